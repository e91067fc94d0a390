"""Which row a token, or a sample, belongs to, where those of all rows lie one behind the other."""

import torch
from torch import Tensor


def row_of(place_T: Tensor, end_R: Tensor) -> Tensor:
    """The first row that ends after each place; empty rows are passed over. May run inside a graph.

    Args:
        place_T: [T] int32.
        end_R: [R] int32, ascending: where each row ends.

    Returns:
        [T] int32; the last row for places behind the end of all.
    """
    return torch.searchsorted(end_R, place_T, right=True, out_int32=True).clamp_(max=end_R.shape[0] - 1)

"""Rows whose tokens, or samples, lie one behind the other: which row one belongs to, and how a recurrence goes through each."""

from collections.abc import Callable

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


def advance_rows(
    advance: Callable[[Tensor, slice, int], Tensor],
    state: Tensor,
    read_line: Tensor,
    write_line: Tensor,
    query_start: Tensor,
    start: Tensor,
    num_stored: Tensor,
    *,
    least: int = 1,
) -> None:
    """Take each row's state from the line that it reads, through the tokens after which it is stored, to the line that it writes,
    and on through the others. It reads lengths on the host: of references, and of operators that are opaque to graphs.

    Args:
        advance: given a state, which of all tokens to take it through, and how many its row has; returns the state after them.
        state: [lines, …].
        read_line, write_line, query_start, start, num_stored: as `stepgraph.layers.recurrent.RecurrentRows` has them.
        least: rows of fewer tokens are left alone.
    """
    borders = query_start.tolist()
    lines = zip(read_line.tolist(), write_line.tolist(), strict=True)
    rows = zip(lines, borders[:-1], borders[1:], start.tolist(), num_stored.tolist(), strict=True)
    for (read, write), begin, end, position, stored in rows:
        if end - begin < least:
            continue
        before = state[read] if position else torch.zeros_like(state[read])
        after = advance(before, slice(begin, begin + stored), end - begin)
        state[write] = after
        advance(after, slice(begin + stored, end), end - begin)


def advance_single_tokens(
    advance: Callable[[Tensor, Tensor], Tensor],
    state: Tensor,
    read_line: Tensor,
    write_line: Tensor,
    query_start: Tensor,
    start: Tensor,
) -> None:
    """`advance_rows` of the rows of one token, all at once.

    Args:
        advance: given states, [S, H, N, D], and of each the token to take it through, [S] int64; returns those after them. It may
            change what it is given.
        state: [lines, H, N, D].
        read_line, write_line, query_start, start: as of `advance_rows`.
    """
    row_S = (query_start.diff() == 1).nonzero().flatten()
    if not len(row_S):
        return
    read_S, write_S, token_S = (x[row_S].long() for x in (read_line, write_line, query_start))
    before_SHND = torch.where((start[row_S] > 0).view(-1, 1, 1, 1), state[read_S], 0)
    state[write_S] = advance(before_SHND, token_S)

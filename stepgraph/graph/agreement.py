"""What ranks that share a model agree on after each has captured a graph by itself: all keep theirs, or all do without."""

from __future__ import annotations

import torch

from stepgraph.errors import CaptureError, DeviceMemoryError, StepgraphError
from stepgraph.parallel.exchange import Exchange

_HAS_IT, _OVER_BUDGET, _NO_MEMORY, _CANNOT = b"+", b"b", b"m", b"x"


def agree(exchange: Exchange, failure: Exception | None, *, lacks_budget: bool = False) -> str | StepgraphError | None:
    """Tell the other ranks what came of this one's try, and hear of theirs.

    Args:
        exchange: between the ranks.
        failure: what the try raised.
        lacks_budget: it came out larger than this rank's budget allows.

    Returns:
        None if all ranks have what they need; which ranks lack the budget, for people; or else what another rank lacks. If that
        is nothing but what this rank lacks, `failure` says so better.
    """
    if failure is None:
        said = _OVER_BUDGET if lacks_budget else _HAS_IT
    else:
        kind = _NO_MEMORY if isinstance(failure, DeviceMemoryError | torch.OutOfMemoryError) else _CANNOT
        said = kind + (str(failure) or repr(failure)).encode()
    all_said = exchange(said)
    for rank, other in enumerate(all_said):
        if other[:1] in (_NO_MEMORY, _CANNOT):
            error = DeviceMemoryError if other[:1] == _NO_MEMORY else CaptureError
            return error(f"rank {rank}: {other[1:].decode()}")
    over = [rank for rank, other in enumerate(all_said) if other == _OVER_BUDGET]
    if not over:
        return None
    return f"rank{'s' * (len(over) > 1)} {', '.join(map(str, over))}" if len(all_said) > 1 else ""

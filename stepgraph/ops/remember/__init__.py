"""Keeping the answers of requests that end, for `stepgraph.ops.lookup` to find in later ones."""

from torch import Tensor

from stepgraph.ops.registry import register
from stepgraph.ops.remember import reference

_remember = register(
    "remember(Tensor(a!) memory, Tensor(b!) keys, Tensor(c!) cursor, Tensor lines, Tensor tokens, Tensor row_slot, "
    "Tensor finished) -> ()",
    {"cpu": reference.remember, "cuda": "stepgraph.ops.remember.triton:remember"},
)


def remember(
    memory: Tensor, keys: Tensor, cursor: Tensor, lines: Tensor, tokens: Tensor, row_slot: Tensor, finished: Tensor
) -> None:
    """Append the answers of the rows that finished to a ring of tokens, in the order of the rows. Runs inside the graph.

    An answer is `tokens[slot, prompt_length:length]`, of which at most the last M // 8 tokens are kept, and -1. It overwrites
    the oldest, wherever that leaves off: what remains of a text is still text. An empty answer writes nothing.

    Args:
        memory: [M] int32, contiguous; -1 throughout at first. Updated.
        keys: [M, 2] int32, contiguous: the line's MEMORY_KEY of the request that each token and separator is from. Updated.
        cursor: [1] int32, where the next answer goes, below M; 0 at first. Updated.
        lines: [slots, LINE_WIDTH] int32.
        tokens: [slots, max_model_len] int32.
        row_slot: [R] int32.
        finished: [R] bool or int32; which rows' requests ended in this step. That of a null slot's row does not matter.
    """
    _remember(memory, keys, cursor, lines, tokens, row_slot, finished)

"""Last stage of a step: write what was sampled into SlotState and into the output ring."""

from torch import Tensor

from stepgraph.ops.commit import reference
from stepgraph.ops.registry import register

_commit = register(
    "commit(Tensor(a!) lines, Tensor(b!) tokens, Tensor(c!) counter, Tensor(d!) ring, Tensor row_slot, "
    "Tensor query_start, Tensor kv_len, Tensor sampled) -> ()",
    cpu=reference.commit,
    fake=lambda *_: None,
    cuda="stepgraph.ops.commit.triton:commit",
    inline_on_cpu=True,
)


def commit(
    lines: Tensor,
    tokens: Tensor,
    counter: Tensor,
    ring: Tensor,
    row_slot: Tensor,
    query_start: Tensor,
    kv_len: Tensor,
    sampled: Tensor,
) -> None:
    """Advance every slot that ran in this step. Runs inside the graph.

    For a row with tokens: `computed = kv_len`. If that reaches the slot's `length`, the row's sample is a new token: it is
    appended to the history, `length` grows by one, and the slot becomes inactive when the token is one of its stop
    tokens (FINISHED_STOP) or `length` reaches `max_length` (FINISHED_LENGTH). A sample of NO_TOKEN is not appended: the
    slot becomes inactive at its old `length` (FINISHED_ERROR). If `computed` stays below `length`, the row was a chunk of a
    prompt and its sample is dropped. A row without tokens changes nothing but reports itself with NO_TOKEN.

    Args:
        lines: [slots, LINE_WIDTH] int32; updated.
        tokens: [slots, max_model_len] int32; updated.
        counter: [1] int32, steps committed so far, modulo `depth`; incremented.
        ring: [depth, max rows, OUTPUT_WIDTH] int32; entry ``counter % depth`` receives (slot, generation, token or
            NO_TOKEN, finish code) for each of the R rows. On CUDA this is pinned host memory.
        row_slot, kv_len: [R] int32.
        query_start: [R + 1] int32.
        sampled: [R] int32, a token or NO_TOKEN.
    """
    _commit(lines, tokens, counter, ring, row_slot, query_start, kv_len, sampled)

"""Verification and commit: which proposals stand, and what was sampled into SlotState and the output ring."""

from torch import Tensor

from stepgraph.ops.commit import reference
from stepgraph.ops.registry import Inlined, register

_commit = register(
    "commit(Tensor(a!) lines, Tensor(b!) tokens, Tensor(c!) counter, Tensor(d!) ring, Tensor row_slot, "
    "Tensor query_start, Tensor kv_len, Tensor sample_start, Tensor sampled, int num_drafts, Tensor? fault=None) -> ()",
    {"cpu": Inlined(reference.commit), "cuda": "stepgraph.ops.commit.triton:commit"},
)


def commit(
    lines: Tensor,
    tokens: Tensor,
    counter: Tensor,
    ring: Tensor,
    row_slot: Tensor,
    query_start: Tensor,
    kv_len: Tensor,
    sample_start: Tensor,
    sampled: Tensor,
    num_drafts: int,
    fault: Tensor | None = None,
) -> None:
    """Advance every slot that ran in this step. Runs inside the graph.

    A row without samples was a chunk of a prompt: `computed = kv_len`, nothing else. Of a row with samples, sample j is what
    follows the history and the row's first j proposals, so it counts while each proposal before it equals the sample in its
    place (*sample and compare*: with point proposals this is rejection sampling, Leviathan et al. 2023, and the tokens are those
    that come without proposals). The samples that count are appended to the history, up to the first that ends the request:
    the slot becomes inactive at a stop token (FINISHED_STOP), when `length` reaches `max_length` (FINISHED_LENGTH), or at a
    sample of NO_TOKEN, which is not appended (FINISHED_ERROR). `length` grows by the appended tokens and `computed` is what lies
    before the last of them: keys and values of proposals that do not stand are beyond it, and will be overwritten.

    Afterwards no slot that ran has proposals. A row without tokens changes nothing but reports itself.

    Args:
        lines: [slots, LINE_WIDTH] int32; updated.
        tokens: [slots, max_model_len] int32; updated. A row's proposals lie there from `length` on.
        counter: [1] int32, steps committed so far, modulo `depth`; incremented.
        ring: [depth, max rows, OUTPUT_WIDTH] int32; entry ``counter % depth`` receives a line for each of the R rows, without
            proposals; see `stepgraph.abi.slot_line`. On CUDA this is pinned host memory.
        row_slot, kv_len: [R] int32.
        query_start, sample_start: [R + 1] int32, see `stepgraph.ops.build`.
        sampled: [S] int32, a token or NO_TOKEN.
        num_drafts: K, the most proposals of a row: it has at most 1 + K samples.
        fault: [1] int32. If it is not zero, what was sampled is worth nothing: all rows are as rows without tokens.
    """
    _commit(lines, tokens, counter, ring, row_slot, query_start, kv_len, sample_start, sampled, num_drafts, fault)

"""Acceptance by decree: replaces what was sampled so that proposals stand, or fall, whatever the logits say.

For tests and measurements: answers are no longer the model's.
"""

from torch import Tensor

from stepgraph.ops.force_acceptance import reference
from stepgraph.ops.registry import Inlined, register

_force_acceptance = register(
    "force_acceptance(Tensor lines, Tensor tokens, Tensor sample_slot, Tensor sample_offset, Tensor sampled, "
    "float probability, int vocab_size) -> Tensor",
    {"cpu": Inlined(reference.force_acceptance), "cuda": "stepgraph.ops.force_acceptance.triton:force_acceptance"},
)


def force_acceptance(
    lines: Tensor,
    tokens: Tensor,
    sample_slot: Tensor,
    sample_offset: Tensor,
    sampled: Tensor,
    probability: float,
    vocab_size: int,
) -> Tensor:
    """Let each proposal stand with this probability, independently. Runs inside the graph, before `commit`.

    Where a sample has a proposal to be compared with, it becomes that proposal, or, if the proposal is to fall, another token.
    The draw is a hash of the request's seed and the position, so the same request meets the same fate in any batch.

    Args:
        lines: [slots, LINE_WIDTH] int32.
        tokens: [slots, max_model_len] int32, proposals behind the history.
        sample_slot, sample_offset, sampled: [S] int32, see `stepgraph.ops.build.StepSamples`.
        probability: 0 … 1.
        vocab_size: of the model; at least 2.

    Returns:
        [S] int32.
    """
    return _force_acceptance(lines, tokens, sample_slot, sample_offset, sampled, probability, vocab_size)

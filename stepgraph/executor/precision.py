"""In which numbers the steps on a CPU compute."""

from __future__ import annotations

from stepgraph.config import EngineConfig
from stepgraph.layers.linear import Linear
from stepgraph.models.language_model import LanguageModel
from stepgraph.ops.packed import EXACT_TOKENS, rounds_to_bfloat16


def exact_tokens(config: EngineConfig) -> int | None:
    """Most tokens of a step that never rounds on a CPU; None if no step may. Steps of rows that would be exact by themselves are
    so with their proposals, too: what is verified is what would be sampled without them."""
    if config.model.dtype == "float32":
        return None
    return max(EXACT_TOKENS, min(EXACT_TOKENS, config.scheduler.max_num_seqs) * (1 + config.speculative.max_drafts))


def describe(model: LanguageModel) -> str:
    """For people: the dtype of weights and activations, and which products are of smaller numbers, on this machine."""
    name = str(model.dtype).removeprefix("torch.")
    linears = (module for module in model.modules() if isinstance(module, Linear))
    limit = max((layer.format.rounds_above for layer in linears if layer.format.rounds_above is not None), default=None)
    if limit is None or not rounds_to_bfloat16():
        return name
    return f"{name}, products in steps of more than {limit} tokens bfloat16"

"""From settings to a drafter."""

from __future__ import annotations

from stepgraph.config import EngineConfig
from stepgraph.models.language_model import LanguageModel
from stepgraph.models.source import ModelSource
from stepgraph.platforms import Platform
from stepgraph.spec.drafter import Drafter
from stepgraph.spec.hybrid import HybridDrafter
from stepgraph.spec.lookup import LookupDrafter
from stepgraph.spec.mtp_checkpoint import load_mtp


def create_drafter(
    config: EngineConfig,
    source: ModelSource,
    model: LanguageModel,
    platform: Platform,
    *,
    max_model_len: int,
    progress: bool = False,
) -> Drafter | None:
    """The drafter that `config` asks for; None if it asks for none.

    Args:
        config: of the engine.
        source: of the model.
        model: filled.
        platform: where it runs.
        max_model_len: longest sequence, in tokens.
        progress: show a bar on stderr.

    Raises:
        ConfigError: the method does not fit the model, or there is no module to draft with.
        ModelError: the module's checkpoint cannot be read.
    """
    settings = config.speculative
    method = settings.speculative_method
    lookup = LookupDrafter(
        min_match=settings.speculative_min_match,
        max_match=settings.speculative_max_match,
        adaptive=method != "ngram",
        memory_tokens=0 if method == "ngram" else settings.speculative_memory_tokens,
        device=platform.device,
    )
    if method in ("ngram", "suffix"):
        return lookup
    if method == "none":
        return None
    mtp = load_mtp(config, source, model, platform, max_model_len=max_model_len, progress=progress)
    return mtp if method == "mtp" else HybridDrafter(lookup, mtp, settings.speculative_hybrid_match)

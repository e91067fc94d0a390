"""What is known of a model that transformers runs. Apart from the model itself, which takes seconds to import."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from stepgraph.layers.inputs import AttentionSpec


@dataclass(frozen=True)
class TransformersConfig:
    """Sizes of a model that transformers runs, see `LanguageModelConfig`; made by `transformers_model.judge`."""

    architecture: str
    vocab_size: int
    hidden_size: int
    attention_specs: tuple[AttentionSpec, ...]
    """Of every call of attention, in the order in which they are made."""
    has_biased_keys: bool
    """Whether cached keys hold what is added to their scores."""
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    media_token_ids: tuple[int, ...]
    num_parameters: int
    hf_config: Any = field(repr=False)

    @property
    def num_layers(self) -> int:
        """As many as attend; of a class that runs layers several times, so many times."""
        return len(self.attention_specs)

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
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int, ...]
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    media_token_ids: tuple[int, ...]
    num_parameters: int
    hf_config: Any = field(repr=False)

    @property
    def attention_specs(self) -> tuple[AttentionSpec, ...]:
        """Of every layer."""
        return tuple(
            AttentionSpec(self.num_heads, self.num_kv_heads, self.head_dim, self.head_dim, window)
            for window in self.windows
        )

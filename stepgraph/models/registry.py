"""Which class runs which architecture."""

from __future__ import annotations

from typing import Any

from stepgraph.errors import ModelError
from stepgraph.models.config import DecoderConfig, architecture_of, check_supported
from stepgraph.models.decoder import Decoder
from stepgraph.models.llama import Llama
from stepgraph.models.qwen2 import Qwen2
from stepgraph.models.qwen3 import Qwen3

ARCHITECTURES: dict[str, type[Decoder]] = {
    "LlamaForCausalLM": Llama,
    "MistralForCausalLM": Llama,
    "Qwen2ForCausalLM": Qwen2,
    "Qwen3ForCausalLM": Qwen3,
}
"""Native models by the class name of their transformers counterpart."""


def read_config(hf_config: Any) -> DecoderConfig:
    """Turn a transformers config into a native one.

    Raises:
        ModelError: no native model runs this architecture, or the model uses something unsupported.
    """
    check_supported(hf_config)  # first: "a mixture of experts" helps more than "unknown architecture"
    architecture = architecture_of(hf_config)
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"No native model runs the architecture {architecture}; there are {', '.join(ARCHITECTURES)}. "
            "docs/adding-a-model.md shows how to add one."
        )
    return ARCHITECTURES[architecture].config_from_hf(hf_config)

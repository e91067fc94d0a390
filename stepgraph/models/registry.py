"""Which class runs which architecture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stepgraph.errors import ModelError
from stepgraph.models.config import DecoderConfig, architecture_of, check_supported
from stepgraph.models.decoder import Decoder
from stepgraph.models.ernie4_5 import Ernie45
from stepgraph.models.gemma3 import Gemma3
from stepgraph.models.granite import Granite
from stepgraph.models.language_model import LanguageModelConfig
from stepgraph.models.llama import Llama
from stepgraph.models.phi3 import Phi3
from stepgraph.models.qwen2 import Qwen2
from stepgraph.models.qwen3 import Qwen3
from stepgraph.models.smollm3 import SmolLM3

ARCHITECTURES: dict[str, type[Decoder]] = {
    "LlamaForCausalLM": Llama,
    "MistralForCausalLM": Llama,
    "MinistralForCausalLM": Llama,
    "Qwen2ForCausalLM": Qwen2,
    "Qwen3ForCausalLM": Qwen3,
    "MiMoForCausalLM": Qwen2,
    "Ernie4_5ForCausalLM": Ernie45,
    "Gemma3ForCausalLM": Gemma3,
    "GraniteForCausalLM": Granite,
    "Phi3ForCausalLM": Phi3,
    "SmolLM3ForCausalLM": SmolLM3,
}
"""Native models by the class name of their counterpart in transformers, or, for MiMo, in code that comes with the checkpoint."""


def choose_config(hf_config: Any, model_impl: str = "auto") -> LanguageModelConfig:
    """Turn a transformers config into that of the implementation which will run the model.

    Args:
        hf_config: config object.
        model_impl: "native", "transformers", or "auto": native if a native model runs the architecture.

    Raises:
        ModelError: the model uses something that the implementation does not support.
    """
    if model_impl == "transformers" or (model_impl == "auto" and architecture_of(hf_config) not in ARCHITECTURES):
        from stepgraph.models.transformers_model import judge

        with _telling_of_odd_fields():
            return judge(hf_config)
    try:
        return read_config(hf_config)
    except ModelError as error:
        if model_impl == "native":
            raise
        raise ModelError(f"{error} Or set model_impl to transformers, to try transformers' own code.") from error


def read_config(hf_config: Any) -> DecoderConfig:
    """Turn a transformers config into a native one.

    Raises:
        ModelError: no native model runs this architecture, or the model uses something unsupported.
    """
    with _telling_of_odd_fields():
        check_supported(hf_config)  # first: "a mixture of experts" helps more than "unknown architecture"
    architecture = architecture_of(hf_config)
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"No native model runs the architecture {architecture}; there are {', '.join(ARCHITECTURES)}. "
            "Set model_impl to auto to run transformers' own code, or add one: see docs/adding-a-model.md."
        )
    with _telling_of_odd_fields():
        return ARCHITECTURES[architecture].config_from_hf(hf_config)


@contextmanager
def _telling_of_odd_fields() -> Iterator[None]:
    """A field of a config may hold anything: what fails inside on its type is a ModelError."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"The model's config cannot be used: {error!r:.500}; a field is missing, of the wrong type or far out of range."
        ) from error

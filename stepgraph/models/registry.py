"""Which class runs which architecture."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from stepgraph.errors import ModelError
from stepgraph.models.bamba import Bamba
from stepgraph.models.config import (
    ConfigFileError,
    DecoderConfig,
    architecture_of,
    check_mixtures,
    check_quantization,
    check_supported,
)
from stepgraph.models.decoder import Decoder
from stepgraph.models.deepseek import DeepseekV2, DeepseekV3
from stepgraph.models.dots1 import Dots1
from stepgraph.models.ernie4_5 import Ernie45
from stepgraph.models.ernie4_5_moe import Ernie45Moe
from stepgraph.models.falcon_h1 import FalconH1
from stepgraph.models.gemma2 import Gemma2, VaultGemma
from stepgraph.models.gemma3 import Gemma3
from stepgraph.models.gemma4 import Gemma4
from stepgraph.models.glm4_moe import Glm4Moe
from stepgraph.models.glm4_moe_lite import Glm4MoeLite
from stepgraph.models.gpt_oss import GptOss
from stepgraph.models.granite import Granite, GraniteMoe, GraniteMoeSWA, GraniteSWA
from stepgraph.models.granite_hybrid import GraniteHybrid
from stepgraph.models.hf_config import hf_config_from_json
from stepgraph.models.language_model import LanguageModelConfig
from stepgraph.models.lfm2 import Lfm2, Lfm2Moe
from stepgraph.models.llama import Llama
from stepgraph.models.minicpm import MiniCPM
from stepgraph.models.minicpm3 import MiniCPM3
from stepgraph.models.ministral3 import Ministral3
from stepgraph.models.mixtral import Mixtral
from stepgraph.models.nemotron_h import NemotronH
from stepgraph.models.olmo_hybrid import OlmoHybrid
from stepgraph.models.phi3 import Phi3
from stepgraph.models.qwen2 import Qwen2
from stepgraph.models.qwen2_moe import Qwen2Moe
from stepgraph.models.qwen3 import Qwen3
from stepgraph.models.qwen3_moe import Qwen3Moe
from stepgraph.models.qwen3_next import Qwen3Next, Qwen35, Qwen35Moe
from stepgraph.models.seed_oss import SeedOss
from stepgraph.models.smollm3 import SmolLM3
from stepgraph.models.text_part import alone, is_multimodal, media_token_ids
from stepgraph.models.youtu import Youtu

logger = logging.getLogger(__name__)

ARCHITECTURES: dict[str, type[Decoder]] = {
    "LlamaForCausalLM": Llama,
    "LLaMAForCausalLM": Llama,
    "MistralForCausalLM": Llama,
    "MinistralForCausalLM": Llama,
    "Ministral3ForCausalLM": Ministral3,
    "AquilaForCausalLM": Llama,
    "AquilaModel": Llama,
    "CwmForCausalLM": Llama,
    "ExaoneForCausalLM": Llama,
    "InternLMForCausalLM": Llama,
    "InternLM3ForCausalLM": Llama,
    "IQuestCoderForCausalLM": Llama,
    "TeleChat3ForCausalLM": Llama,
    "XverseForCausalLM": Llama,
    "Qwen2ForCausalLM": Qwen2,
    "Qwen3ForCausalLM": Qwen3,
    "Qwen3MoeForCausalLM": Qwen3Moe,
    "Qwen3NextForCausalLM": Qwen3Next,
    "Qwen3_5ForCausalLM": Qwen35,
    "Qwen3_5MoeForCausalLM": Qwen35Moe,
    "MiMoForCausalLM": Qwen2,
    "MixtralForCausalLM": Mixtral,
    "Qwen2MoeForCausalLM": Qwen2Moe,
    "BambaForCausalLM": Bamba,
    "DeepseekV2ForCausalLM": DeepseekV2,
    "DeepseekV3ForCausalLM": DeepseekV3,
    "Dots1ForCausalLM": Dots1,
    "Ernie4_5ForCausalLM": Ernie45,
    "Ernie4_5_MoeForCausalLM": Ernie45Moe,
    "FalconH1ForCausalLM": FalconH1,
    "Gemma2ForCausalLM": Gemma2,
    "VaultGemmaForCausalLM": VaultGemma,
    "Gemma3ForCausalLM": Gemma3,
    "Gemma4ForCausalLM": Gemma4,
    "Gemma4UnifiedForCausalLM": Gemma4,
    "Glm4MoeForCausalLM": Glm4Moe,
    "Glm4MoeLiteForCausalLM": Glm4MoeLite,
    "GptOssForCausalLM": GptOss,
    "GraniteForCausalLM": Granite,
    "GraniteMoeForCausalLM": GraniteMoe,
    "GraniteMoeHybridForCausalLM": GraniteHybrid,
    "GraniteSWAForCausalLM": GraniteSWA,
    "GraniteMoeSWAForCausalLM": GraniteMoeSWA,
    "Lfm2ForCausalLM": Lfm2,
    "Lfm2MoeForCausalLM": Lfm2Moe,
    "MiniCPMForCausalLM": MiniCPM,
    "MiniCPM3ForCausalLM": MiniCPM3,
    "NemotronHForCausalLM": NemotronH,
    "OlmoHybridForCausalLM": OlmoHybrid,
    "Phi3ForCausalLM": Phi3,
    "SeedOssForCausalLM": SeedOss,
    "SmolLM3ForCausalLM": SmolLM3,
    "YoutuForCausalLM": Youtu,
}
"""Native models by the class name that their checkpoints give: of transformers or, where it has none, of their makers' code
(`stepgraph.models.alike`)."""


def choose_config(hf_config: Any, model_impl: str, path: Path) -> LanguageModelConfig:
    """Turn a config object into that of the implementation which will run the model.

    Args:
        hf_config: from `hf_config_from_json`. Of a multimodal model, its decoder runs.
        model_impl: "native", "transformers", or "auto": native if a native model runs the architecture.
        path: of the config.json, from which transformers' own object is read where a refusal of the native model depends on it.

    Raises:
        ModelError: the model uses something that the implementation does not support.
    """
    if not hf_config.architectures:
        raise _without_class(hf_config)
    native = alone(hf_config) if is_multimodal(hf_config) else hf_config
    has_native = bool(native.architectures) and architecture_of(native) in ARCHITECTURES
    if model_impl == "transformers" or (model_impl == "auto" and not has_native):
        return _judge(hf_config)
    try:
        return replace(read_config(native), media_token_ids=media_token_ids(hf_config))
    except ModelError as error:
        if isinstance(error, ConfigFileError) or not _runs_through_transformers(path):
            raise
        raise ModelError(f"{error} Or set model_impl to transformers, whose own code runs this model.") from error


def _without_class(hf_config: Any) -> ModelError:
    """For a config that names no class: with the class that would run, if there is one."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    class_name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(hf_config.model_type)
    told = (
        'The model\'s config.json has no "architectures", so its class is unknown, and of its type, '
        f'"{hf_config.model_type}", '
    )
    if class_name is not None:
        named = copy.deepcopy(hf_config)
        named.architectures = [class_name]
        with suppress(ModelError):
            (read_config if class_name in ARCHITECTURES else _judge)(named)
            return ModelError(f'{told}{class_name} writes text. Add "architectures": ["{class_name}"].')
    return ModelError(
        f"{told}no class runs here. What runs are native models and classes of transformers that write text."
    )


def _judge(hf_config: Any) -> LanguageModelConfig:
    from stepgraph.models.transformers_model import judge

    with _telling_of_odd_fields():
        return judge(hf_config)


def _runs_through_transformers(path: Path) -> bool:
    """Whether it is good advice to set model_impl to transformers."""
    try:
        hf_config = hf_config_from_json(path, for_transformers=True)
        if getattr(hf_config, "quantization_config", None):  # known without a trial, which takes seconds
            return False
        _judge(hf_config)
    except ModelError:
        return False
    return True


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
            "To add one, see docs/adding-a-model.md."
        )
    with _telling_of_odd_fields():
        config = ARCHITECTURES[architecture].config_from_hf(hf_config)
        check_mixtures(config)
    check_quantization(hf_config)  # last: of a model that cannot run, no other checkpoint does
    return config


@contextmanager
def _telling_of_odd_fields() -> Iterator[None]:
    """A field of a config may hold anything: what fails inside on its type is a ModelError."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        logger.debug("the config is unusable", exc_info=error)
        missing = (
            error.name if isinstance(error, AttributeError) else error.args[0] if type(error) is KeyError else None
        )
        odd = f'it has no "{missing}"' if missing else "a field is missing, of the wrong type or far out of range"
        raise ModelError(f"The model's config.json cannot be used: {odd}. Download it again.") from error

"""Which model runs, in what precision."""

from __future__ import annotations

from dataclasses import dataclass

from stepgraph.config.fields import check, setting
from stepgraph.devices import check_device
from stepgraph.errors import ConfigError

_QUANTIZATIONS = ("auto", "fp8", "int4", "none", None)


@dataclass(frozen=True)
class ModelConfig:
    """Which model runs, in what precision, over how long a context."""

    model: str = setting("smollm2", "model: smollm2, a .gguf file, a Hugging Face folder or hub name, or a named shape")
    dtype: str = setting(
        "auto",
        "weights and activations; auto is float32 on CPU and bfloat16 on CUDA",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantization: str | None = setting(
        "auto",
        "the layers' matrices: as the checkpoint has them (auto; a GGUF's blocks where there are kernels for them), with 8 bits "
        "a weight (fp8) or 4 (int4), made as they are read, or with 16 or 32, as dtype says, whatever the checkpoint has (none)",
        metavar="auto|fp8|int4|none",
    )
    load_format: str = setting("auto", "dummy gives random weights, for benchmarks", choices=("auto", "dummy"))
    model_impl: str = setting(
        "auto",
        "whose code runs the layers: native, transformers, or auto, which is native where there is a native model",
        choices=("auto", "native", "transformers"),
    )
    max_model_len: int | None = setting(None, "tokens of prompt and answer together; default: the model's", minimum=2)
    seed: int = setting(
        0, "seed of everything random: dummy weights and requests without a seed of their own", minimum=-(2**63)
    )
    device: str = setting(
        "auto",
        "auto (CUDA if there is one), cpu, cuda, or the name of a platform that an installed package brings; "
        "`stepgraph env` lists those",
        metavar="auto|cpu|cuda|NAME",
    )
    deterministic: bool = setting(
        False, "a request's tokens are bit for bit the same alone, in any batch and however its prompt is cut; slower"
    )

    def __post_init__(self) -> None:
        check(self)
        check_device(self.device)
        if self.seed < 0:  # as in requests: the 64 bits it has
            object.__setattr__(self, "seed", self.seed + 2**64)
        if self.quantization not in _QUANTIZATIONS:
            raise ConfigError(
                f"quantization={self.quantization!r} is none of auto, fp8, int4 and none. How a checkpoint is quantised (AWQ, "
                "GPTQ, …) is read from it: leave it at auto. fp8 and int4 quantise one of 16 or 32 bits as it is read"
            )

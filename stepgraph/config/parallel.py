"""How many devices run the steps of an engine, and what each of them has."""

from __future__ import annotations

from dataclasses import dataclass

from stepgraph.config.fields import check, setting
from stepgraph.errors import ConfigError


@dataclass(frozen=True)
class ParallelConfig:
    """Devices that run every step together, each with a part of the weights and of the keys and values."""

    tensor_parallel_size: int = setting(
        1, "devices of this machine that share the model, one process for each; on CPU, so many processes", minimum=1
    )
    data_parallel_size: int = setting(
        1,
        "with --enable-expert-parallel: devices of one engine that share its experts, each with all other weights and with "
        "requests of its own. Without: engines behind a server, each with a whole model and devices (on a CPU: cores) of its "
        "own; a request goes where its prefix is cached, and by load",
        minimum=1,
    )
    enable_expert_parallel: bool = setting(
        False, "devices that share a model have some of its experts each, whole, instead of a part of every one"
    )
    expert_parallel_mixed: str = setting(
        "on",
        "how tokens come to the experts of a model that has some: as is fastest for the number of tokens of each step (on), or "
        "one way for all steps (off)",
        choices=("on", "off"),
    )

    def __post_init__(self) -> None:
        check(self)
        ranks = self.data_parallel_size
        if ranks > 1 and not self.enable_expert_parallel:
            raise ConfigError(
                f"data_parallel_size={ranks} without enable_expert_parallel gives independent replicas, which only `stepgraph "
                "serve` starts; add enable_expert_parallel if one engine is to have so many devices, or leave it out",
                param="data_parallel_size",
            )
        if ranks > 1 and self.tensor_parallel_size > 1:
            raise ConfigError(
                f"tensor_parallel_size={self.tensor_parallel_size} and data_parallel_size={ranks} with enable_expert_parallel do "
                "not go together: either devices share the layers that are no experts, or each has them whole; leave one at 1",
                param="tensor_parallel_size",
            )

    @property
    def num_ranks(self) -> int:
        """Devices of one engine."""
        return self.tensor_parallel_size * self.data_parallel_size

    @property
    def size_setting(self) -> str:
        """The setting that says how many they are, for people: `tensor_parallel_size=2`."""
        name = "tensor_parallel_size" if self.data_parallel_size == 1 else "data_parallel_size"
        return f"{name}={self.num_ranks}"

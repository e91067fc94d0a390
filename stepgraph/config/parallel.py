"""How many devices share the model."""

from __future__ import annotations

from dataclasses import dataclass

from stepgraph.config.fields import check, setting


@dataclass(frozen=True)
class ParallelConfig:
    """Devices that run every step together, each with a part of the weights and of the keys and values."""

    tensor_parallel_size: int = setting(
        1, "devices of this machine that share the model, one process for each; on CPU, so many processes", minimum=1
    )
    enable_expert_parallel: bool = setting(
        False, "let each of these devices have some of the experts, whole, instead of a part of every one"
    )
    expert_parallel_mixed: str = setting(
        "on",
        "how tokens come to the experts of a model that has some: as is fastest for the number of tokens of each step (on), or "
        "one way for all steps (off)",
        choices=("on", "off"),
    )

    def __post_init__(self) -> None:
        check(self)

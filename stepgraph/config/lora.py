"""How many LoRA adapters are kept, and how large."""

from __future__ import annotations

from dataclasses import dataclass

from stepgraph.config.fields import check, setting


@dataclass(frozen=True)
class LoRAConfig:
    """LoRA adapters, one per request."""

    enable_lora: bool = setting(False, "let each request name a LoRA adapter; all of them share steps and graphs")
    max_loras: int = setting(4, "different adapters that unfinished requests can use at once", minimum=1)
    max_lora_rank: int = setting(16, "largest rank of an adapter; memory for it is reserved", minimum=1)

    def __post_init__(self) -> None:
        check(self)

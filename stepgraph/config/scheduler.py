"""How much work one step takes on, and which requests get it."""

from __future__ import annotations

from dataclasses import dataclass

from stepgraph.config.fields import check, setting
from stepgraph.errors import ConfigError


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of one step, and when prompts enter."""

    max_num_seqs: int = setting(64, "requests that run at the same time", minimum=1)
    max_num_batched_tokens: int = setting(2048, "tokens of one step, prompts and decodes together", minimum=1)
    max_num_partial_prefills: int = setting(
        1, "prompts that may be computed in part at the same time; they share the step's tokens", minimum=1
    )
    max_long_partial_prefills: int = setting(
        1, "of these, prompts that count as long; shorter prompts may overtake a long one that waits", minimum=1
    )
    long_prefill_token_threshold: int = setting(0, "prompts of more tokens count as long; 0: no prompt does", minimum=0)
    insertion_policy: str = setting(
        "dynamic",
        "prompts enter the next step that has room (dynamic), or wait for each other to enter together (gather)",
        choices=("dynamic", "gather"),
    )
    prefill_gather_size: int = setting(4, "with gather: prompts that enter together", minimum=1)
    prefill_gather_ms: float = setting(
        50.0, "with gather: milliseconds after the last arrival until prompts enter however few they are", minimum=0
    )

    def __post_init__(self) -> None:
        check(self)
        if self.max_num_seqs > 1024:
            raise ConfigError(f"max_num_seqs={self.max_num_seqs} is above 1024, the most rows a step can hold")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is below max_num_seqs={self.max_num_seqs}, so a "
                "step could not give every running request a token; raise the first or lower the second"
            )

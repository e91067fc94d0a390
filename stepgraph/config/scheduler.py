"""How much work one step takes on."""

from __future__ import annotations

from dataclasses import dataclass

from stepgraph.config.fields import check, setting
from stepgraph.errors import ConfigError


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of one step."""

    max_num_seqs: int = setting(64, "requests that run at the same time", minimum=1)
    max_num_batched_tokens: int = setting(2048, "tokens of one step, prompts and decodes together", minimum=1)

    def __post_init__(self) -> None:
        check(self)
        if self.max_num_seqs > 1024:
            raise ConfigError(f"max_num_seqs={self.max_num_seqs} is above 1024, the most rows a step can hold")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is below max_num_seqs={self.max_num_seqs}, so a "
                "step could not give every running request a token; raise the first or lower the second"
            )

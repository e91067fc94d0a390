"""Who proposes tokens for the next step to verify, and how many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stepgraph.config.fields import check, setting
from stepgraph.errors import ConfigError

MAX_DRAFTS = 8
"""Most tokens that may be proposed for a request in one step."""

_DEFAULT_DRAFTS = {"mtp": 3, "suffix": 7, "ngram": 5, "hybrid": 5}
"""Of suffix 7, for rows of 8 tokens: sizes, tiles and panels are powers of two, and 9 tokens cost twice as much on CPU."""


@dataclass(frozen=True)
class SpeculativeConfig:
    """Speculative decoding. Answers are those that come without it."""

    speculative_method: str = setting(
        "none",
        "who proposes: a trained module (mtp), what followed the longest match in the history and in earlier answers (suffix), "
        "in the history alone (ngram), suffix where the match is long and mtp elsewhere (hybrid), or nobody (none)",
        choices=("none", "mtp", "suffix", "ngram", "hybrid"),
    )
    num_speculative_tokens: int | None = setting(
        None,
        f"most proposals per request and step, 1 to {MAX_DRAFTS}; default: "
        + ", ".join(f"{method} {count}" for method, count in _DEFAULT_DRAFTS.items()),
        minimum=1,
    )
    speculative_model: str | None = setting(
        None,
        "checkpoint that holds the mtp module; default: the model's own, or the one that ships with it",
        metavar="MODEL",
    )
    speculative_adaptive: bool = setting(
        True,
        "propose fewer tokens, or none, while that is faster by the measured cost and acceptance; off: always as many as allowed",
    )
    speculative_min_match: int = setting(
        2, "suffix, ngram, hybrid: tokens that must match before anything is proposed", minimum=1
    )
    speculative_max_match: int = setting(
        32, "suffix, ngram, hybrid: tokens up to which a longer match is a better one", minimum=1
    )
    speculative_memory_tokens: int = setting(
        65536, "suffix, hybrid: tokens of earlier answers, of all requests, that are searched too; 0: none", minimum=0
    )
    speculative_hybrid_match: int = setting(
        6, "hybrid: tokens that must match for suffix to be preferred over mtp", minimum=1
    )
    speculative_acceptance: float | None = setting(
        None,
        "for tests and measurements: each proposal stands with this probability, whatever the model says; answers are wrong then",
        minimum=0,
    )

    def __post_init__(self) -> None:
        check(self)
        if (self.num_speculative_tokens or 0) > MAX_DRAFTS:
            raise ConfigError(
                f"num_speculative_tokens={self.num_speculative_tokens} is above {MAX_DRAFTS}, the most a step verifies"
            )
        if self.speculative_min_match > self.speculative_max_match:
            raise ConfigError(
                f"speculative_min_match={self.speculative_min_match} is above "
                f"speculative_max_match={self.speculative_max_match}; lower the first or raise the second"
            )
        if (self.speculative_acceptance or 0) > 1:
            raise ConfigError(f"speculative_acceptance={self.speculative_acceptance} is a probability; give 0 to 1")

    @property
    def max_drafts(self) -> int:
        """K: most proposals per request and step; 0 without speculation."""
        if self.speculative_method == "none":
            return 0
        return self.num_speculative_tokens or _DEFAULT_DRAFTS[self.speculative_method]

    def __str__(self) -> str:
        """In the words of a log: the method, and how many proposals it makes."""
        if self.speculative_method == "none":
            return self.speculative_method
        depth = "adaptive" if self.speculative_adaptive else "not adaptive"
        return f"{self.speculative_method}, up to {self.max_drafts} proposals, {depth}"


def check_method_is_named(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError if settings say how proposals are made, and not by whom: older versions of vLLM took it from the model.

    Args:
        settings: those of all parts that were given, by their names.
    """
    given = [name for name in SpeculativeConfig.__dataclass_fields__ if settings.get(name) is not None]
    if given and "speculative_method" not in settings:
        raise ConfigError(
            f"{given[0]}={settings[given[0]]!r} has no effect without speculative_method; choose one of: mtp, suffix, ngram, "
            "hybrid"
        )


def check_speculative_keys(given: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise ConfigError if keys of ``--speculative-config`` name no method."""
    if given and "speculative_method" not in settings:
        raise ConfigError('speculative_config names no "method"; choose one of: none, mtp, suffix, ngram, hybrid')

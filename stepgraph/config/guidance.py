"""How answers of a prescribed form are written."""

from __future__ import annotations

from dataclasses import dataclass

from stepgraph.config.fields import check, setting


@dataclass(frozen=True)
class GuidanceConfig:
    """Structured outputs."""

    disable_any_whitespace: bool = setting(
        False, "write the JSON of structured outputs without line breaks and indentation, whatever the requests say"
    )

    def __post_init__(self) -> None:
        check(self)

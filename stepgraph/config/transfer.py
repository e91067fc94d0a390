"""What an engine does of a request, where others do the rest."""

from __future__ import annotations

from dataclasses import dataclass

from stepgraph.config.fields import check, setting


@dataclass(frozen=True)
class TransferConfig:
    """Keys and values that go from one engine to another."""

    splitwise_role: str = setting(
        "mixed",
        "what the engine does of a request: all of it (mixed), its prompt up to the first token, with a sign from every layer "
        "when its keys and values are there, for those who take them (prefill), or what follows (decode)",
        choices=("mixed", "prefill", "decode"),
    )

    def __post_init__(self) -> None:
        check(self)

    @property
    def signals_layers(self) -> bool:
        """Whether graphs say, layer by layer, that keys and values are in the cache."""
        return self.splitwise_role == "prefill"

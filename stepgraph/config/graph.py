"""Which steps are captured, when, and into how much memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stepgraph.config.fields import check, setting
from stepgraph.errors import ConfigError


@dataclass(frozen=True)
class GraphConfig:
    """Which steps are captured, when, and into how much memory."""

    graph_backend: str = setting(
        "auto",
        "how steps are captured: CUDA graphs, recorded torch operators (cpu), or not at all (eager); auto is "
        "cuda on CUDA, cpu on CPU, and else what the platform brings",
        choices=("auto", "cuda", "cpu", "eager"),
    )
    capture: str = setting(
        "auto",
        "capture each graph at its first use (lazy) or before the first request (all); auto is all on CUDA, lazy on CPU",
        choices=("auto", "lazy", "all"),
    )
    capture_sizes: tuple[int, ...] | None = setting(None, "token counts to capture; default: chosen", minimum=1)
    capture_rows: tuple[int, ...] | None = setting(None, "row counts to capture; default: chosen", minimum=1)
    max_capture_size: int | None = setting(
        None, "largest captured token count; default: max_num_batched_tokens", minimum=1
    )
    cudagraph_only_prefill: bool = setting(False, "capture steps that only prefill; steps that decode run eagerly")
    max_prefill_capture_size: int | None = setting(
        None,
        "most tokens of a step that only prefills for it to run in a graph; those of more run eagerly; default: no limit",
        minimum=1,
    )
    graph_memory_mib: int | None = setting(None, "memory that captured graphs may take; default: no limit", minimum=1)
    capture_context_len: int | None = setting(
        None, "context length of the trial run if all graphs are captured at start; default: max_model_len", minimum=1
    )
    capture_warmups: int = setting(1, "runs before each capture", minimum=1)

    def __post_init__(self) -> None:
        check(self)

    def eager_steps(self) -> str | None:
        """In the words of a log: which steps run without a graph by these settings, though others run in one; None if none do."""
        if self.graph_backend == "eager":
            return None
        steps = ["those that decode (cudagraph_only_prefill)"] if self.cudagraph_only_prefill else []
        if (most := self.max_prefill_capture_size) is not None:
            steps.append(f"those that only prefill, more than {most} tokens (max_prefill_capture_size)")
        return " and ".join(steps) or None


def check_graph_keys(given: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise ConfigError if keys of ``--graph-optimization-config`` ask for graphs and for none."""
    if given.get("use_cudagraph") is True and settings.get("graph_backend") == "eager":
        raise ConfigError("use_cudagraph=True contradicts graph_backend='eager' given beside it")

"""Which steps are captured, when, and into how much memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from stepgraph.config.fields import check, read_object, setting
from stepgraph.errors import ConfigError


@dataclass(frozen=True)
class GraphConfig:
    """Which steps are captured, when, and into how much memory."""

    graph_backend: str = setting(
        "auto",
        "how steps are captured: CUDA graphs, recorded torch operators (cpu), or not at all (eager); auto is "
        "cuda on CUDA and cpu on CPU",
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
        "most tokens of a step that prefills and does not decode for it to run in a graph; larger ones run eagerly; default: no limit",
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


_RENAMED = {
    "cudagraph_capture_sizes": "capture_sizes",
    "max_capture_size": "max_capture_size",
    "max_capture_shape_prefill": "max_prefill_capture_size",
    "cudagraph_only_prefill": "cudagraph_only_prefill",
    "cudagraph_num_of_warmups": "capture_warmups",
    "expected_decode_len": "capture_context_len",
}

_FIXED: dict[str, tuple[Any, str]] = {
    "graph_opt_level": (
        0,
        "there is no second, compiled form of the model to choose; levels 1 and 2 do not exist here",
    ),
    "full_cuda_graph": (True, "a graph always holds the whole step, attention included; there are no piecewise graphs"),
    "use_unique_memory_pool": (True, "all graphs share one memory pool; separate pools would only cost memory"),
    "draft_model_use_cudagraph": (True, "drafting is part of the step's graph and cannot leave it"),
    "cudagraph_copy_inputs": (False, "inputs live in buffers with fixed addresses, so there is nothing to copy"),
    "cudagraph_splitting_ops": ([], "a graph always holds the whole step and is not split at operators"),
    "sot_warmup_sizes": ([], "there is no symbolic tracer to warm up"),
}
"""Keys whose effect is always on: the value that says so is accepted, any other refused with the reason."""

_REFUSED = {
    "real_shape_to_captured_size": "the map follows from capture_sizes and cannot be set",
    "real_bsz_to_captured_size": "the map follows from capture_sizes and capture_rows and cannot be set",
    "flag_cudagraph_replay": "whether a step replays a graph is decided and recorded per step",
    "cudagraph_capture_sizes_prefill": "prefill and decode share one family of graphs; add the sizes to "
    "cudagraph_capture_sizes",
}


def graph_config_from_json(text: str | dict[str, Any]) -> dict[str, Any]:
    """Settings of `GraphConfig` from the JSON of ``--graph-optimization-config``.

    Accepts FastDeploy's keys beside our own. Every key has its stated effect or is refused with the reason.

    Returns:
        Keyword arguments for `GraphConfig`.

    Raises:
        ConfigError: malformed JSON, an unknown key, or a key whose value asks for something that does not exist here.
    """
    given = read_object("graph_optimization_config", text, '{"use_cudagraph": true}')
    own = set(GraphConfig.__dataclass_fields__)
    settings: dict[str, Any] = {}
    for key, value in given.items():
        if key == "use_cudagraph":
            if not isinstance(value, bool):
                raise ConfigError(f"use_cudagraph={value!r} must be true or false")
        elif (name := _RENAMED.get(key, key)) in own:
            value = tuple(value) if isinstance(value, list) else value
            if settings.setdefault(name, value) != value:
                raise ConfigError(f"{key}={value!r} contradicts {name}={settings[name]!r} given beside it")
        elif key in _FIXED:
            allowed, reason = _FIXED[key]
            if value != allowed or isinstance(value, bool) != isinstance(allowed, bool):
                raise ConfigError(f"{key}={json.dumps(value)} is not available: {reason}; use {json.dumps(allowed)}")
        elif key in _REFUSED:
            raise ConfigError(f"{key} cannot be set: {_REFUSED[key]}")
        else:
            known = sorted({"use_cudagraph", *_RENAMED, *_FIXED, *own})
            raise ConfigError(f"graph_optimization_config has no key {key!r}; known keys: {', '.join(known)}")
    if "use_cudagraph" in given:
        off, backend = not given["use_cudagraph"], settings.get("graph_backend")
        if backend is not None and off != (backend == "eager"):
            raise ConfigError(f"use_cudagraph={not off} contradicts graph_backend={backend!r} given beside it")
        if off:
            settings["graph_backend"] = "eager"
    return settings

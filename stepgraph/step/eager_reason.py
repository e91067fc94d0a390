"""Why a step ran without a graph."""

from __future__ import annotations

from enum import StrEnum


class EagerReason(StrEnum):
    """Why a step left the graph. Closed: a step that ran eagerly has one of these."""

    GRAPHS_OFF = "graphs_off"  # graph_backend=eager
    NOT_PURE_PREFILL = "not_pure_prefill"  # cudagraph_only_prefill, and the step decodes
    LONG_PREFILL = "long_prefill"  # max_prefill_capture_size, and the step prefills more tokens and decodes nothing
    MEMORY_BUDGET = "memory_budget"  # no captured graph fits and graph_memory_mib is used up
    CAPTURE_FAILED = "capture_failed"  # no captured graph fits and capturing one failed while serving; the log says why

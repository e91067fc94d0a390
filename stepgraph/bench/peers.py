"""Figures to compare with: what another engine took for the same work on the same kind of machine, and what we aim for.

They are in `peers.json`: a table for each kind of device and number of ranks, with its source; in it figures by the name of a
shape, of a workload and of a figure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class Mark:
    """One figure of a workload, in the unit of ours; None where nobody measured it, or nobody aims."""

    peer: float | None = None
    target: float | None = None


@dataclass(frozen=True)
class Peers:
    """What is known for one shape on devices of one kind; nothing for others."""

    source: str
    """Who measured how; empty if nothing is known."""
    figures: Mapping[str, Mapping[str, Mark]]
    """By workload, then by figure."""

    def mark(self, workload: str, figure: str) -> Mark:
        """Of a figure; an empty one if there is none."""
        return self.figures.get(workload, {}).get(figure, Mark())


def load_peers(shape: str, device: str, tensor_parallel_size: int) -> Peers:
    """Figures for a named shape, shared by so many devices of this name."""
    for table in json.loads((files("stepgraph.bench") / "peers.json").read_text())["tables"]:
        known = (table["device"], table["tensor_parallel_size"]) == (device, tensor_parallel_size)
        if known and (workloads := table["shapes"].get(shape)):
            return Peers(
                f"peer: {table['source']}",
                {name: {figure: Mark(**mark) for figure, mark in marks.items()} for name, marks in workloads.items()},
            )
    return Peers("", {})


def mark_cells(mark: Mark, form: str) -> tuple[str, str]:
    """Peer and target for a table; `form` is a format specification."""
    return tuple("-" if x is None else format(x, form) for x in (mark.peer, mark.target))  # type: ignore[return-value]

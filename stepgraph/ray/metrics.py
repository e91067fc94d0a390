"""Metrics of several replicas as one text: every sample gets the label `replica`."""

from __future__ import annotations

import re
from collections.abc import Mapping

_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*?)\})?( .*)", re.DOTALL)
_END = "# EOF"


def merged(texts: Mapping[str, str]) -> str:
    """One text of several, in Prometheus's format or in OpenMetrics, which all of them have.

    Args:
        texts: by the name of their replica.
    """
    families: dict[str, tuple[list[str], list[str]]] = {}  # comments and samples
    is_open = False
    for replica, text in texts.items():
        comments: list[str] = []
        samples: list[str] = []
        for line in text.split("\n"):  # labels may hold what other programs take for ends of lines
            if line == _END:
                is_open = True
            elif line.startswith("#"):
                _, kind, name, *_ = line.split(" ", 3)
                if kind == "HELP" or name not in families:
                    comments, samples = families.setdefault(name, ([], []))
                if line not in comments:
                    comments.append(line)
            elif found := _SAMPLE.fullmatch(line):
                name, labels, rest = found.groups()
                samples.append(f'{name}{{replica="{replica}"{"," if labels else ""}{labels or ""}}}{rest}')
    lines = [line for comments, samples in families.values() for line in (*comments, *samples)]
    return "\n".join([*lines, *([_END] if is_open else [])]) + "\n"

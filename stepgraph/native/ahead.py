"""Libraries compiled ahead, for any CPU of a kind: what a machine without a compiler uses, such as a container.

``python -m stepgraph.native`` makes them, beside the sources. One is used if it was made of these very sources for this version
of torch, and if the CPU has all that it asks for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stepgraph.trusted_folder import why_untrusted

_LEVEL_3 = ("avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "abm")
_LEVEL_4 = (*_LEVEL_3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")


@dataclass(frozen=True)
class Kind:
    """CPUs that one library is for."""

    name: str
    capability: str  # torch's, as in `library`
    flags: tuple[str, ...]  # the compiler's
    features: tuple[str, ...]  # that a CPU must have, in Linux's words


KINDS = (
    Kind("avx512-bf16", "AVX512", ("-march=x86-64-v4", "-mavx512bf16"), (*_LEVEL_4, "avx512_bf16")),
    Kind("avx512", "AVX512", ("-march=x86-64-v4",), _LEVEL_4),
    Kind("avx2", "AVX2", ("-march=x86-64-v3",), _LEVEL_3),
)
"""The best first."""


def library_of(kind: Kind, sources: Path) -> Path:
    """Where the library of the sources in a folder is, or is to be, for a kind of CPU."""
    return sources / "ready" / f"{kind.name}-{digest(sources, (torch.__version__, *kind.flags))}.so"


def find(sources: Path, capability: str) -> Path | None:
    """The best library of those sources that is there and right for this CPU, of what torch takes it for."""
    features = cpu_features()
    for kind in KINDS:
        if kind.capability == capability and features.issuperset(kind.features):
            library = library_of(kind, sources)
            if library.exists() and why_untrusted(library) is None:
                return library
    return None


def digest(sources: Path, facts: Sequence[str]) -> str:
    """Differs where facts or sources do."""
    found = hashlib.sha256("\n".join(facts).encode())
    for path in sorted((*sources.glob("*.cpp"), *sources.glob("*.h"))):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:32]


def cpu_features() -> frozenset[str]:
    """What the first core can do, in Linux's words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").partition(":")[2].split())

"""``bench start``: from the start of a fresh process to its first token, and which part of the way takes how long."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from stepgraph.bench.report import table, write_json
from stepgraph.config import EngineConfig, add_flags, settings_from_flags
from stepgraph.errors import ConfigError, StepgraphError


@dataclass(frozen=True)
class Phase:
    """A part of a start, in seconds."""

    from_s: float
    """Since the process was started."""
    takes_s: float

    @property
    def to_s(self) -> float:
        """When it ends, since the process was started."""
        return self.from_s + self.takes_s


_BESIDE_WEIGHTS = ("tokenizer", "buffers and KV cache", "capture")
"""Phases of another thread, one after the other."""


@dataclass(frozen=True)
class Start:
    """One process, from its start to its first token."""

    phases: Mapping[str, Phase]
    """By name, in the order of their beginning. They may overlap and lie inside each other."""
    machine: Mapping[str, Any]

    @property
    def total_s(self) -> float:
        """Until the token was there."""
        return self.phases["first token"].to_s

    @property
    def weights_alone_s(self) -> float:
        """Reading weights while nothing else went on: all of it, or what capturing graphs meanwhile did not hide."""
        weights = self.phases["weights"]
        beside = [self.phases[name] for name in _BESIDE_WEIGHTS if name in self.phases]
        hidden = sum(max(0.0, min(p.to_s, weights.to_s) - max(p.from_s, weights.from_s)) for p in beside)
        return weights.takes_s - hidden


def add_parser(commands: Any) -> None:
    """Register ``bench start``."""
    parser = commands.add_parser(
        "start",
        help="from process start to the first token, by phase",
        description="Start fresh processes that answer one prompt with one token. The first run fills the caches of disk and "
        "kernels and is shown apart.",
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs after the first (default: 3)")
    parser.add_argument("--prompt-len", type=int, default=10, metavar="N", help="tokens of the prompt (default: 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    add_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark; returns the exit code.

    Raises:
        ConfigError: numbers or settings that cannot be.
        StepgraphError: the process failed; it has said why.
    """
    if min(arguments.repeats, arguments.prompt_len) < 1:
        raise ConfigError(f"repeats={arguments.repeats}, prompt_len={arguments.prompt_len}: both must be 1 or more")
    settings = settings_from_flags(arguments)
    EngineConfig.from_settings(**settings)  # refuse bad ones before a process is started
    request = json.dumps({"settings": settings, "prompt_len": arguments.prompt_len})
    first, *warm = (
        start_once(request)
        for _ in tqdm(range(1 + arguments.repeats), unit="start", leave=False, disable=not sys.stderr.isatty())
    )
    print(f"{settings.get('model', 'the default model')} on {first.machine['device']}; medians of {len(warm)} starts\n")
    print(_table(first, warm))
    print("\nPhases may overlap and lie inside each other; times count from the start of the process.")
    if arguments.json:
        runs = [{"total_s": start.total_s, "phases": asdict(start)["phases"]} for start in (first, *warm)]
        write_json(
            arguments.json,
            {"benchmark": "start", "machine": first.machine, "settings": settings, "first": runs[0], "warm": runs[1:]},
        )
    return 0


def start_once(request: str) -> Start:
    """Start a process and wait for its token.

    Args:
        request: what `stepgraph.bench.start_process` takes.

    Raises:
        StepgraphError: it failed.
    """
    started = time.time()
    process = subprocess.run(
        [sys.executable, "-m", "stepgraph.bench.start_process", request], stdout=subprocess.PIPE, text=True, check=False
    )
    if process.returncode:
        raise StepgraphError(f"the process ended with code {process.returncode}; what it says is above")
    reply = json.loads(process.stdout.splitlines()[-1])
    phases: dict[str, Phase] = {"python": Phase(0.0, reply["began"] - started)}
    for name, begin, end in reply["phases"]:
        before = phases.get(name, Phase(begin - started, 0.0))
        phases[name] = Phase(before.from_s, before.takes_s + end - begin)
    return Start(phases, reply["machine"])


def _table(first: Start, warm: Sequence[Start]) -> str:
    rows = []
    for name, phase in first.phases.items():
        seen = [start.phases[name] for start in warm if name in start.phases]
        if seen:
            begin, took = median(p.from_s for p in seen), median(p.takes_s for p in seen)
            rows.append((name, f"{begin:.2f}", f"{took:.2f}", f"{phase.takes_s:.2f}"))
    for name, of in (
        ("in all", lambda start: start.total_s),
        ("in all without weights", lambda start: start.total_s - start.weights_alone_s),
    ):
        rows.append((name, "", f"{median(map(of, warm)):.2f}", f"{of(first):.2f}"))
    return table(("phase", "from s", "takes s", "in the first run s"), rows)

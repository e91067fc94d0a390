"""``bench busy``: how fast a CPU decodes alone and beside programs that want the same cores, by how OpenMP's threads wait."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from stepgraph.bench.report import table, write_json
from stepgraph.config import EngineConfig, add_flags, settings_from_flags
from stepgraph.errors import ConfigError, StepgraphError

_OWN, _GNU, _ONE_THREAD = "as it comes", "GNU's default", "one thread"
_GNU_SPINS = 300_000  # what GNU OpenMP takes if nothing is said
_LOAD = "import os, sys; cpu = int(sys.argv[1]); cpu < 0 or os.sched_setaffinity(0, {cpu})\nwhile True: pass"


@dataclass(frozen=True)
class Setting:
    """A way to wait: what the environment says beyond what it says anyhow."""

    name: str
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Case:
    """So many requests, alone or not."""

    rows: int
    busy: bool


Samples = dict[tuple[str, Case], list[float]]
"""Mean milliseconds of a decode step, one a round, by setting."""


def add_parser(commands: Any) -> None:
    """Register ``bench busy``."""
    parser = commands.add_parser(
        "busy",
        help="decoding on an idle CPU and beside other work, by how OpenMP's threads wait",
        description="Decode on an idle CPU and beside processes that compute without end, with an engine for each way in which "
        "OpenMP's threads can wait, in turn. The machine must have nothing else to do.",
        allow_abbrev=False,
    )
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="rounds of all settings (default: 7)")
    parser.add_argument(
        "--seconds", type=float, default=1.0, metavar="S", help="how long each is measured in a round (default: 1)"
    )
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1, 8], metavar="N", help="requests at a time (default: 1 8)"
    )
    parser.add_argument(
        "--spins",
        type=int,
        nargs="*",
        default=[300, 3000, 10_000],
        metavar="N",
        help=f"values of GOMP_SPINCOUNT, beside the library's own, GNU OpenMP's default of {_GNU_SPINS:,}, "
        "OMP_WAIT_POLICY=passive and one thread (default: 300 3000 10000)",
    )
    parser.add_argument(
        "--load-processes", type=int, metavar="N", help="processes that compute beside (default: one per usable core)"
    )
    parser.add_argument("--pin-load", action="store_true", help="keep each of them on a core of its own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    add_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark; returns the exit code.

    Raises:
        ConfigError: numbers or settings that cannot be.
        StepgraphError: an engine's process failed; it has said why.
    """
    cores = sorted(os.sched_getaffinity(0))
    num_loads = len(cores) if arguments.load_processes is None else arguments.load_processes
    numbers = [arguments.rounds, num_loads, *arguments.rows, *arguments.spins]
    if min(numbers) < 1 or not arguments.seconds > 0:
        raise ConfigError(
            f"rounds={arguments.rounds}, seconds={arguments.seconds}, rows={arguments.rows}, spins={arguments.spins}, "
            f"load_processes={num_loads}: all must be above 0"
        )
    engine_settings = {"device": "cpu", "enable_prefix_caching": False} | settings_from_flags(arguments)
    EngineConfig.from_settings(**engine_settings)  # refuse bad ones before a process is started
    if engine_settings["device"] != "cpu":
        raise ConfigError(f"device={engine_settings['device']!r}: bench busy measures how the threads of a CPU wait")
    series = ways_to_wait(arguments.spins)
    cases = [Case(rows, busy) for busy in (False, True) for rows in arguments.rows]
    pins = [cores[i % len(cores)] if arguments.pin_load else -1 for i in range(num_loads)]
    load_average = os.getloadavg()[0]
    with ExitStack() as stack:
        engines = {setting.name: stack.enter_context(running_engine(setting, engine_settings)) for setting in series}
        where = {name: engine.begin(arguments.rows) for name, engine in engines.items()}
        samples = measure(engines, cases, pins, rounds=arguments.rounds, seconds=arguments.seconds)
    machine = where[_OWN]
    print(
        f"{engine_settings.get('model', 'the default model')} on {machine['device']}, {machine['threads']} threads; busy: beside "
        f"{num_loads} processes{', each on a core of its own' if arguments.pin_load else ''}; medians of {arguments.rounds} "
        f"rounds in turn; the machine's load before was {load_average:.1f}\n"
    )
    print(_table(series, cases, samples))
    if arguments.json:
        write_json(
            arguments.json,
            {
                "benchmark": "busy",
                "machine": machine,
                "settings": engine_settings,
                "load": {"processes": num_loads, "pinned": arguments.pin_load, "average_before": load_average},
                "rounds": arguments.rounds,
                "seconds": arguments.seconds,
                "series": [
                    {
                        "name": setting.name,
                        "environment": setting.environment,
                        "cases": [
                            {"rows": case.rows, "busy": case.busy, "step_ms": samples[setting.name, case]}
                            for case in cases
                        ],
                    }
                    for setting in series
                ],
            },
        )
    return 0


def ways_to_wait(spins: Sequence[int]) -> list[Setting]:
    """The series: what the library does by itself, and what it could do."""
    return [
        Setting(_OWN, {}),
        Setting(_GNU, {"GOMP_SPINCOUNT": str(_GNU_SPINS)}),
        Setting("passive", {"OMP_WAIT_POLICY": "passive"}),
        *(Setting(f"{number} spins", {"GOMP_SPINCOUNT": str(number)}) for number in spins),
        Setting(_ONE_THREAD, {"OMP_NUM_THREADS": "1"}),
    ]


class EngineProcess:
    """An engine in a process of its own, see `stepgraph.bench.busy_process`. Between requests all its threads sleep."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def begin(self, rows: Sequence[int]) -> dict[str, Any]:
        """Wait until it has loaded and captured what so many rows need; returns its machine."""
        machine: dict[str, Any] = self._ask(list(rows))
        return machine

    def step_ms(self, rows: int, seconds: float) -> float:
        """Mean time of a decode step of so many rows."""
        return float(self._ask([rows, seconds]))

    def _ask(self, request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        reply = self._process.stdout.readline()
        if not reply:
            raise StepgraphError(f"the engine's process ended with code {self._process.wait()}; what it says is above")
        return json.loads(reply)


@contextmanager
def running_engine(setting: Setting, engine_settings: Mapping[str, Any]) -> Iterator[EngineProcess]:
    """An engine that waits as `setting` says, until the end of the block."""
    ways = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in ways} | dict(setting.environment)
    process = subprocess.Popen(
        [sys.executable, "-m", "stepgraph.bench.busy_process", json.dumps(engine_settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        yield EngineProcess(process)
    finally:
        process.kill()
        process.communicate()


@contextmanager
def load(pins: Sequence[int]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that compute until the end of the block, each on a core, or on any if that is -1."""
    processes = [subprocess.Popen([sys.executable, "-c", _LOAD, str(pin)]) for pin in pins]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def measure(
    engines: Mapping[str, EngineProcess], cases: Sequence[Case], pins: Sequence[int], *, rounds: int, seconds: float
) -> Samples:
    """Time all engines in all cases, round by round, each round beginning with another engine."""
    samples: Samples = {(name, case): [] for name in engines for case in cases}
    names = list(engines)
    with tqdm(total=rounds * len(samples), desc="measuring", leave=False, disable=not sys.stderr.isatty()) as bar:
        for turn in range(rounds):
            first = turn % len(names)
            for case in cases:
                with load(pins if case.busy else ()):
                    for name in names[first:] + names[:first]:
                        samples[name, case].append(engines[name].step_ms(case.rows, seconds))
                        bar.update()
    return samples


def _table(series: Sequence[Setting], cases: Sequence[Case], samples: Samples) -> str:
    """Alone in tokens per second, beside others in milliseconds, each with its ratio to what it is held against."""
    header, rows = ["threads wait"], [[setting.name] for setting in series]
    for case in cases:
        ms = [median(samples[setting.name, case]) for setting in series]
        name = f"{case.rows} row{'s' if case.rows > 1 else ''}"
        header += [f"busy, {name}: ms", "x best"] if case.busy else [f"idle, {name}: tokens/s", "of GNU's"]
        gnu_ms = median(samples[_GNU, case])
        for row, step_ms in zip(rows, ms, strict=True):
            row += (
                [f"{step_ms:.1f}", f"{step_ms / min(ms):.2f}"]
                if case.busy
                else [f"{1e3 * case.rows / step_ms:.1f}", f"{gnu_ms / step_ms:.0%}"]
            )
    return table(header, rows)

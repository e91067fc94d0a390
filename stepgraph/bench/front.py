"""What the HTTP front adds: the same prompts through a server and through the engine in this process, in turn.

Offline, one thread runs the steps and turns their tokens into text. The server does so in two processes, and everything else a
served token goes through comes on top: the message, JSON, HTTP, and the client that reads it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stepgraph.bench.report import machine, table, write_json
from stepgraph.config import CacheConfig, EngineConfig, add_flags, settings_from_flags
from stepgraph.errors import ConfigError, StepgraphError

if TYPE_CHECKING:
    from stepgraph.engine.engine import Engine


@dataclass(frozen=True)
class Pace:
    """One round of streams that began together. Milliseconds, medians over the streams."""

    ttft_ms: float
    tpot_ms: float
    step_ms: float
    """Of the engine alone, mean over the round."""


def add_parser(commands: Any) -> None:
    """Add ``bench front``."""
    parser = commands.add_parser(
        "front",
        help="what the HTTP front adds to a token, against the engine alone",
        description="Stream the same prompts through a server and through an engine in this process, in turn. Needs aiohttp and "
        "what the server needs.",
    )
    parser.add_argument(
        "--streams", type=int, nargs="+", default=[1, 64], metavar="N", help="streams at once (default: 1 64)"
    )
    parser.add_argument("--prompt-len", type=int, default=32, metavar="N", help="tokens of a prompt (default: 32)")
    parser.add_argument("--output-len", type=int, default=64, metavar="N", help="tokens of an answer (default: 64)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds of each kind (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    add_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Entry point; returns the exit code."""
    if min(arguments.repeats, arguments.prompt_len, arguments.output_len, *arguments.streams) < 1:
        raise ConfigError(
            f"repeats={arguments.repeats}, prompt_len={arguments.prompt_len}, output_len={arguments.output_len}, "
            f"streams={arguments.streams}: all must be 1 or more"
        )
    for package in ("aiohttp", "fastapi", "uvicorn", "msgspec", "zmq"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"bench front needs {package}, which is not installed; pip install 'stepgraph[server,bench]'"
            )
    most = max(arguments.streams)
    settings = _settings(arguments, most)
    config = EngineConfig.from_settings(**settings)
    if most > config.scheduler.max_num_seqs:
        raise ConfigError(
            f"{most} streams do not run at once with max_num_seqs={config.scheduler.max_num_seqs}; raise it"
        )

    from stepgraph.engine.build import build_engine

    engine = build_engine(config, progress=sys.stderr.isatty())
    rng, vocab_size = np.random.default_rng(0), engine.source.config.vocab_size
    found: dict[int, tuple[list[Pace], list[Pace]]] = {}
    with _server(settings) as url:
        for streams in arguments.streams:
            offline, served = found[streams] = ([], [])
            for round_ in range(1 + arguments.repeats):
                # new prompts each round: the prefix cache knows none of them
                prompts = rng.integers(vocab_size // 100, vocab_size // 2, (streams, arguments.prompt_len)).tolist()
                paces = _offline(engine, prompts, arguments.output_len), _served(url, prompts, arguments.output_len)
                if round_:  # the first captures
                    offline.append(paces[0])
                    served.append(paces[1])
    print(_table(found))
    if arguments.json is not None:
        write_json(
            arguments.json,
            {
                "machine": machine(engine.executor.specs.device),
                "settings": {"prompt_len": arguments.prompt_len, "output_len": arguments.output_len, **settings},
                "rounds": {
                    str(streams): {
                        "offline": [asdict(pace) for pace in offline],
                        "served": [asdict(pace) for pace in served],
                    }
                    for streams, (offline, served) in found.items()
                },
            },
        )
    return 0


def _settings(arguments: argparse.Namespace, most: int) -> dict[str, Any]:
    """The engine settings that were given; for the rest, just what `most` streams need, as two engines share the machine."""
    settings = settings_from_flags(arguments)
    length = arguments.prompt_len + arguments.output_len
    settings.setdefault("max_num_seqs", most)
    max_model_len = settings.setdefault("max_model_len", max(256, length))
    block_size = settings.get("block_size", CacheConfig.block_size)
    longest, of_all = -(-max_model_len // block_size), 2 * most * -(-length // block_size)
    settings.setdefault("num_kv_blocks", 1 + max(longest, of_all))
    return settings


def _offline(engine: Engine, prompts: Sequence[list[int]], output_len: int) -> Pace:
    from stepgraph.engine.prompts import TokenizedPrompt
    from stepgraph.engine.reports import StepReport
    from stepgraph.engine.sampling_params import SamplingParams
    from stepgraph.engine.session import Session

    steps: list[float] = []

    def note(report: StepReport) -> None:
        steps.append(report.seconds)

    engine.on_step = note
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    started = time.perf_counter()
    sessions = {
        str(index): Session.start(engine, str(index), TokenizedPrompt(None, prompt), params)
        for index, prompt in enumerate(prompts)
    }
    times: dict[str, list[float]] = {name: [] for name in sessions}
    while engine.has_work:
        for update in engine.step():
            name = update.request.id
            sessions[name].update(name, update.new_token_ids, update.finish_reason)
            sessions[name].deltas()
            times[name].append(time.perf_counter() - started)
    return _pace(list(times.values()), 1e3 * statistics.fmean(steps))


def _served(url: str, prompts: Sequence[list[int]], output_len: int) -> Pace:
    from stepgraph.bench.serve_client import Load, run_load

    fields = {"max_tokens": output_len, "temperature": 0, "ignore_eos": True, "stream": True}
    bodies = [json.dumps({"prompt": prompt, **fields}).encode() for prompt in prompts]
    load = Load(
        f"{url}/v1/completions", {}, bodies, [len(p) for p in prompts], [0.0] * len(prompts), None, timeout_s=600.0
    )
    before = _steps(url)
    outcomes = run_load(load, on_end=lambda: None).outcomes
    after = _steps(url)
    if failed := next((outcome.error for outcome in outcomes if outcome.error), None):
        raise StepgraphError(f"a request failed: {failed}")
    mean_s = (after[0] - before[0]) / (after[1] - before[1])
    return _pace([[t - o.start_s for t in o.chunk_times_s] for o in outcomes], 1e3 * mean_s, output_len)


def _pace(times_s: Sequence[Sequence[float]], step_ms: float, num_tokens: int | None = None) -> Pace:
    gaps = [(times[-1] - times[0]) / ((num_tokens or len(times)) - 1) for times in times_s]
    return Pace(1e3 * statistics.median(times[0] for times in times_s), 1e3 * statistics.median(gaps), step_ms)


def _table(found: dict[int, tuple[list[Pace], list[Pace]]]) -> str:
    rows = []
    for streams, (offline, served) in found.items():
        for name, field in (
            ("time per token", "tpot_ms"),
            ("time to first token", "ttft_ms"),
            ("engine's step", "step_ms"),
        ):
            alone = [getattr(pace, field) for pace in offline]
            over = [getattr(pace, field) for pace in served]
            ratio = statistics.median(b / a for a, b in zip(alone, over, strict=True))
            rows.append(
                [
                    f"{streams} streams: {name}",
                    f"{statistics.median(alone):.3f}",
                    f"{statistics.median(over):.3f}",
                    f"{ratio:.3f}",
                ]
            )
    return table(["medians of rounds", "offline ms", "served ms", "served / offline"], rows)


@contextmanager
def _server(settings: dict[str, Any]) -> Iterator[str]:
    """A server with these settings, on a free port."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "settings.yaml"
        config.write_text(json.dumps({**settings, "port": 0, "max_queue": 4096}))  # JSON is YAML
        process = subprocess.Popen(
            [sys.executable, "-m", "stepgraph.server", "--config", str(config)], stdout=subprocess.PIPE, text=True
        )
        try:
            yield _wait_for(process)
        finally:
            process.terminate()
            process.wait()


def _wait_for(process: subprocess.Popen[str]) -> str:
    """The server's URL, once it is ready."""
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"serves .* at (http://\S+) ", line):
            return found[1]
    raise StepgraphError("the server does not start; what it says is above")


def _steps(url: str) -> tuple[float, float]:
    """Seconds in steps, and steps, since the server started."""
    with urllib.request.urlopen(f"{url}/metrics") as reply:
        text = reply.read().decode()
    found = dict(re.findall(r"^stepgraph:step_duration_seconds_(sum|count)\S* (\S+)", text, re.MULTILINE))
    return float(found["sum"]), float(found["count"])

"""What Ray Serve adds: the same streams through a replica and through `stepgraph serve`, in turn; and what two replicas lose.

    python scripts/measure_ray.py smollm2 --json ray.json -- --device cpu --max-model-len 512

Both hold the model all the time, and only one of them is asked at a time. Prompts are new in each round, so that no prefix cache
knows them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

os.environ |= {  # before Ray reads them
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_memory_monitor_refresh_ms": "0",
}

import ray
from ray import serve

from stepgraph.bench.report import cpu_name, table, write_json
from stepgraph.bench.serve_client import Load, run_load
from stepgraph.bench.serve_metrics import Outcome
from stepgraph.command_parser import CommandParser
from stepgraph.config import add_flags, settings_from_flags
from stepgraph.config.fields import flag_of
from stepgraph.ray import build_openai_app

_TOKENS = (100, 4000)
"""Ids of made-up prompts lie between."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns 1 if a request was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 64], metavar="N")
    parser.add_argument("--prompt-len", type=int, default=32, metavar="N")
    parser.add_argument("--output-len", type=int, default=32, metavar="N")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds of each kind")
    parser.add_argument("--requests", type=int, default=0, metavar="N", help="then, so many through two replicas")
    parser.add_argument("--max-token-id", type=int, default=_TOKENS[1], metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.epilog = "What follows -- are flags of stepgraph serve, for both."
    given = list(sys.argv[1:] if argv is None else argv)
    end = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:end])
    flags = CommandParser()
    add_flags(flags, server=True)
    settings = settings_from_flags(flags.parse_args([options.model, *given[end + 1 :]]), server=True)
    settings.setdefault("max_num_seqs", max(options.streams))
    settings.setdefault("max_queue", 4096)
    rng = np.random.default_rng(0)
    with ExitStack() as stack:
        urls = {}
        if options.streams and options.repeats:
            urls["stepgraph serve"] = stack.enter_context(_server(settings))
        urls["Ray Serve"] = stack.enter_context(_application(settings))
        rounds = _in_turn(options, urls, rng) if len(urls) > 1 else {}
        lost = None
        if options.requests:
            serve.run(build_openai_app({**settings, "deployment_config": {"num_replicas": 2}}))
            lost = _count(options, urls["Ray Serve"], rng)
    if rounds:
        print(_table(rounds))
    if lost:
        print(
            f"{lost['sent']} requests, {lost['at_once']} at once, through two replicas in {lost['seconds']:.0f} s: "
            f"{lost['lost']} lost"
        )
    if options.json:
        found = {str(streams): of for streams, of in rounds.items()}
        write_json(
            options.json,
            {
                "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "ray": ray.__version__},
                "settings": {**settings, "prompt_len": options.prompt_len, "output_len": options.output_len},
                "rounds": found,
                "two_replicas": lost,
            },
        )
    return int(bool(lost and lost["lost"]))


@contextmanager
def _server(settings: dict[str, Any]) -> Iterator[str]:
    """`stepgraph serve` on a free port."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "settings.yaml"
        config.write_text(json.dumps({**settings, "port": 0}))  # JSON is YAML
        command = [sys.executable, "-m", "stepgraph.server", flag_of("config"), str(config)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if found := re.search(r"serves .* at (http://\S+) ", line):
                    yield found[1]
                    return
            raise SystemExit("the server did not start; what it says is above")
        finally:
            process.terminate()
            process.wait()


@contextmanager
def _application(settings: dict[str, Any]) -> Iterator[str]:
    """An application of one replica, with as many threads as the server has."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    ray.init(num_cpus=64, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build_openai_app(settings))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def _in_turn(
    options: argparse.Namespace, urls: dict[str, str], rng: Any
) -> dict[int, dict[str, list[dict[str, float]]]]:
    found: dict[int, dict[str, list[dict[str, float]]]] = {}
    for streams in options.streams:
        of = found[streams] = {name: [] for name in urls}
        for round_ in range(1 + options.repeats):
            for name in sorted(urls, reverse=bool(round_ % 2)):
                outcomes, seconds = _run(options, urls[name], rng, streams, streams)
                if failed := [outcome.error for outcome in outcomes if outcome.error]:
                    raise SystemExit(f"a request failed: {failed[0]}")
                if round_:  # the first captures
                    of[name].append(
                        {
                            "tokens_per_s": sum(outcome.output_len for outcome in outcomes) / seconds,
                            "first_ms": 1e3 * statistics.median(outcome.ttft_s for outcome in outcomes),
                            "chunks": sum(len(outcome.chunk_times_s) for outcome in outcomes) / len(outcomes),
                        }
                    )
    return found


def _count(options: argparse.Namespace, url: str, rng: Any) -> dict[str, Any]:
    outcomes, seconds = _run(options, url, rng, options.requests, max(options.streams))
    whole = [outcome for outcome in outcomes if not outcome.error and outcome.output_len == options.output_len]
    errors = sorted({outcome.error for outcome in outcomes if outcome.error})[:5]
    return {
        "sent": options.requests,
        "lost": options.requests - len(whole),
        "errors": errors,
        "at_once": max(options.streams),
        "seconds": seconds,
    }


def _run(
    options: argparse.Namespace, url: str, rng: Any, num_requests: int, at_once: int
) -> tuple[Sequence[Outcome], float]:
    fields = {"max_tokens": options.output_len, "temperature": 0, "ignore_eos": True, "stream": True}
    fields["stream_options"] = {"include_usage": True}
    prompts = rng.integers(
        min(_TOKENS[0], options.max_token_id // 2), options.max_token_id, (num_requests, options.prompt_len)
    )
    bodies = [json.dumps({"prompt": prompt, **fields}).encode() for prompt in prompts.tolist()]
    lens = [options.prompt_len] * num_requests
    load = Load(f"{url}/v1/completions", {}, bodies, lens, [0.0] * num_requests, at_once, timeout_s=600.0)
    began = time.monotonic()
    run = run_load(load, on_end=lambda: None)
    return run.outcomes, min(run.duration_s, time.monotonic() - began)


def _table(rounds: dict[int, dict[str, list[dict[str, float]]]]) -> str:
    rows = []
    for streams, of in rounds.items():
        for name, field in (
            ("tokens per second", "tokens_per_s"),
            ("first token, ms", "first_ms"),
            ("chunks of an answer", "chunks"),
        ):
            alone, ours = ([one[field] for one in of[each]] for each in ("stepgraph serve", "Ray Serve"))
            ratio = statistics.median(b / a for a, b in zip(alone, ours, strict=True))
            cells = [f"{statistics.median(values):.1f}" for values in (alone, ours)]
            rows.append([f"{streams} streams: {name}", *cells, f"{ratio:.2f}"])
    return table(["medians of rounds", "stepgraph serve", "Ray Serve", "ratio"], rows)


if __name__ == "__main__":
    sys.exit(main())

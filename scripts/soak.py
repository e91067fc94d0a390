"""Thousands of requests of every kind against a live server: is anything lost, wrong or left in memory?

    python scripts/soak.py --requests 10000 --json soak.json

Completions, chats and responses, whole and streamed; thousands of schemas, tools, regexes; n, log-probabilities, penalties, stop
strings, seeds; a third of the clients leave, before the answer begins or in the middle of it. Every answer is checked for what
was asked; some requests are sent twice, and what is sampled with a seed must be the same again. The memory of front and engine
is read all along: over the last half of the run it has to stay within `LIMITS_MIB`. Exit code 1 if anything is not so.

The model is the tests' tiny one with random weights. `--minutes` bounds the run; a run cut short says so and fails.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

TESTS = Path(__file__).parents[1] / "tests"
sys.path += [str(TESTS), str(TESTS / "server"), str(TESTS / "engine")]

from live import TINY_FLAGS, LiveServer, running_server  # noqa: E402
from soak_traffic import KINDS, MODEL, ask, children_mib, fault, kind_of, leaves_after, rss_mib  # noqa: E402
from tiny import save_tiny_model  # noqa: E402

from stepgraph.bench.report import check_outputs, table, write_json  # noqa: E402

LIMITS_MIB = {"front": 10.0, "engine": 30.0, "grammars": 100.0}
SAMPLES = 40
TWICE = 50  # one in so many requests is sent again
TIMEOUT_S = 120


@dataclass
class Findings:
    """What came of a run."""

    outcomes: Counter[str] = field(default_factory=Counter)
    by_kind: dict[str, Counter[str]] = field(default_factory=lambda: {kind: Counter() for kind in KINDS})
    faults: list[str] = field(default_factory=list)
    memory: list[dict[str, float]] = field(default_factory=list)
    """`requests` by then, and MiB of `front`, `engine` and the engine's `grammars`, which are processes of their own."""

    def note(self, number: int, outcome: str, wrong: str | None = None) -> None:
        self.outcomes[outcome] += 1
        self.by_kind[kind_of(number)][outcome] += 1
        if wrong is not None:
            self.faults.append(f"request {number} ({kind_of(number)}): {wrong}")

    def spread_mib(self) -> dict[str, float]:
        """Highest less lowest memory in the last half of the run."""
        half = self.memory[len(self.memory) // 2 :]
        return {name: max(m[name] for m in half) - min(m[name] for m in half) for name in LIMITS_MIB}


async def run_request(http: aiohttp.ClientSession, url: str, number: int, findings: Findings) -> None:
    """Send one request, perhaps twice, and note what came of it."""
    leaves = leaves_after(number)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            reply = await ask(http, url, number, leaves=leaves)
            if reply is None:
                findings.note(number, "left")
                return
            wrong = fault(number, reply)
            if wrong is None and leaves is None and number % TWICE == 0:
                again = await ask(http, url, number, leaves=None)
                wrong = None if again == reply else f"the same request got {again} after {reply}"
    except TimeoutError:
        findings.note(number, "lost", f"no end within {TIMEOUT_S} s")
    except (aiohttp.ClientError, OSError, ValueError, KeyError) as error:
        findings.note(number, "lost", repr(error))
    else:
        findings.note(number, "answered" if wrong is None else "wrong", wrong)


async def soak(server: LiveServer, requests: int, concurrency: int, minutes: float) -> Findings:
    """Run the requests, so many at a time, and look at memory between them."""
    findings, deadline = Findings(), time.monotonic() + 60 * minutes
    front_pid, engine_pid = server.process.pid, server.engine_pid()
    gate, step = asyncio.Semaphore(concurrency), max(1, requests // SAMPLES)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:

        async def one(number: int) -> None:
            async with gate:
                await run_request(http, server.url, number, findings)

        for begin in range(0, requests, step):
            if time.monotonic() > deadline:
                findings.faults.append(f"{begin} of {requests} requests were sent in {minutes:g} minutes")
                break
            await asyncio.gather(*(one(number) for number in range(begin, min(begin + step, requests))))
            front, engine, grammars = rss_mib(front_pid), rss_mib(engine_pid), children_mib(engine_pid)
            findings.memory.append({"requests": begin + step, "front": front, "engine": engine, "grammars": grammars})
            print(
                f"{begin + step:>6} requests: front {front:.1f} MiB, engine {engine:.1f}, grammars {grammars:.1f}",
                flush=True,
            )
    return findings


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, metavar="N", help="default: 10000")
    parser.add_argument("--concurrency", type=int, default=24, metavar="N", help="requests at a time (default: 24)")
    parser.add_argument("--minutes", type=float, default=60, metavar="M", help="longest run (default: 60)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    arguments = parser.parse_args(argv)
    check_outputs(arguments)
    with tempfile.TemporaryDirectory() as folder:
        model = save_tiny_model(Path(folder), max_model_len=2048)  # the offer of a tool takes some 700 bytes
        with running_server(model, ["--served-model-name", MODEL, *TINY_FLAGS]) as server:
            begun = time.monotonic()
            findings = asyncio.run(soak(server, arguments.requests, arguments.concurrency, arguments.minutes))
            seconds = time.monotonic() - begun
            server.wait_idle()
            left = {
                name: server.metric(name)
                for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            }
            eager = server.metric("steps_total", mode="eager")
            code = server.stop()
    if any(left.values()) or eager or code:
        findings.faults.append(f"at the end: {left}, {eager:g} eager steps, exit code {code}")
    spread = findings.spread_mib()
    findings.faults += [
        f"the {name}'s memory varied by {spread[name]:.1f} MiB over the last half, and {limit:g} are allowed"
        for name, limit in LIMITS_MIB.items()
        if spread[name] > limit
    ]
    outcomes = sorted(findings.outcomes)
    rows = [(kind, *(str(counts[outcome]) for outcome in outcomes)) for kind, counts in findings.by_kind.items()]
    print(f"\n{table(('kind', *outcomes), rows)}\n")
    print(
        f"{sum(findings.outcomes.values())} requests in {seconds:.0f} s: {dict(findings.outcomes)}; memory varied over the last "
        f"half by {', '.join(f'{spread[name]:.1f} MiB ({name})' for name in LIMITS_MIB)}"
    )
    print("\n".join(findings.faults[:40]) or "nothing lost, nothing wrong, memory level")
    if arguments.json:
        result = {
            "seconds": seconds,
            "outcomes": findings.outcomes,
            "by_kind": findings.by_kind,
            "memory_mib": findings.memory,
            "spread_mib_of_last_half": spread,
            "faults": findings.faults,
        }
        write_json(arguments.json, result)
    return 1 if findings.faults else 0


if __name__ == "__main__":
    sys.exit(main())

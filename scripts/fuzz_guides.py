"""Can a structured output hold up others? Random regular expressions, schemas, grammars and structural tags, nested repetitions
above all, beside a free and a guided stream that go on and on; reported is the longest time these waited for a token. Steps that
captured a graph do not count: whoever comes first to a size waits for that, whatever it asks.

    python scripts/fuzz_guides.py --seconds 300
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine
from stepgraph.engine.request import FinishReason, Request
from stepgraph.engine.sampling_params import SamplingParams, StructuredOutputs
from stepgraph.errors import RequestError

SETTINGS: dict[str, Any] = {
    "model": "smollm2",
    "max_model_len": 1024,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 128,
    "num_kv_blocks": 1200,
}
KNOWN = [
    {"regex": "x(.{0,30}){0,30}y"},
    {"regex": "x((.{0,9}){0,9}){0,9}"},
    {"json": {"type": "string", "pattern": "^x(.{0,30}){0,30}y$"}},
    {"grammar": 'root ::= "x" ([^\\n]{0,30}){0,30} "y"'},
    {"grammar": 'root ::= "x" (a){0,30} "y"\na ::= [^z]{0,30}'},
    {"regex": "x(.{1,3}[a-z]{1,3}){1,30}y"},
    {"regex": "x(.{0,5}a?){0,30}"},
]
"""What has held up others, or takes long for a token."""
GUIDED_STREAM = StructuredOutputs(regex="([a-z]{1,12} )*")
_ATOMS = (".", "a", "[a-z]", "[^z]", r"\w", "é", " ", "x|y", "(ab|a|b)", "")


def random_regex(rng: random.Random, depth: int = 0) -> str:
    """Repetitions of repetitions, many of them of what may be empty."""
    if depth == 4 or rng.random() < 0.15:
        return rng.choice(_ATOMS)
    inner = "".join(random_regex(rng, depth + 1) for _ in range(rng.choice((1, 1, 2, 3))))
    low, more = rng.choice((0, 0, 1, 2)), rng.choice((0, 1, 3, 9, 30))
    times = rng.choice(("?", "*", "+", f"{{{low},{low + more}}}", f"{{{low},{low + more}}}", f"{{{low},}}"))
    return f"({inner}){times}"


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """Objects and arrays of texts with patterns and lengths."""
    kind = rng.randrange(4 if depth < 3 else 2)
    if kind == 0:
        return {"type": "string", "pattern": f"^{random_regex(rng, 1)}$"}
    if kind == 1:
        return {"type": "string", "maxLength": rng.choice((1, 30, 900, 3000))}
    if kind == 2:
        return {"type": "array", "items": random_schema(rng, depth + 1), "maxItems": rng.choice((1, 9, 90))}
    names = [f"p{i}" for i in range(rng.choice((1, 4, 30)))]
    return {"type": "object", "properties": {name: random_schema(rng, depth + 1) for name in names}}


def random_grammar(rng: random.Random) -> str:
    """Rules that name each other, in repetitions."""
    names = ["root", "a", "b", "c"]
    rules = []
    for place, name in enumerate(names):
        others = names[place + 1 :] or [name]
        options = []
        for _ in range(rng.choice((1, 1, 2))):
            parts = [
                rng.choice(('"x"', "[^z]", "[a-z]", '"ab"', *others, *others))
                + rng.choice(("", "", "?", "*", "{0,9}", "{0,30}", "{1,5}"))
                for _ in range(rng.choice((1, 2, 3)))
            ]
            options.append(f"({' '.join(parts)}){rng.choice(('', '{0,9}', '{0,30}', '*'))}")
        if name == "c":
            options.append('"z"')
        rules.append(f"{name} ::= {' | '.join(options)}")
    return "\n".join(rules)


def random_tag(rng: random.Random) -> dict[str, Any]:
    """Free text with a structure in it."""
    content: dict[str, Any] = rng.choice((
        {"type": "regex", "pattern": random_regex(rng) or "a"},
        {"type": "json_schema", "json_schema": random_schema(rng)},
    ))  # fmt: skip
    tag = {"type": "tag", "begin": "<a>", "content": content, "end": "</a>"}
    inner = rng.choice((tag, {"type": "repeat", "min": 0, "max": rng.choice((3, 30)), "content": content}))
    free = {"type": "triggered_tags", "triggers": ["<a"], "tags": [tag]}
    return {"type": "structural_tag", "format": rng.choice((inner, free))}


def random_spec(rng: random.Random) -> dict[str, Any]:
    """What one request asks for."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(KNOWN)
    if kind == 1:
        return {"json": random_schema(rng)}
    if kind == 2:
        return {"grammar": random_grammar(rng)}
    if kind == 3:
        return {"structural_tag": random_tag(rng)}
    return {"regex": "x" + random_regex(rng)}


@dataclass
class Stream:
    """A request that is replaced when it ends, and how long it waited for its tokens."""

    name: str
    params: SamplingParams
    request: Request | None = None
    num_started: int = 0
    last: float | None = None
    gaps: list[tuple[float, str]] = field(default_factory=list)
    """Seconds between tokens, and what happened meanwhile."""

    num_seen: int = 0

    def follow(self, engine: Engine, now: float, news: str, *, counts: bool = True) -> None:
        """Look at it after a step; start it again if it has ended."""
        request = self.request
        if request is None or request.finish_reason is not None:
            assert request is None or request.finish_reason is not FinishReason.ERROR, request.error
            self.num_started += 1
            self.request = engine.add_request(f"{self.name}{self.num_started}", [1, 2, 3], self.params)
            self.last = None
        elif len(request.output_token_ids) > self.num_seen:
            if self.last is not None and counts:
                self.gaps.append((now - self.last, news))
            self.last = now
        elif not counts:
            self.last = None
        self.num_seen = len(self.request.output_token_ids) if self.request is not None else 0


def fuzz(
    engine: Engine,
    *,
    seconds: float,
    seed: int = 0,
    at_once: int = 8,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run it; returns what is reported."""
    rng = random.Random(seed)
    room = engine.max_model_len - 8
    streams = [
        Stream("free", SamplingParams(temperature=0, max_tokens=room, ignore_eos=True)),
        Stream("guided", SamplingParams(temperature=1, seed=0, max_tokens=room, structured_outputs=GUIDED_STREAM)),
    ]
    fuzzed: dict[Request, tuple[dict[str, Any], float]] = {}
    outcomes: Counter[str] = Counter()
    captured: list[bool] = []  # of the steps since the streams were looked at
    engine.on_step = lambda report: captured.append(report.record.captured)
    number = 0
    for stream in streams:  # their first tokens, and the first start of the processes, do not count
        stream.follow(engine, 0.0, "")
    while any(not stream.request or len(stream.request.output_token_ids) < 5 for stream in streams):
        engine.step()
    started = time.monotonic()
    while (now := time.monotonic()) < started + seconds:
        news = ""
        while len(fuzzed) < at_once:
            number += 1
            spec = random_spec(rng)
            params = SamplingParams(temperature=1, seed=number, max_tokens=rng.choice((4, 32)), structured_outputs=spec)
            try:
                request = engine.add_request(f"fuzz{number}", [5, 6, 7], params)
            except RequestError as error:
                outcomes[f"refused: {type(error).__name__}"] += 1
                continue
            fuzzed[request] = spec, now + rng.choice((0.3, 1.5, 60.0))
            news = json.dumps(spec)[:200]
        engine.step()
        now = time.monotonic()
        for request, (_, leaves_at) in [*fuzzed.items()]:
            if request.finish_reason is not None:
                outcomes[_outcome(request)] += 1
                del fuzzed[request]
            elif now > leaves_at:
                engine.abort(request.id)
                outcomes["left by its client"] += 1
                del fuzzed[request]
        for stream in streams:
            meanwhile = news or "; ".join(json.dumps(spec)[:80] for spec, _ in fuzzed.values())
            stream.follow(engine, now, meanwhile, counts=not any(captured))
        captured.clear()
        if int(now - started) // 30 != int(now - started - 0.05) // 30:
            note(f"{now - started:.0f} s: {number} requests, longest gaps {[_longest(s) for s in streams]}")
    report: dict[str, Any] = {"seconds": round(time.monotonic() - started, 1), "requests": number}
    for stream in streams:
        gaps = sorted(gap for gap, _ in stream.gaps)
        longest, during = max(stream.gaps)
        report[stream.name] = {
            "tokens": len(gaps),
            "median_ms": round(gaps[len(gaps) // 2] * 1e3, 1),
            "p99_ms": round(gaps[int(len(gaps) * 0.99)] * 1e3, 1),
            "longest_ms": round(longest * 1e3, 1),
            "longest_during": during,
        }
    report["outcomes"] = dict(outcomes.most_common())
    report["grammars"] = engine.grammars.num_processes
    report["grammar_bytes"] = engine.grammars.num_bytes
    for request in [*fuzzed, *(stream.request for stream in streams if stream.request is not None)]:
        engine.abort(request.id)
    return report


def _longest(stream: Stream) -> float:
    return round(max((gap for gap, _ in stream.gaps), default=0.0), 3)


def _outcome(request: Request) -> str:
    if request.finish_reason is not FinishReason.ERROR:
        return str(request.finish_reason)
    error = request.error.message if request.error is not None else ""
    kind = "ended" if request.output_token_ids else "refused"
    for known in ("one token, which is the limit", "CPU time to compile", "at most", "more than", "failed on it"):
        if known in error:
            return f"{kind}: {known}"
    return f"{kind}: {error[:60]}"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="how long to go on (default 120)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=8, help="fuzzed requests at a time (default 8)")
    parser.add_argument("--max-gap", type=float, help="fail if a stream waited longer for a token, in seconds")
    parser.add_argument("--json", type=Path, help="write the report here, too")
    arguments = parser.parse_args()
    engine = build_engine(EngineConfig.from_settings(**SETTINGS), progress=True)
    report = fuzz(engine, seconds=arguments.seconds, seed=arguments.seed, at_once=arguments.at_once, note=print)
    engine.shutdown()
    text = json.dumps(report, indent=2, ensure_ascii=False)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")
    longest = max(report[name]["longest_ms"] for name in ("free", "guided")) / 1e3
    if arguments.max_gap is not None and longest > arguments.max_gap:
        raise SystemExit(f"a stream waited {longest:.3f} s for a token, at most {arguments.max_gap} were allowed")


if __name__ == "__main__":
    main()

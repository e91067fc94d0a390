"""``bench transfer``: what it costs to compute a prompt in one engine and its answer in another, and what that is good for.

First tokens: of a prompt that the engine which answers computes itself (*local*); of one that it takes over while it is computed
elsewhere (*by layer*); and of one that it takes over when it is all there (*whole*). What its blocks alone take then is the
*fetch*: the rest of what is extra is the step for the prompt's last tokens, and the way of a request through two engines. Answers
are compared; in 16 bits the step for the last tokens may round otherwise than one for all of them does, so some may differ.
Then gaps between tokens of answers that are
under way, while long prompts arrive: in this pair of engines, and in two engines that do everything.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from stepgraph.bench.report import table, write_json
from stepgraph.bench.transfer_process import Ask, EngineProcess, Given, wait_for
from stepgraph.config import EngineConfig, add_flags, settings_from_flags
from stepgraph.errors import ConfigError, StepgraphError
from stepgraph.transfer.reference import Offer, Reference

_WARMUPS = 2
_VOCABULARY = 256
"""Tokens of prompts are below it: every model has these."""
_CHECKED = 8
"""Tokens of each answer, which are the same however its prompt came, or nearly so."""


@dataclass(frozen=True)
class FirstToken:
    """Times to the first token, from when the prompt was sent; medians."""

    prompt_len: int
    local_ms: float
    by_layer_ms: float
    whole_ms: float
    fetch_ms: float
    """Of what is whole, from its begin to its confirmation."""
    num_differing: int
    """Prompts that did not get the same answer in all ways."""
    num_prompts: int
    """Those that were not timed included."""

    @property
    def extra_by_layer_ms(self) -> float:
        """Beyond a local prompt."""
        return self.by_layer_ms - self.local_ms

    @property
    def extra_whole_ms(self) -> float:
        """Likewise."""
        return self.whole_ms - self.local_ms


@dataclass(frozen=True)
class Load:
    """Answers under way while prompts arrive."""

    engines: str
    rate: float
    """Prompts per second."""
    itl_p50_ms: float
    itl_p99_ms: float
    """Between tokens of an answer."""
    ttft_p50_ms: float
    """Of the prompts that arrive; 0 if none does."""
    prompts_per_s: float
    tokens_per_s: float
    """Of answers."""


def add_parser(commands: Any) -> None:
    """Register ``bench transfer``."""
    parser = commands.add_parser(
        "transfer",
        help="prompts computed in one engine and answered by another",
        description="Time first tokens of prompts that another engine computes, and gaps between tokens while long prompts come, "
        "with two engines of this machine, each in a process of its own. Needs memory for two engines.",
    )
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="prompts of each kind (default: 20)")
    parser.add_argument(
        "--prompt-lens", type=int, nargs="+", default=[512, 2048, 8000], metavar="N", help="(default: 512 2048 8000)"
    )
    parser.add_argument(
        "--devices", type=int, nargs=2, metavar="N", help="GPUs of the two engines, maybe the same (default: 0 1)"
    )
    parser.add_argument("--decodes", type=int, default=32, metavar="N", help="answers under way (default: 32)")
    parser.add_argument("--seconds", type=float, default=20.0, metavar="S", help="that prompts arrive (default: 20)")
    parser.add_argument("--no-load", action="store_true", help="first tokens alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    add_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark; returns the exit code."""
    if min(arguments.repeats, arguments.decodes, *arguments.prompt_lens) < 1:
        raise ConfigError("repeats, decodes and prompt_lens must be 1 or more")
    settings = settings_from_flags(arguments)
    config = EngineConfig.from_settings(**settings)  # what is wrong with it is said before engines start
    devices = arguments.devices or ([0, 1] if config.model.device != "cpu" else [None, None])
    loads: list[Load] = []
    with ExitStack() as stack:
        pair = _Pair(settings, devices, stack, is_exact=config.model.dtype == "float32")
        lengths = sorted(arguments.prompt_lens)
        measured = [pair.first_token(length, arguments.repeats) for length in lengths]
        if not arguments.no_load:
            rate = 1e3 / measured[-1].local_ms
            load = _Workload(lengths[-1], arguments.decodes, arguments.seconds)
            loads += [
                load.run("prefill + decode", pair.engines, pair.engines[1:], pair.submit, at) for at in (0.0, rate)
            ]
        counts = [engine.tell().counts for engine in pair.engines]
    if loads:
        with ExitStack() as stack:
            replicas = _start([settings | {"splitwise_role": "mixed"}] * 2, devices, stack)
            for engine in replicas:
                engine.ready()
            submit = _Alternating(replicas)
            loads += [load.run("2 mixed", replicas, replicas, submit, at) for at in (0.0, rate)]
    print(f"{config.model.model} on {pair.device}; medians of {arguments.repeats}\n")
    print(_first_token_table(measured))
    if loads:
        print(f"\nprompts of {lengths[-1]} tokens beside {arguments.decodes} answers\n\n{_load_table(loads)}")
    print(f"\nmoved: {counts[1]['blocks_received']} blocks, {counts[1]['bytes_received'] / 1e9:.2f} GB")
    if arguments.json:
        result = {
            "benchmark": "transfer",
            "device": pair.device,
            "settings": asdict(config),
            "devices": devices,
            "first_tokens": [asdict(m) for m in measured],
            "loads": [asdict(m) for m in loads],
            "counts": counts,
        }
        write_json(arguments.json, result)
    return 0


def _start(settings: Sequence[dict[str, Any]], devices: Sequence[int | None], stack: ExitStack) -> list[EngineProcess]:
    engines = [EngineProcess(*engine) for engine in zip(settings, devices, strict=True)]
    for engine in engines:
        stack.callback(engine.close)
    return engines


def _prompt(number: int, length: int) -> list[int]:
    """Of random tokens; those of other numbers are others from the first one on, or soon after."""
    return random.Random(number).choices(range(_VOCABULARY), k=length)


class _Pair:
    """An engine for prompts and one for answers. If they are exact, answers do not depend on how their prompts came."""

    def __init__(
        self, settings: dict[str, Any], devices: Sequence[int | None], stack: ExitStack, *, is_exact: bool
    ) -> None:
        roles = [settings | {"splitwise_role": role} for role in ("prefill", "decode")]
        self.engines = _start(roles, devices, stack)
        told = [engine.ready() for engine in self.engines]
        assert told[0].reference is not None, told
        self._reference, self.device = told[0].reference, told[0].device
        self._count, self._is_exact = 0, is_exact

    def submit(self, name: str, prompt: Sequence[int], max_tokens: int) -> None:
        """Have a prompt computed by the one and answered by the other, at the same time."""
        reference = self._offer(name, prompt, "")
        self.engines[1].ask(Ask(name, prompt, max_tokens, "", reference))

    def first_token(self, length: int, repeats: int) -> FirstToken:
        """Time first tokens of prompts of a length."""
        ways = {"local": self._local, "by_layer": self._by_layer, "whole": self._whole}
        times: dict[str, list[float]] = {way: [] for way in ways}
        before, num_differing = self.engines[1].tell().counts["blocks_received"], 0
        fetch_ms: list[float] = []
        for turn in range(_WARMUPS + repeats):
            prompt = _prompt(self._count + turn, length)
            answers = []
            for way, ask in ways.items():
                started = time.monotonic()
                given = ask(f"{way} {length} {turn}", prompt)
                answers.append([token for tokens in given for token in tokens.token_ids])
                times[way].append(1e3 * (given[0].at_s - started))
                fetched = self.engines[1].tell().fetch_s
                if way == "whole" and turn >= _WARMUPS:
                    fetch_ms += (1e3 * seconds for seconds in fetched)
            num_differing += self._compare(length, answers)
        self._count += _WARMUPS + repeats
        if self.engines[1].tell().counts["blocks_received"] == before and length > 64:
            raise StepgraphError("nothing was taken over: every prompt was computed where it was answered")
        local, by_layer, whole = (median(values[_WARMUPS:]) for values in times.values())
        fetch = median(fetch_ms) if fetch_ms else 0.0
        return FirstToken(length, local, by_layer, whole, fetch, num_differing, _WARMUPS + repeats)

    def _compare(self, length: int, answers: Sequence[list[int]]) -> bool:
        """Whether answers to one prompt differ.

        Raises:
            StepgraphError: one is not complete; or they differ, and the engines are exact.
        """
        if any(len(answer) != _CHECKED for answer in answers):
            raise StepgraphError(
                f"answers to a prompt of {length} tokens do not have {_CHECKED} tokens each: {answers}"
            )
        differ = any(answer != answers[0] for answer in answers)
        if differ and self._is_exact:
            raise StepgraphError(f"answers to a prompt of {length} tokens differ by how it was computed: {answers}")
        return differ

    def _local(self, name: str, prompt: Sequence[int]) -> list[Given]:
        self.engines[1].ask(Ask(name, prompt, _CHECKED, "local"))
        return wait_for(self.engines[1:], name)

    def _by_layer(self, name: str, prompt: Sequence[int]) -> list[Given]:
        reference = self._offer(name, prompt, "by layer")
        self.engines[1].ask(Ask(name, prompt, _CHECKED, "by layer", reference))
        return wait_for(self.engines[1:], name)

    def _whole(self, name: str, prompt: Sequence[int]) -> list[Given]:
        reference = self._offer(name, prompt, "whole")
        wait_for(self.engines[:1], name)
        self.engines[1].ask(Ask(name, prompt, _CHECKED, "whole", reference))
        return wait_for(self.engines[1:], name)

    def _offer(self, name: str, prompt: Sequence[int], salt: str) -> Reference:
        self.engines[0].ask(Ask(name, prompt, 1, salt, Offer(name)))
        return Reference(self._reference.engine, self._reference.host, self._reference.port, name)


class _Alternating:
    """Engines that do everything, in turns."""

    def __init__(self, engines: Sequence[EngineProcess]) -> None:
        self._engines, self._count = engines, 0

    def __call__(self, name: str, prompt: Sequence[int], max_tokens: int) -> None:
        self._engines[self._count % len(self._engines)].ask(Ask(name, prompt, max_tokens, ""))
        self._count += 1


@dataclass(frozen=True)
class _Workload:
    """Answers that are under way all the time, and prompts that arrive at random."""

    prompt_len: int
    num_decodes: int
    seconds: float

    def run(
        self,
        engines_name: str,
        engines: Sequence[EngineProcess],
        answering: Sequence[EngineProcess],
        submit: Callable[[str, Sequence[int], int], None],
        rate: float,
    ) -> Load:
        """Measure for `seconds`.

        Args:
            engines_name: for people.
            engines: all of them.
            answering: those that give the answers.
            submit: takes a request's name, prompt and most tokens.
            rate: prompts per second.
        """
        generator = random.Random(0)
        for number in range(self.num_decodes):
            submit(f"decode {engines_name} {rate} {number}", _prompt(-1 - number, 32), 1 << 14)
        time.sleep(1.0)  # until all are under way
        started = time.monotonic()
        until, due, sent = started + self.seconds, started, dict[str, float]()
        while (now := time.monotonic()) < until:
            if rate and now >= due:
                name = f"prompt {engines_name} {len(sent)}"
                submit(name, _prompt(1_000_000 + len(sent), self.prompt_len), 16)
                sent[name] = due
                due += generator.expovariate(rate)
            for engine in engines:
                engine.take()
            time.sleep(1e-3)
        given = [g for engine in answering for g in engine.given if started <= g.at_s < until and g.token_ids]
        for engine in engines:
            engine.abort_all()
        times: dict[str, list[float]] = {}
        for tokens in given:
            times.setdefault(tokens.name, []).append(tokens.at_s)
        gaps = [1e3 * (b - a) for name, at in times.items() if name not in sent for a, b in pairwise(at)]
        ttfts = [1e3 * (times[name][0] - at) for name, at in sent.items() if name in times]
        return Load(
            engines_name,
            rate,
            median(gaps),
            quantiles(gaps, n=100)[98],
            median(ttfts) if ttfts else 0.0,
            len(ttfts) / self.seconds,
            sum(len(tokens.token_ids) for tokens in given) / self.seconds,
        )


def _first_token_table(measured: Sequence[FirstToken]) -> str:
    header = (
        "first token, ms",
        "local",
        "by layer",
        "whole",
        "extra by layer",
        "extra whole",
        "ratio",
        "fetch",
        "differ",
    )
    return table(
        header,
        [
            (
                f"{m.prompt_len} tokens",
                f"{m.local_ms:.2f}",
                f"{m.by_layer_ms:.2f}",
                f"{m.whole_ms:.2f}",
                f"{m.extra_by_layer_ms:.2f}",
                f"{m.extra_whole_ms:.2f}",
                f"{m.extra_by_layer_ms / m.extra_whole_ms:.2f}" if m.extra_whole_ms else "-",
                f"{m.fetch_ms:.2f}",
                f"{m.num_differing} of {m.num_prompts}",
            )
            for m in measured
        ],
    )


def _load_table(loads: Sequence[Load]) -> str:
    header = ("engines", "prompts/s", "ITL p50 ms", "ITL p99 ms", "TTFT p50 ms", "answered/s", "tokens/s")
    return table(
        header,
        [
            (
                load.engines,
                f"{load.rate:.2f}",
                f"{load.itl_p50_ms:.2f}",
                f"{load.itl_p99_ms:.2f}",
                f"{load.ttft_p50_ms:.1f}",
                f"{load.prompts_per_s:.2f}",
                f"{load.tokens_per_s:,.0f}",
            )
            for load in loads
        ],
    )

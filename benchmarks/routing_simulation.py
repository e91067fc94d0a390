"""Replicas behind several fronts, by ways to choose one: what prefix caches find, how uneven the load is, what users wait.

    python benchmarks/routing_simulation.py --json benchmarks/results/routing_simulation.json

Real engines before devices that only count (`stepgraph.bench.counting_device`), with the step time that was fitted to an H100.
Every front has a router and load estimates of its own, as in the server; requests reach the fronts at random. Conversations begin
at Poisson times with one of a few system prompts, some far more frequent than others; each turn sends all before it again.
"""

from __future__ import annotations

import argparse
import heapq
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count, product
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

from stepgraph.bench.counting_device import BLOCK_SIZE, CountingDevice, engine_over
from stepgraph.bench.report import check_outputs, table, write_json
from stepgraph.bench.simulation import QWEN3_0_6B_ON_H100
from stepgraph.bench.workloads import VOCAB_SIZE
from stepgraph.config import GraphConfig, SchedulerConfig
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.scheduler import Scheduler
from stepgraph.server.routing import LoadEstimate, Router, choose

NUM_KV_BLOCKS = 8_193
NUM_FRONTS = 4
NUM_SYSTEM_PROMPTS = 12
SYSTEM_LEN = (256, 2048)
TURNS = 5.0  # mean
USER_LEN = (16, 256)
ANSWER_LEN = (16, 256)
THINKING_S = 2.0  # mean


@dataclass
class Turn:
    """What a user adds to a conversation, and how much is answered."""

    user: list[int]
    answer_len: int


@dataclass
class Workload:
    """Conversations: when each begins, its system prompt and its turns."""

    begins_s: list[float]
    system: list[list[int]]
    turns: list[list[Turn]]

    @classmethod
    def make(cls, num_conversations: int, conversations_per_s: float, *, seed: int, unique: bool) -> Workload:
        """Poisson times. `unique`: conversations of one turn, with a system prompt of their own."""
        rng = random.Random(seed)

        def tokens(bounds: tuple[int, int]) -> list[int]:
            return rng.choices(range(VOCAB_SIZE), k=rng.randint(*bounds))

        prompts = [tokens(SYSTEM_LEN) for _ in range(NUM_SYSTEM_PROMPTS)]
        weights = [1 / rank for rank in range(1, NUM_SYSTEM_PROMPTS + 1)]
        workload, now = cls([], [], []), 0.0
        for _ in range(num_conversations):
            now += rng.expovariate(conversations_per_s)
            num_turns = 1 if unique else 1 + min(int(rng.expovariate(1 / (TURNS - 0.5))), 20)
            workload.begins_s.append(now)
            workload.system.append(tokens(SYSTEM_LEN) if unique else rng.choices(prompts, weights)[0])
            workload.turns.append([Turn(tokens(USER_LEN), rng.randint(*ANSWER_LEN)) for _ in range(num_turns)])
        return workload


class Policy(ABC):
    """A front's way to choose. `sent` and the others of `LoadEstimate` are told by the simulation."""

    def __init__(self, num_replicas: int):
        self.loads = [LoadEstimate() for _ in range(num_replicas)]
        self._numbers = count()

    @abstractmethod
    def route(self, prompt: Sequence[int]) -> int:
        """The replica for a prompt."""


class RoundRobin(Policy):
    """One after another."""

    def route(self, prompt: Sequence[int]) -> int:
        return next(self._numbers) % len(self.loads)


class LeastLoaded(Policy):
    """The one with the least to do."""

    def route(self, prompt: Sequence[int]) -> int:
        return min(range(len(self.loads)), key=lambda replica: self.loads[replica].tokens)


class FirstBlock(Policy):
    """Always the same replica for the same first block."""

    def route(self, prompt: Sequence[int]) -> int:
        first = b"%r" % list(prompt[:BLOCK_SIZE])
        return choose([0] * len(self.loads), [0] * len(self.loads), first)


class Routed(Policy):
    """As the server chooses."""

    def __init__(self, num_replicas: int):
        super().__init__(num_replicas)
        self._router = Router(num_replicas, block_size=BLOCK_SIZE, num_kv_blocks=NUM_KV_BLOCKS, max_adapters=1)

    def route(self, prompt: Sequence[int]) -> int:
        return self._router.route(prompt, [load.tokens for load in self.loads])


@dataclass
class Outcome:
    """What a run came to."""

    first_token_s: list[float] = field(default_factory=list)
    time_per_token_s: list[float] = field(default_factory=list)
    excess: list[int] = field(default_factory=list)
    """Unfinished requests of the busiest replica above those of the idlest, at each arrival."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed: list[int] = field(default_factory=list)
    """Tokens of prompts that each replica computed."""
    output_tokens: int = 0
    seconds: float = 0.0


class Simulation:
    """N engines with clocks of their own; always the one that is furthest behind takes the next step."""

    def __init__(self, workload: Workload, create: Callable[[int], Policy], num_replicas: int, num_fronts: int):
        self._workload = workload
        self._fronts = [create(num_replicas) for _ in range(num_fronts)]
        answer_lens = [turn.answer_len for turns in workload.turns for turn in turns]
        config = SchedulerConfig(max_num_seqs=64)
        self._engines, self._clocks = [], []
        for _ in range(num_replicas):
            engine, executor = engine_over(
                CountingDevice(config.max_num_seqs, answer_lens),
                config,
                GraphConfig(),
                num_kv_blocks=NUM_KV_BLOCKS,
                max_model_len=32_768,
                create_scheduler=Scheduler,
                step_seconds=lambda record: QWEN3_0_6B_ON_H100.seconds(record.shape.num_tokens, record.shape.num_rows),
            )
            self._engines.append(engine)
            self._clocks.append(executor.clock)
        self._rng = random.Random(0)  # which front a request reaches
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = count()
        self._unfinished = [0] * num_replicas
        self._of: dict[str, tuple[int, int, Policy, float]] = {}
        """Of unfinished requests: conversation, turn, front, and when it arrived or, if it has begun, its first token."""
        places = (
            (conversation, turn) for conversation, turns in enumerate(workload.turns) for turn in range(len(turns))
        )
        self._seeds = {place: number for number, place in enumerate(places)}
        self.outcome = Outcome()

    def run(self) -> Outcome:
        for conversation, begin_s in enumerate(self._workload.begins_s):
            prompt = self._workload.system[conversation] + self._workload.turns[conversation][0].user
            self._at(begin_s, self._arrival(conversation, 0, prompt))
        while True:
            busy = [replica for replica, engine in enumerate(self._engines) if engine.has_work]
            behind = min(busy, key=lambda replica: self._clocks[replica].now, default=None)
            if self._events and (behind is None or self._events[0][0] <= self._clocks[behind].now):
                at_s, _, event = heapq.heappop(self._events)
                event(at_s)
            elif behind is not None:
                self._step(behind)
            else:
                break
        outcome = self.outcome
        outcome.seconds = max(clock.now for clock in self._clocks)
        for engine in self._engines:
            statistics = engine.scheduler.statistics
            outcome.prompt_tokens += statistics.prompt_tokens
            outcome.cached_tokens += statistics.cached_prompt_tokens
            outcome.computed.append(statistics.prompt_tokens - statistics.cached_prompt_tokens)
        return outcome

    def _at(self, at_s: float, event: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), event))

    def _arrival(self, conversation: int, turn: int, prompt: list[int]) -> Callable[[float], None]:
        def arrive(now: float) -> None:
            front = self._rng.choice(self._fronts)
            replica = front.route(prompt)
            name, seed = f"{conversation}/{turn}", self._seeds[conversation, turn]
            params = SamplingParams(
                max_tokens=self._workload.turns[conversation][turn].answer_len, seed=seed, ignore_eos=True
            )
            self._clocks[replica].now = max(self._clocks[replica].now, now)
            self._engines[replica].add_request(name, prompt, params)
            front.loads[replica].sent(name, 1, len(prompt))
            front.loads[replica].accepted(name)
            self._unfinished[replica] += 1
            self._of[name] = conversation, turn, front, now
            self.outcome.excess.append(max(self._unfinished) - min(self._unfinished))

        return arrive

    def _step(self, replica: int) -> None:
        engine, clock = self._engines[replica], self._clocks[replica]
        updates = engine.step()
        num_unfinished = engine.scheduler.num_running + engine.scheduler.num_waiting
        began, ended = [], []
        for request, tokens, finish_reason in updates:
            if tokens and len(request.output_token_ids) == len(tokens):
                began.append(request)
            if finish_reason is not None:
                ended.append(request)
        if began or ended:
            self._at(clock.now, lambda now: self._hear(replica, now, began, ended, num_unfinished))

    def _hear(self, replica: int, now: float, began: Sequence[Any], ended: Sequence[Any], num_unfinished: int) -> None:
        """What an engine tells the fronts after a step."""
        for request in began:
            conversation, turn, front, arrived_s = self._of[request.id]
            front.loads[replica].began(request.id)
            self.outcome.first_token_s.append(now - arrived_s)
            self._of[request.id] = conversation, turn, front, now
        for request in ended:
            conversation, turn, front, first_s = self._of.pop(request.id)
            front.loads[replica].ended(request.id)
            self._unfinished[replica] -= 1
            output = list(request.output_token_ids)
            self.outcome.output_tokens += len(output)
            if len(output) > 1:
                self.outcome.time_per_token_s.append((now - first_s) / (len(output) - 1))
            turns = self._workload.turns[conversation]
            if turn + 1 < len(turns):
                prompt = [*request.prompt_token_ids, *output, *turns[turn + 1].user]
                think_s = random.Random(self._seeds[conversation, turn]).expovariate(1 / THINKING_S)
                self._at(now + think_s, self._arrival(conversation, turn + 1, prompt))
        for front in self._fronts:
            front.loads[replica].reported(num_unfinished)


POLICIES = {
    "round-robin": RoundRobin,
    "least loaded": LeastLoaded,
    "first block": FirstBlock,
    "routed": Routed,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--replicas", type=int, default=4, metavar="N")
    parser.add_argument("--conversations", type=int, default=400, metavar="N")
    parser.add_argument("--rates", type=float, nargs="+", default=[50.0, 200.0], metavar="R", help="conversations/s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    arguments = parser.parse_args()
    check_outputs(arguments)
    rows, results = [], []
    for unique in (False, True):
        for rate in arguments.rates:
            workload = Workload.make(arguments.conversations, rate * (TURNS if unique else 1), seed=0, unique=unique)
            for name, num_fronts in product(POLICIES, (1, NUM_FRONTS)):
                outcome = Simulation(workload, POLICIES[name], arguments.replicas, num_fronts).run()
                result = _figures(outcome) | {
                    "workload": "single prompts" if unique else "conversations",
                    "conversations_per_s": rate * (TURNS if unique else 1),
                    "policy": name,
                    "fronts": num_fronts,
                }
                results.append(result)
                rows.append(_row(result))
    print(table(HEADER, rows))
    if arguments.json:
        write_json(arguments.json, {"replicas": arguments.replicas, "results": results})


HEADER = (
    "workload, per s",
    "policy",
    "fronts",
    "cached",
    "computed max/mean",
    "excess mean",
    "max",
    "first p50",
    "p99 ms",
    "per token p50",
    "p99 ms ",
)


def _figures(outcome: Outcome) -> dict[str, Any]:
    first, token = (quantiles(times, n=100) for times in (outcome.first_token_s, outcome.time_per_token_s))
    return {
        "cached_share": outcome.cached_tokens / outcome.prompt_tokens,
        "computed_max_over_mean": max(outcome.computed) / fmean(outcome.computed),
        "computed_prompt_tokens": sum(outcome.computed),
        "excess_mean": fmean(outcome.excess),
        "excess_max": max(outcome.excess),
        "first_token_ms": {"p50": 1e3 * first[49], "p99": 1e3 * first[98]},
        "time_per_token_ms": {"p50": 1e3 * token[49], "p99": 1e3 * token[98]},
        "output_tokens_per_s": outcome.output_tokens / outcome.seconds,
    }


def _row(result: dict[str, Any]) -> list[str]:
    first, token = result["first_token_ms"], result["time_per_token_ms"]
    return [
        f"{result['workload']}, {result['conversations_per_s']:g}",
        result["policy"],
        f"{result['fronts']}",
        f"{result['cached_share']:.1%}",
        f"{result['computed_max_over_mean']:.2f}",
        f"{result['excess_mean']:.1f}",
        f"{result['excess_max']}",
        f"{first['p50']:.1f}",
        f"{first['p99']:.1f}",
        f"{token['p50']:.2f}",
        f"{token['p99']:.2f}",
    ]


if __name__ == "__main__":
    main()

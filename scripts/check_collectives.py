"""Has ranks add up and gather numbers, and exchange tokens, in an order made to break it, and counts what comes out wrong.

Graphs of several collectives of all sizes are replayed at random, beside collectives outside of graphs and ranks that run by
themselves, while each rank is now and then late, on the host or on the device. Every collective has numbers of its own, so that
one left from another is seen. Then a rank stays away, and the others must name it in time. Exit code 1 if anything was wrong.

    python scripts/check_collectives.py --steps 100000      # on all GPUs
    python scripts/check_collectives.py --device cpu --ranks 3 --steps 500
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from typing import NamedTuple

import torch
from torch import Tensor

from stepgraph.bench.ranks import run_ranks
from stepgraph.graph import Graph, create_backend
from stepgraph.parallel.create import create_group
from stepgraph.parallel.exchange import Exchange
from stepgraph.parallel.group import Fault, Norm
from stepgraph.parallel.shard import Shard
from stepgraph.platforms import create_platform

SIZES = {"cuda": (4096, 151936, 2048), "cpu": (256, 3001, 64)}
"""Hidden size, vocabulary, most tokens."""
NUM_GRAPHS = 24
AHEAD = 100
"""Graphs that are launched before the host waits."""
TIME_LIMIT_S = 10.0


class Found(NamedTuple):
    """What a rank found."""

    group: str
    collectives: int
    wrong: int
    seconds: float
    fault: Fault | None
    until_fault_s: float
    after_fault_s: float  # of a hundred collectives


class Output(NamedTuple):
    wrong: Tensor


class Check:
    """One rank."""

    def __init__(self, shard: Shard, exchange: Exchange, device: str) -> None:
        self.platform = create_platform(device, None if device == "cpu" else shard.rank)
        if device == "cuda":
            torch.cuda.set_device(self.platform.device)
        else:
            torch.set_num_threads(1)
        self.shard, self.exchange = shard, exchange
        self.hidden, self.vocab, self.most = SIZES[device]
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.group = create_group(
            shard,
            exchange,
            self.platform,
            dtype=self.dtype,
            hidden_size=self.hidden,
            max_tokens=self.most // 2,  # so that more go in several messages
            vocab_size=self.vocab,
            max_samples=64,
            time_limit_s=TIME_LIMIT_S,
        )
        self.number = torch.zeros(1, dtype=torch.int64, device=self.platform.device)
        """Of collectives so far."""
        self.wrong = torch.zeros(1, dtype=torch.int64, device=self.platform.device)
        self.norm = Norm(torch.ones(self.hidden, dtype=self.dtype, device=self.platform.device), 1e-6)

    def part(self, rank: int, rows: int, columns: int) -> Tensor:
        """Small whole numbers, and zeros that are -0.0."""
        index = torch.arange(rows * columns, device=self.number.device).view(rows, columns)
        number = (index * 7 + rank * 131 + self.number * 31) % 61 - 30
        return torch.where(number == 0, -0.0, number.to(self.dtype)).to(self.dtype)

    def is_token(self, rank: int, rows: int) -> Tensor:
        """Which of a rank's rows are tokens: often none or all; [rows, 1]."""
        count = ((self.number * 37 + rank * 53) % (2 * rows + 1) - rows // 2).clamp(0, rows)
        return (torch.arange(rows, device=self.number.device) < count)[:, None]

    def exchange_tokens(self, rows: int) -> None:
        """Gather tokens, then bring back sums. May run inside a graph."""
        size, rank = self.shard.size, self.shard.rank
        are_tokens = [self.is_token(other, rows) for other in range(size)]
        parts = [self.part(other, rows, self.hidden) for other in range(size)]
        own_TE = torch.where(are_tokens[rank], parts[rank], torch.nan)
        x_AE, counts_N = self.group.gather_tokens(own_TE, are_tokens[rank].sum(dtype=torch.int32).view(1))
        self.wrong += (counts_N != torch.stack([are.sum() for are in are_tokens])).sum()
        for found_TE, are, expected_TE in zip(x_AE.split(rows), are_tokens, parts, strict=True):
            self.wrong += ((found_TE != expected_TE) & are).sum()
        self.number += 1
        made = [[self.part(3 * maker + other, rows, self.hidden) for other in range(size)] for maker in range(size)]
        part_AE = torch.cat([torch.where(are, x, torch.nan) for x, are in zip(made[rank], are_tokens, strict=True)])
        found = torch.ones(rows, self.hidden, dtype=self.dtype, device=self.number.device)
        normed = self.group.scatter_sum(part_AE, counts_N, found, norm=self.norm)
        expected = 1 + torch.stack([of_all[rank] for of_all in made]).sum(0) * are_tokens[rank]
        self.wrong += (~normed.isfinite()).sum() + (found != expected).sum()
        self.number += 1

    def collective(self, kind: str, rows: int) -> None:
        """Run one, or two with tokens, and count what is wrong. May run inside a graph."""
        if kind == "tokens":
            self.exchange_tokens(rows)
            return
        columns = self.hidden if kind == "sum" else -(-self.vocab // self.shard.size)
        parts = [self.part(rank, rows, columns) for rank in range(self.shard.size)]
        if kind == "sum":
            found = torch.ones(rows, columns, dtype=self.dtype, device=self.number.device)
            normed = self.group.add_sum(parts[self.shard.rank], found, norm=self.norm)
            expected = torch.stack(parts).sum(0) + 1
            self.wrong += (~normed.isfinite()).sum()
        else:
            found = torch.full((rows, self.vocab), torch.nan, dtype=self.dtype, device=self.number.device)
            self.group.gather(parts[self.shard.rank], found)
            expected = torch.cat(parts, dim=1)[:, : self.vocab]
        self.wrong += (found != expected).sum()
        self.number += 1

    def graph(self, cases: list[tuple[str, int]]) -> Graph[Output]:
        """A graph of some collectives, captured by this rank alone."""

        def program() -> Output:
            for case in cases:
                self.collective(*case)
            return Output(self.wrong * 1)

        with self.group.loop_back():
            return create_backend(self.platform.default_graph_backend).capture(program, 1)

    def draw_cases(self, draw: random.Random) -> list[tuple[str, int]]:
        """Collectives of a graph: often of one row, seldom of many."""
        cases = []
        for _ in range(draw.randint(1, 9)):
            kind = draw.choices(("sum", "gather", "tokens"), (0.5, 0.15, 0.35))[0]
            if kind == "gather":
                cases.append((kind, draw.choice((1, 1, 2, 7, 64))))
            else:
                cases.append((kind, draw.choice((1, 1, 2, 3, 8, 63, 64, 127, 129, 200, self.most))))
        return cases

    def run(self, steps: int, seed: int) -> Found:
        draw, late = random.Random(seed), random.Random(seed + 1 + self.shard.rank)
        cases = [self.draw_cases(draw) for _ in range(NUM_GRAPHS)]
        graphs = [self.graph(some) for some in cases]
        self.platform.synchronize()
        self.number.zero_()
        self.wrong.zero_()
        self.exchange(b"")
        started, done, launched = time.perf_counter(), 0, 0
        while done < steps:
            launched += 1
            if late.random() < 0.02:
                time.sleep(late.random() * 2e-3)
            if late.random() < 0.02 and self.platform.device.type == "cuda":
                torch.cuda._sleep(late.randint(1, 2_000_000))
            if late.random() < 0.01:
                with self.group.loop_back():
                    self.group.add_sum(*torch.ones(2, 3, self.hidden, dtype=self.dtype, device=self.number.device))
            if draw.random() < 0.05:
                case = draw.choice(cases)[0]
                self.collective(*case)
                done += number_of([case])
            else:
                index = draw.randrange(NUM_GRAPHS)
                graphs[index].replay()
                done += number_of(cases[index])
            if launched % AHEAD == 0:
                self.platform.synchronize()
                if self.group.fault():
                    break
        self.platform.synchronize()
        seconds, wrong = time.perf_counter() - started, int(self.wrong)
        fault = self.group.fault()
        self.exchange(b"")
        if fault:
            return Found(self.group.name, done, wrong, seconds, fault, 0.0, 0.0)
        until_fault_s = after_fault_s = 0.0
        if self.shard.rank < self.shard.size - 1 and self.group.name != "nccl":
            started = time.perf_counter()
            self.collective(draw.choice(("sum", "tokens")), 3)
            self.platform.synchronize()
            until_fault_s = time.perf_counter() - started
            for _ in range(100):
                self.collective("gather", 1)
            self.platform.synchronize()
            after_fault_s = time.perf_counter() - started - until_fault_s
        self.exchange(b"")
        return Found(self.group.name, done, wrong, seconds, self.group.fault(), until_fault_s, after_fault_s)


def number_of(cases: list[tuple[str, int]]) -> int:
    """Collectives of some cases."""
    return sum(2 if kind == "tokens" else 1 for kind, _ in cases)


def check(shard: Shard, exchange: Exchange, device: str, steps: int, seed: int) -> Found:
    """One rank's part."""
    return Check(shard, exchange, device).run(steps, seed)


def main() -> int:
    """Run the check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ranks", type=int, help="default: one for each GPU, or 2")
    parser.add_argument("--steps", type=int, default=100_000, help="collectives (default: 100000)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    num_ranks = arguments.ranks or (torch.cuda.device_count() if arguments.device == "cuda" else 2)
    found = run_ranks(check, num_ranks, arguments.device, arguments.steps, arguments.seed, time_limit_s=3600.0)
    is_right = True
    for rank, result in enumerate(found):
        named = result.fault is not None and result.fault.rank == num_ranks - 1 and result.until_fault_s > 0
        stays = rank == num_ranks - 1 or result.group == "nccl"
        is_right &= not result.wrong and result.collectives >= arguments.steps and (stays or named)
        print(
            f"rank {rank}, {result.group}: {result.collectives} collectives in {result.seconds:.1f} s, {result.wrong} numbers "
            f"wrong; {result.fault} after {result.until_fault_s:.1f} s, then 100 collectives in {result.after_fault_s:.2f} s"
        )
    print("right" if is_right else "WRONG")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())

"""``bench collectives``: what ranks take to add up their parts, to gather logits, and to exchange tokens, inside a graph.

First, what they compute is compared with the definition, bit by bit and on all ranks; a wrong result ends the benchmark.

Shapes: N ranks, T tokens of each, A = N·T, E hidden size, R rows, W columns that a rank computes, V all columns.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepgraph.bench.ranks import run_ranks
from stepgraph.bench.report import machine, table, write_json
from stepgraph.errors import ConfigError, StepgraphError
from stepgraph.graph import create_backend
from stepgraph.ops import rms_norm
from stepgraph.ops.collectives.reference import gather_columns, reduce_gathered
from stepgraph.parallel.create import create_group
from stepgraph.parallel.exchange import Exchange
from stepgraph.parallel.group import Group, Norm
from stepgraph.parallel.shard import Shard
from stepgraph.platforms import Platform, create_platform

_EPS = 1e-6
_TOKENS = {"cuda": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048), "cpu": (1, 8, 64, 512)}
_OWN_TOKENS = {"cuda": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096), "cpu": (1, 8, 64, 512)}
"""Of each rank, where they have their own."""
_ROWS = (1, 8, 64, 256)
_IN_A_GRAPH = {"cuda": 100, "cpu": 4}
_CYCLES_TO_LAUNCH = 1_000_000
"""Of a GPU, half a millisecond: a graph is launched in less."""
_MOST_SAMPLES = 512


@dataclass(frozen=True)
class Options:
    """What is measured, as all ranks get it."""

    device: str
    hidden_size: int
    vocab_size: int
    repeats: int
    time_limit_s: float = 30.0

    @property
    def dtype(self) -> torch.dtype:
        """Of parts."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16


@dataclass(frozen=True)
class Timing:
    """Of one collective, in a graph of several of its kind."""

    collective: str
    rows: int
    bytes: int  # that a rank sends to each other one
    us: float  # median, of the slowest rank


class Report(NamedTuple):
    """What a rank found."""

    group: str
    timings: list[Timing]
    link_bytes_per_s: float


def add_parser(commands: Any) -> None:
    """Register ``bench collectives``."""
    parser = commands.add_parser(
        "collectives",
        help="sums, gathers and exchanges of tokens of the ranks of a model, beside what the link allows",
        description="Start a process for each rank, compare what their collectives compute with the definition, bit by bit, and "
        "time them inside graphs: the sum with residual and norm, the gather of logits, and, of ranks that share experts only, "
        "the norm and gather of tokens and the sums for each rank's own with residual and norm.",
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="processes (default: one for each GPU; 2 on a CPU)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where (default: auto)")
    parser.add_argument("--hidden-size", type=int, default=4096, metavar="E", help="of sums (default: 4096)")
    parser.add_argument("--vocab-size", type=int, default=151936, metavar="V", help="of logits (default: 151936)")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="timed graphs per case (default: 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark; returns the exit code."""
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    there = torch.cuda.device_count() if device == "cuda" else None
    num_ranks = arguments.ranks or there or 2
    if num_ranks < 2 or (there is not None and num_ranks > there):
        limit = "2 or more" if there is None else f"2 or more, and at most the {there} GPUs that torch sees"
        raise ConfigError(f"ranks={num_ranks} must be {limit}")
    for name in ("hidden_size", "vocab_size", "repeats"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"{name}={getattr(arguments, name)} must be 1 or more")
    options = Options(device, arguments.hidden_size, arguments.vocab_size, arguments.repeats)
    reports: list[Report] = run_ranks(measure, num_ranks, options, time_limit_s=900.0)
    timings = [slowest(same) for same in zip(*(report.timings for report in reports), strict=True)]
    link = max(report.link_bytes_per_s for report in reports)
    where = machine(device)
    print(
        f"{num_ranks} ranks on {where['device']}, collectives by {reports[0].group}, {options.dtype}; all results are the "
        f"defined ones, on all ranks. A link moves {link / 1e9:.0f} GB/s; medians of {options.repeats} graphs\n"
    )
    print(_table(timings, num_ranks, link))
    if arguments.json:
        write_json(
            arguments.json,
            {
                "benchmark": "collectives",
                "machine": where,
                "ranks": num_ranks,
                "group": reports[0].group,
                "link_bytes_per_s": link,
                "settings": asdict(options),
                "timings": [asdict(timing) for timing in timings],
            },
        )
    return 0


def slowest(timings: tuple[Timing, ...]) -> Timing:
    """What the ranks found of one case, as one."""

    first = timings[0]
    return Timing(
        first.collective,
        first.rows,
        first.bytes,
        max(timing.us for timing in timings),
    )


def measure(shard: Shard, exchange: Exchange, options: Options) -> Report:
    """One rank's part: check, then time."""
    platform = create_platform(options.device, None if options.device == "cpu" else shard.rank)
    if platform.device.type == "cuda":
        torch.cuda.set_device(platform.device)
    else:
        torch.set_num_threads(1)
    link = _link_bytes_per_s(shard, exchange, platform)
    bench = Bench(shard, exchange, platform, options)
    bench.check()
    report = Report(bench.group.name, list(bench.time_all()), link)
    exchange(b"")  # a rank that ends takes its memory away, where others may still send to
    bench.group.close()
    return report


class Bench:
    """One rank's group, and what is done with it."""

    def __init__(self, shard: Shard, exchange: Exchange, platform: Platform, options: Options) -> None:
        self.shard, self.exchange, self.platform, self.options = shard, exchange, platform, options
        self.group: Group = create_group(
            shard,
            exchange,
            platform,
            dtype=options.dtype,
            hidden_size=options.hidden_size,
            max_tokens=max(_TOKENS[options.device] + _OWN_TOKENS[options.device]),
            vocab_size=options.vocab_size,
            max_samples=_MOST_SAMPLES,
            time_limit_s=options.time_limit_s,
        )
        self.norm = Norm(self._random(1, options.hidden_size)[0], _EPS)
        self._nothing = self._random(0, 1) * 0, self._random(0, 1)
        self.post_norm = Norm(1 + self._random(2, options.hidden_size)[0].float(), _EPS)

    def check(self) -> None:
        """Compare with the definition.

        Raises:
            StepgraphError: something differs, or ranks do.
        """
        for rows in (1, 2, 7, 64, 300, 1500):
            self._check_tokens(rows)
        first_row: Tensor | None = None
        for rows in (1, 2, 7, 64, 200, 1500):
            parts_NTE = torch.stack([self._random(10 + r, rows) for r in range(self.shard.size)])
            parts_NTE[:, :, :3] = -0.0
            for multiplier, post_norm in ((1.0, None), (0.22, None), (1.0, self.post_norm)):
                residual_TE, expected_TE = self._random(3, rows), self._random(3, rows)
                normed_TE = self.group.add_sum(
                    parts_NTE[self.shard.rank], residual_TE, multiplier=multiplier, post_norm=post_norm, norm=self.norm
                )
                out_TE = torch.empty_like(normed_TE)
                post_weight, post_eps = post_norm or (None, 0.0)
                reduce_gathered(parts_NTE, expected_TE, out_TE, multiplier, post_weight, post_eps, *self.norm)
                exact = post_norm is None
                self._same(f"sum of {rows} rows", residual_TE, expected_TE, exact=exact)
                self._same(f"norm of {rows} rows", normed_TE, out_TE, exact=False)
                if multiplier == 1.0 and exact:
                    if first_row is not None and not torch.equal(first_row, normed_TE[0]):
                        raise StepgraphError(f"rank {self.shard.rank}: a row of {rows} differs from the row alone")
                    first_row = normed_TE[0].clone()
            if rows > _MOST_SAMPLES:
                continue
            columns = -(-self.options.vocab_size // self.shard.size)
            parts_NRW = torch.stack([self._random(20 + r, rows, columns) for r in range(self.shard.size)])
            out_RV = parts_NRW.new_empty(rows, self.options.vocab_size)
            expected_RV = torch.empty_like(out_RV)
            gather_columns(parts_NRW, expected_RV)
            self._same(f"gather of {rows} rows", self.group.gather(parts_NRW[self.shard.rank], out_RV), expected_RV)
        if fault := self.group.fault():
            raise StepgraphError(f"rank {self.shard.rank} gave up: {fault}")

    def _check_tokens(self, rows: int) -> None:
        """Those of all ranks, and sums for each one's own; of each rank another number, padding is NaN."""
        size, rank = self.shard.size, self.shard.rank
        of_ranks = [(rows * (size - other) // size) * (other < size - 1 or rows % 2) for other in range(size)]
        counts_N = torch.tensor(of_ranks, dtype=torch.int32, device=self.platform.device)
        is_token_NT = torch.arange(rows, device=self.platform.device) < counts_N[:, None]
        x_NTE = torch.stack([self._random(30 + other, rows) for other in range(size)])
        x_NTE[:, :, :3] = -0.0
        x_NTE[~is_token_NT] = torch.nan
        found_AE, found_N = self.group.gather_tokens(x_NTE[rank], counts_N[rank : rank + 1])
        for other, found_TE in enumerate(found_AE.split(rows)):
            count = of_ranks[other]
            self._same(f"{rows} tokens of rank {other}", found_TE[:count], x_NTE[other, :count] + 0.0)
        self._same(f"counts of {rows} tokens", found_N, counts_N)
        normed_AE, _ = self.group.gather_tokens(x_NTE[rank], counts_N[rank : rank + 1], norm=self.norm)
        of_all_A = is_token_NT.flatten()
        expected_AE = rms_norm(x_NTE.flatten(0, 1), *self.norm)
        self._same(f"norm of {rows} tokens", normed_AE[of_all_A], expected_AE[of_all_A], exact=False)
        parts_NNTE = torch.stack(
            [torch.stack([self._random(40 + size * a + b, rows) for b in range(size)]) for a in range(size)]
        )
        parts_NNTE[:, ~is_token_NT] = torch.nan
        for multiplier, post_norm in ((0.22, None), (1.0, self.post_norm)):
            residual_TE, expected_TE = self._random(3, rows), self._random(3, rows)
            normed_TE = self.group.scatter_sum(
                parts_NNTE[rank].flatten(0, 1),
                counts_N,
                residual_TE,
                multiplier=multiplier,
                post_norm=post_norm,
                norm=self.norm,
            )
            out_TE = torch.empty_like(normed_TE)
            post_weight, post_eps = post_norm or (None, 0.0)
            reduce_gathered(
                parts_NNTE[:, rank],
                expected_TE,
                out_TE,
                multiplier,
                post_weight,
                post_eps,
                *self.norm,
                counts_N[rank : rank + 1],
            )
            what, exact = f"for {rows} rows of its own", post_norm is None
            self._same(f"sum {what}", residual_TE, expected_TE, exact=exact, of_all=False)
            self._same(f"norm {what}", normed_TE, out_TE, exact=False, of_all=False)

    def time_all(self) -> Iterator[Timing]:
        """Every case."""
        for tokens in _TOKENS[self.options.device]:
            part, residual = self._random(self.shard.rank, tokens) / 64, self._random(3, tokens)
            yield Timing(
                "sum + residual + norm",
                tokens,
                part.numel() * part.element_size(),
                self.time(lambda: self.group.add_sum(part, residual, norm=self.norm)),  # noqa: B023  # run at once
            )
        for tokens in _OWN_TOKENS[self.options.device]:
            x = self._random(self.shard.rank, tokens)
            count = torch.full((1,), tokens, dtype=torch.int32, device=self.platform.device)
            yield Timing(
                "norm + gather of tokens",
                tokens,
                x.numel() * x.element_size(),
                self.time(lambda: self.group.gather_tokens(x, count, norm=self.norm).x),  # noqa: B023
            )
        for tokens in _OWN_TOKENS[self.options.device]:
            part, residual = self._random(self.shard.rank, self.shard.size * tokens) / 64, self._random(3, tokens)
            counts = torch.full((self.shard.size,), tokens, dtype=torch.int32, device=self.platform.device)
            yield Timing(
                "sum of own tokens + residual + norm",
                tokens,
                residual.numel() * residual.element_size(),
                self.time(lambda: self.group.scatter_sum(part, counts, residual, norm=self.norm)),  # noqa: B023
            )
        columns = -(-self.options.vocab_size // self.shard.size)
        for rows in _ROWS:
            part = self._random(self.shard.rank, rows, columns)
            out = part.new_empty(rows, self.options.vocab_size)
            yield Timing(
                "gather of logits",
                rows,
                part.numel() * part.element_size(),
                self.time(lambda: self.group.gather(part, out)),  # noqa: B023
            )

    def time(self, collective: Callable[[], Tensor]) -> float:
        """Median microseconds of one, of a graph of several. All ranks call it."""
        count = _IN_A_GRAPH[self.options.device]

        def program() -> _Output:
            for _ in range(count):
                output = collective()
            return _Output(output)

        with self.group.loop_back():
            graph = create_backend(self.platform.default_graph_backend).capture(program, 1)
        self.platform.synchronize()
        times = []
        for _ in range(2 + self.options.repeats):
            self.exchange(b"")
            times.append(1e6 * self._timed(graph.replay) / count)
        if fault := self.group.fault():
            raise StepgraphError(f"rank {self.shard.rank} gave up: {fault}")
        return statistics.median(times[2:])

    def _timed(self, replay: Callable[[], object]) -> float:
        """Seconds of the device."""
        if self.platform.device.type != "cuda":
            started = time.perf_counter()
            replay()
            return time.perf_counter() - started
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(_CYCLES_TO_LAUNCH)  # so that all that follows is there when it begins
        self.group.add_sum(*self._nothing)  # so that all ranks begin together
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def _random(self, seed: int, rows: int, columns: int | None = None) -> Tensor:
        """The same on all ranks; the first rows are the same whatever their number."""
        generator = torch.Generator().manual_seed(seed)
        size = rows, self.options.hidden_size if columns is None else columns
        return torch.randn(size, generator=generator).to(self.options.dtype).to(self.platform.device)

    def _same(self, what: str, found: Tensor, expected: Tensor, *, exact: bool = True, of_all: bool = True) -> None:
        """`of_all`: whether all ranks find the same."""
        close = torch.equal(found, expected) if exact else torch.allclose(found, expected, rtol=0.02, atol=0.02)
        digests = self.exchange(hashlib.sha256(found.cpu().view(torch.uint8).numpy().tobytes()).digest())
        differ = of_all and len(set(digests)) > 1
        if not close or differ:
            ranks = "; ranks differ" if differ else ""
            worst = (found.float() - expected.float()).abs().max()
            raise StepgraphError(f"rank {self.shard.rank}: {what} is not as defined: {worst} off{ranks}")


class _Output(NamedTuple):
    value: Tensor


def _link_bytes_per_s(shard: Shard, exchange: Exchange, platform: Platform) -> float:
    """A large copy's, one way: between GPUs 0 and 1, or from a CPU's memory to itself."""
    found = 0.0
    if shard.rank == 0:
        size = (1 << 30) if platform.device.type == "cuda" else (64 << 20)
        source = torch.ones(size, dtype=torch.uint8, device=platform.device)
        target = torch.empty_like(source, device="cpu" if platform.device.type == "cpu" else "cuda:1")
        times = []
        for _ in range(6):
            started = time.perf_counter()
            target.copy_(source)
            for index in range(2 if platform.device.type == "cuda" else 0):
                torch.cuda.synchronize(index)
            times.append(time.perf_counter() - started)
        found = size / min(times)
        del source, target
        platform.release_cached_memory()
    exchange(b"")
    return found


def _table(timings: list[Timing], num_ranks: int, link_bytes_per_s: float) -> str:
    rows = []
    for timing in timings:
        least = 1e6 * (num_ranks - 1) * timing.bytes / link_bytes_per_s
        rows.append(
            [
                timing.collective,
                str(timing.rows),
                f"{timing.bytes / 1024:,.0f}",
                f"{timing.us:.2f}",
                f"{least:.2f}",
            ]
        )
    header = ["collective", "rows", "KiB", "us", "link us"]
    return table(header, rows)

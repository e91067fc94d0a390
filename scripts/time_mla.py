"""How long latent attention takes on a GPU, beside what memory and tensor cores allow, and with which launches.

    python scripts/time_mla.py [--heads 16 128] [--contexts 1024 4096] [--rows 1 32 128] [--queries 1 4] [--tune] [--json FILE]

Results are checked against plain torch in float32 first. Then calls are timed in a CUDA graph, each on entries of its own, so
that no cache holds them. Bytes are those of each row's entries once, and of queries and outputs; FLOPs those of the keys that
each token sees. With --tune, launches, programs of a multiprocessor, splits and heights of tiles are tried on some cases.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from unittest import mock

import torch
from time_experts import time_us
from torch import Tensor
from triton.runtime.errors import OutOfResources

from stepgraph.ops.attention import AttentionGeometry, AttentionPlan, attention_plan, max_tiles
from stepgraph.ops.mla_attention import mla_attention, mla_geometry, reference
from stepgraph.ops.mla_attention import triton as kernels
from stepgraph.ops.mla_attention.geometry import programs_of
from stepgraph.platforms.compile_ahead import compile_ahead
from stepgraph.platforms.kernels import kernel_tuning
from stepgraph.platforms.tuning import SM_90

CHUNK = 512
"""Tokens of the prompt that a mixture has beside its rows."""
COLD_BYTES = 256 << 20
"""What calls read before the first one's entries are read again; five times the second-level cache of a Hopper GPU."""
MAX_CALLS = 64
CHECKED_ROWS = 4


@dataclass(frozen=True)
class Sizes:
    """Of a layer and its cache."""

    rank: int
    rotated: int
    block_size: int
    cache_dtype: torch.dtype

    @property
    def entry_bytes(self) -> int:
        return (self.rank + self.rotated) * self.cache_dtype.itemsize


@dataclass(frozen=True)
class Work:
    """Rows of a step, (query length, entries before this step), and the heads of its layers."""

    name: str
    heads: int
    rows: tuple[tuple[int, int], ...]

    @property
    def num_tokens(self) -> int:
        return sum(n for n, _ in self.rows)

    def flops(self, sizes: Sizes) -> float:
        pairs = sum(n * context + n * (n + 1) // 2 for n, context in self.rows)
        return 2.0 * self.heads * pairs * (2 * sizes.rank + sizes.rotated)

    def entries(self) -> int:
        return sum(n + context for n, context in self.rows)

    def num_bytes(self, sizes: Sizes) -> float:
        queries = self.num_tokens * self.heads * (2 * sizes.rank + sizes.rotated) * 2
        return self.entries() * sizes.entry_bytes + queries


def works(arguments: argparse.Namespace) -> list[Work]:
    """The table's cases. A context counts the step's own tokens, but for a chunk's."""
    found = [
        Work(f"q={n}", heads, ((n, context - n),) * rows)
        for heads, context, rows, n in itertools.product(
            arguments.heads, arguments.contexts, arguments.rows, arguments.queries
        )
    ]
    for heads in arguments.heads:
        context, rows = arguments.contexts[len(arguments.contexts) // 2], arguments.rows[-1]
        found.append(Work(f"q=1 + {CHUNK}", heads, ((1, context - 1),) * rows + ((CHUNK, context),)))
    return found


class Case:
    """Calls that do the same work on entries of their own."""

    def __init__(self, work: Work, sizes: Sizes, pool: Tensor) -> None:
        self.work, self.sizes, self.cache = work, sizes, pool
        lengths = torch.tensor(work.rows, dtype=torch.int32, device="cuda")
        self.kv_len = lengths.sum(1, dtype=torch.int32)
        starts = lengths[:, 0].cumsum(0, dtype=torch.int32)
        self.query_start = torch.cat((starts.new_zeros(1), starts))
        self.row_slot = torch.arange(len(work.rows), dtype=torch.int32, device="cuda")
        width = -(-int(self.kv_len.max()) // sizes.block_size)
        per_call = len(work.rows) * width
        wanted = -(-COLD_BYTES // (work.entries() * sizes.entry_bytes))
        self.num_calls = max(1, min(MAX_CALLS, wanted, (pool.shape[0] - 1) // per_call))
        block = 1 + torch.randperm(pool.shape[0] - 1, device="cuda")[: self.num_calls * per_call].int()
        self.block_tables = block.view(self.num_calls, len(work.rows), width)
        shape = (work.num_tokens, work.heads, sizes.rank + sizes.rotated)
        self.q = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        self.scale = (sizes.rank // 4 + sizes.rotated) ** -0.5 / 4

    def geometry(self) -> AttentionGeometry:
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        sizes = self.work.num_tokens, len(self.work.rows), self.work.heads, multiprocessors
        return mla_geometry(*sizes, tuning=kernel_tuning())

    def plan(self, geometry: AttentionGeometry) -> AttentionPlan:
        heads = self.work.heads, 1, self.sizes.rank
        return attention_plan(self.row_slot, self.query_start, self.kv_len, *heads, geometry)

    def call(self, index: int, plan: AttentionPlan, geometry: AttentionGeometry) -> Tensor:
        rows = self.row_slot, self.query_start, self.kv_len
        sizes = {"value_dim": self.sizes.rank, "scale": self.scale}
        return mla_attention(self.q, self.cache, self.block_tables[index], *rows, plan, geometry, **sizes)

    def once(self, geometry: AttentionGeometry) -> Tensor:
        return self.call(0, self.plan(geometry), geometry)

    def error(self, geometry: AttentionGeometry) -> float:
        """The largest difference from plain torch beside the largest value, of some of the rows, the last among them."""
        out, worst = self.once(geometry), 0.0
        count = len(self.work.rows)
        for row in {*torch.randperm(count)[: CHECKED_ROWS - 1].tolist(), count - 1}:
            tokens = slice(int(self.query_start[row]), int(self.query_start[row + 1]))
            rows = (
                self.row_slot[row : row + 1],
                torch.tensor([0, tokens.stop - tokens.start]),
                self.kv_len[row : row + 1],
            )
            expected = reference.mla_attention(
                self.q[tokens].float(), self.cache, self.block_tables[0], *rows, self.sizes.rank, self.scale
            )
            difference = (out[tokens].float() - expected).abs().max() / expected.abs().max()
            worst = max(worst, float(difference.nan_to_num(torch.inf)))
        return worst

    def time_us(self, geometry: AttentionGeometry, **often: int) -> float:
        """Of one call, see `time_experts.time_us`."""
        plan = self.plan(geometry)
        return time_us([partial(self.call, index, plan, geometry) for index in range(self.num_calls)], **often)


def check(case: Case, geometry: AttentionGeometry) -> float:
    error = case.error(geometry)
    if not error < 0.02:
        raise SystemExit(f"{case.work}: off by {error:.3g} of the largest value")
    return error


def table(cases: list[Case], arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Check and time all cases, and print what comes out."""
    print("heads context rows        what tile   error      us   least of least   GB/s TFLOP/s")
    for case in cases:
        geometry, work = case.geometry(), case.work
        error, us = check(case, geometry), case.time_us(geometry)
        num_bytes, flops = work.num_bytes(case.sizes), work.flops(case.sizes)
        least = max(num_bytes / arguments.bytes_per_s, flops / arguments.flops) * 1e6
        context = int(case.kv_len[0])
        print(
            f"{work.heads:5} {context:7} {len(work.rows):4} {work.name:>11} {geometry.tile:4} {error:7.2g} {us:7.1f} "
            f"{least:7.1f} {least / us:8.0%} {num_bytes / us / 1e3:6.0f} {flops / us / 1e6:7.0f}",
            flush=True,
        )
        yield {
            "heads": work.heads,
            "context": context,
            "rows": len(work.rows),
            "what": work.name,
            "tile": geometry.tile,
            "error": error,
            "us": us,
            "least_us": least,
            "GB/s": num_bytes / us / 1e3,
            "TFLOP/s": flops / us / 1e6,
        }


@dataclass(frozen=True)
class Choice:
    """What is tried."""

    tile: int
    launch: kernels.Launch
    programs: int  # of a multiprocessor
    min_split_keys: int = SM_90.min_split_keys_latent
    columns: int = kernels.COLUMNS
    splits: int = kernels.SPLITS
    shares: int = kernels.SHARES

    def patched(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(mock.patch.dict(kernels.LAUNCHES, {self.tile: self.launch}))
        for name in ("columns", "splits", "shares"):
            stack.enter_context(mock.patch.object(kernels, name.upper(), getattr(self, name)))
        return stack

    def geometry(self, case: Case) -> AttentionGeometry:
        target = torch.cuda.get_device_properties(0).multi_processor_count * self.programs
        tiles = max_tiles(case.work.num_tokens, len(case.work.rows), case.work.heads, self.tile)
        return replace(
            case.geometry(),
            tile=self.tile,
            min_split_keys=self.min_split_keys,
            split_target=target,
            max_items=tiles + target,
            max_partials=2 * target,
            num_programs=min(tiles + target, target),
        )


def chosen(tile: int) -> Choice:
    """What is used."""
    return Choice(tile, kernels.LAUNCHES[tile], programs_of(tile, kernel_tuning()))


def choices(case: Case) -> list[Choice]:
    """One thing after the other: launches of each height, then splits and their combination with the launch that there is."""
    of_tile = {
        16: [
            (32, 4, 3, 2),
            (32, 4, 2, 2),
            (32, 4, 4, 1),
            (32, 8, 3, 2),
            (32, 8, 5, 1),
            (32, 8, 6, 1),
            (16, 4, 4, 2),
            (64, 8, 3, 1),
        ],
        32: [(32, 8, 3, 1), (32, 8, 4, 1), (32, 8, 5, 1), (32, 4, 3, 1), (16, 8, 5, 1), (64, 8, 2, 1)],
        64: [(32, 8, 3, 1), (32, 8, 4, 1), (32, 8, 2, 1), (16, 8, 5, 1), (64, 8, 2, 1)],
    }
    pairs = case.work.heads * max(n for n, _ in case.work.rows)
    found = [
        Choice(tile, kernels.Launch(*launch), programs)
        for tile, launches in of_tile.items()
        if tile <= max(16, 2 * pairs) and pairs <= 8 * tile
        for *launch, programs in launches
    ]
    now = chosen(case.geometry().tile)
    found += [replace(now, min_split_keys=keys) for keys in (128, 256, 512)]
    if len(case.work.rows) < 32:
        found += [replace(now, columns=columns, splits=splits) for columns, splits in ((128, 64), (256, 16), (512, 16))]
        found += [replace(now, shares=shares) for shares in (4, 16)]
    return found


def tuned_works() -> list[Work]:
    """What launches are chosen by."""
    return [
        Work("q=1", 16, ((1, 4095),) * 128),
        Work("q=1", 16, ((1, 1023),) * 128),
        Work("q=1", 16, ((1, 1023),) * 8),
        Work("q=1", 16, ((1, 32767),)),
        Work("q=1", 20, ((1, 4095),) * 64),
        Work("q=4", 16, ((4, 1020),) * 128),
        Work("q=1", 128, ((1, 4095),) * 64),
    ]


def tune(cases: list[Case], best: int) -> Iterator[dict[str, object]]:
    """Every choice that fits, the best first."""
    for case in cases:
        found, (n, context) = [], case.work.rows[0]
        for choice in choices(case):
            try:
                with choice.patched():
                    geometry = choice.geometry(case)
                    error = case.error(geometry)
                    found.append((case.time_us(geometry, replays=2, rounds=3), error, choice))
            except OutOfResources:
                continue
        print(f"{case.work.heads} heads, {len(case.work.rows)} rows of {n} with {n + context}:")
        for place, (us, error, choice) in enumerate(sorted(found, key=lambda triple: triple[0])):
            rate = case.work.num_bytes(case.sizes) / us / 1e3
            if place < best or choice == chosen(choice.tile):
                print(f"  {us:8.1f} us {rate:5.0f} GB/s error {error:.2g} {choice}", flush=True)
            yield {"work": asdict(case.work), "us": us, "error": error, **asdict(choice)}


def compiled(cases: list[Case], tuned: list[Case]) -> Iterator[Callable[[], object]]:
    """Calls that together launch all kernels."""

    def patched(case: Case, choice: Choice) -> None:
        with choice.patched():
            case.once(choice.geometry(case))

    for case in cases:
        yield partial(case.once, case.geometry())
    for case in tuned:
        yield from (partial(patched, case, choice) for choice in choices(case))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--heads", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 32768])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rank", type=int, default=512)
    parser.add_argument("--rotated", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--cache", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--tune", action="store_true", help="instead of the table")
    parser.add_argument(
        "--best", type=int, default=4, metavar="N", help="choices to print of a case; all are in the JSON"
    )
    parser.add_argument("--bytes-per-s", type=float, default=4.8e12, help="of the device's memory")
    parser.add_argument("--flops", type=float, default=989e12, help="a second, of 16 bits")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    cache_dtype = torch.float8_e4m3fn if arguments.cache == "fp8" else torch.bfloat16
    sizes = Sizes(arguments.rank, arguments.rotated, arguments.block_size, cache_dtype)
    listed = tuned_works() if arguments.tune else works(arguments)
    most = max(len(work.rows) * max(n + context + sizes.block_size for n, context in work.rows) for work in listed)
    blocks = max(most, 2 * COLD_BYTES // sizes.entry_bytes) // sizes.block_size + 2
    pool = torch.empty(blocks, sizes.block_size, sizes.rank + sizes.rotated, dtype=cache_dtype, device="cuda")
    for part in pool.split(4096):
        part.copy_(torch.randn(part.shape, dtype=torch.bfloat16, device="cuda"))
    cases = [Case(work, sizes, pool) for work in listed]
    started = time.perf_counter()
    compile_ahead(compiled([], cases) if arguments.tune else compiled(cases, []))
    print(f"compiled in {time.perf_counter() - started:.0f} s", flush=True)
    rows = list(tune(cases, arguments.best) if arguments.tune else table(cases, arguments))
    if arguments.json:
        described = {**asdict(sizes), "cache_dtype": arguments.cache}
        with open(arguments.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), **described, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()

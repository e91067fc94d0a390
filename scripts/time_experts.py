"""How long the experts of a layer take on a GPU, beside what memory and tensor cores allow, and with which tiles.

    python scripts/time_experts.py [--tokens 64 2048] [--formats bf16] [--sweep] [--json FILE]

Results are checked against products of float32 first. Then calls are timed in a CUDA graph that goes round layers of weights that
no cache holds. Bytes and FLOPs are those that a routing touches: its experts' weights once, the tokens once in and once out. With
--sweep, both products are timed with a handful of tiles too.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from triton.runtime.errors import OutOfResources

from stepgraph.ops.experts import ExpertDispatch, ExpertWork, expert_work, gated_experts, sum_experts, tiles
from stepgraph.ops.fp8_linear import dequantize, num_groups, quantize
from stepgraph.ops.route import Chosen
from stepgraph.platforms.compile_ahead import compile_ahead
from stepgraph.platforms.tuning import ExpertTile

LAYERS = 2
"""Of weights, 1.2 GB each at the default sizes."""
ROUTINGS = ("uniform", "zipf", "same")
FORMATS = ("bf16", "fp8", "fp8-groups")
"""Of 8 bits with a scale per output or for every group of its inputs."""
FEW = [
    ExpertTile(rows, outputs, inputs, num_warps, num_stages, copied)
    for rows in (16, 32, 64)
    for outputs, inputs, num_warps, num_stages, copied in (
        (64, 128, 4, 3, False),
        (64, 128, 4, 3, True),
        (64, 128, 4, 4, True),
        (128, 64, 4, 4, True),
        (128, 64, 4, 5, True),
        (128, 128, 4, 3, True),
        (256, 64, 8, 4, True),
    )
]
MANY = [
    ExpertTile(rows, outputs, inputs, num_warps, num_stages, copied=True)
    for rows, outputs, inputs, num_warps, num_stages in (
        (64, 128, 64, 4, 3),
        (64, 128, 64, 4, 4),
        (64, 256, 64, 8, 4),
        (128, 64, 128, 4, 3),
        (128, 128, 64, 4, 3),
        (128, 128, 64, 8, 3),
        (128, 128, 64, 8, 4),
        (128, 128, 128, 8, 3),
        (128, 256, 64, 8, 3),
        (128, 256, 64, 8, 4),
        (256, 128, 64, 8, 3),
        (256, 128, 64, 8, 4),
    )
]


@dataclass(frozen=True)
class Sizes:
    """Of the experts of a layer."""

    hidden: int
    width: int
    experts: int
    top: int


@dataclass(frozen=True)
class Layer:
    """Weights of one layer."""

    gate_up: Tensor
    gate_up_scale: Tensor | None
    down: Tensor
    down_scale: Tensor | None

    @property
    def bytes_per_expert(self) -> float:
        tensors = (self.gate_up, self.gate_up_scale, self.down, self.down_scale)
        return sum(t.nbytes for t in tensors if t is not None) / self.gate_up.shape[0]


def create_layer(sizes: Sizes, name: str) -> Layer:
    tensors: list[Tensor | None] = []
    for outputs, inputs in ((2 * sizes.width, sizes.hidden), (sizes.hidden, sizes.width)):
        values = torch.randn(sizes.experts, outputs, inputs, dtype=torch.bfloat16, device="cuda") / inputs**0.5
        if name == "bf16":
            tensors += [values, None]
            continue
        codes, scale = quantize(values.flatten(0, 1), 1 if name == "fp8" else num_groups(inputs))
        tensors += [codes.view_as(values), scale.view(sizes.experts, outputs, -1)]
    return Layer(*tensors)


def choose(sizes: Sizes, tokens: int, routing: str) -> Chosen:
    """Random experts. By Zipf's law, the n-th is drawn 1/n as often as the first; "same": all tokens have the same."""
    noise = -torch.empty(tokens, sizes.experts, device="cuda").exponential_().log()
    if routing == "zipf":
        noise -= torch.arange(1, sizes.experts + 1, device="cuda").log()[torch.randperm(sizes.experts, device="cuda")]
    if routing == "same":
        noise[:] = noise[0].clone()
    chosen = noise.topk(sizes.top)
    return Chosen(chosen.indices.to(torch.int32), chosen.values.softmax(1))


def check(layer: Layer, sizes: Sizes, dispatch: ExpertDispatch, tokens: int, routing: str, by_row: bool) -> float:
    """The largest error beside the largest value."""
    chosen, x = choose(sizes, tokens, routing), torch.randn(tokens, sizes.hidden, dtype=torch.bfloat16, device="cuda")
    out = torch.randn_like(x)
    expected = out.float()
    for number in range(sizes.experts):
        token_J, place_J = (chosen.expert == number).nonzero(as_tuple=True)
        gate, up = (x[token_J].float() @ values(layer.gate_up, layer.gate_up_scale, number).T).chunk(2, 1)
        product = (F.silu(gate) * up) @ values(layer.down, layer.down_scale, number).T
        expected.index_add_(0, token_J, product * chosen.weight[token_J, place_J, None])
    work = expert_work(chosen, 0, sizes.experts, dispatch)
    hidden = gated_experts(x, layer.gate_up, layer.gate_up_scale, work, gelu=False, by_row=by_row)
    sum_experts(hidden, layer.down, layer.down_scale, work, out, add=True, by_row=by_row)
    error = float(((out.float() - expected).abs().max() / expected.abs().max()).cpu())
    if not error < 0.01:
        raise SystemExit(f"{dispatch.value}, {tokens} tokens, {routing}: off by {error:.3g} of the largest value")
    return error


def values(weight: Tensor, scale: Tensor | None, number: int) -> Tensor:
    return weight[number].float() if scale is None else dequantize(weight[number], scale[number])


def time_us(calls: list[Callable[[], object]], replays: int = 5, rounds: int = 3) -> float:
    """Of one call, the least of some rounds."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    best = float("inf")
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) * 1000 / replays / len(calls))
    return best


class Case:
    """Calls of one number of tokens and one routing: one of each layer."""

    def __init__(self, layers: list[Layer], sizes: Sizes, tokens: int, routing: str) -> None:
        self.layers, self.sizes, self.tokens, self.routing = layers, sizes, tokens, routing
        self.chosen = [choose(sizes, tokens, routing) for _ in layers]
        self.x = torch.randn(tokens, sizes.hidden, dtype=torch.bfloat16, device="cuda")
        self.out = torch.randn_like(self.x)
        self.work = [expert_work(c, 0, sizes.experts, ExpertDispatch.TILES) for c in self.chosen]
        self.hidden = self.x.new_ones(tokens * sizes.top, sizes.width)

    def touched(self) -> tuple[float, float]:
        """Bytes and FLOPs of a layer."""
        experts = sum(len(c.expert.unique()) for c in self.chosen) / len(self.chosen)
        flops = 6 * self.tokens * self.sizes.top * self.sizes.hidden * self.sizes.width
        return experts * self.layers[0].bytes_per_expert + 3 * self.x.nbytes, flops

    def sort(self, index: int) -> ExpertWork:
        return expert_work(self.chosen[index], 0, self.sizes.experts, ExpertDispatch.TILES)

    def gated(self, index: int, tile: ExpertTile | None = None) -> Tensor:
        layer, work = self.layers[index], self.work[index]
        return tiles.gated_experts(self.x, layer.gate_up, layer.gate_up_scale, work.order, work.ends, False, tile=tile)

    def down(self, index: int, tile: ExpertTile | None = None) -> Tensor:
        layer, work = self.layers[index], self.work[index]
        return tiles.down_experts(self.hidden, layer.down, layer.down_scale, work.order, work.ends, tile=tile)

    def combine(self, index: int, down: Tensor) -> None:
        chosen = self.chosen[index]
        tiles.combine(down, chosen.expert, chosen.weight, 0, self.sizes.experts, self.out, True, 1.0)

    def whole(self, index: int, dispatch: ExpertDispatch) -> None:
        layer = self.layers[index]
        work = expert_work(self.chosen[index], 0, self.sizes.experts, dispatch)
        hidden = gated_experts(self.x, layer.gate_up, layer.gate_up_scale, work, gelu=False)
        sum_experts(hidden, layer.down, layer.down_scale, work, self.out, add=True)

    def of_layers(self, call: Callable[..., object], *arguments: object) -> list[Callable[[], object]]:
        return [partial(call, index, *arguments) for index in range(len(self.layers))]


def calls_of(case: Case, pairs: bool) -> dict[str, list[Callable[[], object]]]:
    """What is timed."""
    calls = {
        "sort": case.of_layers(case.sort),
        "gated": case.of_layers(case.gated),
        "down": case.of_layers(case.down),
        "combine": case.of_layers(case.combine, case.down(0)),
        "tiles": case.of_layers(case.whole, ExpertDispatch.TILES),
    }
    if pairs:
        calls["pairs"] = case.of_layers(case.whole, ExpertDispatch.PAIRS)
    return calls


def fits(tile: ExpertTile, weight: Tensor, tokens: int, sizes: Sizes) -> bool:
    """Whether a tile is worth a try, and has room in shared memory."""
    average = tokens * sizes.top / sizes.experts
    stage = tile.inputs * (tile.outputs * weight.element_size() + tile.rows * 2)
    return average / 8 <= tile.rows <= max(16, 2 * average) and tile.num_stages * stage < 227 * 1024


def products(case: Case) -> list[tuple[str, Callable[..., Tensor], list[ExpertTile]]]:
    """Both products, and the tiles to be tried."""
    candidates = FEW if case.tokens * case.sizes.top <= 16 * case.sizes.experts else MANY
    return [
        (
            name,
            product,
            [tile for tile in candidates if fits(tile, weight, case.tokens, case.sizes)],
        )
        for name, product, weight in (
            ("gated", case.gated, case.layers[0].gate_up),
            ("down", case.down, case.layers[0].down),
        )
    ]


def sweep(case: Case) -> Iterator[tuple[int, dict[str, object]]]:
    """Every tile that fits, of either product, the best first, and its place."""
    for name, product, candidates in products(case):
        found, expected = [], product(0)
        for tile in candidates:
            try:
                same = torch.equal(product(0, tile), expected)
                found.append((time_us(case.of_layers(product, tile), replays=2, rounds=2), same, tile))
            except OutOfResources:
                continue
        for place, (microseconds, same, tile) in enumerate(sorted(found, key=lambda triple: triple[0])):
            yield place, {"product": name, "us": round(microseconds, 1), "same_bits": same, **asdict(tile)}


def run_format(name: str, sizes: Sizes, arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Check and time the experts of one format, and print what comes out."""
    layers = [create_layer(sizes, name) for _ in range(LAYERS)]
    cases = [Case(layers, sizes, *case) for case in itertools.product(arguments.tokens, arguments.routings)]
    started = time.perf_counter()
    compile_ahead(compiled(cases, arguments))
    print(f"{name}: compiled in {time.perf_counter() - started:.0f} s", flush=True)
    checks = [(ExpertDispatch.TILES, tokens) for tokens in (50, 200, 500, 1000)]  # some of each kind of tiles
    for dispatch, tokens in checks + [(ExpertDispatch.PAIRS, 20)] * (arguments.pairs_up_to > 0):
        errors = [
            check(layers[0], sizes, dispatch, tokens, routing, by_row)
            for routing, by_row in itertools.product(arguments.routings, (False, True))
        ]
        print(f"{name}: {dispatch.value}, {tokens} tokens: off by {max(errors):.2g} of the largest value at most")
    print("tokens  routing    sort  gated   down combine  tiles  pairs   least  GB/s TFLOP/s  of least")
    for case in cases:
        (num_bytes, flops), calls = case.touched(), calls_of(case, case.tokens <= arguments.pairs_up_to)
        us = {what: time_us(call) for what, call in calls.items()}
        least = max(num_bytes / arguments.bytes_per_s, flops / arguments.flops) * 1e6
        print(
            f"{case.tokens:6} {case.routing:>8} {us['sort']:7.1f} {us['gated']:6.0f} {us['down']:6.0f} {us['combine']:7.1f} "
            f"{us['tiles']:6.0f} {us.get('pairs', float('nan')):6.0f} {least:7.0f} {num_bytes / us['tiles'] / 1e3:5.0f} "
            f"{flops / us['tiles'] / 1e6:7.0f} {least / us['tiles']:9.0%}",
            flush=True,
        )
        yield {"format": name, "tokens": case.tokens, "routing": case.routing, "least": least, "us": us}
    for case in cases if arguments.sweep else []:
        if case.routing == arguments.routings[0]:
            for place, row in sweep(case):
                if place < 3:
                    print(case.tokens, *(f"{key}={value}" for key, value in row.items()), flush=True)
                yield {"format": name, "tokens": case.tokens, "routing": case.routing, **row}


def compiled(cases: list[Case], arguments: argparse.Namespace) -> Iterator[Callable[[], object]]:
    """Calls that together launch all kernels."""
    for case in cases:
        for calls in calls_of(case, case.tokens <= arguments.pairs_up_to).values():
            yield calls[0]
        if arguments.sweep:
            for _, product, candidates in products(case):
                yield from (partial(product, 0, tile) for tile in candidates)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top", type=int, default=8)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192]
    )
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["bf16", "fp8"])
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=list(ROUTINGS))
    parser.add_argument("--pairs-up-to", type=int, default=64, metavar="T", help="time the pairs' dispatch too")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--bytes-per-s", type=float, default=4.2e12, help="of a copy, read and written")
    parser.add_argument("--flops", type=float, default=750e12, help="a second, of 16 bits")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    sizes = Sizes(arguments.hidden, arguments.width, arguments.experts, arguments.top)
    torch.manual_seed(0)
    rows = [row for name in arguments.formats for row in run_format(name, sizes, arguments)]
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), **asdict(sizes), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()

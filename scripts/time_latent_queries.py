"""How long the products of heads in latent attention take on a GPU, before it and after it, beside what memory and tensor cores
allow, beside torch.bmm, and with which tiles.

    python scripts/time_latent_queries.py [--models v2-lite v3] [--tokens 1 64 2048] [--sweep] [--json FILE]

Results are checked against products of float32 first, and the last token's bits against those that it has alone, where they shall
not depend on the batch ("fixed"). Then calls are timed in a CUDA graph that goes round layers of weights that no cache holds.
Bytes are those of weights, tokens and results, once. Of what comes before attention, torch's time is that of the product alone.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from time_experts import time_us
from torch import Tensor
from triton.runtime.errors import OutOfResources

from stepgraph.ops import head_linear, latent_queries
from stepgraph.ops.head_linear import triton as after
from stepgraph.ops.head_linear.triton import HeadTile, choose_tile
from stepgraph.ops.latent_queries import triton as before
from stepgraph.platforms.compile_ahead import compile_ahead

CACHE_BYTES = 200 << 20
"""Of weights that are gone round, so that none is in a cache when its turn comes."""
EPS = 1e-6
FEW = [
    HeadTile(16, outputs, inputs, num_warps, num_stages=1, weight_first=True)
    for outputs, inputs, num_warps in itertools.product((16, 32, 64, 128), (64, 128), (4, 8))
] + [HeadTile(16, outputs, 64, 4, num_stages) for outputs, num_stages in itertools.product((16, 32, 64), (3, 4))]
MANY = [
    HeadTile(*sizes)
    for sizes in (
        (32, 32, 64, 4, 4),
        (32, 64, 64, 4, 4),
        (64, 32, 64, 4, 3),
        (64, 32, 64, 4, 4),
        (64, 64, 64, 4, 3),
        (64, 64, 64, 4, 4),
        (64, 128, 64, 4, 3),
        (64, 128, 64, 8, 3),
        (128, 64, 64, 4, 3),
        (128, 64, 64, 8, 3),
        (128, 128, 64, 4, 3),
        (128, 128, 64, 8, 2),
        (128, 128, 64, 8, 3),
        (128, 128, 64, 8, 4),
        (128, 256, 64, 8, 3),
    )
]


@dataclass(frozen=True)
class Sizes:
    """Of a layer's latent attention."""

    heads: int
    key_dim: int
    rotated_dim: int
    kv_rank: int
    value_dim: int


MODELS = {
    "v2-lite": Sizes(16, 128, 64, 512, 128),
    "v3": Sizes(128, 128, 64, 512, 128),
    "glm-4.7-flash": Sizes(20, 192, 64, 512, 256),
    "minicpm3": Sizes(40, 64, 32, 256, 64),
}


class Case:
    """Both operators' arguments for some tokens, and weights of several layers."""

    def __init__(self, sizes: Sizes, weights: list[Tensor], tokens: int) -> None:
        self.sizes, self.weights, self.tokens = sizes, weights, tokens
        entry = sizes.kv_rank + sizes.rotated_dim
        queries = sizes.heads * (sizes.key_dim + sizes.rotated_dim)
        numbers = partial(torch.randn, dtype=torch.bfloat16, device="cuda")
        self.q, self.latent = numbers(tokens, queries + entry).tensor_split((queries,), dim=1)
        self.positions = torch.arange(tokens, dtype=torch.int32, device="cuda")
        angle = torch.rand(tokens, sizes.rotated_dim // 2, device="cuda")
        self.cos_sin = torch.cat((angle.cos(), angle.sin()), dim=1)
        self.norm = numbers(sizes.kv_rank)
        self.cache = numbers(-(-tokens // 16), 16, entry)
        self.attended = numbers(tokens, sizes.heads, sizes.kv_rank)
        self.absorbed = numbers(tokens, sizes.heads, entry)
        self.out = numbers(tokens, sizes.heads * sizes.value_dim)

    def key_weight(self, index: int) -> Tensor:
        return self.weights[index][:, : self.sizes.key_dim]

    def value_weight(self, index: int) -> Tensor:
        return self.weights[index][:, self.sizes.key_dim :]

    def before_arguments(self, index: int) -> tuple[object, ...]:
        return (
            self.q, self.latent, self.positions, self.positions, self.cos_sin, self.norm, self.key_weight(index), self.cache, EPS
        )  # fmt: skip

    def before(self, index: int, tile: HeadTile | None = None, deterministic: bool = False) -> Tensor:
        if tile is None:
            return latent_queries(*self.before_arguments(index), deterministic=deterministic)  # type: ignore[arg-type]
        before.launch(*self.before_arguments(index), self.absorbed, tile)  # type: ignore[arg-type]
        return self.absorbed

    def after(self, index: int, tile: HeadTile | None = None, deterministic: bool = False) -> Tensor:
        if tile is None:
            return head_linear(self.attended, self.value_weight(index), deterministic=deterministic)
        after.multiply(self.attended, self.value_weight(index), self.out, tile)
        return self.out

    def absorb_by_library(self, index: int) -> Tensor:
        """The product of `before` alone."""
        q_HTN = self.q.view(self.tokens, self.sizes.heads, -1)[..., : self.sizes.key_dim].transpose(0, 1)
        return torch.bmm(q_HTN, self.key_weight(index), out=self.absorbed.transpose(0, 1)[..., : self.sizes.kv_rank])

    def after_by_library(self, index: int) -> Tensor:
        out_HTV = self.out.view(self.tokens, self.sizes.heads, -1).transpose(0, 1)
        return torch.bmm(self.attended.transpose(0, 1), self.value_weight(index).transpose(1, 2), out=out_HTV)

    def touched(self, what: str) -> tuple[int, int]:
        """Bytes and FLOPs of a call."""
        T = self.tokens
        if what == "before":
            key = self.key_weight(0)
            num_bytes = 2 * (key.numel() + self.q.numel() + 2 * self.latent.numel() + self.absorbed.numel())
            return num_bytes, 2 * T * key.numel()
        value = self.value_weight(0)
        return 2 * (value.numel() + self.attended.numel() + self.out.numel()), 2 * T * value.numel()

    def of_layers(self, call: Callable[..., object], *arguments: object) -> list[Callable[[], object]]:
        return [partial(call, index, *arguments) for index in range(len(self.weights))]

    def chosen(self, what: str) -> HeadTile:
        sizes = self.sizes
        outputs, inputs = (sizes.kv_rank, sizes.key_dim) if what == "before" else (sizes.value_dim, sizes.kv_rank)
        return choose_tile(self.q, sizes.heads, outputs, inputs, deterministic=False)


def check(case: Case) -> float:
    """The largest error beside the largest value, of both operators; of deterministic ones also whether a token has the same bits
    alone."""
    q_THN, q_THP = case.q.float().unflatten(1, (case.sizes.heads, -1)).tensor_split((case.sizes.key_dim,), dim=2)
    cos_TP, sin_TP = case.cos_sin.chunk(2, dim=1)
    low, high = q_THP.chunk(2, dim=2)
    cos_TP, sin_TP = cos_TP.unsqueeze(1), sin_TP.unsqueeze(1)
    absorbed = torch.einsum("thn,hnr->thr", q_THN, case.key_weight(0).float())
    expected = torch.cat((absorbed, low * cos_TP - high * sin_TP, high * cos_TP + low * sin_TP), dim=2)
    outputs = torch.einsum("thr,hvr->thv", case.attended.float(), case.value_weight(0).float()).flatten(1)
    error = 0.0
    for call, wanted in ((case.before, expected), (case.after, outputs)):
        for deterministic in (False, True):
            found = call(0, None, deterministic).float()
            error = max(error, float((found - wanted).abs().max() / wanted.abs().max()))
    if not error < 0.01:
        raise SystemExit(f"{case.tokens} tokens, {case.sizes}: off by {error:.3g} of the largest value")
    last = case.tokens - 1
    whole = case.before(0, None, True)[last], case.after(0, None, True)[last]
    line = slice(last, last + 1)
    queries = case.before_arguments(0)
    alone_before = latent_queries(
        *(x[line] for x in queries[:4]),
        *queries[4:],
        deterministic=True,  # type: ignore[index,arg-type]
    )[0]
    alone_after = head_linear(case.attended[line], case.value_weight(0), deterministic=True)[0]
    if not (torch.equal(whole[0], alone_before) and torch.equal(whole[1], alone_after)):
        raise SystemExit(f"{case.tokens} tokens, {case.sizes}: a deterministic token has other bits alone")
    return error


def candidates(case: Case, what: str) -> list[HeadTile]:
    """Tiles to try, but for those whose part of the weight registers cannot hold."""
    tiles, inputs = (
        FEW if case.tokens <= 16 else MANY,
        getattr(case.sizes, "key_dim" if what == "before" else "kv_rank"),
    )
    return [tile for tile in tiles if not tile.weight_first or tile.outputs * inputs <= 4 * after.FIRST_NUMBERS]


def sweep(case: Case, what: str) -> list[tuple[float, HeadTile]]:
    """Times of all tiles that fit, ascending."""
    call, found = getattr(case, what), []
    for tile in candidates(case, what):
        try:
            found.append((time_us(case.of_layers(call, tile)), tile))
        except OutOfResources:
            continue
    return sorted(found, key=lambda pair: pair[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 256, 2048])
    parser.add_argument("--sweep", action="store_true", help="time other tiles too, and print the best three")
    parser.add_argument("--bytes-per-s", type=float, default=4.2e12, help="of a copy, read and written")
    parser.add_argument("--flops", type=float, default=750e12, help="a second, of 16 bits")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for name in arguments.models:
        sizes = MODELS[name]
        shape = sizes.heads, sizes.key_dim + sizes.value_dim, sizes.kv_rank
        layers = max(2, min(64, CACHE_BYTES // (2 * shape[0] * shape[1] * shape[2])))
        weights = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") / 16 for _ in range(layers)]
        cases = [Case(sizes, weights, tokens) for tokens in arguments.tokens]
        compile_ahead(
            partial(getattr(case, what), 0, None, deterministic)
            for case, what, deterministic in itertools.product(cases, ("before", "after"), (False, True))
        )
        if arguments.sweep:
            compile_ahead(
                partial(getattr(case, what), 0, tile)
                for case, what in itertools.product(cases, ("before", "after"))
                for tile in candidates(case, what)
            )
        print(f"{name}: off by {max(check(case) for case in cases):.2g} of the largest value at most")
        print("tokens   what      us  fixed  library  least  GB/s TFLOP/s  of least  tile")
        for case, what in itertools.product(cases, ("before", "after")):
            us = time_us(case.of_layers(getattr(case, what)))
            fixed = time_us(case.of_layers(getattr(case, what), None, True))
            library = time_us(case.of_layers(case.absorb_by_library if what == "before" else case.after_by_library))
            num_bytes, flops = case.touched(what)
            least = max(num_bytes / arguments.bytes_per_s, flops / arguments.flops) * 1e6
            tile = case.chosen(what)
            print(
                f"{case.tokens:6} {what:>6} {us:7.1f} {fixed:6.1f} {library:8.1f} {least:6.1f} {num_bytes / us / 1e3:5.0f} "
                f"{flops / us / 1e6:7.0f} {least / us:9.0%}  {tile}",
                flush=True,
            )
            row = {
                "model": name,
                "tokens": case.tokens,
                "what": what,
                "us": us,
                "fixed_us": fixed,
                "library_us": library,
            }
            rows.append({**row, "least_us": least, "tile": asdict(tile)})
            if arguments.sweep:
                times = sweep(case, what)
                for tile_us, other in times[:3]:
                    print(f"{'':13} {tile_us:7.1f} {other}", flush=True)
                rows[-1]["sweep"] = [{"us": tile_us, **asdict(other)} for tile_us, other in times]
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()

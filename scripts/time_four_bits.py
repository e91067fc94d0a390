"""How long products with weights of 4 bits take on a GPU, beside a read of the weight, and with which tiles.

    python scripts/time_four_bits.py [--tokens 1 8 64] [--sweep] [--json FILE]

The weights are those of a Qwen3-8B layer; calls are timed in a CUDA graph that goes round copies that no cache holds. With
--sweep, each product is timed with a handful of tiles too.
"""

import argparse
import json
from collections.abc import Callable

import torch

from stepgraph.ops.four_bit_linear import FourBitWeight
from stepgraph.ops.four_bit_linear import triton as kernel
from stepgraph.ops.four_bit_linear.triton import BlockTile, StreamedTile, Tile
from stepgraph.ops.linear.ends import ADD, STORE, SWIGLU
from stepgraph.platforms.tuning import FlatTile

SHAPES = {
    "qkv": (6144, 4096, STORE),
    "o": (4096, 4096, ADD),
    "gate and up": (24576, 4096, SWIGLU),
    "down": (4096, 12288, ADD),
}
BYTES_OF_COPIES = 512 << 20
BANDWIDTH = 4.2e12
"""Bytes a second that an H200 copies."""
GROUP_SIZE = 128


def tiles(tokens: int, inputs: int) -> list[Tile]:
    """Those to be tried for so many tokens."""
    found: list[Tile] = []
    if tokens <= 2:
        found += [
            StreamedTile(rows, min(inputs, 4096) // 2, warps)
            for rows, warps in ((2, 4), (4, 4), (4, 8), (8, 8), (16, 8))
        ]
    if tokens <= 64:
        found += [
            FlatTile(outputs, inputs_at_once, stages, warps)
            for outputs, inputs_at_once, stages, warps in (
                *((16, 512, 3, 1), (16, 512, 4, 1), (16, 512, 6, 1), (16, 256, 5, 1), (16, 1024, 3, 1)),
                *((32, 512, 3, 2), (32, 512, 4, 2), (64, 512, 3, 4), (64, 256, 2, 4), (64, 256, 3, 4), (64, 256, 4, 4)),
            )
        ]
    if tokens > 8:
        found += [
            BlockTile(tokens=size, outputs=outputs, code_bytes=code_bytes, num_warps=warps, num_stages=stages)
            for size, outputs, code_bytes, warps, stages in (
                *((16, 64, 64, 4, 4), (32, 64, 64, 4, 3), (32, 64, 64, 4, 5), (32, 128, 64, 8, 3)),
                *((64, 64, 64, 4, 3), (64, 64, 64, 4, 4), (64, 64, 64, 4, 5), (64, 128, 64, 8, 3), (64, 128, 64, 4, 3)),
                *((128, 64, 64, 4, 3), (128, 128, 64, 8, 3), (256, 128, 32, 8, 4), (256, 128, 32, 8, 3)),
            )
            if tokens <= 4 * size and size < 4 * tokens
        ]
    return found


def time_us(call: Callable[[int], object], copies: int) -> float:
    """Microseconds of a call, of one for each copy after each other in a graph."""
    for index in range(2):
        call(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(copies):
            call(index)
    graph.replay()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(3):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / copies)
    return min(times)


def main() -> None:
    """Print a line for each product and tile."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 8, 32, 64, 80, 2048])
    parser.add_argument("--sweep", action="store_true", help="try other tiles too")
    parser.add_argument("--json", help="write all times to this file")
    args = parser.parse_args()
    lines = []
    for name, (outputs, inputs, end) in SHAPES.items():
        size = outputs * inputs // 2 + outputs * inputs // GROUP_SIZE * 2
        copies = max(4, BYTES_OF_COPIES // size)
        weights = [
            FourBitWeight(
                torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device="cuda"),
                torch.rand(outputs, inputs // GROUP_SIZE, device="cuda").bfloat16() / 64,
                None,
                None,
                GROUP_SIZE,
                is_e2m1=False,
            )
            for _ in range(copies)
        ]
        for tokens in args.tokens:
            x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
            chosen = kernel.choose_tile(x, weights[0])
            for tile in [chosen, *(tiles(tokens, inputs) if args.sweep else [])]:
                is_whole = isinstance(tile, BlockTile) or (tokens > kernel.MAX_GATED_TOKENS and end == SWIGLU)
                own_end = STORE if is_whole and end == SWIGLU else end
                out = torch.zeros(
                    tokens, outputs // (2 if own_end == SWIGLU else 1), device="cuda", dtype=torch.bfloat16
                )

                def call(index: int, x=x, out=out, tile=tile, own_end=own_end, weights=weights) -> None:
                    kernel.multiply(x, weights[index % len(weights)], None, out, tile, own_end)

                try:
                    us = time_us(call, copies)
                except Exception as error:
                    print(f"{name:12} {tokens:5}  {type(error).__name__}  {tile}", flush=True)
                    continue
                lines.append({"product": name, "tokens": tokens, "us": us, "tile": str(tile), "chosen": tile is chosen})
                least = size / BANDWIDTH * 1e6
                mark = "*" if tile is chosen else " "
                print(f"{name:12} {tokens:5} {us:8.1f} us {us / least:5.2f} x {mark} {tile}", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(lines, file, indent=1)


if __name__ == "__main__":
    main()

"""From how many tokens on latent attention is faster on a GPU with this step's keys and values made for each head.

    python scripts/time_expanded_attention.py [--tokens 256 2048] [--heads 16] [--json FILE]

A layer of DeepSeek-V2-Lite's attention (16 heads) or DeepSeek-V3's (128) is run both ways, up to its output projection: a prompt
without context, one behind 4,096 tokens, and one beside 64 rows that decode behind 1,024. Both must give about the same. Then
they are timed in CUDA graphs, the second also with the kernel for Hopper. The last line says what `min_expanded_tokens` and
`hopper_expanded` of `KernelTuning` are to be. The operator over this step's keys is also timed alone, with other sizes of tiles
and iterations.
"""

import argparse
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import torch
from time_experts import time_us
from torch import Tensor
from triton.runtime.errors import OutOfResources

from stepgraph import ops
from stepgraph.layers.cache import LatentCache
from stepgraph.layers.inputs import AttentionWork, GroupInputs, StepInputs
from stepgraph.layers.latent_attention import LatentAttention, LatentSizes
from stepgraph.layers.norm import RMSNorm
from stepgraph.ops.expanded_attention import triton as kernels
from stepgraph.parallel.shard import WHOLE
from stepgraph.platforms.tuning import SM_90

SIZES = LatentSizes(q_rank=0, kv_rank=512, key_dim=128, rotated_dim=64, value_dim=128, scale=192**-0.5)
HIDDEN = {16: 2048, 128: 7168}
"""By number of heads."""
BLOCK_SIZE = 64
BESIDE = {"no context": [], "4,096 before": [], "64 decode beside": [(1, 1024)] * 64}
LAUNCHES = [
    kernels.Launch(keys, num_warps, num_stages)
    for keys, num_warps, num_stages in ((64, 8, 2), (64, 8, 3), (64, 4, 2), (64, 4, 3), (128, 8, 2), (32, 8, 4))
]


def rows_of(num_tokens: int, case: str) -> list[tuple[int, int]]:
    """New tokens of each row, and those that are cached."""
    return [*BESIDE[case], (num_tokens, 4096 if case == "4,096 before" else 0)]


def step_of(rows: list[tuple[int, int]], num_heads: int, device: torch.device, *, expanded: bool) -> StepInputs:
    """What the layer sees of such a step, whose rows have blocks one after the other."""
    query_lens = [query_len for query_len, _ in rows]
    kv_lens = [sum(row) for row in rows]
    blocks = [-(-kv_len // BLOCK_SIZE) for kv_len in kv_lens]
    table = torch.zeros(len(rows) + 1, max(blocks), dtype=torch.int32)
    slots, positions, first = [], [], 1
    for slot, (kv_len, count, (_, context_len)) in enumerate(zip(kv_lens, blocks, rows, strict=True), start=1):
        table[slot, :count] = torch.arange(first, first + count)
        position = torch.arange(context_len, kv_len)
        positions.append(position)
        slots.append(first * BLOCK_SIZE + position)
        first += count
    num_tokens, num_rows = sum(query_lens), len(rows)
    position = torch.cat(positions).int()
    tokens = ops.StepTokens(
        *(
            tensor.int().to(device)
            for tensor in (
                position,
                position,
                torch.cat(slots),
                torch.arange(1, num_rows + 1),
                torch.tensor([0, *query_lens]).cumsum(0),
                torch.tensor(kv_lens),
            )
        )
    )
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    sizes = num_tokens, num_rows, num_heads, multiprocessors
    own = ops.expanded_geometry(*sizes) if expanded else None
    geometry = replace(ops.mla_geometry(*sizes), own=own)
    spec = SIZES.spec(num_heads)
    work = {spec: AttentionWork.of(spec, tokens, geometry)}
    return StepInputs(tokens, work, (GroupInputs(table.to(device), tokens, BLOCK_SIZE),), caches=())


def create_layer(num_heads: int, device: torch.device) -> LatentAttention:
    layer = LatentAttention(
        HIDDEN[num_heads], num_heads, SIZES, bias=False, eps=1e-6, shard=WHOLE, dtype=torch.bfloat16, device=device
    )
    for parameter in layer.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5) if parameter.dim() > 1 else parameter.fill_(1.0)
    return layer


def calls_of(
    layer: LatentAttention, rows: list[tuple[int, int]], device: torch.device
) -> dict[str, Callable[[], Tensor]]:
    """The layer by either way."""
    num_heads = layer.spec.num_heads
    num_tokens = sum(query_len for query_len, _ in rows)
    x_TE = torch.randn(num_tokens, HIDDEN[num_heads], device=device).bfloat16()
    norm = RMSNorm(HIDDEN[num_heads], 1e-6, dtype=torch.bfloat16, device=device)
    norm.weight.fill_(1.0)
    angle = torch.rand(16384, SIZES.rotated_dim // 2, device=device) * 6
    cos_sin = torch.cat((angle.cos(), angle.sin()), dim=1)
    num_blocks = 1 + sum(-(-sum(row) // BLOCK_SIZE) for row in rows)
    cache = LatentCache(torch.randn(num_blocks, BLOCK_SIZE, SIZES.entry_size, device=device).bfloat16())
    absorbed, expanded = (
        partial(layer, norm, x_TE, cos_sin, cache, step_of(rows, num_heads, device, expanded=expanded))
        for expanded in (False, True)
    )
    return {"absorbed": absorbed, "expanded": expanded, "hopper": partial(on_hopper, expanded)}


def on_hopper(call: Callable[[], Tensor]) -> Tensor:
    """The result, by the kernel for Hopper where it serves."""
    with mock.patch.object(kernels, "kernel_tuning", return_value=replace(SM_90, hopper_expanded=True)):
        return call()


def check(calls: dict[str, Callable[[], Tensor]], what: str) -> float:
    """How far the ways are apart, beside the mean value."""
    absorbed, *others = (call().float() for call in calls.values())
    errors = [float((absorbed - other).abs().mean() / absorbed.abs().mean()) for other in others]
    for name, error in zip(list(calls)[1:], errors, strict=True):
        if not error < 0.02:
            raise SystemExit(f"{what}, {name}: apart from absorbed by {error:.3g} of the mean value")
    return max(errors)


def own_call(step: StepInputs, num_heads: int, device: torch.device, tile: int) -> Callable[[], Tensor]:
    """The operator over this step's keys alone, of one row."""
    T, tokens = step.tokens.positions.shape[0], step.tokens
    geometry = step.attention[SIZES.spec(num_heads)].geometry.own
    assert geometry is not None
    max_items = -(-T // tile)
    programs = min(max_items * num_heads, geometry.num_programs * 128 // tile)
    geometry = replace(geometry, tile=tile, max_items=max_items, num_programs=programs)
    rows = tokens.row_slot, tokens.query_start, tokens.kv_len
    plan = ops.attention_plan(*rows, num_heads, num_heads, SIZES.value_dim, geometry)
    shapes = (
        (T, num_heads * (SIZES.key_dim + SIZES.rotated_dim)),
        (T, num_heads, SIZES.entry_size),
        (T, num_heads * (SIZES.key_dim + SIZES.value_dim)),
        (T, SIZES.rotated_dim),
        (T, num_heads * SIZES.value_dim),
    )
    tensors = [torch.randn(shape, device=device).bfloat16() for shape in shapes]
    lse_TH = torch.zeros(T, num_heads, device=device)
    return lambda: ops.expanded_attention(
        *tensors, lse_TH, tokens.query_start, tokens.kv_len, plan, geometry, scale=SIZES.scale
    )


def time_tiles(num_heads: int, num_tokens: int, device: torch.device) -> list[dict[str, object]]:
    """The operator alone in tiles of several sizes."""
    step = step_of(rows_of(num_tokens, "no context"), num_heads, device, expanded=True)
    flops = num_tokens**2 * num_heads * (SIZES.key_dim + SIZES.rotated_dim + SIZES.value_dim)
    found: list[dict[str, object]] = []
    for tile, launch in product((64, 128), LAUNCHES):
        with mock.patch.object(kernels, "launch_of", lambda *_, launch=launch: launch), suppress(OutOfResources):
            taken = time_us([own_call(step, num_heads, device, tile)])
            found.append({"tile": tile, **asdict(launch), "us": taken, "tflops": flops / taken / 1e6})
    taken = time_us([partial(on_hopper, own_call(step, num_heads, device, 128))])
    found.append({"tile": 128, "keys": "hopper", "us": taken, "tflops": flops / taken / 1e6})
    for figure in found:
        print(f"{num_heads:5} {num_tokens:7}  {json.dumps(figure)}")
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024, 2048, 8192])
    parser.add_argument("--heads", type=int, nargs="+", default=[16, 128], choices=list(HIDDEN))
    parser.add_argument("--json", help="where to write all figures")
    arguments = parser.parse_args()
    device = torch.device("cuda")
    torch.manual_seed(0)
    figures: list[dict[str, Any]] = []
    pays: dict[int, bool] = dict.fromkeys(arguments.tokens, True)
    print("heads  tokens  case               absorbed us  expanded us  on Hopper us  error")
    for num_heads in arguments.heads:
        layer = create_layer(num_heads, device)
        for num_tokens, case in product(arguments.tokens, BESIDE):
            calls = calls_of(layer, rows_of(num_tokens, case), device)
            error = check(calls, f"{num_heads} heads, {num_tokens} tokens, {case}")
            taken = {name: time_us([call]) for name, call in calls.items()}
            pays[num_tokens] &= min(taken["expanded"], taken["hopper"]) < taken["absorbed"]
            figures.append({"heads": num_heads, "tokens": num_tokens, "case": case, "error": error, **taken})
            times = f"{taken['absorbed']:12.1f} {taken['expanded']:12.1f} {taken['hopper']:13.1f}"
            print(f"{num_heads:5} {num_tokens:7}  {case:17} {times} {error:6.4f}")
        del layer
        torch.cuda.empty_cache()
    tiles = [figure for num_heads in arguments.heads for figure in time_tiles(num_heads, 2048, device)]
    faster = [size for size in sorted(pays) if all(pays[other] for other in pays if other >= size)]
    hopper = sum(figure["hopper"] < figure["expanded"] for figure in figures) > len(figures) / 2
    least = faster[0] if faster else "inf"
    print(f"min_expanded_tokens={least} (of {sorted(pays)}), hopper_expanded={hopper}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(
                {"layers": figures, "tiles": tiles, "min_expanded_tokens": least, "hopper_expanded": hopper},
                file,
                indent=1,
            )


if __name__ == "__main__":
    main()

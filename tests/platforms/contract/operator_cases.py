"""Arguments of operators and what they must give, by plain torch in host memory.

Shapes: T tokens, K inputs, N outputs, H query heads, G key/value heads, D head size, B tokens per block, V vocabulary entries.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from case_arguments import (
    EPS,
    B,
    D,
    G,
    H,
    K,
    N,
    T,
    V,
    convolved,
    gated_heads,
    int32,
    random,
    remembered,
    scanned,
)
from slot_fixtures import slot_line, slot_lines
from torch import Tensor

from stepgraph.abi import slot_line as line
from stepgraph.ops.build.reference import build_step
from stepgraph.ops.causal_conv.reference import causal_conv
from stepgraph.ops.collectives.reference import reduce_gathered
from stepgraph.ops.commit.reference import commit
from stepgraph.ops.copy_blocks.reference import copy_blocks
from stepgraph.ops.experts.reference import gated_experts, mixture, sort_pairs, sum_experts
from stepgraph.ops.four_bit_experts import cpu as experts_cpu
from stepgraph.ops.four_bit_linear import FourBitWeight, dequantize
from stepgraph.ops.gated_delta.reference import gated_delta
from stepgraph.ops.gated_norm.reference import gated_norm
from stepgraph.ops.group_slots.reference import group_slots
from stepgraph.ops.grouped_linear.reference import grouped_linear
from stepgraph.ops.head_linear.reference import head_linear
from stepgraph.ops.kv_signal.reference import kv_signal
from stepgraph.ops.latent_queries.reference import latent_queries
from stepgraph.ops.linear.reference import linear
from stepgraph.ops.logprobs.reference import logprobs
from stepgraph.ops.mamba2.reference import mamba2
from stepgraph.ops.relu2.reference import relu2
from stepgraph.ops.rms_norm.reference import rms_norm, rms_norm_add
from stepgraph.ops.rope_cache.reference import rope_cache
from stepgraph.ops.route.reference import route
from stepgraph.ops.sample.reference import sample
from stepgraph.ops.sigmoid_gate.reference import sigmoid_gate
from stepgraph.ops.swiglu.reference import geglu, swiglu
from stepgraph.ops.write_kv.reference import write_kv

NUM_BLOCKS = 4
EXPERTS, TOP = 8, 3
CLAMP = 1.2, 1.702
"""Limit and alpha of a gated activation: many of the products are beyond the one."""


class Case(NamedTuple):
    """One call of `torch.ops.stepgraph.<operator>`."""

    operator: str
    reference: Callable[..., Any]
    """Has the operator's arguments; writes to those that it writes to."""
    args: Callable[[torch.Generator], tuple[Any, ...]]
    rows: tuple[int, ...] = ()
    """Which arguments have a row per token, where a token's result depends on its own rows alone: a row of what is returned, or
    else of the last of these arguments."""


def routing() -> tuple[Any, ...]:
    """How experts are chosen: by sigmoids, within the best two of four groups, with weights that are normalised and scaled."""
    return TOP, True, True, 1e-20, 2.5, 4, 2, 2


def routed(generator: torch.Generator) -> tuple[Any, ...]:
    """The last token is padding."""
    scores = random(generator, EXPERTS, K), random(generator, EXPERTS)
    return random(generator, T, K), *scores, int32(T - 1), torch.zeros(EXPERTS, dtype=torch.int64), *routing()


def chosen(generator: torch.Generator) -> Tensor:
    return torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP] for _ in range(T)]).int()


def gated(generator: torch.Generator, *, is_sorted: bool, clamped: bool = False) -> tuple[Any, ...]:
    expert = chosen(generator)
    order = sort_pairs(expert, 0, EXPERTS) if is_sorted else (None, None)
    product = random(generator, T, K), random(generator, EXPERTS, 2 * N, K) / 4, None
    end = (random(generator, EXPERTS, 2 * N), *CLAMP) if clamped else ()
    return *product, expert, 0, *order, False, False, *end


def ungated(generator: torch.Generator, *, is_sorted: bool) -> tuple[Any, ...]:
    return *gated(generator, is_sorted=is_sorted), None, 0.0, 1.0, False


def summed(generator: torch.Generator, *, is_sorted: bool, biased: bool = False) -> tuple[Any, ...]:
    expert = chosen(generator)
    order = sort_pairs(expert, 0, EXPERTS) if is_sorted else (None, None)
    down = random(generator, T * TOP, N), random(generator, EXPERTS, K, N), None
    end = (random(generator, EXPERTS, K),) if biased else ()
    return *down, expert, random(generator, T, TOP), 0, *order, random(generator, T, K), True, 0.5, False, *end


def mixed(generator: torch.Generator, *, gated: bool = True) -> tuple[Any, ...]:
    x, *router = routed(generator)
    experts = random(generator, EXPERTS, 2 * N if gated else N, K) / 4, None, random(generator, EXPERTS, K, N), None
    end = () if gated else (None, None, None, 0.0, 1.0, False)
    return x, random(generator, K), EPS, *router, *experts, 0, False, random(generator, T, K), True, 0.5, *end


def mixed_with_biases(generator: torch.Generator) -> tuple[Any, ...]:
    biases = [random(generator, *size) for size in ((EXPERTS,), (EXPERTS, 2 * N), (EXPERTS, K))]
    return *mixed(generator), *biases, *CLAMP


def added(generator: torch.Generator, *scale: Tensor) -> tuple[Any, ...]:
    """To a residual, once normalised; rows lie apart."""
    return random(generator, T, K + N)[:, :K], random(generator, K), EPS, random(generator, T, K), *scale


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, multiplier: float) -> None:
    residual += multiplier * linear(x, weight, bias)


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(rms_norm(x, norm, eps), weight, bias)


def gated_linear(x: Tensor, weight: Tensor, gelu: bool) -> Tensor:
    return (geglu if gelu else swiglu)(linear(x, weight, None))


def norm_gated_linear(x: Tensor, norm: Tensor, eps: float, weight: Tensor, gelu: bool) -> Tensor:
    return gated_linear(rms_norm(x, norm, eps), weight, gelu)


def four_bits(g: torch.Generator) -> tuple[Any, ...]:
    """A weight of integers, with zeros."""
    codes = torch.randint(0, 256, (N, K // 2), generator=g, dtype=torch.uint8)
    zero = torch.randint(0, 17, (N, K // 32), generator=g, dtype=torch.uint8)
    return codes, torch.rand(N, K // 32, generator=g) / 8, zero, None, 32, False


def four_bit_linear(x: Tensor, norm: Tensor | None, eps: float, *args: Any) -> Tensor:
    *weight, bias, _ = args
    normed = x if norm is None else rms_norm(x, norm, eps)
    return linear(normed, dequantize(FourBitWeight(*weight), x.shape[1]), bias)


def four_bit_linear_add(x: Tensor, *args: Any) -> None:
    *weight, bias, residual, multiplier = args
    residual.add_(multiplier * linear(x, dequantize(FourBitWeight(*weight), x.shape[1]), bias))


def four_bit_gated_linear(x: Tensor, norm: Tensor, eps: float, *args: Any) -> Tensor:
    *weight, gelu = args
    return norm_gated_linear(x, norm, eps, dequantize(FourBitWeight(*weight), x.shape[1]), gelu)


def expert_values(x: Tensor, weight: Sequence[Any]) -> Tensor:
    return experts_cpu.values(FourBitWeight(*weight), x)


def expert_codes(g: torch.Generator, outputs: int, inputs: int) -> tuple[Any, ...]:
    size = EXPERTS, outputs, -(-inputs // 32)
    codes = torch.randint(0, 256, (EXPERTS, outputs, -(-inputs // 16) * 8), generator=g, dtype=torch.uint8)
    return codes, torch.rand(size, generator=g) / 8, None, None, 32, False


def four_bit_gated(g: torch.Generator) -> tuple[Any, ...]:
    x, _, _, *pairs, gelu, by_row = gated(g, is_sorted=True)
    return x, *expert_codes(g, 2 * N, K), *pairs, gelu, by_row, None, 0.0, 1.0, True


def four_bit_summed(g: torch.Generator) -> tuple[Any, ...]:
    hidden, _, _, *rest = summed(g, is_sorted=False)
    return hidden, *expert_codes(g, K, N), *rest, None


def linear_out(x: Tensor, weight: Tensor, out: Tensor) -> None:
    out.copy_(linear(x, weight, None))


def linear_by_row(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    out.copy_(linear(x, weight, bias))


def caches(g: torch.Generator) -> tuple[Tensor, Tensor]:
    return random(g, NUM_BLOCKS, B, G, D), random(g, NUM_BLOCKS, B, G, D)


def rotated(g: torch.Generator, *norms: Tensor | None) -> tuple[Any, ...]:
    angle = random(g, 64, D // 2)
    cos_sin = torch.cat((angle.cos(), angle.sin()), dim=1)
    qkv = random(g, T, (H + 2 * G) * D)
    return qkv, int32(3, 4, 5, 60, 0), int32(11, 12, 13, 30, 9), cos_sin, *norms, *caches(g), H, EPS


def shared(g: torch.Generator, kv_heads: int) -> tuple[Any, ...]:
    """With a projection of keys that are the values too, or of queries alone, and normalised values."""
    qkv, *rest = rotated(g, random(g, D), random(g, D) if kv_heads else None)
    return qkv[:, : (H + kv_heads) * D].contiguous(), *rest, True


def absorbed(g: torch.Generator, *, deterministic: bool) -> tuple[Any, ...]:
    """Queries and latents are rows of one product; the keys' part of a head's weight lies before its values'."""
    angle, latent = random(g, 64, D // 4), 2 * D
    cos_sin = torch.cat((angle.cos(), angle.sin()), dim=1)
    merged = random(g, T, H * (D + D // 2) + latent + D // 2)
    weight = random(g, H, D + 24, latent) / 8
    return (
        *merged.tensor_split((-latent - D // 2,), dim=1), int32(3, 4, 5, 60, 0), int32(11, 12, 13, 30, 9), cos_sin,
        random(g, latent), weight[:, :D], random(g, NUM_BLOCKS, B, latent + D // 2), EPS, deterministic,
    )  # fmt: skip


def of_heads(g: torch.Generator, *, deterministic: bool) -> tuple[Any, ...]:
    """The values' part of a head's weight lies behind its keys'."""
    return random(g, T, H, 2 * D), random(g, H, D + 24, 2 * D)[:, D:], deterministic


def planned(_: torch.Generator) -> tuple[Any, ...]:
    """Two rows that run, one that has ended, and one of padding; a block granted."""
    lines = slot_lines(
        slot_line(length=9, computed=8), slot_line(length=20, computed=0), slot_line(length=7, computed=6, active=False)
    )
    plan = int32(1, 1, 2, 12, 3, 1, 0, 0, 2, 0, 3, 0, 0, 0)
    tokens = torch.arange(4 * 64, dtype=torch.int32).view(4, 64) % V
    table = torch.arange(4 * 8, dtype=torch.int32).view(4, 8) % NUM_BLOCKS
    return plan, lines, tokens, table, 16, 4, 4, 2, B


def placed(_: torch.Generator) -> tuple[Any, ...]:
    """A decode, a prompt, a row that has ended, and padding, in the tables of four groups of four slots, of which one has
    smaller blocks."""
    table = torch.arange(4 * 4 * 8, dtype=torch.int32).mul(5).remainder(23).view(16, 8)
    table[::4] = 0  # the null slot's
    positions = torch.cat((int32(8), torch.arange(12, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)))
    return table, int32(1, 2, 3, 0), int32(0, 1, 13, 13, 13), positions, (B, B, B, B // 2)


def sampled(g: torch.Generator) -> tuple[Any, ...]:
    """What `planned` ran, two tokens sampled, one of which ends its request."""
    lines = slot_lines(
        slot_line(length=9, computed=8, max_length=50, stop_tokens=(17,)),
        slot_line(length=12, computed=0, max_length=50),
        slot_line(length=7, computed=6, active=False),
    )
    tokens = torch.randint(V, (4, 64), generator=g, dtype=torch.int32)
    tokens[0] = 0  # the null slot's, which padding may write again
    ring = torch.zeros(4, 4, line.OUTPUT_WIDTH, dtype=torch.int32)
    return (
        lines, tokens, int32(2), ring, int32(1, 2, 3, 0), int32(0, 1, 13, 13, 13), int32(9, 12, 6, 0), int32(0, 1, 2, 2, 2),
        int32(17, 30, 0, 0), 0,
    )  # fmt: skip


def drawn(g: torch.Generator) -> tuple[Any, ...]:
    lines = slot_lines(
        slot_line(),
        slot_line(temperature=0.8, seed=11),
        slot_line(temperature=1.5, seed=12, top_k=5, length=30),
        slot_line(temperature=1.0, seed=1 << 40, top_p=0.7, min_p=0.02),
    )
    return 4 * random(g, 4, V), int32(1, 2, 3, 4), int32(0, 0, 2, 1), lines  # what the null slot gets is left open


def asked(g: torch.Generator) -> tuple[Any, ...]:
    ring = torch.zeros(4, 6, line.LOGPROB_WIDTH, dtype=torch.int32)
    return 3 * random(g, 4, V), int32(1, 50, 96, 0), int32(1, 0, 4, 0), int32(3), ring, 1


def gathered(g: torch.Generator) -> tuple[Any, ...]:
    """What three ranks have, and both norms."""
    return random(g, 3, T, K), random(g, T, K), torch.zeros(T, K), 0.5, random(g, K), EPS, random(g, K), EPS


CASES = {
    "swiglu": Case("swiglu", swiglu, lambda g: (3 * random(g, T, 2 * K),), rows=(0,)),
    "geglu": Case("geglu", geglu, lambda g: (3 * random(g, T, 2 * K),), rows=(0,)),
    "swiglu of two": Case("swiglu", swiglu, lambda g: (3 * random(g, T, K), random(g, T, K + N)[:, N:]), rows=(0, 1)),
    "geglu of two": Case("geglu", geglu, lambda g: (3 * random(g, T, K), random(g, T, K + N)[:, N:]), rows=(0, 1)),
    "rms_norm": Case("rms_norm", rms_norm, lambda g: (random(g, T, K), random(g, K), EPS), rows=(0,)),
    "rms_norm_add": Case("rms_norm_add", rms_norm_add, added, rows=(0, 3)),
    "rms_norm_add and scale": Case("rms_norm_add", rms_norm_add, lambda g: added(g, random(g, 1)), rows=(0, 3)),
    "rms_norm of rows apart": Case("rms_norm", rms_norm, lambda g: (random(g, T, K + N)[:, :K], random(g, K), EPS)),
    "linear": Case("linear", linear, lambda g: (random(g, T, K), random(g, N, K), random(g, N)), rows=(0,)),
    "four_bit_linear": Case(
        "four_bit_linear",
        four_bit_linear,
        lambda g: (random(g, T, K), None, EPS, *four_bits(g), random(g, N), False),
        rows=(0,),
    ),
    "four_bit_linear_add": Case(
        "four_bit_linear_add",
        four_bit_linear_add,
        lambda g: (random(g, T, K), *four_bits(g), None, random(g, T, N), 0.5),
        rows=(0, 8),
    ),
    "four_bit_gated_linear": Case(
        "four_bit_gated_linear",
        four_bit_gated_linear,
        lambda g: (random(g, T, K), random(g, K), EPS, *four_bits(g), False),
        rows=(0,),
    ),
    "four_bit_gated_experts": Case(
        "four_bit_gated_experts",
        lambda x, *args: gated_experts(x, expert_values(x, args[:6]), None, *args[6:]),
        four_bit_gated,
    ),
    "four_bit_sum_experts": Case(
        "four_bit_sum_experts",
        lambda x, *args: sum_experts(x, expert_values(x, args[:6]), None, *args[6:]),
        four_bit_summed,
    ),
    "linear of one token": Case("linear", linear, lambda g: (random(g, 1, K), random(g, N, K), None)),
    "linear_out": Case(
        "linear_out", linear_out, lambda g: (random(g, T, K), random(g, N, K), random(g, T, N)), rows=(0, 2)
    ),
    "linear_add": Case(
        "linear_add", linear_add, lambda g: (random(g, T, K), random(g, N, K), None, random(g, T, N), 0.5), rows=(0, 3)
    ),
    "gated_linear": Case(
        "gated_linear", gated_linear, lambda g: (random(g, T, K), random(g, 2 * N, K) / 4, True), rows=(0,)
    ),
    "norm_linear": Case(
        "norm_linear", norm_linear, lambda g: (random(g, T, K), random(g, K), EPS, random(g, N, K), None), rows=(0,)
    ),
    "norm_gated_linear": Case(
        "norm_gated_linear",
        norm_gated_linear,
        lambda g: (random(g, T, K), random(g, K), EPS, random(g, 2 * N, K) / 4, False),
        rows=(0,),
    ),
    "linear_by_row": Case(
        "linear_by_row", linear_by_row, lambda g: (random(g, T, K), random(g, N, K), None, random(g, T, N)), rows=(0, 3)
    ),
    "grouped_linear": Case(
        "grouped_linear", grouped_linear, lambda g: (random(g, 7, K), random(g, 3, N, K), int32(2, 2, 7))
    ),
    "route": Case("route", route, routed),
    "route with scales of experts": Case("route", route, lambda g: (*routed(g), None, random(g, EXPERTS))),
    "route with a bias of logits": Case("route", route, lambda g: (*routed(g), 3 * random(g, EXPERTS))),
    "sort_pairs": Case("sort_pairs", sort_pairs, lambda g: (chosen(g), 0, EXPERTS)),
    "gated_experts without gates by pairs": Case("gated_experts", gated_experts, lambda g: ungated(g, is_sorted=False)),
    "gated_experts without gates by tiles": Case("gated_experts", gated_experts, lambda g: ungated(g, is_sorted=True)),
    "mixture without gates": Case("mixture", mixture, lambda g: mixed(g, gated=False)),
    "relu2": Case("relu2", relu2, lambda g: (random(g, T, K),), rows=(0,)),
    "gated_experts by pairs": Case("gated_experts", gated_experts, lambda g: gated(g, is_sorted=False)),
    "gated_experts by tiles": Case("gated_experts", gated_experts, lambda g: gated(g, is_sorted=True)),
    "sum_experts by pairs": Case("sum_experts", sum_experts, lambda g: summed(g, is_sorted=False)),
    "sum_experts by tiles": Case("sum_experts", sum_experts, lambda g: summed(g, is_sorted=True)),
    "clamped gated_experts by pairs": Case(
        "gated_experts", gated_experts, lambda g: gated(g, is_sorted=False, clamped=True)
    ),
    "clamped gated_experts by tiles": Case(
        "gated_experts", gated_experts, lambda g: gated(g, is_sorted=True, clamped=True)
    ),
    "sum_experts with biases by pairs": Case(
        "sum_experts", sum_experts, lambda g: summed(g, is_sorted=False, biased=True)
    ),
    "sum_experts with biases by tiles": Case(
        "sum_experts", sum_experts, lambda g: summed(g, is_sorted=True, biased=True)
    ),
    "mixture with biases": Case("mixture", mixture, mixed_with_biases),
    "mixture": Case("mixture", mixture, mixed),
    "rope_cache": Case("rope_cache", rope_cache, lambda g: rotated(g, None, None)),
    "rope_cache with norms": Case("rope_cache", rope_cache, lambda g: rotated(g, random(g, D), random(g, D))),
    "rope_cache of keys that are values": Case("rope_cache", rope_cache, lambda g: shared(g, G)),
    "rope_cache of queries alone": Case("rope_cache", rope_cache, lambda g: shared(g, 0)),
    "write_kv": Case(
        "write_kv", write_kv, lambda g: (random(g, T, G, D), random(g, T, G, D), int32(9, 8, 31, 16, 17), *caches(g))
    ),
    "copy_blocks": Case(
        "copy_blocks", copy_blocks, lambda g: (caches(g)[0], int32(3, 1), caches(g)[1], int32(0, 2), 2)
    ),
    "copy_blocks of a head": Case(
        "copy_blocks",
        copy_blocks,
        lambda g: (caches(g)[0][:, :, 1:], int32(3, 1), caches(g)[1][:, :, :1], int32(0, 2), 2),
    ),
    "latent_queries": Case("latent_queries", latent_queries, lambda g: absorbed(g, deterministic=False)),
    "latent_queries by token": Case("latent_queries", latent_queries, lambda g: absorbed(g, deterministic=True)),
    "head_linear": Case("head_linear", head_linear, lambda g: of_heads(g, deterministic=False), rows=(0,)),
    "head_linear by token": Case("head_linear", head_linear, lambda g: of_heads(g, deterministic=True), rows=(0,)),
    "causal_conv": Case("causal_conv", causal_conv, lambda g: convolved(g, silu=True)),
    "causal_conv with a bias": Case("causal_conv", causal_conv, lambda g: convolved(g, silu=False)),
    "gated_delta": Case("gated_delta", gated_delta, lambda g: remembered(g, max_rate=2.0, deterministic=False)),
    "gated_delta by token": Case("gated_delta", gated_delta, lambda g: remembered(g, max_rate=1.0, deterministic=True)),
    "mamba2": Case("mamba2", mamba2, lambda g: scanned(g, deterministic=False)),
    "mamba2 by token": Case("mamba2", mamba2, lambda g: scanned(g, deterministic=True)),
    "gated_norm": Case("gated_norm", gated_norm, lambda g: gated_heads(g, random(g, D), gate_first=False), rows=(0, 1)),
    "gated_norm of groups, gate first": Case(
        "gated_norm", gated_norm, lambda g: gated_heads(g, random(g, H * D), gate_first=True), rows=(0, 1)
    ),
    "gated_norm without norm": Case(
        "gated_norm", gated_norm, lambda g: gated_heads(g, None, gate_first=False), rows=(0, 1)
    ),
    "sigmoid_gate": Case(
        "sigmoid_gate", sigmoid_gate, lambda g: (random(g, T, K), random(g, T, K + 5)[:, :K]), rows=(0, 1)
    ),
    "sigmoid_gate of tokens": Case(
        "sigmoid_gate", sigmoid_gate, lambda g: (random(g, T, K), random(g, T, 1)), rows=(0, 1)
    ),
    "build_step": Case("build_step", build_step, planned),
    "group_slots": Case("group_slots", group_slots, placed),
    "commit": Case("commit", commit, sampled),
    "sample": Case("sample", sample, drawn),
    "kv_signal": Case("kv_signal", kv_signal, lambda g: (torch.tensor([1, 7, 9, 5]), torch.tensor([7, 9, 5]), 1)),
    "kv_signal without trace": Case(
        "kv_signal", kv_signal, lambda g: (torch.tensor([0, 7, 9, 5]), torch.tensor([7, 9, 5]), 1)
    ),
    "reduce_gathered": Case("reduce_gathered", reduce_gathered, gathered),
    "logprobs": Case("logprobs", logprobs, asked),
}
"""Of float32. Both kinds of attention have a test of their own."""

IN_STEPS = {"attention_plan", "rope_attention", "process_logits", "draft_inputs", "draft_row_tokens", "propose"}
"""Operators that the steps of test_steps.py run, where a graph is held to what runs eagerly, and both to rows alone."""
OF_SETTINGS = {
    "fp8_linear",
    "fp8_linear_add",
    "fp8_norm_linear",
    "fp8_gated_linear",
    "fp8_norm_gated_linear",
    "four_bit_linear",
    "four_bit_linear_add",
    "four_bit_gated_linear",
    "four_bit_gated_experts",
    "four_bit_sum_experts",
    "lora",
    "lookup",
    "remember",
    "force_acceptance",
    "all_reduce_add",
    "all_gather_columns",
    "gather_tokens",
    "scatter_sum",
}
"""Operators of settings that a platform need not serve: of quantised weights, LoRA, drafting by lookup, and several devices."""

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def moved(args, device):
    """On a device, tensors as copies of the same strides."""
    return tuple(
        torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype, device=device).copy_(arg)
        if isinstance(arg, torch.Tensor)
        else arg
        for arg in args
    )


def results(returned, args) -> list[torch.Tensor]:
    """All that a call gave, in host memory: what it returned and what its arguments hold then."""
    returned = returned if isinstance(returned, tuple) else () if returned is None else (returned,)
    return [tensor.cpu() for tensor in (*returned, *args) if isinstance(tensor, torch.Tensor)]


def assert_as_reference(name: str, seed: int, device: torch.device) -> None:
    """An operator gives, on a device, what its reference gives."""
    case = CASES[name]
    args = case.args(torch.Generator().manual_seed(seed))
    on_device = moved(args, device)
    found = results(getattr(torch.ops.stepgraph, case.operator).default(*on_device), on_device)
    expected = results(case.reference(*args), args)
    assert len(found) == len(expected)
    for tensor, reference in zip(found, expected, strict=True):
        assert tensor.shape == reference.shape
        if reference.dtype.is_floating_point:
            torch.testing.assert_close(tensor, reference, **TOLERANCE)
        elif name == "logprobs":  # whose lines hold float32 beside whole numbers
            torch.testing.assert_close(tensor.view(torch.float32), reference.view(torch.float32), **TOLERANCE)
        else:
            assert torch.equal(tensor, reference)

"""Gated delta rule, its convolution and its norm: reference against a loop of its own, all kernels against the reference."""

import pytest
import torch
from recurrent_rows import NUM_LINES, Rows, assert_same_rows, on, random_rows, random_state, seeds, with_padding
from triton_operators import triton_operators

from stepgraph import ops
from stepgraph.ops.causal_conv import reference as conv_reference
from stepgraph.ops.gated_delta import chunks, reference
from stepgraph.ops.gated_delta.triton import most_chunks

SIZES = {"small": (1, 2, 16, 16), "odd": (2, 4, 24, 40), "equal heads": (3, 3, 32, 16)}
"""Heads of keys and of values, and their sizes."""
SIZES_OF_TRITON = tuple(SIZES) if torch.cuda.is_available() else ("odd",)
"""Its interpreter takes seconds for each."""


@pytest.fixture(params=["cpu", "triton"])
def kernels(request, device):
    """Where operators run, by their own kernels there."""
    if request.param == "cpu":
        yield "cpu"
        return
    with triton_operators("causal_conv", "gated_delta", "gated_norm"):
        yield device if torch.cuda.is_available() else "interpreter"


def delta_inputs(generator: torch.Generator, rows: Rows, G: int, H: int, N: int, D: int, *, repeats: bool = False):
    """Decays from next to none to nearly all; with `repeats`, keys that are all alike."""
    U = rows.num_tokens
    qkv = torch.randn(U, 2 * G * N + H * D, generator=generator)
    if repeats:
        qkv[:, G * N : 2 * G * N] = qkv[:1, G * N : 2 * G * N] if U else 0
    ba = torch.randn(U, 2 * H, generator=generator) * 3
    a_log = torch.linspace(-6, 2, H)
    dt_bias = torch.randn(H, generator=generator)
    return [with_padding(qkv), with_padding(ba), a_log, dt_bias, random_state(generator, rows, H, N, D)]


def by_reference(inputs, rows: Rows, max_rate: float):
    """In float64."""
    inputs = [x.double() for x in inputs]
    out = reference.gated_delta(*inputs, *rows, max_rate, False)
    return out.float(), inputs[-1].float()


def test_the_reference_is_the_rule(device) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = Rows(*(torch.tensor(x, dtype=torch.int32) for x in ([3], [2], [0, 7], [5], [4])))
    qkv, ba, a_log, dt_bias, state = (x.double() for x in delta_inputs(generator, rows, 1, 2, 16, 8))
    before = state[3].clone()
    out = reference.gated_delta(qkv, ba, a_log, dt_bias, state, *rows, 1.5, False)
    for head in range(2):
        s = before[head]
        for token in range(7):
            q, k = (x / (x.square().sum() + 1e-6).sqrt() for x in (qkv[token, :16], qkv[token, 16:32]))
            v = qkv[token, 32 + 8 * head : 40 + 8 * head]
            alpha = torch.exp(-torch.exp(a_log[head]) * torch.log1p(torch.exp(ba[token, 2 + head] + dt_bias[head])))
            beta = 1.5 / (1 + torch.exp(-ba[token, head]))
            s = alpha * (s - beta * torch.outer(k, s.T @ k)) + beta * torch.outer(k, v)
            torch.testing.assert_close(out[token, 8 * head : 8 * head + 8], s.T @ q / 4)
            if token == 3:
                torch.testing.assert_close(state[2, head], s)


@pytest.mark.parametrize("num_drafts", [0, 3])
@pytest.mark.parametrize(
    ("kernels", "size"),
    [(kernels, size) for kernels in ("cpu", "triton") for size in SIZES if kernels == "cpu" or size in SIZES_OF_TRITON],
    indirect=["kernels"],
)
def test_any_partition_into_rows(kernels, size: str, num_drafts: int) -> None:
    for seed in seeds(kernels):
        generator = torch.Generator().manual_seed(seed)
        rows = random_rows(generator, (1, 4, 5, 8)[seed], num_drafts)
        inputs = delta_inputs(generator, rows, *SIZES[size], repeats=seed == 1)
        max_rate = 2.0 if seed % 2 else 1.0
        expected = by_reference(inputs, rows, max_rate)
        moved = on(kernels, *inputs)
        out = ops.gated_delta(*moved, *on(kernels, *rows), max_rate=max_rate, deterministic=False)
        assert_same_rows(rows, inputs[-1], (out, moved[-1]), expected, 2e-4)


def test_a_deterministic_row_can_be_cut_anywhere(kernels) -> None:
    generator = torch.Generator().manual_seed(1)
    whole = Rows(*(torch.tensor(x, dtype=torch.int32) for x in ([2], [2], [0, 12], [0], [12])))
    inputs = on(kernels, *delta_inputs(generator, whole, *SIZES["odd"]))
    out = ops.gated_delta(*inputs, *on(kernels, *whole), deterministic=True)
    state = inputs[-1][2].clone()
    for begin, end in ((0, 1), (1, 3), (3, 12)):
        lines = ([2], [2])
        part = Rows(*(torch.tensor(x, dtype=torch.int32) for x in (*lines, [0, end - begin], [begin], [end - begin])))
        qkv, ba = (x[begin:end].contiguous() for x in inputs[:2])
        found = ops.gated_delta(qkv, ba, *inputs[2:], *on(kernels, *part), deterministic=True)
        assert torch.equal(found, out[begin:end])
    assert torch.equal(inputs[-1][2], state)


def test_the_grid_has_room_for_all_chunks_of_any_rows() -> None:
    """Against every way to fill a step with rows of lengths around whole chunks, and proposals."""
    for num_tokens in (17, 64, 70, 130, 200):
        for num_rows in (1, 2, 4):
            length = num_tokens // num_rows
            for tail in range(8):
                if length <= chunks.FEW:
                    continue
                parts = (length - tail, tail)
                found = num_rows * sum(-(-part // chunks.CHUNK) for part in parts)
                assert found <= most_chunks(num_tokens, num_rows)


@pytest.mark.parametrize("channels", [40, 300])
@pytest.mark.parametrize(("width", "num_drafts", "plain"), [(4, 0, False), (4, 3, False), (2, 1, False), (3, 2, True)])
def test_convolution_of_any_partition_into_rows(
    kernels, channels: int, width: int, num_drafts: int, plain: bool
) -> None:
    """With SiLU or, plain, with a bias."""
    for seed in seeds(kernels):
        generator = torch.Generator().manual_seed(seed)
        rows = random_rows(generator, (1, 4, 5, 8)[seed], num_drafts)
        wide = with_padding(torch.randn(rows.num_tokens, channels + 8, generator=generator))
        weight = torch.randn(channels, width, generator=generator)
        before = random_state(generator, rows, width - 1, channels)
        bias = torch.randn(channels, generator=generator) if plain else None
        expected, state_after = by_loop(wide[:, :channels], weight, bias, before, rows, silu=not plain)
        moved, taps, state, *biases = on(kernels, wide, weight, before, *([bias] if plain else []))
        rows_there = on(kernels, *rows)
        out = ops.causal_conv(
            moved[:, :channels], taps, biases[0] if plain else None, state, *rows_there, silu=not plain
        )
        assert_same_rows(rows, before, (out, state), (expected, state_after), 1e-5)


def by_loop(x, weight, bias, before, rows: Rows, *, silu: bool):
    """Each row's inputs behind its state, through torch's convolution."""
    out, state = torch.zeros_like(x), before.clone()
    width = weight.shape[1]
    for row, (read, write) in enumerate(zip(rows.read_line.tolist(), rows.write_line.tolist(), strict=True)):
        begin, end = rows.query_start[row : row + 2].tolist()
        if begin == end:
            continue
        old = before[read] if rows.start[row] else torch.zeros_like(before[read])
        whole = torch.cat((old, x[begin:end]))
        sums = torch.nn.functional.conv1d(whole.T[None], weight[:, None], bias, groups=len(weight))[0].T
        out[begin:end] = torch.nn.functional.silu(sums) if silu else sums
        state[write] = whole[int(rows.num_stored[row]) :][: width - 1]
    return out, state


@pytest.mark.parametrize(("heads", "size"), [(3, 24), (2, 128), (40, 32), (1, 2500)])
@pytest.mark.parametrize("form", ["gate behind", "gate first", "gate alone"])
def test_gated_norm_is_the_formula(kernels, heads: int, size: int, form: str) -> None:
    """With a weight for all heads where the gate is behind, and one of each where it is first, as models have it, or none."""
    generator = torch.Generator().manual_seed(0)
    x, wide = (torch.randn(4, n, generator=generator) for n in (heads * size, heads * size + 9))
    first = form == "gate first"
    weight = torch.randn(heads * size if first else size, generator=generator)
    gate = wide[:, 3 : 3 + heads * size]
    silu = torch.nn.functional.silu(gate.double())
    given = (x * silu if first else x).double().view(4, heads, size)
    scaled = torch.nn.functional.rms_norm(given, (size,), None, 1e-6) * weight.view(-1, size).double()
    expected = scaled.flatten(1) if first else scaled.flatten(1) * silu
    if form == "gate alone":
        expected, weight = x * silu, None
    moved, moved_wide, *weights = on(kernels, x, wide, *([] if weight is None else [weight]))
    moved_gate, options = moved_wide[:, 3 : 3 + heads * size], {"size": size, "gate_first": first}
    found = ops.gated_norm(moved, moved_gate, weights[0] if weights else None, 1e-6, **options)
    torch.testing.assert_close(found.cpu(), expected.float(), rtol=1e-5, atol=1e-5)
    assert ops.gated_norm(x.bfloat16(), gate.bfloat16(), weight, 1e-6, **options).dtype == torch.bfloat16


def test_all_is_computed_in_float32_and_rounded_once() -> None:
    generator = torch.Generator().manual_seed(2)
    rows = random_rows(generator, 3, 0)
    qkv, ba, *rest = delta_inputs(generator, rows, *SIZES["small"])
    state = rest[-1].clone()
    exact = reference.gated_delta(qkv.bfloat16().float(), ba.bfloat16().float(), *rest, *rows, 1.0, False)
    rounded = reference.gated_delta(qkv.bfloat16(), ba.bfloat16(), *rest[:-1], state, *rows, 1.0, False)
    assert torch.equal(rows.without_padding(rounded), rows.without_padding(exact).bfloat16())
    x, weight = torch.randn(rows.num_tokens, 8, generator=generator).bfloat16(), torch.randn(8, 4).bfloat16()
    state = torch.zeros(NUM_LINES, 3, 8)
    exact = conv_reference.causal_conv(x.float(), weight.float(), None, state, *rows, True)
    rounded = conv_reference.causal_conv(x, weight, None, torch.zeros(NUM_LINES, 3, 8).bfloat16(), *rows, True)
    assert torch.equal(rounded, exact.bfloat16())

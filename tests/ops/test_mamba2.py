"""Mamba-2's scan: reference against a loop of its own, all kernels against the reference."""

import pytest
import torch
from recurrent_rows import Rows, assert_same_rows, on, random_rows, random_state, seeds, with_padding
from triton_operators import triton_operators

from stepgraph import ops
from stepgraph.ops.mamba2 import reference

SIZES = {"small": (2, 1, 16, 16), "odd": (4, 2, 40, 24), "a group each": (3, 3, 16, 32)}
"""Heads and groups, sizes of a head and of B and C."""
SIZES_OF_TRITON = tuple(SIZES) if torch.cuda.is_available() else ("odd",)
"""Its interpreter takes seconds for each."""
STEPS = (0.2, 2.0)
"""Between which some steps lie, beside those that are clamped."""


@pytest.fixture(params=["cpu", "triton"])
def kernels(request, device):
    """Where operators run, by their own kernels there."""
    if request.param == "cpu":
        yield "cpu"
        return
    with triton_operators("mamba2"):
        yield device if torch.cuda.is_available() else "interpreter"


def scan_inputs(generator: torch.Generator, rows: Rows, H: int, G: int, D: int, N: int):
    """Decays from next to none to nearly all."""
    U = rows.num_tokens
    xbc = torch.randn(U, H * D + 2 * G * N, generator=generator)
    dt = torch.randn(U, H + 3, generator=generator) * 2
    a_log = torch.linspace(-6, 2, H)
    dt_bias, skip = torch.randn(2, H, generator=generator)
    return [with_padding(xbc), with_padding(dt), a_log, dt_bias, skip, random_state(generator, rows, H, N, D)]


def scanned(inputs, rows, steps=STEPS, *, deterministic: bool):
    xbc, dt, *of_heads, state = inputs
    return ops.mamba2(xbc, dt[:, : len(of_heads[0])], *of_heads, state, *rows, steps=steps, deterministic=deterministic)


def by_reference(inputs, rows: Rows, steps=STEPS):
    """In float64."""
    xbc, dt, *of_heads, state = (x.double() for x in inputs)
    out = reference.mamba2(xbc, dt[:, : len(of_heads[0])], *of_heads, state, *rows, *steps, False)
    return out.float(), state.float()


@pytest.mark.parametrize("steps", [(0.0, torch.inf), STEPS])
def test_the_reference_is_the_scan(steps) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = Rows(*(torch.tensor(x, dtype=torch.int32) for x in ([3], [2], [0, 7], [5], [4])))
    xbc, dt, a_log, dt_bias, skip, state = (x.double() for x in scan_inputs(generator, rows, 4, 2, 8, 16))
    before = state[3].clone()
    out = reference.mamba2(xbc, dt[:, :4], a_log, dt_bias, skip, state, *rows, *steps, False)
    for head in range(4):
        s, group = before[head], head // 2
        for token in range(7):
            x = xbc[token, 8 * head : 8 * head + 8]
            b, c = (xbc[token, 32 + 16 * place : 48 + 16 * place] for place in (group, 2 + group))
            step = min(max(torch.log1p(torch.exp(dt[token, head] + dt_bias[head])), steps[0]), steps[1])
            s = torch.exp(-torch.exp(a_log[head]) * step) * s + step * torch.outer(b, x)
            torch.testing.assert_close(out[token, 8 * head : 8 * head + 8], s.T @ c + skip[head] * x)
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
        inputs = scan_inputs(generator, rows, *SIZES[size])
        steps = STEPS if num_drafts else (0.0, torch.inf)
        expected = by_reference(inputs, rows, steps)
        moved = on(kernels, *inputs)
        out = scanned(moved, on(kernels, *rows), steps, deterministic=False)
        assert_same_rows(rows, inputs[-1], (out, moved[-1]), expected, 2e-4)


def test_a_deterministic_row_can_be_cut_anywhere(kernels) -> None:
    generator = torch.Generator().manual_seed(1)
    whole = Rows(*(torch.tensor(x, dtype=torch.int32) for x in ([2], [2], [0, 12], [0], [12])))
    inputs = on(kernels, *scan_inputs(generator, whole, *SIZES["odd"]))
    out = scanned(inputs, on(kernels, *whole), deterministic=True)
    state = inputs[-1][2].clone()
    for begin, end in ((0, 1), (1, 3), (3, 12)):
        part = Rows(*(torch.tensor(x, dtype=torch.int32) for x in ([2], [2], [0, end - begin], [begin], [end - begin])))
        xbc, dt = (x[begin:end].contiguous() for x in inputs[:2])
        found = scanned([xbc, dt, *inputs[2:]], on(kernels, *part), deterministic=True)
        assert torch.equal(found, out[begin:end])
    assert torch.equal(inputs[-1][2], state)


def test_all_is_computed_in_float32_and_rounded_once() -> None:
    generator = torch.Generator().manual_seed(2)
    rows = random_rows(generator, 3, 0)
    xbc, dt, *rest = scan_inputs(generator, rows, *SIZES["small"])
    state = rest[-1].clone()
    exact = reference.mamba2(xbc.bfloat16().float(), dt[:, :2].bfloat16().float(), *rest, *rows, *STEPS, False)
    rounded = reference.mamba2(xbc.bfloat16(), dt[:, :2].bfloat16(), *rest[:-1], state, *rows, *STEPS, False)
    assert torch.equal(rows.without_padding(rounded), rows.without_padding(exact).bfloat16())

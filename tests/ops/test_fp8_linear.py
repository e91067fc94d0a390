"""`fp8_linear`: every kernel against the product in float64 with the dequantised weight. The format: how far off rounding is."""

import pytest
import torch

from stepgraph import ops
from stepgraph.ops.fp8_linear import GROUP_SIZE, cpu, dequantize, num_groups, quantize
from stepgraph.ops.fp8_linear import triton as kernel

STREAMED = kernel.StreamedTile(outputs=4, inputs=256, num_warps=4)
SLICED = kernel.SlicedTile(outputs=16, inputs=64, slices=2, num_stages=3)
BLOCK = kernel.BlockTile(tokens=16, outputs=32, inputs=64, num_warps=4, num_stages=2)
SIZES = [(5, 16), (37, 101), (24, 700)]
NAMES = ["few", "unaligned", "several groups"]


def operands(tokens, outputs, inputs, *, dtype, groups=1, with_bias=True):
    generator = torch.Generator().manual_seed(tokens * outputs + inputs)
    x, values = torch.randn(tokens, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
    bias = torch.randn(outputs, generator=generator).to(dtype) if with_bias else None
    return x.to(dtype), *quantize(values * torch.logspace(-2, 1, outputs).unsqueeze(1), groups), bias


def exact(x, weight, scale, bias):
    product = x.double() @ dequantize(weight, scale).double().T
    return product if bias is None else product + bias.double()


def assert_close(found, x, weight, scale, bias):
    """Up to rounding: of float32 sums, then of the result."""
    sizes = x.double().abs() @ dequantize(weight, scale).double().abs().T
    error = (found.cpu().double() - exact(x, weight, scale, bias)).abs()
    assert (error <= 1e-5 * sizes + 2 * torch.finfo(x.dtype).eps * exact(x, weight, scale, bias).abs()).all()


def check_tile(tile, tokens, device, x, weight, scale, bias):
    """Beyond the tokens, `x` and the result hold NaN, which is neither read nor overwritten."""
    padded = torch.cat([x, torch.full((80, x.shape[1]), torch.nan, dtype=x.dtype)]).to(device)
    out = torch.full((tokens + 1, weight.shape[0]), torch.nan, dtype=x.dtype, device=device)
    on_device = [None if t is None else t.to(device) for t in (weight, scale, bias)]
    kernel.multiply(padded[:tokens], *on_device, out[:tokens], tile)
    assert_close(out[:tokens], x, weight, scale, bias)
    assert out[tokens].isnan().all(), "wrote beyond the last token"


@pytest.mark.parametrize("grouped", [False, True], ids=["a scale per output", "scales of groups"])
@pytest.mark.parametrize(("outputs", "inputs"), SIZES, ids=NAMES)
@pytest.mark.parametrize(
    ("tile", "tokens", "dtype"),
    [
        (STREAMED, 1, torch.float32),
        (STREAMED, 2, torch.float16),
        (SLICED, 3, torch.float16),
        (SLICED, 17, torch.float16),
        (BLOCK, 1, torch.float16),
        (BLOCK, 33, torch.float16),
        (kernel.FLOAT32_TILE, 33, torch.float32),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, kernel.Tile) else str(value),
)
def test_kernels_match_float64(tile, tokens, dtype, outputs, inputs, grouped, device):
    groups = num_groups(inputs) if grouped else 1
    check_tile(tile, tokens, device, *operands(tokens, outputs, inputs, dtype=dtype, groups=groups))
    check_tile(tile, tokens, device, *operands(tokens, outputs, inputs, dtype=dtype, groups=groups, with_bias=False))


CHOSEN = {
    (tokens, tile)
    for tokens in (1, 2, 5, 16, 17, 64, 65, 300, 2048)
    for outputs in (64, 1024, 4096, 24576)
    for inputs in (1024, 4096)
    for by_row in (False, True)
    for tile in [kernel.choose_tile(torch.empty(tokens, inputs, dtype=torch.float16), outputs, by_row=by_row)]
}


@pytest.mark.parametrize("tile", sorted({tile for _, tile in CHOSEN}, key=str), ids=str)
def test_every_tile_that_is_chosen_matches_float64(tile, device):
    tokens = min(tokens for tokens, chosen in CHOSEN if chosen == tile)
    check_tile(tile, min(tokens, 70), device, *operands(min(tokens, 70), 40, 300, dtype=torch.float16, groups=3))


@pytest.mark.parametrize("tokens", [1, 2, 9, 80])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_operator_matches_float64(tokens, by_row, dtype, device):
    given = operands(tokens, 40, 300, dtype=dtype, groups=3)
    found = ops.fp8_linear(*(t.to(device) for t in given), by_row=by_row)
    assert found.dtype == dtype
    assert_close(found, *given)


EPS = 1e-5
FORMS = [(kernel, True), (cpu, False)]
FUSED_CASES = [
    (tokens, inputs, dtype)
    for dtype in (torch.float32, torch.float16)
    for tokens, inputs in [(1, 16), (1, 600), (1, kernel.TUNING.streamed_inputs + 8), (2, 136), (5, 300), (40, 136)]
]


def fused_operands(tokens, inputs, dtype, outputs, grouped):
    """x, weight, scale, bias and the norm's weight; products are of the order of 1."""
    x, weight, scale, bias = operands(tokens, outputs, inputs, dtype=dtype, groups=num_groups(inputs) if grouped else 1)
    norm_weight = 1 + torch.randn(inputs, generator=torch.Generator().manual_seed(inputs)).to(dtype) / 4
    return x, weight, scale * inputs**-0.5, bias, norm_weight


def normalised(x, norm_weight):
    wide = x.double()
    wide = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()
    return wide * norm_weight.double()


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("form", "on_device"), FORMS, ids=["cuda", "cpu"])
@pytest.mark.parametrize(("tokens", "inputs", "dtype"), FUSED_CASES)
def test_products_fused_with_what_is_around_them_match_float64(form, on_device, tokens, inputs, dtype, grouped, device):
    place = device if on_device else "cpu"
    x, weight, scale, bias, norm_weight = fused_operands(tokens, inputs, dtype, 38, grouped)
    exact_weight = dequantize(weight, scale).double()
    on_place = [t.to(place) for t in (x, weight, scale, bias, norm_weight)]
    x_, weight_, scale_, bias_, norm_weight_ = on_place
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": {torch.float32: 1e-4, torch.float16: 0.03}[dtype]}

    def check(found, expected):
        torch.testing.assert_close(found.cpu().double(), expected, **tolerance)

    residual = torch.randn(tokens + 1, 38, generator=torch.Generator().manual_seed(1)).to(dtype)
    updated = residual.to(place, copy=True)
    form.fp8_linear_add(x_, weight_, scale_, bias_, updated[:tokens], 0.22)
    check(updated[:tokens], residual[:tokens].double() + 0.22 * (x.double() @ exact_weight.T + bias.double()))
    assert torch.equal(updated[tokens].cpu(), residual[tokens]), "wrote beyond the last token"

    product = normalised(x, norm_weight) @ exact_weight.T
    check(form.fp8_norm_linear(x_, norm_weight_, EPS, weight_, scale_, bias_), product + bias.double())
    gate, up = product.chunk(2, 1)
    for gelu in (False, True):
        active = torch.nn.functional.gelu(gate, approximate="tanh") if gelu else torch.nn.functional.silu(gate)
        check(form.fp8_norm_gated_linear(x_, norm_weight_, EPS, weight_, scale_, gelu), active * up)
    gate, up = (x.double() @ exact_weight.T).chunk(2, 1)
    for gelu in (False, True):
        active = torch.nn.functional.gelu(gate, approximate="tanh") if gelu else torch.nn.functional.silu(gate)
        check(form.fp8_gated_linear(x_, weight_, scale_, gelu), active * up)


def test_result_is_the_same_whichever_kernel_a_number_of_tokens_chooses(device):
    """On the CPU the launcher runs under Triton's interpreter."""
    x, weight, scale, _ = (None if t is None else t.to(device) for t in operands(70, 40, 300, dtype=torch.float16))
    whole = kernel.fp8_linear(x, weight, scale, None, False)
    for tokens in (1, 2, 3, 40):
        torch.testing.assert_close(
            kernel.fp8_linear(x[:tokens], weight, scale, None, False), whole[:tokens], rtol=2e-3, atol=2e-3
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(33, 300), (1024, 2048)])
def test_rows_keep_their_bits_in_every_batch_and_place(dtype, outputs, inputs, device):
    if device == "cpu":
        outputs = min(outputs, 64)
    x, weight, scale, bias = (t.to(device) for t in operands(70, outputs, inputs, dtype=dtype))
    whole = ops.fp8_linear(x, weight, scale, bias, by_row=True)
    for tokens in (1, 2, 17):
        assert torch.equal(ops.fp8_linear(x[:tokens].clone(), weight, scale, bias, by_row=True), whole[:tokens])
    moved = ops.fp8_linear(x.roll(5, 0), weight, scale, bias, by_row=True)
    assert torch.equal(moved, whole.roll(5, 0))


@pytest.mark.parametrize("grouped", [False, True])
def test_rounding_to_8_bits_is_off_by_a_sixteenth_at_most(grouped):
    values = torch.randn(50, 300) * torch.logspace(-6, 3, 50).unsqueeze(1)
    codes, scale = quantize(values, num_groups(300) if grouped else 1)
    assert codes.dtype == torch.float8_e4m3fn
    assert codes.is_contiguous()
    wide = scale.repeat_interleave(GROUP_SIZE, 1)[:, :300] if grouped else scale
    bound = torch.maximum(values.abs() / 16, wide / 1024)
    assert ((dequantize(codes, scale) - values).abs() <= bound * (1 + 1e-5)).all()


def test_outputs_without_values_and_with_tiny_ones_are_rounded_to_something_finite():
    values = torch.stack([torch.zeros(8), torch.full((8,), 1e-42), torch.full((8,), 3e38)])
    codes, scale = quantize(values, 1)
    assert (scale > 0).all()
    torch.testing.assert_close(dequantize(codes, scale), values, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("grouped", [False, True])
def test_codes_survive_a_round_trip_where_each_scale_has_the_largest_one(grouped):
    codes = (torch.arange(2 * 384).view(2, 384) % 127 + 128 * torch.randint(2, (2, 384))).to(torch.uint8)
    codes = codes.view(torch.float8_e4m3fn)
    scale = torch.rand(2, num_groups(384) if grouped else 1) + 0.1
    again, found = quantize(dequantize(codes, scale), scale.shape[1])
    torch.testing.assert_close(found, scale)
    assert torch.equal(again.float(), codes.float())

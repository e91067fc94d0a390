"""`four_bit_linear`: every kernel against the product in float64 with the weight dequantised by each format's definition."""

import pytest
import torch
from compiled_for_hopper import lines_of

from stepgraph import ops
from stepgraph.ops.four_bit_linear import CHUNK, FourBitWeight, cpu, dequantize, interleave, quantize
from stepgraph.ops.four_bit_linear import triton as kernel
from stepgraph.ops.four_bit_linear.reference import codes_of

STREAMED = kernel.StreamedTile(outputs=4, code_bytes=64, num_warps=4)
FLAT = kernel.FlatTile(outputs=16, inputs=128, num_stages=3, num_warps=1)
BLOCK = kernel.BlockTile(tokens=16, outputs=32, code_bytes=64, num_warps=4, num_stages=2)
SIZES = [(5, 16), (37, 101), (24, 700)]
NAMES = ["few", "unaligned", "several groups"]
KINDS = {
    "integers": (torch.float16, None, False),
    "integers, bfloat16 scales": (torch.bfloat16, None, False),
    "integers and zeros": (torch.float16, torch.uint8, False),
    "integers and minima": (torch.float32, torch.float32, False),
    "E2M1, exponents": (torch.uint8, None, False),
    "E2M1, 8-bit scales": (torch.float8_e4m3fn, None, True),
}
PUBLISHED = [
    *(("integers", group_size) for group_size in (16, 32, 64, 128)),
    ("integers, bfloat16 scales", 256),
    ("integers and zeros", 16),
    ("integers and zeros", 128),
    ("integers and minima", 32),
    ("E2M1, exponents", 32),
    ("E2M1, 8-bit scales", 16),
    ("E2M1, 8-bit scales", 64),
]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def random_weight(outputs, inputs, *, group_size=32, kind="integers"):
    """Values of the order of 1."""
    generator = torch.Generator().manual_seed(outputs * inputs + group_size)
    scale_dtype, zero_dtype, has_factor = KINDS[kind]
    size = outputs, -(-inputs // group_size)
    codes = torch.randint(0, 16, (outputs, inputs), generator=generator, dtype=torch.uint8)
    if scale_dtype == torch.uint8:
        scale = torch.randint(124, 128, size, generator=generator, dtype=torch.uint8)
    else:
        scale = (torch.rand(size, generator=generator) + 0.1).to(scale_dtype)
    zero = None
    if zero_dtype == torch.uint8:
        zero = torch.randint(0, 17, size, generator=generator, dtype=torch.uint8)
    elif zero_dtype is not None:
        zero = -torch.rand(size, generator=generator).to(zero_dtype) * 3
    factor = torch.rand(outputs, 1, generator=generator) + 0.5 if has_factor else None
    return FourBitWeight(interleave(codes), scale, zero, factor, group_size, kind.startswith("E2M1")), codes


def defined(weight, codes):
    """What codes [N, K] stand for, number by number, in float64."""
    outputs, inputs = codes.shape
    values = torch.empty(outputs, inputs, dtype=torch.float64)
    for k in range(inputs):
        group = k // weight.group_size
        code, scale = codes[:, k], weight.scale[:, group]
        scale = 2.0 ** (scale.double() - 127) if scale.dtype == torch.uint8 else scale.double()
        if weight.is_e2m1:
            values[:, k] = torch.tensor(E2M1, dtype=torch.float64)[code.int()] * scale
        elif weight.zero is None:
            values[:, k] = (code.double() - 8) * scale
        elif weight.zero.dtype == torch.uint8:
            values[:, k] = (code.double() - weight.zero[:, group].double()) * scale
        else:
            values[:, k] = code.double() * scale + weight.zero[:, group].double()
    return values if weight.factor is None else values * weight.factor.double()


def tokens_for(tokens, inputs, dtype):
    return torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def assert_close(found, x, values, bias, *, rounded=False):
    """Up to rounding: of float32 sums, of weights if those are `rounded`, then of the result."""
    exact = x.double() @ values.T
    exact = exact if bias is None else exact + bias.double()
    sizes = x.double().abs() @ values.abs().T
    error, eps = (found.cpu().double() - exact).abs(), torch.finfo(x.dtype).eps
    assert (error <= (1e-5 + rounded * eps / 2) * sizes + 2 * eps * exact.abs()).all(), (error / sizes).max()


def moved(weight, device):
    return FourBitWeight(*(t.to(device) if isinstance(t, torch.Tensor) else t for t in weight))


def check_tile(tile, tokens, device, dtype, weight, codes, bias):
    """Beyond the tokens, `x` and the result hold NaN, which is neither read nor overwritten."""
    x, outputs = tokens_for(tokens, codes.shape[1], dtype), codes.shape[0]
    padded = torch.cat([x, torch.full((80, x.shape[1]), torch.nan, dtype=dtype)]).to(device)
    out = torch.full((tokens + 1, outputs), torch.nan, dtype=dtype, device=device)
    bias_there = None if bias is None else bias.to(device)
    kernel.multiply(padded[:tokens], moved(weight, device), bias_there, out[:tokens], tile)
    assert_close(out[:tokens], x, defined(weight, codes), bias, rounded=isinstance(tile, kernel.BlockTile))
    assert out[tokens].isnan().all(), "wrote beyond the last token"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group_size", [16, 32, 64, 128])
@pytest.mark.parametrize(("outputs", "inputs"), SIZES, ids=NAMES)
def test_dequantisation_is_the_formats_definition(kind, group_size, outputs, inputs):
    weight, codes = random_weight(outputs, inputs, group_size=group_size, kind=kind)
    assert torch.equal(codes_of(weight, inputs), codes)
    torch.testing.assert_close(dequantize(weight, inputs).double(), defined(weight, codes), rtol=1e-6, atol=1e-6)


def test_codes_of_neighbours_are_in_neighbouring_bytes():
    codes = torch.arange(32, dtype=torch.uint8).remainder(16).view(1, -1)
    first = [i | (i + 8) << 4 for i in range(8)]
    assert interleave(codes).tolist() == [first * 2]
    assert interleave(codes[:, :5]).tolist() == [[0, 1, 2, 3, 4, 0, 0, 0]]


@pytest.mark.parametrize(("kind", "group_size"), PUBLISHED)
@pytest.mark.parametrize(
    ("tile", "tokens", "dtype"),
    [
        (STREAMED, 1, torch.float32),
        (STREAMED, 2, torch.float16),
        (FLAT, 3, torch.float16),
        (FLAT, 17, torch.float16),
        (BLOCK, 33, torch.float16),
        (kernel.FLOAT32_TILE, 33, torch.float32),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, kernel.Tile) else str(value),
)
def test_kernels_match_float64(tile, tokens, dtype, group_size, kind, device):
    if isinstance(tile, kernel.FlatTile) and group_size == CHUNK:
        return  # which goes in blocks
    outputs, inputs = SIZES[group_size // 32 % 3]
    weight, codes = random_weight(outputs, inputs, group_size=group_size, kind=kind)
    bias = torch.randn(outputs, generator=torch.Generator().manual_seed(1)).to(dtype)
    check_tile(tile, tokens, device, dtype, weight, codes, bias)


@pytest.mark.parametrize("kind", ["integers and zeros", "E2M1, 8-bit scales"])
@pytest.mark.parametrize("tile", [STREAMED, FLAT, BLOCK], ids=lambda tile: type(tile).__name__)
@pytest.mark.parametrize(("outputs", "inputs"), SIZES, ids=NAMES)
def test_kernels_match_float64_in_every_size(tile, outputs, inputs, kind, device):
    weight, codes = random_weight(outputs, inputs, kind=kind)
    check_tile(tile, 2, device, torch.float16, weight, codes, None)


CHOSEN = {
    (tokens, tile)
    for tokens in (1, 2, 5, 16, 17, 64, 65, 300, 2048)
    for outputs in (64, 1024, 4096, 24576)
    for inputs in (1024, 4096)
    for group_size in (16, 128)
    for by_row in (False, True)
    for codes in [torch.empty(outputs, 8, dtype=torch.uint8)]
    for weight in [FourBitWeight(codes, codes, None, None, group_size, is_e2m1=False)]
    for tile in [kernel.choose_tile(torch.empty(tokens, inputs, dtype=torch.float16), weight, by_row=by_row)]
}


@pytest.mark.parametrize("tile", sorted({tile for _, tile in CHOSEN}, key=str), ids=str)
def test_every_tile_that_is_chosen_matches_float64(tile, device):
    tokens = min(tokens for tokens, chosen in CHOSEN if chosen == tile)
    weight, codes = random_weight(40, 300, group_size=128)
    check_tile(tile, min(tokens, 70), device, torch.float16, weight, codes, None)


@pytest.mark.parametrize("tokens", [1, 2, 9, 80])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["integers and zeros", "E2M1, exponents"])
def test_operator_matches_float64(tokens, by_row, dtype, kind, device):
    (weight, codes), x = random_weight(40, 300, kind=kind), tokens_for(tokens, 300, dtype)
    bias = torch.randn(40, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = ops.four_bit_linear(x.to(device), moved(weight, device), bias.to(device), by_row=by_row)
    assert found.dtype == dtype
    assert_close(found, x, defined(weight, codes), bias, rounded=True)


EPS = 1e-5
FUSED_CASES = [
    (tokens, inputs, dtype)
    for dtype in (torch.float32, torch.float16)
    for tokens, inputs in [(1, 16), (1, 600), (1, kernel.TUNING.streamed_inputs + 8), (2, 136), (5, 300), (40, 136)]
    if dtype == torch.float16 or inputs == 600
]


@pytest.mark.parametrize("kind", ["integers and zeros", "E2M1, 8-bit scales"])
@pytest.mark.parametrize(("form", "on_device"), [(kernel, True), (cpu, False)], ids=["cuda", "cpu"])
@pytest.mark.parametrize(("tokens", "inputs", "dtype"), FUSED_CASES)
def test_products_fused_with_what_is_around_them_match_float64(form, on_device, tokens, inputs, dtype, kind, device):
    place = device if on_device else torch.device("cpu")
    weight, codes = random_weight(38, inputs, kind=kind)
    factor = torch.ones(38, 1) if weight.factor is None else weight.factor
    weight = weight._replace(factor=factor * inputs**-0.5 / 4)
    x, values, there = tokens_for(tokens, inputs, dtype), defined(weight, codes), moved(weight, place)
    generator = torch.Generator().manual_seed(inputs)
    bias = torch.randn(38, generator=generator).to(dtype)
    norm_weight = 1 + torch.randn(inputs, generator=generator).to(dtype) / 4
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": {torch.float32: 1e-4, torch.float16: 0.03}[dtype]}
    x_, bias_, norm_ = (t.to(place) for t in (x, bias, norm_weight))

    def check(found, expected):
        torch.testing.assert_close(found.cpu().double(), expected, **tolerance)

    residual = torch.randn(tokens + 1, 38, generator=generator).to(dtype)
    updated = residual.to(place, copy=True)
    form.four_bit_linear_add(x_, *there, bias_, updated[:tokens], 0.22)
    check(updated[:tokens], residual[:tokens].double() + 0.22 * (x.double() @ values.T + bias.double()))
    assert torch.equal(updated[tokens].cpu(), residual[tokens]), "wrote beyond the last token"

    wide = x.double()
    normed = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * norm_weight.double()
    check(form.four_bit_linear(x_, norm_, EPS, *there, bias_, False), normed @ values.T + bias.double())
    for given, inputs_of in ((norm_, normed), (None, x.double())):
        gate, up = (inputs_of @ values.T).chunk(2, 1)
        for gelu in (False, True):
            active = torch.nn.functional.gelu(gate, approximate="tanh") if gelu else torch.nn.functional.silu(gate)
            check(form.four_bit_gated_linear(x_, given, EPS, *there, gelu), active * up)


def test_rows_do_not_depend_on_others(device):
    weight, _ = random_weight(40, 300, kind="integers and zeros")
    x, there = tokens_for(70, 300, torch.float16).to(device), moved(weight, device)
    whole = kernel.four_bit_linear(x, None, 0.0, *there, None, True)
    for begin, end in ((0, 1), (3, 5), (9, 70)):
        assert torch.equal(kernel.four_bit_linear(x[begin:end], None, 0.0, *there, None, True), whole[begin:end])


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("inputs", [16, 101, 700])
def test_rounding_is_to_the_nearest_of_sixteen(group_size, inputs):
    values = torch.randn(24, inputs, generator=torch.Generator().manual_seed(inputs))
    values *= torch.logspace(-6, 2, 24).unsqueeze(1)
    values[3] = 0.0
    weight = quantize(values, group_size, torch.bfloat16)
    scale = weight.scale.float().abs().repeat_interleave(group_size, 1)[:, :inputs]
    error = (dequantize(weight, inputs) - values).abs()
    # Half a step; the farthest on the side that ends at 7 may be a whole one off, and the scale's rounding an eighth.
    assert (error <= 1.1 * scale).all()
    assert (error <= 0.501 * scale).float().mean() > 0.9
    assert (error[3] == 0).all()


COMPILED = """
from stepgraph.ops.four_bit_linear import FourBitWeight
from stepgraph.ops.four_bit_linear import triton as kernel

def weight(N, K, group_size, scale, zero, is_e2m1):
    size = N, K // group_size
    zero = None if zero is None else torch.empty(size, dtype=zero)
    return FourBitWeight(
        torch.empty(N, K // 2, dtype=torch.uint8), torch.empty(size, dtype=scale), zero, None, group_size, is_e2m1
    )

N, K = 4096, 4096
x, norm = torch.empty(2048, K, dtype=torch.bfloat16), torch.empty(K, dtype=torch.bfloat16)
integers, zeros = weight(N, K, 128, torch.bfloat16, None, False), weight(N, K, 128, torch.float16, torch.uint8, False)
nvfp4 = weight(N, K, 16, torch.float8_e4m3fn, None, True)
kernel.four_bit_linear(x, None, 0.0, *integers, None, False)
kernel.four_bit_linear(x[:64], None, 0.0, *zeros, None, False)
kernel.four_bit_linear(x[:8], None, 0.0, *nvfp4, None, False)
kernel.four_bit_gated_linear(x[:1], norm, 1e-6, *integers, False)
kernel.four_bit_linear_add(x[:8], *integers, None, x[:8].clone(), 1.0)
for launched in (kernel.streamed_kernel, kernel.flat_kernel, kernel.block_kernel):
    for compiled in launched.device_caches[0][0].values():
        ptx = compiled.asm["ptx"]
        products = "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else "none"
        print(launched.fn.__name__, products, compiled.metadata.shared)
"""


def test_kernels_compile_for_hopper_and_run_on_tensor_cores():
    found = [line.split() for line in lines_of(COMPILED)]
    assert {name for name, *_ in found} == {"streamed_kernel", "flat_kernel", "block_kernel"}
    assert all((products == "none") == (name == "streamed_kernel") for name, products, _ in found)
    assert all(int(shared) <= 227 << 10 for *_, shared in found)

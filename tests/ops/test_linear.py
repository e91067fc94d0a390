"""`linear`: the kernels for one and for a few tokens against the product in float64. `linear_by_row`: the same, and rows that
keep their bits."""

import pytest
import torch

from stepgraph.ops.linear import cpu, few_tokens
from stepgraph.ops.linear import triton as kernel
from stepgraph.platforms.tuning import FlatTile, SlicedTile

MAX_TOKENS = 64
"""Of products that some tile is for."""

TILES = [kernel.SMALL_TILE, kernel.LARGE_TILE, kernel.FLOAT32_TILE]


@pytest.fixture
def threads():
    """Sets the number of threads of torch's CPU kernels, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def operands(tokens, outputs, inputs, *, dtype=torch.float32, with_bias=True):
    generator = torch.Generator().manual_seed(tokens * outputs + inputs)
    x, weight = torch.randn(tokens, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
    bias = torch.randn(outputs, generator=generator).to(dtype) if with_bias else None
    return x.to(dtype), weight.to(dtype), bias


def to_device(device, *tensors):
    return [None if t is None else t.to(device) for t in tensors]


def exact(x, weight, bias):
    return x.double() @ weight.double().T + (0 if bias is None else bias.double())


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize(("outputs", "inputs"), [(5, 16), (40, 100), (9, 1030)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_streamed_product_matches_float64(tokens, outputs, inputs, with_bias, device):
    x, weight, bias = operands(tokens, outputs, inputs, with_bias=with_bias)
    found = kernel.linear(*to_device(device, x, weight, bias))
    assert found.shape == (tokens, outputs)
    torch.testing.assert_close(found.cpu().double(), exact(x, weight, bias), rtol=1e-5, atol=1e-4)


def test_a_token_gets_the_same_sum_alone_and_beside_others(device):
    x, weight = torch.randn(2, 96, device=device), torch.randn(24, 96, device=device)
    together = kernel.linear(x, weight, None)
    for token in range(2):
        assert torch.equal(kernel.linear(x[token : token + 1], weight, None)[0], together[token])


@pytest.mark.parametrize(
    ("tokens", "inputs", "dtype"),
    [(5, 32, torch.float32), (MAX_TOKENS + 1, 32, torch.float16), (3, 33, torch.float16)],
    ids=["float32", "many tokens", "unaligned rows"],
)
def test_products_without_a_kernel_go_to_the_library(tokens, inputs, dtype, device):
    x, weight, _ = to_device(device, *operands(tokens, 8, inputs, dtype=dtype))
    assert torch.equal(kernel.linear(x, weight, None), torch.nn.functional.linear(x, weight))


MOST_TOKENS = {
    tile: tokens
    for tokens in (1, 8, 16, 32, MAX_TOKENS)
    for outputs in (1024, 2048, 4096, 24576, 151936)
    for gated in (False, True)
    if (tile := few_tokens.choose_tile(torch.empty(tokens, 1024, dtype=torch.float16), outputs, gated=gated))
}
"""Of each tile that is chosen."""
TILES_FOR_FEW_TOKENS = sorted(MOST_TOKENS, key=str)
BROADEST_TILES = [
    max((tile for tile in TILES_FOR_FEW_TOKENS if isinstance(tile, kind)), key=lambda tile: MOST_TOKENS[tile])
    for kind in (FlatTile, SlicedTile)
]
"""Of each kind, the one for the most tokens."""


@pytest.mark.parametrize(
    ("tile", "tokens"),
    [(tile, tokens) for tile in BROADEST_TILES for tokens in (*range(1, 18), MOST_TOKENS[tile])],
    ids=str,
)
@pytest.mark.parametrize(("outputs", "inputs"), [(5, 16), (37, 101), (70, 1032)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_product_of_few_tokens_matches_float64_and_repeats_bit_for_bit(
    tokens, outputs, inputs, with_bias, tile, device
):
    """Beyond the tokens, `x` and `out` hold NaN, which it neither reads nor overwrites."""
    x, weight, bias = operands(tokens, outputs, inputs, dtype=torch.float16, with_bias=with_bias)
    padded = torch.cat([x, torch.full((20, inputs), torch.nan, dtype=torch.float16)]).to(device)
    found = torch.full((2, tokens + 1, outputs), torch.nan, dtype=torch.float16, device=device)
    weight_, bias_ = to_device(device, weight, bias)
    for out in found:
        few_tokens.multiply(padded[:tokens], weight_, bias_, out[:tokens], tile)
    tolerance = torch.finfo(torch.float16).eps
    torch.testing.assert_close(found[0, :tokens].cpu().double(), exact(x, weight, bias), rtol=tolerance, atol=1e-3)
    assert torch.equal(found[0, :tokens], found[1, :tokens])
    assert found[:, tokens].isnan().all(), "wrote beyond the last token"


@pytest.mark.parametrize("tile", TILES_FOR_FEW_TOKENS, ids=str)
def test_every_tile_for_few_tokens_matches_float64(tile, device):
    x, weight, bias = operands(5, tile.outputs + 3, 2 * tile.inputs + 40, dtype=torch.float16)
    out = torch.empty(5, weight.shape[0], dtype=torch.float16, device=device)
    few_tokens.multiply(*to_device(device, x, weight, bias), out, tile)
    tolerance = torch.finfo(torch.float16).eps
    torch.testing.assert_close(out.cpu().double(), exact(x, weight, bias), rtol=tolerance, atol=1e-3)


@pytest.mark.parametrize("tile", TILES_FOR_FEW_TOKENS, ids=str)
def test_tiles_for_few_tokens_fit_into_shared_memory_without_bank_conflicts(tile):
    assert tile.shared_bytes(MOST_TOKENS[tile]) <= 227 << 10
    assert isinstance(tile, FlatTile) or tile.outputs >= tile.min_size


@pytest.mark.parametrize("tile", TILES, ids=["small", "large", "float32"])
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(1, 5, 16), (33, 40, 100), (130, 129, 257)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_tiled_product_matches_float64(tile, tokens, outputs, inputs, with_bias, device):
    x, weight, bias = operands(tokens, outputs, inputs, with_bias=with_bias)
    out = torch.full((tokens + 1, outputs), torch.nan, device=device)
    kernel.launch_tiles(*to_device(device, x, weight, bias), out[:tokens], tile)
    torch.testing.assert_close(out[:tokens].cpu().double(), exact(x, weight, bias), rtol=1e-5, atol=1e-4)
    assert out[tokens].isnan().all(), "wrote beyond the last token"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [3, 2048])
def test_tiled_product_of_16_bits_is_summed_in_float32(dtype, tokens, device):
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter keeps bfloat16 as integers, which its dot multiplies as such")
    x, weight, bias = operands(tokens, 64, 520, dtype=dtype)
    out = torch.empty(tokens, 64, dtype=dtype, device=device)
    kernel.linear_by_row(*to_device(device, x, weight, bias), out)
    expected = exact(x, weight, bias)
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(out.cpu().double(), expected, rtol=tolerance, atol=1e-3)


def rows_with_other_bits(product, x, weight, bias):
    """How many rows of products of several sizes differ from the same row alone. The first row of `x` is tried at every
    place among the others."""
    tokens = x.shape[0]
    alone = torch.cat([product(row, weight, bias) for row in x.split(1)])
    count = 0
    for size in {2, 3, 5, 8, tokens // 2, tokens}:
        count += int((product(x[:size].clone(), weight, bias) != alone[:size]).any(1).sum())
    for place in range(tokens):
        moved = x.roll(place, 0)
        count += int((product(moved, weight, bias) != alone.roll(place, 0)).any(1).sum())
    return count


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(7, 33), (96, 32), (257, 32), (33, 576), (1030, 101)])
def test_cpu_rows_keep_their_bits_in_every_batch_and_place(num_threads, dtype, outputs, inputs, threads):
    threads(num_threads)

    def product(x, weight, bias):
        out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
        cpu.linear_by_row(x, weight, bias, out)
        return out

    operands_ = operands(17, outputs, inputs, dtype=dtype)
    assert rows_with_other_bits(product, *operands_) == 0
    torch.testing.assert_close(
        product(*operands_).double(), exact(*operands_), rtol=torch.finfo(dtype).eps * 4, atol=1e-3
    )


def test_rows_of_the_librarys_cpu_product_change_bits_in_some_batches():
    """Otherwise the test above would prove nothing."""
    assert rows_with_other_bits(torch.nn.functional.linear, *operands(17, 257, 576)) > 0


GPU_SIZES = [(1024, 2048), (4096, 1024), (1024, 3072), (100, 1030), (5, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("outputs", "inputs"), GPU_SIZES)
def test_gpu_rows_keep_their_bits_in_every_batch_place_and_tile(dtype, outputs, inputs, device):
    if device != "cuda":
        pytest.skip("Triton's interpreter adds up with numpy's products, not with tensor cores")
    x, weight, bias = to_device(device, *operands(300, outputs, inputs, dtype=dtype))

    def product(x, weight, bias):
        out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=device)
        kernel.linear_by_row(x, weight, bias, out)
        return out

    assert rows_with_other_bits(product, x, weight, bias) == 0
    if dtype != torch.float32:
        small, large = torch.empty(2, 300, outputs, dtype=dtype, device=device)
        kernel.launch_tiles(x, weight, bias, small, kernel.SMALL_TILE)
        kernel.launch_tiles(x, weight, bias, large, kernel.LARGE_TILE)
        assert torch.equal(small, large)

"""`head_linear`: reference and Triton kernel, in each of its tiles, against products in float64; tokens that keep their bits."""

from dataclasses import replace

import pytest
import torch
from triton_operators import make_rows_of_products_independent

from stepgraph.ops.head_linear import reference
from stepgraph.ops.head_linear import triton as kernel
from stepgraph.ops.head_linear.triton import DETERMINISTIC_TILE, FLOAT32_TILE, LARGE_TILE, MEDIUM_TILE, choose_tile

FIRST_TILE = choose_tile(torch.empty(1, 2, 300, dtype=torch.float16), 2, 24, 300, deterministic=False)
TILES = {
    "first": FIRST_TILE,
    "medium": MEDIUM_TILE,
    "large": LARGE_TILE,
    "deterministic": DETERMINISTIC_TILE,
    "float32": FLOAT32_TILE,
}


def operands(tokens, heads, outputs, inputs, dtype):
    """Each head's weight lies behind 7 rows of something else."""
    generator = torch.Generator().manual_seed(tokens + outputs)
    x = torch.randn(tokens, heads, inputs, generator=generator).to(dtype)
    return x, torch.randn(heads, 7 + outputs, inputs, generator=generator).to(dtype)[:, 7:]


def exact(x, weight):
    return torch.einsum("thk,hok->tho", x.double(), weight.double()).flatten(1)


def tolerance(dtype):
    return {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": torch.finfo(dtype).eps, "atol": 1e-3}


CALLS = [
    (0, torch.float16, False),
    (1, torch.float16, False),
    (1, torch.float32, True),
    (16, torch.float16, True),
    (17, torch.float16, False),
    (70, torch.float16, True),
    (70, torch.float32, False),
]
"""Numbers of tokens, dtypes, and whether deterministic."""


@pytest.mark.parametrize(("tokens", "dtype", "deterministic"), CALLS, ids=str)
@pytest.mark.parametrize("shape", [(2, 24, 40), (3, 5, 16), (1, 64, 300)], ids=str)
def test_both_match_float64(tokens, shape, dtype, deterministic, device):
    x, weight = operands(tokens, *shape, dtype)
    expected = exact(x, weight)
    torch.testing.assert_close(reference.head_linear(x, weight, deterministic).double(), expected, **tolerance(dtype))
    found = kernel.head_linear(x.to(device), weight.to(device), deterministic).cpu()
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, **tolerance(dtype))


@pytest.mark.parametrize("name", TILES)
def test_every_tile_matches_float64_and_reads_and_writes_its_tokens_only(name, device):
    tile = TILES[name]
    tokens, dtype = tile.tokens + 3, torch.float32 if tile is FLOAT32_TILE else torch.float16
    x, weight = operands(tokens, 2, tile.outputs + 5, 300, dtype)
    x_ = torch.cat((x, torch.full((90, 2, 300), torch.nan, dtype=dtype))).to(device)
    out = torch.full((tokens + 90, 2 * weight.shape[1]), torch.nan, dtype=dtype, device=device)
    kernel.multiply(x_[:tokens], weight.to(device), out[:tokens], tile)
    torch.testing.assert_close(out[:tokens].cpu().double(), exact(x, weight), **tolerance(dtype))
    assert out[tokens:].isnan().all(), "wrote beyond the last token"


def test_tokens_of_nan_leave_the_others_alone(device):
    for tokens in (5, 70):
        x, weight = operands(tokens, 2, 24, 40, torch.float16)
        x[1::2] = torch.nan
        found = kernel.head_linear(x.to(device), weight.to(device), False).cpu()
        torch.testing.assert_close(found[::2].double(), exact(x, weight)[::2], **tolerance(x.dtype))


def cancelling(tokens, heads, outputs, inputs, dtype):
    """Products that add up to nothing, so that what comes out are errors of rounding: another order of additions shows."""
    x, weight = operands(tokens, heads, outputs, inputs // 2, dtype)
    return torch.cat((1000 * x, -1000 * x.flip(2)), dim=2), torch.cat((weight, weight.flip(2)), dim=2)


BATCHES = [(0, 1), (16, *range(1, 17)), (65, *range(65), 66)]
"""Places of the tokens of batches in which a token is held to what it is alone: the first of each, and the last."""


def tile_by_tokens(x, *sizes, deterministic):
    """The mutant: a tile that adds up in another order for some numbers of tokens."""
    return DETERMINISTIC_TILE if len(x) > 1 else replace(DETERMINISTIC_TILE, inputs=32)


def tokens_with_other_bits(device, deterministic):
    x, weight = (tensor.to(device) for tensor in cancelling(67, 1, 20, 256, torch.float16))
    count = 0
    for batch in BATCHES:
        found = kernel.head_linear(x[list(batch)], weight, deterministic)
        assert found.abs().max() > 0
        for place in (0, -1):
            alone = kernel.head_linear(x[[batch[place]]], weight, deterministic)
            count += not torch.equal(found[place], alone[0])
    return count


def test_a_token_keeps_its_bits_in_every_batch_and_place_if_deterministic(device, monkeypatch):
    make_rows_of_products_independent(monkeypatch)
    assert tokens_with_other_bits(device, deterministic=True) == 0
    if device == "cpu":  # a tensor core adds up in one order in both of these tiles
        monkeypatch.setattr(kernel, "choose_tile", tile_by_tokens)
        assert tokens_with_other_bits(device, deterministic=True) > 0, "would not show another order of additions"


@pytest.mark.parametrize("deterministic", [False, True])
def test_calls_repeat_bit_for_bit(deterministic, device):
    x, weight = (tensor.to(device) for tensor in cancelling(9, 2, 40, 256, torch.float16))
    assert torch.equal(kernel.head_linear(x, weight, deterministic), kernel.head_linear(x, weight, deterministic))

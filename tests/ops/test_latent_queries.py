"""`latent_queries`: reference and Triton kernel against float64, where cached entries go, and tokens that keep their bits.

Shapes: T tokens, H heads, N dimensions of a head that are not rotated, P that are, R of a latent; L = R + P.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from test_head_linear import BATCHES, CALLS, TILES, tile_by_tokens
from torch import Tensor
from triton_operators import make_rows_of_products_independent

from stepgraph.ops.latent_queries import reference
from stepgraph.ops.latent_queries import triton as kernel

EPS = 1e-6
UNTOUCHED = -7.0
SIZES = [(3, 16, 8, 32), (2, 12, 6, 40), (1, 64, 32, 256)]
"""H, N, P, R."""


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    latent: Tensor
    positions: Tensor
    kv_slots: Tensor
    cos_sin: Tensor
    latent_norm: Tensor
    key_weight: Tensor
    cache: Tensor

    def to(self, device: str) -> Inputs:
        """A copy on `device`, of the same strides."""
        return Inputs(
            *(
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)
                for x in vars(self).values()
            )
        )

    def run(self, function, deterministic: bool = False) -> tuple[Tensor, Tensor]:
        """Queries, and the entries of all slots after the call, in host memory."""
        q = function(*vars(self).values(), EPS, deterministic)
        return q.cpu(), self.cache.cpu().flatten(0, 1)


def make_inputs(
    num_tokens: int,
    sizes: tuple[int, int, int, int] = SIZES[0],
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
) -> Inputs:
    """Queries and latents are parts of one product; each head's weight lies before 5 rows of something else."""
    H, N, P, R = sizes
    generator = torch.Generator().manual_seed(num_tokens + R)
    angle = 50 * torch.rand(60, P // 2, generator=generator)
    merged = torch.randn(num_tokens, H * (N + P) + R + P, generator=generator).to(dtype)
    q, latent = merged.tensor_split((-R - P,), dim=1)
    num_blocks = num_tokens // 4 + 3
    return Inputs(
        q=q,
        latent=latent,
        positions=torch.randint(60, (num_tokens,), generator=generator, dtype=torch.int32),
        kv_slots=4 + torch.randperm(4 * (num_blocks - 1), generator=generator)[:num_tokens].int(),
        cos_sin=torch.cat((angle.cos(), angle.sin()), dim=1),
        latent_norm=1 + torch.rand(R, generator=generator).to(dtype),
        key_weight=(torch.randn(H, N + 5, R, generator=generator) / 4).to(dtype)[:, :N],
        cache=torch.full((num_blocks, 4, R + P), UNTOUCHED).to(cache_dtype or dtype),
    )


def exact(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Queries, and the tokens' entries, of float64."""
    H, N, R = inputs.key_weight.shape
    cos, sin = inputs.cos_sin.double()[inputs.positions.long()].chunk(2, dim=1)
    turn = torch.complex(cos, sin)

    def rotated(x: Tensor, turn: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        turned = torch.complex(low, high) * turn
        return torch.cat((turned.real, turned.imag), dim=-1)

    q_THN, q_THP = inputs.q.double().unflatten(1, (H, -1)).tensor_split((N,), dim=2)
    latent, key = inputs.latent.double().tensor_split((R,), dim=1)
    normed = latent / (latent.square().mean(1, keepdim=True) + EPS).sqrt() * inputs.latent_norm.double()
    absorbed = torch.einsum("thn,hnr->thr", q_THN, inputs.key_weight.double())
    return (
        torch.cat((absorbed, rotated(q_THP, turn.unsqueeze(1))), dim=2),
        torch.cat((normed, rotated(key, turn)), dim=1),
    )


def assert_matches(inputs: Inputs, found: tuple[Tensor, Tensor]) -> None:
    dtype = inputs.q.dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 2e-3}
    q, entries = exact(inputs)
    slots = inputs.kv_slots.long().cpu()
    torch.testing.assert_close(found[0].double(), q, **tolerance)
    torch.testing.assert_close(found[1][slots].double(), entries, **tolerance)
    others = torch.ones(found[1].shape[0], dtype=torch.bool)
    others[slots] = False
    assert (found[1][others] == UNTOUCHED).all()


@pytest.mark.parametrize(("tokens", "dtype", "deterministic"), CALLS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_both_match_float64_and_write_nowhere_else(tokens, sizes, dtype, deterministic, device) -> None:
    inputs = make_inputs(tokens, sizes, dtype)
    assert_matches(inputs, inputs.to("cpu").run(reference.latent_queries, deterministic))
    assert_matches(inputs, inputs.to(device).run(kernel.latent_queries, deterministic))


@pytest.mark.parametrize("name", TILES)
def test_every_tile_matches_float64(name, device) -> None:
    """Of more tokens, and a latent of more numbers, than one holds."""
    tile = TILES[name]
    dtype = torch.float32 if name == "float32" else torch.float16
    inputs = make_inputs(tile.tokens + 3, (2, 70, 8, tile.outputs + 12), dtype)
    out = torch.full((tile.tokens + 3, 2, tile.outputs + 20), torch.nan, dtype=dtype, device=device)

    def in_tiles(*args):
        kernel.launch(*args[:-1], out, tile)
        return out

    assert_matches(inputs, inputs.to(device).run(in_tiles))


def test_padding_tokens_write_only_the_null_block_and_change_no_other(device) -> None:
    inputs = make_inputs(6)
    alone = inputs.to(device).run(kernel.latent_queries)
    q, latent = (torch.cat((x, torch.full((5, x.shape[1]), torch.nan))) for x in (inputs.q, inputs.latent))
    positions, slots = (torch.cat((x, torch.zeros(5, dtype=torch.int32))) for x in (inputs.positions, inputs.kv_slots))
    padded = replace(inputs, q=q, latent=latent, positions=positions, kv_slots=slots)
    queries, entries = padded.to(device).run(kernel.latent_queries)
    torch.testing.assert_close(queries[:6], alone[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entries[4:], alone[1][4:], rtol=1e-6, atol=1e-6)
    assert (entries[1:4] == UNTOUCHED).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_triton_rounds_as_the_reference_does(dtype, device) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter truncates to bfloat16, and multiplies what it keeps as integers")
    inputs = make_inputs(20, SIZES[2], dtype)
    unit = torch.finfo(dtype).eps
    expected = inputs.to("cpu").run(reference.latent_queries)
    for found, wanted in zip(inputs.to(device).run(kernel.latent_queries), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=unit, atol=unit / 2)
        assert (found == wanted).float().mean() > 0.9  # one unit only where float32 results differ


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_float8_cache_gets_the_same_entries_rounded(dtype, device) -> None:
    inputs, wide = (make_inputs(7, SIZES[1], dtype, cached) for cached in (torch.float8_e4m3fn, dtype))
    # Some beyond the largest float8, 448.
    inputs, wide = (replace(x, latent=300 * x.latent, latent_norm=300 * x.latent_norm) for x in (inputs, wide))
    expected_q, expected = wide.to("cpu").run(reference.latent_queries)
    assert expected[:, :40].abs().max() > 448
    assert expected[:, 40:].abs().max() > 448
    wanted = expected.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    for function, where in ((reference.latent_queries, "cpu"), (kernel.latent_queries, device)):
        q, entries = inputs.to(where).run(function)
        torch.testing.assert_close(q, expected_q, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
        assert entries.dtype == torch.float8_e4m3fn
        if function is kernel.latent_queries and device == "cpu":  # Triton's interpreter rounds to float8 wrongly
            same = entries.float().isclose(wanted, rtol=1 / 7, atol=2**-6)
        else:
            same = entries.float() == wanted
        assert same.float().mean() > 0.98  # in the others, float32 results round differently
        beyond = expected.abs() > 465  # what rounds to 448 by itself is below
        assert torch.equal(entries.float()[beyond], 448 * expected[beyond].sign().float())


def test_a_token_keeps_its_bits_in_every_batch_and_place_if_deterministic(device, monkeypatch) -> None:
    """Products add up to nothing, so that absorbed queries are errors of rounding, which another order would change."""
    make_rows_of_products_independent(monkeypatch)
    inputs = make_inputs(67, (1, 256, 8, 20), torch.float16)
    half = inputs.key_weight[:, :128]
    inputs.q[:, 128:256] = -inputs.q[:, :128].flip(1)
    inputs = replace(inputs, key_weight=1000 * torch.cat((half, half.flip(1)), dim=1))

    def run(batch: tuple[int, ...], deterministic: bool) -> Tensor:
        """Queries and entries side by side."""
        names = ("q", "latent", "positions", "kv_slots")
        some = replace(inputs, **{name: getattr(inputs, name)[list(batch)] for name in names})
        q, entries = some.to(device).run(kernel.latent_queries, deterministic)
        return torch.cat((q.flatten(1), entries[some.kv_slots.long()]), dim=1)

    def others(deterministic: bool) -> int:
        count = 0
        for batch in BATCHES:
            found = run(batch, deterministic)
            assert found[:, :20].abs().max() > 0
            for place in (0, -1):
                count += not torch.equal(found[place], run((batch[place],), deterministic)[0])
        return count

    assert others(deterministic=True) == 0
    if device == "cpu":  # a tensor core adds up in one order in both of these tiles
        monkeypatch.setattr(kernel, "choose_tile", tile_by_tokens)
        assert others(deterministic=True) > 0, "would not show another order of additions"

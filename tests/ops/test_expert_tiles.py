"""Experts in tiles: sorting and both products, under every kind of routing, against products in float64."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from stepgraph.ops.capacity import max_tiles
from stepgraph.ops.experts import reference, sort, tiles
from stepgraph.ops.fp8_linear import dequantize, num_groups, quantize
from stepgraph.platforms.tuning import ExpertTile

NUM_EXPERTS = 6
TILE = ExpertTile(rows=16, outputs=32, inputs=32, num_warps=4, num_stages=2, group=2)
COPIED = replace(TILE, copied=True)
FLAT = replace(TILE, outputs=64)


def random_pairs(tokens, top, num_experts=NUM_EXPERTS):
    generator = torch.Generator().manual_seed(tokens)
    scores_TN = torch.rand(tokens, num_experts, generator=generator)
    return scores_TN.topk(top).indices.to(torch.int32)


def one_has_all(tokens):
    return torch.full((tokens, 1), 3, dtype=torch.int32)


def with_padding(tokens, top):
    """As `route` leaves padding tokens: without an expert."""
    expert_TK = random_pairs(tokens, top)
    expert_TK[tokens // 3 :] = NUM_EXPERTS
    return expert_TK


ROUTINGS = {
    "random": (random_pairs(11, 3), 0, NUM_EXPERTS),
    "one token": (random_pairs(1, 2), 0, NUM_EXPERTS),
    "one expert has all": (one_has_all(37), 0, NUM_EXPERTS),
    "tile borders": (torch.tensor([0] * 16 + [2] * 17 + [5] * 15, dtype=torch.int32)[:, None], 0, NUM_EXPERTS),
    "padding": (with_padding(9, 2), 0, NUM_EXPERTS),
    "some here": (random_pairs(11, 4), 2, 3),
    "none here": (torch.zeros(9, 2, dtype=torch.int32), 4, 2),
    "only padding": (torch.full((5, 2), NUM_EXPERTS, dtype=torch.int32), 0, NUM_EXPERTS),
    "one expert here": (random_pairs(10, 2), 5, 1),
}


@pytest.fixture(params=ROUTINGS)
def routing(request):
    return ROUTINGS[request.param]


def sort_on(device, expert, first, count):
    return [t.cpu() for t in sort.sort_pairs(expert.to(device), first, count)]


def assert_sorted(found, expert, first, count):
    order_P, ends_N = found
    expected_P, expected_N = reference.sort_pairs(expert, first, count)
    assert torch.equal(ends_N, expected_N)
    assert torch.equal(order_P[: ends_N[-1]], expected_P[: ends_N[-1]])


def test_pairs_are_sorted_in_their_order(routing, device) -> None:
    assert_sorted(sort_on(device, *routing), *routing)


@pytest.mark.parametrize("block", [128, 512])
def test_pairs_of_several_blocks_are_sorted(monkeypatch, block, device) -> None:
    monkeypatch.setattr(sort, "MAX_BLOCK", block)
    pairs = random_pairs(130, 8, 9), 3, 4
    assert_sorted(sort_on(device, *pairs), *pairs)


def operands(expert, count, dtype, hidden_size, width, groups=None):
    """Tensors of a call, of the weights also their values in float64. Tokens without an expert here are NaN."""
    generator = torch.Generator().manual_seed(expert.numel() + width)
    x = torch.randn(expert.shape[0], hidden_size, generator=generator).to(dtype)
    weights = []
    for outputs, inputs in ((2 * width, hidden_size), (hidden_size, width)):
        values = torch.randn(count * outputs, inputs, generator=generator) / inputs**0.5
        if groups is None:
            codes, scale = values.to(dtype).view(count, outputs, inputs), None
            exact = codes.double()
        else:
            codes, scale = quantize(values, 1 if groups == 1 else num_groups(inputs))
            exact = dequantize(codes, scale).double().view(count, outputs, inputs)
            codes, scale = codes.view(count, outputs, inputs), scale.view(count, outputs, -1)
        weights.append((codes, scale, exact))
    pair_weight = torch.rand(expert.shape, generator=generator)
    return x, weights, pair_weight


def exact_hidden(x, exact, expert, first, gelu):
    """[P, M] float64 in the order of the pairs; NaN where the expert is not here."""
    hidden_PM = torch.full((expert.numel(), exact.shape[1] // 2), torch.nan, dtype=torch.float64)
    for pair, number in enumerate((expert.flatten() - first).tolist()):
        if 0 <= number < len(exact):
            gate, up = (exact[number] @ x[pair // expert.shape[1]].double()).chunk(2)
            hidden_PM[pair] = (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up
    return hidden_PM


def exact_sum(hidden_PM, exact, expert, pair_weight, first):
    """[T, E] float64 of hidden values in the order of the pairs."""
    sum_TE = torch.zeros(expert.shape[0], exact.shape[1], dtype=torch.float64)
    for pair, number in enumerate((expert.flatten() - first).tolist()):
        if 0 <= number < len(exact):
            weight = pair_weight.flatten()[pair].double()
            sum_TE[pair // expert.shape[1]] += weight * (exact[number] @ hidden_PM[pair].double())
    return sum_TE


def on(device, *tensors):
    return [None if t is None else t.to(device) for t in tensors]


def check(routing, device, dtype, *, hidden_size=40, width=20, groups=None, gelu=False, tile=TILE):
    expert, first, count = routing
    x, (gate_up, down), pair_weight = operands(expert, count, dtype, hidden_size, width, groups)
    here_TK = (expert >= first) & (expert < first + count)
    x[~here_TK.any(1)] = torch.nan
    order, ends = sort_on(device, expert, first, count)
    num_here = int(ends[-1])
    order[num_here:] = 2**30  # may be anything, and is not to be read
    pair_J = order[:num_here].long()

    sorted_PM = tiles.gated_experts(*on(device, x, *gate_up[:2], order, ends), gelu, tile=tile).cpu()
    expected_PM = exact_hidden(x, gate_up[2], expert, first, gelu)
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (4 * torch.finfo(dtype).eps, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(sorted_PM[:num_here].double(), expected_PM[pair_J], rtol=rtol, atol=atol)

    sorted_PM[num_here:] = torch.nan
    hidden_PM = torch.full_like(sorted_PM, torch.nan)
    hidden_PM[pair_J] = sorted_PM[:num_here]
    expected_TE = exact_sum(hidden_PM, down[2], expert, pair_weight, first)
    before_TE = torch.randn(x.shape[0], hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)
    before_TE[~here_TK.any(1)] = -0.0  # which a sum of nothing would make 0.0
    down_PE = tiles.down_experts(*on(device, sorted_PM, *down[:2], order, ends), tile=tile)
    for add in (False, True):
        out_TE = before_TE.to(device, copy=True)
        tiles.combine(down_PE, *on(device, expert, pair_weight), first, count, out_TE, add, 0.5)
        expected = before_TE.double() + 0.5 * expected_TE if add else 0.5 * expected_TE
        torch.testing.assert_close(out_TE.cpu().double(), expected, rtol=rtol, atol=8 * atol)
        assert (out_TE.cpu()[~here_TK.any(1)].signbit() == add).all()


def test_products_are_those_of_float64_under_any_routing(routing, device) -> None:
    check(routing, device, torch.float32)


@pytest.mark.parametrize(
    ("groups", "gelu"),
    [(None, False), (None, True), (1, False), (2, True)],
    ids=["16 bits", "16 bits and GELU", "a scale per output", "scales of groups and GELU"],
)
def test_odd_sizes_and_weights_of_8_bits(groups, gelu, device) -> None:
    check(ROUTINGS["some here"], device, torch.float16, hidden_size=135, width=19, groups=groups, gelu=gelu)


@pytest.mark.parametrize(
    ("tile", "groups"),
    [(COPIED, None), (COPIED, 2), (FLAT, 2)],
    ids=["copied", "copied, scales of groups", "flat, scales of groups"],
)
def test_kinds_of_tiles(tile, groups, device) -> None:
    check(ROUTINGS["some here"], device, torch.float16, hidden_size=136, width=40, groups=groups, tile=tile)


def test_half_a_tile_takes_as_many_pairs_as_it_holds(device) -> None:
    sizes = torch.tensor([0, 64, 0, 65])
    expert = torch.repeat_interleave(torch.arange(4), sizes).to(torch.int32)[:, None]
    check((expert, 0, 4), device, torch.float16, hidden_size=32, width=16, tile=replace(COPIED, rows=128))


@pytest.mark.parametrize(("dtype", "groups"), [(torch.float16, None), (torch.float16, 2), (torch.float32, 1)])
def test_tiles_that_are_chosen(dtype, groups, device) -> None:
    check(ROUTINGS["some here"], device, dtype, hidden_size=144, width=32, groups=groups, tile=None)


def test_the_bound_on_tiles_is_that_of_the_worst_split() -> None:
    for pairs, experts, tile in itertools.product(range(1, 9), range(1, 5), (1, 2, 3, 4)):
        splits = [s for s in itertools.product(range(pairs + 1), repeat=experts) if sum(s) <= pairs]
        assert max_tiles(pairs, experts, tile) == max(sum(-(-n // tile) for n in split) for split in splits)


def test_a_grid_that_is_filled_to_its_bound(device) -> None:
    """Its last program has work, so that a bound that is less by one leaves some out."""
    rows = TILE.rows
    sizes = [1, 1, rows + 1, 1, 1, rows + 1]
    expert = torch.repeat_interleave(torch.arange(NUM_EXPERTS), torch.tensor(sizes)).to(torch.int32)[:, None]
    assert sum(-(-n // rows) for n in sizes) == max_tiles(expert.numel(), NUM_EXPERTS, rows)
    check((expert, 0, NUM_EXPERTS), device, torch.float32)


def test_a_token_by_row_does_not_depend_on_the_others(device) -> None:
    expert, first, count = random_pairs(40, 3), 0, NUM_EXPERTS
    x, (gate_up, down), pair_weight = operands(expert, count, torch.float16, 64, 32)

    def rows(tokens):
        order, ends = sort.sort_pairs(expert[tokens].to(device), first, count)
        hidden = tiles.gated_experts(*on(device, x[tokens], *gate_up[:2], order, ends), False, by_row=True)
        out = torch.empty(len(tokens), 64, dtype=x.dtype, device=device)
        tiles.sum_experts(
            *on(device, hidden, *down[:2], expert[tokens], pair_weight[tokens]),
            first,
            order,
            ends,
            out,
            False,
            1.0,
            by_row=True,
        )
        return out.cpu()

    together = rows(list(range(40)))
    assert torch.equal(rows([7]), together[[7]])
    assert torch.equal(rows([39, 3, 20]), together[[39, 3, 20]])

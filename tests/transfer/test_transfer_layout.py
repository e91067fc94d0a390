"""Blocks of two engines are told apart where they differ, and every head goes where it belongs."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stepgraph.layers.cache import LatentSpec, PagedSpec
from stepgraph.parallel.shard import Cut, Shard
from stepgraph.step.memory import CacheLayout
from stepgraph.transfer.layout import BlockLayout, pieces


def layout_of_rank(rank: int, size: int, num_heads: int = 4) -> CacheLayout:
    cut = Shard(rank, size).heads(num_heads)
    paged = PagedSpec(cut.length, 16, torch.bfloat16, heads=cut)
    return CacheLayout(
        (paged, LatentSpec(24, torch.bfloat16), replace(paged, shares=0)), (paged,), 16, 9, 3, lookahead=1
    )


def test_ranks_of_any_number_have_one_layout() -> None:
    layouts = {BlockLayout.of(layout_of_rank(rank, size)) for size in (1, 2, 4, 8) for rank in range(size)}
    assert len(layouts) == 1
    layout = layouts.pop()
    assert layout.owners == (0, 1, 3)
    assert [layout.signal_of(layer) for layer in range(3)] == [0, 1, 3]
    assert [len(tensors) for tensors in layout.layers] == [2, 1, 2]


def test_whatever_differs_shows_in_the_digest() -> None:
    base = layout_of_rank(0, 1)
    paged, latent, _ = base.model_specs
    others = [
        base,
        layout_of_rank(0, 1, num_heads=2),
        replace(base, block_size=32),
        replace(base, lookahead=0),
        replace(base, draft_specs=()),
        replace(base, model_specs=(latent, paged, base.model_specs[2])),
        replace(base, model_specs=(paged, latent, paged)),
        replace(base, model_specs=(replace(paged, dtype=torch.float8_e4m3fn), *base.model_specs[1:])),
        replace(base, model_specs=(replace(paged, head_dim=32), *base.model_specs[1:])),
    ]
    assert len({BlockLayout.of(layout).digest for layout in others}) == len(others)
    unlike = replace(base, num_lines=70, num_drafts=1)  # of which blocks know nothing
    assert BlockLayout.of(unlike).digest == BlockLayout.of(base).digest


@given(st.sampled_from((1, 2, 4, 8)), st.sampled_from((1, 2, 4, 8)), st.sampled_from((1, 2, 4, 8)))
def test_every_head_comes_once_from_who_has_it(num_sources, num_sinks, num_heads) -> None:
    sources = [Shard(rank, num_sources).heads(num_heads) for rank in range(num_sources)]
    asked = [0] * num_sources
    for rank in range(num_sinks):
        target = Shard(rank, num_sinks).heads(num_heads)
        got = [-1] * target.length
        for piece in pieces(sources, target, rank):
            asked[piece.rank] += 1
            for k in range(piece.length):
                assert got[piece.target + k] == -1
                assert piece.source + k < sources[piece.rank].length
                got[piece.target + k] = sources[piece.rank].begin + piece.source + k
        assert got == list(range(target.begin, target.begin + target.length))
    if num_sources == num_sinks <= num_heads:
        assert asked == [1] * num_sources


def test_ranks_that_all_have_everything_take_turns() -> None:
    whole = Cut.whole(1)
    assert [pieces([whole] * 2, whole, rank)[0].rank for rank in range(4)] == [0, 1, 0, 1]


def test_mutant_heads_counted_from_the_sinks_first_are_caught() -> None:
    sources, target = [Shard(rank, 2).heads(4) for rank in range(2)], Shard(1, 2).heads(4)
    [piece] = pieces(sources, target, 1)
    assert (piece.rank, piece.source, piece.target, piece.length) == (1, 0, 0, 2)
    with pytest.raises(AssertionError):
        pieces(sources[:1], target, 1)

"""Latent attention on several ranks: heads are cut, latents whole; the check of graphs passes right ones and no others."""

import re

import pytest
import torch
from random_models import RandomModel, save_model
from safetensors.torch import load_file
from test_shards import CountedFile
from tiny import TINY_SETTINGS

from stepgraph.config import EngineConfig
from stepgraph.errors import ModelError
from stepgraph.layers import latent_attention
from stepgraph.layers.cache import LatentSpec
from stepgraph.models import load_model, resolve, safetensors
from stepgraph.parallel.shard import Shard
from stepgraph.step.shape import Variant
from stepgraph.verify.graphs import verify_graphs

HEADS, N, V, P, R = 4, 8, 12, 8, 16
MODEL = RandomModel(
    "deepseek 3",
    {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "q_lora_rank": 24,
        "kv_lora_rank": R,
        "qk_nope_head_dim": N,
        "qk_rope_head_dim": P,
        "v_head_dim": V,
        "attention_bias": True,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 0,
    },
    num_mtp_modules=1,
    experts=(12, 2, 24, True, 1),
)
PROPOSING = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 3}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    save_model(MODEL, folder)
    return folder


def load(folder, shard: Shard):
    options = {"dtype": torch.float32, "device": torch.device("cpu"), "max_model_len": 64}
    return load_model(resolve(str(folder)), shard=shard, **options)


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_has_some_heads_and_all_latents(folder, size) -> None:
    whole, cut = load(folder, Shard()).layers[1].self_attn, HEADS // size
    values = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    for rank in range(size):
        model = load(folder, Shard(rank, size))
        attention = model.layers[1].self_attn
        heads = slice(rank * cut, (rank + 1) * cut)
        for name, found in attention.named_parameters():
            expected = values[name]
            if name.startswith("o_proj"):
                expected = (
                    expected.unflatten(1, (HEADS, V))[:, heads].flatten(1) if name == "o_proj.weight" else expected
                )
            elif len(expected) in (HEADS * (N + P), HEADS * (N + V)):
                expected = expected.unflatten(0, (HEADS, -1))[heads].flatten(0, 1)
            assert torch.equal(found, expected), (rank, name)
        assert set(values) - {name for name, _ in attention.named_parameters()} <= ({"o_proj.bias"} if rank else set())
        assert model.cache_specs(torch.float32) == (LatentSpec(R + P, torch.float32),) * 2
        assert model.attention_specs[0].num_heads == cut


def test_no_more_is_read_of_what_is_cut_than_is_kept(folder, monkeypatch) -> None:
    stored = {name: tensor.numel() for name, tensor in load_file(folder / "model.safetensors").items()}
    numbers, largest, open_file = {}, {}, safetensors.safe_open
    monkeypatch.setattr(
        safetensors, "safe_open", lambda *args, **kwargs: CountedFile(open_file(*args, **kwargs), numbers, largest)
    )
    load(folder, Shard(1, 4))
    cut = ("q_b_proj.weight", "kv_b_proj.weight", "o_proj.weight")
    for tensor, numel in stored.items():
        if "self_attn" in tensor and not tensor.endswith("o_proj.bias"):
            assert numbers[tensor] == (numel // 4 if tensor.endswith(cut) else numel), tensor


def bytes_of_blocks(executor) -> tuple[int, int]:
    """By the plan of the cache, and as allocated."""
    layout, num_blocks = executor.runner.layout, executor.runner.num_kv_blocks
    tensors = [tensor for cache in executor.runner.caches for tensor in cache.block_tensors]
    return layout.block_bytes * num_blocks, sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize(("settings", "size"), [({}, 4), ({"kv_cache_dtype": "fp8"}, 1)])
def test_each_rank_has_one_entry_of_a_token_for_all_heads(create_ranked, folder, settings, size) -> None:
    given = TINY_SETTINGS | {"model": str(folder), "device": "cpu", "tensor_parallel_size": 2} | settings
    engine = create_ranked(EngineConfig.from_settings(**given, **PROPOSING))
    layers = len(engine.executor.runner.layout.specs)
    expected = layers * given["num_kv_blocks"] * engine.executor.runner.block_size * (R + P) * size
    assert engine.executor.on_all(bytes_of_blocks) == [(expected, expected)] * 2
    assert layers == 3  # the draft module's, too


def test_heads_that_do_not_divide_are_refused_in_words_of_latents(folder) -> None:
    said = r"3 devices cannot share this .*: it has 4 heads, whose latents are whole on each, .* Numbers that can: 1, 2, 4\."
    with pytest.raises(ModelError, match=said):
        load(folder, Shard(0, 3))


@pytest.fixture
def mismatches(create_ranked, folder):
    """Of all graphs of an engine with so many ranks, after something was done to all of them."""

    def check(num_ranks: int, *, spoil=None, rounds: int = 4, **settings) -> list[str]:
        settings = TINY_SETTINGS | {"model": str(folder), "device": "cpu", "num_kv_blocks": 65} | settings
        engine = create_ranked(EngineConfig.from_settings(**settings, tensor_parallel_size=num_ranks))
        executor = engine.executor
        if spoil is not None:
            executor.on_all(spoil)
        levels = executor.specs.draft_levels
        reports = verify_graphs(executor, rounds=rounds, seed=0, variants=(Variant.EXTENDED,), draft_levels=levels)
        assert len(reports) == 2 * len(levels)
        return [mismatch for report in reports for mismatch in report.mismatches]

    return check


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "settings"),
    [
        (1, PROPOSING),
        (1, {"kv_cache_dtype": "fp8"}),
        (1, {"dtype": "bfloat16", "deterministic": True}),
        (2, PROPOSING | {"enable_expert_parallel": True}),
        (2, {"dtype": "bfloat16", "deterministic": True} | PROPOSING),
    ],
    ids=["mtp", "fp8 cache", "deterministic", "two ranks, mtp", "two ranks, deterministic"],
)
def test_right_graphs_pass(mismatches, num_ranks, settings) -> None:
    assert mismatches(num_ranks, **settings) == []


def read_an_entry_too_far(attend):
    def wrong(q, cache, table, row_slot, query_start, kv_len, *others, **options):
        return attend(q, cache, table, row_slot, query_start, kv_len + 1, *others, **options)

    return wrong


def read_of_another_slot(attend):
    def wrong(q, cache, table, row_slot, *others, **options):
        return attend(q, cache, table, row_slot.roll(1), *others, **options)

    return wrong


@pytest.mark.parametrize("mutant", [read_an_entry_too_far, read_of_another_slot])
def test_mutant_attention_that_reads_what_it_must_not_is_caught(mismatches, monkeypatch, mutant) -> None:
    monkeypatch.setattr(latent_attention, "mla_attention", mutant(latent_attention.mla_attention))
    found = mismatches(1, rounds=2)
    assert any(re.search("poisoned entry|differs from the same row alone", text) for text in found)


def move(kv_slots):
    """Every token's entry lies one further."""
    return kv_slots + 1


def scatter(kv_slots):
    """The last token's lies where the null block ends and the first other begins."""
    moved = kv_slots.clone()
    moved[-1] = 17
    return moved


@pytest.mark.parametrize("place", [move, scatter])
def test_mutant_an_entry_at_a_wrong_place_is_caught(mismatches, monkeypatch, place) -> None:
    right = latent_attention.latent_queries

    def wrong(q, latent, positions, kv_slots, *others, **options):
        return right(q, latent, positions, place(kv_slots), *others, **options)

    monkeypatch.setattr(latent_attention, "latent_queries", wrong)
    assert any("cache entries of no token of the step were written" in text for text in mismatches(1, rounds=2))


def test_mutant_a_rotated_part_that_is_written_twice_is_caught(mismatches, monkeypatch) -> None:
    """Of an entry that nobody's is, only the end changes."""
    right = latent_attention.latent_queries

    def wrong(q, latent, positions, kv_slots, cos_sin, norm, weight, cache, *others, **options):
        result = right(q, latent, positions, kv_slots, cos_sin, norm, weight, cache, *others, **options)
        cache[-1, -1, R:] = 1.0
        return result

    monkeypatch.setattr(latent_attention, "latent_queries", wrong)
    assert any("cache entries of no token of the step were written" in text for text in mismatches(1, rounds=2))

"""The roofline of models with latent attention: one entry for all heads, and the cheaper way to attend."""

import random

import pytest
import torch
from transformers import DeepseekV3Config

from stepgraph.bench.account import account
from stepgraph.bench.graphs import GREEDY, lay_out
from stepgraph.bench.roofline import Limits, Operand, StepCost, attention_flops, operator_cost, step_cost
from stepgraph.bench.spec_cost import round_costs
from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.executor.local import runner_of
from stepgraph.graph.eager import EagerGraph
from stepgraph.layers.inputs import AttentionSpec
from stepgraph.layers.latent_attention import LatentSizes
from stepgraph.models.loader import create_model
from stepgraph.models.source import resolve
from stepgraph.parallel.shard import Shard
from stepgraph.step.shape import StepShape

SIZES = LatentSizes(q_rank=0, kv_rank=512, key_dim=128, rotated_dim=64, value_dim=128, scale=1.0)
"""DeepSeek's."""
TINY = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32}
TINY |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24, "max_position_embeddings": 128}
TINY |= {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def on_meta(name, **parts):
    return create_model(
        resolve(name), dtype=torch.bfloat16, device=torch.device("meta"), max_model_len=64, load_format="dummy", **parts
    )


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latent")
    DeepseekV3Config(**TINY, first_k_dense_replace=1, architectures=["DeepseekV3ForCausalLM"]).save_pretrained(folder)
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 48, "capture_sizes": (4, 48), "capture_rows": (4,)}
    settings |= {"load_format": "dummy", "dtype": "float32", "device": "cpu", "max_model_len": 96, "num_kv_blocks": 33}
    settings |= {"speculative_config": {"method": "mtp", "num_speculative_tokens": 2}}
    engine = build_engine(EngineConfig.from_settings(model=str(folder), **settings))
    yield engine
    engine.shutdown()


def test_a_step_reads_every_weight_once_and_each_rows_entries_once_for_all_heads() -> None:
    """DeepSeek-V2-Lite: 27 layers, entries of 512 + 64 numbers."""
    model = on_meta("deepseek-v2-lite")
    every_expert = [mixture.experts.count for mixture in model.modules() if hasattr(mixture, "experts")]
    assert every_expert == [64] * 26
    num_bytes = step_cost(model, [(1, 1000)] * 64).bytes - step_cost(model, [(1, 900)] * 64).bytes
    assert num_bytes == 64 * 100 * 27 * 576 * 2
    longer = step_cost(model, [(3, 1000)]).flops - step_cost(model, [(3, 900)]).flops
    assert longer == 3 * 100 * 27 * 2 * 16 * (576 + 512)


def ways(query_len, kv_len, sizes, num_heads):
    """FLOPs of products that each way makes, beyond one with `kv_b_proj` for each of the step's tokens."""

    def pairs(absorbed, keys):
        key_size = sizes.kv_rank if absorbed else sizes.key_dim
        return 2 * keys * (key_size + sizes.rotated_dim + (sizes.kv_rank if absorbed else sizes.value_dim))

    def products(tokens):
        return 2 * tokens * sizes.kv_rank * (sizes.key_dim + sizes.value_dim)

    own = sum(place + 1 for place in range(query_len))
    earlier = query_len * (kv_len - query_len)
    return [
        num_heads * flops
        for flops in (
            pairs(True, own + earlier),
            pairs(False, own + earlier) + products(kv_len - query_len),
            pairs(False, own) + pairs(True, earlier) + products(query_len),  # never the cheapest
        )
    ]


def test_each_row_attends_in_its_cheapest_way() -> None:
    spec = SIZES.spec(16)
    rng, rows, chosen = random.Random(0), [(1, 1), (1, 4096), (2048, 2048), (512, 1024), (40, 16384)], []
    rows += [(query_len := rng.randint(1, 600), query_len + rng.choice((0, 50, 5000))) for _ in range(20)]
    for row in rows:
        costs = ways(*row, SIZES, 16)
        assert attention_flops(spec, [row], SIZES) == min(costs)
        chosen.append(costs.index(min(costs)))
    assert chosen[:5] == [1, 0, 1, 1, 0]
    assert set(chosen) == {0, 1}
    assert attention_flops(spec, rows, SIZES) == sum(min(ways(*row, SIZES, 16)) for row in rows)
    grouped = AttentionSpec(16, 4, 128, 128)
    assert attention_flops(grouped, [(2, 10)], None) == 2 * 16 * 256 * (9 + 10)


def test_ranks_share_heads_and_each_reads_all_entries() -> None:
    rows = [(1, 300)] * 7 + [(40, 90)]
    whole, cost = on_meta("deepseek-v3-4-layers"), step_cost(on_meta("deepseek-v3-4-layers"), rows)
    costs = []
    for rank in range(2):
        shard = Shard(rank, 2)
        costs.append(step_cost(on_meta("deepseek-v3-4-layers", shard=shard), rows, shard))
    on_both = ("norm", ".gate.", "qkv_proj")  # the last: what makes latents of queries and of keys
    same = [p for name, p in whole.named_parameters() if any(part in name for part in on_both)]
    cached = 4 * 576 * 2 * sum(kv_len + query_len for query_len, kv_len in rows)
    assert sum(c.bytes for c in costs) == pytest.approx(cost.bytes + sum(p.nbytes for p in same) + cached, abs=8)
    assert sum(c.flops for c in costs) == pytest.approx(cost.flops + 2 * 47 * sum(p.numel() for p in same), abs=8)


def operand(kind, *shape, **form):
    return Operand(kind, shape, 2, True, form.get("is_written", False))


def test_an_operator_reads_entries_once_and_multiplies_the_latent_part_twice() -> None:
    queries, cache, result = operand("other", 5, 4, 40), operand("cache", 99, 16, 40), operand("other", 5, 4, 32)
    cost = operator_cost("mla_attention", [queries, cache], [result], [(1, 30), (4, 10)], 4)
    assert cost == StepCost(2 * (5 * 4 * 72 + 40 * 40), 2 * 4 * 72 * (30 + 7 + 8 + 9 + 10))


def test_a_prompts_own_keys_and_older_entries_are_each_attended_to_once() -> None:
    rows, cache = [(3, 30), (4, 4)], operand("cache", 99, 16, 40)
    older = operator_cost("mla_context_attention", [cache], [operand("other", 7, 4, 32)], rows, 4)
    assert older == StepCost(2 * (7 * 4 * 32 + 27 * 40), 2 * 4 * 72 * 3 * 27)
    q, kv, result = operand("other", 7, 4 * 24), operand("other", 7, 4 * 40), operand("other", 7, 4 * 24)
    own = operator_cost("expanded_attention", [q, kv], [result], rows, 4)
    assert own == StepCost(2 * 7 * 4 * (24 + 40 + 24), 2 * 4 * (24 + 24) * (6 + 10))


def test_every_head_reads_its_own_part_of_the_matrix_between_latents_and_heads() -> None:
    cost = operator_cost("head_linear", [operand("other", 5, 4, 32), operand("weight", 4, 24, 32)], [], [], 4)
    assert cost == StepCost(2 * (5 * 4 * 32 + 4 * 24 * 32), 2 * 5 * 4 * 24 * 32)


def test_operators_of_a_step_read_the_matrix_once_between_them(engine) -> None:
    """Whatever experts the tokens of the layer before chose: it is stacked, too."""
    runner = runner_of(engine.executor)
    with runner.workbench():
        plan = lay_out(runner, rows := [(1, 30), (5, 20)], GREEDY)
        shape = StepShape(plan.num_tokens, len(plan.rows))
        program = EagerGraph(runner.create_program(shape))
        lines = runner.state.lines.clone()

        def prepare() -> None:
            runner.state.lines.copy_(lines)
            runner.load(plan, shape)

        prepare()
        found = account(runner, prepare, program.replay, program.replay, rows, Limits(1e9, 1e9), replays=1)

    def flops(name):
        return sum(operator.flops for operator in found.operators if operator.operator.startswith(name))

    layers, tokens, heads, rank = 2, 6, 4, 32  # of the model's own
    assert flops("latent_queries") == 2 * heads * 16 * rank * layers * tokens
    assert flops("head_linear") == 2 * heads * 24 * rank * layers * tokens


def test_a_round_of_a_draft_module_with_experts_reads_those_that_are_chosen(engine) -> None:
    runner = engine.executor.runner
    plain, verify, first, second = (
        cost.bytes for costs in [round_costs(runner, 2, 20, 2)] for cost in (costs.plain, costs.verify, *costs.drafts)
    )
    expert, entry = 4 * 3 * 32 * 64, 4 * 40
    touched = {tokens: 8 * (1 - (1 - 2 / 8) ** tokens) for tokens in (2, 6)}
    more_experts = expert * (touched[6] - touched[2])
    assert first - second == pytest.approx(more_experts + 2 * entry * (22 + 3 - 21 - 1), abs=2)
    assert verify - plain == pytest.approx(more_experts + 2 * 2 * entry * (2 + 2), abs=2)

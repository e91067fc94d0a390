"""Benchmarks of models with experts: the roofline is that of the weights which the tokens chose, and no others."""

import json
from importlib.resources import files
from itertools import combinations, product
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from tiny_mixture import MIXTURE_LAYERS, NUM_EXPERTS, TOP, save_tiny_mixture

from stepgraph import bench
from stepgraph.bench.account import account
from stepgraph.bench.graphs import GREEDY, lay_out
from stepgraph.bench.latency import Case, _costs
from stepgraph.bench.offline import Job
from stepgraph.bench.roofline import ExpertLoad, Limits, Operand, StepCost, operator_cost, step_cost
from stepgraph.bench.routing import Census, _skew, take_census
from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.errors import ConfigError
from stepgraph.executor.local import runner_of
from stepgraph.graph.eager import EagerGraph
from stepgraph.layers.experts import ExpertShard
from stepgraph.layers.inputs import DispatchTable
from stepgraph.models.loader import create_model
from stepgraph.models.sharing import shard_experts
from stepgraph.models.source import resolve
from stepgraph.parallel.shard import Shard
from stepgraph.step.dispatch import mixtures_of
from stepgraph.step.shape import StepShape

FLAGS = [
    *("--dtype=float32", "--device=cpu", "--load-format=dummy", "--max-num-seqs=8", "--max-num-batched-tokens=48"),
    *("--capture-sizes", "8", "48", "--capture-rows", "8"),
]
ROWS = [(1, 30)] * 5 + [(7, 20)]
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_mixture(tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="module")
def engine(folder):
    settings = {"capture_sizes": (8, 48), "capture_rows": (8,), "enable_prefix_caching": False, "device": "cpu"}
    config = EngineConfig.from_settings(
        model=folder, dtype="float32", max_num_seqs=8, max_num_batched_tokens=48, **settings
    )
    engine = build_engine(config)
    yield engine
    engine.shutdown()


def on_meta(name: str, **parts):
    return create_model(
        resolve(name), dtype=torch.bfloat16, device=torch.device("meta"), max_model_len=64, load_format="dummy", **parts
    )


@pytest.mark.parametrize(("num_experts", "top", "num_tokens"), [(4, 1, 3), (4, 2, 2), (5, 3, 2)])
def test_the_expectation_is_the_mean_over_all_choices(num_experts, top, num_tokens):
    choices = list(combinations(range(num_experts), top))
    touched = fmean(len(set().union(*chosen)) for chosen in product(choices, repeat=num_tokens))
    load = ExpertLoad.expected(num_tokens, num_experts, top, num_experts)
    assert load == ExpertLoad(pytest.approx(touched), num_tokens * top)
    half = ExpertLoad.expected(num_tokens, num_experts, top, num_experts // 2)
    assert half.touched == pytest.approx(touched * (num_experts // 2) / num_experts)


def test_a_step_reads_the_experts_that_were_chosen_and_multiplies_each_pair():
    """Qwen3-30B-A3B: 3 matrices of 768 x 2048 an expert, 128 experts, 48 layers."""
    model = on_meta("qwen3-30b-a3b")
    expert = 3 * 768 * 2048
    none = step_cost(model, [(1, 30)], loads=[ExpertLoad(0, 0)] * 48)
    one = step_cost(model, [(1, 30)], loads=[ExpertLoad(8, 8)] * 48)
    assert one.bytes - none.bytes == 48 * 8 * expert * 2
    assert one.flops - none.flops == 48 * 8 * expert * 2
    assert step_cost(model, [(1, 30)]) == one, "one token chooses 8 experts, whichever they are"
    everything = sum(p.nbytes for p in model.parameters())
    lookups = 151936 * 2048 * 2  # the embedding table, of which a row is read
    cached = 48 * 2 * 4 * 128 * 2 * 31
    assert step_cost(model, [(1, 30)], loads=[ExpertLoad(128, 128)] * 48).bytes == everything - lookups + cached


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_what_ranks_must_do_with_experts_adds_up_to_what_one_would(folder, expert_parallel):
    """All but norms and routers, of which no rank is spared."""
    whole, cost = on_meta(folder), step_cost(on_meta(folder), ROWS)
    costs = []
    for rank in range(2):
        shard = Shard(rank, 2)
        part = on_meta(folder, shard=shard, expert_parallel=expert_parallel)
        assert isinstance(shard_experts(part.config, shard, expert_parallel=expert_parallel), ExpertShard)
        costs.append(step_cost(part, ROWS, shard))
    on_both = [p for name, p in whole.named_parameters() if "norm" in name or ".gate.weight" in name]
    assert sum(c.bytes for c in costs) == pytest.approx(cost.bytes + sum(p.nbytes for p in on_both), abs=4)
    twice = 2 * NUM_TOKENS * sum(p.numel() for p in on_both)
    assert sum(c.flops for c in costs) == pytest.approx(cost.flops + twice, abs=4)


def test_an_operator_reads_the_matrices_of_the_experts_that_were_chosen():
    x = Operand("other", (4, 64), 2, True, False)
    stacked = Operand("weight", (8, 96, 64), 2, True, False)
    cost = operator_cost("gated_experts", [x, stacked], [], [], 4, ExpertLoad(5, 12))
    assert cost == StepCost(2 * (4 * 64 + 5 * 96 * 64), 2 * 12 * 96 * 64)


@pytest.mark.parametrize(
    ("most_pairs_tokens", "operators"), [(0, ("gated_experts", "sum_experts")), (48, ("mixture",))]
)
def test_operators_of_a_step_are_given_what_its_tokens_chose(engine, monkeypatch, most_pairs_tokens, operators):
    """The sum over a step's calls is what its own routing touches, whether by several operators or by one."""
    runner = runner_of(engine.executor)
    monkeypatch.setattr(runner, "dispatch", DispatchTable(most_pairs_tokens))
    limits, rows = Limits(1e9, 1e9), [(1, 30)]
    with runner.workbench():
        plan = lay_out(runner, rows, GREEDY)
        shape = StepShape(plan.num_tokens, len(plan.rows))
        program = EagerGraph(runner.create_program(shape))
        lines = runner.state.lines.clone()

        def prepare() -> None:
            runner.state.lines.copy_(lines)
            runner.load(plan, shape)

        prepare()
        for total in runner.expert_counts.totals:
            total.zero_()
        program.replay()
        loads = [ExpertLoad.of(total.tolist()) for total in runner.expert_counts.totals]
        step = account(runner, prepare, program.replay, program.replay, rows, limits, replays=1)
    assert loads == [ExpertLoad(TOP, TOP)] * MIXTURE_LAYERS
    found = [o for o in step.operators if o.operator.startswith(operators)]
    assert len(found) == len(operators)
    matrices = 3 * 16 * 32 * sum(load.touched for load in loads)
    least = 4 * matrices + 4 * MIXTURE_LAYERS * 2 * 32  # weights, and the token as it comes and goes
    assert least <= sum(o.bytes for o in found) < 1.5 * least
    products = 2 * 3 * 16 * 32 * sum(load.pairs for load in loads)
    assert products <= sum(o.flops for o in found) < 1.5 * products


def test_a_census_finds_the_step_that_is_timed(engine):
    jobs = [Job([5 + i, 7 * i + 1, 9], 6) for i in range(4)]
    decode = take_census(engine, jobs, 4, whole_round=False)
    assert [[load.pairs for load in part] for part in decode.loads] == [[4 * TOP] * MIXTURE_LAYERS]
    assert decode.touched == fmean(load.touched for load in decode.loads[0])
    assert decode.expected == pytest.approx(NUM_EXPERTS * (1 - (1 - TOP / NUM_EXPERTS) ** 4))
    assert decode.imbalance > decode.rank_imbalance == 1
    prompt = take_census(engine, [Job(range(20, 60), 1)], 40, whole_round=True)
    assert [[load.pairs for load in part] for part in prompt.loads] == [[40 * TOP] * MIXTURE_LAYERS]


def test_latency_of_skewed_routing_is_told_with_what_was_chosen(folder, tmp_path, capsys):
    file = tmp_path / "latency.json"
    flags = [*FLAGS, "--cases=after 10", "--repeats=1", f"--json={file}", "--routing", "skewed", "uniform"]
    assert bench.main(["latency", folder, *flags]) == 0
    result = json.loads(file.read_text())
    uniform, skewed = result["cases"]
    assert (uniform["routing"], skewed["routing"]) == ("uniform", "skewed")
    assert TOP <= skewed["experts"]["touched"] <= NUM_EXPERTS
    assert capsys.readouterr().out.count("busiest / mean") == 2


def test_skewed_routers_have_rows_of_unequal_norms_in_an_order_of_each_layer(engine):
    gates = [mixture.gate.weight for mixture in mixtures_of(runner_of(engine.executor).model)]
    before = [gate.clone() for gate in gates]
    assert engine.executor.on_all(_skew) == [MIXTURE_LAYERS]
    ratios = [(gate.norm(dim=1) / old.norm(dim=1)).tolist() for gate, old in zip(gates, before, strict=True)]
    wanted = [(1 + place) ** -0.5 for place in range(NUM_EXPERTS)]
    assert [sorted(ratio, reverse=True) for ratio in ratios] == [pytest.approx(wanted)] * MIXTURE_LAYERS
    assert ratios[0] != ratios[1]
    for gate, old in zip(gates, before, strict=True):
        gate.copy_(old)


def test_only_dummy_routers_are_skewed(folder, tiny_model):
    with pytest.raises(ConfigError, match="routing='skewed' changes random weights"):
        bench.main(["latency", folder, "--device=cpu", "--routing=skewed"])
    with pytest.raises(ConfigError, match=r"routing='skewed' has no effect: .* has no experts"):
        bench.main(["throughput", tiny_model, *FLAGS, "--num-prompts=1", "--random-input-len=8", "--routing=skewed"])


def test_dummy_weights_let_tokens_choose_experts_about_equally_often(tmp_path):
    """Though all are of one context, and behind many layers."""
    shape = json.loads((files("stepgraph.models") / "shapes" / "qwen3-30b-a3b.json").read_text())
    shape |= {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 12, "num_attention_heads": 2, "head_dim": 32}
    shape |= {"num_key_value_heads": 1, "moe_intermediate_size": 16, "num_experts": 32, "num_experts_per_tok": 2}
    shape |= {"eos_token_id": 0, "bos_token_id": None}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    config = EngineConfig.from_settings(
        model=str(tmp_path), dtype="float32", device="cpu", load_format="dummy", max_num_seqs=1, max_model_len=256
    )
    engine = build_engine(config)
    census = take_census(engine, [Job(range(2, 202), 1)], 200, whole_round=True)
    engine.shutdown()
    assert census.touched > 0.95 * census.expected, census


def test_of_ranks_with_requests_of_their_own_the_roofline_is_that_of_the_busiest(engine):
    """Each reads all weights but experts, its own rows' keys, and its experts for the tokens of all."""
    case, half = Case("decode 8", 8, 32), (ExpertLoad(3, 10), ExpertLoad(4, 14))
    census = Census((half, (ExpertLoad(4, 14), ExpertLoad(2, 10))), 6.5, 7.0, 1.0, 1.0)
    config = EngineConfig.from_settings(data_parallel_size=2, enable_expert_parallel=True)
    ranks = SimpleNamespace(executor=engine.executor, config=config)
    model = runner_of(engine.executor).model
    assert _costs(ranks, case, census) == [step_cost(model, case.rows[:4], loads=loads) for loads in census.loads]
    together = SimpleNamespace(executor=engine.executor, config=EngineConfig.from_settings(tensor_parallel_size=2))
    assert _costs(together, case, census)[0] == step_cost(model, case.rows, Shard(0, 2), half)

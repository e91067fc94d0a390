"""Engines whose layers have weights of 8 or 4 bits: graphs, batches, adapters, drafts, sleep and new weights as with any."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import drain

from stepgraph import SamplingParams
from stepgraph.bench.roofline import step_cost
from stepgraph.verify.graphs import verify_graphs

PROMPTS = [[(5 * i + 3 * j) % 257 for j in range(length)] for i, length in enumerate((9, 30, 2, 60, 17, 5))]
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module", params=["fp8", "int4"])
def create_rounded(create_engine, request):
    return lambda **settings: create_engine(**({"quantization": request.param} | settings))


@pytest.fixture(scope="module")
def expected(create_rounded):
    return answers(create_rounded(graph_backend="eager"))


def answers(engine, adapter=None):
    requests = [engine.add_request(str(i), prompt, GREEDY, adapter=adapter) for i, prompt in enumerate(PROMPTS)]
    drain(engine)
    return [list(request.output_token_ids) for request in requests]


def test_graphs_give_the_tokens_of_eager_launches(create_rounded, create_engine, expected) -> None:
    engine = create_rounded()
    assert answers(engine) == expected
    assert engine.executor.statistics.num_eager_steps == 0
    assert not any(report.mismatches for report in verify_graphs(engine.executor, rounds=10, seed=0))
    assert answers(create_engine()) != expected, "rounding changes nothing"


def test_weights_take_a_quarter_of_the_memory_of_32_bits(create_rounded, create_engine) -> None:
    small, large = (
        sum(parameter.nbytes for parameter in create().executor.runner.model.layers.parameters())
        for create in (create_rounded, create_engine)
    )
    assert small < 0.4 * large  # norms and scales are a good part of layers so small


def test_the_least_bytes_of_a_step_are_those_of_the_codes(create_rounded, create_engine) -> None:
    small, large = create_rounded().executor.runner.model, create_engine().executor.runner.model
    saved = sum(p.nbytes for p in large.parameters()) - sum(p.nbytes for p in small.parameters())
    assert saved > 0
    assert step_cost(small, [(1, 40)]).bytes == step_cost(large, [(1, 40)]).bytes - saved


def test_deterministic_mode_gives_rows_the_bits_that_they_get_alone(create_rounded) -> None:
    engine = create_rounded(deterministic=True, capture_sizes=(5, 48), capture_rows=(5, 8))
    for report in verify_graphs(engine.executor, rounds=3, seed=3, alone_rows=4):
        assert report.mismatches == []
        assert report.worst_graph_difference == 0
        assert report.worst_alone_difference == 0


def test_drafts_change_no_token(create_rounded, expected) -> None:
    assert answers(create_rounded(speculative_method="mtp", num_speculative_tokens=2)) == expected


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_and_new_weights_bring_the_same_answers(level, create_rounded, tiny_model, expected) -> None:
    engine = create_rounded(enable_sleep_mode=True)
    engine.sleep(level)
    engine.wake_up()
    if level == 2:
        engine.update_weights(tiny_model)
    assert answers(engine) == expected
    engine.update_weights((name, 2 * values) for name, values in load_file(f"{tiny_model}/model.safetensors").items())
    assert answers(engine) != expected


def test_adapters_are_added_to_the_product(create_rounded, expected, tmp_path) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_"
    for folder, size in (("without effect", 0.0), ("with effect", 5.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "adapter_config.json").write_text(json.dumps(config))
        matrices = {f"{name}A.weight": torch.ones(2, 64), f"{name}B.weight": torch.full((32, 2), size)}
        save_file(matrices, tmp_path / folder / "adapter_model.safetensors")
    engine = create_rounded(enable_lora=True)
    assert answers(engine, str(tmp_path / "without effect")) == expected
    assert answers(engine, str(tmp_path / "with effect")) != expected

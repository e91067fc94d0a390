"""Block groups of several ranks: Gemma 4's layers differ in what a token takes by the heads that a rank has of each."""

import pytest
from answers import assert_as_transformers, continued, generate, prompts_of
from checkpoints import HF_CONFIGS, WINDOW, random_hf_model
from tiny import TINY_SETTINGS

from stepgraph.abi.block_groups import BlockGroups
from stepgraph.config import EngineConfig

SETTINGS = TINY_SETTINGS | {"device": "cpu", "max_num_seqs": 4, "capture_sizes": (8, 48), "num_kv_blocks": 33}


@pytest.mark.parametrize(
    ("name", "way", "groups"),
    [
        # Eight heads with a window and one twice as wide: four and one of each rank.
        ("gemma 4 12b", {"tensor_parallel_size": 2}, BlockGroups(1, 2, WINDOW)),
        ("gemma 4 26b", {"tensor_parallel_size": 2}, BlockGroups(1, 1, WINDOW)),
        ("gemma 4 26b", {"data_parallel_size": 2, "enable_expert_parallel": True}, BlockGroups(1, 2, WINDOW)),
    ],
)
def test_two_ranks_answer_as_transformers(name, way, groups, tmp_path, create_ranked) -> None:
    """From the first token, from cached prefixes, and started anew."""
    hf_model = random_hf_model(HF_CONFIGS[name]())
    hf_model.save_pretrained(tmp_path)
    prompts = prompts_of((1, 33, 90, 150))
    expected = [continued(hf_model, prompt) for prompt in prompts]
    engine = create_ranked(EngineConfig.from_settings(model=str(tmp_path), **SETTINGS, **way))
    assert engine.executor.specs.groups == groups
    assert_as_transformers(generate(engine, prompts, together=True), expected)
    again = generate(engine, prompts, together=True, preemption=0.1)
    assert_as_transformers(again, expected)
    assert any(request.num_cached_tokens for request in again)

"""gpt-oss in an engine: the answers of a request that is preempted, shares steps with others or is cut into chunks."""

import pytest
from checkpoints import HF_CONFIGS, random_hf_model
from tiny import drain

from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.sampling_params import SamplingParams

SETTINGS = {
    "device": "cpu",
    "max_model_len": 96,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 48,
    "capture_sizes": (4, 48),
    "num_kv_blocks": 65,
    "block_size": 8,
}
LENGTHS = (3, 40, 17, 29)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("gpt_oss")
    random_hf_model(HF_CONFIGS["gpt oss"]()).save_pretrained(path)
    return str(path)


def answers(folder, batches, **settings):
    """Tokens and log-probabilities by prompt, of prompts that share steps with those of their batch; and the engine."""
    engine = build_engine(EngineConfig.from_settings(model=folder, **SETTINGS | settings))
    found = {}
    for batch in batches:
        for index in batch:
            prompt = [(7 * i * (index + 1)) % 90 + 3 for i in range(LENGTHS[index])]
            temperature = 0.7 * (index % 2)
            params = SamplingParams(temperature=temperature, seed=index, max_tokens=30, ignore_eos=True, logprobs=1)
            found[index] = engine.add_request(str(index), prompt, params)
        drain(engine)
    engine.shutdown()
    return [
        (r.output_token_ids, [entry.logprob for entry in r.output_logprobs]) for _, r in sorted(found.items())
    ], engine


ALONE, TOGETHER = [[0], [1], [2], [3]], [[0, 1, 2, 3]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_answers_have_the_bits_that_they_have_alone(dtype, folder) -> None:
    """bfloat16 is attended by torch, float32 by our own kernel."""
    expected, _ = answers(folder, ALONE, dtype=dtype, deterministic=True)
    chunks = {"max_num_batched_tokens": 5, "capture_sizes": (5,), "capture_rows": (4,)}
    for settings in ({}, chunks):
        assert answers(folder, TOGETHER, dtype=dtype, deterministic=True, **settings)[0] == expected


def test_preempted_requests_get_the_answers_that_they_get_with_memory_for_all(folder) -> None:
    expected, _ = answers(folder, TOGETHER, dtype="float32", deterministic=True)
    found, engine = answers(folder, TOGETHER, dtype="float32", deterministic=True, num_kv_blocks=19)
    assert engine.scheduler.statistics.preemptions > 0
    assert found == expected

"""Layers that carry states on several ranks: the answers of one device, with proposals, adapters and requests that start anew."""

import random
import re

import pytest
import torch
from checkpoints import HF_CONFIGS, random_hf_model
from lora_folders import RANK, save_adapter
from safetensors.torch import load_file
from scripted import watch_drafts
from tiny import TINY_SETTINGS

from stepgraph.config import EngineConfig
from stepgraph.engine import state_lines
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.verify.graphs import verify_graphs

SETTINGS = TINY_SETTINGS | {"device": "cpu", "max_num_seqs": 4, "capture_sizes": (8, 48), "num_kv_blocks": 129}
PROPOSING = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "adaptive": False}}
NUM_TOKENS = 12
MODELS = {
    "qwen3 next": {"enable_expert_parallel": True},
    "olmo hybrid": {},
    "lfm2 with biases": {},
    "falcon h1": {},
    "nemotron h": {"enable_expert_parallel": True},
}
"""By name, how two ranks share it. `test_state_shards` has more of them, by parts."""
ADAPTED = re.compile(r".*\.([abg]_proj|in_proj\w*|o(ut)?_proj|q_proj)\.weight")


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request, tmp_path_factory):
    """A folder, an adapter of it, and how ranks share it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    random_hf_model(HF_CONFIGS[request.param]()).save_pretrained(folder)
    generator, pairs = torch.Generator().manual_seed(0), {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if ADAPTED.fullmatch(name):
            outputs, inputs = tensor.shape
            a = torch.randn(RANK, inputs, generator=generator) / inputs**0.5
            pairs[name.removesuffix(".weight")] = a, torch.randn(outputs, RANK, generator=generator) / 4
    (folder / "adapter").mkdir()
    return str(folder), save_adapter(folder / "adapter", pairs), MODELS[request.param]


def answers(engine, adapter, *, preemption: float):
    """To prompts of 1 to 140 tokens, of which half have an adapter. Of few tokens, so that there is something to propose."""
    rng, requests = random.Random(0), []
    for number, length in enumerate((1, 17, 65, 140, 33, 90)):
        allowed = rng.sample(range(3, 96), 2)
        params = SamplingParams(
            temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0, allowed_token_ids=allowed
        )
        prompt = [rng.choice(allowed) for _ in range(length)]
        requests.append(engine.add_request(f"{number}", prompt, params, adapter=adapter if number % 2 else None))
    while engine.has_work:
        if rng.random() < preemption:
            engine.reset_prefix_cache(preempt=True)
        engine.step()
    return requests


def test_two_ranks_answer_as_one(checkpoint, create_ranked, monkeypatch) -> None:
    """At first from the first token, then from states that were kept, and from the first token again."""
    monkeypatch.setattr(state_lines, "PROMPT_TOKENS", 32)
    folder, adapter, way = checkpoint
    settings = SETTINGS | {"model": folder, "enable_lora": True, "max_lora_rank": RANK}
    one = create_ranked(EngineConfig.from_settings(**settings))
    expected = answers(one, adapter, preemption=0.0)
    two = create_ranked(EngineConfig.from_settings(**settings, **PROPOSING, **way, tensor_parallel_size=2))
    drafts = watch_drafts(two)
    first, again = answers(two, adapter, preemption=0.0), answers(two, adapter, preemption=0.1)
    assert any(request.num_cached_tokens for request in again)
    for request, right in zip(first + again, 2 * expected, strict=True):
        assert request.output_token_ids == right.output_token_ids
        logprobs, exact = ([entry.logprob for entry in r.output_logprobs] for r in (request, right))
        assert logprobs == pytest.approx(exact, abs=2e-4)
    assert {stood < num for num, stood in drafts} == {True, False}


def bytes_of_states(executor) -> int:
    return sum(tensor.nbytes for cache in executor.runner.caches for tensor in cache.line_tensors)


def test_graphs_of_two_ranks_are_verified_and_each_has_half_of_a_state(checkpoint, create_ranked) -> None:
    folder, _, way = checkpoint
    settings = SETTINGS | {"model": folder, "load_format": "dummy"}
    one = create_ranked(EngineConfig.from_settings(**settings))
    two = create_ranked(EngineConfig.from_settings(**settings, **way, tensor_parallel_size=2))
    assert two.executor.on_all(bytes_of_states) == [bytes_of_states(one.executor) / 2] * 2
    reports = verify_graphs(two.executor, rounds=2, seed=0)
    assert [report.mismatches for report in reports] == [[]] * len(reports)


def test_ranks_with_requests_of_their_own_keep_states_of_their_own(tmp_path, create_ranked, monkeypatch) -> None:
    monkeypatch.setattr(state_lines, "PROMPT_TOKENS", 32)
    random_hf_model(HF_CONFIGS["qwen3 next"]()).save_pretrained(tmp_path)
    settings = SETTINGS | {"model": str(tmp_path), "max_num_seqs": 3}
    expected = answers(create_ranked(EngineConfig.from_settings(**settings)), None, preemption=0.0)
    two = create_ranked(EngineConfig.from_settings(**settings, data_parallel_size=2, enable_expert_parallel=True))
    found = [answers(two, None, preemption=0.0) for _ in range(3)]
    for requests in found:
        assert [r.output_token_ids for r in requests] == [r.output_token_ids for r in expected]
    assert sum(request.num_cached_tokens > 0 for request in found[2]) >= 2

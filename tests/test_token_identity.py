"""Greedy SmolLM2 in float32 says token for token what transformers says.

What transformers says is in data/smollm2_greedy.json, made by scripts/make_reference_tokens.py.
"""

import json
from pathlib import Path

import pytest
import torch
from tiny import drain
from transformers import LlamaConfig, LlamaForCausalLM

from stepgraph import native
from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.executor.build import build_local_executor
from stepgraph.layers.formats import Packed
from stepgraph.models.loader import load_model
from stepgraph.ops.packed import EXACT_TOKENS

REFERENCE = json.loads((Path(__file__).parent / "data/smollm2_greedy.json").read_text())["answers"]
BY_LENGTH = sorted(REFERENCE, key=lambda answer: len(answer["prompt"]))
BATCHED = BY_LENGTH[:37] + BY_LENGTH[-1:-9:-3]
"""Forty of them, of all lengths."""
NUM_TOKENS, FEWER_TOKENS = 32, 16
"""Of those answers that are compared. `scripts/check_speculation.py` compares all prompts' whole answers."""
SETTINGS = {
    "dtype": "float32",
    "max_model_len": 1088,
    "num_kv_blocks": 800,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 256,
    "capture_sizes": (8, 64, 256),
    "capture_rows": (8,),
}


@pytest.fixture(scope="module")
def decoder(smollm2, device):
    return load_model(
        smollm2, dtype=torch.float32, device=torch.device(device), max_model_len=SETTINGS["max_model_len"]
    )


@pytest.fixture(scope="module")
def create_engine(smollm2, decoder, device):
    """Makes engines that share one copy of the weights."""

    def create(**settings) -> Engine:
        config = EngineConfig.from_settings(device=device, **(SETTINGS | settings))
        return build_engine(config, source=smollm2, executor=build_local_executor(config, smollm2, model=decoder))

    return create


@pytest.fixture(scope="module")
def engine(create_engine):
    return create_engine()


def assert_identical(engine: Engine, answers, num_tokens: int = NUM_TOKENS) -> None:
    """Run the prompts of `answers` together and hold what they get against the reference."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    requests = [engine.add_request(f"{i}", answer["prompt"], params) for i, answer in enumerate(answers)]
    drain(engine)
    for request, answer in zip(requests, answers, strict=True):
        assert request.output_token_ids == answer["tokens"][:num_tokens], (
            answer["kind"],
            len(answer["prompt"]),
            answer["margin"],
        )


def test_the_reference_has_chat_code_and_prose_from_3_to_1000_tokens() -> None:
    assert len(BATCHED) == 40
    assert {answer["kind"] for answer in BATCHED} == {"chat", "code", "prose"}
    assert {3, 1000} < {len(answer["prompt"]) for answer in BATCHED}
    assert {len(answer["tokens"]) for answer in REFERENCE} == {64}


def test_all_prompts_batched_in_graphs_match_transformers(engine) -> None:
    assert_identical(engine, BATCHED)
    statistics = engine.executor.statistics
    assert statistics.num_steps > 0
    assert statistics.num_eager_steps == 0


@pytest.mark.parametrize("index", [0, len(BY_LENGTH) // 2, -6], ids=["short", "median", "long"])
def test_a_prompt_alone_in_graphs_matches_transformers(engine, index) -> None:
    assert_identical(engine, [BY_LENGTH[index]], FEWER_TOKENS)


def test_prompts_run_eagerly_match_transformers(create_engine) -> None:
    engine = create_engine(graph_backend="eager", max_num_seqs=8, capture_sizes=None, capture_rows=None)
    assert_identical(engine, BY_LENGTH[2:-1:12], FEWER_TOKENS)
    assert engine.executor.statistics.num_eager_steps == engine.executor.statistics.num_steps


def test_prompts_in_chunks_of_at_most_64_tokens_match_transformers(create_engine) -> None:
    engine = create_engine(max_num_seqs=8, max_num_batched_tokens=64, capture_sizes=(16, 64))
    assert_identical(engine, BY_LENGTH[4::18] + BY_LENGTH[-1:], FEWER_TOKENS)
    assert engine.executor.statistics.num_eager_steps == 0


@pytest.fixture(scope="module")
def packed_engine(smollm2) -> Engine:
    """As a user gets it who asks for float32 on a CPU."""
    return build_engine(EngineConfig.from_settings(device="cpu", **SETTINGS), source=smollm2)


@pytest.mark.skipif(not native.available(), reason=f"no kernels: {native.missing()}")
def test_weights_in_the_files_own_blocks_give_the_same_tokens(packed_engine) -> None:
    assert isinstance(packed_engine.executor.runner.model.embed_tokens.format, Packed)
    assert_identical(packed_engine, BY_LENGTH[2:-1:10], FEWER_TOKENS)


@pytest.mark.skipif(not native.available(), reason=f"no kernels: {native.missing()}")
def test_determinism_on_the_files_own_blocks_gives_the_same_tokens(smollm2) -> None:
    settings = SETTINGS | {"dtype": "auto", "deterministic": True}
    engine = build_engine(EngineConfig.from_settings(device="cpu", **settings), source=smollm2)
    assert_identical(engine, BY_LENGTH[2:-1:10], FEWER_TOKENS)


@pytest.fixture(scope="module")
def reference(decoder) -> LlamaForCausalLM:
    """transformers' model as installed, on the weights as they were loaded."""
    c = decoder.config
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.rms_norm_eps,
        rope_theta=1e5,
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device("meta"):
        reference = LlamaForCausalLM(config).eval()
    state = {name: tensor.cpu() for name, tensor in decoder.checkpoint_tensors().items()}
    reference.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]}, strict=True, assign=True)
    reference.model.rotary_emb = type(reference.model.rotary_emb)(config)
    return reference


def test_transformers_as_installed_begins_with_the_same_tokens(reference) -> None:
    """The stored reference, which the engine is held against, is of one version; this is the one at hand."""
    for answer in (BY_LENGTH[10], BY_LENGTH[-10]):
        prompt = torch.tensor([answer["prompt"]])
        output = reference.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=8)
        assert output[0, prompt.shape[1] :].tolist() == answer["tokens"][:8]


@torch.no_grad()
def test_log_likelihoods_of_prompts_are_those_of_transformers(packed_engine, reference) -> None:
    """`scripts/check_loglikelihoods.py` asks a server for those of more texts, as evaluation harnesses do."""
    prompts = [BY_LENGTH[index]["prompt"] for index in (2, len(BY_LENGTH) // 2, -11)]
    assert [len(prompt) > EXACT_TOKENS for prompt in prompts] == [False, True, True]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    requests = [packed_engine.add_request(str(i), prompt, params) for i, prompt in enumerate(prompts)]
    drain(packed_engine)
    for request, prompt in zip(requests, prompts, strict=True):
        ids = torch.tensor([prompt])
        logprobs = reference(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        found = [position.logprob for position in request.prompt_logprobs if position is not None]
        assert len(found) == len(prompt) - 1
        assert sum(found) == pytest.approx(logprobs.sum().item(), abs=1e-3)


@pytest.mark.parametrize(
    ("method", "num_drafts", "tight"),
    [
        ("mtp", 3, False),
        ("suffix", 5, True),
        ("ngram", 2, False),
        ("hybrid", 4, True),
    ],
)
def test_speculation_changes_no_token(create_engine, method, num_drafts, tight) -> None:
    """`scripts/check_speculation.py` checks every combination, on all prompts, with more around them."""
    settings = {"max_num_batched_tokens": 64, "capture_sizes": (64,), "num_kv_blocks": 14} if tight else {}
    engine = create_engine(
        speculative_config={"method": method, "num_speculative_tokens": num_drafts, "adaptive": False}, **settings
    )
    assert_identical(engine, BY_LENGTH[:6])
    statistics = engine.executor.statistics
    assert statistics.num_eager_steps == 0
    assert engine.speculation.num_accepted_tokens > 0
    assert (engine.scheduler.statistics.preemptions > 0) == tight

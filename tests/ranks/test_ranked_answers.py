"""Forty prompts on 2, 3 and 4 ranks: token for token what one rank says, with proposals and without."""

import random

import pytest
from random_engines import Arrival, Case, Outcome, count_ties, serve_ranked, serve_reference
from random_models import NUM_HEADS, RandomModel, save_model
from tiny import MAX_MODEL_LEN, VOCAB_SIZE

from stepgraph.engine.build import build_engine
from stepgraph.engine.sampling_params import SamplingParams

MODEL = RandomModel(
    "llama",
    {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_HEADS,
        "head_dim": 8,
        "max_position_embeddings": MAX_MODEL_LEN,
        "bos_token_id": 1,
        "eos_token_id": 0,
    },
    num_mtp_modules=1,
)
SETTINGS = {
    "device": "cpu",
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 40,
    "max_num_batched_tokens": 256,
    "capture_sizes": (40, 256),
    "capture_rows": (40,),
    "num_kv_blocks": 700,
}
NUM_TOKENS = 64
PROPOSING = {"speculative_method": "hybrid", "num_speculative_tokens": 3, "speculative_adaptive": False}


def forty_requests() -> tuple[Arrival, ...]:
    """Prompts of 3 to 120 tokens. A half repeat themselves, and get answers that do, so that there is something to propose."""
    rng = random.Random(0)
    arrivals = []
    for number in range(40):
        phrase = [rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randint(3, 20))]
        foreseen = {"allowed_token_ids": rng.sample(range(1, VOCAB_SIZE), 2)} if number % 2 else {}
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, **foreseen)
        prompt = tuple(phrase * rng.randint(1, 6) if number % 2 else phrase)
        arrivals.append(Arrival(0, prompt, params, priority=0, adapter=None, abort_step=None))
    return tuple(arrivals)


def case_of(num_ranks: int, **settings) -> Case:
    return Case(0, num_ranks, MODEL, SETTINGS | settings, forty_requests(), event=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(MODEL, folder)
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    """What one rank says that proposes nothing."""
    return serve_reference(case_of(1), folder, build_engine)


@pytest.mark.parametrize(("method", "num_ranks"), [("hybrid", 2), ("none", 3), ("hybrid", 4)])
def test_forty_answers_are_those_of_one_rank_that_proposes_nothing(
    create_ranked, folder, expected, num_ranks, method
) -> None:
    case = case_of(num_ranks, **PROPOSING if method == "hybrid" else {})
    outcome = Outcome(0, num_ranks, case.features)
    found = serve_ranked(case, folder, create_ranked, outcome)
    assert {len(request.output_token_ids) for request in found} == {NUM_TOKENS}
    assert outcome.eager_steps == 0
    assert count_ties(case, folder, create_ranked, found, expected) <= 2
    assert (outcome.accepted > 300) == (method != "none"), outcome

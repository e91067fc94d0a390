"""The memory of answers, which suffix drafting searches: nobody finds in it what another tenant was answered."""

import pytest
from tiny import VOCAB_SIZE, drain

from stepgraph.engine.sampling_params import SamplingParams

PROMPT = [(11 * i * i + 5) % VOCAB_SIZE for i in range(30)]
ANSWERED = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROBED = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def create_suffix_engine(create_engine):
    def create(memory_tokens: int = 4096, **settings):
        config = {"method": "suffix", "adaptive": False, "memory_tokens": memory_tokens}
        return create_engine(speculative_config=config, **settings)

    return create


def answer(engine, prompt, params, salt=None) -> tuple[list[int], int]:
    """The tokens, and how many proposals were verified for them."""
    request = engine.add_request("r", prompt, params, cache_salt=salt)
    drain(engine)
    return request.output_token_ids, request.num_draft_tokens


@pytest.mark.parametrize("salt", [None, "mine"])
def test_a_guess_at_an_answer_of_another_salt_gets_the_proposals_that_an_empty_memory_gives(
    create_suffix_engine, salt
) -> None:
    engine = create_suffix_engine()
    given, _ = answer(engine, PROMPT, ANSWERED, salt)
    guess = [*PROMPT, *given[:12]]
    alone = answer(create_suffix_engine(memory_tokens=0), guess, PROBED)
    for other in {None, "mine", "theirs"} - {salt}:
        assert answer(engine, guess, PROBED, other) == alone
        engine.executor._drafter.forget()  # the probe's own answer
        answer(engine, PROMPT, ANSWERED, salt)
    tokens, num_drafts = answer(engine, guess, PROBED, salt)
    assert tokens == alone[0]
    assert num_drafts > alone[1], "its own answers are found"


def test_a_salted_request_repeats_its_own_text_as_before(create_suffix_engine) -> None:
    always = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, allowed_token_ids=(5,))
    found = [answer(create_suffix_engine(), PROMPT, always, salt) for salt in (None, "mine")]
    assert found[0] == found[1]
    assert found[0][1] > 0


def test_keys_follow_the_salt_and_cannot_be_computed_without_the_engines_secret(create_suffix_engine) -> None:
    engine = create_suffix_engine()
    salts = (None, "a", "b", "a", None)
    requests = [engine.add_request(str(i), PROMPT, PROBED, cache_salt=salt) for i, salt in enumerate(salts)]
    keys = [request.sampling.memory_key for request in requests]
    assert keys[0] == keys[4] == 0
    assert keys[1] == keys[3]
    assert len(set(keys)) == 3
    other = create_suffix_engine().add_request("a", PROMPT, PROBED, cache_salt="a")
    assert other.sampling.memory_key != keys[1]
    drain(engine)

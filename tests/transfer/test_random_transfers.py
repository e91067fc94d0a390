"""Random requests of mixed features whose prompts one engine computes and another answers: the tokens of one engine.

Latents, windows, experts, draft modules, proposals that are looked up, adapters, grammars, penalties, log-probabilities, too few
blocks, aborts and a forgotten cache: whatever `tests/ranks/random_engines.py` makes of these numbers.
"""

from collections.abc import Iterator

import pytest
from engine_pairs import Pair, check_at_rest, settle
from random_engines import count_ties, random_case, serve, serve_reference
from random_models import model_path, save_model
from ranked_engines import EngineFactory

from stepgraph.config import EngineConfig

NUM_REQUESTS = 50
NUMBERS = (2, 29, 42, 161)


@pytest.fixture
def create() -> Iterator[EngineFactory]:
    factory = EngineFactory()
    yield factory
    factory.close()


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
def test_two_engines_answer_random_requests_as_one_does(number, tmp_path, create) -> None:
    case = random_case(number, 1, num_arrivals=NUM_REQUESTS)
    save_model(case.model, tmp_path)
    settings = case.settings | {
        "enable_prefix_caching": True,
        "model": model_path(case.model, tmp_path),
        "block_size": 8,
    }
    source, sink = (
        create(EngineConfig.from_settings(**settings | {"splitwise_role": role, "num_kv_blocks": num_blocks}))
        for role, num_blocks in (("prefill", 400), ("decode", 60))
    )
    found = serve(Pair(source, sink, number), case, tmp_path)
    for engine in (sink, source):
        settle(engine, 60)
        assert check_at_rest(engine) == [], case.features
    assert sink.transfers.counts().blocks_received >= 10
    create.shut_engines_down()
    ties = count_ties(case, tmp_path, create, found, serve_reference(case, tmp_path, create))
    assert ties <= 1, case.features

"""Engines of mixed features on 2, 3 and 4 ranks: the tokens of one rank, and the same bits on all.

`scripts/check_ranks.py` makes more of them.
"""

import pytest
from random_engines import random_case, run_case
from random_models import WITH_LATENTS

_NUMBERS = (4047, 4061, 4102, 4242, 4288, 4299, 4310, 4465, 4516, 4605)  # which have every feature between them
CASES = [(number, 2 + number % 3) for number in _NUMBERS]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "num_ranks"), CASES)
def test_ranks_of_a_random_engine_agree_and_give_the_tokens_of_one(number, num_ranks, tmp_path, create_ranked) -> None:
    outcome = run_case(random_case(number, num_ranks), tmp_path, create_ranked)
    assert outcome.tokens > 0
    assert outcome.ties <= 1, outcome


def test_the_cases_have_all_features() -> None:
    features = {name for number, num_ranks in CASES for name in random_case(number, num_ranks).features}
    expected = {
        *("suffix", "ngram", "mtp", "hybrid", "eager", "auto", "bfloat16", "float32", "fp8", "kv_cache_dtype", "Q4_1"),
        *("transformers", "deterministic", "enable_lora", "guides", "deep sleep", "the same tensors again"),
        *("experts", "enable_expert_parallel", *WITH_LATENTS),
    }
    assert not expected - features

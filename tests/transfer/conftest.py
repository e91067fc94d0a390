"""Two engines of the tiny model in one process, what is between them, and what one engine alone would answer."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parents[1] / name) for name in ("ranks", "models")]  # which make random engines

from engine_pairs import World, build
from tiny import drain

from stepgraph.engine.sampling_params import SamplingParams


@pytest.fixture(scope="session")
def answer(tiny_model) -> Iterator[Callable[[Sequence[int], SamplingParams], list[int]]]:
    """What one engine answers that does everything itself."""
    mixed = build({"model": tiny_model, "enable_prefix_caching": False})

    def answer(prompt: Sequence[int], params: SamplingParams) -> list[int]:
        request = mixed.add_request("request", prompt, params)
        drain(mixed)
        return request.output_token_ids

    yield answer
    mixed.shutdown()


@pytest.fixture(scope="session")
def world(tiny_model) -> Iterator[World]:
    """For all tests, which leave nothing in it."""
    made = World(tiny_model)
    yield made
    made.close()

"""Engines of several ranks, whose processes serve all tests of the folder."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stepgraph.config import EngineConfig
from stepgraph.engine.engine import Engine

sys.path.append(str(Path(__file__).parents[1] / "models"))  # whose writers of files serve here too

from ranked_engines import EngineFactory


@pytest.fixture(scope="session")
def _factory() -> Iterator[EngineFactory]:
    factory = EngineFactory()
    yield factory
    factory.close()


@pytest.fixture
def create_ranked(_factory) -> Iterator[Callable[[EngineConfig], Engine]]:
    """Makes engines of as many ranks as their settings say; shut down after the test."""
    yield _factory
    _factory.shut_engines_down()

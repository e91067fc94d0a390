"""What any platform must satisfy, run for those that this machine has, or for one that an installed package brings:

    python -m pytest tests/platforms/contract --platform NAME

A process can hold one platform of a type of device, so that a package's platform needs a run of its own.
"""

import sys
from pathlib import Path

import pytest
import torch
from tiny import TINY_SETTINGS

from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine
from stepgraph.graph import GraphBackend, create_backend
from stepgraph.platforms import Platform, create_platform

sys.path.append(str(Path(__file__).parents[2] / "ops"))  # whose batches and slot lines serve here too


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--platform",
        metavar="NAME",
        help="what to hold to its contract; default: cpu, and cuda if there is one",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "platform_name" not in metafunc.fixturenames:
        return
    asked = metafunc.config.getoption("--platform", default=None)  # not an option of a run of all tests
    here = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    metafunc.parametrize("platform_name", here if asked is None else (asked,), scope="session")


@pytest.fixture(scope="session")
def platform(platform_name: str) -> Platform:
    return create_platform(platform_name)


@pytest.fixture(scope="session")
def backend(platform: Platform) -> GraphBackend:
    """What captures this platform's steps."""
    return create_backend(platform.default_graph_backend)


@pytest.fixture(scope="session")
def create_engine(tiny_model: str, platform_name: str):
    """Makes engines of the tiny model on the platform: `create_engine(max_num_seqs=3)`."""

    def create(**settings) -> Engine:
        given = {"model": tiny_model, "device": platform_name} | TINY_SETTINGS | settings
        return build_engine(EngineConfig.from_settings(**given))

    return create

"""Fixtures of all tests. Without a GPU, Triton kernels run under its interpreter, chosen before anything imports it."""

import gc
import os
from collections import Counter
from collections.abc import Iterator

import stepgraph  # noqa: F401  # before torch, as it settles how torch's threads wait

# isort: split
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the imports below, one of which imports Triton

import pytest
import triton_interpreter  # noqa: F401  # mends it
from forked_processes import FORKED
from hypothesis import HealthCheck, settings
from tiny import TINY_SETTINGS, save_tiny_model

from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine
from stepgraph.executor import workers
from stepgraph.executor.build import build_local_executor
from stepgraph.models.source import ModelSource, packaged_file, resolve, resolve_configured
from stepgraph.spec.drafter import Drafter

settings.register_profile(
    "stepgraph", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)  # no test asserts a time
settings.load_profile("stepgraph")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, then those with many tests: no process is left alone with a long one at the end."""
    num_tests = Counter(item.path for item in items)
    with_slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in with_slow, -num_tests[item.path]))


@pytest.fixture(scope="session", autouse=True)
def _frozen() -> None:
    """Have what was imported and collected not be looked at whenever an engine ends: that takes longer than a small one lives."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _forked_workers() -> Iterator[None]:
    """Ranks of engines in a test's own process start at once."""
    with pytest.MonkeyPatch.context() as patch:
        if FORKED is not None:
            patch.setattr(workers, "subprocess", FORKED)
        yield
    if FORKED is not None:
        FORKED.close()


@pytest.fixture(scope="session")
def device() -> str:
    """Where Triton kernels run: "cuda", or "cpu" under the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def smollm2() -> ModelSource:
    """The embedded model, for the tests that need one that can speak."""
    if packaged_file("smollm2") is None:
        pytest.skip("the embedded model is not installed: run `stepgraph pull smollm2`")
    pytest.importorskip("gguf", reason="the embedded model is a GGUF file, which needs the gguf package")
    return resolve("smollm2")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """Folder of the random model of `tiny.py`."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def create_engine(tiny_model, device):
    """Makes engines of the tiny model: `create_engine(max_num_seqs=3)`."""

    def create(*, drafter: Drafter | None = None, **settings) -> Engine:
        config = EngineConfig.from_settings(**({"model": tiny_model, "device": device} | TINY_SETTINGS | settings))
        if drafter is None:
            return build_engine(config)
        source = resolve_configured(config.model)
        return build_engine(config, source=source, executor=build_local_executor(config, source, drafter=drafter))

    return create

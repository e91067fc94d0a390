"""The embedded model, for the tests that need one that can speak."""

import pytest

from stepgraph.models.source import ModelSource, packaged_file, resolve


@pytest.fixture(scope="session")
def smollm2() -> ModelSource:
    if packaged_file("smollm2") is None:
        pytest.skip("the embedded model is not installed: run `stepgraph pull smollm2`")
    pytest.importorskip("gguf", reason="the embedded model is a GGUF file, which needs the gguf package")
    return resolve("smollm2")

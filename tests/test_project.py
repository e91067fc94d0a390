"""Claims about the project's own files."""

import re
import tomllib
from pathlib import Path

import stepgraph

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text()


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", requirement).group() for requirement in requirements}


def test_package_has_the_version_of_the_project():
    assert stepgraph.__version__ == PROJECT["version"]
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_dependency_is_explained():
    first_cells = re.findall(r"^\| ([^|]+)", (ROOT / "docs" / "dependencies.md").read_text(), re.MULTILINE)
    explained = {name for cell in first_cells for name in re.findall(r"`([\w.-]+)`", cell)}
    extras = [requirement for group in PROJECT["optional-dependencies"].values() for requirement in group]
    assert requirement_names(PROJECT["dependencies"] + extras) - {PROJECT["name"]} <= explained


def test_torch_is_pinned_so_that_no_installation_brings_a_second_one():
    assert re.search(r"^torch==[\d.]+$", CONSTRAINTS, re.MULTILINE)

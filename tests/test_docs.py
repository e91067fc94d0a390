"""What the pages say is there: commands, flags, imports, files. tests/test_tour.py runs the commands and the code."""

import ast
import importlib
import inspect
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from stepgraph import LLM
from stepgraph.bench import _BENCHMARKS
from stepgraph.cli import _parser
from stepgraph.command_parser import CommandParser
from stepgraph.config import EngineConfig, serve_config, settings_from_flags
from stepgraph.config.engine import ENGINE_PARTS, GROUPS
from stepgraph.config.fields import homes_of
from stepgraph.config.file import read_settings

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

from doc_blocks import LANGUAGES, Block, blocks, pages, simple_commands, without_blocks  # noqa: E402

PAGES = pages()
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = re.findall(r"^(\w+)(?::| \?=)", (ROOT / "Makefile").read_text(), re.MULTILINE)  # and what may be set for them
PROGRAMS = (
    "stepgraph",
    "python",
    "pip",
    "make",
    "curl",
    "docker",
    "kubectl",
    "helm",
    "serve",
    "echo",
    "printf",
    ".venv/bin/pre-commit",
)


def name_of(page) -> str:
    return str(page.relative_to(ROOT))


def blocks_of(language: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language == language]


@pytest.fixture(scope="module")
def parsers() -> dict[str, CommandParser]:
    """That of `stepgraph bench` and, as "", that of all other commands."""
    bench = CommandParser(prog="stepgraph bench")
    commands = bench.add_subparsers()
    for name in _BENCHMARKS:
        importlib.import_module(f"stepgraph.bench.{name}").add_parser(commands)
    return {"bench": bench, "": _parser()}


def check_command(words: list[str], parsers: dict[str, CommandParser]) -> None:
    """A command must be one that the real parser takes, with settings that go together."""
    if words[:3] == ["python", "-m", "stepgraph.server"]:
        words = ["stepgraph", "serve", *words[3:]]
    program, *rest = words
    assert program in PROGRAMS, f"{program} is no program that a page may name without saying what it is"
    if program == "stepgraph" and rest[0] == "bench":
        parsers["bench"].parse_args(rest[1:])
    elif program == "stepgraph":
        arguments = parsers[""].parse_args(rest)
        if getattr(arguments, "config", None) is None and hasattr(arguments, "max_num_seqs"):
            of_server = rest[0] == "serve"
            settings = settings_from_flags(arguments, server=of_server)
            (serve_config if of_server else lambda given: EngineConfig.from_settings(**given))(settings)
    elif program == "make":
        assert {word.partition("=")[0] for word in rest} <= {*TARGETS}, rest
    elif program == "python" and rest[0] != "-c":
        assert (ROOT / rest[0]).is_file(), rest[0]


def test_every_block_says_what_it_is() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert len(re.findall(r"^ *```", text, re.MULTILINE)) == 2 * len(blocks(page)), f"{name_of(page)}: an odd fence"
        for block in blocks(page):
            assert block.language in LANGUAGES, block
            if not block.language:
                programs = "|".join(map(re.escape, ("$", *PROGRAMS)))
                typed = re.findall(rf"^(?:{programs}) [a-z'-].*", block.text, re.MULTILINE)
                assert typed == [], f"{block} holds commands; make it a console"


@pytest.mark.parametrize("block", blocks_of("console"), ids=str)
def test_commands_are_there_with_their_flags(block, parsers, capsys) -> None:
    for command in block.commands:
        for words in simple_commands(command.text):
            try:
                check_command(list(words), parsers)
            except SystemExit:
                pytest.fail(f"{block}: {command.text}: {capsys.readouterr().err}")
    syntax = "\n".join(command.text for command in block.commands)
    subprocess.run(["bash", "-n"], input=syntax, text=True, check=True)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_the_text_are_there_with_their_flags(page, parsers) -> None:
    for span in re.findall(r"`(stepgraph [^`]+)`", without_blocks(page)):
        words = span.replace("…", "").replace("[", "").replace("]", "").split()[1:]
        parser = parsers["bench" if words[0] == "bench" else ""]
        words = words[1:] if words[0] == "bench" else words
        while words and not words[0].startswith("-") and (known := commands_of(parser)):
            assert words[0] in known, f"{name_of(page)}: {span}: there is no {words[0]}"
            parser = known[words.pop(0)]
        for word in words:
            if word.startswith("--"):
                flag = word.partition("=")[0].rstrip(",.;:")
                assert flag in parser._option_string_actions, f"{name_of(page)}: {span}: there is no {flag}"


def commands_of(parser: CommandParser) -> dict[str, CommandParser]:
    groups = [action for action in parser._actions if hasattr(action, "choices") and isinstance(action.choices, dict)]
    return groups[0].choices if groups else {}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_extras_are_there(page) -> None:
    named = re.findall(r"pip install '(?:\.|stepgraph)\[([\w,]+)\]'", page.read_text(encoding="utf-8"))
    assert {extra for names in named for extra in names.split(",")} <= set(EXTRAS)


@pytest.mark.parametrize("block", blocks_of("python"), ids=str)
def test_python_compiles_and_names_what_is_there(block) -> None:
    imported = {}
    for node in ast.walk(tree := ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module != "__future__":
            module = importlib.import_module(node.module)
            imported |= {name.asname or name.name: getattr(module, name.name) for name in node.names}
        elif isinstance(node, ast.Import):
            imported |= {name.name: importlib.import_module(name.name) for name in node.names}
    settings = {*homes_of(ENGINE_PARTS), *GROUPS}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
            assert hasattr(imported[node.value.id], node.attr), f"{block}: {node.value.id}.{node.attr}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in imported:
            called = imported[node.func.id]
            given = {keyword.arg for keyword in node.keywords}
            known = set(inspect.signature(called).parameters) | (settings if called is LLM else set())
            if called.__module__.startswith("stepgraph"):
                assert given <= known, f"{block}: {node.func.id} takes no {', '.join(given - known)}"


def test_files_of_settings_and_bodies_of_requests_are_read(tmp_path) -> None:
    for block in blocks_of("yaml"):
        content = yaml.safe_load(block.text)
        if content.keys().isdisjoint({"scrape_configs", "services"}):
            (tmp_path / "settings.yaml").write_text(block.text)
            serve_config(read_settings(str(tmp_path / "settings.yaml")))
    for block in blocks_of("json"):
        json.loads(block.text)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_are_there(page) -> None:
    named = re.findall(r"`((?:docs|tests|scripts|stepgraph|examples|benchmarks)/[\w/.-]+)`", without_blocks(page))
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", ["from-sglang.md", "from-llama-cpp.md"])
def test_flags_that_stand_for_those_of_other_engines_are_there(page, parsers) -> None:
    known = commands_of(parsers[""])["serve"]._option_string_actions
    rows = re.findall(
        r"^\| `-[^|]+\| ([^|]+) \| [^|]*\|$", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.MULTILINE
    )
    flags = [flag for row in rows for flag in re.findall(r"--[\w-]+", row)]
    assert len(flags) > 15
    assert [flag for flag in flags if flag not in known] == []


def test_the_table_of_commands_is_whole(parsers) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = {tuple(shlex.split(row)[:2]) for row in re.findall(r"^\| `stepgraph ([^`]+)`", readme, re.MULTILINE)}
    for name, parser in commands_of(parsers[""]).items():
        for inner in _BENCHMARKS if name == "bench" else commands_of(parser) or [None]:
            assert any(row[: 1 + (inner is not None)] == ((name, inner) if inner else (name,)) for row in listed), (
                name,
                inner,
            )

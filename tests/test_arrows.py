"""Imports point one way, by the order of packages in docs/architecture.md; and the engine knows nothing of devices."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = (
    {
        "__version__",
        "abi",
        "command_parser",
        "config",
        "devices",
        "errors",
        "lifeline",
        "openmp",
        "trusted_folder",
        "version",
    },
    {"native", "platforms"},
    {"ops"},
    {"parallel"},
    {"layers"},
    {"graph"},
    {"models"},
    {"spec"},
    {"step"},
    {"transfer"},
    {"executor"},
    {"engine"},
    {
        "api",
        "server",
        "chat",
        "cli",
        "text_commands",
        "demo",
        "collect_env",
        "bench",
        "ray",
        "trace_command",
        "verify",
        "__init__",
        "__main__",
    },
)
"""What stands lower comes first. A package imports what stands below it, and those beside it among the first and the last."""
LEVELS = {package: level for level, packages in enumerate(ORDER) for package in packages}
PLAIN_VALUES = {f"stepgraph.step.{name}" for name in ("admission", "plan", "shape", "slot_sampling", "results", "log")}
"""What of the step an engine may know: plans go to the executor, results and records come back."""


def package_of(module: str) -> str:
    """The part of stepgraph that a module belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def modules() -> dict[str, Path]:
    """All of stepgraph's modules by name."""
    found = {}
    for path in sorted((ROOT / "stepgraph").rglob("*.py")):
        names = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(names[:-1] if names[-1] == "__init__" else names)] = path
    return found


MODULES = modules()


def imports_of(source: str) -> Iterator[str]:
    """The modules of stepgraph that a module's text names, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.partition(".")[0] == "stepgraph")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "stepgraph":
            for name in node.names:
                module = f"{node.module}.{name.name}"
                yield module if module in MODULES else str(node.module)


def against_the_order(module: str, imported: str) -> bool:
    """Whether `module` may not import `imported`."""
    above, below = LEVELS[package_of(module)], LEVELS[package_of(imported)]
    return package_of(module) != package_of(imported) and (
        below > above or (below == above and 0 < above < len(ORDER) - 1)
    )


def test_every_package_has_a_place() -> None:
    assert {package_of(module) for module in MODULES} == set(LEVELS) - {"__version__"}  # a name, of `stepgraph` itself


def test_imports_point_one_way() -> None:
    found = {
        (module, imported)
        for module, path in MODULES.items()
        for imported in imports_of(path.read_text())
        if against_the_order(module, imported)
    }
    assert not found


def test_the_engine_knows_plans_and_results_and_no_device() -> None:
    found = {
        (module, imported)
        for module, path in MODULES.items()
        if package_of(module) == "engine"
        for imported in imports_of(path.read_text())
        if package_of(imported) in ("ops", "layers", "platforms", "graph", "step") and imported not in PLAIN_VALUES
    }
    assert not found


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("stepgraph.ops.build", "stepgraph.layers.linear"),
        ("stepgraph.graph.cuda", "stepgraph.step.plan"),
        ("stepgraph.models.decoder", "stepgraph.spec.mtp"),
        ("stepgraph.platforms.cpu", "stepgraph.native"),
        ("stepgraph.engine.engine", "stepgraph.api"),
    ],
)
def test_what_points_the_other_way_is_found(module: str, imported: str) -> None:
    assert against_the_order(module, imported)
    assert list(imports_of(f"def f():\n    from {imported} import x\n")) == [imported]


def test_the_order_is_that_of_the_documentation() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    [sentence] = [line for line in page.splitlines() if line.startswith("Imports point one way:")]
    written = sentence.split("`")[1]
    places = [LEVELS[name.strip(" {}")] for group in written.split("→") for name in group.split(",")]
    assert places == sorted(places, reverse=True)
    assert len(set(places)) == len(ORDER) - 1  # what stands under all is named beside it


def test_who_owns_what_names_files_that_are_there() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| .*\? \| (.*) \|$", page, re.MULTILINE)
    assert len(rows) >= 10
    for row in rows:
        for path in re.findall(r"`(stepgraph/[^`]+)`", row):
            assert (ROOT / path).exists(), row

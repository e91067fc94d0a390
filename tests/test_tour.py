"""Every command and block of the pages is run, as a newcomer would (scripts/tour.py), or says why not; and the reason holds.

Processes are forked from one that has imported everything, and the tiny checkpoint stands for the embedded model wherever a page
does not say what comes out.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from forked_processes import FORKED

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

from doc_blocks import Block, blocks, pages  # noqa: E402
from tour import Tour  # noqa: E402

pytestmark = pytest.mark.slow
PAGES = [page for page in pages() if any(block.language for block in blocks(page))]
REASONS = {
    "needs Docker": r"\bdocker |make image",
    "needs Docker and a GPU": r"\bdocker run .*(--gpus|TARGET=cuda|-cuda|stepgraph:)",
    "needs two GPUs": r"--devices 0 1|--replicas 1 2|parallel[-_]size[ =]2",
    "needs a GPU": r"--count-launches",
    "needs a Kubernetes cluster": r"kubectl |helm ",
    "starts Ray, which stays": r"\bserve[. ]run\b",
    "trains for hours, on data from a package index": r"train_mtp\.py",
    "takes an hour on two cores": r"stepgraph bench spec ",
    "needs a package index": r"pip install\b",
    "tests/transfer/test_killed_engines.py kills engines, too": r"kill_transfers\.py",
    "tests/verify verifies graphs": r"graphs verify\b",
    "installs an environment of its own": r"make (demo|test|docs|docs-serve)\b",
    "changes the repository": r"pre-commit install",
    "needs weights in that format, as tests/models/test_fp8_weights.py makes them": r"-FP8\b",
}
"""Why a block or command may be left out, and what it holds then. Of "part of a file", some example must hold it."""


@pytest.fixture
def tour(tmp_path, smollm2):
    """In a folder of its own. `smollm2` says why, where the embedded model is not installed."""
    with Tour(tmp_path, processes=FORKED or subprocess, is_small=True) as tour:
        yield tour


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_says_can_be_done(page, tour) -> None:
    for block, what, outcome in tour.run(page):
        assert not outcome.startswith("FAILED"), f"{block}: {what}: {outcome}"
        if outcome.startswith("not run: "):
            check_reason(block, what if block.not_run is None else block.text, outcome.removeprefix("not run: "))


def check_reason(block: Block, text: str, reason: str) -> None:
    if reason == "part of a file":
        examples = [path.read_text(encoding="utf-8") for path in (ROOT / "examples").rglob("*.py")]
        assert any(text.strip() in example for example in examples), f"{block}: no example holds this"
    else:
        assert re.search(REASONS[reason], text), f"{block}: it does not look as if it {reason}"


def written(folder: Path, text: str) -> Path:
    page = folder / "page.md"
    page.write_text(text)
    return page


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```console\n$ stepgraph chat --no-such-flag\n```\n", "exit code 2"),
        (
            "```console\n$ stepgraph graphs list --max-num-seqs 1 --max-num-batched-tokens 1\nnothing\n```\n",
            "it prints",
        ),
        ("```console\n$ false\n```\n", "exit code 1"),
        ("```console\n$ stepgraph serve --num-kv-blocks 0\n```\n", "it does not serve"),
        ("```python\nprint(1 + 1)  # 3\n```\n", "it does not print '3'"),
        ("```python\nraise SystemExit(3)\n```\n", "exit code 3"),
        ('```json\n{"prompt": "a"}\n```\n', "the page's server does not answer"),
    ],
)
def test_a_page_that_promises_what_does_not_happen_is_found(text, complaint, tmp_path, tour) -> None:
    [(_, _, outcome)] = tour.run(written(tmp_path, text))
    assert outcome.startswith(f"FAILED: {complaint}")


def test_a_reason_that_does_not_hold_is_found(tmp_path) -> None:
    [block] = blocks(written(tmp_path, "<!-- not run: needs Docker -->\n```console\n$ stepgraph env\n```\n"))
    with pytest.raises(AssertionError, match="does not look as if it needs Docker"):
        check_reason(block, block.text, str(block.not_run))

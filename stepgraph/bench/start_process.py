"""The process that `bench start` starts: answers one prompt with one token, and says when it was where.

Phases are seen from outside: the functions that do them are wrapped before they are called, so that the engine carries no
stopwatch. Prints one line of JSON with times of the system's clock.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from stepgraph.errors import StepgraphError

PHASES = (
    ("read config", "stepgraph.engine.build", "resolve_configured"),
    ("meeting other ranks", "stepgraph.executor.build", "_create_group"),
    ("model without weights", "stepgraph.executor.build", "create_model"),
    ("weights", "stepgraph.executor.in_background", "_run"),
    ("buffers and KV cache", "stepgraph.step.runner", "StepRunner.__init__"),
    ("capture", "stepgraph.step.graphs", "StepGraphs.capture_all"),
    ("tokenizer", "stepgraph.models.source", "ModelSource.tokenizer_if_any"),
)
"""Name, module, and what in it does the phase."""


class Stopwatch:
    """Notes phases as they end."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, float, float]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything inside; it may be called from any thread."""
        begin = time.time()
        try:
            yield
        finally:
            self.phases.append((name, begin, time.time()))

    def watch(self, name: str, module: str, path: str) -> None:
        """Have every call of a function of a module noted as a phase."""
        owner: Any = importlib.import_module(module)
        *parents, attribute = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        function: Callable[..., Any] = getattr(owner, attribute)

        @wraps(function)
        def noted(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        setattr(owner, attribute, noted)


def main() -> None:
    """Takes JSON: settings, and the length of the prompt."""
    began = time.time()
    request = json.loads(sys.argv[1])
    stopwatch = Stopwatch()
    with stopwatch.phase("import"):
        from stepgraph.api import LLM
        from stepgraph.engine.sampling_params import SamplingParams
    for name, module, path in PHASES:
        stopwatch.watch(name, module, path)
    with stopwatch.phase("engine, all of it"):
        llm = LLM(**request["settings"], progress=False)
    with stopwatch.phase("first token"):
        prompt = list(range(1, 1 + request["prompt_len"]))
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        llm.generate([prompt], params, use_tqdm=False)
    from stepgraph.bench.report import machine

    phases = sorted(stopwatch.phases, key=lambda phase: phase[1])
    print(json.dumps({"began": began, "phases": phases, "machine": machine(llm.engine.executor.specs.device)}))


if __name__ == "__main__":
    try:
        main()
    except StepgraphError as error:
        sys.exit(f"error: {error}")

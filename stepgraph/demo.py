"""`stepgraph demo`: three prompts of different lengths arrive at different times; every step runs in a graph.

Shows the answers as they grow, which graph ran each step, and what a step takes with and without graphs. Everything it
prints is measured or observed in this run.
"""

from __future__ import annotations

import textwrap
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import median
from typing import Any

from stepgraph.bench.report import machine, table
from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.chat_template import ChatTemplate
from stepgraph.engine.engine import Engine
from stepgraph.engine.request import Request, RequestUpdate
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.session import Session
from stepgraph.errors import ConfigError
from stepgraph.executor.build import context_len
from stepgraph.executor.local import runner_of
from stepgraph.models.source import ModelSource, resolve_configured
from stepgraph.step.log import StepRecord

SETTINGS = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 256,
    "max_model_len": 1024,
    "capture": "lazy",
    "enable_prefix_caching": False,
}
"""Few enough graphs to capture all of them on a laptop, a step too small for the longest prompt, which is split, and prompts that
are computed each time they are timed."""
ANSWER_TOKENS = 48
ROUNDS = 3


@dataclass(frozen=True)
class Arrival:
    """A prompt, and the step before which it reaches the engine."""

    name: str
    step: int
    text: str


ARRIVALS = (
    Arrival("A", 0, "Why is the sky blue?"),
    Arrival(
        "B",
        8,
        "I have a small balcony that gets sun only in the morning and is quite windy. I would like to grow a few "
        "things to eat there, but I travel for work and can water them only every third day. Which three herbs or "
        "vegetables would you choose, and what should I look out for?",
    ),
    Arrival(
        "C",
        16,
        "Here is a report from the harbour. Please tell me in a few sentences what happened and why.\n\n"
        "The ferry Marlin left the eastern pier at ten past six, about an hour later than planned, because a "
        "delivery of bread and medicine for the islands had been held up by road works on the coast. The captain, "
        "who has sailed this route for nineteen years, knew that the tide would turn before she reached the "
        "narrow channel behind the lighthouse. She told the passengers over the loudspeaker that the crossing "
        "would take longer and that tea would be served without charge. Halfway across, fog came in from the "
        "north, and the crew saw neither the buoys nor the shore. The second officer went to the bow with a horn "
        "and a lamp, and the engine was slowed to walking speed. A fishing boat answered the horn: its skipper "
        "had lost his way as well, and for the next two hours both boats stayed within sight of each other's "
        "lights and shared what their instruments showed. When the fog lifted, they were no more than three "
        "hundred metres from the island's old stone quay, which had been closed to ships since the storm of last "
        "winter. The captain decided to wait for daylight rather than risk the damaged wall. At half past five in "
        "the morning the Marlin moored at the new pier, with everyone on board safe, the medicine dry, and the "
        "bread a little stale. The harbour office has since asked for a radar beacon in the channel.",
    ),
)


def main(settings: dict[str, Any], *, progress: bool) -> int:
    """Run the demo.

    Args:
        settings: of the engine; they override `SETTINGS`.
        progress: show progress bars on stderr.

    Returns:
        The exit code: 0, or 1 if graphs and eager execution gave different tokens.
    """
    settings = {**SETTINGS, **settings}
    config = EngineConfig.from_settings(**settings)
    eager_config = EngineConfig.from_settings(**{**settings, "graph_backend": "eager"})
    started = time.perf_counter()
    source = resolve_configured(config.model)
    source.check_tokenizer()
    source.check_chat_template()
    prompts = _tokenize(source)
    needed = max(map(len, prompts.values())) + ANSWER_TOKENS
    if needed > context_len(config, source):
        raise ConfigError(f"max_model_len={context_len(config, source)} is too small; the demo needs {needed}")
    engine = build_engine(config, source=source, progress=progress)
    where = machine(engine.executor.specs.device)
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    print(f"{versions}\n{where['device']}, {where['threads']} threads")
    seconds = time.perf_counter() - started
    print(
        f"loaded {engine.source.name} in {seconds:.1f} s on {engine.executor.specs.platform}: {engine.executor.specs.precision}"
    )

    started = time.perf_counter()
    runner = runner_of(engine.executor)
    graphs, store, largest = runner.graphs, runner.graphs.store, runner.policy.max_shape
    graphs.capture_all(progress=progress)
    memory = f", {store.bytes / 2**20:.0f} MiB" if store.bytes else ""  # on CPU a graph holds none
    print(
        f"captured {store.num_graphs} {store.backend_name} graphs in {time.perf_counter() - started:.1f} s{memory}: "
        f"steps of up to {largest.num_tokens} tokens in up to {largest.num_rows} rows",
        flush=True,
    )
    if eager_steps := engine.config.graph.eager_steps():
        print(f"steps without a graph: {eager_steps}", flush=True)

    _show_answers(engine, prompts)
    return _compare(engine, eager_config, prompts, progress=progress)


def _tokenize(source: ModelSource) -> dict[str, list[int]]:
    """Token ids of each arrival, as one chat turn."""
    template = ChatTemplate(source.tokenizer())
    return {
        arrival.name: template.prompt([{"role": "user", "content": arrival.text}])["prompt_token_ids"]
        for arrival in ARRIVALS
    }


class Workload:
    """The arrivals, fed to one engine step by step."""

    def __init__(self, engine: Engine, prompts: dict[str, list[int]], label: str = ""):
        self.engine = engine
        self.step_index = 0
        self.requests: dict[str, Request] = {}
        self._prompts = prompts
        self._label = label
        self._waiting = list(ARRIVALS)

    @property
    def finished(self) -> bool:
        return not self._waiting and not self.engine.has_work

    def arrive(self) -> list[Arrival]:
        """Queue what arrives before the next step."""
        arrived = [arrival for arrival in self._waiting if arrival.step <= self.step_index]
        for arrival in arrived:
            self._waiting.remove(arrival)
            params = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
            request = self.engine.add_request(arrival.name + self._label, self._prompts[arrival.name], params)
            self.requests[arrival.name] = request
        return arrived

    def step(self) -> tuple[Sequence[RequestUpdate], StepRecord | None]:
        """Run one step; what it returned, and the record of the step it launched, if it launched one."""
        statistics = self.engine.executor.statistics
        before = statistics.num_steps
        updates = self.engine.step()
        self.step_index += 1
        return updates, statistics.recent[-1] if statistics.num_steps > before else None


def _show_answers(engine: Engine, prompts: dict[str, list[int]]) -> None:
    """Answer the prompts, printing the answers as they grow, then what ran each step."""
    print("\nThree prompts arrive one after the other; each line is a piece of an answer, when it was complete.\n")
    tokenizer = engine.source.tokenizer()
    workload = Workload(engine, prompts)
    sessions: dict[str, Session] = {}
    printers: dict[str, LinePrinter] = {}
    records: list[tuple[int, StepRecord]] = []
    while not workload.finished:
        index = workload.step_index
        for arrival in workload.arrive():
            prompt = prompts[arrival.name]
            beginning = textwrap.shorten(arrival.text, 56, placeholder=" …")
            print(f"step {index:>3}  {arrival.name} > {beginning} ({len(prompt)} tokens)", flush=True)
            sessions[arrival.name] = Session([workload.requests[arrival.name]], None, tokenizer, abort=engine.abort)
            printers[arrival.name] = LinePrinter(arrival.name)
        updates, record = workload.step()
        if record is not None:
            records.append((index, record))
        for update in updates:
            name = update.request.id
            grew = sessions[name].update(name, update.new_token_ids, update.finish_reason)
            assert grew, "no stop string ends an answer before its request"
            [output] = sessions[name].output().outputs
            printers[name].show(output.text, index, complete=output.finished)
            if output.finished:
                print(f"step {index:>3}  {name}   ({len(output.token_ids)} tokens, ended by {output.finish_reason})")

    print("\nWhich graph ran each step (tokens x rows)\n")
    print(table(["steps", "kind", "tokens", "rows", "graph", "padding tokens"], _step_lines(records)))
    in_graphs = [record for _, record in records if record.eager_reason is None]
    computed = sum(record.shape.num_tokens for _, record in records)
    padding = computed - sum(record.num_tokens for _, record in records)
    print(
        f"\n{len(in_graphs)} of {len(records)} steps ran in a graph; "
        f"{padding} of {computed} computed tokens were padding ({padding / computed:.1%})",
        flush=True,
    )


class LinePrinter:
    """Prints a growing text in labelled lines, as readable on a terminal as in a file."""

    WIDTH = 72

    def __init__(self, name: str):
        self._name = name
        self._printed = 0

    def show(self, text: str, step_index: int, *, complete: bool) -> None:
        """Print what makes a whole line, and all that is left once the text is complete."""
        while rest := text[self._printed :]:
            end = rest.find("\n", 0, self.WIDTH)
            if end < 0 and len(rest) > self.WIDTH:
                end = max(rest.rfind(" ", 0, self.WIDTH), 0) or self.WIDTH
            if end < 0 and not complete:
                return
            line = rest if end < 0 else rest[:end]
            self._printed += len(line) + (rest[len(line) : len(line) + 1].isspace())
            if line.strip():
                print(f"step {step_index:>3}  {self._name} | {line}", flush=True)


def _step_lines(records: Sequence[tuple[int, StepRecord]]) -> list[list[str]]:
    """Table lines, one for each run of equal steps."""
    lines = []
    for record, group in groupby(records, key=lambda entry: entry[1]):
        indices = [index for index, _ in group]
        steps = str(indices[0]) if len(indices) == 1 else f"{indices[0]}-{indices[-1]}"
        graph = str(record.shape) if record.eager_reason is None else f"none ({record.eager_reason})"
        padding = record.padding_tokens
        lines.append([steps, record.kind, str(record.num_tokens), str(record.num_rows), graph, str(padding)])
    return lines


def _compare(engine: Engine, eager_config: EngineConfig, prompts: dict[str, list[int]], *, progress: bool) -> int:
    """Run the prompts again with and without graphs, step by step in turn, and print what each kind of step took."""
    eager_engine = build_engine(eager_config, source=engine.source, progress=progress)
    times_ms: dict[StepRecord, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    same = total = 0
    for number in range(ROUNDS):
        pair = tuple(Workload(e, prompts, f"-again-{number}") for e in (engine, eager_engine))
        while not all(workload.finished for workload in pair):
            for turn in (0, 1) if pair[0].step_index % 2 else (1, 0):
                workload = pair[turn]
                if workload.finished:
                    continue
                workload.arrive()
                started = time.perf_counter()
                _, record = workload.step()
                runner_of(workload.engine.executor).platform.synchronize()
                elapsed_ms = (time.perf_counter() - started) * 1e3
                if record is not None:
                    times_ms[replace(record, eager_reason=None)][turn].append(elapsed_ms)
        for name, request in pair[0].requests.items():
            pairs = zip(request.output_token_ids, pair[1].requests[name].output_token_ids, strict=False)
            same += sum(a == b for a, b in pairs)
            total += len(request.output_token_ids)

    lines = []
    for step, (graph_ms, eager_ms) in times_ms.items():
        if graph_ms and eager_ms:
            graph, eager = median(graph_ms), median(eager_ms)
            sizes = [str(step.num_tokens), str(step.num_rows), str(step.shape)]
            measured = [str(len(graph_ms)), f"{eager:.2f}", f"{graph:.2f}", f"{eager / graph:.2f}"]
            lines.append([step.kind, *sizes, *measured])
    print(
        f"\nThe same prompts {ROUNDS} more times, on this engine and on one without graphs, their steps in turn.\n"
        "Eager is the same step at the same padded size, launched operator by operator.\n"
        "A step is timed from its planning until the device is done; medians.\n"
    )
    print(table(["kind", "tokens", "rows", "graph", "steps", "eager ms", "graph ms", "eager / graph"], lines))
    print(f"\n{same} of {total} tokens are the same with and without graphs")
    return 0 if same == total else 1

"""What looking at the page costs an engine: CPU time of its thread per step while nobody looks, and while somebody does.

    python scripts/measure_page_cost.py [--streams 64] [--rounds 7] [--steps 600] [--step-ms 5]

The device only counts, so that all time is the host's; what a step would take there passes asleep. Two engines have the same
requests, which others follow as they end, and take their steps in turn. One of them is looked at: its steps are noted, and go
into messages for the supervisor ten times a second, as in a server. Supervisor and fronts, which are other processes, are not
measured.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from statistics import mean, median
from typing import Any

import numpy as np

from stepgraph.bench.counting_device import BLOCK_SIZE, CountingDevice, engine_over
from stepgraph.bench.report import table
from stepgraph.bench.workloads import VOCAB_SIZE
from stepgraph.config import GraphConfig, SchedulerConfig
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.scheduler import Scheduler
from stepgraph.server.messages import Watch, encode
from stepgraph.server.step_reporter import StepReporter

_PROMPT, _ANSWER = 512, 128
_LEFT_OUT = 0.05
"""Of the steps of a round, at either end: something came between them."""


class Traffic:
    """An engine whose requests are followed by others as they end."""

    def __init__(self, streams: int, *, is_watched: bool):
        self._engine, executor = engine_over(
            CountingDevice(streams),
            SchedulerConfig(max_num_seqs=streams),
            GraphConfig(),
            num_kv_blocks=2 + 2 * streams * (_PROMPT + _ANSWER) // BLOCK_SIZE,
            max_model_len=_PROMPT + _ANSWER,
            create_scheduler=Scheduler,
        )
        executor.clock.now = time.monotonic()
        self.num_bytes = 0
        self._reporter = StepReporter(self._engine, self._send)
        self._prompts = _prompts()
        self._num_added = 0
        for number in range(streams):  # of different lengths, so that they end in different steps
            self._add(1 + number * _ANSWER // streams)
        for _ in range(2 * _ANSWER):
            self.step()
        if is_watched:
            executor.clock.now = time.monotonic() + 1e6  # no step was launched before it was looked at
            self._reporter.go_on(Watch(time.monotonic() + 1e6, 1, 1))

    def step(self) -> float:
        """Seconds of this thread's CPU time that a step took, and what the engine's process does for those who look."""
        started = time.thread_time()
        updates = self._engine.step()
        if self._reporter.is_on:
            self._reporter.tell(at_once=False)
        seconds = time.thread_time() - started
        for update in updates:
            if update.finish_reason is not None:
                self._add(_ANSWER)
        return seconds

    def _send(self, message: Any) -> None:
        self.num_bytes += len(encode(message))

    def _add(self, answer_len: int) -> None:
        self._num_added += 1
        params = SamplingParams(max_tokens=answer_len, ignore_eos=True)
        name = f"chatcmpl-{self._num_added:032x}"
        self._engine.add_request(name, next(self._prompts), params)


def _prompts() -> Iterator[list[int]]:
    generator = np.random.default_rng(0)
    while True:
        yield generator.integers(VOCAB_SIZE, size=_PROMPT).tolist()


def measure_round(off: Traffic, on: Traffic, num_steps: int, step_s: float) -> tuple[float, float]:
    """µs of CPU time per step, unwatched, and what being watched adds to it."""
    off_s, added_s = [], []
    for number in range(num_steps):
        seconds = {each: each.step() for each in ((off, on) if number % 2 else (on, off))}  # the first is slower
        off_s.append(seconds[off])
        added_s.append(seconds[on] - seconds[off])
        time.sleep(step_s)
    return 1e6 * _trimmed_mean(off_s), 1e6 * mean(added_s)  # messages are in few steps, and count


def _trimmed_mean(values: list[float]) -> float:
    num_left_out = round(_LEFT_OUT * len(values))
    return mean(sorted(values)[num_left_out : len(values) - num_left_out])


def main() -> int:
    """Returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[64], metavar="N")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--steps", type=int, default=600, metavar="N", help="of a round")
    parser.add_argument("--step-ms", type=float, default=5.0, metavar="MS", help="what a step takes on the device")
    arguments = parser.parse_args()
    rows = []
    for streams in arguments.streams:
        off, on = Traffic(streams, is_watched=False), Traffic(streams, is_watched=True)
        rounds = [
            measure_round(off, on, arguments.steps, arguments.step_ms / 1e3) for _ in range(1 + arguments.rounds)
        ][1:]
        offs, added = zip(*rounds, strict=True)
        per_step = on.num_bytes / arguments.steps / (1 + arguments.rounds)
        spread = f"{min(added):+.1f} to {max(added):+.1f}"
        rows.append((str(streams), f"{median(offs):.1f}", f"{median(added):+.1f}", spread, f"{per_step:.0f}"))
    print("µs of CPU time per step, and bytes told of it")
    print(table(("streams", "nobody looks", "somebody adds", "of rounds", "bytes"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

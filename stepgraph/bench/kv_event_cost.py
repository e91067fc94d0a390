"""What KV events cost the host: CPU time per step of an engine that publishes none, and of one that does, in turn.

The device only counts, so that all time is the host's. Requests share nothing and fill the cache, so that each new one stores
blocks and pushes others out. A subscriber takes all messages, and asks for nothing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import numpy as np

from stepgraph.bench.counting_device import BLOCK_SIZE, CountingDevice, engine_over
from stepgraph.bench.report import table
from stepgraph.bench.workloads import VOCAB_SIZE
from stepgraph.config import GraphConfig, SchedulerConfig
from stepgraph.config.kv_events import KVEventsConfig
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.scheduler import Scheduler
from stepgraph.errors import ConfigError

NUM_STREAMS = (1, 64)
NUM_ROUNDS = 7
_NUM_STEPS = 600
_PAUSE_S = 0.0002
"""Of each step, in which other threads run, as they do while a device computes."""
_PROMPT, _ANSWER = 512, 128
_LEFT_OUT = 0.05
"""Of the steps of a round, at either end."""
_CACHE = 4
"""So many times the blocks that the streams hold at a time."""


@dataclass(frozen=True)
class EventCost:
    """Of so many streams, in µs of CPU time per step; medians of rounds."""

    streams: int
    off_us: float
    """Of the engine's thread, the device that counts included."""
    added_us: float
    """Of the engine's thread, if events are published."""
    added_in_rounds_us: tuple[float, float]
    """The least and the most of a round."""
    others_us: float
    """Of all other threads, which publish and receive."""
    blocks_per_step: float
    """That are stored, and as many removed, on average."""


def measure_event_costs() -> list[EventCost]:
    """All numbers of streams. ConfigError without pyzmq."""
    return [_measure(streams) for streams in NUM_STREAMS]


def event_table(costs: Sequence[EventCost]) -> str:
    """For people."""
    return table(
        ("streams", "blocks", "no events", "events add", "of rounds", "other threads"),
        [
            (
                str(cost.streams),
                f"{cost.blocks_per_step:.1f}",
                f"{cost.off_us:.1f}",
                f"{cost.added_us:+.1f}",
                "{:+.1f} to {:+.1f}".format(*cost.added_in_rounds_us),
                f"{cost.others_us:.1f}",
            )
            for cost in costs
        ],
    )


def _measure(streams: int) -> EventCost:
    """Rounds in which both kinds take a step in turn."""
    with tempfile.TemporaryDirectory() as folder:
        off, on = _Traffic(streams, None), _Traffic(streams, Path(folder))
        try:
            rounds = [_round(off, on) for _ in range(1 + NUM_ROUNDS)][1:]
        finally:
            on.close()
    offs, added, others = zip(*rounds, strict=True)
    return EventCost(
        streams,
        median(offs),
        median(added),
        (min(added), max(added)),
        median(others),
        streams * (_PROMPT + _ANSWER) / _ANSWER / BLOCK_SIZE,
    )


def _round(off: _Traffic, on: _Traffic) -> tuple[float, float, float]:
    """µs of CPU time per step: of this thread without events, what events add to it, and of all others. Both kinds have the same
    requests in the same steps; of these, those that differ most and least are left out, for something came between them."""
    off_s, added_s = [], []
    own_started, all_started = time.thread_time(), time.process_time()
    for number in range(_NUM_STEPS):
        seconds = {engine: engine.step() for engine in ((off, on) if number % 2 else (on, off))}  # the first is slower
        off_s.append(seconds[off])
        added_s.append(seconds[on] - seconds[off])
        time.sleep(_PAUSE_S)
        on.receive()
    others_s = time.process_time() - all_started - (time.thread_time() - own_started)
    return 1e6 * _trimmed_mean(off_s), 1e6 * _trimmed_mean(added_s), 1e6 * others_s / _NUM_STEPS


def _trimmed_mean(values: Sequence[float]) -> float:
    num_left_out = round(_LEFT_OUT * len(values))
    return mean(sorted(values)[num_left_out : len(values) - num_left_out])


class _Traffic:
    """An engine whose requests are followed by others as they end."""

    def __init__(self, streams: int, folder: Path | None) -> None:
        kv_events = KVEventsConfig()
        if folder is not None:
            kv_events = KVEventsConfig(enable_kv_cache_events=True, kv_events_endpoint=f"ipc://{folder}/kv")
        self._engine, _ = engine_over(
            CountingDevice(streams),
            SchedulerConfig(max_num_seqs=streams),
            GraphConfig(),
            num_kv_blocks=2 + _CACHE * streams * (_PROMPT + _ANSWER) // BLOCK_SIZE,
            max_model_len=_PROMPT + _ANSWER,
            create_scheduler=Scheduler,
            kv_events=kv_events,
        )
        self._subscriber = None if folder is None else _subscribe(f"ipc://{folder}/kv")
        self._prompts = _prompts()
        self._num_added = 0
        for number in range(streams):  # of different lengths, so that they end in different steps
            self._add(1 + number * _ANSWER // streams)
        for _ in range(2 * _ANSWER):
            self.step()

    def step(self) -> float:
        """Seconds of this thread's CPU time that a step took."""
        started = time.thread_time()
        updates = self._engine.step()
        seconds = time.thread_time() - started
        for update in updates:
            if update.finish_reason is not None:
                self._add(_ANSWER)
        return seconds

    def receive(self) -> None:
        """Take what was published."""
        while self._subscriber is not None and self._subscriber.poll(0):
            self._subscriber.recv_multipart()

    def close(self) -> None:
        self._engine.shutdown()
        if self._subscriber is not None:
            self._subscriber.context.destroy(linger=0)

    def _add(self, answer_len: int) -> None:
        self._num_added += 1
        params = SamplingParams(max_tokens=answer_len, ignore_eos=True)
        self._engine.add_request(str(self._num_added), next(self._prompts), params)


def _subscribe(endpoint: str):  # type: ignore[no-untyped-def]  # of a package that may not be there
    try:
        import zmq
    except ImportError as error:
        raise ConfigError(f"events are published with pyzmq ({error}); run: pip install 'stepgraph[server]'") from error
    socket = zmq.Context().socket(zmq.SUB)
    socket.subscribe("")
    socket.connect(endpoint)
    return socket


def _prompts() -> Iterator[list[int]]:
    generator = np.random.default_rng(0)
    while True:
        yield generator.integers(VOCAB_SIZE, size=_PROMPT).tolist()

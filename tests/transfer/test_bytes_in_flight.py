"""Blocks that change hands while they are copied: no answer is made of them. Each guard is also taken away, which must show."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from engine_pairs import ONE_TOKEN, World, failures, go_on
from faults import Change, without
from safetensors.torch import load_file, save_file

from stepgraph.engine.engine import Engine
from stepgraph.engine.request import Request
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.transfer import mover
from stepgraph.transfer.fetch import RemoteFetch
from stepgraph.transfer.leases import Leases
from stepgraph.transfer.messages import Filled, Hello, Lost, Message, Renew
from stepgraph.transfer.shared_memory import _MappedMemory

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
LONG = replace(GREEDY, max_tokens=40)
NUM_BLOCKS = 65
PROMPT = tuple(i * i % 251 + 1 for i in range(200))
FILLING = [tuple((i * (n + 5) + n) % 241 + 1 for i in range(420)) for n in range(3)]
"""They take more blocks than there are."""


@pytest.fixture(scope="module")
def small(tiny_model) -> Iterator[World]:
    """Two engines with few blocks."""
    made = World(tiny_model, num_kv_blocks=NUM_BLOCKS)
    yield made
    made.close()


class Held:
    """A mover that stops after the first layer it copies."""

    def __init__(self) -> None:
        self.has_stopped, self._goes_on = threading.Event(), threading.Event()
        self._num_copies = 0

    def stop(self) -> None:
        self._num_copies += 1
        if self._num_copies == 2:
            self.has_stopped.set()
            assert self._goes_on.wait(60)

    def go_on(self) -> None:
        self._goes_on.set()


@contextmanager
def held(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """Inside, the engine copies layer by layer, and stops."""
    mine, held = engine.transfers._cache.movers._mover, Held()
    right = mine._copy

    def copy(copies) -> None:
        held.stop()
        right(copies)

    with monkeypatch.context() as patch:
        patch.setattr(mover, "_LAYERS_AT_ONCE", 1)
        patch.setattr(mine, "_copy", copy)
        try:
            yield held
        finally:
            held.go_on()


def deaf_to_losses(is_deaf: Callable[[], bool]) -> Change:
    """A link on which what is lost is not heard, for a while."""
    return lambda message: () if isinstance(message, Lost) and is_deaf() else (message,)


def rewrite(engine: Engine, salt: str) -> list[Request]:
    """Have every free block written by other prompts."""
    requests = [
        engine.add_request(f"{salt} {n}", prompt, ONE_TOKEN, cache_salt=salt) for n, prompt in enumerate(FILLING)
    ]
    while any(request.finish_reason is None for request in requests):
        go_on(engine)
    return requests


def stopped(world: World, held: Held, num_source_steps: int | None = None) -> None:
    """Step until the mover has stopped, the source only so often."""
    for _ in range(10**6 if num_source_steps is None else num_source_steps):
        if held.has_stopped.is_set():
            return
        go_on(world.source)
        go_on(world.sink)
    deadline = time.monotonic() + 60
    while not held.has_stopped.is_set():
        assert time.monotonic() < deadline
        go_on(world.sink)


def reused(world: World, monkeypatch: pytest.MonkeyPatch, name: str) -> Request:
    """The lease expires while bytes are under way, and its blocks are written for others before they go on."""
    with (
        held(world.sink, monkeypatch) as copies,
        world.tapped(
            to_sink=deaf_to_losses(lambda: not copies._goes_on.is_set()), to_source=without(Renew), timeout_s=3.0
        ),
    ):
        request = world.begin(name, PROMPT, GREEDY)
        stopped(world, copies)
        while world.source.has_work:
            go_on(world.source)
        for _ in range(2):  # it expires, and the time of grace is over
            world.late_s += 1000
            world.source.exchange.reclaim(copies=False)
        rewrite(world.source, name)
        copies.go_on()
        world.run(request)
    return request


def test_a_block_that_was_reused_gives_no_answer(small, monkeypatch, answer) -> None:
    before = failures(small.sink)
    assert reused(small, monkeypatch, "reused").output_token_ids == answer(PROMPT, GREEDY)
    assert {*(failures(small.sink) - before)} <= {"expired", "timeout"}
    small.check_at_rest()


def test_mutant_a_lease_that_confirms_when_it_is_over_is_caught(small, monkeypatch, answer) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Leases, "confirm", lambda self, name, num_blocks: None)

        def expire(self: Leases, name: str) -> None:
            self._free += self._leases.pop(name).blocks

        patch.setattr(Leases, "_expire", expire)
        request = reused(small, monkeypatch, "confirmed too late")
    assert request.output_token_ids != answer(PROMPT, GREEDY)
    small.sink.reset_prefix_cache()
    small.check_at_rest()


def test_a_request_that_ends_while_its_blocks_are_copied_gives_no_answer(small, monkeypatch, answer) -> None:
    before = failures(small.sink)
    with (
        held(small.sink, monkeypatch) as copies,
        small.tapped(to_sink=deaf_to_losses(lambda: not copies._goes_on.is_set()), timeout_s=3.0),
    ):
        request = small.begin("aborted", PROMPT, GREEDY)
        stopped(small, copies, num_source_steps=2)
        assert small.source.abort("aborted") is not None
        rewrite(small.source, "aborted too")
        copies.go_on()
        small.run(request)
    assert request.output_token_ids == answer(PROMPT, GREEDY)
    assert {*(failures(small.sink) - before)} <= {"cancelled", "timeout"}
    small.check_at_rest()


def late(world: World, monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Answer of a request that uses the blocks which it got, while bytes come for one that was given up."""
    with held(world.sink, monkeypatch) as copies, world.tapped():
        world.begin(name, PROMPT, GREEDY)
        stopped(world, copies)
        assert world.sink.abort(name) is not None
        other = world.sink.add_request(f"{name} 2", FILLING[0], LONG, cache_salt=name)
        world.until(lambda: len(other.output_token_ids) >= 2)
        copies.go_on()
        time.sleep(0.05)
        world.run(other)
    return other.output_token_ids


def test_late_bytes_change_nothing_of_others(small, monkeypatch, answer) -> None:
    before = failures(small.sink)
    assert late(small, monkeypatch, "late") == answer(FILLING[0], LONG)
    assert failures(small.sink) - before == {"cancelled": 1}
    small.check_at_rest()


def test_mutant_blocks_that_are_given_away_before_their_writer_has_stopped_are_caught(
    small, monkeypatch, answer
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(RemoteFetch, "done", lambda self: True)
        found = late(small, monkeypatch, "given away")
    assert found != answer(FILLING[0], LONG)
    small.sink.reset_prefix_cache()
    small.check_at_rest()


@contextmanager
def announcing_first(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, sinks hear of a step some time before it begins, as where steps run beside the host."""
    launch = engine.executor.launch

    def launching(plan):
        engine.exchange.launched(engine.executor.runner.num_launched)
        time.sleep(0.05)
        return launch(plan)

    with monkeypatch.context() as patch:
        patch.setattr(engine.executor, "launch", launching)
        yield


def test_no_layer_is_copied_before_it_is_written(small, monkeypatch, answer) -> None:
    with announcing_first(small.source, monkeypatch), small.tapped():
        request = small.begin("announced", PROMPT, GREEDY)
        small.run(request)
    assert request.output_token_ids == answer(PROMPT, GREEDY)
    assert request.num_cached_tokens == 192
    small.check_at_rest()


def test_mutant_copying_what_is_not_written_is_caught(small, monkeypatch, answer) -> None:
    with announcing_first(small.source, monkeypatch), small.tapped(), monkeypatch.context() as patch:
        patch.setattr(_MappedMemory, "has_written", lambda self, rank, signal, step: True)
        request = small.begin("hasty", PROMPT, GREEDY)
        small.run(request)
    assert request.output_token_ids != answer(PROMPT, GREEDY)
    small.sink.reset_prefix_cache()
    small.check_at_rest()


def repeated(message: Message) -> tuple[Message]:
    """One block many times, under the keys of others."""
    if not isinstance(message, Filled):
        return (message,)
    return (replace(message, blocks=message.blocks[:1] * len(message.blocks)),)


def test_mutant_blocks_under_keys_that_are_not_theirs_are_caught(small, answer) -> None:
    with small.tapped(to_sink=repeated):
        request = small.begin("repeated", PROMPT, GREEDY)
        small.run(request)
    assert request.output_token_ids != answer(PROMPT, GREEDY)
    small.sink.reset_prefix_cache()
    small.check_at_rest()


@pytest.fixture
def other_weights(tiny_model, tmp_path) -> str:
    """The same model, trained a little further."""
    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    tensors = load_file(Path(tiny_model) / "model.safetensors")
    tensors["model.layers.0.self_attn.v_proj.weight"] *= 1.5
    save_file(tensors, tmp_path / "model.safetensors")
    return str(tmp_path)


def test_an_engine_with_other_weights_gives_nothing_and_a_mutant_that_takes_it_is_caught(
    small, other_weights, answer
) -> None:
    before = failures(small.sink)
    small.source.update_weights(other_weights)
    model = small.sink.transfers._hello.model
    try:
        with small.tapped():
            request = small.begin("other weights", PROMPT, GREEDY)
            small.run(request)
        assert request.output_token_ids == answer(PROMPT, GREEDY)
        assert failures(small.sink) - before == {"other_model": 1}
        with small.tapped(to_sink=lambda m: (replace(m, model=model) if isinstance(m, Hello) else m,)):
            request = small.begin("taken for ours", PROMPT, GREEDY)
            small.run(request)
        assert request.output_token_ids != answer(PROMPT, GREEDY)
    finally:
        small.source.update_weights(small.sink.config.model.model)
    with small.tapped():
        request = small.begin("the same again", PROMPT, GREEDY)
        small.run(request)
    assert (request.output_token_ids, request.num_cached_tokens) == (answer(PROMPT, GREEDY), 192)
    small.sink.reset_prefix_cache()
    small.check_at_rest()

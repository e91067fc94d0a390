"""Prefixes that the device has no room for come back from host memory."""

import random

import pytest
from fake_transfers import caches_of, scribble
from scheduling import VOCAB, Loop, answer_alone
from tiny import drain, set_run_ahead

from stepgraph.config import EngineConfig
from stepgraph.config.transfer import TransferConfig
from stepgraph.engine import exchange
from stepgraph.engine.request import FinishReason, Request
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import ConfigError
from stepgraph.executor.fake import FakeExecutor

NUM_HOST_BLOCKS = 24


class FakeMoves:
    """Ends when the test says so."""

    def __init__(self, copy, blocks, undo):
        self.num_moved, self.error = 0, None
        self._copy, self._blocks, self._undo, self._is_over = copy, list(blocks), undo, False
        self._is_cancelled = False

    def advance(self) -> None:
        if self._is_over:
            return
        if self._is_cancelled:
            self._undo()
        else:
            self._copy()
            self.num_moved = len(self._blocks)
        self._is_over = True

    def cancel(self) -> None:
        self._is_cancelled = True

    def done(self) -> bool:
        return self._is_over and self._is_cancelled


class FakeHostCopies:
    """See `HostCopies`, of a `Loop`."""

    block_bytes = 1000

    def __init__(self, num_blocks: int):
        self.num_blocks, self.moves, self.is_closed = num_blocks, [], False
        self.content: dict[int, list[dict[int, object]]] = {}
        self.loop: Loop

    def put(self, blocks, host_blocks):
        def copy():
            for block, host_block in zip(blocks, host_blocks, strict=True):
                self.content[host_block] = [
                    {offset: value for (owner, offset), value in cache.items() if owner == block}
                    for cache in caches_of(self.loop)
                ]

        self.moves.append(FakeMoves(copy, blocks, copy))
        return self.moves[-1]

    def get(self, host_blocks, blocks):
        def copy():
            for host_block, block in zip(host_blocks, blocks, strict=True):
                for cache, content in zip(caches_of(self.loop), self.content[host_block], strict=True):
                    cache.update({(block, offset): value for offset, value in content.items()})

        self.moves.append(FakeMoves(copy, blocks, lambda: [scribble(self.loop, block) for block in blocks]))
        return self.moves[-1]

    def close(self) -> None:
        self.is_closed = True

    def advance(self, chance=lambda: True) -> None:
        for moves in self.moves:
            if chance():
                moves.advance()


class Tiered(Loop):
    """An engine with host memory for some blocks."""

    def __init__(self, monkeypatch, num_host_blocks: int = NUM_HOST_BLOCKS, **options):
        self.copies = FakeHostCopies(num_host_blocks)
        self.copies.loop = self
        monkeypatch.setattr(FakeExecutor, "keep_on_host", lambda executor, num_bytes: self.copies)
        super().__init__(transfer=TransferConfig(kv_host_cache_gib=1), **options)
        self.sink, self.tier = self.engine.exchange.sink, self.engine.exchange.sink.tier

    @property
    def held_elsewhere(self) -> set[int]:
        held = set(self.scheduler.blocks._quarantined)
        for fetching in self.sink._fetching.values():
            held |= {*fetching.blocks, *fetching.held}
        return held | set(self.tier._copying.blocks if self.tier._copying else ())

    @held_elsewhere.setter
    def held_elsewhere(self, blocks: set[int]) -> None:
        assert not blocks

    def settle(self, chance=lambda: True) -> None:
        """Run all requests to their end, and copy all that is to be copied."""
        for _ in range(3000):
            if self.engine.has_work:
                self.step()
            else:
                self.engine.prepare()
            self.copies.advance(chance)
            if not self.engine.has_work and not self.engine.exchange.is_active:
                return
        raise AssertionError("it never ends")

    def check_nothing_is_left(self) -> None:
        self.settle()
        assert not self.tier._num_readers
        assert not self.tier._dropped
        assert sorted([*self.tier._free, *self.tier._by_key.values()]) == list(range(self.copies.num_blocks))
        assert self.scheduler.num_free_blocks == self.num_kv_blocks - 1


def prompt_of(number: int, length: int) -> list[int]:
    return [random.Random(number).randrange(1, VOCAB) for _ in range(length)]


@pytest.mark.parametrize("options", [{}, {"run_ahead": 2}, {"num_drafts": (2, 0, 3), "lookahead": 2}, {"window": 9}])
def test_prefixes_that_others_have_pushed_out_come_back(monkeypatch, options) -> None:
    loop = Tiered(monkeypatch, num_host_blocks=64, num_kv_blocks=33, **options)
    for turn in range(2):
        for number in range(6):
            request = loop.add(f"{turn}{number}", prompt_of(number, 33), 5)
            loop.settle()
            assert request.output_token_ids == answer_alone(request, loop.window)
            if turn:
                assert request.num_cached_tokens == 4 * ((33 - max(1, loop.lookahead)) // 4)
    assert loop.tier.num_hits > 0
    loop.check_nothing_is_left()


def test_what_was_wanted_least_recently_makes_room(monkeypatch) -> None:
    loop = Tiered(monkeypatch, num_host_blocks=16, num_kv_blocks=25)
    for number in (0, 1, 0, 2, 3):
        loop.add(f"{number}-{loop.clock.now}", prompt_of(number, 32), 1)
        loop.settle()
    assert loop.tier.num_blocks == 16
    assert loop.tier.num_evictions > 0
    keys = {}
    for number in range(4):
        request = loop.add(f"{number}", prompt_of(number, 32), 1)
        keys[number] = loop.scheduler.prefixes.keys(request, 7)
        loop.engine.abort(f"{number}")
    assert [loop.tier.count(keys[number]) for number in range(4)] == [0, 0, 7, 7]
    loop.check_nothing_is_left()


def test_copies_wait_for_the_results_of_steps_that_write_what_they_read(monkeypatch) -> None:
    loop = Tiered(monkeypatch, run_ahead=2, max_num_seqs=2)
    loop.add("other", 5, 40)
    loop.add("a", 16, 1)
    while not loop.tier._lately:
        loop.step()
    loop.step()
    launched = len(loop.plans)
    while not loop.copies.moves:
        loop.step()
    assert len(loop.plans) - len(loop.in_flight) >= launched - 1
    loop.check_nothing_is_left()


def test_what_is_on_its_way_back_is_not_overwritten(monkeypatch) -> None:
    loop = Tiered(monkeypatch, num_host_blocks=8, num_kv_blocks=21)
    loop.add("a", prompt_of(0, 33), 1)
    loop.settle()
    loop.engine.exchange.sink.tier._lately.clear()
    loop.scheduler.forget_free()
    again = loop.add("again", prompt_of(0, 33), 5)
    loop.step()
    [back] = [moves for moves in loop.copies.moves if not moves.num_moved]
    loop.add("b", prompt_of(1, 33), 1)
    for _ in range(10):
        loop.step()
        loop.copies.moves = [moves for moves in loop.copies.moves if moves is not back]
        loop.copies.advance()
    back.advance()
    loop.settle()
    assert again.num_cached_tokens == 32
    assert again.output_token_ids == answer_alone(again)
    loop.check_nothing_is_left()


def test_an_engine_that_rests_waits_for_copies_that_read_its_memory(monkeypatch) -> None:
    loop = Tiered(monkeypatch)
    loop.add("a", 33, 1)
    while not loop.copies.moves:
        if loop.engine.has_work:
            loop.step()
        else:
            loop.engine.prepare()
    loop.engine.reset_prefix_cache(preempt=True)
    monkeypatch.setattr(exchange, "_PATIENCE_S", 0.01)
    with pytest.raises(ConfigError, match="KV blocks may still be"):
        loop.engine.exchange.rest()
    loop.copies.advance()
    loop.engine.exchange.rest()
    loop.check_nothing_is_left()


@pytest.mark.parametrize("event", ["reset", "preempt", "fail"])
def test_what_is_forgotten_is_forgotten_there_too(monkeypatch, event) -> None:
    loop = Tiered(monkeypatch, num_kv_blocks=17)
    loop.add("a", prompt_of(0, 33), 1)
    loop.settle()
    loop.add("b", prompt_of(1, 50), 1)
    loop.settle()
    again = loop.add("again", prompt_of(0, 33), 5)
    loop.step()
    assert again.awaits_blocks
    if event == "fail":
        loop.copies.moves[-1].error = RuntimeError("the copy engine is tired")
        loop.copies.moves[-1].cancel()
    else:
        loop.engine.reset_prefix_cache(preempt=event == "preempt")
    if event != "reset":
        loop.copies.advance()
        loop.settle()
        assert loop.tier.num_blocks <= 8 + 5
    else:
        assert loop.tier.num_blocks == 0
    loop.settle()
    assert again.output_token_ids == answer_alone(again)
    assert loop.sink.failures == {"reset": {}, "preempt": {"cache_lost": 1}, "fail": {"host_copy": 1}}[event]
    loop.check_nothing_is_left()
    loop.engine.shutdown()
    assert loop.copies.is_closed


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_answers_are_right_and_nothing_is_left(monkeypatch, seed) -> None:
    chance = random.Random(seed)
    loop = Tiered(
        monkeypatch,
        num_host_blocks=chance.choice([20, 40]),
        num_kv_blocks=25,
        max_num_seqs=3,
        run_ahead=chance.randrange(3),
        **chance.choice([{}, {"num_drafts": (2, 0, 3), "lookahead": 2}, {"window": 9}]),
    )
    requests: list[Request] = []
    for number in range(80):
        for _ in range(chance.randrange(6)):
            if loop.engine.has_work:
                loop.step()
            else:
                loop.engine.prepare()
            loop.copies.advance(lambda: chance.random() < 0.5)
        event = chance.random()
        if event < 0.85:
            prompt = prompt_of(chance.randrange(5), chance.choice([9, 24, 40]))
            requests.append(loop.add(f"{number}", prompt, chance.randrange(1, 12), seed=number))
        elif event < 0.95 and requests:
            loop.engine.abort(chance.choice(requests).id)
        else:
            loop.engine.reset_prefix_cache(preempt=chance.random() < 0.5)
    loop.settle(lambda: chance.random() < 0.5)
    for request in requests:
        expected = answer_alone(request, loop.window)
        ended = request.finish_reason is not FinishReason.ABORT
        assert request.output_token_ids == (expected if ended else expected[: len(request.output_token_ids)])
    assert loop.tier.num_hits > 0
    loop.check_nothing_is_left()
    loop.check_nothing_is_held()


# Real copies


@pytest.mark.parametrize("settings", [{}, {"speculative_config": {"method": "mtp", "num_speculative_tokens": 2}}])
def test_answers_from_host_memory_are_those_of_an_engine_without(create_engine, settings) -> None:
    prompts = [[(7 * i + 3 * j) % 251 + 1 for j in range(150)] for i in range(4)]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    plain = create_engine(enable_prefix_caching=False, **settings)
    tiered = create_engine(kv_host_cache_gib=0.01, num_kv_blocks=25, **settings)
    set_run_ahead(tiered, 1)
    for turn in range(2):
        for number, prompt in enumerate(prompts):
            requests = [engine.add_request(f"{turn}{number}", prompt, params) for engine in (plain, tiered)]
            drain(plain)
            drain(tiered)
            while tiered.exchange.is_active:
                tiered.prepare()
            assert requests[1].output_token_ids == requests[0].output_token_ids
            assert requests[1].num_cached_tokens == (144 if turn else 0)
    assert tiered.exchange.sink.tier.num_hits > 0
    tiered.sleep()
    tiered.wake_up()
    assert tiered.exchange.sink.tier.num_blocks == 0
    again = tiered.add_request("again", prompts[-1], params)
    drain(tiered)
    assert again.num_cached_tokens == 0
    assert again.output_token_ids == requests[0].output_token_ids
    for engine in (plain, tiered):
        engine.shutdown()


def test_a_host_cache_that_cannot_be_is_refused(create_engine) -> None:
    with pytest.raises(ConfigError, match="no room for a KV block"):
        create_engine(kv_host_cache_gib=1e-6)
    with pytest.raises(ConfigError, match="enable_prefix_caching is off"):
        EngineConfig.from_settings(kv_host_cache_gib=1, enable_prefix_caching=False)
    for name in ("tensor_parallel_size", "data_parallel_size"):
        with pytest.raises(ConfigError, match=f"{name}=2"):
            EngineConfig.from_settings(**{name: 2}, kv_host_cache_gib=1, enable_expert_parallel=True)

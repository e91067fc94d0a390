"""A subscriber knows exactly what is in the prefix cache, whatever requests do and whatever it misses."""

import random
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import count
from pathlib import Path

import kv_subscriber
import msgspec
import pytest
import zmq
from kv_subscriber import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch, Subscriber, hash_of
from scheduling import VOCAB, Loop
from test_host_tier import Tiered
from test_lockstep import Ranks
from tiny import TINY_SETTINGS, drain, save_tiny_model

from stepgraph.config import EngineConfig
from stepgraph.config.kv_events import KVEventsConfig
from stepgraph.engine import kv_event_wire
from stepgraph.engine.adapters import Adapter
from stepgraph.engine.blocks import BlockPool, root_key
from stepgraph.engine.build import build_engine
from stepgraph.engine.kv_event_wire import salt_digest
from stepgraph.engine.kv_events import Cleared, KVEvents
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import ConfigError

SALTS = (None, "a", "tenant b")
ADAPTER = Adapter(1, "random", b"d" * 32, "sql")
ROOTS = {
    **{None if salt is None else (salt_digest(salt),): root_key(salt) for salt in SALTS},
    ("sql",): root_key(None, ADAPTER.digest),
    ("sql", salt_digest("a")): root_key("a", ADAPTER.digest),
}


class Told:
    """Engines that publish, and who listens to them."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._numbers = folder, count()
        self._open = ExitStack()

    def settings(self, **settings) -> KVEventsConfig:
        number = next(self._numbers)
        where = {
            f"kv_events_{name}": f"ipc://{self._folder}/{number}{name[0]}" for name in ("endpoint", "replay_endpoint")
        }
        return KVEventsConfig(enable_kv_cache_events=True, **where | settings)

    def loop(self, make=Loop, *arguments, settings: KVEventsConfig | None = None, **options):
        loop = make(*arguments, kv_events=settings or self.settings(), **options)
        self._open.callback(loop.engine.shutdown)
        return loop

    def subscriber(self, settings: KVEventsConfig, rank: int = 0, **options) -> Subscriber:
        where = (settings.endpoint.of_rank(rank), settings.replay_endpoint.of_rank(rank))
        subscriber = Subscriber(*(place.replace("*", "127.0.0.1") for place in where), **options)
        self._open.callback(subscriber.close)
        return subscriber

    def close(self) -> None:
        self._open.close()


@pytest.fixture
def told() -> Iterator[Told]:
    with tempfile.TemporaryDirectory() as folder, closing(Told(Path(folder))) as told:
        yield told


def in_cache(pool: BlockPool) -> set[int]:
    return set(map(hash_of, pool._blocks_by_key))


def knows(subscriber: Subscriber, loop: Loop) -> bool:
    tier = getattr(loop, "tier", None)
    on_host = set() if tier is None else set(map(hash_of, tier._by_key))
    return subscriber.content == {"GPU": in_cache(loop.scheduler.blocks), "CPU": on_host}


def traffic(loop: Loop, rng: random.Random, num_steps: int) -> None:
    """Requests that share prefixes, some with salts or an adapter, of which some are ended from outside."""
    for _ in range(num_steps):
        if len(loop.scheduler.requests) < 8 and rng.random() < 0.5:
            family, length = rng.randrange(5), rng.randint(1, 50)
            prompt = [random.Random(family).randrange(1, VOCAB) for _ in range(length)] + [rng.randrange(VOCAB)]
            request = loop.add(
                str(rng.random()), prompt, rng.randint(1, 30), seed=rng.randrange(3), salt=rng.choice(SALTS)
            )
            if rng.random() < 0.3 and request.cache_salt != "tenant b":
                request.adapter = ADAPTER
                request.block_keys.clear()  # which host memory may have been asked for
        if rng.random() < 0.05 and loop.scheduler.requests:
            loop.engine.abort(rng.choice(loop.scheduler.requests).id)
        if rng.random() < 0.03:
            loop.engine.reset_prefix_cache(preempt=rng.random() < 0.3)
        if loop.engine.has_work:
            loop.step()
        if isinstance(loop, Tiered):
            loop.copies.advance(lambda: rng.random() < 0.5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"run_ahead": 2, "num_kv_blocks": 65},
        {"num_drafts": (2, 0, 3), "lookahead": 2, "run_ahead": 1},
        {"window": 9},
        {"tier": True, "run_ahead": 1},
    ],
    ids=lambda options: "-".join(map(str, options)) or "plain",
)
@pytest.mark.parametrize("loss", [0.0, 0.3])
def test_a_subscriber_knows_what_is_in_the_cache(told, monkeypatch, options, loss) -> None:
    settings = told.settings(kv_events_topic="kv@pod@model")
    options = dict(options)
    make = (Tiered, monkeypatch) if options.pop("tier", False) else (Loop,)
    roots = {} if options.get("lookahead") else ROOTS
    subscriber = told.subscriber(settings, topic="kv@", loss=loss, roots=roots)
    loop = told.loop(*make, settings=settings, **options)
    rng = random.Random(7)
    for _ in range(4):
        traffic(loop, rng, 60)
        subscriber.follow(lambda: knows(subscriber, loop))
    assert loop.scheduler.statistics.preemptions > 0 or options.get("num_kv_blocks")
    assert subscriber.topics == {b"kv@pod@model"}
    assert subscriber.ranks == {0}
    assert {type(event) for event in subscriber.events} == {BlockStored, BlockRemoved, AllBlocksCleared}
    if loss:
        assert subscriber.num_lost > 0
        assert subscriber.num_replays > 0
    stored = [event for event in subscriber.events if isinstance(event, BlockStored)]
    assert {event.lora_name for event in stored} == {None, "sql"}
    extra = {tuple(keys) for event in stored for keys in event.extra_keys or () if keys is not None}
    assert extra == {keys for keys in ROOTS if keys is not None}
    kind = ("sliding_window", 9) if options.get("window") else ("full_attention", None)
    assert {(event.kv_cache_spec_kind, event.kv_cache_spec_sliding_window) for event in stored} == {kind}


@pytest.mark.parametrize("forgotten", ["stored", "removed", "cleared", "stored_on_host", "removed_from_host"])
def test_an_event_that_is_not_told_shows(told, monkeypatch, forgotten) -> None:
    monkeypatch.setattr(kv_subscriber, "DEADLINE_S", 0.3)
    settings = told.settings()
    subscriber = told.subscriber(settings)
    loop = told.loop(Tiered, monkeypatch, settings=settings, num_host_blocks=8)
    monkeypatch.setattr(KVEvents, forgotten, lambda *_: None)

    def go_on() -> None:
        rng = random.Random(7)
        for _ in range(8):
            traffic(loop, rng, 20)
            subscriber.follow(lambda: knows(subscriber, loop))

    with pytest.raises(AssertionError):
        go_on()


@pytest.mark.parametrize("part", [1, 7])
def test_a_whole_cache_is_told_in_parts_as_far_as_there_are_numbers(told, monkeypatch, part) -> None:
    monkeypatch.setattr(kv_event_wire, "_PART", part)
    settings = told.settings(kv_events_buffer_steps=1)
    loop, early = told.loop(settings=settings, num_kv_blocks=65), told.subscriber(settings)
    traffic(loop, random.Random(5), 100)
    early.follow(lambda: knows(early, loop))
    for first in range(early.last):
        late = told.subscriber(settings, roots=ROOTS if first == 0 else None)
        numbers = late.ask(first)
        assert knows(late, loop)
        assert numbers == list(range(numbers[0], early.last + 1))
        assert first <= numbers[0]
        assert first or len(numbers) > 2
        late.close()


@pytest.mark.parametrize("buffer_steps", [10_000, 3, 1])
def test_who_comes_late_hears_all_by_replay(told, monkeypatch, buffer_steps) -> None:
    settings = told.settings(kv_events_buffer_steps=buffer_steps)
    loop = told.loop(Tiered, monkeypatch, settings=settings, num_kv_blocks=65)
    early = told.subscriber(settings)
    for turn in range(8):
        traffic(loop, random.Random(turn), 20)
        early.follow(lambda: knows(early, loop))
    loop.add("last", 30)
    loop.settle()
    early.follow(lambda: knows(early, loop))
    late = told.subscriber(settings, roots=ROOTS)
    numbers = late.ask(0)
    assert knows(late, loop)
    assert late.content["CPU"]
    if buffer_steps == 10_000:
        assert numbers == list(range(early.last + 1))
    else:  # one says what there was before those that are kept
        assert numbers == list(range(early.last - buffer_steps, early.last + 1))
        assert isinstance(late.events[0], AllBlocksCleared)
    traffic(loop, random.Random(8), 60)
    late.follow(lambda: knows(late, loop))


def test_a_replay_is_of_what_was_asked_for(told) -> None:
    settings = told.settings()
    loop, subscriber = told.loop(settings=settings), told.subscriber(settings)
    traffic(loop, random.Random(1), 100)
    subscriber.follow(lambda: knows(subscriber, loop))
    last = subscriber.last
    assert subscriber.ask(last - 2) == [last - 2, last - 1, last]
    assert subscriber.ask(last + 1) == []
    assert subscriber.ask(1 << 63) == []
    for nonsense in ([b"", b"1"], [b"x", bytes(8)], [bytes(8)], [b"", bytes(8), b""]):
        subscriber.replay.send_multipart(nonsense)
    assert subscriber.ask(last) == [last]


def test_clients_that_ask_as_vllms_example_does_are_answered(told) -> None:
    settings = told.settings()
    told.loop(settings=settings)
    with zmq.Context() as context, context.socket(zmq.REQ) as asking:
        asking.connect(settings.replay_endpoint.of_rank(0))
        asking.send((0).to_bytes(8, "big"))
        assert asking.poll(10_000)
        number, payload = asking.recv_multipart()
    assert number == bytes(8)
    batch = msgspec.msgpack.decode(payload)
    assert (len(batch), batch[1:]) == (3, [[{"type": "AllBlocksCleared"}], 0])


def test_an_engine_that_is_started_again_begins_with_nothing(told) -> None:
    settings = told.settings()
    subscriber = told.subscriber(settings)
    first = told.loop(settings=settings)
    rng = random.Random(2)
    while not subscriber.receive(0.02):  # until it is connected: replays alone would not bring the last word
        traffic(first, rng, 60)
    first.add("last", 40)  # whatever the traffic ended with
    first.drain()
    subscriber.follow(lambda: knows(subscriber, first) and subscriber.content["GPU"])
    first.engine.shutdown()
    while subscriber.content["GPU"]:  # it says so itself if it ends by itself
        assert subscriber.receive(kv_subscriber.DEADLINE_S)
    second = told.loop(settings=settings)
    again = told.subscriber(settings)
    second.add("one", 40)
    second.drain()
    again.follow(lambda: knows(again, second) and again.content["GPU"])
    kinds = [type(event) for event in again.events]
    assert kinds[0] is AllBlocksCleared
    assert kinds.count(AllBlocksCleared) == 2


def test_ranks_of_one_engine_have_ports_of_their_own(told) -> None:
    first = free_ports(4)
    settings = KVEventsConfig(
        enable_kv_cache_events=True,
        kv_events_endpoint=f"tcp://*:{first}",
        kv_events_replay_endpoint=f"tcp://127.0.0.1:{first + 2}",
    )
    ranks = told.loop(Ranks, settings=settings)
    for seed in range(12):
        ranks.add(20, 5, seed=seed)
    while ranks.engine.has_work:
        ranks.engine.step()
    for number, scheduler in enumerate(ranks.scheduler.ranks):
        subscriber = told.subscriber(settings, number)
        subscriber.follow(lambda: subscriber.content["GPU"] == in_cache(scheduler.blocks))  # noqa: B023
        assert subscriber.ranks == {number}
        assert subscriber.content["GPU"]


def free_ports(number: int) -> int:
    """The first of so many ports in a row that nobody listens on."""
    for first in range(20_000 + random.randrange(5000), 32_000, number):
        with ExitStack() as sockets:
            try:
                for port in range(first, first + number):
                    sockets.enter_context(socket.create_server(("", port)))
            except OSError:
                continue
            return first
    raise AssertionError("none is free")


def test_an_engine_connects_to_who_listens(told) -> None:
    """As llm-d's has it where one listens for many engines."""
    port = free_ports(1)
    context = zmq.Context()
    listening = context.socket(zmq.SUB)
    listening.subscribe("")
    listening.bind(f"tcp://127.0.0.1:{port}")
    loop = told.loop(settings=told.settings(kv_events_endpoint=f"tcp://127.0.0.1:{port}"))
    found: set[int] = set()
    for number in range(100):
        loop.add(f"{number}", 40)
        loop.drain()
        while listening.poll(20):
            batch = msgspec.msgpack.decode(listening.recv_multipart()[2], type=KVEventBatch)
            found |= {name for e in batch.events if isinstance(e, BlockStored) for name in e.block_hashes}
        if found:
            break
    assert found <= in_cache(loop.scheduler.blocks)
    assert found
    context.destroy(linger=0)


def test_a_subscriber_that_never_reads_harms_nobody(told) -> None:
    settings = told.settings(kv_events_hwm=1, kv_events_buffer_steps=5)
    deaf, loop = told.subscriber(settings), told.loop(settings=settings)
    traffic(loop, random.Random(3), 400)
    loop.drain()
    hearing = told.subscriber(settings)
    hearing.follow(lambda: knows(hearing, loop))
    assert len(loop.engine.exchange._publishers[0]._buffer) == 5
    deaf.follow(lambda: knows(deaf, loop))  # as soon as it does


def test_a_real_engine_tells_of_its_cache_and_of_its_loss(told, tmp_path) -> None:
    settings = told.settings()
    engine = build_engine(
        replace(
            EngineConfig.from_settings(model=save_tiny_model(tmp_path), device="cpu", **TINY_SETTINGS),
            kv_events=settings,
        )
    )
    subscriber = told.subscriber(settings, roots={None: b""})
    pool = engine.scheduler.blocks

    def run(request_id: str) -> None:
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        engine.add_request(request_id, list(range(1, 70)), params)
        drain(engine)
        subscriber.follow(lambda: subscriber.content["GPU"] == in_cache(pool) and subscriber.content["GPU"])

    lost = [engine.reset_prefix_cache, lambda: engine.reset_prefix_cache(preempt=True), lambda: engine.sleep(1)]
    try:
        for number, lose in enumerate(lost):
            run(str(number))
            assert len(subscriber.content["GPU"]) == (69 + 39) // engine.executor.specs.block_size
            lose()
            subscriber.follow(lambda: not subscriber.content["GPU"])
    finally:
        engine.shutdown()


def test_what_is_not_taken_in_time_is_dropped_and_the_cache_told_empty() -> None:
    events = KVEvents(max_queued=3)
    for number in range(10):
        events.removed([bytes([number]) * 32])
    assert events._queue.qsize() <= 4
    assert events.take() == [Cleared()]
    events.removed([bytes(32)])
    assert len(events.take()) == 1
    events.close()
    assert events.take() is None


def test_what_was_noted_before_the_end_is_taken_first() -> None:
    events = KVEvents(max_queued=1000)
    for number in range(600):
        events.removed([number.to_bytes(32, "big")])
    events.close()
    taken = []
    while (some := events.take()) is not None:
        taken += some
    assert [key for event in taken for key in event.keys] == [number.to_bytes(32, "big") for number in range(600)]


def test_salts_are_shown_only_if_that_is_wanted(told) -> None:
    for salts, shown in (("digest", salt_digest("secret")), ("plain", "secret")):
        settings = told.settings(kv_events_salts=salts)
        loop, subscriber = told.loop(settings=settings), told.subscriber(settings)
        loop.add("one", 20, salt="secret")
        loop.drain()
        subscriber.follow(lambda: knows(subscriber, loop) and subscriber.content["GPU"])  # noqa: B023
        (stored, *_) = [event for event in subscriber.events if isinstance(event, BlockStored)]
        assert stored.extra_keys == [[shown], *[None] * (len(stored.block_hashes) - 1)]


def test_salts_and_adapters_that_are_no_text_end_nothing(told) -> None:
    settings = told.settings(kv_events_salts="plain")
    loop, subscriber = told.loop(settings=settings), told.subscriber(settings)
    loop.add("one", 20, salt="a\udc80").adapter = replace(ADAPTER, name="sql\udcff")
    loop.drain()
    subscriber.follow(lambda: knows(subscriber, loop) and subscriber.content["GPU"])
    (stored, *_) = [event for event in subscriber.events if isinstance(event, BlockStored)]
    assert (stored.lora_name, stored.extra_keys[0]) == (r"sql\udcff", [r"sql\udcff", r"a\udc80"])


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_ipv6_is_listened_on(told) -> None:
    first = free_ports(2)
    settings = KVEventsConfig(
        enable_kv_cache_events=True,
        kv_events_endpoint=f"tcp://[::]:{first}",
        kv_events_replay_endpoint=f"tcp://[::1]:{first + 1}",
    )
    told.loop(settings=settings)
    for host, port in (("127.0.0.1", first), ("::1", first), ("::1", first + 1)):
        socket.create_connection((host, port), timeout=10).close()


def test_nothing_is_kept_for_replays_that_nobody_can_ask_for(told) -> None:
    loop = told.loop(settings=told.settings(kv_events_replay_endpoint=None))
    (publisher,) = loop.engine.exchange._publishers
    loop.add("one", 20)
    loop.drain()
    loop.engine.shutdown()
    assert publisher._next_number > 1
    assert not publisher._buffer


def test_a_place_that_is_taken_is_refused(told) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"kv_events_endpoint: tcp://\*:{port} cannot be used"):
            Loop(kv_events=KVEventsConfig(enable_kv_cache_events=True, kv_events_endpoint=f"tcp://*:{port}"))
        with pytest.raises(ConfigError, match="kv_events_replay_endpoint: tcp://"):
            Loop(kv_events=told.settings(kv_events_replay_endpoint=f"tcp://*:{port}"))


def test_without_its_packages_it_is_refused_in_one_sentence(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "stepgraph.engine.kv_event_publisher", raising=False)
    monkeypatch.setitem(sys.modules, "zmq", None)
    with pytest.raises(ConfigError, match=r"needs pyzmq and msgspec.*pip install 'stepgraph\[server\]'"):
        Loop(kv_events=KVEventsConfig(enable_kv_cache_events=True))

"""KVEventPublisher: tells subscribers over ZeroMQ what enters and leaves a prefix cache, and again what they have missed.

A message has three frames, as vLLM's: topic, number of the batch as eight bytes, highest first, and the batch. Two threads of its
own do the work, and the engine's waits for neither: one publishes, one replays. A subscriber that is too slow misses messages
(ZeroMQ drops them), sees that by their numbers, and asks for them.

Replay: a subscriber sends the number of the first batch that it wants and gets all from there on, each as (number, batch), and
then the number -1 with nothing. Instead of batches that are kept no more, it gets some, under the numbers of the last of them,
that say that all is cleared and what was in the cache after those.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

import msgspec
import zmq

from stepgraph.config.kv_events import Endpoint, KVEventsConfig
from stepgraph.engine.kv_event_wire import AllBlocksCleared, CacheContent, EventBatch, WireEvent, Wording
from stepgraph.engine.kv_events import KVEvents
from stepgraph.errors import ConfigError

logger = logging.getLogger(__name__)

_NUMBER_BYTES = 8
_END = (-1).to_bytes(_NUMBER_BYTES, "big", signed=True)
_LAST_WORD_MS = 1000
"""How long the last messages may take to leave."""
_PATIENCE_MS = 5000
"""How long a subscriber may take to make room for the next message of a replay."""


class KVEventPublisher:
    """Binds its sockets at birth, and publishes from `start` to `close`.

    Args:
        config: where, and how much is kept.
        rank: of the cache, among those of all data-parallel ranks of an engine.

    Raises:
        ConfigError: it cannot listen there.
    """

    def __init__(self, config: KVEventsConfig, rank: int) -> None:
        self.rank = config.kv_events_rank + rank
        """Among those of all engines."""
        self._topic = config.kv_events_topic.encode()
        self._context = zmq.Context()
        self._replay: zmq.Socket[bytes] | None = None
        self._publish = self._context.socket(zmq.PUB)
        self._publish.set_hwm(config.kv_events_hwm)
        try:
            _open(self._publish, "kv_events_endpoint", config.endpoint, self.rank)
            if config.replay_endpoint is not None:
                self._replay = self._context.socket(zmq.ROUTER)
                self._replay.setsockopt(zmq.ROUTER_MANDATORY, 1)  # wait for room, and hear of subscribers that are gone
                self._replay.setsockopt(zmq.SNDTIMEO, _PATIENCE_MS)
                _open(self._replay, "kv_events_replay_endpoint", config.replay_endpoint, self.rank, must_bind=True)
        except ConfigError:
            self._context.destroy(linger=0)
            raise
        self._buffer: deque[tuple[int, bytes]] = deque()
        self._most_kept = config.kv_events_buffer_steps
        self._lock = threading.Lock()  # of what is kept
        self._next_number = 0
        self._events: KVEvents | None = None
        self._threads: list[threading.Thread] = []

    def start(self, events: KVEvents, wording: Wording) -> None:
        """Publish what is noted in `events`, put as `wording` says. At first, that there is nothing."""
        self._events, self._wording = events, wording
        self._before = CacheContent(wording)  # as it was before the first batch that is kept
        for name, run in (("publish", self._run_publish), ("replay", self._run_replay)):
            thread = threading.Thread(target=run, name=f"stepgraph-kv-{name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """Say that nothing is in the cache any more, and give the ports back."""
        if self._events is None:
            self._context.destroy(linger=0)
            return
        self._events.cleared()
        self._events.close()
        self._threads[0].join()
        self._context.term()  # which ends the replay
        self._threads[1].join()

    def _run_publish(self) -> None:
        assert self._events is not None
        try:
            # Said again with the first blocks: subscribers connect, or find an engine that was started again, a little later.
            self._send([AllBlocksCleared()])
            is_first = True
            while (noted := self._events.take()) is not None:
                events = self._wording.events(noted)
                self._send([AllBlocksCleared(), *events] if is_first else events)
                is_first = False
        finally:
            self._publish.close(linger=_LAST_WORD_MS)

    def _send(self, events: list[WireEvent]) -> None:
        """The next batch. Never waits: for subscribers that are too slow, ZeroMQ drops it."""
        number, batch = self._next_number, self._encode(events)
        self._next_number += 1
        if self._replay is not None:
            self._keep(number, batch)
        # After that: whoever has received a batch, and asks for those before it, gets it once more.
        self._publish.send_multipart((self._topic, _bytes_of(number), batch))

    def _keep(self, number: int, batch: bytes) -> None:
        """Have a batch at hand for replay."""
        with self._lock:
            self._buffer.append((number, batch))
            if len(self._buffer) > self._most_kept:
                oldest = msgspec.msgpack.decode(self._buffer.popleft()[1], type=EventBatch)
                self._before.take_in(oldest.events)

    def _encode(self, events: list[WireEvent]) -> bytes:
        return msgspec.msgpack.encode(EventBatch(time.time(), events, self.rank))

    def _run_replay(self) -> None:
        socket = self._replay
        if socket is None:
            return
        while True:
            try:
                subscriber, *frames = socket.recv_multipart()
                if len(frames) == 2 and not frames[0] and len(frames[1]) == _NUMBER_BYTES:
                    self._answer(socket, subscriber, int.from_bytes(frames[1], "big"))
                else:
                    logger.warning("a request for replay that is not %d bytes behind an empty frame", _NUMBER_BYTES)
            except zmq.ContextTerminated:
                socket.close(linger=0)
                return
            except zmq.ZMQError as error:  # it is gone, or takes nothing
                logger.warning("a replay of KV events was given up: %s", error)

    def _answer(self, socket: zmq.Socket[bytes], subscriber: bytes, first: int) -> None:
        """Send a subscriber what it has missed."""
        with self._lock:
            kept = list(self._buffer)
            before = self._before.copy() if kept and first < kept[0][0] else None
        if before is not None:
            oldest = kept[0][0]
            num_parts = min(before.num_parts, oldest - first)
            for number, events in enumerate(before.parts(num_parts), oldest - num_parts):
                socket.send_multipart((subscriber, b"", _bytes_of(number), self._encode(events)))
        for number, batch in kept:
            if number >= first:
                socket.send_multipart((subscriber, b"", _bytes_of(number), batch))
        socket.send_multipart((subscriber, b"", _END, b""))


def _bytes_of(number: int) -> bytes:
    return number.to_bytes(_NUMBER_BYTES, "big")


def _open(socket: zmq.Socket[bytes], name: str, endpoint: Endpoint, rank: int, *, must_bind: bool = False) -> None:
    """Listen at an endpoint, or connect to it."""
    address = endpoint.of_rank(rank)
    if "[" in endpoint.prefix:
        socket.setsockopt(zmq.IPV6, 1)
    try:
        if must_bind or endpoint.is_bound:
            socket.bind(address)
        else:
            socket.connect(address)
    except zmq.ZMQError as error:
        raise ConfigError(f"{name}: {address} cannot be used ({error}); choose another", param=name) from error

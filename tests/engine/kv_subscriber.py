"""A router's side of KV events, written from vLLM's structs and not from ours: what is in a cache, by messages alone."""

import hashlib
import random
import time
from array import array
from collections.abc import Callable

import msgspec
import zmq

DEADLINE_S = 20.0


class KVCacheEvent(msgspec.Struct, omit_defaults=True, tag=True):
    pass


class BlockStored(KVCacheEvent):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[list[str] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None


class BlockRemoved(KVCacheEvent):
    block_hashes: list[int]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(KVCacheEvent):
    pass


class KVEventBatch(msgspec.Struct, array_like=True, omit_defaults=True):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


def hash_of(key: bytes) -> int:
    """A block's name, of our key."""
    return int.from_bytes(key[-8:], "big")


class Subscriber:
    """Belongs to one thread.

    Args:
        endpoint, replay: where the engine publishes and replays.
        topic: what it wants of it.
        loss: share of messages that it never sees.
        roots: what chains begin with, by the extra keys of their first block; of others, names are not looked at.
    """

    def __init__(
        self,
        endpoint: str,
        replay: str | None = None,
        topic: str = "",
        *,
        loss: float = 0.0,
        seed: int = 0,
        roots: dict[tuple[str, ...] | None, bytes] | None = None,
    ):
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.SUB)
        self.socket.subscribe(topic)
        self.socket.connect(endpoint)
        self.replay = None
        if replay is not None:
            self.replay = self.context.socket(zmq.DEALER)
            self.replay.connect(replay)
        self.decoder = msgspec.msgpack.Decoder(KVEventBatch)
        self.loss, self.random, self.roots = loss, random.Random(seed), roots or {}
        self.last = -1
        self.content: dict[str, set[int]] = {"GPU": set(), "CPU": set()}
        self.keys: dict[int, bytes] = {}  # by names, of all blocks whose tokens were told
        self.events: list[KVCacheEvent] = []
        self.topics: set[bytes] = set()
        self.ranks: set[int | None] = set()
        self.num_lost = self.num_replays = 0

    def close(self) -> None:
        self.context.destroy(linger=0)

    def receive(self, timeout_s: float) -> bool:
        """Take the next message; False if none comes."""
        if not self.socket.poll(1000 * timeout_s):
            return False
        topic, number, payload = self.socket.recv_multipart()
        self.topics.add(topic)
        assert len(number) == 8
        if self.random.random() < self.loss:
            self.num_lost += 1
        elif int.from_bytes(number, "big") > self.last + 1:
            self.ask()
        else:
            self.take(int.from_bytes(number, "big"), payload)
        return True

    def ask(self, first: int | None = None) -> list[int]:
        """Have everything replayed that was missed, or from a number on. Returns the numbers that came."""
        assert self.replay is not None
        self.num_replays += 1
        first = self.last + 1 if first is None else first
        self.replay.send_multipart((b"", first.to_bytes(8, "big")))
        numbers = []
        while True:
            assert self.replay.poll(1000 * DEADLINE_S), "no end of the replay"
            empty, number, payload = self.replay.recv_multipart()
            assert empty == b""
            if number == (-1).to_bytes(8, "big", signed=True):
                assert payload == b""
                return numbers
            numbers.append(int.from_bytes(number, "big"))
            self.take(numbers[-1], payload)

    def take(self, number: int, payload: bytes) -> None:
        if number <= self.last:
            return
        self.last = number
        batch = self.decoder.decode(payload)
        self.ranks.add(batch.data_parallel_rank)
        assert abs(batch.ts - time.time()) < 1000
        for event in batch.events:
            self.events.append(event)
            if isinstance(event, AllBlocksCleared):
                self.content = {"GPU": set(), "CPU": set()}
            elif isinstance(event, BlockRemoved):
                assert self.content[event.medium] >= set(event.block_hashes), "what was never told is gone"
                self.content[event.medium] -= set(event.block_hashes)
            else:
                assert not self.content[event.medium] & set(event.block_hashes), "told twice"
                self.content[event.medium] |= set(event.block_hashes)
                if event.medium == "GPU":
                    self.check_names(event)

    def check_names(self, event: BlockStored) -> None:
        """A block's name follows from the one before it and its tokens, and from its salt and adapter if it is the first."""
        size = event.block_size
        assert len(event.token_ids) == size * len(event.block_hashes)
        assert len(event.extra_keys) == len(event.block_hashes)
        if event.parent_block_hash is not None:
            before = self.keys.get(event.parent_block_hash)
        else:
            extra = event.extra_keys[0]
            before = self.roots.get(None if extra is None else tuple(extra))
        for place, name in enumerate(event.block_hashes):
            if before is None:
                return
            tokens = array("i", event.token_ids[place * size : (place + 1) * size]).tobytes()
            before = hashlib.sha256(before + tokens).digest()
            assert hash_of(before) == name
            self.keys[name] = before

    def follow(self, is_there: Callable[[], bool]) -> None:
        """Take messages until something is so."""
        deadline = time.monotonic() + DEADLINE_S
        while not is_there():
            assert time.monotonic() < deadline, (self.last, self.content)
            if not self.receive(0.02) and self.replay is not None:
                self.ask()  # what was lost last shows by no later number

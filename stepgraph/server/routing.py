"""Which replica serves a request: by what its prompt finds in the prefix caches, and by load. Pure: no clock, no messages.

Every front has a `Router` and a `LoadEstimate` of each replica to itself. They need not agree: a router knows what its own front
has sent, and prompts that are new to it are sent where the hash of their beginning says, which is the same in all fronts.

Three routers it is like. As in Dynamo's, a replica costs what it has to do less what its prefix cache saves (there as the
engines' events tell, if they send any). As in llm-d's approximate scorer, the caches are not asked: an LRU of what was sent to a
replica stands for its cache. As in SGLang's, affinity ends at a bound on the imbalance, with the same limits: 64 requests, or
half as much again; but it is weighed, not switched on and off: a prompt goes to a busier replica if that spares more than the
difference.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from stepgraph.engine.blocks import root_key
from stepgraph.errors import EngineDeadError
from stepgraph.server.messages import encode

REQUEST_TOKENS = 256
"""An unfinished request is as much load as so many tokens of prompt: about what its row costs the steps of an answer."""
MAX_EXCESS_TOKENS = 64 * REQUEST_TOKENS
"""So much more load than the least loaded replica, or half as much again, a replica may have and still be chosen."""
TOLERANCE_TOKENS = REQUEST_TOKENS
"""Costs that differ by no more are alike, and so are those within a sixteenth of the least load: fronts see the loads at
different moments."""
ADAPTER_TOKENS = 4096
"""What a replica that has a request's LoRA adapter saves: reading it takes as long as so many tokens of prompt, about."""
SPAN_TOKENS = 64
"""Prefixes are compared by so many tokens at a time, or by KV blocks if these are longer."""
MAX_SPANS = 65_536
"""Most that a router remembers of a replica: some 12 MB, for 4 million tokens."""


def choose(loads: Sequence[int | None], saved: Sequence[int], key: bytes) -> int:
    """The replica to send a request to.

    With `least` the lowest load, the load of the one chosen is at most `least + max(MAX_EXCESS_TOKENS, least // 2)`, and at most
    `least` + what it saves beyond the least loaded one + the tolerance, `max(TOLERANCE_TOKENS, least // 16)`.

    Args:
        loads: of each replica, in tokens; None: it takes no requests.
        saved: tokens of work that each is spared by what it keeps.
        key: among replicas that are alike, the same keys are given to the same one.

    Raises:
        EngineDeadError: none takes requests.
    """
    up = [(replica, load) for replica, load in enumerate(loads) if load is not None]
    if not up:
        raise EngineDeadError("no replica of the engine takes requests now")
    least = min(load for _, load in up)
    bound = least + max(MAX_EXCESS_TOKENS, least // 2)
    costs = {replica: load - saved[replica] for replica, load in up if load <= bound}
    worst = min(costs.values()) + max(TOLERANCE_TOKENS, least // 16)
    alike = [replica for replica, cost in costs.items() if cost <= worst]
    most = max(saved[replica] for replica in alike)
    return _by_rendezvous([replica for replica in alike if saved[replica] == most], key)


def _by_rendezvous(replicas: Sequence[int], key: bytes) -> int:
    """The replica with the highest hash beside `key`: if one comes or goes, only its own keys move."""
    if len(replicas) == 1:
        return replicas[0]
    return max(replicas, key=lambda replica: hashlib.sha256(b"%s %d" % (key, replica)).digest())


class Route(NamedTuple):
    """Where a prompt goes."""

    replica: int
    num_cached_tokens: int
    """That the replica has of the prompt, as far as is known here."""


class Router:
    """Remembers what was sent to each replica, and chooses by it. A choice takes the time of hashing the prompt, some
    50 µs for 2,000 tokens.

    Args:
        num_replicas: of the beginning; there may be more later.
        block_size: tokens of the engines' KV blocks, a power of two.
        num_kv_blocks: of one replica, all of which may hold prefixes; 0 if prefixes are not cached.
        max_adapters: LoRA adapters that a replica keeps.
    """

    def __init__(self, num_replicas: int, *, block_size: int, num_kv_blocks: int, max_adapters: int):
        self._span = max(SPAN_TOKENS, block_size)
        self._num_spans = min(num_kv_blocks * block_size // self._span, MAX_SPANS)
        self._max_adapters = max_adapters
        self._prefixes: list[_Recent] = []
        self._adapters: list[_Recent] = []
        for _ in range(num_replicas):
            self.add()

    @property
    def num_replicas(self) -> int:
        """Also those of which nothing is known."""
        return len(self._prefixes)

    def route(
        self,
        prompt_token_ids: Sequence[int],
        loads: Sequence[int | None],
        *,
        salt: str | None = None,
        adapter: str | None = None,
        session: str | None = None,
    ) -> Route:
        """Where to send a prompt; that it gets there is remembered.

        Args:
            prompt_token_ids: a list.
            loads: see `choose`.
            salt: only prompts of the same salt share blocks.
            adapter: folder of a LoRA adapter, whose prompts share blocks with none without it.
            session: names requests that will share a prefix, for the first of them; of a user's making.

        Raises:
            EngineDeadError: no replica takes requests.
        """
        keys, whole = self._keys(prompt_token_ids, salt if adapter is None else f"{adapter}\n{salt or ''}")
        adapter_key = () if adapter is None else (root_key(adapter),)
        found = [prefixes.prefix_len(keys) for prefixes in self._prefixes]
        has_adapter = [adapters.prefix_len(adapter_key) for adapters in self._adapters]
        if session is not None:
            key = root_key(session)
        elif adapter is not None and not any(has_adapter):
            key = root_key(adapter)
        else:  # the shortest beginning that nobody has: what is new after one that everybody has goes different ways
            key = (*keys, whole)[max(found)]
        saved = [
            self._span * num_spans + ADAPTER_TOKENS * num_adapters
            for num_spans, num_adapters in zip(found, has_adapter, strict=True)
        ]
        replica = choose(loads, saved, key)
        route = Route(replica, self._span * found[replica])
        self._prefixes[replica].add(keys)
        self._adapters[replica].add(adapter_key)
        return route

    def add(self) -> int:
        """One more replica, of which nothing is known; returns its number."""
        self._prefixes.append(_Recent(self._num_spans))
        self._adapters.append(_Recent(self._max_adapters))
        return len(self._prefixes) - 1

    def forget(self, replica: int) -> None:
        """What a replica kept is gone: it was started anew, or its prefix cache was emptied."""
        self._prefixes[replica].clear()
        self._adapters[replica].clear()

    def _keys(self, token_ids: Sequence[int], salt: str | None) -> tuple[list[bytes], bytes]:
        """Names of a prompt's beginnings of one, two, … spans, and of all of it."""
        digest, size, keys = hashlib.sha256(root_key(salt)), self._span, []
        end = len(token_ids) - len(token_ids) % size
        with suppress(OverflowError):  # a token of more than 64 bits: the request is refused, wherever it goes
            for first in range(0, end, size):
                digest.update(encode(token_ids[first : first + size]))  # the quickest way from integers to bytes
                keys.append(digest.digest())
            digest.update(encode(token_ids[end:]))
        return keys, digest.digest()


class _Recent:
    """The keys used last, at most `capacity`. With a key of a chain it has all before it: those are always used later."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._keys: OrderedDict[bytes, None] = OrderedDict()  # the least recently used first
        self.clear = self._keys.clear

    def prefix_len(self, chain: Sequence[bytes]) -> int:
        """How many of a chain's first keys are here."""
        return bisect_left(chain, True, key=lambda key: key not in self._keys)

    def add(self, chain: Sequence[bytes]) -> None:
        """Use a chain's keys, the last one first."""
        for key in reversed(chain[: self._capacity]):
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > self._capacity:
            self._keys.popitem(last=False)


class LoadEstimate:
    """What one replica has to do, in tokens of prompt, as far as a front knows: what the replica's last report counts, and what
    the front has sent that the report cannot count yet. A group is the requests of one prompt."""

    def __init__(self) -> None:
        self._reported = 0  # unfinished requests
        self._sent: dict[str, int] = {}  # requests of groups that the engine has not accepted
        self._accepted: dict[str, int] = {}  # likewise, of those it has accepted since its last report
        self._num_unreported = 0
        self._prompts: dict[str, int] = {}  # tokens, of groups without an answer's first token
        self._prompt_tokens = 0

    @property
    def tokens(self) -> int:
        """The load, for `Router.route`."""
        return REQUEST_TOKENS * (self._reported + self._num_unreported) + self._prompt_tokens

    def sent(self, group: str, num_requests: int, num_prompt_tokens: int) -> None:
        """Requests of one prompt go to the replica."""
        self._sent[group] = num_requests
        self._num_unreported += num_requests
        self._prompts[group] = num_prompt_tokens
        self._prompt_tokens += num_prompt_tokens

    def accepted(self, group: str) -> None:
        """The engine has queued them: its next report counts them."""
        if (count := self._sent.pop(group, None)) is not None:
            self._accepted[group] = count

    def began(self, group: str) -> None:
        """An answer's first token has come: the prompt waits no longer."""
        self._prompt_tokens -= self._prompts.pop(group, 0)

    def ended(self, group: str) -> None:
        """They are done, refused or aborted."""
        self.began(group)
        self._num_unreported -= self._sent.pop(group, 0) + self._accepted.pop(group, 0)

    def reported(self, num_unfinished: int) -> None:
        """The replica says how many requests it has, of all fronts: those that run and those that wait."""
        self._reported = num_unfinished
        self._num_unreported -= sum(self._accepted.values())
        self._accepted.clear()

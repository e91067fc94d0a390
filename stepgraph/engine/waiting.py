"""The requests that wait for a slot, in the order in which they are served.

Waiting is bounded. A request can be overtaken, by higher priorities or by short prompts while long ones are limited, by at most
`MAX_OVERTAKEN` later arrivals; then nothing passes it any more. Losing its blocks to a later arrival counts too. So whatever
arrives, it waits for the work of those before it and of a fixed number of others.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterator

from stepgraph.config import SchedulerConfig
from stepgraph.engine.request import Request

MAX_OVERTAKEN = 256
"""Later arrivals that may get a slot before a waiting request does, or take a running one's blocks."""

_POLL_S = 0.001
"""How soon to look again for a request whose grammar is being compiled, or whose blocks are on their way."""


class WaitingLine:
    """Requests by rank, and the gate that lets them enter where prompts are gathered.

    Args:
        config: the insertion policy.
        clock: seconds, monotonic.
    """

    def __init__(self, config: SchedulerConfig, clock: Callable[[], float]):
        self._config, self._clock = config, clock
        self._requests: list[Request] = []  # by rank
        self._priorities: Counter[int] = Counter()
        self._num_arrived = 0
        self._last_arrival = 0.0  # seconds
        self._gathered = 0  # requests that arrived up to this number may enter
        self._num_gathering = 0  # waiting requests beyond it
        self.num_tokens = 0
        """Known of all that wait."""

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        """Highest rank first."""
        return iter(self._requests)

    def arrive(self, request: Request) -> None:
        """Queue a new request, and give it its number."""
        self._num_arrived += 1
        request.arrival = self._num_arrived
        self._last_arrival = self._clock()
        if request.arrived_at is None:  # else another line has handed it over
            request.arrived_at = self._last_arrival
        self._num_gathering += 1
        self.come_back(request)

    def come_back(self, request: Request) -> None:
        """Queue a request that lost its slot, in its old place."""
        insort(self._requests, request, key=rank)
        self._priorities[request.priority] += 1
        self.num_tokens += request.num_known

    def give_up(self, request: Request) -> None:
        """A waiting request has ended."""
        self._remove(request)
        self._num_gathering -= request.arrival > self._gathered

    def enter(self, request: Request) -> None:
        """A waiting request gets a slot; those that it overtakes count it."""
        may_pass_others = len(self._priorities) > 1 or self._config.long_prefill_token_threshold
        self._remove(request)
        if may_pass_others:
            self._count_overtaken(request)

    def may_enter(self, request: Request) -> bool:
        """Whether nothing but room keeps it from running."""
        return not request.is_kept_waiting and request.arrival <= self._gathered

    def must_wait_for_first(self, request: Request) -> bool:
        """Whether the first in line was overtaken so often that nobody else may pass."""
        first = self._requests[0]
        return _is_overdue(first) and request is not first and not first.is_kept_waiting

    def open_gate(self) -> None:
        """Let those that wait enter, if the insertion policy says that it is time."""
        config = self._config
        if config.insertion_policy == "gather":
            waited = self._clock() - self._last_arrival
            if self._num_gathering < config.prefill_gather_size and waited < config.prefill_gather_ms / 1e3:
                return
        self._gathered, self._num_gathering = self._num_arrived, 0

    def seconds_until_one_may_enter(self) -> float | None:
        """How long nobody will be able to enter unless a request arrives; None if one may now."""
        self.open_gate()
        if any(map(self.may_enter, self._requests)):
            return None
        if any(request.is_kept_waiting for request in self._requests):
            return _POLL_S
        return max(0.0, self._last_arrival + self._config.prefill_gather_ms / 1e3 - self._clock())

    def _remove(self, request: Request) -> None:
        self._requests.remove(request)
        self.num_tokens -= request.num_known
        self._priorities[request.priority] -= 1
        if not self._priorities[request.priority]:
            del self._priorities[request.priority]

    def _count_overtaken(self, admitted: Request) -> None:
        arrival, gathered = admitted.arrival, self._gathered
        overdue = []
        for request in self._requests:
            if request.arrival < arrival and request.arrival <= gathered and not request.is_kept_waiting:
                request.overtaken += 1
                if request.overtaken == MAX_OVERTAKEN:
                    overdue.append(request)
        for request in overdue:
            self._requests.remove(request)
            insort(self._requests, request, key=rank)


def rank(request: Request) -> tuple[bool, int, int]:
    """Who comes first: those that were overtaken too often, then by priority and arrival."""
    overdue = _is_overdue(request)
    return not overdue, 0 if overdue else request.priority, request.arrival


def _is_overdue(request: Request) -> bool:
    return request.overtaken >= MAX_OVERTAKEN

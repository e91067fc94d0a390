"""Which engine a front sends a request to, and what it knows of those that are gone."""

import asyncio
from collections import Counter

import pytest
from fronts import PROMPT, READY, Front
from observed import LOAD, service

from stepgraph.config.server import ServerConfig
from stepgraph.errors import EngineDeadError
from stepgraph.server.engine_observer import EngineState, EngineStatus
from stepgraph.server.messages import Failed, Progress
from stepgraph.server.routing import MAX_EXCESS_TOKENS, REQUEST_TOKENS


def test_a_prefix_is_sent_where_it_is_until_that_engine_is_much_busier() -> None:
    front = Front()
    counts, excess = Counter(), 0
    for _ in range(400):
        counts[engine := front.submit(PROMPT * 100)] += 1
        front.begin(engine)
        excess = max(excess, abs(counts[0] - counts[1]))
    assert 8 <= excess <= MAX_EXCESS_TOKENS / REQUEST_TOKENS + 2
    assert min(counts.values()) > 100


def test_other_prompts_are_shared_out() -> None:
    front = Front(4)
    counts = Counter(front.submit([number, *PROMPT]) for number in range(100))
    assert max(counts.values()) - min(counts.values()) <= 2


@pytest.mark.parametrize("named", [{"adapter": "/poet"}, {"session": "talk"}])
def test_first_requests_of_an_adapter_or_a_session_share_an_engine(named) -> None:
    for name in range(6):
        front, others = Front(4), {key: f"{value}{name}" for key, value in named.items()}
        ends = set()
        for number in range(5):
            engine = front.submit([number, name, *PROMPT], **others)
            front.replicas.clients[engine].abort([front.sent[engine][-1].requests[0][0]])
            ends.add(engine)
        assert len(ends) == 1


def test_an_engine_that_is_not_there_gets_nothing_and_its_requests_end() -> None:
    front = Front()
    first = front.submit()
    other = 1 - first
    died = Failed("its process was killed by signal 9", is_users=False)
    front.replicas.on_status(first, EngineStatus(EngineState.RESTARTING, READY, died))
    front.replicas.on_end(first, "the engine stopped: its process was killed by signal 9")
    assert front.replicas.num_unfinished == 1  # that goes to the other one
    assert {front.submit() for _ in range(5)} == {other}
    assert (front.replicas.trouble, front.replicas.capacity) == (None, READY.max_num_seqs)
    assert front.replicas.troubles[other] is None
    assert "killed by signal 9" in front.replicas.troubles[first]
    front.replicas.on_status(other, EngineStatus(EngineState.RESTARTING, READY, died))
    with pytest.raises(
        EngineDeadError, match=r"the engine stopped \(its process was killed by signal 9\) and is being"
    ):
        front.submit()
    front.start(first)
    assert front.submit() == first
    assert front.replicas.capacity == READY.max_num_seqs


def test_what_an_engine_that_dies_gave_no_token_of_is_answered_by_another_once() -> None:
    front = Front(3)
    first = front.submit(adapter="/poet")
    assert front.submit(PROMPT * 2, adapter="/poet") == first
    front.begin(first)
    waiting, begun = front.sent[first]
    moved, failed = (front.generations[message.group] for message in (waiting, begun))
    front.end(first)
    [second] = [number for number, adds in enumerate(front.sent) if waiting in adds and number != first]
    assert not any(begun in adds for number, adds in enumerate(front.sent) if number != first)
    assert front.replicas.num_unfinished == front.replicas.clients[second].num_unfinished == 1
    assert front.replicas.clients[second].load.tokens == REQUEST_TOKENS + len(PROMPT)
    with pytest.raises(EngineDeadError, match="killed by signal 9"):
        asyncio.run(failed.accepted())
    asyncio.run(moved.accepted())
    front.begin(second)
    assert moved.requests[waiting.requests[0][0]].output_token_ids == [5]
    moved.leave()
    assert front.replicas.num_unfinished == 0

    unlucky = front.submit()
    generation = front.generations[front.sent[unlucky][-1].group]
    front.end(unlucky)
    assert front.replicas.num_unfinished == (unlucky != first)
    for number in range(3):
        front.start(number)
    [heir] = [number for number, client in enumerate(front.replicas.clients) if client.num_unfinished]
    front.end(heir)
    assert front.replicas.num_unfinished == 0
    with pytest.raises(EngineDeadError, match="killed by signal 9"):
        asyncio.run(generation.accepted())


def test_the_queue_is_that_of_all_fronts() -> None:
    front = Front(shared=True)
    served = service(ServerConfig(max_queue=3), front.replicas)
    for engine, others in ((0, 2), (1, 1)):
        front.replicas.on_message(engine, Progress([], [], LOAD._replace(num_running=others, num_waiting=0)))
    assert served.fullness is None
    front.submit()
    assert front.replicas.num_everybodys == 4
    front.submit()
    assert served.fullness == "the queue is full: 5 requests run or wait"
    assert front.replicas.num_unfinished == 2

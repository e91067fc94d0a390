"""Engines that compute prompts for others: which prompts, and what becomes of a request when one of the two is gone."""

import asyncio

import pytest
from fronts import PROMPT, Front
from observed import LOAD, service

from stepgraph.config.server import ServerConfig
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import Fault, RequestError
from stepgraph.server.messages import Accepted, Add, Progress, Refused, TokenUpdate
from stepgraph.server.routing import REQUEST_TOKENS, SPAN_TOKENS
from stepgraph.transfer.reference import Offer, Reference

LONG = [*range(1, 257)]
SOURCE, SINK = 0, 1
ROLES = ("prefill", "decode")


def split(roles=ROLES, **options) -> Front:
    return Front(len(roles), roles=roles, accepts=False, min_remote_prefill_tokens=128, **options)


def accept(front: Front, engine: int) -> None:
    front.replicas.on_message(engine, Accepted(front.sent[engine][-1].group))


def finish(front: Front, engine: int) -> None:
    """An engine's last request ends."""
    [(request_id, _)] = front.sent[engine][-1].requests
    front.replicas.on_message(engine, Progress([TokenUpdate(request_id, (5,), "length")], [], LOAD))


def only(adds: list[Add]) -> Add:
    [add] = adds
    return add


def test_a_long_prompt_is_computed_by_one_engine_and_answered_by_another_once_the_first_has_it() -> None:
    front = split()
    assert front.submit(LONG, priority=3, salt="a") == SOURCE
    offered = only(front.sent[SOURCE])
    assert (offered.prompt_token_ids, offered.priority, offered.cache_salt) == (LONG, 3, "a")
    assert [settings["max_tokens"] for _, settings in offered.requests] == [1]
    assert front.sent[SINK] == []
    accept(front, SOURCE)
    asked = only(front.sent[SINK])
    assert (asked.prompt_token_ids, asked.offer) == (LONG, None)
    assert asked.reference == Reference("engine 0", "@socket", 0, offered.offer.lease)
    finish(front, SOURCE)
    accept(front, SINK)
    asyncio.run(front.generations["r0"].accepted())
    assert front.generations["r0"].requests["r0"].output_token_ids == []
    finish(front, SINK)
    assert front.generations["r0"].requests["r0"].output_token_ids == [5]
    assert [client.load.tokens for client in front.replicas.clients] == [REQUEST_TOKENS * 3, REQUEST_TOKENS * 3]
    front.generations["r0"].leave()
    assert front.aborted == [[], []]


def test_leases_have_names_of_their_own() -> None:
    front = split()
    for number in range(8):
        front.submit([number, *LONG])
    assert len({add.offer.lease for add in front.sent[SOURCE]}) == 8


def test_prompts_with_little_that_is_new_are_answered_by_one_engine() -> None:
    front = split()
    assert front.submit(PROMPT) == SINK
    assert only(front.sent[SINK]).reference is None
    assert front.submit(LONG) == SOURCE
    accept(front, SOURCE)
    assert front.submit(LONG + PROMPT) == SINK  # where the longest part of it is by now
    assert len(LONG) % SPAN_TOKENS == 0


def test_prompts_whose_probabilities_are_asked_for_are_answered_by_one_engine() -> None:
    assert split().submit(LONG, params=SamplingParams(prompt_logprobs=1)) == SINK


def test_while_one_of_the_roles_is_missing_the_other_answers_alone() -> None:
    for missing, left in ((SOURCE, SINK), (SINK, SOURCE)):
        front = split()
        front.end(missing)
        assert front.submit(LONG) == left
        assert (only(front.sent[left]).offer, only(front.sent[left]).reference) == (None, None)
        front.start(missing)
        assert front.submit([7, *LONG]) == SOURCE
        assert front.sent[SOURCE][-1].offer is not None


@pytest.mark.parametrize("what", ["refused", "gone"])
def test_an_engine_that_does_not_take_the_prompt_leaves_it_to_the_other(what) -> None:
    front = split()
    front.submit(LONG)
    if what == "gone":
        front.end(SOURCE)
    else:
        fault = Fault.of(RequestError("no"))
        front.replicas.on_message(SOURCE, Refused(only(front.sent[SOURCE]).group, fault))
    assert only(front.sent[SINK]).reference is None
    accept(front, SINK)
    asyncio.run(front.generations["r0"].accepted())
    assert front.replicas.clients[SOURCE].load.tokens == 0


def test_an_engine_that_is_gone_with_a_prompt_it_has_taken_changes_nothing_here() -> None:
    front = split()
    front.submit(LONG)
    accept(front, SOURCE)
    front.end(SOURCE)
    assert only(front.sent[SINK]).reference is not None
    assert front.replicas.num_unfinished == 1
    assert front.replicas.clients[SOURCE].load.tokens == 0


def test_what_nobody_wants_any_more_ends_in_both() -> None:
    front = split()
    front.submit(LONG)
    front.generations["r0"].leave()
    accept(front, SOURCE)
    assert front.sent[SINK] == []
    assert front.aborted[SOURCE] == [name for name, _ in only(front.sent[SOURCE]).requests]
    front.submit(LONG[1:])
    accept(front, SOURCE)
    front.generations["r1"].leave()
    assert front.aborted == [[name for add in front.sent[SOURCE] for name, _ in add.requests], ["r0", "r1"]]
    assert front.replicas.num_unfinished == 0


def test_what_waits_for_an_engine_that_dies_goes_to_another_without_the_blocks() -> None:
    front = split(("prefill", "decode", "decode"))
    front.submit(LONG)
    [first] = [number for number in (1, 2) if front.replicas.clients[number].num_unfinished]
    other = 3 - first
    front.end(first)
    assert only(front.sent[other]).reference is None
    assert front.aborted[SOURCE] == [name for name, _ in only(front.sent[SOURCE]).requests]
    accept(front, SOURCE)
    assert (len(front.sent[first]), len(front.sent[other])) == (0, 1)
    accept(front, other)
    asyncio.run(front.generations["r0"].accepted())


def test_a_router_of_vllms_form_in_front_of_the_server_finds_the_engine_that_does_it() -> None:
    front = split()
    assert front.submit(PROMPT, transfer=Offer()) == SOURCE
    assert front.submit(LONG, transfer=Reference("engine 0", "@socket", 0, "lease")) == SINK


def test_the_queue_is_that_of_the_engines_that_answer() -> None:
    front = split(("prefill", "prefill", "decode"), shared=True)
    assert front.replicas.capacity == front.ready[SINK].max_num_seqs
    served = service(ServerConfig(max_queue=3), front.replicas)
    for engine in (0, 1):
        front.replicas.on_message(engine, Progress([], [], LOAD._replace(num_running=9, num_waiting=9)))
    assert served.fullness is None

"""How much of a request's body is let in, and when that is seen."""

import asyncio
import json
import threading
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from observed import one_engine, service
from pydantic import BaseModel

from stepgraph.config.server import ServerConfig
from stepgraph.errors import RequestError
from stepgraph.server import bodies, chat
from stepgraph.server.app import create_app
from stepgraph.server.bodies import MAX_DEPTH, Bodies, Body, ItemCount
from stepgraph.server.errors import APIError
from stepgraph.server.protocol import ChatRequest

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])) | st.just('\\"[{'),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=12,
)

LISTS = "[" + "[]," * 20_000 + "[]]"


def num_items(value) -> int:
    """Texts, names of fields, lists and objects."""
    if isinstance(value, list):
        return 1 + sum(map(num_items, value))
    if isinstance(value, dict):
        return 1 + len(value) + sum(map(num_items, value.values()))
    return isinstance(value, str)


@settings(max_examples=40, deadline=None)
@given(JSON, st.booleans(), st.lists(st.integers(1, 9), min_size=1))
def test_items_are_counted_as_they_are_however_the_text_is_cut(value, ascii, sizes) -> None:
    content, count, position = json.dumps(value, ensure_ascii=ascii).encode(), ItemCount(10**6, "it"), 0
    while position < len(content):
        size = sizes[position % len(sizes)]
        count.feed(content[position : position + size])
        position += size
    assert count.num_items == num_items(value)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ([""] * 100, "too_many_items"),
        ([[]] * 100, "too_many_items"),
        ({f"f{i}": 1 for i in range(100)}, "too_many_items"),
        ([1] * 900, "too_many_items"),
        (json.loads("[" * 130 + "]" * 130), "nested_too_deep"),
    ],
)
def test_what_is_too_much_is_refused_while_it_arrives(content, code) -> None:
    count, text = ItemCount(99 if code == "too_many_items" else 1000, "it"), json.dumps(content).encode()
    pieces = (bytes([byte]) for byte in text[:-1])  # the end does not come
    with pytest.raises(RequestError) as refused:
        any(map(count.feed, pieces))
    assert (refused.value.param, refused.value.code) == (None, code)


def test_numbers_cost_an_eighth_and_depth_is_not_length() -> None:
    ItemCount(101, "it").feed(json.dumps([1] * 800).encode())
    ItemCount(1000, "it").feed(json.dumps([[["x"]]] * 300).encode())
    ItemCount(1000, "it").feed(b"[" * MAX_DEPTH)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": LISTS}}]}]},
        {"guided_json": LISTS},
        {"structured_outputs": {"json": LISTS}},
        {"structured_outputs": {"structural_tag": LISTS}},
    ],
)
def test_json_in_a_text_is_measured_before_it_is_read(fields) -> None:
    path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
    status, reply, _ = post(path, json.dumps({"prompt": [1]} | fields).encode())
    assert (status, reply["error"]["code"]) == (400, "too_many_items")


def bodies_of(**settings) -> Bodies:
    async def in_thread(work):
        return await asyncio.to_thread(work)

    return Bodies(ServerConfig(**settings), in_thread)


def test_bodies_together_are_bounded_and_small_ones_pass_all_the_same() -> None:
    shared = bodies_of(max_bodies_mib=1, max_body_mib=1)
    large, other, small = Body(shared), Body(shared), Body(shared)
    large.take(bytes(700_000))
    with pytest.raises(APIError, match="max_bodies_mib=1 MiB") as refused:
        other.take(bytes(400_000))
    assert (refused.value.status, refused.value.headers) == (503, {"Retry-After": "1"})
    small.take(bytes(60_000))
    for body in (large, other, small):
        body.release()
        body.release()  # a request's end comes after all else
    assert shared.num_bytes == 0


def test_pieces_of_large_bodies_are_measured_one_to_a_turn_of_the_loop() -> None:
    async def test() -> None:
        shared, turns = bodies_of(), []

        async def receive(body: Body) -> None:
            await body.receive(bytes(100_000))
            turns.append("measured")

        tasks = [asyncio.create_task(receive(Body(shared))) for _ in range(8)]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            turns.append("turn")
        assert "measured, measured" not in ", ".join(turns)
        assert turns.count("measured") == 8

    asyncio.run(test())


class _Numbers(BaseModel):
    numbers: list[int]


class _Request:
    """As much of an HTTP request as is asked."""

    def __init__(self, content: bytes):
        self._content = content
        self.headers = {"content-type": "application/json"}

    async def body(self) -> bytes:
        return self._content


def test_large_bodies_wait_for_each_other_until_they_are_released() -> None:
    content = json.dumps({"numbers": list(range(20_000))}).encode()
    assert len(content) > bodies._LARGE_BYTES

    async def read() -> None:
        shared = bodies_of()
        first, second, small = Body(shared), Body(shared), Body(shared)
        for body in (first, second):
            body.take(content)
        await first.read(_Request(content), _Numbers)
        waiting = asyncio.create_task(second.read(_Request(content), _Numbers))
        assert (await small.read(_Request(b'{"numbers": [1]}'), _Numbers)).numbers == [1]
        await asyncio.sleep(0.01)
        assert not waiting.done()
        first.release()
        assert len((await waiting).numbers) == 20_000
        second.release()

    asyncio.run(read())


def test_a_client_that_leaves_while_it_waits_gives_its_turn_on() -> None:
    content = json.dumps({"numbers": list(range(20_000))}).encode()

    async def read() -> None:
        shared = bodies_of()
        first, gone, last = Body(shared), Body(shared), Body(shared)
        for body in (first, gone, last):
            body.take(content)
        await first.read(_Request(content), _Numbers)
        leaving = asyncio.create_task(gone.read(_Request(content), _Numbers))
        await asyncio.sleep(0.01)
        leaving.cancel()
        gone.release()
        first.release()
        assert len((await last.read(_Request(content), _Numbers)).numbers) == 20_000

    asyncio.run(read())


class Server:
    """A server in this process, to which requests come in pieces."""

    def __init__(self, **settings) -> None:
        self.service = service(ServerConfig(**settings), one_engine())
        self.service._model = SimpleNamespace(
            name="tiny", tokenizer=None, chat_form=None, sampling_defaults={}, longest_token=8
        )
        self.app = create_app(self.service, api_keys=())

    async def post(self, path: str, *pieces: bytes) -> tuple[int, dict, int]:
        """Status, reply, and how many of the pieces were asked for."""
        left, status, reply = list(pieces), 0, b""

        async def receive():
            if not left:
                await asyncio.Event().wait()
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

        async def send(message) -> None:
            nonlocal status, reply
            status, reply = message.get("status", status), reply + message.get("body", b"")

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
        await self.app(scope, receive, send)
        return status, json.loads(reply), len(pieces) - len(left)


def post(path: str, *pieces: bytes, **settings) -> tuple[int, dict, int]:
    async def run():
        server = Server(**settings)
        try:
            found = await server.post(path, *pieces)
            assert server.service.bodies.num_bytes == 0
            return found
        finally:
            server.service.shut_down()

    return asyncio.run(run())


def test_a_body_of_very_many_fields_is_refused_at_its_first_piece() -> None:
    rest = [b",".join(b'"f%d": 1' % (i * 4000 + j) for j in range(4000)) + b"," for i in range(125)]
    status, reply, num_read = post("/v1/chat/completions", b"{", *rest)
    assert (status, reply["error"]["code"]) == (400, "too_many_items")
    assert "more than 32768 texts, lists and objects" in reply["error"]["message"]
    assert num_read < 12


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}] * 64}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 600}]}),
        ("/v1/completions", {"prompt": "x" * 600}),
        ("/v1/responses", {"input": "x" * 600}),
        ("/tokenize", {"messages": [{"role": "user", "content": "x"}] * 64}),
    ],
)
def test_what_cannot_fit_is_refused_before_it_is_rendered_or_tokenised(path, fields) -> None:
    async def run() -> None:
        server = Server()
        server.service._model.tokenizer = object()  # with which nothing can be done, nor with the chat template
        status, reply, _ = await server.post(path, json.dumps(fields).encode())
        assert (status, reply["error"]["code"]) == (400, "context_length_exceeded")
        server.service.shut_down()

    asyncio.run(run())


def test_a_large_body_is_taken_apart_and_prepared_beside_the_loop(monkeypatch) -> None:
    """All that is said of its messages is found out in threads; a small one's fields are read at once."""
    threads = []

    def noted(function):
        def call(*args):
            threads.append(threading.current_thread() is threading.main_thread())
            return function(*args)

        return call

    monkeypatch.setattr(bodies, "_parse", noted(bodies._parse))
    monkeypatch.setattr(chat, "plain_messages", noted(chat.plain_messages))
    for num_messages, in_loop in ((6000, [False, False]), (64, [True, False])):
        threads.clear()
        content = json.dumps({"messages": [{"role": "user", "content": "x"}] * num_messages}).encode()
        status, reply, _ = post("/v1/chat/completions", content)
        assert (status, reply["error"]["code"]) == (400, "context_length_exceeded")
        assert threads == in_loop


def test_a_request_keeps_nothing_of_its_prompt_once_the_engine_has_it() -> None:
    request = ChatRequest(messages=[{"role": "user", "content": "x" * 1000}], unheard_of="y" * 1000, stream=True)
    assert request.ignored() == ["unheard_of"]
    request.let_go()
    assert "x" * 10 not in repr(request)
    assert "y" * 10 not in repr(request)
    assert request.stream

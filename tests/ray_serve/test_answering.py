"""An application in a replica answers requests that come without a connection."""

import asyncio

import pytest

from stepgraph.ray.http import MAX_PIECE_BYTES, Answering, Head, HttpRequest

REQUEST = HttpRequest("POST", "/path", b"a=b", [(b"x", b"y")], b"body")


def start(kind: bytes = b"application/json"):
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]}


def piece(body: bytes):
    return {"type": "http.response.body", "body": body, "more_body": True}


def pieces_of(app, request=REQUEST):
    async def collect():
        return [each async for each in Answering(app).answer(request)]

    return asyncio.run(collect())


def test_a_whole_reply_is_one_piece() -> None:
    async def app(scope, receive, send) -> None:
        assert (scope["method"], scope["path"], scope["query_string"]) == ("POST", "/path", b"a=b")
        content = (await receive())["body"]
        await send(start())
        await send(piece(content * 2))

    assert pieces_of(app) == [Head(200, start()["headers"], b"bodybody")]


def test_a_large_reply_comes_in_pieces_that_ray_takes() -> None:
    content = bytes(range(256)) * (10 * 2**20 // 256)

    async def app(scope, receive, send) -> None:
        await send(start())
        await send(piece(content))

    head, *rest = pieces_of(app)
    assert b"".join([head.content, *rest]) == content
    assert max(map(len, rest)) == MAX_PIECE_BYTES


def test_the_first_piece_of_a_stream_does_not_wait_for_the_second() -> None:
    async def check() -> None:
        go_on = asyncio.Event()

        async def app(scope, receive, send) -> None:
            await send(start(b"text/event-stream"))
            await asyncio.sleep(0)
            await send(piece(b"one"))
            await go_on.wait()
            await send(piece(b"two"))
            await send(piece(b"three"))

        pieces = Answering(app).answer(REQUEST)
        head = await anext(pieces)
        assert head.is_stream
        assert await anext(pieces) == b"one"
        go_on.set()
        assert [each async for each in pieces] == [b"twothree"]

    asyncio.run(check())


def test_whoever_closes_the_stream_leaves() -> None:
    async def check() -> list[str]:
        heard = []

        async def app(scope, receive, send) -> None:
            assert (await receive())["type"] == "http.request"
            await send(start())
            heard.append((await receive())["type"])

        pieces = Answering(app).answer(REQUEST)
        await anext(pieces)
        await pieces.aclose()
        return heard

    assert asyncio.run(check()) == ["http.disconnect"]


@pytest.mark.parametrize("begins", [False, True])
def test_an_application_that_fails_breaks_its_reply_off(begins) -> None:
    async def app(scope, receive, send) -> None:
        if begins:
            await send(start())
        raise KeyError("fault")

    with pytest.raises(KeyError, match="fault"):
        pieces_of(app)

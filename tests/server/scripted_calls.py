"""Conversations whose answers are known, without an engine."""

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx2
from hypothesis import strategies as st
from msgspec import UNSET

from stepgraph.engine.session import AnswerDelta
from stepgraph.server.chat import Gain
from stepgraph.server.pieces import Piece
from stepgraph.server.replies import CompletionTokensDetails, PromptTokensDetails, Usage
from stepgraph.server.sse import EventStream
from stepgraph.server.tool_calls import ToolCallDelta


class ScriptedCall:
    """A `ChatCall` whose answer is known. With `stalls`, it does not end."""

    def __init__(self, gains, error=None, *, stalls=False):
        self._gains = gains
        self._error = error
        self._stalls = stalls
        self.ended = False
        self.generation = SimpleNamespace(kv_transfer_params=UNSET)

    async def gains(self):
        try:
            for gain in self._gains:
                yield gain
            if self._stalls:
                await asyncio.Event().wait()
            if self._error is not None:
                raise self._error
        finally:
            self.ended = True

    def usage(self) -> Usage:
        return Usage(11, 5, 16, PromptTokensDetails(8), CompletionTokensDetails(2))


def gain(reasoning="", content="", calls=(), *, end=None, stop=None, logprobs=None) -> Gain:
    delta = AnswerDelta(0, "", tuple(range(len(logprobs or ()))), logprobs, end, stop)
    return Gain(delta, Piece(reasoning, content, [ToolCallDelta(*call) for call in calls]), end)


async def streamed(reply: Any, timeout_s: float | None = None) -> bytes:
    """The body that a client who stays gets."""
    sent = []

    async def send(message) -> None:
        sent.append(message.get("body", b""))

    async def receive():
        await asyncio.Event().wait()

    await EventStream(reply.events(), failed=reply.failed, request_id="r1", timeout_s=timeout_s)({}, receive, send)
    return b"".join(sent)


class Wire:
    """Gives a vendor's client what it is told to, without a connection.

    Args:
        create_client: the client's class.
        base_url: as that client wants it.
    """

    def __init__(self, create_client, base_url: str):
        self._content = (b"", "")
        self._client = create_client(
            api_key="none",
            base_url=base_url,
            max_retries=0,
            http_client=httpx2.Client(transport=httpx2.MockTransport(self._answer)),
            _strict_response_validation=True,
        )

    def _answer(self, request):
        content, media_type = self._content
        return httpx2.Response(200, content=content, headers={"content-type": media_type})


FRAGMENT = st.text(st.sampled_from('a{"ü\n'), min_size=1, max_size=4)
CALL = st.tuples(st.sampled_from(["f", "g"]), st.lists(FRAGMENT, max_size=3))


@st.composite
def answers(draw):
    """Gains of an answer, and what is in it: reasoning, content, and calls with their arguments."""
    reasoning = draw(st.lists(FRAGMENT, max_size=3))
    written = [("reasoning", text) for text in reasoning]
    content, calls = [], []
    for part in draw(st.lists(FRAGMENT | CALL, max_size=5)):
        if isinstance(part, str):
            content.append(part)
            written.append(("content", part))
            continue
        name, texts = part
        begins_with_text = bool(texts) and draw(st.booleans())
        written.append(("call", (len(calls), name, texts[0] if begins_with_text else "")))
        written += [("call", (len(calls), None, text)) for text in texts[begins_with_text:]]
        calls.append((name, "".join(texts)))
    gains = []
    while written or not gains or draw(st.booleans()):
        size = draw(st.integers(0, 4))
        here, written = written[:size], written[size:]
        joined = ["".join(text for kind, text in here if kind == wanted) for wanted in ("reasoning", "content")]
        gains.append(gain(*joined, [call for kind, call in here if kind == "call"]))
    gains.append(gain(end=draw(st.sampled_from(["stop", "length", "tool_calls", "abort"]))))
    return gains, ("".join(reasoning), "".join(content), calls)


THINKS_TALKS_CALLS = [
    gain("Let me "),
    gain("see."),
    gain(content="One mo"),
    gain(),
    gain(content="ment.", calls=[(0, "weather", "")]),
    gain(calls=[(0, None, '{"place": ')]),
    gain(calls=[(0, None, '"Rome"}'), (1, "weather", "{}")]),
    gain(end="tool_calls"),
]

"""Answers in harmony whose tokens are known, as the server makes text and events of them."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from harmony_model import create_harmony_tokenizer, tokens_of

from stepgraph.engine.chat_template import ChatTemplate
from stepgraph.engine.prompts import TokenizedPrompt
from stepgraph.engine.request import AnsweredRequest, FinishReason
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.session import Session
from stepgraph.server.chat import ChatCall
from stepgraph.server.conversation import ChatForm, ToolUse
from stepgraph.server.generation import Generation, Origin
from stepgraph.server.messages import TokenUpdate
from stepgraph.server.pieces import Piece
from stepgraph.server.protocol import Tool
from stepgraph.server.service import Tally

TOKENIZER = create_harmony_tokenizer()
TOKENS = tokens_of(TOKENIZER)
TOOLS = [Tool(function={"name": name}) for name in ("f", "get_weather")]
OPEN = "<|start|>user<|message|>Hi<|end|><|start|>assistant"
"""Behind which an answer goes on."""


def form_of(calls: str = "auto", reasoning: str = "auto") -> ChatForm:
    return ChatForm.of(ChatTemplate(TOKENIZER), TOKENIZER, tool_call_parser=calls, reasoning_parser=reasoning)


def encoded(text: str) -> list[int]:
    """With special tokens where the text spells them."""
    return TOKENIZER.encode(text, add_special_tokens=False)


def spelled_out(text: str) -> list[int]:
    """Without any."""
    return [token for character in text for token in encoded(character)]


def deltas_of(
    batches: Sequence[Sequence[int]],
    reason: FinishReason,
    look: Callable[[Session], Iterable[Any]] = Session.deltas,
    **params,
) -> list[Any]:
    """What a reader finds who looks after each batch of tokens."""
    request = AnsweredRequest("r", [], SamplingParams(**params))
    if reason is FinishReason.STOP and batches and batches[-1][-1:] in ([TOKENS.return_], [TOKENS.call]):
        request.stop_token = batches[-1][-1]
    session = Session([request], OPEN, TOKENIZER, abort=lambda _: None)
    found = []
    for number, batch in enumerate(batches, 1):
        request.output_token_ids += batch
        session.update("r", batch, reason if number == len(batches) else None)
        found += look(session)
    return found


class Found(NamedTuple):
    """What is in an answer."""

    reasoning: str
    content: str
    calls: list[tuple[str, str]]


def joined(pieces: Sequence[Piece]) -> Found:
    calls: list[tuple[str, str]] = []
    for call in (call for piece in pieces for call in piece.calls):
        if call.name is not None:
            assert call.index == len(calls)
            calls.append((call.name, ""))
        name, arguments = calls[call.index]
        calls[call.index] = (name, arguments + call.arguments)
    return Found("".join(p.reasoning for p in pieces), "".join(p.content for p in pieces), calls)


def parsed(
    batches: Sequence[Sequence[int]],
    *,
    reason: FinishReason = FinishReason.STOP,
    prompt: str = OPEN,
    tools: Sequence[Tool] = TOOLS,
    choice: str | None = None,
    parallel: bool | None = None,
    form: ChatForm | None = None,
    **params,
) -> Found:
    """What is found in an answer that arrives in batches of tokens."""
    parser = (form or form_of()).parser(ToolUse.of(tools, choice, parallel), prompt=prompt, guided=False)
    pieces = []
    for part in (part for delta in deltas_of(batches, reason, **params) for part in delta.parts()):
        special = part.specials[0].token_id if part.specials else None
        pieces.append(parser.feed(part.text, special=special, finish_reason=part.finish_reason))
    return joined(pieces)


class _Engine:
    """Has given all that it will."""

    def abort(self, request_ids, reason) -> None: ...

    def leave(self, generation) -> None: ...


def call_of(text: str, *, prompt: str = OPEN, **params) -> ChatCall:
    """A conversation that is answered with this text, each token an update of its own."""
    tokens = encoded(text)
    origin = Origin("chat", "tiny", "id", None)
    asked = TokenizedPrompt(prompt, encoded(prompt))
    params = SamplingParams(max_tokens=1000, **params)
    generation = Generation(_Engine(), "g", asked, params, TOKENIZER, 0.0, origin, TOKENS[-2:])
    [request] = generation.requests
    form, tools = form_of(), ToolUse.of(TOOLS, None, None)
    call = ChatCall(
        generation,
        [form.parser(tools, prompt=prompt, guided=False)],
        Tally([generation], thinks=form.thinks, speculates=False),
        tools,
    )
    is_ended = tokens[-1] in TOKENS[-2:]
    updates = [TokenUpdate(request, (token,)) for token in tokens[:-1]]
    updates.append(
        TokenUpdate(request, (tokens[-1],), "stop" if is_ended else "length", tokens[-1] if is_ended else None)
    )
    answer = call.gains

    async def gains():
        async def give() -> None:
            for update in updates:
                while generation._updates:  # the reader has not seen the last one
                    await asyncio.sleep(0)
                generation.take(update)

        giving = asyncio.ensure_future(give())
        async for gain in answer():
            yield gain
        await giving

    call.gains = gains
    return call

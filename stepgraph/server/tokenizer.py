"""Endpoints that tokenise for others: a client needs no tokenizer of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from starlette.responses import Response

from stepgraph.engine.prompts import require_tokenizer
from stepgraph.errors import RequestError
from stepgraph.server.conversation import plain_messages
from stepgraph.server.protocol import DetokenizeRequest, TokenizeRequest
from stepgraph.server.replies import Text, TokenizerInfo, Tokens, json_response
from stepgraph.server.service import Service

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def add_tokenizer(app: FastAPI, service: Service) -> None:
    """The routes."""

    @app.post("/tokenize", summary="The tokens of a text or a conversation", tags=["tokenizer"])
    async def tokenize(body: TokenizeRequest, http: Request) -> Response:
        service.choose_model(body.model)
        tokenizer = require_tokenizer(service.model.tokenizer)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("/tokenize takes prompt or messages; give one of them", param="prompt")

        def tokens() -> Tokens:
            if body.prompt is not None:
                prompt = service.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
            else:
                messages = plain_messages(body.messages or ())
                service.check_turns(messages)
                tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
                text = service.chat_form.template.render(messages, tools, **body.rendering())
                prompt = service.encode(text, add_special_tokens=body.add_special_tokens is True)
            ids = prompt.token_ids
            texts = tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
            return Tokens(ids, len(ids), service.max_model_len, texts)

        return json_response(await service.in_thread(tokens))

    @app.get("/tokenizer_info", summary="What is known of the tokenizer, for clients of it", tags=["tokenizer"])
    async def tokenizer_info() -> Response:
        tokenizer = require_tokenizer(service.model.tokenizer)
        return json_response(await service.in_thread(lambda: _describe(tokenizer, service)))

    @app.post("/detokenize", summary="The text of tokens", tags=["tokenizer"])
    async def detokenize(body: DetokenizeRequest, http: Request) -> Response:
        service.choose_model(body.model)
        tokenizer = require_tokenizer(service.model.tokenizer)
        if wrong := next((token for token in body.tokens if not 0 <= token < 2**31), None):
            raise RequestError(
                f"tokens holds {wrong!r:.80}, which is no token id; ids are whole numbers from 0 up", param="tokens"
            )
        return json_response(Text(await service.in_thread(lambda: tokenizer.decode(body.tokens))))


def _describe(tokenizer: PreTrainedTokenizerFast, service: Service) -> TokenizerInfo:
    """What /tokenizer_info says. No path of this machine is in it."""
    template: str = service.chat_form.template.text
    if service.config.chat_template is None and isinstance(tokenizer.chat_template, dict):
        template = tokenizer.chat_template.get("default", "")
    bos = tokenizer.bos_token_id
    return TokenizerInfo(
        tokenizer_class=type(tokenizer).__name__,
        vocab_size=len(tokenizer),
        model_max_length=service.max_model_len,
        bos_token=tokenizer.bos_token,
        bos_token_id=bos,
        eos_token=tokenizer.eos_token,
        eos_token_id=tokenizer.eos_token_id,
        pad_token=tokenizer.pad_token,
        pad_token_id=tokenizer.pad_token_id,
        unk_token=tokenizer.unk_token,
        unk_token_id=tokenizer.unk_token_id,
        special_tokens=list(tokenizer.all_special_tokens),
        add_bos_token=bos is not None and tokenizer.encode("")[:1] == [bos],
        chat_template=template or None,
    )

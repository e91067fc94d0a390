"""What the server answers, as the OpenAI API shapes it. A field that is UNSET is left out; None is null."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType
from starlette.responses import Response

encode_json = msgspec.json.Encoder().encode


def json_response(content: Any, headers: Mapping[str, str] | None = None) -> Response:
    """What was asked, as JSON."""
    return Response(encode_json(content), headers=headers, media_type="application/json")


def ignored_fields(names: Iterable[str]) -> dict[str, str]:
    """The header that names what a request holds and nothing here knows."""
    shown = [ascii(name)[1:-1] for name in names]
    return {"X-Ignored-Fields": ", ".join(shown)[:500]} if shown else {}


class PromptTokensDetails(msgspec.Struct):
    """Part of `Usage`."""

    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct):
    """Part of `Usage`."""

    reasoning_tokens: int = 0
    accepted_prediction_tokens: int | UnsetType = UNSET
    """Proposals of speculative decoding that are part of the answers; left out where there are never any."""
    rejected_prediction_tokens: int | UnsetType = UNSET
    """Those that were verified in vain, likewise."""


class Usage(msgspec.Struct):
    """Tokens of a request: of all its prompts and answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


class CompletionLogprobs(msgspec.Struct):
    """Log-probabilities of a piece of text, one entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """Where each token's text begins: characters from the start of the choice's text."""


class CompletionChoice(msgspec.Struct):
    """An answer to a prompt, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: tuple[int, ...] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: Any = UNSET


class Completion(msgspec.Struct):
    """Of /v1/completions: the whole answer, or a chunk of a stream."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    object: str = "text_completion"
    kv_transfer_params: dict[str, Any] | UnsetType = UNSET
    """See `Generation.kv_transfer_params`; of a stream, with the piece that ends it."""


class TopLogprob(msgspec.Struct):
    """A token that was likely at a position."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    """The token at a position."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """Log-probabilities of an answer's tokens."""

    content: list[TokenLogprob]
    refusal: None = None


class FunctionCall(msgspec.Struct):
    """Which function, and its arguments as JSON text. In a stream, the name comes once and the text in pieces."""

    arguments: str
    name: str | UnsetType = UNSET


class ToolCall(msgspec.Struct):
    """A call the model wants made. In a stream, all but `index` and `function.arguments` come once."""

    function: FunctionCall
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    index: int | UnsetType = UNSET


class ChatMessage(msgspec.Struct):
    """The model's turn, or a piece of it."""

    content: str | UnsetType | None = UNSET
    role: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET
    refusal: UnsetType | None = UNSET


class ChatChoice(msgspec.Struct):
    """An answer to a conversation."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None
    token_ids: tuple[int, ...] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    """A piece of an answer to a conversation."""

    index: int
    delta: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: tuple[int, ...] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct):
    """Of /v1/chat/completions."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: str = "chat.completion"
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: Any = UNSET
    kv_transfer_params: dict[str, Any] | UnsetType = UNSET
    """See `Generation.kv_transfer_params`."""


class ChatChunk(msgspec.Struct):
    """Of a stream of /v1/chat/completions."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    object: str = "chat.completion.chunk"
    kv_transfer_params: dict[str, Any] | UnsetType = UNSET
    """See `Generation.kv_transfer_params`; with the piece that ends the answer."""


class ModelCard(msgspec.Struct):
    """A model that requests can name."""

    id: str
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None
    permission: list[Any] = []
    object: str = "model"


class ModelList(msgspec.Struct):
    """Of /v1/models."""

    data: list[ModelCard]
    object: str = "list"


class Tokens(msgspec.Struct):
    """Of /tokenize."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class Text(msgspec.Struct):
    """Of /detokenize."""

    prompt: str


class TokenizerInfo(msgspec.Struct):
    """Of /tokenizer_info: what a client must know that tokenises here. Tokens are null where the tokenizer has none."""

    tokenizer_class: str
    vocab_size: int
    """Tokens of the vocabulary, added ones included."""
    model_max_length: int
    """Of prompt and answer together, in tokens, as this server limits it."""
    bos_token: str | None
    bos_token_id: int | None
    eos_token: str | None
    eos_token_id: int | None
    pad_token: str | None
    pad_token_id: int | None
    unk_token: str | None
    unk_token_id: int | None
    special_tokens: list[str]
    add_bos_token: bool
    """Whether texts begin with `bos_token`, unless /tokenize is told otherwise."""
    chat_template: str | None

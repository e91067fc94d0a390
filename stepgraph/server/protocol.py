"""What clients may send: the fields of the OpenAI API, and those that vLLM and FastDeploy add.

Types are checked here, values where they are used. A field nobody here knows is ignored, and named in the reply's header
``X-Ignored-Fields``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, model_validator

from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import RequestError
from stepgraph.server.bodies import check_values
from stepgraph.server.forced_calls import FORM_BESIDE_CALLS

T = TypeVar("T")


def is_part(param: str, whole: str) -> bool:
    """Whether a `param` of errors names a field or something in it."""
    return param == whole or param.startswith((f"{whole}.", f"{whole}["))


class _FailFast(FailFast):
    """One that can be part of a union, which before Python 3.14 takes hashable types only."""

    def __hash__(self) -> int:
        return hash(self.fail_fast)


Items = Annotated[list[T], _FailFast()]
"""A list whose first wrong item is the last one looked at: to describe a million of them would take minutes."""


class RequestPart(BaseModel):
    """A request's body, or an object in it. Fields that it does not know are kept."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    def ignored(self) -> list[str]:
        """Names of the fields that nothing here knows."""
        return sorted(self.model_extra or ())

    def spelled(self, param: str) -> str:
        """How the request spells what an error is about, which others know by the name that the engine or LLM has for it."""
        names = self._spellings()
        nearest = max((name for name in names if is_part(param, name)), key=len, default=None)
        return param if nearest is None else names[nearest] + param[len(nearest) :]

    def _spellings(self) -> dict[str, str]:
        """What goes by another name in such requests."""
        return {}


class RequestOptions(RequestPart):
    """Fields of which some are switches or numbers with a default."""

    @model_validator(mode="before")
    @classmethod
    def _null_switches_are_unset(cls, given: Any) -> Any:
        """null leaves a switch or a number at its default, as in the OpenAI API: clients write out all that they could set."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None or not cls._is_plain(name)}

    @classmethod
    def _is_plain(cls, name: str) -> bool:
        field = cls.model_fields.get(name)
        return field is not None and not field.is_required() and field.annotation in (bool, int)


_PROMPTS = frozenset({"messages", "prompt", "input", "system"})
"""Fields of what is to be answered."""


class StreamOptions(RequestOptions):
    """What a stream holds beside the answer."""

    include_usage: bool = Field(False, description="end with a chunk of token counts")
    continuous_usage_stats: bool = Field(False, description="token counts so far in every chunk")


class SamplingFields(RequestOptions):
    """Fields of completions and chats alike. Those that SamplingParams has mean what they mean there."""

    model: str | None = Field(None, description="a name that /v1/models lists; default: the first")
    stream: bool = Field(False, description="send the answer in pieces, as server-sent events")
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, description="0 is greedy")
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = Field(None, description="answers to each prompt")
    seed: int | None = Field(
        None, description="makes random choices repeatable; any whole number of 64 bits, with or without a sign"
    )
    stop: str | Items[str] | None = Field(None, description="texts that end the answer")
    stop_token_ids: Items[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, Any] | None = Field(None, description="token ids, and what to add to their logits")
    bad_words: Items[str] | None = None
    allowed_token_ids: Items[int] | None = None
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = Field(
        None, description="log-probabilities of the prompt's tokens, and of so many likely ones"
    )
    return_token_ids: bool = Field(False, description="token ids of prompt and answers beside their text")
    truncate_prompt_tokens: int | None = Field(None, description="keep only so many of the prompt's last tokens")
    priority: int = Field(0, description="lower runs first")
    cache_salt: str | None = Field(
        None, max_length=1024, description="only requests of the same salt share cached prefixes"
    )
    response_format: dict[str, Any] | None = Field(
        None, description='{"type": "text"}, "json_object", "json_schema" with a json_schema, or "structural_tag"'
    )
    structured_outputs: dict[str, Any] | None = Field(
        None, description="the form of the answer: one of json, regex, choice, grammar, json_object, structural_tag"
    )
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Items[str] | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None
    speculative: dict[str, Any] | None = Field(
        None,
        description='{"num_speculative_tokens": n}: at most n proposals per step, 0 for none; the answer is the same',
    )
    kv_transfer_params: dict[str, Any] | None = Field(
        None,
        description="whether the prompt is computed for another engine to go on with, or was by another one; in vLLM's form, and "
        "given with the answer to the first of the two",
    )
    user: str | None = Field(None, description="without effect")
    metadata: dict[str, Any] | None = Field(None, description="without effect")
    store: bool | None = Field(None, description="without effect: nothing is kept")
    service_tier: str | None = Field(None, description="without effect")
    safety_identifier: str | None = Field(None, description="without effect")
    prompt_cache_key: str | None = Field(
        None,
        description="where there are several engines, new prefixes of the same go to the same one",
    )

    def _spellings(self) -> dict[str, str]:
        return super()._spellings() | {"adapter": "model"} | _form_spellings(self)

    def let_go(self) -> None:
        """Forget what only the prompt was made of: the answer may take long, and much may wait for it."""
        for name in _PROMPTS & type(self).model_fields.keys():
            setattr(self, name, None)
        (self.model_extra or {}).clear()


class CompletionRequest(SamplingFields):
    """/v1/completions."""

    prompt: str | Items[str] | Items[int] | Items[Items[int]] = Field(
        description="text or token ids, one prompt or several"
    )
    max_tokens: int | None = Field(16, description="length of each answer")
    echo: bool = Field(False, description="give the prompt before each answer")
    logprobs: int | None = Field(None, description="log-probabilities of the tokens, and of so many likely ones")
    add_special_tokens: bool = Field(
        True, description="tokens that the model wants around a text, as its tokenizer adds them"
    )
    best_of: int | None = Field(None, description="n, or unset")
    suffix: str | None = Field(None, description="not supported")


class Function(RequestPart):
    """A function the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(RequestPart):
    """A tool the model may use: a function."""

    type: Literal["function"] = "function"
    function: Function


class FunctionName(RequestPart):
    """Part of `NamedToolChoice`."""

    name: str


class FunctionChoice(RequestPart):
    """Makes the model call one function, in the Responses API."""

    type: Literal["function"] = "function"
    name: str


class NamedToolChoice(RequestPart):
    """Makes the model call one function."""

    type: Literal["function"] = "function"
    function: FunctionName


class ChatMessageField(RequestPart):
    """One turn of a conversation."""

    role: str
    content: str | Items[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: Items[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class TemplateFields(RequestOptions):
    """How a conversation goes through the chat template."""

    add_generation_prompt: bool = Field(
        True, description="begin the assistant's turn after the last message; false with continue_final_message"
    )
    continue_final_message: bool = Field(False, description="go on with the last message instead")
    documents: Items[dict[str, Any]] | None = Field(
        None, description='texts to answer from, {"title", "text"} each, for chat templates that show them'
    )
    chat_template: str | None = Field(
        None, description="not supported: a template is a program, and the server runs those that it is started with"
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="further variables of the chat template; also the fields above"
    )

    def rendering(self) -> dict[str, Any]:
        """What these fields say, as `ChatTemplate.render` takes it. A field may also stand in chat_template_kwargs.

        Raises:
            RequestError: it brings a template, gives a field twice with different values, or one of the wrong type.
        """
        variables = dict(self.chat_template_kwargs or {})
        if self.chat_template is not None or "chat_template" in variables:
            raise RequestError(
                "chat_template is not taken from requests, since a template is a program that the server would run; start the "
                "server with --chat-template FILE, or send the rendered prompt to /v1/completions",
                param="chat_template" if self.chat_template is not None else "chat_template_kwargs.chat_template",
            )
        moved = {name: variables.pop(name) for name in _RENDERING if name in variables}
        for name, value in moved.items():
            given = getattr(self, name) if name in self.model_fields_set else None
            if given is not None and value != given:
                raise RequestError(
                    f"{name} is {given!r:.80}, and {value!r:.80} in chat_template_kwargs; give it in one place",
                    param=name,
                )
            if not _fits(name, value):
                raise RequestError(
                    f"{name}={value!r:.80} in chat_template_kwargs must be "
                    f"{'a list of objects' if name == 'documents' else 'true or false'}",
                    param=f"chat_template_kwargs.{name}",
                )
        found = {name: getattr(self, name) for name in _RENDERING} | moved
        if found["continue_final_message"] and "add_generation_prompt" not in self.model_fields_set | moved.keys():
            found["add_generation_prompt"] = False
        return {**found, "variables": variables}

    def _spellings(self) -> dict[str, str]:
        moved = (self.chat_template_kwargs or {}).keys() & set(_RENDERING) - self.model_fields_set
        return super()._spellings() | {name: f"chat_template_kwargs.{name}" for name in moved}


_RENDERING = ("add_generation_prompt", "continue_final_message", "documents")


def _fits(name: str, value: Any) -> bool:
    if name == "documents":
        return isinstance(value, list) and all(isinstance(one, dict) for one in value)
    return isinstance(value, bool)


class ChatRequest(SamplingFields, TemplateFields):
    """/v1/chat/completions."""

    messages: Items[ChatMessageField] = Field(description="the conversation so far")
    max_completion_tokens: int | None = Field(
        None, description="length of each answer; default: what the context holds"
    )
    max_tokens: int | None = Field(None, description="an older name of max_completion_tokens")
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: Items[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = Field(None, description="false: one call at most")
    include_reasoning: bool = Field(True, description="false leaves reasoning_content out")
    reasoning_effort: str | None = Field(None, description="given to the chat template")

    def _spellings(self) -> dict[str, str]:
        older = self.max_completion_tokens is None and self.max_tokens is not None
        names = {"prompt": "messages", "max_tokens": "max_tokens" if older else "max_completion_tokens"}
        choice = self.tool_choice.function if isinstance(self.tool_choice, NamedToolChoice) else self.tool_choice
        called = call_spellings(choice, [tool.function.name for tool in self.tools or ()], ".function.parameters")
        return super()._spellings() | names | {"logprobs": "top_logprobs"} | called


class TokenizeRequest(TemplateFields):
    """/tokenize: a text, or a conversation through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Items[ChatMessageField] | None = None
    tools: Items[Tool] | None = None
    add_special_tokens: bool | None = Field(None, description="default: true for a text, false for a conversation")
    return_token_strs: bool = False

    def _spellings(self) -> dict[str, str]:
        return super()._spellings() | ({} if self.messages is None else {"prompt": "messages"})


class DetokenizeRequest(RequestPart):
    """/detokenize."""

    model: str | None = None
    tokens: Items[int]


class LoadAdapterRequest(RequestOptions):
    """/v1/load_lora_adapter."""

    lora_name: str = Field(description="what requests will give as model")
    lora_path: str = Field(description="folder that PEFT wrote, on the server's machine")
    load_inplace: bool = Field(False, description="replace the adapter of this name, or read it again")


class UpdateWeightsRequest(RequestPart):
    """/update_weights_from_disk."""

    model_path: str = Field(description="folder or .gguf file of the same model, on the server's machine")


class UnloadAdapterRequest(RequestPart):
    """/v1/unload_lora_adapter."""

    lora_name: str


_SAME_NAMES = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "seed",
    "stop",
    "stop_token_ids",
    "min_tokens",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "bad_words",
    "allowed_token_ids",
    "prompt_logprobs",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "speculative",
)


def sampling_params(request: SamplingFields, defaults: Mapping[str, Any], **others: Any) -> SamplingParams:
    """The SamplingParams that a request asks for.

    Args:
        request: what it gives goes before `defaults`.
        defaults: for what it leaves open.
        others: fields that go by another name in requests.

    Raises:
        RequestError: a value outside its range.
    """
    given = {name: value for name in _SAME_NAMES if (value := getattr(request, name)) is not None}
    spec = structured_outputs(request)
    return SamplingParams(**({"structured_outputs": spec} | dict(defaults) | given | others))


def structured_outputs(request: SamplingFields) -> dict[str, Any] | None:
    """The form an answer must have, as SamplingParams takes it, from any of the fields that ask for one."""
    specs: dict[str, dict[str, Any]] = {}
    if request.structured_outputs is not None:
        specs["structured_outputs"] = request.structured_outputs
    for name in _GUIDED:
        if (value := getattr(request, f"guided_{name}")) not in (None, False):
            specs[f"guided_{name}"] = {name: value}
    if request.response_format is not None and (spec := _of_response_format(request.response_format)) is not None:
        specs["response_format"] = spec
    if len(specs) > 1:
        raise RequestError(
            "response_format, structured_outputs and the guided_ fields each ask for a form of the answer; give one of them",
            param=[*specs][-1],
        )
    for spec in specs.values():
        for name in ("json", "structural_tag"):
            if isinstance(text := spec.get(name), str):
                check_values(text, f"structured_outputs.{name}")
    return next(iter(specs.values()), None)


_GUIDED = ("json", "regex", "choice", "grammar", "json_object")


def _form_spellings(request: SamplingFields) -> dict[str, str]:
    """How the field is spelled in which a request asks for the form of its answer."""
    # Where forms are put together with what a model's format has around them, the engine knows them as a structural tag.
    tag = "structured_outputs.structural_tag"
    for name in _GUIDED:
        if getattr(request, f"guided_{name}") not in (None, False):
            return dict.fromkeys(("structured_outputs", f"structured_outputs.{name}", tag), f"guided_{name}")
    if request.response_format is None:
        named = next((name for name in request.structured_outputs or () if name in _GUIDED), None)
        return {} if named is None else {tag: f"structured_outputs.{named}"}
    return {
        "structured_outputs": "response_format",
        "structured_outputs.json": "response_format.json_schema.schema",
        tag: "response_format",
        f"structured_outputs.{FORM_BESIDE_CALLS}": "response_format.json_schema.schema",
    }


def call_spellings(
    choice: str | FunctionName | FunctionChoice | None, names: Sequence[str | None], parameters: str
) -> dict[str, str]:
    """Where the form of an answer comes from if it is made of tools, because the model must call one.

    Args:
        choice: "required", or the function to call.
        names: of the functions.
        parameters: where a tool has the schema of its arguments.
    """
    if choice is None or choice in ("none", "auto"):
        return {}
    place = "tools"
    if not isinstance(choice, str) and choice.name in names:
        place += f"[{names.index(choice.name)}]{parameters}"
    return dict.fromkeys(("structured_outputs", "structured_outputs.json", "structured_outputs.structural_tag"), place)


def _of_response_format(given: dict[str, Any]) -> dict[str, Any] | None:
    kind = given.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind == "json_schema":
        holder = given.get("json_schema")
        schema = holder.get("schema") if isinstance(holder, dict) else None
        if schema is None:
            raise RequestError(
                'response_format of type "json_schema" needs json_schema: {"name": ..., "schema": {...}}',
                param="response_format.json_schema" + (".schema" if isinstance(holder, dict) else ""),
            )
        return {"json": schema}
    if kind == "structural_tag":
        return {"structural_tag": given}
    raise RequestError(
        f"response_format.type={kind!r:.80} is not known; use text, json_object, json_schema or structural_tag",
        param="response_format.type",
    )


def check_one_answer(request: SamplingFields, what: str) -> None:
    """Refuse what an API has no place for whose replies are one answer each, called `what`.

    Raises:
        RequestError: the request asks for it.
    """
    if request.n not in (None, 1):
        raise RequestError(
            f"n={request.n} is not supported: {what} has one answer; send the request several times", param="n"
        )
    for name, is_given in (
        ("prompt_logprobs", request.prompt_logprobs is not None),
        ("return_token_ids", request.return_token_ids),
    ):
        if is_given:
            raise RequestError(f"{name} has no place in {what}; leave it out, or use /v1/chat/completions", param=name)

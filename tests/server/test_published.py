"""The check that all replies of live servers go through refuses what the published schema does not allow."""

import json

import pytest
from published import NotAsPublished, ReplyCheck, check

CHUNK = {
    "id": "chatcmpl-1",
    "created": 1,
    "model": "tiny",
    "choices": [{"index": 0, "delta": {"content": "a"}, "logprobs": None, "finish_reason": None}],
    "object": "chat.completion.chunk",
}
TEXT = {
    "type": "response.output_text.delta",
    "item_id": "msg_1",
    "output_index": 0,
    "content_index": 0,
    "delta": "a",
    "logprobs": [],
}
ERROR = {"error": {"message": "no", "type": "server_error", "param": None, "code": "unavailable"}}


def feed(path: str, *events: object, status: int = 200, media_type: str = "text/event-stream") -> None:
    """A reply as it comes, in pieces that are cut anywhere."""
    found = ReplyCheck(path, status, media_type)
    if media_type == "application/json":
        content = json.dumps(events[0]).encode()
    else:
        content = b"".join(
            b"data: [DONE]\n\n"
            if event == "[DONE]"
            else (f"event: {event['type']}\n" if "type" in event else "").encode()
            + f"data: {json.dumps(event)}\n\n".encode()
            for event in events
        )
    for start in range(0, len(content), 7):
        found.feed(content[start : start + 7])
    found.end()


def without(value: dict, *path: str | int) -> dict:
    """A copy that lacks one field."""
    copy = json.loads(json.dumps(value))
    holder = copy
    for part in path[:-1]:
        holder = holder[part]
    del holder[path[-1]]
    return copy


def test_what_the_schema_asks_for_passes() -> None:
    feed("/v1/chat/completions", CHUNK, CHUNK | {"choices": [], "usage": None, "ours": 1}, "[DONE]")
    feed("/v1/chat/completions", CHUNK, ERROR)
    feed("/v1/chat/completions", ERROR, status=503, media_type="application/json")
    check("ResponseTextDeltaEvent", TEXT | {"sequence_number": 2})


@pytest.mark.parametrize(
    "path",
    [
        ("id",),
        ("object",),
        ("choices",),
        ("choices", 0, "delta"),
        ("choices", 0, "index"),
        ("choices", 0, "finish_reason"),
    ],
    ids=str,
)
def test_a_missing_field_is_caught(path) -> None:
    with pytest.raises(NotAsPublished, match=f"'{path[-1]}' is a required property"):
        check("CreateChatCompletionStreamResponse", without(CHUNK, *path))
    with pytest.raises(NotAsPublished):
        feed("/v1/chat/completions", without(CHUNK, *path), "[DONE]")


@pytest.mark.parametrize("field", [*sorted(TEXT.keys() - {"type"}), "sequence_number"])
def test_a_missing_field_of_an_event_is_caught(field) -> None:
    with pytest.raises(NotAsPublished, match=f"'{field}' is a required property"):
        check("ResponseTextDeltaEvent", without(TEXT | {"sequence_number": 2}, field))


@pytest.mark.parametrize("field", sorted(ERROR["error"]))
def test_a_missing_field_of_an_error_is_caught(field) -> None:
    with pytest.raises(NotAsPublished, match="is a required property"):
        feed("/v1/models", without(ERROR, "error", field), status=401, media_type="application/json")


def test_a_wrong_type_in_a_union_is_told_by_the_member_that_is_meant() -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": {}}
    with pytest.raises(NotAsPublished, match=r"\$.item.arguments: {} is not of type 'string'"):
        check(
            "ResponseOutputItemDoneEvent",
            {"type": "response.output_item.done", "output_index": 0, "sequence_number": 1, "item": call},
        )


@pytest.mark.parametrize(
    ("path", "events", "complaint"),
    [
        ("/v1/chat/completions", [CHUNK], "ends with"),
        ("/v1/chat/completions", ["[DONE]", CHUNK], "comes after the end"),
        ("/v1/chat/completions", [CHUNK | {"type": "chunk"}, "[DONE]"], "has the name chunk"),
        ("/v1/completions", [CHUNK, "[DONE]"], "CompletionChunk"),
        ("/v1/responses", [TEXT | {"sequence_number": 0}], "event 0 of a response"),
        (
            "/v1/responses",
            [{"type": "response.created", "sequence_number": 1, "response": {}}],
            "event 0 of a response",
        ),
        ("/v1/responses", [{"type": "response.created", "sequence_number": 0, "response": {}}], "required property"),
    ],
)
def test_a_stream_out_of_order_is_caught(path, events, complaint) -> None:
    with pytest.raises(NotAsPublished, match=complaint):
        feed(path, *events)

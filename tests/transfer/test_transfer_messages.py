"""Messages arrive as they were sent, and what is none is refused whatever it is."""

import json
import typing
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepgraph.transfer.messages import (
    KEY_BYTES,
    Complete,
    Confirm,
    Filled,
    Hello,
    Message,
    ProtocolError,
    decode,
    encode,
)

KINDS = typing.get_args(Message)
NUMBERS = st.integers(-1, (1 << 63) - 1)
VALUES = {int: NUMBERS, str: st.text(), bool: st.booleans(), tuple[int, ...]: st.lists(NUMBERS).map(tuple)}
VALUES[tuple[str, ...]] = st.lists(st.text()).map(tuple)
FILLED = st.lists(st.tuples(NUMBERS, st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES))).flatmap(
    lambda pairs: st.builds(
        Filled,
        lease=st.text(),
        start=NUMBERS,
        blocks=st.just(tuple(block for block, _ in pairs)),
        keys=st.just(tuple(key.hex() for _, key in pairs)),
        step=NUMBERS,
    )
)


def messages(kind: type) -> st.SearchStrategy:
    hints = typing.get_type_hints(kind)
    return FILLED if kind is Filled else st.builds(kind, **{name: VALUES[hint] for name, hint in hints.items()})


@given(st.one_of(*map(messages, KINDS)))
def test_a_message_arrives_as_it_was_sent(message) -> None:
    assert decode(encode(message)) == message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
)


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_what_is_no_message_is_refused(content) -> None:
    with pytest.raises(ProtocolError):
        decode(content)


@given(st.one_of(*map(messages, KINDS)), st.data())
def test_a_field_of_another_type_is_refused(message, data) -> None:
    given_ = json.loads(encode(message))
    name = data.draw(st.sampled_from([field.name for field in fields(message)]))
    value = data.draw(JSON.filter(lambda value: type(value) is not type(given_[name])))
    given_[name] = value
    with pytest.raises(ProtocolError):
        decode(json.dumps(given_).encode())


@pytest.mark.parametrize(
    "content",
    [
        {"kind": "Complete", "lease": "a"},
        {"kind": "Complete", "lease": "a", "num_blocks": 1, "more": 2},
        {"kind": "Complete", "lease": "a", "num_blocks": True},
        {"kind": "Complete", "lease": "a", "num_blocks": -2},
        {"kind": "Complete", "lease": "a", "num_blocks": 1 << 64},
        {"kind": "Filled", "lease": "a", "start": 0, "blocks": [1], "keys": [], "step": 1},
        {"kind": "Filled", "lease": "a", "start": 0, "blocks": [1], "keys": ["00"], "step": 1},
        {"kind": "Message"},
        {"kind": ["Complete"], "lease": "a", "num_blocks": 1},
        {},
    ],
)
def test_what_is_nearly_a_message_is_refused(content) -> None:
    with pytest.raises(ProtocolError):
        decode(json.dumps(content).encode())


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(ProtocolError):
        decode(b"[" * 100_000)


def test_kinds_have_names_of_their_own() -> None:
    assert len({kind.__name__ for kind in KINDS}) == len(KINDS)
    assert {Hello, Confirm, Complete} < set(KINDS)

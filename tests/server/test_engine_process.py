"""The loop of the engine's process: what one request makes it wait for holds up no other."""

import threading
import time

import pytest
import zmq
from lora_folders import matrices, save_adapter

from stepgraph.errors import EngineDeadError, ModelError
from stepgraph.executor import local
from stepgraph.server.engine_control import EngineControl
from stepgraph.server.engine_process import EngineProcess
from stepgraph.server.messages import (
    Abort,
    AbortAll,
    Accepted,
    Add,
    Beat,
    Progress,
    Refused,
    Sleep,
    Stop,
    UpdateWeights,
    WakeUp,
    decode_from_engine,
    encode,
)

SETTINGS = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}
PROMPT = [5, 6, 7]


class Front:
    """The socket's other end: answers what the engine says with what to do next, until it is told to stop."""

    def __init__(self, first, react):
        self._inbox = [encode(message) for message in first]
        self._react = react
        self.said = []

    def poll(self, timeout_ms, flags) -> bool:
        time.sleep(0.001)
        return bool(self._inbox)

    def recv(self, flags) -> bytes:
        if not self._inbox:
            raise zmq.Again
        return self._inbox.pop(0)

    def send(self, content, flags) -> None:
        message = decode_from_engine(content)
        if not isinstance(message, Beat):
            self.said.append(message)
            self._inbox += [encode(answer) for answer in self._react(message)]

    def tokens(self, request_id: str) -> list[int]:
        updates = [update for message in self.said if isinstance(message, Progress) for update in message.updates]
        return [token for update in updates if update.id == request_id for token in update.token_ids]


def add(name, adapter=None, **options) -> Add:
    return Add(name, [(name, SETTINGS | options.pop("settings", {}))], PROMPT, adapter=adapter, **options)


def ended(message) -> set[str]:
    """Requests of which this is the last word."""
    if isinstance(message, Refused):
        return {message.group}
    updates = message.updates if isinstance(message, Progress) else ()
    return {update.id for update in updates if update.finish_reason is not None}


@pytest.fixture(scope="module")
def create_lora_engine(create_engine):
    return lambda: create_engine(enable_lora=True, max_lora_rank=4)


def test_requests_of_an_adapter_that_is_being_read_wait_and_others_do_not(create_lora_engine, tmp_path, monkeypatch):
    engine, may_read = create_lora_engine(), threading.Event()
    folder, nowhere = save_adapter(tmp_path, matrices(0)), str(tmp_path / "nowhere")
    read = engine.read_adapter

    def slow(wanted):
        assert may_read.wait(60)
        return read(wanted)

    monkeypatch.setattr(engine, "read_adapter", slow)
    left = {"adapted", "other", "nowhere", "plain"}

    def react(message):
        if "plain" in (done := ended(message)):
            may_read.set()
        left.difference_update(done)
        return [] if left else [Stop()]

    adds = [add("adapted", folder), add("gone", folder), add("other", folder), add("nowhere", nowhere), add("plain")]
    front = Front([*adds, Abort(["gone"])], react)
    EngineProcess(engine, front).run()
    order = [name for message in front.said for name in sorted(ended(message))]
    assert order[0] == "plain", "it had to wait for files that are none of its business"
    assert sorted(order) == ["adapted", "nowhere", "other", "plain"]
    [refused] = [message for message in front.said if isinstance(message, Refused)]
    assert (refused.group, refused.error.is_users, refused.error.param) == ("nowhere", True, "adapter")
    assert front.tokens("adapted") == front.tokens("other") != front.tokens("plain")
    assert {message.group for message in front.said if isinstance(message, Accepted)} == {"adapted", "other", "plain"}

    again = Front([add("later", folder)], lambda message: [Stop()] if ended(message) else [])
    may_read.clear()  # it is in memory: nothing is read
    EngineProcess(engine, again).run()
    assert again.tokens("later") == front.tokens("adapted")


def test_a_request_that_waits_for_its_adapter_is_ended_with_all_others(create_lora_engine, tmp_path, monkeypatch):
    engine, may_read = create_lora_engine(), threading.Event()
    folder = save_adapter(tmp_path, matrices(0))
    read = engine.read_adapter
    monkeypatch.setattr(engine, "read_adapter", lambda wanted: may_read.wait(60) and read(wanted))
    left = {"adapted", "later"}

    def react(message):
        if "adapted" in (done := ended(message)):
            may_read.set()
        left.difference_update(done)
        return [] if left else [Stop()]

    front = Front([add("adapted", folder), AbortAll(), add("later", folder)], react)
    threading.Timer(5, may_read.set).start()  # or it would wait for ever where it was not ended
    EngineProcess(engine, front).run()
    reasons = {
        u.id: u.finish_reason for m in front.said if isinstance(m, Progress) for u in m.updates if u.finish_reason
    }
    assert reasons == {"adapted": "abort", "later": "length"}
    assert [message.group for message in front.said if isinstance(message, Accepted)] == ["adapted", "later"]


def test_bad_words_come_as_tokens_and_the_engine_reads_no_tokenizer(create_engine, monkeypatch):
    engine = create_engine()
    free = Front([add("free")], lambda message: [Stop()] if ended(message) else [])
    EngineProcess(engine, free).run()
    first = free.tokens("free")[0]
    monkeypatch.setattr(type(engine.source), "tokenizer", lambda _: pytest.fail("the engine reads the tokenizer"))
    words = {"settings": {"bad_words": ["whatever it is"]}, "bad_words": [[first]]}
    front = Front([add("clean", **words)], lambda message: [Stop()] if ended(message) else [])
    EngineProcess(engine, front).run()
    assert len(front.tokens("clean")) == 4
    assert first not in front.tokens("clean")


def test_an_engine_that_cannot_wake_up_sleeps_on_and_can_be_woken_later(create_engine, monkeypatch):
    engine, announced = create_engine(enable_sleep_mode=True), []
    whole = Front([add("before")], lambda message: [Stop()] if ended(message) else [])
    EngineProcess(engine, whole).run()
    control = EngineControl(engine, announced.append)
    control.obey(Sleep(1, level=2))

    def gone(source):
        raise ModelError("the folder is gone")

    with monkeypatch.context() as patch:
        patch.setattr(type(engine.source), "tensors", gone)
        with pytest.raises(ModelError, match="gone"):
            control.obey(WakeUp(2))
    assert (engine.is_sleeping, engine.has_weights, announced) == (True, False, [Beat(reads=True)] * 2)
    control.obey(WakeUp(3))
    front = Front([add("after")], lambda message: [Stop()] if ended(message) else [])
    EngineProcess(engine, front).run()
    assert front.tokens("after") == whole.tokens("before")


def test_weights_that_turn_out_damaged_leave_the_old_ones(create_engine, tiny_model, monkeypatch):
    engine, damages = create_engine(), [ModelError("a file is damaged")]
    write = local.write

    def write_unless_damaged(update):
        if damages:
            raise damages.pop()
        write(update)

    monkeypatch.setattr(local, "write", write_unless_damaged)
    control = EngineControl(engine, lambda beat: None)
    with pytest.raises(ModelError, match="a file is damaged"):
        control.obey(UpdateWeights(1, tiny_model))
    assert engine.has_weights
    damages += [ModelError("gone, too"), ModelError("a file is damaged")]
    with pytest.raises(EngineDeadError, match=r"a file is damaged\), and the old ones are gone: gone, too"):
        control.obey(UpdateWeights(2, tiny_model))

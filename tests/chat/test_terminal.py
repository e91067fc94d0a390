"""`stepgraph chat` as a user meets it: keys on a real terminal, two sessions of one user."""

import json
import locale
import stat

import pytest
from terminal import CTRL_D, ENTER, TAB, UP, Terminal, pasted
from tiny import save_tiny_model

from stepgraph.chat import reader
from stepgraph.chat.history import History


@pytest.fixture(scope="module")
def talkative(tmp_path_factory) -> list[str]:
    """The command of a chat whose answers take a minute."""
    folder = save_tiny_model(tmp_path_factory.mktemp("talkative"), max_model_len=8192)
    flags = [
        "--device",
        "cpu",
        "--graph-backend",
        "eager",
        "--max-num-seqs",
        "1",
        "--max-num-batched-tokens",
        "64",
        "--stop",
        "XYZZY",
    ]
    return ["chat", folder, *flags]


def ask(terminal: Terminal, keys: str, answered: str) -> None:
    """Type a line, and wait for what ends the reply and for the next prompt."""
    terminal.type(keys + ENTER)
    terminal.wait_for(answered)
    terminal.wait_for("\n> ")


def test_a_history_that_the_locale_has_no_characters_for_costs_entries_and_not_the_session(
    tmp_path, monkeypatch
) -> None:
    readline = pytest.importorskip("readline")
    known = locale.setlocale(locale.LC_CTYPE)
    history = History(tmp_path / "history")
    history.add("où?")
    monkeypatch.setattr(reader, "_readline", lambda: readline)
    monkeypatch.setattr("builtins.input", lambda *_: "là!")
    readline.clear_history()
    locale.setlocale(locale.LC_CTYPE, "C")
    try:
        typed = reader.Reader(history, (), ()).read()
    finally:
        locale.setlocale(locale.LC_CTYPE, known)
        readline.clear_history()
        readline.set_completer(None)
    assert typed.text == "là!"
    assert History(tmp_path / "history").entries == ["où?", "là!"]


def test_two_sessions_at_a_terminal(talkative, tmp_path) -> None:
    saved, state = tmp_path / "talk.json", tmp_path / "state"
    with Terminal(talkative, XDG_STATE_HOME=str(state)) as first:
        first.wait_for(r"8192 tokens of context. Type a message; /help shows what else.\n> ")
        first.type("dropped")
        first.wait_for("dropped")
        first.interrupt("\n> ")  # where something is typed
        ask(first, "/set max_tokens 5", "")
        ask(first, "one", "cut off: max_tokens is 5")
        ask(first, "/set max_tokens none", "")
        first.type("tell me all" + ENTER)
        first.wait_for(r"(?s)all\n.{20}")
        first.interrupt(r"\(stopped\)\n> ")  # in an answer
        ask(first, "/set max_tokens 3", "")
        ask(first, pasted("two\rlines\r"), "cut off")
        ask(first, "/nonsense", "there is no command /nonsense")
        ask(first, f"/sa{TAB}{saved}", "6 messages in ")
        first.type(CTRL_D)
        assert first.wait_for_end() == 0
        assert "Traceback" not in first.screen
        assert "again leaves" not in first.screen
    [one, _, all_, so_far, two, _] = [message["content"] for message in json.loads(saved.read_text())["messages"]]
    assert (one, all_, two) == ("one", "tell me all", "two\nlines")
    assert 0 < len(so_far) < 8000

    assert stat.S_IMODE((state / "stepgraph" / "chat_history").stat().st_mode) == 0o600
    with Terminal([*talkative, "--max-model-len", "64"], XDG_STATE_HOME=str(state)) as second:
        second.wait_for("> ")
        ask(second, UP + UP + UP, "are full; /reset makes room")  # the pasted message; no max_tokens here
        ask(second, "long " * 20, "max_model_len is 64.*The message is left out")
        ask(second, f"/load {saved}", "6 messages from")
        second.interrupt(r"Ctrl-C again leaves.*\n> ")
        second.interrupt(r"\n")
        assert second.wait_for_end() == 130
        assert "Traceback" not in second.screen

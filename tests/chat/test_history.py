import json
import os
import stat

import pytest

from stepgraph.chat.history import MAX_ENTRIES, MAX_ENTRY_BYTES, MAX_FILE_BYTES, History, history_file


def test_the_history_lies_in_the_users_folder_for_state(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_file() == tmp_path / "stepgraph" / "chat_history"
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in ("", "a/relative/folder"):
        monkeypatch.setenv("XDG_STATE_HOME", unset)
        assert history_file() == tmp_path / ".local" / "state" / "stepgraph" / "chat_history"


def test_a_later_session_finds_what_was_typed_and_nobody_else_can_read_it(tmp_path) -> None:
    file = tmp_path / "state" / "stepgraph" / "chat_history"
    history = History(file)
    for entry in ("one", "two\nlines", "two\nlines", "a half \udcff", "one"):
        history.add(entry)
    assert History(file).entries == history.entries == ["one", "two\nlines", "a half \udcff", "one"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    file.chmod(0o644)
    History(file).add("three")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_two_sessions_at_a_time_add_to_one_history(tmp_path) -> None:
    first, second = History(tmp_path / "h"), History(tmp_path / "h")
    first.add("of the first")
    second.add("of the second")
    assert History(tmp_path / "h").entries == ["of the first", "of the second"]


def test_what_is_none_of_ours_is_left_out_and_what_was_cut_off_harms_no_later_entry(tmp_path) -> None:
    file = tmp_path / "h"
    file.write_bytes(b'"one"\n\xff\xfe\n[1]\nplain\n' + b"[" * 100_000 + b'\n"two"\n"cut o')
    history = History(file)
    assert (history.entries, history.trouble) == (["one", "two"], None)
    history.add("three")
    assert History(file).entries == ["one", "two", "three"]


def test_the_file_is_bounded(tmp_path) -> None:
    file = tmp_path / "h"
    file.write_text("".join(f"{json.dumps(f'{i}' * 100)}\n" for i in range(5 * MAX_ENTRIES)))
    assert file.stat().st_size > MAX_FILE_BYTES
    history = History(file)
    assert history.entries == [f"{i}" * 100 for i in range(4 * MAX_ENTRIES, 5 * MAX_ENTRIES)]
    assert len(file.read_text().splitlines()) == MAX_ENTRIES
    history.add("x" * MAX_ENTRY_BYTES)
    assert history.entries[-1] == "x" * MAX_ENTRY_BYTES
    assert len(file.read_text().splitlines()) == MAX_ENTRIES


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "below a file"])
def test_a_file_that_cannot_be_used_costs_the_history_only(kind, tmp_path) -> None:
    file = tmp_path / "h"
    if kind == "a folder":
        file.mkdir()
    elif kind == "a pipe":
        os.mkfifo(file)
    else:
        file.write_text("")
        file = file / "stepgraph" / "chat_history"
    history = History(file)
    history.add("one")
    history.add("two")
    assert history.entries == ["one", "two"]
    assert str(file) in history.trouble

"""A conversation at a keyboard of the test's; `test_terminal.py` has a real one."""

import json
import signal

import pytest
from tiny import TINY_SETTINGS

from stepgraph import LLM, SamplingParams
from stepgraph.chat.conversation import Conversation, said
from stepgraph.chat.history import History
from stepgraph.chat.terminal import Chat

CTRL_C, CTRL_D = KeyboardInterrupt(), EOFError()
SHORT = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_model, device) -> LLM:
    return LLM(tiny_model, progress=False, device=device, **TINY_SETTINGS)


@pytest.fixture
def talk(llm, monkeypatch, capsys):
    """Types lines with Enter, Ctrl-C and Ctrl-D, and Ctrl-D in the end. Gives the chat, the exit code, stdout and stderr."""

    def talk(*keys, system=None, turns=(), params=SHORT, history=None):
        typed = iter([*keys, CTRL_D])

        def ask(prompt=""):
            key = next(typed)
            if isinstance(key, BaseException):
                raise key
            return key

        monkeypatch.setattr("builtins.input", ask)
        chat = Chat(llm, Conversation(system, turns, params), history or History(None))
        code = chat.run()
        return (chat, code, *capsys.readouterr())

    return talk


def answer(llm, *messages, params=SHORT) -> str:
    """Of the model to messages of user and assistant in turn."""
    roles = ("user", "assistant")
    return (
        llm.chat([said(roles[i % 2], text) for i, text in enumerate(messages)], params, use_tqdm=False)[0]
        .outputs[0]
        .text
    )


def texts(chat: Chat) -> list[str]:
    return [turn["content"] for turn in chat._conversation.turns]


def test_answers_go_to_stdout_and_know_what_was_said(llm, talk) -> None:
    first = answer(llm, "Hello.")
    second = answer(llm, "Hello.", first, "And now?")
    chat, code, out, err = talk("Hello.", "", "And now?")
    assert code == 0
    assert out == f"{first}\n{second}\n"
    assert texts(chat) == ["Hello.", first, "And now?", second]
    assert "/help" in err.splitlines()[0]
    assert "tokens of context" in err.splitlines()[0]


def pressing(llm, monkeypatch, at_step: int, presses: int = 1) -> None:
    launch, steps = llm.engine.executor.runner.launch, []

    def press(plan):
        steps.append(plan)
        if len(steps) == at_step:
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)
        return launch(plan)

    monkeypatch.setattr(llm.engine.executor.runner, "launch", press)


@pytest.mark.parametrize("presses", [1, 3])
def test_ctrl_c_stops_the_answer_keeps_it_and_frees_its_request_at_once(llm, talk, monkeypatch, presses) -> None:
    long = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    whole = answer(llm, "Hello.", params=long)
    num_free = llm.engine.scheduler.num_free_blocks
    with monkeypatch.context() as patch:
        pressing(llm, patch, at_step=20, presses=presses)
        chat, code, out, err = talk("Hello.", params=long)
    assert code == 0
    [question, said_so_far] = texts(chat)
    assert question == "Hello."
    assert 0 < len(said_so_far) < len(whole)
    assert whole.startswith(said_so_far.rstrip("\ufffd"))
    assert "(stopped)" in err
    assert out.startswith(said_so_far)
    assert not llm.engine.scheduler.has_requests
    assert llm.engine.scheduler.num_free_blocks == num_free
    assert texts(talk("Again.", turns=chat._conversation.turns)[0])[:3] == ["Hello.", said_so_far, "Again."]


def test_ctrl_c_before_the_first_word_leaves_the_message_out(llm, talk, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        pressing(llm, patch, at_step=1)
        chat, _, _, err = talk("Hello. " * 20)
    assert texts(chat) == []
    assert "stopped before the answer began" in err
    assert not llm.engine.scheduler.has_requests


def test_ctrl_c_at_an_empty_prompt_tells_how_to_leave_and_the_next_one_leaves(talk) -> None:
    _, code, _, err = talk(CTRL_C, CTRL_C, "never asked")
    assert code == 130
    assert err.count("Ctrl-C again leaves") == 1
    _, code, _, err = talk(CTRL_C, "Hello.", CTRL_C)
    assert code == 0
    assert err.count("Ctrl-C again leaves") == 2


def test_a_message_that_does_not_fit_ends_no_conversation(llm, talk) -> None:
    chat, code, _, err = talk("Hello.", "long " * 200, "And now?")
    assert code == 0
    assert "max_model_len is 512" in err
    assert "The message is left out" in err
    assert texts(chat)[::2] == ["Hello.", "And now?"]


def test_an_answer_that_fails_and_an_engine_that_died_leave_the_conversation(llm, talk, monkeypatch, tmp_path) -> None:
    from stepgraph.errors import EngineDeadError

    def dead(messages, params):
        raise EngineDeadError("the engine stopped: no memory")

    before = (said("user", "Hello."), said("assistant", "Hi."))
    with monkeypatch.context() as patch:
        patch.setattr(llm, "stream_chat", dead)
        chat, code, _, err = talk("And now?", f"/save {tmp_path / 'talk.json'}", turns=before)
    assert code == 0
    assert "error: the engine stopped: no memory. There are no more answers; /save FILE" in err
    assert texts(chat) == ["Hello.", "Hi."]
    assert len(json.loads((tmp_path / "talk.json").read_text())["messages"]) == 2


def test_several_lines_are_one_message_between_quotes_behind_backslashes_and_pasted(talk) -> None:
    chat, *_ = talk(
        '"""one', "", '  two"""', '"""/three"""', "four\\", "five", "six\nseven", '"""eight\nnine"""', '"""ten\neleven'
    )
    assert texts(chat)[::2] == [
        "one\n\n  two",
        "/three",
        "four\nfive",
        "six\nseven",
        "eight\nnine",
        '"""ten\neleven',
    ]


@pytest.mark.parametrize("key", [CTRL_C, CTRL_D], ids=["Ctrl-C", "Ctrl-D"])
def test_a_message_of_several_lines_can_be_dropped_while_it_is_typed(talk, key) -> None:
    chat, code, _, err = talk('"""one', key, "four\\", key, "Hello.")
    assert code == 0
    assert texts(chat)[::2] == ["Hello."]
    assert "Ctrl-C again" not in err


def test_what_was_typed_is_in_the_history_as_it_can_be_sent_again(talk, tmp_path) -> None:
    history = History(tmp_path / "h")
    talk("Hello.", "/reset", '"""/one', 'two"""', "three\\", "four", "", "/nonsense", history=history)
    assert History(tmp_path / "h").entries == ["Hello.", "/reset", '"""/one\ntwo"""', "three\nfour", "/nonsense"]


def test_an_unknown_command_is_named_with_all_there_are_and_two_slashes_send_one(talk) -> None:
    chat, _, _, err = talk("/nonsense now", "//etc/passwd, what is it?")
    assert "there is no command /nonsense; there are /help, /reset, /retry, /system, /set, /save, /load, /exit" in err
    assert texts(chat)[::2] == ["/etc/passwd, what is it?"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/reset now", "/reset takes nothing behind it"),
        ("/save", "/save needs a FILE behind it"),
        ("/save -f", "/save -f needs a FILE behind it"),
        ("/load", "/load needs a FILE behind it"),
        ("/retry", "there is no message to answer again"),
        ("/set heat 1", "/set needs one of temperature, "),
        ("/set temperature", "/set needs one of temperature, "),
        ("/set temperature -1", "temperature=-1 must be"),
        ("/set top_k many", "top_k='many' must be"),
        ("/load ~nobody-of-that-name/x", "~nobody-of-that-name/x"),
    ],
)
def test_a_command_that_cannot_be_done_says_why(talk, line, message) -> None:
    _, code, _, err = talk(line)
    assert code == 0
    assert f"error: {message}" in err


def test_commands_change_what_the_next_answer_depends_on(llm, talk, tmp_path) -> None:
    file = tmp_path / "my talk.json"
    chat, _, _, err = talk(
        "/system Be brief.",
        "/set max_tokens 2",
        "/set stop END",
        "Hello.",
        f"/save {file}",
        "/reset",
        "/system",
        "/set",
        "/exit",
        "no",
    )
    assert texts(chat) == []
    assert "Be brief.\n" in err
    assert "max_tokens 2\n" in err
    assert 'stop ["END"]\n' in err
    assert "(cut off: max_tokens is 2)" in err
    again, _, _, err = talk(f"/load {file}", f"/save {file}", '/system ""', "/retry", "/help")
    assert "(2 messages from" in err
    assert again._conversation.params.max_tokens == 2
    assert again._conversation.system is None
    assert texts(again) == ["Hello.", answer(llm, "Hello.", params=SamplingParams(temperature=0, max_tokens=2))]
    assert all(f"\n{name}" in err for name in ("/retry", "/system [TEXT]", "/save FILE"))
    _, _, _, err = talk(f"/save {file}", f"/save -f {file}")
    assert err.count("is there already") == 1
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"model": "another"}))
    assert "(they are of another; " in talk(f"/load {file}")[3]

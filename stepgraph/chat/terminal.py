"""`stepgraph chat` in a terminal."""

from __future__ import annotations

import json
import logging
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from stepgraph.api import LLM
from stepgraph.chat.conversation import SAMPLING, Conversation, last_question, load, said, save
from stepgraph.chat.history import History
from stepgraph.chat.printed_answer import PrintedAnswer
from stepgraph.chat.reader import Reader
from stepgraph.errors import EngineDeadError, RequestError, StepgraphError

logger = logging.getLogger(__name__)

_INTERRUPTED = 130
_PATIENCE_S = 1.0
"""A Ctrl-C that comes sooner after one that stopped an answer was meant for it, and not to leave."""


class _Command(NamedTuple):
    """What can be typed instead of a message."""

    argument: str
    """As /help shows it; in brackets if it may be left out; "" if there is none."""
    text: str
    run: Callable[[str], None]


class Chat:
    """A conversation at a terminal: messages are answered, lines that begin with a slash are commands.

    Answers go to stdout, all else that is said to stderr. An error ends an answer, not the conversation.

    Args:
        llm: answers.
        conversation: to begin with.
        history: of earlier sessions.
    """

    def __init__(self, llm: LLM, conversation: Conversation, history: History):
        self._llm = llm
        self._conversation = conversation
        self._history = history
        self._own_files: set[Path] = set()  # read or written here: saving to them again surprises nobody
        self._left = False
        self._stopped_at = -math.inf
        self._commands = {
            "/help": _Command("", "show this", self._help),
            "/reset": _Command("", "forget the conversation; the system prompt stays", self._reset),
            "/retry": _Command("", "answer the last message again", self._retry),
            "/system": _Command(
                "[TEXT]", 'replace the system prompt, or show it; "" leaves it to the model', self._system
            ),
            "/set": _Command("[NAME VALUE]", f"how answers are drawn: {', '.join(SAMPLING)}; or show it", self._set),
            "/save": _Command(
                "FILE", "write the conversation as JSON; -f FILE replaces a file that is there", self._save
            ),
            "/load": _Command("FILE", "go on with a conversation that was saved", self._load),
            "/exit": _Command("", "leave; Ctrl-D too", self._exit),
        }

    def run(self) -> int:
        """Talk until the user leaves; returns the exit code: 0, or 130 if it was by Ctrl-C."""
        reader = Reader(self._history, tuple(self._commands), ("/save", "/load"))
        context = self._llm.engine.max_model_len
        _say(f"{self._llm.engine.source.name}, {context} tokens of context. Type a message; /help shows what else.")
        asked_to_leave = False
        with _handling_interrupts(signal.default_int_handler):
            while not self._left:
                if self._history.trouble is not None:
                    _say(f"(what is typed is not kept for later sessions: {self._history.trouble})")
                    self._history.trouble = None
                try:
                    typed = reader.read()
                except EOFError:
                    _say("")
                    return 0
                except KeyboardInterrupt:
                    if time.monotonic() - self._stopped_at < _PATIENCE_S:
                        continue
                    if asked_to_leave:
                        return _INTERRUPTED
                    asked_to_leave = True
                    _say("(Ctrl-C again leaves, as does Ctrl-D or /exit)")
                    continue
                asked_to_leave = False
                try:
                    self._take(typed.text, is_message=typed.is_quoted)
                except KeyboardInterrupt:  # of a command
                    _say("")
                except StepgraphError as error:
                    _say(f"error: {error}")
        return 0

    def _take(self, text: str, *, is_message: bool) -> None:
        if not text:
            return
        if is_message or not text.startswith("/"):
            self._answer(self._conversation.turns, text)
        elif text.startswith("//"):
            self._answer(self._conversation.turns, text[1:])
        else:
            name, *rest = text.split(maxsplit=1)
            argument = rest[0].strip() if rest else ""
            command = self._commands.get(name)
            if command is None:
                raise RequestError(
                    f"there is no command {name}; there are {', '.join(self._commands)}. A message that begins with a slash "
                    "is typed with two"
                )
            if argument and not command.argument:
                raise RequestError(f"{name} takes nothing behind it, and not {argument!r:.80}")
            if not argument and command.argument and not command.argument.startswith("["):
                raise RequestError(f"{name} needs a {command.argument} behind it")
            command.run(argument)

    def _answer(self, before: Sequence[Mapping[str, Any]], question: str) -> None:
        """Answer a question behind some turns, and make them the conversation, unless there is no answer.

        Raises:
            StepgraphError: there is none; says what can be done.
        """
        turns = (*before, said("user", question))
        asked = replace(self._conversation, turns=turns)
        answer = PrintedAnswer.of_chat(self._llm)
        with _stopped_by_interrupt() as was_stopped:
            try:
                with closing(self._llm.stream_chat(asked.messages, asked.params)) as outputs:
                    for output in outputs:
                        answer.show(output)
            except KeyboardInterrupt:
                pass
            except EngineDeadError as error:
                raise EngineDeadError(
                    f"{error}. There are no more answers; /save FILE keeps the conversation, and /load FILE in a new "
                    "`stepgraph chat` goes on with it"
                ) from error
            except RequestError as error:
                raise RequestError(f"{error}. The message is left out; /reset forgets the conversation") from error
            except Exception:
                if not was_stopped():  # what is raised in a step that hangs passes through TorchScript as another error
                    raise
            finally:
                answer.end_line()
            if was_stopped():
                self._stopped_at = time.monotonic()
                if not answer.text:
                    _say("(stopped before the answer began; the message is left out)")
                    return
            if answer.error is not None:
                raise StepgraphError(f"the answer ended early: {answer.error}. It is left out, with the message")
            self._conversation = replace(asked, turns=(*turns, said("assistant", answer.text)))
            if was_stopped():
                _say("(stopped)")
            elif answer.finish_reason == "length":
                limit = asked.params.max_tokens
                context = f"the {self._llm.engine.max_model_len} tokens of the context are full; /reset makes room"
                _say(f"(cut off: {f'max_tokens is {limit}' if answer.num_tokens == limit else context})")
            answer.log_speed()

    # Commands

    def _help(self, _: str) -> None:
        shown = [(f"{name} {command.argument}", command.text) for name, command in self._commands.items()]
        width = max(len(name) for name, _ in shown)
        for name, text in shown:
            _say(f"{name:<{width}} {text}")
        _say('\n"""..."""   a message of several lines; so does \\ at the end of a line, and pasting')
        _say("//...       a message that begins with a slash")
        _say("Ctrl-C      stop the answer, which stays in the conversation as far as it came")

    def _reset(self, _: str) -> None:
        self._conversation = replace(self._conversation, turns=())

    def _retry(self, _: str) -> None:
        turns = self._conversation.turns
        index = last_question(turns)
        if index is None:
            raise RequestError("there is no message to answer again")
        self._answer(turns[:index], turns[index]["content"])

    def _system(self, text: str) -> None:
        if text:
            self._conversation = replace(self._conversation, system=None if text == '""' else text)
        elif self._conversation.system is None:
            _say("(the model's own, if its chat template has one)")
        else:
            _say(self._conversation.system)

    def _set(self, words: str) -> None:
        params = self._conversation.params
        if not words:
            for name in SAMPLING:
                _say(f"{name} {_shown(getattr(params, name))}")
            return
        name, *rest = words.split(maxsplit=1)
        if name not in SAMPLING or not rest:
            raise RequestError(f"/set needs one of {', '.join(SAMPLING)} and a value, as in /set temperature 0.8")
        try:
            value = json.loads(rest[0])
        except ValueError:
            value = None if rest[0] == "none" else rest[0]
        self._conversation = replace(self._conversation, params=replace(params, **{name: value}))

    def _save(self, argument: str) -> None:
        flag, _, named = argument.partition(" ")
        forced = flag == "-f"
        if forced and not named.strip():
            raise RequestError("/save -f needs a FILE behind it; a file of that name is ./-f")
        path = _path(named if forced else argument)
        save(path, self._conversation, self._llm.engine.source.name, replace=forced or path in self._own_files)
        self._own_files.add(path)
        _say(f"({len(self._conversation.turns)} messages in {path})")

    def _load(self, argument: str) -> None:
        path = _path(argument)
        self._conversation, model = load(path)
        self._own_files.add(path)
        _say(f"({len(self._conversation.turns)} messages from {path})")
        if model not in (None, self._llm.engine.source.name):
            _say(f"(they are of {model}; {self._llm.engine.source.name} goes on with them)")

    def _exit(self, _: str) -> None:
        self._left = True


Handler = Callable[[int, FrameType | None], Any]


@contextmanager
def _handling_interrupts(handler: Handler) -> Iterator[None]:
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _stopped_by_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C raises a KeyboardInterrupt in the block, once: more of them, while what it stops is cleared away, are the same wish.
    Yields whether it was pressed."""
    pressed = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if not pressed:
            pressed = True
            raise KeyboardInterrupt

    with _handling_interrupts(stop):
        yield lambda: pressed


def _say(text: str) -> None:
    """Something that is no answer."""
    print(text, file=sys.stderr, flush=True)


def _path(name: str) -> Path:
    try:
        return Path(name.strip()).expanduser()
    except RuntimeError as error:  # ~nobody
        raise RequestError(f"{name}: {error}") from error


def _shown(value: Any) -> str:
    return "none" if value is None else json.dumps(value)

"""`stepgraph generate` and `stepgraph chat`: a model and a text.

What is wrong with flags, text and model is found, as far as it can be, before the model is loaded.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from stepgraph.chat.printed_answer import PrintedAnswer
from stepgraph.config import EngineConfig, settings_from_flags
from stepgraph.errors import ConfigError, ModelError, RequestError, StepgraphError

if TYPE_CHECKING:
    from stepgraph.api import LLM
    from stepgraph.engine.outputs import RequestOutput
    from stepgraph.engine.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


def generate(arguments: argparse.Namespace) -> int:
    """`stepgraph generate`; returns the exit code."""
    prompts = _prompts(arguments)
    llm, params = _start(arguments)
    if sys.stderr.isatty() and llm.tokenizer is not None and llm.tokenizer.chat_template:
        print("A chat model: its text is continued; `stepgraph chat --message` has it answer.", file=sys.stderr)
    if len(prompts) == 1 and not arguments.no_stream:
        _print_stream(llm.stream(prompts[0], params), PrintedAnswer())
        _log_steps(llm)
        return 0
    outputs = llm.generate(prompts, params, use_tqdm=sys.stderr.isatty())
    for prompt, output in zip(prompts, outputs, strict=True):
        if len(prompts) > 1:
            print(f"=== {prompt!r}")
        print(output.outputs[0].text)
    _log_steps(llm)
    for output in outputs:
        _require_answer(output)
    return 0


def chat(arguments: argparse.Namespace) -> int:
    """`stepgraph chat`; returns the exit code."""
    if arguments.message is not None and not arguments.message.strip():
        raise RequestError("--message is empty; give the message to answer, or leave it out to talk")
    llm, params = _start(arguments, for_chat=True)
    from stepgraph.chat.conversation import Conversation, said

    conversation = Conversation(arguments.system, (), params)
    if arguments.message is not None:
        asked = [*conversation.messages, said("user", arguments.message)]
        _print_stream(llm.stream_chat(asked, params), PrintedAnswer.of_chat(llm))
        return 0
    if sys.stdin.isatty():
        from stepgraph.chat.history import History, history_file
        from stepgraph.chat.terminal import Chat

        return Chat(llm, conversation, History(None if arguments.no_history else history_file())).run()

    history = conversation.messages
    for text in map(str.strip, sys.stdin):
        if text == "/exit":
            break
        if text == "/reset":
            history = conversation.messages
        elif text:
            history.append(said("user", text))
            answer = _print_stream(llm.stream_chat(history, params), PrintedAnswer.of_chat(llm))
            history.append(said("assistant", answer))
    return 0


def _prompts(arguments: argparse.Namespace) -> list[str]:
    """Those of the flags, else the one on stdin."""
    if arguments.prompt:
        if "" in arguments.prompt:
            raise RequestError("--prompt is empty; give the text to continue")
        return list(arguments.prompt)
    piped = "" if sys.stdin.isatty() else sys.stdin.read().removesuffix("\n")
    if not piped:
        misplaced = _misplaced_text(arguments)
        raise RequestError(f"there is no prompt; give --prompt TEXT, or pipe one in{misplaced and f'. {misplaced}'}")
    return [piped]


def _start(arguments: argparse.Namespace, *, for_chat: bool = False) -> tuple[LLM, SamplingParams]:
    """The model, and how to sample from it.

    Bad sampling flags are refused before the model is loaded, and so is a model without a tokenizer, as prompts here are text,
    or, `for_chat`, without a chat template.
    """
    settings = settings_from_flags(arguments)
    config = EngineConfig.from_settings(**settings)
    from stepgraph.api import LLM
    from stepgraph.chat.conversation import SAMPLING
    from stepgraph.engine.sampling_params import SamplingParams
    from stepgraph.models.source import resolve_configured

    params = SamplingParams(**{name: getattr(arguments, name) for name in SAMPLING})
    misplaced = _misplaced_text(arguments)
    if misplaced and len(arguments.model_argument.split()) > 1:
        raise ConfigError(misplaced)
    try:
        source = resolve_configured(config.model)
    except ModelError as error:
        raise ModelError(f"{error} {misplaced}" if misplaced else str(error)) from error
    source.check_tokenizer()
    if for_chat:
        source.check_chat_template()
    return LLM(**settings, source=source, progress=sys.stderr.isatty()), params


def _misplaced_text(arguments: argparse.Namespace) -> str:
    """What to say where MODEL looks like the text that a model is to be given; "" where it does not."""
    given = arguments.model_argument
    if given is None or os.path.exists(os.path.expanduser(given)) or given.endswith(".gguf"):
        return ""
    from stepgraph.models.source import PACKAGED, shape_names

    if given in PACKAGED or given in shape_names() or ("/" in given and len(given.split()) == 1):
        return ""
    command = f"{'generate --prompt' if hasattr(arguments, 'prompt') else 'chat --message'} {shlex.quote(given)}"
    return f"MODEL is {given!r:.80}, which names no model here; if it is what the model shall read, write: stepgraph {command}"


def _print_stream(outputs: Iterable[RequestOutput], answer: PrintedAnswer) -> str:
    """Print an answer as it grows; returns the whole."""
    for output in outputs:
        answer.show(output)
        if output.finished:
            answer.end_line()
            _require_answer(output)
    return answer.text


def _require_answer(output: RequestOutput) -> None:
    error = output.outputs[0].error
    if error is not None:
        raise StepgraphError(f"the answer ended early: {error}")


def _log_steps(llm: LLM) -> None:
    """With -v: how many steps ran in a graph, why others did not, how much was padding, and what came of proposals."""
    statistics = llm.engine.executor.statistics
    eager = {f"{kind} ({reason})": n for (kind, reason), n in statistics.steps.items() if reason is not None}
    logger.info(
        "%d of %d steps ran in a graph%s; %d tokens computed, %d more were padding",
        statistics.num_steps - statistics.num_eager_steps,
        statistics.num_steps,
        "".join(f", {n} {what} eagerly" for what, n in eager.items()),
        statistics.real_tokens,
        statistics.padding_tokens,
    )
    speculation = llm.engine.speculation
    if speculation.num_drafts:
        logger.info(
            "%d of %d proposals stood: %.2f tokens per step and request that verified some",
            speculation.num_accepted_tokens,
            speculation.num_draft_tokens,
            speculation.mean_accepted_length,
        )

"""LLM: the engine from Python."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor
from tqdm import tqdm

from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.chat_messages import Message
from stepgraph.engine.chat_template import ChatTemplate
from stepgraph.engine.chrome_trace import chrome_trace
from stepgraph.engine.interrupts import interrupts_held
from stepgraph.engine.outputs import RequestOutput
from stepgraph.engine.prompts import Prompt, tokenize
from stepgraph.engine.request import RequestUpdate
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.session import Session
from stepgraph.engine.step_recorder import StepRecorder, step_entry
from stepgraph.errors import RequestError
from stepgraph.models.source import ModelSource
from stepgraph.version import VERSION

T = TypeVar("T")


class LLM:
    """A model, ready to answer. Arguments are named as in vLLM.

    Args:
        model: ``"smollm2"``, a .gguf file, a Hugging Face folder or hub name, or a named shape with
            ``load_format="dummy"``.
        progress: show progress bars on stderr while loading and capturing.
        source: what `model` names, if that is resolved already.
        settings: any field of the dataclasses in `stepgraph.config`, e.g. ``dtype="bfloat16"``, ``max_num_seqs=8``,
            ``max_model_len=4096``, ``graph_optimization_config={"use_cudagraph": False}``. With ``tensor_parallel_size=2``, two
            devices of this machine share the model: this process has one, and a process that it starts has the other. So it is
            with ``data_parallel_size=2, enable_expert_parallel=True``, but that they share its experts only.

    Raises:
        ConfigError: an unknown setting, a bad value, or more devices than there are.
        ModelError: the model cannot be found, read or run, or not be cut for so many devices.
        EngineDeadError: the process of another device ended while it built its part.

    Examples:
        >>> llm = LLM("smollm2")
        >>> greedy = SamplingParams(temperature=0, max_tokens=64)
        >>> [output] = llm.chat([{"role": "user", "content": "What is the capital of France?"}], greedy)
        >>> output.outputs[0].text
        'The capital of France is Paris.'
    """

    def __init__(
        self, model: str = "smollm2", *, progress: bool = True, source: ModelSource | None = None, **settings: Any
    ):
        config = EngineConfig.from_settings(model=model, **settings)
        self.engine = build_engine(config, source=source, needs_tokenizer=True, progress=progress)
        self.tokenizer = self.engine.tokenizer
        self._chat_template = ChatTemplate(self.tokenizer)
        self._ids = (f"request-{number}" for number in count())

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | Sequence[int] = 0,
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Answer prompts, all at once; returns when the last is done.

        Args:
            prompts: one prompt or several; a prompt is text, token ids, or a dict with ``prompt`` or ``prompt_token_ids``, and
                perhaps ``cache_salt``: only prompts of the same salt share cached prefixes.
            sampling_params: for all prompts, or one for each; default `SamplingParams()`.
            use_tqdm: show a progress bar on stderr.
            priority: for all prompts, or one for each; lower runs first.
            adapter: folder of a LoRA adapter for all prompts, or one or None for each; needs ``enable_lora=True``.

        Returns:
            One `RequestOutput` per prompt, in order; a request that failed by itself has finish_reason "error".

        Raises:
            RequestError: a prompt or parameter is unusable; nothing has run then.
        """
        one = (
            not isinstance(prompts, Sequence)
            or isinstance(prompts, str)
            or (len(prompts) > 0 and isinstance(prompts[0], int))
        )
        several: Sequence[Any] = [prompts] if one else prompts  # type: ignore[assignment]  # not one prompt: several
        params = _one_each("sampling_params", SamplingParams(), sampling_params, len(several))
        priorities = _one_each("priority", 0, priority, len(several))
        sessions = self._start(several, params, priorities, _one_each("adapter", None, adapter, len(several)))
        owners = {request.id: session for session in sessions for request in session.requests}
        num_running = len(sessions)
        may_stop_early = any(session.may_stop_early for session in sessions)
        try:
            with tqdm(total=num_running, desc="answers", disable=not use_tqdm, file=sys.stderr, leave=False) as bar:
                while num_running:
                    for update in self._step():
                        if update.finish_reason is None and not may_stop_early:
                            continue
                        session = owners.get(update.request.id)
                        if session is None or session.finished:
                            continue
                        if session.may_stop_early or update.finish_reason is not None:
                            session.advance()
                        if session.finished:
                            num_running -= 1
                            bar.update()
        except BaseException:
            _abort(sessions)
            raise
        return [session.output() for session in sessions]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        adapter: str | Sequence[str | None] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, through the model's chat template.

        Args:
            messages: turns as the OpenAI API has them; `ChatTemplate` tells what becomes of those the template does not know.
            sampling_params: as in `generate`, but the default allows answers as long as the context.
            use_tqdm: as in `generate`.
            adapter: as in `generate`.
            tools: functions the model may call, as the OpenAI API describes them; calls stand in the answer's text.
            add_generation_prompt: begin the assistant's turn.
            continue_final_message: leave the last turn open instead, to go on with it.
            documents: to answer from, `{"title", "text"}` each.
            chat_template: a template in place of the model's, as text.
            chat_template_kwargs: further variables of the template, e.g. ``{"enable_thinking": False}``.

        Raises:
            RequestError: as `generate`; or a conversation does not fit the template.
        """
        one = bool(messages) and not isinstance(messages[0], Sequence)
        conversations: Sequence[Any] = [messages] if one else messages
        template = self._chat_template if chat_template is None else ChatTemplate(self.tokenizer, chat_template)
        prompts = [
            template.prompt(
                conversation,
                tools or (),
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
                documents=documents,
                variables=chat_template_kwargs,
            )
            for conversation in conversations
        ]
        params = sampling_params or SamplingParams(max_tokens=None)
        return self.generate(prompts, params, use_tqdm=use_tqdm, adapter=adapter)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Answer one prompt, token by token; each output holds the answer so far.

        Closing the generator early, or leaving it to be collected, aborts the request. Other calls may run between two outputs:
        the engine then works on all of their requests.
        """
        [session] = self._start([prompt], [sampling_params or SamplingParams()], [0], [adapter])
        try:
            while not session.finished:
                output = session.poll()
                if output is None:
                    self._step()
                else:
                    yield output
        finally:
            session.abort()

    def stream_chat(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Answer one conversation, token by token. See `stream`."""
        prompt = self._chat_template.prompt(messages)
        return self.stream(prompt, sampling_params or SamplingParams(max_tokens=None), adapter=adapter)

    def sleep(self, level: int = 1) -> None:
        """Give memory of the device back until `wake_up`. See `Engine.sleep`."""
        self.engine.sleep(level)

    def wake_up(self) -> None:
        """Take the memory back that `sleep` gave up. See `Engine.wake_up`."""
        self.engine.wake_up()

    def update_weights(self, weights: str | Path | ModelSource | Iterable[tuple[str, Tensor]]) -> None:
        """Replace the model's weights. See `Engine.update_weights`."""
        self.engine.update_weights(weights)

    def reset_prefix_cache(self, *, preempt: bool = False) -> int:
        """Forget the prefixes of earlier requests. See `Engine.reset_prefix_cache`."""
        return self.engine.reset_prefix_cache(preempt=preempt)

    @contextmanager
    def trace(self, file: str | Path) -> Iterator[None]:
        """Write the steps that run meanwhile, and what became of the requests in them, to a file that Perfetto and Chrome open.
        Of more than 10,000 steps, the last ones. See docs/page.md."""
        recorder = StepRecorder(self.engine, count(1))
        try:
            yield
        finally:
            recorder.end()
            steps, requests, dropped = recorder.take()
            about = {"model": self.engine.config.model.model, "version": VERSION, "dropped_steps": dropped}
            entries = [step_entry(step, number) for number, step in enumerate(steps, start=dropped)]
            trace = chrome_trace(entries, [{"engine": 0} | request._asdict() for request in requests], (), about)
            Path(file).write_text(json.dumps(trace), encoding="utf-8")

    def shutdown(self) -> None:
        """Free the engine's memory and end its threads; every later call raises EngineDeadError. Leaving a ``with`` block does
        so too."""
        self.engine.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def _start(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        priorities: Sequence[int],
        adapters: Sequence[str | None],
    ) -> list[Session]:
        """Queue all requests, or none."""
        tokenized = [tokenize(prompt, self.tokenizer) for prompt in prompts]
        sessions: list[Session] = []
        try:
            with interrupts_held():  # or a request could be queued that nobody knows
                for prompt, p, priority, adapter in zip(tokenized, params, priorities, adapters, strict=True):
                    sessions.append(
                        Session.start(self.engine, next(self._ids), prompt, p, priority=priority, adapter=adapter)
                    )
        except BaseException:
            _abort(sessions)
            raise
        return sessions

    def _step(self) -> Sequence[RequestUpdate]:
        """One step of the engine, when it has something to do. Ctrl-C leaves it usable: it waits for the step's end."""
        if self.engine.idle_reason is not None and not self.engine.has_work:
            raise RequestError(f"the engine computes no answers now: {self.engine.idle_reason}")
        seconds = self.engine.seconds_until_work
        if seconds is not None:
            time.sleep(seconds)
        with interrupts_held():
            return self.engine.step()


def _abort(sessions: Sequence[Session]) -> None:
    for session in sessions:
        session.abort()


def _one_each(what: str, default: T, values: T | Sequence[T] | None, count: int) -> Sequence[T]:
    """`values`, or one value `count` times."""
    if values is None:
        values = default
    if not isinstance(values, Sequence) or isinstance(values, str):
        return [values] * count
    if len(values) != count:
        raise RequestError(f"{len(values)} {what} for {count} prompts; give one for all or one for each")
    return values

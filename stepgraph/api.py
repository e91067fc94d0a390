"""LLM: the Python face of the engine."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from tqdm import tqdm

from stepgraph.config import EngineConfig
from stepgraph.engine.engine import Engine
from stepgraph.engine.outputs import RequestOutput
from stepgraph.engine.prompts import Message, Prompt, render_chat, tokenize
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.session import Session
from stepgraph.errors import RequestError


class LLM:
    """A model, ready to answer. Arguments are named as in vLLM.

    Args:
        model: ``"smollm2"``, a .gguf file, a Hugging Face folder or hub name, or a named shape with
            ``load_format="dummy"``.
        progress: show progress bars on stderr while loading and capturing.
        settings: any field of the dataclasses in `stepgraph.config`, e.g. ``dtype="bfloat16"``, ``max_num_seqs=8``,
            ``max_model_len=4096``, ``graph_optimization_config={"use_cudagraph": False}``.

    Raises:
        ConfigError: an unknown setting or a bad value.
        ModelError: the model cannot be found, read or run.

    Example:
        >>> llm = LLM("smollm2")
        >>> [output] = llm.chat([{"role": "user", "content": "What is the capital of France?"}])
        >>> output.outputs[0].text
        'The capital of France is Paris.'
    """

    def __init__(self, model: str = "smollm2", *, progress: bool = True, **settings: Any):
        self.engine = Engine(EngineConfig.from_settings(model=model, **settings), progress=progress)
        self.tokenizer = self.engine.tokenizer
        self._ids = (f"request-{number}" for number in count())

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer prompts, all at once; returns when the last is done.

        Args:
            prompts: one prompt or several; a prompt is text, token ids, or a dict with ``prompt_token_ids``.
            sampling_params: for all prompts, or one for each; default `SamplingParams()`.
            use_tqdm: show a progress bar on stderr.

        Returns:
            One `RequestOutput` per prompt, in order.

        Raises:
            RequestError: a prompt or parameter is unusable; nothing has run then.
        """
        one = (
            not isinstance(prompts, Sequence)
            or isinstance(prompts, str)
            or (len(prompts) > 0 and isinstance(prompts[0], int))
        )
        several: Sequence[Any] = [prompts] if one else prompts  # type: ignore[assignment]  # not one prompt: several
        params = _one_each(sampling_params, len(several))
        sessions = self._start(several, params)
        running = sessions
        with tqdm(total=len(sessions), desc="answers", disable=not use_tqdm, file=sys.stderr, leave=False) as bar:
            while running:
                self.engine.step()
                unfinished = [session for session in running if session.request.finish_reason is None]
                bar.update(len(running) - len(unfinished))
                running = unfinished
        return [output for session in sessions if (output := session.poll()) is not None]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, through the model's chat template. See `generate`.

        The default `SamplingParams` here allow answers as long as the context.
        """
        one = bool(messages) and not isinstance(messages[0], Sequence)
        conversations: Sequence[Any] = [messages] if one else messages
        prompts = [render_chat(conversation, self.tokenizer) for conversation in conversations]
        return self.generate(prompts, sampling_params or SamplingParams(max_tokens=None), use_tqdm=use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Answer one prompt, token by token; each output holds the answer so far.

        Leaving the iterator early aborts the request. Other calls may run between two outputs: the engine then works on
        all of their requests.
        """
        [session] = self._start([prompt], [sampling_params or SamplingParams()])
        try:
            finished = False
            while not finished:
                output = session.poll()
                if output is None:
                    self.engine.step()
                else:
                    yield output
                    finished = output.finished
        finally:
            self.engine.abort(session.request.id)

    def stream_chat(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Answer one conversation, token by token. See `stream`."""
        prompt = render_chat(messages, self.tokenizer)
        return self.stream(prompt, sampling_params or SamplingParams(max_tokens=None))

    def _start(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> list[Session]:
        """Queue all requests, or none."""
        tokenized = [tokenize(prompt, self.tokenizer) for prompt in prompts]
        sessions: list[Session] = []
        try:
            for (text, token_ids), p in zip(tokenized, params, strict=True):
                request = self.engine.add_request(next(self._ids), token_ids, p)
                sessions.append(Session(request, text, self.tokenizer))
        except RequestError:
            for session in sessions:
                self.engine.abort(session.request.id)
            raise
        return sessions


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> Sequence[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise RequestError(f"{len(params)} sampling_params for {count} prompts; give one for all or one for each")
    return params

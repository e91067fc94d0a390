"""Engine: the loop that joins scheduler and runner. One thread drives it; `LLM` and `AsyncEngine` do."""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING

import torch

from stepgraph.config import EngineConfig
from stepgraph.engine.guidance import GuidanceCompiler
from stepgraph.engine.masks import TokenMasks
from stepgraph.engine.prompts import require_tokenizer
from stepgraph.engine.request import FinishReason, Request, RequestUpdate
from stepgraph.engine.sampling_params import SamplingParams, bad_word_token_ids
from stepgraph.engine.scheduler import ScheduledStep, Scheduler
from stepgraph.errors import ConfigError, EngineDeadError, ModelError, RequestError, StepgraphError
from stepgraph.models.loader import load_model
from stepgraph.models.source import ModelSource, resolve
from stepgraph.ops import slot_line
from stepgraph.platforms import create_platform
from stepgraph.step.runner import StepRunner, Ticket
from stepgraph.step.state import SlotSampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)


@dataclass
class HostTime:
    """What steps cost the host, waiting for the device excluded."""

    steps: int = 0
    seconds: float = 0.0


class Engine:
    """Runs requests to completion, step by step.

    Args:
        config: all settings.
        source: the model, if it is resolved already.
        progress: show progress bars on stderr while loading and capturing.

    Raises:
        ConfigError: settings that this model or machine cannot meet.
        ModelError: the model cannot be found, read or run.
    """

    def __init__(self, config: EngineConfig, *, source: ModelSource | None = None, progress: bool = False):
        self.config = config
        self.source = source or resolve(config.model.model, weights=config.model.load_format != "dummy")
        self.platform = create_platform(config.model.device)
        self.max_model_len = _max_model_len(config, self.source)
        self.dtype: torch.dtype = (
            self.platform.default_dtype if config.model.dtype == "auto" else getattr(torch, config.model.dtype)
        )
        model = load_model(
            self.source,
            dtype=self.dtype,
            device=self.platform.device,
            load_format=config.model.load_format,
            max_model_len=self.max_model_len,
            deterministic=config.model.deterministic,
            progress=progress,
        )
        self.runner = StepRunner(model, config, self.platform, max_model_len=self.max_model_len)
        self.scheduler = Scheduler(
            config.scheduler,
            max_tokens=self.runner.pool.max_tokens,
            num_kv_blocks=self.runner.num_kv_blocks,
            block_size=config.cache.block_size,
            token_sizes=self.runner.pool.token_sizes,
            prefix_caching=config.cache.enable_prefix_caching,
            pure_steps=config.graph.cudagraph_only_prefill and config.scheduler.insertion_policy == "gather",
        )
        self.runner.cache_lost = self.scheduler.preempt_all
        self.host_time = HostTime()
        self._masks = TokenMasks(self._create_compiler, self.source.config.vocab_size)
        self._seeds = random.Random(config.model.seed)
        self._in_flight: deque[tuple[ScheduledStep, Ticket]] = deque()
        self._failure: BaseException | None = None
        if not self.runner.pool.lazy:
            self.runner.pool.capture_all(progress=progress)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """The model's tokenizer; None if it has none that can be read, which leaves prompts of token ids."""
        try:
            return self.source.tokenizer()
        except ModelError as error:
            logger.warning("%s", error)
            return None

    @property
    def has_work(self) -> bool:
        """Whether a call of `step` can make progress, now or after `seconds_until_work`."""
        return self.scheduler.has_requests or bool(self._in_flight)

    @property
    def seconds_until_work(self) -> float | None:
        """How long `step` will have nothing to do unless a request arrives; None if it may have work now."""
        return None if self._in_flight else self.scheduler.seconds_until_work

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> Request:
        """Queue a request; it starts with the next step that has room.

        Args:
            request_id: differs from that of every unfinished request.
            prompt_token_ids: at least one; shorter than the context.
            params: with `n` 1: a session makes several requests of several answers.
            priority: lower runs first.
            cache_salt: only requests of the same salt share cached prefixes.

        Raises:
            RequestError: the prompt is empty, holds an id outside the vocabulary, is too long, a parameter does not fit the
                model, or the id is in use.
            ConfigError: the request needs a package that is not installed, or a tokenizer and the model has none.
            EngineDeadError: an earlier step failed.
        """
        self._check_alive()
        assert params.n == 1, params.n
        prompt = list(prompt_token_ids)
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token")
        self._check_token_ids("prompt token id", prompt)
        self._check_token_ids("allowed_token_ids: token id", params.allowed_token_ids or ())
        self._check_token_ids("logit_bias: token id", params.logit_bias or ())
        if len(prompt) >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens and max_model_len is {self.max_model_len}, which must hold the "
                f"prompt and at least one token of answer; shorten it to {self.max_model_len - 1} tokens or fewer"
            )
        room = self.max_model_len - len(prompt)
        request = Request(
            id=request_id,
            prompt_token_ids=prompt,
            params=params,
            max_length=len(prompt) + min(params.max_tokens or room, room),
            sampling=self._sampling_of(params),
            variant=params.variant,
            priority=priority,
            cache_salt=cache_salt,
        )
        self.scheduler.add(request)
        if params.structured_outputs is not None:
            try:
                self._masks.start(request, params.structured_outputs)
            except BaseException:
                self.scheduler.abort(request_id)
                raise
        return request

    def abort(self, request_id: str) -> RequestUpdate | None:
        """End a request now; its slot and blocks are free for the next step. None if it is not running."""
        update = self.scheduler.abort(request_id)
        if update is not None:
            self._masks.drop(update.request)
        return update

    def step(self) -> list[RequestUpdate]:
        """Launch the next step, and return the results of the oldest one that must be read by now.

        Raises:
            EngineDeadError: this or an earlier step failed.
        """
        self._check_alive()
        try:
            return self._step()
        except BaseException as error:
            self._failure = error
            if isinstance(error, StepgraphError) or not isinstance(error, Exception):
                raise
            raise EngineDeadError(f"the engine stopped on an error: {error}") from error

    def _step(self) -> list[RequestUpdate]:
        started = time.perf_counter()
        updates = [self._fail(request) for request in self._masks.collect()]
        scheduled = self.scheduler.schedule()
        if scheduled is not None:
            for request in scheduled.admitted:
                self._admit(request)
            self._in_flight.append((scheduled, self.runner.launch(scheduled.plan)))
            self.host_time.steps += 1
        launched = time.perf_counter()
        self.host_time.seconds += launched - started
        if not self._in_flight or (scheduled is not None and len(self._in_flight) <= self.platform.run_ahead):
            return updates
        step, ticket = self._in_flight.popleft()
        results = self.runner.collect(ticket)
        collected = time.perf_counter()
        for update in self.scheduler.reconcile(step, results):
            updates.append(update if update.request.guide is None else self._follow_grammar(update))
        self.host_time.seconds += time.perf_counter() - collected
        return updates

    def _admit(self, request: Request) -> None:
        """Write the device's view of a request that got a slot, before its first step or after a preemption."""
        assert request.slot is not None
        state = self.runner.state
        state.admit(
            request.slot,
            tokens=request.tokens(0, request.num_known),
            prompt_len=request.prompt_len,
            blocks=request.blocks[: request.num_found],
            computed=request.num_found * self.config.cache.block_size,
            generation=request.generation,
            max_length=request.max_length,
            sampling=request.sampling,
        )
        if request.sampling.masked:
            state.set_mask(request.slot, self._masks.mask(request))

    def _follow_grammar(self, update: RequestUpdate) -> RequestUpdate:
        """Move a request on in its grammar, and send the device what may come next."""
        request = update.request
        if update.finish_reason is not None:
            return update
        assert request.guide is not None
        assert request.slot is not None
        try:
            for token in update.new_token_ids:
                request.guide.accept(token)
        except RequestError as error:
            request.error = str(error)
            return replace(self._fail(request), new_token_ids=update.new_token_ids)
        if request.guide.finished:  # nothing may follow, not even a stop token
            ended = self.scheduler.end(request.id, FinishReason.STOP)
            assert ended is not None
            return RequestUpdate(request, update.new_token_ids, FinishReason.STOP)
        self.runner.state.set_mask(request.slot, self._masks.mask(request))
        request.awaits_host = False
        return update

    def _fail(self, request: Request) -> RequestUpdate:
        """End a request whose `error` is set; the others do not notice."""
        update = self.scheduler.end(request.id, FinishReason.ERROR)
        assert update is not None
        return update

    def _sampling_of(self, params: SamplingParams) -> SlotSampling:
        """Sampling parameters as the device wants them."""
        stop_token_ids = tuple(dict.fromkeys((() if params.ignore_eos else self._eos) + params.stop_token_ids))
        if len(stop_token_ids) > slot_line.MAX_STOP_TOKENS:
            raise RequestError(
                f"{len(stop_token_ids)} stop tokens, the model's end tokens included; at most "
                f"{slot_line.MAX_STOP_TOKENS} fit"
            )
        bad_words = bad_word_token_ids(params.bad_words, require_tokenizer(self.tokenizer)) if params.bad_words else []
        return SlotSampling(
            seed=params.seed if params.seed is not None else self._seeds.getrandbits(64),
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            stop_token_ids=stop_token_ids,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            min_tokens=params.min_tokens,
            logit_bias=tuple((params.logit_bias or {}).items()),
            bad_words=tuple(tuple(word) for word in bad_words),
            masked=params.allowed_token_ids is not None or params.structured_outputs is not None,
            num_logprobs=0 if params.logprobs is None else 1 + params.logprobs,
            num_prompt_logprobs=0 if params.prompt_logprobs is None else 1 + params.prompt_logprobs,
        )

    def _create_compiler(self) -> GuidanceCompiler:
        return GuidanceCompiler(
            require_tokenizer(self.tokenizer), vocab_size=self.source.config.vocab_size, stop_token_ids=self._eos
        )

    def _check_token_ids(self, what: str, token_ids: Iterable[object]) -> None:
        vocab_size = self.source.config.vocab_size
        for token in token_ids:
            if not (isinstance(token, Integral) and 0 <= int(token) < vocab_size):
                raise RequestError(f"{what} {token!r} is outside the vocabulary of {vocab_size} tokens")

    @property
    def _eos(self) -> tuple[int, ...]:
        return self.source.config.eos_token_ids

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineDeadError(f"the engine stopped on an earlier error: {self._failure}") from self._failure


def _max_model_len(config: EngineConfig, source: ModelSource) -> int:
    wanted, limit = config.model.max_model_len, source.config.max_position_embeddings
    if wanted is not None and wanted > limit:
        raise ConfigError(
            f"max_model_len={wanted} is above the {limit} positions {source.name} was made for; use {limit} or less"
        )
    return wanted or limit

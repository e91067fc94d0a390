"""Engine: the loop that joins scheduler and runner. One thread drives it; `LLM` and `AsyncEngine` do."""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING

import torch

from stepgraph.config import EngineConfig
from stepgraph.engine.request import Request, RequestUpdate
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.scheduler import Scheduler
from stepgraph.errors import ConfigError, EngineDeadError, ModelError, RequestError, StepgraphError
from stepgraph.models.loader import load_model
from stepgraph.models.source import ModelSource, resolve
from stepgraph.ops import slot_line
from stepgraph.platforms import create_platform
from stepgraph.step.runner import StepRunner, Ticket

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
            progress=progress,
        )
        self.runner = StepRunner(model, config, self.platform, max_model_len=self.max_model_len)
        self.scheduler = Scheduler(
            max_num_seqs=config.scheduler.max_num_seqs,
            max_tokens=self.runner.pool.max_tokens,
            num_kv_blocks=self.runner.num_kv_blocks,
            block_size=config.cache.block_size,
        )
        self.host_time = HostTime()
        self._seeds = random.Random(config.model.seed)
        self._in_flight: deque[Ticket] = deque()
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
        """Whether a call of `step` can make progress."""
        return self.scheduler.has_requests or bool(self._in_flight)

    def add_request(self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams) -> Request:
        """Queue a request; it starts with the next step that has room.

        Raises:
            RequestError: the prompt is empty, holds an id outside the vocabulary, is too long, or the id is in use.
            EngineDeadError: an earlier step failed.
        """
        self._check_alive()
        prompt = list(prompt_token_ids)
        vocab_size = self.source.config.vocab_size
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token")
        if bad := [t for t in prompt if not (isinstance(t, Integral) and 0 <= t < vocab_size)]:
            raise RequestError(f"prompt token id {bad[0]!r} is outside the vocabulary of {vocab_size} tokens")
        if len(prompt) >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens and max_model_len is {self.max_model_len}, which must hold the "
                f"prompt and at least one token of answer; shorten it to {self.max_model_len - 1} tokens or fewer"
            )
        room = self.max_model_len - len(prompt)
        stop_token_ids = tuple(dict.fromkeys((() if params.ignore_eos else self._eos) + params.stop_token_ids))
        if len(stop_token_ids) > slot_line.MAX_STOP_TOKENS:
            raise RequestError(
                f"{len(stop_token_ids)} stop tokens, the model's end tokens included; at most "
                f"{slot_line.MAX_STOP_TOKENS} fit"
            )
        request = Request(
            id=request_id,
            prompt_token_ids=prompt,
            params=params,
            stop_token_ids=stop_token_ids,
            max_length=len(prompt) + min(params.max_tokens or room, room),
            seed=params.seed if params.seed is not None else self._seeds.getrandbits(64),
        )
        self.scheduler.add(request)
        return request

    def abort(self, request_id: str) -> RequestUpdate | None:
        """End a request now; its slot and blocks are free for the next step. None if it is not running."""
        return self.scheduler.abort(request_id)

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
        scheduled = self.scheduler.schedule()
        if scheduled is not None:
            for request in scheduled.admitted:
                assert request.slot is not None
                self.runner.state.admit(
                    request.slot,
                    prompt=request.prompt_token_ids,
                    generation=request.generation,
                    max_length=request.max_length,
                    temperature=request.params.temperature,
                    top_k=request.params.top_k,
                    top_p=request.params.top_p,
                    seed=request.seed,
                    stop_token_ids=request.stop_token_ids,
                )
            self._in_flight.append(self.runner.launch(scheduled.plan))
            self.host_time.steps += 1
        launched = time.perf_counter()
        self.host_time.seconds += launched - started
        if not self._in_flight or (scheduled is not None and len(self._in_flight) <= self.platform.run_ahead):
            return []
        results = self.runner.collect(self._in_flight.popleft())
        collected = time.perf_counter()
        updates = self.scheduler.reconcile(results)
        self.host_time.seconds += time.perf_counter() - collected
        return updates

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

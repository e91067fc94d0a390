"""Engine: the loop that joins scheduler and runner. One thread drives it; `LLM` and `AsyncEngine` do."""

from __future__ import annotations

import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from stepgraph.config import EngineConfig
from stepgraph.engine.grammars import Grammars
from stepgraph.engine.guidance import Vocabulary, read_vocabulary
from stepgraph.engine.in_background import in_background
from stepgraph.engine.intake import RequestIntake
from stepgraph.engine.masks import TokenMasks, num_until_end
from stepgraph.engine.model_defaults import end_tokens_of
from stepgraph.engine.precision import describe, exact_tokens
from stepgraph.engine.prompts import require_tokenizer
from stepgraph.engine.reports import HostTime, StepReport
from stepgraph.engine.request import FinishReason, Request, RequestUpdate
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.scheduler import ScheduledStep, Scheduler
from stepgraph.engine.speculation import SpeculationStatistics
from stepgraph.errors import ConfigError, EngineDeadError, Fault, StepgraphError
from stepgraph.models.adapters import Adapter, AdapterFile, AdapterStore
from stepgraph.models.decoder import Decoder
from stepgraph.models.language_model import LanguageModel
from stepgraph.models.loader import create_model, fill, fills_in_place
from stepgraph.models.source import ModelSource, resolve, resolve_configured
from stepgraph.models.update import plan_update, write
from stepgraph.platforms import create_platform
from stepgraph.spec.create import create_drafter
from stepgraph.spec.depth import LEVELS, DraftDepth
from stepgraph.spec.drafter import Drafter
from stepgraph.step.memory import place_weights
from stepgraph.step.plan import StepKind, StepPlan
from stepgraph.step.runner import StepResults, StepRunner, Ticket
from stepgraph.step.shape import Variant

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

_WAIT_SECONDS = 0.002
"""How long a step waits for a grammar where nothing else is to be done."""

T = TypeVar("T")


class _InFlight(NamedTuple):
    """A step that was launched and whose results have not been read."""

    scheduled: ScheduledStep
    ticket: Ticket
    launched_at: float
    host_seconds: float


class Engine:
    """Runs requests to completion, step by step.

    Args:
        config: all settings.
        source: the model, if it is resolved already.
        needs_tokenizer: read the tokenizer now, while weights are loaded, rather than at its first use.
        progress: show progress bars on stderr while loading and capturing.

    Raises:
        ConfigError: settings that this model or machine cannot meet.
        ModelError: the model cannot be found, read or run.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        source: ModelSource | None = None,
        needs_tokenizer: bool = False,
        progress: bool = False,
    ):
        self.config = config
        self.source = source or resolve_configured(config.model)
        self.platform = create_platform(config.model.device)
        self.max_model_len = context_len(config, self.source)
        self.end_token_ids = end_tokens_of(self.source)
        """Tokens with which the model ends an answer."""
        self.dtype: torch.dtype = (
            self.platform.default_dtype if config.model.dtype == "auto" else getattr(torch, config.model.dtype)
        )
        model = create_model(
            self.source,
            dtype=self.dtype,
            device=self.platform.device,
            load_format=config.model.load_format,
            quantization=config.model.quantization,
            supports_fp8=self.platform.supports_fp8,
            max_model_len=self.max_model_len,
            deterministic=config.model.deterministic,
            packed=config.model.quantization == "auto" and (self.dtype, self.platform.name) == (torch.float32, "cpu"),
            exact_tokens=exact_tokens(config),
            free_bytes=self.platform.free_memory_bytes(),
            progress=progress,
        )

        def weights() -> Iterator[None]:
            return fill(model, self.source, load_format=config.model.load_format, progress=progress)

        weights_first = not (
            self.platform.captures_addresses
            and fills_in_place(model)
            and config.speculative.speculative_method not in ("mtp", "hybrid")  # whose modules share some
        )
        if weights_first:
            with in_background(weights(), self.platform):
                _ = self.tokenizer if needs_tokenizer else None
        self._drafter = create_drafter(
            config,
            self.source,
            model,
            self.platform,
            max_model_len=self.max_model_len,
            progress=progress,
        )
        max_drafts = config.speculative.max_drafts
        self._depth = DraftDepth(
            max_drafts,
            self._draft_levels(self._drafter),
            costs_when_idle=self._drafter is None or self._drafter.costs_when_idle,
        )
        drafter_parameters = [] if self._drafter is None else self._drafter.parameters()
        self._weights = place_weights([*model.parameters(), *drafter_parameters], config.cache, self.platform)
        adapters = _create_adapters(model, config)
        if not weights_first:
            torch._foreach_zero_(list(model.parameters()))  # capturing runs programs on them, which must not meet NaN
        with nullcontext() if weights_first else in_background(weights(), self.platform):
            _ = self.tokenizer if needs_tokenizer else None
            self.runner = StepRunner(
                model,
                config,
                self.platform,
                max_model_len=self.max_model_len,
                adapters=adapters,
                drafter=self._drafter,
                draft_levels=self._depth.levels,
            )
            if not self.runner.pool.lazy:
                self.runner.pool.capture_all(progress=progress)
        self.scheduler = Scheduler(
            config.scheduler,
            max_tokens=self.runner.policy.max_tokens,
            num_kv_blocks=self.runner.num_kv_blocks,
            block_size=config.cache.block_size,
            token_sizes=self.runner.policy.token_sizes,
            prefix_caching=config.cache.enable_prefix_caching,
            pure_steps=config.graph.cudagraph_only_prefill and config.scheduler.insertion_policy == "gather",
            choose_drafts=self._depth.choose,
            lookahead=0 if self._drafter is None else self._drafter.lookahead,
        )
        self.runner.cache_lost = self.scheduler.preempt_all
        self.host_time = HostTime()
        self.on_step: Callable[[StepReport], None] = lambda report: None
        """Called in the engine's thread when a step's results have been read; whoever watches the steps sets it."""
        self._masks = TokenMasks(self._read_vocabulary, self.source.config.vocab_size, max_drafts, config.guidance)
        self._intake = RequestIntake(
            adapters,
            vocab_size=self.source.config.vocab_size,
            max_model_len=self.max_model_len,
            end_token_ids=self.end_token_ids,
            read_tokenizer=lambda: require_tokenizer(self.tokenizer),
            seed=config.model.seed,
        )
        self._in_flight: deque[_InFlight] = deque()
        self._collected_at = 0.0  # when the results of the last step had been read
        self._undelivered: list[RequestUpdate] = []
        self._paused = False
        self._sleep_level = 0
        self._has_weights = True
        self._failure: BaseException | None = None
        self._is_shut_down = False
        logger.info("%s on %s: %s", self.source.name, self.platform.name, self.precision)
        if max_drafts:
            logger.info("speculative decoding: %s", config.speculative)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """The model's tokenizer; None if it has none that can be read, which leaves prompts of token ids."""
        return self.source.tokenizer_if_any()

    @property
    def precision(self) -> str:
        """For people: in which numbers the steps compute."""
        return describe(self.runner.model, self.dtype)

    @property
    def speculation(self) -> SpeculationStatistics:
        """What came of the proposals of all requests."""
        return self.scheduler.speculation

    @property
    def draft_levels(self) -> tuple[int, ...]:
        """How many proposals the rows of a step may get at most, ascending; each number has graphs of its own."""
        return self._depth.levels

    @property
    def grammars(self) -> Grammars:
        """What requests follow, and what is kept for others."""
        return self._masks.grammars

    @property
    def has_work(self) -> bool:
        """Whether a call of `step` can make progress, now or after `seconds_until_work`."""
        may_launch = self.idle_reason is None and self.scheduler.has_requests
        return may_launch or bool(self._in_flight) or bool(self._undelivered)

    @property
    def seconds_until_work(self) -> float | None:
        """How long `step` will have nothing to do unless a request arrives; None if it may have work now."""
        if self._in_flight or self._undelivered or self.idle_reason is not None:
            return None
        return self.scheduler.seconds_until_work()

    @property
    def idle_reason(self) -> str | None:
        """Why no step is launched whatever waits, and what ends that; None if steps are launched."""
        if self._sleep_level:
            return "it sleeps; call wake_up()"
        if not self._has_weights:
            return "it has no weights; call update_weights()"
        return "it is paused; call resume()" if self._paused else None

    @property
    def is_paused(self) -> bool:
        """Whether `pause` was called, and `resume` not since."""
        return self._paused

    @property
    def is_sleeping(self) -> bool:
        """Whether `sleep` was called, and `wake_up` not since."""
        return self._sleep_level > 0

    @property
    def has_weights(self) -> bool:
        """Whether the model's weights are there, or kept for `wake_up`; if not, `update_weights` must come before any step."""
        return self._has_weights

    def pause(self) -> None:
        """Launch no more steps until `resume`. Steps under way are finished and delivered by the next calls of `step`; requests
        can be added, and wait, and aborted."""
        self._check_alive()
        self._paused = True

    def resume(self) -> None:
        """Launch steps again."""
        self._check_alive()
        self._paused = False

    def sleep(self, level: int = 1) -> None:
        """Give memory of the device back until `wake_up`, and launch no steps meanwhile. Captured graphs stay.

        Requests are kept: those that run are computed again after `wake_up` from the tokens known by now, and get the answers
        they would have got. What they got up to now is delivered by the next call of `step`.

        Args:
            level: 1 drops the KV cache and keeps the weights in host memory; 2 drops the weights too, and after `wake_up` no
                step is launched before `update_weights`. From level 1, the engine can be sent to 2. What is small stays on the
                device: graphs, buffers of steps, LoRA adapters.

        Raises:
            ConfigError: another level, or `enable_sleep_mode` is off on a GPU.
        """
        self._check_alive()
        if level not in (1, 2):
            raise ConfigError(
                f"sleep level {level!r} is unknown; use 1 to keep the weights in host memory, 2 to drop them"
            )
        if not self._weights.releasable:
            raise ConfigError(
                "sleep() needs memory that can be given back; start the engine with enable_sleep_mode=True"
            )
        self._stop_running()
        self._weights.release(keep_content=level == 1 and self._has_weights)
        self.runner.kv_memory.release(keep_content=False)
        self.platform.release_cached_memory()
        self._sleep_level = max(self._sleep_level, level)
        self._has_weights = self._has_weights and level == 1

    def wake_up(self) -> None:
        """Take the memory back that `sleep` gave up, and go on with the requests.

        Raises:
            ConfigError: others use the memory now; the engine sleeps on, and this can be called again.
        """
        self._check_alive()
        if self._sleep_level:
            self._weights.restore()
            self.runner.kv_memory.restore()
            self._sleep_level = 0

    def update_weights(self, weights: str | Path | ModelSource | Iterable[tuple[str, Tensor]]) -> None:
        """Replace the model's weights; captured graphs stay. Requests that run go on, with the new weights from here on. Draft
        modules keep theirs, which are read again from where they came from.

        Args:
            weights: a checkpoint of the same model, named as the setting `model`, or all of its tensors under their names in
                transformers' checkpoints.

        Raises:
            ModelError: the weights do not fit the model, or cannot be read. If that shows only while they are written, no
                step is launched before another call has succeeded.
            ConfigError: the engine sleeps.
        """
        self._check_alive()
        if self._sleep_level:
            raise ConfigError("weights cannot be updated while the engine sleeps; call wake_up() first")
        if isinstance(weights, str | Path):
            weights = resolve(str(weights), model_impl=self.config.model.model_impl)
        update = plan_update(self.runner.model, weights)
        self._stop_running()
        self._has_weights = False
        write(update)
        if self._drafter is not None:
            self._drafter.reload()
        self._has_weights = True

    def reset_prefix_cache(self, *, preempt: bool = False) -> int:
        """Forget the prefixes that the KV cache holds of requests that have ended.

        Args:
            preempt: forget those of running requests too, which are computed again and get the answers they would have got.

        Returns:
            Blocks of running requests that later ones can still find: 0 if `preempt`, or if none runs.
        """
        self._check_alive()
        if not preempt:
            return self.scheduler.forget_free()
        self._stop_running()
        return 0

    def shutdown(self) -> None:
        """End the engine: its threads stop, and graphs, KV cache and weights are freed. Requests get nothing more. Later calls,
        except of this and `abort`, raise EngineDeadError."""
        if self._is_shut_down:
            return
        self._is_shut_down = True
        self._masks.shutdown()
        self.platform.synchronize()
        memories = self._weights, self.runner.kv_memory
        del self.runner, self._intake, self._drafter
        gc.collect()  # graphs and their buffers are parts of cycles
        for memory in memories:
            memory.free()
        self.platform.release_cached_memory()

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        adapter: str | AdapterFile | None = None,
        bad_words: Sequence[Sequence[int]] | None = None,
    ) -> Request:
        """Queue a request; it starts with the next step that has room.

        Args:
            request_id: differs from that of every unfinished request.
            prompt_token_ids: at least one; shorter than the context.
            params: with `n` 1: a session makes several requests of several answers.
            priority: lower runs first.
            cache_salt: only requests of the same salt share cached prefixes, and find each other's answers to propose them.
            adapter: folder of a LoRA adapter as PEFT saves it, or what `read_adapter` read of it; needs `enable_lora`.
            bad_words: tokens of `params.bad_words`, see `bad_word_token_ids`; default: found here. That, and to
                read a folder, takes time in which all requests wait.

        Raises:
            RequestError: the prompt is empty, holds an id outside the vocabulary, is too long, a parameter does not fit the
                model, or the id is in use.
            ConfigError: the request needs a package that is not installed, or a tokenizer and the model has none.
            EngineDeadError: an earlier step failed.
        """
        self._check_alive()
        request = self._intake.take(
            request_id,
            prompt_token_ids,
            params,
            priority=priority,
            cache_salt=cache_salt,
            adapter=adapter,
            adapters_in_use=self._adapters_in_use(),
            bad_words=bad_words,
        )
        self.scheduler.add(request)
        if params.structured_outputs is not None:
            try:
                self._masks.start(request, params.structured_outputs)
            except BaseException:
                self.scheduler.abort(request_id)
                raise
        return request

    def holds_adapter(self, folder: str) -> bool:
        """Whether a LoRA adapter need not be read before a request can use it; RequestError if none can be used."""
        return self._intake.adapters_for(folder).holds(folder)

    def read_adapter(self, folder: str) -> AdapterFile:
        """Read a LoRA adapter for `add_request`. The one method that any thread may call, at any time.

        Raises:
            RequestError: the folder is not an adapter that this model can run.
        """
        return self._intake.adapters_for(folder).read(folder)

    def load_adapter(self, file: AdapterFile, *, replace: bool = False) -> None:
        """Bring a LoRA adapter into the device's memory before a request asks for it.

        Args:
            file: what `read_adapter` read.
            replace: use it though the folder's adapter is in memory. Requests that run keep the one they have.

        Raises:
            RequestError: unfinished requests use `max_loras` others.
        """
        self._check_alive()
        adapters = self._intake.adapters_for(file)
        if replace:
            adapters.forget(file.folder)
        adapters.load(file, self._adapters_in_use())

    def forget_adapter(self, folder: str) -> None:
        """Have a LoRA adapter read again when the next request asks for it; those that run keep it."""
        self._intake.adapters_for(folder).forget(folder)

    def abort(self, request_id: str) -> RequestUpdate | None:
        """End a request now; its slot and blocks are free for the next step. None if it is not running."""
        update = self.scheduler.abort(request_id)
        if update is not None:
            self._masks.drop(update.request)
            self._undelivered = [other for other in self._undelivered if other.request is not update.request]
        return update

    def step(self) -> Sequence[RequestUpdate]:
        """Launch the next step, and return the results of the oldest one that must be read by now.

        Raises:
            EngineDeadError: this or an earlier step failed.
        """
        self._check_alive()
        return self._noting_failure(self._step)

    def prepare(self) -> bool:
        """Use a moment without requests: capture one graph that steps may need later. False if nothing is left to prepare."""
        return self.idle_reason is None and self._noting_failure(self.runner.pool.capture_spare)

    def _adapters_in_use(self) -> set[Adapter]:
        """Those of unfinished requests."""
        return {request.adapter for request in self.scheduler.requests if request.adapter is not None}

    def _noting_failure(self, call: Callable[[], T]) -> T:
        """What fails in `call` leaves requests and the device in a state nobody knows: the engine ends."""
        try:
            return call()
        except BaseException as error:
            self._failure = error
            if isinstance(error, StepgraphError) or not isinstance(error, Exception):
                raise
            raise EngineDeadError(f"the engine stopped on an error: {error}") from error

    def _step(self) -> Sequence[RequestUpdate]:
        started = time.perf_counter()
        updates, self._undelivered = self._undelivered, []
        collected: Sequence[RequestUpdate] = []
        scheduled = None
        if self.idle_reason is None:
            updates += self._take_masks()
            scheduled = self._schedule(updates)
        if scheduled is not None:
            launching = time.perf_counter()
            try:
                ticket = self.runner.launch(scheduled.plan)
            except torch.OutOfMemoryError as error:
                updates += self._give_up(scheduled.plan, error)
            else:
                # where nothing runs ahead, launching a step is computing it
                planned = launching if self.platform.run_ahead == 0 else time.perf_counter()
                self._in_flight.append(_InFlight(scheduled, ticket, launching, planned - started))
                self.host_time.steps += 1
                self.host_time.seconds += planned - started
        if self._in_flight and (scheduled is None or len(self._in_flight) > self.platform.run_ahead):
            collected = self._collect()
        elif scheduled is None and not updates:
            self.grammars.wait(_WAIT_SECONDS)
        return [*updates, *collected] if updates else collected

    def _take_masks(self) -> list[RequestUpdate]:
        """Let requests run on whose masks have arrived; returns the end of those that their grammar ended."""
        requests = self._masks.collect()
        for request in requests:
            if request.slot is not None and request.error is None:
                with self._blaming(request):
                    self.runner.state.set_masks(request.slot, self._masks.masks(request))
        return [self._fail(request) for request in requests if request.error is not None]

    def _schedule(self, updates: list[RequestUpdate]) -> ScheduledStep | None:
        """Plan a step and write the device's view of the requests that it admits. Ends those for which that fails."""
        while True:
            scheduled = self.scheduler.schedule()
            if scheduled is None or not scheduled.admitted:
                return scheduled
            failed = [request for request in scheduled.admitted if not self._admit(request)]
            if not failed:
                return scheduled
            self.platform.synchronize()  # a device that is broken fails all, and does so here
            updates += [self._fail(request) for request in failed]
            # A row that cannot run is planned, and rows after it may count on the blocks it was to fill: plan everything anew.
            self.scheduler.preempt_all()

    def _give_up(self, plan: StepPlan, error: torch.OutOfMemoryError) -> list[RequestUpdate]:
        """End those requests of a step that was not launched, for lack of memory, which want more of it than a plain step takes;
        the others start anew. Raises `error` if there are none."""
        slots = {slot for slot, _ in plan.rows}
        failed = [r for r in self.scheduler.requests if r.slot in slots and r.variant > Variant.PLAIN]
        if not failed:
            raise error
        logger.warning("a step with log-probabilities, penalties, biases or masks was given up: %s", error)
        self.runner.recover()
        for request in failed:
            request.error = Fault(
                "the device has no memory left for a step with what the request asks for: log-probabilities, penalties, biases, "
                "bad words or masks; try again later, or without",
                is_users=False,
            )
        updates = [self._fail(request) for request in failed]
        self.scheduler.preempt_all()
        return updates

    def _collect(self) -> Sequence[RequestUpdate]:
        """Take in the results of the oldest step under way."""
        step = self._in_flight.popleft()
        plan = step.ticket.plan
        self.runner.wait(step.ticket)
        collected = time.perf_counter()
        results = self.runner.collect(step.ticket)
        updates = self.scheduler.reconcile(step.scheduled, results)
        if step.scheduled.follows_grammar:
            updates = [update if update.request.guide is None else self._follow_grammar(update) for update in updates]
        seconds = collected - max(step.launched_at, self._collected_at)
        if len(self._depth.levels) > 1:
            self._observe(step.ticket, results, seconds)
        reading = time.perf_counter() - collected
        self.host_time.seconds += reading
        self.on_step(
            StepReport(step.ticket.record, seconds, step.host_seconds + reading, results, plan.num_prefill_rows)
        )
        self._collected_at = collected
        return updates

    def _observe(self, ticket: Ticket, results: StepResults, seconds: float) -> None:
        """Let the choice of how many tokens to propose learn from a step."""
        record, plan = ticket.record, ticket.plan
        telling = record.kind is StepKind.DECODE and not record.captured
        accepted = [outcome[1:] for outcome in results.outcomes(plan.num_prefill_rows) if outcome[0]]
        if accepted:
            self._depth.observe(len(accepted), plan.num_drafts, accepted, seconds if telling else None)

    def _stop_running(self) -> None:
        """Finish the steps under way and send every running request back to wait; the KV cache holds nothing after that."""
        self._noting_failure(self._drain)

    def _drain(self) -> None:
        while self._in_flight:
            self._undelivered += self._collect()
        self.scheduler.preempt_all()

    def _admit(self, request: Request) -> bool:
        """Write the device's view of a request that got a slot, before its first step or after a preemption. False if that
        cannot be done; the request's `error` is set then."""
        assert request.slot is not None
        if request.admitted_at is None:
            request.admitted_at = time.monotonic()
        state = self.runner.state
        with self._blaming(request):
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
                state.set_masks(request.slot, self._masks.masks(request))
        return request.error is None

    def _follow_grammar(self, update: RequestUpdate) -> RequestUpdate:
        """Move a request on in its grammar, which says later what may come next."""
        request, tokens = update.request, update.new_token_ids
        num_taken = num_until_end(update, self.end_token_ids)
        if num_taken is not None:  # nothing may follow, not even a stop token
            request.drop_tokens(len(tokens) - num_taken)
            if update.finish_reason is not None:
                request.finish_reason, request.stop_token, request.error = FinishReason.STOP, None, None
            else:
                self.scheduler.end(request.id, FinishReason.STOP)
            update = RequestUpdate(request, tokens[:num_taken], FinishReason.STOP)
        if update.finish_reason is None:
            self._masks.ask(request)
        else:
            self._masks.drop(request)
        return update

    @contextmanager
    def _blaming(self, request: Request) -> Iterator[None]:
        """What fails inside is about one request: note it as its `error`, for the others do not suffer from it."""
        try:
            yield
        except Exception as error:
            request.error = Fault.of(error)
            if not request.error.is_users:
                logger.exception("request %s failed", request.id)

    def _fail(self, request: Request) -> RequestUpdate:
        """End a request whose `error` is set; the others do not notice."""
        update = self.scheduler.end(request.id, FinishReason.ERROR)
        assert update is not None
        self._masks.drop(request)
        return update

    def _draft_levels(self, drafter: Drafter | None) -> Sequence[int]:
        """Numbers of proposals to choose from. Where a capture takes as long as many steps, few are worth one: on CPU three, as
        four tokens cost little more than two."""
        if drafter is None or not self.config.speculative.speculative_adaptive:
            return ()
        return LEVELS if self.platform.captures_all_by_default else (0, 3)

    def _read_vocabulary(self) -> Vocabulary:
        return read_vocabulary(require_tokenizer(self.tokenizer), self.source.config.vocab_size, self.end_token_ids)

    def _check_alive(self) -> None:
        if self._is_shut_down:
            raise EngineDeadError("the engine was shut down; create another one")
        if self._failure is not None:
            raise EngineDeadError(f"the engine stopped on an earlier error: {self._failure}") from self._failure


def context_len(config: EngineConfig, source: ModelSource) -> int:
    """Most tokens of a prompt and its answer; ConfigError if more are asked for than the model has positions."""
    wanted, limit = config.model.max_model_len, source.config.max_position_embeddings
    if wanted is not None and wanted > limit:
        raise ConfigError(
            f"max_model_len={wanted} is above the {limit} positions {source.name} was made for; use {limit} or less"
        )
    return wanted or limit


def _create_adapters(model: LanguageModel, config: EngineConfig) -> AdapterStore | None:
    if not config.lora.enable_lora:
        return None
    if not isinstance(model, Decoder):
        raise ConfigError(
            f"enable_lora=True needs a native model, and {model.config.architecture} runs through transformers; choose a "
            "native model, or leave enable_lora off"
        )
    return AdapterStore(model, config.lora, max_tokens=config.scheduler.max_num_batched_tokens)

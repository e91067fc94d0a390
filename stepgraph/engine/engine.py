"""Engine: the loop that joins scheduler and executor. One thread drives it; `LLM` and `AsyncEngine` do."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from stepgraph.config import EngineConfig
from stepgraph.engine.blame import blaming
from stepgraph.engine.exchange import POLL_S, Exchange
from stepgraph.engine.grammars import Grammars
from stepgraph.engine.intake import RequestIntake
from stepgraph.engine.lifecycle import Lifecycle
from stepgraph.engine.lockstep import LockstepScheduler
from stepgraph.engine.masks import TokenMasks
from stepgraph.engine.reports import HostTime, LaunchedStep, StepReport
from stepgraph.engine.request import FinishReason, Request, RequestUpdate
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.scheduler import Scheduler
from stepgraph.engine.speculation import SpeculationStatistics
from stepgraph.engine.step_draft import ScheduledStep
from stepgraph.errors import DeviceMemoryError, Fault
from stepgraph.executor.base import AdmissionError, Executor
from stepgraph.models.adapters import AdapterFile
from stepgraph.models.source import ModelSource
from stepgraph.spec.depth import DraftDepth
from stepgraph.step.admission import Admission
from stepgraph.step.plan import StepKind, StepPlan
from stepgraph.step.results import StepResults, Ticket
from stepgraph.step.shape import Variant
from stepgraph.transfer.reference import Offer, Reference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from stepgraph.engine.adapters import Adapter

logger = logging.getLogger(__name__)

_WAIT_SECONDS = 0.002
"""How long a step waits for a grammar where nothing else is to be done."""


class Engine:
    """Runs requests to completion, step by step. Made by `stepgraph.engine.build.build_engine`.

    Args:
        config: all settings.
        source: the model.
        executor: runs the steps.
        scheduler: plans them.
        draft_depth: chooses numbers of proposals for the scheduler; told what came of them.
        masks: of tokens that requests may sample.
        intake: makes requests.
        exchange: brings blocks of prompts here, and gives them to others.
        end_token_ids: tokens with which the model ends an answer.
        read_tokenizer: gives the model's tokenizer, the same at each call; None if it has none that can be read.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        config: EngineConfig,
        source: ModelSource,
        executor: Executor,
        scheduler: Scheduler | LockstepScheduler,
        *,
        draft_depth: DraftDepth,
        masks: TokenMasks,
        intake: RequestIntake,
        exchange: Exchange,
        end_token_ids: tuple[int, ...],
        read_tokenizer: Callable[[], PreTrainedTokenizerFast | None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.config = config
        self.source = source
        self.executor = executor
        self.scheduler = scheduler
        self.end_token_ids = end_token_ids
        self.host_time = HostTime()
        self.on_step: Callable[[StepReport], None] = lambda report: None
        """Called in the engine's thread when a step's results have been read; whoever watches the steps sets it."""
        self._depth = draft_depth
        self._masks = masks
        self._intake, self.loaded_adapters = intake, intake.loaded_adapters
        self.exchange, self.transfers = exchange, exchange.transfers
        self._read_tokenizer = read_tokenizer
        self._clock = clock
        self._life = Lifecycle(executor, self._drain, exchange, config.model.model_impl)
        executor.watch_cache(self._lose_cache)
        self._in_flight: deque[LaunchedStep] = deque()
        self._collected_at = 0.0  # when the results of the last step had been read
        self._undelivered: list[RequestUpdate] = []

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """The model's tokenizer; None if it has none that can be read, which leaves prompts of token ids."""
        return self._read_tokenizer()

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its answer."""
        return self.executor.specs.max_model_len

    @property
    def draft_levels(self) -> tuple[int, ...]:
        """How many proposals the rows of a step may get at most, ascending; each number has graphs of its own."""
        return self.executor.specs.draft_levels

    @property
    def speculation(self) -> SpeculationStatistics:
        """What came of the proposals of all requests."""
        return self.scheduler.speculation

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
        """How long `step` and `prepare` will have nothing to do unless a request arrives; None if they may have work now."""
        if self._in_flight or self._undelivered or self.idle_reason is not None:
            return None
        if not self.scheduler.has_requests:
            return POLL_S if self.exchange.is_active else None
        return self.scheduler.seconds_until_work()

    @property
    def idle_reason(self) -> str | None:
        """Why no step is launched whatever waits, and what ends that; None if steps are launched."""
        return self._life.idle_reason

    @property
    def is_paused(self) -> bool:
        """Whether `pause` was called, and `resume` not since."""
        return self._life.is_paused

    @property
    def is_sleeping(self) -> bool:
        """Whether `sleep` was called, and `wake_up` not since."""
        return self._life.is_sleeping

    @property
    def has_weights(self) -> bool:
        """Whether the model's weights are there, or kept for `wake_up`; if not, `update_weights` must come before any step."""
        return self._life.has_weights

    def pause(self) -> None:
        """Launch no more steps until `resume`. Steps under way are finished and delivered by the next calls of `step`; requests
        can be added, and wait, and aborted."""
        self._life.check_alive()
        self._life.is_paused = True

    def resume(self) -> None:
        """Launch steps again."""
        self._life.check_alive()
        self._life.is_paused = False

    def sleep(self, level: int = 1) -> None:
        """Give memory of the device back until `wake_up`, and launch no steps meanwhile. See `Lifecycle.sleep`."""
        self._life.sleep(level)

    def wake_up(self) -> None:
        """Take the memory back that `sleep` gave up, and go on with the requests. See `Lifecycle.wake_up`."""
        self._life.wake_up()

    def update_weights(self, weights: str | Path | ModelSource | Iterable[tuple[str, Tensor]]) -> None:
        """Replace the model's weights; requests that run go on with the new ones. See `Lifecycle.update_weights`."""
        self._life.update_weights(weights)

    def reset_prefix_cache(self, *, preempt: bool = False) -> int:
        """Forget the prefixes that the KV cache holds of requests that have ended.

        Args:
            preempt: forget those of running requests too, which are computed again and get the answers they would have got.

        Returns:
            Blocks of running requests that later ones can still find: 0 if `preempt`, or if none runs.
        """
        self._life.check_alive()
        if not preempt:
            self.exchange.forget()
            return self.scheduler.forget_free()
        self._life.stop_running()
        return 0

    def shutdown(self) -> None:
        """End the engine: its threads stop, and graphs, KV cache and weights are freed. Requests get nothing more. Later calls,
        except of this and `abort`, raise EngineDeadError."""
        if not self._life.is_shut_down:
            self._life.is_shut_down = True
            self._masks.shutdown()
            self.exchange.close()
            self.executor.close()

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
        transfer: Offer | Reference | None = None,
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
            transfer: where the blocks of its prompt go, or come from; see `stepgraph.transfer.reference`.

        Raises:
            RequestError: the prompt is empty, holds an id outside the vocabulary, is too long, a parameter does not fit the
                model, the id is in use, or the engine does not do what `transfer` says.
            ConfigError: the request needs a package that is not installed, or a tokenizer and the model has none.
            EngineDeadError: an earlier step failed.
        """
        self._life.check_alive()
        request = self._intake.take(
            request_id,
            prompt_token_ids,
            params,
            priority=priority,
            cache_salt=cache_salt,
            adapter=adapter,
            adapters_in_use=self._adapters_in_use,
            bad_words=bad_words,
            transfer=transfer,
        )
        self.scheduler.add(request)
        try:
            self.exchange.add(request)
            if params.structured_outputs is not None:
                self._masks.start(request, params.structured_outputs)
        except BaseException:
            self.abort(request_id)
            raise
        return request

    def holds_adapter(self, folder: str) -> bool:
        """Whether a LoRA adapter need not be read before a request can use it; RequestError if none can be used."""
        self._life.check_alive()
        return self._intake.adapters_for(folder).holds(folder)

    def read_adapter(self, folder: str) -> AdapterFile:
        """Read a LoRA adapter for `add_request`. The one method that any thread may call, at any time.

        Raises:
            RequestError: the folder is not an adapter that this model can run.
        """
        self._life.check_alive()
        return self._intake.adapters_for(folder).read(folder)

    def load_adapter(self, file: AdapterFile, *, replace: bool = False) -> None:
        """Bring a LoRA adapter into the device's memory before a request asks for it.

        Args:
            file: what `read_adapter` read.
            replace: use it though the folder's adapter is in memory. Requests that run keep the one they have.

        Raises:
            RequestError: unfinished requests use `max_loras` others.
        """
        self._life.check_alive()
        adapters = self._intake.adapters_for(file)
        if replace:
            adapters.forget(file.folder)
        adapters.load(file, self._adapters_in_use())

    def forget_adapter(self, folder: str) -> None:
        """Have a LoRA adapter read again when the next request asks for it; those that run keep it."""
        self._life.check_alive()
        self._intake.adapters_for(folder).forget(folder)

    def abort(self, request_id: str) -> RequestUpdate | None:
        """End a request now; its slot and blocks are free for the next step. None if it is not running."""
        update = self.scheduler.abort(request_id)
        if update is not None:
            self._drop(update.request)
            self._undelivered = [other for other in self._undelivered if other.request is not update.request]
        return update

    def step(self) -> Sequence[RequestUpdate]:
        """Launch the next step, and return the results of the oldest one that must be read by now.

        Raises:
            EngineDeadError: this or an earlier step failed.
        """
        self._life.check_alive()
        return self._life.noting_failure(self._step)

    def prepare(self) -> bool:
        """Use a moment without requests: take back what other engines need no more, and capture one graph that steps may need
        later. False if no graph is left to capture."""
        self._life.check_alive()
        self.exchange.reclaim(copies=self.idle_reason is None)
        return self.idle_reason is None and self._life.noting_failure(self.executor.prepare)

    def _adapters_in_use(self) -> set[Adapter]:
        """Those of unfinished requests."""
        return {request.adapter for request in self.scheduler.requests if request.adapter is not None}

    def _step(self) -> Sequence[RequestUpdate]:
        started = self._clock()
        updates, self._undelivered = self._undelivered, []
        collected: Sequence[RequestUpdate] = []
        scheduled = None
        if self.idle_reason is None:
            updates += self._take_masks()
            if self.exchange.is_active:
                updates += map(self._fail, self.exchange.poll([step.ticket.step for step in self._in_flight]))
            scheduled = self._schedule(updates)
        if scheduled is not None:
            launching = self._clock()
            try:
                ticket = self.executor.launch(scheduled.plan)
            except DeviceMemoryError as error:
                updates += self._give_up(scheduled.plan, error)
            else:
                # where nothing runs ahead, launching a step is computing it
                planned = launching if self.executor.specs.run_ahead == 0 else self._clock()
                self._in_flight.append(LaunchedStep(scheduled, ticket, started, launching, planned - started))
                if self.exchange.is_active:
                    self.exchange.launched(ticket.step)
                self.host_time.steps += 1
                self.host_time.seconds += planned - started
        if self._in_flight and (scheduled is None or len(self._in_flight) > self.executor.specs.run_ahead):
            collected = self._collect()
        elif scheduled is None and not updates:
            self.grammars.wait(_WAIT_SECONDS)
        return [*updates, *collected] if updates else collected

    def _take_masks(self) -> list[RequestUpdate]:
        """Let requests run on whose masks have arrived; returns the end of those that their grammar ended."""
        requests = self._masks.collect()
        for request in requests:
            if request.slot is not None and request.error is None:
                with blaming(request):
                    self.executor.set_masks(request.slot, self._masks.masks(request))
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
            self.executor.recover()  # a device that is broken fails all, and does so here
            # A row that cannot run is planned, and rows after it may count on the blocks it was to fill: plan everything anew.
            updates += self._start_anew(failed)

    def _give_up(self, plan: StepPlan, error: DeviceMemoryError) -> list[RequestUpdate]:
        """End those requests of a step that was not launched, for lack of memory, which want more of it than a plain step takes;
        the others start anew. Raises `error` if there are none."""
        slots = {slot for slot, _ in plan.rows}
        failed = [r for r in self.scheduler.requests if r.slot in slots and r.variant > Variant.PLAIN]
        if not failed:
            raise error
        logger.warning("a step with log-probabilities, penalties, biases or masks was given up: %s", error)
        self.executor.recover()
        for request in failed:
            request.error = Fault(
                "the device has no memory left for a step with what the request asks for: log-probabilities, penalties, biases, "
                "bad words or masks; try again later, or without",
                is_users=False,
            )
        return self._start_anew(failed)

    def _collect(self) -> Sequence[RequestUpdate]:
        """Take in the results of the oldest step under way."""
        step = self._in_flight.popleft()
        plan = step.ticket.plan
        ended = self._wait(step.ticket)
        collected = self._clock()
        results = self.executor.collect(step.ticket)
        updates: Sequence[RequestUpdate] = self.scheduler.reconcile(step.scheduled, results)
        if step.scheduled.follows_grammar:
            updates = self._masks.follow(updates, partial(self.scheduler.end, reason=FinishReason.STOP))
        if self.exchange.is_active:
            self.exchange.read()
        seconds = collected - max(step.launched_at, self._collected_at)
        if len(self._depth.levels) > 1:
            self._observe(step.ticket, results, seconds)
        reading = self._clock() - collected
        self.host_time.seconds += reading
        host_seconds = step.host_seconds + reading
        self.on_step(
            StepReport(step.ticket.record, seconds, host_seconds, results, plan.num_prefill_rows, step, collected)
        )
        self._collected_at = collected
        return [*ended, *updates] if ended else updates

    def _wait(self, ticket: Ticket) -> list[RequestUpdate]:
        """Wait for a step. Ends the requests that turn out not to have been admitted everywhere; the others start anew, and what
        steps under way yield for them is dropped."""
        try:
            self.executor.wait(ticket)
        except AdmissionError as error:
            logger.warning("a step was given up: %s", error)
            self.executor.recover()
            failed = [request for request in self.scheduler.requests if request.slot in error.slots]
            for request in failed:
                request.error = Fault(str(error), is_users=False)
            return self._start_anew(failed)
        return []

    def _observe(self, ticket: Ticket, results: StepResults, seconds: float) -> None:
        """Let the choice of how many tokens to propose learn from a step."""
        record, plan = ticket.record, ticket.plan
        telling = record.kind is StepKind.DECODE and not record.captured
        accepted = [outcome[1:] for outcome in results.outcomes(plan.num_prefill_rows) if outcome[0]]
        if accepted:
            self._depth.observe(len(accepted), plan.num_drafts, accepted, seconds if telling else None)

    def _drain(self) -> None:
        """Finish the steps under way and send every running request back to wait; the KV cache holds nothing after that."""
        while self._in_flight:
            self._undelivered += self._collect()
        self._lose_cache()

    def _start_anew(self, failed: Sequence[Request]) -> list[RequestUpdate]:
        """End requests whose `error` is set. The others start anew."""
        updates = [self._fail(request) for request in failed]
        self._lose_cache()
        return updates

    def _lose_cache(self) -> None:
        """The KV cache's content counts no more: every running request waits, and other engines get nothing of it."""
        self.exchange.lost()
        self.scheduler.preempt_all()

    def _admit(self, request: Request) -> bool:
        """Write the device's view of a request that got a slot, before its first step or after a preemption. False if that
        cannot be done; the request's `error` is set then."""
        assert request.slot is not None
        if request.admitted_at is None:
            request.admitted_at = self._clock()
        with blaming(request):
            self.executor.admit(
                Admission(
                    request.slot,
                    tokens=request.tokens(0, request.num_known),
                    prompt_len=request.prompt_len,
                    generation=request.generation,
                    max_length=request.max_length,
                    sampling=request.sampling,
                    blocks=request.blocks[: request.num_found * self.executor.specs.groups.size],
                    computed=request.num_found * self.executor.specs.block_size,
                    lines=request.start_lines,
                )
            )
            if request.sampling.masked:
                self.executor.set_masks(request.slot, self._masks.masks(request))
        return request.error is None

    def _fail(self, request: Request) -> RequestUpdate:
        """End a request whose `error` is set; the others do not notice."""
        update = self.scheduler.end(request.id, FinishReason.ERROR)
        assert update is not None
        self._drop(request)
        return update

    def _drop(self, request: Request) -> None:
        """A request was ended by the host."""
        self._masks.drop(request)
        self.exchange.gone(request)

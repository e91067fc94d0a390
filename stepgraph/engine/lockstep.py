"""LockstepScheduler: requests of several ranks, each with slots and a KV cache of its own, in one step after another of all.

The ranks launch every step together, at one shape, whatever each has to do in it: a step takes as long as for the rank with the
most to do, and a rank without work takes part. What is planned for a rank is no other's concern, so each has a `Scheduler` of its
own; this one says which rank a request goes to, and how many proposals all of them make. A request stays where it has run, for
what it needs is cached there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain

from stepgraph.engine.request import FinishReason, Request, RequestUpdate, StepUpdates
from stepgraph.engine.scheduler import Scheduler
from stepgraph.engine.step_draft import ScheduledStep
from stepgraph.errors import RequestError
from stepgraph.step.plan import StepPlan, idle_plan
from stepgraph.step.results import StepResults


class LockstepScheduler:
    """Has the methods of `Scheduler` that an engine calls, of all ranks together. Slots of rank r are numbered from r ·
    `max_num_seqs` + 1 on.

    Args:
        num_ranks: with requests of their own.
        max_num_seqs: slots of each.
        create: makes the scheduler of one of them; takes `first_slot` and `choose_drafts` of `Scheduler`.
        choose_drafts: how many proposals the step should make for each row, given how many rows decode in it, of all ranks.
    """

    def __init__(
        self,
        num_ranks: int,
        max_num_seqs: int,
        create: Callable[..., Scheduler],
        choose_drafts: Callable[[int], int] = lambda num_decodes: 0,
    ):
        self._choose_drafts, self._num_drafts = choose_drafts, 0
        self.ranks = tuple(
            create(first_slot=rank * max_num_seqs, choose_drafts=lambda _: self._num_drafts)
            for rank in range(num_ranks)
        )
        """The scheduler of each."""
        first, *others = self.ranks
        self.statistics, self.speculation = first.statistics, first.speculation
        for other in others:
            other.statistics, other.speculation = first.statistics, first.speculation
        self._last = ScheduledStep(StepPlan.joined([idle_plan(0)] * num_ranks, epoch=0), ranks=(None,) * num_ranks)

    @property
    def requests(self) -> tuple[Request, ...]:
        """See `Scheduler.requests`."""
        return tuple(chain.from_iterable(rank.requests for rank in self.ranks))

    @property
    def num_waiting(self) -> int:
        return sum(rank.num_waiting for rank in self.ranks)

    @property
    def num_running(self) -> int:
        return sum(rank.num_running for rank in self.ranks)

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks that requests hold, of the rank that has the fewest left."""
        return max(rank.kv_usage for rank in self.ranks)

    @property
    def has_requests(self) -> bool:
        return any(rank.has_requests for rank in self.ranks)

    def seconds_until_work(self) -> float | None:
        """See `Scheduler.seconds_until_work`."""
        waits = [rank.seconds_until_work() for rank in self.ranks if rank.has_requests]
        known = [seconds for seconds in waits if seconds is not None]
        return min(known) if known and len(known) == len(waits) else None

    def add(self, request: Request) -> None:
        """Queue a request where it costs least: the prompts that wait before it, and what of its own is not cached there.

        Raises:
            RequestError: as `Scheduler.add`.
        """
        if any(rank.has(request.id) for rank in self.ranks):
            raise RequestError(
                f"request id {request.id!r} is in use; ids must differ while requests run", param="request_id"
            )
        min(self.ranks, key=lambda rank: rank.load - rank.num_cached(request)).add(request)

    def abort(self, request_id: str) -> RequestUpdate | None:
        """See `Scheduler.abort`."""
        return self.end(request_id, FinishReason.ABORT)

    def end(self, request_id: str, reason: FinishReason) -> RequestUpdate | None:
        """See `Scheduler.end`."""
        return next((rank.end(request_id, reason) for rank in self.ranks if rank.has(request_id)), None)

    def preempt_all(self) -> None:
        """See `Scheduler.preempt_all`."""
        for rank in self.ranks:
            rank.preempt_all()

    def forget_free(self) -> int:
        """See `Scheduler.forget_free`."""
        return sum(rank.forget_free() for rank in self.ranks)

    def schedule(self) -> ScheduledStep | None:
        """Plan one step of all ranks; None if no rank can run anything until results or requests arrive."""
        self._even_out()
        self._num_drafts = self._choose_drafts(self.num_running)
        steps = tuple(rank.schedule() for rank in self.ranks)
        if not any(steps):
            return None
        self._last = self._join(steps)
        return self._last

    def reconcile(self, step: ScheduledStep, results: StepResults) -> StepUpdates:
        """See `Scheduler.reconcile`."""
        parts = zip(self.ranks, step.ranks, results.ranks, strict=True)
        return StepUpdates.joined([rank.reconcile(own, part) for rank, own, part in parts if own is not None])

    def _join(self, steps: tuple[ScheduledStep | None, ...]) -> ScheduledStep:
        """What all ranks run. It is of the last joined plan's epoch if each rank's is of its own last one's."""
        last, last_plan = self._last, self._last.plan
        if all(step is other for step, other in zip(steps, last.ranks, strict=True)):
            return last
        idle = idle_plan(self._num_drafts)
        plans = tuple(idle if step is None else step.plan for step in steps)
        assert last_plan.epoch is not None
        if all(plan.epoch == other.epoch for plan, other in zip(plans, last_plan.ranks, strict=True)):
            plan = replace(last_plan, ranks=plans)
        else:
            plan = StepPlan.joined(plans, last_plan.epoch + 1)
        busy = [step for step in steps if step is not None]
        return ScheduledStep(
            plan,
            admitted=tuple(chain.from_iterable(step.admitted for step in busy)),
            follows_grammar=any(step.follows_grammar for step in busy),
            ranks=steps,
            chunks=tuple(chain.from_iterable(step.chunks for step in busy)),
        )

    def _even_out(self) -> None:
        """Give each rank that could take a request at once the first one that waits in another's line."""
        crowded = [rank for rank in self.ranks if rank.num_waiting]
        if not crowded or len(crowded) == len(self.ranks):
            return
        for idler in self.ranks:
            for rank in crowded:
                request = rank.first_in_line()
                if request is not None and rank.is_short_for(request) and idler.can_take(request):
                    rank.hand_over(request, idler)
                    break

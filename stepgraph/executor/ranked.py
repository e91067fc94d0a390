"""RankedExecutor: devices that all run the same rows, each with its part of the model. And what builds executors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from stepgraph.config import EngineConfig
from stepgraph.errors import StepgraphError
from stepgraph.executor.build import Ranks, build_local_executor
from stepgraph.executor.leading import LeadingExecutor, Threads
from stepgraph.executor.limits import check_devices, check_parts
from stepgraph.executor.local import LocalExecutor
from stepgraph.executor.lockstep import LockstepExecutor
from stepgraph.executor.orders import words_of_admission
from stepgraph.executor.ring import NOTHING, Kind, Words
from stepgraph.executor.workers import Build, Workers, log_level
from stepgraph.models.source import ModelSource
from stepgraph.parallel.shard import Shard
from stepgraph.step.admission import Admission
from stepgraph.step.plan import StepPlan
from stepgraph.step.shape import StepShape

TIME_LIMIT_S = 30.0
"""How long a collective waits for another rank before it is given up."""


def start_workers(config: EngineConfig) -> Workers | None:
    """The processes that `build_executor` needs; None for one device. They import for seconds, in which the model can be found.

    Raises:
        ConfigError: this machine does not have the devices.
    """
    if config.parallel.num_ranks == 1:
        return None
    check_devices(config)
    return Workers(config.parallel.num_ranks)


def build_executor(
    config: EngineConfig,
    source: ModelSource,
    *,
    workers: Workers | None = None,
    meanwhile: Callable[[], object] = lambda: None,
    progress: bool = False,
) -> LocalExecutor | LeadingExecutor:
    """What runs an engine's steps, on as many devices as the settings ask for. See `build_local_executor` and
    `build_ranked_executor` for arguments and errors.

    Args:
        workers: from `start_workers`, which end with it.
    """
    if config.parallel.num_ranks == 1:
        return build_local_executor(config, source, meanwhile=meanwhile, progress=progress)
    return build_ranked_executor(
        config, source, meanwhile=meanwhile, progress=progress, workers=workers, ends_workers=True
    )


def build_ranked_executor(
    config: EngineConfig,
    source: ModelSource,
    *,
    meanwhile: Callable[[], object] = lambda: None,
    progress: bool = False,
    workers: Workers | None = None,
    ends_workers: bool = False,
    time_limit_s: float = TIME_LIMIT_S,
) -> LeadingExecutor:
    """All that runs an engine's steps on several devices: this process has the first of them, and processes that it starts have
    the others.

    Args:
        config: all settings.
        source: the model; the others find it by the settings.
        meanwhile: called while weights are read, if they are.
        progress: show progress bars of the first device on stderr.
        workers: of as many ranks, which wait for another engine after this one; default: new ones, which end with it.
        ends_workers: end the given ones, too.
        time_limit_s: how long a collective waits for another rank before it is given up.

    Raises:
        ConfigError: settings that this model or machine cannot meet.
        ModelError: the model cannot be read or run.
        EngineDeadError: a process ended while it built its part.
    """
    size = config.parallel.num_ranks
    check_devices(config)
    check_parts(config, source)
    ends_workers = ends_workers or workers is None
    workers = workers or Workers(size)
    assert workers.size == size, (workers.size, size)
    computes_here = config.model.device == "cpu" or not torch.cuda.is_available()
    threads = Threads(size) if computes_here else None
    try:
        build = Build(config, None if threads is None else threads.each, time_limit_s, log_level())
        workers.build(build)
        ranks = Ranks(Shard(0, size), workers.exchange, time_limit_s)
        local = build_local_executor(config, source, meanwhile=meanwhile, progress=progress, ranks=ranks)
        for rank, specs in enumerate(workers.built(), start=1):
            alike = replace(specs, device=local.specs.device, longest_step_s=local.specs.longest_step_s)
            if alike != local.specs:
                raise StepgraphError(f"rank {rank} was built otherwise than rank 0: {specs}, not {local.specs}")
    except BaseException:
        workers.close(now=True)
        if threads is not None:
            threads.restore()
        raise
    leading = RankedExecutor if config.parallel.data_parallel_size == 1 else LockstepExecutor
    return leading(local, workers, build, ends_workers=ends_workers, threads=threads)


class RankedExecutor(LeadingExecutor):
    """All ranks run the same rows, each with its part of the model, and come to the same results: this process reads its own."""

    def admit(self, admission: Admission) -> None:
        """See `Executor.admit`. Workers do it meanwhile; `wait` says if one could not."""
        self._admitted_at = self.runner.num_launched
        self._order(Kind.ADMIT, words=words_of_admission(admission))
        self._local.admit(admission)

    def set_masks(self, slot: int, masks: npt.NDArray[np.int32]) -> None:
        """See `Executor.set_masks`."""
        self._order(Kind.MASKS, slot, words=masks.ravel())
        self._local.set_masks(slot, masks)

    def _pack(self, plan: StepPlan, shape: StepShape) -> tuple[slice, Words]:
        part = self.runner.pack(plan, shape)
        return part, self.runner.staged(part) if part.stop else NOTHING

    def check_alike(self) -> None:
        """EngineDeadError if a rank knows something else of the requests than rank 0, with no step under way."""
        first, *others = self._on_all_soon(LocalExecutor.checksum)
        for rank, other in enumerate(others, start=1):
            if other != first:
                raise self._fail(
                    f"rank {rank} has computed something else than rank 0 in one of {self.runner.num_launched} steps, so that no "
                    "answer since then can be trusted; this is a fault of stepgraph or of a device"
                )
        self._alike_at = self.runner.num_launched

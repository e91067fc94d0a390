"""Executor: all that an engine knows of the devices that run its steps.

What goes in and comes out are plain values: numbers, tuples, NumPy arrays, and what was read from files into host memory. No
tensor of a device passes, nor anything that holds one, so that the devices may be other processes'. (What
`export_cache` returns is there for other threads, which fill the cache beside the steps.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from stepgraph.abi.block_groups import BlockGroups
from stepgraph.errors import DeviceMemoryError
from stepgraph.layers.inputs import DispatchTable
from stepgraph.models.adapters import AdapterFile
from stepgraph.models.source import ModelSource
from stepgraph.step.admission import Admission
from stepgraph.step.log import GraphRecord, StepLog
from stepgraph.step.plan import StepPlan
from stepgraph.step.results import StepResults, Ticket
from stepgraph.step.shape import StepShape
from stepgraph.transfer.host_memory import HostCopies
from stepgraph.transfer.rank_cache import ExportedCache

R = TypeVar("R")


@dataclass(frozen=True)
class ExecutorSpecs:
    """What an executor can do, known once it has been built."""

    platform: str
    """Name of its platform."""
    device: str
    """Where steps run, for people."""
    dtype: str
    """Of weights and activations: `bfloat16`."""
    precision: str
    """For people: in which numbers the steps compute."""
    graph_backend: str
    """Name of what captures its graphs."""
    vocab_size: int
    max_model_len: int
    """Most tokens of a prompt and its answer."""
    num_kv_blocks: int
    """Of which each has a block of every block group; the null block included."""
    block_size: int
    """Tokens of a KV block."""
    max_tokens: int
    """Most tokens of a step."""
    token_sizes: tuple[int, ...]
    """Captured token counts, ascending."""
    run_ahead: int
    """Steps that may be launched before the results of an earlier one are read; with 0, launching a step is computing it."""
    num_ranks: int = 1
    """Devices that share the model, and every step."""
    data_parallel_size: int = 1
    """Ranks of which each has requests of its own, with slots, KV blocks and tokens of a step as said here. Slots of rank r are
    numbered from r · slots + 1 on, and plans have a part for each rank: see `StepPlan.ranks`."""
    collectives: str = ""
    """Name of what carries sums between them; none of one device."""
    draft_levels: tuple[int, ...] = (0,)
    """Numbers of proposals of a row that steps may be planned with, ascending; each has graphs of its own."""
    dispatch: DispatchTable | None = None
    """How the tokens of a step come to their experts; None without experts."""
    lookahead: int = 0
    """Tokens after a KV block that its content depends on."""
    reuses_prefixes: bool = True
    """Whether requests can start from KV blocks that others have filled, and nothing else."""
    num_checkpoints: int = 0
    """Where they cannot: lines for states from which they can, beside a line for each slot."""
    groups: BlockGroups = BlockGroups()  # noqa: RUF009  # frozen
    """Of the layers that keep KV blocks."""
    drafts_cost_when_idle: bool = True
    """A step with room for proposals is slower also where there are none."""
    max_adapters: int = 0
    """LoRA adapters that it holds at a time; 0 if it takes none."""
    can_sleep: bool = False
    """Whether `sleep` is allowed."""
    longest_step_s: float = 0.0
    """What its largest step takes on the slowest machine; 0 where that is next to nothing."""

    def dispatch_of(self, shape: StepShape) -> str | None:
        """How the tokens of steps of a shape come to their experts; None without experts."""
        return None if self.dispatch is None else str(self.dispatch.of(self.data_parallel_size * shape.num_tokens))


class AdmissionError(DeviceMemoryError):
    """A rank could not admit requests for lack of memory, as is found when the next results are read.

    Args:
        message: for people.
        slots: of the requests.
    """

    def __init__(self, message: str, slots: Sequence[int]):
        super().__init__(message)
        self.slots = tuple(slots)


class GraphCounts(NamedTuple):
    """The captured graphs in numbers."""

    num_graphs: int
    bytes: int
    capture_seconds: float
    """Time that all captures took."""
    failed_captures: int
    """Captures that failed while steps were served; these ran otherwise."""


class RankReport(NamedTuple):
    """One of the processes that share a model."""

    rank: int
    device: str
    pid: int
    num_graphs: int
    graph_bytes: int
    free_memory_bytes: int
    total_memory_bytes: int
    """Of the device."""
    cpu_share: float
    """Of a core, since the engine was built."""
    waiting_share: float
    """Of the time since then, what it waited for orders; 0 of the one that gives them."""
    experts: tuple[int, int] = (0, 0)
    """The first of a layer's experts that it keeps, and how many."""
    expert_tokens: tuple[int, ...] = ()
    """Of rank 0, which sees all tokens: how many chose each expert, in all layers together, since the engine was built; while
    steps run, as of the report before."""


class Executor(Protocol):
    """Runs the steps of one engine, by whose generations and epochs it tells requests and plans apart. Driven by that engine's
    thread alone, but for `read_adapter`."""

    specs: ExecutorSpecs

    @property
    def statistics(self) -> StepLog:
        """Which graphs served the steps launched so far."""

    # Steps

    def admit(self, admission: Admission) -> None:
        """Start a request in its slot, ordered before the next step; see `stepgraph.step.state.SlotState.admit`."""

    def set_masks(self, slot: int, masks: npt.NDArray[np.int32]) -> None:
        """Say which tokens a slot may sample, ordered before the next step; see `stepgraph.step.state.SlotState.set_masks`."""

    def launch(self, plan: StepPlan) -> Ticket:
        """Launch a step. At most `run_ahead` others may be launched and not collected.

        Raises:
            DeviceMemoryError: there is no memory for it; `recover` before the next one.
        """

    def wait(self, ticket: Ticket) -> None:
        """Block until a launched step is done.

        Raises:
            AdmissionError: another rank could not admit some requests, and what was computed since is worth nothing; `recover`
                before the next step.
            EngineDeadError: another rank has ended, or does not come.
        """

    def collect(self, ticket: Ticket) -> StepResults:
        """Results of a step that is done. Log-probabilities and proposals are valid until the next launch."""

    def recover(self) -> None:
        """Make the devices ready after a launch or an admission that failed, maybe half-way; raises what ails them if they are
        broken. What was left of requests' state is undefined: they must be admitted anew."""

    # LoRA adapters

    def read_adapter(self, folder: str) -> AdapterFile:
        """Read an adapter into host memory. May take long, and may be called in any thread.

        Raises:
            RequestError: the folder is not an adapter that this model can run.
        """

    def write_adapter(self, number: int, file: AdapterFile) -> None:
        """Put an adapter where slots of `SlotSampling.adapter` = `number`, 1 … `max_adapters`, find it; ordered before the next
        step."""

    # Life

    def sleep(self, *, keep_weights: bool) -> None:
        """Give the memory of weights and KV cache up, with no step under way. Can be called again, to drop kept weights.

        Args:
            keep_weights: keep them in host memory until `wake`.
        """

    def wake(self) -> None:
        """Take the memory back. ConfigError if others use it now; it sleeps on then."""

    def check_weights(self, weights: ModelSource | Iterable[tuple[str, Tensor]]) -> None:
        """Check that new weights fit the model, all of them, and keep them for `write_weights`; steps may be under way.

        Args:
            weights: a checkpoint of the same model, or all of its tensors, in host memory or not, under their names in
                transformers' checkpoints.

        Raises:
            ModelError: they are of another model, incomplete or of other shapes, or cannot be read.
        """

    def write_weights(self) -> None:
        """Write the weights that were checked, with no step under way. If it fails, there are some old and some new ones.

        Raises:
            ModelError: a file is damaged.
        """

    def close(self) -> None:
        """Free graphs, KV cache and weights, for good."""

    def watch_cache(self, lost: Callable[[], None]) -> None:
        """Have `lost` called when the KV cache no longer holds what was put there, though the executor did not sleep."""

    # Transfers

    def export_cache(self, backend: str) -> ExportedCache:
        """Let other engines reach the KV cache, and have a mover in each rank that fills it, until the executor is closed. To be
        called once, with no step under way. While it sleeps, nobody may fill it.

        Args:
            backend: name of the way to move bytes; see `stepgraph.transfer.create.create_backend`.

        Raises:
            ConfigError: the cache does not lie where that needs it, or layers keep something of requests beside it.
        """

    def keep_on_host(self, num_bytes: int) -> HostCopies:
        """Room for blocks of the KV cache in host memory, until the executor is closed. For one rank alone; to be called once.
        While it sleeps, nothing is to be copied.

        Raises:
            ConfigError: there is not so much memory.
        """

    # Graphs

    def prepare(self) -> bool:
        """Capture one graph that steps may need later; False if none is left."""

    def graph_counts(self) -> GraphCounts:
        """How many graphs there are, and what they take."""

    def graph_records(self) -> list[GraphRecord]:
        """The captured graphs and their use, smallest first."""

    def watch_captures(self, about_to: Callable[[], None]) -> None:
        """Have `about_to` called, by `launch` or `prepare`, when a graph is about to be captured, which may take long."""

    # Ranks

    def on_all(self, function: Callable[..., R], *args: Any) -> list[R]:
        """Call ``function(executor, *args)`` on every rank at the same time, with the `LocalExecutor` of each, with no step under
        way. It may run collectives if it does the same on all. Returns what it returned, in the order of the ranks.

        Args:
            function: which other processes can import.
            args: that can be pickled, as can what it returns.

        Raises:
            StepgraphError: what it raised on a rank.
        """

    def rank_reports(self) -> list[RankReport]:
        """How the ranks do, in their order. Steps may be under way."""

"""Where the time of a step goes: every operator with its kernels, the bytes and FLOPs it cannot avoid, and what is left between.

A captured graph knows kernels, not operators. So the same program is run eagerly once, under a recorder that wraps each
operator call in a mark and notes the tensors it is given; the profiler says which kernels were launched inside which mark. A
kernel of the graph belongs to the operator that launched the kernel of the same name in the same turn. On CPU there are no
kernels: the operators of eager steps are timed themselves.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stepgraph.bench.roofline import ExpertLoad, Limits, Operand, StepCost, operator_cost
from stepgraph.step.runner import StepRunner

_MARK = "operator call "
_UNKNOWN = "kernels of no known operator"
_PAUSE_S = 0.005
"""Between replays: longer than any gap inside a step, so that the replays can be told apart."""
_PAUSE_SEEN_US = 2000.0


@dataclass(frozen=True)
class KernelTime:
    """One kernel of an operator: all its calls in a step together."""

    name: str
    calls: float
    us: float


@dataclass(frozen=True)
class OperatorTime:
    """All calls of one operator on weights of one role, in one step."""

    operator: str
    calls: int
    us: float
    bytes: int
    """That they must read and write."""
    flops: int
    least_us: float
    """Roofline."""
    kernels: tuple[KernelTime, ...]
    """Empty on CPU."""


@dataclass(frozen=True)
class StepAccount:
    """A step's time, in full: that of the operators and that between them."""

    operators: tuple[OperatorTime, ...]
    """Longest first."""
    between_us: float
    """In which no kernel ran; on CPU, Python between the operators, that of the recorder included."""

    @property
    def us(self) -> float:
        """Of the step, from its first kernel's start to its last one's end."""
        return self.between_us + sum(operator.us for operator in self.operators)

    @property
    def unexplained(self) -> float:
        """Share of the step in kernels that no operator was found for."""
        return sum(o.us for o in self.operators if o.operator == _UNKNOWN) / self.us


class Kernel(NamedTuple):
    """One launch, as the profiler saw it."""

    name: str
    start_us: float
    end_us: float


@dataclass(frozen=True)
class Call:
    """One operator call of a step."""

    operator: str
    cost: StepCost
    us: float
    """On the host, which on CPU is the operator itself."""


def account(
    runner: StepRunner,
    prepare: Callable[[], None],
    eager: Callable[[], object],
    replay: Callable[[], object],
    rows: Sequence[tuple[int, int]],
    limits: Limits,
    replays: int = 5,
) -> StepAccount:
    """Take a step apart. The runner's workbench is open.

    Args:
        runner: whose step it is.
        prepare: puts the state back to before the step.
        eager: runs the step's program, operator by operator.
        replay: runs the same step as a graph.
        rows: (query length, keys) of each row.
        limits: of the machine.
        replays: means are taken over so many, on CPU medians.
    """
    recorder = _Recorder(runner, rows)
    for _ in range(2):  # the first may compile kernels
        prepare()
        eager()
    if runner.platform.device.type != "cuda":
        runs = [recorder.run(prepare, eager) for _ in range(replays)]
        seconds, calls = zip(*runs, strict=True)
        us = [median(call.us for call in turn) for turn in zip(*calls, strict=True)]
        return summarize(calls[0], us, [()] * len(us), 1e6 * median(seconds), limits)
    marked, owners = _owners(recorder, prepare, eager)
    bursts = _replay(runner, prepare, replay, replays)
    return assign(marked, owners, bursts, limits)


def assign(
    calls: Sequence[Call], owners: Mapping[str, Sequence[int]], replays: Sequence[Sequence[Kernel]], limits: Limits
) -> StepAccount:
    """Give the kernels of replayed graphs to operator calls.

    A kernel that starts before the one before it has ended, as programmatic dependent launch lets it, counts from that end on:
    what it did until then cost the step nothing.

    Args:
        calls: of the step's program.
        owners: by the name of a kernel, which call launched its first, second, … occurrence.
        replays: the kernels of each, by start.
        limits: of the machine.
    """
    us = [0.0] * (len(calls) + 1)  # the last: of no known operator
    kernels: list[list[KernelTime]] = [[] for _ in us]
    span_us = 0.0
    for replay in replays:
        waiting = {name: deque(indices) for name, indices in owners.items()}
        busy_until = replay[0].start_us
        for kernel in replay:
            queue = waiting.get(kernel.name)
            index = queue.popleft() if queue else len(calls)
            own_us = max(0.0, kernel.end_us - max(kernel.start_us, busy_until)) / len(replays)
            busy_until = max(busy_until, kernel.end_us)
            us[index] += own_us
            kernels[index].append(KernelTime(kernel.name, 1 / len(replays), own_us))
        span_us += (busy_until - replay[0].start_us) / len(replays)
    unknown = Call(_UNKNOWN, StepCost(0, 0), 0.0)
    return summarize([*calls, *([unknown] if kernels[-1] else [])], us, kernels, span_us, limits)


def summarize(
    calls: Sequence[Call],
    us: Sequence[float],
    kernels: Sequence[Sequence[KernelTime]],
    span_us: float,
    limits: Limits,
) -> StepAccount:
    """Add up the calls of each operator. Those that do nothing on the device are left out.

    Args:
        calls: of one step.
        us: of each.
        kernels: of each.
        span_us: of the step.
        limits: of the machine.
    """
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, call in enumerate(calls):
        groups[call.operator].append(index)
    operators = [
        OperatorTime(
            operator=name,
            calls=len(indices),
            us=sum(us[i] for i in indices),
            bytes=sum(calls[i].cost.bytes for i in indices),
            flops=sum(calls[i].cost.flops for i in indices),
            least_us=1e3 * sum(calls[i].cost.least_ms(limits) for i in indices),
            kernels=_by_name(kernel for i in indices for kernel in kernels[i]),
        )
        for name, indices in groups.items()
        if sum(us[i] for i in indices)
    ]
    operators.sort(key=lambda operator: -operator.us)
    return StepAccount(tuple(operators), span_us - sum(operator.us for operator in operators))


def split_bursts(kernels: Iterable[Kernel]) -> list[list[Kernel]]:
    """Kernels in the order of their start, cut where the device did nothing for a while."""
    bursts: list[list[Kernel]] = []
    busy_until = float("-inf")
    for kernel in sorted(kernels, key=lambda k: k.start_us):
        if kernel.start_us - busy_until > _PAUSE_SEEN_US:
            bursts.append([])
        bursts[-1].append(kernel)
        busy_until = max(busy_until, kernel.end_us)
    return bursts


class _Recorder(TorchDispatchMode):
    """Notes every operator call that does something, and marks it for the profiler."""

    def __init__(self, runner: StepRunner, rows: Sequence[tuple[int, int]]):
        super().__init__()
        self._rows, self._num_heads = rows, runner.model.attention_specs[0].num_heads
        model = cast(nn.Module, runner.model)
        named = [*model.named_parameters(), *model.named_buffers()]
        self._names = {_address(tensor): name for name, tensor in named}
        self._caches = {_address(tensor) for cache in runner.caches for tensor in cache.block_tensors}
        self._synchronize = runner.platform.synchronize
        self._calls: list[Call] = []
        self._chosen: list[int] = []
        """Tokens that chose each expert in the last layer that had any."""

    def run(self, prepare: Callable[[], None], eager: Callable[[], object]) -> tuple[float, list[Call]]:
        """Seconds of one step, and its calls."""
        prepare()
        self._calls = []
        self._synchronize()
        started = time.perf_counter()
        with self:
            eager()
        self._synchronize()
        return time.perf_counter() - started, self._calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.is_view:
            return func(*args, **(kwargs or {}))
        totals = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)).get("totals")
        before = [] if totals is None else totals.tolist()
        with torch.profiler.record_function(f"{_MARK}{len(self._calls)}"):
            started = time.perf_counter()
            result = func(*args, **(kwargs or {}))
            seconds = time.perf_counter() - started
        if totals is not None:
            self._chosen = [now - then for now, then in zip(totals.tolist(), before, strict=True)]
        self._calls.append(self._note(func, args, kwargs or {}, result, seconds))
        return result

    def _note(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, seconds: float) -> Call:
        name = func._schema.name.partition("::")[2]
        operands, roles, known, first, has_experts = [], [], set(), 0, False
        given = {argument.name: argument for argument in func._schema.arguments}
        for argument, value in [*zip(given.values(), args, strict=False), *((given[k], v) for k, v in kwargs.items())]:
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            first = value if argument.name == "first" else first  # of the experts that are kept
            for tensor in _tensors(value):
                known.add(_address(tensor))
                path = self._names.get(_address(tensor), "")
                if "cos_sin" in path:  # some rows of it are looked up
                    continue
                kind = "weight" if path else "cache" if _address(tensor) in self._caches else "other"
                operands.append(_operand(tensor, kind, is_written=is_written, is_output=argument.name == "out"))
                has_experts = has_experts or ".experts." in path
                if path:
                    roles.append(_role(path, is_lookup="embedding" in name))
        results = [_operand(tensor) for tensor in _tensors(result) if _address(tensor) not in known]
        kept = max((x.shape[0] for x in operands if x.kind == "weight" and len(x.shape) == 3), default=0)
        load = ExpertLoad.of(self._chosen[first : first + kept]) if has_experts else None
        cost = operator_cost(name, operands, results, self._rows, self._num_heads, load)
        return Call(" ".join([name, ", ".join(dict.fromkeys(roles))]).strip(), cost, 1e6 * seconds)


def _role(path: str, *, is_lookup: bool) -> str:
    """What a parameter is for, the same in every layer."""
    module = path.rpartition(".")[0].rpartition(".")[2]
    return "output head" if module == "lm_head" or (module == "embed_tokens" and not is_lookup) else module


def _operand(tensor: Tensor, kind: Any = "other", *, is_written: bool = False, is_output: bool = False) -> Operand:
    shape = tuple(tensor.shape)
    return Operand(kind, shape, tensor.element_size(), tensor.is_floating_point(), is_written, is_output)


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _owners(
    recorder: _Recorder, prepare: Callable[[], None], eager: Callable[[], object]
) -> tuple[list[Call], dict[str, list[int]]]:
    """The calls of one eager step, and by the name of each kernel the calls that launched it."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        _, calls = recorder.run(prepare, eager)
    launched: list[tuple[int, float, str]] = []
    for event in profiler.events():
        marked: Any = event
        while marked is not None and not marked.name.startswith(_MARK):
            marked = marked.cpu_parent
        if marked is not None:
            index = int(marked.name.removeprefix(_MARK))
            launched += [(index, event.time_range.start, kernel.name) for kernel in event.kernels]
    owners: defaultdict[str, list[int]] = defaultdict(list)
    for index, _, name in sorted(launched):
        owners[name].append(index)
    return calls, owners


def _replay(
    runner: StepRunner, prepare: Callable[[], None], replay: Callable[[], object], replays: int
) -> list[list[Kernel]]:
    """The kernels of each replay."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(replays):
            prepare()
            runner.platform.synchronize()
            time.sleep(_PAUSE_S)
            replay()
            runner.platform.synchronize()
            time.sleep(_PAUSE_S)
    bursts = split_bursts(
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    )
    return sorted(bursts, key=len)[-replays:]  # the others put the state back


def _by_name(kernels: Iterable[KernelTime]) -> tuple[KernelTime, ...]:
    """One for each name, longest first."""
    found: defaultdict[str, list[KernelTime]] = defaultdict(list)
    for kernel in kernels:
        found[kernel.name].append(kernel)
    sums = (KernelTime(name, sum(k.calls for k in each), sum(k.us for k in each)) for name, each in found.items())
    return tuple(sorted(sums, key=lambda kernel: -kernel.us))

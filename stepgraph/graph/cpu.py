"""Static graphs on CPU: the program runs once while its operators are recorded, and is replayed without its Python.

Recording is to a program what CUDA's capture is: it runs for real, the buffers it works on are taken by address, what the host
decided is baked in, and what a replay could not follow (a value read on the host, a size that depends on data) is refused: the
same mistakes show on a laptop. What runs the record is `stepgraph.graph.script`'s business.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from stepgraph.errors import CaptureError
from stepgraph.graph.base import Output
from stepgraph.graph.script import Script, Value
from stepgraph.ops.registry import INLINED


@dataclass(frozen=True)
class CpuGraph(Generic[Output]):
    """A recorded program bound to the buffers it was recorded with."""

    calls: tuple[OpOverload, ...]
    """The operators that a replay runs, in their order."""
    run: Callable[..., tuple[Tensor, ...]]
    buffers: tuple[Tensor, ...]
    output_type: Callable[..., Output]

    def replay(self) -> Output:
        with torch.no_grad():
            return self.output_type(*self.run(*self.buffers))


class CpuBackend:
    """See `stepgraph.graph.base.GraphBackend`."""

    name = "cpu"

    def capture(self, program: Callable[[], Output], warmups: int) -> CpuGraph[Output]:
        recorder = _Recorder()
        with torch.no_grad(), recorder, _NoHostReads():
            output = program()
        run = recorder.finish(tuple(output))  # type: ignore[arg-type]  # a NamedTuple of tensors, see GraphBackend.capture
        graph: CpuGraph[Output] = CpuGraph(tuple(recorder.calls), run, tuple(recorder.buffers), type(output))
        for _ in range(warmups - 1):  # recording has run it once
            graph.replay()
        return graph

    def memory_bytes(self) -> int:
        return 0  # operators allocate as they run


class _Recorder(TorchDispatchMode):
    """Writes down the operators that run inside it.

    A tensor that none of them made is a buffer: an argument of the script, which would be free to drop writes to a constant. A
    view of a buffer is a buffer too, and not made again at each replay. Tensors made on the way are not kept.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether torch.compile is to keep out, which nobody here uses: torch imports it to tell it so, for over a second."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[OpOverload] = []
        self.buffers: list[Tensor] = []
        self._script = Script()
        self._inputs: dict[int, Value] = {}  # of the buffers, by their ids
        # Of what was made, by id, with a reference that tells whether the id is still that tensor's.
        self._made: dict[int, tuple[weakref.ref[Tensor], Value]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in INLINED:
            with self, _NoHostReads():
                result = INLINED[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        if torch.Tag.data_dependent_output in func.tags or func is torch.ops.aten.is_nonzero.default:
            raise _host_read(func)
        if torch.Tag.dynamic_output_shape in func.tags and not _is_index_of_positions(func, args):
            raise CaptureError(
                f"{func} yields a shape that depends on the batch; {_REPLAYED}. Use a fixed size and mask what is unused"
            )
        if func is torch.ops.aten.lift_fresh.default:  # a literal, like torch.tensor(1): each run has its own
            func = torch.ops.aten.lift_fresh_copy.default
        result = func(*args, **kwargs)
        if not self._is_view_of_buffer(func, args, result):
            self.calls.append(func)
            given = [self._given(arg) for arg in args], {name: self._given(arg) for name, arg in kwargs.items()}
            for tensor, value in self._script.add_call(func, *given, result):
                if id(tensor) not in self._inputs:
                    self._made[id(tensor)] = weakref.ref(tensor), value
        return result

    def finish(self, output: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        """The function that replays the record on `buffers` and returns what `output` are."""
        return self._script.finish([self._value(tensor) for tensor in output])

    def _given(self, argument: Any) -> Any:
        """An argument with what stands for its tensors in their place."""
        if isinstance(argument, Tensor):
            return self._value(argument)
        if isinstance(argument, list | tuple):
            return [self._given(item) for item in argument]
        return argument

    def _value(self, tensor: Tensor) -> Value:
        made = self._made_value(tensor)
        if made is not None:
            return made
        if id(tensor) not in self._inputs:
            self.buffers.append(tensor)
            self._inputs[id(tensor)] = self._script.add_input()
        return self._inputs[id(tensor)]

    def _is_view_of_buffer(self, func: OpOverload, args: Sequence[Any], result: Any) -> bool:
        """Whether `result` is made of a buffer without work. `x.to(dtype)`, a view by its schema, may also be a copy."""
        return (
            func.is_view
            and isinstance(result, Tensor)
            and self._made_value(args[0]) is None
            and result.untyped_storage()._cdata == args[0].untyped_storage()._cdata
        )

    def _made_value(self, tensor: Tensor) -> Value | None:
        reference, value = self._made.get(id(tensor), (None, None))
        return value if reference is not None and reference() is tensor else None


def _is_index_of_positions(func: OpOverload, args: Sequence[Any]) -> bool:
    """Whether it is `x[indices]` with as many results as indices; a mask for an index would yield as many as it holds."""
    return func is torch.ops.aten.index.Tensor and not any(
        index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    )


_REPLAYED = "a captured step would replay what it saw at capture"


def _host_read(how: object) -> CaptureError:
    return CaptureError(
        f"the step reads a tensor's value on the host ({how}); {_REPLAYED}. Keep the value on the device"
    )


class _NoHostReads(TorchFunctionMode):
    """Refuses what reads a tensor's memory without a call of an operator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__):
            raise _host_read(f"Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))

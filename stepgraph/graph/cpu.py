"""Static graphs on CPU: the program runs once while its operators are recorded, and is replayed without its Python.

Recording is to a program what CUDA's capture is: it runs for real, the buffers it works on are taken by address, what the host
decided is baked in, and what a replay could not follow (a value read on the host, a size that depends on data) is refused: the
same mistakes show on a laptop. The record is a graph of TorchScript's intermediate representation, whose interpreter dispatches
operators from C++ and needs no compiler. It is built call by call, with neither a tracer nor fake tensors: that takes about 25 us
an operator beside the run itself, where tracing (`make_fx`, then `torch.jit.trace`) took 600.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from stepgraph.errors import CaptureError
from stepgraph.graph.base import Output
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
        with torch.no_grad(), _as_recorded():
            try:
                return self.output_type(*self.run(*self.buffers))
            except RuntimeError as error:
                if "KeyboardInterrupt" in str(error):  # TorchScript hides its type if it strikes in a Python kernel
                    raise KeyboardInterrupt from error
                raise


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


def _as_recorded() -> AbstractContextManager[None]:
    """TorchScript runs the graph as it is, without profiling runs that rewrite it."""
    return torch.jit.optimized_execution(False)  # type: ignore[attr-defined]  # public, not exported


class _Recorder(TorchDispatchMode):
    """Writes down the operators that run inside it, as a TorchScript graph.

    A tensor that none of them made is a buffer: an input of the graph, since TorchScript would be free to drop writes to a
    constant. A view of a buffer is a buffer too, and not made again at each replay. Tensors made on the way are not kept.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether torch.compile is to keep out, which nobody here uses: torch imports it to tell it so, for over a second."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[OpOverload] = []
        self.buffers: list[Tensor] = []
        self._graph = torch._C.Graph()
        self._schemas: dict[OpOverload, _Schema] = {}
        self._inputs: dict[int, torch._C.Value] = {}  # of the buffers, by their ids
        # Of what was made, by id, with a reference that tells whether the id is still that tensor's.
        self._made: dict[int, tuple[weakref.ref[Tensor], torch._C.Value]] = {}
        self._constants: dict[tuple[str, bool], torch._C.Value] = {}

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
            self._record(func, args, kwargs, result)
        return result

    def finish(self, output: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        """The function that replays the record on `buffers` and returns what `output` are."""
        results = self._insert("prim::TupleConstruct", [self._value(tensor) for tensor in output], 1).output()
        results.setType(torch._C.TupleType([torch._C.TensorType.get()] * len(output)))
        self._graph.registerOutput(results)
        return torch._C._create_function_from_graph("step", self._graph)

    def _record(self, func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        if func not in self._schemas:
            self._schemas[func] = _Schema.of(func)
        schema = self._schemas[func]
        given = [*args, *(kwargs.get(name, default) for name, _, default in schema.arguments[len(args) :])]
        inputs = [self._input(value, kind) for value, (_, kind, _) in zip(given, schema.arguments, strict=True)]
        node = self._insert(schema.name, inputs, len(schema.returns))
        # The overload goes by the inputs' types: a number for a tensor, as in `x + 1`, is its own. Others must be what ran.
        assert node.schema() == schema.text or schema.takes_number_for_tensor(given), (node.schema(), schema.text)
        self.calls.append(func)
        results = result if len(schema.returns) > 1 else [result] * len(schema.returns)
        for i, (kind, found) in enumerate(zip(schema.returns, results, strict=True)):
            if isinstance(found, list | tuple):
                parts = self._insert("prim::ListUnpack", [node.outputsAt(i).setType(kind)], len(found))
                for j, tensor in enumerate(found):
                    self._made[id(tensor)] = weakref.ref(tensor), parts.outputsAt(j)
            elif isinstance(found, Tensor) and id(found) not in self._inputs:
                self._made[id(found)] = weakref.ref(found), node.outputsAt(i)  # `outputs()` takes 15 us

    def _insert(self, name: str, inputs: list[torch._C.Value], num_outputs: int) -> torch._C.Node:
        return self._graph.insertNode(self._graph.create(name, inputs, num_outputs))

    def _input(self, given: Any, kind: torch._C.JitType) -> torch._C.Value:
        """What stands in the graph for an argument of an operator whose schema says that it is of type `kind`."""
        if isinstance(given, Tensor):
            return self._value(given)
        if isinstance(given, list | tuple) and (not given or any(isinstance(item, Tensor) for item in given)):
            kind = kind.getElementType() if isinstance(kind, torch._C.OptionalType) else kind
            items = [self._input(item, kind) for item in given]
            return self._insert("prim::ListConstruct", items, 1).output().setType(kind)
        if isinstance(given, torch.memory_format):
            given = _MEMORY_FORMATS.index(given)
        is_flag = isinstance(given, bool) and isinstance(kind, torch._C.NumberType)
        key = repr(given), is_flag
        if key not in self._constants:
            constant = self._graph.insertConstant(given)  # type: ignore[attr-defined]  # missing in the stubs
            self._constants[key] = constant.setType(kind) if is_flag else constant  # a bool is no number otherwise
        return self._constants[key]

    def _value(self, tensor: Tensor) -> torch._C.Value:
        made = self._made_value(tensor)
        if made is not None:
            return made
        if id(tensor) not in self._inputs:
            self.buffers.append(tensor)
            self._inputs[id(tensor)] = self._graph.addInput()
        return self._inputs[id(tensor)]

    def _is_view_of_buffer(self, func: OpOverload, args: Sequence[Any], result: Any) -> bool:
        """Whether `result` is made of a buffer without work. `x.to(dtype)`, a view by its schema, may also be a copy."""
        return (
            func.is_view
            and isinstance(result, Tensor)
            and self._made_value(args[0]) is None
            and result.untyped_storage()._cdata == args[0].untyped_storage()._cdata
        )

    def _made_value(self, tensor: Tensor) -> torch._C.Value | None:
        reference, value = self._made.get(id(tensor), (None, None))
        return value if reference is not None and reference() is tensor else None


@dataclass(frozen=True)
class _Schema:
    """What TorchScript knows of an operator, out of reach of its slow accessors."""

    name: str
    arguments: tuple[tuple[str, torch._C.JitType, Any], ...]  # name, type, default
    returns: tuple[torch._C.JitType, ...]
    text: str

    @classmethod
    def of(cls, func: OpOverload) -> _Schema:
        schema = func._schema
        arguments = tuple((a.name, a.type, a.default_value) for a in schema.arguments)
        return cls(schema.name, arguments, tuple(r.type for r in schema.returns), str(schema))

    def takes_number_for_tensor(self, given: Sequence[Any]) -> bool:
        """Whether one of these arguments is a number where the schema says tensor."""
        kinds = (kind.kind() for _, kind, _ in self.arguments)
        return any(kind == "TensorType" and isinstance(v, int | float) for kind, v in zip(kinds, given, strict=True))


_MEMORY_FORMATS = [torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d]
"""By the number that TorchScript has for each."""


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

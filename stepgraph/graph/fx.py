"""Static graphs on CPU: the program is traced once, checked, and replayed without running its Python again.

`make_fx` traces with fake tensors, so tracing changes no state and a host value that depends on the batch shows as an
unbacked symbol, which is refused. What the host did decide is baked in, exactly as a CUDA graph bakes it: the same mistakes
show on a laptop. The traced graph is replayed by TorchScript's interpreter, which dispatches operators from C++ and needs
no compiler.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, free_unbacked_symbols
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from stepgraph.errors import CaptureError
from stepgraph.graph.base import Output
from stepgraph.ops.registry import INLINED


@dataclass(frozen=True)
class FxGraph(Generic[Output]):
    """A traced program bound to the buffers it was traced with."""

    calls: fx.Graph
    """The traced operators, for inspection."""
    traced: Callable[..., Any]
    buffers: tuple[Tensor, ...]
    output_type: Callable[..., Output]

    def replay(self) -> Output:
        with torch.no_grad(), _as_traced():
            try:
                return self.output_type(*self.traced(*self.buffers))
            except RuntimeError as error:
                if "KeyboardInterrupt" in str(error):  # TorchScript hides its type if it strikes in a Python kernel
                    raise KeyboardInterrupt from error
                raise


class FxBackend:
    """See `stepgraph.graph.base.GraphBackend`."""

    name = "fx"

    def capture(self, program: Callable[[], Output], warmups: int) -> FxGraph[Output]:
        output_type: list[type] = []

        def flat_program() -> tuple[Tensor, ...]:
            output = program()
            output_type.append(type(output))
            return tuple(output)  # type: ignore[arg-type]  # a NamedTuple of tensors, see GraphBackend.capture

        module, buffers = trace(flat_program)
        with torch.no_grad(), _as_traced(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript announces its retirement; it is the floor, not the plan
            traced = torch.jit.trace(module, buffers, check_trace=False)
        graph: FxGraph[Output] = FxGraph(module.graph, traced, buffers, output_type[0])
        for _ in range(warmups - 1):  # tracing has run it once
            graph.replay()
        return graph


def _as_traced() -> AbstractContextManager[None]:
    """TorchScript runs the graph as it is, without profiling runs that rewrite it."""
    return torch.jit.optimized_execution(False)  # type: ignore[attr-defined]  # public, not exported


def trace(function: Callable[[], Any]) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """Trace a function of fixed buffers with fake tensors and refuse whatever depends on their values.

    Returns:
        The traced module, and the buffers the function closed over, which are the module's inputs.

    Raises:
        CaptureError: a value read on the host, a branch on a tensor, or a shape that depends on data; names the operator.
    """
    fakes = _FakeBuffers()

    def function_of_fakes() -> Any:
        with fakes, _NoHostReads():
            return function()

    try:
        with torch.no_grad():
            module = make_fx(
                function_of_fakes, decomposition_table=dict(INLINED), tracing_mode="fake", _allow_non_fake_inputs=True
            )()
    except (GuardOnDataDependentSymNode, DataDependentOutputException) as error:
        raise _host_read(str(error).splitlines()[0]) from error
    for node in module.graph.nodes:
        if free_unbacked_symbols(node.meta.get("val")):
            raise CaptureError(
                f"{node.target} ({node.name}) yields a value or shape that depends on the batch: {node.meta['val']}; "
                f"{_REPLAYED}. Use a fixed size and mask what is unused"
            )
    return module, _lift_buffers(module, fakes)


_REPLAYED = "a captured step would replay what it saw at capture"


def _host_read(how: object) -> CaptureError:
    return CaptureError(
        f"the step reads a tensor's value on the host ({how}); {_REPLAYED}. Keep the value on the device"
    )


class _FakeBuffers(TorchDispatchMode):
    """Shows the tensors that a function closes over to the tracer as fake ones.

    The tracer takes a real tensor for a constant: reading its value is allowed then, and writing to it happens.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fakes: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.lift_fresh.default:  # a literal, like torch.tensor(1), is a constant indeed
            return func(*args, **(kwargs or {}))
        if torch.Tag.data_dependent_output in func.tags:
            raise _host_read(func)
        args, kwargs = tree_map_only(Tensor, self._fake, (args, kwargs or {}))
        return func(*args, **kwargs)

    def real(self, tensor: Tensor) -> Tensor:
        """The buffer that `tensor` stands for; itself if it is a constant."""
        return next((real for real, fake in self._fakes.values() if fake is tensor), tensor)

    def _fake(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in self._fakes:
            mode = detect_fake_mode()
            assert mode is not None
            fake = mode.from_tensor(tensor, static_shapes=True)
            self._fakes[id(tensor)] = (tensor, fake)
            if fake._base is not None:  # a view: the trace makes it from its base
                assert tensor._base is not None
                self._fakes[id(tensor._base)] = (tensor._base, fake._base)
        return self._fakes[id(tensor)][1]


class _NoHostReads(TorchFunctionMode):
    """Refuses what reads a buffer's memory without telling the tracer."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__):
            raise _host_read(f"Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))


def _lift_buffers(module: fx.GraphModule, fakes: _FakeBuffers) -> tuple[Tensor, ...]:
    """Turn the tensors the program closed over into inputs of the traced module, in place, and return them.

    As constants, TorchScript would be free to fold what is computed from them.
    """
    buffers: dict[int, tuple[Tensor, fx.Node]] = {}
    last: fx.Node | None = None
    for node in list(module.graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = fakes.real(getattr(module, node.target))
        if id(tensor) not in buffers:
            place = module.graph.inserting_after(last) if last else module.graph.inserting_before(node)
            with place:
                last = module.graph.placeholder(f"buffer_{len(buffers)}")
            buffers[id(tensor)] = (tensor, last)
        node.replace_all_uses_with(buffers[id(tensor)][1])
        module.graph.erase_node(node)
    assert not any(isinstance(tensor, FakeTensor) for tensor, _ in buffers.values())
    module.recompile()
    return tuple(tensor for tensor, _ in buffers.values())

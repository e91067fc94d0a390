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
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, free_unbacked_symbols

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

        module = trace(flat_program)
        buffers = _lift_buffers(module)
        with torch.no_grad(), _as_traced(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript announces its retirement; it is the floor, not the plan
            traced = torch.jit.trace(module, buffers, check_trace=False)
        graph: FxGraph[Output] = FxGraph(module.graph, traced, buffers, output_type[0])
        for _ in range(warmups):
            graph.replay()
        return graph


def _as_traced() -> AbstractContextManager[None]:
    """TorchScript runs the graph as it is, without profiling runs that rewrite it."""
    return torch.jit.optimized_execution(False)  # type: ignore[attr-defined]  # public, not exported


def trace(function: Callable[[], Any]) -> fx.GraphModule:
    """Trace a function of fixed buffers with fake tensors and refuse whatever depends on their values.

    Raises:
        CaptureError: a value read on the host, a branch on a tensor, or a shape that depends on data; names the operator.
    """
    try:
        with torch.no_grad():
            module = make_fx(
                function, decomposition_table=dict(INLINED), tracing_mode="fake", _allow_non_fake_inputs=True
            )()
    except (GuardOnDataDependentSymNode, torch._subclasses.fake_tensor.DataDependentOutputException) as error:
        raise CaptureError(
            f"the step reads a tensor's value on the host ({str(error).splitlines()[0]}); a captured step would replay the "
            "value it saw at capture. Keep the value on the device"
        ) from error
    for node in module.graph.nodes:
        if free_unbacked_symbols(node.meta.get("val")):
            raise CaptureError(
                f"{node.target} ({node.name}) yields a value or shape that depends on the batch: {node.meta['val']}; a "
                "captured step would replay the one it saw at capture. Use a fixed size and mask what is unused"
            )
    return module


def _lift_buffers(module: fx.GraphModule) -> tuple[Tensor, ...]:
    """Turn the tensors the program closed over into inputs of the traced module, in place, and return them.

    As constants, TorchScript would be free to fold what is computed from them.
    """
    buffers: dict[int, tuple[Tensor, fx.Node]] = {}
    first = next(iter(module.graph.nodes))
    for node in list(module.graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = getattr(module, node.target)
        if id(tensor) not in buffers:
            with module.graph.inserting_before(first):
                buffers[id(tensor)] = (tensor, module.graph.placeholder(f"buffer_{len(buffers)}"))
        node.replace_all_uses_with(buffers[id(tensor)][1])
        module.graph.erase_node(node)
    module.recompile()
    return tuple(tensor for tensor, _ in buffers.values())

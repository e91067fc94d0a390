"""Straight-line programs of torch operators, run by TorchScript's interpreter: all that needs torch's private interfaces for it.

The interpreter dispatches operators from C++ and needs no compiler. The graph is built call by call, with neither a tracer nor
fake tensors: that takes about 25 us an operator, where tracing (`make_fx`, then `torch.jit.trace`) took 600. Torch deprecates
TorchScript; but with the same calls in a list that a loop in Python runs, a decode step of SmolLM2 took 8.6 % longer (median of
300 pairs on one core: 17.5 ms and 1.5 ms more, 4 us for each of 360 calls); a prompt of 512 tokens took as long (1.9 s).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

Value = torch._C.Value
"""What stands for a tensor in a script."""


class Script:
    """A program, written call by call."""

    def __init__(self) -> None:
        self._graph = torch._C.Graph()
        self._schemas: dict[OpOverload, _Schema] = {}
        self._constants: dict[tuple[str, bool], Value] = {}

    def add_input(self) -> Value:
        """What stands for the next argument of the program."""
        return self._graph.addInput()

    def add_call(
        self, func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], result: Any
    ) -> Iterator[tuple[Tensor, Value]]:
        """Write down the call of an operator.

        Args:
            func: the operator.
            args, kwargs: what it was given, with values in place of tensors.
            result: what it returned.

        Yields:
            Each tensor of its result, and what stands for it.
        """
        if func not in self._schemas:
            self._schemas[func] = _Schema.of(func)
        schema = self._schemas[func]
        given = [*args, *(kwargs.get(name, default) for name, _, default in schema.arguments[len(args) :])]
        inputs = [self._input(value, kind) for value, (_, kind, _) in zip(given, schema.arguments, strict=True)]
        node = self._insert(schema.name, inputs, len(schema.returns))
        # The overload goes by the inputs' types: a number for a tensor, as in `x + 1`, is its own. Others must be what ran.
        assert node.schema() == schema.text or schema.takes_number_for_tensor(given), (node.schema(), schema.text)
        results = result if len(schema.returns) > 1 else [result] * len(schema.returns)
        for i, (kind, found) in enumerate(zip(schema.returns, results, strict=True)):
            if isinstance(found, list | tuple):
                parts = self._insert("prim::ListUnpack", [node.outputsAt(i).setType(kind)], len(found))
                for j, tensor in enumerate(found):
                    yield tensor, parts.outputsAt(j)
            elif isinstance(found, Tensor):
                yield found, node.outputsAt(i)  # `outputs()` takes 15 us

    def finish(self, output: Sequence[Value]) -> Callable[..., tuple[Tensor, ...]]:
        """The function that runs the program on its arguments and returns what `output` stands for."""
        results = self._insert("prim::TupleConstruct", list(output), 1).output()
        results.setType(torch._C.TupleType([torch._C.TensorType.get()] * len(output)))
        self._graph.registerOutput(results)
        function = torch._C._create_function_from_graph("step", self._graph)

        def run(*arguments: Tensor) -> tuple[Tensor, ...]:
            # As it is written, without profiling runs that rewrite it.
            with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]  # public, not exported
                try:
                    return function(*arguments)
                except RuntimeError as error:
                    if "KeyboardInterrupt" in str(error):  # its type is lost where it strikes in a Python kernel
                        raise KeyboardInterrupt from error
                    raise

        return run

    def _insert(self, name: str, inputs: list[Value], num_outputs: int) -> torch._C.Node:
        return self._graph.insertNode(self._graph.create(name, inputs, num_outputs))

    def _input(self, given: Any, kind: torch._C.JitType) -> Value:
        """What stands for an argument of an operator whose schema says that it is of type `kind`."""
        if isinstance(given, Value):
            return given
        if isinstance(given, list | tuple) and (not given or any(isinstance(item, Value) for item in given)):
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

"""All operators by their Triton kernels, also where there is no GPU: under Triton's interpreter."""

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

import stepgraph.ops  # noqa: F401  # registers the operators
from stepgraph.platforms.kernels import _KERNELS, INLINED


def launcher(target: str) -> Callable[..., Any]:
    """What ``"module:function"`` names."""
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)


TARGETS = {name: kernels["cuda"] for name, kernels in _KERNELS.items() if "cuda" in kernels}
"""Of each operator, the name of what launches its Triton kernel."""


@contextmanager
def triton_operators(*names: str) -> Iterator[None]:
    """Makes these operators, or all, run their Triton kernels: on CUDA they do; on CPU the interpreter takes the CPU kernels'
    place."""
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("stepgraph::")}
    assert names or {f"stepgraph::{name}" for name in TARGETS} == registered
    names = names or tuple(TARGETS)
    library = torch.library.Library("stepgraph", "IMPL")
    if not torch.cuda.is_available():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces that a kernel is overridden, which is the purpose
            for name in names:
                library.impl(name, launcher(TARGETS[name]), "CPU", allow_override=True)
    try:
        with mock.patch.dict(INLINED):
            for name in names:  # CPU graphs record what the CPU kernels of these are made of
                INLINED.pop(getattr(torch.ops.stepgraph, name).default, None)
            yield
    finally:
        library._destroy()


def make_rows_of_products_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are on tensor cores. The interpreter's products are NumPy's, whose bits depend on where in memory a row is."""
    if torch.cuda.is_available():
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self, a, b, acc, input_precision, max_num_imprecise_acc):
        a_MK, b_KN = (x.data.astype(acc.data.dtype) for x in (a, b))
        product_MN = (a_MK[:, None, :] * b_KN.T.copy()[None]).sum(axis=-1)
        return TensorHandle(product_MN + acc.data, acc.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)

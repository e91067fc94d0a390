"""Kernels by the names of platforms. What a process chooses once, it keeps: each test has a process of its own."""

import subprocess
import sys
import textwrap

import pytest
import torch

from stepgraph.errors import ConfigError
from stepgraph.ops.registry import brings_kernel, register_kernels
from stepgraph.platforms.kernels import use_kernels

BEGINNING = """
import torch
from stepgraph import ops
from stepgraph.errors import ConfigError
from stepgraph.graph.cpu import CpuBackend
from stepgraph.ops.registry import INLINED, Inlined, brings_kernel, register_kernels
from stepgraph.platforms.kernels import use_kernels

CPU, META = torch.device("cpu"), torch.device("meta")
x, weight = torch.randn(3, 8), torch.randn(8)
swiglu, rms_norm = torch.ops.stepgraph.swiglu.default, torch.ops.stepgraph.rms_norm.default
normed = ops.rms_norm(x, weight, 1e-5)
"""


def run(body: str) -> None:
    """Run Python code after `BEGINNING`, whose assertions must hold."""
    done = subprocess.run([sys.executable, "-c", BEGINNING + textwrap.dedent(body)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_platform_runs_its_own_kernels_and_the_cpus_for_what_it_lacks() -> None:
    run(
        """
        register_kernels("third", {"swiglu": lambda x: x.new_full((3, 4), 7.0)})
        assert not (ops.swiglu(x) == 7).any()  # until it is used
        use_kernels("third", CPU)
        assert (ops.swiglu(x) == 7).all()
        assert torch.equal(ops.rms_norm(x, weight, 1e-5), normed)
        assert brings_kernel("swiglu", CPU) and not brings_kernel("rms_norm", CPU)
        """
    )


def test_a_recorded_graph_holds_the_platforms_kernel_not_what_the_cpus_is_made_of() -> None:
    run(
        """
        from typing import NamedTuple

        class Output(NamedTuple):
            result: torch.Tensor

        register_kernels("third", {
            "swiglu": lambda x: x[:, :4] * 2,
            "rms_norm": Inlined(lambda x, weight, eps: x * weight),
        })
        use_kernels("third", CPU)
        graph = CpuBackend().capture(lambda: Output(ops.rms_norm(ops.swiglu(x), weight[:4], 1e-5)), 1)
        assert graph.calls == (swiglu, torch.ops.aten.mul.Tensor), graph.calls
        assert torch.equal(graph.replay().result, x[:, :4] * 2 * weight[:4])
        """
    )


def test_two_platforms_of_one_type_of_device_are_refused_in_one_process() -> None:
    run(
        """
        use_kernels("third", CPU)
        use_kernels("third", CPU)
        try:
            use_kernels("cpu", CPU)
        except ConfigError as error:
            assert "device='cpu' cannot be used in a process that uses device='third'" in str(error), error
        else:
            raise AssertionError("not refused")
        """
    )


def test_kernels_that_would_not_run_any_more_are_refused() -> None:
    run(
        """
        register_kernels("third", {"swiglu": lambda x: x[:, :4]})
        use_kernels("third", CPU)
        try:
            register_kernels("third", {"geglu": lambda x: x[:, :4]})
        except ConfigError as error:
            assert "kernels of platform 'third' come too late" in str(error), error
        else:
            raise AssertionError("not refused")
        """
    )


def test_elsewhere_an_operator_without_a_kernel_is_refused_by_name() -> None:
    run(
        """
        register_kernels("third", {"swiglu": lambda x: x[:, :4]})
        use_kernels("third", META)
        assert ops.swiglu(x.to(META)).shape == (3, 4)
        try:
            ops.rms_norm(x.to(META), weight.to(META), 1e-5)
        except ConfigError as error:
            assert "device='third' has no kernel for the operator rms_norm" in str(error), error
        else:
            raise AssertionError("not refused")
        """
    )


def test_a_kernel_for_an_operator_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'third' brings kernels for unknown operators: swiglo; there are .*swiglu"):
        register_kernels("third", {"swiglo": torch.relu})


def test_kernels_of_built_in_platforms_are_not_replaced() -> None:
    with pytest.raises(ConfigError, match="kernels of platform 'cpu' are built in"):
        register_kernels("cpu", {"swiglu": torch.relu})
    before = torch.ops.stepgraph.swiglu.default(torch.ones(1, 4))
    use_kernels("cpu", torch.device("cpu"))
    assert torch.equal(torch.ops.stepgraph.swiglu.default(torch.ones(1, 4)), before)


def test_every_operator_has_kernels_of_the_built_in_platforms() -> None:
    names = [
        n.removeprefix("stepgraph::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("stepgraph::")
    ]
    assert len(names) > 20
    assert all(brings_kernel(name, torch.device(device)) for name in names for device in ("cpu", "cuda"))
    assert [name for name in names if brings_kernel(name, torch.device("meta"))] == ["grouped_linear"]

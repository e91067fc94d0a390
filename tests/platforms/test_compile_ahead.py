"""Kernels compiled ahead of their launches, for a GPU that need not be there."""

import ast
import subprocess
import sys
import threading
from pathlib import Path

import torch
import triton
import triton.language as tl

import stepgraph.ops
from stepgraph.ops.launched import launched
from stepgraph.platforms.compile_ahead import compile_ahead

KERNELS = """
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

from stepgraph.ops.launched import launched
from stepgraph.platforms.compile_ahead import compile_ahead


class Absent:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


driver.set_active(Absent())


@launched
@triton.jit
def add(x_ptr, y, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    tl.store(x_ptr + offset, tl.load(x_ptr + offset) + y)


@launched
@triton.jit
def clear(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), 0.0)


@launched
@gluon.jit
def clear_box(x_desc):
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    box = gl.allocate_shared_memory(gl.float32, [8, 16], x_desc.layout)
    box.store(gl.zeros([8, 16], gl.float32, layout))
    tma.async_copy_shared_to_global(x_desc, [0, 0], box)


x = torch.full((16,), 3.0)
x_desc = TensorDescriptor(x, [1, 16], [16, 1], [8, 16], gl.NVMMASharedLayout(64, 32, 2))


def program(block):
    def run():
        new = torch.empty(1000)
        assert not new.any()
        for _ in range(3):
            add[(1,)](x, 2.0, BLOCK=block)
        clear[(1,)](x, BLOCK=16)
        clear_box[(1,)](x_desc)

    return run


print(*compile_ahead([program(16), program(32)]), *compile_ahead([program(32)]))
assert x.tolist() == [3.0] * 16
"""


def test_each_kernel_is_compiled_once_and_found_on_disk_by_the_next_process(tmp_path) -> None:
    (tmp_path / "kernels.py").write_text(KERNELS)  # Triton reads the source of a kernel

    def counts() -> str:
        environment = {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": ":".join(sys.path)}
        return subprocess.run(
            [sys.executable, tmp_path / "kernels.py"], env=environment, capture_output=True, text=True, check=True
        ).stdout

    assert counts() == "4 0 0 0\n"
    assert counts() == "0 4 0 0\n"


@launched
@triton.jit
def _count_kernel(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr) + 1)


def test_launches_of_another_thread_run_while_one_compiles_ahead(device) -> None:
    mine, other = torch.zeros(2, 1, device=device)
    compiling, launched_beside = threading.Event(), threading.Event()

    def program() -> None:
        _count_kernel[(1,)](mine)
        compiling.set()
        assert launched_beside.wait(60)
        _count_kernel[(1,)](mine)

    thread = threading.Thread(target=compile_ahead, args=([program],))
    thread.start()
    assert compiling.wait(60)
    _count_kernel[(1,)](other)
    launched_beside.set()
    thread.join()
    assert (mine.item(), other.item()) == (0, 1)
    _count_kernel[(1,)](mine)
    assert mine.item() == 1


def test_a_program_that_fails_leaves_nothing_behind(device) -> None:
    x = torch.zeros(1, device=device)

    def program() -> None:
        raise ZeroDivisionError

    listener = triton.knobs.compilation.listener
    for _ in range(2):
        try:
            compile_ahead([program])
        except ZeroDivisionError:
            continue
        raise AssertionError("the error was swallowed")
    _count_kernel[(1,)](x)
    assert x.item() == 1
    assert triton.knobs.compilation.listener is listener


def test_every_kernel_that_operators_launch_can_be_compiled_ahead() -> None:
    """A kernel without the mark would run instead, on tensors that nothing filled."""
    marked, kernels = set(), set()
    for path in Path(stepgraph.ops.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                marks = {ast.unparse(decorator).split("(")[0] for decorator in node.decorator_list}
                if "launched" in marks:
                    marked.add(node.name)
                elif marks & {"triton.jit", "gluon.jit", "jit"}:
                    assert not node.name.endswith("kernel"), (path, node.name)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                kernels.add(ast.unparse(node.func.value))
    launches = {name for name in kernels if name.endswith("kernel") and name != "kernel"}
    assert launches
    assert launches <= marked

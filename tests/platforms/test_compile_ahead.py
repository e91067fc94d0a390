"""Kernels compiled ahead of their launches, for a GPU that need not be there."""

import subprocess
import sys

KERNELS = """
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

from stepgraph.platforms.compile_ahead import compile_ahead


class Absent:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


driver.set_active(Absent())


@triton.jit
def add(x_ptr, y, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    tl.store(x_ptr + offset, tl.load(x_ptr + offset) + y)


@triton.jit
def clear(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), 0.0)


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

"""Kernels compiled ahead of their launches, for a GPU that need not be there."""

import subprocess
import sys

KERNELS = """
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
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


x = torch.full((16,), 3.0)


def program(block):
    def run():
        new = torch.empty(1000)
        assert not new.any()
        for _ in range(3):
            add[(1,)](x, 2.0, BLOCK=block)
        clear[(1,)](x, BLOCK=16)

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

    assert counts() == "3 0 0 0\n"
    assert counts() == "0 3 0 0\n"

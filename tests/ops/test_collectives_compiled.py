"""The kernels that push, compiled for a Hopper GPU on any machine: the interpreter takes what the compiler would not."""

import os
import subprocess
import sys

import pytest

COMPILED = """
import re
import stepgraph
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from stepgraph.platforms import kernels, tuning
from stepgraph.platforms.compile_ahead import COMPILING

class Hopper:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

driver.set_active(Hopper())
kernels.kernel_tuning = lambda: tuning.SM_90
COMPILING.set(True)
from stepgraph.ops.collectives import triton as push

memory = (
    torch.zeros(3, 2, 1 << 14, dtype=torch.int16), [1 << 46, 1 << 47], torch.zeros(2048, 2, dtype=torch.int64),
    torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64),
)
x, weight = torch.zeros(2, 4096, dtype=torch.bfloat16), torch.ones(4096)
push.all_reduce_add(x, x.clone(), x.clone(), *memory, 1, 30 * 10**9, 0.22, weight, 1e-6, weight.bfloat16(), 1e-6)
push.all_gather_columns(x[:, :1600], x[:, :3200].contiguous(), *memory, 1, 30 * 10**9)
for kernel in (push._all_reduce_add_kernel, push._all_gather_columns_kernel):
    [compiled] = kernel.device_caches[0][0].values()
    print(*sorted(set(re.findall(r"\\b((?:ld|st)\\.(?:volatile\\.)?global[\\w.]*)", compiled.asm["ptx"]))))
    print(*sorted(set(re.findall(r"griddepcontrol\\.\\w+", compiled.asm["ptx"]))))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there on Linux only")
def test_they_compile_and_send_and_poll_sixteen_bytes_at_a_time() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for accesses, waits in zip(lines[::2], lines[1::2], strict=True):
        assert "ld.volatile.global.v4.b32" in accesses
        assert "st.global.v4.b32" in accesses
        assert "b16" not in accesses  # numbers one by one, as where an address is not known to be a multiple of 16
        assert waits == "griddepcontrol.launch_dependents griddepcontrol.wait"

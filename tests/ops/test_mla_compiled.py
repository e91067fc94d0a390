"""The kernels of latent attention, compiled for a Hopper GPU on any machine, for the sizes that DeepSeek's models have."""

import os
import subprocess
import sys

import pytest

COMPILED = """
import dataclasses
import re
import subprocess
import tempfile
import stepgraph
import torch
from functools import partial
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from stepgraph.platforms import kernels, tuning
from stepgraph.platforms.compile_ahead import compile_ahead

class Hopper:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

driver.set_active(Hopper())
kernels.kernel_tuning = lambda: dataclasses.replace(tuning.SM_90, hopper_mla=False)
from stepgraph.ops.mla_attention import triton as mla

def attend(heads, tile, block_size):
    q, cache = (torch.zeros(*size, 576, dtype=torch.bfloat16) for size in ((8, heads), (4, block_size)))
    int32, partials = torch.zeros(64, 8, dtype=torch.int32), torch.zeros(4, 1, tile, 514)
    mla.mla_attention(q, cache, *[int32] * 6, partials, 512, 0.1, tile, 132, False)

def show(kernel):
    for compiled in kernel.device_caches[0][0].values():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        [stack] = re.findall(r"STACK:(\\d+)", usage)
        ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
        wide = ptx.count("cp.async.cg.shared.global"), ptx.count("wgmma.mma_async")
        waits = ptx.count("griddepcontrol.wait"), ptx.count("griddepcontrol.launch_dependents")
        print(stack, shared, *wide, *waits)
        kernel.device_caches.clear()

for sizes in ((16, 16, 16), (128, 64, 64)):
    compile_ahead([partial(attend, *sizes)])
    show(mla._attention_kernel)
    show(mla._combine_kernel)
"""
MULTIPROCESSOR = 227 * 1024
"""Bytes of shared memory; each program takes a KiB more than it asks for."""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there on Linux only")
def test_they_fit_a_multiprocessor_and_copy_and_multiply_asynchronously() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = [[int(number) for number in line.split()] for line in done.stdout.splitlines()]
    for (stack, shared, copies, products, *waits), most in zip(lines[::2], (0, 16), strict=True):
        assert stack <= most  # of the taller tile, numbers of an item that its loop does not use
        assert shared + 1024 <= MULTIPROCESSOR
        assert copies
        assert products
        assert waits == [1, 1]
    for stack, *_, wait, launch in lines[1::2]:
        assert (stack, wait, launch) == (0, 1, 1)

"""The kernels of attention by this step's own keys, compiled for a Hopper GPU on any machine."""

import os
import re
import subprocess
import sys

import pytest

COMPILED = """
import dataclasses
import subprocess
import tempfile
import stepgraph
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from stepgraph.platforms import kernels, tuning
from stepgraph.platforms.compile_ahead import COMPILING

class Hopper:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

driver.set_active(Hopper())
kernels.kernel_tuning = lambda: dataclasses.replace(tuning.SM_90, hopper_expanded=False)
COMPILING.set(True)
from stepgraph.ops.expanded_attention.geometry import TILE
from stepgraph.ops.expanded_attention import hopper
from stepgraph.ops.expanded_attention import triton as kernel

T, H, N, P, V, R = 256, 16, 128, 64, 128, 512
shapes = (T, H * (N + P)), (T, H, R + P), (T, H * (N + V)), (T, P), (T, H * V)
tensors = [torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes]
ints = torch.zeros(16, 8, dtype=torch.int32)
kernel.expanded_attention(*tensors, torch.zeros(T, H), ints, ints, ints, ints, 0.1, TILE, 132)
hopper.expanded_attention(*tensors, torch.zeros(T, H), ints, ints, 0.1, 132)
for module in (kernel, hopper):
    [compiled] = module._expanded_attention_kernel.device_caches[0][0].values()
    print("kernel of", compiled.metadata.shared, "bytes and", compiled.metadata.num_warps, "warps")
    print(compiled.asm["ptx"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        print(subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True).stdout)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there on Linux only")
def test_they_multiply_on_tensor_cores_and_spill_nothing() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    kernels = re.split(r"kernel of (\d+) bytes and (\d+) warps", done.stdout)[1:]
    assert kernels[1::3] == ["8", "12"]
    for shared_bytes, listing, copy in zip(
        kernels[::3], kernels[2::3], ("cp.async.cg", "cp.async.bulk.tensor"), strict=True
    ):
        assert int(shared_bytes) <= 227 * 1024
        assert set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16", listing)) == {"64", "128"}
        assert copy in listing
        assert "griddepcontrol.wait" in listing
        assert re.findall(r"REG:\d+ STACK:(\d+)", listing) == ["0"]

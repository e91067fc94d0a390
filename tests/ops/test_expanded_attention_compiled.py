"""The kernel of attention by this step's own keys, compiled for a Hopper GPU on any machine."""

import os
import re
import subprocess
import sys

import pytest

COMPILED = """
import subprocess
import sys
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
kernels.kernel_tuning = lambda: tuning.SM_90
COMPILING.set(True)
from stepgraph.ops.expanded_attention.geometry import TILE
from stepgraph.ops.expanded_attention import triton as kernel

T, H, N, P, V, R = 256, 16, 128, 64, 128, 512
shapes = (T, H * (N + P)), (T, H, R + P), (T, H * (N + V)), (T, P), (T, H * V)
ints = torch.zeros(16, 8, dtype=torch.int32)
kernel.expanded_attention(
    *(torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes), torch.zeros(T, H), ints, ints, ints, ints, 0.1, TILE, 132
)
[compiled] = kernel._expanded_attention_kernel.device_caches[0][0].values()
print(compiled.metadata.shared, compiled.metadata.num_warps)
print(compiled.asm["ptx"])
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(compiled.asm["cubin"])
    file.flush()
    subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", file.name], check=True, stdout=sys.stdout)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there on Linux only")
def test_it_multiplies_on_tensor_cores_and_spills_nothing() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    shared_bytes, num_warps = map(int, done.stdout.split(maxsplit=2)[:2])
    assert shared_bytes <= 227 * 1024
    assert num_warps == 8
    assert set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16", done.stdout)) == {"64", "128"}
    assert "cp.async.cg.shared.global" in done.stdout
    assert "griddepcontrol.wait" in done.stdout
    assert re.findall(r"REG:\d+ STACK:(\d+)", done.stdout) == ["0"]

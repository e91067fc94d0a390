"""Kernels of layers with states, compiled for a Hopper GPU on any machine: the interpreter takes what the compiler would not."""

import sys

import pytest
from compiled_for_hopper import lines_of

COMPILED = """
from stepgraph.ops.causal_conv import triton as conv
from stepgraph.ops.gated_delta import triton as delta
from stepgraph.ops.gated_norm import triton as norm
from stepgraph.ops.mamba2 import triton as mamba2

G, H, N, D = 16, 32, 128, 128
C = 2 * G * N + H * D
state = torch.empty(2, H, N, D), torch.empty(2, 3, C, dtype=torch.bfloat16)
for tokens, rows in ((8, 8), (2048, 64)):
    read, write, start, stored = (torch.zeros(rows, dtype=torch.int32) for _ in range(4))
    operands = read, write, torch.zeros(rows + 1, dtype=torch.int32), start, stored
    qkvz = torch.empty(tokens, C + H * D, dtype=torch.bfloat16)
    ba, of_heads = torch.empty(tokens, 2 * H, dtype=torch.bfloat16), torch.empty(H)
    qkv = conv.causal_conv(qkvz[:, :C], torch.empty(C, 4, dtype=torch.bfloat16), None, state[1], *operands, True)
    out = delta.gated_delta(qkv, ba, of_heads, of_heads, state[0], *operands, 2.0, False)
    norm.gated_norm(out, qkvz[:, C:], torch.empty(D, dtype=torch.bfloat16), 1e-6, D, False)
taps, bias = torch.empty(C, 3, dtype=torch.bfloat16), torch.empty(C, dtype=torch.bfloat16)
conv.causal_conv(qkvz[:, :C], taps, bias, state[1][:, :2].contiguous(), *operands, False)

for tokens, rows, H, G, N, D in ((8, 8, 64, 8, 128, 64), (2048, 64, 64, 8, 128, 64), (2048, 64, 24, 1, 256, 128)):
    state = torch.empty(2, H, N, D)
    read, write, start, stored = (torch.zeros(rows, dtype=torch.int32) for _ in range(4))
    operands = read, write, torch.zeros(rows + 1, dtype=torch.int32), start, stored
    xbc, of_heads = torch.empty(tokens, H * D + 2 * G * N, dtype=torch.bfloat16), torch.empty(H)
    dt = torch.empty(tokens, H, dtype=torch.bfloat16)
    mamba2.mamba2(xbc, dt, of_heads, of_heads, of_heads, state, *operands, 0.0, float("inf"), False)
wide = torch.empty(8, 8192, dtype=torch.bfloat16)
for size in (1024, 8192):
    norm.gated_norm(wide, wide, wide[0], 1e-5, size, True)
for kernel in (conv._causal_conv_kernel, delta._prepare_kernel, delta._scan_kernel, mamba2._scan_kernel, norm._gated_norm_kernel):
    for compiled in kernel.device_caches[0][0].values():
        ptx = compiled.asm["ptx"]
        products = "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else "none"
        print(products, compiled.metadata.shared)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there on Linux only")
def test_they_compile_and_chunks_run_on_tensor_cores() -> None:
    found = [line.split() for line in lines_of(COMPILED)]
    convolutions, prepared, delta, scans, norms = (
        ["none"] * 3,
        ["wgmma"],
        ["none", "wgmma", "none"],
        ["none", "wgmma", "none", "wgmma", "none"],
        ["none"] * 3,
    )
    assert [products for products, _ in found] == [*convolutions, *prepared, *delta, *scans, *norms]
    assert all(int(shared) <= 227 << 10 for _, shared in found)

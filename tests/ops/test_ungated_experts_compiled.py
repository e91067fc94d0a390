"""Experts without gates, compiled for a Hopper GPU on any machine: the interpreter takes what the compiler would not."""

import sys

import pytest
from compiled_for_hopper import lines_of

COMPILED = """
from stepgraph.ops.experts import pairs, tiles
from stepgraph.ops.relu2 import triton as relu2
from stepgraph.ops.route import Routing

N, E, M, K = 16, 2688, 1856, 6
up, ends = torch.empty(N, M, E, dtype=torch.bfloat16), torch.zeros(N, dtype=torch.int32)
for T in (8, 2048):
    x, order = torch.empty(T, E, dtype=torch.bfloat16), torch.zeros(T * K, dtype=torch.int32)
    tiles.gated_experts(x, up, None, order, ends, False, gated=False)
codes = torch.empty(N, M, E, dtype=torch.float8_e4m3fn), torch.empty(N, M, 1)
tiles.gated_experts(x, *codes, order, ends, False, gated=False)
x, choice = x[:4], pairs.Choice(expert=torch.zeros(4, K, dtype=torch.int32), routing=Routing(K))
for weight, scale in ((up, None), codes):
    pairs.gated_experts(x, weight, scale, choice.expert, 0, False, None, 0.0, 1.0, False)
relu2.relu2(x)
for kernel in (tiles._product_kernel, pairs._gated_kernel, relu2._relu2_kernel):
    for compiled in kernel.device_caches[0][0].values():
        ptx = compiled.asm["ptx"]
        products = "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else "none"
        print(products, compiled.metadata.shared)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there on Linux only")
def test_they_compile_and_tiles_run_on_tensor_cores() -> None:
    found = [line.split() for line in lines_of(COMPILED)]
    assert [products for products, _ in found if products != "none"] == ["wgmma"] * (len(found) - 3)
    assert len(found) >= 5
    assert all(int(shared) <= 227 << 10 for _, shared in found)

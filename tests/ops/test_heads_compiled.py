"""Products of heads, compiled for a Hopper GPU on any machine: the interpreter takes what the compiler would not."""

import sys

import pytest
from compiled_for_hopper import lines_of

COMPILED = """
from stepgraph.ops.head_linear import triton as after
from stepgraph.ops.latent_queries import triton as before

H, N, P, R, V = 16, 128, 64, 512, 128
weight = torch.empty(H, N + V, R, dtype=torch.bfloat16)
for tokens, cached in ((1, torch.bfloat16), (2048, torch.float8_e4m3fn)):
    place, angles = torch.zeros(tokens, dtype=torch.int32), torch.zeros(1, P)
    q, latent = torch.empty(tokens, H * (N + P) + R + P, dtype=torch.bfloat16).tensor_split((-R - P,), dim=1)
    cache = torch.empty(1, 16, R + P, dtype=torch.bfloat16).to(cached)
    norm = torch.empty(R, dtype=torch.bfloat16)
    before.latent_queries(q, latent, place, place, angles, norm, weight[:, :N], cache, 1e-6, False)
    after.head_linear(torch.empty(tokens, H, R, dtype=torch.bfloat16), weight[:, N:], False)
for kernel in (before._latent_queries_kernel, after._head_linear_kernel):
    for compiled in kernel.device_caches[0][0].values():
        ptx = compiled.asm["ptx"]
        products = "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else "none"
        first_wait = ptx.index("griddepcontrol.wait")
        early = len(re.findall(r"ld\\.global[\\w.:]*v4\\.b32", ptx[:first_wait]))
        print(products, compiled.metadata.shared, early)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there on Linux only")
def test_they_compile_for_tensor_cores_and_read_weights_of_a_few_tokens_early() -> None:
    found = [line.split() for line in lines_of(COMPILED)]
    assert [products for products, _, _ in found] == ["mma", "wgmma"] * 2
    assert all(int(shared) <= 227 << 10 for _, shared, _ in found)
    # Of `head_linear`, whose first wait is after a program's 32 KiB of weight: 256 threads read 16 bytes eight times.
    assert int(found[2][2]) == 8

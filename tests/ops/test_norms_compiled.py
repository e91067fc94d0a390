"""Norms compiled for a Hopper GPU on any machine: the interpreter takes what the compiler would not."""

import sys

import pytest
from compiled_for_hopper import lines_of

COMPILED = """
from stepgraph.ops.rms_norm import triton as norm

x, scale = torch.empty(2, 2560, dtype=torch.bfloat16), torch.empty(1, dtype=torch.bfloat16)
for weight in (torch.empty(2560), torch.empty(2560, dtype=torch.bfloat16)):
    for scales in ((), (scale,)):
        norm.rms_norm_add(x, weight, 1e-6, x, *scales)
        [compiled] = norm._norm_kernel.device_caches[0][0].values()
        norm._norm_kernel.device_caches[0][0].clear()
        ptx = compiled.asm["ptx"]
        first_wait = ptx.index("griddepcontrol.wait")
        print(len(scales), len(re.findall(r"ld\\.global\\.b16", ptx[:first_wait])))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there on Linux only")
def test_a_scale_is_read_before_the_previous_kernel_ends() -> None:
    found = [tuple(map(int, line.split())) for line in lines_of(COMPILED)]
    assert found == [(0, 0), (1, 1)] * 2

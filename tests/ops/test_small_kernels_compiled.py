"""Small kernels compiled for a Hopper GPU on any machine: the interpreter takes what the compiler would not."""

import sys

import pytest
from compiled_for_hopper import lines_of

COMPILED = """
from dataclasses import astuple
from stepgraph.ops.rms_norm import triton as norm
from stepgraph.ops.route import Routing
from stepgraph.ops.route import triton as route
from stepgraph.ops.swiglu import triton as gates

x, scale = torch.empty(2, 2560, dtype=torch.bfloat16), torch.empty(1, dtype=torch.bfloat16)
for weight in (torch.empty(2560), torch.empty(2560, dtype=torch.bfloat16)):
    for scales in ((), (scale,)):
        norm.rms_norm_add(x, weight, 1e-6, x, *scales)
        [compiled] = norm._norm_kernel.device_caches[0][0].values()
        norm._norm_kernel.device_caches[0][0].clear()
        ptx = compiled.asm["ptx"]
        first_wait = ptx.index("griddepcontrol.wait")
        print(len(scales), len(re.findall(r"ld\\.global\\.b16", ptx[:first_wait])))

totals, counts, scales = torch.zeros(128, dtype=torch.int64), torch.ones(1, dtype=torch.int32), torch.empty(128)
for some in ((), (None, scales)):
    route.route(x, torch.empty(128, 2560), None, counts, totals, *astuple(Routing(top=8)), *some)
print(len(route._choose_kernel.device_caches[0][0]))

inputs = torch.empty(2, 42 * 256, dtype=torch.bfloat16).split(256, dim=1)
for some in ((x,), (x[:, :256], inputs[1])):
    gates.geglu(*some)
for compiled in gates._gated_kernel.device_caches[0][0].values():
    ptx = compiled.asm["ptx"]
    print(len(re.findall(r"ld\\.global\\.v4\\.b32", ptx)), ptx.count("griddepcontrol.wait"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there on Linux only")
def test_they_compile_with_and_without_what_they_may_have() -> None:
    *norms, choices, merged, apart = lines_of(COMPILED)
    assert norms == ["0 0", "1 1"] * 2  # loads before the previous kernel ends
    assert choices == "2"
    assert merged == apart == "2 1"  # 16 bytes of the gate and of what it lets through, after the wait

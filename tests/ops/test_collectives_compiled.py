"""The kernels that push, compiled for a Hopper GPU on any machine: the interpreter takes what the compiler would not."""

import sys

import pytest
from compiled_for_hopper import lines_of

COMPILED = """
from stepgraph.ops.collectives import triton as push
from stepgraph.ops.collectives import triton_tokens

memory = (
    torch.zeros(3, 2, 1 << 14, dtype=torch.int16), [1 << 46, 1 << 47], torch.zeros(2048, 2, dtype=torch.int64),
    torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64),
)
x, weight = torch.zeros(2, 4096, dtype=torch.bfloat16), torch.ones(4096)
push.all_reduce_add(x, x.clone(), x.clone(), *memory, 1, 30 * 10**9, 0.22, weight, 1e-6, weight.bfloat16(), 1e-6)
push.all_gather_columns(x[:, :1600], x[:, :3200].contiguous(), *memory, 1, 30 * 10**9)
count, counts = torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
triton_tokens.gather_tokens(x, count[0], weight, 1e-6, x.expand(2, 2, 4096).contiguous(), counts, 0, *memory, 1, 30 * 10**9)
triton_tokens.scatter_sum(
    x.expand(2, 2, 4096).contiguous(), counts, x.clone(), x.clone(), 0, *memory, 1, 30 * 10**9, 0.22, None, 0.0, weight, 1e-6
)
for kernel in (
    push._all_reduce_add_kernel, push._all_gather_columns_kernel, triton_tokens._gather_tokens_kernel,
    triton_tokens._scatter_sum_kernel,
):
    [compiled] = kernel.device_caches[0][0].values()
    accesses = re.findall(r"\\b((?:ld|st)\\.(?:volatile\\.)?global[\\w.]*)", compiled.asm["ptx"])
    print(*sorted(set(accesses)), sum("b16" in access for access in accesses))
    print(*sorted(set(re.findall(r"griddepcontrol\\.\\w+", compiled.asm["ptx"]))))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there on Linux only")
def test_they_compile_and_send_and_poll_sixteen_bytes_at_a_time() -> None:
    lines = lines_of(COMPILED)
    for accesses, waits in zip(lines[::2], lines[1::2], strict=True):
        assert "ld.volatile.global.v4.b32" in accesses
        assert "st.global.v4.b32" in accesses
        # Numbers one by one, as where an address is not known to be a multiple of 16; of heads, one is sent to each of two ranks,
        # and received from them.
        assert int(accesses.split()[-1]) in (0, 2 + 2 * 2)
        assert waits == "griddepcontrol.launch_dependents griddepcontrol.wait"

"""Attention over heads of 256 and 512, compiled for a Hopper GPU on any machine: what a program keeps must fit."""

import sys

import pytest
from compiled_for_hopper import lines_of

COMPILED = """
import subprocess
import tempfile
from triton import knobs
from stepgraph.ops.attention import attention_geometry, triton as attention
from stepgraph.ops.rope_cache import triton as rope

G, GROUP = 1, 8
def zeros(*size):
    return torch.zeros(size, dtype=torch.int32)

for D, tokens, rows in ((256, 256, 256), (512, 256, 256), (512, 2048, 8)):
    cache = torch.empty(2, 16, G, D, dtype=torch.bfloat16)
    sizes = attention_geometry(tokens, rows, G * GROUP, G, 132, tuning=tuning.SM_90)
    lists = zeros(sizes.max_items, 8), zeros(2), torch.empty(sizes.max_partials, G, sizes.tile, D + 2)
    rows = zeros(rows, 4), zeros(rows), zeros(rows + 1), zeros(rows)
    q = torch.empty(tokens, G * GROUP, D, dtype=torch.bfloat16)
    counters = zeros(sizes.max_partials, G)
    attention.paged_attention(q, cache, cache, *rows, *lists, counters, 1.0, sizes.tile, sizes.num_programs, 0, False)
norm, place = torch.empty(D), zeros(1)
for projected in (0, G):
    qkv = torch.empty(1, (G * GROUP + projected) * D, dtype=torch.bfloat16)
    norms = norm, norm if projected else None
    rope.rope_cache(qkv, place, place, torch.zeros(1, D), *norms, cache, cache, G * GROUP, 1e-6, True)
for kernel in (attention._attention_kernel, rope._rope_cache_kernel):
    for compiled in kernel.device_caches[0][0].values():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        print(compiled.metadata.shared, re.search(r"STACK:(\\d+)", used)[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there on Linux only")
def test_shared_memory_and_registers_hold_what_a_program_keeps() -> None:
    found = [tuple(map(int, line.split())) for line in lines_of(COMPILED)]
    assert len(found) == 5
    assert all(shared <= 227 << 10 for shared, _ in found)
    # Bytes of a thread's registers that spill. Combined as those of smaller heads, parts of heads of 512 took 4,392.
    assert [spilled for _, spilled in found] == pytest.approx([0, 0, 0, 0, 0], abs=256)

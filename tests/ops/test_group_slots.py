"""Where tokens lie in further block groups is where `build_step` says for a group's table alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_fixtures import slot_line, slot_lines

from stepgraph.abi import slot_line as line
from stepgraph.ops.build import reference as build
from stepgraph.ops.group_slots import reference
from stepgraph.ops.group_slots import triton as kernels

SLOTS, MAX_LEN = 5, 40


@pytest.mark.parametrize("slots_of", [reference.group_slots, kernels.group_slots])
@given(
    block_sizes=st.lists(st.sampled_from([2, 4, 8]), min_size=2, max_size=4),
    rows=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 20), st.booleans()), min_size=1, max_size=4),
    padding=st.integers(0, 9),
)
@settings(max_examples=20)
def test_slots_are_those_of_each_groups_own_table(slots_of, device, block_sizes, rows, padding) -> None:
    lines = [slot_line(length=computed + n, computed=computed, active=active) for n, computed, active in rows]
    absent = [slot_line(active=False, length=0, computed=0)] * (SLOTS - 1 - len(lines))
    width = MAX_LEN // min(block_sizes)
    table = torch.arange(len(block_sizes) * SLOTS * width, dtype=torch.int32).view(-1, SLOTS, width)
    table[:, line.NULL_SLOT] = line.NULL_BLOCK
    plan = torch.tensor([x for slot, (n, _, _) in enumerate(rows, start=1) for x in (slot, n)], dtype=torch.int32)
    tokens = torch.zeros(SLOTS, MAX_LEN, dtype=torch.int32)
    sizes = sum(n for n, _, _ in rows) + padding, len(rows), 1, 0
    built = [
        build.build_step(plan, slot_lines(*lines, *absent), tokens, of_group, *sizes, block_size)
        for of_group, block_size in zip(table, block_sizes, strict=True)
    ]
    _, positions, _, row_slot, query_start, *_ = (x.to(device) for x in built[0])
    flat = table.flatten(0, 1).to(device)
    found = slots_of(flat, row_slot, query_start, positions, block_sizes)
    assert found.tolist() == [kv_slots.tolist() for _, _, kv_slots, *_ in built[1:]]

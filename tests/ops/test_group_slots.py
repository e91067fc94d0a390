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

SLOTS, MAX_LEN, BLOCK_SIZE = 5, 40, 4


@pytest.mark.parametrize("slots_of", [reference.group_slots, kernels.group_slots])
@given(
    num_groups=st.integers(2, 4),
    rows=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 20), st.booleans()), min_size=1, max_size=4),
    padding=st.integers(0, 9),
)
@settings(max_examples=20)
def test_slots_are_those_of_each_groups_own_table(slots_of, device, num_groups, rows, padding) -> None:
    lines = [slot_line(length=computed + n, computed=computed, active=active) for n, computed, active in rows]
    absent = [slot_line(active=False, length=0, computed=0)] * (SLOTS - 1 - len(lines))
    table = torch.arange(num_groups * SLOTS * MAX_LEN // BLOCK_SIZE, dtype=torch.int32).view(num_groups, SLOTS, -1)
    table[:, line.NULL_SLOT] = line.NULL_BLOCK
    plan = torch.tensor([x for slot, (n, _, _) in enumerate(rows, start=1) for x in (slot, n)], dtype=torch.int32)
    tokens = torch.zeros(SLOTS, MAX_LEN, dtype=torch.int32)
    sizes = sum(n for n, _, _ in rows) + padding, len(rows), 1, 0, BLOCK_SIZE
    built = [build.build_step(plan, slot_lines(*lines, *absent), tokens, of_group, *sizes) for of_group in table]
    _, positions, _, row_slot, query_start, *_ = (x.to(device) for x in built[0])
    flat = table.flatten(0, 1).to(device)
    found = slots_of(flat, row_slot, query_start, positions, num_groups, BLOCK_SIZE)
    assert found.tolist() == [kv_slots.tolist() for _, _, kv_slots, *_ in built[1:]]

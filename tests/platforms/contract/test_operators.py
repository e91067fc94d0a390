"""Operators on the platform's device against plain torch."""

import pytest
import torch
from attention_batches import make_batch
from operator_cases import CASES, IN_STEPS, OF_SETTINGS, TOLERANCE, assert_as_reference, moved

from stepgraph import ops
from stepgraph.ops.attention import attention_geometry
from stepgraph.ops.expanded_attention import expanded_geometry
from stepgraph.ops.mla_attention import mla_geometry
from stepgraph.ops.mla_attention import reference as mla_reference

ATTENTION = {"paged_attention", "mla_attention", "mla_context_attention", "expanded_attention"}
ROWS = {
    "first": [(1, 0)],
    "decode": [(1, 37)],
    "prompt": [(13, 0)],
    "decodes": [(1, 5), (1, 63), (1, 64)],
    "mixed": [(7, 30), (1, 12), (20, 0), (1, 0)],
}
"""New tokens of each row, and those that are cached."""


def test_every_operator_is_checked_somewhere() -> None:
    registered = {
        n.removeprefix("stepgraph::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("stepgraph::")
    }
    assert {case.operator for case in CASES.values()} | IN_STEPS | OF_SETTINGS | ATTENTION == registered


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_an_operator_gives_what_plain_torch_gives(platform, name, seed) -> None:
    assert_as_reference(name, seed, platform.device)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.rows])
def test_a_token_depends_on_its_own_rows_alone(platform, name) -> None:
    """As padding may hold anything: rows after the real ones are NaN."""
    case = CASES[name]
    args = case.args(torch.Generator().manual_seed(2))
    num_rows = args[case.rows[0]].shape[0]
    padded = list(moved(args, platform.device))
    for index in case.rows:
        padding = torch.full((3, *padded[index].shape[1:]), torch.nan, device=platform.device)
        padded[index] = torch.cat((padded[index], padding))
    returned = getattr(torch.ops.stepgraph, case.operator).default(*padded)
    found = (padded[case.rows[-1]] if returned is None else returned)[:num_rows].cpu()
    expected = case.reference(*args)
    torch.testing.assert_close(found, args[case.rows[-1]] if expected is None else expected, **TOLERANCE)


@pytest.mark.parametrize("scores", [{}, {"sinks": True, "softcap": 1.5}], ids=["plain", "sinks and cap"])
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_attention_reads_its_rows_keys_and_no_others(platform, rows, window, scores) -> None:
    """Keys and values of nobody are NaN, and so are those before a window."""
    batch = make_batch(rows, num_tokens=48, head_dim=32, window=window, poisoned=True, **scores)
    there = batch.to(str(platform.device))
    num_heads, num_kv_heads, head_dim = batch.q.shape[1], *batch.k_cache.shape[2:]
    geometry = attention_geometry(
        48, len(rows), num_heads, num_kv_heads, platform.multiprocessors, tuning=platform.tuning
    )
    step = there.row_slot, there.query_start, there.kv_len
    plan = ops.attention_plan(*step, num_heads, num_kv_heads, head_dim, geometry, window)
    for _ in range(2):  # scratch is left as it was found
        found = ops.paged_attention(
            there.q, there.k_cache, there.v_cache, there.block_table, *step, plan, geometry, batch.scale, window,
            there.sinks, there.softcap,
        )  # fmt: skip
        torch.testing.assert_close(
            found[: batch.num_real_tokens].cpu().view(-1), batch.expected().float().view(-1), **TOLERANCE
        )


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_latent_attention_reads_its_rows_entries_and_no_others(platform, rows, deterministic) -> None:
    """Entries of nobody are NaN."""
    value_dim, num_heads = 32, 4
    batch = make_batch(rows, num_tokens=48, num_kv_heads=1, group=num_heads, head_dim=value_dim + 16, poisoned=True)
    q, entries, _, *rows_of_cache = batch.inputs()
    expected = mla_reference.mla_attention(
        q.double(), entries.squeeze(2).double(), *rows_of_cache, value_dim, batch.scale
    )
    there = batch.to(str(platform.device))
    q, entries, _, block_table, *step = there.inputs()
    geometry = mla_geometry(48, len(rows), num_heads, platform.multiprocessors, deterministic=deterministic)
    plan = ops.attention_plan(*step, num_heads, 1, value_dim, geometry)
    for _ in range(2):  # scratch is left as it was found
        found = ops.mla_attention(
            q, entries.squeeze(2), block_table, *step, plan, geometry, value_dim=value_dim, scale=batch.scale
        )[: batch.num_real_tokens]
        torch.testing.assert_close(found.cpu(), expected[: batch.num_real_tokens].float(), **TOLERANCE)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_latent_attention_is_that_over_older_entries_and_then_over_this_steps(platform, rows) -> None:
    """Heads' own keys and values are here the entries themselves."""
    value_dim, num_heads = 32, 4
    batch = make_batch(rows, num_tokens=48, num_kv_heads=1, group=num_heads, head_dim=value_dim + 16, poisoned=True)
    q, entries, _, *rows_of_cache = batch.inputs()
    expected = mla_reference.mla_attention(
        q.double(), entries.squeeze(2).double(), *rows_of_cache, value_dim, batch.scale
    )[: batch.num_real_tokens]
    block_table, row_slot, query_start, kv_len = rows_of_cache
    block_size, own = entries.shape[1], torch.full((48, value_dim + 16), torch.nan)
    for slot, start, (query_len, context_len) in zip(row_slot, query_start.tolist(), rows, strict=False):
        position = torch.arange(context_len, context_len + query_len)
        own[start : start + query_len] = entries.squeeze(2)[
            block_table[slot, position // block_size], position % block_size
        ]

    device = platform.device
    q, entries, own = q.to(device), entries.squeeze(2).to(device), own.to(device)
    block_table, row_slot, query_start, kv_len = (tensor.to(device) for tensor in rows_of_cache)
    sizes = 48, len(rows), num_heads, platform.multiprocessors
    context_len = kv_len - query_start.diff()
    geometry = mla_geometry(*sizes)
    plan = ops.attention_plan(row_slot, query_start, context_len, num_heads, 1, value_dim, geometry)
    own_geometry = expanded_geometry(*sizes)
    own_plan = ops.attention_plan(row_slot, query_start, kv_len, num_heads, num_heads, value_dim, own_geometry)
    kv = own[:, None, :value_dim].repeat(1, 2 * num_heads, 1).flatten(1)
    step = block_table, row_slot, query_start, context_len
    for _ in range(2):  # scratch is left as it was found
        context, lse = ops.mla_context_attention(
            q, entries, *step, plan, geometry, value_dim=value_dim, scale=batch.scale
        )
        found = ops.expanded_attention(
            q.flatten(1), q, kv, own[:, value_dim:], context.flatten(1), lse, query_start, kv_len, own_plan, own_geometry,
            scale=batch.scale,
        )  # fmt: skip
        torch.testing.assert_close(found[: batch.num_real_tokens].cpu(), expected.flatten(1).float(), **TOLERANCE)

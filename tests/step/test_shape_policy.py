"""ShapePolicy: which shapes exist, which serves a step, and which steps run without a graph."""

from dataclasses import replace

import pytest
from fake_graphs import create_policy, plan
from hypothesis import example, given
from hypothesis import strategies as st

from stepgraph.errors import ConfigError
from stepgraph.step.eager_reason import EagerReason
from stepgraph.step.shape import StepShape, Variant


@given(
    max_tokens=st.integers(1, 3000),
    max_rows=st.integers(1, 1024),
    tokens=st.integers(1, 3000),
    rows=st.integers(1, 1024),
)
@example(max_tokens=64, max_rows=8, tokens=17, rows=1)
def test_chosen_sizes_hold_every_step_with_at_most_a_quarter_of_padding_beyond_17_tokens(
    max_tokens, max_rows, tokens, rows
) -> None:
    max_rows = min(max_rows, max_tokens)
    tokens = min(tokens, max_tokens)
    rows = min(rows, tokens, max_rows)
    policy = create_policy(max_tokens=max_tokens, max_rows=max_rows, capture_sizes=None, capture_rows=None)
    shape = policy.round_up(tokens, rows)
    assert shape in policy.shapes()
    assert tokens <= shape.num_tokens <= max(24 if tokens == 17 else 16, 4 / 3 * tokens)
    assert rows <= shape.num_rows <= max(8, 8 * rows)
    assert policy.max_tokens == max_tokens
    assert len(policy.shapes()) <= 160


def test_max_capture_size_drops_larger_sizes_and_bounds_the_steps() -> None:
    policy = create_policy(max_capture_size=16)
    assert policy.max_tokens == 16
    assert policy.max_shape == StepShape(16, 8)
    assert create_policy(max_capture_size=512).max_tokens == 64
    assert create_policy(capture_sizes=None, max_capture_size=20).max_tokens == 20


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"capture_sizes": (8, 128)}, r"capture_sizes=\[128\] are above max_num_batched_tokens=64.*drop them or raise"),
        ({"capture_sizes": (4,)}, "largest captured size 4 is below max_num_seqs=8.*capture a size of at least that"),
        ({"capture_sizes": (16,), "max_capture_size": 8}, "largest captured size 0 is below max_num_seqs=8"),
    ],
)
def test_sizes_that_cannot_serve_the_engine_are_refused(config, message) -> None:
    with pytest.raises(ConfigError, match=message):
        create_policy(**config)


@pytest.mark.parametrize("max_num_seqs", [1, 5, 64])
def test_no_smaller_shape_holds_the_step(max_num_seqs) -> None:
    policy = create_policy(max_tokens=300, max_rows=max_num_seqs, capture_sizes=None, capture_rows=None)
    shapes = sorted(policy.shapes())
    for num_tokens in range(1, 301):
        for num_rows in range(1, min(num_tokens, max_num_seqs) + 1):
            smallest = next(s for s in shapes if s.num_tokens >= num_tokens and s.num_rows >= num_rows)
            assert policy.round_up(num_tokens, num_rows) == smallest


@pytest.mark.parametrize(
    ("num_tokens", "num_rows", "num_drafts", "shape"),
    [
        (1, 1, 3, "1x1+3"),  # no proposal to verify
        (2, 1, 3, "4x1+3"),
        (2, 1, 1, "2x1+1"),
        (2, 1, 7, "4x1+7"),
        (6, 4, 3, "6x4+3"),
    ],
)
def test_rows_of_few_proposals_share_the_shape_of_four_tokens(num_tokens, num_rows, num_drafts, shape) -> None:
    policy = create_policy(capture_sizes=None, capture_rows=None, max_rows=4, draft_levels=(0, 1, 3, 7))
    assert str(policy.round_up(num_tokens, num_rows, num_drafts=num_drafts)) == shape


def test_equal_settings_make_equal_policies_that_can_be_keys() -> None:
    policies = {create_policy(): 1, create_policy(): 2, create_policy(draft_levels=(0, 1)): 3}
    assert sorted(policies.values()) == [2, 3]


def test_a_plan_runs_at_the_shape_of_its_tokens_rows_variant_and_proposals() -> None:
    asked = replace(plan(1, 3), variant=Variant.EXTENDED, num_drafts=2)
    assert create_policy(draft_levels=(0, 2)).shape_of(asked) == StepShape(8, 2, Variant.EXTENDED, 2)


def test_steps_that_settings_keep_out_of_graphs_have_the_first_reason_that_holds() -> None:
    decode, mixed, short, long = (
        plan(1, 1),
        plan(1, 20, prefill_rows=1),
        plan(16, prefill_rows=1),
        plan(17, prefill_rows=1),
    )

    def reasons(**config) -> list[EagerReason | None]:
        policy = create_policy(**config)
        return [policy.eager_reason(step) for step in (decode, mixed, short, long)]

    assert reasons() == [None] * 4
    assert reasons(max_prefill_capture_size=16) == [None, None, None, EagerReason.LONG_PREFILL]
    assert reasons(max_prefill_capture_size=16, cudagraph_only_prefill=True) == [
        EagerReason.NOT_PURE_PREFILL,
        EagerReason.NOT_PURE_PREFILL,
        None,
        EagerReason.LONG_PREFILL,
    ]
    assert reasons(graphs_off=True, cudagraph_only_prefill=True) == [EagerReason.GRAPHS_OFF] * 4

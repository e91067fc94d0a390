"""Gemma 4 in an engine that keeps keys and values by groups of layers: a block has fewer tokens in layers of one sort than in
those of the other, and the same bytes. Against transformers in float32."""

import pytest
from answers import assert_as_transformers, continued, generate, prompts_of
from checkpoints import GEMMA4, HF_CONFIGS, WINDOW, hf_config, random_hf_model
from test_block_groups_in_engine import add_all, assert_alike, create, in_one_group, watch

from stepgraph.abi.block_groups import BlockGroups
from stepgraph.bench.graphs import lay_out
from stepgraph.bench.tokens import _next_log_probs
from stepgraph.executor.local import runner_of
from stepgraph.step.shape import StepShape
from stepgraph.step.slot_sampling import SlotSampling
from stepgraph.verify.compositions import Composition, Row
from stepgraph.verify.graphs import verify_shape

BLOCK_SIZE = 16
LENGTHS = (1, 33, 90, 150)


def two_to_one():
    """Of equal bytes though not of equal heads, as those of 26B-A4B are that four ranks share."""
    return hf_config("Gemma4TextConfig", **GEMMA4 | {"num_key_value_heads": 2, "hidden_size_per_layer_input": 0})


LAYOUTS = {
    "gemma 4 e4b": (HF_CONFIGS["gemma 4 e4b"], (2, 1)),
    "gemma 4 26b": (HF_CONFIGS["gemma 4 26b"], (1, 2)),
    "gemma 4 12b": (HF_CONFIGS["gemma 4 12b"], (1, 4)),
    "equal bytes": (two_to_one, (1, 1)),
}
"""By name: a config, and the blocks of a place in the group that sees all tokens and in that with a window."""


@pytest.fixture(scope="module", params=LAYOUTS)
def checkpoint(request, tmp_path_factory):
    """A folder, the blocks of a place, prompts, and how transformers goes on."""
    config, splits = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp("checkpoint")
    hf_model = random_hf_model(config())
    hf_model.save_pretrained(folder)
    prompts = prompts_of(LENGTHS)
    return str(folder), splits, prompts, [continued(hf_model, prompt) for prompt in prompts]


@pytest.mark.parametrize(
    "options", [{}, {"speculative_method": "ngram", "num_speculative_tokens": 3, "max_num_batched_tokens": 24}]
)
def test_blocks_behind_the_window_are_freed_and_answers_are_transformers(checkpoint, device, options) -> None:
    folder, splits, prompts, expected = checkpoint
    engine = create(
        folder, device, enable_prefix_caching=False, **{"max_num_batched_tokens": 32, "capture_sizes": None} | options
    )
    groups = engine.executor.specs.groups
    assert (groups, runner_of(engine.executor).layout.splits) == (BlockGroups(*splits, WINDOW), splits)
    counts = watch(engine)
    assert_as_transformers(generate(engine, prompts, together=False), expected)
    seen = -(-(WINDOW + 32) // BLOCK_SIZE) + 1  # places, of the last prompt's ten
    assert max(counts) <= 10 * splits[0] + seen * splits[1] < 10 * groups.size
    assert_as_transformers(generate(engine, prompts, together=True), expected)
    assert engine.scheduler.num_free_blocks == 79 * groups.size


def test_from_the_prefix_cache_and_started_anew(checkpoint, device) -> None:
    folder, _, prompts, expected = checkpoint
    engine = create(folder, device, num_kv_blocks=13)  # prompts wait for each other
    watch_cached(engine)
    assert_as_transformers(generate(engine, prompts, together=True), expected)
    assert_as_transformers(generate(engine, prompts, together=True, preemption=0.1), expected)
    whole = create(folder, device)
    assert_as_transformers(generate(whole, prompts, together=True), expected)
    requests = generate(whole, prompts, together=True)
    assert_as_transformers(requests, expected)
    assert [request.num_cached_tokens for request in requests] == [0, 32, 80, 144]


def test_long_answers_that_take_blocks_from_each_other_are_those_of_one_group(checkpoint, device) -> None:
    folder, splits, *_ = checkpoint
    engine = create(folder, device, num_kv_blocks=11)
    assert engine.executor.specs.groups == BlockGroups(*splits, WINDOW)
    watch_cached(engine)
    found = add_all(engine)
    assert engine.scheduler.statistics.preemptions
    assert_alike(found, add_all(in_one_group(folder, device)))


def test_benches_give_requests_blocks_of_all_groups(checkpoint, device) -> None:
    folder, splits, prompts, expected = checkpoint
    runner = runner_of(create(folder, device, max_num_batched_tokens=160, capture_sizes=None).executor)
    for prompt, ((token, *_), (logprob, *_)) in zip(prompts, expected, strict=True):
        log_probs = _next_log_probs(runner, prompt)
        assert (int(log_probs.argmax()), float(log_probs.max())) == (token, pytest.approx(logprob, abs=1e-4))
    with runner.workbench():
        lay_out(runner, [(1, 50), (3, 3), (9, 33)], SlotSampling(seed=0))
        granted = []
        for size, table in zip(runner.tables.block_sizes, runner.state.block_tables, strict=True):
            for slot, places in enumerate((4, 1, 3), start=1):
                granted += table[slot, : places * BLOCK_SIZE // size].tolist()
        assert sorted(granted) == list(range(1, 8 * sum(splits) + 1))


def watch_cached(engine) -> None:
    """Before each step, what is in no request's blocks and cannot be found is NaN, as far as no step under way has it."""
    launch, pool = engine.executor.launch, engine.scheduler.blocks
    tensors = {t.data_ptr(): t for cache in runner_of(engine.executor).caches for t in cache.block_tensors}.values()

    def launch_over_poison(plan):
        held = {block for request in engine.scheduler.running() for block in request.blocks}
        free = [block for block in range(pool.num_usable + 1) if block not in held and pool.key_of(block) is None]
        for tensor in tensors:
            tensor[free] = float("nan")
        return launch(plan)

    engine.executor.launch = launch_over_poison


@pytest.mark.parametrize(("num_heads", "splits"), [(1, (2, 1)), (8, (1, 4))])
def test_draft_modules_find_their_entries_and_graphs_are_as_their_eager_twins(
    num_heads, splits, tmp_path, device
) -> None:
    """Modules are as the last layer, which sees all tokens."""
    sizes = GEMMA4 | {"num_attention_heads": 8, "num_key_value_heads": num_heads, "hidden_size_per_layer_input": 0}
    random_hf_model(hf_config("Gemma4TextConfig", **sizes)).save_pretrained(tmp_path)
    options = {"speculative_method": "mtp", "num_speculative_tokens": 3, "load_format": "dummy"}
    engine = create(str(tmp_path), device, **options)
    assert set(runner_of(engine.executor).layout.splits) == set(splits)
    found = add_all(engine)
    assert_alike(found, add_all(in_one_group(str(tmp_path), device, **options)))
    rows = (Row(20, 1, 21), Row(0, 17, 17), Row(33, 4, 34, num_drafts=3), Row(7, 1, 8, active=False), Row(0, 3, 3))
    shape = StepShape(48, 8, num_drafts=3)
    result = verify_shape(runner_of(engine.executor), shape, [Composition(rows, seed=1)], alone_rows=8)
    assert result.mismatches == []

"""Whole steps of a tiny model: captured against eager, poisoned padding, run ahead, tokens, sleep."""

import random

import pytest
import torch
from tiny import drain
from transformers import AutoModelForCausalLM

from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.step.shape import StepShape, Variant
from stepgraph.verify.compositions import random_compositions
from stepgraph.verify.graphs import verify_shape

PROMPTS = [[7], list(range(1, 30)), [5, 5, 5, 9, 200], list(range(40, 130)), [100, 3]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


def answers(engine, prompts=PROMPTS, params=GREEDY) -> list[list[int]]:
    """The tokens of each, all requests added at once."""
    tokens: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, params)
        tokens[str(i)] = []
    while engine.has_work:
        for update in engine.step():
            tokens[update.request.id] += update.new_token_ids
    return [tokens[str(i)] for i in range(len(prompts))]


@pytest.fixture(scope="module")
def expected(tiny_model: str) -> list[list[int]]:
    """What transformers answers, greedily, one prompt after the other."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        return [
            model.generate(
                torch.tensor([prompt]),
                do_sample=False,
                min_new_tokens=20,
                max_new_tokens=20,
                pad_token_id=0,
                eos_token_id=-1,
            )[0, len(prompt) :].tolist()
            for prompt in PROMPTS
        ]


@pytest.mark.parametrize("variant", list(Variant))
@pytest.mark.parametrize("num_drafts", [0, 2])
def test_a_captured_step_is_the_eager_one_bit_for_bit_and_reads_no_padding(create_engine, variant, num_drafts) -> None:
    drafting = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 2}} if num_drafts else {}
    runner = create_engine(**drafting).executor.runner
    shape = StepShape(48, 8, variant=variant, num_drafts=num_drafts)
    room = {
        "max_len": runner.max_model_len - 1,
        "num_blocks": runner.num_kv_blocks - 1,
        "block_size": runner.block_size,
    }
    compositions = list(random_compositions(shape, 12, random.Random(0), **room))
    report = verify_shape(runner, shape, compositions, alone_rows=2)
    assert report.compositions == 12
    assert report.mismatches == []


@pytest.mark.parametrize("settings", [{}, {"graph_backend": "eager"}, {"max_num_seqs": 2}, {"capture": "all"}], ids=str)
def test_greedy_tokens_are_those_of_transformers(create_engine, expected, settings) -> None:
    assert answers(create_engine(**settings)) == expected


def test_sampled_tokens_repeat(create_engine) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=20, seed=5, ignore_eos=True)
    engine = create_engine()
    first = answers(engine, params=params)
    assert answers(engine, params=params) == first
    assert answers(create_engine(graph_backend="eager"), params=params) == first


def test_the_host_launches_as_many_steps_ahead_as_the_platform_says(create_engine, platform, monkeypatch) -> None:
    engine = create_engine()
    under_way: list[int] = []
    launched = collected = 0
    launch, collect = engine.executor.runner.launch, engine.executor.runner.collect

    def counted_launch(plan):
        nonlocal launched
        launched += 1
        under_way.append(launched - collected)
        return launch(plan)

    def counted_collect(ticket):
        nonlocal collected
        collected += 1
        return collect(ticket)

    monkeypatch.setattr(engine.executor.runner, "launch", counted_launch)
    monkeypatch.setattr(engine.executor.runner, "collect", counted_collect)
    answers(engine)
    assert max(under_way) == 1 + platform.run_ahead


def test_requests_come_and_go_while_steps_are_under_way(create_engine, expected) -> None:
    engine = create_engine(max_num_seqs=3)
    tokens: dict[str, list[int]] = {}
    waiting = list(enumerate(PROMPTS))
    step = 0
    while waiting or engine.has_work:
        if waiting and step % 3 == 0:
            i, prompt = waiting.pop()
            engine.add_request(str(i), prompt, GREEDY)
            engine.add_request(f"gone {i}", [9, 9, i + 1], GREEDY)
        if step % 3 == 2 and (gone := [name for name in list(tokens) if name.startswith("gone")]):
            engine.abort(gone[0])
            del tokens[gone[0]]
        for update in engine.step():
            tokens.setdefault(update.request.id, []).extend(update.new_token_ids)
        step += 1
    assert [tokens[str(i)] for i in range(len(PROMPTS))] == expected


@pytest.mark.parametrize("level", [1, 2])
def test_an_engine_sleeps_in_the_middle_of_answers_and_goes_on(
    create_engine, platform, tiny_model, expected, level
) -> None:
    if platform.name == "cuda":
        pytest.importorskip("cuda.bindings", reason="sleep needs the driver's Python bindings")
    engine = create_engine(enable_sleep_mode=True)
    engine.add_request("a", PROMPTS[1], GREEDY)
    tokens: list[int] = []
    for _ in range(6):
        for update in engine.step():
            tokens += update.new_token_ids
    engine.sleep(level)
    engine.wake_up()
    if level == 2:
        engine.update_weights(tiny_model)
    while engine.has_work:
        for update in engine.step():
            tokens += update.new_token_ids
    assert tokens == expected[1]
    drain(engine)

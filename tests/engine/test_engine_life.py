"""Pausing, sleeping, new weights, failing requests, interrupts and the end: answers are those of an engine left alone."""

import asyncio
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY_SETTINGS, drain, save_tiny_model, set_run_ahead

from stepgraph import LLM
from stepgraph.config import EngineConfig
from stepgraph.engine.async_engine import AsyncEngine
from stepgraph.engine.request import FinishReason
from stepgraph.engine.sampling_params import SamplingParams, StructuredOutputs
from stepgraph.errors import ConfigError, EngineDeadError, Fault, ModelError, RequestError
from stepgraph.models.source import resolve

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
CASES = [
    (list(range(1, 60)), replace(GREEDY, logprobs=2)),
    ([5, 6, 7], replace(GREEDY, temperature=1.0, seed=3, repetition_penalty=1.3)),
    ([9] * 100, replace(GREEDY, prompt_logprobs=1)),
    ([9] * 40 + [1], GREEDY),
]


def add_all(engine) -> list:
    return [engine.add_request(f"r{i}", prompt, params) for i, (prompt, params) in enumerate(CASES)]


def answers(requests) -> list[tuple]:
    """Tokens, and the most likely tokens beside them."""

    def tops(positions):
        return [p and [token for token, _ in p.top] for p in positions]

    return [(r.output_token_ids, tops(r.output_logprobs), tops(r.prompt_logprobs)) for r in requests]


def steps(engine, count: int) -> list:
    return [update for _ in range(count) for update in engine.step()]


def updates_until_idle(engine) -> list:
    updates = []
    for _ in range(1000):
        if not engine.has_work:
            return updates
        updates += engine.step()
    raise AssertionError("the engine never rests")


def graphs(engine) -> dict:
    """The captured graphs, by shape."""
    graphs = engine.executor.runner.graphs
    return {record.shape: id(graphs.store.graph(record.shape)) for record in graphs.records()}


@pytest.fixture(scope="module")
def expected(create_engine) -> list[tuple]:
    engine = create_engine()
    requests = add_all(engine)
    drain(engine)
    return answers(requests)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory, tiny_model) -> str:
    """The tiny model, trained to say something else."""
    folder = tmp_path_factory.mktemp("other-model")
    save_tiny_model(folder)
    generator = torch.Generator().manual_seed(7)
    tensors = load_file(folder / "model.safetensors")
    changed = {n: t + 0.2 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


# Pause


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_a_paused_engine_finishes_what_is_under_way_and_nothing_else(create_engine, expected, run_ahead) -> None:
    engine = create_engine()
    set_run_ahead(engine, run_ahead)
    requests = add_all(engine)
    got = steps(engine, 9)
    launched = engine.host_time.steps
    engine.pause()
    got += updates_until_idle(engine)
    assert engine.is_paused
    assert engine.step() == []
    assert engine.host_time.steps == launched
    assert engine.seconds_until_work is None
    for request in requests:
        assert sum(len(u.new_token_ids) for u in got if u.request is request) == len(request.output_token_ids)

    late, aborted = engine.add_request("late", [3], GREEDY), engine.add_request("aborted", [4], GREEDY)
    assert not engine.has_work
    assert engine.abort("aborted").finish_reason is FinishReason.ABORT
    engine.resume()
    drain(engine)
    assert answers(requests) == expected
    assert len(late.output_token_ids) == GREEDY.max_tokens
    assert aborted.output_token_ids == []


def test_a_reset_of_the_prefix_cache_makes_a_prompt_be_computed_again(tiny_model) -> None:
    def num_cached(llm) -> int:
        return llm.generate([list(range(1, 40))], GREEDY, use_tqdm=False)[0].num_cached_tokens

    with LLM(tiny_model, progress=False, **TINY_SETTINGS) as llm:
        assert [num_cached(llm), num_cached(llm)] == [0, 32]
        assert llm.reset_prefix_cache() == 0
        assert num_cached(llm) == 0


def test_a_paused_llm_says_so_rather_than_wait_for_ever(tiny_model) -> None:
    with LLM(tiny_model, progress=False, enable_sleep_mode=True, **TINY_SETTINGS) as llm:
        llm.engine.pause()
        with pytest.raises(RequestError, match=r"it is paused; call resume\(\)"):
            llm.generate([1, 2], GREEDY, use_tqdm=False)
        llm.engine.resume()
        stream = llm.stream([1, 2], GREEDY)
        next(stream)
        llm.sleep()
        with pytest.raises(RequestError, match=r"it sleeps; call wake_up\(\)"):
            list(stream)
        llm.wake_up()
        assert len(llm.generate([1, 2], GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 24


# Sleep


def storage_bytes(tensors) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def caches(engine) -> list[torch.Tensor]:
    return [cache for caches in engine.executor.runner.caches for cache in caches.block_tensors]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CUDA, memory is given up below torch's storages")
@pytest.mark.parametrize("level", [1, 2])
def test_sleep_gives_memory_up_and_wake_up_goes_on_with_the_same_graphs(
    create_engine, tiny_model, expected, level
) -> None:
    engine = create_engine()
    set_run_ahead(engine, 1)
    requests = add_all(engine)
    got = steps(engine, 9)
    captured = graphs(engine)
    parameters = list(engine.executor.runner.model.parameters())

    engine.sleep(level)
    assert engine.is_sleeping
    assert storage_bytes(caches(engine)) == 0
    assert (storage_bytes(parameters) == 0) == (level == 2)
    got += updates_until_idle(engine)
    for request in requests:
        assert sum(len(u.new_token_ids) for u in got if u.request is request) == len(request.output_token_ids)
    assert engine.step() == []
    late = engine.add_request("late", *CASES[0])
    engine.sleep(level)

    engine.wake_up()
    if level == 2:
        assert not engine.has_work
        engine.update_weights(tiny_model)
    drain(engine)
    assert answers([*requests, late]) == [*expected, expected[0]]
    assert min(request.num_preemptions for request in requests) == 1
    assert captured.items() <= graphs(engine).items()
    assert not engine.is_sleeping


def test_nothing_is_delivered_of_a_request_after_its_abort(create_engine) -> None:
    engine = create_engine(enable_sleep_mode=True)
    set_run_ahead(engine, 1)
    request = engine.add_request("a", [1, 2, 3], GREEDY)
    steps(engine, 5)
    engine.sleep()
    assert engine.has_work
    engine.abort("a")
    engine.wake_up()
    assert engine.step() == []
    assert request.finish_reason is FinishReason.ABORT


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CUDA, memory is given up below torch's storages")
def test_a_light_sleep_can_become_a_deep_one_and_a_deep_one_not_a_light_one(
    create_engine, tiny_model, expected
) -> None:
    engine = create_engine()
    parameters = list(engine.executor.runner.model.parameters())
    for level, dropped in ((1, False), (2, True), (1, True)):
        engine.sleep(level)
        assert (storage_bytes(parameters) == 0) == dropped
    engine.wake_up()
    requests = add_all(engine)
    assert engine.idle_reason == "it has no weights; call update_weights()"
    engine.update_weights(tiny_model)
    drain(engine)
    assert answers(requests) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU's memory and its captured graphs")
@pytest.mark.parametrize("level", [1, 2])
def test_a_gpus_memory_is_free_during_sleep_and_its_graphs_are_valid_after_it(level) -> None:
    pytest.importorskip("cuda.bindings.driver", reason="needs the Python bindings of the CUDA driver")
    # Deterministic, as a request that is computed again meets other batches.
    with LLM(
        "qwen3-0.6b",
        load_format="dummy",
        device="cuda",
        deterministic=True,
        enable_sleep_mode=True,
        max_model_len=2048,
        max_num_seqs=8,
        max_num_batched_tokens=128,
        capture_sizes=(8, 128),
        num_kv_blocks=4096,
        progress=False,
    ) as llm:
        engine = llm.engine
        weights = {name: t.detach().cpu() for name, t in engine.executor.runner.model.checkpoint_tensors().items()}
        weight_bytes = sum(parameter.nbytes for parameter in engine.executor.runner.model.parameters())
        cache_bytes = sum(cache.nbytes for cache in caches(engine))
        prompts = [list(range(n, 3 * n)) for n in (5, 90, 200)]
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY, use_tqdm=False)]
        requests = [engine.add_request(f"r{n}", prompt, GREEDY) for n, prompt in enumerate(prompts)]
        steps(engine, 12)
        captured, free = graphs(engine), engine.executor.runner.platform.free_memory_bytes()
        addresses = [tensor.data_ptr() for tensor in (*engine.executor.runner.model.parameters(), *caches(engine))]

        engine.sleep(level)
        assert engine.executor.runner.platform.free_memory_bytes() - free >= 0.99 * (weight_bytes + cache_bytes)
        engine.wake_up()
        if level == 2:
            engine.update_weights(weights.items())
        drain(engine)
        assert [tuple(request.output_token_ids) for request in requests] == expected
        assert graphs(engine) == captured
        assert [
            tensor.data_ptr() for tensor in (*engine.executor.runner.model.parameters(), *caches(engine))
        ] == addresses


def test_sleep_refuses_what_it_cannot_do(create_engine, tiny_model) -> None:
    engine = create_engine()
    with pytest.raises(ConfigError, match="sleep level 3 is unknown; use 1"):
        engine.sleep(3)
    engine.executor.specs = replace(engine.executor.specs, can_sleep=False)  # as on CUDA without the setting
    with pytest.raises(ConfigError, match="start the engine with enable_sleep_mode=True"):
        engine.sleep()
    assert not engine.is_sleeping


def test_weights_cannot_be_updated_asleep(create_engine, tiny_model) -> None:
    engine = create_engine(enable_sleep_mode=True)
    engine.sleep()
    with pytest.raises(ConfigError, match=r"call wake_up\(\) first"):
        engine.update_weights(tiny_model)


# New weights


@pytest.mark.parametrize(
    ("form", "model_impl"),
    [("folder", "native"), ("source", "native"), ("tensors", "native"), ("folder", "transformers")],
)
def test_requests_go_on_with_new_weights_in_the_same_graphs(create_engine, other_model, form, model_impl) -> None:
    engine, other = create_engine(model_impl=model_impl), create_engine(model=other_model, model_impl=model_impl)
    request = engine.add_request("a", [1, 2, 3], GREEDY)
    steps(engine, 9)
    captured = graphs(engine)
    forms = {
        "folder": other_model,
        "source": resolve(other_model, model_impl=model_impl),
        "tensors": load_file(f"{other_model}/model.safetensors").items(),
    }
    engine.update_weights(forms[form])
    before = list(request.output_token_ids)  # those of steps that were in flight included
    again = engine.add_request("b", [1, 2, 3], GREEDY)  # finds no prefix that old weights computed
    drain(engine)

    continued = other.add_request("a", [1, 2, 3, *before], replace(GREEDY, max_tokens=24 - len(before)))
    fresh = other.add_request("b", [1, 2, 3], GREEDY)
    drain(other)
    assert request.output_token_ids == before + continued.output_token_ids
    assert again.output_token_ids == fresh.output_token_ids
    assert again.output_token_ids[: len(before)] != before
    assert captured.items() <= graphs(engine).items()


def test_weights_of_another_model_are_refused_before_any_is_written(create_engine, tiny_model, tmp_path) -> None:
    engine = create_engine()
    tensors = load_file(f"{tiny_model}/model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    zeros = {other: torch.zeros_like(tensor) for other, tensor in tensors.items()}
    for bad, message in (
        ({other: t for other, t in zeros.items() if other != name}, rf"1 \({name}\) missing, none left over"),
        (zeros | {"model.extra": torch.zeros(1)}, r"none missing, 1 \(model.extra\) left over"),
        (zeros | {name: torch.zeros(3, 4)}, rf"{name} has shape \[3, 4\].*in the model \[64, 32\]"),
    ):
        with pytest.raises(ModelError, match=message):
            engine.update_weights(bad.items())
    with pytest.raises(ModelError, match=r"1 .* left over"):
        engine.update_weights([*zeros.items(), (name, zeros[name])])
    with pytest.raises(ModelError, match="is of another model than the one that runs"):
        engine.update_weights(save_tiny_model(tmp_path, num_layers=3))
    targets = engine.executor.runner.model.checkpoint_tensors()
    assert all(torch.equal(targets[other].cpu(), tensor) for other, tensor in tensors.items())
    assert engine.idle_reason is None

    through_transformers = create_engine(model_impl="transformers")
    with pytest.raises(ModelError, match="save the weights with save_pretrained and give the folder"):
        through_transformers.update_weights(tensors.items())


def test_after_an_update_that_failed_half_way_no_step_runs_until_one_succeeds(
    create_engine, tiny_model, expected
) -> None:
    class Damaged(torch.Tensor):
        def to(self, *args, **kwargs):
            raise ModelError("the file ends too early")

    engine = create_engine()
    requests = add_all(engine)
    steps(engine, 5)
    tensors = load_file(f"{tiny_model}/model.safetensors")
    last = list(tensors)[-1]
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    with pytest.raises(ModelError, match="ends too early"):
        engine.update_weights({**zeros, last: zeros[last].as_subclass(Damaged)}.items())
    updates_until_idle(engine)
    assert engine.idle_reason == "it has no weights; call update_weights()"
    engine.update_weights(tiny_model)
    drain(engine)
    assert answers(requests) == expected


# The end


def test_shutdown_frees_everything_and_leaves_room_for_another_engine(create_engine, expected) -> None:
    engine = create_engine()
    requests = add_all(engine)
    steps(engine, 5)
    tensors = [*engine.executor.runner.model.parameters(), *caches(engine)]
    runner, store = weakref.ref(engine.executor.runner), weakref.ref(engine.executor.runner.graphs.store)
    graph = weakref.ref(engine.executor.runner.graphs.store.graph(engine.executor.runner.graphs.records()[0].shape))
    for _ in range(2):
        engine.shutdown()
    assert (runner(), store(), graph()) == (None, None, None)
    assert storage_bytes(tensors) == 0
    calls = [engine.step, engine.pause, engine.resume, engine.sleep, engine.wake_up, lambda: engine.update_weights([])]
    for call in [*calls, lambda: engine.add_request("x", [1], GREEDY)]:
        with pytest.raises(EngineDeadError, match="the engine was shut down; create another one"):
            call()
    assert engine.abort("r0").finish_reason is FinishReason.ABORT

    other = create_engine()
    requests = add_all(other)
    drain(other)
    assert answers(requests) == expected


def test_an_engine_that_failed_can_be_shut_down(create_engine, monkeypatch) -> None:
    engine = create_engine()
    engine.add_request("a", [1], GREEDY)
    monkeypatch.setattr(engine.executor.runner, "launch", lambda plan: 1 / 0)
    with pytest.raises(EngineDeadError):
        engine.step()
    runner = weakref.ref(engine.executor.runner)
    monkeypatch.undo()
    engine.shutdown()
    engine._life.failure = None  # it holds the frames that failed
    gc.collect()
    assert runner() is None


def test_leaving_the_block_of_an_llm_shuts_it_down(tiny_model) -> None:
    with LLM(tiny_model, progress=False, **TINY_SETTINGS) as llm:
        assert len(llm.generate([1, 2], GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 24
    llm.shutdown()
    with pytest.raises(EngineDeadError, match="was shut down"):
        llm.generate([1, 2], GREEDY, use_tqdm=False)


# One request's failure


@pytest.mark.parametrize("run_ahead", [0, 1])
@pytest.mark.parametrize("first", [True, False], ids=["admitted first", "admitted among others"])
def test_a_request_that_cannot_be_admitted_fails_alone(create_engine, run_ahead, first) -> None:
    engine, alone = create_engine(max_num_batched_tokens=96, capture_sizes=(8, 96)), create_engine()
    set_run_ahead(engine, run_ahead)
    running = [engine.add_request(f"before{i}", [i, 3], GREEDY) for i in range(2)]
    steps(engine, 4)
    stem = list(range(32))  # whoever comes after the poisoned request counts on the blocks it was to fill
    after = [] if first else [engine.add_request("early", [77, 3], GREEDY)]
    poisoned = engine.add_request("poisoned", [*stem, 1], GREEDY)
    poisoned.sampling = replace(poisoned.sampling, stop_token_ids=tuple(range(1000)))
    after += [engine.add_request(f"after{i}", [*stem, i], GREEDY) for i in range(2)]
    [failure] = [update for update in updates_until_idle(engine) if update.request is poisoned]
    assert (failure.finish_reason, failure.new_token_ids) == (FinishReason.ERROR, ())
    assert "stop_token_ids" in poisoned.error.message
    for request in [*running, *after]:
        copy = alone.add_request(request.id, request.prompt_token_ids, GREEDY)
        drain(alone)
        assert request.output_token_ids == copy.output_token_ids, request.id
        assert request.finish_reason is FinishReason.LENGTH
    assert engine.scheduler.num_free_blocks == engine.executor.runner.num_kv_blocks - 1


def test_a_request_whose_masks_break_fails_alone(create_engine, expected, monkeypatch) -> None:
    pytest.importorskip("xgrammar", reason="guided answers need xgrammar")
    engine = create_engine()
    masks_of = engine._masks.masks

    def masks(request):
        if request.output_token_ids:
            raise ZeroDivisionError("a bug in the masks")
        return masks_of(request)

    monkeypatch.setattr(engine._masks, "masks", masks)
    requests = add_all(engine)
    broken = engine.add_request("broken", [1, 2], replace(GREEDY, structured_outputs=StructuredOutputs(regex="a*")))
    drain(engine)
    assert (broken.finish_reason, broken.error) == (FinishReason.ERROR, Fault("a bug in the masks", is_users=False))
    assert len(broken.output_token_ids) == 1
    assert answers(requests) == expected
    engine.shutdown()


# The same, asked of an AsyncEngine


@pytest.fixture
def async_engine(tiny_model, device):
    settings = {"model": tiny_model, "device": device, "enable_sleep_mode": True} | TINY_SETTINGS
    engine = AsyncEngine(EngineConfig.from_settings(**settings))
    yield engine
    engine.shutdown()


async def tokens_of(engine, prompt) -> tuple[int, ...]:
    return [output async for output in engine.generate(prompt, GREEDY)][-1].outputs[0].token_ids


def test_calls_wait_while_an_async_engine_is_paused_or_asleep_and_its_thread_rests(
    async_engine, other_model, monkeypatch
) -> None:
    turns = []
    run_commands = async_engine._run_commands
    monkeypatch.setattr(async_engine, "_run_commands", lambda: (turns.append(1), run_commands()))

    async def scenario() -> None:
        expected = await tokens_of(async_engine, [1, 2, 3])
        for stop, go_on, asked in (
            (async_engine.pause, async_engine.resume, "is_paused"),
            (async_engine.sleep, async_engine.wake_up, "is_sleeping"),
        ):
            early = asyncio.create_task(tokens_of(async_engine, [1, 2, 3]))
            await asyncio.sleep(0.01)
            await stop()
            late = asyncio.create_task(tokens_of(async_engine, [1, 2, 3]))
            await asyncio.sleep(0.05)
            assert getattr(async_engine, asked)
            turns.clear()
            await asyncio.sleep(0.2)
            assert len(turns) <= 1
            assert not late.done()
            await go_on()
            assert await early == await late == expected
        with pytest.raises(ConfigError, match="sleep level 0"):
            await async_engine.sleep(0)
        await async_engine.update_weights(other_model)
        assert await tokens_of(async_engine, [1, 2, 3]) != expected
        async_engine.shutdown()
        with pytest.raises(EngineDeadError, match="shut down"):
            await async_engine.pause()

    asyncio.run(asyncio.wait_for(scenario(), 60))
    with pytest.raises(EngineDeadError, match="the engine was shut down"):
        async_engine.engine.step()

"""AsyncEngine: concurrent callers, callers that leave, and an engine that stops."""

import asyncio
import itertools
import threading
from contextlib import aclosing

import pytest
from lora_folders import matrices, save_adapter
from tiny import TINY_SETTINGS, VOCAB_SIZE, drain

from stepgraph.config import EngineConfig
from stepgraph.engine.async_engine import AsyncEngine
from stepgraph.engine.prompts import tokenize
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import EngineDeadError, RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
PROMPTS = [list(range(n, 2 * n + 1)) for n in range(1, 9)]


@pytest.fixture
def engine(tiny_model, device):
    engine = AsyncEngine(EngineConfig.from_settings(**({"model": tiny_model, "device": device} | TINY_SETTINGS)))
    yield engine
    engine.shutdown()


def run(coroutine):
    """A caller's event loop, which fails rather than waits for ever."""
    return asyncio.run(asyncio.wait_for(coroutine, 60))


async def collect(engine, prompt, params=GREEDY, **options):
    return [output async for output in engine.generate(prompt, params, **options)]


def num_tokens(outputs) -> int:
    """Of the whole answer: how many outputs it took depends on how busy the caller's loop was."""
    return len(outputs[-1].outputs[0].token_ids)


async def until_idle(engine) -> None:
    while engine.engine.has_work:
        await asyncio.sleep(0.001)


def test_an_answer_grows_token_by_token_to_a_finished_one(engine) -> None:
    outputs = run(collect(engine, PROMPTS[3], request_id="mine"))
    lengths = [len(output.outputs[0].token_ids) for output in outputs]
    assert lengths == sorted(set(lengths)), "each has more than the one before"
    assert lengths[-1] == 12
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    for shorter, longer in itertools.pairwise(outputs):
        assert longer.outputs[0].token_ids[: len(shorter.outputs[0].token_ids)] == shorter.outputs[0].token_ids
        assert longer.outputs[0].text.startswith(shorter.outputs[0].text)
    last = outputs[-1]
    assert (last.request_id, last.prompt, last.prompt_token_ids) == ("mine", None, tuple(PROMPTS[3]))
    assert (last.outputs[0].finish_reason, last.outputs[0].index) == ("length", 0)


def test_concurrent_callers_get_what_each_gets_alone(engine, create_engine) -> None:
    async def all_at_once():
        return await asyncio.gather(*(collect(engine, prompt) for prompt in PROMPTS))

    found = [tuple(outputs[-1].outputs[0].token_ids) for outputs in run(all_at_once())]
    alone = create_engine()
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        request = alone.add_request("r", prompt, GREEDY)
        drain(alone)
        assert tuple(request.output_token_ids) == tokens
    assert max(record.num_rows for record in engine.engine.executor.statistics.recent) > 1  # they did run together


def test_a_caller_that_leaves_early_ends_its_request_and_no_other(engine) -> None:
    async def leave_beside_a_neighbour():
        neighbour = asyncio.create_task(collect(engine, PROMPTS[2]))
        async with aclosing(engine.generate(PROMPTS[1], LONG)) as outputs:
            async for output in outputs:
                if len(output.outputs[0].token_ids) == 3:
                    break
        tokens = (await neighbour)[-1].outputs[0].token_ids
        await until_idle(engine)
        return tokens

    assert run(leave_beside_a_neighbour()) == run(collect(engine, PROMPTS[2]))[-1].outputs[0].token_ids
    assert engine.engine.executor.statistics.num_steps < 300
    assert engine.engine.scheduler.num_running == 0


def test_a_cancelled_task_ends_its_request(engine) -> None:
    async def cancel():
        task = asyncio.create_task(collect(engine, PROMPTS[1], LONG))
        while not engine.engine.scheduler.num_running:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until_idle(engine)

    run(cancel())
    assert engine.engine.executor.statistics.num_steps < 300


def test_abort_gives_the_caller_a_last_output_that_says_so(engine) -> None:
    async def abort():
        outputs = []
        async for output in engine.generate(PROMPTS[1], LONG, request_id="long"):
            outputs.append(output)
            if len(outputs) == 3:
                engine.abort("long")
        return outputs

    last = run(abort())[-1]
    assert last.finished
    assert last.outputs[0].finish_reason == "abort"
    assert 3 <= len(last.outputs[0].token_ids) < 400
    engine.abort("long")  # ended: nothing happens
    engine.abort("never there")
    assert num_tokens(run(collect(engine, PROMPTS[0]))) == 12


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([VOCAB_SIZE], "outside the vocabulary"),
        ({"text": "hello"}, "needs 'prompt' or 'prompt_token_ids', not"),
        (7, "a prompt is text or a list of token ids, not int"),
    ],
)
def test_an_unusable_prompt_is_the_callers_error_and_nobody_elses(engine, prompt, message) -> None:
    with pytest.raises(RequestError, match=message):
        run(collect(engine, prompt))
    assert num_tokens(run(collect(engine, PROMPTS[0]))) == 12


def test_a_second_caller_with_the_same_id_is_refused_and_the_first_goes_on(engine) -> None:
    async def two_with_one_id():
        first = asyncio.create_task(collect(engine, PROMPTS[1], request_id="same"))
        while not engine.engine.scheduler.has_requests:
            await asyncio.sleep(0)
        with pytest.raises(RequestError, match="request id 'same' is in use"):
            await collect(engine, PROMPTS[2], request_id="same")
        return await first

    last = run(two_with_one_id())[-1]
    assert (len(last.outputs[0].token_ids), last.outputs[0].finish_reason) == (12, "length")


def test_a_caller_whose_event_loop_is_gone_harms_nobody(engine) -> None:
    loop = asyncio.new_event_loop()
    outputs = engine.generate(PROMPTS[1], LONG)
    loop.run_until_complete(anext(outputs))
    loop.close()
    assert num_tokens(run(collect(engine, PROMPTS[0]))) == 12
    run(until_idle(engine))
    assert engine.engine.executor.statistics.num_steps < 300


def test_shutdown_ends_waiting_callers_and_refuses_later_ones(engine) -> None:
    async def shut_down_under_a_caller():
        caller = asyncio.create_task(collect(engine, PROMPTS[1], LONG))
        while not engine.engine.scheduler.num_running:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(engine.shutdown)
        with pytest.raises(EngineDeadError, match="it was shut down"):
            await caller
        with pytest.raises(EngineDeadError, match="it was shut down"):
            await collect(engine, PROMPTS[1])

    run(shut_down_under_a_caller())
    engine.shutdown()  # a second time does nothing


def test_callers_that_arrive_during_shutdown_are_all_told(engine) -> None:
    """None is left waiting for a thread that has ended."""

    async def arrive_all_the_time():
        async def caller() -> str:
            try:
                await collect(engine, PROMPTS[0])
            except EngineDeadError:
                return "told"
            return "served"

        callers = [asyncio.create_task(caller()) for _ in range(20)]
        stopping = asyncio.create_task(asyncio.to_thread(engine.shutdown))
        while not stopping.done():
            callers.append(asyncio.create_task(caller()))
            await asyncio.sleep(0)
        callers += [asyncio.create_task(caller()) for _ in range(20)]
        return await asyncio.gather(*callers)

    results = run(arrive_all_the_time())
    assert set(results[-20:]) == {"told"}


def test_a_failed_step_is_reported_to_every_caller_and_all_later_ones(engine, monkeypatch) -> None:
    def launch(plan):
        raise RuntimeError("the device fell over")

    monkeypatch.setattr(engine.engine.executor.runner, "launch", launch)

    async def many():
        return await asyncio.gather(*(collect(engine, prompt) for prompt in PROMPTS), return_exceptions=True)

    for results in (run(many()), run(many())):
        assert {type(result) for result in results} == {EngineDeadError}
        assert all("the device fell over" in str(result) for result in results)


async def text_of(engine) -> str:
    return (await collect(engine, PROMPTS[3], LONG))[-1].outputs[0].text


def test_several_answers_are_streamed_together(engine) -> None:
    params = SamplingParams(n=3, seed=5, max_tokens=12, ignore_eos=True)

    async def together_and_alone():
        together = await collect(engine, PROMPTS[3], params, request_id="mine")
        alone = [
            await collect(engine, PROMPTS[3], SamplingParams(seed=s, max_tokens=12, ignore_eos=True)) for s in (5, 6, 7)
        ]
        return together, [outputs[-1].outputs[0].token_ids for outputs in alone]

    outputs, alone = run(together_and_alone())
    assert [completion.token_ids for completion in outputs[-1].outputs] == alone
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert {output.request_id for output in outputs} == {"mine"}
    for shorter, longer in itertools.pairwise(outputs):
        for before, after in zip(shorter.outputs, longer.outputs, strict=True):
            assert after.token_ids[: len(before.token_ids)] == before.token_ids


def test_abort_ends_all_answers_of_a_request(engine) -> None:
    async def abort():
        outputs = []
        async for output in engine.generate(
            PROMPTS[1], SamplingParams(n=3, max_tokens=400, ignore_eos=True), request_id="long"
        ):
            outputs.append(output)
            if len(outputs) == 3:
                engine.abort("long")
        await until_idle(engine)
        return outputs[-1]

    last = run(abort())
    assert [completion.finish_reason for completion in last.outputs] == ["abort"] * 3
    assert engine.engine.executor.statistics.num_steps < 300
    assert num_tokens(run(collect(engine, PROMPTS[0], request_id="long"))) == 12  # its id is free again


def test_a_caller_that_leaves_several_answers_ends_them_all(engine) -> None:
    async def leave():
        async with aclosing(
            engine.generate(PROMPTS[1], SamplingParams(n=3, max_tokens=400, ignore_eos=True), request_id="left")
        ) as outputs:
            await anext(outputs)
        await until_idle(engine)

    run(leave())
    assert engine.engine.executor.statistics.num_steps < 300
    assert num_tokens(run(collect(engine, PROMPTS[0], request_id="left"))) == 12


def test_a_stop_string_ends_the_answer_and_its_request(engine) -> None:
    text = run(text_of(engine))
    stop = text[20:24]
    params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True, stop=stop)
    before = engine.engine.executor.statistics.num_steps

    async def stop_and_start_again():
        outputs = await collect(engine, PROMPTS[3], params, request_id="mine")
        again = await collect(engine, PROMPTS[3], params, request_id="mine")
        await until_idle(engine)
        return outputs, again

    outputs, again = run(stop_and_start_again())
    completion = outputs[-1].outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == (
        text[: text.index(stop)],
        "stop",
        stop,
    )
    assert all(completion.text.startswith(output.outputs[0].text) for output in outputs)
    assert again[-1].outputs == outputs[-1].outputs
    assert engine.engine.executor.statistics.num_steps - before < 300


def test_an_id_is_in_use_until_the_last_of_its_answers_has_ended(engine) -> None:
    async def two_with_one_id():
        first = asyncio.create_task(
            collect(engine, PROMPTS[1], SamplingParams(n=2, max_tokens=400, ignore_eos=True), request_id="same")
        )
        while not engine.engine.scheduler.has_requests:
            await asyncio.sleep(0)
        with pytest.raises(RequestError, match="request id 'same' is in use"):
            await collect(engine, PROMPTS[2], request_id="same")
        engine.abort("same")
        return await first

    assert run(two_with_one_id())[-1].finished


def test_priority_and_cache_salt_reach_the_engine(engine, monkeypatch) -> None:
    add_request, seen = engine.engine.add_request, []

    def add(*args, **options):
        seen.append(options)
        return add_request(*args, **options)

    monkeypatch.setattr(engine.engine, "add_request", add)
    run(collect(engine, {"prompt_token_ids": PROMPTS[1], "cache_salt": "me"}, priority=-3))
    assert seen == [{"priority": -3, "cache_salt": "me", "adapter": None, "bad_words": []}]


def test_work_that_becomes_due_later_is_waited_for_and_a_new_request_is_not_kept_waiting(engine, monkeypatch) -> None:
    run(collect(engine, PROMPTS[1]))  # captures its graphs
    statistics = engine.engine.executor.statistics
    before = statistics.num_steps
    due: list[float | None] = [3600.0]
    monkeypatch.setattr(type(engine.engine), "seconds_until_work", property(lambda _: due[0]))

    async def second_arrival_makes_it_due():
        first = asyncio.create_task(collect(engine, PROMPTS[1]))
        await asyncio.sleep(0.3)
        waited = statistics.num_steps - before
        due[0] = None
        second = await collect(engine, PROMPTS[2])
        return waited, await first, second

    waited, first, second = run(second_arrival_makes_it_due())
    assert waited <= 1  # the one after the request was added
    assert (num_tokens(first), num_tokens(second)) == (12, 12)


def test_work_runs_when_it_is_due_though_nobody_calls(engine, monkeypatch) -> None:
    pauses = iter([None, 0.01, 0.01])
    monkeypatch.setattr(type(engine.engine), "seconds_until_work", property(lambda _: next(pauses, None)))
    assert num_tokens(run(collect(engine, PROMPTS[1]))) == 12


def test_a_caller_that_is_slower_than_the_engine_gets_all_that_came_in_one_output(engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)

    async def look_away():
        outputs = []
        async for output in engine.generate(PROMPTS[1], params):
            outputs.append(output)
            await until_idle(engine)
        return outputs

    outputs, steady = run(look_away()), run(collect(engine, PROMPTS[1], params))
    assert len(outputs) <= 3, "one when it began, one for the rest, one if the end was told by itself"
    assert outputs[-1].outputs == steady[-1].outputs
    assert num_tokens(outputs) == 60


def test_text_and_bad_words_become_tokens_beside_the_event_loop(engine, monkeypatch) -> None:
    loop_runs = threading.Event()
    encode = engine.tokenizer.encode

    def slow(text, **options):
        assert loop_runs.wait(30), "the event loop waits for the tokenizer"
        return encode(text, **options)

    monkeypatch.setattr(engine.tokenizer, "encode", slow)
    monkeypatch.setattr("stepgraph.engine.intake.bad_word_token_ids", lambda *_: pytest.fail("its thread tokenises"))

    async def generate():
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, bad_words=("ab",))
        asyncio.get_running_loop().call_later(0.05, loop_runs.set)
        return await collect(engine, "abc", params)

    assert num_tokens(run(generate())) == 4


def test_a_request_that_is_aborted_before_its_prompt_is_ready_ends_so(engine, monkeypatch) -> None:
    aborted = threading.Event()

    def slow(prompt, tokenizer):
        assert aborted.wait(30)
        return tokenize(prompt, tokenizer)

    monkeypatch.setattr("stepgraph.engine.async_engine.tokenize", slow)

    async def abort():
        answering = asyncio.create_task(collect(engine, PROMPTS[1], LONG, request_id="early"))
        await asyncio.sleep(0.05)
        engine.abort("early")
        await engine.pause()  # the engine's thread has heard of it
        assert await engine.reset_prefix_cache(preempt=True) == 0
        await engine.resume()
        aborted.set()
        return await answering

    last = run(abort())[-1]
    assert (last.outputs[0].finish_reason, last.finished) == ("abort", True)


@pytest.fixture
def lora_engine(tiny_model, device):
    settings = {"model": tiny_model, "device": device, "enable_lora": True, "max_lora_rank": 4} | TINY_SETTINGS
    engine = AsyncEngine(EngineConfig.from_settings(**settings))
    yield engine
    engine.shutdown()


def test_an_adapter_is_read_beside_the_engine_and_only_its_own_requests_wait(
    lora_engine, monkeypatch, tmp_path
) -> None:
    engine, may_read, reads = lora_engine, threading.Event(), []
    folder, broken = save_adapter(tmp_path, matrices(0)), str(tmp_path / "none")
    read = engine.engine.read_adapter

    def slow(wanted):
        reads.append(wanted)
        assert may_read.wait(30)
        return read(wanted)

    monkeypatch.setattr(engine._adapters, "_read", slow)

    async def answers():
        adapted = [asyncio.create_task(collect(engine, PROMPTS[2], adapter=folder)) for _ in range(2)]
        refused = asyncio.create_task(collect(engine, PROMPTS[2], adapter=broken))
        left = asyncio.create_task(collect(engine, PROMPTS[2], adapter=folder))
        neighbour = await collect(engine, PROMPTS[2])
        assert not any(task.done() for task in (*adapted, refused))
        left.cancel()
        may_read.set()
        with pytest.raises(RequestError, match="holds no adapter_config"):
            await refused
        return neighbour, await asyncio.gather(*adapted)

    neighbour, adapted = run(answers())
    assert num_tokens(neighbour) == 12
    assert sorted(reads) == sorted([folder, broken]), "calls that wait for the same adapter share one reading"
    tokens = {outputs[-1].outputs[0].token_ids for outputs in adapted}
    assert len(tokens) == 1
    assert tokens != {neighbour[-1].outputs[0].token_ids}


def test_an_idle_engine_captures_the_graphs_of_fewer_proposals_and_answers_meanwhile(tiny_model, device) -> None:
    engine = AsyncEngine(
        EngineConfig.from_settings(
            **({"model": tiny_model, "device": device} | TINY_SETTINGS),
            speculative_config={"method": "suffix", "num_speculative_tokens": 4},
        )
    )
    graphs, levels = engine.engine.executor.runner.graphs, engine.engine.draft_levels
    wanted = {shape for level in levels for shape in engine.engine.executor.runner.policy.shapes(num_drafts=level)}
    assert len(levels) > 1

    async def answer_and_wait() -> None:
        before = (await collect(engine, PROMPTS[3]))[-1].outputs[0].token_ids
        graphs.lazy = False  # as where captures are done ahead
        assert (await collect(engine, PROMPTS[3]))[-1].outputs[0].token_ids == before
        while not wanted <= {record.shape for record in graphs.records()}:
            await asyncio.sleep(0.01)
        assert (await collect(engine, PROMPTS[3]))[-1].outputs[0].token_ids == before

    run(answer_and_wait())
    engine.shutdown()

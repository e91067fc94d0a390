"""LLM: prompts in every form, results shaped as vLLM's."""

import itertools
import shutil

import pytest
from tiny import MAX_MODEL_LEN, TINY_SETTINGS

import stepgraph
from stepgraph import LLM, CompletionOutput, RequestOutput, SamplingParams
from stepgraph.errors import ConfigError, ModelError, RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
CHAT = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def llm(tiny_model, device) -> LLM:
    return LLM(tiny_model, progress=False, device=device, **TINY_SETTINGS)


def generate(llm: LLM, *args, **options) -> list[RequestOutput]:
    return llm.generate(*args, **({"use_tqdm": False} | options))


def tokens_of(outputs: list[RequestOutput]) -> list[tuple[int, ...]]:
    return [output.outputs[0].token_ids for output in outputs]


def test_a_prompt_may_be_text_ids_or_a_dict_and_there_may_be_several(llm) -> None:
    ids = llm.tokenizer.encode("Hello")
    forms = ["Hello", ids, tuple(ids), {"prompt": "Hello"}, {"prompt_token_ids": ids}]
    [expected] = tokens_of(generate(llm, "Hello", GREEDY))
    assert len(expected) == 10
    for form in forms:
        assert tokens_of(generate(llm, form, GREEDY)) == [expected]
    assert tokens_of(generate(llm, forms, GREEDY)) == [expected] * len(forms)
    assert generate(llm, []) == []


def test_results_are_shaped_as_vllms(llm) -> None:
    [output] = generate(llm, ["Hello"], GREEDY)
    assert isinstance(output, RequestOutput)
    assert output.prompt == "Hello"
    assert list(output.prompt_token_ids) == llm.tokenizer.encode("Hello")
    assert output.finished
    [completion] = output.outputs
    assert isinstance(completion, CompletionOutput)
    assert (completion.index, completion.finish_reason, completion.stop_reason) == (0, "length", None)
    assert (completion.logprobs, completion.cumulative_logprob) == (None, None)
    assert completion.text == llm.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    [from_ids] = generate(llm, [1, 2, 3], GREEDY)
    assert from_ids.prompt is None
    assert from_ids.prompt_token_ids == (1, 2, 3)


def test_outputs_come_in_the_order_of_the_prompts_whatever_ends_first(llm) -> None:
    lengths = (9, 1, 30, 4)
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    outputs = generate(llm, [[n] for n in lengths], params)
    assert [output.prompt_token_ids for output in outputs] == [(n,) for n in lengths]
    assert [len(tokens) for tokens in tokens_of(outputs)] == list(lengths)
    assert len({output.request_id for output in outputs}) == 4


def test_more_prompts_than_fit_at_once_are_all_answered_as_alone(llm) -> None:
    prompts = [[n, n + 1, n + 2] for n in range(30)]
    assert tokens_of(generate(llm, prompts, GREEDY)) == [tokens_of(generate(llm, p, GREEDY))[0] for p in prompts]


def test_the_stop_token_that_ended_an_answer_is_its_stop_reason(llm) -> None:
    [tokens] = tokens_of(generate(llm, "Hello", GREEDY))
    stop = next(token for i, token in enumerate(tokens) if i > 2 and token not in tokens[:i])
    [output] = generate(llm, "Hello", SamplingParams(temperature=0, ignore_eos=True, stop_token_ids=[stop]))
    [completion] = output.outputs
    assert completion.token_ids == tokens[: tokens.index(stop) + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)


def test_an_end_token_of_the_models_is_no_stop_reason_though_the_request_names_it(llm) -> None:
    end = llm.engine.end_token_ids[0]
    forced = {"max_tokens": 4, "logit_bias": {end: 100.0}, "stop_token_ids": [end, 5]}
    [output] = generate(llm, "Hello", SamplingParams(**forced))
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", None)
    [output] = generate(llm, "Hello", SamplingParams(ignore_eos=True, **forced))
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", end)


def test_in_a_chat_the_developer_speaks_as_the_system_and_no_role_is_made_up(llm) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        *CHAT,
        {"role": "tool", "tool_call_id": "c", "content": "7"},
    ]
    prompt = "[system]Be brief.[user]Hello[user]<tool_response>\n7\n</tool_response>[assistant]"
    [output] = llm.chat(messages, GREEDY, use_tqdm=False)
    assert output.prompt == prompt
    assert next(iter(llm.stream_chat(messages, GREEDY))).prompt == prompt
    with pytest.raises(RequestError, match=r"messages\[0\].role='narrator' is not known"):
        llm.chat([{"role": "narrator", "content": "x"}], GREEDY)


def test_seeds_below_zero_draw_tokens_of_their_own(llm) -> None:
    drawn = [tokens_of(generate(llm, "Hello", SamplingParams(seed=seed))) for seed in (-1, -1, 2**64 - 1, 1, -(2**63))]
    assert drawn[0] == drawn[1] == drawn[2]
    assert len({str(tokens) for tokens in drawn}) == 3


def test_text_is_left_out_if_nobody_wants_it(llm) -> None:
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, detokenize=False)
    [output] = generate(llm, "Hello", params)
    assert output.outputs[0].text == ""
    assert tokens_of([output]) == tokens_of(generate(llm, "Hello", GREEDY))


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        (["a", "b"], [GREEDY], "1 sampling_params for 2 prompts; give one for all or one for each"),
        (["a"], [GREEDY, GREEDY], "2 sampling_params for 1 prompts"),
        (["a", [300]], GREEDY, "prompt: token id 300 is outside the vocabulary"),
        (["a", [1] * MAX_MODEL_LEN], GREEDY, f"the prompt has {MAX_MODEL_LEN} tokens and max_model_len is"),
        ([{"text": "a"}], GREEDY, r"needs 'prompt' or 'prompt_token_ids', not \['text'\]"),
        (
            [{"prompt": "a", "multi_modal_data": {"image": 1}}],
            GREEDY,
            "has no 'multi_modal_data' here; it may have 'prompt'",
        ),
        ([["a"]], GREEDY, "a prompt is text or a list of token ids, not list"),
        (7, GREEDY, "a prompt is text or a list of token ids, not int"),
    ],
)
def test_one_unusable_prompt_refuses_the_call_before_anything_runs(llm, prompts, params, message) -> None:
    steps = llm.engine.executor.statistics.num_steps
    with pytest.raises(RequestError, match=message):
        generate(llm, prompts, params)
    assert llm.engine.executor.statistics.num_steps == steps
    assert not llm.engine.has_work


def test_chat_is_generate_on_the_rendered_conversation(llm) -> None:
    text = "[user]Hello[assistant]"
    [output] = llm.chat(CHAT, GREEDY, use_tqdm=False)
    assert output.prompt == text
    assert tokens_of([output]) == tokens_of(generate(llm, text, GREEDY))
    both = llm.chat([CHAT, [{"role": "user", "content": "Hi"}]], GREEDY, use_tqdm=False)
    assert [output.prompt for output in both] == [text, "[user]Hi[assistant]"]
    assert tokens_of(both[:1]) == tokens_of([output])


def test_chat_renders_as_it_is_asked_to(llm) -> None:
    template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}{% if tools %}{{ tools[0]['function']['name'] }};"
        "{% endif %}{{ mood }}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]

    def prompt(messages=CHAT, **options) -> str:
        params = SamplingParams(temperature=0, max_tokens=1)
        [output] = llm.chat(messages, params, use_tqdm=False, chat_template=template, **options)
        return output.prompt

    whole = prompt()
    assert whole.endswith(";assistant:")
    assert prompt(tools=tools).endswith(";weather;assistant:")
    assert prompt(add_generation_prompt=False) == whole.removesuffix("assistant:")
    assert prompt(chat_template_kwargs={"mood": "glad;"}).endswith(";glad;assistant:")
    begun = [*CHAT, {"role": "assistant", "content": "It is"}]
    assert prompt(begun, continue_final_message=True).endswith("assistant:It is")
    with pytest.raises(RequestError) as refusal:
        prompt(documents=[{"text": "a"}])
    assert refusal.value.param == "documents"


def test_chat_without_a_template_or_with_odd_messages_is_refused(llm, monkeypatch) -> None:
    monkeypatch.setattr(llm.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match="do not fit the model's chat template: roles must alternate"):
        llm.chat(CHAT, use_tqdm=False)
    monkeypatch.setattr(llm.tokenizer, "chat_template", None)
    with pytest.raises(RequestError, match="no chat template; use generate"):
        llm.chat(CHAT, use_tqdm=False)


def test_a_stream_yields_the_answer_so_far_and_ends_as_generate_does(llm) -> None:
    outputs = list(llm.stream("Hello", GREEDY))
    assert [len(output.outputs[0].token_ids) for output in outputs] == list(range(1, 11))
    for shorter, longer in itertools.pairwise(outputs):
        assert longer.outputs[0].text.startswith(shorter.outputs[0].text)
        assert not shorter.finished
    [expected] = generate(llm, "Hello", GREEDY)
    assert outputs[-1].outputs == expected.outputs
    assert outputs[-1].finished
    assert list(llm.stream_chat(CHAT, GREEDY))[-1].outputs == llm.chat(CHAT, GREEDY, use_tqdm=False)[0].outputs


def test_a_stream_left_early_ends_its_request(llm) -> None:
    stream = llm.stream("Hello", SamplingParams(max_tokens=None, ignore_eos=True))
    next(stream)
    assert llm.engine.scheduler.num_running == 1
    stream.close()
    assert not llm.engine.has_work or llm.engine.scheduler.num_running == 0


def test_streams_and_calls_that_take_turns_get_all_their_tokens(llm) -> None:
    """Each turn steps the engine for everybody."""
    expected = [list(llm.stream(prompt, GREEDY))[-1].outputs for prompt in ("Hello", "World")]
    first, second = llm.stream("Hello", GREEDY), llm.stream("World", GREEDY)
    last = {}
    for _ in range(3):
        last["first"], last["second"] = next(first), next(second)
    [between] = generate(llm, "Hello", GREEDY)
    for output in first:
        last["first"] = output
    for output in second:
        last["second"] = output
    assert [last["first"].outputs, last["second"].outputs, between.outputs] == [*expected, expected[0]]


def test_an_empty_text_is_refused_and_not_taken_for_no_prompt(llm) -> None:
    for empty in ("", [""], {"prompt": ""}, {"prompt_token_ids": []}, [[]]):
        with pytest.raises(RequestError, match="the prompt is empty"):
            generate(llm, empty)


def test_settings_reach_the_engine_and_wrong_ones_are_refused(tiny_model) -> None:
    with pytest.raises(ConfigError, match="unknown setting 'max_num_sequences'"):
        LLM(tiny_model, max_num_sequences=8)
    with pytest.raises(ConfigError, match="pipeline_parallel_size=2 is not supported"):
        LLM(tiny_model, pipeline_parallel_size=2)
    with pytest.raises(
        ConfigError, match="data_parallel_size=2 without enable_expert_parallel gives independent replicas"
    ):
        LLM(tiny_model, data_parallel_size=2)
    with pytest.raises(ModelError):
        LLM(tiny_model + "/nowhere")


def test_a_model_without_a_tokenizer_takes_token_ids_only(tiny_model, tmp_path, device) -> None:
    shutil.copy(f"{tiny_model}/config.json", tmp_path)
    llm = LLM(str(tmp_path), progress=False, device=device, load_format="dummy", **TINY_SETTINGS)
    assert llm.tokenizer is None
    [output] = generate(llm, [1, 2, 3], SamplingParams(temperature=0, max_tokens=2))
    assert (len(output.outputs[0].token_ids), output.outputs[0].text) == (2, "")
    with pytest.raises(ConfigError, match="comes without a tokenizer; give prompts as token ids"):
        generate(llm, "Hello")


def test_the_package_offers_its_faces_by_name() -> None:
    for name in stepgraph.__all__:
        assert getattr(stepgraph, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'LMM'"):
        _ = stepgraph.LMM


def test_a_stream_loses_nothing_to_calls_made_between_its_outputs(llm) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    [alone] = llm.generate([[5, 6, 7]], params, use_tqdm=False)
    stream = llm.stream([5, 6, 7], params)
    outputs = [next(stream)]
    llm.generate([[8, 9]], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), use_tqdm=False)
    outputs += stream
    assert outputs[-1].outputs[0].token_ids == alone.outputs[0].token_ids
    assert outputs[-1].finished


def test_several_answers_to_one_prompt_are_those_of_their_seeds_alone(llm) -> None:
    params = SamplingParams(n=3, seed=5, max_tokens=8, ignore_eos=True)
    [output, other] = generate(llm, ["Hello", "World"], params)
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    assert output.finished
    assert {completion.finish_reason for completion in output.outputs} == {"length"}
    alone = [SamplingParams(seed=seed, max_tokens=8, ignore_eos=True) for seed in (5, 6, 7)]
    for joined, prompt in ((output, "Hello"), (other, "World")):
        assert [c.token_ids for c in joined.outputs] == tokens_of(generate(llm, [prompt] * 3, alone))
    assert len({completion.token_ids for completion in output.outputs}) == 3
    assert list(llm.stream("Hello", params))[-1].outputs == output.outputs
    unseeded = generate(llm, "Hello", SamplingParams(n=3, max_tokens=8, ignore_eos=True))[0]
    assert len({completion.token_ids for completion in unseeded.outputs}) == 3


def test_an_answer_stops_at_a_stop_string_and_so_does_its_request(llm) -> None:
    long = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    [whole] = generate(llm, "Hello", long)
    text, tokens = whole.outputs[0].text, whole.outputs[0].token_ids
    stop = text[20:24]
    start = text.index(stop)
    stopping = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True, stop=[stop, "never"])
    steps = llm.engine.executor.statistics.num_steps
    [output] = generate(llm, "Hello", stopping)
    [completion] = output.outputs
    assert (completion.text, completion.finish_reason, completion.stop_reason) == (text[:start], "stop", stop)
    assert completion.token_ids == tokens[: len(completion.token_ids)]
    assert llm.engine.executor.statistics.num_steps - steps < 100
    assert not llm.engine.scheduler.has_requests
    streamed = list(llm.stream("Hello", stopping))
    assert streamed[-1].outputs == output.outputs
    assert all(text[:start].startswith(partial.outputs[0].text) for partial in streamed)
    assert not llm.engine.scheduler.has_requests


def test_requests_with_and_without_stop_strings_share_a_call(llm) -> None:
    [alone] = generate(llm, "Hello", GREEDY)
    stop = alone.outputs[0].text[1:3]
    params = [GREEDY, SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, stop=stop), GREEDY]
    outputs = generate(llm, ["Hello"] * 3, params)
    assert [output.outputs[0].stop_reason for output in outputs] == [None, stop, None]
    assert tokens_of(outputs)[::2] == tokens_of([alone]) * 2


def test_a_call_that_an_exception_ends_leaves_no_request_behind(llm, monkeypatch) -> None:
    step, calls = llm.engine.step, itertools.count()

    def interrupted_step():
        if next(calls) == 3:
            raise KeyboardInterrupt
        return step()

    with monkeypatch.context() as patched:
        patched.setattr(llm.engine, "step", interrupted_step)
        with pytest.raises(KeyboardInterrupt):
            generate(llm, ["Hello", "World"], SamplingParams(n=2, max_tokens=400, ignore_eos=True))
    assert not llm.engine.scheduler.has_requests
    assert len(tokens_of(generate(llm, "Hello", GREEDY))[0]) == 10


def test_a_stream_of_several_answers_left_early_ends_them_all(llm) -> None:
    stream = llm.stream("Hello", SamplingParams(n=3, max_tokens=None, ignore_eos=True))
    next(stream)
    assert llm.engine.scheduler.has_requests
    stream.close()
    assert not llm.engine.scheduler.has_requests


def test_priorities_and_cache_salts_reach_the_engine(llm, monkeypatch) -> None:
    add_request, seen = llm.engine.add_request, []

    def add(*args, priority, cache_salt, **options):
        seen.append((priority, cache_salt))
        return add_request(*args, priority=priority, cache_salt=cache_salt, **options)

    monkeypatch.setattr(llm.engine, "add_request", add)
    prompts = [{"prompt": "a", "cache_salt": "me"}, {"prompt_token_ids": [1]}, "b"]
    generate(llm, prompts, GREEDY, priority=[3, 2, 1])
    generate(llm, prompts, GREEDY, priority=7)
    assert seen == [(3, "me"), (2, None), (1, None), (7, "me"), (7, None), (7, None)]
    with pytest.raises(RequestError, match="2 priority for 3 prompts; give one for all or one for each"):
        generate(llm, prompts, GREEDY, priority=[1, 2])
    with pytest.raises(RequestError, match="priority=None must be a whole number"):
        generate(llm, prompts, GREEDY, priority=[1, 2, None])
    with pytest.raises(RequestError, match="cache_salt=5 must be a text that is not empty, or None"):
        generate(llm, {"prompt": "a", "cache_salt": 5})
    assert not llm.engine.scheduler.has_requests


def test_a_call_waits_for_work_that_becomes_due_later(llm, monkeypatch) -> None:
    naps: list[float] = []
    due = iter([0.25, 0.5])
    monkeypatch.setattr(type(llm.engine), "seconds_until_work", property(lambda engine: next(due, None)))
    monkeypatch.setattr("stepgraph.api.time.sleep", naps.append)
    generate(llm, "Hello", GREEDY)
    assert naps == [0.25, 0.5]


def test_log_probabilities_of_an_answer_are_those_of_the_same_tokens_as_a_prompt(llm) -> None:
    params = SamplingParams(n=2, seed=3, max_tokens=6, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    [output] = generate(llm, "Hello", params)
    assert output.prompt_logprobs[0] is None
    assert [next(iter(position)) for position in output.prompt_logprobs[1:]] == list(output.prompt_token_ids[1:])
    assert all(2 <= len(position) <= 3 for position in output.prompt_logprobs[1:])
    for completion in output.outputs:
        assert [next(iter(position)) for position in completion.logprobs] == list(completion.token_ids)
        own = [position[token] for position, token in zip(completion.logprobs, completion.token_ids, strict=True)]
        assert completion.cumulative_logprob == pytest.approx(sum(entry.logprob for entry in own))
        [again] = generate(llm, [*output.prompt_token_ids, *completion.token_ids], SamplingParams(prompt_logprobs=3))
        found = again.prompt_logprobs[len(output.prompt_token_ids) :]
        for expected, position in zip(completion.logprobs, found, strict=True):
            assert list(position) == list(expected)
            for token, entry in expected.items():
                assert position[token].logprob == pytest.approx(entry.logprob, abs=1e-4)
                assert (position[token].rank, position[token].decoded_token) == (
                    entry.rank,
                    llm.tokenizer.decode([token]),
                )


def test_a_stop_string_is_not_searched_before_min_tokens(llm) -> None:
    [whole] = generate(llm, "Hello", SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    stop = whole.outputs[0].text[2]
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, stop=stop, min_tokens=12)
    [completion] = generate(llm, "Hello", params)[0].outputs
    assert len(completion.token_ids) >= 12
    assert completion.token_ids == whole.outputs[0].token_ids[: len(completion.token_ids)]

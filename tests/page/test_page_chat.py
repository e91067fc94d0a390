"""The page's chat in a real browser, before a server that answers what a test wants."""

import json

from page_server import chunks, request, step
from page_use import ask, open_table, told


def test_a_chat_sends_settings_and_history_and_shows_the_answer(fake, tab):
    call = {"index": 0, "function": {"name": "look_up", "arguments": '{"city": "Paris"}'}}
    fake.answer = chunks(
        {"reasoning_content": "They greet me."},
        {"content": "Hello **you**, `x` is\n\n```py"},
        {"content": "thon\nprint(1)\n```\n"},
        {"content": "# Done"},
        {"tool_calls": [call]},
    )
    tab.click("#chat-settings summary")
    tab.click("#system")
    tab.type("Be brief.")
    tab.click("#temperature")
    tab.type("0.5")
    ask(tab, "Hi")
    tab.wait_text("article.assistant .foot", "12 prompt tokens · 5 tokens")
    assert tab.texts("article.assistant .text strong, article.assistant .text p code") == ["you", "x"]
    assert tab.texts("article.assistant pre, article.assistant .heading") == ["print(1)", "Done"]
    assert tab.text("article.assistant .call") == 'Tool call\n\nlook_up {"city": "Paris"}'
    assert tab.value("document.querySelector('.reasoning').open") is False
    assert tab.value("document.querySelector('.reasoning div').textContent") == "They greet me."
    ask(tab, "And now?")
    tab.wait("document.querySelectorAll('article.assistant .foot button').length === 2")
    first, second = fake.chats
    assert first == {
        "model": "fake",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "temperature": 0.5,
        "max_tokens": 512,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert [each["role"] for each in second["messages"]] == ["system", "user", "assistant", "user"]
    assert second["messages"][2]["content"].startswith("Hello **you**")


def test_stop_leaves_the_answer_and_keeps_what_came(fake, tab):
    fake.answer, fake.ends = chunks({"content": "One two"})[:1], False
    ask(tab, "Count")
    tab.wait_text("article.assistant", "One two")
    tab.click("#stop")
    assert fake.left.get(timeout=60)
    tab.wait_text("article.assistant .foot", "stopped")
    tab.wait("!document.querySelector('#send').hidden && document.querySelector('#stop').hidden")
    ask(tab, "Again")
    tab.wait_text("article.assistant:last-child", "One two")
    tab.press("Escape")
    assert fake.left.get(timeout=60)
    assert fake.chats[1]["messages"][1] == {"role": "assistant", "content": "One two"}


def test_an_answer_that_breaks_off_says_why_and_gives_the_question_back(fake, tab):
    fake.answer = [{"error": {"message": "the engine <b>ended</b>"}}]
    ask(tab, "Hi")
    tab.wait_text("article.assistant .error", "the engine <b>ended</b>")
    assert tab.value("document.querySelector('#message').value") == "Hi"


def test_hostile_output_is_text_and_does_not_freeze_the_page(fake, tab):
    hostile = (
        "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>\n"
        "[a](javascript:document.title='owned') \x1b[31mred\x1b]0;owned\x07 \u202etxet"
        "\n```\n</code></pre><svg onload=\"document.title='owned'\">\n```\n"
    )
    fake.answer = chunks(
        {"content": hostile},
        {"reasoning_content": "<iframe src='http://example.org'></iframe>"},
        {"tool_calls": [{"index": 0, "function": {"name": "<b>", "arguments": "<script>1</script>"}}]},
        {"content": "odd: " + "`" * 5000 + "*" * 5000},
        *[{"content": "w" * 50_000}] * 60,
        {"content": "\n" * 1000 + "the end"},
    )
    fake.say(told(step(1, graph="<img src=x>", kind="<b>odd</b>", reason="<script>1</script>", requests=[[1, 1]])))
    fake.say({"type": "requests", "requests": [request(1, name="<svg onload=alert(1)>", finish_reason="<i>")]})
    open_table(tab, "steps")
    open_table(tab, "requests")
    ask(tab, "<b>me</b>")
    tab.wait_text("article.assistant", "more characters are not shown")
    tab.wait_text("article.assistant .foot", "tokens")
    shown = tab.value("document.querySelector('article.assistant').textContent")
    assert "<script>document.title='owned'</script>" in shown
    assert "␛[31mred␛]0;owned␇ ⟨U+202E⟩txet" in shown
    assert len(shown) < 210_000
    made = "article :is(img, script, svg, iframe, a, b, i), #steps :is(img, script, svg, b, i)"
    assert tab.value(f"document.querySelectorAll({json.dumps(made)}).length") == 0
    assert tab.value("document.title") == "fake – stepgraph"
    assert max(tab.value("[...document.querySelectorAll('article p')].map((each) => each.textContent.length)")) <= 2000
    assert tab.texts("article.user .text") == ["<b>me</b>"]

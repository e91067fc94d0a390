"""The page in a real browser, before a real server with a key."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from chromium import Tab, opened_tab
from live import TINY_FLAGS, LiveServer, running_server
from page_use import SHOWN

KEY = {"Authorization": "Bearer s3cret"}
FLAGS = [
    *TINY_FLAGS,
    *("--max-num-batched-tokens", "256", "--capture-sizes", "8", "256", "--served-model-name", "tiny"),
    *("--api-key", "s3cret", "--enable-admin-endpoints"),
]


@pytest.fixture(scope="module")
def server(browser, tiny_model) -> Iterator[LiveServer]:
    """Made after the browser: without one, neither is needed."""
    with running_server(tiny_model, FLAGS) as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where downloads go."""
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def tab(browser, server, folder) -> Iterator[Tab]:
    """The page, which was given the key."""
    with opened_tab(browser, downloads=folder) as opened:
        opened.open(f"{server.url}/")
        opened.wait("document.querySelector('#key').open")
        opened.type("s3cret")
        opened.press("Enter")
        opened.wait_text("#connection", "Live")
        opened.value("void document.querySelectorAll('details').forEach((each) => (each.open = true))")
        yield opened
        own = (f"{server.url}/", f"blob:{server.url}/")
        assert [url for url in opened.requests if not url.startswith(own)] == []
        assert opened.complaints == []


def order(server: LiveServer, path: str) -> None:
    assert server.post(path, {}, headers=KEY).status == 200


def wait_load(server: LiveServer, number: int) -> None:
    """Until so many requests run or wait."""
    server.wait_for(lambda: server.get("/load").json == {"server_load": number})


def test_the_page_says_what_serves_and_asks_for_the_key(server, tab):
    assert "tiny · cpu · up to 8 requests, 256 tokens a step" in tab.text("#engine")
    assert server.get("/ui/events").status == server.get("/ui/trace").status == 401
    page = server.get("/", headers={"Accept": "text/html"})
    assert page.status == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]


def test_one_token_and_three_prompts_show_as_one_step_of_one_graph(server, tab):
    def complete(token: int, num_tokens: int) -> int:
        body = {"model": "tiny", "prompt": [token] * num_tokens, "max_tokens": 4, "ignore_eos": True}
        return server.post("/v1/completions", body, headers=KEY).status

    order(server, "/pause")
    with ThreadPoolExecutor(4) as pool:
        statuses = []
        for number, num_tokens in enumerate((1, 80, 80, 80), start=1):
            statuses.append(pool.submit(complete, number, num_tokens))
            wait_load(server, number)
        order(server, "/resume")
    assert [status.result() for status in statuses] == [200] * 4
    tab.wait("document.querySelectorAll('#requests-table tbody tr').length === 4")
    tab.wait("parseInt(document.querySelector('#steps-note').innerText) >= 4")
    row = "[...document.querySelectorAll('#steps-table tbody tr')].find((row) => row.cells[3].innerText === '241')"
    tab.wait(f"!!{row}")
    assert tab.value(f"[...{row}.cells].slice(1, 6).map((cell) => cell.innerText)") == [
        "prefill",
        "256×8",
        "241",
        "4",
        "15",
    ]
    tab.value(f"void {row}.querySelector('button').click()")
    named = tab.wait("document.querySelector('#step-details').innerText.match(/requests: (.*)$/)?.[1]")
    assert [part.split()[-1] for part in named.split(", ")] == ["1", "80", "80", "80"]
    tab.press("a")
    tab.wait(f"{SHOWN} >= 4")
    states = "[...document.querySelectorAll('#requests-table tbody tr')].map((row) => row.cells[1].innerText)"
    tab.wait(f"{states}.join() === 'finished,finished,finished,finished'")
    tab.wait(
        "[...document.querySelectorAll('#graphs-table tbody tr')].some((row) => row.cells[0].innerText === '256×8')"
    )


def test_a_chat_is_answered_and_its_steps_are_found(server, tab):
    tab.value("void (document.querySelector('#max-tokens').value = 12)")
    tab.click("#message")
    tab.type("Hi")
    tab.press("Enter")
    tab.wait_text("article.assistant .foot", "prompt tokens")
    tab.wait("!document.querySelector('#send').hidden")
    tab.click("article.assistant .foot button")
    tab.wait("document.querySelector('#filter').value.startsWith('chatcmpl-')")
    tab.wait("document.querySelectorAll('#requests-table tbody tr').length === 1")
    tab.wait(f"{SHOWN} > 0")
    output = int(tab.texts("#requests-table tbody td:nth-child(5)")[0])
    assert 0 < output <= 12
    assert tab.value(SHOWN) <= output + 1
    tab.click("#steps-title")
    tab.press("x")


def test_stop_ends_the_request_in_the_engine(server, tab):
    order(server, "/pause")
    tab.click("#chat-clear")
    tab.type("Never answered")
    tab.press("Enter")
    wait_load(server, 1)
    tab.click("#stop")
    wait_load(server, 0)
    tab.wait_text("article.assistant .foot", "stopped")
    order(server, "/resume")


def test_the_trace_that_is_saved_is_one_for_perfetto(server, tab, folder):
    tab.click("#export")
    saved = folder / "stepgraph-trace.json"
    server.wait_for(saved.exists)
    events = json.loads(saved.read_text())["traceEvents"]
    assert {event["ph"] for event in events} >= {"M", "X"}
    lasting = [event for event in events if event["ph"] == "X"]
    for event in lasting:
        assert event["ts"] >= 0, event
        assert event["dur"] >= 0, event
        assert isinstance(event["name"], str), event
        assert {type(event["pid"]), type(event["tid"])} == {int}, event
    assert any("256x8" in json.dumps(event) for event in lasting)


def test_what_was_kept_comes_again_and_so_does_the_key(tab):
    kept = tab.value("document.querySelector('#steps-note').innerText")
    tab.call("Page.reload")
    tab.wait_text("#connection", "Live")
    tab.wait_text("#steps-note", kept)
    assert tab.value("document.querySelector('#key').open") is False

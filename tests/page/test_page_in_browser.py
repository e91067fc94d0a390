"""The page in a real browser, before a server that says what a test wants. tests/page/test_page_live.py has a real one."""

import json
import re

import pytest
from chromium import REQUIRED, Tab, need_chromium, opened_tab
from page_server import ENGINE, UI, request, running_fake, step
from page_use import CHOSEN, SHOWN, ask, open_table, told, wait_for_file


def test_its_files_hold_nothing_that_its_policy_forbids():
    texts = {path.name: path.read_text() for path in UI.iterdir()}
    named = set(re.findall(r'(?:href|src)="ui/([^"]+)"', texts["index.html"]))
    for name, text in texts.items():
        named |= set(re.findall(r'from "\./([^"]+)"', text))
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            name
        )
        assert set(re.findall(r"\w+://[\w./]+", text)) <= {"http://www.w3.org/2000/svg", "chrome://tracing"}, name
        assert text.count("\n") < 500, name
    assert not re.search(r"<(?:script|style)>|\sstyle=|\son\w+=", texts["index.html"])
    assert named == {*texts} - {"index.html"}


def test_without_chromium_a_user_skips_and_ci_fails(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv(REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match="no Chromium"):
        need_chromium()
    monkeypatch.setenv(REQUIRED, "1")
    with pytest.raises(pytest.fail.Exception, match="no Chromium"):
        need_chromium()


def test_an_idle_server_is_named_and_what_is_missing_said(tab):
    assert ENGINE["model"] in tab.text("#engine")
    assert "up to 8 requests, 256 tokens a step" in tab.text("#engine")
    assert "watch the steps" in tab.text("#messages")
    tab.wait("document.querySelector('#graphs-table tbody').rows.length === 3")
    assert tab.texts("#graphs-table tbody tr:first-child td") == ["1×1", "plain", "5", "50.0 %", "1.00 MiB", "1.50 ms"]
    assert "memory_budget 1" in tab.text("#graphs-note")
    tab.click('[data-sort="size"]')
    assert tab.texts("#graphs-table tbody td:first-child") == ["256×4", "8×8", "1×1"]


def test_an_engine_that_is_not_there_is_said_until_it_is(fake, tab):
    loading = {"model": "fake", "state": "loading", "trouble": "the model is being loaded"}
    fake.say({"type": "engines", "engines": [loading]})
    tab.wait_text("#connection", "The model is being loaded")
    assert tab.text("#engine") == "fake"
    assert tab.value("document.querySelector('#connection-retry').hidden")
    fake.say({"type": "engines", "engines": [ENGINE | {"state": "ready", "trouble": None}]})
    tab.wait_text("#connection", "Live")
    assert "up to 8 requests" in tab.text("#engine")


def test_steps_show_with_all_that_is_known_of_them(fake, tab):
    mixed = step(
        5,
        kind="mixed",
        graph="256x4",
        tokens=241,
        rows=4,
        padding=15,
        proposed=3,
        accepted=2,
        host_us=410,
        device_us=12_300,
        prompts=3,
        requests=[[2, 80], [3, 80], [4, 80], [1, 1]],
    )
    fake.say({"type": "requests", "requests": [request(number) for number in (1, 2, 3, 4)]})
    fake.say(told(*(step(n) for n in range(5)), mixed, step(7, graph=None, reason="memory_budget")))
    fake.say({"type": "gauges", "time": 0.05, "running": 4, "waiting": 2, "kv_used": 25, "kv_total": 100})
    open_table(tab, "steps")
    open_table(tab, "requests")
    tab.wait(f"{SHOWN} === 7")
    assert tab.texts("#steps-table tbody tr:nth-child(2) td") == [
        *("5", "mixed", "256×4", "241", "4", "15", "2 of 3", "410 µs", "12.3 ms", ""),
    ]
    assert tab.texts("#steps-table tbody tr:first-child td")[-1] == "memory_budget"
    assert tab.texts("#totals dd") == ["7", "85.7 %", "247", "5.7 %", "66.7 %", "77 %"]
    tab.wait_text("#gauges-now", "25 of 100 KV blocks used (25.0 %) · 4 running · 2 waiting")
    assert tab.texts("#requests-table tbody tr:first-child td")[1:] == [
        *("finished", "80", "16", "41", "20.0 ms", "100 ms", "100", "stop"),
    ]
    tab.click("#steps-table tbody tr:nth-child(2) button")
    assert tab.value(CHOSEN).startswith("Step 5 at 08:00:00.050 · mixed · ")
    assert "graph 256×4 · 241 tokens in 4 rows, 15 padding · 2 of 3 proposals accepted" in tab.value(CHOSEN)
    assert "requests: 00000002 80, 00000003 80, 00000004 80, 00000001 1" in tab.value(CHOSEN)


def test_a_filter_hides_steps_by_kind_graph_reason_and_request(fake, tab):
    fake.say({"type": "requests", "requests": [request(1), request(2, name="cmpl-beef")]})
    fake.say(
        told(
            step(0),
            step(1, kind="prefill", graph="256x4"),
            step(2, graph=None, reason="memory_budget"),
            step(3, kind="mixed", requests=[[1, 1], [2, 64]]),
        )
    )
    tab.wait(f"{SHOWN} === 4")
    for chip, left in (("decode", 2), ("decode", 4), ("eager only", 1), ("eager only", 4)):
        tab.click(f"[data-kind='{chip}']")
        tab.wait(f"{SHOWN} === {left}")
    for text, left in (("256×4", 1), ("BUDGET", 1), ("beef", 1), ("nothing", 0)):
        tab.press("/")
        tab.type(text)
        tab.wait(f"{SHOWN} === {left}")
        tab.press("Escape")
        tab.press("x")
        tab.wait(f"{SHOWN} === 4")


def test_paused_nothing_moves_and_nothing_is_lost(fake, tab):
    fake.say(told(step(0)))
    tab.wait(f"{SHOWN} === 1")
    tab.click("#pause")
    fake.say(told(step(1), step(2)))
    tab.wait_text("#steps-note", "paused, 2 new · 1 kept")
    assert tab.value(SHOWN) == 1
    tab.click("#pause")
    tab.wait(f"{SHOWN} === 3")
    assert tab.text("#steps-note") == "3 kept"


def test_a_view_that_is_paused_outlives_its_connection(browser):
    with opened_tab(browser) as tab:
        with running_fake() as fake:
            fake.say(told(step(0), step(1)))
            tab.open(fake.url)
            tab.wait(f"{SHOWN} === 2")
            tab.press("p")
            port = fake.port
        tab.wait_text("#connection", "The server is gone")
        with running_fake(port) as fake:
            tab.click("#connection-retry")
            tab.wait_text("#connection", "Live")
            fake.say(told(step(0)))
            fake.say({"type": "steps", "steps": [step(5)], "dropped": 3})
            tab.wait_text("#steps-note", "paused, 1 new · 2 kept · 3 missed")
            assert tab.value(SHOWN) == 2
            tab.press("p")
            tab.wait_text("#steps-note", "2 kept · 3 missed")


def test_the_span_of_time_is_moved_by_keys_buttons_and_mouse(fake, tab):
    fake.say(told(*(step(n) for n in range(100))))
    tab.wait(f"{SHOWN} === 100")
    tab.press("a")
    tab.press("+")
    tab.wait(f"{SHOWN} < 60")
    tab.click("#zoom-in")
    tab.wait(f"{SHOWN} < 30")
    tab.press("ArrowRight")
    first = tab.value(CHOSEN)
    for key in ("[", "f"):  # earlier, and no step is chosen any more
        tab.press(key)
    tab.press("+")
    tab.wait("document.querySelector('#follow').getAttribute('aria-pressed') === 'true'")
    assert tab.value(CHOSEN).startswith("Point at")
    assert first.startswith("Step ")
    box = tab.value("(({left, top}) => [left, top])(document.querySelector('#timeline').getBoundingClientRect())")
    drag = [("mousePressed", 300), ("mouseMoved", 320), ("mouseMoved", 500), ("mouseReleased", 500)]
    for kind, x in drag:
        place = {"x": box[0] + x, "y": box[1] + 60, "button": "left", "buttons": 1, "clickCount": 1}
        tab.call("Input.dispatchMouseEvent", type=kind, **place)
    tab.wait("document.querySelector('#follow').getAttribute('aria-pressed') === 'false'")
    assert tab.value(CHOSEN).startswith("Point at"), "a drag is no click"


def test_an_idle_server_shows_what_it_did_last(fake, tab):
    fake.say(told(step(0), step(1)))
    fake.say({"type": "gauges", "time": 5000.0, "running": 0, "waiting": 0, "kv_used": 0, "kv_total": 100})
    tab.wait_text("#gauges-now", "0 of 100 KV blocks")
    tab.wait(f"{SHOWN} === 2")


def test_of_several_engines_one_is_looked_at(browser, fake):
    fake.num_engines = 3
    fake.say(
        told(step(0), step(1, engine=2), step(2, engine=2)), {"type": "requests", "requests": [request(1, engine=2)]}
    )
    with opened_tab(browser) as tab:
        tab.open(fake.url)
        tab.wait(f"{SHOWN} === 1")
        tab.value(
            "const s = document.querySelector('#engine-select'); s.value = '2'; s.dispatchEvent(new Event('change'))"
        )
        tab.wait(f"{SHOWN} === 2")
        tab.wait("document.querySelector('#graphs-table tbody').rows.length === 2")
        assert tab.complaints == []


def test_the_trace_is_saved_as_the_server_gives_it(tab, tmp_path):
    tab.click("#export")
    tab.wait_text("#step-details", "Saved")
    saved = tmp_path / "stepgraph-trace.json"
    tab.wait("document.querySelector('#export').disabled === false")
    wait_for_file(tab, saved)
    assert json.loads(saved.read_text())["traceEvents"][0]["name"] == "step"


def test_many_steps_are_kept_bounded_and_drawn_by_the_pixel(fake, tab):
    names = [[number, 1] for number in range(1, 9)]
    for first in range(0, 12_000, 500):
        fake.say(told(*(step(n, requests=names, device_us=9000) for n in range(first, first + 500))))
        fake.say(
            {"type": "gauges", "time": first / 100, "running": first % 7, "waiting": 0, "kv_used": 1, "kv_total": 9}
        )
    fake.say({"type": "requests", "requests": [request(number) for number in range(1, 3000)]})
    tab.wait("document.querySelector('#steps-note').innerText.startsWith('10,000 kept')")
    tab.press("a")
    tab.wait(f"{SHOWN} === 10000")
    frame = tab.value(
        "({...document.querySelector('#timeline').dataset, ...document.querySelector('#waterfall').dataset})"
    )
    width = tab.value("document.querySelector('#timeline').clientWidth")
    assert int(frame["visited"]) == 10_000
    assert 0 < int(frame["drawn"]) <= width
    assert int(frame["marks"]) <= 20_000
    assert int(frame["requests"]) <= 2000
    open_table(tab, "steps")
    tab.wait("document.querySelector('#steps-table tbody').rows.length === 100")


def test_a_key_is_asked_for_once_and_used_everywhere(browser, fake):
    fake.api_key = "right"
    with opened_tab(browser) as tab:
        tab.open(fake.url)
        tab.wait("document.querySelector('#key').open")
        tab.type("wrong")
        tab.press("Enter")
        tab.wait_text("#key-error", "does not take this key")
        tab.press("Escape")
        tab.wait_text("#connection", "An API key is needed")
        tab.click("#connection-retry")
        tab.wait("document.querySelector('#key').open")
        tab.type("right")
        tab.press("Enter")
        tab.wait_text("#connection", "Live")
        ask(tab, "Hi")
        tab.wait_text("article.assistant", "Hello.")
        assert tab.value("Object.values(sessionStorage)") == ["right"]
        assert "right" not in tab.value("JSON.stringify(localStorage) + document.cookie + location.href")
        assert not tab.value("document.querySelector('#key').open")
        assert tab.complaints == []


def test_a_server_that_goes_away_is_missed_and_found_again(browser):
    with opened_tab(browser) as tab:
        with running_fake() as fake:
            fake.say(told(step(0)))
            tab.open(fake.url)
            tab.wait(f"{SHOWN} === 1")
            port, url = fake.port, fake.url
        tab.wait_text("#connection", "The server is gone")
        tab.wait_text("#connection-wait", "trying again in")
        assert tab.value(SHOWN) == 1
        with running_fake(port) as fake:
            tab.click("#connection-retry")
            tab.wait_text("#connection", "Live")
            fake.say(told(step(0), step(1)))
            tab.wait(f"{SHOWN} === 2")
            assert fake.url == url


def test_colours_follow_the_system_or_the_switch_and_can_be_read(tab):
    seen = {}
    for dark in (False, True):
        tab.set_dark(dark)
        tab.wait(f"matchMedia('(prefers-color-scheme: dark)').matches === {json.dumps(dark)}")
        seen[dark] = palette_of(tab)
        for name in ("text", "quiet", "accent", "error"):
            assert contrast(seen[dark][name], seen[dark]["panel"]) >= 4.5, (dark, name)
        for name in ("prefill", "decode", "mixed", "other", "eager", "kv", "running", "waiting", "queued"):
            assert contrast(seen[dark][name], seen[dark]["panel"]) >= 3, (dark, name)
        assert contrast(seen[dark]["accent-text"], seen[dark]["accent"]) >= 4.5
    assert seen[False] != seen[True]
    for theme, dark in (("Dark", True), ("Light", False)):  # the system is dark
        tab.press("d")
        assert theme in tab.text("#theme")
        assert palette_of(tab) == seen[dark]
    tab.call("Page.reload")
    tab.wait_text("#connection", "Live")
    assert palette_of(tab) == seen[False]


def palette_of(tab: Tab) -> dict[str, str]:
    names = sorted(set(re.findall(r"--([a-z-]+): #", (UI / "style.css").read_text())))
    style = "getComputedStyle(document.documentElement)"
    return tab.value(f"Object.fromEntries({names}.map((name) => [name, {style}.getPropertyValue('--' + name).trim()]))")


def contrast(one: str, other: str) -> float:
    """The ratio of WCAG 2, of colours as #rrggbb."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_keyboard_reaches_everything_but_not_out_of_fields(fake, tab):
    fake.say(told(*(step(n) for n in range(10))))
    tab.wait(f"{SHOWN} === 10")
    tab.press("?")
    tab.wait("document.querySelector('#help').open")
    tab.press("p")  # not behind a dialog
    tab.press("Escape")
    tab.wait("!document.querySelector('#help').open")
    tab.press("c")
    tab.type("p?")
    assert tab.value("[document.activeElement.id, document.activeElement.value]") == ["message", "p?"]
    assert tab.value("document.querySelector('#pause').getAttribute('aria-pressed')") == "false"
    tab.press("Escape")
    tab.press("ArrowLeft")
    assert tab.value(CHOSEN).startswith("Step 9 at ")
    tab.wait("document.querySelector('#follow').getAttribute('aria-pressed') === 'false'")
    for key, number in (("ArrowLeft", 8), ("ArrowLeft", 7), ("ArrowRight", 8)):
        tab.press(key)
        assert tab.value(CHOSEN).startswith(f"Step {number} at ")
    tab.value("document.querySelector('#timeline').focus()")
    tab.press("Home")
    assert tab.value(CHOSEN).startswith("Step 0 at ")
    tab.press("p")
    assert tab.value("document.querySelector('#pause').getAttribute('aria-pressed')") == "true"
    tab.press("f")
    assert tab.value("document.querySelector('#pause').getAttribute('aria-pressed')") == "false"
    tab.value("void (document.querySelector('#shortcuts').checked = false)")
    tab.press("p")
    assert tab.value("document.querySelector('#pause').getAttribute('aria-pressed')") == "false"


def test_the_keys_of_the_help_are_those_of_the_documentation(tab):
    documented = re.findall(r"^\| `(\S+)` \| (.+) \|$", (UI.parents[2] / "docs" / "page.md").read_text(), re.MULTILINE)
    tab.press("?")
    tab.wait("document.querySelector('#help').open")
    assert list(zip(tab.texts("#keys dt"), tab.texts("#keys dd"), strict=True)) == documented


def test_everything_that_can_be_used_has_a_name(fake, tab):
    fake.say(told(step(0)), {"type": "requests", "requests": [request(1)]})
    tab.wait(f"{SHOWN} === 1")
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    used = (
        "button",
        "textbox",
        "searchbox",
        "spinbutton",
        "combobox",
        "checkbox",
        "link",
        "application",
        "log",
        "table",
    )
    found = [node for node in nodes if not node["ignored"] and node["role"]["value"] in used]
    assert len(found) > 15
    assert [node for node in found if not node.get("name", {}).get("value")] == []


@pytest.mark.parametrize("width", [360, 800, 1280])
def test_no_width_needs_sideways_scrolling(fake, tab, width):
    fake.say(told(step(0)), {"type": "requests", "requests": [request(1)]})
    tab.set_size(width, 700)
    tab.wait(f"innerWidth === {width} && document.querySelector('#timeline').clientWidth <= {width} && {SHOWN} === 1")
    assert tab.value("document.documentElement.scrollWidth") <= width

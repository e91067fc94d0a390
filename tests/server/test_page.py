"""What the page is made of, and what it is shown: whoever looks sees all steps, and holds up nobody."""

import asyncio
import http.client
import json
import re
import threading
import time
from contextlib import closing
from types import SimpleNamespace

import msgspec
import pytest
from fakes import FakeEngine
from live import TINY_FLAGS, LiveServer, running_server
from observed import LOAD, service
from starlette.testclient import TestClient

from stepgraph.cli import main
from stepgraph.config.server import ServerConfig
from stepgraph.engine.step_recorder import SeenRequest, SeenStep
from stepgraph.server import page as page_module
from stepgraph.server import step_reporter
from stepgraph.server import watched as watched_module
from stepgraph.server.app import create_app
from stepgraph.server.engine_observer import EngineState
from stepgraph.server.messages import Seen, Watch
from stepgraph.server.step_reporter import StepReporter
from stepgraph.server.watched import Watched

BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
KEY = {"Authorization": "Bearer secret"}
ANSWER = {"model": "tiny", "prompt": "abc" * 20, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
STEP = SeenStep("decode", "8x8", None, False, 2, 2, 6, 1, 0, 0, 1.0, 20.0, 1.1, 500.0, 10.0, 0, [1, 2], [1, 1])
REQUEST = SeenRequest(1, "cmpl-a", 1.0, 1.1, 1.2, None, 5, 0, 2, 0, "running", None)


# Files


@pytest.fixture(scope="module")
def web():
    return TestClient(create_app(service(), api_keys=("secret",)))


def test_the_page_needs_no_key_and_what_it_shows_does(web) -> None:
    page = web.get("/", headers=BROWSER)
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    files = set(re.findall(r'(?:src|href)="(ui/[^"]+)"', page.text))
    for name in files:
        assert web.get(f"/{name}").status_code == 200, name
    for path in ("/ui/events", "/ui/trace", "/graphs", "/v1/models", "/ui/nothing.js", "/ui/"):
        assert web.get(path).status_code == 401, path


def test_pages_and_scripts_come_from_here_only(web) -> None:
    for path in ("/", "/ui/index.html"):
        headers = web.get(path, headers=BROWSER).headers
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == policy["object-src"] == "'none'"
        assert "unsafe" not in str(policy)
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


def test_a_file_that_has_not_changed_is_not_sent_again_and_none_lies_outside(web) -> None:
    first = web.get("/ui/index.html")
    again = web.get("/ui/index.html", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    for path in ("/ui/../page.py", "/ui/%2e%2e%2fpage.py", "/ui/..%5cpage.py", "/ui/page.py"):
        assert web.get(path, headers=KEY).status_code == 404, path


def test_programs_get_the_list_of_endpoints_and_without_the_page_browsers_do() -> None:
    listed = TestClient(create_app(service(), api_keys=())).get("/").json()["endpoints"]
    assert {each["path"] for each in listed} >= {"/ui/trace", "/graphs"}
    off = TestClient(create_app(service(ServerConfig(ui=False)), api_keys=()))
    assert "<code>/graphs</code>" in off.get("/", headers=BROWSER).text
    for path in ("/ui/events", "/ui/trace", "/ui/index.html"):
        assert off.get(path).status_code == 404, path
    assert "/ui/trace" not in {each["path"] for each in off.get("/").json()["endpoints"]}


def test_what_cannot_be_looked_at_is_said_as_everywhere(web, monkeypatch) -> None:
    for given in ("abc", "-1", "51", "nan", "inf"):
        reply = web.get(f"/ui/trace?seconds={given}", headers=KEY)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "seconds"), given
        assert f"seconds='{given}' must be a number from 0 to 50" in reply.json()["error"]["message"]
    monkeypatch.setattr(page_module, "MAX_READERS", 0)
    reply = web.get("/ui/events", headers=KEY)
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "5")


# What is kept


def watched(num_engines: int = 1, **limits) -> Watched:
    engines = [FakeEngine(number) for number in range(num_engines)]
    return Watched(engines, [SimpleNamespace(load=LOAD)] * num_engines, "tiny", **limits)


class Reader:
    """One who looks."""

    def __init__(self, kept: Watched):
        self._kept, self._cursor = kept, None
        self.steps, self.requests, self.gauges, self.dropped = [], {}, [], 0

    def look(self) -> None:
        """Until there is no more."""
        more = True
        while more:
            looked = self._kept.look(self._cursor)
            self._cursor, more = looked["cursor"], looked["more"]
            for content in looked["messages"]:
                message = json.loads(content)
                assert len(message.get("steps", ())) <= 500
                if message["type"] == "steps":
                    self.steps += message["steps"]
                    self.dropped += message["dropped"]
                elif message["type"] == "requests":
                    self.requests |= {each["id"]: each for each in message["requests"]}
                elif message["type"] == "gauges":
                    self.gauges.append(message)


def test_memory_is_bounded_and_a_reader_that_is_slow_hears_how_much_it_missed() -> None:
    kept = watched(max_steps=1200)
    quick, slow = Reader(kept), Reader(kept)
    for number in range(40):
        kept.take(0, Seen([STEP._replace(tokens=number)] * 100, [], False))
        quick.look()
        if number == 0:
            slow.look()
    slow.look()
    late = Reader(kept)
    late.look()
    assert [step["n"] for step in quick.steps] == list(range(4000))
    assert [step["tokens"] for step in quick.steps] == [number for number in range(40) for _ in range(100)]
    assert (quick.dropped, slow.dropped, late.dropped) == (0, 4000 - 100 - 1200, 0)
    assert [step["n"] for step in slow.steps] == [*range(100), *range(2800, 4000)]
    assert [step["n"] for step in late.steps] == list(range(2800, 4000))


def test_steps_of_many_rows_take_no_more_memory_than_others() -> None:
    kept = watched(max_bytes=100_000)
    wide = STEP._replace(ids=list(range(1024)), gained=[1] * 1024)
    kept.take(0, Seen([wide] * 50, [], False))
    reader = Reader(kept)
    reader.look()
    assert sum(len(json.dumps(step)) for step in reader.steps) < 200_000
    assert [step["n"] for step in reader.steps] == list(range(50 - len(reader.steps), 50))
    requests = [REQUEST._replace(id=number, name=f"cmpl-{number}") for number in range(1, 6001)]
    kept.take(0, Seen([], requests, False))
    reader.look()
    assert (len(reader.requests), max(reader.requests)) == (4096, 6000)


def test_several_engines_have_numbers_of_their_own_and_are_asked_while_somebody_looks(monkeypatch) -> None:
    now = 100.0
    monkeypatch.setattr(watched_module, "time", SimpleNamespace(monotonic=lambda: now, time=time.time))
    kept = watched(2)
    engines = kept._engines
    reader = Reader(kept)
    for _ in range(30):
        reader.look()
        now += 0.1
    told = [engine.heard for engine in engines]
    assert [len(messages) for messages in told] == [3, 3], "once a second each"
    assert [messages[0] for messages in told] == [Watch(105.0, 1, 2), Watch(105.0, 2, 2)]
    assert {gauge["engine"] for gauge in reader.gauges} == {0, 1}
    assert reader.gauges[-1] | {"time": 0, "engine": 0} == {
        "type": "gauges",
        "engine": 0,
        "time": 0,
        "running": LOAD.num_running,
        "waiting": LOAD.num_waiting,
        "kv_used": 2,
        "kv_total": 8,
    }
    kept.take(1, Seen([STEP], [REQUEST._replace(id=2)], True))
    kept.take(0, Seen([STEP], [REQUEST._replace(id=1)], True))
    reader.look()
    assert [(step["n"], step["engine"]) for step in reader.steps] == [(0, 1), (1, 0)]
    assert {number: each["engine"] for number, each in reader.requests.items()} == {1: 0, 2: 1}
    kept.lose(1)  # its process is gone
    reader.look()
    assert [reader.requests[number]["state"] for number in (1, 2)] == ["running", "lost"]
    kept.take(0, Seen([], [REQUEST._replace(id=3)], True))  # nobody looked meanwhile
    reader.look()
    assert [reader.requests[number]["state"] for number in (1, 2, 3)] == ["lost", "lost", "running"]


# The engine's side


def test_an_engine_notes_steps_only_while_somebody_looks(create_engine, monkeypatch) -> None:
    now, said = 100.0, []
    monkeypatch.setattr(step_reporter, "time", SimpleNamespace(monotonic=lambda: now))
    engine = create_engine()
    idle = engine.on_step
    reporter = StepReporter(engine, said.append)
    assert not reporter.is_on
    reporter.go_on(Watch(105.0, 7, 2))
    assert engine.on_step != idle
    reporter.tell(at_once=False)
    assert said == [Seen([], [], True)]
    now += 50  # a step took so long, and that somebody looks on is still to be read
    reporter.tell(at_once=True)
    reporter.go_on(Watch(155.0, 99, 2))
    now += 4
    reporter.tell(at_once=True)
    assert reporter.is_on
    now += 2
    reporter.tell(at_once=True)
    reporter.tell(at_once=True)
    assert not reporter.is_on
    assert engine.on_step == idle


# With a server


class Looking:
    """A client that looks, on a connection of its own."""

    def __init__(self, server: LiveServer):
        self.messages: list[dict] = []
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        self._connection.request("GET", "/ui/events", headers=KEY)
        self._reply = self._connection.getresponse()
        assert self._reply.status == 200
        assert self._reply.headers["content-type"].startswith("text/event-stream")
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for line in self._reply:
                if line.startswith(b"data: "):
                    self.messages.append(json.loads(line.removeprefix(b"data: ")))
        except (OSError, ValueError, AttributeError, http.client.HTTPException):  # closed
            pass

    def close(self) -> None:
        sock = self._connection.sock or self._reply.fp.raw._sock
        sock.shutdown(2)
        self._thread.join(60)
        self._connection.close()

    @property
    def steps(self) -> list[dict]:
        return [step for message in tuple(self.messages) if message["type"] == "steps" for step in message["steps"]]

    @property
    def requests(self) -> dict[str, dict]:
        told = [message["requests"] for message in tuple(self.messages) if message["type"] == "requests"]
        return {request["name"]: request for requests in told for request in requests}


@pytest.fixture(scope="module")
def server(tiny_model):
    flags = ["--served-model-name", "tiny", "--api-key", "secret", *TINY_FLAGS]
    with running_server(tiny_model, [*flags, "--data-parallel-size", "2", "--api-server-count", "2"]) as server:
        yield server


def test_whoever_looks_at_any_front_sees_the_steps_of_all_engines(server) -> None:
    with closing(Looking(server)) as one, closing(Looking(server)) as other:
        for looking in (one, other):
            server.wait_for(lambda looking=looking: any(m["type"] == "gauges" for m in looking.messages))
        [hello, *_] = one.messages
        assert hello["type"] == "hello"
        assert [engine["max_num_seqs"] for engine in hello["engines"]] == [8, 8]
        names = []
        while {step["engine"] for step in one.steps} != {0, 1}:  # whatever goes where
            reply = server.post("/v1/completions", ANSWER | {"prompt": f"{len(names):3}" * 20}, headers=KEY)
            names.append(reply.json["id"])
            server.wait_for(lambda: one.requests.get(names[-1], {}).get("state") == "finished")
        for looking in (one, other):
            server.wait_for(lambda looking=looking: looking.requests.get(names[-1], {}).get("state") == "finished")
            server.wait_for(lambda looking=looking: len(looking.steps) == len(one.steps))
        assert one.steps == other.steps
        request = one.requests[names[0]]
        steps = [step for step in one.steps if request["id"] in dict(step["requests"])]
        assert sum(dict(step["requests"])[request["id"]] for step in steps if step["prompts"]) == 60
        assert sum(dict(step["requests"])[request["id"]] for step in steps if not step["prompts"]) == 7
        assert {step["graph"] for step in steps} == {"48x8", "8x8"}
        assert request["finish_reason"] == "length"
        assert request["arrived"] <= request["scheduled"] <= request["first_token"] <= request["finished"]
    trace = server.get("/ui/trace", headers=KEY).json
    assert {event["name"] for event in trace["traceEvents"]} > {"prefill", "decode", "queued", "KV blocks"}
    assert trace["otherData"]["model"] == "tiny"


def test_the_command_writes_a_trace(server, tmp_path, monkeypatch, capsys) -> None:
    with closing(Looking(server)) as looking:
        server.wait_for(lambda: any(message["type"] == "gauges" for message in looking.messages))
        name = server.post("/v1/completions", ANSWER, headers=KEY).json["id"]
        server.wait_for(lambda: looking.requests.get(name, {}).get("state") == "finished")
    arguments = ["trace", "--url", server.url, "--seconds", "0", "-o", str(tmp_path / "trace.json")]
    monkeypatch.setenv("STEPGRAPH_API_KEY", "secret")
    assert main(arguments) == 0
    monkeypatch.delenv("STEPGRAPH_API_KEY")
    assert main(arguments) == 2
    said = capsys.readouterr()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert f"{sum(event.get('cat') == 'step' for event in events)} steps" in said.out
    assert name in {event["name"] for event in events}
    assert "STEPGRAPH_API_KEY" in said.err


def test_a_trace_of_some_seconds_has_what_came_in_them(monkeypatch) -> None:
    now, kept = 100.0, watched()
    kept.take(0, Seen([STEP] * 3, [REQUEST._replace(id=1, finished=99.0, state="finished")], True))

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        if now < 101:
            running = REQUEST._replace(id=2, name="cmpl-b", arrived=now)
            kept.take(0, Seen([STEP._replace(plan_start=now, start=now)], [running], False))

    monkeypatch.setattr(watched_module, "time", SimpleNamespace(monotonic=lambda: now, time=time.time))
    monkeypatch.setattr(watched_module.asyncio, "sleep", sleep)
    trace = json.loads(asyncio.run(kept.trace(2.0)))
    steps = [event["args"]["n"] for event in trace["traceEvents"] if event.get("cat") == "step"]
    assert steps[0] == 3
    assert steps == sorted(steps)
    assert len(steps) > 5
    assert {event["name"] for event in trace["traceEvents"] if event.get("cat") == "request"} == {"cmpl-b"}
    assert [message.until for message in kept._engines[0].heard] == pytest.approx([105.0, 106.0], abs=0.2)


def test_what_cannot_be_traced_is_said_in_a_sentence(capsys) -> None:
    for url, code in (("nowhere", 2), ("http://127.0.0.1:9", 1)):
        assert main(["trace", "--url", url]) == code
        assert url in capsys.readouterr().err


def test_a_client_that_takes_nothing_holds_up_nobody() -> None:
    """Nothing is looked for until it has taken what was found before."""
    looks = []

    async def look(cursor):
        looks.append(cursor)
        return {"messages": [b"{}"], "cursor": [len(looks), 0], "more": True}

    async def read() -> None:
        some = SimpleNamespace(draining=False, control=SimpleNamespace(look=look))
        events = page_module._events(some, await look(None))
        for _ in range(3):
            assert await anext(events) == b"data: {}\n\n"
        assert looks == [None, [1, 0], [2, 0]]
        some.draining = True
        with pytest.raises(StopAsyncIteration):
            await anext(events)

    asyncio.run(read())


def test_whoever_looks_hears_once_when_an_engine_is_not_there_and_when_it_is() -> None:
    kept = watched()
    engine = kept._engines[0]

    def told(cursor) -> tuple[list, list]:
        looked = kept.look(cursor)
        messages = [json.loads(content) for content in looked["messages"]]
        return [m["engines"][0] for m in messages if m["type"] in ("hello", "engines")], looked["cursor"]

    engine.status.state, ready, engine.status.ready = EngineState.LOADING, engine.status.ready, None
    [about], cursor = told(None)
    assert (about["state"], about["trouble"]) == ("loading", "the model is being loaded")
    assert "max_num_seqs" not in about
    assert told(cursor) == ([], cursor)
    engine.status.state, engine.status.ready = EngineState.READY, ready
    [about], cursor = told(cursor)
    assert (about["state"], about["trouble"], about["max_num_seqs"]) == ("ready", None, ready.max_num_seqs)
    assert told(cursor) == ([], cursor)


def test_what_a_front_is_told_can_be_a_message() -> None:
    kept = watched()
    kept.take(0, Seen([STEP], [REQUEST], True))
    looked = kept.look(kept.look(None)["cursor"])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(looked)) == looked

"""Several engines and several fronts behind one port: what becomes of one is no trouble for the others, and what is asked of any
front is done, and told, of all."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from live import TINY_FLAGS, LiveServer, running_server
from lora_folders import matrices, save_adapter

from stepgraph.server.front_messages import StartFront, encode_start
from stepgraph.server.spawn import spawn_front

FLAGS = [
    *("--served-model-name", "tiny", "--data-parallel-size", "2", "--api-server-count", "2"),
    *("--enable-admin-endpoints", "--enable-lora", "--max-lora-rank", "4", "--max-loras", "2", *TINY_FLAGS),
]
LONG = {"prompt": "a", "max_tokens": 450, "temperature": 0, "ignore_eos": True}
SHORT = {"prompt": "abc" * 20, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
FEW = 12
"""Connections of which each front gets some, all but surely."""


@pytest.fixture(scope="module")
def server(tiny_model):
    with running_server(tiny_model, FLAGS) as server:
        yield server


@pytest.fixture(autouse=True)
def all_is_there(server):
    """Each test finds all processes, and leaves no request."""
    yield
    if server.process.poll() is not None:
        return
    server.wait_for(lambda: server.get("/health").json.get("engines") == ["ok", "ok"])
    server.wait_for(lambda: len(server.pids("front_process")) == 2)
    server.wait_for(lambda: server.get("/load").json == {"server_load": 0, "engines": [0, 0]})
    server.wait_for(lambda: server.metric("num_requests_running") == 0)


class Stream:
    """A long answer being read in a thread, on a connection of its own."""

    def __init__(self, server: LiveServer, **fields):
        self.text, self.error, self.is_whole = "", "", False
        self.begun = threading.Event()
        self.port = 0
        self._thread = threading.Thread(target=self._read, args=(server, LONG | {"stream": True} | fields))
        self._thread.start()

    def _read(self, server: LiveServer, body) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            reply = connection.getresponse()
            assert reply.status == 200
            for line in reply:
                if line.startswith(b"data: {"):
                    event = json.loads(line.removeprefix(b"data: "))
                    self.error += event.get("error", {}).get("message", "")
                    self.text += "".join(choice["text"] for choice in event.get("choices", ()))
                    self.begun.set()
                self.is_whole |= line.startswith(b"data: [DONE]")
        except (OSError, http.client.HTTPException):  # the connection broke
            pass
        finally:
            self.begun.set()
            connection.close()

    def join(self) -> "Stream":
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self


def streams(server: LiveServer, count: int = FEW) -> list[Stream]:
    """Streams under way, of which both engines have some: each prompt is another's."""
    started = [Stream(server, cache_salt=str(number)) for number in range(count)]
    for stream in started:
        assert stream.begun.wait(60)
    return started


def tokens(server: LiveServer, **fields) -> list[int]:
    reply = server.post("/v1/completions", SHORT | fields)
    assert reply.status == 200, reply.body
    return reply.json["choices"][0]["token_ids"]


def everywhere(server: LiveServer, path: str) -> list:
    """What a GET says on several connections."""
    return [server.get(path).json for _ in range(FEW)]


def test_a_killed_engine_ends_its_own_streams_only_and_comes_back(server) -> None:
    whole = Stream(server).join().text
    begun = streams(server)
    loads = server.get("/load").json
    assert loads["server_load"] == sum(loads["engines"])
    os.kill(server.pids("engine_process")[1], signal.SIGKILL)
    ended = [stream.join() for stream in begun]
    lost = [stream for stream in ended if stream.error]
    assert 0 < len(lost) < len(ended)
    assert all("killed by signal 9" in stream.error for stream in lost)
    assert all(stream.text == whole for stream in ended if not stream.error)
    health = server.get("/health")
    assert (health.status, health.json["engines"][0]) == (200, "ok")
    assert len({tuple(tokens(server)) for _ in range(3)}) == 1
    server.wait_for(lambda: server.get("/health").json["engines"] == ["ok", "ok"])
    restarts = [server.metric("engine_restarts_total", engine=engine, cause="died") for engine in "01"]
    assert restarts == [0, 1]
    server.wait_for(lambda: tokens(server, cache_salt=os.urandom(4).hex()) and generated(server, 1) > 0)


def generated(server: LiveServer, engine: int) -> float:
    """Steps that an engine has run since its process started."""
    return server.get("/graphs").json["engines"][engine]["steps"]


def test_a_killed_front_breaks_its_own_connections_only_and_its_requests_end(server) -> None:
    before = {name: server.metric(name) for name in ("generation_tokens_total", "http_requests_total")}
    whole = Stream(server).join().text
    begun = streams(server)
    victim, other = server.pids("front_process")
    os.kill(victim, signal.SIGKILL)
    server.wait_for(lambda: not os.path.exists(f"/proc/{victim}"))
    assert {server.get("/ready").status for _ in range(FEW)} == {200}  # by the other one
    ended = [stream.join() for stream in begun]
    assert 0 < sum(stream.is_whole for stream in ended) < len(ended)
    assert all(stream.text == whole for stream in ended if stream.is_whole)
    assert not any(stream.error for stream in ended)
    server.wait_for(lambda: len(server.pids("front_process")) == 2)
    assert other in server.pids("front_process")
    assert len({tuple(tokens(server)) for _ in range(FEW)}) == 1
    for name, count in before.items():
        assert server.metric(name) > count


def test_every_front_counts_for_the_sum(server) -> None:
    everywhere(server, "/version")
    first = server.metric("http_requests_total", handler="/version")
    everywhere(server, "/version")
    told = [server.metric("http_requests_total", handler="/version") for _ in range(4)]
    assert told == [first + FEW] * 4


def test_what_one_front_is_asked_holds_for_all_fronts_and_engines(server) -> None:
    expected = tokens(server)
    assert server.post("/pause", None).json == {"status": "paused"}
    assert everywhere(server, "/is_paused") == [{"is_paused": True}] * FEW
    waiting = [threading.Thread(target=tokens, args=(server,), kwargs={"cache_salt": str(n)}) for n in range(4)]
    for thread in waiting:
        thread.start()
    server.wait_for(lambda: server.metric("num_requests_waiting") == 4)
    server.post("/resume", None)
    for thread in waiting:
        thread.join(60)
    assert server.post("/sleep", None).json == {"status": "asleep", "level": 1}
    assert everywhere(server, "/is_sleeping") == [{"is_sleeping": True, "level": 1}] * FEW
    assert {server.post("/v1/completions", SHORT).status for _ in range(FEW)} == {503}
    assert server.post("/wake_up", None).json == {"status": "awake"}
    assert {tuple(tokens(server)) for _ in range(FEW)} == {tuple(expected)}
    assert server.post("/reset_prefix_cache", None).json == {"success": True, "kept_blocks": 0}
    refused = server.post("/update_weights_from_disk", {"model_path": "/nowhere"})
    assert (refused.status, refused.json["error"]["param"]) == (400, "model_path")


def test_an_adapter_is_everybodys_at_once_and_its_requests_stay_with_one_engine(server, tmp_path) -> None:
    folder = save_adapter(tmp_path, matrices(0))
    load = {"lora_name": "poet", "lora_path": str(folder)}
    refused = server.post("/v1/load_lora_adapter", load | {"lora_name": "tiny"})
    assert refused.status == 409
    assert server.post("/v1/load_lora_adapter", load).status == 200
    before = [generated(server, engine) for engine in (0, 1)]
    assert len({tuple(tokens(server, model="poet", prompt=f"{n}" * 40)) for n in range(FEW)}) > 1
    grown = [generated(server, engine) > steps for engine, steps in enumerate(before)]
    assert sorted(grown) == [False, True]
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "poet"}).status == 200
    assert {server.post("/v1/completions", SHORT | {"model": "poet"}).status for _ in range(FEW)} == {404}


def test_the_port_is_nobody_elses(server) -> None:
    for count in ("1", "2"):
        flags = ["--port", str(server.port), "--api-server-count", count]
        second = subprocess.run(
            [sys.executable, "-m", "stepgraph.server", "--model", "smollm2", *flags],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (second.returncode, f"port={server.port} at host 127.0.0.1 cannot be opened" in second.stderr) == (
            2,
            True,
        )


def test_all_finish_what_runs_when_the_server_is_to_end(server) -> None:
    begun = streams(server, 4)
    pids = server.pids("front_process") + server.pids("engine_process")
    server.process.send_signal(signal.SIGTERM)
    assert all(stream.join().is_whole for stream in begun)
    assert len({stream.text for stream in begun}) == 1
    assert server.process.wait(60) == 0
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


def test_a_front_ends_with_whoever_started_it() -> None:
    start = StartFront("front-0-0", "ipc:///nowhere", {}, {"port": 0}, [], None, [], 8, 1)
    process = spawn_front([])
    process.stdin.write(encode_start(start) + b"\n")
    process.stdin.close()
    assert process.wait(60) == 0

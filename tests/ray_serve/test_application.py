"""An application on a real Ray. One goes through all of it: started with one replica, scaled to two by load, and back."""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import ray
from cluster import Client, engine_processes, replicas, running, running_ray, running_replicas, wait_for
from ray import serve
from tiny import TINY_SETTINGS

from stepgraph.errors import ConfigError
from stepgraph.ray import build_openai_app

_LONG = 470
SCALING = {
    "min_replicas": 1,
    "max_replicas": 2,
    "target_ongoing_requests": 2,
    "upscale_delay_s": 0.2,
    "downscale_delay_s": 3600,
    "look_back_period_s": 0.5,
}


def settings(tiny_model, **deployment_config):
    return {
        "model": tiny_model,
        "device": "cpu",
        "served_model_name": "tiny",
        **TINY_SETTINGS,
        "deployment_config": {"health_check_period_s": 1, "graceful_shutdown_wait_loop_s": 0.1, **deployment_config},
    }


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


@contextlib.contextmanager
def slowed(processes: set[int]) -> Iterator[None]:
    """Let these run for a twentieth of the time: answers of engines last, however fast the machine is."""
    enough = threading.Event()

    def send(number: signal.Signals) -> None:
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def slow() -> None:
        while not enough.wait(0.04):
            send(signal.SIGCONT)
            time.sleep(0.002)
            send(signal.SIGSTOP)

    thread = threading.Thread(target=slow)
    thread.start()
    try:
        yield
    finally:
        enough.set()
        thread.join()
        send(signal.SIGCONT)


class Stream(threading.Thread):
    """Reads a long streamed answer."""

    def __init__(self, client: Client, prompt: str):
        super().__init__(daemon=True)
        self.has_begun = threading.Event()
        self.events: list[str] = []
        self._client, self._prompt = client, prompt
        self.start()

    def run(self) -> None:
        body = {"prompt": self._prompt, "max_tokens": _LONG, "temperature": 0, "ignore_eos": True, "stream": True}
        with self._client.open("POST", "/v1/completions", body) as reply:
            for line in reply:
                if line.startswith(b"data: "):
                    self.events.append(line[6:].strip().decode())
                    self.has_begun.set()

    @property
    def is_whole(self) -> bool:
        return self.events[-1] == "[DONE]" and json.loads(self.events[-2])["choices"][0]["finish_reason"] == "length"


@pytest.fixture(scope="module")
def client(tiny_model, tmp_path_factory):
    """Of an application with two replicas, of which load brought the second."""
    port = free_port()
    with running_ray(tmp_path_factory.mktemp("r"), port):
        serve.run(build_openai_app(settings(tiny_model, autoscaling_config=SCALING)))
        client = Client(port)
        assert running_replicas() == 1
        enough = threading.Event()

        def load() -> None:
            while not enough.is_set():
                Stream(client, "load").join()

        loads = [threading.Thread(target=load) for _ in range(4)]
        for one in loads:
            one.start()
        try:
            wait_for(lambda: len(replicas()) == 2)
        finally:
            enough.set()
            for one in loads:
                one.join()
        wait_for(lambda: len(client.by_replica("engine_up")) == 2)  # the router knows both
        yield client
        engines = engine_processes()
        assert engines
    wait_for(lambda: not running(engines))  # no engine outlives Ray


def test_all_apis_answer(client) -> None:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key="none", max_retries=0) as official:
        assert [model.id for model in official.models.list()] == ["tiny"]
        asked = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 6}
        whole = official.chat.completions.create(**asked).choices[0].message.content
        streamed = official.chat.completions.create(**asked, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices) == whole
        assert official.responses.create(model="tiny", input="hello", max_output_tokens=4).usage.output_tokens == 4
    status, _, body = client.request(
        "POST", "/v1/messages", {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}
    )
    assert (status, json.loads(body)["stop_reason"]) == (200, "max_tokens")
    assert client.request("GET", "/health")[::2] == (200, b'{"status":"ok"}')
    assert client.request("HEAD", "/metrics")[::2] == (200, b"")
    wait_for(lambda: json.loads(client.request("GET", "/load")[2]) == {"server_load": 0, "engines": [0, 0]})


def test_errors_are_those_of_the_server(client) -> None:
    for path, body, status, words in (
        ("/v1/completions", {"prompt": "a", "max_tokens": "b"}, 422, "max_tokens: Input should be a valid integer"),
        ("/v1/completions", {"prompt": "a", "model": "other"}, 404, "the model 'other' is not served here"),
        ("/v1/chat/completions", {"messages": [], "temperature": -1}, 400, ""),
        ("/v1/embeddings", {}, 404, "embeddings and scores are not computed"),
        ("/sleep", {}, 404, "administration is off"),
        ("/v1/completions", b"a" * 9 * 2**20, 413, "max_body_mib"),
    ):
        found, headers, content = client.request("POST", path, body, **{"X-Request-Id": "one"})
        error = json.loads(content)["error"]
        assert (found, set(error)) == (status, {"message", "type", "param", "code"})
        assert words in error["message"]
        assert headers["x-request-id"] == "one"
    error = json.loads(client.request("POST", "/v1/messages", {})[2])
    assert (error["type"], error["error"]["type"]) == ("error", "invalid_request_error")


def test_of_many_requests_through_two_replicas_none_is_lost(client) -> None:
    before = client.by_replica("http_requests_total", handler="/v1/completions", status="200")

    def ask(number: int) -> int:
        status, _, body = client.request(
            "POST", "/v1/completions", {"prompt": f"{number} is the number", "max_tokens": 3, "ignore_eos": True}
        )
        assert status == 200
        return json.loads(body)["usage"]["completion_tokens"]

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(96))) == [3] * 96

    def served() -> list[float]:
        now = client.by_replica("http_requests_total", handler="/v1/completions", status="200")
        return list((now - before).values())

    wait_for(lambda: sum(served()) == 96)
    assert len(served()) == 2


def test_prompts_that_share_a_beginning_meet_it(client) -> None:
    before = client.by_replica("prefix_cache_hits_total")
    shared = "a beginning that is long enough to be known again. " * 7
    for number in range(6):
        assert client.request("POST", "/v1/completions", {"prompt": f"{shared}{number}", "max_tokens": 1})[0] == 200

    def hits() -> list[float]:
        return list((client.by_replica("prefix_cache_hits_total") - before).values())

    wait_for(lambda: sum(hits()) > 5 * 300)
    assert len(hits()) == 1


def test_a_client_that_leaves_ends_its_request(client) -> None:
    body = {"prompt": "leaving", "max_tokens": 480, "ignore_eos": True, "stream": True}
    with client.open("POST", "/v1/completions", body) as reply:
        assert reply.readline().startswith(b"data: ")
    wait_for(lambda: json.loads(client.request("GET", "/load")[2])["server_load"] == 0)
    wait_for(lambda: sum(client.by_replica("request_success_total", finished_reason="abort").values()) == 1)


def test_more_devices_than_a_node_has_are_refused_with_the_reason(client, tiny_model) -> None:
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=2 needs 2 GPUs on one node, and the largest has 1"):
        build_openai_app({"model": tiny_model, "device": "cuda", "tensor_parallel_size": 2})


def test_a_replica_that_dies_ends_its_own_streams_only(client, tiny_model) -> None:
    streams: list[Stream] = []
    actors, engines = replicas(), engine_processes()
    with slowed(engines):
        for number in range(4):  # one by one: the router knows of those before
            streams.append(Stream(client, f"{number} " * 9))
            assert streams[-1].has_begun.wait(60)
        wait_for(lambda: sum(client.by_replica("num_requests_running").values()) == 4)
        held = client.by_replica("num_requests_running")
        assert min(held.values()) > 0
        name = min(held)
        ray.kill(actors[name])
    for stream in streams:
        stream.join(120)
    broken = [stream for stream in streams if not stream.is_whole]
    assert len(broken) == held[name]
    for stream in broken:
        error = json.loads(stream.events[-1])["error"]
        assert (error["code"], error["message"]) == (
            "unavailable",
            "the replica that had the request ended before the answer did",
        )
    wait_for(lambda: len(running(engines)) == 1)


def test_replicas_that_nobody_needs_are_ended_with_their_engines(client, tiny_model) -> None:
    wait_for(lambda: len(replicas()) == running_replicas() == 2)  # another one stands for that which died
    wait_for(lambda: client.by_replica("engine_up").keys() == replicas().keys())  # as the router knows, too
    serve.run(build_openai_app(settings(tiny_model, autoscaling_config={**SCALING, "downscale_delay_s": 0})))
    wait_for(lambda: len(replicas()) == 1 and running_replicas() == 1)

    def is_answered() -> bool:
        status, headers, body = client.request("POST", "/v1/completions", {"prompt": "a", "max_tokens": 2})
        # the router hears later of what has ended
        assert status == 200 or (status, headers.get("retry-after")) == (503, "5"), body
        return status == 200

    wait_for(is_answered)
    wait_for(lambda: len(engine_processes()) == 1)

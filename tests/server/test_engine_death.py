"""The engine's process dies: its requests hear of it, the front stays, and serves again by itself."""

import os
import signal
import threading
import time

import openai
import pytest
from live import TINY_FLAGS, running_server

LONG = {"model": "tiny", "prompt": "a", "max_tokens": 450, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def server(tiny_model):
    with running_server(tiny_model, ["--served-model-name", "tiny", *TINY_FLAGS]) as server:
        yield server


def test_a_killed_engine_fails_its_requests_and_is_started_again(server) -> None:
    expected = (
        server.client().completions.create(model="tiny", prompt="abc", max_tokens=8, temperature=0).choices[0].text
    )
    for restarts in (1, 2):
        failures: list[openai.APIError] = []

        def whole(failures=failures) -> None:
            with pytest.raises(openai.APIError) as caught:
                server.client().completions.create(**LONG)
            failures.append(caught.value)

        def streamed(failures=failures) -> None:
            with pytest.raises(openai.APIError) as caught:
                for _ in server.client().completions.create(**LONG, stream=True):
                    pass
            failures.append(caught.value)

        readers = [threading.Thread(target=whole), threading.Thread(target=streamed)]
        for reader in readers:
            reader.start()
        server.wait_for(lambda: server.metric("num_requests_running") == 2)
        os.kill(server.engine_pid(), signal.SIGKILL)
        for reader in readers:
            reader.join(timeout=30)
        assert len(failures) == 2
        assert all("the engine stopped" in str(failure) for failure in failures)
        assert {getattr(failure, "status_code", 503) for failure in failures} == {503}
        health = server.get("/health")
        assert (health.status, "killed by signal 9" in health.body.decode()) == (503, True)
        refused = server.post("/v1/completions", {"prompt": "a"})
        assert (refused.status, "retry-after" in refused.headers) == (503, True)
        server.wait_for(lambda: server.get("/health").status == 200)
        again = server.client().completions.create(model="tiny", prompt="abc", max_tokens=8, temperature=0)
        assert again.choices[0].text == expected
        assert server.metric("engine_restarts_total") == restarts
        assert server.metric("engine_up") == 1


def test_an_engine_ends_with_its_front(tiny_model) -> None:
    with running_server(tiny_model, TINY_FLAGS) as server:
        engine = server.engine_pid()
        server.process.kill()
        server.process.wait()
        deadline = time.monotonic() + 30
        while _runs(engine):
            assert time.monotonic() < deadline, "the engine's process outlives its front"
            time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False

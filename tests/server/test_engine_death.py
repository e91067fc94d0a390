"""The engine's process dies or hangs: its requests hear of it, the front stays, and serves again by itself."""

import os
import signal
import threading
import time

import openai
import pytest
from live import TINY_FLAGS, running_server

from stepgraph.server.socket_folder import remove_abandoned, socket_folder

LONG = {"model": "tiny", "prompt": "a", "max_tokens": 450, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def server(tiny_model):
    flags = ["--served-model-name", "tiny", "--engine-hang-timeout", "3", *TINY_FLAGS]
    with running_server(tiny_model, flags) as server:
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
        assert server.metric("engine_restarts_total", cause="died") == restarts
        assert server.metric("engine_up") == 1


def test_an_engine_that_hangs_while_clients_come_and_go_is_named_and_replaced(server) -> None:
    told: list[openai.APIError] = []
    statuses: list[tuple[int, bytes]] = []

    def streamed() -> None:
        with pytest.raises(openai.APIError) as caught:
            for _ in server.client().completions.create(**LONG, stream=True):
                pass
        told.append(caught.value)

    def come_and_go() -> None:
        """A client that leaves after a moment, and comes again."""
        while not told:
            with pytest.raises((openai.APITimeoutError, openai.APIStatusError)):
                server.client(timeout=0.3).completions.create(**LONG)

    def ask() -> None:
        reply = server.get("/graphs")
        statuses.append((reply.status, reply.body))

    before = server.metric("engine_restarts_total", cause="hung")
    reader = threading.Thread(target=streamed)
    reader.start()
    server.wait_for(lambda: server.metric("num_requests_running") == 1)
    engine = server.engine_pid()
    os.kill(engine, signal.SIGSTOP)
    others = [threading.Thread(target=come_and_go), threading.Thread(target=ask)]
    for other in others:
        other.start()
    for thread in (reader, *others):
        thread.join(timeout=60)
    assert len(told) == 1
    assert "it hung: there was no sign of life from it for 3 s" in str(told[0])
    assert statuses[0][0] == 503
    assert b"it hung" in statuses[0][1]
    server.wait_for(lambda: not _runs(engine))
    server.wait_for(lambda: server.get("/health").status == 200)
    assert server.client().completions.create(model="tiny", prompt="abc", max_tokens=8).usage.completion_tokens == 8
    assert server.metric("engine_restarts_total", cause="hung") == before + 1


def test_an_engine_ends_with_its_front_even_if_stopped_and_the_next_front_removes_what_is_left(
    tiny_model, tmp_path
) -> None:
    theirs = tmp_path / "stepgraph-of-another-kind"
    theirs.mkdir()
    with running_server(tiny_model, TINY_FLAGS, TMPDIR=str(tmp_path)) as server:
        engine = server.engine_pid()
        os.kill(engine, signal.SIGSTOP)
        server.process.kill()
        server.process.wait()
        deadline = time.monotonic() + 30
        while _runs(engine):
            assert time.monotonic() < deadline, "the engine's process outlives its front"
            time.sleep(0.05)
    assert len(set(tmp_path.glob("stepgraph-*")) - {theirs}) == 1
    with socket_folder(tmp_path) as used:
        remove_abandoned(tmp_path)
        assert set(tmp_path.glob("stepgraph-*")) == {theirs, used}
    assert not used.exists()


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False

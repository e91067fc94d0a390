"""A server whose engine has two ranks: a worker, the engine's process or the front is killed, and clients are told, no process
stays, and the same answers come again."""

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable

import openai
import pytest
from live import TINY_FLAGS, LiveServer, running_server

LONG = {"model": "tiny", "prompt": "a", "max_tokens": 450, "temperature": 0, "extra_body": {"ignore_eos": True}}
FLAGS = [*TINY_FLAGS, "--served-model-name", "tiny", "--tensor-parallel-size", "2"]


@pytest.fixture(scope="module")
def server(tiny_model):
    with running_server(tiny_model, FLAGS) as server:
        yield server


def worker_of(server: LiveServer) -> int:
    """The process of rank 1, a child of the engine's."""
    found = subprocess.run(
        ["ps", "--ppid", str(server.engine_pid()), "-o", "pid=,comm=,args="], capture_output=True, text=True, check=True
    ).stdout
    [pid] = [int(line.split()[0]) for line in found.splitlines() if "worker" in line]
    return pid


def wait_for_end(*pids: int) -> None:
    deadline = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline, "a process stays"
        time.sleep(0.05)


def test_ranks_are_told_of(server) -> None:
    assert "; 2 ranks by shared_memory" in "".join(server.output)
    server.client().completions.create(model="tiny", prompt="abc", max_tokens=8)
    reports = server.get("/graphs").json["ranks"]
    assert [(report["rank"], report["device"]) for report in reports] == [(0, "cpu"), (1, "cpu")]
    assert reports[0]["num_graphs"] == reports[1]["num_graphs"] > 0
    assert server.metric("rank_total_memory_bytes", rank="1") > 0


@pytest.mark.parametrize(
    ("victim", "said"),
    [(worker_of, "rank 1 was ended by SIGKILL"), (LiveServer.engine_pid, "its process was killed by signal 9")],
    ids=["worker", "leader"],
)
def test_clients_hear_of_a_rank_that_is_killed_and_the_engine_comes_back_with_all_of_them(
    server, victim: Callable[[LiveServer], int], said: str
) -> None:
    expected = server.client().completions.create(model="tiny", prompt="abc", max_tokens=8, temperature=0)
    before, ranks = server.metric("engine_restarts_total", cause="died"), (server.engine_pid(), worker_of(server))
    failures: list[openai.APIError] = []

    def read(stream: bool) -> None:
        try:
            list(server.client().completions.create(**LONG, stream=stream))
        except openai.APIError as error:
            failures.append(error)

    readers = [threading.Thread(target=read, args=(stream,)) for stream in (True, False)]
    for reader in readers:
        reader.start()
    server.wait_for(lambda: server.metric("num_requests_running") == 2)
    os.kill(victim(server), signal.SIGKILL)
    for reader in readers:
        reader.join(timeout=30)
    assert len(failures) == 2
    assert all(f"the engine stopped: {said}" in str(failure) for failure in failures)
    wait_for_end(*ranks)
    server.wait_for(lambda: server.get("/health").status == 200)
    again = server.client().completions.create(model="tiny", prompt="abc", max_tokens=8, temperature=0)
    assert again.choices[0].text == expected.choices[0].text
    assert server.metric("engine_restarts_total", cause="died") == before + 1
    assert "Traceback" not in "".join(server.output)


def test_all_ranks_end_with_the_front_even_if_they_are_stopped(server) -> None:
    ranks = server.engine_pid(), worker_of(server)
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    server.process.kill()
    server.process.wait()
    wait_for_end(*ranks)


def test_a_worker_that_cannot_start_ends_the_server_with_a_sentence(tiny_model, tmp_path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif 'executor.worker' in ' '.join(sys.orig_argv):\n    sys.modules['torch'] = None\n"
    )
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    with running_server(tiny_model, FLAGS, wait_ready=False, PYTHONPATH=path) as server:
        assert server.process.wait(timeout=120) == 1
        server.wait_for(lambda: "rank 1" in "".join(server.output))
    output = "".join(server.output)
    assert re.search(
        r"error: rank 1( ended with exit status 1)?: its process cannot start: import of torch halted", output
    )
    assert "Traceback" not in output

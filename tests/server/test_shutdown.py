"""Ending a server: what runs may finish, nothing new begins, no process is left behind."""

import signal
import threading

import openai
import pytest
from live import TINY_FLAGS, LiveServer, running_server

FLAGS = ["--served-model-name", "tiny", *TINY_FLAGS]


class Stream:
    """A long answer being read in a thread."""

    def __init__(self, server: LiveServer, max_tokens: int = 450):
        self.num_chunks = 0
        self.error: Exception | None = None
        self.finish_reason: str | None = None
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(server.client(), max_tokens))
        self._thread.start()
        assert self._begun.wait(60)

    def _read(self, client: openai.OpenAI, max_tokens: int) -> None:
        try:
            for chunk in client.completions.create(
                model="tiny", prompt="a", max_tokens=max_tokens, stream=True, extra_body={"ignore_eos": True}
            ):
                self.num_chunks += 1
                self.finish_reason = chunk.choices[0].finish_reason
                self._begun.set()
        except Exception as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()


@pytest.mark.parametrize(("number", "is_waited_for"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_running_requests_finish_and_new_ones_are_refused(tiny_model, number, is_waited_for) -> None:
    with running_server(tiny_model, [*FLAGS, "--enable-admin-endpoints"]) as server:
        engine = server.engine_pid()
        stream = Stream(server)
        if is_waited_for:  # by an administrator, too
            threading.Thread(target=server.post, args=("/sleep?mode=wait", None), daemon=True).start()
            server.wait_for(lambda: "about to sleep" in server.get("/ready").json["status"] or stream.finish_reason)
        server.process.send_signal(number)
        server.wait_for(lambda: server.get("/ready").status == 503)
        refused = server.post("/v1/completions", {"prompt": "a"})
        assert (refused.status, refused.json["error"]["message"]) == (503, "the server is shutting down")
        assert server.get("/health").status == 200
        stream.join()
        assert (stream.error, stream.finish_reason) == (None, "length")
        assert server.process.wait(60) == 0
        assert not _exists(engine)


@pytest.mark.parametrize("again", [False, True])
def test_what_takes_too_long_is_cut_off_with_an_error(tiny_model, again) -> None:
    limit = "600" if again else "0.1"
    with running_server(tiny_model, [*FLAGS, "--shutdown-timeout", limit]) as server:
        stream = Stream(server)
        server.process.send_signal(signal.SIGTERM)
        if again:
            server.wait_for(lambda: server.get("/ready").status == 503)
            server.process.send_signal(signal.SIGTERM)
        stream.join()
        assert server.process.wait(60) == 0
        if stream.finish_reason is None:  # unless it was quicker than the signal
            assert "the engine stopped" in str(stream.error)


def _exists(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat"):
            return True
    except FileNotFoundError:
        return False

"""Engines in processes of their own, which may be killed: forked from one that has imported everything, within milliseconds."""

from __future__ import annotations

import array
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from typing import Any

_MOST_BYTES = 1 << 20


class EngineProcess:
    """An engine elsewhere. It steps by itself.

    Args:
        channel: to it.
        pid: its process.
    """

    def __init__(self, channel: socket.socket, pid: int) -> None:
        self.pid, self.answers = pid, {}  # type: int, dict[str, dict[str, Any]]
        """Of requests that have ended, by their names: "tokens", "finish_reason", "kv_transfer_params"."""
        self._channel = channel
        self._process = os.pidfd_open(pid)
        self.address = self._receive(60)
        """Its `kv_transfer_params`, but for the name of a lease."""

    def add(self, name: str, prompt: list[int], params: dict[str, Any], **options: Any) -> None:
        """Queue a request; returns when that is done.

        Args:
            name: of it.
            prompt: token ids.
            params: of `SamplingParams`.
            options: `cache_salt`, and `transfer` as `kv_transfer_params`.
        """
        self._channel.send(json.dumps({"name": name, "prompt": prompt, "params": params, **options}).encode())
        while not self._receive_answer(60).get("is_queued"):
            pass

    def wait_for(self, names: list[str], timeout_s: float) -> None:
        """Until these requests have ended."""
        deadline = time.monotonic() + timeout_s
        while not self.answers.keys() >= {*names}:
            self._receive_answer(deadline - time.monotonic())

    def kill(self) -> None:
        """As `kill -9`, whatever it does."""
        signal.pidfd_send_signal(self._process, signal.SIGKILL)
        assert select.select([self._process], [], [], 30)[0], f"process {self.pid} does not end"
        os.close(self._process)
        self._channel.close()

    def _receive_answer(self, timeout_s: float) -> dict[str, Any]:
        answer = self._receive(timeout_s)
        if "tokens" in answer:
            self.answers[answer["name"]] = answer
        return answer

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        self._channel.settimeout(max(1e-3, timeout_s))
        content = self._channel.recv(_MOST_BYTES)
        assert content, "an engine's process has ended by itself"
        return json.loads(content)


class EngineProcesses:
    """Where they come from."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._template = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
        )
        theirs.close()
        assert self._socket.recv(64), "what engines are forked from has not started"

    def start(self, settings: dict[str, Any]) -> EngineProcess:
        """One more, with these settings of the engine."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            descriptors = array.array("i", [theirs.fileno()])
            self._socket.sendmsg([json.dumps(settings).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
            pid = int(self._socket.recv(64))
        return EngineProcess(ours, pid)

    def close(self) -> None:
        """End the process that they are forked from."""
        self._socket.close()
        self._template.wait()


def _serve(channel: socket.socket, settings: dict[str, Any]) -> None:
    """Be an engine, until whoever has the other end of the channel is gone."""
    from stepgraph.config import EngineConfig
    from stepgraph.engine.build import build_engine
    from stepgraph.engine.sampling_params import SamplingParams
    from stepgraph.transfer.reference import Reference, read_params

    engine = build_engine(EngineConfig.from_settings(**settings))
    transfers = engine.transfers
    address = Reference(transfers.engine_id, transfers.host, transfers.port, "none")
    channel.send(json.dumps(address.params(0, 1)).encode())
    while True:
        delay = (engine.seconds_until_work or 0.0) if engine.has_work else 0.01
        if select.select([channel], [], [], delay)[0]:
            content = channel.recv(_MOST_BYTES)
            if not content:
                os._exit(0)
            given = json.loads(content)
            engine.add_request(
                given["name"],
                given["prompt"],
                SamplingParams(**given["params"]),
                cache_salt=given.get("cache_salt"),
                transfer=read_params(given.get("transfer")),
            )
            channel.send(json.dumps({"name": given["name"], "is_queued": True}).encode())
        engine.exchange.reclaim(copies=False)
        for update in engine.step() if engine.has_work else ():
            request = update.request
            if request.finish_reason is not None:
                answer = {
                    "name": request.id,
                    "tokens": request.output_token_ids,
                    "finish_reason": str(request.finish_reason),
                    "kv_transfer_params": request.kv_transfer_params,
                }
                channel.send(json.dumps(answer).encode())


def main() -> None:
    """Of the process that engines are forked from."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    for module in ("stepgraph.engine.build", "transformers.models.auto.configuration_auto"):
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    channel.send(b"ready")
    while True:
        request, ancillary, _, _ = channel.recvmsg(_MOST_BYTES, 64)
        if not request:
            return
        given = array.array("i")
        given.frombytes(ancillary[0][2])
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            channel.close()
            _serve(socket.socket(fileno=given[0]), json.loads(request))
        os.close(given[0])
        channel.send(str(pid).encode())


if __name__ == "__main__":
    main()

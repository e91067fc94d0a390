"""Does what README.md, docs/ and benchmarks/ tell a newcomer to do, with the installation that runs this.

    python scripts/tour.py [--pages README.md docs/serving.md]

Every console, python, yaml and json block is run, page by page, in a scratch folder: servers in the background until another
one takes their port or the page ends, `stepgraph chat` with a message on stdin, requests at the page's server. It prints a line
for each command and block, and fails if one fails. Nothing is fetched: hub names become a tiny checkpoint, ports become free
ones. What cannot be run says why, in `NOT_RUN` or in the page (see doc_blocks.py). Takes some minutes on two cores; needs smollm2
and the development tools, as `make test` installs them. tests/test_tour.py takes the same tour quicker: it forks processes in
place of starting them, and runs the tiny checkpoint wherever a page does not say what comes out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from doc_blocks import ROOT, Block, Command, blocks, pages, simple_commands

sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "engine")]

NOT_RUN = (
    (r"pip install\b", "needs a package index"),
    (r"make (demo|test|docs)\b", "installs an environment of its own"),
    (r"\.venv/bin/pre-commit install\b", "changes the repository"),
    (
        r"stepgraph serve Qwen/Qwen3-8B-FP8\b",
        "needs weights in that format, as tests/models/test_fp8_weights.py makes them",
    ),
)
"""Commands that are left out wherever they stand, by how they begin."""
NOT_RUN_IF_SMALL = (
    (r"python scripts/kill_transfers\.py\b", "tests/transfer/test_killed_engines.py kills engines, too"),
    (r"stepgraph graphs verify\b", "tests/verify verifies graphs"),
)
"""Further ones that take too long for a test."""
HUB_NAME = r"\bQwen/Qwen3-[\w.]+"
TINY = "path/to/model"
MAX_MODEL_LEN = 8192
"""Of the tiny checkpoint: the most that pages ask for. All keys and values of so many tokens are allocated."""
DEFAULT_PORT = "8000"
RUNS_A_MODEL = ("chat", "eval", "generate", "graphs", "serve")
"""Commands that take a model, and smollm2 if none is named."""
LIMIT_S = 300
TYPED = "Hello.\n"


class BrokenPromiseError(Exception):
    """A page promises what does not happen."""


class Tour:
    """Runs what pages say. Use as a context: it ends the servers that it started.

    Args:
        scratch: an empty folder, where commands are run.
        processes: what starts Python's modules; anything with the `Popen` of `subprocess`.
        is_small: whether the tiny checkpoint stands for smollm2 where a page does not say what comes out.
    """

    def __init__(self, scratch: Path, *, processes: Any = subprocess, is_small: bool = False):
        self._scratch = scratch
        self._processes = processes
        self._is_small = is_small
        self._ports: dict[str, str] = {}
        self._servers: dict[str, subprocess.Popen[bytes]] = {}
        self._environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
            "XDG_STATE_HOME": str(scratch / "state"),
            "PYTHONPATH": os.pathsep.join([str(scratch), str(ROOT)]),
        }

    def __enter__(self) -> Tour:
        from lora_folders import matrices, save_adapter
        from tiny import save_tiny_model

        model, adapter = self._scratch / TINY, self._scratch / "path" / "to" / "peft-folder"
        for folder in (model, adapter):
            folder.mkdir(parents=True)
        save_tiny_model(model, max_model_len=MAX_MODEL_LEN)
        save_adapter(adapter, matrices(0))
        (self._scratch / "keys.txt").write_text("a-key-of-the-tour\n")
        return self

    def __exit__(self, *_: object) -> None:
        self.end_servers()

    def run(self, page: Path) -> Iterator[tuple[Block, str, str]]:
        """Each command and block of a page with what came of it."""
        found = blocks(page)
        for block in found:
            if block.language == "yaml" and not re.match("scrape_configs:|services:", block.text):
                (self._scratch / "serve.yaml").write_text(self._here(block.text))  # commands above it name it
        for block in found:
            if block.language == "console":
                for command in block.commands:
                    yield block, command.text, self._outcome(block, command)
            elif block.language:
                yield block, f"({block.language})", self._outcome(block, None)
        self.end_servers()

    def end_servers(self) -> None:
        for server in self._servers.values():
            server.send_signal(signal.SIGTERM)
        for server in self._servers.values():
            server.wait(LIMIT_S)
        self._servers.clear()

    def _outcome(self, block: Block, command: Command | None) -> str:
        reasons = [block.not_run] if block.not_run is not None else []
        if command is not None:
            left_out = (*NOT_RUN, *(NOT_RUN_IF_SMALL if self._is_small else ()))
            reasons += [why for begins, why in left_out if re.match(begins, command.text)]
        if reasons:
            return f"not run: {reasons[0]}"
        try:
            if command is not None:
                return self._run_command(command)
            return {"python": self._run_python, "json": self._send, "yaml": lambda _: "read"}[block.language](block)
        except BrokenPromiseError as failure:
            return f"FAILED: {failure}"

    def _here(self, text: str) -> str:
        """What a page says, as it can be done here."""
        text = re.sub(HUB_NAME, TINY, text)
        return re.sub(r"(127\.0\.0\.1:|localhost:|port[ :=]+)(\d+)", lambda m: m[1] + self._port(m[2]), text)

    def _port(self, named: str) -> str:
        """A free port, the same for the same number in the pages."""
        if named not in self._ports:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self._ports[named] = str(probe.getsockname()[1])
        return self._ports[named]

    def _run_command(self, command: Command) -> str:
        text = self._here(command.text)
        *before, last = simple_commands(text)
        if last[:2] == ["stepgraph", "trace"] and "--url" not in last:
            last = [*last, "--url", f"http://127.0.0.1:{self._port(DEFAULT_PORT)}"]
        program = _module_of(last, with_model=TINY if self._is_small and not command.output else None)
        if last[:2] == ["stepgraph", "serve"] or last[:3] == ["python", "-m", "stepgraph.server"]:
            return self._serve(program)
        if program and len(before) <= 1:
            typed = TYPED if last[:2] == ["stepgraph", "chat"] else ""
            said = self._finished(["bash", "-c", shlex.join(before[0])], "") if before else typed
            done = self._finished(program, said)
        else:
            text = re.sub(r"^curl ", "curl --no-progress-meter --fail-with-body ", text)
            done = self._finished(["bash", "-c", re.sub(r"^python (?=\w)", f"python {ROOT}/", text)], "")
        if command.output and command.output.strip() != done.strip():
            raise BrokenPromiseError(f"it prints {done!r}, and the page shows {command.output!r}")
        return "ran"

    def _serve(self, words: list[str]) -> str:
        if "--port" not in words:
            words += ["--port", self._port(DEFAULT_PORT)]
        port = words[words.index("--port") + 1]
        if (before := self._servers.pop(port, None)) is not None:
            before.send_signal(signal.SIGTERM)
            before.wait(LIMIT_S)
        with (self._scratch / "server.log").open("wb") as log:
            server = self._started(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._servers[port] = server
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline and server.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    return "serves"
            except OSError:
                time.sleep(0.05)
        raise BrokenPromiseError(f"it does not serve: {_end_of((self._scratch / 'server.log').read_text())}")

    def _run_python(self, block: Block) -> str:
        promised = re.findall(r"^ *print\(.*\)  # (.+)$", block.text, re.MULTILINE)
        text = block.text if promised or not self._is_small else block.text.replace('"smollm2"', f'"{TINY}"')
        (self._scratch / "block.py").write_text(self._here(text), encoding="utf-8")
        printed = self._finished([sys.executable, "-m", "block"], "").splitlines()
        if missing := [line for line in promised if line not in printed]:
            raise BrokenPromiseError(f"it does not print {missing[0]!r}")
        return f"ran, and printed what the page says: {promised[0]}" if promised else "ran"

    def _send(self, block: Block) -> str:
        body = json.loads(block.text)
        path = "completions" if "prompt" in body else "chat/completions"
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port(DEFAULT_PORT)}/v1/{path}",
            block.text.encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=LIMIT_S):
                return f"answered at /v1/{path}"
        except urllib.error.HTTPError as error:
            raise BrokenPromiseError(f"status {error.code}: {error.read().decode()}") from error
        except OSError as error:
            raise BrokenPromiseError(f"the page's server does not answer: {error}") from error

    def _finished(self, words: list[str], stdin: str) -> str:
        """What a command prints."""
        pipe = subprocess.PIPE
        process = self._started(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        try:
            printed, complaints = process.communicate(stdin, timeout=LIMIT_S)
        except subprocess.TimeoutExpired as error:
            process.kill()
            raise BrokenPromiseError(f"it takes more than {LIMIT_S} s") from error
        if process.returncode:
            raise BrokenPromiseError(f"exit code {process.returncode}: {_end_of(complaints or printed)}")
        return str(printed)

    def _started(self, words: list[str], **streams: Any) -> subprocess.Popen[Any]:
        processes = self._processes if words[:2] == [sys.executable, "-m"] else subprocess
        started: subprocess.Popen[Any] = processes.Popen(words, cwd=self._scratch, env=self._environment, **streams)
        return started


def _module_of(words: Sequence[str], *, with_model: str | None) -> list[str]:
    """A command of ours as Python runs it, nothing for others.

    Args:
        words: the command.
        with_model: runs in place of smollm2, if given; not where several devices share it, as it may be too small for that.
    """
    if words[:1] == ["stepgraph"]:
        called = [sys.executable, "-m", *words]
    elif words[:2] == ["python", "-m"]:
        called = [sys.executable, *words[1:]]
    else:
        return []
    if (
        with_model is None
        or "--tensor-parallel-size" in called
        or not (set(called[2:4]) & {*RUNS_A_MODEL, "stepgraph.server"})
    ):
        return called
    called = [with_model if word == "smollm2" else word for word in called]
    if called[3] in ("chat", "generate") and "--max-tokens" not in called:
        called += ["--max-tokens", "16"]
    return called if with_model in called else [*called, "--model", with_model]


def _end_of(text: str) -> str:
    return " / ".join(text.strip().splitlines()[-4:])


def main() -> int:
    """Returns the exit code: 1 if a page promises what does not happen."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--pages", nargs="+", metavar="PAGE", help="only these, from the repository's root (default: all)"
    )
    chosen = parser.parse_args().pages
    failures = total = 0
    with tempfile.TemporaryDirectory(prefix="stepgraph-tour-") as scratch, Tour(Path(scratch)) as tour:
        for page in pages() if chosen is None else [ROOT / name for name in chosen]:
            for block, what, outcome in tour.run(page):
                total, failures = total + 1, failures + outcome.startswith("FAILED")
                print(f"{block!s:<34} {what[:90]:<90} {outcome}", flush=True)
    print(f"{total} commands and blocks, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

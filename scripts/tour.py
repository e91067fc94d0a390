"""Does what README.md, docs/ and benchmarks/ tell a newcomer to do, with the installation that runs this.

    python scripts/tour.py [--pages README.md docs/serving.md]

Every console, python, yaml and json block is run, page by page, in a scratch folder: servers in the background until another
one takes their port or the page ends, `stepgraph chat` with a message on stdin, requests at the page's server. It prints a line
for each command and block, and fails if one fails. Nothing is fetched: hub names become a tiny checkpoint, ports become free
ones. What cannot be run says why, in `NOT_RUN` or in the page (see doc_blocks.py). Takes some minutes on two cores; needs smollm2
and the development tools, as `make test` installs them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from doc_blocks import ROOT, Block, Command, blocks, pages, simple_commands

sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "engine")]

NOT_RUN = (
    (r"pip install\b", "needs a package index"),
    (r"make (demo|test)\b", "installs an environment of its own"),
    (r"\.venv/bin/pre-commit install\b", "changes the repository"),
    (
        r"stepgraph serve Qwen/Qwen3-8B-FP8\b",
        "needs weights in that format, as tests/models/test_fp8_weights.py makes them",
    ),
)
"""Commands that are left out wherever they stand, by how they begin."""
HUB_NAME = r"\bQwen/Qwen3-[\w.]+"
DEFAULT_PORT = "8000"
LIMIT_S = 300
TYPED = "Hello.\n"


class BrokenPromiseError(Exception):
    """A page promises what does not happen."""


class Tour:
    """Runs what pages say. Use as a context: it ends the servers that it started."""

    def __init__(self, scratch: Path):
        self._scratch = scratch
        self._ports: dict[str, str] = {}
        self._servers: dict[str, subprocess.Popen[bytes]] = {}
        self._environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
            "XDG_STATE_HOME": str(scratch / "state"),
        }

    def __enter__(self) -> Tour:
        from lora_folders import matrices, save_adapter
        from tiny import save_tiny_model

        model, adapter = self._scratch / "path" / "to" / "model", self._scratch / "path" / "to" / "peft-folder"
        for folder in (model, adapter):
            folder.mkdir(parents=True)
        save_tiny_model(model)
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
        reason = block.not_run
        for begins, why in NOT_RUN:
            if command is not None and re.match(begins, command.text):
                reason = why
        if reason is not None:
            return f"not run: {reason}"
        try:
            if command is not None:
                return self._run_command(command)
            return {"python": self._run_python, "json": self._send, "yaml": lambda _: "read"}[block.language](block)
        except BrokenPromiseError as failure:
            return f"FAILED: {failure}"

    def _here(self, text: str) -> str:
        """What a page says, as it can be done here."""
        text = re.sub(HUB_NAME, "path/to/model", text)
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
        [first, *_] = simple_commands(text)
        if first[:2] == ["stepgraph", "serve"] or first[:3] == ["python", "-m", "stepgraph.server"]:
            return self._serve(list(first))
        text = re.sub(r"^curl ", "curl --no-progress-meter --fail-with-body ", text)
        done = self._finished(["bash", "-c", text], TYPED if first[:2] == ["stepgraph", "chat"] else "")
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
            server = subprocess.Popen(words, cwd=self._scratch, env=self._environment, stdout=log, stderr=log)
        self._servers[port] = server
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline and server.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    return "serves"
            except OSError:
                time.sleep(0.2)
        raise BrokenPromiseError(f"it does not serve: {_end_of((self._scratch / 'server.log').read_text())}")

    def _run_python(self, block: Block) -> str:
        (self._scratch / "block.py").write_text(self._here(block.text), encoding="utf-8")
        printed = self._finished([sys.executable, "block.py"], "").splitlines()
        promised = re.findall(r"^ *print\(.*\)  # (.+)$", block.text, re.MULTILINE)
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
        try:
            done = subprocess.run(
                words,
                cwd=self._scratch,
                env=self._environment,
                input=stdin,
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
            )
        except subprocess.TimeoutExpired as error:
            raise BrokenPromiseError(f"it takes more than {LIMIT_S} s") from error
        if done.returncode:
            raise BrokenPromiseError(f"exit code {done.returncode}: {_end_of(done.stderr or done.stdout)}")
        return done.stdout


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

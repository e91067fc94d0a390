"""Does NVIDIA Dynamo's KV indexer know what is in an engine's prefix cache, from KV events alone?

An engine of a random model answers prompts that share beginnings, in a cache too small for all of them. Before each, the
indexer is asked how many of its tokens the engine has; the engine's `num_cached_tokens` is the truth. In between the indexer
is killed, and another one has to learn everything by replay; or it is stopped while the engine goes on, so that it may miss
messages; or the cache is reset.

    pip install ai-dynamo-runtime     # the indexer; nothing else of stepgraph needs it
    python scripts/check_kv_indexer.py --prompts 400 --json benchmarks/results/kv-indexer.json
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from tiny import TINY_SETTINGS, save_tiny_model

from stepgraph import LLM, SamplingParams
from stepgraph.bench.report import check_outputs, write_json

INDEXER = "import sys, dynamo._core as core; core.run_kv_indexer(sys.argv[1:])"
"""`python -m dynamo.indexer`, without the rest of Dynamo that it imports."""
BLOCK_SIZE = 16
WAIT_S = 30.0
FAULTS = ("killed", "stopped", "reset")


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Indexer:
    """A process of Dynamo's that listens to one engine."""

    def __init__(self, events: int, replay: int) -> None:
        [port] = free_ports(1)
        self._address = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-c", INDEXER, "--port", str(port), "--threads", "1"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        engine = {
            "instance_id": 1,
            "model_name": "random",
            "block_size": BLOCK_SIZE,
            "endpoint": f"tcp://127.0.0.1:{events}",
            "replay_endpoint": f"tcp://127.0.0.1:{replay}",
        }
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                self._ask("register", engine)
                return
            except urllib.error.URLError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def _ask(self, path: str, body: Any) -> Any:
        request = urllib.request.Request(
            f"{self._address}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            return json.load(answer)

    def tokens_cached(self, tokens: list[int]) -> int:
        """As far as the indexer knows, of the prompt's first."""
        scores = self._ask("query", {"model_name": "random", "token_ids": tokens})["scores"]
        return int(scores.get("1", {}).get("0", 0))

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def next_prompt(rng: random.Random, prompts: list[list[int]]) -> list[int]:
    """A new one, or the beginning of an earlier one with another end."""
    start = []
    if prompts and rng.random() < 0.8:
        earlier = rng.choice(prompts[-40:])
        start = earlier[: rng.randint(1, len(earlier))]
    return start + [rng.randint(1, 250) for _ in range(rng.randint(1, 60))]


def try_prompts(llm: LLM, ports: tuple[int, int], count: int, seed: int) -> Counter[str]:
    """Counts of prompts, by whether the indexer was right about them, and of what was done to it."""
    rng = random.Random(seed)
    indexer = Indexer(*ports)
    counts: Counter[str] = Counter()
    prompts: list[list[int]] = []
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)

    def ask_engine(prompt: list[int]) -> int:
        prompts.append(prompt)
        [output] = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        return output.num_cached_tokens

    try:
        for number in range(count):
            if number % 25 == 24:
                fault = FAULTS[number // 25 % len(FAULTS)]
                counts[fault] += 1
                if fault == "reset":
                    llm.reset_prefix_cache()
                elif fault == "killed":
                    indexer.close()
                    indexer = Indexer(*ports)
                else:
                    indexer.send(signal.SIGSTOP)
                    for _ in range(200):
                        ask_engine(next_prompt(rng, prompts))
                    indexer.send(signal.SIGCONT)
                ask_engine(
                    next_prompt(rng, prompts)
                )  # an indexer asks for what it has missed when it hears of what is new
            prompt = next_prompt(rng, prompts)[:300]
            # a last token is always computed, for its logits
            most = (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE
            deadline = time.monotonic() + 0.5
            expected, known = -1, 0
            while known != expected or time.monotonic() < deadline:  # settled: the same half a second long
                if time.monotonic() > deadline:
                    deadline = time.monotonic() + 0.5
                expected, known = known, min(most, indexer.tokens_cached(prompt))
                time.sleep(0.05)
            cached = ask_engine(prompt)
            counts["right" if cached == known else "too many" if known > cached else "too few"] += 1
            counts["with a prefix"] += cached > 0
    finally:
        indexer.close()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hwm", type=int, default=4, help="messages that wait for an indexer, before it misses some")
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    arguments = parser.parse_args()
    check_outputs(arguments)
    events, replay = free_ports(2)
    settings = TINY_SETTINGS | {"num_kv_blocks": 97, "block_size": BLOCK_SIZE, "device": "cpu"}
    config = {
        "enable_kv_cache_events": True,
        "endpoint": f"tcp://*:{events}",
        "replay_endpoint": f"tcp://*:{replay}",
        "buffer_steps": 200,
        "hwm": arguments.hwm,
    }
    with tempfile.TemporaryDirectory() as folder:
        model = save_tiny_model(Path(folder))
        with LLM(model, progress=False, kv_events_config=config, **settings) as llm:
            counts = try_prompts(llm, (events, replay), arguments.prompts, arguments.seed)
    version = metadata.version("ai-dynamo-runtime")
    print(f"Dynamo's indexer {version}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    if arguments.json:
        write_json(arguments.json, {"ai-dynamo-runtime": version, "counts": dict(counts)})
    if counts["right"] != arguments.prompts:
        sys.exit(1)


if __name__ == "__main__":
    main()

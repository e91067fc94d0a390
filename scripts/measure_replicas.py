"""What replicas behind one door give: a server with one engine, then with several, under the same load, and one of them killed.

    python scripts/measure_replicas.py qwen3-0.6b --replicas 1 2 --json replicas.json

A named shape gets random weights and a made-up tokenizer; a folder is served as it is. Every load has new prompts, so that no
prefix cache knows them. A device for each replica; on CPU they share the cores, and nothing is to be gained.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import stepgraph.models
from stepgraph.bench.report import cpu_name, table, write_json

SHAPES = Path(stepgraph.models.__file__).parent / "shapes"
HEADER = (
    *("replicas, fronts", "at once", "tokens/s", "of one", "first p50", "p99 ms", "per token p50", "p99 ms"),
    *("clients' cores", "tokens by engine"),
)
COME_BACK_S = 90.0
"""How long a killed engine gets to be there again."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns 1 if an engine that was killed did not come back."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", help="a named shape or a folder")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--max-concurrency", type=int, nargs="+", default=[128, 256], metavar="N")
    parser.add_argument(
        "--prompts-per-place", type=int, default=12, metavar="N", help="requests for each that is under way"
    )
    parser.add_argument("--input-range", type=int, nargs=2, default=[16, 256], metavar=("FROM", "TO"))
    parser.add_argument("--output-len", type=int, default=128, metavar="N")
    parser.add_argument("--client-processes", type=int, metavar="N", help="of bench serve")
    parser.add_argument("--no-kill", action="store_true", help="leave the last server's engines alone")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--vocab-size", type=int, default=1000, metavar="N", help="token ids are below N")
    parser.epilog = "What follows -- is given to stepgraph serve."
    given = list(sys.argv[1:] if argv is None else argv)
    end = given.index("--") if "--" in given else len(given)
    options, flags = parser.parse_args(given[:end]), given[end + 1 :]
    results: list[dict[str, Any]] = []
    killed: dict[str, Any] | None = None
    with tempfile.TemporaryDirectory() as scratch:
        folder = _folder(options.model, Path(scratch))
        for replicas in options.replicas:
            began = time.monotonic()
            with _server(folder, replicas, max(options.max_concurrency), flags) as (process, url):
                start_s = time.monotonic() - began
                fronts = max(1, len(_processes(process.pid, "front_process")))
                for at_once in options.max_concurrency:
                    load = _load(
                        options,
                        url,
                        at_once,
                        seed=1000 * replicas + at_once,
                        file=Path(scratch) / "load.json",
                        num_warmups=at_once // 2,
                    )
                    results.append({"replicas": replicas, "fronts": fronts, "start_s": start_s, **load})
                    print("  ".join(_row(results[-1], results)), flush=True)
                if replicas == options.replicas[-1] and replicas > 1 and not options.no_kill:
                    killed = _kill_one(options, process.pid, url, Path(scratch) / "killed.json")
    print(table(HEADER, [_row(result, results) for result in results]))
    if killed is not None:
        print(
            f"\none of {options.replicas[-1]} engines killed under load: {killed['failed']} of {killed['sent']} streams failed "
            f"({killed['errors']}), at most {killed['under_way']} were under way; it was back after {killed['back_s']} s"
        )
    if options.json:
        write_json(options.json, {"client": cpu_name(), "cores": os.cpu_count(), "results": results, "killed": killed})
    return int(killed is not None and killed["back_s"] is None)


def _folder(model: str, scratch: Path) -> str:
    """What to serve: for a shape its config, and a tokenizer with a word for each id."""
    shape = SHAPES / f"{model}.json"
    if not shape.is_file():
        return model
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = scratch / model
    folder.mkdir()
    config = json.loads(shape.read_text())
    (folder / "config.json").write_text(json.dumps(config))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config["vocab_size"])}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.WordPiece(prefix="", cleanup=False)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return str(folder)


@contextlib.contextmanager
def _server(
    folder: str, replicas: int, at_once: int, flags: Sequence[str]
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server on a free port, and its address."""
    command = [sys.executable, "-m", "stepgraph", "serve", folder, "--port", "0", "--max-queue", "4096"]
    command += ["--max-num-seqs", str(min(256, at_once)), "--max-model-len", "4096"]
    if Path(folder).is_dir() and not list(Path(folder).glob("*.safetensors")):
        command += ["--load-format", "dummy"]
    if replicas > 1:
        command += ["--data-parallel-size", str(replicas)]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"serves .* at (http://\S+) ", line):
                yield process, found[1]
                break
        else:
            raise SystemExit("the server did not start; what it says is above")
    finally:
        process.terminate()
        process.wait()


def _load(
    options: argparse.Namespace, url: str, at_once: int, *, seed: int, file: Path, num_warmups: int
) -> dict[str, Any]:
    """`bench serve` in processes of its own."""
    before = _by_engine(url)
    low, high = map(str, options.input_range)
    command = [sys.executable, "-m", "stepgraph.bench", "serve", "--base-url", url, "--seed", str(seed)]
    command += ["--random-input-range", low, high, "--random-output-len", str(options.output_len)]
    command += ["--max-concurrency", str(at_once), "--num-prompts", str(at_once * options.prompts_per_place)]
    command += ["--num-warmups", str(num_warmups), "--vocab-size", str(options.vocab_size), "--json", str(file)]
    if options.client_processes:
        command += ["--client-processes", str(options.client_processes)]
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
    result: dict[str, Any] = json.loads(file.read_text())
    result["tokens_by_engine"] = {engine: count - before.get(engine, 0) for engine, count in _by_engine(url).items()}
    return result


def _kill_one(options: argparse.Namespace, server: int, url: str, file: Path) -> dict[str, Any]:
    """What the clients see of it, and when the engine is there again; None: not within `COME_BACK_S`."""
    at_once = max(options.max_concurrency)
    found: dict[str, Any] = {}

    def send() -> None:
        found.update(_load(options, url, at_once, seed=7, file=file, num_warmups=0))

    load = threading.Thread(target=send)
    load.start()
    while _gauge(url, "num_requests_running") < at_once // 2 and load.is_alive():
        time.sleep(0.05)
    os.kill(_processes(server, "engine_process")[-1], signal.SIGKILL)
    died, back_s = time.monotonic(), None
    load.join()
    while back_s is None and time.monotonic() - died < COME_BACK_S:
        time.sleep(0.1)
        if _gauge(url, "engine_up") == options.replicas[-1]:
            back_s = round(time.monotonic() - died, 1)
    return {
        "failed": found["failed"],
        "sent": found["num_prompts"],
        "errors": found["errors_by_kind"],
        "under_way": found["max_concurrent_requests"],
        "back_s": back_s,
    }


def _processes(parent: int, name: str) -> list[int]:
    """Descendants of a process whose command has the name in it, by age."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    family, grew = {parent}, True
    while grew:
        more = {pid for pid, its_parent in parents.items() if its_parent in family} - family
        family, grew = family | more, bool(more)
    chosen = []
    for pid in sorted(family - {parent}):
        with contextlib.suppress(OSError):
            if name in Path(f"/proc/{pid}/cmdline").read_text():
                chosen.append(pid)
    return chosen


def _by_engine(url: str) -> dict[str, float]:
    """Tokens that each engine has generated."""
    samples = re.findall(r"^stepgraph:generation_tokens_total\{([^}]*)\} (\S+)", _metrics(url), re.MULTILINE)
    return {(re.findall(r'engine="(\d+)"', labels) or ["0"])[0]: float(value) for labels, value in samples}


def _gauge(url: str, name: str) -> float:
    """Summed over engines."""
    return sum(map(float, re.findall(rf"^stepgraph:{name}\{{[^}}]*\}} (\S+)", _metrics(url), re.MULTILINE)))


def _metrics(url: str) -> str:
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as reply:
        return str(reply.read().decode())


def _row(result: dict[str, Any], results: Sequence[dict[str, Any]]) -> list[str]:
    one = next(r for r in results if r["max_concurrency"] == result["max_concurrency"])
    by_engine = result["tokens_by_engine"].values()
    return [
        f"{result['replicas']}, {result['fronts']}",
        f"{result['max_concurrency']}",
        f"{result['output_throughput']:,.0f}",
        f"{result['output_throughput'] / one['output_throughput']:.2f}",
        f"{result['median_ttft_ms']:.1f}",
        f"{result['p99_ttft_ms']:.1f}",
        f"{result['median_tpot_ms']:.2f}",
        f"{result['p99_tpot_ms']:.2f}",
        f"{result['client']['processes']} x {result['client']['cpu_share']:.0%}"
        + (" (limit)" if result["client"]["was_limit"] else ""),
        " + ".join(f"{count:,.0f}" for count in by_engine),
    ]


if __name__ == "__main__":
    sys.exit(main())

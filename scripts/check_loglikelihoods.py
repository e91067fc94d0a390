"""Are the log-likelihoods that a server gives those of transformers in float32? Asked for as evaluation harnesses do.

    stepgraph serve smollm2 --dtype float32 --port 8000
    python scripts/check_loglikelihoods.py --url http://127.0.0.1:8000 --json loglikelihoods.json

12 short texts of 8 to 16 tokens and 12 long ones of 200 to 600: prose of Python's documentation, cut by tokens. Each is sent to
/v1/completions as lm-eval's `local-completions` sends it (token ids, `echo`, `logprobs` 1, `max_tokens` 1, temperature 0), its
second half is summed as a harness sums a continuation, and held against transformers' own Llama with the dequantised weights of
the same file. Exit code 1 if one differs by more than `--tolerance`. Needs the embedded model (`stepgraph pull smollm2`).
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean

import torch

from stepgraph.bench.report import check_outputs, table, write_json
from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from against_transformers import transformers_model

SHORT, LONG, NUM_TEXTS = (8, 16), (200, 600), 12


@dataclass(frozen=True)
class Comparison:
    """One text: the sum over its second half, and the largest difference of one token."""

    num_tokens: int
    served: float
    expected: float
    largest_token: float

    @property
    def difference(self) -> float:
        return abs(self.served - self.expected)


def texts(tokenizer) -> list[list[int]]:  # type: ignore[no-untyped-def]
    """Short ones first; lengths are spread evenly over the two ranges."""
    sources = [tokenizer.encode(text) for _, text in sorted(topics.items())]
    sources = [ids for ids in sources if len(ids) >= LONG[1]]
    lengths = [low + (high - low) * i // (NUM_TEXTS - 1) for low, high in (SHORT, LONG) for i in range(NUM_TEXTS)]
    return [sources[i % len(sources)][:length] for i, length in enumerate(lengths)]


def served_logprobs(url: str, ids: Sequence[int]) -> list[float]:
    """Log-probabilities of all tokens of a prompt but the first."""
    body = {"prompt": [list(ids)], "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        [choice] = json.load(response)["choices"]
    logprobs: list[float] = choice["logprobs"]["token_logprobs"][1 : len(ids)]
    return logprobs


@torch.no_grad()
def expected_logprobs(model: torch.nn.Module, ids: Sequence[int]) -> list[float]:
    """The same from transformers."""
    tokens = torch.tensor([ids])
    logprobs: list[float] = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0].tolist()
    return logprobs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: http://127.0.0.1:8000)")
    parser.add_argument("--tolerance", type=float, default=1e-3, metavar="NATS", help="default: 0.001")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    arguments = parser.parse_args()
    check_outputs(arguments)

    settings = {"model": "smollm2", "device": "cpu", "max_num_seqs": 1, "max_model_len": 1024, "quantization": "none"}
    engine = build_engine(EngineConfig.from_settings(**settings))
    reference = transformers_model(engine)
    comparisons = []
    for ids in texts(engine.tokenizer):
        served, expected = served_logprobs(arguments.url, ids), expected_logprobs(reference, ids)
        half = len(ids) // 2
        largest = max(abs(a - b) for a, b in zip(served, expected, strict=True))
        comparisons.append(Comparison(len(ids), sum(served[half:]), sum(expected[half:]), largest))
    rows = [
        (
            name,
            f"{fmean(c.difference for c in part):.2g}",
            f"{max(c.difference for c in part):.2g}",
            f"{max(c.largest_token for c in part):.2g}",
        )
        for name, part in (("short", comparisons[:NUM_TEXTS]), ("long", comparisons[NUM_TEXTS:]))
    ]
    print(table((f"{NUM_TEXTS} texts", "mean |d sum|", "max |d sum|", "max |d token|"), rows))
    if arguments.json:
        write_json(arguments.json, {"texts": [asdict(c) | {"difference": c.difference} for c in comparisons]})
    return int(max(c.difference for c in comparisons) > arguments.tolerance)


if __name__ == "__main__":
    sys.exit(main())

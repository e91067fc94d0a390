"""Has one engine compute a prompt and another one answer it: what a router between them does.

    stepgraph serve smollm2 --device cpu --splitwise-role prefill --port 8100
    stepgraph serve smollm2 --device cpu --splitwise-role decode --port 8200
    python examples/two_engines.py http://127.0.0.1:8100 http://127.0.0.1:8200

See docs/disaggregation.md.
"""

from __future__ import annotations

import argparse
import json
import re
import urllib.request
from typing import Any

PROMPT = "A router sends a prompt to one engine, and then to another one. " * 12 + "The second engine"


def complete(server: str, **body: Any) -> dict[str, Any]:
    """The answer of `POST /v1/completions`."""
    request = urllib.request.Request(
        f"{server}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def blocks_taken_over(server: str) -> float:
    """How many blocks a server has from others."""
    with urllib.request.urlopen(f"{server}/metrics") as response:
        lines = response.read().decode()
    return sum(
        map(float, re.findall(r'^stepgraph:kv_transfer_blocks_total\{.*direction="received".*\} (\S+)', lines, re.M))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefill", help="address of the engine that computes prompts")
    parser.add_argument("decode", help="address of the one that answers")
    parser.add_argument("--prompt", default=PROMPT)
    options = parser.parse_args()
    # One token: the prompt is what this engine is for. Its answer says where the keys and values are.
    first = complete(
        options.prefill, prompt=options.prompt, max_tokens=1, kv_transfer_params={"do_remote_decode": True}
    )
    before = blocks_taken_over(options.decode)
    answer = complete(
        options.decode,
        prompt=options.prompt,
        max_tokens=32,
        temperature=0,
        kv_transfer_params=first["kv_transfer_params"],
    )
    print(answer["choices"][0]["text"])
    print(f"{blocks_taken_over(options.decode) - before:.0f} blocks came from the first engine")


if __name__ == "__main__":
    main()

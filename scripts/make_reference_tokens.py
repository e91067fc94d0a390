"""Make tests/data/smollm2_greedy.json: what transformers answers, greedily and in float32, to prompts of many kinds and lengths.

    python scripts/make_reference_tokens.py tests/data/smollm2_greedy.json

Every prompt runs alone, through transformers' own GGUF loader and tokenizer; nothing of stepgraph but the place of the file is
used. A prompt whose two best tokens come closer than `MIN_MARGIN` anywhere is dropped: there the order of additions, and not
the model, would decide. Needs the embedded model (`stepgraph pull smollm2`) and accelerate, without which transformers reads
no GGUF file (`pip install --no-deps accelerate`), and takes about three minutes on two cores.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from stepgraph.models.source import packaged_file

NUM_TOKENS = 64
MIN_MARGIN = 1e-3
"""In logits."""

CHATS = (
    "Hi",
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write a haiku about rain on a tin roof.",
    "Give me three tips for sleeping better.",
    "Translate to Spanish: The library opens at nine.",
    "Explain to a child how a bicycle stays upright.",
    "What is 17 times 23? Show the steps.",
    "List five animals that live in the desert, one per line.",
    "Summarise in one sentence: The council met on Monday to discuss the bridge. After two hours it was agreed that repairs "
    "would start in spring, paid for by the toll, and that the ferry would run for free until the work is done.",
    "I have eggs, rice, a leek and soy sauce. What could I cook tonight, and in which order should I do things?",
    "Write a polite e-mail to a landlord whose heating has been broken for a week.",
    "Who wrote Pride and Prejudice, and when was it published?",
    "Schreibe einen Satz über den Herbst. 🍂",
    "Compare a stack with a queue.",
    "My train leaves at 10:45 and the walk to the station takes 25 minutes. When should I leave at the latest?",
)
CODE = (
    "def fibonacci(n):\n",
    "import json\n\ndef read_settings(path):\n    with open(path) as file:\n",
    "SELECT name, COUNT(*) AS orders\nFROM customers\nJOIN",
    "for (int i = 0; i < n; ++i) {\n    for (int j = i + 1; j < n; ++j) {\n        if (a[j] < a[i]) {\n",
    "class Stack:\n    def __init__(self):\n        self._items = []\n\n    def push(self, item):\n        "
    "self._items.append(item)\n\n    def pop(self):\n",
    "# Count the words of a text, most frequent first.\nfrom collections import Counter\n\n",
    "<html>\n  <head>\n    <title>Opening hours</title>\n  </head>\n  <body>\n",
    "fn main() {\n    let numbers = vec![3, 1, 2];\n    let mut sorted = numbers.clone();\n",
    'def is_prime(n: int) -> bool:\n    """Return whether n is a prime number.\n\n    >>> is_prime(7)\n    True\n    """\n',
    "try:\n    value = int(text)\nexcept ValueError:\n",
    "function debounce(callback, delay) {\n  let timer = null;\n  return (...args) => {\n",
    "import numpy as np\n\nx = np.linspace(0, 1, 11)\ny = x ** 2\n\n# Integrate by the trapezoidal rule.\n",
)
PROSE = (
    "Once upon a time",
    "The old lighthouse keeper had not spoken to anyone for three weeks when",
    "Water boils at 100 degrees Celsius at sea level because",
    "In the year 1905, Albert Einstein published",
    "It was the first day of school, and",
    "The three most important ideas of economics are",
)
PROSE_LENGTHS = (
    3,
    5,
    8,
    15,
    16,
    17,
    31,
    50,
    63,
    64,
    65,
    100,
    127,
    129,
    160,
    200,
    256,
    300,
    400,
    481,
    600,
    777,
    900,
    1000,
)
"""Tokens of the slices of Python's own documentation."""


def prompts(tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[str, list[int]]]:
    """Kind and token ids of every candidate."""
    for text in CHATS:
        chat = [{"role": "user", "content": text}]
        yield "chat", tokenizer.encode(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    for text in CODE:
        yield "code", tokenizer.encode(text)
    for text in PROSE:
        yield "prose", tokenizer.encode(text)
    documentation = tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics))[:200_000])
    start = 0
    for length in PROSE_LENGTHS:
        yield "prose", documentation[start : start + length]
        start += length


@torch.no_grad()
def answer(model: Any, prompt: list[int]) -> tuple[list[int], float]:
    """The `NUM_TOKENS` greedy tokens after `prompt`, end tokens or not, and the smallest lead of a winner in logits."""
    tokens: list[int] = []
    margin = float("inf")
    cache, fed = None, prompt
    while len(tokens) < NUM_TOKENS:
        output = model(torch.tensor([fed]), past_key_values=cache, use_cache=True)
        best, second = output.logits[0, -1].topk(2).values.tolist()
        margin = min(margin, best - second)
        cache, fed = output.past_key_values, [int(output.logits[0, -1].argmax())]
        tokens += fed
    return tokens, margin


def main(target: Path) -> None:
    path = packaged_file("smollm2")
    if path is None:
        sys.exit("the embedded model is not installed: run `stepgraph pull smollm2`")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    kept, dropped = [], 0
    for kind, prompt in tqdm(list(prompts(tokenizer))):
        tokens, margin = answer(model, prompt)
        if margin < MIN_MARGIN:
            dropped += 1
            continue
        kept.append({"kind": kind, "margin": round(margin, 5), "prompt": prompt, "tokens": tokens})
    header = {
        "made_by": "scripts/make_reference_tokens.py",
        "model": path.name,
        "reference": f"transformers {transformers.__version__}, torch {torch.__version__}, float32, greedy, one prompt at a time",
        "dropped": f"{dropped} of {dropped + len(kept)} candidates, whose two best tokens came closer than {MIN_MARGIN} logits",
    }
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in header.items()]
    answers = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in kept)
    target.write_text("{\n" + ",\n".join(lines) + f',\n"answers": [\n{answers}\n]\n}}\n')
    print(f"{len(kept)} prompts; {header['dropped']}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Calls of OpenAI's client and what tests of several files know of the tiny model's answers."""

import inspect
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import openai

from stepgraph import LLM, SamplingParams

PROMPT, MESSAGES = "[user]co[assistant]", [{"role": "user", "content": "co"}]
"""The same, as the tiny model's chat template has it. The greedy answer has 19 tokens, the last one the end token; some are no
whole characters, and the letters GYO stand in it."""
ANSWER = SamplingParams(temperature=0, max_tokens=24)
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
REFERENCE = json.loads((Path(__file__).parents[1] / "data/smollm2_greedy.json").read_text())["answers"]
KEY = "a-key-of-this-test"


def generate(llm: LLM, prompt: Any, params: SamplingParams):
    """The one output."""
    [output] = llm.generate(prompt, params, use_tqdm=False)
    return output


def sdk_fields(create, fields: dict[str, Any]) -> dict[str, Any]:
    """As arguments of a method of the client, which takes what the OpenAI API does not know as extra_body."""
    known = inspect.signature(create).parameters
    extra = {name: value for name, value in fields.items() if name not in known}
    return {name: value for name, value in fields.items() if name in known} | {"extra_body": extra}


def complete(client: openai.OpenAI, prompt: Any = PROMPT, **fields):
    """Of the tiny model; greedy, unless `fields` say something else."""
    create = client.completions.create
    return create(model="tiny", prompt=prompt, **sdk_fields(create, {"temperature": 0} | fields))


def chat(client: openai.OpenAI, messages: Any = MESSAGES, **fields):
    """Likewise."""
    create = client.chat.completions.create
    return create(model="tiny", messages=messages, **sdk_fields(create, {"temperature": 0} | fields))


class Streamed:
    """A stream of either endpoint, put together."""

    def __init__(self, chunks):
        self.texts: dict[int, str] = defaultdict(str)
        self.finish_reasons: dict[int, str] = {}
        self.logprobs: dict[int, list[Any]] = defaultdict(list)
        self.usages = []
        self.num_chunks = 0
        for chunk in chunks:
            self.num_chunks += 1
            self.usages.append(chunk.usage)
            for choice in chunk.choices:
                assert choice.index not in self.finish_reasons, "a piece after the end"
                is_chat = hasattr(choice, "delta")
                self.texts[choice.index] += (choice.delta.content or "") if is_chat else choice.text
                if choice.finish_reason is not None:
                    self.finish_reasons[choice.index] = choice.finish_reason
                if choice.logprobs is not None:
                    self.logprobs[choice.index] += (
                        choice.logprobs.content if is_chat else choice.logprobs.token_logprobs
                    )

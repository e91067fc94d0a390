"""The engine's process of `bench busy`: answers lines of JSON with lines of JSON.

Its argument is the engine's settings. The first line is the numbers of rows to come, answered with the machine; each further one
``[rows, seconds]``, answered with the mean time of a decode step in ms.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import count

from stepgraph.bench.report import machine
from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import StepgraphError

_PROMPT, _ANSWER = 16, 64
_FEWEST_STEPS = 4


def step_ms(engine: Engine, rows: int, seconds: float) -> float:
    """Mean time of a step in which `rows` requests decode, over as many steps as begin within `seconds`, four or more. Steps that
    have prompts do not count."""
    params = SamplingParams(temperature=0, max_tokens=_ANSWER, ignore_eos=True)
    vocab, ids = engine.source.config.vocab_size, count()
    steps, taken_s = 0, 0.0
    while steps < _FEWEST_STEPS or taken_s < seconds:
        requests = [
            engine.add_request(str(next(ids)), [(7 * i + 131 * row + 5) % vocab for i in range(_PROMPT)], params)
            for row in range(rows)
        ]
        while not all(request.output_token_ids for request in requests):
            engine.step()
        begin = time.perf_counter()
        while engine.has_work and (steps < _FEWEST_STEPS or taken_s + time.perf_counter() - begin < seconds):
            engine.step()
            steps += 1
        taken_s += time.perf_counter() - begin
        for request in requests:
            engine.abort(request.id)
        while engine.has_work:
            engine.step()
    return 1e3 * taken_s / steps


def main() -> None:
    """See the module."""
    engine = build_engine(EngineConfig.from_settings(**json.loads(sys.argv[1])))
    for rows in json.loads(sys.stdin.readline()):
        step_ms(engine, rows, 0.0)
    print(json.dumps(machine(engine.executor.specs.device)), flush=True)
    for line in sys.stdin:
        rows, seconds = json.loads(line)
        print(json.dumps(step_ms(engine, rows, seconds)), flush=True)


if __name__ == "__main__":
    try:
        main()
    except StepgraphError as error:
        sys.exit(f"error: {error}")

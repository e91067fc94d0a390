"""Puts an engine to sleep with requests under way, wakes it, replaces its weights, and checks that nobody notices.

Prints times and the device's free memory. Answers must be those of an undisturbed run, and no graph may be captured again.

    python scripts/check_sleep.py qwen3-8b      # random weights; on a GPU, needs cuda-bindings
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from stepgraph import LLM, SamplingParams

PROMPTS = [list(range(n, 6 * n)) for n in range(3, 35)]
GREEDY = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)


def main(model: str) -> None:
    """Run the check; raises AssertionError if somebody noticed."""
    # Deterministic, since a request that is computed again runs in other batches.
    llm = LLM(model, load_format="dummy", enable_sleep_mode=True, deterministic=True, max_model_len=512, progress=False)
    engine, graphs = llm.engine, llm.engine.executor.runner.graphs
    expected = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
    weights = {
        name: tensor.detach().cpu().clone()
        for name, tensor in engine.executor.runner.model.checkpoint_tensors().items()
    }
    records = [(record.shape, record.capture_ms) for record in graphs.records()]

    def timed(what: str, call: Callable[[], object]) -> None:
        engine.executor.runner.platform.synchronize()
        before, started = engine.executor.runner.platform.free_memory_bytes(), time.perf_counter()
        call()
        engine.executor.runner.platform.synchronize()
        elapsed, after = time.perf_counter() - started, engine.executor.runner.platform.free_memory_bytes()
        print(f"{what:<24} {elapsed:7.2f} s   free {before / 2**30:7.2f} -> {after / 2**30:7.2f} GiB")

    for level in (1, 2):
        requests = [engine.add_request(f"{level}-{i}", prompt, GREEDY) for i, prompt in enumerate(PROMPTS)]
        for _ in range(20):
            engine.step()
        timed(f"sleep({level})", lambda level=level: llm.sleep(level))
        late = engine.add_request(f"late-{level}", PROMPTS[0], GREEDY)
        timed("wake_up()", llm.wake_up)
        if level == 2:
            timed("update_weights(tensors)", lambda: llm.update_weights(weights.items()))
        while engine.has_work:
            engine.step()
        answers = [tuple(request.output_token_ids) for request in [*requests, late]]
        assert answers == [*expected, expected[0]], "an answer changed"
        assert [(record.shape, record.capture_ms) for record in graphs.records()] == records, (
            "a graph was captured again"
        )
        print(f"{len(answers)} of {len(answers)} answers unchanged, {len(records)} graphs kept")
    timed("shutdown()", llm.shutdown)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "qwen3-0.6b")

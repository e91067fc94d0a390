"""Layers say that their keys and values are in the cache when they are, and only then."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from tiny import drain
from torch import Tensor
from triton_operators import triton_operators

from stepgraph.engine.engine import Engine
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.layers.inputs import StepInputs
from stepgraph.models.decoder_layer import DecoderLayer
from stepgraph.ops.kv_signal import reference
from stepgraph.step.signals import KVSignals
from stepgraph.verify.graphs import verify_graphs

PROMPTS = ([5, 6, 7] * 25, [9, 8], list(range(1, 30)))


@pytest.fixture
def create(create_engine) -> Iterator[Callable[..., Engine]]:
    """Makes engines in host memory, where a graph's operators can be watched."""
    made: list[Engine] = []

    def create(**settings) -> Engine:
        made.append(create_engine(device="cpu", **({"splitwise_role": "prefill"} | settings)))
        return made[-1]

    yield create
    for engine in made:
        engine.shutdown()


def add(engine: Engine, max_tokens: int = 6) -> list:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return [engine.add_request(str(number), prompt, params) for number, prompt in enumerate(PROMPTS)]


def cached(engine: Engine, layer: int) -> list[Tensor]:
    """What the layers have cached that a signal speaks of: the model's layer, or all if it is of the whole step."""
    runner = engine.executor.runner
    caches = runner.caches[layer : layer + 1] if layer < len(runner.layout.model_specs) else runner.caches
    return [tensor.clone() for cache in caches for tensor in cache.block_tensors]


def early_signals(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Serve requests, and hold what each signal speaks of when it is given to what is there at the end of the step. Returns the
    layers that spoke too early."""
    signal, seen, early = reference.kv_signal, dict[int, list[Tensor]](), list[int]()

    def watched(counts: Tensor, words: Tensor, layer: int) -> None:
        if counts[0]:
            assert layer not in seen
            seen[layer] = cached(engine, layer)
        signal(counts, words, layer)

    monkeypatch.setattr(reference, "kv_signal", watched)
    runner = engine.executor.runner
    add(engine)
    while engine.has_work:
        seen.clear()
        before = runner.num_launched
        engine.step()
        assert runner.num_launched - before == bool(seen)
        if seen:
            assert list(seen) == list(range(len(runner.layout.model_specs) + 1))
            assert runner.signals.tensors.words.tolist() == [runner.num_launched] * len(seen)
            early += [
                layer
                for layer, then in seen.items()
                if not all(torch.equal(*pair) for pair in zip(then, cached(engine, layer), strict=True))
            ]
    return early


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("method", ["none", "mtp"])
def test_what_a_signal_speaks_of_is_in_the_cache(create, monkeypatch, method, backend) -> None:
    engine = create(speculative_method=method, graph_backend=backend)
    assert early_signals(engine, monkeypatch) == []
    assert all(engine.executor.runner.signals.has_written(layer, 0) for layer in range(3))
    assert not engine.executor.runner.signals.has_written(0, engine.executor.runner.num_launched)


def test_mutant_a_signal_before_the_write_is_caught(create, monkeypatch) -> None:
    forward = DecoderLayer.forward

    def signals_first(self, stream, cos_sin, caches, inputs, *others) -> None:
        inputs.signals.wrote(next(i for i, other in enumerate(inputs.caches) if other is caches[0]))
        forward(self, stream, cos_sin, caches, inputs, *others)

    monkeypatch.setattr(DecoderLayer, "forward", signals_first)
    monkeypatch.setattr(StepInputs, "wrote", lambda self, layer: None)
    assert {0, 1} <= set(early_signals(create(), monkeypatch))


def test_graphs_that_nobody_watches_have_no_signal(create) -> None:
    for role, number in (("mixed", 0), ("decode", 0), ("prefill", 3)):
        engine = create(splitwise_role=role)
        add(engine)
        drain(engine)
        graphs = [captured.graph for captured in engine.executor.runner.graphs.store.captured]
        assert graphs
        for graph in graphs:
            assert graph.calls.count(torch.ops.stepgraph.kv_signal.default) == number


def test_answers_are_those_of_an_engine_without_signals(create) -> None:
    answers = []
    for role in ("mixed", "prefill"):
        engine = create(splitwise_role=role)
        requests = add(engine)
        drain(engine)
        answers.append([request.output_token_ids for request in requests])
    assert answers[0] == answers[1]


def test_captures_and_checks_are_nobodys_steps(create) -> None:
    engine = create()
    runner = engine.executor.runner
    add(engine)
    engine.step()
    words = runner.signals.tensors.words
    assert words.tolist() == [1, 1, 1]
    while engine.executor.prepare():
        pass
    assert words.tolist() == [1, 1, 1]
    drain(engine)
    num_steps = runner.num_launched
    assert verify_graphs(engine.executor, rounds=1, seed=0)
    assert words.tolist() == [num_steps] * 3
    runner.recover()
    assert words.tolist() == [runner.num_launched] * 3
    add(engine)
    engine.step()
    assert words.tolist() == [runner.num_launched] * 3


def test_mutant_captures_that_count_as_steps_are_caught(create, monkeypatch) -> None:
    engine = create()
    add(engine)
    engine.step()
    runner = engine.executor.runner
    graph = next(captured.graph for captured in runner.graphs.store.captured)
    runner.try_out(graph)
    assert not runner.signals.has_written(0, 1)
    monkeypatch.setattr(KVSignals, "silent", lambda signals: nullcontext())
    runner.try_out(graph)
    assert runner.signals.has_written(0, 1)  # as whoever waits for the second step would see


def test_triton_kernel_counts_as_the_reference(device) -> None:
    for step, layer in ((1, 0), (1, 2), (0, 1)):
        expected = torch.tensor([step, 4, 5, 6]), torch.tensor([4, 5, 6])
        found = tuple(tensor.to(device) for tensor in expected)
        with triton_operators("kv_signal"):
            torch.ops.stepgraph.kv_signal.default(*found, layer)
        reference.kv_signal(*expected, layer)
        assert all(torch.equal(one.cpu(), other) for one, other in zip(found, expected, strict=True))

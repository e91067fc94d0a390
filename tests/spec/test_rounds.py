"""Rounds whose outcome is decreed: how many steps they take, what they leave in the KV cache, and that each is one launch."""

import pytest
import torch
from tiny import VOCAB_SIZE, drain
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from stepgraph.abi import slot_line
from stepgraph.engine.engine import Engine
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.graph.cpu import CpuGraph

PROMPT = [(11 * i * i + 5) % VOCAB_SIZE for i in range(10)]


def speculative(acceptance: float | None = None, num: int = 3, method: str = "mtp") -> dict:
    config = {"method": method, "num_speculative_tokens": num, "adaptive": False}
    return {"speculative_config": config | ({} if acceptance is None else {"acceptance": acceptance})}


def generate(engine: Engine, prompt: list[int], max_tokens: int) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    request = engine.add_request("r", prompt, params)
    drain(engine)
    return request.output_token_ids


def cached(engine: Engine, slot: int, num_tokens: int) -> list[torch.Tensor]:
    """Keys and values of a slot's first tokens, of every layer: [num_tokens, G, D]."""
    position = torch.arange(num_tokens, device=engine.executor.runner.platform.device)
    block = engine.executor.runner.state.block_tables[0][slot, position // engine.executor.runner.block_size].long()
    entry = block * engine.executor.runner.block_size + position % engine.executor.runner.block_size
    return [cache.flatten(0, 1)[entry] for caches in engine.executor.runner.caches for cache in caches.block_tensors]


@pytest.mark.parametrize("num_drafts", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("max_tokens", [1, 2, 9, 21])
def test_if_all_proposals_stand_a_round_yields_one_token_more_than_there_are(create_engine, num_drafts, max_tokens):
    engine = create_engine(graph_backend="eager", **speculative(1.0, num_drafts))
    assert len(generate(engine, PROMPT, max_tokens)) == max_tokens
    # The prompt's step yields a token; a round yields 1 + K, or what is left.
    rounds = -(-(max_tokens - 1) // (1 + num_drafts))
    # Where the host runs ahead, it has planned another by the time it sees the end.
    assert 0 <= engine.executor.statistics.num_steps - (1 + rounds) <= engine.executor.specs.run_ahead


@pytest.mark.parametrize("num_drafts", [1, 5])
def test_if_no_proposal_stands_a_round_yields_one_token(create_engine, num_drafts):
    engine = create_engine(graph_backend="eager", **speculative(0.0, num_drafts))
    assert len(generate(engine, PROMPT, 21)) == 21
    assert 0 <= engine.executor.statistics.num_steps - 21 <= engine.executor.specs.run_ahead


@pytest.mark.parametrize("acceptance", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("num_drafts", [1, 3, 5])
def test_the_cache_holds_what_the_tokens_that_stand_give(create_engine, acceptance, num_drafts):
    """Of the model's layers and the draft module's alike: entries of proposals that fell were overwritten."""
    engine = create_engine(graph_backend="eager", **speculative(acceptance, num_drafts))
    text = PROMPT + generate(engine, PROMPT, 41)
    fresh = create_engine(graph_backend="eager", max_num_batched_tokens=64, capture_sizes=(64,), **speculative())
    generate(fresh, text[:-1], 1)
    # An entry of the draft module depends on the token after: that of the prompt's last is another one in the fresh engine.
    num_tokens = len(text) - 2
    (slot,) = {
        plan_slot for plan_slot in range(1, 9) if engine.executor.runner.state.lines[plan_slot, slot_line.GENERATION]
    }
    found, expected = cached(engine, slot, num_tokens), cached(fresh, slot, num_tokens)
    assert len(found) == 2 * 3, "two layers of the model and one of the draft module"
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class CountOperators(TorchDispatchMode):
    """Operators called outside of graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["mtp", "suffix", "ngram", "hybrid"])
def test_a_round_is_one_launch(create_engine, device, monkeypatch, method):
    if device != "cpu":
        pytest.skip("counts replays of CPU graphs; `stepgraph bench spec --count-launches` counts those of CUDA graphs")
    engine = create_engine(**speculative(0.5, 3, method))
    engine.add_request("r", PROMPT * 2, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    for _ in range(8):  # capture
        engine.step()
    launches = []
    replay = CpuGraph.replay

    def counted(graph: CpuGraph):
        launches.append(graph)
        with _disable_current_modes():
            return replay(graph)

    monkeypatch.setattr(CpuGraph, "replay", counted)
    steps = engine.executor.statistics.num_steps
    with CountOperators() as operators:
        for _ in range(6):
            engine.step()
    assert len(launches) == engine.executor.statistics.num_steps - steps == 6
    assert engine.executor.statistics.num_eager_steps == 0
    others = {name for name in operators.names if "slice" not in name}
    assert others <= {"aten.copy_.default"}, "beside the graph there is the copy of the plan, where that changed"


def test_uneven_numbers_of_proposals_share_a_graph(create_engine):
    """A row that switched speculation off, one that takes one proposal and one that takes all run side by side."""
    engine = create_engine(**speculative(1.0, 3))
    params = SamplingParams(temperature=0, max_tokens=33, ignore_eos=True)
    requests = [
        engine.add_request(
            str(n),
            [n + 1, *PROMPT],
            SamplingParams(temperature=0, max_tokens=33, ignore_eos=True, speculative={"num_speculative_tokens": n}),
        )
        for n in (0, 1, 3)
    ]
    drain(engine)
    assert params.max_num_drafts == slot_line.MAX_DRAFTS
    assert [len(request.accepted) for request in requests] == [0, 16, 24]
    assert 0 <= engine.executor.statistics.num_steps - 33 <= engine.executor.specs.run_ahead
    assert {record.shape.num_drafts for record in engine.executor.runner.graphs.records()} == {3}

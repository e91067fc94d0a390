"""How tokens come to experts: timed once, kept, the same for all ranks, and of no consequence for answers."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from tiny_mixture import TOP, save_tiny_mixture

from stepgraph import LLM, SamplingParams
from stepgraph.cli import main
from stepgraph.config import EngineConfig
from stepgraph.executor import build
from stepgraph.layers.inputs import DispatchTable
from stepgraph.models.loader import create_model
from stepgraph.models.source import resolve
from stepgraph.ops import ExpertDispatch, Routing
from stepgraph.parallel.exchange import alone
from stepgraph.platforms.cpu import CpuPlatform
from stepgraph.step import dispatch as dispatching
from stepgraph.step.dispatch import ONE_WAY, best_table, choose_dispatch, measured, mixtures_of

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [30] * 20]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_mixture(tmp_path_factory.mktemp("mixture"))


def answers(folder: str, **settings) -> list[list[int]]:
    llm = LLM(folder, dtype="float32", device="cpu", num_kv_blocks=64, **settings)
    try:
        outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    finally:
        llm.shutdown()
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def model(folder):
    model = create_model(resolve(folder), dtype=torch.float32, device=torch.device("cpu"), max_model_len=64)
    for parameter in model.parameters():
        parameter.zero_()
    return model


class KeepingPlatform(CpuPlatform):
    """Keeps kernels, and says that it is no CPU."""

    def __init__(self, folder):
        self.kernel_cache = folder
        self.device = SimpleNamespace(type="accelerator")


def choose(model, platform, *, is_leader=True, exchange=alone, **settings) -> DispatchTable | None:
    return choose_dispatch(
        model,
        EngineConfig.from_settings(**settings),
        platform,
        graph_backend="eager",
        token_sizes=(1, 2, 8, 64),
        is_leader=is_leader,
        exchange=exchange,
    )


@pytest.fixture
def clock(monkeypatch, model):
    """What timing finds, by size and way; counts how often somebody times."""
    found = SimpleNamespace(seconds=lambda size, way: 1.0, calls=[])

    def time(trials, platform, graph_backend):
        found.calls.append(sorted(trials))
        for trial in trials.values():
            assert trial()[0].isfinite().all()
        assert model.layers[0].mlp.gate.totals.count_nonzero() > TOP, "all tokens choose the same experts"
        return {(size, way): found.seconds(size, way) for size, way in trials}

    monkeypatch.setattr(dispatching, "_time", time)
    return found


def pairs_up_to(most: int):
    return lambda size, way: 1.0 + ((way == "pairs") == (size > most))


def test_the_threshold_is_where_the_faster_way_changes():
    assert best_table({1: (1.0, 3.0), 2: (2.0, 3.0), 4: (4.0, 3.5), 8: (8.0, 4.0)}).most_pairs_tokens == 2
    assert best_table({1: (4.0, 3.0), 2: (5.0, 3.0)}) == ONE_WAY
    assert best_table({1: (1.0, 3.0), 2: (1.0, 3.0)}).most_pairs_tokens == 2
    assert best_table({}) == ONE_WAY


def test_one_slip_of_the_clock_moves_no_threshold():
    """Tiles seem 2 % faster at 2 tokens, where pairs are twice as fast at 1 and at 4."""
    assert best_table({1: (1.0, 2.0), 2: (1.02, 1.0), 4: (1.0, 2.0), 8: (3.0, 2.0)}).most_pairs_tokens == 4


def test_what_one_start_has_timed_the_next_ones_find(model, clock, tmp_path):
    clock.seconds = pairs_up_to(1)
    platform = KeepingPlatform(tmp_path)
    assert choose(model, platform) == DispatchTable(1)
    assert clock.calls == [[(size, way) for size in (1, 2) for way in ("pairs", "tiles")]], "8 tokens are no candidate"
    clock.seconds = pairs_up_to(2)
    assert choose(model, platform) == DispatchTable(1)
    assert len(clock.calls) == 1
    (file,) = tmp_path.iterdir()
    for damaged in ("", "[]", "{}", '{"most_pairs_tokens": "2"}'):
        file.write_text(damaged)
        assert choose(model, platform) == DispatchTable(2)
        assert json.loads(file.read_text()) == {"most_pairs_tokens": 2}


def test_of_two_that_time_at_once_both_use_what_the_first_has_found(model, clock, tmp_path):
    platform = KeepingPlatform(tmp_path)

    def meanwhile(size, way):
        clock.seconds = pairs_up_to(1)
        assert choose(model, platform) == DispatchTable(1)
        clock.seconds = pairs_up_to(2)
        return clock.seconds(size, way)

    clock.seconds = meanwhile
    assert choose(model, platform) == DispatchTable(1)


def test_other_sizes_are_timed_by_themselves(model, clock, tmp_path, monkeypatch):
    platform = KeepingPlatform(tmp_path)
    choose(model, platform)
    monkeypatch.setattr(dispatching.torch, "__version__", "0.0")
    choose(model, platform)
    monkeypatch.setattr(dispatching, "_digest_of_kernels", lambda: "changed")
    choose(model, platform)
    monkeypatch.setattr(model.layers[0].mlp.gate, "routing", Routing(2))
    choose(model, platform)
    assert len(clock.calls) == len(list(tmp_path.iterdir())) == 4


def test_where_nothing_can_be_kept_each_start_times(model, clock, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    platform = KeepingPlatform(tmp_path / "file")
    clock.seconds = pairs_up_to(2)
    assert choose(model, platform) == choose(model, platform) == DispatchTable(2)
    assert len(clock.calls) == 2
    assert "cannot be kept" in caplog.text


def test_all_ranks_take_what_rank_0_has_timed(model, clock, tmp_path):
    clock.seconds = pairs_up_to(2)
    said = []

    def exchange(value: bytes) -> list[bytes]:
        said.append(value)
        return [said[0], value]

    tables = [choose(model, KeepingPlatform(tmp_path), is_leader=rank == 0, exchange=exchange) for rank in (0, 1)]
    assert tables == [DispatchTable(2)] * 2
    assert len(clock.calls) == 1


def test_settings_that_ask_for_one_way_get_it_untimed(model, clock, tmp_path):
    platform = KeepingPlatform(tmp_path)
    clock.seconds = pairs_up_to(2)
    assert choose(model, platform, deterministic=True) == ONE_WAY
    assert choose(model, platform, expert_parallel_mixed="off") == ONE_WAY
    assert choose(model, CpuPlatform()) == ONE_WAY
    assert choose(torch.nn.Linear(2, 2), platform) is None
    assert clock.calls == []
    assert choose(model, platform, expert_parallel_mixed="on") == DispatchTable(2)


def test_timing_leaves_no_trace(model):
    gates = [mixture.gate for mixture in mixtures_of(model)]
    before = [tensor.clone() for gate in gates for tensor in (gate.weight, gate.totals)]
    table = measured(mixtures_of(model), CpuPlatform(), "cpu", (1, 2))
    assert table.most_pairs_tokens in (0, 1, 2)
    assert all(map(torch.equal, before, [tensor for gate in gates for tensor in (gate.weight, gate.totals)]))


def test_answers_are_equal_with_one_way_and_with_two(folder, monkeypatch):
    """Tokens of float32. With two ways, decoding takes another one than prompts, and than steps of both together."""
    one = answers(folder, expert_parallel_mixed="off")
    seen = set()

    class Noting(DispatchTable):
        def of(self, num_tokens):
            seen.add(super().of(num_tokens))
            return super().of(num_tokens)

    monkeypatch.setattr(build, "choose_dispatch", lambda *_, **__: Noting(2))
    assert answers(folder, expert_parallel_mixed="on", max_num_seqs=2) == one
    assert seen == set(ExpertDispatch)


def test_lists_of_graphs_say_how_tokens_come_to_experts(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(build, "choose_dispatch", lambda *_, **__: DispatchTable(2))
    settings = [folder, "--device", "cpu", "--max-num-seqs", "1", "--max-num-batched-tokens", "4"]
    assert main(["graphs", "list", *settings, "--capture-now"]) == 0
    listed = capsys.readouterr().out
    found = re.findall(r"^(\dx1) .* (\w+)$", listed, re.MULTILINE)
    assert found == [("1x1", "pairs"), ("2x1", "pairs"), ("3x1", "tiles"), ("4x1", "tiles")]
    file = tmp_path / "verified.json"
    assert main(["graphs", "verify", *settings, "--rounds", "1", "--json", str(file)]) == 0
    assert re.findall(r"^ +(\dx1) +(\w+) ", capsys.readouterr().out, re.MULTILINE) == found[::-1]
    assert [graph["dispatch"] for graph in json.loads(file.read_text())["graphs"]] == [way for _, way in found[::-1]]

"""``bench start``: the phases of a real start, seen from outside the process."""

import importlib
import json
from operator import attrgetter

import pytest
from tiny import TINY_SETTINGS

from stepgraph import bench
from stepgraph.bench import start, start_process
from stepgraph.bench.start import Phase, Start, start_once
from stepgraph.bench.start_process import Stopwatch
from stepgraph.errors import ConfigError, StepgraphError


def test_a_watched_function_works_as_before_and_is_noted(monkeypatch) -> None:
    monkeypatch.setattr(json, "dumps", json.dumps)
    monkeypatch.setattr(json.JSONDecoder, "decode", json.JSONDecoder.decode)
    stopwatch = Stopwatch()
    stopwatch.watch("dump", "json", "dumps")
    stopwatch.watch("decode", "json", "JSONDecoder.decode")
    assert json.loads(json.dumps([1])) == [1]
    assert [name for name, _, _ in stopwatch.phases] == ["dump", "decode"]
    assert all(begin <= end for _, begin, end in stopwatch.phases)
    with pytest.raises(TypeError):
        json.dumps({1, 2})
    assert len(stopwatch.phases) == 3, "a phase that fails has taken time, too"


def test_every_phase_is_a_function_that_there_is() -> None:
    for name, module, path in start_process.PHASES:
        assert callable(attrgetter(path)(importlib.import_module(module))), name


@pytest.mark.slow
def test_phases_of_a_start_lie_between_its_begin_and_its_first_token(tiny_model) -> None:
    settings = {"model": tiny_model, "capture": "all"} | TINY_SETTINGS
    begun = start_once(json.dumps({"settings": settings, "prompt_len": 10}))
    assert list(begun.phases)[:2] == ["python", "import"]
    assert {"read config", "weights", "buffers and KV cache", "capture", "first token"} <= set(begun.phases)
    for phase in begun.phases.values():
        assert 0 <= phase.from_s <= phase.from_s + phase.takes_s <= begun.total_s


def test_the_first_start_stands_apart_and_the_others_are_medians(tmp_path, monkeypatch, capsys) -> None:
    def start_in(seconds: float) -> Start:
        phases = {
            "python": Phase(0, 0.1),
            "weights": Phase(0.1, seconds - 0.2),
            "first token": Phase(seconds - 0.1, 0.1),
        }
        return Start(phases, {"device": "some machine"})

    starts = iter([start_in(30), start_in(5), start_in(9), start_in(6)])
    monkeypatch.setattr(start, "start_once", lambda request: next(starts))
    file = tmp_path / "start.json"
    assert bench.main(["start", "smollm2", "--repeats=3", f"--json={file}"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["weights", "0.10", "5.80", "29.80"] in lines
    assert ["in", "all", "6.00", "30.00"] in lines
    assert ["in", "all", "without", "weights", "0.20", "0.20"] in lines
    result = json.loads(file.read_text())
    assert [run["total_s"] for run in (result["first"], *result["warm"])] == pytest.approx([30, 5, 9, 6])


def test_weights_that_were_read_while_graphs_were_captured_count_where_they_stick_out() -> None:
    phases = {"weights": Phase(1, 5), "tokenizer": Phase(0.5, 1), "capture": Phase(2, 3), "first token": Phase(6, 1)}
    assert Start(phases, {}).weights_alone_s == pytest.approx(1.5)


def test_a_start_that_fails_says_so(capfd) -> None:
    with pytest.raises(StepgraphError, match="ended with code 1"):
        start_once("no JSON")
    assert "JSONDecodeError" in capfd.readouterr().err


def test_what_a_start_cannot_do_is_said_in_one_sentence(tiny_model, capfd) -> None:
    settings = {"model": tiny_model} | TINY_SETTINGS | {"max_model_len": 16}
    with pytest.raises(StepgraphError, match="ended with code 1"):
        start_once(json.dumps({"settings": settings, "prompt_len": 20}))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith(("error:", "Traceback"))]
    assert len(lines) == 1
    assert "the prompt has 20 tokens and max_model_len is 16" in lines[0]


def test_no_starts_are_refused() -> None:
    with pytest.raises(ConfigError, match="repeats=0"):
        bench.main(["start", "smollm2", "--repeats=0"])

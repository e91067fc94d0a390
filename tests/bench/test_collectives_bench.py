"""`stepgraph bench collectives` on the CPU."""

import json

import pytest

from stepgraph.bench import main
from stepgraph.bench.collectives import Timing, slowest
from stepgraph.errors import ConfigError


def test_it_checks_and_times_every_case(tmp_path, capsys) -> None:
    path = tmp_path / "collectives.json"
    sizes = ["--hidden-size", "64", "--vocab-size", "301", "--repeats", "1"]
    assert main(["collectives", "--device", "cpu", *sizes, "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["group"] == "shared_memory"
    assert result["ranks"] == 2
    cases = [(timing["collective"], timing["rows"], timing["bytes"]) for timing in result["timings"]]
    assert ("sum + residual + norm", 8, 8 * 64 * 4) in cases
    assert ("norm + gather of tokens", 8, 8 * 64 * 4) in cases
    assert ("sum of own tokens + residual + norm", 8, 8 * 64 * 4) in cases
    assert ("gather of logits", 64, 64 * 151 * 4) in cases
    assert all(timing["us"] > 0 for timing in result["timings"])
    assert "all results are the defined ones" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--ranks", "1"], ["--repeats", "0"], ["--vocab-size", "0"]])
def test_what_measures_nothing_is_refused(flags: list[str]) -> None:
    with pytest.raises(ConfigError, match=flags[0].removeprefix("--").replace("-", "_")):
        main(["collectives", "--device", "cpu", *flags])


def test_a_case_takes_as_long_as_on_its_slowest_rank() -> None:
    ranks = Timing("sum", 1, 8, 2.0), Timing("sum", 1, 8, 3.0)
    assert slowest(ranks) == Timing("sum", 1, 8, 3.0)

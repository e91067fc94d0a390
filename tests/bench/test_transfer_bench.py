"""`bench transfer`: two engines in processes of their own, on the CPU."""

import json

import pytest

from stepgraph.bench import main
from stepgraph.errors import ConfigError


@pytest.mark.slow
def test_prompts_are_taken_over_and_answers_do_not_depend_on_that(tiny_model, tmp_path, capsys) -> None:
    path = tmp_path / "transfer.json"
    settings = "--device cpu --dtype float32 --num-kv-blocks 100 --max-num-seqs 8 --capture-sizes 48 --max-num-batched-tokens 48"
    arguments = ["transfer", "--model", tiny_model, *settings.split(), "--prompt-lens", "100", "--repeats", "1"]
    assert main([*arguments, "--no-load", "--json", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "100 tokens" in shown
    found = json.loads(path.read_text())
    assert found["counts"][1]["failures"] == {}
    assert found["counts"][1]["blocks_received"] >= 2 * 3 * 6  # by layer and whole, warm-ups too
    assert found["counts"][0]["num_leases"] == 0


def test_wrong_numbers_are_refused_before_engines_start() -> None:
    with pytest.raises(ConfigError, match="1 or more"):
        main(["transfer", "--model", "qwen3-0.6b", "--repeats", "0"])

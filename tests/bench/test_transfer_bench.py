"""`bench transfer`: two engines in processes of their own, on the CPU."""

import json

import pytest

from stepgraph.bench import main, transfer
from stepgraph.errors import ConfigError, StepgraphError


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
    assert found["first_tokens"][0]["num_differing"] == 0
    assert found["first_tokens"][0]["fetch_ms"] > 0


def pair(*, is_exact: bool) -> transfer._Pair:
    made = object.__new__(transfer._Pair)  # without engines
    made._is_exact = is_exact
    return made


def test_answers_may_differ_in_16_bits_alone_and_must_be_complete() -> None:
    same, other = list(range(8)), [*range(7), 0]
    for is_exact in (True, False):
        assert not pair(is_exact=is_exact)._compare(100, [same, list(same), same])
        with pytest.raises(StepgraphError, match="do not have 8 tokens"):
            pair(is_exact=is_exact)._compare(100, [same, same, same[:-1]])
    assert pair(is_exact=False)._compare(100, [same, same, other])
    with pytest.raises(StepgraphError, match="differ by how"):
        pair(is_exact=True)._compare(100, [same, other, same])


def test_wrong_numbers_are_refused_before_engines_start() -> None:
    with pytest.raises(ConfigError, match="1 or more"):
        main(["transfer", "--model", "qwen3-0.6b", "--repeats", "0"])

"""What a step of a model with gated delta rules, or with Mamba-2, costs at least."""

from math import prod

import torch

from stepgraph.bench.roofline import ExpertLoad, Operand, operator_cost, step_cost
from stepgraph.models import resolve
from stepgraph.models.registry import ARCHITECTURES


def test_states_are_read_and_written_once_per_row() -> None:
    config = resolve("qwen3.5-9b").config
    model = ARCHITECTURES[config.architecture](
        config, max_model_len=64, dtype=torch.bfloat16, device=torch.device("meta")
    )
    state = 24 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)
    key_values = 8 * 2 * 4 * 256 * 2
    one, longer, two = (step_cost(model, rows) for rows in ([(1, 30)], [(64, 93)], [(1, 30), (1, 50)]))
    assert two.bytes - one.bytes == 2 * state + key_values * 51
    assert longer.bytes - one.bytes == key_values * (63 + 63)


def test_states_of_mamba_are_too() -> None:
    config = resolve("nemotron-3-nano-30b-a3b").config
    model = ARCHITECTURES[config.architecture](
        config, max_model_len=64, dtype=torch.bfloat16, device=torch.device("meta")
    )
    state = 23 * (64 * 128 * 64 * 4 + 3 * 6144 * 2)
    one, two = (step_cost(model, [(1, 30)] * number, loads=[ExpertLoad(6, 6)] * 23) for number in (1, 2))
    assert two.bytes - one.bytes == 2 * state + 6 * 2 * 2 * 128 * 2 * 31


def test_an_operator_reads_and_writes_the_states_of_its_rows_not_of_all_lines() -> None:
    x = Operand("other", (2, 8), 2, True, False)
    for name, line in (("causal_conv", (3, 8)), ("gated_delta", (4, 16, 16)), ("mamba2", (4, 16, 16))):
        states = [Operand("other", (lines, *line), 4, True, True) for lines in (9, 99)]
        few, many = (operator_cost(name, [x, state], [x], [(1, 30), (1, 50)], 4) for state in states)
        assert few == many
        assert few.bytes == 2 * x.bytes + 2 * 2 * prod(line) * 4

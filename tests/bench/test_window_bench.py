"""What a step of a model with windows reads and computes at least."""

import torch

from stepgraph.bench.roofline import attention_flops, step_cost
from stepgraph.layers.inputs import AttentionSpec
from stepgraph.models import resolve
from stepgraph.models.registry import ARCHITECTURES

ROWS = [(1, 1000), (1, 100), (5, 130), (300, 300), (40, 600), (1, 1)]


def test_queries_see_the_last_keys_of_their_window() -> None:
    for window in (0, 1, 7, 128, 5000):
        spec = AttentionSpec(8, 2, 16, 16, window)
        seen = [kv_len - n + j + 1 for n, kv_len in ROWS for j in range(n)]
        expected = sum(min(number, window) if window else number for number in seen)
        assert attention_flops(spec, ROWS, None) == 2 * 8 * 32 * expected, window


def test_gpt_oss_reads_all_keys_in_half_of_its_layers_and_128_in_the_others() -> None:
    config = resolve("gpt-oss-20b").config
    model = ARCHITECTURES[config.architecture](
        config, max_model_len=8, dtype=torch.bfloat16, device=torch.device("meta")
    )
    short, long = (step_cost(model, [(1, keys)]).bytes for keys in (128, 100_000))
    assert long - short == 12 * (100_000 - 128) * 2 * 8 * 64 * 2
    # Of 32 experts, one token takes four, and of the embedding a row.
    experts = 24 * 32 * 2 * (2880 * 3 * 2880 + 3 * 2880)
    whole = sum(parameter.nbytes for parameter in model.parameters()) - 2 * 201088 * 2880
    assert abs(short - (whole - experts * 28 / 32 + 24 * 129 * 2 * 8 * 64 * 2)) < 100

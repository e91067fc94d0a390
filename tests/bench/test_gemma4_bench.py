"""What a step of Gemma 4 costs at least: tables of layers are looked up, and layers that share keys and values write none."""

import pytest
import torch

from stepgraph.bench.roofline import step_cost
from stepgraph.models import resolve
from stepgraph.models.registry import ARCHITECTURES


@pytest.fixture(scope="module")
def models():
    def build(name):
        config = resolve(name).config
        return ARCHITECTURES[config.architecture](
            config, max_model_len=64, dtype=torch.bfloat16, device=torch.device("meta")
        )

    return {name: build(name) for name in ("gemma4-e4b", "gemma4-26b-a4b")}


def test_tables_of_layers_are_not_read_whole(models) -> None:
    model = models["gemma4-e4b"]
    norms = sum(p.numel() for p in model.parameters() if p.dtype == torch.float32)
    table = 262144 * 42 * 256
    weights = 2 * (7_463_013_376 + 42 - table) + 2 * norms
    cached = 2 * 2 * 2 * (35 * 256 + 7 * 512)  # of one token, of all layers
    own = 2 * 2 * 2 * (20 * 256 + 4 * 512)  # of those that have keys and values of their own
    assert step_cost(model, [(1, 30)]).bytes == weights + 30 * cached + own


def test_a_longer_context_costs_what_windows_let_layers_see(models) -> None:
    model = models["gemma4-26b-a4b"]
    short, long = (step_cost(model, [(1, kv_len)]).bytes for kv_len in (1024, 9024))
    assert long - short == 8000 * 5 * 2 * 2 * 2 * 512


def test_a_token_takes_eight_of_128_experts(models) -> None:
    model = models["gemma4-26b-a4b"]
    expert = 3 * 704 * 2816
    norms = sum(p.numel() for p in model.parameters() if p.dtype == torch.float32 and p.ndim == 1)
    routers = 30 * 128 * 2816
    weights = 2 * (25_233_141_760 + 30 - 30 * 120 * expert) + 2 * (norms + routers)
    cached = 31 * 2 * 2 * (25 * 8 * 256 + 5 * 2 * 512)
    assert step_cost(model, [(1, 30)]).bytes == weights + cached

"""A layer of latent attention by itself: how many products its queries and its cache entry take, and what adapters call them."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stepgraph.layers.cache import LatentSpec
from stepgraph.layers.latent_attention import LatentAttention, LatentSizes
from stepgraph.layers.norm import RMSNorm
from stepgraph.parallel.shard import WHOLE

DTYPE, DEVICE = torch.float32, torch.device("cpu")
ENTRY, FIRST = 24, 2
LAYERS = {0: ["norm_linear"], 20: ["norm_linear", "norm_linear"]}
"""Products before `latent_queries`, by the rank of the queries' latent, for one token."""


class Operators(TorchDispatchMode):
    """Writes down the names of stepgraph's operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "stepgraph":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def cached(q_rank: int, num_tokens: int) -> tuple[list[str], torch.Tensor]:
    """The operators that write a step's entries, and the entries."""
    torch.manual_seed(0)
    sizes = LatentSizes(q_rank, kv_rank=16, key_dim=12, rotated_dim=8, value_dim=10, scale=0.2)
    layer = LatentAttention(32, 3, sizes, bias=q_rank > 0, eps=1e-6, shard=WHOLE, dtype=DTYPE, device=DEVICE)
    norm = RMSNorm(32, 1e-6, dtype=DTYPE, device=DEVICE)
    for parameter in (*layer.parameters(), *norm.parameters()):
        parameter.normal_()
    place = torch.arange(num_tokens, dtype=torch.int32)
    tokens = SimpleNamespace(positions=place, kv_slots=FIRST + place)
    inputs = SimpleNamespace(
        tokens=tokens,
        groups=(SimpleNamespace(tokens=tokens),),
        attention={layer.spec: SimpleNamespace(geometry=SimpleNamespace(deterministic=False))},
    )
    [item] = layer.cache_spec(DTYPE).per_block(8)
    cache = LatentSpec(ENTRY, DTYPE).cache([torch.zeros(1, *item.shape)], [])
    with torch.no_grad(), Operators() as called:
        layer.cache_only(norm, torch.randn(5, 32)[:num_tokens], torch.randn(8, 8), cache, inputs)
    return called.names, cache.entries[0, FIRST : FIRST + num_tokens]


@pytest.mark.parametrize("q_rank", LAYERS)
def test_latents_of_queries_and_of_keys_are_one_product(q_rank) -> None:
    """Of more tokens, rows of the queries' latent lie apart, and are normalised before the product with them."""
    names, [first] = cached(q_rank, 1)
    assert names == [*LAYERS[q_rank], "latent_queries"]
    names, entries = cached(q_rank, 4)
    assert names == ["norm_linear", *(["rms_norm", "linear"] if q_rank else []), "latent_queries"]
    torch.testing.assert_close(entries[0], first)
    assert entries.abs().amin() > 0


def test_projections_have_the_names_of_checkpoints() -> None:
    layers = [
        LatentAttention(
            32,
            3,
            LatentSizes(q_rank, 16, 12, 8, 10, 0.2),
            bias=False,
            eps=1e-6,
            shard=WHOLE,
            dtype=DTYPE,
            device=DEVICE,
        )
        for q_rank in LAYERS
    ]
    assert [list(layer.qkv_proj.parts) for layer in layers] == [
        ["q_proj", "kv_a_proj_with_mqa"],
        ["q_a_proj", "kv_a_proj_with_mqa"],
    ]
    assert list(layers[1].q_proj.parts) == ["q_b_proj"]

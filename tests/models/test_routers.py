"""Which experts each family's routers choose, and with which weights, against transformers' own routers."""

import random
from types import SimpleNamespace

import pytest
import torch
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeTopKRouter
from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter

from stepgraph import ops
from stepgraph.models.glm4_moe import deepseek_mixtures
from stepgraph.ops import Routing

HIDDEN, TOKENS = 24, 40


def sizes(rng, *, groups=False):
    """Experts, experts of a token, groups and kept groups."""
    if not groups:
        num_experts = rng.randint(1, 64)
        return num_experts, rng.randint(1, min(8, num_experts)), 1, 1
    size, num_groups = rng.randint(2, 8), rng.randint(1, 8)
    kept = rng.randint(1, num_groups)
    return size * num_groups, rng.randint(1, min(8, size * kept)), num_groups, kept


def fields(num_experts, top, groups, kept, **others):
    """A config for transformers' routers, which differ in the names of fields."""
    named = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), num_experts)
    return SimpleNamespace(
        **named, num_experts_per_tok=top, n_group=groups, topk_group=kept, hidden_size=HIDDEN, **others
    )


def qwen(rng):
    numbers, normalise = sizes(rng), rng.random() < 0.5
    router = Qwen2MoeTopKRouter(fields(*numbers, norm_topk_prob=normalise))
    return router, Routing(numbers[1], normalise=normalise)


def granite(rng):
    numbers = sizes(rng)
    return GraniteMoeTopKRouter(fields(*numbers)), Routing(numbers[1])


def ernie(rng):
    numbers, least = sizes(rng), rng.choice((1e-12, 0.5))
    return Ernie4_5_MoeTopKRouter(fields(*numbers, moe_norm_min=least)), Routing(numbers[1], least_sum=least)


def deepseek_v2(rng):
    method = rng.choice(("greedy", "group_limited_greedy"))
    numbers, scale = sizes(rng, groups=method != "greedy"), rng.choice((1.0, 16.0))
    router = DeepseekV2TopkRouter(fields(*numbers, routed_scaling_factor=scale, topk_method=method))
    return router, Routing(
        numbers[1], normalise=False, scale=scale, groups=numbers[2], kept_groups=numbers[3], group_top=1
    )


def deepseek_v3(rng):
    settings = {"norm_topk_prob": rng.random() < 0.5, "routed_scaling_factor": rng.choice((1.0, 2.5))}
    layers = {"moe_intermediate_size": 8, "n_shared_experts": 1, "first_k_dense_replace": 0, "num_hidden_layers": 1}
    config = fields(*sizes(rng, groups=True), **settings, **layers)
    (spec,) = deepseek_mixtures(config, 0)
    return DeepseekV3TopkRouter(config), spec.routing


class Lfm2Router(Lfm2MoeTopKRouter):
    """With the bias that its layer holds."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))

    def forward(self, x):
        return super().forward(x, self.e_score_correction_bias)


def lfm2(rng):
    numbers, normalise, scale = sizes(rng), rng.random() < 0.5, rng.choice((1.0, 2.5))
    settings = {"norm_topk_prob": normalise, "routed_scaling_factor": scale, "use_expert_bias": True}
    routing = Routing(numbers[1], sigmoid=True, normalise=normalise, least_sum=1e-6, scale=scale)
    return Lfm2Router(fields(*numbers, **settings)), routing


ROUTERS = {
    "Mixtral, Granite": granite,
    "Qwen": qwen,
    "ERNIE": ernie,
    "DeepSeek V2": deepseek_v2,
    "DeepSeek V3, GLM": deepseek_v3,
    "LFM2": lfm2,
}


def spread(expert_TK, weight_TK, num_experts):
    """[T, N] weights, 0 of experts that are not chosen."""
    spread_TN = torch.zeros(len(expert_TK), num_experts + 1)
    return spread_TN.scatter_add_(1, expert_TK.long(), weight_TK.float())[:, :num_experts]


def bias_of(router):
    found = [value for name, value in router.state_dict().items() if name.endswith("e_score_correction_bias")]
    return found[0].view(-1) if found else None


@pytest.mark.parametrize("name", ROUTERS)
def test_experts_and_weights_are_those_of_transformers_routers(name) -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    for _ in range(40):
        router, routing = ROUTERS[name](rng)
        weight, bias, x = router.weight.detach().normal_(0, 0.5), bias_of(router), torch.randn(TOKENS, HIDDEN)
        if bias is not None:
            bias.normal_(0, 0.3)
        with torch.no_grad():
            _, expected_weight, expected = router(x)
        num_experts = len(weight)
        totals, counts = torch.zeros(num_experts, dtype=torch.int64), torch.tensor([TOKENS], dtype=torch.int32)
        chosen = ops.route(x, weight, bias, counts, totals, routing)
        found = spread(*chosen, num_experts)
        torch.testing.assert_close(found, spread(expected, expected_weight, num_experts), atol=1e-6, rtol=1e-5)
        assert torch.equal(totals, torch.bincount(expected.flatten(), minlength=num_experts))
        if bias is not None and routing.top < num_experts:
            forgetful = ops.route(x, weight, None, counts, totals, routing)
            assert not torch.equal(spread(*forgetful, num_experts), found)


def check_padding(route) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(8, HIDDEN), torch.randn(8), torch.randn(12, HIDDEN)
    counts, routing = torch.tensor([3, 0, 4], dtype=torch.int32), Routing(3, sigmoid=True, groups=4, kept_groups=2)
    real = torch.tensor([True, True, True, False, *[False] * 4, *[True] * 4])
    found = []
    for poison in (0.0, torch.nan):
        x[~real] = poison
        totals = torch.zeros(8, dtype=torch.int64)
        found.append((*route(x, weight, bias, counts, totals, routing), totals))
        assert totals.sum() == 3 * real.sum()
        assert (found[-1][0][~real] == 8).all()
        assert (found[-1][1][~real] == 0).all()
    assert all(map(torch.equal, *found))


def test_padding_reaches_no_expert_whatever_it_holds() -> None:
    def careless(x, weight, bias, counts, *others):
        return ops.route(x, weight, bias, torch.full_like(counts, 4), *others)

    check_padding(ops.route)
    with pytest.raises(AssertionError):
        check_padding(careless)

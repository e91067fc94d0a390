"""Ranks with tokens of their own that share experts: each gets what one device computes of its tokens."""

import copy

import pytest
import torch
from checkpoints import GEMMA4, MIXTURES, ONE_PART, SIZES, hf_config, random_hf_model
from stepping import BLOCK_SIZE, Stepper
from thread_group import ThreadGroup, run_ranks
from torch import Tensor
from transformers import Glm4MoeConfig, GptOssConfig, LlamaConfig, NemotronHConfig, Qwen2MoeConfig, Qwen3MoeConfig

from stepgraph.errors import ConfigError, ModelError
from stepgraph.layers.experts import ExpertShard, ExpertsSpec, MixtureMLP
from stepgraph.layers.inputs import GroupInputs, StepInputs
from stepgraph.layers.norm import RMSNorm
from stepgraph.layers.residual import ResidualStream
from stepgraph.models import load_model, resolve
from stepgraph.ops import Routing, StepTokens
from stepgraph.parallel.group import GatheredTokens
from stepgraph.parallel.shard import Shard

EXPERTS = {"num_experts_per_tok": 3, "moe_intermediate_size": 36, "norm_topk_prob": True}
MODELS = {
    "qwen3 with a dense layer": lambda: Qwen3MoeConfig(
        **SIZES | EXPERTS | {"num_hidden_layers": 3}, num_experts=12, mlp_only_layers=[1]
    ),
    "a shared expert with a gate": lambda: Qwen2MoeConfig(
        **SIZES | EXPERTS, num_experts=12, shared_expert_intermediate_size=40
    ),
    "groups, bias and a shared expert": lambda: Glm4MoeConfig(
        **SIZES | EXPERTS, n_routed_experts=12, n_group=4, topk_group=2, n_shared_experts=1, first_k_dense_replace=1
    ),
    "biases of experts and of logits": lambda: GptOssConfig(
        **SIZES, num_local_experts=12, num_experts_per_tok=3, head_dim=16, sliding_window=24
    ),
    "no gates, between projections, with states": lambda: NemotronHConfig(**ONE_PART | MIXTURES, moe_latent_size=24),
    "experts beside a dense part": lambda: hf_config(
        "Gemma4TextConfig",
        **GEMMA4,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=12,
        top_k_experts=3,
        moe_intermediate_size=36,
    ),
}
STEPS = [(8, (5, 0, 8, 1)), (8, (0, 0, 3, 8)), (1, (1, 0, 0, 0)), (2, (0, 0, 0, 0)), (30, (29, 1, 0, 30))]
"""Rows of a step, on all ranks, and how many of them are tokens on each."""


class PaddedStepper(Stepper):
    """Steps of more rows than tokens. What padding is embedded as is NaN."""

    def step(self, token_ids: list[int], num_rows: int | None = None) -> Tensor:
        """Logits of the tokens. Without tokens, the step is that of a plan of zeros."""
        count = len(token_ids)
        tokens = self._padded(self.build(token_ids), count, num_rows or count)
        embed = self.model.embed
        self.model.embed = lambda ids_T: torch.where(torch.arange(len(ids_T))[:, None] < count, embed(ids_T), torch.nan)
        try:
            return self.run(tokens)[:count]
        finally:
            del self.model.embed

    def _padded(self, tokens: StepTokens, count: int, num_rows: int) -> StepTokens:
        padding = torch.zeros(num_rows - count, dtype=torch.int32)
        longer = {name: torch.cat([getattr(tokens, name), padding]) for name in ("token_ids", "positions", "kv_slots")}
        row_slot = tokens.row_slot if count else torch.zeros_like(tokens.row_slot)
        return tokens._replace(**longer, row_slot=row_slot, kv_len=tokens.kv_len * (count > 0))


def load(path, **settings):
    settings = {"dtype": torch.float32, "max_model_len": 64, "device": torch.device("cpu")} | settings
    return load_model(resolve(str(path)), **settings)


def tokens_of(rank: int) -> list[int]:
    return [(7 * i + 31 * rank + 3) % 96 for i in range(64)]


def run_steps(model, rank: int, *, padded: bool) -> tuple[Tensor, list[int]]:
    """Logits of a rank's tokens, and how often each expert of all layers was chosen."""
    stepper, tokens, found = PaddedStepper(model, 64), tokens_of(rank), []
    for num_rows, counts in STEPS:
        now, tokens = tokens[: counts[rank]], tokens[counts[rank] :]
        if now or padded:
            found.append(stepper.step(now, num_rows if padded else None))
    gates = [module.gate for module in model.modules() if isinstance(module, MixtureMLP)]
    return torch.cat(found), torch.stack([gate.totals for gate in gates]).flatten().tolist()


@pytest.fixture(params=MODELS, scope="module")
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    random_hf_model(MODELS[request.param]()).save_pretrained(path)
    return path


@pytest.mark.parametrize("size", [2, 3, 4])
def test_each_rank_gets_what_one_device_computes_of_its_tokens(folder, size) -> None:
    alone = [run_steps(load(folder), rank, padded=False) for rank in range(size)]
    totals = [sum(numbers) for numbers in zip(*(totals for _, totals in alone), strict=True)]

    def run(group):
        model = load(folder, expert_group=group)
        assert model.group is None
        kept = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        return *run_steps(model, group.shard.rank, padded=True), kept, group.calls

    ranks, again = run_ranks(size, run), run_ranks(size, run)
    whole = sum(p.numel() for name, p in load(folder).named_parameters() if ".experts." in name)
    for rank, (logits, found_totals, kept, calls) in enumerate(ranks):
        torch.testing.assert_close(logits, alone[rank][0], atol=2e-4, rtol=1e-4)
        assert torch.equal(logits, again[rank][0])
        assert found_totals == totals, "of all ranks' tokens, and of no padding"
        assert kept * size == whole
        assert calls == ranks[0][3], "in the same order, whoever has tokens"


class Mutant(ThreadGroup):
    """Exchanges tokens in a wrong way."""

    def __init__(self, group: ThreadGroup, kind: str) -> None:
        self.__dict__ |= group.__dict__
        self.kind = kind

    def gather_tokens(self, x_TE, count_1, *, norm=None):
        if self.kind == "counts are not sent":
            count_1 = torch.full_like(count_1, x_TE.shape[0])
        x_AE, counts_N = super().gather_tokens(x_TE, count_1, norm=norm)
        if self.kind == "rows of ranks are exchanged":
            x_AE = torch.cat(x_AE.chunk(self.shard.size)[::-1])
        return GatheredTokens(x_AE, counts_N)

    def scatter_sum(self, part_AE, counts_N, residual_TE, **options):
        if self.kind == "sums of ranks are exchanged":
            part_AE = torch.cat(part_AE.chunk(self.shard.size)[::-1])
        return super().scatter_sum(part_AE, counts_N, residual_TE, **options)


def is_right(folder, kind: str) -> bool:
    """Whether two ranks get what one device computes."""

    def run(group: ThreadGroup) -> tuple[Tensor, list[int]]:
        return run_steps(load(folder, expert_group=Mutant(group, kind)), group.shard.rank, padded=True)

    alone = [run_steps(load(folder), rank, padded=False) for rank in range(2)]
    totals = [sum(numbers) for numbers in zip(*(totals for _, totals in alone), strict=True)]
    return all(
        torch.allclose(logits, expected, atol=2e-4, rtol=1e-4) and found == totals
        for (logits, found), (expected, _) in zip(run_ranks(2, run), alone, strict=True)
    )


def test_a_wrong_exchange_is_noticed(tmp_path) -> None:
    random_hf_model(MODELS["qwen3 with a dense layer"]()).save_pretrained(tmp_path)
    assert is_right(tmp_path, "none is wrong")
    for kind in ("counts are not sent", "rows of ranks are exchanged", "sums of ranks are exchanged"):
        assert not is_right(tmp_path, kind), kind


WIDTH = 32
SPEC = ExpertsSpec(6, 16, Routing(2), shared_intermediate_size=24)


def mixture(shard: Shard, whole: MixtureMLP | None = None) -> MixtureMLP:
    settings = {"activation": "silu", "shard": Shard(), "dtype": torch.float32, "device": torch.device("cpu")}
    layer = MixtureMLP(SPEC, WIDTH, expert_shard=ExpertShard(experts=shard), **settings)
    if whole is None:
        torch.manual_seed(1)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return layer
    kept = slice(layer.experts.first, layer.experts.first + layer.experts.count)
    for name, parameter in layer.named_parameters():
        value = whole.get_parameter(name)
        if ".experts." in f".{name}" and "shared" not in name:
            value = value.view(SPEC.num_experts, -1, value.shape[1])[kept].flatten(0, 1)
        parameter.copy_(value)
    return layer


def inputs_of(count: int) -> StepInputs:
    query_start = torch.tensor([0, count], dtype=torch.int32)
    none = torch.zeros(0, dtype=torch.int32)
    tokens = StepTokens(none, none, none, none, query_start, none)
    return StepInputs(tokens, {}, (GroupInputs(none, tokens, BLOCK_SIZE),), ())


@pytest.mark.parametrize("post", [False, True])
def test_what_comes_after_the_sum_is_as_on_one_device(post) -> None:
    """The multiplier, a norm of what is added, a scale, and the norm of the next reader; the stream was read before, and added
    to."""
    counts, rows = (3, 0, 7), 7
    norms = [RMSNorm(WIDTH, 1e-6, dtype=torch.float32, device=torch.device("cpu")) for _ in range(3)]
    with torch.no_grad():
        for index, norm in enumerate(norms):
            torch.nn.init.normal_(norm.weight, 1.0, 0.2, generator=torch.Generator().manual_seed(index))
        whole = mixture(Shard())
    before, after, post_norm = norms[0], norms[1], norms[2] if post else None

    def run(layer: MixtureMLP, stream: ResidualStream, count: int) -> tuple[Tensor, Tensor]:
        norms = {"post_norm": post_norm, "next_norm": after}
        for scale_1 in (None, torch.tensor([0.7])):
            layer.add_to(stream, before, inputs_of(count), multiplier=0.5, **norms, scale_1=scale_1)
            stream.add_part(torch.ones(rows, WIDTH), multiplier=1.0, post_norm=None, next_norm=after)
        changed = stream.normalised(after)[:count]
        layer.add_to(stream, after, inputs_of(count), multiplier=0.5, post_norm=post_norm, next_norm=before)
        return torch.cat([changed, stream.normalised(before)[:count]]), stream.residual_TE[:count]

    residuals = [torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rank)) for rank in range(3)]

    def run_rank(group: ThreadGroup) -> tuple[Tensor, Tensor]:
        rank = group.shard.rank
        return run(mixture(group.shard, whole), ResidualStream(residuals[rank].clone(), None, group), counts[rank])

    with torch.no_grad():
        for rank, found in enumerate(run_ranks(3, run_rank)):
            alone = run(copy.deepcopy(whole), ResidualStream(residuals[rank].clone(), None), counts[rank])
            torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)


def test_numbers_of_ranks_that_cannot_share_the_experts_are_refused(tmp_path) -> None:
    random_hf_model(MODELS["qwen3 with a dense layer"]()).save_pretrained(tmp_path / "experts")
    random_hf_model(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "dense")
    group = ThreadGroup(0, [None] * 5, None)
    with pytest.raises(ModelError, match=r"5 devices cannot share the 12 experts .* can: 1, 2, 3, 4, 6, 12\."):
        load(tmp_path / "experts", expert_group=group)
    for settings in ({}, {"model_impl": "transformers"}):
        with pytest.raises(ConfigError, match="needs a native model with experts"):
            load_model(
                resolve(str(tmp_path / "dense"), **settings),
                dtype=torch.float32,
                max_model_len=64,
                device=torch.device("cpu"),
                expert_group=group,
            )

"""config.json as published with well-known models, often in the form that older transformers wrote."""

import json
import math
from pathlib import Path

import pytest
import torch

from stepgraph.models import resolve
from stepgraph.models.registry import ARCHITECTURES

PUBLISHED = json.loads((Path(__file__).parents[1] / "data" / "published_configs.json").read_text())
MINICPM3_FACTORS = [
    *(1.0591234137867171, 1.1241891283591912, 1.2596935748670968, 1.5380380402321725, 2.093982484148734),
    *(3.1446935121267696, 4.937952647693647, 7.524541999994549, 10.475458000005451, 13.062047352306353),
    *(14.85530648787323, 15.906017515851266, 16.461961959767827, 16.740306425132907, 16.87581087164081),
    16.940876586213285,
]


@pytest.fixture
def config_of(tmp_path):
    def read(name: str):
        (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]["config"]))
        return resolve(str(tmp_path)).config

    return read


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_model_has_as_many_parameters_as_the_published_one(config_of, name) -> None:
    config = config_of(name)
    model = ARCHITECTURES[config.architecture](config, max_model_len=8, dtype=config.dtype, device=torch.device("meta"))
    assert config.dtype == torch.bfloat16
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]["parameters"]


def test_gemma_3_has_windows_and_another_rotary_base_in_five_of_six_layers(config_of) -> None:
    config = config_of("google/gemma-3-1b-it")
    assert config.windows == (*[512, 512, 512, 512, 512, 0] * 4, 512, 512)
    bases = [rope.inv_freq[1] ** (-256 / 2) for rope in config.ropes]
    assert bases == pytest.approx([1e4 if window else 1e6 for window in config.windows], rel=1e-3)
    assert config.attention_scale == 1 / 16
    assert config.eos_token_ids == (1, 106)


def test_phi_4_mini_rotates_three_quarters_of_a_head_with_the_factors_of_the_context_length(config_of) -> None:
    config = config_of("microsoft/Phi-4-mini-instruct")
    (rope,) = set(config.ropes)
    assert (len(rope.inv_freq), rope.original_length, config.head_dim) == (48, 4096, 128)
    assert rope.long_inv_freq == tuple(f / 2 for f in rope.inv_freq)
    assert rope.scale == pytest.approx((1 + 5 / 12) ** 0.5)  # sqrt(1 + ln 32 / ln 4096)
    assert set(config.windows) == {0}


def test_smollm_3_leaves_every_fourth_layer_without_positions(config_of) -> None:
    config = config_of("HuggingFaceTB/SmolLM3-3B")
    assert [bool(rope.inv_freq) for rope in config.ropes] == [True, True, True, False] * 9
    assert set(config.windows) == {0}


def test_ernies_and_glms_first_layer_is_dense_and_half_of_glms_heads_is_rotated(config_of) -> None:
    ernie, glm = (config_of(name) for name in ("baidu/ERNIE-4.5-21B-A3B-PT", "zai-org/GLM-4.5-Air"))
    for config, top in ((ernie, 6), (glm, 8)):
        assert config.mixture(0) is None
        assert {config.mixture(layer).routing.top for layer in range(1, config.num_layers)} == {top}
        assert config.num_mtp_modules == 1
    assert (ernie.mixture(1).shared_intermediate_size, glm.mixture(1).shared_intermediate_size) == (3072, 1408)
    assert {len(rope.inv_freq) for rope in glm.ropes} == {32}


def test_deepseek_scales_scores_by_yarn_and_not_the_rotation(config_of) -> None:
    for name, weight in (("deepseek-ai/DeepSeek-V2-Lite", 0.707), ("deepseek-ai/DeepSeek-R1", 1.0)):
        config = config_of(name)
        (rope,) = set(config.ropes)
        assert (len(rope.inv_freq), rope.scale, config.interleaved_rope) == (32, 1.0, True)
        assert config.latent.scale == pytest.approx((0.1 * weight * math.log(40) + 1) ** 2 / 192**0.5)


def test_deepseek_chooses_experts_within_groups_from_the_second_or_fourth_layer_on(config_of) -> None:
    names = (
        "deepseek-ai/DeepSeek-V2-Lite",
        "deepseek-ai/DeepSeek-V2",
        "deepseek-ai/DeepSeek-R1",
        "zai-org/GLM-4.7-Flash",
    )
    routings = []
    for name, num_dense in zip(names, (1, 1, 3, 1), strict=True):
        config = config_of(name)
        assert [config.mixture(layer) is None for layer in range(5)] == [layer < num_dense for layer in range(5)]
        routings.append(config.mixture(4).routing)
    assert [(r.top, r.sigmoid, r.normalise, r.scale) for r in routings] == [
        (6, False, False, 1.0),
        (6, False, False, 16.0),
        (8, True, True, 2.5),
        (4, True, True, 1.8),
    ]
    assert [(r.groups, r.kept_groups, r.group_top) for r in routings] == [(1, 1, 1), (8, 3, 1), (8, 4, 2), (1, 1, 2)]
    assert [config_of(name).num_mtp_modules for name in names] == [0, 0, 1, 1]


def test_minicpm_3_lengthens_no_context_and_divides_its_angles(config_of) -> None:
    config = config_of("openbmb/MiniCPM3-4B")
    (rope,) = set(config.ropes)
    assert (rope.scale, rope.original_length, rope.long_inv_freq == rope.inv_freq) == (1.0, 32768, True)
    assert [1e4 ** (-i / 16) / f for i, f in enumerate(rope.inv_freq)] == pytest.approx(MINICPM3_FACTORS)
    assert (config.latent.value_dim, config.tie_word_embeddings, config.logits_divisor) == (64, True, 10.0)
    assert not config.interleaved_rope


def test_gpt_oss_has_windows_in_every_other_layer_and_slow_pairs_that_are_32_times_slower(config_of) -> None:
    config = config_of("openai/gpt-oss-20b")
    assert config.windows == (128, 0) * 12
    assert {spec.sinks for spec in config.attention_specs} == {True}
    (rope,) = set(config.ropes)
    assert rope.scale == pytest.approx(0.1 * math.log(32) + 1)
    assert rope.inv_freq[0] == 1.0
    assert rope.inv_freq[-1] == pytest.approx(150000 ** (-62 / 64) / 32)
    (mixture,) = config.kinds_of_mlp
    assert mixture.clamp == (7.0, 1.702)


def test_gemma_2_caps_scores_and_logits(config_of) -> None:
    config = config_of("google/gemma-2-2b-it")
    assert {spec.softcap for spec in config.attention_specs} == {50.0}
    assert (config.logits_softcap, config.attention_scale) == (30.0, 1 / 16)
    assert config.windows == (4096, 0) * 13


def test_nemotron_has_one_part_in_each_layer_and_steps_of_any_size(config_of) -> None:
    config = config_of("nvidia/NVIDIA-Nemotron-Nano-9B-v2")
    layers = range(config.num_layers)
    parts = [(config.has_attention(i), config.has_state(i), config.has_mlp(i)) for i in layers]
    assert {sum(of_layer) for of_layer in parts} == {1}
    assert [i for i in layers if config.has_attention(i)] == [14, 21, 30, 39]
    assert (config.activation, config.mamba.steps, config.mamba.num_groups) == ("relu2", (0.0, math.inf), 8)
    assert {len(rope.inv_freq) for rope in config.ropes} == {0}


def test_granite_4_attends_in_every_tenth_layer_without_rotating(config_of) -> None:
    config = config_of("ibm-granite/granite-4.0-h-small")
    assert [i for i in range(config.num_layers) if config.has_attention(i)] == [5, 15, 25, 35]
    assert {len(rope.inv_freq) for rope in config.ropes} == {0}
    (mixture,) = config.kinds_of_mlp
    assert (mixture.num_experts, mixture.routing.top, mixture.shared_intermediate_size) == (72, 10, 1536)
    assert (config.mamba.width, config.mamba.gate_first, config.logits_divisor) == (8192, True, 16)


def test_falcon_h1_has_both_in_each_layer_and_only_gates_what_is_read(config_of) -> None:
    config = config_of("tiiuae/Falcon-H1-0.5B-Instruct")
    assert all(config.has_attention(i) and config.has_state(i) and config.has_mlp(i) for i in range(config.num_layers))
    assert (config.mamba.width, config.mamba.has_norm) == (1536, False)
    assert config.mamba.multipliers[1] == pytest.approx(1.25 * 0.25)
    assert config.attention_scale == pytest.approx(0.390625 / 8)
    assert (config.part_multipliers.attention, config.part_multipliers.mlp) == (0.9375, 0.5859375)

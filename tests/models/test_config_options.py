"""What a native model's options do at load: rotary tables, head orders, windows, weights held in another form."""

import logging

import pytest
import torch
from checkpoints import HF_CONFIGS, MIXED_LAYERS, SIZES, WINDOW, random_hf_model
from stepping import Stepper
from transformers import Gemma3TextConfig

from stepgraph.layers.rotary import UNROTATED, RotaryFrequencies, cos_sin_table, rotary_order
from stepgraph.models import load_model, resolve

CPU = torch.device("cpu")


def save(hf_config, folder, dtype=torch.float32):
    hf_model = random_hf_model(hf_config).to(dtype)
    hf_model.save_pretrained(folder)
    return hf_model, resolve(str(folder))


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("mistral without window", (0, 0)),
        ("mistral with windows", (WINDOW, WINDOW)),
        ("ministral with windows in some layers", (WINDOW, 0, WINDOW)),
        ("qwen2", (0, 0)),
        ("qwen2 with windows in later layers", (0, WINDOW)),
        ("gemma 3", (WINDOW, 0, WINDOW)),
        ("phi 3 with windows", (WINDOW, WINDOW)),
        ("smollm 3 with windows", (0, WINDOW, 0)),
    ],
)
def test_windows_are_those_of_each_layer(tmp_path, name, windows) -> None:
    _, source = save(HF_CONFIGS[name](), tmp_path)
    assert source.config.windows == windows


@pytest.mark.parametrize(("max_model_len", "factors"), [(64, "short"), (65, "long")])
def test_long_rope_takes_its_factors_from_the_longest_sequence_once(tmp_path, caplog, max_model_len, factors) -> None:
    hf_model, source = save(HF_CONFIGS["phi 4 with long rope"](), tmp_path)
    tokens = [(7 * i + 3) % 96 for i in range(max_model_len)]
    with caplog.at_level(logging.INFO, logger="stepgraph"), torch.no_grad():
        model = load_model(source, dtype=torch.float32, device=CPU, max_model_len=max_model_len)
        expected = hf_model(torch.tensor([tokens])).logits[0]  # transformers decides by the length of each call
    assert f"LongRoPE: {factors} factors for all requests, as max_model_len={max_model_len}" in caplog.text
    stepper = Stepper(model, max_model_len)
    logits = torch.cat([stepper.step(tokens[:20]), stepper.step(tokens[20:])])
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


def test_pairs_without_a_frequency_are_not_rotated_or_scaled() -> None:
    table = cos_sin_table(RotaryFrequencies((0.5,), scale=2.0), 6, 3, CPU)
    angles = torch.tensor([0.0, 0.5, 1.0])
    ones, zeros = torch.ones(3), torch.zeros(3)
    expected = torch.stack((2 * angles.cos(), ones, ones, 2 * angles.sin(), zeros, zeros), dim=1)
    torch.testing.assert_close(table, expected)
    assert torch.equal(cos_sin_table(UNROTATED, 4, 2, CPU), torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 2))


@pytest.mark.parametrize(
    ("num_pairs", "interleaved", "order"),
    [
        (4, False, [0, 1, 2, 3, 4, 5, 6, 7]),
        (4, True, [0, 2, 4, 6, 1, 3, 5, 7]),
        (2, False, [0, 1, 4, 5, 2, 3, 6, 7]),
        (2, True, [0, 2, 4, 5, 1, 3, 6, 7]),
        (0, False, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_dimensions_that_rotate_together_come_to_lie_half_a_head_apart(num_pairs, interleaved, order) -> None:
    assert rotary_order(RotaryFrequencies((1.0,) * num_pairs), 8, interleaved=interleaved).tolist() == order


def test_layers_with_the_same_rotation_share_one_table(tmp_path) -> None:
    _, source = save(HF_CONFIGS["gemma 3"](), tmp_path)
    model = load_model(source, dtype=torch.float32, device=CPU, max_model_len=32)
    assert len(dict(model.named_buffers())) == 2


def test_gemma_in_16_bits_rounds_where_transformers_does(tmp_path) -> None:
    config = Gemma3TextConfig(**SIZES | MIXED_LAYERS | {"hidden_size": 80}, head_dim=32, sliding_window=WINDOW)
    hf_model, source = save(config, tmp_path, torch.bfloat16)
    model = load_model(source, dtype=torch.bfloat16, device=CPU, max_model_len=32)
    tokens = torch.arange(32)
    x = model.embed_tokens(tokens)
    assert model.embed_tokens.multiplier != 80**0.5
    assert torch.equal(x, hf_model.model.embed_tokens(tokens))
    layer, hf_layer = model.layers[0], hf_model.model.layers[0]
    normed, expected = layer.input_layernorm(x), hf_layer.input_layernorm(x)
    assert (
        normed == expected
    ).float().mean() > 0.99  # float32 sums differ in their last bit, which may decide a rounding
    for norm in ("q_norm", "k_norm"):
        weight = 1.0 + getattr(hf_layer.self_attn, norm).weight.float()
        assert torch.equal(getattr(layer.self_attn, norm).weight, weight)
        assert not torch.equal(weight.bfloat16().float(), weight)

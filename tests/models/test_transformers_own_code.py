"""Classes of transformers whose attention or experts are code of their own, with ours in its place: transformers' logits in
chunks and decodes side by side, and what is refused of them."""

import pytest
import torch
import transformers
from checkpoints import SIZES, hf_config, random_hf_model
from test_transformers_model import (
    GPT2_SIZES,
    MAX_MODEL_LEN,
    SEQUENCES,
    STEPS,
    create_runner,
    logits_in_steps,
    refused_config,
    through_transformers,
)

from stepgraph.errors import ModelError
from stepgraph.models import load_model
from stepgraph.models.transformers_interfaces import with_bias
from stepgraph.models.transformers_model import judge

LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16}
LATENT |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "qk_head_dim": 16, "v_head_dim": 16}
BLOOM = {"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4, "seq_length": 256}
DOGE = SIZES | {"pad_token_id": 0}
CHUNKED = {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]}

OWN_CODE = {
    "bloom: ALiBi": lambda: transformers.BloomConfig(**BLOOM),
    "bloom: ALiBi of six heads": lambda: transformers.BloomConfig(**BLOOM | {"hidden_size": 48, "n_head": 6}),
    "dbrx: experts below each other in three matrices": lambda: transformers.DbrxConfig(
        vocab_size=96,
        d_model=64,
        n_heads=4,
        n_layers=2,
        max_seq_len=256,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 2.0},
        ffn_config={"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "doge: a bias of keys by their values": lambda: transformers.DogeConfig(**DOGE, keep_window_size=256),
    "falcon: a list of its own, one key head": lambda: transformers.FalconConfig(**SIZES, alibi=False),
    "falcon: key heads of groups": lambda: transformers.FalconConfig(
        **SIZES, alibi=False, new_decoder_architecture=True, num_kv_heads=2
    ),
    "falcon: ALiBi in bfloat16": lambda: transformers.FalconConfig(**SIZES, alibi=True, multi_query=False),
    "falcon: ALiBi with one key head": lambda: transformers.FalconConfig(**SIZES, alibi=True, multi_query=True),
    "gemma3n: activations above a bound": lambda: transformers.Gemma3nTextConfig(
        **SIZES,
        head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
        activation_sparsity_pattern=[0.9, 0.0],
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=96,
        laurel_rank=8,
        sliding_window=20,
    ),
    "gpt_neo: scores as they are, a local layer": lambda: transformers.GPTNeoConfig(
        vocab_size=96,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        max_position_embeddings=256,
        attention_types=[[["global", "local"], 1]],
        window_size=20,
    ),
    "gpt_neox_japanese": lambda: transformers.GPTNeoXJapaneseConfig(**SIZES),
    "jetmoe: attention of experts": lambda: transformers.JetMoeConfig(
        **SIZES | {"num_attention_heads": 4}, kv_channels=16, num_local_experts=4
    ),
    "llama4: a temperature by positions that it counts itself": lambda: transformers.Llama4TextConfig(
        **SIZES,
        **CHUNKED,
        head_dim=16,
        intermediate_size_mlp=96,
        num_local_experts=4,
        moe_layers=[1],
        floor_scale=8,
        attn_temperature_tuning=True,
        attention_chunk_size=128,
        pad_token_id=0,
    ),
    "longcat_flash: experts that pass tokens through": lambda: transformers.LongcatFlashConfig(
        **SIZES | LATENT | {"num_hidden_layers": 4},
        num_layers=2,
        n_routed_experts=4,
        zero_expert_num=3,
        moe_topk=3,
        expert_ffn_hidden_size=32,
        head_dim=8,
    ),
    "mpt: ALiBi of six heads": lambda: transformers.MptConfig(
        vocab_size=96, d_model=48, n_heads=6, n_layers=2, max_seq_len=256
    ),
    "openai-gpt": lambda: transformers.OpenAIGPTConfig(**GPT2_SIZES),
    "xglm": lambda: transformers.XGLMConfig(
        vocab_size=96,
        d_model=64,
        ffn_dim=96,
        num_layers=2,
        attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=1,
    ),
}
"""What runs, and what is particular about it."""


@pytest.mark.parametrize("name", OWN_CODE)
def test_logits_in_graphs_match_the_class_as_it_is(name, tmp_path, device) -> None:
    hf_model = random_hf_model(OWN_CODE[name]())
    hf_model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = [hf_model(torch.tensor([tokens])).logits[0] for tokens in SEQUENCES]
    runner = create_runner(through_transformers(tmp_path), device)
    found = logits_in_steps(runner, SEQUENCES, STEPS)
    assert len(found) == 10
    for (i, position), logits in found.items():
        torch.testing.assert_close(logits, expected[i][position], atol=2e-4, rtol=1e-4)


REFUSED = {
    "keys chosen by value": (
        lambda: transformers.DogeConfig(**DOGE, keep_window_size=128),
        "of longer sequences it keeps 128 keys .* Give max_position_embeddings 128 at most",
    ),
    "experts by the scores of other tokens": (
        lambda: transformers.DogeConfig(**DOGE, keep_window_size=256, is_moe=True, num_experts=16),
        r"chosen by the scores of other tokens, too \(is_moe\)",
    ),
    "keys of the last loop": (
        lambda: hf_config(
            "DoryConfig", **SIZES, head_dim=16, n_input_layers=1, n_output_layers=0, recurrent_kv_cache_mode="last_loop"
        ),
        '"last_loop".*With "per_loop" it runs',
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_with_the_reason_before_weights_are_read(name) -> None:
    config, message = REFUSED[name]
    with pytest.raises(ModelError, match=message):
        judge(refused_config(config()))


def test_chunks_of_attention_bound_the_context() -> None:
    config = OWN_CODE["llama4: a temperature by positions that it counts itself"]()
    assert judge(refused_config(config)).max_position_embeddings == 128


def test_keys_that_hold_a_bias_are_not_kept_in_8_bits(tmp_path) -> None:
    config = OWN_CODE["bloom: ALiBi"]()
    config.architectures = ["BloomForCausalLM"]
    config.save_pretrained(tmp_path)
    settings = {"dtype": torch.float32, "device": torch.device("cpu"), "max_model_len": MAX_MODEL_LEN}
    model = load_model(through_transformers(tmp_path), load_format="dummy", **settings)
    assert {spec.head_dim for spec in model.cache_specs(torch.bfloat16)} == {24}
    with pytest.raises(ModelError, match=r"cannot keep its keys in 8 bits.*leave kv_cache_dtype at auto"):
        model.cache_specs(torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_dtype_rounds_a_bias_off(dtype) -> None:
    bias_HT = torch.rand(4, 50) * 1000
    query, key, value = (
        torch.randn(1, 4, 50, 16).to(dtype),
        torch.randn(1, 2, 50, 16).to(dtype),
        torch.randn(1, 2, 50, 16),
    )
    biased_query, biased_key, values = with_bias(query, key, value, bias_HT)
    scores = biased_query.double() @ biased_key.double().mT
    expected = query.double() @ key.double().repeat_interleave(2, 1).mT + bias_HT.double().unsqueeze(1)
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=0)
    assert values.shape == (1, 4, 50, 16)
    assert biased_key.shape[-1] % 8 == 0

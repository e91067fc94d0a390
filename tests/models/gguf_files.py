"""Writes GGUF files of transformers models, as llama.cpp's converter does."""

import gguf
import numpy as np
import torch

MODEL_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "mlp.gate.e_score_correction_bias": "exp_probs_b",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "self_attn.kv_b_proj.keys": "attn_k_b",
    "self_attn.kv_b_proj.values": "attn_v_b",
}
LATENT = {"deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2", "glm4_moe_lite": "deepseek2", "youtu": "deepseek2"}
"""Architectures of models with latent attention, where the name is not that of transformers."""


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in MODEL_NAMES:
        return f"{MODEL_NAMES[stem]}.{kind}"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{LAYER_NAMES[part]}.{kind}"


def permute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder query or key rows as llama.cpp's converter does: within a head, row i of each half side by side."""
    order = []
    head_dim = len(rows) // num_heads
    for head in range(num_heads):
        for i in range(head_dim // 2):
            order += [head * head_dim + i, head * head_dim + head_dim // 2 + i]
    return rows[order]


def named_matrices(hf_model, split_latents):
    """Views of a model's parameters, of which one may hold the gates and ups of all experts of a layer; and that of latents' keys
    and values in two parts, if these are split."""
    config = hf_model.config
    biases = [item for item in hf_model.named_buffers() if item[0].endswith("e_score_correction_bias")]
    for name, buffer in biases:
        yield f"{name}.bias", buffer
    for name, parameter in hf_model.named_parameters():
        if name.endswith("kv_b_proj.weight") and split_latents:
            heads = parameter.data.unflatten(0, (config.num_attention_heads, -1))
            keys, values = heads.split((config.qk_nope_head_dim, config.v_head_dim), 1)
            stem = name.removesuffix(".weight")
            yield f"{stem}.keys.weight", keys.transpose(1, 2)
            yield f"{stem}.values.weight", values
        elif name.endswith("mlp.experts.gate_up_proj"):
            for part, values in zip(("gate_proj", "up_proj"), parameter.data.chunk(2, dim=1), strict=True):
                yield name.replace("gate_up_proj", f"{part}.weight"), values
        elif name.endswith("mlp.experts.down_proj"):
            yield f"{name}.weight", parameter.data
        elif name.endswith("mlp.shared_expert_gate.weight"):
            yield name, parameter.data[0]
        else:
            yield name, parameter.data


def add_latent_attention(writer, config, *, split) -> None:
    """What a converter writes of latent attention, and of experts beside it; `split`: since it splits that of keys and values."""
    key_length = config.qk_nope_head_dim + config.qk_rope_head_dim
    if config.q_lora_rank:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    if split:
        writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
        writer.add_value_length(config.kv_lora_rank)
        writer.add_key_length_mla(key_length)
        writer.add_value_length_mla(config.v_head_dim)
    else:
        writer.add_key_length(key_length)
        writer.add_value_length(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    rope = config.rope_parameters
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    if hasattr(config, "n_routed_experts"):
        writer.add_expert_count(config.n_routed_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_expert_shared_count(config.n_shared_experts)
        writer.add_expert_weights_scale(config.routed_scaling_factor)
        kinds = getattr(config, "mlp_layer_types", None)
        writer.add_leading_dense_block_count(kinds.count("dense") if kinds else config.first_k_dense_replace)
        if config.n_group:
            writer.add_expert_group_count(config.n_group)
            writer.add_expert_group_used_count(config.topk_group)
        if config.model_type != "deepseek_v2":
            writer.add_expert_weights_norm(config.norm_topk_prob)


def write_gguf(path, hf_model, types=None, *, metadata=(), tensors=None, split_latents=False) -> None:
    """Write `hf_model` as llama.cpp's converter does. `types` gives the type of matrices by a part of their GGUF name;
    the model's own weights are replaced by what the types make of them. `split_latents`: see `add_latent_attention`."""
    config = hf_model.config
    architecture = LATENT.get(config.model_type) or config.model_type.replace("_", "")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1 if split_latents else config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_bos_token_id(config.bos_token_id)
    if config.eos_token_id is not None:
        writer.add_eos_token_id(config.eos_token_id)
    if getattr(config, "kv_lora_rank", None):
        add_latent_attention(writer, config, split=split_latents)
    elif getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if hasattr(config, "moe_intermediate_size") and architecture != "deepseek2":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    for add in metadata:
        add(writer)
    for name, data in (tensors or {}).items():
        writer.add_tensor(name, data)
    for name, values in named_matrices(hf_model, split_latents):
        new_name = gguf_name(name)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(
            new_name.split(".")[-2]
        )
        type_ = next((t for part, t in (types or {}).items() if part in new_name), gguf.GGMLQuantizationType.F32)
        packed = gguf.quants.quantize(values.detach().contiguous().numpy(), type_)
        values.copy_(torch.from_numpy(gguf.quants.dequantize(packed, type_).copy()))
        writer.add_tensor(
            new_name, permute(packed, heads) if heads and architecture == "llama" else packed, raw_dtype=type_
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

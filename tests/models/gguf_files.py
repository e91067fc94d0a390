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
}


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


def named_matrices(hf_model):
    """Views of a model's parameters, of which one may hold the gates and ups of all experts of a layer."""
    for name, parameter in hf_model.named_parameters():
        if name.endswith("mlp.experts.gate_up_proj"):
            for part, values in zip(("gate_proj", "up_proj"), parameter.data.chunk(2, dim=1), strict=True):
                yield name.replace("gate_up_proj", f"{part}.weight"), values
        elif name.endswith("mlp.experts.down_proj"):
            yield f"{name}.weight", parameter.data
        elif name.endswith("mlp.shared_expert_gate.weight"):
            yield name, parameter.data[0]
        else:
            yield name, parameter.data


def write_gguf(path, hf_model, types=None, *, metadata=(), tensors=None) -> None:
    """Write `hf_model` as llama.cpp's converter does. `types` gives the type of matrices by a part of their GGUF name;
    the model's own weights are replaced by what the types make of them."""
    config = hf_model.config
    architecture = config.model_type.replace("_", "")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_bos_token_id(config.bos_token_id)
    if config.eos_token_id is not None:
        writer.add_eos_token_id(config.eos_token_id)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    for add in metadata:
        add(writer)
    for name, data in (tensors or {}).items():
        writer.add_tensor(name, data)
    for name, values in named_matrices(hf_model):
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

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


def write_gguf(path, hf_model, types=None, *, metadata=(), tensors=None) -> None:
    """Write `hf_model` as llama.cpp's converter does. `types` gives the type of matrices by a part of their GGUF name;
    the model's own weights are replaced by what the types make of them."""
    config = hf_model.config
    architecture = config.model_type
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
    for add in metadata:
        add(writer)
    for name, data in (tensors or {}).items():
        writer.add_tensor(name, data)
    for name, parameter in hf_model.named_parameters():
        new_name = gguf_name(name)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(
            new_name.split(".")[-2]
        )
        type_ = next((t for part, t in (types or {}).items() if part in new_name), gguf.GGMLQuantizationType.F32)
        packed = gguf.quants.quantize(parameter.detach().numpy(), type_)
        parameter.data.copy_(torch.from_numpy(gguf.quants.dequantize(packed, type_).copy()))
        writer.add_tensor(
            new_name, permute(packed, heads) if heads and architecture == "llama" else packed, raw_dtype=type_
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

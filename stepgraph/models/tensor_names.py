"""Names of tensors in checkpoints whose makers' code has others than Llama's, for what is the same."""

from __future__ import annotations

import re

from stepgraph.models.text_part import in_decoder

_EXAONE = {
    "wte": "embed_tokens",
    "ln_f": "norm",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.attention.q_proj": "self_attn.q_proj",
    "attn.attention.k_proj": "self_attn.k_proj",
    "attn.attention.v_proj": "self_attn.v_proj",
    "attn.attention.out_proj": "self_attn.o_proj",
    "mlp.c_fc_0": "mlp.gate_proj",
    "mlp.c_fc_1": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
_NAME = re.compile(r"transformer\.(?:h\.(?P<layer>\d+)\.)?(?P<part>.+)\.(?P<kind>\w+)")
_OF_LFM2 = (
    (re.compile(r"^model\.embedding_norm\."), "model.norm."),
    (re.compile(r"\.operator_norm\."), ".input_layernorm."),
    (re.compile(r"\.ffn_norm\."), ".post_attention_layernorm."),
    (re.compile(r"\.self_attn\.out_proj\."), ".self_attn.o_proj."),
    (re.compile(r"\.self_attn\.([qk])_layernorm\."), r".self_attn.\1_norm."),
    (re.compile(r"\.feed_forward\.expert_bias$"), ".mlp.gate.bias"),
    (re.compile(r"\.feed_forward\.w1\."), ".mlp.gate_proj."),
    (re.compile(r"\.feed_forward\.w2\."), ".mlp.down_proj."),
    (re.compile(r"\.feed_forward\.w3\."), ".mlp.up_proj."),
    (re.compile(r"\.feed_forward\."), ".mlp."),
)
_OF_MAMBA = (
    # Bamba's, which Falcon-H1 has too
    (re.compile(r"^model\.final_layernorm\."), "model.norm."),
    (re.compile(r"\.pre_ff_layernorm\."), ".post_attention_layernorm."),
    (re.compile(r"\.feed_forward\.(?=(?:gate|up|down)_proj\.)"), ".mlp."),
    # Nemotron-H's, whose layers have one part each
    (re.compile(r"^backbone\."), "model."),
    (re.compile(r"^model\.embeddings\."), "model.embed_tokens."),
    (re.compile(r"^model\.norm_f\."), "model.norm."),
    (re.compile(r"^(model\.layers\.\d+)\.norm\."), r"\1.input_layernorm."),
    (re.compile(r"\.mixer\.(?=[qkvo]_proj\.)"), ".self_attn."),
    (re.compile(r"\.mixer\.(?=(?:in_proj|conv1d|norm|out_proj)\.|(?:A_log|dt_bias|D)$)"), ".mamba."),
    (re.compile(r"\.mixer\."), ".mlp."),
    # Granite's, beside experts or not
    (re.compile(r"\.shared_mlp\.output_linear\."), ".mlp.shared_experts.down_proj."),
    (re.compile(r"\.shared_mlp\."), ".mlp.shared_experts."),
)
_OF_GEMMA4 = (
    (re.compile(r"^model\.embed_tokens_per_layer\."), "model.per_layer_inputs.embedding."),
    (re.compile(r"^model\.per_layer_model_projection\."), "model.per_layer_inputs.projection."),
    (re.compile(r"^model\.per_layer_projection_norm\."), "model.per_layer_inputs.norm."),
    (re.compile(r"\.per_layer_input_gate\."), ".per_layer.gate."),
    (re.compile(r"\.per_layer_projection\."), ".per_layer.projection."),
    (re.compile(r"\.post_per_layer_input_norm\."), ".per_layer.post_norm."),
    (re.compile(r"(\.layers\.\d+)\.router\.proj\."), r"\1.moe.gate."),
    (re.compile(r"(\.layers\.\d+)\.router\.scale$"), r"\1.moe.router_norm.weight"),
    (re.compile(r"(\.layers\.\d+)\.router\.per_expert_scale$"), r"\1.moe.gate.expert_scale"),
    (re.compile(r"(\.layers\.\d+)\.(?:moe\.)?experts\."), r"\1.moe.experts."),
    (re.compile(r"\.pre_feedforward_layernorm_2\."), ".moe.norm."),
    (re.compile(r"\.post_feedforward_layernorm_1\."), ".moe.dense_post_norm."),
    (re.compile(r"\.post_feedforward_layernorm_2\."), ".moe.post_norm."),
)
_OF_OLMO = (
    (re.compile(r"\.attention_layer_norm\."), ".input_layernorm."),
    (re.compile(r"\.feedforward_layer_norm\."), ".post_attention_layernorm."),
    (re.compile(r"\.linear_attn\.([ab])_proj\."), r".linear_attn.in_proj_\1."),
    (re.compile(r"\.linear_attn\.g_proj\."), ".linear_attn.in_proj_z."),
    (re.compile(r"\.linear_attn\.o_proj\."), ".linear_attn.out_proj."),
    (re.compile(r"\.linear_attn\.o_norm\."), ".linear_attn.norm."),
)
_OF_EXPERTS = (
    # Mixtral's; Granite's has all experts in one tensor
    (re.compile(r"\.block_sparse_moe\."), ".mlp."),
    (re.compile(r"(\.experts\.\d+)\.w1\."), r"\1.gate_proj."),
    (re.compile(r"(\.experts\.\d+)\.w2\."), r"\1.down_proj."),
    (re.compile(r"(\.experts\.\d+)\.w3\."), r"\1.up_proj."),
    (re.compile(r"\.mlp\.input_linear\.weight$"), ".mlp.experts.gate_up_proj"),
    (re.compile(r"\.mlp\.output_linear\.weight$"), ".mlp.experts.down_proj"),
    (re.compile(r"\.mlp\.router\.(?:layer\.)?weight$"), ".mlp.gate.weight"),
    (re.compile(r"\.mlp\.router\.bias$"), ".mlp.gate.logit_bias"),
    # Qwen2's
    (re.compile(r"\.mlp\.shared_expert\."), ".mlp.shared_experts."),
    # ERNIE's, in checkpoints and in memory; DeepSeek's, which GLM has too
    (re.compile(r"\.mlp\.(?:gate\.)?(?:moe_statics\.)?e_score_correction_bias$"), ".mlp.gate.bias"),
)


def native_name(name: str) -> str:
    """The name in native models of a checkpoint's tensor; itself if it is another model's.

    >>> native_name("transformer.h.3.mlp.c_fc_0.weight_scale")
    'model.layers.3.mlp.gate_proj.weight_scale'
    >>> native_name("model.language_model.layers.3.block_sparse_moe.experts.7.w2.weight")
    'model.layers.3.mlp.experts.7.down_proj.weight'
    >>> native_name("model.layers.3.feed_forward.experts.7.w2.weight")
    'model.layers.3.mlp.experts.7.down_proj.weight'
    >>> native_name("model.language_model.layers.3.experts.down_proj")
    'model.layers.3.moe.experts.down_proj'
    """
    name = in_decoder(name)
    match = _NAME.fullmatch(name)
    if match is None or match["part"] not in _EXAONE:
        for pattern, native in (*_OF_LFM2, *_OF_MAMBA, *_OF_OLMO, *_OF_GEMMA4, *_OF_EXPERTS):
            name = pattern.sub(native, name)
        return name
    layer = "" if match["layer"] is None else f"layers.{match['layer']}."
    return f"model.{layer}{_EXAONE[match['part']]}.{match['kind']}"

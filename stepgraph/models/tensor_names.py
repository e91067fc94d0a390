"""Names of tensors in checkpoints whose makers' code has others than Llama's, for what is the same."""

from __future__ import annotations

import re

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


def native_name(name: str) -> str:
    """The name in native models of a checkpoint's tensor; itself if it is another model's.

    >>> native_name("transformer.h.3.mlp.c_fc_0.weight_scale")
    'model.layers.3.mlp.gate_proj.weight_scale'
    """
    match = _NAME.fullmatch(name)
    if match is None or match["part"] not in _EXAONE:
        return name
    layer = "" if match["layer"] is None else f"layers.{match['layer']}."
    return f"model.{layer}{_EXAONE[match['part']]}.{match['kind']}"

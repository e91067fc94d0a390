"""Which configs of models with Mamba-2 run, and the sentences that refuse others."""

import json

import pytest
from checkpoints import HF_CONFIGS

from stepgraph.errors import ModelError
from stepgraph.models import resolve

CLASSES = {
    "bamba": "BambaForCausalLM",
    "falcon h1": "FalconH1ForCausalLM",
    "granite 4.0-h": "GraniteMoeHybridForCausalLM",
    "nemotron h": "NemotronHForCausalLM",
}


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("bamba", {"hidden_act": "gelu_pytorch_tanh"}, "run with silu"),
        ("bamba", {"mamba_n_groups": 3}, "heads must be a multiple of groups"),
        ("bamba", {"mamba_d_state": 0}, "states of 0"),
        ("bamba", {"mamba_d_conv": 1}, "at least 2 tokens"),
        ("bamba", {"time_step_limit": [2.0, 1.0]}, "must be two numbers, the least step and the most"),
        ("bamba", {"attn_layer_indices": None}, "No layer .* is of type full_attention"),
        ("granite 4.0-h", {"layer_types": ["mamba"] * 3}, "No layer .* is of type full_attention"),
        ("granite 4.0-h", {"layer_types": ["mamba", "attention", "conv"]}, "layers of type conv"),
        ("granite 4.0-h", {"num_experts_per_tok": 9}, "number of experts per token is 9"),
        ("nemotron h", {"layers_block_type": ["mamba", "mlp"]}, "No layer .* is of type full_attention"),
        ("nemotron h", {"mlp_hidden_act": "silu"}, "whose layers run with relu2"),
        ("nemotron h", {"mamba_hidden_act": "gelu"}, "whose layers run with silu"),
        ("nemotron h", {"attention_bias": True}, "attention_bias is True .* have no biases here"),
        ("nemotron h", {"mlp_bias": True}, "mlp_bias is True .* have no biases here"),
        ("nemotron h", {"mamba_proj_bias": True}, "mamba_proj_bias is True .* where use_bias says so"),
        ("nemotron h", {"topk_group": 5}, "number of groups that a token's experts are of is 5"),
        ("nemotron h", {"moe_latent_size": -1}, "width of what experts take is -1"),
        ("falcon h1", {"lm_head_multiplier": 0.0}, "must have 5, 2 and one that is not 0"),
        ("falcon h1", {"ssm_multipliers": [1.0] * 4}, "has 4 ssm_multipliers"),
        ("falcon h1", {"attention_bias": True}, r"a bias \(attention_bias\) behind a factor"),
        ("falcon h1", {"mamba_proj_bias": True}, r"a bias \(mamba_proj_bias\) behind a factor"),
        ("falcon h1", {"projectors_bias": True}, "supported in both or none"),
    ],
)
def test_what_is_not_right_is_refused(tmp_path, name, changes, said) -> None:
    config = HF_CONFIGS[name]().to_dict() | {"architectures": [CLASSES[name]]} | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=said):
        resolve(str(tmp_path))

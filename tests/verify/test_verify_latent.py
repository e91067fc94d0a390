"""One captured graph of a model with latent attention against many ways to fill it."""

import json

from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.step.shape import StepShape
from stepgraph.verify.compositions import Composition, Row
from stepgraph.verify.graphs import verify_shape

TOKENS, ROWS = 160, 8
CONFIG = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": 96,
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 2,
    "max_position_embeddings": 256,
}


def test_one_graph_is_right_on_60_partitions_of_160_tokens_into_up_to_3_rows(tmp_path) -> None:
    """`scripts/check_partitions.py --latent` has all 2,214."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    sizes = {"capture_sizes": (8, TOKENS), "capture_rows": (ROWS,), "num_kv_blocks": 65}
    engine = build_engine(
        EngineConfig.from_settings(
            model=str(tmp_path), load_format="dummy", dtype="float32", device="cpu", max_num_seqs=ROWS,
            max_num_batched_tokens=TOKENS, **sizes,
        )
    )  # fmt: skip
    for parameter in engine.executor.runner.model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)  # large enough that every entry and token matters
    partitions = [(a, b, TOKENS - a - b) for a in range(54) for b in range(a, (TOKENS - a) // 2 + 1)]
    assert len(partitions) == 2214
    compositions = [
        Composition(tuple(Row(number, n, number + n) for n in lengths if n), seed=number)  # behind so many tokens
        for number, lengths in enumerate(partitions[:: len(partitions) // 59])
    ]
    report = verify_shape(engine.executor.runner, StepShape(TOKENS, ROWS), compositions, alone_rows=1)
    assert report.compositions == 60
    assert report.mismatches == []
    assert report.worst_graph_difference == 0

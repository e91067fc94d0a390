"""One captured graph of 160 tokens and 8 rows against every way to fill it.

    python scripts/check_partitions.py [--latent] [--device cuda] [--json FILE]

All 2,214 partitions of 160 into up to 3 rows, 2,000 random ones into up to 8, and adversarial ones (all ones and the rest, tile
borders ± 1), each with random contexts, on a random two-layer model whose 5 query heads per KV head and tiles of 64 rows are
those of the batch pair [160, 0] and [80, 80] that needs 13 and 14 tiles. With --latent, the model has latent attention of 5
heads, which are one group, and experts in its second layer. See `stepgraph.verify.graphs` for what is compared.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from stepgraph.bench.report import check_outputs, machine, write_json
from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.step.shape import StepShape
from stepgraph.verify.compositions import Composition, Row
from stepgraph.verify.graphs import verify_shape

TOKENS, ROWS = 160, 8
SIZES = {
    "vocab_size": 257,
    "hidden_size": 160,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
    "bos_token_id": 1,
}
GROUPED = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **SIZES,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
LATENT = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    **SIZES,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "q_lora_rank": None,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "topk_method": "greedy",
    "routed_scaling_factor": 1.0,
}


def query_lengths(rng: random.Random) -> dict[str, list[tuple[int, ...]]]:
    """Row lengths that sum to TOKENS, by family."""
    up_to_3 = {(TOKENS,)} | {tuple(sorted((a, TOKENS - a))) for a in range(1, TOKENS)}
    up_to_3 |= {tuple(sorted((a, b, TOKENS - a - b))) for a in range(1, TOKENS) for b in range(1, TOKENS - a)}
    at_random = []
    for _ in range(2000):
        cuts = sorted(rng.sample(range(1, TOKENS), rng.randint(1, ROWS) - 1))
        at_random.append(tuple(b - a for a, b in zip([0, *cuts], [*cuts, TOKENS], strict=True)))
    adversarial = []
    for rows in range(1, ROWS + 1):
        for length in (1, 11, 12, 13, 14, 25, 26, 27, 38, 39):  # 64 / 5 = 12.8 tokens fill a tile
            rest = TOKENS - length * (rows - 1)
            if rest > 0:
                adversarial += [(*[length] * (rows - 1), rest), (rest, *[length] * (rows - 1))]
    return {"up to 3 rows": sorted(up_to_3), "random": at_random, "adversarial": sorted(set(adversarial))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latent", action="store_true", help="a model with latent attention")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    arguments = parser.parse_args()
    check_outputs(arguments)
    config = LATENT if arguments.latent else GROUPED
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        engine = build_engine(
            EngineConfig.from_settings(
                model=folder,
                load_format="dummy",
                dtype="float32",
                device=arguments.device,
                max_num_seqs=ROWS,
                max_num_batched_tokens=TOKENS,
                capture_sizes=(8, TOKENS),
                capture_rows=(ROWS,),
                num_kv_blocks=257,
            )
        )
    for parameter in engine.executor.runner.model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)  # large enough that every key and token matters
    rng = random.Random(0)
    families = {}
    for family, lengths in query_lengths(rng).items():
        compositions = [
            Composition(
                tuple(Row(c, n, c + n) for n, c in ((n, rng.choice((0, rng.randint(0, 40)))) for n in row_lengths)),
                seed=rng.getrandbits(32),
            )
            for row_lengths in lengths
        ]
        graph_difference = alone_difference = 0.0
        mismatches: list[str] = []
        for composition in tqdm(compositions, desc=family, leave=False, disable=not sys.stderr.isatty()):
            report = verify_shape(engine.executor.runner, StepShape(TOKENS, ROWS), [composition], alone_rows=1)
            graph_difference = max(graph_difference, report.worst_graph_difference)
            alone_difference = max(alone_difference, report.worst_alone_difference)
            mismatches += report.mismatches
        print(
            f"{family}: {len(compositions)} compositions, {len(mismatches)} mismatches, "
            f"graph - eager {graph_difference:.3g}, last row - alone {alone_difference:.3g} (relative)"
        )
        families[family] = {
            "compositions": len(compositions),
            "worst_graph_difference": graph_difference,
            "worst_alone_difference": alone_difference,
            "mismatches": mismatches,
        }
        print(*mismatches[:5], sep="\n", end="\n" if mismatches else "")
    if arguments.json is not None:
        write_json(
            arguments.json,
            {
                "machine": machine(engine.executor.specs.device),
                "tokens": TOKENS,
                "rows": ROWS,
                "model": config,
                "families": families,
            },
        )
    return 1 if any(found["mismatches"] for found in families.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

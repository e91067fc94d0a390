"""Every kind of native model through the engine: captured steps, prompts in chunks beside decodes, against transformers."""

import pytest
import torch
from checkpoints import HF_CONFIGS, random_hf_model

from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.sampling_params import SamplingParams

MODELS = [
    "mistral with windows",
    "ministral with windows in some layers",
    "qwen2 with windows in later layers",
    "qwen3 with windows in some layers",
    "ernie 4.5 with every bias",
    "gemma 3",
    "granite",
    "gpt oss",
    "gemma 2",
    "phi 3 with windows",
    "phi 4 with long rope",
    "smollm 3 with windows",
]
PROMPTS = [[(7 * i + 3) % 96 for i in range(70)], [(5 * i + 11) % 96 for i in range(30)]]


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_the_most_likely_ones_for_transformers_too(name, tmp_path) -> None:
    hf_model = random_hf_model(HF_CONFIGS[name]())
    hf_model.save_pretrained(tmp_path)
    engine = build_engine(
        EngineConfig.from_settings(
            model=str(tmp_path),
            device="cpu",
            dtype="float32",
            graph_backend="cpu",
            max_model_len=128,
            max_num_seqs=2,
            max_num_batched_tokens=32,
            capture_sizes=(2, 32),
            capture_rows=(2,),
            num_kv_blocks=17,
        )
    )
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    requests = [engine.add_request(str(i), prompt, params) for i, prompt in enumerate(PROMPTS)]
    while engine.has_work:
        engine.step()
    assert {reason for _, reason in engine.executor.statistics.steps} == {None}
    assert {str(record.shape) for record in engine.executor.runner.graphs.records()} == {"2x2", "32x2"}
    for prompt, request in zip(PROMPTS, requests, strict=True):
        tokens = request.output_token_ids
        assert len(tokens) == 12
        padded = (prompt + tokens + [0] * 100)[:100]  # LongRoPE goes by the longest sequence here, by the call's there
        with torch.no_grad():
            logits = hf_model(torch.tensor([padded])).logits[0, len(prompt) - 1 :][:12]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(chosen, logits.max(dim=1).values, atol=2e-4, rtol=1e-4)  # a tie may go either way

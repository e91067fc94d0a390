"""The embedded model answers, which a permuted or misread weight would prevent."""

import pytest
import torch
from stepping import greedy

from stepgraph.models import load_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_embedded_model_knows_the_capital_of_france(smollm2, dtype) -> None:
    model = load_model(smollm2, dtype=dtype, device=torch.device("cpu"), max_model_len=128)
    tokenizer = smollm2.tokenizer()
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.encode(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    answer = tokenizer.decode(greedy(model, prompt, 16))
    assert answer.startswith("The capital of France is Paris")


def test_the_embedded_config_is_the_published_one(smollm2) -> None:
    config = smollm2.config
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.max_position_embeddings) == (49152, 8192)
    assert config.tie_word_embeddings
    assert config.rms_norm_eps == pytest.approx(1e-5)
    assert (config.bos_token_id, config.eos_token_ids, config.dtype) == (1, (2,), torch.bfloat16)

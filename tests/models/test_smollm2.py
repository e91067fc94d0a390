"""The embedded model answers, which a permuted or misread weight would prevent."""

import pytest
import torch
from stepping import Stepper, greedy

from stepgraph.models import load_model

ANSWER = "The capital of France is Paris"


def prompt_of(tokenizer) -> list[int]:
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    return tokenizer.encode(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


def load(source, dtype):
    return load_model(source, dtype=dtype, device=torch.device("cpu"), max_model_len=128)


def test_the_embedded_model_knows_the_capital_of_france(smollm2) -> None:
    tokenizer = smollm2.tokenizer()
    answer = tokenizer.decode(greedy(load(smollm2, torch.float32), prompt_of(tokenizer), 16))
    assert answer.startswith(ANSWER)


def test_in_bfloat16_every_token_of_that_answer_is_the_most_likely_up_to_rounding(smollm2) -> None:
    """The first is ahead of another by less than bfloat16 can tell at that size, so that CPUs differ in which they take."""
    tokenizer = smollm2.tokenizer()
    prompt, answer = prompt_of(tokenizer), tokenizer.encode(ANSWER, add_special_tokens=False)
    stepper = Stepper(load(smollm2, torch.bfloat16), 128)
    logits_TV = stepper.run(stepper.build(prompt + answer)).float()[len(prompt) - 1 : -1]
    likely_T = logits_TV.gather(1, torch.tensor(answer)[:, None]).squeeze(1)
    spacing_T = torch.finfo(torch.bfloat16).eps * logits_TV.amax(1).log2().floor().exp2()
    assert (logits_TV.amax(1) - likely_T <= 2 * spacing_T).all()
    assert (logits_TV.argmax(1) == torch.tensor(answer)).float().mean() > 0.8


def test_the_embedded_config_is_the_published_one(smollm2) -> None:
    config = smollm2.config
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.max_position_embeddings) == (49152, 8192)
    assert config.tie_word_embeddings
    assert config.rms_norm_eps == pytest.approx(1e-5)
    assert (config.bos_token_id, config.eos_token_ids, config.dtype) == (1, (2,), torch.bfloat16)

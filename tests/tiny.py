"""A random model small enough to run thousands of steps in a test, in the layout that transformers writes."""

import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"
MAX_MODEL_LEN = 512
VOCAB_SIZE = 257
EOS = 0
TINY_SETTINGS = {
    "dtype": "float32",
    "max_num_seqs": 8,
    "max_num_batched_tokens": 48,
    "capture_sizes": (8, 48),
    "capture_rows": (8,),
    "num_kv_blocks": 257,
}
"""Of an engine that captures two graphs."""


def save_tiny_model(folder: Path, *, num_layers: int = 2) -> str:
    """Write a Llama whose tokenizer has one token per byte, and "<end>". Returns the folder.

    Weights are large enough that another token, position or key anywhere in the context changes the answer.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<end>": EOS} | {c: i for i, c in enumerate(alphabet, start=1)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", chat_template=CHAT_TEMPLATE)
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(alphabet) + 1,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=MAX_MODEL_LEN,
            bos_token_id=None,
            eos_token_id=EOS,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(folder)
    return str(folder)


def drain(engine) -> None:
    """Step until every request has ended, which must happen."""
    for _ in range(5000):
        if not engine.has_work:
            return
        time.sleep(engine.seconds_until_work or 0)
        engine.step()
    raise AssertionError("the requests never end")

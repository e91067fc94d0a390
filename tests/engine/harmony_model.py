"""A tokenizer with the special tokens of gpt-oss, a chat template that does as its does, and a tiny model with both."""

from pathlib import Path

import torch
from small_tokenizers import create_byte_tokenizer
from tokenizers import AddedToken
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stepgraph.engine.harmony import SPELLINGS, HarmonyTokens

HARMONY_TEMPLATE = (
    "{% macro said(who, text, end='<|end|>') %}<|start|>{{ who }}<|message|>{{ text }}{{ end }}{% endmacro %}"
    # the first turn is the developer's, whether it calls itself that or the system
    "{% set rules, turns = '', messages %}{% if messages[0].role in ('system', 'developer') %}"
    "{% set rules, turns = messages[0].content, messages[1:] %}{% endif %}"
    "{{ said('system', 'It is ' ~ strftime_now('%Y') ~ '. Reasoning: ' ~ (reasoning_effort or 'medium')) }}"
    "{% if rules or tools %}<|start|>developer<|message|>{{ rules }}{% for tool in tools or () %}"
    "\n{{ '// ' + tool.function.description + ' ' + tool.function.name }}{% endfor %}<|end|>{% endif %}"
    "{% set ns = namespace(called=none) %}{% for m in turns %}"
    "{% if m.role == 'user' %}{{ said('user', m.content) }}"
    # of a call: one only, its reasoning until the turn has its final answer, in one of two fields
    "{% elif m.role == 'assistant' and m.tool_calls is defined %}"
    "{% if m.content and m.thinking %}{{ raise_exception('reasoning stands in content or in thinking') }}{% endif %}"
    "{% set later = namespace(answered=false) %}{% for n in turns[loop.index:] %}"
    "{% if n.role == 'assistant' and n.tool_calls is not defined %}{% set later.answered = true %}{% endif %}{% endfor %}"
    "{% if (m.content or m.thinking) and not later.answered %}"
    "{{ said('assistant<|channel|>analysis', m.thinking or m.content) }}{% endif %}"
    "{% set ns.called = m.tool_calls[0].function.name %}"
    "{{ said('assistant to=functions.' ~ ns.called ~ '<|channel|>commentary json', "
    "m.tool_calls[0].function.arguments | tojson, '<|call|>') }}"
    "{% elif m.role == 'assistant' %}{% set is_open = loop.last and not add_generation_prompt %}"
    "{% if m.thinking and is_open %}{{ said('assistant<|channel|>analysis', m.thinking) }}{% endif %}"
    "{{ said('assistant<|channel|>final', m.content, '<|return|>' if is_open else '<|end|>') }}"
    "{% elif m.role == 'tool' %}{% if ns.called is none %}{{ raise_exception('a result without a call') }}{% endif %}"
    "{{ said('functions.' ~ ns.called ~ ' to=assistant<|channel|>commentary', m.content | tojson) }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def create_harmony_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, the special ones, and no other."""
    tokenizer = create_byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(text, special=True) for text in SPELLINGS]})
    tokenizer.chat_template = HARMONY_TEMPLATE
    return tokenizer


def tokens_of(tokenizer: PreTrainedTokenizerFast) -> HarmonyTokens:
    tokens = HarmonyTokens.of(tokenizer)
    assert tokens is not None
    return tokens


def save_harmony_model(folder: Path) -> str:
    """Write a random Llama with that tokenizer, whose turns end as those of gpt-oss. Returns the folder."""
    tokenizer = create_harmony_tokenizer()
    tokens = tokens_of(tokenizer)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=tokens.return_,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=[tokens.return_, tokens.call])
    model.save_pretrained(folder)
    return str(folder)

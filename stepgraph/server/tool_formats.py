"""Calls of tools: how families of models write them."""

from __future__ import annotations

from enum import StrEnum

FUNCTION = "<function="


class ToolCallFormat(StrEnum):
    """How a family of models writes calls. There may be whitespace between all parts.

    An object holds a call's `name` and its `arguments` or `parameters`, in any order. Arguments that are a string are the JSON
    text that it holds; those that are missing or null are `{}`.
    """

    HERMES = "hermes"
    """`<tool_call>{"name": "f", "arguments": {...}}</tool_call>`: Hermes, Qwen2.5, Qwen3, SmolLM3 and many others."""
    LLAMA = "llama"
    """`{"name": "f", "parameters": {...}}`, several of them separated by `;`, or a list, at the start of the answer or after
    `<|python_tag|>`: Llama 3.1 and later."""
    MISTRAL = "mistral"
    """`[TOOL_CALLS][{"name": "f", "arguments": {...}}, ...]` or `[TOOL_CALLS]f[ARGS]{...}`, where `[CALL_ID]` and an id may
    follow the name. The marks are special tokens, which the text must not leave out."""
    QWEN3_CODER = "qwen3_coder"
    """`<tool_call><function=f><parameter=a>text</parameter></function></tool_call>`: Qwen3-Coder, Qwen3.5 and 3.6, Nemotron 3.
    The outer tags may be missing."""
    GEMMA4 = "gemma4"
    """`<|tool_call>call:f{name:<|"|>text<|"|>,other:1}<tool_call|>`: Gemma 4. The marks are special tokens too."""

    @property
    def has_special_tokens(self) -> bool:
        """Whether an answer's text shows its calls only with special tokens in it."""
        return self in (ToolCallFormat.MISTRAL, ToolCallFormat.GEMMA4)


MARKS: dict[ToolCallFormat | None, tuple[str, ...]] = {
    ToolCallFormat.HERMES: ("<tool_call>", "</tool_call>"),
    ToolCallFormat.LLAMA: ("<|python_tag|>",),
    ToolCallFormat.MISTRAL: ("[TOOL_CALLS]",),
    ToolCallFormat.QWEN3_CODER: ("<tool_call>", "</tool_call>", FUNCTION),
    ToolCallFormat.GEMMA4: ("<|tool_call>", "<tool_call|>"),
    None: (),
}
"""What stands before calls, after them, and at the beginning of one. Each begins with a character that it has nowhere else."""


def detect_format(chat_template: str | None) -> ToolCallFormat:
    """The format that a chat template shows its model; HERMES if it shows none."""
    template = chat_template or ""
    if "<|tool_call>" in template and "<tool_call|>" in template:
        return ToolCallFormat.GEMMA4
    if FUNCTION in template and "<parameter=" in template:
        return ToolCallFormat.QWEN3_CODER
    if "<tool_call>" in template:
        return ToolCallFormat.HERMES
    if "[TOOL_CALLS]" in template:
        return ToolCallFormat.MISTRAL
    if "<|python_tag|>" in template or "ipython" in template:
        return ToolCallFormat.LLAMA
    return ToolCallFormat.HERMES

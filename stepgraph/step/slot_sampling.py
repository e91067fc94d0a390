"""How the device chooses the tokens of one slot."""

from __future__ import annotations

from dataclasses import dataclass

from stepgraph.abi import slot_line


@dataclass(frozen=True)
class SlotSampling:
    """How a slot's tokens are chosen. Zeros and empty tuples ask for nothing."""

    seed: int  # 64 bits
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()  # at most MAX_STOP_TOKENS
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()  # at most MAX_BIASES
    bad_words: tuple[tuple[int, ...], ...] = ()  # at most MAX_BAD_WORDS of at most BAD_WORD_WIDTH tokens
    masked: bool = False  # only tokens of the slot's mask may be sampled; see `SlotState.set_masks`
    num_logprobs: int = 0  # 1 + n; 0 is none
    num_prompt_logprobs: int = 0
    adapter: int = 0  # number of a LoRA adapter, see `stepgraph.models.adapters`
    memory_key: int = (
        0  # 64 bits; requests of different keys never find each other's answers when they look for proposals
    )
    max_num_drafts: int = slot_line.MAX_DRAFTS  # proposals the request takes; 0 switches speculation off

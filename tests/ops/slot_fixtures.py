"""Lines and side buffers of SlotState for tests."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stepgraph.abi import slot_line as line


def slot_line(
    *,
    length: int = 5,
    computed: int = 4,
    active: bool = True,
    generation: int = 1,
    max_length: int = 1 << 20,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    prompt_length: int = 1,
    min_length: int = 0,
    num_biases: int = 0,
    num_bad_words: int = 0,
    masked: bool = False,
    num_drafts: int = 0,
    max_num_drafts: int = line.MAX_DRAFTS,
    memory_key: int = 0,
    stop_tokens: tuple[int, ...] = (),
) -> Tensor:
    """One line, [LINE_WIDTH] int32. `seed` and `memory_key`: 64 bits, unsigned."""
    line_L = torch.zeros(line.LINE_WIDTH, dtype=torch.int32)
    line_L[line.LENGTH] = length
    line_L[line.COMPUTED] = computed
    line_L[line.ACTIVE] = int(active)
    line_L[line.GENERATION] = generation
    line_L[line.MAX_LENGTH] = max_length
    line_L[line.TOP_K] = top_k
    line_L[line.PROMPT_LENGTH] = prompt_length
    line_L[line.MIN_LENGTH] = min_length
    line_L[line.NUM_BIASES] = num_biases
    line_L[line.NUM_BAD_WORDS] = num_bad_words
    line_L[line.MASKED] = int(masked)
    line_L[line.NUM_DRAFTS] = num_drafts
    line_L[line.MAX_NUM_DRAFTS] = max_num_drafts
    floats_L = line_L.view(torch.float32)
    floats_L[line.TEMPERATURE] = temperature
    floats_L[line.TOP_P] = top_p
    floats_L[line.MIN_P] = min_p
    floats_L[line.REPETITION_PENALTY] = repetition_penalty
    floats_L[line.PRESENCE_PENALTY] = presence_penalty
    floats_L[line.FREQUENCY_PENALTY] = frequency_penalty
    line_L[[line.SEED_LOW, line.SEED_HIGH]] = torch.tensor([seed & 0xFFFFFFFF, seed >> 32]).to(torch.int32)
    line_L[line.MEMORY_KEY : line.MEMORY_KEY + line.MEMORY_KEY_WIDTH] = key_words(memory_key)
    line_L[line.STOP_TOKENS :] = -1
    line_L[line.STOP_TOKENS : line.STOP_TOKENS + len(stop_tokens)] = torch.tensor(stop_tokens, dtype=torch.int32)
    return line_L


def key_words(*keys: int) -> Tensor:
    """Memory keys as `remember` and `lookup` have them: [len(keys), 2] int32, low words first."""
    words = [word for key in keys for word in (key & 0xFFFFFFFF, key >> 32)]
    return torch.tensor(words, dtype=torch.int64).to(torch.int32).view(-1, line.MEMORY_KEY_WIDTH)


def slot_lines(*lines: Tensor) -> Tensor:
    """The null slot's line, then the given ones: [1 + len(lines), LINE_WIDTH] int32."""
    return torch.stack((torch.zeros(line.LINE_WIDTH, dtype=torch.int32), *lines))


@dataclass(frozen=True)
class SamplingSettings:
    """What a slot asks of `process_logits`, and its history."""

    history: tuple[int, ...] = (1,)
    prompt_length: int = 1
    drafts: tuple[int, ...] = ()  # proposals behind the history
    allowed: frozenset[int] | None = None
    allowed_after: tuple[frozenset[int], ...] = ()  # as many proposals, if `allowed` is given
    bad_words: tuple[tuple[int, ...], ...] = ()
    biases: tuple[tuple[int, float], ...] = ()
    stop_tokens: tuple[int, ...] = ()
    min_length: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def line(self, **settings: float) -> Tensor:
        """The slot's line: `settings` are those of `slot_line`."""
        return slot_line(
            length=len(self.history),
            prompt_length=self.prompt_length,
            masked=self.allowed is not None,
            num_bad_words=len(self.bad_words),
            num_biases=len(self.biases),
            stop_tokens=self.stop_tokens,
            min_length=self.min_length,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            **settings,
        )


class SideBuffers(NamedTuple):
    """`tokens`, `biases`, `bad_words` and `masks` of `process_logits`. What no setting names is filled with what would show if
    it were read."""

    tokens: Tensor
    biases: Tensor
    bad_words: Tensor
    masks: Tensor


def side_buffers(slots: Sequence[SamplingSettings], vocab_size: int, max_len: int) -> SideBuffers:
    """Buffers of the null slot and then the given ones."""
    num_slots = 1 + len(slots)
    bias = torch.stack((torch.tensor(2, dtype=torch.int32), torch.tensor(1e9).view(torch.int32)))
    buffers = SideBuffers(
        tokens=torch.full((num_slots, max_len), 3, dtype=torch.int32),
        biases=bias.repeat(num_slots, line.MAX_BIASES, 1),
        bad_words=torch.full((num_slots, line.MAX_BAD_WORDS, line.BAD_WORD_WIDTH), -1, dtype=torch.int32),
        masks=torch.zeros(
            num_slots,
            1 + max(len(asked.allowed_after) for asked in slots),
            -(-vocab_size // line.MASK_BITS),
            dtype=torch.int32,
        ),
    )
    buffers.bad_words[:, :, -1] = 0
    for slot, asked in enumerate(slots, start=1):
        known = (*asked.history, *asked.drafts)
        buffers.tokens[slot, : len(known)] = torch.tensor(known, dtype=torch.int32)
        for i, (token, value) in enumerate(asked.biases):
            buffers.biases[slot, i] = torch.stack(
                (torch.tensor(token, dtype=torch.int32), torch.tensor(value, dtype=torch.float32).view(torch.int32))
            )
        for i, word in enumerate(asked.bad_words):
            buffers.bad_words[slot, i, -len(word) :] = torch.tensor(word, dtype=torch.int32)
        for place, allowed in enumerate((asked.allowed or (), *asked.allowed_after)):
            for token in allowed:
                bit = 1 << token % line.MASK_BITS
                buffers.masks[slot, place, token // line.MASK_BITS] |= bit if bit < 2**31 else bit - 2**32
    return buffers

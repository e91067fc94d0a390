"""Plain torch definition of `process_logits`: a row at a time, over all of the vocabulary. R rows, V entries, L columns of a
slot line."""

import torch
from torch import Tensor

from stepgraph.abi import slot_line as line


def process_logits(
    logits: Tensor,
    row_slot: Tensor,
    offset: Tensor,
    lines: Tensor,
    tokens: Tensor,
    biases: Tensor,
    bad_words: Tensor,
    masks: Tensor,
    counts: Tensor,
    out: Tensor,
) -> None:
    """See `stepgraph.ops.process_logits.process_logits`. Needs no scratch."""
    vocab_size = logits.shape[1]
    entry_V = torch.arange(vocab_size)
    for row, (slot, place) in enumerate(zip(row_slot.tolist(), offset.tolist(), strict=True)):
        x_V = logits[row].float()
        line_L = lines[slot]
        length, prompt_length = int(line_L[line.LENGTH]) + place, int(line_L[line.PROMPT_LENGTH])
        history = tokens[slot, :length].tolist()

        if line_L[line.MASKED]:
            word_V = masks[slot, place, entry_V // line.MASK_BITS]
            x_V = x_V.masked_fill((word_V >> (entry_V % line.MASK_BITS)) & 1 == 0, -torch.inf)
        for padded_word in bad_words[slot, : line_L[line.NUM_BAD_WORDS]].tolist():
            *prefix, last = (token for token in padded_word if token >= 0)
            if history[length - len(prefix) :] == prefix and len(prefix) <= length and last < vocab_size:
                x_V[last] = -torch.inf
        bias_B2 = biases[slot, : line_L[line.NUM_BIASES]]
        for token, bias in zip(bias_B2[:, 0].tolist(), bias_B2.view(torch.float32)[:, 1].tolist(), strict=True):
            if 0 <= token < vocab_size:
                x_V[token] += bias
        if length < line_L[line.MIN_LENGTH]:
            for token in line_L[line.STOP_TOKENS :].tolist():
                if 0 <= token < vocab_size:
                    x_V[token] = -torch.inf

        repetition, presence, frequency = line_L.view(torch.float32)[
            [line.REPETITION_PENALTY, line.PRESENCE_PENALTY, line.FREQUENCY_PENALTY]
        ].tolist()
        if repetition not in (0, 1):
            seen_V = _counts(history, vocab_size) > 0
            x_V = torch.where(seen_V, torch.where(x_V > 0, x_V / repetition, x_V * repetition), x_V)
        sampled_V = _counts(history[prompt_length:], vocab_size)
        if frequency:
            x_V = torch.where(sampled_V > 0, x_V - frequency * sampled_V, x_V)
        if presence:
            x_V = torch.where(sampled_V > 0, x_V - presence, x_V)
        out[row] = x_V


def _counts(tokens: list[int], vocab_size: int) -> Tensor:
    """How often each entry of the vocabulary occurs: [V] int64."""
    return torch.tensor([t for t in tokens if 0 <= t < vocab_size], dtype=torch.int64).bincount(minlength=vocab_size)

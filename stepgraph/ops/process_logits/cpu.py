"""`process_logits` on the CPU: one copy of all rows, then the tokens that a row's settings name are changed in place.

Shapes: R rows, V vocabulary entries, L columns of a slot line, H tokens of history, N tokens named.
"""

import numpy as np
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
    """See `stepgraph.ops.process_logits.process_logits`. Reads tensor values: opaque to a recording. Needs no scratch."""
    out[: logits.shape[0]].copy_(logits)
    lines_RL = lines.index_select(0, row_slot)
    lines_RL[:, line.LENGTH] += offset
    for row in _asks(lines_RL).nonzero().squeeze(1).tolist():
        x_V, line_L, slot, place = out[row], lines_RL[row], int(row_slot[row]), int(offset[row])
        history_H = tokens[slot, : int(line_L[line.LENGTH])]
        if line_L[line.MASKED]:
            x_V.masked_fill_(_is_masked(masks[slot, place], len(x_V)), -torch.inf)
        if num_bad_words := int(line_L[line.NUM_BAD_WORDS]):
            x_V[_within(_completions(bad_words[slot, :num_bad_words], history_H), x_V)] = -torch.inf
        if num_biases := int(line_L[line.NUM_BIASES]):
            _add_biases(x_V, biases[slot, :num_biases])
        if line_L[line.LENGTH] < line_L[line.MIN_LENGTH]:
            x_V[_within(line_L[line.STOP_TOKENS :], x_V)] = -torch.inf
        _penalize(x_V, history_H, line_L)


def _asks(lines_RL: Tensor) -> Tensor:
    """Which rows ask for anything: [R] bool."""
    floats_RL = lines_RL.view(torch.float32)
    repetition_R = floats_RL[:, line.REPETITION_PENALTY]
    return (
        (lines_RL[:, [line.MASKED, line.NUM_BAD_WORDS, line.NUM_BIASES]] != 0).any(1)
        | (lines_RL[:, line.LENGTH] < lines_RL[:, line.MIN_LENGTH])
        | ((repetition_R != 0) & (repetition_R != 1))
        | (floats_RL[:, [line.PRESENCE_PENALTY, line.FREQUENCY_PENALTY]] != 0).any(1)
    )


def _within(token_N: Tensor, x_V: Tensor) -> Tensor:
    """Those of the tokens that are entries of the vocabulary."""
    return token_N[(token_N >= 0) & (token_N < len(x_V))]


def _is_masked(mask_M: Tensor, vocab_size: int) -> Tensor:
    """[V] bool. The words' bits count from the lowest, as little-endian bytes' do."""
    bits_V = np.unpackbits(mask_M.numpy().astype("<i4", copy=False).view(np.uint8), count=vocab_size, bitorder="little")
    return torch.from_numpy(bits_V == 0)


def _completions(words_NW: Tensor, history_H: Tensor) -> Tensor:
    """The last tokens of the bad words whose other tokens the history ends with."""
    prefix_NP = words_NW[:, :-1]
    num_columns = prefix_NP.shape[1]
    tail_P = history_H[-num_columns:]
    tail_P = torch.nn.functional.pad(tail_P, (num_columns - len(tail_P), 0), value=-2)  # matches no column
    return words_NW[((prefix_NP == -1) | (prefix_NP == tail_P)).all(1), -1]


def _add_biases(x_V: Tensor, bias_N2: Tensor) -> None:
    token_N, value_N = bias_N2[:, 0], bias_N2[:, 1].view(torch.float32)
    known_N = (token_N >= 0) & (token_N < len(x_V))
    x_V.index_add_(0, token_N[known_N], value_N[known_N])


def _penalize(x_V: Tensor, history_H: Tensor, line_L: Tensor) -> None:
    floats_L = line_L.view(torch.float32)
    repetition, presence, frequency = floats_L[
        [line.REPETITION_PENALTY, line.PRESENCE_PENALTY, line.FREQUENCY_PENALTY]
    ].tolist()
    if repetition not in (0, 1):
        seen_N = _within(history_H.unique(), x_V)
        x_N = x_V[seen_N]
        x_V[seen_N] = torch.where(x_N > 0, x_N / repetition, x_N * repetition)
    if presence or frequency:
        output_H = _within(history_H[int(line_L[line.PROMPT_LENGTH]) :], x_V)
        token_N, count_N = output_H.unique(return_counts=True)
        x_V[token_N] = x_V[token_N] - frequency * count_N - presence

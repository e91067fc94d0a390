"""What a request asks to be done to its logits before a token is drawn: masks, bans, biases, penalties.

The penalties are defined as in vLLM and, for `repetition_penalty` (Keskar et al., "CTRL", 2019), as in transformers.
"""

from torch import Tensor

from stepgraph.ops.process_logits import cpu
from stepgraph.ops.registry import register

_process_logits = register(
    "process_logits(Tensor logits, Tensor row_slot, Tensor offset, Tensor lines, Tensor tokens, Tensor biases, Tensor bad_words, "
    "Tensor masks, Tensor(a!) counts, Tensor(b!) out) -> ()",
    {"cpu": cpu.process_logits, "cuda": "stepgraph.ops.process_logits.triton:process_logits"},
)


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
    """Write each row's logits, changed as its slot's line asks, to `out`. Runs inside the graph.

    The token to be sampled follows the slot's history and the first `offset` of its proposals, `tokens[slot, :length + offset]`,
    of which the first `prompt_length` tokens are the prompt and the rest the output; `length` below counts them all. In this
    order and in float32:

    1. MASKED: tokens whose bit in the slot's mask is 0 become -inf.
    2. Bad words: if the history ends with all but the last token of a word, the last becomes -inf.
    3. Logit biases are added; those of one token add up.
    4. Stop tokens become -inf while `length` is below `min_length`.
    5. Repetition penalty r, on tokens in the history: x / r where x > 0, else x · r. Frequency penalty f and presence
       penalty p, on tokens that the output holds n > 0 times: x - f · n - p.

    A penalty of 0, or a repetition penalty of 1, changes nothing. NaN stays NaN unless it is banned. Token ids
    outside the vocabulary are passed over. A row that asks for nothing is copied exactly.

    Args:
        logits: [R, V] float32, bfloat16 or float16, contiguous.
        row_slot: [R] int32.
        offset: [R] int32, 0 for a slot's next token, j for the one after j proposals.
        lines: [slots, LINE_WIDTH] int32.
        tokens: [slots, max_model_len] int32.
        biases: [slots, MAX_BIASES, 2] int32, token id and float32 bits.
        bad_words: [slots, MAX_BAD_WORDS, BAD_WORD_WIDTH] int32, right-aligned, -1 before the first token.
        masks: [slots, 1 + K, ceil(V / MASK_BITS)] int32; of line `offset`, bit v % MASK_BITS of word v // MASK_BITS allows token
            v.
        counts: [at least R, V] int32, contiguous; scratch, all zero before and after.
        out: [at least R, V] float32, contiguous; its first R rows receive the result, those of the null slot anything.
    """
    _process_logits(logits, row_slot, offset, lines, tokens, biases, bad_words, masks, counts, out)

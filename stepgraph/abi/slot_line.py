"""Layout of one line of SlotState: what the device knows about one running request, as int32 columns.

Floats are stored by their bits, so that admitting a request is one contiguous copy. Columns after `STOP_TOKENS` hold up
to `MAX_STOP_TOKENS` token ids, unused ones -1. An all-zero line is an inactive slot; line 0 is the null slot and stays zero.
"""

from stepgraph.config.speculative import MAX_DRAFTS as MAX_DRAFTS  # read from here by all that use the line

LENGTH = 0  # tokens known: prompt and everything sampled so far
COMPUTED = 1  # tokens whose keys and values are cached
ACTIVE = 2  # 1 while the request runs; the device clears it when it finishes the request
GENERATION = 3  # tells two users of one slot apart
MAX_LENGTH = 4  # the request ends when `length` reaches this many tokens
TOP_K = 5  # keep the k most likely tokens; 0 keeps all
TEMPERATURE = 6  # float32 bits; 0 means greedy
TOP_P = 7  # float32 bits; 1 keeps all
SEED_LOW = 8  # low 32 bits of the request's seed
SEED_HIGH = 9  # high 32 bits
MIN_P = 10  # float32 bits; keep tokens at least this share of the most likely one's probability
# Only graphs of an extended variant read the columns from here on, see `stepgraph.step.shape.Variant`.
REPETITION_PENALTY = 11  # float32 bits; 0 and 1 change nothing
PRESENCE_PENALTY = 12  # float32 bits
FREQUENCY_PENALTY = 13  # float32 bits
PROMPT_LENGTH = 14  # tokens of the user's prompt; what follows in the history was sampled
MIN_LENGTH = 15  # no stop token can be sampled while `length` is below this
NUM_BIASES = 16  # entries of the slot's logit biases in use
NUM_BAD_WORDS = 17  # entries of the slot's bad words in use
MASKED = 18  # 1: only tokens whose bit is set in the slot's token mask can be sampled
NUM_LOGPROBS = 19  # 1 + n: report the sampled token's log-probability and the n highest
NUM_PROMPT_LOGPROBS = 20  # likewise for each token of the prompt
ADAPTER = 21  # LoRA adapter; 0 is none
# Read by every graph again:
NUM_DRAFTS = 22  # proposed tokens that lie in the history from `length` on, to be verified by the next step
MAX_NUM_DRAFTS = 23  # proposals the request takes; 0 switches speculation off
START = 24  # tokens whose keys and values were found cached when the request got the slot; their blocks may be shared
MEMORY_KEY = 25  # two columns, 64 bits: the answers of earlier requests that it may find are those of its key
MEMORY_KEY_WIDTH = 2
STOP_TOKENS = 32
MAX_STOP_TOKENS = 16
LINE_WIDTH = STOP_TOKENS + MAX_STOP_TOKENS

NULL_SLOT = 0
NULL_BLOCK = 0
NULL_LINE = 0

MAX_BIASES = 512
"""Logit biases of a slot: [slots, MAX_BIASES, 2] int32, token id and float32 bits."""
MAX_BAD_WORDS = 128
BAD_WORD_WIDTH = 8
"""Bad words of a slot: [slots, MAX_BAD_WORDS, BAD_WORD_WIDTH] int32 token ids, right-aligned, -1 before the first."""
MASK_BITS = 32
"""Token masks: [slots, 1 + K, ceil(V / MASK_BITS)] int32; bit v % 32 of word v // 32 of line j allows token v as the j-th new
token of a step, counted from 0."""

# Columns of one row of the output ring:
OUT_SLOT = 0
OUT_GENERATION = 1
OUT_FINISH = 2  # RUNNING or one of the FINISHED codes
OUT_NUM_TOKENS = 3  # new tokens; 0 if the row was a chunk of a prompt, or did not run
OUT_NUM_VERIFIED = 4  # proposals it ran
OUT_NUM_ACCEPTED = 5  # of these, the first so many are among the new tokens
OUT_FIRST_SAMPLE = 6  # where its first new token lies among the step's samples
OUT_NUM_DRAFTS = 7  # proposals for the next step
OUT_TOKENS = 8  # the new tokens; what follows them is unspecified
OUT_DRAFTS = OUT_TOKENS + 1 + MAX_DRAFTS  # the proposals, likewise
OUTPUT_WIDTH = OUT_DRAFTS + MAX_DRAFTS
NO_TOKEN = -1
RUNNING, FINISHED_STOP, FINISHED_LENGTH, FINISHED_ERROR = 0, 1, 2, 3
"""FINISHED_ERROR: no token could be sampled, because all logits were NaN or ruled out."""

MAX_LOGPROBS = 20
LOGPROB_WIDTH = 2 + 2 * MAX_LOGPROBS
"""Columns of one line of a log-probability ring: the token's log-probability (float32 bits) and rank (1 is the most likely), then
MAX_LOGPROBS pairs of token id and log-probability (float32 bits), most likely first."""

ROW_WIDTH = 2
"""Columns of a plan row: slot, query length bound."""
DELTA_WIDTH = 3
"""Columns of a block-table delta: slot, index in its block table, block."""

READ_LINE, WRITE_LINE, NEXT_LINE = 0, 1, 2
NUM_LINES = 3
"""Where layers have lines, a slot's line of the block table has so many columns more, behind those of blocks: the lines that its
next step reads and writes, and the one that the step after that writes. Deltas set them like blocks."""

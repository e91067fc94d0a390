"""Layout of one line of SlotState: what the device knows about one running request, as int32 columns.

Floats are stored by their bits, so that admitting a request is one contiguous copy. Columns after `STOP_TOKENS` hold up
to `MAX_STOP_TOKENS` token ids, unused ones -1. An all-zero line is an inactive slot; line 0 is the null slot and stays zero.
"""

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
STOP_TOKENS = 16
MAX_STOP_TOKENS = 16
LINE_WIDTH = STOP_TOKENS + MAX_STOP_TOKENS

NULL_SLOT = 0
NULL_BLOCK = 0

OUTPUT_WIDTH = 4
"""Columns of one row of the output ring: slot, generation, token (or NO_TOKEN), finish code."""
NO_TOKEN = -1
RUNNING, FINISHED_STOP, FINISHED_LENGTH = 0, 1, 2

ROW_WIDTH = 2
"""Columns of a plan row: slot, query length bound."""
DELTA_WIDTH = 3
"""Columns of a block-table delta: slot, index in its block table, block."""

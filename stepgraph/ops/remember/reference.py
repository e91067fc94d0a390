"""Plain torch definition of `remember`; also its CPU kernel. A step in which no request ends costs one comparison."""

import torch
from torch import Tensor

from stepgraph.abi import slot_line as line

SHARE = 8
"""One answer takes at most one SHAREth of the memory, and its separator."""


def remember(
    memory: Tensor, keys: Tensor, cursor: Tensor, lines: Tensor, tokens: Tensor, row_slot: Tensor, finished: Tensor
) -> None:
    """See `stepgraph.ops.remember.remember`. Reads tensor values: opaque to a recording."""
    for row in finished.nonzero().flatten().tolist():
        slot = int(row_slot[row])
        end = int(lines[slot, line.LENGTH])
        start = max(int(lines[slot, line.PROMPT_LENGTH]), end - len(memory) // SHARE)
        if start < end:
            text = torch.nn.functional.pad(tokens[slot, start:end], (0, 1), value=line.NO_TOKEN)
            place = (cursor + torch.arange(len(text), device=memory.device)) % len(memory)
            memory[place] = text
            keys[place] = lines[slot, line.MEMORY_KEY : line.MEMORY_KEY + line.MEMORY_KEY_WIDTH]
            cursor.copy_((cursor + len(text)) % len(memory))

"""What the device is told of a request that gets a slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from stepgraph.step.slot_sampling import SlotSampling


class Admission(NamedTuple):
    """A request at the beginning of its stay in a slot. Plain values, which may go to other processes."""

    slot: int
    """1 … max_num_seqs."""
    tokens: Sequence[int]
    """All known token ids, the prompt first."""
    prompt_len: int
    """How many of them are the prompt."""
    generation: int
    """Differs from that of the slot's previous request."""
    max_length: int
    """Tokens of prompt and answer at which the request ends."""
    sampling: SlotSampling
    """How its tokens are chosen."""
    blocks: Sequence[int] = ()
    """KV blocks of the first `computed` tokens, those of a place one behind the other; see `stepgraph.abi.block_groups`."""
    computed: int = 0
    """Tokens whose keys and values are cached; fewer than `tokens`."""
    lines: Sequence[int] = ()
    """Where layers have lines: the one that its first step reads, which holds the first `computed` tokens, and the one that it
    writes; none: both are that of the slot's number."""

"""The lines of requests' states, and which of them are kept so that others can start there.

What layers with a state know of a prefix is in a line, at one place of the prefix and no other (`stepgraph.layers.recurrent`). A
request that ends a chunk of its prompt at a block border can leave its line there, and write another from then on: the line it
leaves is a *checkpoint*, known by the key of the block before the border. A request whose prefix is cached up to there reads it
in its first step, and writes a line of its own. So nothing is copied, and a checkpoint costs a line and the step in which the
chunk goes on.

A chunk ends at a border only for that, so borders are chosen for what they may save:

- where a prompt is found to go on otherwise than another, `SHARED_TOKENS` or more behind where it can start: what two requests
  begin with, a third may. Of several that arrive together, one does it;
- the last border of a prompt, `PROMPT_TOKENS` or more behind where it starts: the next turn of its conversation begins with it.

There are never more checkpoints than `num_checkpoints`. Another one takes the line of the one that was used least recently, of
those that nobody reads; if all are read, it is not made. One that a single request has started from gives way before all others
once that request has left another further on: it was a conversation's, which will go on from there.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence

from stepgraph.abi import slot_line
from stepgraph.engine.request import Request

SHARED_TOKENS = 128
"""Tokens that a prompt must share with others beyond what it starts from, for one more step of it to be worth their state."""
PROMPT_TOKENS = 1024
"""Tokens of a prompt that must be computed up to its last border: whether anybody goes on there is not known, and the step more
delays its first token, by the less the longer it is."""


class StateLines:
    """Gives lines to requests that run, and finds checkpoints.

    Args:
        num_slots: most requests that run.
        num_checkpoints: most checkpoints; there are as many lines as both, and the null line. With 0 none is given out: each slot
            has its own, or there is no state.
        block_size: tokens per KV block.
        table_width: KV blocks of a slot's line of the block table, behind which it has its lines.
        lookahead: tokens after a block that its key depends on.
    """

    def __init__(self, num_slots: int, num_checkpoints: int, block_size: int, table_width: int, lookahead: int):
        self._free = list(range(num_slots + num_checkpoints, slot_line.NULL_LINE, -1))
        self._num_checkpoints, self._block_size = num_checkpoints, block_size
        # What is left of a prompt behind its last border is a step of its own. That of one token would make proposals, for whose
        # blocks its plan has no room beside a line.
        self._least_rest = max(2, lookahead)
        self._next_line = table_width + slot_line.NEXT_LINE
        self._keys: OrderedDict[int, bytes | None] = OrderedDict()
        """Of all checkpoints, the least recently used first; None: it cannot be found any more, and somebody reads it."""
        self._lines: dict[bytes, int] = {}  # those that can be found
        self._num_starts: Counter[int] = Counter()  # requests that have started from a checkpoint
        self._readers: Counter[int] = Counter()  # rows to come that read a checkpoint
        self._cut: dict[Request, None] = {}  # that run, and have borders before them

    def can_start(self, key: bytes) -> bool:
        """Whether there is a checkpoint behind the block of a key; where none are needed, there is."""
        return not self._num_checkpoints or key in self._lines

    def enter(self, request: Request, count_shared: Callable[[Request], int]) -> None:
        """A request that gets a slot gets a line.

        Args:
            request: `num_found` says what it starts behind.
            count_shared: of its first blocks, how many are cached, those that it cannot start behind too.
        """
        if not self._num_checkpoints:
            return
        request.line = self._free.pop()
        if request.num_found:
            request.read_line = self._lines[request.block_keys[request.num_found - 1]]
            self._readers[request.read_line] += 1
            self._num_starts[request.read_line] += 1
            self._keys.move_to_end(request.read_line)
        request.start_lines = request.read_line or request.line, request.line
        request.borders = self._borders(request, count_shared(request))
        if request.borders:
            self._cut[request] = None

    def _borders(self, request: Request, num_shared: int) -> list[int]:
        """Where chunks of a prompt are to end."""
        size, borders = self._block_size, []
        start, last = request.num_found * size, (request.num_known - self._least_rest) // size * size
        shared = min(num_shared * size, last)
        if shared - start >= SHARED_TOKENS:
            start = shared
            if not self._is_awaited(request, shared):
                borders.append(shared)
        if last - start >= PROMPT_TOKENS:
            borders.append(last)
        return borders

    def _is_awaited(self, request: Request, border: int) -> bool:
        """Whether another request with the same tokens up to `border` is to leave its state there."""
        count = border // self._block_size
        key = request.block_keys[count - 1 : count]
        return any(border in other.borders and other.block_keys[count - 1 : count] == key for other in self._cut)

    def plan_row(
        self, request: Request, end: int, name: Callable[[Request, int], Sequence[bytes]]
    ) -> list[tuple[int, int, int]]:
        """A row of a request is in the step that is being planned, and ends before position `end`. If its state there is wanted,
        and not kept already, it is kept if there is room, and can be found for the next step. To be called when nobody gets a
        slot in the step any more: what a row of it reads may be written by the next one.

        Args:
            request: runs.
            end: in its prompt.
            name: gives the keys of the first so many blocks of a request.

        Returns:
            What changes in the block table.
        """
        if request.read_line:
            self._let_go(request.read_line)
            request.read_line = 0
        if not request.borders or end < request.borders[0]:
            return []
        del request.borders[0]
        if not request.borders:
            del self._cut[request]
        key = name(request, end // self._block_size)[-1]
        if (known := self._lines.get(key)) is not None:
            self._keys.move_to_end(known)
            return []
        if len(self._keys) == self._num_checkpoints and not self._evict():
            return []
        kept, request.line = request.line, self._free.pop()
        self._keys[kept] = key
        self._lines[key] = kept
        request.read_line = kept
        self._readers[kept] += 1
        if request.num_found:
            start = self._lines.get(request.block_keys[request.num_found - 1])
            if start is not None and self._num_starts[start] == 1:
                self._keys.move_to_end(start, last=False)
        assert request.slot is not None
        return [(request.slot, self._next_line, request.line)]

    def leave(self, request: Request) -> None:
        """A request gives its line up, and its slot. It has no row in the step that is being planned."""
        if request.line:
            self._free.append(request.line)
            self._cut.pop(request, None)
            if request.read_line:
                self._let_go(request.read_line)
            request.line, request.read_line, request.start_lines, request.borders = 0, 0, (), []

    def forget(self) -> None:
        """No checkpoint can be found any more. For when blocks cannot, or the lines' memory or the weights change."""
        self._lines.clear()
        for line in list(self._keys):
            self._keys[line] = None
            self._drop_if_unused(line)

    def _evict(self) -> bool:
        """Forget the checkpoint that was used least recently, of those that nobody reads; False if all are read."""
        line = next((line for line in self._keys if not self._readers[line]), None)
        if line is None:
            return False
        self._remove(line)
        return True

    def _let_go(self, line: int) -> None:
        """One reader less."""
        self._readers[line] -= 1
        self._drop_if_unused(line)

    def _drop_if_unused(self, line: int) -> None:
        if not self._readers[line] and self._keys[line] is None:
            self._remove(line)

    def _remove(self, line: int) -> None:
        key = self._keys.pop(line)
        if key is not None:
            del self._lines[key]
        del self._readers[line], self._num_starts[line]
        self._free.append(line)

"""Rows of a recurrence, of any lengths, and what no operator may read or write of them.

Shapes: U tokens, R rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

NUM_LINES, PADDING = 17, 5
LENGTHS = (0, 0, 1, 1, 2, 3, 4, 5, 15, 16, 17, 40, 63, 64, 65, 100, 128, 130)


class Rows(NamedTuple):
    """The last arguments of the operators."""

    read_line: Tensor
    write_line: Tensor
    query_start: Tensor
    start: Tensor
    num_stored: Tensor

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        return int(self.query_start[-1])

    def lines_that_are(self, *, written: bool) -> Tensor:
        """Those of rows that run tokens, or all others but the null line."""
        lines = self.write_line[self.query_start.diff() > 0].long()
        others = torch.ones(NUM_LINES, dtype=torch.bool)
        others[lines] = False
        others[0] = False
        return lines if written else others.nonzero().flatten()

    def without_padding(self, x_U: Tensor) -> Tensor:
        """Of what is of tokens."""
        return x_U[: self.num_tokens]


def random_rows(generator: torch.Generator, num_rows: int, num_drafts: int) -> Rows:
    """Rows that write lines of their own, some empty, some of new requests, padding rows last. Half of them read other lines than
    they write, of which rows may read the same."""

    def draw(*bounds: int) -> int:
        return int(torch.randint(*bounds, (), generator=generator))

    lengths = [LENGTHS[draw(0, len(LENGTHS))] for _ in range(num_rows)]
    lines = (1 + torch.randperm(NUM_LINES - 1, generator=generator)).int().tolist()
    write, spare = lines[:num_rows], lines[num_rows:]
    read = [line if draw(0, 2) else spare[draw(0, 4)] for line in write]
    start = torch.tensor([draw(0, 2) * draw(1, 100) for _ in range(num_rows)] + [0], dtype=torch.int32)
    stored = [max(min(1, length), length - draw(0, num_drafts + 1)) for length in lengths] + [0]
    return Rows(
        torch.tensor([*read, 0], dtype=torch.int32),
        torch.tensor([*write, 0], dtype=torch.int32),
        torch.tensor([0, *lengths, 0]).cumsum(0).int(),
        start,
        torch.tensor(stored, dtype=torch.int32),
    )


def random_state(generator: torch.Generator, rows: Rows, *shape: int) -> Tensor:
    """NaN where nothing may be read."""
    state = torch.full((NUM_LINES, *shape), torch.nan)
    is_read = (rows.start > 0) & (rows.query_start.diff() > 0)
    for line in rows.read_line[is_read].tolist():
        state[line] = torch.randn(shape, generator=generator)
    return state


def with_padding(x_U: Tensor) -> Tensor:
    """More tokens, of NaN."""
    return torch.cat((x_U, x_U.new_full((PADDING, *x_U.shape[1:]), torch.nan)))


def seeds(kernels: str) -> tuple[int, ...]:
    return (1,) if kernels == "interpreter" else (0, 1, 2, 3)


def on(kernels: str, *tensors) -> list:
    return [x.clone().to("cpu" if kernels == "interpreter" else kernels) for x in tensors]


def assert_same_rows(rows: Rows, before, found, expected, tolerance: float) -> None:
    """Outputs and states are as expected, and all other lines as they were."""
    (out, state), (expected_out, expected_state) = found, expected
    out, state = out.cpu(), state.cpu()
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(rows.without_padding(out), rows.without_padding(expected_out), **close)
    running, others = rows.lines_that_are(written=True), rows.lines_that_are(written=False)
    torch.testing.assert_close(state[running], expected_state[running], **close)
    torch.testing.assert_close(state[others], before[others], rtol=0, atol=0, equal_nan=True)

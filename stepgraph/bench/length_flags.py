"""The flags that say how long random prompts and their answers are; named as in ``vllm bench``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from stepgraph.errors import ConfigError


def add_length_flags(parser: argparse._ActionsContainer, input_len: int, output_text: str) -> None:
    """Add them; those that are not given are None.

    Args:
        parser: or a group of it.
        input_len: of a prompt, if no flag says otherwise.
        output_text: help, for which answers the length of an answer is and what it is by default.
    """
    for side, text in (
        ("input", f"length of a random prompt (default: {input_len})"),
        ("output", f"of an answer, {output_text}"),
    ):
        parser.add_argument(f"--random-{side}-len", f"--{side}-len", type=int, metavar="N", help=text)
    parser.add_argument(
        "--random-range-ratio",
        type=float,
        metavar="R",
        help="both lengths are drawn evenly from (1 - R) to (1 + R) times the given ones (default: 0)",
    )
    for side, what in (("input", "prompts'"), ("output", "answers'")):
        parser.add_argument(
            f"--random-{side}-range",
            type=int,
            nargs=2,
            metavar=("LO", "HI"),
            help=f"draw {what} lengths from this instead",
        )


def check_lengths(arguments: argparse.Namespace) -> None:
    """Refuse lengths out of their range, and flags that contradict each other, with a ConfigError."""
    flags = vars(arguments)
    ratio = arguments.random_range_ratio
    if ratio is not None and not 0 <= ratio < 1:
        raise ConfigError(f"--random-range-ratio={ratio} must be at least 0 and below 1")
    for side in ("input", "output"):
        length, limits = flags[f"random_{side}_len"], flags[f"random_{side}_range"]
        if length is not None and length < 1:
            raise ConfigError(f"--random-{side}-len={length} is too small; the smallest value is 1")
        if limits is not None and not 1 <= limits[0] <= limits[1]:
            raise ConfigError(
                f"--random-{side}-range={limits} must be at least 1, and the second number no less than the first"
            )
        if limits is not None and length is not None:
            raise ConfigError(f"--random-{side}-range and --random-{side}-len contradict each other; give one of them")


def length_range(limits: Sequence[int] | None, length: int, ratio: float) -> tuple[int, int]:
    """The shortest and the longest: `limits` if given, else what `ratio` makes of `length`."""
    if limits is not None:
        return limits[0], limits[1]
    return max(1, math.floor(length * (1 - ratio))), math.ceil(length * (1 + ratio))

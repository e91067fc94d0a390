"""Repetitions of regular expressions, written so that a text can be read in as few ways as possible.

A matcher follows all ways at once, and `(.{0,30}){0,30}` has very many: any of its inner repetitions may be empty. What is here
changes how an expression is written, never what it matches:

- ``(X{a,b}){c,d}`` is ``X{ac,bd}`` where the lengths leave no gap, and ``X{a,b}X{c,d}`` is ``X{a+c,b+d}``;
- ``X{c,d}`` of an X that may be empty is ``Y{0,d}``, where Y matches what X does except the empty text;
- ``X{a,b}|X{c,d}`` is ``X{min(a,c),max(b,d)}`` where the lengths leave no gap.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stepgraph.engine.guided_text import Limits

_MAX_PARTS = 8
"""Of a sequence of which each may be empty, as far as that is written out: the result is of quadratic size."""


@dataclass(frozen=True, slots=True)
class Atom:
    """What matches texts that are not empty."""

    text: str
    num_states: int = 0
    """What it counts towards the limit of states."""


@dataclass(frozen=True, slots=True)
class Row:
    """Several, one after the other."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several."""

    options: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """`low` to `high` times, None is without end."""

    node: Node
    low: int
    high: int | None


Node = Atom | Row | Choice | Repeat
EMPTY = Row(())


def sequence(nodes: Iterable[Node]) -> Node:
    """One after the other."""
    parts: list[Node] = []
    for node in nodes:
        for part in node.parts if isinstance(node, Row) else (node,):
            if parts and (isinstance(part, Repeat) or isinstance(parts[-1], Repeat)):
                left, right = _as_repeat(parts[-1]), _as_repeat(part)
                if left.node == right.node:
                    most = None if left.high is None or right.high is None else left.high + right.high
                    parts[-1] = repeat(left.node, left.low + right.low, most)
                    continue
            parts.append(part)
    return parts[0] if len(parts) == 1 else Row(tuple(parts))


def choice(nodes: Iterable[Node]) -> Node:
    """One of several."""
    options: list[Node] = []
    places: dict[Node, int] = {}  # of what is repeated, or stands once
    may_be_empty = False
    for node in nodes:
        for option in node.options if isinstance(node, Choice) else (node,):
            repeated = _as_repeat(option)
            if option == EMPTY:
                may_be_empty = True
            elif (place := places.setdefault(repeated.node, len(options))) == len(options):
                options.append(option)
            elif (joined := _joined(_as_repeat(options[place]), repeated)) is not None:
                options[place] = joined
            else:
                options.append(option)
    if not options:
        return EMPTY
    node = options[0] if len(options) == 1 else Choice(tuple(options))
    return repeat(node, 0, 1) if may_be_empty and not is_nullable(node) else node


def _joined(left: Repeat, right: Repeat) -> Node | None:
    """One repetition for two of the same; None if their lengths leave a gap."""
    if (right.high is not None and right.high + 1 < left.low) or (left.high is not None and left.high + 1 < right.low):
        return None
    most = None if left.high is None or right.high is None else max(left.high, right.high)
    return repeat(left.node, min(left.low, right.low), most)


def repeat(node: Node, low: int, high: int | None) -> Node:
    """`low` to `high` times."""
    if high == 0 or node == EMPTY:
        return EMPTY
    if isinstance(node, Repeat) and _leaves_no_gap(node.low, node.high, low, high):
        low, high = low * node.low, None if high is None or node.high is None else high * node.high
        node = node.node
    elif is_nullable(node) and (rest := _not_empty(node)) is not None:
        return repeat(rest, 0, high)
    return node if (low, high) == (1, 1) else Repeat(node, low, high)


def _leaves_no_gap(low: int, high: int | None, outer_low: int, outer_high: int | None) -> bool:
    """Whether every number from the least to the most of times can be had by so many repetitions of so many."""
    if outer_low == outer_high:
        return True
    if outer_low == 0 and low > 1:
        return False
    fewest = max(1, outer_low)
    return high is None or low * (fewest + 1) <= high * fewest + 1


def is_nullable(node: Node) -> bool:
    """Whether it matches the empty text."""
    match node:
        case Atom():
            return False
        case Row(parts):
            return all(map(is_nullable, parts))
        case Choice(options):
            return any(map(is_nullable, options))
        case Repeat(inner, low, _):
            return low == 0 or is_nullable(inner)


def _not_empty(node: Node) -> Node | None:
    """What matches the same texts, except the empty one; None if that would be too long."""
    if not is_nullable(node):
        return node
    match node:
        case Repeat(inner, _, high):
            rest = _not_empty(inner)
            return None if rest is None else repeat(rest, 1, high)
        case Choice(options):
            rests = [_not_empty(option) for option in options if option != EMPTY]
            return None if None in rests else choice(rest for rest in rests if rest is not None)
        case Row(parts) if len(parts) <= _MAX_PARTS:
            written = []
            for place, part in enumerate(parts):  # the first that is not empty, and whatever follows it
                rest = _not_empty(part)
                if rest is None:
                    return None
                written.append(sequence([rest, *parts[place + 1 :]]))
            return choice(written)
    return None


def _as_repeat(node: Node) -> Repeat:
    if isinstance(node, Row) and len(set(node.parts)) == 1:
        return Repeat(node.parts[0], len(node.parts), len(node.parts))
    return node if isinstance(node, Repeat) else Repeat(node, 1, 1)


def count(node: Node, limits: Limits) -> None:
    """Hold it against the limits."""
    match node:
        case Atom(_, num_states):
            limits.element(num_states)
        case Row(parts):
            for part in parts:
                count(part, limits)
        case Choice(options):
            limits.open()
            for option in options:
                count(option, limits)
            limits.close()
        case Repeat(inner, low, high):
            is_group = isinstance(inner, Row | Repeat)
            if is_group:
                limits.open()
            count(inner, limits)
            if is_group:
                limits.close()
            limits.repeat(low, high)


def written(node: Node) -> str:
    """As a regular expression."""
    match node:
        case Atom(text):
            return text
        case Row(parts):
            return "".join(f"({written(part)})" if isinstance(part, Choice) else written(part) for part in parts)
        case Choice(options):
            return "|".join(map(written, options))
        case Repeat(inner, low, high):
            text = written(inner) if isinstance(inner, Atom) else f"({written(inner)})"
            return text + _quantifier(low, high)


def _quantifier(low: int, high: int | None) -> str:
    known = {(0, 1): "?", (0, None): "*", (1, None): "+"}
    if (low, high) in known:
        return known[low, high]
    return f"{{{low}}}" if low == high else f"{{{low},{'' if high is None else high}}}"


@dataclass(frozen=True, slots=True)
class Bar:
    """Between options."""


@dataclass(frozen=True, slots=True)
class Open:
    """A group begins."""


@dataclass(frozen=True, slots=True)
class Close:
    """A group ends."""


@dataclass(frozen=True, slots=True)
class Times:
    """What stands before is repeated."""

    low: int
    high: int | None


Piece = Atom | Open | Close | Bar | Times


def parse(pieces: Sequence[Piece]) -> Node | None:
    """The expression that pieces make up; None if they make up none."""
    levels: list[list[list[Node]]] = [[[]]]  # groups that are open, their options, these's parts
    repeatable = False
    for piece in pieces:
        parts = levels[-1][-1]
        match piece:
            case Atom():
                parts.append(piece)
            case Open():
                levels.append([[]])
            case Bar():
                levels[-1].append([])
            case Close():
                if len(levels) == 1:
                    return None
                group = choice([sequence(option) for option in levels.pop()])
                levels[-1][-1].append(group)
            case Times(low, high):
                if not repeatable or (high is not None and high < low):
                    return None
                parts.append(repeat(parts.pop(), low, high))
        repeatable = isinstance(piece, Atom | Close)
    return choice([sequence(option) for option in levels[0]]) if len(levels) == 1 else None

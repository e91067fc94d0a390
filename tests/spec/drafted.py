"""Watching what an engine proposes, round by round."""

from __future__ import annotations

from typing import NamedTuple

from stepgraph.engine.engine import Engine


class Round(NamedTuple):
    """A row of a step that ended with proposals."""

    known: tuple[int, ...]  # prompt and answer, the step's tokens included
    drafts: tuple[int, ...]


def watch_rounds(engine: Engine) -> list[Round]:
    """The engine's rounds: a list that grows as it runs."""
    rounds: list[Round] = []
    collect = engine.executor.collect

    def watching(ticket):
        results = collect(ticket)
        for index, row in enumerate(results.rows):
            request = engine.scheduler._by_slot.get(row.slot)
            if request is not None and request.generation == row.generation and row.num_drafts:
                known = (*request.tokens(0, request.num_known), *row.tokens)
                rounds.append(Round(known, tuple(results.drafts[index, : row.num_drafts].tolist())))
        return results

    engine.executor.collect = watching
    return rounds

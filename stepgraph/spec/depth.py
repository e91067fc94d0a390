"""How many tokens to propose: as many as make the most tokens per second, by what steps cost and what is accepted.

A step with K proposals per row yields, per row, one token and as many more as stand. Its cost depends on K and on the number of
rows, and is measured: the time of steps that only decode, by K and by the number of rows (to a power of two). What stands is
measured too, and a step with many proposals tells it for all smaller K. The K of the best ratio is used, 0 included.

What is not used is not measured, so now and then another K is tried for a few steps: each that could be the best, if it cost no
more than the cheapest, soon after the start; later, more and more rarely, all that came close or were never looked at again.

Where proposing costs nothing unless something is proposed, K = 0 gains little beside a K whose proposals are rare, and loses
sight of them: it must be clearly better, and while it is used, others are tried as often as at first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from stepgraph.abi.slot_line import MAX_DRAFTS

LEVELS = (0, 1, 2, 3, 5, MAX_DRAFTS)
"""Numbers of proposals to choose from, where graphs are captured in milliseconds; each has graphs of its own."""

_TRIAL_STEPS = 4
"""Steps of a trial. The first verifies what the K before it proposed, and is not measured."""
_FIRST_PAUSE, _LONGEST_PAUSE = 64, 512
"""Steps between trials: doubled each time one changes nothing."""
_MEMORY = 64
"""Rows that the estimate of what stands remembers, about."""
_SMOOTHING = 0.15
"""Weight of a new measurement of a cost."""
_OUTLIER = 3.0
"""A step that took so many times what such steps take tells nothing of the next."""
_MARGIN = 1.01
"""How much better another K must be, so that noise does not make the choice wander."""
_RELUCTANCE = 1.1
"""How much better still it must be to propose nothing, where only proposals that are made cost time."""


def draft_levels(max_drafts: int, choices: Sequence[int]) -> tuple[int, ...]:
    """The numbers of proposals to choose from, ascending: those of `choices` below the most there may be, and that."""
    return tuple(sorted({level for level in choices if level < max_drafts} | {max_drafts}))


@dataclass
class _Bucket:
    """What is known of steps of about one number of rows."""

    choice: int
    seconds: dict[int, float] = field(default_factory=dict)  # by K
    trial: int | None = None
    trial_left: int = 0
    pause: int = _FIRST_PAUSE
    until_trial: int = _FIRST_PAUSE
    next_trial: int = 0  # index of the level to try next


class DraftDepth:
    """Chooses the number of proposals for each step.

    Args:
        max_drafts: the most there may be.
        levels: those to choose from, beside `max_drafts`, which is the largest. One level is always chosen.
        costs_when_idle: see `stepgraph.spec.drafter.Drafter`.
    """

    def __init__(self, max_drafts: int, levels: Sequence[int] = LEVELS, *, costs_when_idle: bool = True):
        self.levels = draft_levels(max_drafts, levels)
        """The numbers to choose from, ascending."""
        self._costs_when_idle = costs_when_idle
        # Of rows whose proposals before the j-th (from 1) all stood, the share in which it does too, and the rows behind that.
        self._stands = [0.0] * (max_drafts + 1)
        self._weight = [0] * (max_drafts + 1)
        self._buckets: dict[int, _Bucket] = {}
        self._last: int | None = None  # K of the step that was read last

    def choose(self, num_rows: int) -> int:
        """Proposals to make for each row of a step in which so many rows decode."""
        if len(self.levels) == 1 or not num_rows:
            return self.levels[-1]
        bucket = self._bucket(num_rows)
        return bucket.choice if bucket.trial is None else bucket.trial

    def observe(self, num_rows: int, num_drafts: int, accepted: list[tuple[int, int]], seconds: float | None) -> None:
        """Take in a step whose results have been read.

        Args:
            num_rows: rows that decoded.
            num_drafts: K of the step.
            accepted: for each of them, (proposals verified, proposals that stood).
            seconds: what it took; None if that says nothing about such steps: it computed prompts too, or captured a graph.
        """
        self._learn(Counter(accepted), num_drafts if self._last == num_drafts else None)
        steady, self._last = self._last == num_drafts, num_drafts
        if len(self.levels) == 1 or not num_rows:
            return
        bucket = self._bucket(num_rows)
        if seconds is not None and steady:
            known = bucket.seconds.get(num_drafts)
            if known is None:
                bucket.seconds[num_drafts] = seconds
            elif seconds < _OUTLIER * known:
                bucket.seconds[num_drafts] += _SMOOTHING * (seconds - known)
        self._advance(bucket)

    def expected_tokens(self, num_drafts: int) -> float:
        """Tokens that a row is expected to get from a step with so many proposals. Places that were never tried are taken to be
        like the one before."""
        expected = reached = stands = 1.0
        for place in range(1, num_drafts + 1):
            stands = self._stands[place] if self._weight[place] else stands
            reached *= stands
            expected += reached
        return expected

    def _bucket(self, num_rows: int) -> _Bucket:
        key = num_rows.bit_length()
        if key not in self._buckets:
            bucket = self._buckets[key] = _Bucket(self.levels[-1])
            bucket.trial, bucket.trial_left = self.levels[-1], _TRIAL_STEPS
        return self._buckets[key]

    def _learn(self, accepted: Counter[tuple[int, int]], num_drafts: int | None) -> None:
        """Take in how often so many proposals were verified, and so many of them stood. With `num_drafts`, each row could have
        had so many."""
        tried, stood_here = [0] * len(self._stands), [0] * len(self._stands)
        for (verified, stood), count in accepted.items():
            places = verified if num_drafts is None else num_drafts
            for place in range(1, min(places, stood + 1) + 1):
                tried[place] += count
                stood_here[place] += count * (place <= stood)
        for place, count in enumerate(tried):
            if count:
                # As `count` rows one after another, each of which counts for as much as one of those remembered.
                weight = self._weight[place]
                self._weight[place] = grown = min(weight + count, _MEMORY)
                kept = weight / grown * (1 - 1 / _MEMORY) ** (weight + count - grown)
                self._stands[place] = kept * self._stands[place] + (1 - kept) * stood_here[place] / count

    def _advance(self, bucket: _Bucket) -> None:
        if bucket.trial is not None:
            bucket.trial_left -= 1
            if bucket.trial_left > 0:
                return
            bucket.trial = None
        best = self._best(bucket)
        if best != bucket.choice:
            bucket.choice, bucket.pause = best, _FIRST_PAUSE
            bucket.until_trial = bucket.pause
        untried = self._promising(bucket)
        if untried is None:
            bucket.until_trial -= 1
            if bucket.until_trial > 0:
                return
            longest = _LONGEST_PAUSE if bucket.choice or self._costs_when_idle else _FIRST_PAUSE
            bucket.pause = min(2 * bucket.pause, longest)
            bucket.until_trial = bucket.pause
            others = [level for level in self.levels if level != bucket.choice]
            untried = others[bucket.next_trial % len(others)]
            bucket.next_trial += 1
        bucket.trial, bucket.trial_left = untried, _TRIAL_STEPS

    def _best(self, bucket: _Bucket) -> int:
        """The level of the highest rate, among those whose cost is known."""
        rates = {level: self.expected_tokens(level) / seconds for level, seconds in bucket.seconds.items()}
        if 0 in rates and not self._costs_when_idle:
            rates[0] /= _RELUCTANCE
        if not rates:
            return bucket.choice
        best = max(rates, key=rates.__getitem__)
        current = rates.get(bucket.choice, 0.0)
        return best if rates[best] > _MARGIN * current else bucket.choice

    def _promising(self, bucket: _Bucket) -> int | None:
        """A level whose cost is not known and that would be the best if it cost no more than the next smaller one known."""
        if bucket.choice not in bucket.seconds:
            return bucket.choice if not bucket.seconds else None
        rate = self.expected_tokens(bucket.choice) / bucket.seconds[bucket.choice]
        for level in self.levels:
            if level not in bucket.seconds:
                below = [seconds for known, seconds in bucket.seconds.items() if known < level]
                least = max(below, default=0.0) or min(bucket.seconds.values()) * 0.5
                if self.expected_tokens(level) / least > rate:
                    return level
        return None

"""One step of one composition, laid out in fresh state among poison, and everything that came of it.

All a step must not read is NaN: every KV entry outside the rows' contexts, the null block's included. And it must write to its
own tokens' entries and to the null block only; a draft model also to those of the proposals it makes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepgraph.abi import slot_line
from stepgraph.graph.base import Graph
from stepgraph.graph.compositions import Composition, Row, random_sampling
from stepgraph.step.plan import StepPlan
from stepgraph.step.program import StepOutput
from stepgraph.step.runner import StepRunner
from stepgraph.step.shape import StepShape

Proposals = Sequence[Sequence[int]]
"""Of each row of a composition."""


@dataclass(frozen=True)
class Result:
    """What a step of a composition did. Samples are counted over the rows that ran, in their order."""

    first_logits: int  # the sample that `logits` begins with: of many samples, only the last chunk's logits are left
    logits: Tensor  # [samples - first_logits, V] float32
    sampled: list[int]
    ring: list[list[int]]  # a line per row, as far as it is specified
    lines: Tensor
    tokens: Tensor
    written: Tensor  # keys and values this step wrote, all layers
    draft_written: Tensor  # those of the draft model
    strays: int  # cache entries that changed beside those and the null block's
    logprobs: Tensor  # what the step reported, bits


def random_proposals(composition: Composition, vocab_size: int) -> list[list[int]]:
    """Any tokens for each row."""
    rng = random.Random(composition.seed)
    return [[rng.randrange(vocab_size) for _ in range(row.num_drafts)] for row in composition.rows]


def mostly_right_proposals(
    runner: StepRunner, graph: Graph[StepOutput], shape: StepShape, composition: Composition
) -> list[list[int]]:
    """Proposals of which, for each row, a random number stands. It takes a step to find the next token of all rows."""
    proposals = random_proposals(composition, runner.vocab_size)
    rng = random.Random(~composition.seed)
    num_right = [rng.randint(0, max(0, row.num_samples - 1)) for row in composition.rows]
    for place in range(max(num_right)):
        sampled = run(runner, graph, shape, composition, proposals).sampled
        start = 0
        for row, right, proposed in zip(composition.rows, num_right, proposals, strict=True):
            if place < right and sampled[start + place] != slot_line.NO_TOKEN:
                proposed[place] = sampled[start + place]
            start += row.num_samples
    return proposals


def run(
    runner: StepRunner,
    graph: Graph[StepOutput],
    shape: StepShape,
    composition: Composition,
    proposals: Proposals,
    only: int | None = None,
    poison: float = torch.nan,
) -> Result:
    """Lay a composition out in fresh state and run one step of it, or of one of its rows.

    Args:
        runner: with a KV cache that holds the composition; its slots must be free.
        graph: of `shape`.
        shape: that holds the composition, or the row.
        composition: what to run.
        proposals: at least as many for each row as it has.
        only: index of a row, to run it alone.
        poison: what cache entries hold that the step must not read. With anything but NaN, what it wrote cannot be told from
            what was there, and `Result.strays` says nothing.
    """
    with runner.workbench():
        return _run(runner, graph, shape, composition, proposals, only, poison)


@dataclass(frozen=True)
class _Placed:
    """A row that takes part in the step."""

    row: Row
    slot: int
    entries: list[int]  # of the KV cache, of every position that blocks were granted for


def _run(
    runner: StepRunner,
    graph: Graph[StepOutput],
    shape: StepShape,
    composition: Composition,
    proposals: Proposals,
    only: int | None,
    poison: float,
) -> Result:
    state, block_size, vocab = runner.state, runner.block_size, runner.vocab_size
    generator = torch.Generator().manual_seed(composition.seed)
    state.lines.zero_()
    state.block_table.zero_()
    state.tokens.copy_(torch.randint(vocab, state.tokens.shape, generator=generator, dtype=torch.int32))
    for ring in (state.ring, state.logprob_ring, state.prompt_logprob_ring):
        ring.zero_()
    for caches in runner.kv_caches:
        for cache in caches:
            _fill(cache, poison)

    free_blocks = (torch.randperm(runner.num_kv_blocks - 1, generator=generator) + 1).tolist()
    settings = random.Random(composition.seed)
    most = min(runner.max_model_len, len(free_blocks) * block_size + 1)  # tokens of the longest sequence
    placed: list[_Placed] = []
    deltas: list[tuple[int, int, int]] = []
    prefix_slots: list[int] = []
    for slot, row in enumerate(composition.rows, start=1):
        sampling = random_sampling(settings, shape.variant, vocab)
        max_length = min(row.length + row.num_drafts + settings.choice((1, 2, 5, 100)), most)
        num_granted = max(row.end, min(row.end + shape.num_drafts - 1, max_length - 1))
        blocks = [free_blocks.pop() for _ in range(-(-num_granted // block_size))]
        known = -(-row.computed // block_size)
        state.admit(
            slot,
            tokens=state.tokens[slot, : row.length].tolist(),
            prompt_len=settings.randint(1, row.length),
            blocks=blocks[:known],
            computed=row.computed,
            generation=slot - 1,
            max_length=max_length,
            sampling=sampling,
        )
        if sampling.masked:
            state.set_masks(slot, np.stack([_random_mask(settings, vocab) for _ in range(state.masks.shape[1])]))
        state.lines[slot, slot_line.ACTIVE] = int(row.active)
        state.lines[slot, slot_line.NUM_DRAFTS] = row.num_drafts
        proposed = torch.tensor(proposals[slot - 1][: row.num_drafts], dtype=torch.int32)
        state.tokens[slot, row.length : row.length + row.num_drafts] = proposed
        entries = [blocks[p // block_size] * block_size + p % block_size for p in range(num_granted)]
        prefix_slots.extend(entries[: row.computed])
        if only is None or slot - 1 == only:
            placed.append(_Placed(row, slot, entries))
            deltas.extend((slot, i, blocks[i]) for i in range(known, len(blocks)))

    prefix = torch.tensor(prefix_slots, device=runner.platform.device, dtype=torch.long)
    before = []
    for caches in runner.kv_caches:
        for cache in caches:
            values = torch.randn(len(prefix_slots), cache[0, 0].numel(), generator=generator)
            flat = cache.view(-1, cache[0, 0].numel())
            flat[prefix] = values.to(cache)
            before.append(flat[prefix])

    rows = tuple((item.slot, item.row.query_len) for item in placed)
    runner.load(StepPlan(rows, tuple(deltas), 0, shape.variant, shape.num_drafts), shape)
    output = graph.replay()
    runner.platform.synchronize()

    own = [entry for p in placed if p.row.active for entry in p.entries[p.row.computed : p.row.end]]
    drafted = [entry for p in placed if p.row.active for entry in _drafted_entries(p, state.lines, shape.num_drafts)]
    num_layers = 2 * runner.model.config.num_layers
    changed = [_changed(cache, prefix, old) for cache, old in zip(_flat(runner), before, strict=True)]
    num_samples = sum(item.row.num_samples for item in placed)
    first_logits = min(num_samples, output.sampled.shape[0] - output.logits.shape[0])
    return Result(
        first_logits=first_logits,
        logits=output.logits[: num_samples - first_logits].float().clone(),
        sampled=output.sampled[:num_samples].tolist(),
        ring=[_specified(line) for line in state.ring[0, : len(placed)].tolist()],
        lines=state.lines.clone(),
        tokens=state.tokens.clone(),
        written=_content(runner, slice(0, num_layers), own),
        draft_written=_content(runner, slice(num_layers, None), own + drafted),
        strays=_count_strays(changed[:num_layers], own, block_size)
        + _count_strays(changed[num_layers:], own + drafted, block_size),
        logprobs=torch.cat((state.logprob_ring[0], state.prompt_logprob_ring[0])),
    )


def _drafted_entries(item: _Placed, lines: Tensor, num_drafts: int) -> list[int]:
    """Cache entries of the proposals that a draft model computed for a row, beyond the row's own: all proposals but the last."""
    length, computed, active, max_length, most = lines[
        item.slot,
        [
            slot_line.LENGTH,
            slot_line.COMPUTED,
            slot_line.ACTIVE,
            slot_line.MAX_LENGTH,
            slot_line.MAX_NUM_DRAFTS,
        ],
    ].tolist()
    room = min(num_drafts, most, max_length - length - 1) if active and computed == length - 1 else 0
    return item.entries[max(item.row.end, computed) : computed + room - 1]


def _flat(runner: StepRunner) -> list[Tensor]:
    """Each cache as [entries, G · D]."""
    return [cache.flatten(0, 1).flatten(1) for caches in runner.kv_caches for cache in caches]


def _content(runner: StepRunner, layers: slice, entries: list[int]) -> Tensor:
    index = torch.tensor(entries, device=runner.platform.device, dtype=torch.long)
    found = [flat[index] for flat in _flat(runner)[layers]]
    return torch.stack(found) if found else torch.empty(0)


def _changed(flat: Tensor, prefix: Tensor, before: Tensor) -> Tensor:
    """[entries] bool: those that are not as they were laid out."""
    changed = ~flat[:, 0].isnan()
    changed[prefix] = (flat[prefix] != before).any(1)
    return changed


def _count_strays(changed: list[Tensor], allowed: list[int], block_size: int) -> int:
    """Entries that changed in any of the caches, and may not."""
    if not changed:
        return 0
    strays = torch.stack(changed).any(0)
    strays[torch.tensor(allowed, device=strays.device, dtype=torch.long)] = False
    strays[: block_size * (slot_line.NULL_BLOCK + 1)] = False
    return int(strays.sum())


def _specified(line: list[int]) -> list[int]:
    """A row's line of the output ring without the columns that may hold anything."""
    tokens = line[slot_line.OUT_TOKENS :][: line[slot_line.OUT_NUM_TOKENS]]
    return line[: slot_line.OUT_TOKENS] + tokens + line[slot_line.OUT_DRAFTS :][: line[slot_line.OUT_NUM_DRAFTS]]


def _fill(cache: Tensor, value: float) -> None:
    if cache.dtype == torch.float8_e4m3fn:  # on CPU, torch cannot fill it
        cache.view(torch.uint8).fill_(int(torch.tensor(value).to(cache.dtype).view(torch.uint8)))
    else:
        cache.fill_(value)


def _random_mask(rng: random.Random, vocab_size: int) -> npt.NDArray[np.int32]:
    """Allows about half of the tokens."""
    words = -(-vocab_size // slot_line.MASK_BITS)
    return np.frombuffer(rng.randbytes(4 * words), dtype=np.int32)

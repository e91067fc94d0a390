"""One step of one composition, laid out in fresh state among poison, and everything that came of it.

All a step must not read is NaN: every KV entry outside the rows' contexts, the null block's included, and all lines but those
that rows read behind their requests' first tokens. And it must write to its own tokens' entries, its own rows' lines, the null
block and the null line only; the modules of a draft model to some entries before and behind those too. Where there are lines
enough, some rows read another line than they write; and some requests began before the step.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepgraph.abi import slot_line
from stepgraph.graph.base import Graph
from stepgraph.layers.cache import LayerCache
from stepgraph.layers.head import HeadPart
from stepgraph.models.language_model import LanguageModel
from stepgraph.step.admission import Admission
from stepgraph.step.plan import StepPlan
from stepgraph.step.program import StepOutput
from stepgraph.step.runner import StepRunner
from stepgraph.step.shape import StepShape, Variant
from stepgraph.verify.compositions import Composition, Row, random_sampling

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
    written: Tensor  # cache entries this step wrote, all layers
    draft_written: Tensor  # those of the draft model
    states: Tensor  # what the rows' lines say after it, all layers, and what the draft model carries on for them
    strays: int  # cache entries, lines and states carried on that changed beside those and the null ones
    logprobs: Tensor  # what the step reported, bits
    hidden: (
        Tensor  # of a rank that ran without a graph, what its part of the first logits was computed from; else empty
    )


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
    line: int  # that it writes
    start: int  # token that its request began at: those before may be others' too
    entries: list[list[int]]  # of the KV cache: for each block group, of every position that blocks were granted for

    @property
    def own(self) -> range:
        """Positions of its tokens in the step."""
        return range(self.row.computed, self.row.end)

    def rewritten(self, module: int) -> range:
        """Positions before its own at which a draft model's module, counted from 0, knew proposals only and now knows tokens,
        see `stepgraph.spec.mtp_levels`."""
        return range(max(self.start, self.row.computed - module), self.row.computed)

    def drafted(self, module: int, num_modules: int, lines: Tensor, num_drafts: int) -> range:
        """Positions that a module has written after the step. The first runs over the step's tokens, the others over those that
        stand; the last also over the proposals it starts from, which are those that modules have made, but the last."""
        length, computed, active, max_length, most = lines[
            self.slot,
            [
                slot_line.LENGTH,
                slot_line.COMPUTED,
                slot_line.ACTIVE,
                slot_line.MAX_LENGTH,
                slot_line.MAX_NUM_DRAFTS,
            ],
        ].tolist()
        end = computed if module else self.row.end
        if module == num_modules - 1 and active and computed == length - 1:
            end = max(end, computed + min(num_drafts - num_modules, min(most, max_length - length - 1) - 1))
        return range(self.rewritten(module).start, end)


class _Paged(NamedTuple):
    """A tensor of blocks as one layer's cache has it."""

    flat: Tensor  # [rows, width]
    entry_rows: (
        int  # rows of an entry: more than one where layers of other groups have narrower entries in the same memory
    )
    block_rows: int
    group: int
    module: int | None = None  # of the draft model, counted from 0


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
    groups = runner.layout.groups
    generator = torch.Generator().manual_seed(composition.seed)
    state.lines.zero_()
    state.tables.zero_()
    state.tokens.copy_(torch.randint(vocab, state.tokens.shape, generator=generator, dtype=torch.int32))
    for ring in (state.ring, state.logprob_ring, state.prompt_logprob_ring):
        ring.zero_()
    model_caches = _distinct(runner.caches[: len(runner.layout.model_specs)])
    draft_caches = _distinct(runner.caches)[len(model_caches) :]
    for cache in (*model_caches, *draft_caches):
        for tensor in (*cache.block_tensors, *cache.line_tensors):
            _fill(tensor, poison)
    carried_on = runner.drafter.carried if runner.drafter is not None else ()
    for carried in carried_on:
        _fill(carried, poison)

    free_blocks = (torch.randperm(groups.num_blocks(runner.num_kv_blocks) - 1, generator=generator) + 1).tolist()
    settings = random.Random(composition.seed)
    choice = random.Random(~composition.seed)  # of lines
    beginning = random.Random(composition.seed ^ 1)  # of requests
    free_lines = choice.sample(range(1, runner.layout.num_lines), runner.layout.num_lines - 1)
    num_spare = len(free_lines) - len(composition.rows)
    most = min(runner.max_model_len, len(free_blocks) // groups.size * block_size + 1)  # tokens of the longest sequence
    placed: list[_Placed] = []
    deltas: list[tuple[int, int, int]] = []
    sizes = runner.tables.block_sizes
    prefix: list[list[int]] = [[] for _ in sizes]  # entries that earlier steps have left, by group
    for slot, row in enumerate(composition.rows, start=1):
        sampling = random_sampling(settings, shape.variant, vocab)
        max_length = min(row.length + row.num_drafts + settings.choice((1, 2, 5, 100)), most)
        num_granted = max(row.end, min(row.end + shape.num_drafts - 1, max_length - 1))
        blocks = [free_blocks.pop() for _ in range(groups.size * -(-num_granted // block_size))]
        known = groups.size * -(-row.computed // block_size)
        read = line = free_lines.pop()
        if num_spare and choice.random() < 0.5:
            read, num_spare = free_lines.pop(), num_spare - 1
        state.admit(
            Admission(
                slot,
                tokens=state.tokens[slot, : row.length].tolist(),
                prompt_len=settings.randint(1, row.length),
                blocks=blocks[:known],
                computed=row.computed,
                generation=slot - 1,
                max_length=max_length,
                sampling=sampling,
                lines=(read, line),
            )
        )
        if sampling.masked:
            state.set_masks(slot, np.stack([_random_mask(settings, vocab) for _ in range(state.masks.shape[1])]))
        start = max(0, row.computed - beginning.choice((0, 1, row.computed)))
        state.lines[slot, slot_line.START] = start
        state.lines[slot, slot_line.ACTIVE] = int(row.active)
        state.lines[slot, slot_line.NUM_DRAFTS] = row.num_drafts
        proposed = torch.tensor(proposals[slot - 1][: row.num_drafts], dtype=torch.int32)
        state.tokens[slot, row.length : row.length + row.num_drafts] = proposed
        if row.computed:
            for cache in (*model_caches, *draft_caches):
                cache.lay_out(read, row.computed, generator)
        if start < row.computed:
            for carried in carried_on:
                carried[slot] = torch.randn(carried.shape[1:], generator=generator).to(carried)
        entries = []
        for size, blocks_of_group in zip(sizes, runner.tables.by_group(blocks), strict=True):
            entries.append([int(blocks_of_group[p // size]) * size + p % size for p in range(num_granted)])
        for of_group, known_entries in zip(prefix, entries, strict=True):
            of_group += known_entries[: row.computed]
        if only is None or slot - 1 == only:
            placed.append(_Placed(row, slot, line, start, entries))
            deltas.extend((slot, i, blocks[i]) for i in range(known, len(blocks)))

    ran = [item for item in placed if item.row.active]
    paged = _by_entry(model_caches, draft_caches)
    laid_out = [_left(prefix[part.group], part, ran) for part in paged]
    for part, index in zip(paged, laid_out, strict=True):
        part.flat[index] = torch.randn(len(index), part.flat.shape[1], generator=generator).to(part.flat)
    shared = _by_tensor(paged)
    prefixes = [torch.cat([laid_out[i] for i in parts]) for parts in shared]
    before = [paged[parts[0]].flat[known] for parts, known in zip(shared, prefixes, strict=True)]
    line_tensors = [tensor for cache in (*model_caches, *draft_caches) for tensor in cache.line_tensors]
    lines_before = [tensor.clone() for tensor in line_tensors]
    carried_before = [tensor.clone() for tensor in carried_on]

    rows = tuple((item.slot, item.row.query_len) for item in placed)
    runner.load(StepPlan(rows, tuple(deltas), 0, shape.variant, shape.num_drafts), shape)
    with _inputs_of_head(runner.model) as hidden:
        output = graph.replay()
    runner.platform.synchronize()

    written = [_written(part, ran, len(draft_caches), state.lines, shape.num_drafts) for part in paged]
    strays = [
        _strays(
            _changed(paged[parts[0]].flat, known, old),
            torch.cat([written[i] for i in parts]),
            paged[parts[0]].block_rows,
        )
        for parts, known, old in zip(shared, prefixes, before, strict=True)
    ]
    states = [
        tensor
        for cache in (*model_caches, *draft_caches)
        for item in ran
        for tensor in cache.line_content(item.line, item.row.end)
    ]
    states += [carried[item.slot] for carried in carried_on for item in ran]
    num_samples = sum(item.row.num_samples for item in placed)
    prompts_first = shape.variant >= Variant.PROMPT_LOGPROBS  # logits of all tokens come before those of samples
    num_hidden = sum(item.row.query_len for item in ran) if prompts_first else num_samples
    first_logits = min(num_samples, output.sampled.shape[0] - output.logits.shape[0])
    return Result(
        first_logits=first_logits,
        logits=output.logits[: num_samples - first_logits].float().clone(),
        sampled=output.sampled[:num_samples].tolist(),
        ring=[_specified(line) for line in state.ring[0, : len(placed)].tolist()],
        lines=state.lines.clone(),
        tokens=state.tokens.clone(),
        written=_as_one([p.flat[index] for p, index in zip(paged, written, strict=True) if p.module is None]),
        draft_written=_as_one([p.flat[index] for p, index in zip(paged, written, strict=True) if p.module is not None]),
        states=_as_one(states),
        strays=int(torch.stack(strays).any(0).sum() if strays else 0)
        + _count_stray_lines(line_tensors, lines_before, [slot_line.NULL_LINE, *(item.line for item in ran)])
        + _count_stray_lines(carried_on, carried_before, [slot_line.NULL_SLOT, *(item.slot for item in ran)]),
        logprobs=torch.cat((state.logprob_ring[0], state.prompt_logprob_ring[0])),
        hidden=hidden[0][:num_hidden].float() if hidden else torch.empty(0),
    )


@contextmanager
def _inputs_of_head(model: LanguageModel) -> Iterator[list[Tensor]]:
    """What an output head that ranks share is given inside, call by call, by steps that run without a graph. Logits do not tell
    whether ranks hold the same residual stream: each computes a part of them, for all."""
    inputs: list[Tensor] = []
    heads = [module for module in model.modules() if isinstance(module, HeadPart)]
    hooks = [head.register_forward_pre_hook(lambda head, args: inputs.append(args[1].clone())) for head in heads]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def _distinct(caches: Sequence[LayerCache]) -> list[LayerCache]:
    """Each once, of layers that share one too."""
    return list({id(cache): cache for cache in caches}.values())


def _by_entry(model_caches: Sequence[LayerCache], draft_caches: Sequence[LayerCache]) -> list[_Paged]:
    """The tensors of blocks, layer by layer."""
    tensors = [
        (tensor, getattr(cache, "group", 0), module)
        for caches, of_drafter in ((model_caches, False), (draft_caches, True))
        for index, cache in enumerate(caches)
        for module in (index if of_drafter else None,)
        for tensor in cache.block_tensors
    ]
    widths: dict[int, int] = {}  # of the narrowest entries at an address
    for tensor, _, _ in tensors:
        width = tensor[0, 0].numel()
        widths[tensor.data_ptr()] = min(width, widths.get(tensor.data_ptr(), width))
    paged = []
    for tensor, group, module in tensors:
        flat = tensor.view(-1, widths[tensor.data_ptr()])
        block_rows = flat.shape[0] // tensor.shape[0]
        paged.append(_Paged(flat, block_rows // tensor.shape[1], block_rows, group, module))
    return paged


def _by_tensor(paged: Sequence[_Paged]) -> list[list[int]]:
    """Indices of those that are the same tensor, of layers in different groups."""
    shared: dict[int, list[int]] = {}
    for index, part in enumerate(paged):
        shared.setdefault(part.flat.data_ptr(), []).append(index)
    return list(shared.values())


def _left(prefix: Sequence[int], part: _Paged, ran: Sequence[_Placed]) -> Tensor:
    """Entries of the prefix that a step may read: not those it is to write anew, which are poison until it does."""
    if part.module:
        anew = {item.entries[part.group][p] for item in ran for p in item.rewritten(part.module)}
        prefix = [entry for entry in prefix if entry not in anew]
    return _as_index(prefix, part)


def _written(part: _Paged, ran: Sequence[_Placed], num_modules: int, lines: Tensor, num_drafts: int) -> Tensor:
    """Entries that a step is to write."""

    def positions(item: _Placed) -> range:
        if part.module is None:
            return item.own
        return item.drafted(part.module, num_modules, lines, num_drafts)

    return _as_index([item.entries[part.group][p] for item in ran for p in positions(item)], part)


def _as_index(entries: Sequence[int], part: _Paged) -> Tensor:
    row = torch.tensor(entries, device=part.flat.device, dtype=torch.long) * part.entry_rows
    return (row[:, None] + torch.arange(part.entry_rows, device=row.device)).flatten()


def _as_one(tensors: Sequence[Tensor]) -> Tensor:
    """All values in a row; float64 holds those of any dtype."""
    return torch.cat([tensor.double().flatten() for tensor in tensors]) if tensors else torch.empty(0)


def _changed(flat: Tensor, prefix: Tensor, before: Tensor) -> Tensor:
    """[rows] bool: those that are not as they were laid out."""
    changed = flat.isnan().sum(1) < flat.shape[1]  # `all` takes four times as long
    changed[prefix] = (flat[prefix] != before).any(1)
    return changed


def _strays(changed: Tensor, allowed: Tensor, block_rows: int) -> Tensor:
    """[rows] bool: those of a tensor that changed, and may not."""
    changed[allowed] = False
    changed[: block_rows * (slot_line.NULL_BLOCK + 1)] = False
    return changed


def _count_stray_lines(tensors: Sequence[Tensor], before: Sequence[Tensor], allowed: list[int]) -> int:
    """Lines that changed in any of the tensors, and may not."""
    strays: set[int] = set()
    for tensor, old in zip(tensors, before, strict=True):
        same = (tensor == old) | (tensor.isnan() & old.isnan())
        strays.update((~same.flatten(1).all(1)).nonzero().flatten().tolist())
    return len(strays.difference(allowed))


def _specified(line: list[int]) -> list[int]:
    """A row's line of the output ring without the columns that may hold anything."""
    tokens = line[slot_line.OUT_TOKENS :][: line[slot_line.OUT_NUM_TOKENS]]
    return line[: slot_line.OUT_TOKENS] + tokens + line[slot_line.OUT_DRAFTS :][: line[slot_line.OUT_NUM_DRAFTS]]


def _fill(tensor: Tensor, value: float) -> None:
    if tensor.dtype == torch.float8_e4m3fn:  # on CPU, torch cannot fill it
        tensor.view(torch.uint8).fill_(int(torch.tensor(value).to(tensor.dtype).view(torch.uint8)))
    elif tensor.is_floating_point():
        tensor.fill_(value)
    else:
        tensor.fill_(torch.iinfo(tensor.dtype).max)


def _random_mask(rng: random.Random, vocab_size: int) -> npt.NDArray[np.int32]:
    """Allows about half of the tokens."""
    words = -(-vocab_size // slot_line.MASK_BITS)
    return np.frombuffer(rng.randbytes(4 * words), dtype=np.int32)

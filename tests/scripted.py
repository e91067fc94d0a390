"""A drafter that knows the answers and is wrong now and then, so that every number of proposals stands and falls."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from stepgraph import ops
from stepgraph.abi import slot_line
from stepgraph.engine.engine import Engine
from stepgraph.spec.drafter import Drafts, DraftStep


class ScriptedDrafter:
    """Proposes what `answers` hold, each token right with a chance of about 3 in 4, and of uneven number.

    Requests are told apart by one of their first tokens, that at `place`: give each prompt its own there. See
    `stepgraph.spec.drafter.Drafter`.
    """

    attention_specs = ()
    carried = ()
    lookahead = 0
    costs_when_idle = False

    def __init__(
        self,
        answers: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        max_model_len: int,
        vocab_size: int,
        device: str,
        place: int = 0,
    ):
        self._vocab_size, self._place = vocab_size, place
        texts = torch.zeros(vocab_size, max_model_len + slot_line.MAX_DRAFTS, dtype=torch.int32)
        for prompt, answer in answers:
            text = [*prompt, *answer]
            assert not texts[prompt[place]].any(), "two prompts are told apart by the same"
            texts[prompt[place], : len(text)] = torch.tensor(text, dtype=torch.int32)
        self._texts = texts.to(device)

    def cache_specs(self, dtype: torch.dtype) -> tuple[()]:
        return ()

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(())

    def propose(self, step: DraftStep) -> Drafts:
        slot_R = step.inputs.tokens.row_slot
        length_R = step.lines.index_select(0, slot_R)[:, slot_line.LENGTH]
        place_K = torch.arange(step.num_drafts, dtype=torch.int32, device=slot_R.device)
        position_RK = length_R.unsqueeze(1) + place_K
        first_R = step.tokens.index_select(0, slot_R)[:, self._place]
        right_RK = self._texts[first_R.unsqueeze(1), position_RK.clamp(max=self._texts.shape[1] - 1)]
        chance_RK = (position_RK * 7919 + first_R.unsqueeze(1) * 104729) % 97
        wrong_RK = (right_RK + 1) % self._vocab_size
        count_R = (length_R * 31 + first_R) % (2 * step.num_drafts)
        tokens_RK = torch.where(chance_RK < 73, right_RK, wrong_RK).to(torch.int32)
        return Drafts(tokens_RK, count_R.clamp(max=step.num_drafts).to(torch.int32))

    def forget(self) -> None: ...

    def reload(self) -> None: ...

    def follow(self, step: DraftStep) -> None: ...


def wrong_commit(accept: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., None]:
    """`ops.commit` whose samples were changed first: `accept(samples, proposals)`, both [S] with proposals of NO_TOKEN where
    there are none, gives what is taken for the samples."""
    commit = ops.commit

    def wrong(lines, tokens, counter, ring, row_slot, query_start, kv_len, sample_start, sampled, *rest) -> None:
        proposals = torch.full_like(sampled, slot_line.NO_TOKEN)
        sample_S = torch.arange(sampled.shape[0], device=sampled.device)
        row_S = torch.searchsorted(sample_start[1:], sample_S, right=True).clamp(max=row_slot.shape[0] - 1)
        offset_S = sample_S - sample_start[row_S]
        proposed_S = offset_S < sample_start[row_S + 1] - sample_start[row_S] - 1
        slot_S = row_slot[row_S] * proposed_S
        position_S = (lines[slot_S, slot_line.LENGTH] + offset_S) * proposed_S
        proposals = torch.where(proposed_S, tokens[slot_S, position_S], proposals)
        sampled = accept(sampled, proposals).to(torch.int32)
        commit(lines, tokens, counter, ring, row_slot, query_start, kv_len, sample_start, sampled, *rest)

    return wrong


def watch_drafts(engine: Engine) -> list[tuple[int, int]]:
    """Of each row that verified proposals: how many, and how many stood. A list that grows as the engine runs."""
    found: list[tuple[int, int]] = []
    collect = engine.executor.collect

    def watching(ticket):
        results = collect(ticket)
        found.extend((row.num_verified, row.num_accepted) for row in results.rows if row.num_verified)
        return results

    engine.executor.collect = watching
    return found

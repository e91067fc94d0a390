"""Which experts tokens went to in one run of a step, kept and imposed on another.

Alone, a row is rounded otherwise than in a batch. Where two experts' scores are all but equal, that turns a choice over, and what
follows differs by more than rounding. So a row alone takes the experts that it took in the batch. Whether those were right, by
what the router saw in the batch, is asked there of these tokens alone, and must be so bit for bit.

A kernel that chooses and computes at once cannot be watched: choices are kept in a run without it. Where it rounds so that a tie
turns over there, that is reported as a difference; it takes few tokens, so that this is rare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepgraph.layers.experts import Router
from stepgraph.models.language_model import LanguageModel
from stepgraph.ops.route import Chosen


class Choice(NamedTuple):
    """What a router saw, and chose."""

    router: Router
    x: Tensor
    """[T, E]."""
    counts: Tensor
    """[B], see `stepgraph.ops.route`."""
    chosen: Chosen

    def of(self, values: Tensor, tokens: slice) -> Tensor:
        """Those of `values`, one for each token, that belong to some tokens of each rank with tokens of its own."""
        return values.unflatten(0, (len(self.counts), -1))[:, tokens].flatten(0, 1).contiguous()

    @property
    def takes_padding(self) -> bool:
        """Whether it chose an expert for a token that is none."""
        places_BL = torch.arange(len(self.x), device=self.x.device).view(len(self.counts), -1)
        is_padding_T = (places_BL - places_BL[:, :1] >= self.counts[:, None]).flatten()
        return bool((self.chosen.expert[is_padding_T] < len(self.router.weight)).any())


def has_routers(model: LanguageModel) -> bool:
    """Whether tokens of a model choose experts."""
    return bool(_routers(model))


def _routers(model: LanguageModel) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


@contextmanager
def kept_choices(model: LanguageModel) -> Iterator[list[Choice]]:
    """What the routers of steps that run inside, without a graph, see and choose: a choice for each call, in their order."""
    kept: list[Choice] = []

    def keep(router: Any, args: tuple[Tensor, Tensor], chosen: Chosen) -> None:
        x, counts = args
        kept.append(Choice(router, x.clone(), counts.clone(), chosen))

    with _hooked(_routers(model), keep):
        yield kept


@contextmanager
def imposed_choices(kept: Sequence[Choice], tokens: slice) -> Iterator[list[int]]:
    """Have the routers of a step that runs inside, without a graph, choose what was chosen for some tokens.

    Args:
        kept: of the step with all tokens.
        tokens: those of this step.

    Yields:
        Calls of routers, counted from 0, that chose otherwise for these tokens than they choose for them alone.
    """
    calls, wrong = enumerate(kept), []

    def impose(router: Any, args: tuple[Tensor, Tensor], chosen: Chosen) -> Chosen:
        call, choice = next(calls)
        assert choice.router is router
        in_batch = Chosen(*(choice.of(values, tokens) for values in choice.chosen))
        alone = router.forward(choice.of(choice.x, tokens), args[1])
        if not all(map(torch.equal, alone, in_batch)):
            wrong.append(call)
        return in_batch

    with _hooked({choice.router for choice in kept}, impose):
        yield wrong


@contextmanager
def _hooked(routers: Iterable[Router], hook: Callable[[Any, Any, Any], Chosen | None]) -> Iterator[None]:
    with ExitStack() as hooks:
        for router in routers:
            hooks.callback(router.register_forward_hook(hook).remove)
            hooks.callback(setattr, router, "is_watched", False)
            router.is_watched = True
        yield

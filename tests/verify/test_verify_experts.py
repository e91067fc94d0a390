"""The check of captured graphs where layers have experts: choices that rounding turns over are no faults, and wrong ones are."""

from contextlib import nullcontext

import pytest
import torch
from tiny import TINY_SETTINGS, save_tiny_mixture
from torch import Tensor

from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.layers.experts import Experts, MixtureMLP, Router
from stepgraph.ops.route import Chosen
from stepgraph.verify import graphs
from stepgraph.verify.graphs import verify_graphs


@pytest.fixture(scope="module")
def tiny_mixture(tmp_path_factory) -> str:
    return save_tiny_mixture(tmp_path_factory.mktemp("mixture"))


@pytest.fixture
def check(tiny_mixture):
    """Mismatches of a model with experts."""

    def check(*, tied: bool = True, **settings) -> list[str]:
        settings = TINY_SETTINGS | {"model": tiny_mixture, "device": "cpu", "num_kv_blocks": 65} | settings
        engine = build_engine(EngineConfig.from_settings(**settings))
        if not tied:
            generator = torch.Generator().manual_seed(0)
            for module in engine.executor.runner.model.modules():
                if isinstance(module, Router):
                    module.weight.normal_(0.0, 0.3, generator=generator)
        reports = verify_graphs(engine.executor, rounds=4, seed=0, alone_rows=8)
        assert len(reports) == 2
        return [mismatch for report in reports for mismatch in report.mismatches]

    return check


@pytest.mark.parametrize("settings", [{}, {"quantization": "fp8"}, {"dtype": "bfloat16", "deterministic": True}])
def test_right_graphs_pass_whatever_rounding_chooses(check, settings) -> None:
    assert check(**settings) == []


def test_mutant_rows_alone_that_choose_anew_differ(check, monkeypatch) -> None:
    """Of experts that are all but tied, by routers that round otherwise in steps of other sizes, as some processors do."""
    right = Router.forward

    def rounded(self: Router, x: Tensor, counts: Tensor) -> Chosen:
        return right(self, x * (1 + torch.linspace(0, 1e-6 * len(x), x.shape[1])), counts)

    def has_other_values() -> bool:
        return any("differs from the same row alone" in mismatch for mismatch in check())

    monkeypatch.setattr(Router, "forward", rounded)
    assert not has_other_values()
    monkeypatch.setattr(graphs, "imposed_choices", lambda kept, tokens: nullcontext([]))
    assert has_other_values()


def test_mutant_padding_that_reaches_experts_is_caught(check, monkeypatch) -> None:
    right = Router.forward
    monkeypatch.setattr(Router, "forward", lambda self, x, counts: right(self, x, torch.full_like(counts, len(x))))
    assert any("padding reached experts" in mismatch for mismatch in check())


def test_mutant_router_that_forgets_the_last_tokens_of_a_large_step_is_caught(check, monkeypatch) -> None:
    """In graphs and without."""
    right = Router.forward

    def mutant(self: Router, x: Tensor, counts: Tensor) -> Chosen:
        chosen = right(self, x, counts)
        chosen.expert[40:] = chosen.expert[40:].clamp(max=6)
        return chosen

    monkeypatch.setattr(Router, "forward", mutant)
    assert any("went to other experts than alone, in routers" in mismatch for mismatch in check())


def test_mutant_experts_that_forget_the_last_tokens_of_a_large_step_are_caught(check, monkeypatch) -> None:
    """In graphs and without."""
    right = Experts.forward

    def mutant(self: Experts, x: Tensor, chosen: Chosen, *args, **options) -> Tensor:
        fewer = Chosen(torch.where(torch.arange(len(x))[:, None] < 40, chosen.expert, 8), chosen.weight)
        return right(self, x, fewer, *args, **options)

    monkeypatch.setattr(Experts, "forward", mutant)
    assert any("differs from the same row alone" in mismatch for mismatch in check())


def test_what_rounds_otherwise_while_choices_are_watched_passes(check, monkeypatch) -> None:
    """As a kernel may that chooses experts and computes them at once, which then does not run."""
    right = MixtureMLP.routed

    def rounding(self: MixtureMLP, *args, **options) -> tuple[Tensor, Tensor]:
        normed, part = right(self, *args, **options)
        return normed, part if self.gate.is_watched else part.mul_(1 + 2**-22)

    monkeypatch.setattr(MixtureMLP, "routed", rounding)
    assert check(tied=False) == []

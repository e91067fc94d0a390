"""Tokens of experts are counted exactly, and read without waiting for the device."""

from types import SimpleNamespace

import pytest
import torch
from tiny_mixture import MIXTURE_LAYERS, NUM_EXPERTS, TOP, save_tiny_mixture

from stepgraph import LLM, SamplingParams
from stepgraph.executor.local import runner_of
from stepgraph.platforms.cpu import CpuPlatform
from stepgraph.step import expert_counts
from stepgraph.step.expert_counts import ExpertCounts

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [30] * 20]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = save_tiny_mixture(tmp_path_factory.mktemp("mixture"))
    with LLM(
        folder, dtype="float32", device="cpu", num_kv_blocks=64, enable_prefix_caching=False, capture="all"
    ) as llm:
        yield llm


def test_each_token_is_counted_once_for_each_of_its_experts_and_layers(llm):
    """Padding is not, nor what ran while graphs were captured and tried out."""
    (report,) = llm.engine.executor.rank_reports()
    assert (report.experts, report.expert_tokens) == ((0, NUM_EXPERTS), (0,) * NUM_EXPERTS)
    params = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True)
    llm.generate(PROMPTS, params)
    (report,) = llm.engine.executor.rank_reports()
    num_tokens = sum(len(prompt) + 7 - 1 for prompt in PROMPTS)
    assert sum(report.expert_tokens) == num_tokens * TOP * MIXTURE_LAYERS
    assert len(set(report.expert_tokens)) > 1
    llm.generate(PROMPTS, params)
    (again,) = llm.engine.executor.rank_reports()
    assert again.expert_tokens == tuple(2 * count for count in report.expert_tokens)


def test_checks_and_timings_are_not_counted(llm):
    runner = runner_of(llm.engine.executor)
    before = [total.clone() for total in runner.expert_counts.totals]
    with runner.workbench():
        for total in runner.expert_counts.totals:
            total += 1
    assert all(map(torch.equal, runner.expert_counts.totals, before))


class SlowPlatform(CpuPlatform):
    """Whoever waits for work that follows a step which is not known to be done hangs."""

    def __init__(self, steps: SimpleNamespace) -> None:
        self.steps = steps

    def completion(self):
        steps = self.steps

        class Mark:
            def record(self) -> None:
                self.after = steps.launched

            def wait(self) -> None:
                assert self.after <= steps.done, "it waits for a step"

        return Mark()


def test_nobody_waits_for_a_step_to_read_the_counts(monkeypatch):
    totals = [torch.zeros(2, dtype=torch.int64) for _ in range(3)]
    layers = [
        SimpleNamespace(gate=SimpleNamespace(totals=total), experts=SimpleNamespace(first=0, count=2))
        for total in totals
    ]
    monkeypatch.setattr(expert_counts, "mixtures_of", lambda model: layers)
    steps = SimpleNamespace(launched=0, done=0)
    counts = ExpertCounts(None, SlowPlatform(steps))

    def launch() -> None:
        steps.launched += 1
        for total in totals:
            total[1] += 1

    def read() -> tuple[int, ...]:
        return counts.read(steps.launched, steps.done)

    assert read() == (0, 0)
    launch()
    assert read() == (0, 0), "of the question before, as a step is under way"
    launch()
    assert read() == (0, 0), "the copy waits for the first step"
    steps.done = 1
    assert read() == (0, 3)
    steps.done = 2
    assert read() == (0, 6), "as they are, once nothing is under way"
    launch()
    assert read() == (0, 6)

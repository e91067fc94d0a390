"""Draft modules that ranks share: all ranks propose what one device would."""

import pytest
import torch
from drafted import watch_rounds
from safetensors.torch import load_file, save_file
from thread_group import run_ranks
from tiny import MAX_MODEL_LEN, TINY_SETTINGS, drain, save_tiny_model

from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.executor.build import build_local_executor
from stepgraph.models import load_model
from stepgraph.models.source import resolve_configured

TEXT = [(7 * i + 3) % 250 + 1 for i in range(60)]


def answers(group, config, num_requests):
    """What an engine answers and proposes. Engines of ranks take the same steps."""
    source = resolve_configured(config.model)
    model = load_model(
        source,
        group=group,
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_model_len=config.model.max_model_len,
        packed=True,
    )
    engine = build_engine(config, source=source, executor=build_local_executor(config, source, model=model))
    rounds = watch_rounds(engine)
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    drawn = SamplingParams(temperature=0.7, seed=5, max_tokens=12, ignore_eos=True)
    requests = [engine.add_request(str(n), TEXT[: 19 * n + 1], greedy if n % 2 else drawn) for n in range(num_requests)]
    drain(engine)
    return [request.output_token_ids for request in requests], rounds


def assert_ranks_do_the_same(config, sizes, num_requests) -> None:
    expected = answers(None, config, num_requests)
    assert len(expected[1]) >= 10
    for size in sizes:
        found = run_ranks(size, lambda group: answers(group, config, num_requests))
        assert found == [expected] * size


def configured(model, drafts=None, **settings):
    speculative = {"method": "mtp", "num_speculative_tokens": 3, "adaptive": False} | (drafts or {})
    return EngineConfig.from_settings(
        model=model,
        graph_backend="eager",
        speculative_config=speculative,
        **TINY_SETTINGS | settings,
    )


@pytest.mark.parametrize("num_modules", [1, 2])
def test_engines_of_ranks_answer_and_propose_as_one_does(num_modules, tmp_path) -> None:
    folder = save_tiny_model(tmp_path, num_mtp_modules=num_modules)
    assert_ranks_do_the_same(configured(folder, max_model_len=MAX_MODEL_LEN), (2, 4), num_requests=4)


def test_modules_of_ranks_propose_from_a_part_of_the_vocabulary() -> None:
    """The head's rows are those of the embedding table, of which every rank has all."""
    assert_ranks_do_the_same(configured("smollm2", max_model_len=128), (3,), num_requests=2)


def test_modules_of_ranks_propose_any_token_where_no_rank_has_the_whole_head(tmp_path) -> None:
    """The same tokens come of it, as proposals only tell which are verified early."""
    folder, modules = save_tiny_model(tmp_path / "model"), tmp_path / "modules"
    modules.mkdir()
    tensors = load_file(f"{folder}/mtp.safetensors")
    save_file({**tensors, "draft_token_ids": torch.arange(1, 257, 2)}, modules / "model.safetensors")
    config = configured(folder, max_model_len=MAX_MODEL_LEN, drafts={"model": str(modules)})
    tokens, rounds = answers(None, config, 4)
    first, second = run_ranks(2, lambda group: answers(group, config, 4))
    assert first == second
    assert first[0] == tokens
    assert all(draft % 2 for _, drafts in rounds for draft in drafts)
    assert not all(draft % 2 for _, drafts in first[1] for draft in drafts)

"""Draft modules that ranks share: all ranks propose what one device would."""

import pytest
import torch
from drafted import watch_rounds
from thread_group import run_ranks
from tiny import MAX_MODEL_LEN, TINY_SETTINGS, drain, save_tiny_model

from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.executor.build import build_local_executor
from stepgraph.models import load_model, resolve

TEXT = [(7 * i + 3) % 250 + 1 for i in range(60)]


@pytest.mark.parametrize("num_modules", [1, 2])
def test_engines_of_ranks_answer_and_propose_as_one_does(num_modules, tmp_path) -> None:
    """Each rank's engine takes the same steps."""
    folder = save_tiny_model(tmp_path, num_mtp_modules=num_modules)
    speculative = {"method": "mtp", "num_speculative_tokens": 3, "adaptive": False}
    config = EngineConfig.from_settings(
        model=folder, graph_backend="eager", speculative_config=speculative, **TINY_SETTINGS
    )

    def answers(group):
        source = resolve(folder)
        model = load_model(
            source, group=group, dtype=torch.float32, device=torch.device("cpu"), max_model_len=MAX_MODEL_LEN
        )
        engine = build_engine(config, source=source, executor=build_local_executor(config, source, model=model))
        rounds = watch_rounds(engine)
        greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        drawn = SamplingParams(temperature=0.7, seed=5, max_tokens=12, ignore_eos=True)
        requests = [engine.add_request(str(n), TEXT[: 19 * n + 1], greedy if n % 2 else drawn) for n in range(4)]
        drain(engine)
        return [request.output_token_ids for request in requests], rounds

    expected = answers(None)
    assert len(expected[1]) > 10
    for size in (2, 4):
        assert run_ranks(size, answers) == [expected] * size

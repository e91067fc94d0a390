"""Sampled answers have the model's distribution with every method: a chi-square test of three tokens' joint distribution."""

import math
from collections import Counter
from itertools import product

import pytest
import torch
from safetensors.torch import save_file
from scripted import wrong_commit
from tiny import mtp_tensors
from transformers import LlamaConfig, LlamaForCausalLM

from stepgraph import ops
from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.sampling_params import SamplingParams

VOCAB_SIZE = 5
PROMPT = [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]
NUM_ANSWERS = 4000
TEMPERATURE = 0.9


@pytest.fixture(scope="module")
def small_vocabulary(tmp_path_factory) -> tuple[str, str]:
    """Folders of a model of few tokens whose distribution is neither flat nor peaked, and of a draft module for it."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=0,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.25)
    folder = tmp_path_factory.mktemp("small-vocabulary")
    model.save_pretrained(folder)
    module = tmp_path_factory.mktemp("module")
    save_file(mtp_tensors(model.config, 1), module / "model.safetensors")
    return str(folder), str(module)


@pytest.fixture(scope="module")
def distribution(small_vocabulary) -> dict[tuple[int, ...], float]:
    """Probability of each answer of three tokens, by transformers in float64."""
    model = LlamaForCausalLM.from_pretrained(small_vocabulary[0]).double().eval()
    answers = list(product(range(VOCAB_SIZE), repeat=3))
    with torch.no_grad():
        text = torch.tensor([PROMPT + list(answer) for answer in answers])
        logp = (model(text).logits[:, len(PROMPT) - 1 : -1] / TEMPERATURE).log_softmax(-1)
    chosen = logp.gather(2, torch.tensor(answers).unsqueeze(2)).sum((1, 2)).exp()
    return dict(zip(answers, chosen.tolist(), strict=True))


def sample(folders: tuple[str, str], method: str) -> tuple[Counter[tuple[int, ...]], int]:
    """Answers with consecutive seeds, and how many proposals stood."""
    engine = build_engine(
        EngineConfig.from_settings(
            model=folders[0],
            dtype="float32",
            device="cpu",
            graph_backend="eager",
            max_num_seqs=64,
            max_num_batched_tokens=256,
            num_kv_blocks=400,
            speculative_config={
                "method": method,
                "num_speculative_tokens": 2,
                "model": folders[1],
                "min_match": 1,
                "adaptive": False,
            },
        )
    )
    params = [
        SamplingParams(temperature=TEMPERATURE, max_tokens=3, seed=seed, ignore_eos=True) for seed in range(NUM_ANSWERS)
    ]
    requests = [engine.add_request(str(seed), PROMPT, one) for seed, one in enumerate(params)]
    while engine.has_work:
        engine.step()
    accepted = sum(len(request.accepted) for request in requests)
    return Counter(tuple(request.output_token_ids) for request in requests), accepted


def chi_square_excess(found: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """Standard deviations above what chance gives, by Wilson and Hilferty's approximation. Rare answers count as one."""
    rare = {answer for answer, p in expected.items() if p * NUM_ANSWERS < 5}
    cells = [(found[answer], p * NUM_ANSWERS) for answer, p in expected.items() if answer not in rare]
    cells.append((sum(found[answer] for answer in rare), sum(expected[answer] for answer in rare) * NUM_ANSWERS))
    statistic = sum((n - mean) ** 2 / mean for n, mean in cells if mean)
    freedom = len(cells) - 1
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


@pytest.mark.parametrize("method", ["none", "mtp", "suffix", "ngram", "hybrid"])
def test_three_tokens_have_the_models_joint_distribution(small_vocabulary, distribution, method):
    found, accepted = sample(small_vocabulary, method)
    assert chi_square_excess(found, distribution) < 3.5
    assert (accepted > NUM_ANSWERS / 100) == (method != "none"), "proposals must stand often enough to do harm"


@pytest.mark.parametrize("method", ["mtp", "suffix"])
def test_a_wrong_rule_of_acceptance_is_noticed(small_vocabulary, distribution, monkeypatch, method):
    """Proposals of token 2 stand whatever was sampled."""
    wrong = wrong_commit(lambda sampled, proposed: torch.where(proposed == 2, proposed, sampled))
    monkeypatch.setattr(ops, "commit", wrong)
    found, _ = sample(small_vocabulary, method)
    assert chi_square_excess(found, distribution) > 6

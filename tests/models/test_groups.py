"""Models that ranks share: what each rank computes is what one device would, and the same bits on all ranks."""

import pytest
import torch
from checkpoints import HF_CONFIGS, SIZES, random_hf_model
from stepping import Stepper
from thread_group import run_ranks
from transformers import LlamaConfig

from stepgraph.errors import ModelError
from stepgraph.layers import head
from stepgraph.models import load_model, resolve

CPU = {"dtype": torch.float32, "device": torch.device("cpu"), "max_model_len": 64}
NAMES = [
    "llama with every bias",
    "llama tied",
    "mistral with windows",
    "ministral with windows in some layers",
    "qwen2",
    "qwen3 tied",
    "qwen3 with windows in some layers",
    "ernie 4.5 with every bias",
    "gemma 3",
    "granite",
    "phi 4 with long rope",
    "seed oss",
    "seed oss with another choice of biases",
    "cwm with windows in some layers",
    "smollm 3",
    "minicpm 3",
    "youtu",
]
RANKS = {
    2: {},
    3: {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96, "vocab_size": 97},
    4: {"vocab_size": 90},
}
"""By number of ranks, what configs get: query heads for three; vocabularies of which the last rank has one entry, or fewer than
the others. Of four ranks, two keep the same key/value head."""
TOKENS = [(7 * i + 3) % 90 for i in range(40)]


def save(name, size, folder):
    config = HF_CONFIGS[name]()
    for field, value in RANKS[size].items():
        setattr(config, field, value)
    random_hf_model(config).save_pretrained(folder)
    return str(folder)


def run(model):
    """Hidden states and logits of some tokens, fed in two steps."""
    stepper, hidden, logits = Stepper(model, 64), [], []
    for part in (TOKENS[:25], TOKENS[25:]):
        hidden.append(model(stepper.inputs(stepper.build(part))))
        logits.append(model.logits(hidden[-1], out=torch.full((len(part), model.config.vocab_size), torch.nan)))
    return torch.cat(hidden), torch.cat(logits)


def run_shared(path, size, **settings):
    """`run` on every rank, which all give the same bits."""
    ranks = run_ranks(size, lambda group: run(load_model(resolve(path), group=group, **CPU | settings)))
    for found in ranks[1:]:
        assert all(torch.equal(x, first) for x, first in zip(found, ranks[0], strict=True))
    return ranks[0]


def assert_close(found, expected, tolerance=1e-4) -> None:
    assert found.shape == expected.shape
    assert (found - expected).norm(dim=1).max() < tolerance * expected.norm(dim=1).min()


@pytest.mark.parametrize("size", RANKS)
@pytest.mark.parametrize("name", NAMES)
def test_ranks_compute_what_one_device_does(name, size, tmp_path) -> None:
    path = save(name, size, tmp_path)
    expected = run(load_model(resolve(path), **CPU))
    for found, exact in zip(run_shared(path, size), expected, strict=True):
        assert_close(found, exact)


@pytest.mark.parametrize("settings", [{"deterministic": True}, {"quantization": "fp8"}, {"dtype": torch.bfloat16}])
@pytest.mark.parametrize("name", ["llama tied", "gemma 3", "seed oss"])
def test_ranks_compute_what_one_device_does_in_every_format(name, settings, tmp_path) -> None:
    path = save(name, 3, tmp_path)
    expected = run(load_model(resolve(path), **CPU | settings))
    tolerance = 0.06 if "dtype" in settings else 1e-4
    for found, exact in zip(run_shared(path, 3, **settings), expected, strict=True):
        assert_close(found.float(), exact.float(), tolerance)


def test_a_rank_reduces_twice_in_each_layer_and_normalises_nothing_itself(tmp_path) -> None:
    path = save("llama", 2, tmp_path)

    def calls(group):
        model = load_model(resolve(path), group=group, **CPU)
        stepper = Stepper(model, 64)
        for normed in (model.layers[0].post_attention_layernorm, model.layers[1].input_layernorm, model.norm):
            normed.forward = None  # called by nobody
        model(stepper.inputs(stepper.build(TOKENS)))
        return group.calls

    assert run_ranks(2, calls) == [["add_sum [40, 64]"] * 4] * 2


def test_logits_of_many_rows_are_computed_in_turns(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(head, "MAX_ROWS", 16)
    path = save("qwen2", 4, tmp_path)
    _, expected = run(load_model(resolve(path), **CPU))
    assert_close(run_shared(path, 4)[1], expected)


def test_vocabularies_of_too_few_entries_are_refused(tmp_path) -> None:
    sizes = SIZES | {"num_attention_heads": 32, "num_key_value_heads": 32, "hidden_size": 256, "vocab_size": 96}
    random_hf_model(LlamaConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"16 devices cannot share .*and 96 entries .* can: 1, 2, 4, 8\."):
        run_ranks(16, lambda group: load_model(resolve(str(tmp_path)), group=group, **CPU))

import pytest
import torch
from conftest import HF_CONFIGS, random_hf_model
from stepping import Stepper
from torch.fx.experimental.proxy_tensor import make_fx

from stepgraph.models import load_model, resolve

CPU = torch.device("cpu")
TOKENS = [(7 * i + 3) % 96 for i in range(80)]


@pytest.fixture(scope="module", params=HF_CONFIGS)
def pair(request, tmp_path_factory):
    """A transformers model and ours, loaded from what transformers saved."""
    folder = tmp_path_factory.mktemp("checkpoint")
    hf_model = random_hf_model(HF_CONFIGS[request.param]())
    hf_model.save_pretrained(folder)
    model = load_model(resolve(str(folder)), dtype=torch.float32, device=CPU, max_model_len=128)
    return hf_model, model


def test_logits_match_transformers_for_a_whole_prompt(pair) -> None:
    hf_model, model = pair
    with torch.no_grad():
        expected = hf_model(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(Stepper(model, 128).step(TOKENS), expected, atol=2e-4, rtol=1e-4)


def test_logits_match_transformers_however_the_prompt_is_cut_into_steps(pair) -> None:
    hf_model, model = pair
    stepper = Stepper(model, 128)
    logits = torch.cat([stepper.step(TOKENS[a:b]) for a, b in ((0, 1), (1, 33), (33, 79), (79, 80))])
    with torch.no_grad():
        expected = hf_model(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


def test_bfloat16_stays_near_float32(pair) -> None:
    hf_model, _ = pair
    source = resolve(hf_model.name_or_path) if hf_model.name_or_path else None
    assert source is None or source.config.dtype == torch.float32


def test_forward_contains_nothing_that_depends_on_values(pair) -> None:
    _, model = pair
    stepper = Stepper(model, 128)
    traced = make_fx(lambda: stepper.step(TOKENS[:5]), tracing_mode="fake", _allow_non_fake_inputs=True)()
    assert not [node for node in traced.graph.nodes if "item" in str(node.target) or "nonzero" in str(node.target)]

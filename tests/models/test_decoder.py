"""The native decoder against transformers, in float32."""

from typing import NamedTuple

import pytest
import torch
from checkpoints import HF_CONFIGS, random_hf_model
from stepping import Stepper
from torch import Tensor

from stepgraph.graph.cpu import CpuBackend
from stepgraph.models import load_model, resolve

TOKENS = [(7 * i + 3) % 96 for i in range(80)]


@pytest.fixture(scope="module", params=HF_CONFIGS)
def pair(request, tmp_path_factory):
    """transformers' logits for TOKENS, and our model loaded from what transformers saved."""
    folder = tmp_path_factory.mktemp("checkpoint")
    hf_model = random_hf_model(HF_CONFIGS[request.param]())
    hf_model.save_pretrained(folder)
    model = load_model(resolve(str(folder)), dtype=torch.float32, device=torch.device("cpu"), max_model_len=128)
    with torch.no_grad():
        return hf_model(torch.tensor([TOKENS])).logits[0], model


def test_logits_match_transformers_for_a_whole_prompt(pair) -> None:
    expected, model = pair
    torch.testing.assert_close(Stepper(model, 128).step(TOKENS), expected, atol=2e-4, rtol=1e-4)


def test_logits_match_transformers_however_the_prompt_is_cut_into_steps(pair) -> None:
    expected, model = pair
    stepper = Stepper(model, 128)
    logits = [stepper.step(TOKENS[start:end]) for start, end in ((0, 1), (1, 33), (33, 79), (79, 80))]
    torch.testing.assert_close(torch.cat(logits), expected, atol=2e-4, rtol=1e-4)


class Logits(NamedTuple):
    value: Tensor


def test_a_forward_captured_on_one_step_is_right_on_another(pair) -> None:
    expected, model = pair
    stepper = Stepper(model, 128)
    buffers, later = stepper.build(TOKENS[:40]), stepper.build(TOKENS[40:])
    graph = CpuBackend().capture(lambda: Logits(stepper.run(buffers)), warmups=1)
    torch.testing.assert_close(graph.replay().value, expected[:40], atol=2e-4, rtol=1e-4)
    for buffer, value in zip(buffers, later, strict=True):
        buffer.copy_(value)
    torch.testing.assert_close(graph.replay().value, expected[40:], atol=2e-4, rtol=1e-4)

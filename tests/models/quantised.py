"""What tests of quantised checkpoints load, and look at of a model."""

import torch
from checkpoints import SIZES
from stepping import Stepper

from stepgraph.layers.linear import Linear
from stepgraph.models import load_model, resolve

TOKENS = [(7 * i) % 96 for i in range(20)]
WIDE = SIZES | {"hidden_size": 192, "intermediate_size": 320, "head_dim": 32}
"""Several groups of inputs, the last ones incomplete where groups are of 128, and merged parts that end inside a block of
outputs."""


def load(folder, dtype=torch.float32, **kwargs):
    return load_model(resolve(str(folder)), dtype=dtype, device=torch.device("cpu"), max_model_len=32, **kwargs)


def logits(model):
    return Stepper(model, 32).step(TOKENS)


def layers_of(model):
    """The linear layers but the output head, by name."""
    return {name: module for name, module in model.layers.named_modules() if isinstance(module, Linear)}

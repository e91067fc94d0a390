"""What the engine needs of a model, whoever wrote its layers: a native `Decoder`, or transformers' own class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from stepgraph.layers.inputs import StepInputs


class LanguageModelConfig(Protocol):
    """Sizes that the step and its buffers depend on. The KV cache has `num_layers` pairs of [blocks, block_size,
    `num_kv_heads`, `head_dim`]."""

    @property
    def architecture(self) -> str:
        """Class name in transformers, e.g. ``"LlamaForCausalLM"``."""

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states that the output head reads."""

    @property
    def num_layers(self) -> int:
        """Layers, each with one attention."""

    @property
    def num_heads(self) -> int:
        """Query heads of a layer."""

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads of a layer."""

    @property
    def head_dim(self) -> int:
        """Size of a head, of queries, keys and values alike."""

    @property
    def windows(self) -> tuple[int, ...]:
        """Per layer: last keys a token sees, its own included; 0: all."""

    @property
    def max_position_embeddings(self) -> int:
        """Longest sequence the model was made for, in tokens."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""


class LanguageModel(Protocol):
    """A causal language model over one step's tokens."""

    @property
    def config(self) -> LanguageModelConfig:
        """Sizes of the model."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""

    def __call__(self, inputs: StepInputs) -> Tensor:
        """Run the layers over a step's tokens, writing their keys and values. Runs inside the graph.

        Returns:
            [T, E] hidden states that `logits` takes. Those of padding tokens are unspecified.
        """

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """Embeddings of tokens, as the first layer takes them: [T, E]. May run inside a graph."""

    def logits(self, hidden_RE: Tensor, out: Tensor) -> Tensor:
        """Write logits into `out`, [R, V] of the dtype of `hidden_RE`, and return it. Runs inside the graph."""

    def modules(self) -> Iterator[nn.Module]:
        """Itself and all its layers, each once."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters, each once, the embedding table first."""

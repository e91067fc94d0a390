"""What the engine needs of a model, whoever wrote its layers: a native `Decoder`, or transformers' own class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from stepgraph.layers.cache import CacheSpec
from stepgraph.layers.inputs import AttentionSpec, StepInputs
from stepgraph.parallel.group import Group


class LanguageModelConfig(Protocol):
    """Sizes that the step and its buffers depend on."""

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
        """Layers."""

    @property
    def attention_specs(self) -> tuple[AttentionSpec, ...]:
        """Of each layer that has attention."""

    @property
    def max_position_embeddings(self) -> int:
        """Longest sequence the model was made for, in tokens."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""

    @property
    def media_token_ids(self) -> tuple[int, ...]:
        """Tokens that stand for images, sound or video, which the model would take, but not here."""


class LanguageModel(Protocol):
    """A causal language model over one step's tokens."""

    @property
    def config(self) -> LanguageModelConfig:
        """Sizes of the model."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""

    @property
    def group(self) -> Group | None:
        """The ranks that share the model, this one among them; None: there is one."""

    @property
    def attention_specs(self) -> tuple[AttentionSpec, ...]:
        """As of the config, of the heads that this rank keeps."""

    def __call__(self, inputs: StepInputs) -> Tensor:
        """Run the layers over a step's tokens, writing to their caches. Runs inside the graph.

        Args:
            inputs: of the step, with a cache for each of `cache_specs`.

        Returns:
            [T, E] hidden states that `logits` takes. Those of padding tokens are unspecified.
        """

    def cache_specs(self, dtype: torch.dtype) -> tuple[CacheSpec, ...]:
        """What each layer keeps of requests; keys and values in `dtype`."""

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """Embeddings of tokens, as the first layer takes them: [T, E]. May run inside a graph."""

    def logits(self, hidden_RE: Tensor, out: Tensor) -> Tensor:
        """Write logits into `out`, [R, V] of the dtype of `hidden_RE`, and return it. Runs inside the graph."""

    def modules(self) -> Iterator[nn.Module]:
        """Itself and all its layers, each once."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters, each once, the embedding table first."""

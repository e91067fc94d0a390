"""The decoder that Llama, Mistral, Qwen2 and Qwen3 share.

Shapes: T tokens, R rows, E hidden size, V vocabulary, D head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from stepgraph.layers.attention import Attention
from stepgraph.layers.embedding import Embedding
from stepgraph.layers.inputs import StepInputs
from stepgraph.layers.linear import Linear, MergedLinear
from stepgraph.layers.mlp import MLP
from stepgraph.layers.norm import RMSNorm
from stepgraph.layers.rotary import cos_sin_table
from stepgraph.models.config import DecoderConfig


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each normalised before and added to the residual stream after."""

    def __init__(self, config: DecoderConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.self_attn = Attention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            qkv_bias=config.qkv_bias,
            output_bias=config.output_bias,
            qk_norm=config.qk_norm,
            eps=config.rms_norm_eps,
            dtype=dtype,
            device=device,
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias, dtype=dtype, device=device)

    def forward(
        self,
        x_TE: Tensor | None,
        residual_TE: Tensor,
        cos_sin: Tensor,
        cache: tuple[Tensor, Tensor],
        inputs: StepInputs,
    ) -> Tensor:
        """Return what this layer's feed-forward adds to the residual stream, which the next norm will add.

        Args:
            x_TE: the previous layer's result, not yet in the residual stream; None for the first layer.
            residual_TE: residual stream; updated.
            cos_sin: [max positions, D] float32.
            cache: this layer's keys and values.
            inputs: of the step.
        """
        x_TE = self.input_layernorm(residual_TE) if x_TE is None else self.input_layernorm(x_TE, residual_TE)
        x_TE = self.self_attn(x_TE, cos_sin, cache, inputs)
        return self.mlp(self.post_attention_layernorm(x_TE, residual_TE))


class Decoder(nn.Module, ABC):
    """A causal language model over one step's tokens. Subclasses say what differs.

    Parameters are uninitialised until a loader fills them through `checkpoint_tensors`. Module names are those of
    transformers' checkpoints, less the leading ``model.``.
    """

    lm_head: Linear | None

    def __init__(self, config: DecoderConfig, *, max_model_len: int, dtype: torch.dtype, device: torch.device) -> None:
        """Args:
        config: of the model.
        max_model_len: longest sequence, in tokens; sizes the rotary table.
        dtype: of parameters and activations.
        device: of the parameters.
        """
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.layers = nn.ModuleList(DecoderLayer(config, dtype=dtype, device=device) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(config.hidden_size, config.vocab_size, dtype=dtype, device=device)
        )
        self.cos_sin: Tensor
        self.register_buffer("cos_sin", cos_sin_table(config.rope, max_model_len, device), persistent=False)

    @classmethod
    @abstractmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """Read a transformers config of this architecture; ModelError if its rope settings are unsupported."""

    def forward(self, inputs: StepInputs) -> Tensor:
        """Run the layers over a step's tokens, writing their keys and values. Runs inside the graph.

        Args:
            inputs: of the step, with one KV cache per layer.

        Returns:
            [T, E] hidden states after the final norm. Those of padding tokens are unspecified.
        """
        residual_TE = self.embed_tokens(inputs.built.token_ids)
        x_TE = None
        for layer, cache in zip(self.layers, inputs.kv_caches, strict=True):
            x_TE = layer(x_TE, residual_TE, self.cos_sin, cache, inputs)
        return self.norm(x_TE, residual_TE)

    def logits(self, hidden_RE: Tensor, out: Tensor) -> Tensor:
        """Write logits into `out`, [R, V] of the dtype of `hidden_RE`, and return it. Runs inside the graph."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return torch.mm(hidden_RE, head.weight.t(), out=out)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Where each tensor of a checkpoint goes: checkpoint name → parameter, or view into a merged one."""
        targets: dict[str, Tensor] = {}
        for path, module in self.named_modules():
            if isinstance(module, MergedLinear):
                path, tensors = path.rpartition(".")[0], module.named_parts()
            else:
                tensors = dict(module.named_parameters(recurse=False))
            prefix = path if path == "lm_head" else f"model.{path}"
            targets |= {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}
        return targets

"""A layer of the decoder that Llama and the models like it share.

Shapes: T tokens, E hidden size, D head size, P width of a layer's own input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepgraph.layers.attention import Attention
from stepgraph.layers.experts import ExpertShard, MixtureMLP
from stepgraph.layers.gated_delta import GatedDelta
from stepgraph.layers.inputs import StepInputs
from stepgraph.layers.latent_attention import LatentAttention
from stepgraph.layers.mamba2 import Mamba2
from stepgraph.layers.mlp import MLP
from stepgraph.layers.norm import RMSNorm
from stepgraph.layers.normed_experts import NormedExperts
from stepgraph.layers.per_layer_inputs import PerLayerGate
from stepgraph.layers.recurrent import RecurrentRows
from stepgraph.layers.residual import ResidualStream
from stepgraph.layers.short_conv import ShortConv
from stepgraph.models.config import DecoderConfig
from stepgraph.parallel.shard import Shard

_LATENT_EPS = 1e-6
"""Of the norms of latents, whatever the config says of the others'."""


Mixer = Attention | LatentAttention | GatedDelta | ShortConv | Mamba2


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each normalised before and added to the residual stream after.

    In place of attention, or beside it, over the same normalised stream, there may be a recurrence or a convolution. Layers of
    some models have one of the parts alone, whose norm is `input_layernorm`.

    Where `DecoderConfig.output_norms` asks for it, what they add is normalised too. As in the checkpoints,
    `post_attention_layernorm` is then the norm of what attention adds, and `pre_feedforward_layernorm` has its usual place. OLMo
    has these norms alone; see `DecoderConfig.norms`.
    """

    self_attn: Attention | LatentAttention | None
    linear_attn: GatedDelta | None
    conv: ShortConv | None
    mamba: Mamba2 | None
    input_layernorm: RMSNorm | None
    post_attention_layernorm: RMSNorm | None
    mlp: MLP | MixtureMLP | None
    pre_feedforward_layernorm: RMSNorm | None
    post_feedforward_layernorm: RMSNorm | None
    moe: NormedExperts | None
    per_layer: PerLayerGate | None
    layer_scalar: nn.Parameter | None

    def __init__(
        self,
        config: DecoderConfig,
        index: int,
        *,
        shard: Shard,
        expert_shard: ExpertShard,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Args:
        config: of the model.
        index: of the layer.
        shard: the part of this rank.
        expert_shard: its part of the experts.
        dtype, device: of the parameters.
        """
        super().__init__()
        eps = config.rms_norm_eps
        self.residual_multiplier, self.multipliers = config.residual_multiplier, config.part_multipliers
        norms_inputs, norms_outputs = config.norms(index)
        self.input_layernorm = norm_of(config, config.hidden_size, dtype, device) if norms_inputs else None
        self.self_attn = self.linear_attn = self.conv = self.mamba = None
        if config.has_attention(index):
            self.self_attn = _attention(config, index, shard, dtype, device)
        if config.has_state(index):
            if config.short_conv is not None:
                self.conv = ShortConv(config.hidden_size, config.short_conv, shard=shard, dtype=dtype, device=device)
            elif config.mamba is not None:
                self.mamba = Mamba2(config.hidden_size, config.mamba, eps=eps, shard=shard, dtype=dtype, device=device)
            else:
                assert config.delta is not None
                self.linear_attn = GatedDelta(config.hidden_size, config.delta, shard=shard, dtype=dtype, device=device)
        self.post_attention_layernorm = self.mlp = None
        if config.has_mlp(index):
            if self.mixers:
                self.post_attention_layernorm = norm_of(config, config.hidden_size, dtype, device)
            self.mlp = _mlp(config, index, shard, expert_shard, dtype, device)
        self.moe = self.per_layer = self.layer_scalar = None
        self.pre_feedforward_layernorm = self.post_feedforward_layernorm = None
        if norms_outputs:
            if norms_inputs:
                self.pre_feedforward_layernorm = norm_of(config, config.hidden_size, dtype, device)
            self.post_feedforward_layernorm = norm_of(config, config.hidden_size, dtype, device)
        mixture = config.mixture(index)
        if mixture is not None and mixture.is_beside_dense:
            self.moe = NormedExperts(
                mixture,
                config.hidden_size,
                activation=config.activation,
                eps=config.rms_norm_eps,
                shard=shard,
                expert_shard=expert_shard,
                dtype=dtype,
                device=device,
            )
        if config.per_layer_inputs is not None:
            self.per_layer = PerLayerGate(
                config.per_layer_inputs,
                config.hidden_size,
                activation=config.activation,
                eps=config.rms_norm_eps,
                dtype=dtype,
                device=device,
            )
        if config.layer_scalars:
            self.layer_scalar = nn.Parameter(torch.empty(1, dtype=dtype, device=device), False)

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """What takes tokens to each other, of which each has a cache."""
        of_tokens = self.self_attn, self.linear_attn, self.conv, self.mamba
        return tuple(mixer for mixer in of_tokens if mixer is not None)

    @property
    def attention(self) -> Attention | LatentAttention:
        """Of a layer that has it."""
        assert self.self_attn is not None
        return self.self_attn

    def forward(
        self,
        stream: ResidualStream,
        cos_sin: Tensor,
        caches: tuple[Any, ...],
        inputs: StepInputs,
        next_norm: RMSNorm | None,
        query_scale_T: Tensor | None = None,
        rows: RecurrentRows | None = None,
        input_TP: Tensor | None = None,
    ) -> None:
        """Add to the residual stream what attention and feed-forward make of it.

        Args:
            stream: [T, E], updated.
            cos_sin: [max positions, D] float32.
            caches: this layer's, one for each of `mixers`, of the kind of its `cache_spec`.
            inputs: of the step.
            next_norm: after which the stream is read next: the next layer's first norm, or the final one.
            query_scale_T: [T] float32, of models that have `DecoderConfig.query_scaling` and reach so far.
            rows: what layers with a state run; None: there are none.
            input_TP: [T, P], what this layer takes beside the stream, if `DecoderConfig.per_layer_inputs` says so.
        """
        after_attention: RMSNorm | None = None
        before_mlp: RMSNorm | None = self.post_attention_layernorm
        if self.post_feedforward_layernorm is not None:
            after_attention, before_mlp = self.post_attention_layernorm, self.pre_feedforward_layernorm
        before_mlp = before_mlp or self.input_layernorm
        read, mixed = stream.inputs(self.input_layernorm), []
        for mixer, cache in zip(self.mixers, caches, strict=True):
            if isinstance(mixer, Attention | LatentAttention):
                scaling = () if query_scale_T is None else (query_scale_T,)
                mixed_TF = mixer(*read, cos_sin, cache, inputs, *scaling)
                mixed.append((mixer.o_proj, mixed_TF, self.multipliers.attention))
            else:
                mixed.append((mixer.out_proj, mixer(*read, cache, rows), self.multipliers.state))
        for out_proj, mixed_TF, multiplier in mixed:
            stream.add(
                out_proj,
                mixed_TF,
                multiplier=multiplier * self.residual_multiplier,
                post_norm=after_attention,
                next_norm=next_norm if self.mlp is None else before_mlp,
            )
        # The layer's last addition takes the factor.
        mlp_scale_1 = self.layer_scalar if self.per_layer is None else None
        if self.moe is not None:
            assert isinstance(self.mlp, MLP)
            assert self.post_feedforward_layernorm is not None
            assert before_mlp is not None
            self.moe.add_beside(
                self.mlp,
                stream,
                before_mlp,
                inputs,
                post_norm=self.post_feedforward_layernorm,
                scale_1=mlp_scale_1,
            )
        elif self.mlp is not None:
            self.mlp.add_to(
                stream,
                before_mlp,
                inputs,
                multiplier=self.multipliers.mlp * self.residual_multiplier,
                post_norm=self.post_feedforward_layernorm,
                next_norm=next_norm,
                scale_1=mlp_scale_1,
            )
        if self.per_layer is not None:
            assert input_TP is not None
            self.per_layer.add_to(stream, input_TP, self.layer_scalar)


def _mlp(
    config: DecoderConfig, index: int, shard: Shard, expert_shard: ExpertShard, dtype: torch.dtype, device: torch.device
) -> MLP | MixtureMLP:
    mixture = config.mixture(index)
    if mixture is None or mixture.is_beside_dense:
        return MLP(
            config.hidden_size,
            config.sizes(index).intermediate_size,
            activation=config.activation,
            bias=config.mlp_bias,
            gate_multiplier=config.part_multipliers.mlp_gate,
            shard=shard,
            dtype=dtype,
            device=device,
        )
    return MixtureMLP(
        mixture,
        config.hidden_size,
        activation=config.activation,
        shard=shard,
        expert_shard=expert_shard,
        dtype=dtype,
        device=device,
    )


def _attention(
    config: DecoderConfig, index: int, shard: Shard, dtype: torch.dtype, device: torch.device
) -> Attention | LatentAttention:
    if config.latent is not None:
        return LatentAttention(
            config.hidden_size,
            config.num_heads,
            config.latent,
            bias=config.qkv_bias,
            eps=_LATENT_EPS,
            shard=shard,
            dtype=dtype,
            device=device,
        )
    return Attention(
        config.hidden_size,
        config.attention_spec(index),
        qkv_bias=config.qkv_bias,
        output_bias=config.output_bias,
        qk_norm=config.qk_norm,
        joint_qk_norm=config.joint_qk_norm,
        norm_weight_offset=config.norm_weight_offset,
        output_gate=config.output_gate,
        scale=config.attention_scale,
        eps=config.rms_norm_eps,
        keys_and_values=config.sizes(index).keys_and_values,
        norms_round_once=config.norms_round_once,
        shard=shard,
        dtype=dtype,
        device=device,
    )


def norm_of(config: DecoderConfig, width: int, dtype: torch.dtype, device: torch.device) -> RMSNorm:
    return RMSNorm(
        width,
        config.rms_norm_eps,
        weight_offset=config.norm_weight_offset,
        rounds_once=config.norms_round_once,
        dtype=dtype,
        device=device,
    )

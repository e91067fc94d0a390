"""The decoder that Llama and the models like it share.

Shapes: T tokens, R rows, E hidden size, V vocabulary, D head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stepgraph.layers.attention import Attention
from stepgraph.layers.cache import PagedCache, PagedSpec
from stepgraph.layers.embedding import Embedding
from stepgraph.layers.formats import End, Target
from stepgraph.layers.inputs import StepInputs
from stepgraph.layers.linear import Linear, MergedLinear
from stepgraph.layers.matrix import Matrix
from stepgraph.layers.mlp import MLP
from stepgraph.layers.norm import RMSNorm
from stepgraph.layers.rotary import cos_sin_table, rotary_order
from stepgraph.models.config import DecoderConfig
from stepgraph.models.conversion import with_head_order, with_offset
from stepgraph.parallel.shard import WHOLE, Shard


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each normalised before and added to the residual stream after.

    Where `DecoderConfig.output_norms` asks for it, what they add is normalised too. As in the checkpoints,
    `post_attention_layernorm` is then the norm of what attention adds, and `pre_feedforward_layernorm` has its usual place.
    """

    pre_feedforward_layernorm: RMSNorm | None
    post_feedforward_layernorm: RMSNorm | None

    def __init__(
        self, config: DecoderConfig, index: int, *, shard: Shard, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Args:
        config: of the model.
        index: of the layer.
        shard: the part of this rank.
        dtype, device: of the parameters.
        """
        super().__init__()
        self.residual_multiplier = config.residual_multiplier
        self.input_layernorm = _norm(config, config.hidden_size, dtype, device)
        self.self_attn = Attention(
            config.hidden_size,
            config.attention_specs[index],
            qkv_bias=config.qkv_bias,
            output_bias=config.output_bias,
            qk_norm=config.qk_norm,
            norm_weight_offset=config.norm_weight_offset,
            scale=config.attention_scale,
            eps=config.rms_norm_eps,
            shard=shard,
            dtype=dtype,
            device=device,
        )
        self.post_attention_layernorm = _norm(config, config.hidden_size, dtype, device)
        self.mlp = MLP(
            config.hidden_size,
            config.intermediate_size,
            activation=config.activation,
            bias=config.mlp_bias,
            shard=shard,
            dtype=dtype,
            device=device,
        )
        self.pre_feedforward_layernorm = self.post_feedforward_layernorm = None
        if config.output_norms:
            self.pre_feedforward_layernorm = _norm(config, config.hidden_size, dtype, device)
            self.post_feedforward_layernorm = _norm(config, config.hidden_size, dtype, device)

    def forward(self, residual_TE: Tensor, cos_sin: Tensor, cache: PagedCache, inputs: StepInputs) -> None:
        """Add to the residual stream, in place, what attention and feed-forward make of it.

        Args:
            residual_TE: updated.
            cos_sin: [max positions, D] float32.
            cache: this layer's keys and values.
            inputs: of the step.
        """
        o_proj, down_proj = self.self_attn.o_proj, self.mlp.down_proj
        attended_TF = self.self_attn(self.input_layernorm, residual_TE, cos_sin, cache, inputs)
        if self.pre_feedforward_layernorm is None or self.post_feedforward_layernorm is None:
            o_proj.product(attended_TF, end=End.ADD, out=residual_TE, multiplier=self.residual_multiplier)
            hidden_TM = self.mlp.hidden(self.post_attention_layernorm, residual_TE)
            down_proj.product(hidden_TM, end=End.ADD, out=residual_TE, multiplier=self.residual_multiplier)
        else:
            residual_TE.add_(self.post_attention_layernorm(o_proj(attended_TF)))
            hidden_TM = self.mlp.hidden(self.pre_feedforward_layernorm, residual_TE)
            residual_TE.add_(self.post_feedforward_layernorm(down_proj(hidden_TM)))


def _norm(config: DecoderConfig, width: int, dtype: torch.dtype, device: torch.device) -> RMSNorm:
    return RMSNorm(
        width,
        config.rms_norm_eps,
        weight_offset=config.norm_weight_offset,
        dtype=dtype,
        device=device,
    )


class Decoder(nn.Module, ABC):
    """A causal language model over one step's tokens. Subclasses say what differs.

    Parameters are uninitialised until a loader fills them through `checkpoint_tensors`. Module names are those of
    transformers' checkpoints, less the leading ``model.``.
    """

    lm_head: Linear | None

    def __init__(
        self,
        config: DecoderConfig,
        *,
        max_model_len: int,
        shard: Shard = WHOLE,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Args:
        config: of the model.
        max_model_len: longest sequence, in tokens; sizes the rotary table.
        shard: the part of this rank; embedding table, output head and norms are whole on all.
        dtype: of parameters and activations.
        device: of the parameters.
        """
        super().__init__()
        self.config, self.dtype, self.shard = config, dtype, shard
        self.attention_specs = tuple(spec.sharded(shard) for spec in config.attention_specs)
        self.embed_tokens = Embedding(
            config.vocab_size, config.hidden_size, multiplier=config.embedding_multiplier, dtype=dtype, device=device
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, index, shard=shard, dtype=dtype, device=device) for index in range(config.num_layers)
        )
        self.norm = _norm(config, config.hidden_size, dtype, device)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(config.hidden_size, config.vocab_size, dtype=dtype, device=device)
        )
        # Tables have values from the start, which a model on the meta device keeps in host memory.
        device = torch.device("cpu") if device.type == "meta" else device
        ropes = list(dict.fromkeys(config.ropes))
        for i, rope in enumerate(ropes):
            table = cos_sin_table(rope, config.head_dim, max_model_len, device)
            self.register_buffer(f"cos_sin_{i}", table, persistent=False)
        self._table_names = [f"cos_sin_{ropes.index(rope)}" for rope in config.ropes]

    @classmethod
    @abstractmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """Read a transformers config of this architecture; ModelError if its rope settings are unsupported."""

    def cache_specs(self, dtype: torch.dtype) -> tuple[PagedSpec, ...]:
        """See `LanguageModel.cache_specs`."""
        return tuple(PagedSpec.of(spec, dtype) for spec in self.attention_specs)

    def forward(self, inputs: StepInputs) -> Tensor:
        """Run the layers over a step's tokens, writing their keys and values. Runs inside the graph.

        Args:
            inputs: of the step, with the caches of `cache_specs`.

        Returns:
            [T, E] hidden states after the final norm. Those of padding tokens are unspecified.
        """
        residual_TE = self.embed(inputs.tokens.token_ids)
        for layer, table, cache in zip(self.layers, self._table_names, inputs.caches, strict=True):
            layer(residual_TE, self.get_buffer(table), cache, inputs)
        normalised_TE: Tensor = self.norm(residual_TE)
        return normalised_TE

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """Embeddings of tokens, as the first layer takes them: [T, E]. May run inside a graph."""
        embedding_TE: Tensor = self.embed_tokens(token_ids_T)
        return embedding_TE

    @property
    def head(self) -> Matrix:
        """The output head; in some models it is the embedding table."""
        return self.embed_tokens if self.lm_head is None else self.lm_head

    def logits(self, hidden_RE: Tensor, out: Tensor) -> Tensor:
        """Write logits into `out`, [R, V] of the dtype of `hidden_RE`, and return it. Runs inside the graph."""
        if self.config.logits_divisor != 1.0:
            hidden_RE = hidden_RE / self.config.logits_divisor
        return self.head.product(hidden_RE, out=out)

    def checkpoint_tensors(self) -> dict[str, Target]:
        """Where each tensor of a checkpoint goes: checkpoint name → parameter, view into a merged one, or one that is
        converted as it is filled."""
        layers = {f"layers.{index}": index for index in range(self.config.num_layers)}
        targets = named_targets(self, self.config, layers)
        return {name if name.startswith("lm_head.") else f"model.{name}": target for name, target in targets.items()}


def named_targets(root: nn.Module, config: DecoderConfig, layers: Mapping[str, int]) -> dict[str, Target]:
    """Where each tensor of a checkpoint goes, by the paths of the modules below `root`.

    Args:
        root: holds `DecoderLayer` modules.
        config: of the layers.
        layers: paths of all of them, and which of the config's layers each is like.
    """
    targets: dict[str, Target] = {}
    for path, module in root.named_modules():
        tensors: dict[str, Target] = dict(module.named_parameters(recurse=False))
        if isinstance(module, RMSNorm) and module.weight_offset:
            tensors = {name: with_offset(tensor, module.weight_offset) for name, tensor in tensors.items()}
        elif isinstance(module, MergedLinear) and not config.merged_projections:
            path, tensors = path.rpartition(".")[0], module.part_targets()
        elif isinstance(module, Matrix):
            tensors = module.targets()
        targets |= {f"{path}.{name}": tensor for name, tensor in tensors.items()}
    for path, index in layers.items():
        layer = root.get_submodule(path)
        assert isinstance(layer, DecoderLayer)
        _reorder_heads(targets, f"{path}.self_attn", layer.self_attn, config, index)
    return targets


def _reorder_heads(
    targets: dict[str, Target], path: str, attention: Attention, config: DecoderConfig, index: int
) -> None:
    """Have the attention at `path` filled so that the dimensions its checkpoint rotates together meet; see `rotary_order`."""
    order_D = rotary_order(config.ropes[index], config.head_dim, interleaved=config.interleaved_rope)
    if torch.equal(order_D, torch.arange(config.head_dim)):
        return
    num_heads = {"q_proj": attention.spec.num_heads, "k_proj": attention.spec.num_kv_heads, "q_norm": 1, "k_norm": 1}
    num_heads["qkv_proj"] = attention.spec.num_heads + attention.spec.num_kv_heads  # values stay
    for part, heads in num_heads.items():
        for kind in ("weight", "bias"):
            name = f"{path}.{part}.{kind}"
            if name in targets:
                targets[name] = with_head_order(targets[name], order_D, heads)

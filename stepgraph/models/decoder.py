"""The decoder that Llama and the models like it share.

Shapes: T tokens, R rows, E hidden size, V vocabulary, D head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice, repeat
from typing import Any, cast

import torch
from torch import Tensor, nn

from stepgraph.layers.attention import Attention
from stepgraph.layers.cache import CacheSpec
from stepgraph.layers.embedding import Embedding
from stepgraph.layers.experts import ALL_EXPERTS, ExpertShard
from stepgraph.layers.formats import Target
from stepgraph.layers.gated_delta import DeltaLayout, GatedDelta
from stepgraph.layers.head import HeadPart
from stepgraph.layers.inputs import StepInputs
from stepgraph.layers.latent_attention import LatentAttention
from stepgraph.layers.linear import Linear, MergedLinear
from stepgraph.layers.mamba2 import ChannelNorm, Mamba2
from stepgraph.layers.matrix import Matrix
from stepgraph.layers.norm import RMSNorm
from stepgraph.layers.per_layer_inputs import PerLayerInputs
from stepgraph.layers.recurrent import RecurrentCache
from stepgraph.layers.residual import ResidualStream
from stepgraph.layers.rotary import cos_sin_table, rotary_order
from stepgraph.layers.short_conv import Convolution
from stepgraph.models.config import DecoderConfig
from stepgraph.models.conversion import with_factor, with_head_order, with_offset, with_row_order
from stepgraph.models.decoder_layer import DecoderLayer, norm_of
from stepgraph.parallel.group import Group
from stepgraph.parallel.shard import WHOLE, Axis, Shard


class Decoder(nn.Module, ABC):
    """A causal language model over one step's tokens. Subclasses say what differs.

    Parameters are uninitialised until a loader fills them through `checkpoint_tensors`. Module names are those of
    transformers' checkpoints, less the leading ``model.``.
    """

    lm_head: Linear | None
    per_layer_inputs: PerLayerInputs | None
    query_scale: Tensor | None
    head_part: HeadPart | None

    def __init__(
        self,
        config: DecoderConfig,
        *,
        max_model_len: int,
        shard: Shard = WHOLE,
        expert_shard: ExpertShard = ALL_EXPERTS,
        group: Group | None = None,
        expert_group: Group | None = None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Args:
        config: of the model.
        max_model_len: longest sequence, in tokens; sizes the rotary table.
        shard: the part of this rank; embedding table and norms are whole on all.
        expert_shard: its part of the experts.
        group: the ranks that share the model, this one among them; None: there is one, or it is not to run.
        expert_group: ranks that share experts only, this one among them, each with tokens of its own; None: there are none.
        dtype: of parameters and activations.
        device: of the parameters.
        """
        super().__init__()
        assert group is None or group.shard == shard, shard
        assert expert_group is None or expert_group.shard == expert_shard.experts, expert_shard
        self.config, self.dtype, self.group, self.expert_group = config, dtype, group, expert_group
        self.shard, self.expert_shard = shard, expert_shard
        self.attention_specs = tuple(spec.sharded(shard) for spec in config.attention_specs)
        self.embed_tokens = Embedding(
            config.vocab_size, config.hidden_size, multiplier=config.embedding_multiplier, dtype=dtype, device=device
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, index, shard=shard, expert_shard=expert_shard, dtype=dtype, device=device)
            for index in range(config.num_layers)
        )
        self.norm = norm_of(config, config.hidden_size, dtype, device)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(config.hidden_size, config.vocab_size, axis=Axis.OUT, shard=shard, dtype=dtype, device=device)
        )
        self.per_layer_inputs = None
        if config.per_layer_inputs is not None:
            self.per_layer_inputs = PerLayerInputs(
                config.per_layer_inputs,
                config.num_layers,
                config.hidden_size,
                eps=config.rms_norm_eps,
                dtype=dtype,
                device=device,
            )
        # Tables have values from the start, which a model on the meta device keeps in host memory.
        device = torch.device("cpu") if device.type == "meta" else device
        self.head_part = None if group is None else HeadPart(config.vocab_size, group, dtype=dtype, device=device)
        rotations = [(rope, config.sizes(layer).head_dim) for layer, rope in enumerate(config.ropes)]
        tables = list(dict.fromkeys(rotations))
        for i, (rope, head_dim) in enumerate(tables):
            table = cos_sin_table(rope, head_dim, max_model_len, device)
            self.register_buffer(f"cos_sin_{i}", table, persistent=False)
        self._table_names = [f"cos_sin_{tables.index(rotation)}" for rotation in rotations]
        scaling = config.query_scaling
        scales = None if scaling is None or max_model_len <= scaling.length else scaling.table(max_model_len).to(device)
        self.register_buffer("query_scale", scales, persistent=False)

    @classmethod
    @abstractmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """Read a transformers config of this architecture; ModelError if its rope settings are unsupported."""

    @property
    def decoder_layers(self) -> Iterable[DecoderLayer]:
        """`layers`, as what they are."""
        return cast(Iterable[DecoderLayer], self.layers)

    def cache_specs(self, dtype: torch.dtype) -> tuple[CacheSpec, ...]:
        """See `LanguageModel.cache_specs`."""
        mixers = [mixer for layer in self.decoder_layers for mixer in layer.mixers]
        # A state holds activations, whatever keys and values are kept in.
        return tuple(m.cache_spec(dtype if isinstance(m, Attention | LatentAttention) else self.dtype) for m in mixers)

    def forward(self, inputs: StepInputs) -> Tensor:
        """Run the layers over a step's tokens, writing their keys and values. Runs inside the graph.

        Args:
            inputs: of the step, with the caches of `cache_specs`.

        Returns:
            [T, E] hidden states after the final norm. Those of padding tokens are unspecified.
        """
        x_TE = self.embed(inputs.tokens.token_ids)
        inputs_LTP: Iterator[Tensor | None] = repeat(None)
        if self.per_layer_inputs is not None:
            inputs_LTP = iter(self.per_layer_inputs(inputs.tokens.token_ids, x_TE))
        stream = ResidualStream(x_TE, self.group, self.expert_group)
        states = (cache for cache in inputs.caches if isinstance(cache, RecurrentCache))
        rows = next((cache.rows(inputs) for cache in states), None)
        next_norms = [*(layer.input_layernorm for layer in self.layers), self.norm][1:]
        scale_T = None if self.query_scale is None else self.query_scale[inputs.tokens.positions]
        caches = enumerate(inputs.caches)
        for layer, table, norm in zip(self.decoder_layers, self._table_names, next_norms, strict=True):
            own = dict(islice(caches, len(layer.mixers)))
            input_TP = next(inputs_LTP)
            layer(stream, self.get_buffer(table), tuple(own.values()), inputs, norm, scale_T, rows, input_TP)
            for index in own:
                inputs.wrote(index)
        return stream.normalised(self.norm)

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """Embeddings of tokens, as the first layer takes them: [T, E]. May run inside a graph."""
        embedding_TE: Tensor = self.embed_tokens(token_ids_T)
        return embedding_TE

    @property
    def head(self) -> Matrix:
        """The output head; in some models it is the embedding table. Of a head of their own, ranks have a part each."""
        return self.embed_tokens if self.lm_head is None else self.lm_head

    def logits(self, hidden_RE: Tensor, out: Tensor) -> Tensor:
        """Write logits into `out`, [R, V] of the dtype of `hidden_RE`, and return it. Runs inside the graph."""
        if self.config.logits_divisor != 1.0:
            hidden_RE = hidden_RE / self.config.logits_divisor
        if self.head_part is None:
            self.head.product(hidden_RE, out=out)
        else:
            self.head_part(self.head, hidden_RE, out)
        if cap := self.config.logits_softcap:
            out.div_(cap).tanh_().mul_(cap)
        return out

    def reads(self, name: str) -> bool:
        """Whether a checkpoint's tensor may be of this model; others, of which it makes no use, are passed over."""
        return True

    def checkpoint_tensors(self) -> dict[str, Target]:
        """Where each tensor of a checkpoint goes: checkpoint name → parameter, view into a merged one, or one that is
        converted as it is filled."""
        layers = {f"layers.{index}": index for index in range(self.config.num_layers)}
        targets = named_targets(self, self.config, layers)
        return {self.checkpoint_name(name): target for name, target in targets.items()}

    def checkpoint_name(self, name: str) -> str:
        """What a checkpoint calls the tensor of a parameter, by the path of its module; see `tensor_names.native_name`."""
        return name if name.startswith("lm_head.") else f"model.{name}"

    def merged_name(self, name: str) -> str | None:
        """What adapters call a layer of several projections, of the name `checkpoint_name`, if the class has it as one matrix
        though they are read one by one; None: by its projections."""
        return None


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
        elif isinstance(module, RMSNorm) and module.weight_factor != 1.0:
            tensors = {name: with_factor(tensor, module.weight_factor) for name, tensor in tensors.items()}
        elif isinstance(module, MergedLinear) and not config.merged_projections:
            path, tensors = path.rpartition(".")[0], module.part_targets()
        elif isinstance(module, Matrix | Attention | Convolution | GatedDelta | Mamba2 | ChannelNorm):
            tensors = module.targets()
        targets |= {f"{path}.{name}": tensor for name, tensor in tensors.items()}
    for path, index in layers.items():
        layer = root.get_submodule(path)
        assert isinstance(layer, DecoderLayer)
        before_mlp = f"{path}.post_attention_layernorm.weight"
        if before_mlp in targets:
            targets[f"{path}.{config.mlp_norm}.weight"] = targets.pop(before_mlp)
        if layer.self_attn is not None:
            _reorder_heads(targets, f"{path}.self_attn", layer.self_attn, config, index)
        if layer.linear_attn is not None and (sizes := layer.linear_attn.sizes).layout is DeltaLayout.BY_HEADS:
            for part, rows in (("qkvz", sizes.qkvz_rows), ("ba", sizes.ba_rows)):
                name = f"{path}.linear_attn.in_proj_{part}.weight"
                targets[name] = with_row_order(targets[name], rows)
    return targets


def _reorder_heads(
    targets: dict[str, Target], path: str, attention: Attention | LatentAttention, config: DecoderConfig, index: int
) -> None:
    """Have the attention at `path` filled so that the dimensions its checkpoint rotates together meet; see `rotary_order`."""
    head_dim = config.sizes(index).head_dim
    order_D = rotary_order(config.ropes[index], head_dim, interleaved=config.interleaved_rope)
    if isinstance(attention, Attention) and attention.output_gate:
        first_H1 = torch.arange(attention.spec.num_heads).unsqueeze(1) * 2 * head_dim
        gate_D = torch.arange(head_dim, 2 * head_dim)
        rows = torch.cat(((first_H1 + order_D).flatten(), (first_H1 + gate_D).flatten()))
        for name in {f"{path}.q_proj.{kind}" for kind in ("weight", "bias")} & targets.keys():
            targets[name] = with_row_order(targets[name], rows)
    if torch.equal(order_D, torch.arange(head_dim)):
        return
    num_heads = attention.spec.num_heads
    if isinstance(attention, LatentAttention):
        query_D, entry_D = _behind(attention.sizes.key_dim, order_D), _behind(attention.sizes.kv_rank, order_D)
        orders = {"q_proj": (query_D, num_heads), "q_b_proj": (query_D, num_heads), "kv_a_proj_with_mqa": (entry_D, 1)}
    else:
        heads = {"k_proj": attention.spec.num_kv_heads, "q_norm": 1, "k_norm": 1}
        heads |= {} if attention.output_gate else {"q_proj": num_heads}
        heads["qkv_proj"] = num_heads + attention.spec.num_kv_heads  # values stay
        orders = {part: (order_D, number) for part, number in heads.items()}
    for part, (order_D, number) in orders.items():
        for kind in ("weight", "bias"):
            name = f"{path}.{part}.{kind}"
            if name in targets:
                targets[name] = with_head_order(targets[name], order_D, number)


def _behind(size: int, order_D: Tensor) -> Tensor:
    """The order of a head that begins with `size` dimensions which stay."""
    return torch.cat((torch.arange(size), size + order_D))

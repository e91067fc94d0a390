"""Multi-token prediction: a small module, trained beside the model, that drafts from the model's hidden states.

Source: DeepSeek-AI, "DeepSeek-V3 Technical Report" (2024), section 2.2. A module holds one decoder layer: at position i it
takes the hidden state of position i and the embedding of token i + 1, and predicts token i + 2. Embedding and output head are the
model's. Of several modules, the k-th takes the (k-1)-th's output at position i and token i + k, and predicts token i + k + 1, see
`stepgraph.spec.mtp_levels`. For more proposals than there are modules, the last is repeated on its own output and the token just
proposed, at the position after.

The layer's keys and values are cached like the model's own. Those at position i depend on token i + 1, so they are computed once
that token is known, which for the step's last tokens is after sampling; so the layer runs over all of the step's tokens, also
when nothing is to be proposed. What it cached for proposals lies beyond the tokens that stand, where the next step overwrites it.

Shapes: T tokens of the step or of a module, R rows, E hidden size, V vocabulary, N entries of the draft vocabulary, D modules, K
proposals of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stepgraph import ops
from stepgraph.abi import slot_line
from stepgraph.layers.cache import CacheSpec
from stepgraph.layers.experts import ALL_EXPERTS, ExpertShard
from stepgraph.layers.formats import Target, WeightFormat
from stepgraph.layers.inputs import AttentionSpec, AttentionWork, GroupInputs, StepInputs
from stepgraph.layers.linear import Linear
from stepgraph.layers.norm import RMSNorm
from stepgraph.layers.residual import ResidualStream
from stepgraph.layers.rotary import cos_sin_table
from stepgraph.models.config import DecoderConfig
from stepgraph.models.decoder import named_targets
from stepgraph.models.decoder_layer import DecoderLayer
from stepgraph.models.language_model import LanguageModel
from stepgraph.parallel.group import Group
from stepgraph.parallel.shard import WHOLE, Shard
from stepgraph.platforms import Platform
from stepgraph.spec.drafter import Drafts, DraftStep
from stepgraph.spec.mtp_levels import Level, carry, extend_history, first_level, next_level


@dataclass(frozen=True)
class MTPOptions:
    """In what the published modules differ."""

    hidden_first: bool = False
    """The projection takes (hidden, embedding), not (embedding, hidden)."""
    hands_over_normalised: bool = False
    """The next proposal starts from the output after the final norm, not from the residual stream before it."""
    shares_final_norm: bool = False
    """The module ends with the model's own final norm, and starts from the model's residual stream before that."""


class MTPLayer(nn.Module):
    """One module. Its parameters are uninitialised until a loader fills them."""

    cos_sin: Tensor

    def __init__(
        self,
        config: DecoderConfig,
        options: MTPOptions,
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
        config: of the decoder layer, which is like the last of the model that has attention.
        options: of the module.
        max_model_len: longest sequence, in tokens.
        shard, expert_shard, group, expert_group: as of the model; projection and norms are whole on all ranks.
        dtype, device: of the parameters.
        """
        super().__init__()
        E, last = config.hidden_size, config.last_attention
        assert last is not None, config
        # Of attention and feed-forward, whatever else the model's layers have.
        config = replace(config, is_recurrent=(), attends=(), feeds_forward=())
        self.config, self.options, self._like = config, options, last
        self.group, self.expert_group = group, expert_group
        self.attention_spec = config.attention_spec(last).sharded(shard)
        self.embedding_norm, self.hidden_norm, self.norm = (
            RMSNorm(
                E,
                config.rms_norm_eps,
                weight_offset=config.norm_weight_offset,
                rounds_once=config.norms_round_once,
                dtype=dtype,
                device=device,
            )
            for _ in range(3)
        )
        self.projection = Linear(2 * E, E, dtype=dtype, device=device)
        self.block = DecoderLayer(config, last, shard=shard, expert_shard=expert_shard, dtype=dtype, device=device)
        # It has values from the start, which a module on the meta device keeps in host memory.
        device = torch.device("cpu") if device.type == "meta" else device
        table = cos_sin_table(config.ropes[last], config.sizes(last).head_dim, max_model_len, device)
        self.register_buffer("cos_sin", table, persistent=False)

    def checkpoint_tensors(self) -> dict[str, Target]:
        """Where each tensor of a checkpoint goes, by the names of this class; the shared final norm is none of them."""
        targets = named_targets(self, self.config, {"block": self._like})
        if self.options.shares_final_norm:
            del targets["norm.weight"]
        return targets

    def first_hidden(self, hidden_TE: Tensor) -> Tensor:
        """What the first module takes, from the model's hidden states after its final norm. May run inside a graph."""
        if not self.options.shares_final_norm:
            return hidden_TE
        # Up to a factor, which `hidden_norm` takes out, that is the residual stream before the norm.
        return (hidden_TE / self.norm.weight).to(hidden_TE.dtype)

    def forward(self, embedding_TE: Tensor, hidden_TE: Tensor, cache: Any, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """Run the module, caching its keys and values.

        Args:
            embedding_TE: of the token after each.
            hidden_TE: of each token.
            cache: the module's.
            inputs: where the tokens lie.

        Returns:
            [T, E] for the output head, and [T, E] for the next proposal.
        """
        stream = ResidualStream(self._combine(embedding_TE, hidden_TE), self.group, self.expert_group)
        self.block(stream, self.cos_sin, (cache,), inputs, self.norm)
        normalised_TE = stream.normalised(self.norm)
        return normalised_TE, normalised_TE if self.options.hands_over_normalised else stream.residual_TE

    def cache_only(self, embedding_TE: Tensor, hidden_TE: Tensor, cache: Any, inputs: StepInputs) -> None:
        """Cache keys and values as `forward` does, and no more."""
        x_TE = self._combine(embedding_TE, hidden_TE)
        self.block.attention.cache_only(self.block.input_layernorm, x_TE, self.cos_sin, cache, inputs)

    def _combine(self, embedding_TE: Tensor, hidden_TE: Tensor) -> Tensor:
        parts = self.embedding_norm(embedding_TE), self.hidden_norm(hidden_TE)
        return self.projection(torch.cat(parts[::-1] if self.options.hidden_first else parts, dim=1))


class DraftHead(nn.Module):
    """Output head over a part of the vocabulary, the likeliest tokens: a sub-step mostly reads the head's weights. They are those
    of the model's head, of which `fill` takes the rows."""

    token_ids: Tensor

    def __init__(self, num_tokens: int, hidden_size: int, format: WeightFormat, logits_RV: Tensor) -> None:
        """Args:
        num_tokens: N.
        hidden_size: E.
        format: of the weight.
        logits_RV: filled with -inf, in the dtype of the hidden states; receives the logits of as many rows as it has.
        """
        super().__init__()
        self.part = Linear(hidden_size, num_tokens, format=format, dtype=logits_RV.dtype, device=logits_RV.device)
        token_ids_N = torch.zeros(num_tokens, dtype=torch.int64, device=logits_RV.device)
        self.register_buffer("token_ids", token_ids_N, persistent=False)
        self._logits_RV = logits_RV

    def fill(self, weight_VE: Tensor, token_ids_N: Tensor) -> None:
        """Take the rows of these tokens, int64, from the weight of the model's head, which is in the same format. Not inside a
        graph; the same tokens every time."""
        self.token_ids.copy_(token_ids_N)
        self.part.weight.copy_(weight_VE.index_select(0, self.token_ids))

    def forward(self, hidden_RE: Tensor) -> Tensor:
        """Logits of all of the vocabulary, -inf outside the part: [R, V]. The next call overwrites them."""
        logits_RV = self._logits_RV[: hidden_RE.shape[0]]
        return logits_RV.index_copy_(1, self.token_ids, self.part(hidden_RE))


class MTPDrafter:
    """See `stepgraph.spec.drafter.Drafter`.

    A request that samples gets its proposals sampled too, with the very random numbers that verification will use at those
    positions: so the two agree more often than two draws would, and a proposal is still a fixed function of what came before.
    """

    costs_when_idle = True

    def __init__(
        self,
        layers: Sequence[MTPLayer],
        model: LanguageModel,
        head: DraftHead | None,
        fill: Callable[[], None],
        *,
        max_rows: int,
        platform: Platform,
    ) -> None:
        """Args:
        layers: the modules in order, filled.
        model: whose embedding and, without `head`, output head they share.
        head: over a part of the vocabulary.
        fill: fills modules and head anew.
        max_rows: of a step.
        platform: that its steps run on.
        """
        self.layers = tuple(layers)
        self.lookahead = len(self.layers)
        self._model, self._head, self._fill = model, head, fill
        self._platform = platform
        weight = self.layers[0].projection.weight
        width = 0 if head is not None else model.config.vocab_size
        self._logits_RV = torch.empty(max_rows, width, dtype=model.dtype, device=weight.device)
        # Of each module but the last, for each slot, the null slot included; see `stepgraph.spec.mtp_levels`.
        size = 1 + max_rows, weight.shape[0]
        self.carried = tuple(torch.zeros(size, dtype=model.dtype, device=weight.device) for _ in self.layers[1:])

    @property
    def attention_specs(self) -> tuple[AttentionSpec, ...]:
        """See `Drafter.attention_specs`: the first module runs over the step's own tokens."""
        return (self.layers[0].attention_spec,)

    def cache_specs(self, dtype: torch.dtype) -> tuple[CacheSpec, ...]:
        """See `Drafter.cache_specs`."""
        return tuple(layer.block.attention.cache_spec(dtype) for layer in self.layers)

    def parameters(self) -> Iterator[nn.Parameter]:
        """See `Drafter.parameters`."""
        for layer in self.layers:
            yield from layer.parameters()
        if self._head is not None:
            yield from self._head.parameters()

    def propose(self, step: DraftStep) -> Drafts:
        """See `Drafter.propose`."""
        slot_R, index_R, drafts, hidden_TE = self._run_modules(step)
        D, last, cache = len(self.layers), self.layers[-1], step.caches[-1]
        hidden_RE = hidden_TE.index_select(0, index_R)
        geometry = self._geometry(last, slot_R.shape[0], slot_R.shape[0], decode_tokens=1)
        for place in range(D, step.num_drafts):
            group = _group(step)
            tokens = ops.draft_row_tokens(
                step.lines, group.block_table, slot_R, drafts[-1], place - D + 1, group.block_size
            )
            inputs = self._inputs(step, last, tokens, geometry)
            normalised_RE, hidden_RE = last(self._model.embed(drafts[-1]), hidden_RE, cache, inputs)
            drafts.append(self._choose(normalised_RE, slot_R, place, step.lines))
        return Drafts(torch.stack(drafts, dim=1), torch.full_like(slot_R, step.num_drafts))

    def forget(self) -> None:
        """See `Drafter.forget`."""

    def reload(self) -> None:
        """See `Drafter.reload`."""
        self._fill()

    def follow(self, step: DraftStep) -> None:
        """See `Drafter.follow`."""
        self._run_modules(step)

    def _run_modules(self, step: DraftStep) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
        """Run every module once, so that all caches are kept up.

        Returns:
            Slots of the rows that draft ([R], null for others); where their last tokens that stand lie among those of the last
            module ([R]); the first min(K, D) proposals ([R] each); and, if K ≥ D, the last module's output ([T, E]).
        """
        start = ops.draft_inputs(step.lines, step.tokens, step.inputs.tokens)
        level = first_level(step.inputs.tokens, start.next_ids)
        hidden_TE, index_R, inputs = self.layers[0].first_hidden(step.hidden), start.token_index, step.inputs
        drafts: list[Tensor] = []
        for k, (layer, cache) in enumerate(zip(self.layers, step.caches, strict=True), start=1):
            if k > 1:
                level, hidden_TE = self._next_level(step, level, k, hidden_TE)
                geometry = self._geometry(
                    layer, level.tokens.token_ids.shape[0], start.slot.shape[0], decode_tokens=k + step.num_drafts
                )
                inputs = self._inputs(step, layer, level.tokens, geometry)
                index_R = (level.tokens.query_start[1:] - 1) * (start.slot != slot_line.NULL_SLOT)
            embedding_TE = self._model.embed(level.tokens.token_ids)
            if k == len(self.layers) and k > step.num_drafts:
                layer.cache_only(embedding_TE, hidden_TE, cache, inputs)
                break
            normalised_TE, hidden_TE = layer(embedding_TE, hidden_TE, cache, inputs)
            if k <= step.num_drafts:
                drafts.append(self._choose(normalised_TE.index_select(0, index_R), start.slot, k - 1, step.lines))
                if k < len(self.layers):
                    extend_history(step.lines, step.tokens, start.slot, drafts[-1], k - 1)
        return start.slot, index_R, drafts, hidden_TE

    def _next_level(self, step: DraftStep, level: Level, k: int, hidden_TE: Tensor) -> tuple[Level, Tensor]:
        """The tokens of module k ≥ 2 and the hidden states it takes, from those of module k - 1."""
        carried_SE, group = self.carried[k - 2], _group(step)
        following = next_level(
            level,
            step.inputs.tokens,
            k,
            step.lines,
            step.tokens,
            group.block_table,
            hidden_TE,
            carried_SE,
            group.block_size,
        )
        carry(level, k - 1, step.lines, hidden_TE, carried_SE)
        return following

    def _geometry(
        self, layer: MTPLayer, num_tokens: int, num_rows: int, *, decode_tokens: int
    ) -> ops.AttentionGeometry:
        spec = layer.attention_spec
        if spec.latent:
            return ops.mla_geometry(
                num_tokens,
                num_rows,
                spec.num_heads,
                self._platform.multiprocessors,
                tuning=self._platform.tuning,
            )
        return ops.attention_geometry(
            num_tokens,
            num_rows,
            spec.num_heads,
            spec.num_kv_heads,
            self._platform.multiprocessors,
            head_dim=spec.head_dim,
            decode_tokens=decode_tokens,
            tuning=self._platform.tuning,
        )

    def _inputs(
        self, step: DraftStep, layer: MTPLayer, tokens: ops.StepTokens, geometry: ops.AttentionGeometry
    ) -> StepInputs:
        """What a module sees of tokens that are not laid out as the step's are."""
        work = AttentionWork.of(layer.attention_spec, tokens, geometry)
        groups = tuple(group._replace(tokens=tokens) for group in step.inputs.groups)
        return replace(step.inputs, tokens=tokens, attention={layer.attention_spec: work}, groups=groups)

    def _choose(self, normalised_RE: Tensor, slot_R: Tensor, place: int, lines: Tensor) -> Tensor:
        """The proposal for the place after `place` others: [R] int32."""
        if self._head is None:
            logits_RV = self._model.logits(normalised_RE, out=self._logits_RV[: slot_R.shape[0]])
        else:
            logits_RV = self._head(normalised_RE)
        # Rows that do not draft may get NO_TOKEN, which has no embedding.
        return ops.sample(logits_RV, slot_R, torch.full_like(slot_R, place), lines).clamp_(min=0)


def _group(step: DraftStep) -> GroupInputs:
    """That of the modules' blocks, which are all of one."""
    group: GroupInputs = step.inputs.groups[step.caches[0].group]
    return group

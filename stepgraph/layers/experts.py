"""Mixture of experts: a feed-forward layer of many, of which each token takes a few.

Shapes: T tokens, E hidden size, N experts, K of them for a token, M width of an expert, P = T·K.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from stepgraph import ops
from stepgraph.layers.formats import End, Plain, Target
from stepgraph.layers.formats.target import Skipped
from stepgraph.layers.inputs import DispatchTable, StepInputs
from stepgraph.layers.linear import Linear, MergedLinear
from stepgraph.layers.matrix import Matrix
from stepgraph.layers.mlp import ENDS, MLP, Activation, first_parts
from stepgraph.layers.norm import RMSNorm
from stepgraph.layers.residual import ResidualStream
from stepgraph.ops.route import Routing
from stepgraph.ops.swiglu import Clamp
from stepgraph.parallel.shard import WHOLE, Axis, Cut, Shard

_PLAIN = Plain()


@dataclass(frozen=True)
class ExpertsSpec:
    """The mixture of one layer."""

    num_experts: int
    intermediate_size: int
    """M."""
    routing: Routing
    has_bias: bool = False
    """Whether experts are chosen by scores with a bias that was learned."""
    has_logit_bias: bool = False
    """Whether the router's logits have a bias."""
    has_expert_biases: bool = False
    """Whether the projections of experts have biases."""
    clamp: Clamp | None = None
    """Of the experts' activation."""
    shared_intermediate_size: int = 0
    """Of a feed-forward layer beside the experts that all tokens take; 0: there is none."""
    has_shared_gate: bool = False
    """Whether what it adds is multiplied by the sigmoid of a product with a vector."""
    is_beside_dense: bool = False
    """Whether the layer has a dense feed-forward layer of its own too, see `stepgraph.layers.normed_experts`."""
    latent_size: int = 0
    """Of what experts take and give, between two projections of the layer; 0: there are none."""


@dataclass(frozen=True)
class ExpertShard:
    """How ranks share the experts of a layer.

    Either each has some of the experts, whole, or some of the M of every one.
    """

    experts: Shard = WHOLE
    inner: Shard = WHOLE


ALL_EXPERTS = ExpertShard()
"""One rank has all of them."""


class Router(nn.Module):
    """What chooses the experts; whole on all ranks, in float32."""

    totals: Tensor
    """[N] int64: tokens that chose each expert so far."""
    is_watched = False
    """Whether forward hooks want to see, or to say, what is chosen: then nothing may choose without this module."""

    def __init__(self, spec: ExpertsSpec, hidden_size: int, *, device: torch.device) -> None:
        """Args:
        spec: of the mixture.
        hidden_size: E.
        device: of the parameters.
        """
        super().__init__()
        self.routing = spec.routing
        size = spec.num_experts, hidden_size
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.float32, device=device), False)
        bias = partial(torch.empty, size[0], dtype=torch.float32, device=device)
        self.bias = nn.Parameter(bias(), False) if spec.has_bias else None
        self.logit_bias = nn.Parameter(bias(), False) if spec.has_logit_bias else None
        device = torch.device("cpu") if device.type == "meta" else device  # buffers have values from the start
        self.register_buffer("totals", torch.zeros(size[0], dtype=torch.int64, device=device), persistent=False)

    def forward(self, x_TE: Tensor, counts_B: Tensor) -> ops.Chosen:
        """Choose; see `ops.route`. May run inside a graph."""
        return ops.route(x_TE, self.weight, self.bias, counts_B, self.totals, self.routing, self.logit_bias)

    def mixture(
        self,
        norm: RMSNorm | None,
        x_TE: Tensor,
        counts_B: Tensor,
        weights: ops.ExpertWeights,
        *,
        gelu: bool,
        clamp: Clamp | None,
        gated: bool,
        add_to: Tensor | None,
        multiplier: float,
    ) -> tuple[Tensor, Tensor]:
        """Normalise, choose, and compute what the experts make of it; see `ops.mixture`. May run inside a graph.

        Returns:
            `x_TE` after `norm`, and `add_to` or a new tensor.
        """
        out_TE = torch.empty_like(x_TE) if add_to is None else add_to
        x_TE = ops.mixture(
            x_TE,
            None if norm is None else (norm.weight, norm.eps),
            self.weight,
            self.bias,
            counts_B,
            self.totals,
            self.routing,
            weights,
            out_TE,
            gelu=gelu,
            add=add_to is not None,
            multiplier=multiplier,
            logit_bias=self.logit_bias,
            clamp=clamp,
            gated=gated,
        )
        return x_TE, out_TE


class ExpertLinear(MergedLinear):
    """The weights of all experts that a rank keeps, stacked: [N·O, I], and what else the format has. Checkpoints keep each
    expert's as matrices of their own."""

    def __init__(
        self,
        inputs: Cut,
        outputs: dict[str, Cut],
        num_experts: int,
        experts: Cut,
        *,
        axis: Axis,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Args:
        inputs: which inputs of each expert the rank keeps.
        outputs: which outputs, of each of the projections that are stacked in an expert, by checkpoint name.
        num_experts: of the layer.
        experts: those that the rank keeps.
        axis: along which ranks share each expert, if they do.
        bias: whether each expert has one.
        dtype, device: as of `Matrix`.
        """
        kept = range(experts.begin, experts.begin + experts.length)
        parts: dict[str, tuple[Cut, ...]] = {
            f"{expert}.{name}": (cut if expert in kept else Cut(cut.size, 0, 0),)
            for expert in range(num_experts)
            for name, cut in outputs.items()
        }
        Matrix.__init__(
            self,
            inputs,
            [cut for (cut,) in parts.values()],
            axis=axis,
            bias=bias,
            format=_PLAIN,
            dtype=dtype,
            device=device,
        )
        self.has_biases = bias
        self.parts = parts
        self.num_kept = experts.length

    def part_targets(self) -> dict[str, Target]:
        """See `MergedLinear.part_targets`. Of other ranks' experts, nothing is read."""
        targets = super().part_targets()
        for name, (cut,) in self.parts.items():
            if cut.length == 0:
                shapes = {"weight": (cut.size, self.inputs.size)} | ({"bias": (cut.size,)} if self.has_biases else {})
                for kind, shape in shapes.items():
                    targets[f"{name}.{kind}"] = Skipped(torch.Size(shape), self.dtype, self.weight.device)
        return targets

    @property
    def stacked(self) -> dict[str, Tensor]:
        """The parameters with a dimension for the experts: [N, O, I]."""
        return {
            name: parameter.view(self.num_kept, -1, *parameter.shape[1:])
            for name, parameter in self.parameters_by_name.items()
        }


class Experts(nn.Module):
    """Weights of a layer's experts. May run inside a graph."""

    def __init__(
        self,
        spec: ExpertsSpec,
        hidden_size: int,
        *,
        activation: Activation,
        shard: ExpertShard,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Args:
        spec: of the mixture.
        hidden_size: E.
        activation: of the gates, or of experts without them.
        shard: what this rank keeps.
        dtype, device: of the parameters.
        """
        super().__init__()
        experts, inner = shard.experts.cut(spec.num_experts), shard.inner.cut(spec.intermediate_size)
        self.first, self.count = experts.begin, experts.length
        width = spec.latent_size or hidden_size
        self.gate_up_proj = ExpertLinear(
            Cut.whole(width),
            dict.fromkeys(first_parts(activation), inner),
            spec.num_experts,
            experts,
            axis=Axis.OUT,
            bias=spec.has_expert_biases,
            dtype=dtype,
            device=device,
        )
        self.down_proj = ExpertLinear(
            inner,
            {"down_proj": Cut.whole(width)},
            spec.num_experts,
            experts,
            axis=Axis.IN,
            bias=spec.has_expert_biases,
            dtype=dtype,
            device=device,
        )
        self._end = ENDS[activation]
        self.clamp = spec.clamp

    @property
    def operands(self) -> ops.ExpertWeights | None:
        """For `ops.mixture`; None if that does not take weights of these formats."""
        gate_up, down = (proj.format.mixture_operands(proj.stacked) for proj in (self.gate_up_proj, self.down_proj))
        if gate_up is None or down is None:
            return None
        biases = (proj.stacked.get("bias") for proj in (self.gate_up_proj, self.down_proj))
        return ops.ExpertWeights(*gate_up, *down, self.first, *biases)

    @property
    def is_gelu(self) -> bool:
        """Whether gates have GELU, not SiLU."""
        return self._end is End.GEGLU

    @property
    def is_gated(self) -> bool:
        """Whether experts have gates."""
        return self._end is not End.RELU2

    def forward(
        self,
        x_TE: Tensor,
        chosen: ops.Chosen,
        dispatch: ops.ExpertDispatch,
        *,
        add_to: Tensor | None = None,
        multiplier: float = 1.0,
    ) -> Tensor:
        """What the experts that are kept here make of their tokens.

        Args:
            x_TE: [T, E], normalised.
            chosen: the experts of each token.
            dispatch: how tokens come to them.
            add_to: [T, E], to which it is added; None: to nothing.
            multiplier: of what is added.

        Returns:
            [T, E], `add_to` or a new tensor.
        """
        work = ops.expert_work(chosen, self.first, self.count, dispatch)
        gate_up, down = self.gate_up_proj, self.down_proj
        hidden_PM = gate_up.format.gated_experts(gate_up.stacked, x_TE, work, self._end, self.clamp)
        return down.format.sum_experts(down.stacked, hidden_PM, work, x_TE.shape, add_to, multiplier)


class MixtureMLP(nn.Module):
    """The routed experts and, in some models, a feed-forward layer that all tokens take. May run inside a graph.

    Source: Shazeer et al., "Outrageously Large Neural Networks" (2017); Dai et al., "DeepSeekMoE" (2024).
    """

    shared_experts: MLP | None
    shared_expert_gate: Matrix | None
    fc1_latent_proj: Linear | None
    fc2_latent_proj: Linear | None

    def __init__(
        self,
        spec: ExpertsSpec,
        hidden_size: int,
        *,
        activation: Activation,
        shard: Shard,
        expert_shard: ExpertShard,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Args:
        spec: of the mixture.
        hidden_size: E.
        activation: of all gates.
        shard: the part of this rank of what all tokens take.
        expert_shard: its part of the experts.
        dtype, device: of the parameters.
        """
        super().__init__()
        self.gate = self._router(spec, hidden_size, device)
        self.experts = Experts(spec, hidden_size, activation=activation, shard=expert_shard, dtype=dtype, device=device)
        self.fc1_latent_proj = self.fc2_latent_proj = None
        if spec.latent_size:
            self.fc1_latent_proj = Linear(hidden_size, spec.latent_size, dtype=dtype, device=device)
            self.fc2_latent_proj = Linear(spec.latent_size, hidden_size, dtype=dtype, device=device)
        self.shared_experts = self.shared_expert_gate = None
        if spec.shared_intermediate_size:
            self.shared_experts = MLP(
                hidden_size,
                spec.shared_intermediate_size,
                activation=activation,
                bias=False,
                shard=shard,
                dtype=dtype,
                device=device,
            )
            if spec.has_shared_gate:
                self.shared_expert_gate = Matrix(
                    Cut.whole(hidden_size),
                    [Cut.whole(1)],
                    axis=None,
                    bias=False,
                    format=_PLAIN,
                    dtype=dtype,
                    device=device,
                )

    def _router(self, spec: ExpertsSpec, hidden_size: int, device: torch.device) -> Router:
        return Router(spec, hidden_size, device=device)

    def add_to(
        self,
        stream: ResidualStream,
        norm: RMSNorm | None,
        inputs: StepInputs,
        *,
        multiplier: float,
        post_norm: RMSNorm | None,
        next_norm: RMSNorm | None,
        scale_1: Tensor | None = None,
    ) -> None:
        """See `stepgraph.layers.mlp.MLP.add_to`."""
        if stream.expert_group is not None:
            self._add_exchanged(stream, norm, inputs, multiplier=multiplier, post_norm=post_norm, next_norm=next_norm)
            stream.scale(scale_1)
            return
        counts_1 = inputs.tokens.query_start[-1:]
        left, x_TE = stream.inputs(norm)
        if stream.takes_products and post_norm is None:
            x_TE, _ = self.routed(
                left, x_TE, counts_1, inputs.dispatch, add_to=stream.residual_TE, multiplier=multiplier
            )
            if self.shared_experts is not None:
                shared_TM = self._shared_hidden(x_TE)
                stream.add(
                    self.shared_experts.down_proj,
                    shared_TM,
                    multiplier=multiplier,
                    post_norm=None,
                    next_norm=next_norm,
                )
            stream.scale(scale_1)
            return
        x_TE, part_TE = self.routed(left, x_TE, counts_1, inputs.dispatch)
        if self.shared_experts is not None:
            self.shared_experts.down_proj.product(self._shared_hidden(x_TE), end=End.ADD, out=part_TE)
        stream.add_part(part_TE, multiplier=multiplier, post_norm=post_norm, next_norm=next_norm, scale_1=scale_1)

    def _add_exchanged(
        self,
        stream: ResidualStream,
        norm: RMSNorm | None,
        inputs: StepInputs,
        *,
        multiplier: float,
        post_norm: RMSNorm | None,
        next_norm: RMSNorm | None,
    ) -> None:
        """As `add_to`, where ranks have tokens of their own: those of all come to the experts here, and what they make of them
        goes back. All ranks choose experts for all tokens, as that takes less than to send what was chosen.

        What all tokens take is added apart, so that the bits of a token do not depend on the rank that has it."""
        assert stream.expert_group is not None
        num_tokens, rank = stream.residual_TE.shape[0], stream.expert_group.shard.rank
        x_AE, counts_N = stream.gather_tokens(norm, inputs.tokens.query_start[-1:])
        _, part_AE = self.routed(None, x_AE, counts_N, inputs.dispatch)
        if self.shared_experts is not None:
            own = slice(num_tokens * rank, num_tokens * (rank + 1))
            down_proj, shared_TM = self.shared_experts.down_proj, self._shared_hidden(x_AE[own])
            if post_norm is None:
                stream.add(down_proj, shared_TM, multiplier=multiplier, post_norm=None, next_norm=next_norm)
            else:  # of the sum of both
                down_proj.product(shared_TM, end=End.ADD, out=part_AE[own])
        stream.scatter_sum(part_AE, counts_N, multiplier=multiplier, post_norm=post_norm, next_norm=next_norm)

    def routed(
        self,
        norm: RMSNorm | None,
        x_TE: Tensor,
        counts_B: Tensor,
        table: DispatchTable,
        *,
        add_to: Tensor | None = None,
        multiplier: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Have the routed experts' part of the layer computed.

        Args:
            norm: of `x_TE`; None: it is normalised.
            x_TE: [T, E].
            counts_B: as of `ops.route`.
            table: how tokens come to experts.
            add_to, multiplier: as of `Experts`.

        Returns:
            `x_TE` after `norm`, and what its experts make of it: `add_to` or a new tensor.
        """
        dispatch, to_latent, from_latent = table.of(x_TE.shape[0]), self.fc1_latent_proj, self.fc2_latent_proj
        joins = dispatch is ops.ExpertDispatch.PAIRS and to_latent is None
        operands = self.experts.operands if joins else None
        if operands is not None and not self.gate.is_watched:
            return self.gate.mixture(
                norm,
                x_TE,
                counts_B,
                operands,
                gelu=self.experts.is_gelu,
                clamp=self.experts.clamp,
                gated=self.experts.is_gated,
                add_to=add_to,
                multiplier=multiplier,
            )
        normed_TE: Tensor = x_TE if norm is None else norm(x_TE)
        chosen = self.gate(normed_TE, counts_B)
        if to_latent is not None and from_latent is not None:
            sum_TL = self.experts(to_latent(normed_TE), chosen, dispatch)
            end = End.STORE if add_to is None else End.ADD
            return normed_TE, from_latent.product(sum_TL, end=end, out=add_to, multiplier=multiplier)
        return normed_TE, self.experts(normed_TE, chosen, dispatch, add_to=add_to, multiplier=multiplier)

    def _shared_hidden(self, x_TE: Tensor) -> Tensor:
        assert self.shared_experts is not None
        hidden_TM = self.shared_experts.hidden(None, x_TE)
        if self.shared_expert_gate is None:
            return hidden_TM
        return ops.sigmoid_gate(hidden_TM, self.shared_expert_gate.product(x_TE))

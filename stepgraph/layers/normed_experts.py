"""Experts beside a dense feed-forward layer, each with norms of its own before and after, as Gemma 4 has them.

Shapes: T tokens, E hidden size, N experts, K of them for a token.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from stepgraph import ops
from stepgraph.layers.experts import ExpertShard, ExpertsSpec, MixtureMLP, Router
from stepgraph.layers.inputs import DispatchTable, StepInputs
from stepgraph.layers.mlp import MLP, Activation
from stepgraph.layers.norm import RMSNorm
from stepgraph.layers.residual import ResidualStream
from stepgraph.parallel.shard import Shard


class ScaledRouter(Router):
    """A router whose weights of a token's experts, which add up to 1, are multiplied by a factor of each expert."""

    def __init__(self, spec: ExpertsSpec, hidden_size: int, *, device: torch.device) -> None:
        """Arguments as of `Router`."""
        super().__init__(spec, hidden_size, device=device)
        self.expert_scale = nn.Parameter(torch.empty(spec.num_experts, dtype=torch.float32, device=device), False)

    def forward(self, x_TE: Tensor, counts_B: Tensor) -> ops.Chosen:
        """Choose; see `ops.route`. May run inside a graph."""
        choice = self.weight, self.bias, counts_B, self.totals, self.routing, self.logit_bias
        return ops.route(x_TE, *choice, expert_scale=self.expert_scale)


class NormedExperts(MixtureMLP):
    """The experts of a layer that is dense too. May run inside a graph.

    Router and experts take the residual stream after norms of their own. What the dense layer makes of the stream and what the
    experts make of it are normalised, added up, and normalised again on their way to the stream.
    """

    def __init__(
        self,
        spec: ExpertsSpec,
        hidden_size: int,
        *,
        activation: Activation,
        eps: float,
        shard: Shard,
        expert_shard: ExpertShard,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Args:
        spec: of the mixture.
        hidden_size: E.
        activation: of all gates.
        eps: of the norms.
        shard, expert_shard: as of `MixtureMLP`.
        dtype, device: of the parameters.
        """
        super().__init__(
            spec,
            hidden_size,
            activation=activation,
            shard=shard,
            expert_shard=expert_shard,
            dtype=dtype,
            device=device,
        )
        norm = partial(RMSNorm, hidden_size, eps, rounds_once=True, dtype=dtype, device=device)
        self.router_norm = norm(weight_factor=hidden_size**-0.5)
        self.norm, self.post_norm, self.dense_post_norm = norm(), norm(), norm()

    def _router(self, spec: ExpertsSpec, hidden_size: int, device: torch.device) -> Router:
        return ScaledRouter(spec, hidden_size, device=device)

    def add_beside(
        self,
        dense: MLP,
        stream: ResidualStream,
        norm: RMSNorm,
        inputs: StepInputs,
        *,
        post_norm: RMSNorm,
        scale_1: Tensor | None = None,
    ) -> None:
        """Add both layers' products to the residual stream.

        Args:
            dense: the other layer.
            stream: [T, E], updated.
            norm: of the stream, before the dense layer.
            inputs: of the step.
            post_norm: of what is added.
            scale_1: as of `ResidualStream.add`.
        """
        dense_TE = dense.down_proj.product(dense.hidden(*stream.inputs(norm)))
        x_TE, counts_B, counts_N = stream.residual_TE, inputs.tokens.query_start[-1:], None
        if stream.expert_group is not None:
            x_TE, counts_N = stream.gather_tokens(None, counts_B)
            counts_B = counts_N
        _, routed_TE = self.routed(None, x_TE, counts_B, inputs.dispatch)
        stream.add_beside(
            (dense_TE, self.dense_post_norm),
            (routed_TE, self.post_norm),
            counts_N=counts_N,
            post_norm=post_norm,
            scale_1=scale_1,
        )

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
        """See `MixtureMLP.routed`; `x_TE` is the residual stream, and the norms are this layer's own, whatever `norm` is."""
        chosen = self.gate(self.router_norm(x_TE), counts_B)
        normed_TE: Tensor = self.norm(x_TE)
        dispatch = table.of(x_TE.shape[0])
        return normed_TE, self.experts(normed_TE, chosen, dispatch, add_to=add_to, multiplier=multiplier)

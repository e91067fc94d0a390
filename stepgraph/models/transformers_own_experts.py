"""Classes of transformers whose mixtures of experts are code of their own, which chooses on the host, given ours.

Shapes: T tokens, E hidden size, K experts of a token, S = T·K, N experts, M width of an expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepgraph.models.transformers_interfaces import by_expert
from stepgraph.ops import grouped_linear


def adapt_dbrx(module: Any) -> None:
    """`DbrxExperts`: three matrices, each of all experts below each other."""

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        mlp = module.mlp
        gate_NME, up_NME, down_NME = (
            weight.view(module.num_experts, -1, module.hidden_size) for weight in (mlp.w1, mlp.v1, mlp.w2)
        )

        def run(x_SE: Tensor, _: Tensor, ends_N: Tensor) -> Tensor:
            gate_SM = mlp.activation_fn(grouped_linear(x_SE, gate_NME, ends_N))
            return grouped_linear(gate_SM * grouped_linear(x_SE, up_NME, ends_N), down_NME.transpose(1, 2), ends_N)

        x_TE = hidden_states.reshape(-1, module.hidden_size)
        return by_expert(x_TE, top_k_index, top_k_weights, module.num_experts, run).view(hidden_states.shape)

    module.forward = forward


def adapt_longcat_flash(module: Any) -> None:
    """`LongcatFlashExperts`: those beyond the first `num_routed_experts` give tokens back as they are."""

    def run(x_SE: Tensor, expert_S: Tensor, ends_N: Tensor) -> Tensor:
        ends_N = torch.cat((ends_N[: module.num_routed_experts - 1], ends_N[-1:]))  # the last one's rows are not used
        gate_SM, up_SM = grouped_linear(x_SE, module.gate_up_proj[: len(ends_N)], ends_N).chunk(2, -1)
        y_SE = grouped_linear(module.act_fn(gate_SM) * up_SM, module.down_proj, ends_N)
        return torch.where((expert_S < module.num_routed_experts).unsqueeze(-1), y_SE, x_SE)

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return by_expert(hidden_states, top_k_index, top_k_weights, module.total_experts, run)

    module.forward = forward


def adapt_jetmoe_router(module: Any) -> None:
    """`JetMoeTopKGating`: says where experts' rows end in place of how many there are."""

    def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        logits = module.layer(hidden_states).float()
        top = logits.topk(module.top_k, dim=1)
        expert_S, order_S = top.indices.flatten().sort(0)
        numbers_N = torch.arange(module.num_experts, device=expert_S.device)
        ends_N = torch.searchsorted(expert_S, numbers_N, right=True, out_int32=True)
        gates_S = torch.softmax(top.values, dim=1).type_as(hidden_states).flatten()[order_S]
        return order_S, order_S // module.top_k, gates_S, ends_N, logits

    module.forward = forward


def adapt_jetmoe_experts(module: Any) -> None:
    """`JetMoeParallelExperts`: one matrix each."""

    def forward(inputs: Tensor, expert_size: Tensor) -> Tensor:
        return grouped_linear(inputs, module.weight, expert_size)

    module.forward = forward

"""Operators of a step. One folder each: schema and docs, torch reference, Triton kernel. See `registry`."""

from stepgraph.ops.attention import (
    AttentionGeometry,
    AttentionPlan,
    attention_geometry,
    attention_plan,
    paged_attention,
    tall_tile,
)
from stepgraph.ops.build import BuiltStep, StepSamples, StepTokens, build_step
from stepgraph.ops.causal_conv import causal_conv
from stepgraph.ops.collectives import (
    Mailbox,
    all_gather_columns,
    all_reduce_add,
    gather_tokens,
    reduce_gathered,
    scatter_sum,
)
from stepgraph.ops.commit import commit
from stepgraph.ops.copy_blocks import copy_blocks
from stepgraph.ops.draft import draft_inputs, draft_row_tokens, propose
from stepgraph.ops.expanded_attention import expanded_attention, expanded_geometry
from stepgraph.ops.experts import (
    ExpertDispatch,
    ExpertWeights,
    ExpertWork,
    expert_work,
    gated_experts,
    mixture,
    sum_experts,
)
from stepgraph.ops.force_acceptance import force_acceptance
from stepgraph.ops.four_bit_experts import four_bit_gated_experts, four_bit_sum_experts
from stepgraph.ops.four_bit_linear import (
    four_bit_gated_linear,
    four_bit_linear,
    four_bit_linear_add,
)
from stepgraph.ops.fp8_linear import (
    fp8_gated_linear,
    fp8_linear,
    fp8_linear_add,
    fp8_norm_gated_linear,
    fp8_norm_linear,
)
from stepgraph.ops.gated_delta import gated_delta
from stepgraph.ops.gated_norm import gated_norm
from stepgraph.ops.group_slots import group_slots
from stepgraph.ops.grouped_linear import grouped_linear
from stepgraph.ops.head_linear import head_linear
from stepgraph.ops.kv_signal import kv_signal
from stepgraph.ops.latent_queries import latent_queries
from stepgraph.ops.linear import gated_linear, linear, linear_add, linear_by_row, norm_gated_linear, norm_linear
from stepgraph.ops.logprobs import logprobs
from stepgraph.ops.lookup import lookup
from stepgraph.ops.lora import lora
from stepgraph.ops.mamba2 import mamba2
from stepgraph.ops.mla_attention import mla_attention, mla_context_attention, mla_geometry
from stepgraph.ops.packed import packed_linear, packed_linear_add, packed_norm_linear, packed_norm_swiglu, packed_rows
from stepgraph.ops.packed.experts import packed_gated_experts, packed_sum_experts
from stepgraph.ops.process_logits import process_logits
from stepgraph.ops.registry import register_kernels
from stepgraph.ops.relu2 import relu2
from stepgraph.ops.remember import remember
from stepgraph.ops.rms_norm import rms_norm, rms_norm_add
from stepgraph.ops.rope_attention import rope_attention
from stepgraph.ops.rope_cache import rope_cache
from stepgraph.ops.route import Chosen, Routing, route
from stepgraph.ops.sample import sample
from stepgraph.ops.sigmoid_gate import sigmoid_gate
from stepgraph.ops.swiglu import geglu, swiglu
from stepgraph.ops.write_kv import write_kv

__all__ = [
    "AttentionGeometry",
    "AttentionPlan",
    "BuiltStep",
    "Chosen",
    "ExpertDispatch",
    "ExpertWeights",
    "ExpertWork",
    "Mailbox",
    "Routing",
    "StepSamples",
    "StepTokens",
    "all_gather_columns",
    "all_reduce_add",
    "attention_geometry",
    "attention_plan",
    "build_step",
    "causal_conv",
    "commit",
    "copy_blocks",
    "draft_inputs",
    "draft_row_tokens",
    "expanded_attention",
    "expanded_geometry",
    "expert_work",
    "force_acceptance",
    "four_bit_gated_experts",
    "four_bit_gated_linear",
    "four_bit_linear",
    "four_bit_linear_add",
    "four_bit_sum_experts",
    "fp8_gated_linear",
    "fp8_linear",
    "fp8_linear_add",
    "fp8_norm_gated_linear",
    "fp8_norm_linear",
    "gated_delta",
    "gated_experts",
    "gated_linear",
    "gated_norm",
    "gather_tokens",
    "geglu",
    "group_slots",
    "grouped_linear",
    "head_linear",
    "kv_signal",
    "latent_queries",
    "linear",
    "linear_add",
    "linear_by_row",
    "logprobs",
    "lookup",
    "lora",
    "mamba2",
    "mixture",
    "mla_attention",
    "mla_context_attention",
    "mla_geometry",
    "norm_gated_linear",
    "norm_linear",
    "packed_gated_experts",
    "packed_linear",
    "packed_linear_add",
    "packed_norm_linear",
    "packed_norm_swiglu",
    "packed_rows",
    "packed_sum_experts",
    "paged_attention",
    "process_logits",
    "propose",
    "reduce_gathered",
    "register_kernels",
    "relu2",
    "remember",
    "rms_norm",
    "rms_norm_add",
    "rope_attention",
    "rope_cache",
    "route",
    "sample",
    "scatter_sum",
    "sigmoid_gate",
    "sum_experts",
    "swiglu",
    "tall_tile",
    "write_kv",
]

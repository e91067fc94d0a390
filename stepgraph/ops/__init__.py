"""Operators of a step. One folder each: schema and docs, torch reference, Triton kernel. See `registry`."""

from stepgraph.ops.attention import (
    AttentionGeometry,
    AttentionPlan,
    attention_geometry,
    attention_plan,
    paged_attention,
)
from stepgraph.ops.build import BuiltStep, build_step
from stepgraph.ops.commit import commit
from stepgraph.ops.linear import linear
from stepgraph.ops.rms_norm import add_rms_norm, rms_norm
from stepgraph.ops.rope_cache import rope_cache
from stepgraph.ops.sample import sample
from stepgraph.ops.swiglu import swiglu

__all__ = [
    "AttentionGeometry",
    "AttentionPlan",
    "BuiltStep",
    "add_rms_norm",
    "attention_geometry",
    "attention_plan",
    "build_step",
    "commit",
    "linear",
    "paged_attention",
    "rms_norm",
    "rope_cache",
    "sample",
    "swiglu",
]

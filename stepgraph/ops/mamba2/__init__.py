"""Mamba-2's state-space scan over packed rows: a state per line and head that decays, takes what a token brings, and is read.
Rows of a token and rows of thousands are one operator with a constant grid.

With a step size Δ = clamp(softplus(dt + dt_bias)) and a decay α = exp(-exp(a_log)·Δ), a token makes of the state S

    S ← α·S + B ⊗ Δ·x;    out = Sᵀ C + skip·x

Rows of few tokens run so, token by token. Of longer ones 64 tokens are a chunk, which matrix products compute at once
(`stepgraph.ops.mamba2.chunks`).

Source: Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality"
(2024).
"""

from torch import Tensor

from stepgraph.ops.registry import register

_mamba2 = register(
    "mamba2(Tensor xbc, Tensor dt, Tensor a_log, Tensor dt_bias, Tensor skip, Tensor(a!) state, Tensor read_line, "
    "Tensor write_line, Tensor query_start, Tensor start, Tensor num_stored, float least_step, float most_step, "
    "bool deterministic) -> Tensor",
    {"cpu": "stepgraph.ops.mamba2.cpu:mamba2", "cuda": "stepgraph.ops.mamba2.triton:mamba2"},
)


def mamba2(
    xbc: Tensor,
    dt: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    skip: Tensor,
    state: Tensor,
    read_line: Tensor,
    write_line: Tensor,
    query_start: Tensor,
    start: Tensor,
    num_stored: Tensor,
    *,
    steps: tuple[float, float],
    deterministic: bool,
) -> Tensor:
    """Run every row's tokens from its state on. Runs inside the graph.

    Shapes: U tokens, R rows, H heads, D their size, G groups of them, N size of a group's B and C. Head h is in group
    h // (H / G).

    Args:
        xbc: [U, H·D + 2·G·N], x, then B and C of each group; contiguous.
        dt: [U, H], dtype of `xbc`; rows may lie apart.
        a_log, dt_bias, skip: [H] float32.
        state: [lines, H, N, D] float32. Updated.
        read_line, write_line, query_start, start, num_stored: of the rows, as of `causal_conv`.
        steps: the least and the most Δ.
        deterministic: a token's result does not depend, bit for bit, on which of its row's tokens are in the same step: all rows
            run token by token.

    Returns:
        [U, H·D] contiguous, dtype of `xbc`. Padding tokens get unspecified values.
    """
    rows = read_line, write_line, query_start, start, num_stored
    return _mamba2(xbc, dt, a_log, dt_bias, skip, state, *rows, *steps, deterministic)

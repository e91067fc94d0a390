"""The gated delta rule over packed rows: a state per line and head that forgets, corrects what it holds of a key, and is read by
a query. Rows of a token and rows of thousands are one operator with a constant grid.

With q and k normalised, a decay α = exp(-exp(a_log) · softplus(a + dt_bias)) and a rate β = max_rate · sigmoid(b), a token makes
of the state S

    S ← α·S;    S ← S + k ⊗ β (v - Sᵀk);    out = Sᵀq

Rows of few tokens run so, token by token. Of longer ones 64 tokens are a chunk, within which all corrections follow from one
triangular system, so that matrix products do the work (`stepgraph.ops.gated_delta.chunks`).

Source: Yang et al., "Gated Delta Networks" (2024); the chunked form: Yang et al., "Parallelizing Linear Transformers with the
Delta Rule over Sequence Length" (2024); rates up to 2: Grazzi et al., "Unlocking State-Tracking in Linear RNNs Through Negative
Eigenvalues" (2024).
"""

from torch import Tensor

from stepgraph.ops.registry import register

_gated_delta = register(
    "gated_delta(Tensor qkv, Tensor ba, Tensor a_log, Tensor dt_bias, Tensor(a!) state, Tensor read_line, "
    "Tensor write_line, Tensor query_start, Tensor start, Tensor num_stored, float max_rate, bool deterministic) -> Tensor",
    {"cpu": "stepgraph.ops.gated_delta.cpu:gated_delta", "cuda": "stepgraph.ops.gated_delta.triton:gated_delta"},
)


def gated_delta(
    qkv: Tensor,
    ba: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    read_line: Tensor,
    write_line: Tensor,
    query_start: Tensor,
    start: Tensor,
    num_stored: Tensor,
    *,
    max_rate: float = 1.0,
    deterministic: bool,
) -> Tensor:
    """Run every row's tokens from its state on. Runs inside the graph.

    Shapes: U tokens, R rows, G heads of queries and keys, N their size, H heads of values, a multiple of G, D their size. Head h
    of the values goes with head h // (H / G) of queries and keys.

    Args:
        qkv: [U, 2·G·N + H·D], queries, keys, values; contiguous. Queries and keys are normalised here (L2, 1e-6 under the root),
            and queries divided by √N.
        ba: [U, 2·H], of each head b, then of each head a; rows may lie apart.
        a_log, dt_bias: [H] float32.
        state: [lines, H, N, D] float32. Updated.
        read_line, write_line, query_start, start, num_stored: of the rows, as of `causal_conv`.
        max_rate: at 1, what is held of a key is corrected at most to the value; at 2, to as much beyond it.
        deterministic: a token's result does not depend, bit for bit, on which of its row's tokens are in the same step: all rows
            run token by token.

    Returns:
        [U, H·D] contiguous, dtype of `qkv`. Padding tokens get unspecified values.
    """
    return _gated_delta(
        qkv, ba, a_log, dt_bias, state, read_line, write_line, query_start, start, num_stored, max_rate, deterministic
    )

"""A short causal convolution of each channel over the tokens of a row, with SiLU or without. What reaches back before a row's
first token is in a line of states: the last few inputs.

Source: Gu and Dao, "Mamba" (2023); with gated delta rules: Yang et al., "Gated Delta Networks" (2024); between gates: Liquid AI,
"LFM2 Technical Report" (2025).
"""

from torch import Tensor

from stepgraph.ops.causal_conv import reference
from stepgraph.ops.registry import Inlined, register

_causal_conv = register(
    "causal_conv(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) state, Tensor read_line, Tensor write_line, "
    "Tensor query_start, Tensor start, Tensor num_stored, bool silu) -> Tensor",
    {"cpu": Inlined(reference.causal_conv), "cuda": "stepgraph.ops.causal_conv.triton:causal_conv"},
)


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    read_line: Tensor,
    write_line: Tensor,
    query_start: Tensor,
    start: Tensor,
    num_stored: Tensor,
    *,
    silu: bool,
) -> Tensor:
    """f(bias + Σ_i weight[:, i] · x at the position W - 1 - i before), row by row. May run inside a graph.

    Shapes: U tokens, R rows, C channels, W width of the convolution, at least 2.

    Args:
        x: [U, C]; rows may lie apart, the rest is contiguous.
        weight: [C, W], dtype of `x`; the last entry is of the token itself.
        bias: [C], dtype of `x`, or None.
        state: [lines, W - 1, C], dtype of `x`: in a line, the last inputs before a position, the latest last. Updated.
        read_line: [R] int32, the line with the state before each row.
        write_line: [R] int32, the line that gets its state; the same, or one that no other row reads or writes. The null line may
            be anybody's.
        query_start: [R + 1] int32, where each row begins among the tokens, and the end of all.
        start: [R] int32, position of each row's first token. At 0 the state before it is zero, whatever `state` holds.
        num_stored: [R] int32: the state after so many of a row's tokens is left in `state`; at least 1, at most all, and 0 of a
            row without tokens, which writes to no line but the null line.
        silu: whether f is SiLU; else it is nothing.

    Returns:
        [U, C] contiguous, dtype of `x`; computed in float32 and rounded once. Padding tokens get unspecified values.
    """
    return _causal_conv(x, weight, bias, state, read_line, write_line, query_start, start, num_stored, silu)

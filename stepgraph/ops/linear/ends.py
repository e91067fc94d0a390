"""What becomes of a product while it is still in registers."""

import triton
import triton.language as tl

from stepgraph.ops.swiglu.triton import gated

STORE = "store"
ADD = "add"
"""Add the rounded product, times a multiplier, to what is there."""
SWIGLU = "swiglu"
"""The product with the weight's first half is the gate of that with its second; likewise GEGLU."""
GEGLU = "geglu"
RELU2 = "relu2"
"""Squared ReLU of the product, of experts without gates."""


@triton.jit
def before_add(out, inside, END: tl.constexpr):
    """What a product is added to, to be loaded while it is computed; nothing of use if END does not add."""
    return tl.load(out, mask=inside & (END == "add"), other=0.0)


@triton.jit
def finish(out, product, up, before, multiplier, inside, END: tl.constexpr):
    """Round the product, float32, and do what END says.

    Args:
        out: pointers to the outputs.
        product, up: with the weight; with its second half, if END is an activation.
        before: from `before_add`.
        multiplier: of what is added.
        inside: which outputs there are.
    """
    dtype = out.dtype.element_ty
    rounded = product.to(dtype)
    if END == "add":
        rounded = (before.to(tl.float32) + rounded.to(tl.float32) * multiplier).to(dtype)
    elif END == "swiglu" or END == "geglu":
        rounded = gated(rounded, up.to(dtype), END == "geglu")
    tl.store(out, rounded, mask=inside)

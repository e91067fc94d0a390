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


@triton.jit
def finish(out, product, up, multiplier, inside, END: tl.constexpr):
    """Round the product, float32, and do what END says.

    Args:
        out: pointers to the outputs.
        product, up: with the weight; with its second half, if END is an activation.
        multiplier: of what is added.
        inside: which outputs there are.
    """
    dtype = out.dtype.element_ty
    rounded = product.to(dtype)
    if END == "add":
        before = tl.load(out, mask=inside, other=0.0)
        rounded = (before.to(tl.float32) + rounded.to(tl.float32) * multiplier).to(dtype)
    elif END == "swiglu" or END == "geglu":
        rounded = gated(rounded, up.to(dtype), END == "geglu")
    tl.store(out, rounded, mask=inside)

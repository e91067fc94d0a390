"""Plain torch definition of `fp8_linear`, and of the format of its weights.

Shapes: T tokens, N outputs, K inputs, G groups of inputs.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

GROUP_SIZE = 128
"""Inputs that share a scale, where an output has several."""
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def num_groups(inputs: int) -> int:
    """Scales of an output that has one for every `GROUP_SIZE` inputs."""
    return -(-inputs // GROUP_SIZE)


def quantize(values: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Round a weight to 8 bits, each scale such that the largest of the values it is for becomes the largest code.

    A value of at least 2^-6 / 448 of the largest is off by at most 2^-4 of itself, a smaller one by 2^-10 / 448 of the largest.

    Args:
        values: [N, K], floating point.
        groups: 1, or `num_groups(K)`.

    Returns:
        Codes [N, K] float8_e4m3fn and scales [N, groups] float32.
    """
    grouped_NGK = _grouped(values.float(), groups)
    largest_NG = grouped_NGK.abs().amax(2)
    scale_NG = torch.where(largest_NG > 0, largest_NG / _LARGEST, 1.0).clamp_min(torch.finfo(torch.float32).tiny)
    codes_NK = (grouped_NGK / scale_NG.unsqueeze(2)).flatten(1)[:, : values.shape[1]]
    return codes_NK.to(torch.float8_e4m3fn), scale_NG


def dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    """The values [N, K] float32 that codes [N, K] and scales [N, G] stand for."""
    grouped_NGK = _grouped(weight.float(), scale.shape[1])
    return (grouped_NGK * scale.unsqueeze(2)).flatten(1)[:, : weight.shape[1]]


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """See `stepgraph.ops.fp8_linear.fp8_linear`."""
    return F.linear(x.float(), dequantize(weight, scale), None if bias is None else bias.float()).to(x.dtype)


def _grouped(values: Tensor, groups: int) -> Tensor:
    """[N, G, inputs of a group], padded with zeros."""
    size = values.shape[1] if groups == 1 else GROUP_SIZE
    return F.pad(values, (0, groups * size - values.shape[1])).unflatten(1, (groups, size))

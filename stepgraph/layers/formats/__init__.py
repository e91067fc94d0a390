"""How layers keep their weights.

A format is one file here, a `WeightFormat`, beside the kernels of `stepgraph.ops` that it calls, and a line in `FORMATS`.
"""

from stepgraph.layers.formats.adapted import Adapted
from stepgraph.layers.formats.base import End, FormatOptions, ParameterSpec, WeightFormat, Weights
from stepgraph.layers.formats.four_bit import FourBit
from stepgraph.layers.formats.fp8 import FP8
from stepgraph.layers.formats.packed import Packed
from stepgraph.layers.formats.plain import Plain
from stepgraph.layers.formats.target import Target

__all__ = [
    "FORMATS",
    "FP8",
    "Adapted",
    "End",
    "FormatOptions",
    "FourBit",
    "Packed",
    "ParameterSpec",
    "Plain",
    "Target",
    "WeightFormat",
    "Weights",
]

FORMATS: tuple[type[WeightFormat], ...] = (FP8, Packed, FourBit)
"""Those that keep a quantised checkpoint's tensors as they are stored, each asked in turn (`WeightFormat.keeping`). To add one,
write its file and its kernels, and name it here; its reader joins a checkpoint's codes and scales into one tensor of the same
`quantization`, as `stepgraph.models.fp8_checkpoint` does."""

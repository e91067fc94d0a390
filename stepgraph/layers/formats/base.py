"""How a layer keeps its weight, and the products it computes with it.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from stepgraph import ops
from stepgraph.layers.formats.target import Target
from stepgraph.layers.norm import RMSNorm
from stepgraph.ops.swiglu import Clamp

Weights = Mapping[str, Tensor]
"""A layer's parameters by name: those of its format, and "bias", [O], if it has one. Parts of a layer have views of them."""


class End(Enum):
    """What becomes of a product."""

    STORE = "store"
    ADD = "add"
    """Added, times a multiplier, to what is there."""
    SWIGLU = "swiglu"
    """The product with the weight's first half is the gate of that with its second; likewise GEGLU."""
    GEGLU = "geglu"
    RELU2 = "relu2"
    """Squared ReLU of the product."""


class ParameterSpec(NamedTuple):
    """A parameter to be made."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class FormatOptions:
    """What decides, beside the checkpoint, how a layer keeps its weight."""

    in_layers: bool  # of the decoder, and not at its ends: embedding table and output head
    deterministic: bool  # see `WeightFormat`
    packed: bool  # blocks of quantised checkpoints are kept where there are kernels for them
    repacked: bool  # those of 4 bits become `stepgraph.layers.formats.four_bit.FourBit`
    exact_tokens: int | None  # see `stepgraph.layers.formats.packed.Packed`


class WeightFormat(ABC):
    """How a layer keeps its weight: the parameters that hold it, what fills them, and the products with it.

    A format has no state: layers own the parameters. What a format has to define are `parameters`, `plain_product` and `values`;
    `product` puts what comes before and after a product around it, unless `fused_product` has a kernel that does it all.
    """

    deterministic: bool
    """Whether a token's product may not depend, bit for bit, on the tokens beside it."""
    fills_in_place: ClassVar[bool] = True
    """Whether filling a parameter takes no memory on the device, and launches no kernels of Triton there."""

    @property
    def base(self) -> WeightFormat:
        """The format that keeps the weight: this one, unless it adds to the products of another."""
        return self

    @property
    def input_unit(self) -> int:
        """Inputs that are kept together: ranks share a weight's inputs at multiples of this only."""
        return 1

    @property
    def rounds_above(self) -> int | None:
        """Products of more tokens than this may round their operands to bfloat16; None: none does."""
        return None

    @classmethod
    def keeping(cls, encoding: str, inputs: int, options: FormatOptions) -> WeightFormat | None:
        """The format that keeps a checkpoint's tensors as they are encoded.

        Args:
            encoding: of all tensors that make up the weight, see `CheckpointTensor.quantization`.
            inputs: I.
            options: of the layer.

        Returns:
            None if this is not the format for them: the weight is then kept as numbers.
        """
        return None

    @abstractmethod
    def parameters(self, outputs: int, inputs: int, dtype: torch.dtype) -> dict[str, ParameterSpec]:
        """What a weight [O, I] is kept in, by name; one is "weight". The first dimension of each is O: projections that a layer
        merges have rows of it.

        Args:
            outputs, inputs: O and I.
            dtype: of the activations.
        """

    def targets(self, weights: Weights, inputs: int) -> dict[str, Target]:
        """What a loader fills, by the names of the tensors in a checkpoint: each parameter once, alone or with others.

        Args:
            weights: the parameters, or views of their rows.
            inputs: I.
        """
        return {**weights}

    def product(
        self,
        weights: Weights,
        x_TI: Tensor,
        *,
        norm: RMSNorm | None = None,
        end: End = End.STORE,
        out: Tensor | None = None,
        multiplier: float = 1.0,
    ) -> Tensor:
        """Arguments as of `stepgraph.layers.matrix.Matrix.product`, and the parameters."""
        if norm is not None and not x_TI.is_contiguous():
            x_TI, norm = norm(x_TI), None
        if norm is None and end is End.STORE:
            return self.plain_product(weights, x_TI, out)
        fused = self.fused_product(weights, x_TI, norm, end, out, multiplier)
        if fused is not None:
            return fused
        if norm is not None and end is End.STORE:
            return self.plain_product(weights, norm(x_TI), out)
        product_TO = self.product(weights, x_TI, norm=norm)
        if end is End.ADD:
            assert out is not None
            # `alpha` of 16 bits rounds by position.
            return out.add_(product_TO if multiplier == 1.0 else product_TO.float() * multiplier)
        if end is End.RELU2:
            return ops.relu2(product_TO)
        return (ops.geglu if end is End.GEGLU else ops.swiglu)(product_TO)

    @abstractmethod
    def plain_product(self, weights: Weights, x_TI: Tensor, out: Tensor | None) -> Tensor:
        """Return `x @ weight.T + bias`: [T, O], dtype of `x_TI`; in `out` if that is given, which goes without a bias."""

    def fused_product(
        self, weights: Weights, x_TI: Tensor, norm: RMSNorm | None, end: End, out: Tensor | None, multiplier: float
    ) -> Tensor | None:
        """`product` by one kernel, where something comes before or after; None if there is none for it."""
        return None

    def mixture_operands(self, weights: Weights) -> tuple[Tensor, Tensor | None] | None:
        """Weight and scales of experts for `ops.mixture`; None of formats that it does not take, and of deterministic ones, since
        its sums are not those of steps that it is not for."""
        return None

    def gated_experts(
        self, weights: Weights, x_TE: Tensor, work: ops.ExpertWork, end: End, clamp: Clamp | None = None
    ) -> Tensor:
        """See `ops.gated_experts`. Only of formats that experts may have.

        Args:
            weights: with a dimension for the experts, [N, 2M, E]; without gates [N, M, E].
            x_TE: [T, E].
            work: the pairs of tokens and experts.
            end: `End.SWIGLU` or `End.GEGLU`; without gates `End.RELU2`.
            clamp: of the activation, if it has one.
        """
        raise AssertionError(f"{self} keeps no experts")

    def sum_experts(
        self,
        weights: Weights,
        hidden_PM: Tensor,
        work: ops.ExpertWork,
        shape: torch.Size,
        add_to: Tensor | None,
        multiplier: float,
    ) -> Tensor:
        """See `ops.sum_experts`. Only of formats that experts may have.

        Args:
            weights: with a dimension for the experts, [N, E, M].
            hidden_PM: [P, M], from `gated_experts`.
            work: the pairs of tokens and experts.
            shape: [T, E].
            add_to: [T, E], to which it is added; None: to nothing.
            multiplier: of what is added.

        Returns:
            `add_to` or a new tensor.
        """
        raise AssertionError(f"{self} keeps no experts")

    def rows(self, weights: Weights, index_T: Tensor) -> Tensor:
        """Return a fresh [T, I] tensor of some rows of the weight. Only of formats that embedding tables may have."""
        raise AssertionError(f"{self} keeps no embedding table")

    @abstractmethod
    def values(self, weights: Weights, inputs: int) -> Tensor:
        """The weight as numbers, [O, I]: the parameter itself, or a new tensor of what it stands for."""

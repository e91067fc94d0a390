"""The residual stream of one forward.

Shapes: T tokens, E hidden size, I inputs.
"""

from __future__ import annotations

from torch import Tensor

from stepgraph.layers.formats import End
from stepgraph.layers.matrix import Matrix
from stepgraph.layers.norm import RMSNorm
from stepgraph.parallel.group import Group, Norm


class ResidualStream:
    """What layers add to, and read normalised. All ranks hold the same one. May be used inside a graph.

    A model of one device normalises the stream as it reads it: that, and adding to the stream, are parts of the products before
    and after. Where ranks share the model, what a layer adds is a sum over all of them, and their collective adds it and
    normalises the stream for the next reader.
    """

    def __init__(self, residual_TE: Tensor, group: Group | None) -> None:
        """Args:
        residual_TE: [T, E], updated by `add`.
        group: the ranks that share the model; None: there is one.
        """
        self.residual_TE = residual_TE
        self._group = group
        self._norm: RMSNorm | None = None  # of
        self._normalised_TE = residual_TE

    def inputs(self, norm: RMSNorm) -> tuple[RMSNorm | None, Tensor]:
        """What a product of the stream after `norm` is to take: the norm that is still to come, if it is, and [T, E]."""
        return (None, self._normalised_TE) if norm is self._norm else (norm, self.residual_TE)

    def normalised(self, norm: RMSNorm) -> Tensor:
        """The stream after `norm`: [T, E]."""
        left, x_TE = self.inputs(norm)
        return x_TE if left is None else left(x_TE)

    @property
    def takes_products(self) -> bool:
        """Whether what a layer computes can be added to `residual_TE` as it is computed: there is one rank."""
        return self._group is None

    def add(
        self, matrix: Matrix, x_TI: Tensor, *, multiplier: float, post_norm: RMSNorm | None, next_norm: RMSNorm
    ) -> None:
        """Add a layer's product to the stream.

        Args:
            matrix: of the product; each rank has a part of its inputs.
            x_TI: [T, I], the inputs that this rank has.
            multiplier: of the product, if there is no `post_norm`.
            post_norm: of the product.
            next_norm: after which the stream is read next.
        """
        if self.takes_products and post_norm is None:
            matrix.product(x_TI, end=End.ADD, out=self.residual_TE, multiplier=multiplier)
        else:
            self.add_part(matrix.product(x_TI), multiplier=multiplier, post_norm=post_norm, next_norm=next_norm)

    def add_part(self, part_TE: Tensor, *, multiplier: float, post_norm: RMSNorm | None, next_norm: RMSNorm) -> None:
        """Add what a layer has computed; arguments as of `add`.

        Args:
            part_TE: [T, E], contiguous; of several ranks, what is added is the sum of theirs.
        """
        if self._group is not None:
            self._normalised_TE = self._group.add_sum(
                part_TE,
                self.residual_TE,
                multiplier=multiplier if post_norm is None else 1.0,
                post_norm=None if post_norm is None else _norm(post_norm),
                norm=_norm(next_norm),
            )
            self._norm = next_norm
        elif post_norm is None:
            self.residual_TE.add_(part_TE if multiplier == 1.0 else part_TE.float() * multiplier)
        else:
            self.residual_TE.add_(post_norm(part_TE))


def _norm(norm: RMSNorm) -> Norm:
    return Norm(norm.weight, norm.eps)

"""The residual stream of one forward.

Shapes: T tokens, A tokens of all ranks, N ranks, E hidden size, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepgraph.layers.formats import End
from stepgraph.layers.matrix import Matrix
from stepgraph.layers.norm import RMSNorm
from stepgraph.parallel.group import GatheredTokens, Group, Norm


class ResidualStream:
    """What layers add to, and read normalised. May be used inside a graph.

    A model of one device normalises the stream as it reads it: that, and adding to the stream, are parts of the products before
    and after. Where ranks share the model, all hold the same stream; what a layer adds is a sum over all of them, and their
    collective adds it and normalises the stream for the next reader. Where ranks share only experts, each has tokens and a stream
    of its own; that of all layers with experts comes back to it as such a sum.
    """

    def __init__(self, residual_TE: Tensor, group: Group | None, expert_group: Group | None = None) -> None:
        """Args:
        residual_TE: [T, E], updated by `add`.
        group: the ranks that share the model; None: there is one.
        expert_group: ranks with tokens of their own that share experts; None: this one has all, or `group` shares them.
        """
        assert group is None or expert_group is None
        self.residual_TE = residual_TE
        self.expert_group = expert_group
        self._group = group
        self._norm: RMSNorm | None = None  # of
        self._normalised_TE = residual_TE

    def inputs(self, norm: RMSNorm | None) -> tuple[RMSNorm | None, Tensor]:
        """What a product of the stream after `norm` is to take: the norm that is still to come, if it is, and [T, E]. Without a
        norm, that is the stream as it is."""
        return (None, self._normalised_TE) if norm is self._norm is not None else (norm, self.residual_TE)

    def normalised(self, norm: RMSNorm) -> Tensor:
        """The stream after `norm`: [T, E]."""
        left, x_TE = self.inputs(norm)
        return x_TE if left is None else left(x_TE)

    @property
    def takes_products(self) -> bool:
        """Whether what a layer computes can be added to `residual_TE` as it is computed: there is one rank."""
        return self._group is None

    def add(
        self,
        matrix: Matrix,
        x_TI: Tensor,
        *,
        multiplier: float,
        post_norm: RMSNorm | None,
        next_norm: RMSNorm | None,
        scale_1: Tensor | None = None,
    ) -> None:
        """Add a layer's product to the stream.

        Args:
            matrix: of the product; each rank has a part of its inputs.
            x_TI: [T, I], the inputs that this rank has.
            multiplier: of the product, if there is no `post_norm`.
            post_norm: of the product.
            next_norm: after which the stream is read next; None: as it is.
            scale_1: [1], what the stream is multiplied by after that; None: nothing.
        """
        if self.takes_products and post_norm is None:
            matrix.product(x_TI, end=End.ADD, out=self.residual_TE, multiplier=multiplier)
            self._norm = None
            self.scale(scale_1)
        else:
            self.add_part(
                matrix.product(x_TI),
                multiplier=multiplier,
                post_norm=post_norm,
                next_norm=next_norm,
                scale_1=scale_1,
            )

    def add_part(
        self,
        part_TE: Tensor,
        *,
        multiplier: float,
        post_norm: RMSNorm | None,
        next_norm: RMSNorm | None,
        scale_1: Tensor | None = None,
    ) -> None:
        """Add what a layer has computed; arguments as of `add`.

        Args:
            part_TE: [T, E], contiguous; of several ranks, what is added is the sum of theirs.
        """
        if self._group is not None:
            self._normalised_TE = self._group.add_sum(
                part_TE,
                self.residual_TE,
                multiplier=multiplier if post_norm is None else 1.0,
                post_norm=_norm(post_norm),
                norm=_norm(next_norm),
            )
            self._norm = next_norm
            self.scale(scale_1)
        elif post_norm is None:
            self.residual_TE.add_(part_TE if multiplier == 1.0 else part_TE.float() * multiplier)
            self._norm = None
            self.scale(scale_1)
        else:
            self.add_whole(part_TE, post_norm, scale_1)

    def add_whole(self, x_TE: Tensor, norm: RMSNorm | None = None, scale_1: Tensor | None = None) -> None:
        """Add what all ranks have alike, [T, E], after a norm if there is one; `scale_1` as of `add`."""
        self._norm = None
        if norm is not None:
            norm.add_to(self.residual_TE, x_TE, scale_1)
        else:
            self.residual_TE.add_(x_TE)
            self.scale(scale_1)

    def scale(self, factor_1: Tensor | None) -> None:
        """Multiply the stream by [1], if there is a factor: where what was added last was no norm that takes it."""
        if factor_1 is not None:
            self.residual_TE.mul_(factor_1)
            self._norm = None

    def add_beside(
        self,
        dense: tuple[Tensor, RMSNorm],
        routed: tuple[Tensor, RMSNorm],
        *,
        counts_N: Tensor | None,
        post_norm: RMSNorm,
        scale_1: Tensor | None = None,
    ) -> None:
        """Add what a dense layer and experts beside it have computed: each normalised, and then their sum.

        Args:
            dense: [T, E], contiguous, and its norm; where ranks share the model, what is normalised is the sum of theirs.
            routed: likewise of the experts; where ranks share only these, [A, E] of the tokens of all.
            counts_N: as of `scatter_sum`, where ranks share only experts; else None.
            post_norm: of the sum of both.
            scale_1: as of `add`.
        """
        (dense_TE, dense_norm), (routed_TE, routed_norm) = dense, routed
        first, last = _norm(routed_norm), _norm(post_norm)
        if counts_N is not None:
            assert self.expert_group is not None
            sum_TE = dense_norm(dense_TE)
            sum_TE = self.expert_group.scatter_sum(routed_TE, counts_N, sum_TE, post_norm=first, norm=last)
        elif self._group is not None:
            sum_TE = torch.zeros_like(dense_TE)
            self._group.add_sum(dense_TE, sum_TE, post_norm=_norm(dense_norm))
            sum_TE = self._group.add_sum(routed_TE, sum_TE, post_norm=first, norm=last)
        else:
            sum_TE = dense_norm(dense_TE)
            routed_norm.add_to(sum_TE, routed_TE)
            self.add_whole(sum_TE, post_norm, scale_1)
            return
        self.add_whole(sum_TE, None, scale_1)

    def gather_tokens(self, norm: RMSNorm | None, count_1: Tensor) -> GatheredTokens:
        """The streams of the ranks of `expert_group`, after `norm` if there is one; see `Group.gather_tokens`."""
        assert self.expert_group is not None
        left, x_TE = self.inputs(norm)
        return self.expert_group.gather_tokens(x_TE, count_1, norm=_norm(left))

    def scatter_sum(
        self,
        part_AE: Tensor,
        counts_N: Tensor,
        *,
        multiplier: float,
        post_norm: RMSNorm | None,
        next_norm: RMSNorm | None,
    ) -> None:
        """Add the sum of what the ranks of `expert_group` have computed for this one; arguments as of `add`.

        Args:
            part_AE: [A, E], what this rank computed of the tokens of all.
            counts_N: [N] int32, as `gather_tokens` returned it.
        """
        assert self.expert_group is not None
        self._normalised_TE = self.expert_group.scatter_sum(
            part_AE,
            counts_N,
            self.residual_TE,
            multiplier=multiplier if post_norm is None else 1.0,
            post_norm=_norm(post_norm),
            norm=_norm(next_norm),
        )
        self._norm = next_norm


def _norm(norm: RMSNorm | None) -> Norm | None:
    return None if norm is None else Norm(norm.weight, norm.eps)

"""`widen`: deltas weighted by how far each column's length and direction moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mergeflow.ops.base import Block, Cut, DeltaOp, Reduction, number
from mergeflow.settings import NonNegative, Number, Setting, setting

if TYPE_CHECKING:
    from torch import Tensor

Side = Literal["columns", "rows"]


class Widen(DeltaOp):
    """Weight each column of a delta by how far its length and its direction moved, ranked within its model (WIDEN).

    Of each column of theta_i: the change of its norm | |theta_i| - |theta_0| | and of its direction 1 - cos(theta_i, theta_0). Each
    of both is replaced by its rank within the model, 0 for the least to (n - 1) / n for the greatest of n columns, the first among
    equals the lower. The score of a column is the softmax of its ranks over the models, or `s` where its rank is above t times the
    mean rank of its model. The delta is sum_i (S_length + S_direction) / 2 tau_i.

    In tensors of one axis the magnitudes |tau_i| themselves stand in place of both ranks. Tensors of more than two axes count
    as matrices with their last axis as columns. Any float dtype; computed in float32 (float64 if any input is), norms and
    cosines in float64. The authors take the embedding by its rows: `side: [{match: "*embed_tokens*", value: rows}, {value: columns}]`.
    Columns of norm 0 in both have not turned; in one of both they have by a right angle.
    """

    name = "widen"
    formula = "theta_0 + sum_i (S_length,i + S_direction,i) / 2 tau_i"
    paper = "arXiv:2408.03092"
    cut: ClassVar[Cut] = "row"
    portable = False

    t: Setting[NonNegative] = setting(
        1.0, "How many times the mean rank of its model a rank is above, to count as important."
    )
    s: Setting[Number] = setting(1.0, "The score of what is important.")
    side: Setting[Side] = setting("columns", "What has a length and a direction: columns or rows of matrices.")

    def reduction(self, known: tuple[Any, ...]) -> Reduction | None:
        """One round: the scores."""
        return None if known else _Scores(number(self.t), number(self.s), self.side == "rows")

    def combine(self, deltas: Sequence[Tensor], block: Block) -> Tensor:
        """sum_i score_i tau_i"""
        import torch

        scores: Tensor = block.measured[-1].to(deltas[0])
        if self.side == "rows" and len(block.shape) > 1:
            first = block.start // max(deltas[0].shape[1], 1)
            scores = scores[:, first : first + len(deltas[0]), None]
        total = torch.zeros_like(deltas[0])
        for delta, score in zip(deltas, scores, strict=True):
            total.add_(delta * score)
        return total


@dataclass(frozen=True, slots=True)
class _Sums:
    """Of each column or row |theta_0|^2, then |theta_i|^2 and theta_i theta_0 of each input; of a vector, its |tau_i|."""

    values: Tensor
    vector: bool


@dataclass(frozen=True, slots=True)
class _Scores(Reduction):
    """The scores: (inputs, columns), or (inputs, rows), in float64."""

    cut: ClassVar[Cut] = "row"

    t: float
    s: float
    rows: bool

    def block(self, inputs: Sequence[Tensor], block: Block) -> _Sums:
        import torch

        if len(block.shape) < 2:
            return _Sums(torch.stack([delta.double().abs().reshape(-1) for delta in inputs[1:]]), vector=True)
        axis = 1 if self.rows else 0
        base, *deltas = (tensor.double() for tensor in inputs)
        sums = [base.square().sum(axis)]
        for delta in deltas:
            theta = delta + base
            sums += [theta.square().sum(axis), theta.mul_(base).sum(axis)]
        return _Sums(torch.stack(sums), vector=False)

    def merge(self, parts: Sequence[_Sums]) -> _Sums:
        import torch

        first, *others = parts
        if first.vector or self.rows:
            return _Sums(torch.cat([part.values for part in parts], dim=1), first.vector)
        total = first.values
        for part in others:
            total.add_(part.values)
        return first

    def finish(self, total: _Sums) -> Tensor:
        if total.vector:
            means = total.values.mean(1, keepdim=True)
            return self._scores(total.values, total.values > means * self.t)
        base, squares, products = total.values[:1], total.values[1::2], total.values[2::2]
        lengths = (squares.sqrt() - base.sqrt()).abs_()
        norms = (squares * base).sqrt_()
        cosines = (products / norms).masked_fill_(norms == 0, 0.0).masked_fill_((squares == 0) & (base == 0), 1.0)
        return (self._ranked(lengths) + self._ranked(1 - cosines)) / 2

    def _ranked(self, values: Tensor) -> Tensor:
        """The scores of values of which the place in their own row counts; the first among equals stands lower."""
        places, count = values.argsort(dim=1, stable=True).argsort(dim=1), values.shape[1]
        # Whole numbers are compared, lest rounding decide on a place at the mean.
        return self._scores(places.double() / max(count, 1), places > self.t * (count - 1) / 2)

    def _scores(self, significance: Tensor, important: Tensor) -> Tensor:
        """The softmax over the models; `s` where important."""
        return significance.softmax(0).masked_fill_(important, self.s)

"""`model_stock`: as far from the base to the mean of the models as their angles say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from mergeflow.ops.base import Block, Cut, DeltaOp, Reduction, weighted_sum
from mergeflow.ops.gram import Gram, cosines, row_sums

if TYPE_CHECKING:
    from torch import Tensor

    from mergeflow.ops.gram import Array

_SINGULAR = 1e-6
"""Divisors smaller than this leave the base."""


class ModelStock(DeltaOp):
    """Go from the base towards the mean of its fine-tunes, the farther the more these agree.

    theta_0 + t / K sum_i tau_i with t = K c / (1 + (K - 1) c) and tau_i = theta_i - theta_0, where c is the mean cosine
    between each two of the K deltas as flat vectors or, with `filter_wise`, as vectors along the last axis, each with
    a t of its own. A norm of 0 counts as 1, so that a delta of zeros is at right angles to all; where |1 + (K - 1) c| <
    1e-6 the result is the base. For two models or more, of one shape in any float dtype; computed in float32 (float64
    if any is), the cosines in float64.

    The paper has one angle between all fine-tunes, and the mean of the pairs stands for it; t is not clamped, so deltas
    that point apart (c < 0) lead away from their mean. The last bit depends on the processor.
    """

    name = "model_stock"
    formula = "theta_0 + t / K sum_i tau_i, t = K c / (1 + (K - 1) c), c the mean cosine of pairs"
    paper = "arXiv:2403.19522"
    fewest = 2
    portable = False

    filter_wise: bool = Field(default=False, strict=True, description="A t for each row, and not for each tensor.")

    @property
    def cut(self) -> Cut:  # type: ignore[override]
        """Rows, where each has angles of its own."""
        return "row" if self.filter_wise else "element"

    def reduction(self, known: tuple[Any, ...]) -> Reduction | None:
        """One round: the angles of whole tensors; a row's are found as it is computed."""
        return None if known or self.filter_wise else Gram(_factors, skip=1)

    def combine(self, deltas: Sequence[Tensor], block: Block) -> Tensor:
        """t / K sum_i tau_i"""
        if not self.filter_wise:
            return weighted_sum(deltas, block.measured[0])
        total = weighted_sum(deltas, [1.0] * len(deltas))
        return total.mul_(_row_shares(deltas).unsqueeze(1).to(total.dtype))


def _factors(gram: Array) -> tuple[float, ...]:
    """t / K for each input."""
    import numpy as np

    count = len(gram)
    cosine = float(cosines(gram)[np.triu_indices(count, 1)].mean())
    divisor = 1 + (count - 1) * cosine
    return (0.0 if abs(divisor) < _SINGULAR else cosine / divisor,) * count


def _row_shares(deltas: Sequence[Tensor]) -> Tensor:
    """t / K for each row, in float64."""
    import torch

    count = len(deltas)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    sums = row_sums(deltas, [*((i, i) for i in range(count)), *pairs])
    lengths = torch.where(sums[:count] == 0, 1, sums[:count].sqrt())
    cosine = torch.zeros_like(lengths[0])
    for dot, (i, j) in zip(sums[count:], pairs, strict=True):
        cosine += (dot / (lengths[i] * lengths[j])).clamp_(-1, 1)
    cosine /= len(pairs)
    divisor = 1 + (count - 1) * cosine
    return torch.where(divisor.abs() < _SINGULAR, 0, cosine / divisor)

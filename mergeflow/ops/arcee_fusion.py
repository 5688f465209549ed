"""`arcee_fusion`: take over what changed a model's behaviour most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mergeflow.ops.base import Block, Cut, Op, Reduction
from mergeflow.ops.deltas import Digit, Threshold, at_rank, leading_digits

if TYPE_CHECKING:
    from torch import Tensor

_LEAST = 1e-8
"""Added to each probability."""
_CHUNK = 65_536
"""Elements whose divergence is computed together: few enough to stay in the processor's caches."""


class ArceeFusion(Op):
    """Take the entries of a model whose importance stands out, and the others from the base.

    theta_1 where importance >= median + 1.5 (q_3 - q_1), else theta_0. The importance of an entry is |theta_1 - theta_0|
    times the Kullback-Leibler divergence sum p log(p / q) of its row, where p and q are the softmax of theta_1 and of
    theta_0 along the last axis, each probability plus 1e-8; a tensor of fewer axes than two is one row. The median and
    the quartiles are those of all n importances of the tensor: of the ascending order the ones at int(n / 2 - 1/2) and
    int((n - 1) / 4), int(3 (n - 1) / 4), counted from 0. A model of the base's shape, in any float dtype; the result is
    one of the two bit for bit, the importances are computed in float64.

    The quantiles are exact, whatever the size of the tensor, where mergekit draws a million entries. The importance's
    last bit depends on the processor, and so may an entry at the threshold.
    """

    name = "arcee_fusion"
    formula = "theta_1 where |tau_1| KL(softmax theta_1, softmax theta_0) >= median + 1.5 IQR, else theta_0"
    needs_base = True
    most = 1
    cut = "row"
    portable = False
    shows_non_finite = False
    temporaries = 12

    def reduction(self, known: tuple[Any, ...]) -> Reduction | None:
        """The divergence of each row with the leading digits of the importances, then digit by digit the quartiles."""
        if not known:
            return _Divergence()
        found: tuple[Threshold, ...] = known[0].quartiles if len(known) == 1 else known[-1]
        return _RowDigit(found, _three_times, to_the_end=True) if any(one.shift for one in found) else None

    def measure_bytes(self, inputs: int) -> int:
        """Histograms of 65,536 bins."""
        return 9 * (8 << 16)

    def compute(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        """theta_1 where it is important, else theta_0"""
        import torch

        base, theta = inputs
        found: tuple[Threshold, ...] = block.measured[-1] if len(block.measured) > 1 else block.measured[0].quartiles
        first, median, third = (one.at() for one in found)
        return torch.where(_importance(inputs, block) >= median + 1.5 * (third - first), theta, base)


@dataclass(frozen=True, slots=True)
class _Rows:
    """The divergence of each row in float64, and what is known of the quartiles."""

    divergence: Tensor
    quartiles: tuple[Threshold, ...]


def _importance(inputs: Sequence[Tensor], block: Block) -> Tensor:
    """|theta_1 - theta_0| times the divergence of the row, in float64."""
    base, theta = inputs
    row = block.start // max(base.shape[1], 1)
    divergence = block.measured[0].divergence[row : row + len(base)]
    return _weighed(base, theta, divergence)


def _weighed(base: Tensor, theta: Tensor, divergence: Tensor) -> Tensor:
    return (theta.double() - base).abs_().mul_(divergence.unsqueeze(1))


def _three_times(inputs: Sequence[Tensor], block: Block) -> tuple[Tensor, ...]:
    """The importances, for each of the quartiles."""
    return (_importance(inputs, block).reshape(-1),) * 3


@dataclass(frozen=True, slots=True)
class _Divergence(Reduction):
    """The divergence of each row, and the histogram of the leading digits of the importances."""

    cut: ClassVar[Cut] = "row"

    def block(self, inputs: Sequence[Tensor], block: Block) -> tuple[list[Tensor], Tensor]:
        import torch

        base, theta = inputs
        step = max(_CHUNK // max(base.shape[1], 1), 1)
        rows = [
            _divergence(*(one[start : start + step] for one in inputs)) for start in range(0, max(len(base), 1), step)
        ]
        divergence = torch.cat(rows)
        return [divergence], leading_digits(_weighed(base, theta, divergence).reshape(-1))

    def merge(self, parts: Sequence[tuple[list[Tensor], Tensor]]) -> tuple[list[Tensor], Tensor]:
        (rows, counts), *others = parts
        for more, count in others:
            rows.extend(more)
            counts.add_(count)
        return rows, counts

    def finish(self, total: tuple[list[Tensor], Tensor]) -> _Rows:
        import torch

        rows, counts = total
        size = int(counts.sum())
        # The k-th of the ascending order, counted from 0, is the (n - k)-th largest.
        ranks = [size - int(share * (size - 1)) for share in (0.25, 0.5, 0.75)]
        found = tuple(at_rank(counts, rank) if size else Threshold(True, 0, 0, 0, 0) for rank in ranks)
        return _Rows(torch.cat(rows), found)


def _divergence(base: Tensor, theta: Tensor) -> Tensor:
    """sum p log(p / q) for each row; not below 0, which only rounding leads to."""
    p, q = (one.double().softmax(1).add_(_LEAST) for one in (theta, base))
    return (p / q).log_().mul_(p).sum(1).clamp_(min=0)


class _RowDigit(Digit):
    """The next digit of the quartiles, from whole rows."""

    cut: ClassVar[Cut] = "row"

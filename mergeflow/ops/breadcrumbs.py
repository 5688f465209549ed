"""`breadcrumbs` and `breadcrumbs_ties`: drop the largest and the smallest entries of each delta, merge what is between.

What is kept lies between two thresholds, each found as trim finds its own: what is above the lower one, less what is above the
upper one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from mergeflow.ops.base import Block, Reduction, numbers
from mergeflow.ops.deltas import Rescale, Selection, Share, Threshold, largest, selecting, the_deltas, trimming_bytes
from mergeflow.ops.sparsified import NORMS, Norms, Sparsified, Voting, measured
from mergeflow.settings import PerInput, Unit, setting

if TYPE_CHECKING:
    from torch import Tensor


class Breadcrumbs(Sparsified):
    """Drop the largest and the smallest entries of each delta, and add the weighted sum of the rest.

    theta_0 + s sum_i w_i f_i b(tau_i) with tau_i = theta_i - theta_0. Of the n entries of a tensor, b keeps int(density n): those
    that are left when the int(gamma n) largest in magnitude and then the smallest are dropped; where so many are to be kept that
    no smallest are left, fewer of the largest are dropped. A density of 1 asks for no number: all but the int(gamma n)
    largest are kept. The order is that of trim: by magnitude, and among equals the lowest index counts as the largest.
    f_i is 1 unless `rescale` makes up for what was dropped. With `normalize` the sum is divided by sum_i w_i; weights that
    sum to 0 are then refused when planning.

    The thresholds are exact, whatever the size of the tensor. Models and deltas of one shape, in any float dtype; computed in
    float32 (float64 if any input is).
    """

    name = "breadcrumbs"
    formula = "theta_0 + s sum_i w_i f_i b(tau_i)"
    paper = "arXiv:2312.06795"
    shows_non_finite = False

    gamma: PerInput[Unit] = setting(0.01, "Part of this delta's entries to drop as outliers, the largest first.")
    rescale: Rescale = Field(
        default="none", description="Make up for what was dropped: keep that norm of the delta, or times 1 / density."
    )

    def reduction(self, known: tuple[Any, ...]) -> Reduction | None:
        """The rounds that find the thresholds, and one for a norm; none where nothing is dropped."""
        shares = self._shares()
        if not any(shares) or (known and measured(Block(measured=known))):
            return None
        found = selecting(known, Selection(shares, _each_twice))
        return Norms(self, self.rescale) if found is None and self.rescale in NORMS else found

    def measure_bytes(self, inputs: int) -> int:
        """What finding the thresholds holds at most."""
        return trimming_bytes(2 * inputs)

    def _shares(self) -> tuple[Share | None, ...]:
        """Of each delta what the lower threshold keeps, and what the upper one takes of that."""
        shares: list[Share | None] = []
        for density, gamma in zip(numbers(self.density), numbers(self.gamma), strict=True):
            shares.append(None if density == 1 else _Above(density, gamma, upper=False))
            shares.append(None if gamma == 0 else _Above(density, gamma, upper=True))
        return tuple(shares)

    def sparse(self, deltas: Sequence[Tensor], block: Block) -> Sequence[tuple[Tensor, float]]:
        """b(tau_i), and the factor that makes up for it."""
        factors = measured(block)
        known = block.measured[: -1 if factors else None]
        found: Sequence[Threshold | None] = known[-1] if known else [None] * (2 * len(deltas))
        result = []
        for which, (delta, density) in enumerate(zip(deltas, numbers(self.density), strict=True)):
            lower, upper = found[2 * which : 2 * which + 2]
            kept = largest(delta, lower, block) if lower else delta
            if upper:
                outliers = largest(delta, upper, block)
                kept = delta - outliers if kept is delta else kept.sub_(outliers)
            factor = factors.factors[which] if factors else 1 / density if self.rescale == "probability" else 1.0
            result.append((kept, factor))
        return result


class BreadcrumbsTies(Breadcrumbs, Voting):
    """Drop the largest and the smallest entries of each delta, and merge what agrees in sign of the rest.

    theta_0 + s sum_i m_i w_i f_i b(tau_i): `breadcrumbs` with the vote of `ties`. The elected sign of an entry is that of
    sum_i w_i f_i b(tau_i), 0 counting as +; m_i is 1 where w_i f_i b(tau_i) has the elected sign, so a dropped entry never
    votes. With `normalize` each entry is divided by sum_i m_i w_i; where that is 0 the delta is 0.

    Models and deltas of one shape, in any float dtype; computed in float32 (float64 if any input is).
    """

    name = "breadcrumbs_ties"
    formula = "theta_0 + s sum_i m_i w_i f_i b(tau_i)"


def _each_twice(inputs: Sequence[Tensor], block: Block) -> Sequence[Tensor]:
    """The deltas, each for both of its thresholds."""
    return [delta for delta in the_deltas(inputs, block) for _ in range(2)]


@dataclass(frozen=True, slots=True)
class _Above:
    """How many of the largest entries are above the lower threshold, or above the upper one, of what breadcrumbs keeps."""

    density: float
    gamma: float
    upper: bool
    not_zero: ClassVar[bool] = False

    def of(self, size: int) -> int:
        """size - start, or size - start - keep"""
        top = int(self.gamma * size)
        keep = size - top if self.density == 1 else int(self.density * size)
        start = max(0, size - keep - top)
        return size - start - keep if self.upper else size - start

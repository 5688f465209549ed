"""`star`: the strongest singular directions of each delta, as strong together as all were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergeflow.ops.base import number, numbers
from mergeflow.ops.deltas import divided, refuse_zero_sum, scaled
from mergeflow.ops.spectral import Deltas, SpectralOp, Svd, thin_svd
from mergeflow.settings import Flag, Fraction, Number, PerInput, Setting, setting

if TYPE_CHECKING:
    from torch import Tensor


class Star(SpectralOp):
    """Keep the strongest singular directions of each delta, make up for the rest, and average (STAR).

    tau_i = U S V^T keeps the fewest largest singular values that sum to at least eta sum(S), and these are multiplied by
    sum(S) / sum(kept S), so that the nuclear norm stays; the delta is s sum_i w_i star(tau_i) / sum_i w_i. Without `normalize`
    the sum is not divided. Matrices (m, n) in any float dtype; computed in float64.
    """

    name = "star"
    formula = "theta_0 + s sum_i w_i star(tau_i) / sum_i w_i"
    paper = "arXiv:2502.10339"
    temporaries = 24

    weight: PerInput[Number] = setting(1.0, "Share of this delta.")
    eta: Setting[Fraction] = setting(0.4, "Share of a delta's nuclear norm that its kept directions have at least.")
    normalize: Setting[Flag] = setting(True, "Divide by the sum of the weights.")
    scale: Setting[Number] = setting(1.0, "Multiplies the merged delta before it is added to the base.")

    def check(self) -> None:
        """Raises RecipeError where the weights sum to 0 and would divide."""
        if self.normalize:
            refuse_zero_sum(numbers(self.weight))

    def merged(self, deltas: Sequence[Tensor]) -> Tensor:
        """s sum_i w_i star(tau_i) / sum_i w_i"""
        import torch

        weights = numbers(self.weight)
        taus = Deltas(deltas, [1.0] * len(deltas))
        total = torch.zeros_like(deltas[0], dtype=torch.float64)
        for delta, weight in zip(taus, weights, strict=True):
            total.add_(scaled(_truncated(thin_svd(delta, taus.rounding), number(self.eta)), weight, own=True))
        if self.normalize:
            total = divided(total, weights, own=True)
        return scaled(total, number(self.scale), own=True)


def _truncated(found: Svd, eta: float) -> Tensor:
    """The matrix of the fewest largest directions that have a share `eta` of the nuclear norm, scaled to all of it."""
    sums = found.s.cumsum(0)
    if not len(sums):
        return found.matrix()
    kept = found.first(int((sums < eta * sums[-1]).sum()) + 1)
    return Svd(kept.u, kept.s * (sums[-1] / kept.s.sum()), kept.vh).matrix()

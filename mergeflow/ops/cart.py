"""`cart`: task arithmetic of low rank, around the average instead of the base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergeflow.ops.base import number, numbers
from mergeflow.ops.deltas import divided, refuse_zero_sum
from mergeflow.ops.spectral import Deltas, SpectralOp, ranks_of, thin_svd
from mergeflow.settings import Fraction, Number, PerInput, Setting, setting

if TYPE_CHECKING:
    from torch import Tensor


class Cart(SpectralOp):
    """Average the models, and add what is strongest in the difference of each from the average (CART).

    With mu = sum_i w_i tau_i / sum_i w_i, the delta is mu + s K sum_i w_i top_k(tau_i - mu) / sum_i w_i for K inputs, top_k keeping
    the k = rank min(m, n) largest singular directions, rounded down, at least one. Matrices (m, n) in any float dtype; computed in
    float64.

    The weighted differences sum to 0: with all directions, scale 0, one input or equal inputs the result is the average.
    """

    name = "cart"
    formula = "theta_0 + mu + s K sum_i w_i top_k(tau_i - mu) / sum_i w_i, mu = sum_i w_i tau_i / sum_i w_i"
    paper = "arXiv:2412.12153"
    temporaries = 32

    weight: PerInput[Number] = setting(1.0, "Share of this delta in the average, and in what is added to it.")
    rank: Setting[Fraction] = setting(0.08, "Share of the singular directions that are kept of each difference.")
    scale: Setting[Number] = setting(1.0, "Multiplies what is kept, before it is added to the average.")

    def check(self) -> None:
        """Raises RecipeError where the weights sum to 0."""
        refuse_zero_sum(numbers(self.weight), "cart divides", "Change a weight.")

    def merged(self, deltas: Sequence[Tensor]) -> Tensor:
        """mu + s K sum_i w_i top_k(tau_i - mu) / sum_i w_i"""
        import torch

        weights = numbers(self.weight)
        mean = divided(Deltas(deltas, weights).total(), weights, own=True)
        taus = Deltas(deltas, [1.0] * len(deltas))
        kept = ranks_of(number(self.rank), taus.rank)
        if kept == taus.rank:
            return mean
        merged, share = mean.clone(), number(self.scale) * len(taus) / math.fsum(weights)
        for delta, weight in zip(taus, weights, strict=True):
            # Equal inputs differ from their average by the rounding of float64 alone.
            floor = torch.finfo(torch.float64).eps * float(torch.linalg.matrix_norm(delta))
            strongest = thin_svd(delta - mean, taus.rounding, floor).first(kept)
            merged.add_(strongest.matrix().mul_(weight * share))
        return merged

"""`cart`: task arithmetic of low rank, around the average instead of the base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergeflow.ops.base import number, numbers
from mergeflow.ops.spectral import Deltas, SpectralOp, ranks_of, thin_svd
from mergeflow.settings import Fraction, Number, PerInput, Setting, setting

if TYPE_CHECKING:
    from torch import Tensor


class Cart(SpectralOp):
    """Average the models, and add what is strongest in the difference of each from the average (CART).

    With mu the mean of the w_i tau_i, the delta is mu + s sum_i top_k(w_i tau_i - mu), top_k keeping the k = rank min(m, n)
    largest singular directions, rounded down, at least one. Matrices (m, n) in any float dtype; computed in float64.

    The differences sum to 0: with rank 1 (all directions), scale 0, one input or equal inputs the result is the average.
    """

    name = "cart"
    formula = "theta_0 + mu + s sum_i top_k(w_i tau_i - mu), mu = sum_i w_i tau_i / K"
    paper = "arXiv:2412.12153"
    temporaries = 32

    weight: PerInput[Number] = setting(1.0, "Multiplies this delta first.")
    rank: Setting[Fraction] = setting(0.08, "Share of the singular directions that are kept of each difference.")
    scale: Setting[Number] = setting(1.0, "Multiplies the sum of what is kept, before it is added to the average.")

    def merged(self, deltas: Sequence[Tensor]) -> Tensor:
        """mu + s sum_i top_k(w_i tau_i - mu)"""
        import torch

        taus = Deltas(deltas, numbers(self.weight))
        mean = taus.total().div_(len(taus))
        merged = mean.clone()
        kept = ranks_of(number(self.rank), taus.rank)
        if kept == taus.rank:
            return merged
        for delta in taus:
            # Equal inputs differ from their average by the rounding of float64 alone.
            floor = torch.finfo(torch.float64).eps * float(torch.linalg.matrix_norm(delta))
            merged.add_(thin_svd(delta - mean, taus.rounding, floor).first(kept).matrix().mul_(number(self.scale)))
        return merged

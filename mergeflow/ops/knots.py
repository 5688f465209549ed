"""`knots`: TIES in the space of right singular vectors that all deltas share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from mergeflow.ops.base import Block, measure, number
from mergeflow.ops.deltas import Rounding, Vote, scaled
from mergeflow.ops.spectral import Deltas, SpectralOp, thin_svd
from mergeflow.ops.ties import Ties
from mergeflow.settings import Flag, Fraction, Number, PerInput, Setting, setting

if TYPE_CHECKING:
    from torch import Tensor


class Knots(SpectralOp):
    """Align the deltas by one decomposition of all of them, merge what is aligned by TIES, and turn it back (KnOTS-TIES).

    [tau_1 .. tau_K] side by side is U S [V_1^T .. V_K^T]; the delta is s U ties(S V_1^T, .., S V_K^T), with the trim, the vote
    and the weighted mean of `ties`. Matrices (m, n) in any float dtype; computed in float64.

    Directions whose singular value is 0 up to the rounding of the deltas are left out, so `density` is a share of rank times n
    entries. The threshold is found for each tensor alone, where the authors' code finds one over all of them.
    """

    name = "knots"
    formula = "theta_0 + s U ties(S V_1^T, .., S V_K^T), U S [V_1^T .. V_K^T] = [tau_1 .. tau_K]"
    paper = "arXiv:2410.19735"
    temporaries = 44

    weight: PerInput[Number] = setting(1.0, "Multiplies this aligned delta, before the vote.")
    density: PerInput[Fraction] = setting(1.0, "Part of this aligned delta's entries to keep, the largest first.")
    normalize: Setting[Flag] = setting(True, "Divide each entry by the weights of the deltas that agree on it.")
    scale: Setting[Number] = setting(1.0, "Multiplies the merged delta before it is added to the base.")
    rounding: Rounding = Field(default="floor", description="How density times size becomes a number of entries.")
    vote: Vote = Field(default="mass", description="Elect the sign of the sum (mass), or of the majority (count).")

    def merged(self, deltas: Sequence[Tensor]) -> Tensor:
        """s U ties(S V_1^T, .., S V_K^T)"""
        import torch

        taus = Deltas(deltas, [1.0] * len(deltas))
        rows, columns = taus.shape
        joint = torch.empty(rows, columns * len(taus), dtype=torch.float64, device=deltas[0].device)
        for place, tau in zip(joint.tensor_split(len(taus), dim=1), taus, strict=True):
            place.copy_(tau)
        left, strengths, right = thin_svd(joint, taus.rounding)
        right.mul_(strengths[:, None])
        aligned = [part.reshape(-1) for part in right.tensor_split(len(taus), dim=1)]
        del joint, right
        ties = Ties.model_construct(
            weight=self.weight, density=self.density, normalize=self.normalize, rounding=self.rounding, vote=self.vote
        )
        measured = measure(ties, [aligned[0], *aligned])
        chosen = ties.combine(aligned, Block(measured=measured))
        return scaled(left @ chosen.view(len(strengths), columns), number(self.scale), own=True)

"""`tsv`: the strongest singular directions of each delta, made orthogonal to those of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergeflow.ops.base import number, numbers
from mergeflow.ops.deltas import scaled
from mergeflow.ops.spectral import Deltas, SpectralOp, polar, thin_svd
from mergeflow.settings import Number, PerInput, Setting, setting

if TYPE_CHECKING:
    from torch import Tensor


class Tsv(SpectralOp):
    """Keep the strongest singular directions of each delta, and make all of them orthogonal before they are added (TSV-M).

    w_i tau_i = U_i S_i V_i^T for each input; of min(m, n) directions each of K inputs keeps the min(m, n) / K largest,
    rounded down, and at least one. With the kept U_i side by side, the V_i^T above each other and the S_i in a row, the
    delta is s polar(U) diag(S) polar(V^T), polar(A) being the orthogonal factor of A. Matrices (m, n) in any float dtype;
    computed in float64.

    Directions whose singular value is 0 up to the rounding of the deltas are left out, where published code keeps what the
    solver happens to give for them. Equal inputs give the strongest directions of that input.
    """

    name = "tsv"
    formula = "theta_0 + s polar([U_1 .. U_K]) diag(S_1 .. S_K) polar([V_1^T; ..; V_K^T])"
    paper = "arXiv:2412.00081"
    temporaries = 28

    weight: PerInput[Number] = setting(1.0, "Multiplies this delta before it is decomposed.")
    scale: Setting[Number] = setting(1.0, "Multiplies the merged delta before it is added to the base.")

    def merged(self, deltas: Sequence[Tensor]) -> Tensor:
        """s polar(U) diag(S) polar(V^T)"""
        import torch

        taus = Deltas(deltas, numbers(self.weight))
        share = max(1, taus.rank // len(taus))
        parts = [thin_svd(delta, taus.rounding).first(share) for delta in taus]
        left = polar(torch.cat([part.u for part in parts], dim=1), taus.rounding)
        right = polar(torch.cat([part.vh for part in parts]), taus.rounding)
        return scaled((left * torch.cat([part.s for part in parts])) @ right, number(self.scale), own=True)

"""`iso_c`: the summed deltas with all singular values made equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergeflow.ops.base import number, numbers
from mergeflow.ops.spectral import Deltas, SpectralOp, thin_svd
from mergeflow.settings import Number, PerInput, Setting, setting

if TYPE_CHECKING:
    from torch import Tensor


class IsoC(SpectralOp):
    """Add the deltas up and give all their singular directions the same strength (Iso-C).

    sum_i w_i tau_i = U S V^T; the delta is s mean(S) U V^T, the mean over all min(m, n) singular values. Matrices (m, n)
    in any float dtype; computed in float64.

    Directions whose singular value is 0 up to the rounding of the deltas stay 0, where published code gives the strength to
    whatever the solver happens to give for them.
    """

    name = "iso_c"
    formula = "theta_0 + s mean(S) U V^T, U S V^T = sum_i w_i tau_i"
    paper = "arXiv:2502.04959"
    temporaries = 24

    weight: PerInput[Number] = setting(1.0, "Multiplies this delta before the sum.")
    scale: Setting[Number] = setting(1.0, "Multiplies the merged delta before it is added to the base.")

    def merged(self, deltas: Sequence[Tensor]) -> Tensor:
        """s mean(S) U V^T"""
        taus = Deltas(deltas, numbers(self.weight))
        found = thin_svd(taus.total(), taus.rounding)
        strength = float(found.s.sum()) / taus.rank
        return (found.u @ found.vh).mul_(strength * number(self.scale))

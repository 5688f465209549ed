"""`iso_cts`: the common directions of the deltas and those of each alone, all of one strength."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergeflow.ops.base import number, numbers
from mergeflow.ops.spectral import Deltas, SpectralOp, polar, thin_svd
from mergeflow.settings import Number, PerInput, Setting, Unit, setting

if TYPE_CHECKING:
    from torch import Tensor


class IsoCts(SpectralOp):
    """Join the strongest directions of the summed deltas with those of each delta beside them, all of one strength (Iso-CTS).

    The common space is spanned by the left singular vectors C of sum_i w_i tau_i that are the largest; what a delta has
    outside of it is w_i tau_i - C C^T w_i tau_i, of which each of K inputs gives its d largest directions: d = (r - int(common
    r)) / K to the nearest whole number (a half to the even one), r = min(m, n), and the common space has the r - K d that are
    left. With U, S, V^T the vectors and values of all of them, the delta is s mean(S) polar(U) polar(V^T). Matrices (m, n) in
    any float dtype; computed in float64.

    Directions whose singular value is 0 up to the rounding of the deltas are left out. `common: 1` is `iso_c`.
    """

    name = "iso_cts"
    formula = "theta_0 + s mean(S) polar(U) polar(V^T) over common and task directions"
    paper = "arXiv:2502.04959"
    temporaries = 44

    weight: PerInput[Number] = setting(1.0, "Multiplies this delta first.")
    common: Setting[Unit] = setting(0.8, "Share of the directions that come from the sum of the deltas.")
    scale: Setting[Number] = setting(1.0, "Multiplies the merged delta before it is added to the base.")

    def merged(self, deltas: Sequence[Tensor]) -> Tensor:
        """s mean(S) polar(U) polar(V^T)"""
        import torch

        taus = Deltas(deltas, numbers(self.weight))
        own = _own(taus.rank, number(self.common), len(taus))
        shared = thin_svd(taus.total(), taus.rounding).first(taus.rank - own * len(taus))
        parts = [shared]
        if own:
            for delta in taus:
                # What projecting leaves of a delta inside the common space is rounding, of the size of the delta's own.
                floor = taus.rounding * float(torch.linalg.matrix_norm(delta))
                rest = delta - shared.u @ (shared.u.mT @ delta)
                parts.append(thin_svd(rest, taus.rounding, floor).first(own))
        left = polar(torch.cat([part.u for part in parts], dim=1), taus.rounding)
        right = polar(torch.cat([part.vh for part in parts]), taus.rounding)
        strength = sum(float(part.s.sum()) for part in parts) / taus.rank
        return (left @ right).mul_(strength * number(self.scale))


def _own(rank: int, common: float, count: int) -> int:
    """How many directions each of `count` inputs gives."""
    return min(round((rank - int(rank * common)) / count), rank // count)

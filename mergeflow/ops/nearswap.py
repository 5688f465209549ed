"""`nearswap`: take over another model where it differs little."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergeflow.ops.base import Block, DeltaOp, number
from mergeflow.settings import NonNegative, Setting, setting

if TYPE_CHECKING:
    from torch import Tensor


class NearSwap(DeltaOp):
    """Swap entries of the base for another model's where they are near, and move the others by `t` towards it.

    v theta_1 + (1 - v) theta_0 with v = clamp(t / |theta_1 - theta_0|, 0, 1), and v = 1 where both are equal; that is
    theta_0 + clamp(tau_1, -t, t) with tau_1 = theta_1 - theta_0, which divides by nothing. Element by element, for a
    model or a delta of the base's shape in any float dtype; computed in float32 (float64 if either is).
    """

    name = "nearswap"
    formula = "theta_0 + clamp(tau_1, -t, t)"
    most = 1
    shows_non_finite = False

    t: Setting[NonNegative] = setting(..., "How far an entry moves at most.")

    def combine(self, deltas: Sequence[Tensor], block: Block) -> Tensor:
        """clamp(tau_1, -t, t)"""
        bound = number(self.t)
        return deltas[0].clamp(-bound, bound)

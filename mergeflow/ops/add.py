"""`add`: deltas onto a base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergeflow.ops.base import Block, DeltaOp, numbers, weighted_sum
from mergeflow.settings import Number, PerInput, setting

if TYPE_CHECKING:
    from torch import Tensor


class Add(DeltaOp):
    """Add deltas to a base.

    theta_0 + sum_i w_i tau_i, element by element, where every input is a delta already (a `task_vector`, an adapter,
    or a node of such); computed in float32 (float64 if any input is).

    A model given as an input is refused: `task_arithmetic` subtracts the base first.
    """

    name = "add"
    formula = "theta_0 + sum_i w_i tau_i"
    paper = "arXiv:2212.04089"
    deltas_only = True

    weight: PerInput[Number] = setting(1.0, "Multiplies this delta; negative takes away what it learnt.")

    def combine(self, deltas: Sequence[Tensor], block: Block) -> Tensor:
        """sum_i w_i tau_i"""
        return weighted_sum(deltas, numbers(self.weight))

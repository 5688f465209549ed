"""`task_arithmetic`: the sum of what models learnt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergeflow.ops.base import Block, DeltaOp, is_one_of, number, numbers, weighted_sum
from mergeflow.ops.deltas import divided, refuse_zero_sum, scaled
from mergeflow.settings import Flag, Number, PerInput, Setting, setting

if TYPE_CHECKING:
    from torch import Tensor


class TaskArithmetic(DeltaOp):
    """Add the weighted sum of what models learnt since the base.

    theta_0 + s sum_i w_i tau_i with tau_i = theta_i - theta_0, element by element; with `normalize` the sum is divided
    by sum_i w_i. Models and deltas of one shape may stand together, in any float dtype; computed in float32 (float64
    if any input is).

    Weights that sum to 0 with `normalize` are refused when planning. `scale` is called lambda elsewhere.
    """

    name = "task_arithmetic"
    formula = "theta_0 + s sum_i w_i tau_i"
    paper = "arXiv:2212.04089"

    weight: PerInput[Number] = setting(1.0, "Multiplies this delta; negative takes away what it learnt.")
    normalize: Setting[Flag] = setting(False, "Divide by the sum of the weights.")
    scale: Setting[Number] = setting(1.0, "Multiplies the merged delta before it is added to the base.")

    def check(self) -> None:
        """Raises RecipeError where the weights sum to 0 and would divide."""
        if self.normalize:
            refuse_zero_sum(numbers(self.weight))

    def combine(self, deltas: Sequence[Tensor], block: Block) -> Tensor:
        """s sum_i w_i tau_i"""
        weights = numbers(self.weight)
        merged = weighted_sum(deltas, weights)
        if self.normalize:
            merged = divided(merged, weights, own=not is_one_of(merged, deltas))
        return scaled(merged, number(self.scale), own=not is_one_of(merged, deltas))

"""`linear`: the weighted average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergeflow.ops.base import Block, Op, is_one_of, numbers, weighted_sum
from mergeflow.ops.deltas import divided, refuse_zero_sum
from mergeflow.settings import Flag, Number, PerInput, Setting, setting

if TYPE_CHECKING:
    from torch import Tensor


class Linear(Op):
    """The weighted average of models, or of deltas.

    sum_i w_i theta_i / sum_i w_i, element by element, for inputs of one shape in any float dtype; computed in float32
    (float64 if any input is), products summed in the order of the inputs. Without `normalize` the sum is not divided.

    Weights that sum to 0 are refused when planning, where other tools give NaN; there is no base. Model soups:
    arXiv:2203.05482.
    """

    name = "linear"
    formula = "sum_i w_i theta_i / sum_i w_i"
    paper = "arXiv:2203.05482"

    weight: PerInput[Number] = setting(1.0, "Share of this input.")
    normalize: Setting[Flag] = setting(True, "Divide by the sum of the weights.")

    def check(self) -> None:
        """Raises RecipeError where the weights sum to 0 and would divide."""
        if self.normalize:
            refuse_zero_sum(numbers(self.weight))

    def only_input(self, count: int) -> int | None:
        """One input is its own average."""
        return 0 if count == 1 and (self.normalize or numbers(self.weight)[0] == 1) else None

    def compute(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        """sum_i w_i theta_i / sum_i w_i"""
        if self.only_input(len(inputs)) is not None:
            return inputs[0]
        weights = numbers(self.weight)
        total = weighted_sum(inputs, weights)
        return divided(total, weights, own=not is_one_of(total, inputs)) if self.normalize else total

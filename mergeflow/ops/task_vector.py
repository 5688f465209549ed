"""`task_vector`: what a model learnt since its base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergeflow.errors import RecipeError
from mergeflow.ops.base import Block, Op, Space

if TYPE_CHECKING:
    from torch import Tensor


class TaskVector(Op):
    """What a model learnt since its base, as a delta.

    theta - theta_0, element by element, for two models of one shape in any float dtype; computed in float32 (float64
    if either is). Its result is a delta: ops that add to a base take it as it is, `linear` averages it with other
    deltas.

    Written as an output in bfloat16 or float16 it is rounded there, and base + delta is then no longer exactly the
    model.
    """

    name = "task_vector"
    formula = "theta - theta_0"
    paper = "arXiv:2212.04089"
    takes = "model"
    most = 1
    needs_base = True

    def space(self, base: Space | None, inputs: Sequence[Space]) -> Space:
        """Two weights give a delta. Raises RecipeError for anything else."""
        if base != "weight" or inputs[0] != "weight":
            raise RecipeError(
                f"{self.name} subtracts a base from a model, and got {base or 'no base'} and {inputs[0]}",
                fix="Both must be models or nodes that give weights; a delta can be used as it is.",
            )
        return "delta"

    def compute(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        """theta - theta_0"""
        return inputs[1] - inputs[0]

"""`scale`: a model or a delta times a number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergeflow.ops.base import Block, Op, number
from mergeflow.settings import Number, Setting, setting

if TYPE_CHECKING:
    from torch import Tensor


class Scale(Op):
    """Multiply a model or a delta by a number.

    c theta, element by element, for one input of any float dtype; computed in float32 (float64 if the input is).
    """

    name = "scale"
    formula = "c theta"
    takes = "model"
    most = 1

    by: Setting[Number] = setting(..., "The factor.")

    def only_input(self, count: int) -> int | None:
        """A factor of 1 changes nothing."""
        return 0 if number(self.by) == 1 else None

    def compute(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        """c theta"""
        factor = number(self.by)
        return inputs[0] if factor == 1 else inputs[0] * factor

"""`passthrough`: a tensor as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergeflow.ops.base import Block, Op, number
from mergeflow.settings import Number, Setting, setting

if TYPE_CHECKING:
    from torch import Tensor


class Passthrough(Op):
    """The tensor itself, bit for bit, or times a scale.

    s theta, element by element; with s = 1 nothing is computed and the stored bytes are copied.
    """

    name = "passthrough"
    formula = "s theta"
    takes = "model"
    most = 1

    scale: Setting[Number] = setting(1.0, "Multiplies the tensor.")

    def only_input(self, count: int) -> int | None:
        """A scale of 1 changes nothing."""
        return 0 if number(self.scale) == 1 else None

    def compute(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        """s theta"""
        factor = number(self.scale)
        return inputs[0] if factor == 1 else inputs[0] * factor

"""`slerp`: along the arc between two models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from mergeflow.ops.base import Block, Op, Reduction, number, weighted_sum
from mergeflow.ops.gram import Gram, cosines
from mergeflow.settings import Setting, Unit, setting

if TYPE_CHECKING:
    from torch import Tensor

    from mergeflow.ops.gram import Array

_STRAIGHT = 0.9995
"""Above this |cos| the arc is a straight line to rounding, and its formula divides by almost 0."""


class Slerp(Op):
    """Go from the first model (t = 0) to the second (t = 1) along the arc between them.

    sin((1 - t) a) / sin(a) theta_1 + sin(t a) / sin(a) theta_2, where a is the angle between the two tensors seen as
    flat vectors; the straight line (1 - t) theta_1 + t theta_2 where |cos a| > 0.9995, so for parallel and for
    opposite tensors. A norm of 0 counts as 1. For two inputs of one shape in any float dtype; computed in float32
    (float64 if either is), the angle in float64.

    t = 0 and t = 1 give that input bit for bit. The angle's last bit depends on the processor. Shoemake 1985,
    doi:10.1145/325165.325242.
    """

    name = "slerp"
    formula = "sin((1-t) a)/sin a theta_1 + sin(t a)/sin a theta_2"
    paper = "doi:10.1145/325165.325242"
    fewest = 2
    most = 2
    portable = False

    t: Setting[Unit] = setting(..., "Where between the two: 0 is the first input, 1 the second.")

    def only_input(self, count: int) -> int | None:
        """The ends of the arc are the inputs."""
        return {0.0: 0, 1.0: 1}.get(number(self.t))

    def reduction(self, known: tuple[Any, ...]) -> Reduction | None:
        """One round: the angle."""
        return None if known or self.only_input(2) is not None else Gram(partial(_factors, number(self.t)))

    def compute(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        """c_1 theta_1 + c_2 theta_2"""
        end = self.only_input(2)
        if end is not None:
            return inputs[end]
        return weighted_sum(inputs, block.measured[0])


def _factors(t: float, gram: Array) -> tuple[float, float]:
    """The factors of the two inputs."""
    cosine = float(cosines(gram)[0, 1])
    if abs(cosine) > _STRAIGHT:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)

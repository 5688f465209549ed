"""`evolve_cross`: the crossover of differential evolution between two models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergeflow.ops.base import Block, Op, number, weighted_sum
from mergeflow.ops.draws import below
from mergeflow.settings import Number, Setting, Unit, setting

if TYPE_CHECKING:
    from torch import Tensor


class EvolveCross(Op):
    """Move the first model towards the second at entries that are drawn by chance.

    (1 - F) theta_1 + F theta_2 where u < Cr, theta_1 elsewhere, bit for bit; u in [0, 1) is drawn for each entry by a
    counter-based generator (Philox4x32-10) with the key of the second input. Two inputs of one space and one shape, in any
    float dtype; computed in float32 (float64 if either is).
    """

    name = "evolve_cross"
    formula = "(1 - F) theta_1 + F theta_2 where u < Cr, else theta_1"
    paper = "arXiv:2406.12208"
    fewest = 2
    most = 2
    draws = True
    shows_non_finite = False

    F: Setting[Number] = setting(0.5, "How far the drawn entries move to the second model: 1 takes them over.")
    Cr: Setting[Unit] = setting(0.5, "The probability with which an entry is drawn.")

    def only_input(self, count: int) -> int | None:
        """Nothing moves with F or Cr of 0; all is taken over with both of 1."""
        crossed, drawn = number(self.F), number(self.Cr)
        return 0 if crossed == 0 or drawn == 0 else 1 if crossed == drawn == 1 else None

    def compute(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        """where(u < Cr, (1 - F) theta_1 + F theta_2, theta_1)"""
        import torch

        only = self.only_input(2)
        if only is not None:
            return inputs[only]
        drawn = below(block.keys[1], block.start, inputs[0], number(self.Cr))
        return torch.where(drawn, weighted_sum(inputs, (1 - number(self.F), number(self.F))), inputs[0])

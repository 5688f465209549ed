"""`magmax`: entry by entry, the delta that moved furthest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergeflow.ops.base import Block, DeltaOp, is_one_of, number, numbers
from mergeflow.ops.deltas import scaled
from mergeflow.settings import Number, PerInput, Setting, setting

if TYPE_CHECKING:
    from torch import Tensor


class Magmax(DeltaOp):
    """Take each entry from the delta in which it is largest in magnitude (MagMax).

    theta_0 + s w_j tau_j with j the input of the largest |w_i tau_i| at this entry, the last one among equals as in the authors'
    code. Models and deltas of one shape, in any float dtype; computed in float32 (float64 if any input is).

    A NaN is larger than any number, so that it is seen.
    """

    name = "magmax"
    formula = "theta_0 + s w_j tau_j, j = argmax_i |w_i tau_i|"
    paper = "arXiv:2407.06322"

    weight: PerInput[Number] = setting(1.0, "Multiplies this delta, before magnitudes are compared.")
    scale: Setting[Number] = setting(1.0, "Multiplies the merged delta before it is added to the base.")

    def combine(self, deltas: Sequence[Tensor], block: Block) -> Tensor:
        """s w_j tau_j"""
        import torch

        first, *others = (
            scaled(delta, weight, own=False) for delta, weight in zip(deltas, numbers(self.weight), strict=True)
        )
        largest = first
        for other in others:
            smaller = (other.abs() < largest.abs()).logical_or_(largest.isnan())
            largest = torch.where(smaller, largest, other)
        return scaled(largest, number(self.scale), own=not is_one_of(largest, deltas))

"""`consensus`: the summed deltas where enough tasks agree that an entry is theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergeflow.errors import RecipeError
from mergeflow.ops.base import Block, DeltaOp, number, numbers, weighted_sum
from mergeflow.ops.deltas import scaled
from mergeflow.settings import Count, NonNegative, Number, PerInput, Setting, setting

if TYPE_CHECKING:
    from torch import Tensor


class Consensus(DeltaOp):
    """Add the deltas up, without the entries that matter to fewer than k of them (Consensus merging by TALL masks).

    theta_0 + s c sum_i w_i tau_i, where an entry is in the mask of input i if |w_i tau_i| >= lam |sum_j w_j tau_j - w_i tau_i|, and
    c is 1 where at least k masks have it, else 0. Models and deltas of one shape, in any float dtype; computed in float32
    (float64 if any input is).

    k = 0 is `task_arithmetic`; k = 1 takes away what matters to none; k = 2 also what matters to one alone, so it needs two inputs.
    """

    name = "consensus"
    formula = "theta_0 + s [sum_i m_i >= k] sum_i w_i tau_i, m_i = [|w_i tau_i| >= lam |sum_j w_j tau_j - w_i tau_i|]"
    paper = "arXiv:2405.07813"
    fewest = 2

    weight: PerInput[Number] = setting(1.0, "Multiplies this delta first.")
    lam: Setting[NonNegative] = setting(
        0.4, "How large an entry is beside what the others add to it, to be in the mask."
    )
    k: Setting[Count] = setting(2, "In how many masks an entry is at least, to be kept.")
    scale: Setting[Number] = setting(1.0, "Multiplies the merged delta before it is added to the base.")

    def check(self) -> None:
        """Raises RecipeError where k asks for more masks than there are."""
        count, masks = int(number(self.k)), len(numbers(self.weight))
        if count > masks:
            raise RecipeError(
                f"no entry can be in {count} masks of {masks} inputs",
                fix=f"Write `k: {masks}` or less, or give more inputs.",
            )

    def combine(self, deltas: Sequence[Tensor], block: Block) -> Tensor:
        """s [sum_i m_i >= k] sum_i w_i tau_i"""
        import torch

        products = [
            scaled(delta, weight, own=False) for delta, weight in zip(deltas, numbers(self.weight), strict=True)
        ]
        total = weighted_sum(products, [1.0] * len(products))
        votes = torch.zeros_like(total)
        for product in products:
            others = (total - product).abs_().mul_(number(self.lam))
            votes.add_(product.abs() >= others)
        # A product, not a choice: 0 times a NaN or an Inf is seen.
        total = votes.ge_(number(self.k)).mul_(total)
        return scaled(total, number(self.scale), own=True)

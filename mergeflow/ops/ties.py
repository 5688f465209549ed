"""`ties`: trim, elect signs, merge what agrees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from mergeflow.ops.base import Block, DeltaOp, Reduction, number, numbers
from mergeflow.ops.deltas import Rescale, Rounding, Scope, Vote, agreeing, scaled, trimmed, trimming, trimming_bytes
from mergeflow.settings import Flag, Fraction, Number, PerInput, Setting, setting

if TYPE_CHECKING:
    from torch import Tensor


class Ties(DeltaOp):
    """Trim each delta to its largest entries, elect a sign for each entry, average the deltas that agree with it.

    theta_0 + s sum_i m_i w_i trim(tau_i) / sum_i m_i w_i with tau_i = theta_i - theta_0. trim keeps the k = max(1,
    int(density n)) entries largest in magnitude of each tensor, the lowest index first among equals; the elected sign
    is that of sum_i w_i trim(tau_i), 0 counting as +; m_i is 1 where w_i trim(tau_i) has the elected sign, so a zero
    never votes. Without `normalize` the sum is not divided; where the divisor is 0 the delta is 0. Models and deltas
    of one shape, in any float dtype; computed in float32 (float64 if any input is).

    With `scope: model` k counts the entries of all floating tensors of the node together, as the paper's own code does:
    among equals the tensor whose name comes first keeps its entries, and tensors that no output asks for are read too.

    The threshold is exact, whatever the size of the tensor or the model. Published TIES differ from each other:
    `rounding`, `scope`, `vote`, `rescale` and `normalize` name the choices. A weight multiplies before the vote.
    """

    name = "ties"
    formula = "theta_0 + s sum_i m_i w_i trim(tau_i) / sum_i m_i w_i"
    paper = "arXiv:2306.01708"
    shows_non_finite = False
    model_settings = ("density",)

    weight: PerInput[Number] = setting(1.0, "Multiplies this delta, before the vote.")
    density: PerInput[Fraction] = setting(1.0, "Part of this delta's entries to keep, the largest first.")
    normalize: Setting[Flag] = setting(True, "Divide each entry by the weights of the deltas that agree on it.")
    scale: Setting[Number] = setting(1.0, "Multiplies the merged delta before it is added to the base.")
    rescale: Rescale = Field(
        default="none", description="Make up for what trim took: keep that norm, or times 1 / density."
    )
    rounding: Rounding = Field(default="floor", description="How density times size becomes a number of entries.")
    scope: Scope = Field(default="tensor", description="What density is a part of: each tensor, or the whole model.")
    vote: Vote = Field(default="mass", description="Elect the sign of the sum (mass), or of the majority (count).")

    @property
    def over_model(self) -> bool:
        """With `scope: model`."""
        return self.scope == "model"

    def reduction(self, known: tuple[Any, ...]) -> Reduction | None:
        """The rounds that find each delta's threshold; none at density 1."""
        return trimming(known, numbers(self.density), self.rounding, self.rescale, self.scope)

    def measure_bytes(self, inputs: int) -> int:
        """What finding the thresholds holds at most."""
        return trimming_bytes(inputs)

    def combine(self, deltas: Sequence[Tensor], block: Block) -> Tensor:
        """s sum_i m_i w_i trim(tau_i) / sum_i m_i w_i"""
        weights = numbers(self.weight)
        kept = trimmed(deltas, numbers(self.density), self.rescale, block)
        products = [
            scaled(part, weight, own=part is not delta)
            for part, weight, delta in zip(kept, weights, deltas, strict=True)
        ]
        merged = agreeing(products, weights, vote=self.vote, normalize=bool(self.normalize))
        return scaled(merged, number(self.scale), own=True)

"""`lot`: the delta whose features drift least from every task's own, by least squares on that task's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, NoReturn

from mergeflow.ops.base import Block, Op, numbers
from mergeflow.ops.deltas import refuse_zero_sum
from mergeflow.ops.fisher import FisherMean, Floor
from mergeflow.ops.regmean import RegMean
from mergeflow.settings import NonNegative, Number, PerInput, Setting, setting

if TYPE_CHECKING:
    from torch import Tensor


class Lot(Op):
    """Choose the delta whose features drift least from every task's own on that task's inputs (LOT).

    Linear weights: theta_0 + s [(sum_i c_i G_i)^+ sum_i c_i G_i tau_i^T]^T, the smallest solution of the least squares problem,
    where G_i is the Gram matrix of the inputs that task i has there (`gram:` of an input). Norm gains: theta_0 + s sum_i c_i q_i
    tau_i / sum_i c_i q_i by channels, where q_i is the mean square of what the gain multiplies (`gram_diag:` of an input, which
    may be left out). All other tensors take `others`, by default the base with the mean of the deltas, with the same weights.
    Matrices (out, in), stored (in, out) by Conv1D, and vectors, in any float dtype; matrices are solved in float64.

    This is `regmean` around the base at alpha 1, with the smallest correction.
    """

    name = "lot"
    formula = "theta_0 + s [(sum_i c_i G_i)^+ sum_i c_i G_i tau_i^T]^T"
    paper = "arXiv:2505.23859"
    needs_base = True
    matrices_only = True
    portable = False
    input_keys: ClassVar[tuple[str, ...]] = ("gram", "gram_diag")
    optional_keys: ClassVar[tuple[str, ...]] = ("gram_diag",)

    weight: PerInput[NonNegative] = setting(1.0, "Share of this input.")
    scale: Setting[Number] = setting(1.0, "Multiplies the merged delta before it is added to the base.")

    def check(self) -> None:
        """Raises RecipeError where all weights are 0."""
        refuse_zero_sum(numbers(self.weight))

    def compute(self, inputs: Sequence[Tensor], block: Block) -> NoReturn:
        """Never asked for: planning puts other ops in its place."""
        raise TypeError("lot needs a Gram for each input: use it in a recipe")

    def at_matrix(self) -> RegMean:
        """What a resolved op is at a linear weight."""
        return RegMean.model_construct(
            weight=self.weight,
            alpha=1.0,
            scale=self.scale,
            ridge=0.0,
            weigh_by="models",
            reference="base",
            solver="lstsq",
            solve_dtype="float64",
        )

    def at_gain(self) -> FisherMean:
        """What a resolved op is at a norm gain, before the step from the base is scaled."""
        weights = numbers(self.weight)
        return FisherMean(weights=weights, floored=(False,) * len(weights), floor=Floor(abs=0.0))

"""`multislerp`: the mean direction of any number of models, with their mean length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from mergeflow.errors import RecipeError
from mergeflow.ops.base import Block, Op, Reduction, numbers, weighted_sum
from mergeflow.ops.deltas import refuse_zero_sum
from mergeflow.ops.gram import Gram, cosines, norms
from mergeflow.settings import Flag, Number, PerInput, Setting, setting

if TYPE_CHECKING:
    from torch import Tensor

    from mergeflow.ops.gram import Array

_NO_DIRECTION = 1e-5
"""A mean of unit vectors this short, for weights of size 1, is what rounding left of vectors that cancel."""
_ONE_LINE = 1 - 1e-9
"""Vectors with a larger |cosine| between them lie on one line."""


class MultiSlerp(Op):
    """Go to the weighted mean direction of the models, at the weighted mean of their lengths.

    m sum_i w_i |tau_i| with m = M / |M|, M = sum_i w_i u_i and u_i = tau_i / |tau_i|, the tensors as flat vectors;
    tau_i is theta_i - theta_0 with a base, to which the result is added, and theta_i without one. With
    `normalize_weights` each weight is divided by their sum. A tensor of zeros has no direction: its u_i is 0. For
    inputs of one shape in any float dtype; computed in float32 (float64 if any is), lengths and angles in float64.

    It is described with one step more: the tangents u_i - (u_i m) m at m are added up by their weights and followed
    from m by the exponential map. Their sum is 0, since m is the direction of M, so that step stays where it is.

    Where the directions cancel (|M| < 1e-5 sum |w_i|) there is no m: tensors that lie on one line, as two that cancel or
    any of one entry do, give the point sum_i w_i tau_i of that line; others raise RecipeError when run, as weights that
    sum to 0 with `normalize_weights` do when planned. The last bit depends on the processor.
    """

    name = "multislerp"
    formula = "theta_0 + M / |M| sum_i w_i |tau_i|, M = sum_i w_i tau_i / |tau_i|"
    may_base = True
    portable = False

    weight: PerInput[Number] = setting(1.0, "How much this input's direction and length count.")
    normalize_weights: Setting[Flag] = setting(True, "Divide each weight by their sum.")

    def check(self) -> None:
        """Raises RecipeError where the weights sum to 0 and would divide."""
        if self.normalize_weights:
            fix = "Change a weight, or write `normalize_weights: false`."
            refuse_zero_sum(numbers(self.weight), "`normalize_weights` divides", fix)

    @property
    def _weights(self) -> tuple[float, ...]:
        weights = numbers(self.weight)
        total = math.fsum(weights) if self.normalize_weights else 1.0
        return tuple(weight / total for weight in weights)

    def only_input(self, count: int) -> int | None:
        """One input of weight 1, with none beside it."""
        weights = self._weights
        return weights.index(1) if sum(map(bool, weights)) == 1 and 1 in weights else None

    def reduction(self, known: tuple[Any, ...]) -> Reduction | None:
        """One round: the lengths and the angles."""
        return None if known or self.only_input(0) is not None else Gram(partial(_factors, self._weights))

    def compute(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        """sum_i c_i tau_i"""
        only = self.only_input(len(inputs))
        return inputs[only] if only is not None else weighted_sum(inputs, block.measured[0])


def _factors(weights: Sequence[float], gram: Array) -> Sequence[float]:
    """c_i = w_i / |tau_i| sum_j w_j |tau_j| / |M|"""
    import numpy as np

    by_weight, lengths = np.asarray(weights), norms(gram)
    between = cosines(gram)
    mean = math.sqrt(max(float(by_weight @ between @ by_weight), 0))
    if mean <= _NO_DIRECTION * np.abs(by_weight).sum():
        counting = by_weight * lengths != 0
        if np.abs(between[counting][:, counting]).min(initial=1) < _ONE_LINE:
            raise RecipeError(
                "the weighted directions of the inputs of multislerp cancel, so they have no mean direction",
                fix="Change a weight, or use `op: linear`.",
            )
        return weights
    factors = by_weight / np.where(lengths == 0, 1, lengths) * (by_weight @ lengths / mean)
    return [float(factor) for factor in factors]

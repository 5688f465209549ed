"""`karcher`: the point of a sphere that is nearest to all models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from mergeflow.ops.base import Block, Op, Reduction, number, weighted_sum
from mergeflow.ops.gram import Gram, cosines, norms
from mergeflow.settings import Count, Positive, Setting, setting

if TYPE_CHECKING:
    from torch import Tensor

    from mergeflow.ops.gram import Array

_OPPOSITE = 1e-6
"""The sine of an angle under which opposite vectors are on one line."""


class Karcher(Op):
    """Go to the Karcher (Riemannian) mean of the models' directions, at the mean of their lengths.

    m sum_i |theta_i| / K, where the unit vector m has the least sum of squared angles to u_i = theta_i / |theta_i|, the
    tensors as flat vectors. From the direction of sum_i u_i, m goes along the great circle of the mean
    T = sum_i a_i / sin(a_i) (u_i - cos(a_i) m) / K, a_i the angle between m and u_i, as far as |T|, until |T| < `tol`
    or `max_iter` steps are done. Terms of a_i < `tol` are left out, and tensors of zeros have no direction: they count
    only in the mean length. Where the u_i cancel it starts from the first. For inputs of one shape in any float dtype;
    computed in float32 (float64 if any is), lengths and angles in float64.

    Every m is a linear combination of the u_i, so the steps take place among their dot products: the tensors are read
    twice, whatever `max_iter` is. The last bit depends on the processor. Grove and Karcher 1973, doi:10.1007/BF01425505.
    """

    name = "karcher"
    formula = "argmin_m sum_i angle(m, theta_i)^2, |m| = sum_i |theta_i| / K"
    paper = "doi:10.1007/BF01425505"
    portable = False

    max_iter: Setting[Count] = setting(10, "The most steps.")
    tol: Setting[Positive] = setting(1e-5, "A step shorter than this angle is not made any more.")

    def only_input(self, count: int) -> int | None:
        """One input is its own mean."""
        return 0 if count == 1 else None

    def reduction(self, known: tuple[Any, ...]) -> Reduction | None:
        """One round: the lengths and the angles."""
        return None if known else Gram(partial(_factors, int(number(self.max_iter)), number(self.tol)))

    def compute(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        """sum_i c_i theta_i"""
        return inputs[0] if len(inputs) == 1 else weighted_sum(inputs, block.measured[0])


def _factors(max_iter: int, tol: float, gram: Array) -> Sequence[float]:
    """The factors of the inputs in their mean: of their unit vectors in m, times the mean length, by their lengths."""
    import numpy as np

    lengths = norms(gram)
    some = lengths != 0
    factors = np.zeros(len(lengths))
    if some.any():
        factors[some] = _mean(cosines(gram)[some][:, some], max_iter, tol) / lengths[some] * lengths.mean()
    return [float(factor) for factor in factors]


def _mean(between: Array, max_iter: int, tol: float) -> Array:
    """The factors of some unit vectors in their Karcher mean, from the dot products `between` them."""
    import numpy as np

    count = len(between)
    mean = np.ones(count) / count
    length = _length(mean, between)
    mean = np.eye(count)[0] if length < tol else mean / length
    for _ in range(max_iter):
        cosine = np.clip(between @ mean, -1, 1)
        angle = np.arccos(cosine)
        sine = np.sin(angle)
        # From the point opposite to a vector no way to it is shorter than others: it does not pull.
        pull = np.where((angle < tol) | (sine < _OPPOSITE), 0, angle / np.where(sine == 0, 1, sine)) / count
        step = pull - (pull @ cosine) * mean
        length = _length(step, between)
        if length < tol:
            break
        mean = np.cos(length) * mean + np.sin(length) / length * step
        mean /= _length(mean, between)
    return mean


def _length(factors: Array, between: Array) -> float:
    """The length of a combination of unit vectors."""
    import numpy as np

    return float(np.sqrt(np.maximum(factors @ between @ factors, 0)))

"""`wudi`: the delta whose difference from each of the others is hardly felt on that one's own inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from mergeflow.ops.base import number, numbers
from mergeflow.ops.deltas import scaled
from mergeflow.ops.spectral import Deltas, SpectralOp
from mergeflow.settings import Count, Number, PerInput, Positive, Setting, setting

if TYPE_CHECKING:
    from torch import Tensor

_BETAS = 0.9, 0.999
_EPSILON = 1e-8
_WIDE = 4
"""How many times as many columns as rows a matrix has at least for the gradient to be taken from the deltas each time, since the
(n, n) product of its columns would be larger than so many of them."""


class Wudi(SpectralOp):
    """Find the merged delta that disturbs each task least, the rows of a delta standing for its task's inputs (WUDI).

    The delta is s m, where m makes sum_i |(m - tau_i) tau_i^T|^2 / |tau_i|^2 small (Frobenius norms), tau_i standing for
    w_i tau_i. `adam`, as published: `steps` steps of Adam (betas 0.9 and 0.999, epsilon 1e-8) from sum_i tau_i, in the compute
    dtype. `exact`: the minimum itself, (sum_i tau_i A_i) (sum_i A_i)^+ with A_i = tau_i^T tau_i / |tau_i|^2, the smallest where
    there are many; directions in which the deltas are only rounding count as 0. Matrices (m, n) in any float dtype.

    A step costs one product of (m, n) with (n, n), since 2 (m sum_i A_i - sum_i tau_i A_i) is the gradient. Deltas of 0 disturb
    nothing, where published code divides by their norm. One input gives that input.
    """

    name = "wudi"
    formula = "theta_0 + s argmin_m sum_i |(m - tau_i) tau_i^T|^2 / |tau_i|^2"
    paper = "arXiv:2503.08099"
    temporaries = 40

    weight: PerInput[Number] = setting(1.0, "Multiplies this delta first.")
    steps: Setting[Count] = setting(300, "Steps of Adam.")
    lr: Setting[Positive] = setting(1e-5, "How far a step of Adam goes, in the units of the weights.")
    scale: Setting[Number] = setting(1.0, "Multiplies the merged delta before it is added to the base.")
    method: Literal["adam", "exact"] = Field(
        default="adam", description="Go towards the minimum by Adam, as published, or be there."
    )

    def merged(self, deltas: Sequence[Tensor]) -> Tensor:
        """s m"""
        pairs = zip(deltas, numbers(self.weight), strict=True)
        sound = [(delta, weight) for delta, weight in pairs if weight and bool(delta.any())]
        if not sound:
            return deltas[0].new_zeros(deltas[0].shape).double()
        taus = Deltas(*zip(*sound, strict=True))
        found = _exact(taus) if self.method == "exact" else _adam(taus, int(number(self.steps)), number(self.lr))
        return scaled(found, number(self.scale), own=True)


def _adam(taus: Deltas, steps: int, lr: float) -> Tensor:
    """So many steps of Adam from the sum of the deltas.

    What moves is kept apart from where it began: the gradient at the sum is taken in float64, where it is 0 if it should be,
    and only its change in the compute dtype. Adam divides by the gradient's size, and would follow rounding as it does a slope.
    """
    import torch

    start = taus.total()
    gradient = _gradient(taus, start)
    moved = torch.zeros_like(taus.tensors[0])
    first, second = torch.zeros_like(moved), torch.zeros_like(moved)
    for step in range(1, steps + 1):
        slope = gradient(moved)
        first.mul_(_BETAS[0]).add_(slope * (1 - _BETAS[0]))
        second.mul_(_BETAS[1]).add_(slope.square_().mul_(1 - _BETAS[1]))
        root = second.sqrt().div_(math.sqrt(1 - _BETAS[1] ** step)).add_(_EPSILON)
        moved.sub_(root.reciprocal_().mul_(first).mul_(lr / (1 - _BETAS[0] ** step)))
    return start.add_(moved)


def _gradient(taus: Deltas, start: Tensor) -> Callable[[Tensor], Tensor]:
    """The function of a move from the start that gives the gradient there, in the compute dtype."""
    import torch

    rows, columns = taus.shape
    dtype = taus.tensors[0].dtype
    if columns > _WIDE * rows:
        shares = [2 / _square(delta) for delta in taus]

        def from_deltas(moved: Tensor) -> Tensor:
            total = torch.zeros_like(moved)
            for delta, share in zip(taus, shares, strict=True):
                tau, rest = delta.to(dtype), (start - delta).to(dtype).add_(moved)
                total.add_((rest @ tau.mT).mul_(share) @ tau)
            return total

        return from_deltas
    grams, products = _sums(taus)
    grams.mul_(2)
    begin = (start @ grams).sub_(products.mul_(2)).to(dtype)
    curvature = grams.to(dtype)

    def from_sums(moved: Tensor) -> Tensor:
        slope: Tensor = moved @ curvature
        return slope.add_(begin)

    return from_sums


def _sums(taus: Deltas, basis: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """sum_i A_i and sum_i tau_i A_i in float64, of the deltas' coordinates in a basis of their rows if one is given."""
    import torch

    rows, columns = taus.shape
    width = columns if basis is None else basis.shape[1]
    grams = torch.zeros(width, width, dtype=torch.float64, device=taus.tensors[0].device)
    products = grams.new_zeros(rows, width)
    for delta in taus:
        tau = delta if basis is None else delta @ basis
        gram = (tau.mT @ tau).div_(_square(delta))
        products.add_(tau @ gram)
        grams.add_(gram)
    return grams, products


def _exact(taus: Deltas) -> Tensor:
    """The smallest of the minima."""
    import torch

    rows, columns = taus.shape
    basis = None
    if columns > len(taus) * rows:  # all of them lie in the few dimensions that their rows span
        basis = torch.linalg.qr(torch.cat(list(taus)).mT).Q
    grams, products = _sums(taus, basis)
    values, vectors = torch.linalg.eigh(grams)
    kept = values > max(torch.finfo(torch.float64).eps * len(values), taus.rounding**2) * values[-1]
    vectors, values = vectors[:, kept], values[kept]
    merged = ((products @ vectors) / values) @ vectors.mT
    return merged if basis is None else torch.matmul(merged, basis.mT)


def _square(delta: Tensor) -> float:
    """|tau|^2"""
    import torch

    return float(torch.linalg.matrix_norm(delta)) ** 2

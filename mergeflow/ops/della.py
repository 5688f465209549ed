"""`della` and `della_linear`: drop entries of each delta by chance, the small ones of a row more often, make up for it, merge.

The ranks of a row come from a radix sort of the bits of |tau|, 16 at a time from the lowest: numpy sorts 16-bit numbers stably in a
tenth of the time in which anything here sorts float32, and a sort that moves indices by digits puts the lowest index first among
equals by itself. Each rank's probability is scattered to where its entry stands, without a second sort.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mergeflow.errors import RecipeError
from mergeflow.ops.base import Block, Reduction, numbers
from mergeflow.ops.draws import uniform
from mergeflow.ops.sparsified import KeptInRows, KeptInWhole, Masking, Voting
from mergeflow.settings import Flag, PerInput, Setting, Unit, setting

if TYPE_CHECKING:
    from torch import Tensor

_ROUNDING = 1e-9
"""How far density + epsilon may be beyond 1 by the rounding of decimal numbers."""


class DellaLinear(Masking):
    """Drop entries of each delta by chance, the small ones of a row more often, and add the weighted sum.

    theta_0 + s sum_i w_i f_i b_i tau_i with tau_i = theta_i - theta_0 and b_i = 1 where u < p, else 0;
    p = density - epsilon + 2 epsilon (rank - 1) / (len - 1) with the ranks 1 to len of |tau_i| along the last axis, the lowest
    index first among equals; u is drawn for each entry of each input by a counter-based generator (Philox4x32-10). f_i makes
    up for what was dropped: by default it restores the l1 norm of tau_i over the whole tensor; `rescale: probability` divides
    each entry by its p, as the paper does. A density of 1 drops nothing; otherwise density - epsilon and density +
    epsilon must be in [0, 1] (RecipeError when planning). Rows of one entry, so 0-d tensors too, are kept whole. With
    `normalize` the sum is divided by sum_i w_i; weights that sum to 0 are then refused when planning.

    `rank_axis: 1` ranks along the second axis, which is another one than the last in tensors of three axes and more: these are
    then computed as a whole, in as much memory as they need. Models and deltas of one shape, in any float dtype; computed in
    float32 (float64 if any input is).
    """

    name = "della_linear"
    formula = "theta_0 + s sum_i w_i f_i b_i tau_i"
    paper = "arXiv:2406.11617"
    cut = "row"
    temporaries: ClassVar[int] = 16
    kept_by = KeptInRows

    epsilon: PerInput[Unit] = setting(
        0.15, "How far the probability of the smallest and of the largest is from density."
    )
    rank_axis: Literal[-1, 1] = Field(default=-1, description="The axis along which entries are ranked.")

    def check(self) -> None:
        """Raises RecipeError where a probability would be no probability, or weights that divide sum to 0."""
        super().check()
        for density, epsilon in zip(numbers(self.density), numbers(self.epsilon), strict=True):
            if density < 1 and (density - epsilon < -_ROUNDING or density + epsilon > 1 + _ROUNDING):
                raise RecipeError(
                    f"density {density:g} and epsilon {epsilon:g} give probabilities from {density - epsilon:g} to "
                    f"{density + epsilon:g}, which must be in [0, 1]",
                    fix=f"Write an epsilon of at most {min(density, 1 - density):g}, or a density of 1 to drop nothing.",
                )
        if self.rank_axis == 1 and self.rescale == "probability":
            raise RecipeError(
                "`rank_axis: 1` cannot be rescaled by probability", fix="Leave out one of the two, or keep a norm."
            )

    def reduction(self, known: tuple[Any, ...]) -> Reduction | None:
        """One round for a norm; where ranks run along the second axis, one that looks at the shape comes first."""
        if self.rank_axis == -1 or all(density == 1 for density in numbers(self.density)):
            return super().reduction(known)
        if not known:
            return _Shape()
        if len(known[0]) < 3:
            return super().reduction(known[1:])
        return KeptInWhole(self, self.rescale) if len(known) == 1 else None

    def masks(self, deltas: Sequence[Tensor], block: Block) -> list[tuple[Tensor, Any] | None]:
        """u < p"""
        second = self.rank_axis == 1 and len(block.shape) > 2
        if second:  # as a whole, in its own shape
            deltas = [delta.reshape(block.shape).movedim(1, -1) for delta in deltas]
        result: list[tuple[Tensor, Any] | None] = []
        for delta, density, epsilon, key in zip(
            deltas, numbers(self.density), numbers(self.epsilon), block.keys, strict=True
        ):
            length = delta.shape[-1] if delta.numel() else 0
            if density == 1 or length < 2:
                result.append(None)
                continue
            limits = _limits(delta.reshape(-1, length), density, epsilon).view(delta.shape)
            if second:
                limits = limits.movedim(-1, 1).contiguous()
            result.append((uniform(key, block.start, delta).view(limits.shape) < limits, limits))
        return result


class Della(DellaLinear, Voting):
    """Drop entries of each delta by chance, the small ones of a row more often, and merge what agrees in sign.

    theta_0 + s sum_i m_i w_i f_i b_i tau_i / sum_i m_i w_i: `della_linear` with the vote of `ties`. The elected sign of an
    entry is that of sum_i w_i f_i b_i tau_i, 0 counting as +; m_i is 1 where w_i f_i b_i tau_i has the elected sign, so a
    dropped entry never votes. Without `normalize` the sum is not divided; where the divisor is 0 the delta is 0.

    Models and deltas of one shape, in any float dtype; computed in float32 (float64 if any input is).
    """

    name = "della"
    formula = "theta_0 + s sum_i m_i w_i f_i b_i tau_i / sum_i m_i w_i"

    normalize: Setting[Flag] = setting(True, "Divide each entry by the weights of the deltas that agree on it.")


@dataclass(frozen=True, slots=True)
class _Shape(Reduction):
    """The shape of the tensor, which an op knows only once it sees a block of it."""

    sample: ClassVar[bool] = True

    def block(self, inputs: Sequence[Tensor], block: Block) -> tuple[int, ...]:
        return block.shape

    def merge(self, parts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return parts[0]

    def finish(self, total: tuple[int, ...]) -> tuple[int, ...]:
        return total


def _limits(rows: Tensor, density: float, epsilon: float) -> Tensor:
    """What u must be less than for each entry to be kept, in float32: (rows, length).

    Numbers of 24 bits, as u is: u < ceil(p 2^24) 2^-24 just where u < p, and that is the probability itself with which it is.
    """
    import torch

    length = rows.shape[1]
    steps = torch.arange(length, dtype=torch.float64, device=rows.device)
    ranked = (steps * (2 * epsilon / (length - 1)) + (density - epsilon)).clamp_(0, 1)
    ranked = ranked.mul_(2**24).ceil_().mul_(2**-24).float()
    return torch.empty_like(rows, dtype=torch.float32).scatter_(1, _ascending(rows), ranked.expand(rows.shape))


def _ascending(rows: Tensor) -> Tensor:
    """The index of each row's smallest magnitude, of the next, and so on; the lowest index first among equals."""
    import numpy as np
    import torch

    magnitudes = rows.abs().contiguous()
    if not rows.is_cpu:
        return magnitudes.sort(dim=1, stable=True).indices
    digits: Any = magnitudes.numpy().view(np.uint16).reshape(*rows.shape, rows.element_size() // 2)
    order: Tensor | None = None
    for place in range(digits.shape[-1]):
        digit = np.ascontiguousarray(digits[..., place])
        if order is None:
            order = torch.from_numpy(np.argsort(digit, axis=1, kind="stable"))
            continue
        digit = torch.from_numpy(digit.view(np.int16)).gather(1, order).numpy().view(np.uint16)
        order = order.gather(1, torch.from_numpy(np.argsort(digit, axis=1, kind="stable")))
    assert order is not None
    return order

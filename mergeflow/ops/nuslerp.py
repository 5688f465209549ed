"""`nuslerp`: along the arc between two models, or what they learnt, as far as their weights say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from mergeflow.ops.base import Block, Cut, Op, Reduction, numbers, weighted_sum
from mergeflow.ops.gram import Gram, cosines, row_sums
from mergeflow.settings import Number, PerInput, setting

if TYPE_CHECKING:
    from torch import Tensor

    from mergeflow.ops.gram import Array

_NO_ANGLE = 1e-6
"""Below this |sin| two vectors are one line: nothing says which arc joins opposite ones."""
_CANCELS = 1e-8
"""Weights whose sum is smaller meet halfway."""
_PAIRS = ((0, 1), (0, 0), (1, 1))


class NuSlerp(Op):
    """Go from the first model to the second along the arc between them, as far as the second's share of the weights.

    sin((1 - t) a) / sin(a) tau_1 + sin(t a) / sin(a) tau_2 with t = w_2 / (w_1 + w_2), 0.5 where the weights sum to 0;
    a is the angle between the two tensors as flat vectors or, with `flatten: false`, between each two vectors along
    the last axis (`row_wise: true`) or along the one before (`row_wise: false`); a tensor of one axis is one vector.
    tau_i is theta_i - theta_0 with a base, to which the result is added, and theta_i without one. Where |sin a| < 1e-6
    it is the straight line (1 - t) tau_1 + t tau_2; a norm of 0 counts as 1. For two inputs of one shape in any float
    dtype; computed in float32 (float64 if either is), angles in float64.

    It differs from `slerp` for weights instead of t, for the base, and in that nearly parallel tensors follow the arc.
    mergekit calls the vectors along the last axis columns, so its `nuslerp_row_wise` means the opposite. The last bit
    depends on the processor.
    """

    name = "nuslerp"
    formula = "theta_0 + sin((1-t) a)/sin a tau_1 + sin(t a)/sin a tau_2, t = w_2 / (w_1 + w_2)"
    paper = "doi:10.1145/325165.325242"
    fewest = 2
    most = 2
    may_base = True
    portable = False

    weight: PerInput[Number] = setting(1.0, "How near the result is to this input.")
    flatten: bool = Field(default=True, strict=True, description="One angle for the whole tensor.")
    row_wise: bool = Field(
        default=False, strict=True, description="Without `flatten`: an angle for each row, and not for each column."
    )

    @property
    def cut(self) -> Cut:  # type: ignore[override]
        """Rows, where rows or columns have angles of their own."""
        return "element" if self.flatten else "row"

    @property
    def _t(self) -> float:
        first, second = numbers(self.weight)
        return 0.5 if abs(first + second) < _CANCELS else second / (first + second)

    def only_input(self, count: int) -> int | None:
        """The ends of the arc are the inputs."""
        return {0.0: 0, 1.0: 1}.get(self._t)

    def reduction(self, known: tuple[Any, ...]) -> Reduction | None:
        """One round: the angle of the whole, or those of the columns; a row's is found as it is computed."""
        if known or self.only_input(2) is not None or (self.row_wise and not self.flatten):
            return None
        return Gram(partial(_factors, self._t)) if self.flatten else _Columns(self._t)

    def compute(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        """c_1 tau_1 + c_2 tau_2"""
        end = self.only_input(2)
        if end is not None:
            return inputs[end]
        if self.flatten:
            return weighted_sum(inputs, block.measured[0])
        if self.row_wise:
            first, second = (share.unsqueeze(1) for share in _shares(self._t, row_sums(inputs, _PAIRS)))
        else:
            first, second = (_for_rows(share, inputs[0], block) for share in block.measured[0])
        return (inputs[0] * first.to(inputs[0].dtype)).add_(inputs[1] * second.to(inputs[1].dtype))


def _factors(t: float, gram: Array) -> tuple[float, float]:
    """The factors of the two inputs."""
    cosine = float(cosines(gram)[0, 1])
    angle = math.acos(cosine)
    sine = math.sin(angle)
    if sine < _NO_ANGLE:
        return 1 - t, t
    return math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine


def _shares(t: float, sums: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of pairs of vectors, from their dot products and squared norms: (3, ...) in float64."""
    import torch

    dot, first, second = sums
    lengths = [torch.where(square == 0, 1, square.sqrt()) for square in (first, second)]
    angle = (dot / (lengths[0] * lengths[1])).clamp_(-1, 1).acos_()
    sine = angle.sin()
    shares = [((1 - t) * angle).sin_().div_(sine), (t * angle).sin_().div_(sine)]
    straight = sine < _NO_ANGLE
    return shares[0].masked_fill_(straight, 1 - t), shares[1].masked_fill_(straight, t)


def _for_rows(share: Tensor, rows: Tensor, block: Block) -> Tensor:
    """The columns' factors, (matrices, columns), for each of some rows that may be of several matrices."""
    import torch

    if len(share) == 1:
        return share
    first = block.start // max(rows.shape[1], 1)
    return share[torch.arange(first, first + len(rows), device=rows.device) // max(block.shape[-2], 1)]


@dataclass(frozen=True, slots=True)
class _Columns(Reduction):
    """For each column of each matrix of two tensors their dot product and squared norms, and the factors they lead to.

    A part is the sums over the rows of a block, (3, matrices, columns) in float64, and the number of its first matrix.
    """

    cut: ClassVar[Cut] = "row"

    t: float

    def block(self, inputs: Sequence[Tensor], block: Block) -> tuple[int, Tensor]:
        import torch

        count, columns = inputs[0].shape
        if len(block.shape) < 2:
            return 0, row_sums(inputs, _PAIRS).unsqueeze(1)
        height, row = max(block.shape[-2], 1), block.start // max(columns, 1)
        # The rest of a matrix that the block before began, whole matrices, the beginning of one more.
        head = min(-row % height, count)
        ends = (0, head, count - (count - head) % height, count)
        sums = [torch.zeros((3, 0, columns), dtype=torch.float64, device=inputs[0].device)]
        for (start, end), size in zip(pairwise(ends), (head, height, ends[3] - ends[2]), strict=True):
            if end > start:
                a, b = (one[start:end].double().view(-1, size, columns) for one in inputs)
                sums.append(torch.stack([(a * b).sum(1), (a * a).sum(1), (b * b).sum(1)]))
        return row // height, torch.cat(sums, dim=1)

    def merge(self, parts: Sequence[tuple[int, Tensor]]) -> tuple[int, Tensor]:
        import torch

        (first, total), *others = parts
        for at, part in others:
            if at == first + total.shape[1] - 1:  # both have rows of one matrix
                total[:, -1] += part[:, 0]
                part = part[:, 1:]
            total = torch.cat([total, part], dim=1) if part.shape[1] else total
        return first, total

    def finish(self, total: tuple[int, Tensor]) -> tuple[Tensor, Tensor]:
        return _shares(self.t, total[1])

"""Lengths and angles of whole tensors, seen as flat vectors: all the dot products of the inputs, in one reading.

What the ops on a sphere give is a linear combination of their inputs, and its factors follow from the dot products
alone, whatever number of steps their definition takes. So they read their inputs twice: once here, once to add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeflow.ops.base import LEAF, Block, Reduction

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[Any]
    Factors = Callable[[Array], Sequence[float]]

_CHUNK = 65_536
"""Elements that row sums look at together: few enough to stay in the processor's caches."""


@dataclass(frozen=True, slots=True)
class Gram(Reduction):
    """The dot products of each two inputs after the first `skip`, (leaves, pairs) in float64, summed exactly.

    What it finds are the `factors` of the inputs that follow from them: from a symmetric float64 matrix, which has NaN
    where a sum is none, or beyond float64.
    """

    factors: Factors
    skip: int = 0

    def block(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        import torch

        rows = []
        for parts in zip(*(torch.split(tensor, LEAF) for tensor in inputs[self.skip :]), strict=True):
            # A copy always: what `dot` gives depends on how its memory is aligned, and a copy is aligned in one way.
            wide = [part.to(torch.float64, copy=True) for part in parts]
            rows.append(torch.stack([torch.dot(wide[i], wide[j]) for i, j in _pairs(len(wide))]))
        return torch.stack(rows)

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        import torch

        return torch.cat(list(parts))

    def finish(self, total: Tensor) -> tuple[float, ...]:
        import numpy as np

        columns = total.T.tolist()
        size = math.isqrt(2 * len(columns))
        found = np.empty((size, size))
        for (i, j), column in zip(_pairs(size), columns, strict=True):
            found[i, j] = found[j, i] = exact_sum(column)
        with np.errstate(invalid="ignore"):  # NaN is seen in the result
            return tuple(self.factors(found))


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(i, count)]


def exact_sum(parts: Sequence[float]) -> float:
    """The sum, rounded once; NaN for inf - inf, or a sum beyond float64."""
    try:
        return math.fsum(parts)
    except (ValueError, OverflowError):
        return math.nan


def norms(gram: Array) -> Array:
    """The length of each input."""
    import numpy as np

    lengths: Array = np.sqrt(np.diagonal(gram))
    return lengths


def cosines(gram: Array) -> Array:
    """The cosine between each two inputs, in [-1, 1]; a length of 0 counts as 1, so that 0 is at right angles to all."""
    import numpy as np

    lengths = norms(gram)
    lengths[lengths == 0] = 1
    between: Array = np.clip(gram / (lengths[:, None] * lengths), -1, 1)
    return between


def row_sums(rows: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> Tensor:
    """For each row of some (n, length) tensors the dot products of these pairs of them: (pairs, n) in float64."""
    import torch

    count, length = rows[0].shape
    step = max(_CHUNK // max(length, 1), 1)
    parts = []
    for start in range(0, max(count, 1), step):
        wide = [one[start : start + step].double() for one in rows]
        parts.append(torch.stack([(wide[i] * wide[j]).sum(1) for i, j in pairs]))
    return torch.cat(parts, dim=1)

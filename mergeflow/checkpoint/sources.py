"""Tensors that no file holds as such: how their elements are made from stored ones, block by block."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Read = Callable[[int, int, int], "Tensor"]
"""`read(i, start, stop)`: elements [start, stop) of the i-th stored tensor, flat, in its stored dtype, on the device."""


class Source(ABC):
    """What makes the elements of one tensor out of stored tensors. A frozen value."""

    cut: ClassVar[Literal["element", "row"]] = "element"
    """Whether any stretch can be made alone, or only whole rows of the last axis."""

    @abstractmethod
    def make(self, read: Read, start: int, stop: int, shape: tuple[int, ...], compute: torch.dtype) -> Tensor:
        """Elements [start, stop) of the tensor of this shape, flat, in the compute dtype: a new tensor."""

    def held(self, shape: tuple[int, ...]) -> int:
        """Elements that `make` holds at most beyond a few times what it gives, for the estimate of memory."""
        return 0


@dataclass(frozen=True, slots=True)
class Bits(Source):
    """The bits of one stored tensor of bytes, the first element in the lowest bit, as 0 and 1."""

    def make(self, read: Read, start: int, stop: int, shape: tuple[int, ...], compute: torch.dtype) -> Tensor:
        """Elements [start, stop)."""
        import torch

        packed = read(0, start // 8, -(-stop // 8))
        bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
        return bits.reshape(-1)[start % 8 :][: stop - start].to(compute)


@dataclass(frozen=True, slots=True)
class Everywhere(Source):
    """The one element of a stored tensor, at every place."""

    def make(self, read: Read, start: int, stop: int, shape: tuple[int, ...], compute: torch.dtype) -> Tensor:
        """Elements [start, stop)."""
        return read(0, 0, 1).to(compute).expand(stop - start).clone()


@dataclass(frozen=True, slots=True)
class Along(Source):
    """A stored vector at every place of a matrix: entry j in column j, or, by `rows`, entry i in row i."""

    rows: bool = False

    def make(self, read: Read, start: int, stop: int, shape: tuple[int, ...], compute: torch.dtype) -> Tensor:
        """Elements [start, stop)."""
        import torch

        columns = max(shape[-1], 1)
        vector = read(0, 0, shape[0] if self.rows else columns).to(compute)
        place = torch.arange(start, stop, device=vector.device)
        return vector[place // columns if self.rows else place % columns]


@dataclass(frozen=True, slots=True)
class Zeros(Source):
    """A tensor of zeros, which reads nothing."""

    def make(self, read: Read, start: int, stop: int, shape: tuple[int, ...], compute: torch.dtype) -> Tensor:
        """Zeros."""
        import torch

        return torch.zeros(stop - start, dtype=compute)


PANEL = 32_768
"""Elements of a panel: the whole rows of a low-rank product that are always computed together."""


@dataclass(frozen=True, slots=True)
class LowRank(Source):
    """scaling * B A, of two stored matrices: B (out, rank) and A (rank, in), in this order; or the transpose of that.

    The first axis of the result counts rows, all others columns, so that a convolution's kernel of shape
    (out, in, height, width) is the product of (out, rank) and (rank, in * height * width).

    The bits of a matrix product depend on how many rows are asked for at once. So they are computed in panels of rows that
    follow from the shape alone, whatever the stretch that is wanted, and what of a panel is not wanted is thrown away: a
    stretch can start and stop anywhere, and its bits are those of any other cut. Copies are laid out alike for the same
    reason.
    """

    rank: int
    scaling: float
    transposed: bool = False

    def make(self, read: Read, start: int, stop: int, shape: tuple[int, ...], compute: torch.dtype) -> Tensor:
        """scaling * B A, rows [start / columns, stop / columns) of it."""
        import torch

        if stop <= start:
            return torch.zeros(0, dtype=compute)
        rows, columns = shape[0], math.prod(shape[1:])
        step = max(PANEL // columns, 1)
        first = start // columns // step * step
        last = min(-(-stop // columns // step) * step, rows)
        right = self._right(read, columns, compute)
        left = self._left(read, first, last, rows)
        made = []
        for top in range(first, last, step):
            bottom = min(top + step, rows)
            panel = torch.empty((bottom - top, self.rank), dtype=compute, device=right.device)
            product = (panel.copy_(left[top - first : bottom - first]) @ right).mul_(self.scaling).reshape(-1)
            made.append(product[max(start - top * columns, 0) : stop - top * columns])
        return made[0] if len(made) == 1 else torch.cat(made)

    def held(self, shape: tuple[int, ...]) -> int:
        """The right factor, as stored and copied."""
        return 2 * self.rank * math.prod(shape[1:])

    def _left(self, read: Read, first: int, last: int, rows: int) -> Tensor:
        """Rows [first, last) of the left factor, as stored: of B, or columns of A."""
        import torch

        if not self.transposed:
            return read(0, first * self.rank, last * self.rank).reshape(-1, self.rank)
        return torch.stack([read(1, one * rows + first, one * rows + last) for one in range(self.rank)], dim=1)

    def _right(self, read: Read, columns: int, compute: torch.dtype) -> Tensor:
        """The right factor, (rank, columns): A, or B's transpose; a new tensor."""
        import torch

        stored = read(int(not self.transposed), 0, self.rank * columns)
        matrix = stored.reshape(columns, self.rank).T if self.transposed else stored.reshape(self.rank, columns)
        return torch.empty((self.rank, columns), dtype=compute, device=stored.device).copy_(matrix)

"""Tensors that no file holds as such: how their elements are made from stored ones, block by block."""

from __future__ import annotations

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

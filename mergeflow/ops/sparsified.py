"""What the ops share that drop a part of each delta, make up for it, and merge what is left.

Which elements are dropped may depend on draws, on ranks or on thresholds. A mask that takes long to find is found once: where
the norms before and after it are needed, the round that measures them keeps it, a bit an element, for the blocks to come.
"""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from mergeflow.ops.base import Block, Cut, DeltaOp, Reduction, is_one_of, number, numbers
from mergeflow.ops.deltas import (
    Rescale,
    Vote,
    agreeing,
    divided,
    factor_of,
    masked,
    norm_of,
    norm_parts,
    norms_around,
    powers,
    refuse_zero_sum,
    scaled,
)
from mergeflow.settings import Flag, Fraction, Number, PerInput, Setting, setting

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

NORMS: tuple[Rescale, ...] = ("l1", "l2", "linf")
_MOST_BITS = 1 << 27
"""Elements, of all deltas of a tensor, whose masks are kept: 16 MiB. Of larger tensors they are found again."""


class Sparsified(DeltaOp):
    """theta_0 + s sum_i m_i w_i f_i s(tau_i): s drops, f_i makes up for it, m_i is 1, or says who agrees with the vote."""

    weight: PerInput[Number] = setting(1.0, "Multiplies this delta, before the vote if there is one.")
    density: PerInput[Fraction] = setting(1.0, "Part of this delta's entries to keep.")
    normalize: Setting[Flag] = setting(
        False, "Divide by the weights: of all deltas, or of those that agree on an entry."
    )
    scale: Setting[Number] = setting(1.0, "Multiplies the merged delta before it is added to the base.")

    @abstractmethod
    def sparse(self, deltas: Sequence[Tensor], block: Block) -> Sequence[tuple[Tensor, float]]:
        """Each delta with the dropped elements 0, a new tensor or the delta itself, and what to multiply it with."""

    def check(self) -> None:
        """Raises RecipeError where the weights sum to 0 and would divide."""
        if self.normalize and not isinstance(self, Voting):
            refuse_zero_sum(numbers(self.weight))

    def merged(self, products: list[Tensor], deltas: Sequence[Tensor]) -> Tensor:
        """sum_i p_i of products w_i f_i s(tau_i), which may be written into but for those that are `deltas` themselves."""
        total, *others = products
        for product in others:
            total = total + product if is_one_of(total, deltas) else total.add_(product)
        return divided(total, numbers(self.weight), own=not is_one_of(total, deltas)) if self.normalize else total

    def combine(self, deltas: Sequence[Tensor], block: Block) -> Tensor:
        """s sum_i m_i w_i f_i s(tau_i)"""
        products = [
            scaled(part, weight * factor, own=part is not delta)
            for (part, factor), weight, delta in zip(
                self.sparse(deltas, block), numbers(self.weight), deltas, strict=True
            )
        ]
        merged = self.merged(products, deltas)
        return scaled(merged, number(self.scale), own=not is_one_of(merged, deltas))


class Voting(Sparsified):
    """A sparsifying op whose deltas vote, element by element, on a sign."""

    vote: Vote = Field(default="mass", description="Elect the sign of the sum (mass), or of the majority (count).")

    def merged(self, products: list[Tensor], deltas: Sequence[Tensor]) -> Tensor:
        """sum_i m_i p_i, divided by sum_i m_i w_i with `normalize`."""
        merged = agreeing(products, numbers(self.weight), vote=self.vote, normalize=bool(self.normalize))
        if self.vote == "count":  # an Inf that the many outvote is seen all the same: 0 Inf is NaN
            for product in products:
                merged.add_(product * 0)
        return merged


class Masking(Sparsified):
    """A sparsifying op that draws which elements are kept, so that each has a probability."""

    draws: ClassVar[bool] = True

    rescale: Rescale = Field(
        default="l1", description="Make up for what was dropped: keep that norm of the delta, or divide by probability."
    )

    kept_by: ClassVar[type[Kept]]
    """The round that measures what the masks take."""

    @abstractmethod
    def masks(self, deltas: Sequence[Tensor], block: Block) -> list[tuple[Tensor, Any] | None]:
        """What is kept of each delta, as truth values, and with which probability; None where all is."""

    def reduction(self, known: tuple[Any, ...]) -> Reduction | None:
        """One round for a norm before and after; none where no norm is kept or nothing is dropped."""
        drops = any(density < 1 for density in numbers(self.density))
        return None if known or not drops or self.rescale not in NORMS else self.kept_by(self, self.rescale)

    def measure_bytes(self, inputs: int) -> int:
        """The masks of one tensor."""
        return _MOST_BITS // 8

    def sparse(self, deltas: Sequence[Tensor], block: Block) -> Sequence[tuple[Tensor, float]]:
        """m_i tau_i, and the factor that makes up for it."""
        found = measured(block)
        if found and found.masks:
            return [
                (delta, 1.0) if mask is None else (masked(delta, mask), factor)
                for delta, mask, factor in zip(
                    deltas, found.masks.at(block.start, deltas[0]), found.factors, strict=True
                )
            ]
        result = []
        for which, (delta, drawn) in enumerate(zip(deltas, self.masks(deltas, block), strict=True)):
            if drawn is None:
                result.append((delta, 1.0))
                continue
            mask, probability = drawn
            kept, factor = masked(delta, mask), found.factors[which] if found else 1.0
            if self.rescale == "probability":
                kept.div_(probability)
            result.append((kept, factor))
        return result


def measured(block: Block) -> Factors | None:
    """What makes up for the loss, if it was measured."""
    found = block.measured[-1] if block.measured else None
    return found if isinstance(found, Factors) else None


@dataclass(frozen=True, slots=True)
class Masks:
    """Which elements of deltas are kept, a bit each, in stretches of a tensor; bits are None of a delta that is kept whole."""

    starts: tuple[int, ...]
    bits: tuple[tuple[NDArray[Any] | None, ...], ...]

    def at(self, start: int, like: Tensor) -> list[Tensor | None]:
        """The masks from element `start` on, in the shape and on the device of `like`; None of a delta that is kept whole."""
        import numpy as np
        import torch

        stop = start + like.numel()
        pieces: list[list[NDArray[Any] | None]] = []
        index = max(bisect_right(self.starts, start) - 1, 0)
        while index < len(self.starts) and (self.starts[index] < stop or not pieces):
            own = self.starts[index]
            first, end = max(start - own, 0), min((stop, *self.starts[index + 1 : index + 2])) - own
            pieces.append([None if bits is None else _unpacked(bits, first, end) for bits in self.bits[index]])
            index += 1
        result: list[Tensor | None] = []
        for parts in zip(*pieces, strict=True):
            found = [part for part in parts if part is not None]
            whole = found[0] if len(found) == 1 else np.concatenate(found) if found else None
            result.append(None if whole is None else torch.from_numpy(whole).view(like.shape).to(like.device))
        return result


def _unpacked(bits: NDArray[Any], first: int, end: int) -> NDArray[Any]:
    """Truth values [first, end) of those that are packed, eight to a byte."""
    import numpy as np

    return np.unpackbits(bits[first // 8 : -(-end // 8)], bitorder="little")[first % 8 :][: end - first].view(np.bool_)


@dataclass(frozen=True, slots=True)
class Factors:
    """What makes up for the loss of each delta, and the masks if they were kept."""

    factors: tuple[float, ...]
    masks: Masks | None = None


@dataclass(frozen=True, slots=True)
class _Part:
    """Of a stretch of blocks: the parts of the norms of each delta, before and after, and the masks."""

    norms: tuple[tuple[Tensor, Tensor] | None, ...]
    starts: tuple[int, ...] = ()
    bits: tuple[tuple[NDArray[Any] | None, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Norms(Reduction):
    """The norms of each delta before and after a part of it is dropped."""

    op: Sparsified
    norm: Rescale

    def block(self, inputs: Sequence[Tensor], block: Block) -> _Part:
        deltas = inputs[1:]
        kept = self.op.sparse(deltas, block)
        return _Part(tuple(self.before_and_after(delta, part) for delta, (part, _) in zip(deltas, kept, strict=True)))

    def before_and_after(self, delta: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        before, after = (norm_parts(powers(one.reshape(-1), self.norm), self.norm) for one in (delta, kept))
        return before, after

    def merge(self, parts: Sequence[_Part]) -> _Part:
        import torch

        norms: list[tuple[Tensor, Tensor] | None] = []
        for pairs in zip(*(part.norms for part in parts), strict=True):
            sound = [pair for pair in pairs if pair is not None]
            before, after = (torch.cat([pair[side] for pair in sound]) if sound else None for side in (0, 1))
            norms.append(None if before is None or after is None else (before, after))
        starts = tuple(chain.from_iterable(part.starts for part in parts))
        return _Part(tuple(norms), starts, tuple(chain.from_iterable(part.bits for part in parts)))

    def finish(self, total: _Part) -> Factors:
        factors = tuple(
            1.0 if pair is None else factor_of(*(norm_of(side.tolist(), self.norm) for side in pair))
            for pair in total.norms
        )
        return Factors(factors, Masks(total.starts, total.bits) if total.bits else None)


@dataclass(frozen=True, slots=True)
class Kept(Norms):
    """The norms before and after masks, and the masks, unless they are too many."""

    op: Masking

    def block(self, inputs: Sequence[Tensor], block: Block) -> _Part:
        import numpy as np

        deltas = inputs[1:]
        norms: list[tuple[Tensor, Tensor] | None] = []
        bits: list[NDArray[Any] | None] = []
        for delta, mask in zip(deltas, self.op.masks(deltas, block), strict=True):
            if mask is None:
                norms.append(None)
                bits.append(None)
                continue
            if self.norm in NORMS:
                norms.append(norms_around(delta.reshape(-1), mask[0].reshape(-1), self.norm))
            else:
                norms.append(None)
            bits.append(np.packbits(np.asarray(mask[0].reshape(-1).cpu()), bitorder="little"))
        if self.cut != "tensor" and prod(block.shape) * len(deltas) > _MOST_BITS:
            return _Part(tuple(norms))
        return _Part(tuple(norms), (block.start,), (tuple(bits),))


@dataclass(frozen=True, slots=True)
class KeptInRows(Kept):
    """The same of whole rows."""

    cut: ClassVar[Cut] = "row"


@dataclass(frozen=True, slots=True)
class KeptInWhole(Kept):
    """The same of a whole tensor, whose masks are always kept."""

    cut: ClassVar[Cut] = "tensor"

"""The shared parts of ops on deltas: weighting, trim, vote, rescale.

Trim selects over the bits of |tau|, which order as the numbers do, exactly, without a sort or a copy of the tensor.
A small sample brackets the threshold; one pass counts the elements above the bracket and collects the few inside, among
which the threshold then is. Where the sample misled, or the bracket holds masses, a radix selection decides: a histogram
of the leading 15 or 16 bits, then of the next digit within the bucket that holds the threshold, until its bits are known.
(The radix alone reads the deltas twice, and a third time where they tie: with the bracket first, TIES of bfloat16 models
took a fifth less processor time.) Elements equal to the threshold are kept from the lowest index on, for which they are
counted leaf by leaf: deltas of bfloat16 models tie in masses. NaN has larger bits than any number: it is kept, and seen.

All of it is made of elementwise operations, counts, and sums in a fixed order, so it gives the same bytes on every
processor. The same selection finds the largest entries of any score that is computed from the deltas (`Selection`).
"""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

from mergeflow.errors import RecipeError
from mergeflow.ops.base import LEAF, Block, Reduction, is_one_of, weighted_sum

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

T = TypeVar("T")

Rounding = Literal["floor", "nearest", "ceil"]
Rescale = Literal["none", "l1", "l2", "linf", "probability"]
Vote = Literal["mass", "count"]
Scope = Literal["tensor", "model"]

_TINY = 1e-8
"""Divisors smaller than this count as 0."""
_NO_NORM = 1e-7
"""Norms smaller than this are not made up for."""
_INFINITY = {False: 0x7F80_0000, True: 0x7FF0_0000_0000_0000}
"""The bits of Inf, of float32 and of float64 (`wide`)."""
_SHIFT = {False: 16, True: 47}
"""The bits below the leading digit."""
_BINS = {False: 1 << 15, True: 1 << 16}
"""The values of the leading digit."""


def refuse_zero_sum(
    weights: Sequence[float],
    what: str = "`normalize` divides",
    fix: str = "Change a weight, or write `normalize: false`.",
) -> None:
    """Raises RecipeError where weights that will divide sum to 0; `what` says what divides."""
    if abs(math.fsum(weights)) < _TINY:
        listed = ", ".join(f"{one:g}" for one in weights)
        raise RecipeError(f"{what} by the sum of the weights, which is 0: {listed}", fix=fix)


def divided(total: Tensor, weights: Sequence[float], *, own: bool) -> Tensor:
    """`total` / sum of weights; written into it if it is our own."""
    divisor = math.fsum(weights)
    if abs(math.frexp(divisor)[0]) == 0.5:  # a power of two: its reciprocal is exact, and multiplying is faster
        return scaled(total, 1 / divisor, own=own)
    return total.div_(divisor) if own else total / divisor


def scaled(total: Tensor, factor: float, *, own: bool) -> Tensor:
    """`total` * factor; written into it if it is our own."""
    if factor == 1:
        return total
    return total.mul_(factor) if own else total * factor


def kept_of(size: int, density: float, rounding: Rounding) -> int:
    """How many of `size` elements a density keeps: at least one, at most all."""
    exact = density * size
    count = {"floor": math.floor(exact), "nearest": math.floor(exact + 0.5), "ceil": math.ceil(exact)}[rounding]
    return min(size, max(1, count))


class Share(Protocol):
    """How many elements of a score are above its threshold, of how many it has: of all, or of those that are not 0."""

    @property
    def not_zero(self) -> bool:
        """Whether only elements other than 0 count."""

    def of(self, size: int) -> int:
        """As many of so many elements."""


@dataclass(frozen=True, slots=True)
class Largest:
    """What trim keeps: the part of the elements that the density says, at least one; of those that are not 0, rounded down."""

    density: float
    rounding: Rounding = "floor"
    not_zero: bool = False

    def of(self, size: int) -> int:
        """As many elements as the density says."""
        return int(self.density * size) if self.not_zero else kept_of(size, self.density, self.rounding)


@dataclass(frozen=True, slots=True)
class Threshold:
    """What is known of the smallest of so many magnitudes of one delta, the largest first.

    `bits` are its leading bits, with `shift` bits below them not known yet. All elements above are kept, and of the
    `sharing` elements that share these bits `need`: all before leaf `leaf`, and `rest` in it. `factor` multiplies what
    is kept.
    """

    wide: bool
    bits: int
    shift: int
    need: int
    sharing: int
    leaf: int | None = None
    rest: int = 0
    factor: float = 1.0

    @property
    def open(self) -> bool:
        """Whether further bits matter."""
        return self.shift > 0 and self.need < self.sharing

    @property
    def lowest(self) -> int:
        """The lowest magnitude that `bits` stand for, as an integer."""
        return self.bits << self.shift

    @property
    def divides(self) -> bool:
        """Whether only some of the elements at the threshold are kept."""
        return self.need < self.sharing and 0 < self.lowest <= _INFINITY[self.wide]

    def at(self) -> float:
        """The threshold."""
        return _number(min(self.lowest, _INFINITY[self.wide]), self.wide)

    def below(self) -> float:
        """The number under the threshold: what is greater is kept, if all at the threshold are; -1 under 0."""
        return _number(min(self.lowest - 1, _INFINITY[self.wide]), self.wide) if self.lowest else -1.0


def _number(bits: int, wide: bool) -> float:
    """The float with these bits."""
    found: float = struct.unpack("<d" if wide else "<f", bits.to_bytes(8 if wide else 4, "little"))[0]
    return found


Scores = Callable[[Sequence["Tensor"], Block], Sequence["Tensor"]]
"""What is selected among, from the inputs of a block: flat tensors, of which the magnitudes count."""


def the_deltas(inputs: Sequence[Tensor], block: Block) -> Sequence[Tensor]:
    """The inputs without the base."""
    return inputs[1:]


@dataclass(frozen=True, slots=True)
class Selection:
    """What is looked for: a threshold for each share of its score, which are as many; None is a share that is not looked for."""

    shares: tuple[Share | None, ...]
    scores: Scores = the_deltas


def nothing(wide: bool) -> Threshold:
    """The threshold that no number reaches."""
    return Threshold(wide, _INFINITY[wide] + 1, 0, 0, 0)


def trimming(
    known: tuple[Any, ...],
    densities: Sequence[float],
    rounding: Rounding,
    rescale: Rescale,
    scope: Scope = "tensor",
) -> Reduction | None:
    """The next round of finding the thresholds of deltas to trim; a delta of density 1 is not trimmed, and has none."""
    shares = tuple(None if density == 1 else Largest(density, rounding) for density in densities)
    return selecting(known, Selection(shares), rescale, scope)


def selecting(
    known: tuple[Any, ...], selection: Selection, rescale: Rescale = "none", scope: Scope = "tensor"
) -> Reduction | None:
    """The next round of finding the thresholds of scores, of tensors that are given flat.

    The first round knows a bracket for each share, later ones a `Threshold`. The second knows None where a bracket did not hold
    the threshold. Over a model there is no bracket: a sample of each tensor says little about all of them.
    """
    if not any(selection.shares):
        return None
    if not known and scope == "tensor":
        return _Brackets(selection)
    if len(known) == 1 and scope == "tensor":
        return _Inside(selection, known[0], count_leaves=rescale not in ("l1", "l2"))
    if not known or known[-1] is None:
        return _Leading(selection)
    found: tuple[Threshold | None, ...] = known[-1]
    if any(one and one.open for one in found):
        return Digit(found, selection.scores)
    if any(one and one.leaf is None and (one.divides or rescale in ("l1", "l2")) for one in found):
        return _AtThreshold(found, selection.scores, rescale)
    return None


def trimming_bytes(deltas: int) -> int:
    """Bytes that finding thresholds holds at most: what is collected and chosen among, or histograms of 65,536 bins."""
    return max(6 * _MOST_INSIDE, 3 * deltas * (8 << 16))


def trimmed(deltas: Sequence[Tensor], densities: Sequence[float], rescale: Rescale, block: Block) -> list[Tensor]:
    """Each delta with its small elements set to 0: a new tensor, or the delta itself where it is not trimmed."""
    found: Sequence[Threshold | None] = block.measured[-1] if block.measured else [None] * len(deltas)
    result = []
    for delta, density, one in zip(deltas, densities, found, strict=True):
        if one is None:
            result.append(delta)
            continue
        kept = largest(delta, one, block)
        factor = 1 / density if rescale == "probability" else one.factor
        result.append(scaled(kept, factor, own=kept is not delta))
    return result


def largest(delta: Tensor, threshold: Threshold, block: Block) -> Tensor:
    """A delta, or a score, with all set to 0 but what a threshold keeps: a new tensor, or itself where nothing is lost.

    The order is by magnitude, and by index among equals, of which the lowest counts as the largest.
    """
    import torch

    if not threshold.lowest:
        return delta
    start = block.before * LEAF + block.start  # in whole leaves, where several tensors are measured
    if not threshold.divides:
        return torch.hardshrink(delta, threshold.below())
    assert threshold.leaf is not None
    border = threshold.leaf * LEAF - start
    if border >= len(delta):
        return torch.hardshrink(delta, threshold.below())
    kept = torch.hardshrink(delta, threshold.at())
    if border > 0:
        kept[:border] = torch.hardshrink(delta[:border], threshold.below())
    if border >= 0 and threshold.rest:
        leaf = delta[border : border + LEAF]
        first = (leaf.abs() == threshold.at()).nonzero().flatten()[: threshold.rest]
        kept[border : border + LEAF][first] = leaf[first]
    return kept


def agreeing(
    products: Sequence[Tensor],
    weights: Sequence[float],
    *,
    vote: Vote,
    normalize: bool,
    voters: Sequence[Tensor] | None = None,
) -> Tensor:
    """sum_i m_i p_i, where m_i is 1 if the product p_i = w_i s(tau_i) has the elected sign, else 0.

    `normalize` divides by sum_i m_i w_i. `mass` elects the sign of sum_i v_i, `count` that of sum_i sign(v_i), v_i being
    p_i, or the `voters` if they are others; 0 counts as +. Where the divisor is 0 the result is 0.
    """
    import torch

    voters = products if voters is None else voters
    ballots = voters if vote == "mass" else [voter.sign() for voter in voters]
    elected = weighted_sum(ballots, [1.0] * len(ballots))
    own = elected if not is_one_of(elected, ballots) else torch.empty_like(elected)
    elected = torch.ge(elected, 0, out=own).mul_(2).sub_(1)
    # Weights of one sign add up without cancelling; others need float64 to tell a divisor of 0 from its rounding error.
    simple = all(weight == 0 or weight >= _TINY for weight in weights)
    total: Tensor | None = None
    divisor: Tensor | None = None
    agreed = share = None
    for product, weight in zip(products, weights, strict=True):
        # The first of each become the sums, the second are written over by those that follow.
        agreed = torch.empty_like(elected) if agreed is total else agreed
        agreed = torch.mul(product, elected, out=agreed).relu_()
        if normalize:
            share = torch.empty_like(elected) if share is divisor or not simple else share
            share = torch.gt(agreed, 0, out=share)
            share = scaled(share if simple else share.double(), weight, own=True)
            divisor = share if divisor is None else divisor.add_(share)
        total = agreed if total is None else total.add_(agreed)
    assert total is not None
    if divisor is not None and simple:
        # Where nobody agrees the sum is 0 already, so any divisor will do.
        total.div_(divisor.clamp_(min=min((weight for weight in weights if weight), default=1.0)))
    elif divisor is not None:
        total.div_(divisor.masked_fill_(divisor.abs() < _TINY, math.inf).to(total.dtype))
    return total.mul_(elected)


_MARGIN = 0.005
"""How far the bracket reaches to each side of the threshold, as a share of the elements: two and a half standard errors
of a sample of `LEAF` elements at the worst density, since a wider one costs more than a rare miss."""
_MOST_INSIDE = 1 << 21
"""Elements that are collected at most, of all deltas of a tensor."""
_MOST_PIECES = 8
"""Arrays in which what was collected lies."""

_Bracket = tuple[int, int]
"""The lowest and the highest magnitude inside, as integers."""


@dataclass(frozen=True, slots=True)
class _Brackets(Reduction):
    """Brackets of the thresholds, from the order of a sample's magnitudes."""

    sample: ClassVar[bool] = True

    selection: Selection

    def block(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        import torch

        return torch.stack([_magnitude(score) for score in self.selection.scores(inputs, block)])

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        import torch

        return torch.cat(list(parts), dim=1)

    def finish(self, total: Tensor) -> tuple[_Bracket | None, ...]:
        import numpy as np

        found: list[_Bracket | None] = []
        for row, share in zip(total, self.selection.shares, strict=True):
            sample = np.asarray(row.cpu())
            if share is not None and share.not_zero:
                sample = sample[sample != 0]
            found.append(None if share is None else _bracket(sample, share))
        return tuple(found)


def _bracket(sample: NDArray[Any], share: Share) -> _Bracket:
    """The magnitudes between which the last element of a share is, judged by a sample."""
    import numpy as np

    size, reach = len(sample), int(_MARGIN * len(sample)) + 8
    first, last = share.of(size) - reach, share.of(size) + reach
    return (
        _nth_largest(sample, last) if last <= size else 0,
        _nth_largest(sample, first) if first > 0 else int(np.iinfo(sample.dtype).max),
    )


def _nth_largest(values: NDArray[Any], n: int) -> int:
    """The n-th largest of some integers >= 0, by digits of 16 bits: masses of equal ones, which partitioning
    algorithms are slow at, cost nothing here.
    """
    import numpy as np

    found, bits = 0, int(values.max()).bit_length()
    while True:
        bits = max(bits - 16, 0)
        digits = values >> bits
        from_top = np.bincount(digits)[::-1].cumsum()
        above = int(np.searchsorted(from_top, n))
        digit = len(from_top) - 1 - above
        found += digit << bits
        if bits == 0:
            return found
        n -= int(from_top[above - 1]) if above else 0
        values = values[digits == digit] - (digit << bits)


@dataclass(frozen=True, slots=True)
class _Collected:
    """What a stretch of blocks holds of each bracketed score: the elements that its density is a share of, those above the
    bracket, those inside by leaf, and the values of these, as magnitudes above the bracket's lowest, as integers.
    """

    elements: tuple[int, ...]
    above: tuple[int, ...]
    by_leaf: tuple[tuple[NDArray[Any], ...], ...]
    values: tuple[tuple[NDArray[Any], ...], ...]


@dataclass(frozen=True, slots=True)
class _Inside(Reduction):
    """The elements inside each bracket, among which the threshold is chosen; None where they are too many to hold."""

    selection: Selection
    brackets: tuple[_Bracket | None, ...]
    count_leaves: bool

    def block(self, inputs: Sequence[Tensor], block: Block) -> _Collected | None:
        import numpy as np

        elements, above, by_leaf, values = [], [], [], []
        scores = self.selection.scores(inputs, block)
        for score, share, bracket in zip(scores, self.selection.shares, self.brackets, strict=True):
            if share is None or bracket is None:
                continue
            low, high = bracket
            elements.append(int(score.count_nonzero()) if share.not_zero else len(score))
            array = np.asarray(_magnitude(score).sub_(low).cpu())
            # Below the bracket is negative, which is large as an unsigned number: one comparison finds what is inside.
            inside = array.view(f"u{array.itemsize}") <= high - low
            above.append(int(np.count_nonzero(array > high - low)))
            starts = range(0, len(array), LEAF)
            by_leaf.append((np.array([np.count_nonzero(inside[start : start + LEAF]) for start in starts], np.int64),))
            values.append((array.compress(inside),))
        return _Collected(tuple(elements), tuple(above), tuple(by_leaf), tuple(values))

    def merge(self, parts: Sequence[_Collected | None]) -> _Collected | None:
        sound = [part for part in parts if part is not None]
        values = [tuple(chain.from_iterable(one)) for one in zip(*(part.values for part in sound), strict=True)]
        if len(sound) < len(parts) or sum(len(part) for one in values for part in one) > _MOST_INSIDE:
            return None
        return _Collected(
            tuple(map(sum, zip(*(part.elements for part in sound), strict=True))),
            tuple(map(sum, zip(*(part.above for part in sound), strict=True))),
            tuple(_joined(tuple(chain(*one))) for one in zip(*(part.by_leaf for part in sound), strict=True)),
            tuple(map(_joined, values)),
        )

    def finish(self, total: _Collected | None) -> tuple[Threshold | None, ...] | None:
        import numpy as np

        if total is None:
            return None
        collected = zip(total.elements, total.above, total.by_leaf, total.values, strict=True)
        found: list[Threshold | None] = []
        for share, bracket in zip(self.selection.shares, self.brackets, strict=True):
            if share is None or bracket is None:
                found.append(None)
                continue
            elements, above, by_leaf, parts = next(collected)
            values = np.concatenate(parts)
            count = share.of(elements)
            if count == 0:
                found.append(nothing(values.itemsize == 8))
                continue
            need = count - above
            if not 0 < need <= len(values):
                return None
            value = _nth_largest(values, need)
            at = values == value
            need -= int(np.count_nonzero(values > value))
            one = Threshold(values.itemsize == 8, bracket[0] + value, 0, need, int(np.count_nonzero(at)))
            if self.count_leaves:
                ends = np.concatenate(by_leaf).cumsum().tolist()
                ties = np.array([np.count_nonzero(at[start:end]) for start, end in pairwise([0, *ends])]).cumsum()
                leaf = int(np.count_nonzero(ties <= need))
                one = replace(one, leaf=leaf, rest=need - (int(ties[leaf - 1]) if leaf else 0))
            found.append(one)
        return tuple(found)


def _joined(pieces: tuple[NDArray[Any], ...]) -> tuple[NDArray[Any], ...]:
    """The same values in few pieces: many small ones would lie between the large blocks, and keep their memory from reuse."""
    import numpy as np

    return pieces if len(pieces) <= _MOST_PIECES else (np.concatenate(pieces),)


class _Counts(Reduction):
    """A histogram for each score whose threshold is looked for: (scores, bins)."""

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        total, *others = parts
        for part in others:
            total.add_(part)
        return total


@dataclass(frozen=True, slots=True)
class _Leading(_Counts):
    """The histogram of the leading 15 bits of float32 magnitudes, or 16 of float64 ones: its length tells which.

    One bin more counts the elements that the share is none of.
    """

    selection: Selection

    def block(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        import torch

        rows = []
        for score, share in zip(self.selection.scores(inputs, block), self.selection.shares, strict=True):
            if share is not None:
                row = leading_digits(score)
                zeros = len(score) - int(score.count_nonzero()) if share.not_zero else 0
                rows.append(torch.cat([row, row.new_tensor([zeros])]))
        return torch.stack(rows)

    def finish(self, total: Tensor) -> tuple[Threshold | None, ...]:
        wide = total.shape[1] > _BINS[True]
        rows = iter(total)
        found: list[Threshold | None] = []
        for share in self.selection.shares:
            if share is None:
                found.append(None)
                continue
            counts = next(rows)
            kept = share.of(int(counts[:-1].sum()) - int(counts[-1]))
            found.append(at_rank(counts[:-1], kept) if kept else nothing(wide))
        return tuple(found)


def leading_digits(score: Tensor) -> Tensor:
    """The histogram of the leading bits of some magnitudes."""
    import torch

    wide = score.dtype == torch.float64
    return torch.bincount(_magnitude(score).bitwise_right_shift_(_SHIFT[wide]), minlength=_BINS[wide])


def at_rank(leading: Tensor, rank: int) -> Threshold:
    """What the histogram of the leading bits says of the `rank`-th largest magnitude."""
    wide = len(leading) == _BINS[True]
    bits, need, sharing = _bucket(leading, rank)
    return Threshold(wide, bits, _SHIFT[wide], need, sharing)


@dataclass(frozen=True, slots=True)
class Digit(_Counts):
    """The histogram of the next digit (16 bits, or what is left) of magnitudes that share the known bits.

    For thresholds whose further bits choose between elements; with `to_the_end` for all that have further bits.
    """

    known: tuple[Threshold | None, ...]
    scores: Scores = the_deltas
    to_the_end: bool = False

    def _open(self, one: Threshold | None) -> bool:
        return one is not None and (one.shift > 0 if self.to_the_end else one.open)

    def block(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        import torch

        rows = []
        for score, one in zip(self.scores(inputs, block), self.known, strict=True):
            if one and self._open(one):
                inside = _from_zero(_magnitude(score).sub_(one.lowest), 1 << one.shift)
                digits = inside.bitwise_right_shift_(one.shift - _width(one))
                rows.append(torch.bincount(digits, minlength=self._bins))
        return torch.stack(rows)

    @property
    def _bins(self) -> int:
        return 1 << max(_width(one) for one in self.known if one and self._open(one))

    def finish(self, total: Tensor) -> tuple[Threshold | None, ...]:
        rows = iter(total)
        found: list[Threshold | None] = []
        for one in self.known:
            if one and self._open(one):
                digit, need, sharing = _bucket(next(rows), one.need)
                width = _width(one)
                one = replace(one, bits=one.bits << width | digit, shift=one.shift - width, need=need, sharing=sharing)
            found.append(one)
        return tuple(found)


@dataclass(frozen=True, slots=True)
class _AtThreshold(Reduction):
    """Leaf by leaf, how many elements equal the threshold, and the norms before and after it: (leaves, columns)."""

    known: tuple[Threshold | None, ...]
    scores: Scores
    rescale: Rescale

    def block(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        import torch

        columns = []
        for score, one in zip(self.scores(inputs, block), self.known, strict=True):
            if one is None:
                continue
            if one.divides:
                columns.append(_leaves(score.abs().eq_(one.at())).sum(1).double())  # counts, exact in any order
            if self.rescale in ("l1", "l2"):
                kept = torch.hardshrink(score, one.at() if one.divides else one.below())
                columns += [leaf_sums(powers(each, self.rescale)) for each in (score, kept)]
        return torch.stack(columns, dim=1)

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        import torch

        return torch.cat(list(parts))

    def finish(self, total: Tensor) -> tuple[Threshold | None, ...]:
        columns = iter(total.T)
        found: list[Threshold | None] = []
        for one in self.known:
            if one is not None:
                leaf, rest, factor, kept_there = 0, 0, 1.0, 0
                if one.divides:
                    counts = next(columns).long().cumsum(0)
                    leaf = int((counts <= one.need).sum())
                    rest = one.need - (int(counts[leaf - 1]) if leaf else 0)
                    kept_there = one.need
                if self.rescale in ("l1", "l2"):
                    before, above = (math.fsum(next(columns).tolist()) for _ in range(2))
                    power = 2 if self.rescale == "l2" else 1
                    factor = factor_of(before ** (1 / power), (above + kept_there * one.at() ** power) ** (1 / power))
                one = replace(one, leaf=leaf, rest=rest, factor=factor)
            found.append(one)
        return tuple(found)


def _width(known: Threshold) -> int:
    """How many bits the next digit has."""
    return min(16, known.shift)


def _magnitude(delta: Tensor) -> Tensor:
    """|delta| as integers in the order of the magnitudes: its bits without the sign, as a new tensor."""
    import torch

    if delta.dtype == torch.float64:
        return delta.view(torch.int64) & 0x7FFF_FFFF_FFFF_FFFF
    return delta.view(torch.int32) & 0x7FFF_FFFF


def _from_zero(values: Tensor, end: int) -> Tensor:
    """The integers of `values` in [0, end), in a new tensor."""
    import torch

    if values.is_cpu:  # numpy takes a fourth of the time
        array = values.numpy()
        unsigned = array.view(f"u{array.itemsize}")
        return torch.from_numpy(array.compress(unsigned < end))
    return values[(values >= 0) & (values < end)]


def _bucket(counts: Tensor, need: int) -> tuple[int, int, int]:
    """The bin that holds the `need`-th largest element, how many elements of it that needs, and how many it has."""
    from_top = counts.flip(0).cumsum(0)
    above = int((from_top < need).sum())
    share = int(counts[len(counts) - 1 - above])
    return len(counts) - 1 - above, need - (int(from_top[above]) - share), share


def powers(delta: Tensor, norm: Rescale) -> Tensor:
    """What a norm is made of: x^2 in float64 (l2), or |x| (l1, linf)."""
    return delta.double().square() if norm == "l2" else delta.abs()


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """The values where a mask of truth values is true, else 0, as a new tensor. A NaN or Inf stays one, or becomes one."""
    import numpy as np
    import torch

    if not values.is_cpu:
        return values * mask
    found = torch.empty_like(values)
    with np.errstate(invalid="ignore"):  # numpy multiplies by truth values in a third of the time
        np.multiply(values.numpy(), mask.numpy(), out=found.numpy())
    return found


def _leaves(values: Tensor) -> Tensor:
    """A row for each leaf, the last filled up with zeros."""
    import torch

    if len(values) % LEAF:
        values = torch.nn.functional.pad(values, (0, -len(values) % LEAF))
    return values.view(-1, LEAF)


def leaf_sums(values: Tensor) -> Tensor:
    """The sum of each leaf of values >= 0, in float64, by halves, so that no processor's vector width changes a bit.

    The first three halvings are made in the values' dtype, which costs half the time: eight float32 values of one sign lose less
    than 2e-7 of their sum, and their errors do not add up.
    """
    import torch

    rows = _leaves(values)
    while rows.shape[1] > LEAF >> 3:
        left, right = rows.tensor_split(2, dim=1)
        rows = left + right
    rows = rows.double()
    if rows.is_cpu:  # calling torch for so few numbers costs more than they do
        array = rows.numpy()
        while (width := array.shape[1] // 2) > 0:
            array = array[:, :width] + array[:, width:]
        return torch.from_numpy(array[:, 0])
    while rows.shape[1] > 1:
        left, right = rows.tensor_split(2, dim=1)
        rows = left + right
    return rows[:, 0]


def norm_parts(values: Tensor, norm: Rescale) -> Tensor:
    """What is put together of `powers` of a stretch of whole leaves, or of rows, to make a norm: sums, or the largest."""
    if norm != "linf":
        return leaf_sums(values)
    return values.amax().double().reshape(1) if values.numel() else values.new_zeros(1).double()


class _Scratch(threading.local):
    """What a thread works in, leaf by leaf: the sizes before and after a mask, and their sums by halves."""

    def __init__(self) -> None:
        import numpy as np

        self.sizes, self.sums = np.empty((2, LEAF), np.float32), np.empty((2, LEAF // 2), np.float32)


@cache
def _scratch() -> _Scratch:
    return _Scratch()


def norms_around(delta: Tensor, mask: Tensor, norm: Rescale) -> tuple[Tensor, Tensor]:
    """`norm_parts` of a flat delta, and of what a mask keeps of it."""
    import numpy as np
    import torch

    if norm != "l1" or not delta.is_cpu or delta.dtype != torch.float32:
        whole = powers(delta, norm)
        return norm_parts(whole, norm), norm_parts(masked(whole, mask), norm)
    # The same leaf by leaf in memory that stays in the nearest caches, which takes half the time.
    sizes, sums = _scratch().sizes, _scratch().sums
    values, kept = delta.numpy(), mask.numpy()
    found = np.empty((-(-len(values) // LEAF), 2, LEAF // 8))
    with np.errstate(invalid="ignore"):
        for leaf, start in enumerate(range(0, len(values), LEAF)):
            stop = min(start + LEAF, len(values))
            sizes[:, stop - start :] = 0
            np.abs(values[start:stop], out=sizes[0, : stop - start])
            np.multiply(sizes[0, : stop - start], kept[start:stop], out=sizes[1, : stop - start])
            np.add(sizes[:, : LEAF // 2], sizes[:, LEAF // 2 :], out=sums)
            np.add(sums[:, : LEAF // 4], sums[:, LEAF // 4 :], out=sizes[:, : LEAF // 4])
            np.add(sizes[:, : LEAF // 8], sizes[:, LEAF // 8 : LEAF // 4], out=found[leaf])
    while (width := found.shape[2] // 2) > 0:
        found = found[:, :, :width] + found[:, :, width:]
    before, after = (torch.from_numpy(found[:, side, 0].copy()) for side in range(2))
    return before, after


def norm_of(parts: Sequence[float], norm: Rescale) -> float:
    """The norm of a tensor from the parts of all its stretches."""
    if norm == "linf":
        return math.nan if any(map(math.isnan, parts)) else max(parts, default=0.0)
    total = math.fsum(parts)
    return math.sqrt(total) if norm == "l2" else total


def factor_of(before: float, after: float) -> float:
    """before / after; 1 where there is nothing to make up for, or a NaN or Inf among the elements."""
    if before < _NO_NORM or after < _NO_NORM:
        return 1.0
    factor = before / after
    return factor if math.isfinite(factor) else 1.0

"""`pcb`: a mean of deltas whose weights balance what matters within each against what agrees across them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Any, ClassVar

from mergeflow.ops.base import Block, DeltaOp, Reduction, number, numbers
from mergeflow.ops.deltas import leaf_sums, scaled, trimmed, trimming, trimming_bytes
from mergeflow.settings import Fraction, Number, PerInput, Setting, setting

if TYPE_CHECKING:
    from torch import Tensor

Pair = tuple[int, int]
"""Two inputs, or one twice: whose product it is, the lower first."""


class Pcb(DeltaOp):
    """Weight each entry by its share in its own delta and its agreement with the others, and drop the least (PCB-Merging).

    b_i = softmax(K norm(tau_i tau_i)) sum_j softmax(norm(tau_i tau_j)) element by element, for K inputs, norm taking a tensor's
    least and greatest value to 0 and 1 (all to 0 where they are equal), and softmax going over its entries. Of each b_i the
    k = max(1, int(ratio n)) largest entries stay, the lowest index first among equals, and others become 0; the delta is
    s sum_i b_i w_i tau_i / sum_i b_i, 0 where nothing stayed. Models and deltas of one shape, in any float dtype; weights in float64.

    Per tensor, where the paper takes the whole model as one vector. The authors' code differs from their formulas: it has
    exp(K norm(|tau_i|)^2) tanh(tau_i sum_j tau_j), cuts off the ends of |tau_i|, and takes the threshold off what stays.
    """

    name = "pcb"
    formula = "theta_0 + s sum_i b_i w_i tau_i / sum_i b_i"
    paper = "arXiv:2410.02396"
    temporaries = 32
    portable = False

    weight: PerInput[Number] = setting(1.0, "Multiplies this delta in the mean; has no part in the balance.")
    ratio: Setting[Fraction] = setting(
        0.1, "Part of each delta's entries to keep, those of the largest balanced weight."
    )
    scale: Setting[Number] = setting(1.0, "Multiplies the merged delta before it is added to the base.")

    def reduction(self, known: tuple[Any, ...]) -> Reduction | None:
        """The least and greatest products, what the softmaxes divide by, then the rounds that find the thresholds."""
        count = len(numbers(self.weight))
        if not known:
            return _Extremes(count)
        if len(known) == 1:
            return _Divisors(_Balance(count, known[0], {}))
        inner = trimming(known[2:], (number(self.ratio),) * count, "floor", "none")
        if inner is None:
            return None
        through = _ThroughSample if inner.sample else _Through
        return through(_Balance(count, known[0], known[1]), inner)

    def measure_bytes(self, inputs: int) -> int:
        """What finding the thresholds holds at most."""
        return trimming_bytes(inputs)

    def combine(self, deltas: Sequence[Tensor], block: Block) -> Tensor:
        """s sum_i b_i w_i tau_i / sum_i b_i"""
        import torch

        weights = numbers(self.weight)
        shares = _Balance(len(deltas), block.measured[0], block.measured[1]).weights(deltas)
        ratios = (number(self.ratio),) * len(deltas)
        shares = trimmed(shares, ratios, "none", replace(block, measured=block.measured[2:]))
        total, divisor = torch.zeros_like(shares[0]), torch.zeros_like(shares[0])
        for delta, share, weight in zip(deltas, shares, weights, strict=True):
            total.add_(share * scaled(delta.double(), weight, own=True))
            divisor.add_(share)
        # Where nothing stayed the sum is 0 already.
        total.div_(divisor.masked_fill_(divisor == 0, 1.0))
        return scaled(total, number(self.scale), own=True).to(deltas[0].dtype)


@dataclass(frozen=True, slots=True)
class _Balance:
    """The weights b_i, once the extremes of all products and the divisors of their softmaxes are known."""

    count: int
    extremes: dict[Pair, tuple[float, float]]
    divisors: dict[tuple[Pair, int], float]

    def raised(self, deltas: Sequence[Tensor], pair: Pair, power: int) -> Tensor:
        """exp(power (norm(tau_i tau_j) - 1)), in float64: a softmax before it is divided; below 1, so it cannot overflow."""
        low, high = self.extremes[pair]
        value = _product(deltas, pair)
        value = value.zero_() if low == high else value.sub_(low).div_(high - low)
        return value.sub_(1).mul_(power).exp_()

    def weights(self, deltas: Sequence[Tensor]) -> list[Tensor]:
        """b_i of a block."""
        import torch

        found = [torch.zeros_like(delta, dtype=torch.float64) for delta in deltas]
        for pair in _pairs(self.count):
            share = self.raised(deltas, pair, 1).div_(self.divisors[pair, 1])
            for index in set(pair):
                found[index].add_(share)
        for index, own in enumerate(found):
            pair = (index, index)
            own.mul_(self.raised(deltas, pair, self.count).div_(self.divisors[pair, self.count]))
        return found


def _pairs(count: int) -> list[Pair]:
    return list(combinations_with_replacement(range(count), 2))


def _product(deltas: Sequence[Tensor], pair: Pair) -> Tensor:
    """tau_i tau_j, a new tensor in float64."""
    return deltas[pair[0]].double() * deltas[pair[1]].double()


@dataclass(frozen=True, slots=True)
class _Extremes(Reduction):
    """The least and greatest value of each product: (pairs, 2)."""

    count: int

    def block(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        import torch

        found = torch.tensor([[math.inf, -math.inf]] * len(_pairs(self.count)), dtype=torch.float64)
        if inputs[0].numel():
            for row, pair in zip(found, _pairs(self.count), strict=True):
                low, high = _product(inputs[1:], pair).aminmax()
                row[0], row[1] = low, high
        return found

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        import torch

        together = torch.stack(list(parts))
        return torch.stack([together[:, :, 0].amin(0), together[:, :, 1].amax(0)], dim=1)

    def finish(self, total: Tensor) -> dict[Pair, tuple[float, float]]:
        found: dict[Pair, tuple[float, float]] = {}
        for pair, (low, high) in zip(_pairs(self.count), total.tolist(), strict=True):
            found[pair] = low, high
        return found


@dataclass(frozen=True, slots=True)
class _Divisors(Reduction):
    """What each softmax divides by: (leaves, softmaxes), summed exactly at the end."""

    balance: _Balance

    @property
    def _softmaxes(self) -> list[tuple[Pair, int]]:
        count = self.balance.count
        within = [((index, index), count) for index in range(count)]
        return list(dict.fromkeys([*((pair, 1) for pair in _pairs(count)), *within]))

    def block(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        import torch

        deltas = inputs[1:]
        return torch.stack(
            [leaf_sums(_padded(self.balance.raised(deltas, pair, power))) for pair, power in self._softmaxes], dim=1
        )

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        import torch

        return torch.cat(list(parts))

    def finish(self, total: Tensor) -> dict[tuple[Pair, int], float]:
        return {softmax: math.fsum(column) for softmax, column in zip(self._softmaxes, total.T.tolist(), strict=True)}


def _padded(values: Tensor) -> Tensor:
    """The values themselves; one 0 where there are none, which has a leaf to sum."""
    return values if values.numel() else values.new_zeros(1)


@dataclass(frozen=True, slots=True)
class _Through(Reduction):
    """A round over the weights b_i in place of the deltas."""

    balance: _Balance
    inner: Reduction

    def block(self, inputs: Sequence[Tensor], block: Block) -> Any:
        return self.inner.block([inputs[0], *self.balance.weights(inputs[1:])], block)

    def merge(self, parts: Sequence[Any]) -> Any:
        return self.inner.merge(parts)

    def finish(self, total: Any) -> Any:
        return self.inner.finish(total)


class _ThroughSample(_Through):
    """The same over a sample."""

    sample: ClassVar[bool] = True

"""`sce`: select what differs most between models, weigh each by its change, erase what points the other way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from mergeflow.ops.base import LEAF, Block, DeltaOp, Reduction, number
from mergeflow.ops.deltas import Largest, Selection, agreeing, largest, scaled, selecting, trimming_bytes
from mergeflow.ops.gram import exact_sum
from mergeflow.settings import Setting, Unit, setting

if TYPE_CHECKING:
    from torch import Tensor

SelectScope = Literal["deltas", "weights_only"]

_CHUNK = 65_536
"""Elements whose variance is computed together: few enough to stay in the processor's caches."""


class Sce(DeltaOp):
    """Select, calculate, erase: average what models learnt, by how much each learnt where they differ most.

    theta_0 + sum_i w_i m_i s tau_i / sum_i w_i m_i with tau_i = theta_i - theta_0. s is 1 for the int(`select_topk` n)
    entries with the largest variance over the inputs of each tensor, of the n whose variance is not 0, the lowest index
    first among equals, else 0; at `select_topk` 1 it is 1 everywhere. w_i = sum s tau_i^2 / sum_j sum s tau_j^2, equal
    weights where nothing was learnt. m_i is 1 where s tau_i has the sign of sum_j s tau_j, 0 counting as +, so a zero
    never votes; where the divisor is 0 the delta is 0. With `select_scope: weights_only` s is used for w_i alone.
    Models and deltas of one shape, in any float dtype; computed in float32 (float64 if any input is).

    One input varies nowhere, so with `select_topk` below 1 nothing of it is selected. mergekit gives all inputs one
    weight where the mean squares sum to less than 1e-6, which those of most fine-tunes do: here they never do.
    """

    name = "sce"
    formula = "theta_0 + sum_i w_i m_i s tau_i / sum_i w_i m_i, w_i = sum s tau_i^2 / sum_j sum s tau_j^2"
    paper = "arXiv:2408.07990"
    portable = False
    shows_non_finite = False

    select_topk: Setting[Unit] = setting(1.0, "Share of the entries whose variance is not 0 to select.")
    select_scope: SelectScope = Field(
        default="deltas", description="Merge what is selected only, or use it for the weights only."
    )

    @property
    def _selection(self) -> Selection:
        topk = number(self.select_topk)
        return Selection((Largest(topk, not_zero=True) if topk < 1 else None,), _scores)

    def reduction(self, known: tuple[Any, ...]) -> Reduction | None:
        """The rounds that find the threshold of the variance, none at `select_topk` 1; then the sums of squares."""
        if known and isinstance(known[-1], _Weights):
            return None
        return selecting(known, self._selection) or _Squares(self._selection)

    def measure_bytes(self, inputs: int) -> int:
        """What finding the threshold holds at most."""
        return trimming_bytes(1) if number(self.select_topk) < 1 else 0

    def combine(self, deltas: Sequence[Tensor], block: Block) -> Tensor:
        """sum_i w_i m_i s tau_i / sum_i w_i m_i"""
        weights = block.measured[-1].values
        chosen = deltas if self.select_scope == "weights_only" else _selected(deltas, block.measured[:-1], block)
        products = [scaled(one, weight, own=False) for one, weight in zip(chosen, weights, strict=True)]
        return agreeing(products, weights, vote="mass", normalize=True, voters=chosen)


@dataclass(frozen=True, slots=True)
class _Weights:
    """The weight of each input."""

    values: tuple[float, ...]


def _scores(inputs: Sequence[Tensor], block: Block) -> tuple[Tensor]:
    """What is selected by."""
    return (_variance(inputs[1:]),)


def _variance(deltas: Sequence[Tensor]) -> Tensor:
    """K^2 times the variance over the K deltas of each entry, from what they differ from the first in.

    So it is exactly 0 where all are equal, and entries of equal variance stay equal where these differences are short numbers.
    """
    import torch

    first, *others = deltas
    found = torch.zeros_like(first)
    for start in range(0, len(first) if others else 0, _CHUNK):
        part = slice(start, start + _CHUNK)
        total: Tensor | None = None
        squares = found[part]
        for other in others:
            difference = other[part] - first[part]
            squares.add_(difference.square())
            total = difference if total is None else total.add_(difference)
        assert total is not None
        squares.mul_(len(others) + 1).sub_(total.square_()).clamp_(min=0)
    return found


def _selected(deltas: Sequence[Tensor], known: tuple[Any, ...], block: Block) -> Sequence[Tensor]:
    """The deltas with 0 for what is not selected."""
    import torch

    if not known:
        return deltas
    kept = largest(_variance(deltas), known[-1][0], block)
    selected = torch.ne(kept, 0, out=kept)
    return [delta * selected for delta in deltas]


@dataclass(frozen=True, slots=True)
class _Squares(Reduction):
    """The sum of squares of what is selected of each delta, (leaves, deltas) in float64, and the weights they make."""

    selection: Selection

    def block(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        import torch

        rows = []
        for delta in _selected(inputs[1:], block.measured, block):
            # A copy always: what `dot` gives depends on how its memory is aligned, and a copy is aligned in one way.
            wide = [part.to(torch.float64, copy=True) for part in torch.split(delta, LEAF)]
            rows.append(torch.stack([torch.dot(part, part) for part in wide]))
        return torch.stack(rows, dim=1)

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        import torch

        return torch.cat(list(parts))

    def finish(self, total: Tensor) -> _Weights:
        squares = [exact_sum(column) for column in total.T.tolist()]
        whole = math.fsum(squares)
        return _Weights(tuple(square / whole if whole else 1 / len(squares) for square in squares))

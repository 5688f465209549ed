"""`ram` and `ramplus`: what one model alone changed counts in full, what several changed is averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeflow.ops.base import Block, DeltaOp, Reduction, number
from mergeflow.settings import NonNegative, Setting, setting

if TYPE_CHECKING:
    from torch import Tensor


class Ram(DeltaOp):
    """Add what one model alone changed in full, and the mean of what several changed.

    theta_0 + sum_i m_i tau_i / max(1, sum_i m_i), element by element, with tau_i = theta_i - theta_0 and m_i = 1 where
    |tau_i| > `epsilon`, else 0: smaller changes are dropped. Models and deltas of one shape, in any float dtype;
    computed in float32 (float64 if any input is).
    """

    name = "ram"
    formula = "theta_0 + sum_i m_i tau_i / max(1, sum_i m_i), m_i = [|tau_i| > epsilon]"
    paper = "arXiv:2601.13572"

    epsilon: Setting[NonNegative] = setting(1e-5, "Entries that moved no farther than this count as unchanged.")

    def combine(self, deltas: Sequence[Tensor], block: Block) -> Tensor:
        """sum_i m_i tau_i / max(1, sum_i m_i)"""
        changed = _changed(deltas, number(self.epsilon))
        total, count = _sum_and_count(changed)
        return total.div_(count.clamp_(min=1))


class RamPlus(Ram):
    """RAM, with what a model alone changed amplified the more, the more of its changes others share.

    As `ram`, except that an entry that input i alone changed is m_i tau_i (1 + `r` clamp(rho_i, 0, `alpha`)), where
    rho_i = (entries that i and others changed) / (entries that i alone changed), counted in each tensor. Models and
    deltas of one shape, in any float dtype; computed in float32 (float64 if any input is).

    The paper counts over the whole model. mergekit has this form as `ramplus_tl`.
    """

    name = "ramplus"
    formula = "ram, with entries of one m_i alone times 1 + r clamp(shared_i / unique_i, 0, alpha)"

    r: Setting[NonNegative] = setting(0.1, "How much of the ratio is added.")
    alpha: Setting[NonNegative] = setting(0.2, "The greatest ratio that counts.")

    def reduction(self, known: tuple[Any, ...]) -> Reduction | None:
        """One round: how many entries each input changed alone, and with others."""
        return None if known else _Shared(number(self.epsilon))

    def combine(self, deltas: Sequence[Tensor], block: Block) -> Tensor:
        """sum_i m_i tau_i / sum_i m_i where sum_i m_i > 1, else the one m_i tau_i amplified"""
        changed = _changed(deltas, number(self.epsilon))
        total, count = _sum_and_count(changed)
        alone = _alone(count)
        total.div_(count.clamp_(min=1))
        for one, (unique, shared) in zip(changed, block.measured[0], strict=True):
            more = number(self.r) * min(shared / unique, number(self.alpha)) if unique else 0.0
            if more:
                total.add_(one.mul_(alone).mul_(more))
        return total


def _changed(deltas: Sequence[Tensor], epsilon: float) -> list[Tensor]:
    """New tensors: the deltas without entries that count as unchanged."""
    import torch

    return [torch.hardshrink(delta, epsilon) for delta in deltas]


def _sum_and_count(changed: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The sum of the changes of each entry and how many they are, as new tensors."""
    import torch

    total = changed[0].clone()
    count = torch.ne(changed[0], 0, out=torch.empty_like(total))
    mine = torch.empty_like(total)
    for one in changed[1:]:
        total.add_(one)
        count.add_(torch.ne(one, 0, out=mine))
    return total, count


def _alone(count: Tensor) -> Tensor:
    """1 where one input alone changed an entry, else 0."""
    import torch

    return torch.eq(count, 1, out=torch.empty_like(count))


@dataclass(frozen=True, slots=True)
class _Shared(Reduction):
    """How many entries each input changed alone, and how many together with others: (inputs, 2)."""

    epsilon: float

    def block(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        import torch

        changed = _changed(inputs[1:], self.epsilon)
        alone = _alone(_sum_and_count(changed)[1])
        rows = []
        for one in changed:
            all_of_it = one.count_nonzero()
            unique = one.mul_(alone).count_nonzero()
            rows.append(torch.stack([unique, all_of_it - unique]))
        return torch.stack(rows)

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        total, *others = parts
        for part in others:
            total.add_(part)
        return total

    def finish(self, total: Tensor) -> tuple[tuple[int, int], ...]:
        return tuple((int(unique), int(shared)) for unique, shared in total.tolist())

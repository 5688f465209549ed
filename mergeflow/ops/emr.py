"""`emr` and `emr_apply`: one delta for all tasks, and for each task a mask and a number that make it the task's own.

`emr` is never computed as such: planning gives each of its parts a row of its own, made by the small ops at the end of this
module, and `emr_apply` goes from the inputs to one task's model without the parts between being written. Parts are made row
by row and not together: rows over one tensor follow each other, so what they read again comes from memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from pydantic import Field

from mergeflow.errors import RecipeError
from mergeflow.ops.base import Block, DeltaOp, Op, Reduction, Space, weighted_sum
from mergeflow.ops.deltas import leaf_sums, masked

if TYPE_CHECKING:
    from torch import Tensor

EmrRescale = Literal["per_tensor_mean", "global", "per_tensor"]


class Emr(DeltaOp):
    """Elect one delta for all tasks, and keep a mask and a scaler that give each task's model back.

    unified = sigma max_i abs(tau_i) over the inputs i whose entry has the elected sign sigma, that of sum_i tau_i (0 counts
    as -, as in the authors' code); mask_i = 1 where tau_i unified > 0; scaler_i is the size of tau_i over that of
    mask_i unified: with `per_tensor_mean` both are means of absolute values within each tensor, summed over the model (the
    authors' code), with `global` sums over the model (the paper), with `per_tensor` each tensor has a scaler of its own. A
    size of 0 gives the scaler 1. Models and deltas of one shape; computed in float32 (float64 if any input is), sums exactly.

    The result is an artifact and no model: `unified.<tensor>`, `mask.<task>.<tensor>` (eight entries to a byte, the first in
    the lowest bit), `scaler.<task>` (with `per_tensor`: `scaler.<task>.<tensor>`), a task being an input's model name.
    `emr_apply` makes a task's model of it.
    """

    name = "emr"
    formula = "scaler_i mask_i unified, unified = sigma max_i abs(tau_i)"
    paper = "arXiv:2405.17461"
    has_parts = True
    shows_non_finite = False

    rescale: EmrRescale = Field(default="per_tensor_mean", description="What a task's scaler makes up for.")

    def space(self, base: Space | None, inputs: Sequence[Space]) -> Space:
        """Weights or deltas give an artifact."""
        super().space(base, inputs)
        return "artifact"

    @property
    def over_model(self) -> bool:
        """But for `per_tensor`."""
        return self.rescale != "per_tensor"

    def reduction(self, known: tuple[Any, ...]) -> Reduction | None:
        """One round: the sizes."""
        return None if known else _Sizes(by_tensor=self.rescale != "global")

    def combine(self, deltas: Sequence[Tensor], block: Block) -> NoReturn:
        """Never asked for: planning makes the parts."""
        raise TypeError("emr gives parts, each made by an op of its own")


class EmrApply(Op):
    """Make one task's model of what `emr` kept.

    theta_0 + scaler_t mask_t unified, element by element, for a task t of an `emr` node or of its artifact
    (`artifacts: {merged: ./merged}`). Integer tensors are the base's; from a node, the inputs' must be equal to it. Computed in
    float32 (float64 if any input is).

    From a node nothing is written in between; an artifact in bfloat16 or float16 has its unified delta rounded.
    """

    name = "emr_apply"
    formula = "theta_0 + scaler_t mask_t unified"
    paper = "arXiv:2405.17461"
    takes = "emr"
    most = 1
    needs_base = True
    shows_non_finite = False

    task: str = Field(min_length=1, description="The model name of the input whose model is made.")

    def space(self, base: Space | None, inputs: Sequence[Space]) -> Space:
        """A base and an artifact give a weight."""
        if base != "weight" or tuple(inputs) != ("artifact",):
            raise RecipeError(
                f"{self.name} adds an artifact of `emr` to a base, and got {base or 'no base'} and {inputs[0]}",
                fix="Name an `emr` node, or an entry of `artifacts:` that such a node made.",
            )
        return "weight"

    def compute(self, inputs: Sequence[Tensor], block: Block) -> NoReturn:
        """Never asked for: planning puts an op on the parts in its place."""
        raise TypeError("emr_apply is planned as an op on parts")


def _unified(deltas: Sequence[Tensor]) -> Tensor:
    """sigma max_i |tau_i| over the entries that agree with sigma."""
    import torch

    total = weighted_sum(deltas, [1.0] * len(deltas))
    elected = torch.gt(total, 0, out=torch.empty_like(total)).mul_(2).sub_(1)
    largest: Tensor | None = None
    for delta in deltas:
        agreed = (delta * elected).relu_()
        largest = agreed if largest is None else torch.maximum(largest, agreed, out=largest)
    assert largest is not None
    return largest.mul_(elected)


def _masked(delta: Tensor, unified: Tensor) -> Tensor:
    """mask_i unified: a new tensor."""
    return masked(unified, delta * unified.sign() > 0)


@dataclass(frozen=True, slots=True)
class _Sizes(Reduction):
    """The sums of |tau_i| and of mask_i |unified|, leaf by leaf: (leaves, 2 K); `by_tensor` divides by the tensor's size."""

    by_tensor: bool

    def block(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        import torch

        _, *deltas = inputs
        unified = _unified(deltas)
        parts = [*deltas, *(_masked(delta, unified) for delta in deltas)]
        sums = torch.stack([leaf_sums(part.abs().double()) for part in parts], dim=1)
        return sums / max(math.prod(block.shape), 1) if self.by_tensor else sums

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        import torch

        return torch.cat(list(parts))

    def finish(self, total: Tensor) -> tuple[float, ...]:
        """The scaler of each task."""
        sizes = [math.fsum(column) for column in total.T.tolist()]
        tasks = len(sizes) // 2
        scalers = (own / kept if kept else 1.0 for own, kept in zip(sizes[:tasks], sizes[tasks:], strict=True))
        return tuple(one if math.isfinite(one) else 1.0 for one in scalers)


class _Part(Op):
    """What planning makes rows of; no recipe can name it. Inputs are the base and the deltas, as the measure has them."""

    name = "emr"
    formula = Emr.formula
    paper = Emr.paper


class EmrUnified(_Part):
    """The unified delta."""

    def compute(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        """sigma max_i |tau_i|"""
        return _unified(inputs[1:])


class EmrMask(_Part):
    """Where a task's delta has the elected sign."""

    task: int = Field(description="The index of the task's input.")

    def compute(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        """tau_t unified > 0"""
        return inputs[1 + self.task] * _unified(inputs[1:]).sign() > 0


class EmrScaler(_Part):
    """A task's scaler, as a tensor without axes; it has no inputs but what was measured."""

    task: int = Field(description="The index of the task's input.")

    def compute(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        """scaler_t"""
        import torch

        return torch.tensor(block.measured[0][self.task], dtype=torch.float32)


class EmrTask(_Part):
    """A task's model, from a base to add to, then the base and the deltas."""

    task: int = Field(description="The index of the task's input.")

    def compute(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        """theta_0 + scaler_t mask_t unified"""
        base, _, *deltas = inputs
        own = _masked(deltas[self.task], _unified(deltas))
        # As a file would hold it, so that a model is the same from a node and from its artifact.
        scaler = EmrScaler(task=self.task).compute((), block).to(own)
        return own.mul_(scaler).add_(base)


class EmrStored(_Part):
    """A task's model, from a base, the unified delta, the mask as 0 and 1, and the scaler at every element."""

    def compute(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        """theta_0 + scaler_t mask_t unified"""
        base, unified, mask, scaler = inputs
        return masked(unified, mask != 0).mul_(scaler).add_(base)

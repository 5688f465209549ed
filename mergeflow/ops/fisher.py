"""`fisher`: the mean of models in which each weight counts by how much its model's predictions depend on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mergeflow.errors import RecipeError
from mergeflow.ops.base import Block, Op, Reduction, numbers
from mergeflow.ops.deltas import leaf_sums, refuse_zero_sum
from mergeflow.settings import NonNegative, PerInput, Positive, setting

if TYPE_CHECKING:
    from torch import Tensor


class Floor(BaseModel):
    """The least that a Fisher entry counts: `{abs: 1e-6}`, or `{rel: 1e-3}` of that model's mean entry."""

    model_config = ConfigDict(frozen=True, extra="forbid", json_schema_extra={"minProperties": 1, "maxProperties": 1})

    abs: NonNegative | None = Field(default=None, description="This number.")
    rel: NonNegative | None = Field(default=None, description="This number times the mean entry of the model.")

    @model_validator(mode="after")
    def _one(self) -> Floor:
        if (self.abs is None) == (self.rel is None):
            raise ValueError("a floor is {abs: ...} or {rel: ...}")
        return self


class Fisher(Op):
    """Average models with each entry weighted by its diagonal Fisher information (Fisher merging).

    sum_i c_i F_i theta_i / sum_i c_i F_i, element by element, where F_i is the diagonal of model i's Fisher information, of the
    weights' shapes: `fisher:` of an input names a folder or node of such statistics. F_i counts as max(F_i, floor), and `favor`
    keeps the floor to one input, so that what no other model needs is its. `normalize` then divides F_i by its norm or its sum
    over the model. With `prior: d` a base is corrected instead, theta_0 + sum_i c_i (d + F_i) (theta_i - theta_0) / (d + sum_i c_i
    F_i), which needs no floor. Computed in float32 (float64 if any input is). Where all F_i are 0 it is the mean with the weights
    c_i; tensors for which some input has no Fisher take `others`, by default that mean.
    """

    name = "fisher"
    formula = "sum_i c_i F_i theta_i / sum_i c_i F_i"
    paper = "arXiv:2111.09832"
    may_base = True
    portable = False
    input_keys: ClassVar[tuple[str, ...]] = ("fisher",)

    weight: PerInput[NonNegative] = setting(1.0, "Multiplies this input's Fisher information.")
    normalize: Literal["none", "model_l2", "trace"] = Field(
        default="none", description="Divide each Fisher diagonal by its norm, or its sum, over the model."
    )
    floor: Floor | None = Field(
        default=None,
        description="The least a Fisher entry counts: {rel: 1e-3} of its mean, or as without it {abs: 1e-6}.",
    )
    favor: str | None = Field(
        default=None, description="The model name of the only input whose Fisher information has the floor."
    )
    prior: Positive | None = Field(
        default=None, description="What is added to the Fisher information of each, to correct a base; without a floor."
    )

    def check(self) -> None:
        """Raises RecipeError where all weights are 0."""
        refuse_zero_sum(numbers(self.weight))

    def compute(self, inputs: Sequence[Tensor], block: Block) -> NoReturn:
        """Never asked for: planning puts `FisherMean` in its place."""
        raise TypeError("fisher needs Fisher information for each input: use it in a recipe")

    def mean(self, weights: Sequence[float], floored: Sequence[bool]) -> FisherMean:
        """The op at a tensor, of a resolved one."""
        return FisherMean(
            weights=tuple(weights),
            floored=tuple(floored),
            normalize=self.normalize,
            floor=self.floor or Floor(abs=1e-6),
            prior=self.prior,
        )


class FisherMean(Op):
    """What planning puts at one tensor; no recipe can name it. Inputs are theta_1, F_1 .. theta_K, F_K, with a prior after theta_0."""

    name = "fisher"
    formula = Fisher.formula
    paper = Fisher.paper
    portable = False

    weights: tuple[float, ...]
    floored: tuple[bool, ...]
    normalize: Literal["none", "model_l2", "trace"] = "none"
    floor: Floor = Floor(abs=1e-6)
    prior: float | None = None

    @property
    def over_model(self) -> bool:
        """Norms, sums and means are those of the whole model."""
        return self.normalize != "none" or (self.floor.rel is not None and self.prior is None)

    def reduction(self, known: tuple[Any, ...]) -> Reduction | None:
        """One round where sums are wanted: those of F and of its squares."""
        return _Totals() if self.over_model and not known else None

    def compute(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        """sum_i c_i F_i theta_i / sum_i c_i F_i"""
        import torch

        base, given = (inputs[0], inputs[1:]) if self.prior is not None else (None, inputs)
        sums = block.measured[0] if self.over_model else ()
        total: Tensor | None = None
        divisor: Tensor | None = None
        for index, weight in enumerate(self.weights):
            theta, fisher = given[2 * index : 2 * index + 2]
            floor, size = self._sizes(sums[index] if sums else (1.0, 1.0, 1.0), floored=self.floored[index])
            share = fisher.clamp(min=floor).mul_(weight / size if size else 0.0)
            own = share if base is None else share + (self.prior or 0) * weight
            if base is not None:
                theta = theta - base
            product = own * theta
            total = product if total is None else total.add_(product)
            divisor = share if divisor is None else divisor.add_(share)
        assert total is not None and divisor is not None
        if base is not None:
            return total.div_(divisor.add_(self.prior or 0)).add_(base)
        even = divisor <= 0
        merged = total.div_(divisor.masked_fill_(even, 1.0))
        if bool(even.any()):
            mean = sum((given[2 * i] * w for i, w in enumerate(self.weights)), torch.zeros_like(merged))
            merged = torch.where(even, mean.div_(math.fsum(self.weights)), merged)
        return merged

    def _sizes(self, sums: tuple[float, float, float], *, floored: bool) -> tuple[float, float]:
        """The floor of a Fisher diagonal, and what it is divided by."""
        total, squares, count = sums
        floor = 0.0
        if floored and self.prior is None:
            floor = self.floor.abs if self.floor.abs is not None else (self.floor.rel or 0.0) * total / max(count, 1.0)
        return floor, {"none": 1.0, "model_l2": math.sqrt(squares), "trace": total}[self.normalize]


@dataclass(frozen=True, slots=True)
class _Totals(Reduction):
    """The sum of each F, and of its squares, leaf by leaf, and how many entries there are: (leaves, 2 K + 1)."""

    def block(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        import torch

        fishers = inputs[1 + len(inputs) % 2 :: 2]
        count = torch.ones_like(fishers[0])
        parts = [part for one in fishers for part in (one, one.double().square())]
        return torch.stack([leaf_sums(part.double()) for part in (*parts, count)], dim=1)

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        import torch

        return torch.cat(list(parts))

    def finish(self, total: Tensor) -> tuple[tuple[float, float, float], ...]:
        """Sum, sum of squares and number of entries of each F."""
        *sums, count = [math.fsum(column) for column in total.T.tolist()]
        return tuple((sums[at], sums[at + 1], count) for at in range(0, len(sums), 2))


def refuse_prior_without_base(op: Fisher, *, based: bool) -> None:
    """Raises RecipeError where a prior has no base to correct, or a base no prior."""
    if (op.prior is not None) != based:
        raise RecipeError(
            "`prior` corrects a base, and the node has none" if op.prior is not None else "`base` says nothing here",
            fix="Add `base:` to the node." if op.prior is not None else "Leave it out, or write `prior:`.",
        )

"""`Unchanged`: what planning puts in the place of an op for integer and boolean tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from mergeflow.errors import RecipeError
from mergeflow.ops.base import Block, Op

if TYPE_CHECKING:
    from torch import Tensor


def differing() -> RecipeError:
    """What is said of integer or boolean tensors that are not equal."""
    return RecipeError(
        "integer and boolean tensors are never computed on, and the inputs differ here",
        fix="Choose one by a `select` rule for this tensor, or leave it to one model by `only:` and `others:`.",
    )


class Unchanged(Op):
    """An integer or boolean tensor that all inputs agree on; no recipe can name it.

    Inputs are given as stored. Weights must all be equal, deltas all zero; the result is the first weight, zeros of
    its shape where a delta is asked for, or the first delta where all are.
    """

    name = "unchanged"
    formula = "theta_1 = ... = theta_K"
    exact = True

    deltas: tuple[bool, ...] = Field(description="Which inputs are deltas.")
    gives_delta: bool = Field(default=False, description="Whether the result is a delta.")

    def compute(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        """The tensor that the inputs agree on. Raises RecipeError where they do not."""
        weights = [tensor for tensor, delta in zip(inputs, self.deltas, strict=True) if not delta]
        deltas = [tensor for tensor, delta in zip(inputs, self.deltas, strict=True) if delta]
        if not all(weights[0].equal(other) for other in weights[1:]) or any(bool(delta.any()) for delta in deltas):
            raise differing()
        if not weights:
            return deltas[0]
        return weights[0].new_zeros(weights[0].shape) if self.gives_delta else weights[0]

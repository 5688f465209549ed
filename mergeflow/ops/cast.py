"""`cast`: rounding to a dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergeflow.dtypes import BY_NAME, torch_dtype
from mergeflow.ops.base import Block, Op
from mergeflow.settings import FloatName, Setting, setting

if TYPE_CHECKING:
    from torch import Tensor


class Cast(Op):
    """Round a model or a delta to a float dtype.

    Each element becomes the nearest value of the dtype, ties to even; inside a graph the rounded values go on in
    float32, and as the node of an output `cast` sets the dtype that is written. For one input of any float dtype.

    What is too large for the dtype becomes Inf or NaN, which a run reports: float8 dtypes, which would give their
    largest value without a word, are no exception here.
    """

    name = "cast"
    formula = "round(theta)"
    takes = "model"
    most = 1

    to: Setting[FloatName] = setting(..., "The dtype, by its name in torch.")

    def result_dtype(self) -> str | None:
        """The dtype the values are rounded to."""
        return str(self.to)

    def compute(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        """The rounded values, in the dtype of the input."""
        tensor, dtype = inputs[0], BY_NAME[str(self.to)]
        rounded = tensor.to(torch_dtype(dtype)).to(tensor.dtype)
        if dtype.size == 1 and dtype.largest is not None:
            rounded = rounded.masked_fill_(tensor.abs() > dtype.largest, float("inf"))
        return rounded

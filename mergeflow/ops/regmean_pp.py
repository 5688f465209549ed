"""`regmean_pp`: RegMean on the inputs that the merged model's own layers give. Parameters only: models run in `mergeflow.stages`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from mergeflow.errors import RecipeError
from mergeflow.ops.base import Space
from mergeflow.ops.deltas import refuse_zero_sum
from mergeflow.ops.regmean import RegMean, Solver
from mergeflow.ops.statistics import StageOp
from mergeflow.settings import NonNegative, PerInput, Setting, Unit


def _as_in_regmean(name: str) -> Any:
    """A field with the default and the words of RegMean's."""
    info = RegMean.model_fields[name]
    return Field(default=info.default, description=info.description, validate_default=False)


class RegMeanPP(StageOp):
    """Solve each linear weight as regmean does, on the inputs that the merged layers below it give (RegMean++).

    W = W_ref + [(sum_i c_i G~_i)^-1 sum_i c_i G~_i (W_i - W_ref)^T]^T with G~ = alpha G + (1 - alpha) diag(G), W_ref the weighted
    mean, and G_i the Gram matrix of what this layer reads when model i's block runs on model i's data behind the blocks that are
    merged already. Blocks are merged from the first to the last, so that all models, and `data:` of each, must be at hand at once,
    and fit the memory beside the merged model. What is not a linear weight, or left out by `only`, is the weighted mean.

    Models must have the same tensors and one stack of like blocks. Names, dtypes, config and tokenizer are the first model's. The
    result lies in the cache as a whole model, which other nodes use like any.

    Raises RecipeError for models that differ or have no such stack, MachineError where they do not fit, InputError for bad data,
    NumericError as regmean does.
    """

    name = "regmean_pp"
    formula = RegMean.formula
    paper = "arXiv:2508.03121"
    fewest = 2
    seeded = False

    weight: PerInput[NonNegative] = _as_in_regmean("weight")
    alpha: Setting[Unit] = _as_in_regmean("alpha")
    ridge: Setting[NonNegative] = _as_in_regmean("ridge")
    weigh_by: Literal["models", "tokens"] = _as_in_regmean("weigh_by")
    solver: Solver = _as_in_regmean("solver")
    solve_dtype: Literal["float64", "float32"] = _as_in_regmean("solve_dtype")

    def check(self) -> None:
        """Raises RecipeError where all weights are 0."""
        refuse_zero_sum(tuple(self.weight), "the mean divides", "Change a weight.")  # type: ignore[arg-type]

    def space(self, base: Space | None, inputs: Sequence[Space]) -> Space:
        """Whole models give a whole model."""
        wrong = [one for one in inputs if one != "weight"]
        if wrong:
            raise RecipeError(
                f"{self.name} runs its models, and one is {wrong[0]}",
                fix="Name entries of `models:`, or nodes that give whole models.",
            )
        return "weight"

    def solving(self) -> RegMean:
        """What solves one weight, of a resolved op."""
        shared = RegMean.model_fields.keys() & type(self).model_fields.keys()
        return RegMean.model_construct(**{name: getattr(self, name) for name in shared})

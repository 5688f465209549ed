"""Expressions as planning makes them: ops resolved once for equal values, and one object for what is the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mergeflow.checkpoint.sources import Zeros
from mergeflow.dtypes import BY_NAME
from mergeflow.errors import RecipeError
from mergeflow.graph import Apply, Expression, Load, Made, Measure, loads_of
from mergeflow.ops import Add, Linear, Op, TaskArithmetic, TaskVector
from mergeflow.settings import Each, Place

FLOAT32, FLOAT64 = BY_NAME["float32"], BY_NAME["float64"]


SUBTRACT = TaskVector()
MEAN: Op = Linear.model_construct(weight=1.0, normalize=True)
MEAN_DELTA: Op = TaskArithmetic.model_construct(weight=1.0, normalize=True, scale=1.0)
ONTO: Op = Add.model_construct(weight=Each((1.0,)))
"""Adds one delta to a base."""
BOTH: Op = Linear.model_construct(weight=Each((1.0, 1.0)), normalize=False)
"""The sum of two deltas."""


def is_zeros(expression: Expression) -> bool:
    """Whether an expression is a delta of zeros that reads nothing."""
    return isinstance(expression, Made) and isinstance(expression.source, Zeros)


def mean_like(op: Op, *, based: bool) -> Op:
    """What `others: mean` computes beside an op: the plain mean of its inputs, in the op's own space."""
    if isinstance(op, TaskVector):
        return op
    return MEAN_DELTA if based else MEAN


class Expressions:
    """Makes the expressions of one plan; what it keeps is keyed by identity, and lives as long as it does."""

    def __init__(self, *, any_wide: bool = True) -> None:
        self.any_wide = any_wide
        """Whether any tensor is float64 at all: without one no expression is looked at."""
        self.differences: dict[tuple[int, int], Apply] = {}
        self.nothing: dict[tuple[int, ...], Made] = {}
        self.wide: dict[int, bool] = {}
        self.ready: dict[Any, Op] = {}
        self.measures: dict[int, bool] = {}
        self.uniform: dict[int, bool] = {}
        self.agreed: dict[int, str] = {}
        """Of vocabulary tensors merged under `vocab: ignore`: the model whose words their rows are taken to mean."""

    def apply(self, op: Op, inputs: tuple[Expression, ...], keys: tuple[int, ...] = ()) -> Apply:
        """A resolved op on its inputs, with the measure that it needs."""
        measure = Measure(op, (inputs,), (keys,) if keys else ()) if self.measured(op) else None
        return Apply(op, inputs, measure, keys)

    def measured(self, op: Op) -> bool:
        """Whether a resolved op needs a measure."""
        measures = self.measures.get(id(op))
        if measures is None:
            measures = self.measures[id(op)] = op.measures
        return measures

    def zeros(self, shape: tuple[int, ...]) -> Made:
        """A delta of zeros, which reads nothing."""
        found = self.nothing.get(shape)
        if found is None:
            found = self.nothing[shape] = Made(Zeros(), (), FLOAT32, shape)
        return found

    def difference(self, model: Expression, base: Expression) -> Apply:
        """What a model learnt since a base."""
        key = (id(model), id(base))
        found = self.differences.get(key)
        if found is None:
            found = self.differences[key] = self.apply(SUBTRACT, (base, model))
        return found

    def is_wide(self, expression: Expression) -> bool:
        """Whether an expression reads float64 and so is computed in it."""
        if not self.any_wide:
            return False
        if not isinstance(expression, Apply):
            return any(load.tensor.dtype is FLOAT64 for load in loads_of(expression))
        found = self.wide.get(id(expression))
        if found is None:
            found = self.wide[id(expression)] = any(map(self.is_wide, expression.inputs))
        return found

    def speakers(self, expression: Expression) -> Iterator[str]:
        """The models whose words the rows of a vocabulary tensor mean, each once, in the order of the inputs."""
        seen: set[int | str] = set()
        todo = [expression]
        while todo:
            one = todo.pop()
            if id(one) in seen:
                continue
            seen.add(id(one))
            model = self.agreed.get(id(one))
            if model is None and not isinstance(one, Apply):
                model = next((load.model for load in loads_of(one)), None)
            if model is None:
                todo += reversed(one.inputs) if isinstance(one, Apply) else ()
            elif model not in seen:
                seen.add(model)
                yield model

    def resolved(self, op: Op, place: Place, kept: Sequence[int], count: int) -> Op:
        """The op with its settings' values at a place for the inputs (of `count`) that are kept; equal values share one op.

        Raises RecipeError where a setting has no value there, or values clash.
        """
        uniform = self.uniform.get(id(op))
        if uniform is None:
            uniform = self.uniform[id(op)] = op.uniform
        whole = len(kept) == count
        key: Any = (id(op), count)
        if not (whole and uniform):
            values = op.values_at(place, kept)
            if not whole:
                values = _renormalised(op, values, place, count)
            key = (id(op), len(kept), values)
        found = self.ready.get(key)
        if found is None:
            found = self.ready[key] = op.resolved(op.values_at(place, kept) if whole and uniform else values)
        return found


def _renormalised(op: Op, values: tuple[Any, ...], place: Place, count: int) -> tuple[Any, ...]:
    """Weights of the inputs that are left, scaled so that their sum stays, where the op does not divide by it anyway.

    Only weights of one sign: of others the sum says nothing about how much each counts, and scaling may turn a sign around.
    """
    names = list(op.settings())
    if "weight" not in names or ("normalize" in names and values[names.index("normalize")]):
        return values
    index = names.index("weight")
    given = op.values_at(place, range(count))[index]
    if min(given) < 0 < max(given):
        raise RecipeError(
            "weights of both signs cannot be scaled to make up for an input that is left out",
            fix="Write `base` in place of `omit`, where the op has a base, or change the weights.",
        )
    total, left = sum(given), sum(values[index])
    if abs(left) < 1e-8:
        raise RecipeError("the weights of the inputs that are left sum to 0", fix="Change the weights, or `missing:`.")
    return (*values[:index], tuple(weight * total / left for weight in values[index]), *values[index + 1 :])


def applications(expressions: Iterable[Expression]) -> Iterator[Apply]:
    """Each op on tensors that expressions hold, once."""
    seen: set[int] = set()
    todo = list(expressions)
    while todo:
        expression = todo.pop()
        if isinstance(expression, Apply) and id(expression) not in seen:
            seen.add(id(expression))
            yield expression
            todo += expression.inputs


def loads(*expressions: Expression) -> Iterator[Load]:
    """Each tensor that expressions read, once, in the order of the inputs."""
    seen: set[int] = set()
    todo: list[Expression] = list(reversed(expressions))
    while todo:
        expression = todo.pop()
        if id(expression) in seen:
            continue
        seen.add(id(expression))
        if isinstance(expression, Load):
            yield expression
            continue
        if isinstance(expression, Made):
            todo += reversed(expression.loads)
            continue
        todo += reversed(expression.inputs)
        if expression.measure is not None and len(expression.measure.over) > 1:
            todo += [one for inputs in reversed(expression.measure.over) for one in reversed(inputs)]

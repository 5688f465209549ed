"""What an op is: a frozen pydantic value whose fields are its parameters and whose one method is the mathematics.

The YAML form, the JSON Schema, the table of ops, validation and the plan all read the class, so nothing is written
twice. An op knows neither recipes nor files. Classes are declared without torch: `import torch` stands inside the
methods that compute.

Planning resolves an op at each tensor (`values_at`, `resolved`): the ops of a plan hold one number for each setting,
and the executor knows nothing of places. The mathematics gets flat blocks in the compute dtype (float32, or float64 if
any input is float64), may write into tensors that it made itself, and never into its inputs.

An op that needs a global number first answers `reduction` with a `Reduction` over blocks; rounds may build on each
other (a radix selection needs two). Sums are kept for each leaf of `LEAF` elements until the end, so that the cut into
blocks cannot change a bit of the result.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict

from mergeflow.dtypes import BY_NAME, torch_dtype
from mergeflow.errors import RecipeError
from mergeflow.settings import Each, Place, SettingOf, constant, value_at

if TYPE_CHECKING:
    from torch import Tensor

Space = Literal["weight", "delta", "statistics", "artifact"]

LEAF = 65_536
"""Elements in a leaf: reductions are summed leaf by leaf, in order, and a block is a whole number of leaves."""


@dataclass(frozen=True, slots=True)
class Block:
    """The part of a tensor that is computed at once: the flat index of its first element, and what was measured."""

    start: int = 0
    measured: tuple[Any, ...] = ()


class Reduction(ABC):
    """One round of a measure: a partial result for each block, merged in the order of the blocks, finished once."""

    sample: ClassVar[bool] = False
    """Whether the round is given `spread` values instead of all: it guides later rounds, and changes no result."""

    @abstractmethod
    def block(self, inputs: Sequence[Tensor]) -> Any:
        """The partial result of a block; `inputs` are flat, of equal length, whole leaves but for the last."""

    @abstractmethod
    def merge(self, parts: Sequence[Any]) -> Any:
        """Partial results of neighbouring blocks as one; associative to the last bit. May write into the first."""

    @abstractmethod
    def finish(self, total: Any) -> Any:
        """What the next round and `Op.compute` are given."""


SPREAD_RUNS, SPREAD_RUN = 64, 1024
"""How many runs of neighbouring elements a sample has, and how long each is: `LEAF` elements in all."""


def spread(tensor: Tensor) -> Tensor:
    """Up to `LEAF` elements of a flat tensor, in runs that are spread evenly over it."""
    if len(tensor) <= LEAF:
        return tensor
    step = len(tensor) // SPREAD_RUNS
    return tensor[: step * SPREAD_RUNS].view(SPREAD_RUNS, step)[:, :SPREAD_RUN].reshape(-1)


class Op(BaseModel, ABC):
    """An operation with its parameters set."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    name: ClassVar[str]
    """The word in recipes."""
    formula: ClassVar[str]
    """What one output tensor is, in the notation of the papers."""
    paper: ClassVar[str | None] = None
    """Where it comes from, e.g. `arXiv:2306.01708`."""
    takes: ClassVar[Literal["model", "inputs", "rules"]] = "inputs"
    """How a recipe names what the op works on: one `model`, a list of `inputs`, or `rules` by tensor name."""
    fewest: ClassVar[int] = 1
    """The least number of inputs."""
    most: ClassVar[int | None] = None
    """The greatest number of inputs; None is any."""
    needs_base: ClassVar[bool] = False
    """Whether a recipe must name a `base`."""
    cut: ClassVar[Literal["element", "tensor"]] = "element"
    """Whether any block can be computed alone, or only the whole tensor (given in its own shape)."""
    portable: ClassVar[bool] = True
    """Same bytes on any x86-64 with AVX2 or better; otherwise on the same processor only."""
    shows_non_finite: ClassVar[bool] = True
    """Whether a NaN or Inf in any input always leaves one in the result, so that looking at the result is enough."""
    exact: ClassVar[bool] = False
    """Whether inputs are given as stored, not in the compute dtype."""

    def space(self, base: Space | None, inputs: Sequence[Space]) -> Space:
        """The space of the result. Raises RecipeError where the inputs' spaces cannot go together."""
        if len(set(inputs)) > 1:
            raise RecipeError(
                f"{self.name} mixes {' and '.join(sorted(set(inputs)))} inputs",
                fix="Make deltas of the models by `{op: task_vector, base: ..., model: ...}`, "
                "or add the delta to a base by `op: add`.",
            )
        return inputs[0]

    def check(self) -> None:
        """Rules across the parameters of a resolved op. Raises RecipeError."""

    def only_input(self, count: int) -> int | None:
        """Which of `count` inputs the result is, bit for bit, if it is one; None where something is computed."""
        return None

    def result_dtype(self) -> str | None:
        """The dtype the result is rounded to, for ops that round."""
        return None

    def reduction(self, known: tuple[Any, ...]) -> Reduction | None:
        """The next round of the measure, given what the rounds before found; None when all is known."""
        return None

    def measure_bytes(self, inputs: int) -> int:
        """Bytes that the measure of one tensor holds at most in each thread, beside its blocks, for so many inputs."""
        return 0

    @property
    def measures(self) -> bool:
        """Whether the op needs a measure before its blocks can be computed."""
        return self.reduction(()) is not None

    @abstractmethod
    def compute(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        """The mathematics: inputs of equal length (the base first, if there is one), the same length out.

        The result may be one of the inputs itself, where nothing is computed.
        """

    @classmethod
    def settings(cls) -> dict[str, SettingOf]:
        """The fields that are settings, by name."""
        found = _SETTINGS.get(cls)
        if found is None:
            found = {
                name: mark
                for name, info in cls.model_fields.items()
                for mark in info.metadata
                if isinstance(mark, SettingOf)
            }
            _SETTINGS[cls] = found
        return found

    @property
    def uniform(self) -> bool:
        """Whether every setting has one value over the whole model."""
        return all(constant(getattr(self, name)) for name in self.settings())

    def values_at(self, place: Place, kept: Sequence[int]) -> tuple[Any, ...]:
        """The value of each setting at a place, for the inputs whose indices are `kept`."""
        values = []
        for name, mark in self.settings().items():
            own = getattr(self, name)
            if not mark.per_input:
                values.append(value_at(own, place))
            elif isinstance(own, Each):
                values.append(tuple(value_at(own[index], place) for index in kept))
            else:
                values.append((value_at(own, place),) * len(kept))
        return tuple(values)

    def resolved(self, values: Sequence[Any]) -> Self:
        """The op with these values (of `values_at`) for its settings. Raises RecipeError where they clash."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in type(self).model_fields}
        for (name, mark), value in zip(self.settings().items(), values, strict=True):
            fields[name] = Each(value) if mark.per_input else value
        found = type(self).model_construct(**fields)
        found.check()
        return found

    def __call__(self, *tensors: Tensor | Sequence[Tensor]) -> Tensor:
        """The op on plain tensors, computed as a run would: `Linear()([a, b])`, `Ties(density=0.2)(base, [a, b])`.

        Inputs have one shape and any float dtype and device; computed in float32 (float64 if any is float64), given
        back in the dtype of the first. Settings must have one value (no gradient or rules), since a plain tensor has
        no place in a model.
        """
        return _on_tensors(self, *tensors)


_SETTINGS: dict[type[Op], dict[str, SettingOf]] = {}


def numbers(setting: Any) -> tuple[float, ...]:
    """The value of a resolved per-input setting: one for each input."""
    return tuple(setting)


def number(setting: Any) -> float:
    """The value of a resolved setting."""
    return float(setting)


class DeltaOp(Op):
    """An op that works on what models learnt since a base: result = base + combine(deltas).

    `inputs` of `compute` are the base and the deltas; planning subtracts the base from each weight input.
    """

    needs_base: ClassVar[bool] = True

    deltas_only: ClassVar[bool] = False
    """Whether weights are refused as inputs."""

    def space(self, base: Space | None, inputs: Sequence[Space]) -> Space:
        """Weights and deltas may stand together as inputs; the base is a weight, and so is the result."""
        if base != "weight":
            raise RecipeError(
                f"the base of {self.name} is {f'a {base}' if base else 'missing'}, not a weight",
                fix="A base must be a model or a node that gives weights.",
            )
        wrong = [space for space in inputs if space not in ("weight", "delta")]
        if wrong:
            raise RecipeError(f"{self.name} cannot use {wrong[0]} as an input", fix="Give it models or deltas.")
        if self.deltas_only and "weight" in inputs:
            raise RecipeError(
                f"{self.name} adds deltas, and an input is a model's weights",
                fix="Make a delta of it first: `{op: task_vector, base: ..., model: ...}`, "
                "or use `op: task_arithmetic`.",
            )
        return "weight"

    @abstractmethod
    def combine(self, deltas: Sequence[Tensor], block: Block) -> Tensor:
        """The merged delta: a new tensor, or one of `deltas` itself, which it may not write into."""

    def compute(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        """base + combine(deltas)"""
        base, *deltas = inputs
        merged = self.combine(deltas, block)
        return merged + base if is_one_of(merged, deltas) else merged.add_(base)


def is_one_of(tensor: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether a result is one of the inputs, so that it may not be written into."""
    return any(tensor is other for other in inputs)


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i x_i in the order of the inputs, each product rounded before it is added (no fused multiply-add).

    A new tensor, except that one tensor of weight 1 is given back itself.
    """
    products = (tensor if weight == 1 else tensor * weight for tensor, weight in zip(tensors, weights, strict=True))
    total = next(products)
    own = weights[0] != 1
    for product in products:
        total = total.add_(product) if own else total + product
        own = True
    return total


def measure(op: Op, blocks: Sequence[Sequence[Tensor]]) -> tuple[Any, ...]:
    """All rounds of an op's measure over tensors that are at hand; the executor does the same without holding them."""
    known: tuple[Any, ...] = ()
    while (reduction := op.reduction(known)) is not None:
        given = [[spread(one) for one in inputs] for inputs in blocks] if reduction.sample else blocks
        known = (*known, reduction.finish(reduction.merge([reduction.block(inputs) for inputs in given])))
    return known


def _on_tensors(op: Op, *tensors: Tensor | Sequence[Tensor]) -> Tensor:
    import torch

    given = [tensor for item in tensors for tensor in ([item] if isinstance(item, torch.Tensor) else item)]
    if op.takes == "rules":
        raise RecipeError(f"{op.name} chooses tensors by name", fix="Use it in a recipe.")
    count = len(given) - op.needs_base
    if count < op.fewest or (op.most is not None and count > op.most):
        raise RecipeError(
            f"{op.name} got {max(count, 0)} inputs, not {op.fewest}{'' if op.most == op.fewest else ' or more'}",
            fix=f"Call it with {'the base and ' if op.needs_base else ''}its inputs.",
        )
    for name in op.settings():
        own = getattr(op, name)
        if isinstance(own, Each) and len(own) != count:
            raise RecipeError(f"{op.name} has {len(own)} values of `{name}` for {count} inputs")
    if len({tensor.shape for tensor in given}) > 1:
        raise RecipeError(f"the tensors have different shapes: {', '.join(str(tuple(t.shape)) for t in given)}")
    if not all(tensor.is_floating_point() for tensor in given):
        raise RecipeError("integer and boolean tensors are never computed on")
    if not op.uniform:
        raise RecipeError("a gradient or a rule needs the names of a model", fix="Give each parameter one value.")
    ready = op.resolved(op.values_at(Place(""), range(count)))
    compute = torch.float64 if any(tensor.dtype == torch.float64 for tensor in given) else torch.float32
    inputs = [tensor.detach().to(compute) for tensor in given]
    if op.cut == "element":
        inputs = [tensor.reshape(-1) for tensor in inputs]
    if isinstance(op, DeltaOp) and not op.deltas_only:
        inputs = [inputs[0], *(tensor - inputs[0] for tensor in inputs[1:])]
    result = ready.compute(inputs, Block(0, measure(ready, [inputs])))
    if is_one_of(result, inputs):
        result = result.clone()
    rounded = ready.result_dtype()
    return result.reshape(given[0].shape).to(torch_dtype(BY_NAME[rounded]) if rounded else given[0].dtype)

"""What an op is: a frozen pydantic value whose fields are its parameters and whose one method is the mathematics.

The YAML form, the JSON Schema, the table of ops, validation and the plan all read the class, so nothing is written
twice. An op knows neither recipes nor files. Classes are declared without torch: `import torch` stands inside the
methods that compute.

Planning resolves an op at each tensor (`values_at`, `resolved`): the ops of a plan hold one number for each setting,
and the executor knows nothing of places. The mathematics gets flat blocks in the compute dtype (float32, or float64 if
any input is float64), may write into tensors that it made itself, and never into its inputs.

An op that needs a global number first answers `reduction` with a `Reduction` over blocks; rounds may build on each
other (a radix selection needs two).

How an op, and each of its reductions, can be cut up decides what a block is:
`element`: a flat stretch of any whole number of leaves; the budget chooses how long it is, so sums are kept for each leaf of
`LEAF` elements until the end, and the cut cannot change a bit.
`row`: (rows, length of the last axis), a number of rows that follows from the shape alone, so that a sum over a block is the
same always, and neighbouring blocks merge in one fixed order.
`tensor`: the whole tensor in its own shape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict

from mergeflow.dtypes import BY_NAME, torch_dtype
from mergeflow.errors import RecipeError
from mergeflow.settings import Each, Place, SettingOf, constant, value_at

if TYPE_CHECKING:
    from torch import Tensor

Space = Literal["weight", "delta", "statistics", "artifact"]

LEAF = 65_536
"""Elements in a leaf: reductions are summed leaf by leaf, in order, and a block is a whole number of leaves."""


Cut = Literal["element", "row", "tensor"]


@dataclass(frozen=True, slots=True)
class Block:
    """The part of a tensor that is computed or measured at once.

    `start` is the flat index of its first element, `measured` what the rounds before found, `shape` that of the whole
    tensor. `keys` are the 64-bit keys of a random op's draws at this tensor, one for each input. `before` counts the
    leaves of the tensors that stand before this one in a measure over several.
    """

    start: int = 0
    measured: tuple[Any, ...] = ()
    shape: tuple[int, ...] = ()
    keys: tuple[int, ...] = ()
    before: int = 0


class Reduction(ABC):
    """One round of a measure: a partial result for each block, merged in the order of the blocks, finished once."""

    sample: ClassVar[bool] = False
    """Whether the round is given `spread` values instead of all: it guides later rounds, and changes no result."""
    cut: ClassVar[Cut] = "element"
    """What its blocks are."""

    @abstractmethod
    def block(self, inputs: Sequence[Tensor], block: Block) -> Any:
        """The partial result of a block; `inputs` are cut as `cut` says, and may not be written into."""

    @abstractmethod
    def merge(self, parts: Sequence[Any]) -> Any:
        """Partial results of neighbouring blocks as one, in order; of flat blocks associative to the last bit.

        May write into the first.
        """

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


class ByRows(Protocol):
    """A tensor that is read when it is wanted."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Its rows [start, stop) of the first axis, in the compute dtype; not to be written into."""


class Op(BaseModel, ABC):
    """An operation with its parameters set."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    name: ClassVar[str]
    """The word in recipes."""
    formula: ClassVar[str]
    """What one output tensor is, in the notation of the papers."""
    paper: ClassVar[str | None] = None
    """Where it comes from, e.g. `arXiv:2306.01708`."""
    takes: ClassVar[Literal["model", "inputs", "rules", "layers", "emr", "sources"]] = "inputs"
    """How a recipe names what the op works on: one `model`, a list of `inputs`, `rules` by name, `layers`, an artifact, or a
    `target` and its `sources`."""
    fewest: ClassVar[int] = 1
    """The least number of inputs."""
    most: ClassVar[int | None] = None
    """The greatest number of inputs; None is any."""
    needs_base: ClassVar[bool] = False
    """Whether a recipe must name a `base`."""
    may_base: ClassVar[bool] = False
    """Whether a recipe may name a `base`: the op then works on the deltas, and what it gives is added to the base."""
    cut: ClassVar[Cut] = "element"
    """What can be computed alone: any stretch of elements, any rows, or only the whole tensor."""
    lazy: ClassVar[bool] = False
    """Whether an op on whole tensors reads them itself (`compute_lazily`), and says what it holds (`needed_bytes`)."""
    input_keys: ClassVar[tuple[str, ...]] = ()
    """Keys of an input that name what goes with its model: an artifact, or a node that makes one."""
    optional_keys: ClassVar[tuple[str, ...]] = ()
    """Which of these may be left out."""
    keys_of_base: ClassVar[bool] = False
    """Whether what the inputs name by these keys was collected on the base, and not on the inputs."""
    has_parts: ClassVar[bool] = False
    """Whether the result is several tensors for one of the inputs', each made by an op of its own."""
    draws: ClassVar[bool] = False
    """Whether the op draws random numbers (`Block.keys`)."""
    matrices_only: ClassVar[bool] = False
    """Whether the op acts on tensors of two axes alone; a node's `others` says where the rest comes from."""
    temporaries: ClassVar[int] = 8
    """Blocks that the op may hold beyond its inputs, for the estimate of memory."""
    version: ClassVar[int] = 1
    """Goes up whenever the op's numbers change: locks record it, and no artifact of before is taken for one of after."""
    portable: ClassVar[bool] = True
    """Same bytes on any x86-64 with AVX2 or better; otherwise on the same processor only."""
    shows_non_finite: ClassVar[bool] = True
    """Whether a NaN or Inf in any input always leaves one in the result, so that looking at the result is enough."""
    exact: ClassVar[bool] = False
    """Whether inputs are given as stored, not in the compute dtype."""

    def space(self, base: Space | None, inputs: Sequence[Space]) -> Space:
        """The space of the result. Raises RecipeError where the inputs' spaces cannot go together."""
        if base is not None and self.may_base:
            return _onto_base(self, base, inputs)
        if self.needs_base and base != "weight":
            raise _no_base(self, base)
        if self.needs_base and "delta" in inputs:
            raise RecipeError(
                f"{self.name} compares models with their base, and an input is a delta",
                fix="Put the delta onto the base first: `{op: add, base: ..., inputs: [...]}`.",
            )
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

    model_settings: ClassVar[tuple[str, ...]] = ()
    """Settings that must have one value over the whole model where `over_model` holds."""

    @property
    def over_model(self) -> bool:
        """Whether the measure goes over all floating tensors of the node, by name, and not over each alone."""
        return False

    @property
    def measures(self) -> bool:
        """Whether the op needs a measure before its blocks can be computed."""
        return self.reduction(()) is not None

    @abstractmethod
    def compute(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        """The mathematics: inputs of one shape, cut as `cut` says (the base first, if the op needs one), the same shape out.

        The result may be one of the inputs itself, where nothing is computed; inputs may not be written into.
        """

    def compute_lazily(self, inputs: Sequence[ByRows], block: Block) -> Tensor:
        """The mathematics of a `lazy` op: inputs of any shapes, the first of the result's, read by rows when they are wanted."""
        raise TypeError(f"{self.name} takes tensors")

    def needed_bytes(self, shapes: Sequence[tuple[int, ...]]) -> int:
        """Bytes that a `lazy` op holds at most, its result included, for inputs of these shapes."""
        return 0

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

    def __call__(self, *tensors: Tensor | Sequence[Tensor], seed: int = 0) -> Tensor:
        """The op on plain tensors, computed as a run would: `Linear()([a, b])`, `Ties(density=0.2)(base, [a, b])`.

        Inputs have one shape and any float dtype and device; computed in float32 (float64 if any is float64), given
        back in the dtype of the first. Settings must have one value (no gradient or rules), since a plain tensor has
        no place in a model. `seed` is for ops that draw: each input draws its own numbers, by its position.
        """
        return _on_tensors(self, *tensors, seed=seed)


_SETTINGS: dict[type[Op], dict[str, SettingOf]] = {}


def numbers(setting: Any) -> tuple[float, ...]:
    """The value of a resolved per-input setting: one for each input."""
    return tuple(setting)


def number(setting: Any) -> float:
    """The value of a resolved setting."""
    return float(setting)


def _no_base(op: Op, base: Space | None) -> RecipeError:
    return RecipeError(
        f"the base of {op.name} is {f'a {base}' if base else 'missing'}, not a weight",
        fix="A base must be a model or a node that gives weights.",
    )


def _onto_base(op: Op, base: Space | None, inputs: Sequence[Space]) -> Space:
    """The space of an op that adds to a base what it makes of deltas, of weights or deltas as inputs."""
    if base != "weight":
        raise _no_base(op, base)
    wrong = [space for space in inputs if space not in ("weight", "delta")]
    if wrong:
        raise RecipeError(f"{op.name} cannot use {wrong[0]} as an input", fix="Give it models or deltas.")
    return "weight"


class DeltaOp(Op):
    """An op that works on what models learnt since a base: result = base + combine(deltas).

    `inputs` of `compute` are the base and the deltas; planning subtracts the base from each weight input.
    """

    needs_base: ClassVar[bool] = True

    deltas_only: ClassVar[bool] = False
    """Whether weights are refused as inputs."""

    def space(self, base: Space | None, inputs: Sequence[Space]) -> Space:
        """Weights and deltas may stand together as inputs; the base is a weight, and so is the result."""
        space = _onto_base(self, base, inputs)
        if self.deltas_only and "weight" in inputs:
            raise RecipeError(
                f"{self.name} adds deltas, and an input is a model's weights",
                fix="Make a delta of it first: `{op: task_vector, base: ..., model: ...}`, "
                "or use `op: task_arithmetic`.",
            )
        return space

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


def cut_as(tensor: Tensor, cut: Cut, shape: Sequence[int]) -> Tensor:
    """A tensor, or flat whole rows of one of this shape, in the form in which `cut` gives it."""
    if cut == "tensor":
        return tensor.reshape(shape)
    if cut == "element":
        return tensor.reshape(-1)
    length = shape[-1] if shape else 1
    return tensor.reshape(-1, length) if length else tensor.reshape(0, 0)


def measure(op: Op, tensors: Sequence[Tensor], keys: tuple[int, ...] = ()) -> tuple[Any, ...]:
    """All rounds of an op's measure over tensors that are at hand; the executor does the same without holding them."""
    known: tuple[Any, ...] = ()
    shape = tuple(tensors[0].shape)
    while (reduction := op.reduction(known)) is not None:
        given = [cut_as(tensor, reduction.cut, shape) for tensor in tensors]
        if reduction.sample:
            given = [spread(one) for one in given]
        part = reduction.block(given, Block(0, known, shape, keys))
        known = (*known, reduction.finish(reduction.merge([part])))
    return known


def _on_tensors(op: Op, *tensors: Tensor | Sequence[Tensor], seed: int) -> Tensor:
    import torch

    from mergeflow.ops.draws import draw_key

    given = [tensor for item in tensors for tensor in ([item] if isinstance(item, torch.Tensor) else item)]
    if op.takes in ("rules", "layers"):
        raise RecipeError(f"{op.name} chooses tensors by name", fix="Use it in a recipe.")
    if op.takes == "emr" or op.has_parts:
        raise RecipeError(f"{op.name} has parts, and no tensor is all of them", fix="Use it in a recipe.")
    based = op.needs_base or (op.may_base and len(tensors) > 1 and isinstance(tensors[0], torch.Tensor))
    count = len(given) - based
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
    shape = tuple(given[0].shape)
    if op.matrices_only and len(shape) != 2:
        raise RecipeError(f"{op.name} acts on tensors of two axes, and these have {len(shape)}")
    if not op.uniform:
        raise RecipeError("a gradient or a rule needs the names of a model", fix="Give each parameter one value.")
    ready = op.resolved(op.values_at(Place(""), range(count)))
    compute = torch.float64 if any(tensor.dtype == torch.float64 for tensor in given) else torch.float32
    inputs = [tensor.detach().to(compute) for tensor in given]
    if based and (op.may_base or (isinstance(op, DeltaOp) and not op.deltas_only)):
        inputs = [inputs[0], *(tensor - inputs[0] for tensor in inputs[1:])]
    keys = tuple(draw_key((str(seed), ""), str(index), 0, "") for index in range(count)) if op.draws else ()
    origin = inputs.pop(0) if based and op.may_base else None
    result = ready.compute(
        [cut_as(one, op.cut, shape) for one in inputs], Block(0, measure(ready, inputs, keys), shape, keys)
    ).reshape(shape)
    if origin is not None:
        result = result + origin
    elif any(result.data_ptr() == other.data_ptr() for other in given):
        result = result.clone()
    rounded = ready.result_dtype()
    return result.to(torch_dtype(BY_NAME[rounded]) if rounded else given[0].dtype)

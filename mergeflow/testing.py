"""The conformance suite: what every op keeps to, as a pytest class that ops inherit, ours and those of other packages.

    from mergeflow.testing import OpConformance

    class TestDoubled(OpConformance):
        op = Doubled

That is a whole test file. What the suite holds an op to follows from what its class declares (`cut`, `draws`, `needs_base`,
`shows_non_finite`, ...); the few things that a class does not say are attributes of the test class: `alone`, `averages`,
`commutes`. A property that an op does not claim is not collected, so a test that passes has looked at something. A test of
one's own stands beside them: a float64 reference written from the formula, which no suite can know.

Ops are driven here as a run drives them, in blocks of any size, and then by real runs from files on disk. pytest and hypothesis
come with the extra `mergeflow[test]` and are imported when a test runs; this module itself needs neither, nor torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from mergeflow.dtypes import BY_NAME, torch_dtype
from mergeflow.errors import MachineError, RecipeError
from mergeflow.ops.base import LEAF, Block, DeltaOp, Op, Reduction, cut_as, spread
from mergeflow.ops.statistics import StageOp
from mergeflow.recipe import NAME, Recipe, node_section
from mergeflow.settings import Each, Place

if TYPE_CHECKING:
    from torch import Tensor, dtype

RESERVED = frozenset(
    {"op", "model", "inputs", "base", "name", "seed", "missing", "mismatch", "extra", "vocab", "non_finite"}
    | {"only", "others", "dtype", "like", "artifact"}
)
"""Words of a node that no parameter may have for its name."""

F = TypeVar("F", bound=Callable[..., None])
_SMALL_MEMORY, _LARGE_MEMORY = 64 * 2**20, 2**30
_EPSILON = 2.0**-23


@dataclass(frozen=True, slots=True)
class Case:
    """An op with its parameters set, and what it is tried on: so many inputs, and a base or none.

    `alone` and `averages` say of this case what the test class says of the op with its defaults.
    """

    op: Op
    inputs: int = 2
    based: bool = False
    alone: bool | None = None
    averages: bool | None = None

    def __str__(self) -> str:
        set_here = [
            f"{name}={_shown(value)}" for name, value in _fields(self.op).items() if not _is_default(self.op, name)
        ]
        return " ".join([*set_here, f"of {self.inputs}", *(["and a base"] if self.based else [])])


def cases_of(op: type[Op]) -> tuple[Case, ...]:
    """What an op is tried with, read off its class.

    Its defaults; shares (`Fraction`, `Unit`) that stand at an end of their range moved inside, where there is something to
    compute; from there each other choice of the words and flags. A parameter without a default gets a value in its range.
    """
    required = {name: _sample(_kind(op, name)) for name, info in op.model_fields.items() if info.is_required()}
    inside = {name: 0.4 for name, value in _defaults(op).items() if _is_share(_kind(op, name)) and value in (0.0, 1.0)}
    found = [required, {**required, **inside}] if inside else [required]
    for name in op.model_fields:
        kind = _kind(op, name)
        choices = get_args(kind) if get_origin(kind) is Literal else (True, False) if _schema(kind) == "boolean" else ()
        for choice in choices:
            if choice != {**_defaults(op), **required}[name]:
                found.append({**required, **inside, name: choice})
    few, most = op.fewest, op.most or max(op.fewest, 3)
    usual = min(max(few, 2), most)
    counts = [[usual] for _ in found]
    counts[0] = list(dict.fromkeys([usual, few, most]))
    cases = []
    for fields, some in zip(found, counts, strict=True):
        for count in some:
            for based in (True,) if op.needs_base else (False, True) if op.may_base else (False,):
                case = Case(op(**fields), count, based)
                with contextlib.suppress(RecipeError):  # values that clash are refused when a recipe is planned
                    _resolved(case)
                    cases.append(case)
    return tuple(sorted(cases, key=lambda case: case.inputs != usual))


def property_of(
    chosen: Callable[[Any, Case], bool] = lambda suite, case: True, *, computes: bool = True
) -> Callable[[F], F]:
    """Marks a test of the suite with the cases that it is for; where there are none, it is no test of that op.

    What `computes` is asked of an op on plain tensors, which one with parts cannot answer, nor one with statistics beside its
    inputs or a stage, whose `compute` is never asked for.
    """

    def marked(function: F) -> F:
        function.chosen = (  # type: ignore[attr-defined]
            (lambda suite, case: _computes(case.op) and chosen(suite, case)) if computes else chosen
        )
        return function

    return marked


def _of_models_alone(op: Op) -> bool:
    """Whether checkpoints are all that the op needs: no data and no statistics."""
    return not op.input_keys and not isinstance(op, StageOp)


def _computes(op: Op) -> bool:
    return not op.has_parts and _of_models_alone(op)


def _commutes(suite: Any, case: Case) -> bool:
    return bool(suite.commutes) and case.inputs > 1


def _averages(suite: Any, case: Case) -> bool:
    return bool(suite.averages and _all_default(case.op)) if case.averages is None else case.averages


def _measured(suite: Any, case: Case) -> bool:
    first = _resolved(case).reduction(())
    return _cut(case) == "element" and first is not None and first.cut == "element"


class OpConformance:
    """The rules for all ops. Inherit it, set `op`, and declare what the class of the op does not say."""

    op: ClassVar[type[Op]]
    """The op."""
    alone: ClassVar[bool] = True
    """Whether one input, with every parameter at its default, comes out as it went in."""
    averages: ClassVar[bool] = False
    """Whether equal inputs, with every parameter at its default, give that input, however many they are."""
    commutes: ClassVar[bool | None] = None
    """Whether the order of the inputs matters to rounding only; default: where there may be three of them and nothing is drawn."""
    tolerance: ClassVar[float] = 0.0
    """Relative L2 error that counts as rounding; default: 1e-6, and 1e-5 for what needs a whole tensor (SVD)."""
    examples: ClassVar[int] = 15
    """How many examples hypothesis makes up for each property."""
    shape: ClassVar[tuple[int, ...]] = ()
    """The tensor that is cut into blocks; default: a little more than three leaves, or a small matrix where it stays whole."""

    def cases(self) -> Sequence[Case]:
        """What the op is tried with; to add to what its class tells: `return (*super().cases(), Case(...))`."""
        return cases_of(self.op)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "op" not in cls.__dict__:
            return
        if cls.op.takes not in ("model", "inputs") or cls.op.input_keys:
            cases: Sequence[Case] = ()
        else:
            cases = cls().cases()
        if "commutes" not in cls.__dict__:
            cls.commutes = cls.op.takes == "inputs" and cls.op.most is None and not cls.op.draws
        for name in dir(cls):
            chosen = getattr(getattr(cls, name), "chosen", None)
            if chosen is not None and not any(chosen(cls, case) for case in cases):
                setattr(cls, name, None)

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """One test for each case that a property is for."""
        if "case" in metafunc.fixturenames:
            cases = [case for case in self.cases() if metafunc.function.chosen(type(self), case)]
            metafunc.parametrize("case", cases, ids=str)

    # What the class says

    def test_it_is_described_by_docstring_formula_and_a_line_for_each_parameter(self) -> None:
        """The README's table, `mergeflow ops` and the schema have no other source."""
        first = (self.op.__doc__ or "").strip().split("\n")[0]
        assert first.endswith(".") and len(first) <= 140, f"the docstring starts with one short sentence, not {first!r}"
        assert self.op.formula, "the formula is missing"
        assert re.fullmatch(NAME, self.op.name), f"{self.op.name!r} is no word of a recipe"
        for name, info in self.op.model_fields.items():
            assert info.description, f"{name} has no description"

    def test_a_recipe_finds_it_by_its_name(self) -> None:
        """Ours are in the list of ops, those of other packages have an entry point of the group `mergeflow.ops`."""
        from mergeflow.ops import op_named

        assert op_named(self.op.name) is self.op, f"another op is called {self.op.name!r}"

    def test_its_parameters_have_names_of_their_own(self) -> None:
        """A recipe's own words stand beside the parameters."""
        taken = RESERVED & self.op.model_fields.keys()
        assert not taken, f"{', '.join(taken)} are words of every node"

    def test_its_traits_go_together(self) -> None:
        """Numbers of inputs, how it is cut, and what it gives."""
        op = self.op
        assert op.takes != "model" or (op.fewest, op.most) == (1, 1), "an op of one model has one input"
        assert op.most is None or op.most >= op.fewest
        assert not (op.needs_base and op.may_base), "a base is needed or may be given, not both"

    @property_of(computes=False)
    def test_it_says_how_it_can_be_cut(self, case: Case) -> None:
        """Into stretches of elements, into rows, or not at all; and so may what it measures."""
        cut = _cut(case)
        assert cut in ("element", "row", "tensor"), cut
        assert cut != "tensor" or not case.op.portable, "what sums over a whole tensor depends on the processor"

    def test_its_defaults_are_values_that_it_takes(self) -> None:
        """Defaults are not validated when an op is made, so that making one is quick."""
        required = {n: _sample(_kind(self.op, n)) for n, info in self.op.model_fields.items() if info.is_required()}
        made = self.op(**{**_defaults(self.op), **required})
        assert made == self.op(**required), f"{made} is not {self.op(**required)}"

    @property_of(computes=False)
    def test_it_is_frozen_and_takes_no_unknown_parameter(self, case: Case) -> None:
        """An op is a value."""
        for name in (*type(case.op).model_fields, "another"):
            with _raises(ValidationError):
                setattr(case.op, name, 1)
        with _raises(ValidationError):
            type(case.op)(**{**_fields(case.op), "another": 1})

    @property_of(
        lambda suite, case: suite.op.__module__.split(".")[0] not in ("mergeflow", suite.__module__), computes=False
    )
    def test_declaring_it_loads_no_torch(self) -> None:
        """`mergeflow validate` imports the op, and answers in a fraction of a second; of ours one test asks it for all."""
        module = self.op.__module__
        code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], check=False, env=_environment())
        assert done.returncode == 0, f"import torch inside the methods of {module} that compute"

    @property_of(computes=False)
    def test_it_is_equal_to_its_copy_and_survives_pickle(self, case: Case) -> None:
        """As it is written, and as a plan holds it."""
        for op in (case.op, _resolved(case)):
            again = pickle.loads(pickle.dumps(op))
            assert again == op and hash(again) == hash(op) and type(again) is type(op)

    @property_of(computes=False)
    def test_a_recipe_says_it_and_gives_it_back(self, case: Case) -> None:
        """Recipe, parsed, is the op; what is written of it is the recipe again."""
        recipe = _recipe(case)
        node = recipe.nodes["merged"]
        assert _resolved(Case(node.op, case.inputs)) == _resolved(case), f"{node.op!r} is not {case.op!r}"
        from mergeflow.document import read_document

        again = read_document(recipe.text().encode(), "again").data
        assert Recipe(**again).nodes["merged"].op == node.op

    @property_of(computes=False)
    def test_the_schema_has_it(self, case: Case) -> None:
        """Every parameter with its description, and the recipe is accepted."""
        from jsonschema import Draft7Validator  # type: ignore[import-untyped]

        from mergeflow.ops import TaskVector
        from mergeflow.schema import recipe_schema

        schema = recipe_schema(tuple(dict.fromkeys((TaskVector, type(case.op)))))
        properties = schema["definitions"][f"node.{case.op.name}"]["properties"]
        assert type(case.op).model_fields.keys() <= properties.keys()
        problems = [error.message for error in Draft7Validator(schema).iter_errors(dict(_recipe(case).resolved))]
        assert not problems, problems

    @property_of(lambda suite, case: bool(suite.op.settings()) and case == suite().cases()[0], computes=False)
    def test_each_setting_may_change_over_the_model(self, case: Case) -> None:
        """By rules, by a gradient where it is a number, and for an input alone where it says so."""
        place = Place("layers.1.w", 1, (0, 1, 2))
        for name, mark in type(case.op).settings().items():
            value = _plain(getattr(case.op, name))
            shapes: list[Any] = [[{"match": "*.w", "value": value}, {"value": value}]]
            if _schema(mark.kind) == "number":
                shapes.append({"gradient": [value, value], "outside": value})
            for shape in shapes:
                node = _recipe(case, **{name: shape}).nodes["merged"]
                values = node.op.values_at(place, range(case.inputs))
                assert node.op.resolved(values) == _resolved(case), f"{name}: {shape}"
                assert not node.op.uniform
            if mark.per_input:
                own = _recipe(case, on_inputs={name: value}).nodes["merged"].op
                assert own.resolved(own.values_at(place, range(case.inputs))) == _resolved(case), name

    # What it computes

    @property_of()
    def test_small_empty_and_zero_tensors_are_defined_and_finite(self, case: Case) -> None:
        """Of any shape, down to no element: zero norms, equal inputs, masses of equal magnitudes, tiny numbers."""
        import torch

        def holds(shape: tuple[int, ...], kind: str, seed: int, wide: bool) -> None:
            tensors = [
                _values(shape, kind, seed + i, torch.float64 if wide else torch.float32) for i in range(_count(case))
            ]
            got = _called(case, tensors)
            assert tuple(got.shape) == shape, f"{tuple(got.shape)} came of {shape}"
            assert _finite(got), f"{got} came of {tensors}"

        for shape in _shapes(self.op):
            holds(shape, "zero", 0, wide=False)
        strategies = _strategies()
        self._tried(
            holds,
            shape=strategies.sampled_from(_shapes(self.op)),
            kind=strategies.sampled_from(_KINDS),
            seed=strategies.integers(0, 2**31),
            wide=strategies.booleans(),
        )

    @property_of()
    def test_the_result_has_the_dtype_of_the_first_tensor_and_is_computed_in_a_wider_one(self, case: Case) -> None:
        """float32 for all narrower ones; float64 where any input is."""
        import torch

        for kinds in (
            *([one] for one in (torch.bfloat16, torch.float16, torch.float32, torch.float64)),
            [torch.bfloat16, torch.float32, torch.float16],
            [torch.float32, torch.float64, torch.bfloat16],
        ):
            each = [kinds[i % len(kinds)] for i in range(_count(case))]
            tensors = [_values(_LITTLE, "normal", i, kind) for i, kind in enumerate(each)]
            wide = torch.float64 if torch.float64 in each else torch.float32
            got, exact = _called(case, tensors), _called(case, [tensor.to(wide) for tensor in tensors])
            rounded = case.op.resolved(_at(case)).result_dtype()
            wanted = torch_dtype(BY_NAME[rounded]) if rounded else each[0]
            assert got.dtype == wanted, f"{got.dtype} came of {each}"
            assert _same_bits(got, exact.to(wanted)), f"{each} are not computed in {wide}"

    @property_of()
    def test_inputs_are_never_written_to_nor_given_back(self, case: Case) -> None:
        """They may be maps of a file."""
        import torch

        for kind in (torch.float32, torch.float64):
            tensors = [_values(_LITTLE, "normal", i, kind) for i in range(_count(case))]
            before = [tensor.clone() for tensor in tensors]
            _called(case, tensors).fill_(7)
            assert all(map(_same_bits, tensors, before)), (
                "an op on plain tensors wrote into its inputs, or gave one back"
            )
            given, _ = _given(case, tensors)
            copies = [tensor.clone() for tensor in given]
            _in_blocks(case, given, _LITTLE, LEAF)
            assert all(map(_same_bits, given, copies)), "reduction or compute wrote into its inputs"

    @property_of()
    def test_what_it_gives_depends_on_nothing_but_its_inputs(self, case: Case) -> None:
        """Twice the same, and no global generator is asked or moved."""
        import numpy as np
        import torch

        tensors = [_values(_LITTLE, "normal", i) for i in range(_count(case))]
        torch.manual_seed(1)
        np.random.seed(1)
        first, state, numbers = _called(case, tensors), torch.get_rng_state(), np.random.random()
        torch.manual_seed(2)
        assert _same_bits(_called(case, tensors), first), "the same inputs gave another result"
        torch.manual_seed(1)
        np.random.seed(1)
        assert torch.equal(torch.get_rng_state(), state) and np.random.random() == numbers, "a global generator moved"

    @property_of(lambda suite, case: _cut(case) == "element")
    def test_the_cut_into_blocks_changes_no_bit(self, case: Case) -> None:
        """Blocks are any whole number of leaves: the budget of memory chooses."""
        import torch

        shape = self._large(case)
        for kind, sizes in ((torch.float32, (1, 2, 3)), (torch.float64, (1,))):
            given, _ = _given(case, [_values(shape, "normal", i, kind) for i in range(_count(case))])
            whole = _in_blocks(case, given, shape, 2**40)
            for leaves in sizes:
                got = _in_blocks(case, given, shape, leaves * LEAF)
                assert _same_bits(got, whole), f"blocks of {leaves} leaves give other bits ({_difference(got, whole)})"
            if not self.op.draws and not case.based:  # with a base there is more around the op
                direct = _called(case, given)
                assert _same_bits(direct, whole.to(direct.dtype)), "the op on plain tensors gives other bits"

    @property_of(_measured)
    def test_segments_that_are_measured_apart_change_no_bit(self, case: Case) -> None:
        """Threads measure segments, which are merged in order: merging is associative to the last bit."""
        shape = self._large(case)
        for kind, group in (("normal", 2), ("grid", 3)):
            given, _ = _given(case, [_values(shape, kind, i) for i in range(_count(case))])
            whole = _in_blocks(case, given, shape, LEAF)
            got = _in_blocks(case, given, shape, LEAF, group)
            assert _same_bits(got, whole), f"segments of {group} leaves give other bits ({_difference(got, whole)})"

    @property_of(lambda suite, case: _cut(case) == "row")
    def test_rows_may_be_computed_apart(self, case: Case) -> None:
        """A block is whole rows, so no row may need another but through a measure."""
        shape = self._large(case)
        given, _ = _given(case, [_values(shape, "normal", i) for i in range(_count(case))])
        whole = _in_blocks(case, given, shape, 2**40)
        for rows in (13, 100, 1000):
            got = _in_blocks(case, given, shape, rows * shape[-1])
            assert self._close(case, got, whole), (
                f"blocks of {rows} rows give another result ({_difference(got, whole)})"
            )

    @property_of(lambda suite, case: _resolved(case).shows_non_finite)
    def test_a_nan_or_inf_in_any_input_leaves_one_in_the_result(self, case: Case) -> None:
        """So that looking at the result is enough; an op that can hide one says `shows_non_finite = False`."""
        for which, bad, at in product(range(_count(case)), (math.nan, math.inf, -math.inf), (0, 5)):
            tensors = [_values(_LITTLE, "normal", i) for i in range(_count(case))]
            tensors[which].view(-1)[at] = bad
            given, origin = _given(case, tensors)
            got = _in_blocks(case, given, _LITTLE, LEAF)
            assert not _finite(got if origin is None else got + origin), f"{bad} in tensor {which} leaves no trace"

    @property_of()
    def test_a_nan_or_inf_is_no_reason_to_break(self, case: Case) -> None:
        """What a run does about it is the recipe's business."""
        import torch

        for bad in (math.nan, math.inf):
            for which in range(_count(case)):
                tensors = [_values(_LITTLE, "normal", i) for i in range(_count(case))]
                tensors[which].view(-1)[3] = bad
                assert _called(case, tensors).shape == tensors[0].shape
            assert _called(case, [torch.full(_LITTLE, bad)] * _count(case)).shape == _LITTLE

    @property_of(
        lambda suite, case: (
            suite.op.takes == "inputs"
            and suite.op.fewest == 1
            and case.inputs == suite().cases()[0].inputs
            and (case.alone if case.alone is not None else suite.alone and _all_default(case.op))
        )
    )
    def test_one_input_comes_out_as_it_went_in(self, case: Case) -> None:
        """Bit for bit where the op says that nothing is computed, else to rounding."""
        self._gives_back(Case(case.op, 1, case.based))

    @property_of(lambda suite, case: _averages(suite, case) and case.inputs == suite().cases()[0].inputs)
    def test_equal_inputs_give_that_input(self, case: Case) -> None:
        """However many they are."""
        for count in range(self.op.fewest, (self.op.most or 5) + 1):
            self._gives_back(Case(case.op, count, case.based))

    @property_of(
        lambda suite, case: (
            "weight" in suite.op.settings()
            and suite.op.settings()["weight"].per_input
            and case.inputs > 1
            and _averages(suite, case)
        )
    )
    def test_weight_one_on_one_input_and_none_on_the_others_gives_it(self, case: Case) -> None:
        """Whichever it is."""
        for which in range(case.inputs):
            weights = Each(float(i == which) for i in range(case.inputs))
            one = Case(case.op.model_copy(update={"weight": weights}), case.inputs, case.based)
            tensors = [_values(_LITTLE, "normal", i) for i in range(_count(one))]
            got, want = _called(one, tensors), tensors[which + case.based]
            assert self._close(one, got, want, *tensors[: case.based]), f"{got} came of {want}"

    @property_of(_commutes)
    def test_the_order_of_the_inputs_matters_to_rounding_only(self, case: Case) -> None:
        """What inputs say for themselves goes with them."""
        import torch

        def holds(order: Sequence[int], seed: int) -> None:
            tensors = [_values(_LITTLE, "normal", seed + i) for i in range(_count(case))]
            before, inputs = tensors[: case.based], tensors[case.based :]
            each = {
                name: Each(value[i] for i in order)
                for name, value in _fields(case.op).items()
                if isinstance(value, Each)
            }
            other = Case(case.op.model_copy(update=each), case.inputs, case.based)
            first = _called(case, tensors)
            second = _called(other, [*before, *(inputs[i] for i in order)])
            if _cut(case) == "tensor":
                assert self._close(case, second, first, *tensors), f"in the order {order} it is {second}, not {first}"
                return
            terms = torch.stack([tensor.abs() for tensor in tensors]).sum(0)
            far = (first - second).abs() > 4 * _EPSILON * terms
            assert not far.any(), f"in the order {order} it is {second[far]}, not {first[far]}"

        strategies = _strategies()
        self._tried(
            holds, order=strategies.permutations(range(case.inputs)), seed=strategies.integers(0, 2**31).map(int)
        )

    @property_of(lambda suite, case: case.based and case.op.space(*_spaces(case)) == "weight")
    def test_zero_deltas_give_the_base_bit_for_bit(self, case: Case) -> None:
        """Where nothing was learnt, nothing changes."""
        import torch

        for kind, shape in product((torch.float32, torch.float64, torch.bfloat16), (_LITTLE, _ONE)):
            base = _values(shape, "normal", 1, kind)
            one = torch.zeros_like(base) if _deltas_only(case) else base
            got = _called(case, [base, *(one.clone() for _ in range(case.inputs))])
            assert _same_bits(got, base), f"{_difference(got, base)} came of zero deltas"

    @property_of(lambda suite, case: suite.op.draws)
    def test_what_is_drawn_depends_on_the_seed_and_on_the_place_alone(self, case: Case) -> None:
        """The same seed, the same numbers; an element's number does not change with the block that it is drawn in."""
        tensors = [_values(self._large(case), "normal", i) for i in range(_count(case))]
        first = _called(case, tensors, seed=1)
        assert _same_bits(first, _called(case, tensors, seed=1))
        if not _all_default(case.op):
            assert not _same_bits(first, _called(case, tensors, seed=2)), "another seed gives the same numbers"

    # Runs

    @property_of(lambda suite, case: _of_models_alone(case.op) and case == suite._telling(), computes=False)
    def test_a_run_gives_the_same_bytes_whatever_its_threads_memory_reading_and_files(
        self, case: Case, tmp_path: Path
    ) -> None:
        """From checkpoints with matrices, vectors, scalars, empty tensors and integers, as files on disk."""
        import torch

        from mergeflow import pipeline

        names = ["base", *(f"model_{i}" for i in range(case.inputs))]
        large = self._large(case)
        matrix = large if len(large) > 1 else (large[0] // 263 + 1, 263)
        shapes = {"layers.0.w": matrix, "layers.1.w": (7, 5), "norm": (11,), "one": (), "none": (0, 3)}
        models = {
            name: {key: _values(shape, "normal", 10 * i + j) for j, (key, shape) in enumerate(shapes.items())}
            | {"steps": torch.arange(5)}
            for i, name in enumerate(names)
        }
        for name, tensors in models.items():
            _save(tmp_path / "one" / name, tensors, 1)
            _save(tmp_path / "other" / name, dict([*tensors.items()][::-1]), 1 if name == names[0] else 2)
        made: list[dict[str, Tensor]] = []
        small = _least_memory(_recipe(case, folder=tmp_path / "one"))
        ways: list[tuple[int, int, Any, str]] = [
            (1, _LARGE_MEMORY, "mmap", "one"),
            (2, small, "mmap", "other"),
            (2, _LARGE_MEMORY, "pread", "other"),
            (1, small, "pread", "one"),
        ]
        for threads, memory, reading, which in ways:
            recipe, out = _recipe(case, folder=tmp_path / which), tmp_path / f"out{len(made)}"
            pipeline.run(recipe, out, threads=threads, memory=memory, reading=reading)
            made.append(_weights(out))
        first = made[0]
        for other in made[1:]:
            assert other.keys() == first.keys()
            for key, tensor in first.items():
                assert _same_bits(tensor, other[key]), f"{key} is not the same ({_difference(tensor, other[key])})"
        if self.op.has_parts:
            return
        assert {key: tuple(tensor.shape) for key, tensor in first.items()} == {**shapes, "steps": (5,)}
        gives_delta = case.op.space(*_spaces(case)) == "delta"
        assert torch.equal(first["steps"], torch.zeros(5, dtype=torch.int64) if gives_delta else torch.arange(5))
        if self.op.draws:
            return
        for key, shape in shapes.items():
            if len(shape) != 2 and self.op.matrices_only:
                continue
            given = [models[name][key] for name in names[not case.based :]]
            if _deltas_only(case):
                given = [given[0], *(tensor - given[0] for tensor in given[1:])]
            got, want = first[key], _called(case, given)
            same = _same_bits(got, want) if _cut(case) == "element" else self._close(case, got, want)
            assert same, f"{key}: a run gives {got}, the op on plain tensors {want}"

    # Beside the properties

    @classmethod
    def _telling(cls) -> Case:
        """The case that has something to compute: shares inside their range where there are any."""
        usual = cls().cases()
        return next((case for case in usual if not _all_default(case.op)), usual[0])

    def _tried(self, holds: Callable[..., None], **strategies: Any) -> None:
        """Try a property on examples that hypothesis makes up, the same ones each time."""
        import hypothesis

        settings = hypothesis.settings(
            max_examples=self.examples,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[hypothesis.Phase.generate],  # the arguments are few and small as they are
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        settings(hypothesis.given(**strategies)(holds))()

    def _large(self, case: Case) -> tuple[int, ...]:
        """The shape of a tensor that is cut into blocks."""
        return self.shape or {"element": (3 * LEAF + 1234,), "row": (1501, 131), "tensor": (37, 23)}[_cut(case)]

    def _close(self, case: Case, got: Tensor, want: Tensor, *terms: Tensor) -> bool:
        """Whether two results differ by rounding only; `terms` are what was subtracted and added on the way."""
        import torch

        tolerance = self.tolerance or (1e-5 if _cut(case) == "tensor" else 1e-6)
        size = torch.linalg.vector_norm(torch.stack([one.double() for one in (want, *terms)]))
        return bool(torch.linalg.vector_norm(got.double() - want.double()) <= tolerance * size)

    def _gives_back(self, case: Case) -> None:
        for seed in range(3):
            base, one = _values(_LITTLE, "normal", seed), _values(_LITTLE, "normal", seed + 100)
            given = one - base if _deltas_only(case) else one
            got = _called(case, [*([base] if case.based else []), *(given.clone() for _ in range(case.inputs))])
            exact = _resolved(case).only_input(case.inputs) is not None and not case.based
            same = _same_bits(got, one) if exact else self._close(case, got, one, *([base] if case.based else []))
            assert same, f"{case.inputs} inputs give {got}, and each is {one}"


# Ops, read off their classes


def _fields(op: Op) -> dict[str, Any]:
    return {name: getattr(op, name) for name in type(op).model_fields}


def _defaults(op: type[Op]) -> dict[str, Any]:
    return {name: info.default for name, info in op.model_fields.items() if not info.is_required()}


def _is_default(op: Op, name: str) -> bool:
    info = type(op).model_fields[name]
    return not info.is_required() and getattr(op, name) == info.default


def _all_default(op: Op) -> bool:
    return all(_is_default(op, name) or info.is_required() for name, info in type(op).model_fields.items())


def _kind(op: type[Op], name: str) -> Any:
    """The type of one value of a parameter."""
    settings = op.settings()
    return settings[name].kind if name in settings else op.model_fields[name].annotation


def _schema(kind: Any) -> str:
    return str(TypeAdapter(kind).json_schema().get("type", ""))


def _is_share(kind: Any) -> bool:
    found = TypeAdapter(kind).json_schema()
    return found.get("type") == "number" and found.get("maximum") == 1


def _sample(kind: Any) -> Any:
    """A value of a type, in the middle of its range."""
    found = TypeAdapter(kind).json_schema()
    if "const" in found:
        return found["const"]
    if "enum" in found:
        return found["enum"][0]
    low, high = found.get("minimum", found.get("exclusiveMinimum")), found.get("maximum", found.get("exclusiveMaximum"))
    if found.get("type") == "number":
        return 0.4 if high is None or low is None else low + 0.4 * (high - low)
    if found.get("type") == "integer":
        return (low or 0) + 1
    if found.get("type") == "boolean":
        return True
    if found.get("type") == "string":
        return "text"
    raise TypeError(f"no value of {kind} can be thought of: give the cases in the test class")


def _at(case: Case) -> tuple[Any, ...]:
    return case.op.values_at(Place("w"), range(case.inputs))


def _resolved(case: Case) -> Op:
    """The op as a plan holds it."""
    return case.op.resolved(_at(case))


def _cut(case: Case) -> str:
    """How the op with these parameters can be cut."""
    return _resolved(case).cut


def _deltas_only(case: Case) -> bool:
    return isinstance(case.op, DeltaOp) and case.op.deltas_only


def _count(case: Case) -> int:
    return case.inputs + case.based


def _spaces(case: Case) -> tuple[Any, list[Any]]:
    return ("weight" if case.based else None), ["delta" if _deltas_only(case) else "weight"] * case.inputs


def _plain(value: Any) -> Any:
    """A parameter as a recipe writes it."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_none=True)
    return [_plain(one) for one in value] if isinstance(value, tuple | list) else value


def _shown(value: Any) -> str:
    return f"[{','.join(map(_shown, value))}]" if isinstance(value, tuple) else str(value)


def _recipe(
    case: Case, *, folder: str | Path = ".", on_inputs: Mapping[str, Any] | None = None, **changed: Any
) -> Recipe:
    """A recipe whose node `merged` is the case, over the models `base`, `model_0`, `model_1`, ..."""
    fields = {name: _plain(value) for name, value in _fields(case.op).items() if not isinstance(value, Each)}
    fields = {name: value for name, value in fields.items() if value is not None and name not in (on_inputs or {})}
    each = {name: list(value) for name, value in _fields(case.op).items() if isinstance(value, Each)}
    names = [f"model_{i}" for i in range(case.inputs)]
    models: list[Any] = (
        [{"op": "task_vector", "base": "base", "model": n} for n in names] if _deltas_only(case) else names
    )
    node: dict[str, Any] = {"op": case.op.name, **fields, **changed}
    if case.based:
        node["base"] = "base"
    data = {"rows": "./rows.jsonl"} if isinstance(case.op, StageOp) and case.op.needs_data else {}
    if case.op.takes == "model":
        node |= {"model": models[0], **({"data": "rows"} if data else {})}
    else:
        beside = {key: f"{key}_statistics" for key in case.op.input_keys} | ({"data": "rows"} if data else {})
        own = [
            {**beside, **(on_inputs or {}), **{name: values[i] for name, values in each.items()}}
            for i in range(case.inputs)
        ]
        node["inputs"] = [{"model": model, **given} for model, given in zip(models, own, strict=True)]
    unknown = node.keys() - node_section(type(case.op)).model_fields.keys()
    assert not unknown, f"the grammar of {case.op.name} lacks {', '.join(unknown)}"
    read = (["base"] if case.based else []) + names
    return Recipe(
        folder=folder,
        models={name: f"./{name}" for name in read},
        nodes={"merged": node},
        **({"artifacts": {f"{key}_statistics": "./kept" for key in case.op.input_keys}} if case.op.input_keys else {}),
        **({"data": data} if data else {}),
    )


# Tensors

_LITTLE, _ONE = (12, 25), (1, 1)
_KINDS = ("normal", "grid", "sparse", "equal", "tiny", "zero", "ones")


def _values(shape: tuple[int, ...], kind: str, seed: int, dtype: dtype | None = None) -> Tensor:
    """A tensor like a model's; on a grid, so that many magnitudes are equal; mostly zeros; or one of the odd kinds."""
    import torch

    draw = torch.Generator().manual_seed(seed if kind != "equal" else 0)
    found = torch.randn(shape, generator=draw, dtype=torch.float64) * 0.02
    if kind == "grid":
        found = torch.randint(-5, 6, shape, generator=draw).double() / 64
    elif kind == "sparse":
        found = found * (torch.rand(shape, generator=draw) < 0.1)
    elif kind in ("tiny", "zero", "ones"):
        found = {"tiny": found * 1e-30, "zero": torch.zeros(shape), "ones": torch.ones(shape)}[kind].double()
    return found.to(dtype or torch.float32)


def _shapes(op: type[Op]) -> tuple[tuple[int, ...], ...]:
    matrices = ((1, 1), (2, 3), (3, 2), (1, 4), (4, 1), (0, 3), (3, 0), (9, 7))
    return matrices if op.matrices_only else (*matrices, (), (0,), (1,), (2,), (33,), (2, 3, 4), (2, 0, 4))


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.float().isfinite().all())


def _same_bits(first: Tensor, second: Tensor) -> bool:
    import torch

    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[first.element_size()]
    same = first.dtype == second.dtype and first.shape == second.shape
    return same and torch.equal(first.contiguous().view(kind), second.contiguous().view(kind))


def _difference(first: Tensor, second: Tensor) -> str:
    if first.shape != second.shape or first.dtype != second.dtype:
        return f"{tuple(first.shape)} of {first.dtype}, {tuple(second.shape)} of {second.dtype}"
    other = first != second
    largest = (first.double() - second.double()).abs().max() if first.numel() else 0
    return f"{int(other.sum())} of {first.numel()} elements, by up to {float(largest):.3g}"


# Driving an op


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One thread in an op, as in a run: a matrix product's bits depend on it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _called(case: Case, tensors: Sequence[Tensor], seed: int = 0) -> Tensor:
    """The op on plain tensors, the base first where the case has one."""
    with _one_thread():
        if case.based:
            return case.op(tensors[0], list(tensors[1:]), seed=seed)
        return case.op(list(tensors), seed=seed)


def _given(case: Case, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor | None]:
    """What planning hands to an op for these weights, and the base that is added to what comes out."""
    given = list(tensors)
    if case.based and (case.op.may_base or (isinstance(case.op, DeltaOp) and not case.op.deltas_only)):
        given = [given[0], *(tensor - given[0] for tensor in given[1:])]
    return (given[1:], given[0]) if case.based and case.op.may_base else (given, None)


def _in_blocks(case: Case, given: Sequence[Tensor], shape: tuple[int, ...], elements: int, group: int = 1) -> Tensor:
    """The op measured and computed in blocks of about so many elements, as the executor does it.

    Measures of `group` neighbouring blocks are merged first, as those of a segment are that a thread has made.
    """
    import torch

    ready = _resolved(case)
    known: tuple[Any, ...] = ()
    keys = tuple(range(1, case.inputs + 1)) if case.op.draws else ()
    with _one_thread(), torch.inference_mode():
        while (reduction := ready.reduction(known)) is not None:
            blocks = _blocks(given, reduction.cut, shape, elements)
            if reduction.sample:
                blocks = [(0, [spread(tensor.reshape(-1)) for tensor in given])]
            parts = [reduction.block(block, Block(start, known, shape, keys)) for start, block in blocks]
            segments = [_merged(reduction, parts[i : i + group]) for i in range(0, len(parts), group)]
            known = (*known, reduction.finish(_merged(reduction, segments)))
        made = [
            ready.compute(block, Block(start, known, shape, keys)).reshape(-1)
            for start, block in _blocks(given, ready.cut, shape, elements)
        ]
    return torch.cat(made).reshape(shape)


def _blocks(given: Sequence[Tensor], cut: Any, shape: tuple[int, ...], elements: int) -> list[tuple[int, list[Tensor]]]:
    """Where each block starts, and its part of every tensor."""
    whole = [cut_as(tensor, cut, shape) for tensor in given]
    if cut == "tensor":
        return [(0, whole)]
    width = max(whole[0].shape[-1], 1) if cut == "row" else 1
    step = max(elements // width, 1)
    return [
        (start * width, [tensor[start : start + step] for tensor in whole])
        for start in range(0, max(len(whole[0]), 1), step)
    ]


def _merged(reduction: Reduction, parts: Sequence[Any]) -> Any:
    total = parts[0]
    for part in parts[1:]:
        total = reduction.merge([total, part])
    return total


# Files


def _save(folder: Path, tensors: Mapping[str, Tensor], shards: int) -> None:
    """A checkpoint with the tensors in this order, which safetensors' own writer does not keep; in one file, or dealt to several."""
    import torch

    folder.mkdir(parents=True)
    home = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(home.values()):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        data = b""
        for name, tensor in tensors.items():
            if home[name] == file:
                raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
                kind = "F32" if tensor.is_floating_point() else "I64"
                offsets = [len(data), len(data) + len(raw)]
                header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": offsets}
                data += raw
        text = json.dumps(header).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text + data)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": home}))


def _weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def _least_memory(recipe: Recipe) -> int:
    """The least of 64, 128 and 256 MiB that a run can do with. Raises MachineError where that is too little."""
    from mergeflow.pipeline import Budget, plan

    made = plan(recipe)
    for memory in (_SMALL_MEMORY, 2 * _SMALL_MEMORY):
        with contextlib.suppress(MachineError):
            Budget.of(made, memory, 1)
            return memory
    Budget.of(made, 4 * _SMALL_MEMORY, 1)
    return 4 * _SMALL_MEMORY


# What tests need


def _strategies() -> Any:
    from hypothesis import strategies

    return strategies


def _raises(error: type[BaseException]) -> Any:
    import pytest

    return pytest.raises(error)


def _environment() -> dict[str, str]:
    """The environment of a process that finds the modules that this one finds."""
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}

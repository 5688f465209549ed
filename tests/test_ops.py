"""Each op against a slow float64 reference written from its formula, and the rules that hold for all of them."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

import mergeflow.ops as ops
from mergeflow.errors import RecipeError
from mergeflow.ops import (
    LEAF,
    OPS,
    Add,
    Block,
    Cast,
    DeltaOp,
    Linear,
    Op,
    Passthrough,
    Scale,
    Select,
    Slerp,
    TaskArithmetic,
    TaskVector,
    Ties,
    Unchanged,
    all_ops,
    op_named,
)
from mergeflow.ops.deltas import kept_of
from mergeflow.settings import Each, Place

Array = NDArray[np.float64]
quick = settings(max_examples=60, deadline=None)


# What a run does with an op, on tensors at hand and in blocks of any size.


def resolved(op: Op, count: int) -> Any:
    return op.resolved(op.values_at(Place("w"), range(count)))


def in_blocks(op: Op, tensors: Sequence[torch.Tensor], leaves: int) -> torch.Tensor:
    """The op over flat tensors of the compute dtype (the base first), measured and computed in blocks of so many leaves."""
    given = list(tensors)
    if isinstance(op, DeltaOp) and not op.deltas_only:
        given = [given[0], *(tensor - given[0] for tensor in given[1:])]
    size = leaves * LEAF
    starts = range(0, max(len(given[0]), 1), size)
    blocks = [[tensor[start : start + size] for tensor in given] for start in starts]
    ready = resolved(op, len(given) - op.needs_base)
    known: tuple[Any, ...] = ()
    while (reduction := ready.reduction(known)) is not None:
        total = None
        for start, block in zip(starts, blocks, strict=True):
            part = reduction.block(block, Block(start, known))
            total = part if total is None else reduction.merge([total, part])
        known = (*known, reduction.finish(total))
    return torch.cat([ready.compute(block, Block(start, known)) for start, block in zip(starts, blocks, strict=True)])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(kind), b.view(kind))


def close(got: torch.Tensor, want: Array, tolerance: float = 1e-6, terms: Array | None = None) -> None:
    """Relative L2 distance, and no single element far off; `terms` is the size of what was summed, where it may cancel."""
    difference = got.double().numpy().reshape(-1) - np.asarray(want).reshape(-1)
    size = np.abs(want if terms is None else terms).reshape(-1)
    assert np.isfinite(difference).all()
    assert np.linalg.norm(difference) <= tolerance * np.linalg.norm(size) + 1e-12
    assert np.abs(difference).max(initial=0) <= 10 * tolerance * size.max(initial=1e-6)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32, spread: float = 0.02) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread).to(dtype)


# The references: float64, sorted, element by element; deltas are taken in float32, since thresholds are found there.


def doubles(*tensors: torch.Tensor) -> list[Array]:
    return [tensor.double().numpy() for tensor in tensors]


def reference_trim(tau: Array, k: int) -> Array:
    flat = tau.reshape(-1)
    order = sorted(range(len(flat)), key=lambda index: (-abs(flat[index]), index))
    kept = np.zeros_like(flat)
    kept[order[:k]] = flat[order[:k]]
    return kept.reshape(tau.shape)


def reference_rescale(before: Array, after: Array, kind: str, density: float) -> Array:
    if kind == "none":
        return after
    if kind == "probability":
        return after / density
    order = {"l1": 1, "l2": 2, "linf": np.inf}[kind]
    old, new = np.linalg.norm(before.reshape(-1), order), np.linalg.norm(after.reshape(-1), order)
    return after if old < 1e-7 or new < 1e-7 else after * (old / new)


def reference_ties(
    base: Array,
    deltas: Sequence[Array],
    weights: Sequence[float],
    densities: Sequence[float],
    *,
    rounding: str = "floor",
    rescale: str = "none",
    vote: str = "mass",
    normalize: bool = True,
    scale: float = 1.0,
) -> Array:
    n = base.size
    products = []
    for tau, weight, density in zip(deltas, weights, densities, strict=True):
        part = tau
        if density != 1:
            exact = density * n
            k = {"floor": int(exact), "nearest": math.floor(exact + 0.5), "ceil": math.ceil(exact)}[rounding]
            part = reference_rescale(tau, reference_trim(tau, min(n, max(1, k))), rescale, density)
        products.append(weight * part)
    result = base.copy().reshape(-1)
    for index in range(n):
        entries = [float(product.reshape(-1)[index]) for product in products]
        ballot = sum(entries) if vote == "mass" else sum(np.sign(entry) for entry in entries)
        elected = 1 if ballot >= 0 else -1
        agree = [entry != 0 and np.sign(entry) == elected for entry in entries]
        merged = sum(entry for entry, yes in zip(entries, agree, strict=True) if yes)
        if normalize:
            divisor = sum(weight for weight, yes in zip(weights, agree, strict=True) if yes)
            merged = 0 if abs(divisor) < 1e-8 else merged / divisor
        result[index] += scale * merged
    return result.reshape(base.shape)


def reference_slerp(a: Array, b: Array, t: float) -> Array:
    dot = float(np.sum(a * b)) / ((math.sqrt(np.sum(a * a)) or 1) * (math.sqrt(np.sum(b * b)) or 1))
    if abs(dot) > 0.9995:
        return (1 - t) * a + t * b
    angle = math.acos(dot)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


# Against the references.

weights_of = st.lists(st.floats(-2, 2).map(lambda x: round(x, 3)), min_size=1, max_size=4)
shapes = st.sampled_from([(), (1,), (7,), (3, 5), (2, 3, 4), (257,)])
grids = st.integers(0, 2**31)


@quick
@given(weights=weights_of, shape=shapes, seed=grids, normalize=st.booleans(), wide=st.booleans())
def test_linear_is_the_weighted_mean(
    weights: list[float], shape: tuple[int, ...], seed: int, normalize: bool, wide: bool
) -> None:
    tensors = [
        normal(*shape, seed=seed + i, dtype=torch.float64 if wide else torch.float32) for i in range(len(weights))
    ]
    op = Linear(weight=weights, normalize=normalize)
    if normalize and abs(sum(weights)) < 1e-8:
        return
    divisor = sum(weights) if normalize else 1.0
    inputs = doubles(*tensors)
    want = sum(w * x for w, x in zip(weights, inputs, strict=True)) / divisor
    close(op(tensors), want, terms=sum(np.abs(w * x) for w, x in zip(weights, inputs, strict=True)) / divisor)


@quick
@given(weights=weights_of, shape=shapes, seed=grids, scale=st.sampled_from([1.0, 0.3, -2.0]))
def test_task_arithmetic_and_add_are_weighted_sums_of_deltas(
    weights: list[float], shape: tuple[int, ...], seed: int, scale: float
) -> None:
    base, *tensors = [normal(*shape, seed=seed + i) for i in range(len(weights) + 1)]
    origin, *inputs = doubles(base, *tensors)
    want = origin + scale * sum(w * (x - origin) for w, x in zip(weights, inputs, strict=True))
    terms = np.abs(origin) + sum(abs(scale * w) * np.abs(x - origin) for w, x in zip(weights, inputs, strict=True))
    close(TaskArithmetic(weight=weights, scale=scale)(base, tensors), want, terms=terms)
    want = origin + sum(w * x for w, x in zip(weights, inputs, strict=True))
    terms = np.abs(origin) + sum(np.abs(w * x) for w, x in zip(weights, inputs, strict=True))
    close(Add(weight=weights)(base, tensors), want, terms=terms)


def test_task_arithmetic_divides_by_the_weights_when_asked() -> None:
    base, a, b = (normal(40, seed=i) for i in range(3))
    origin, x, y = doubles(base, a, b)
    got = TaskArithmetic(weight=[0.5, 1.0], normalize=True, scale=2)(base, [a, b])
    close(got, origin + 2 * (0.5 * (x - origin) + (y - origin)) / 1.5)


def test_task_vector_scale_and_passthrough_are_elementwise() -> None:
    base, model = normal(3, 4, seed=1), normal(3, 4, seed=2)
    close(TaskVector()(base, model), np.subtract(*doubles(model, base)))
    close(Scale(by=-0.3)(model), -0.3 * doubles(model)[0])
    close(Passthrough(scale=3.0)(model), 3 * doubles(model)[0])
    assert same_bits(Passthrough()(model), model)


@quick
@given(t=st.floats(0, 1), shape=shapes, seed=grids, wide=st.booleans())
def test_slerp_goes_along_the_arc(t: float, shape: tuple[int, ...], seed: int, wide: bool) -> None:
    a, b = (normal(*shape, seed=seed + i, dtype=torch.float64 if wide else torch.float32) for i in range(2))
    got = Slerp(t=t)([a, b])
    close(got, reference_slerp(*doubles(a, b), t), terms=np.abs(doubles(a)[0]) + np.abs(doubles(b)[0]))


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
def test_slerp_of_parallel_opposite_and_zero_tensors_is_finite(t: float) -> None:
    a, zero = normal(100, seed=3), torch.zeros(100)
    for first, second in ((a, a), (a, 2 * a), (a, -a), (a, zero), (zero, a), (zero, zero)):
        close(Slerp(t=t)([first, second]), reference_slerp(*doubles(first, second), t))


def test_slerp_ends_are_the_inputs_bit_for_bit() -> None:
    a, b = normal(50, seed=4), normal(50, seed=5)
    assert same_bits(Slerp(t=0.0)([a, b]), a)
    assert same_bits(Slerp(t=1.0)([a, b]), b)
    assert not resolved(Slerp(t=1.0), 2).measures


@st.composite
def ties_cases(draw: st.DrawFn) -> dict[str, Any]:
    """Values on a coarse grid, so that magnitudes tie in masses, and weights that make every sum exact."""
    count = draw(st.integers(1, 4))
    shape = draw(st.sampled_from([(), (1,), (2,), (5,), (33,), (4, 9), (2, 3, 7)]))
    size = math.prod(shape)
    columns = st.lists(st.integers(-5, 5), min_size=size, max_size=size)
    values = [np.array(draw(columns), dtype=np.float64).reshape(shape) / 64 for _ in range(count + 1)]
    return {
        "base": values[0],
        "inputs": [values[0] + value for value in values[1:]],
        "weights": draw(st.lists(st.sampled_from([0.5, 1.0, 2.0, -1.0, 0.0, 0.75]), min_size=count, max_size=count)),
        "densities": draw(st.lists(st.sampled_from([0.01, 0.2, 0.25, 0.5, 0.9, 1.0]), min_size=count, max_size=count)),
        "options": {
            "rounding": draw(st.sampled_from(["floor", "nearest", "ceil"])),
            "rescale": draw(st.sampled_from(["none", "l1", "l2", "linf", "probability"])),
            "vote": draw(st.sampled_from(["mass", "count"])),
            "normalize": draw(st.booleans()),
            "scale": draw(st.sampled_from([1.0, 0.5, -1.5])),
        },
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
    }


@settings(max_examples=150, deadline=None)
@given(case=ties_cases())
def test_ties_is_what_a_sort_gives_in_every_variant(case: dict[str, Any]) -> None:
    base = torch.tensor(case["base"], dtype=case["dtype"])
    inputs = [torch.tensor(value, dtype=case["dtype"]) for value in case["inputs"]]
    options = case["options"]
    got = Ties(weight=case["weights"], density=case["densities"], **options)(base, inputs)
    if options["rescale"] in ("l1", "l2", "probability"):
        # A factor that is no power of two makes near-cancelling masses a matter of rounding: look at one input at a time.
        weights, densities, inputs = case["weights"][:1], case["densities"][:1], inputs[:1]
        got = Ties(weight=weights, density=densities, **options)(base, inputs)
    else:
        weights, densities = case["weights"], case["densities"]
    deltas = [value - case["base"] for value in case["inputs"]][: len(inputs)]
    close(got, reference_ties(case["base"], deltas, weights, densities, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("density", [0.003, 0.2, 0.77])
def test_ties_of_weights_like_a_models_is_what_a_sort_gives(dtype: torch.dtype, density: float) -> None:
    base = normal(60, 50, seed=1, dtype=dtype)
    inputs = [(base.double() + normal(60, 50, seed=2 + i, spread=0.001).double()).to(dtype) for i in range(3)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    deltas = doubles(*(x.to(wide) - base.to(wide) for x in inputs))
    kept = [kept_of(3000, density, "floor")] * 3
    products = [reference_trim(tau, k) * w for tau, k, w in zip(deltas, kept, [0.5, 0.3, 0.7], strict=True)]
    want = reference_ties(doubles(base)[0], deltas, [0.5, 0.3, 0.7], [density] * 3)
    sure = np.abs(sum(products)) >= 1e-6 * sum(np.abs(product) for product in products)
    got = in_blocks(Ties(density=density, weight=[0.5, 0.3, 0.7]), [x.to(wide).reshape(-1) for x in (base, *inputs)], 1)
    close(got.reshape(60, 50) * torch.from_numpy(sure), want * sure)


def test_trim_keeps_the_lowest_index_first_among_equals_across_leaves() -> None:
    size = 3 * LEAF + 100
    base, delta = torch.zeros(size), torch.full((size,), 0.5)
    delta[::2] = -0.5
    delta[7] = 2.0
    for keep in (1, 2, LEAF, LEAF + 1, 2 * LEAF + 5, size - 1, size):
        got = in_blocks(Ties(density=(keep + 0.5) / size if keep < size else 1.0), [base, delta], 1)
        expected = torch.zeros(size)
        expected[7] = 2.0
        others = torch.tensor([index for index in range(keep + 1) if index != 7][: keep - 1], dtype=torch.long)
        expected[others] = delta[others]
        assert torch.equal(got, expected), keep


@pytest.mark.parametrize(
    ("rounding", "expected"), [("floor", [1, 1, 3, 10]), ("nearest", [1, 2, 3, 10]), ("ceil", [1, 2, 4, 10])]
)
def test_a_density_becomes_a_count_as_its_rounding_says(rounding: Any, expected: list[int]) -> None:
    assert [kept_of(10, density, rounding) for density in (0.01, 0.15, 0.31, 1.0)] == expected
    assert kept_of(0, 0.5, rounding) == 0
    for density in (0.01, 0.15, 0.31):
        merged = Ties(density=density, rounding=rounding)(torch.zeros(10), [torch.arange(1.0, 11.0)])
        assert int(merged.count_nonzero()) == kept_of(10, density, rounding)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_thresholds_are_exact_to_the_last_bit(kind: torch.dtype) -> None:
    """All magnitudes share their leading bits, so every round of the selection is needed."""
    whole = torch.int32 if kind == torch.float32 else torch.int64
    one = torch.ones(1, dtype=kind).view(whole)
    delta = (one + torch.randperm(5000, generator=torch.Generator().manual_seed(0)).to(whole)).view(kind)
    got = Ties(density=0.1)(torch.zeros_like(delta), [delta])
    assert torch.equal(got != 0, delta >= delta.sort(descending=True).values[499])


def test_subnormal_magnitudes_are_trimmed_like_others() -> None:
    delta = torch.arange(1, 9, dtype=torch.int32).view(torch.float32)
    assert torch.equal(Ties(density=0.5)(torch.zeros(8), [delta]), torch.where(torch.arange(8) >= 4, delta, 0.0))


@pytest.mark.parametrize("rescale", ["l1", "l2", "linf", "probability"])
def test_rescale_makes_up_for_what_was_trimmed(rescale: Any) -> None:
    base, delta = torch.zeros(2 * LEAF + 11), normal(2 * LEAF + 11, seed=8, dtype=torch.bfloat16).float()
    got = in_blocks(Ties(density=0.3, rescale=rescale), [base, delta], 1)
    k = kept_of(len(delta), 0.3, "floor")
    order = np.argsort(-np.abs(delta.numpy()), kind="stable")[:k]
    kept = np.zeros(len(delta))
    kept[order] = delta.numpy()[order]
    close(got, reference_rescale(delta.double().numpy(), kept, rescale, 0.3))


@pytest.mark.parametrize("rescale", ["l1", "l2"])
@pytest.mark.parametrize("keep", [0.1, 0.9])
def test_rescale_of_a_delta_that_is_mostly_zero_or_all_zero_is_finite(rescale: Any, keep: float) -> None:
    delta = torch.zeros(100)
    assert torch.equal(Ties(density=keep, rescale=rescale)(torch.ones(100), [torch.ones(100)]), torch.ones(100))
    delta[3] = 0.5
    assert torch.equal(Ties(density=keep, rescale=rescale)(torch.zeros(100), [delta]), delta)


def test_a_vote_by_count_hears_the_many_and_one_by_mass_the_great() -> None:
    base = torch.zeros(1)
    inputs = [torch.tensor([5.0]), torch.tensor([-1.0]), torch.tensor([-2.0])]
    assert Ties(vote="mass")(base, inputs).item() == 5.0
    assert Ties(vote="count")(base, inputs).item() == -1.5


def test_a_drawn_vote_counts_as_plus_and_a_divisor_of_zero_gives_no_delta() -> None:
    assert Ties()(torch.zeros(1), [torch.tensor([2.0]), torch.tensor([-2.0])]).item() == 2.0
    assert Ties(weight=[1.0, -1.0])(torch.ones(1), [torch.tensor([3.0]), torch.tensor([-1.0])]).item() == 1.0
    # 0.7 - 0.6 - 0.1 is 0 but for rounding, and in float32 4e-8
    inputs = [torch.tensor([2.0]), torch.tensor([0.0]), torch.tensor([0.0])]
    assert Ties(weight=[0.7, -0.6, -0.1])(torch.ones(1), inputs).item() == 1.0


def test_a_nan_in_a_delta_shows_in_the_result_and_leaves_the_rest_alone() -> None:
    base, a, b = torch.zeros(1000), normal(1000, seed=1), normal(1000, seed=2)
    clean = Ties(density=0.2)(base, [a, b])
    for bad in (float("nan"), float("inf")):
        spoilt = a.clone()
        spoilt[123] = bad
        got = Ties(density=0.2, rescale="l1")(base, [spoilt, b])
        assert not got[123].isfinite()
        assert int((~got.isfinite()).sum()) == 1
        got = Ties(density=0.2)(base, [spoilt, b])
        assert int((got != clean).sum()) <= 2  # the entry itself, and the one it pushed under the threshold
    everything = torch.full((1000,), float("nan"))
    assert Ties(density=0.2)(base, [everything, b]).isnan().all()


def test_cast_rounds_to_the_nearest_and_shows_what_overflows() -> None:
    tensor = normal(1000, seed=1, spread=1.0)
    assert torch.equal(Cast(to="float16")(tensor), torch.from_numpy(tensor.numpy().astype(np.float16)))
    bits = tensor.numpy().view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    assert torch.equal(Cast(to="bfloat16")(tensor).float(), torch.from_numpy(rounded))
    large = torch.tensor([1.0, 1e6])
    for name in ("float16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"):
        op = resolved(Cast(to=name), 1)
        assert op.compute([large], Block()).isfinite().tolist() == [True, False], name
        assert op.result_dtype() == name
        assert str(Cast(to=name)(torch.ones(3)).dtype) == f"torch.{name}"


# What the conformance suite (test_conformance.py) does not know.


@quick
@given(seed=grids, count=st.integers(1, 5), density=st.sampled_from([0.2, 1.0]))
def test_equal_deltas_merge_to_one_of_them(seed: int, count: int, density: float) -> None:
    base, tensor = normal(50, seed=seed), normal(50, seed=seed + 1)
    alone = Ties(density=density)(base, [tensor])
    close(Ties(density=density)(base, [tensor] * count), doubles(alone)[0], 3e-7)
    if density == 1.0:
        close(alone, doubles(tensor)[0], 3e-7)
        close(TaskArithmetic(normalize=True)(base, [tensor] * count), doubles(tensor)[0], 3e-7)


def test_ops_know_which_input_they_are_bit_for_bit() -> None:
    assert resolved(Linear(weight=0.3), 1).only_input(1) == 0
    assert resolved(Linear(weight=0.3, normalize=False), 1).only_input(1) is None
    assert resolved(Linear(normalize=False), 1).only_input(1) == 0
    assert resolved(Linear(), 2).only_input(2) is None
    assert [resolved(Slerp(t=t), 2).only_input(2) for t in (0.0, 0.5, 1.0)] == [0, None, 1]
    assert [resolved(Passthrough(scale=s), 1).only_input(1) for s in (1.0, 2.0)] == [0, None]
    assert [resolved(Scale(by=s), 1).only_input(1) for s in (1.0, 2.0)] == [0, None]


def test_only_what_is_trimmed_or_turned_is_measured() -> None:
    assert [resolved(op, 2).measures for op in (Ties(), Ties(density=0.5), Slerp(t=0.5), Linear())] == [
        False,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("op", [Linear(weight=[1.0, -1.0]), TaskArithmetic(weight=[0.5, -0.5], normalize=True)])
def test_weights_that_sum_to_zero_are_refused_where_they_divide(op: Op) -> None:
    with pytest.raises(RecipeError, match="sum of the weights, which is 0"):
        resolved(op, 2)
    resolved(op.model_copy(update={"normalize": False}), 2)


# Spaces.


def test_spaces_that_do_not_go_together_are_refused_with_the_sentence_that_mends_it() -> None:
    assert Linear().space(None, ["weight", "weight"]) == "weight"
    assert Linear().space(None, ["delta", "delta"]) == "delta"
    assert TaskVector().space("weight", ["weight"]) == "delta"
    assert Ties().space("weight", ["weight", "delta"]) == "weight"
    assert Add().space("weight", ["delta"]) == "weight"
    for op, base, inputs, words in (
        (Linear(), None, ["weight", "delta"], "mixes delta and weight"),
        (TaskVector(), "weight", ["delta"], "subtracts a base"),
        (TaskVector(), "delta", ["weight"], "subtracts a base"),
        (Ties(), "delta", ["weight"], "base of ties is a delta"),
        (Ties(), "weight", ["statistics"], "cannot use statistics"),
        (Add(), "weight", ["delta", "weight"], "adds deltas"),
    ):
        with pytest.raises(RecipeError, match=words) as caught:
            op.space(base, inputs)  # type: ignore[arg-type]
        assert caught.value.fix


# Integer and boolean tensors.


def test_integer_tensors_pass_when_all_agree_and_never_are_computed_on() -> None:
    a, other, zero = torch.arange(5), torch.arange(1, 6), torch.zeros(5, dtype=torch.int64)
    assert Unchanged(deltas=(False, False)).compute([a, a.clone()], Block()) is a
    assert Unchanged(deltas=(False, True)).compute([a, zero], Block()) is a
    assert torch.equal(Unchanged(deltas=(False, False), gives_delta=True).compute([a, a.clone()], Block()), zero)
    assert Unchanged(deltas=(True, True), gives_delta=True).compute([zero, zero], Block()) is zero
    flags = torch.tensor([True, False])
    assert Unchanged(deltas=(False,)).compute([flags], Block()) is flags
    for deltas, tensors in (((False, False), [a, other]), ((False, True), [a, other]), ((True,), [other])):
        with pytest.raises(RecipeError, match="select"):
            Unchanged(deltas=deltas).compute(tensors, Block())


# Classes.


def test_an_op_is_called_on_plain_tensors_and_refuses_what_makes_no_sense() -> None:
    a, b = torch.ones(3), torch.zeros(3)
    for call, words in (
        (lambda: Slerp(t=0.5)([a]), "got 1 inputs, not 2"),
        (lambda: Ties()(a), "got 0 inputs, not 1 or more"),
        (lambda: Linear(weight=[1.0])([a, b]), "1 values of `weight` for 2 inputs"),
        (lambda: Linear()([a, torch.ones(4)]), "different shapes"),
        (lambda: Linear()([a, torch.arange(3)]), "never computed on"),
        (lambda: Linear(weight={"gradient": [0.0, 1.0]})([a, b]), "needs the names of a model"),
        (lambda: Select()([a]), "chooses tensors by name"),
    ):
        with pytest.raises(RecipeError, match=words):
            call()


def test_parameters_that_do_not_exist_or_do_not_fit_are_pydantics_errors() -> None:
    for build in (
        lambda: Ties(densty=0.2),  # type: ignore[call-arg]
        lambda: Ties(density=0.0),
        lambda: Ties(density=1.5),
        lambda: Ties(density="0.5"),
        lambda: Ties(rounding="up"),  # type: ignore[arg-type]
        lambda: Linear(weight=math.nan),
        lambda: Linear(normalize=1),
        lambda: Slerp(t=-0.1),
        lambda: Slerp(),
        lambda: Cast(to="int8"),
        lambda: Add(scale=2.0),  # type: ignore[call-arg]
        lambda: Select(rules=[]),  # type: ignore[call-arg]
    ):
        with pytest.raises(ValidationError):
            build()
    with pytest.raises(TypeError, match="abstract"):
        DeltaOp()  # type: ignore[abstract]


def test_settings_of_an_op_are_resolved_at_a_place() -> None:
    op = Ties(weight=[0.5, {"gradient": [0.0, 1.0]}], density=[{"match": "*.mlp.*", "value": 0.1}, {"value": 0.9}])
    ready = op.resolved(op.values_at(Place("layers.1.mlp.w", 1, (0, 1, 2)), [1]))
    assert (ready.weight, ready.density, ready.normalize) == (Each((0.5,)), Each((0.1,)), True)
    assert not op.uniform
    assert set(Ties.settings()) == {"weight", "density", "normalize", "scale"}


def test_every_op_of_the_list_has_a_name_of_its_own_and_those_of_planning_are_not_in_it() -> None:
    assert len({op.name for op in OPS}) == len(OPS)
    assert Unchanged not in OPS


def test_an_unknown_op_gets_the_nearest_name() -> None:
    with pytest.raises(RecipeError) as caught:
        op_named("task-arithmetics")
    assert str(caught.value) == "unknown op 'task-arithmetics'. Did you mean 'task_arithmetic'?"


class Doubled(Op):
    """Twice a model."""

    name = "doubled"
    formula = "2 theta"

    def compute(self, inputs: Sequence[torch.Tensor], block: Block) -> torch.Tensor:
        return inputs[0] * 2


def test_ops_of_other_packages_are_found_by_their_entry_points_and_cannot_hide_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def found(group: str) -> list[EntryPoint]:
        assert group == "mergeflow.ops"
        return [EntryPoint(name, value, group) for name, value in entries.items()]

    monkeypatch.setattr(ops, "entry_points", found)
    entries = {"doubled": f"{__name__}:Doubled", "linear": "nowhere:Linear"}
    assert op_named("doubled") is Doubled
    assert op_named("linear") is Linear
    assert list(all_ops()) == [*(op.name for op in OPS), "doubled"]
    with pytest.raises(RecipeError, match="Did you mean 'doubled'"):
        op_named("doubld")
    entries = {"halved": "nowhere_at_all:Halved", "twice": f"{__name__}:Doubled"}
    for name, words in (("halved", "cannot be loaded"), ("twice", "is not an op called 'twice'")):
        with pytest.raises(RecipeError, match=words):
            op_named(name)


def test_naming_every_op_and_its_schema_loads_no_torch() -> None:
    code = (
        "import sys; from mergeflow.ops import OPS, Ties, Slerp; [op.model_json_schema() for op in OPS];"
        " Ties(density=0.2); Slerp(t=0.5); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

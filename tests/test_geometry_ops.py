"""Ops on angles, on what differs and on what stands out, against float64 references written from their formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import save, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from mergeflow import RecipeError, load_recipe, run
from mergeflow.ops import (
    LEAF,
    ArceeFusion,
    Block,
    DeltaOp,
    Karcher,
    ModelStock,
    MultiSlerp,
    NearSwap,
    NuSlerp,
    Op,
    Ram,
    RamPlus,
    Sce,
    Slerp,
    measure,
)
from mergeflow.ops.base import cut_as
from mergeflow.settings import Place

Array = NDArray[np.float64]
quick = settings(max_examples=25, deadline=None)
shapes = st.sampled_from([(), (1,), (7,), (3, 5), (2, 3, 4), (257,), (64, 3)])
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([torch.float32, torch.float64])


def resolved(op: Op, count: int) -> Any:
    return op.resolved(op.values_at(Place("w"), range(count)))


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32, spread: float = 0.02) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread).to(dtype)


def family(
    count: int, *shape: int, seed: int, dtype: torch.dtype = torch.float32, shared: float = 0.5
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base and fine-tunes of it, whose deltas have a part in common."""
    base, common = normal(*shape, seed=seed, dtype=dtype), normal(*shape, seed=seed + 1, dtype=dtype)
    return base, [base + shared * common + normal(*shape, seed=seed + 2 + i, dtype=dtype) for i in range(count)]


def doubles(*tensors: torch.Tensor) -> list[Array]:
    return [tensor.double().numpy() for tensor in tensors]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(kind), b.view(kind))


def close(got: torch.Tensor, want: Array, tolerance: float = 1e-6, terms: Array | None = None) -> None:
    """Relative L2 distance; `terms` is the size of what was summed, where it may cancel."""
    difference = got.double().numpy().reshape(-1) - np.asarray(want).reshape(-1)
    assert np.isfinite(difference).all()
    size = np.abs(want if terms is None else terms)
    assert np.linalg.norm(difference) <= tolerance * np.linalg.norm(size) + 1e-12


def in_blocks(op: Op, tensors: Sequence[torch.Tensor], shape: tuple[int, ...], leaves: int, rows: int) -> torch.Tensor:
    """The op over tensors of the compute dtype, the base first: blocks of so many leaves, or of so many rows."""
    given = [tensor.reshape(-1) for tensor in tensors]
    if isinstance(op, DeltaOp):
        given = [given[0], *(tensor - given[0] for tensor in given[1:])]
    ready = resolved(op, len(given) - op.needs_base)

    def blocks(cut: Any) -> list[tuple[int, list[torch.Tensor]]]:
        size = leaves * LEAF if cut == "element" else rows * shape[-1]
        starts = range(0, len(given[0]), size)
        return [(start, [cut_as(one[start : start + size], cut, shape) for one in given]) for start in starts]

    known: tuple[Any, ...] = ()
    while (reduction := ready.reduction(known)) is not None:
        parts = [reduction.block(inputs, Block(start, known, shape)) for start, inputs in blocks(reduction.cut)]
        total = parts[0]
        for part in parts[1:]:
            total = reduction.merge([total, part])
        known = (*known, reduction.finish(total))
    made = [ready.compute(inputs, Block(start, known, shape)).reshape(-1) for start, inputs in blocks(ready.cut)]
    return torch.cat(made).reshape(shape)


# The references.


def angle_between(a: Array, b: Array) -> float:
    lengths = (float(np.linalg.norm(a)) or 1.0) * (float(np.linalg.norm(b)) or 1.0)
    return math.acos(min(1.0, max(-1.0, float((a * b).sum()) / lengths)))


def along_the_arc(a: Array, b: Array, t: float) -> Array:
    angle = angle_between(a, b)
    if math.sin(angle) < 1e-6:
        return (1 - t) * a + t * b
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def reference_multislerp(tensors: Sequence[Array], weights: Sequence[float], normalize: bool) -> Array:
    """All the steps, with the tangents and the exponential map."""
    if normalize:
        weights = [weight / sum(weights) for weight in weights]
    units = [tensor / np.linalg.norm(tensor) for tensor in tensors]
    mean = np.sum([w * u for w, u in zip(weights, units, strict=True)], axis=0)
    mean = mean / np.linalg.norm(mean)
    tangent = sum(w * (u - (u * mean).sum() * mean) for w, u in zip(weights, units, strict=True))
    step = np.linalg.norm(tangent)
    point = math.cos(step) * mean + (math.sin(step) / step * tangent if step > 0 else 0)
    return np.asarray(point * sum(w * np.linalg.norm(x) for w, x in zip(weights, tensors, strict=True)))


def reference_karcher(tensors: Sequence[Array], max_iter: int = 10, tol: float = 1e-5) -> Array:
    units = [tensor / np.linalg.norm(tensor) for tensor in tensors if np.linalg.norm(tensor)]
    lengths = [float(np.linalg.norm(tensor)) for tensor in tensors]
    if not units:
        return np.zeros_like(tensors[0])
    mean = np.mean(units, axis=0)
    mean = units[0] if np.linalg.norm(mean) < tol else mean / np.linalg.norm(mean)
    for _ in range(max_iter):
        step = np.zeros_like(mean)
        for unit in units:
            cosine = min(1.0, max(-1.0, float((unit * mean).sum())))
            angle = math.acos(cosine)
            if angle >= tol and math.sin(angle) > 1e-6:
                step += angle / math.sin(angle) * (unit - cosine * mean) / len(units)
        size = float(np.linalg.norm(step))
        if size < tol:
            break
        mean = math.cos(size) * mean + math.sin(size) * step / size
        mean /= np.linalg.norm(mean)
    return np.asarray(mean * (sum(lengths) / len(lengths)))


def reference_model_stock(base: Array, tensors: Sequence[Array]) -> Array:
    deltas = [tensor - base for tensor in tensors]
    count = len(deltas)
    pairs = [(deltas[i], deltas[j]) for i in range(count) for j in range(i + 1, count)]
    cosine = sum(math.cos(angle_between(a, b)) for a, b in pairs) / len(pairs)
    divisor = 1 + (count - 1) * cosine
    t = 0 if abs(divisor) < 1e-6 else count * cosine / divisor
    return np.asarray(t * sum(tensors) / count + (1 - t) * base)


def reference_sce(base: Array, deltas: Sequence[Array], topk: float = 1.0, scope: str = "deltas") -> Array:
    flat = np.stack([delta.reshape(-1) for delta in deltas])
    count, size = flat.shape
    selected = np.ones(size)
    if topk < 1:
        # K^2 times the variance, as a sum over pairs: exact for values on a coarse grid, so that equal ones stay equal
        variance = sum((flat[i] - flat[j]) ** 2 for i in range(count) for j in range(i + 1, count)) + np.zeros(size)
        order = sorted(range(size), key=lambda index: (-variance[index], index))
        selected = np.zeros(size)
        selected[order[: int(np.count_nonzero(variance) * topk)]] = 1
    squares = [(row * row * selected).sum() for row in flat]
    weights = [square / sum(squares) if sum(squares) else 1 / count for square in squares]
    merged = np.zeros(size)
    for index in range(size):
        entries = [row[index] * (selected[index] if scope == "deltas" else 1) for row in flat]
        elected = 1 if sum(entries) >= 0 else -1
        agree = [weight if np.sign(entry) == elected else 0 for weight, entry in zip(weights, entries, strict=True)]
        if sum(agree) >= 1e-8:
            merged[index] = sum(weight * entry for weight, entry in zip(agree, entries, strict=True)) / sum(agree)
    return base + merged.reshape(base.shape)


def reference_fusion(base: Array, theta: Array) -> Array:
    def softmax(x: Array) -> Array:
        powers = np.exp(x - x.max(axis=-1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=-1, keepdims=True))

    rows = [one.reshape(-1, one.shape[-1] if one.ndim else 1) for one in (base, theta)]
    q, p = (softmax(one) + 1e-8 for one in rows)
    importance = np.abs(rows[1] - rows[0]) * (p * np.log(p / q)).sum(axis=1, keepdims=True)
    ascending = np.sort(importance.reshape(-1))
    first, median, third = (ascending[int(share * (base.size - 1))] for share in (0.25, 0.5, 0.75))
    return np.where(importance >= median + 1.5 * (third - first), rows[1], rows[0]).reshape(base.shape)


def reference_ram(base: Array, deltas: Sequence[Array], epsilon: float, r: float = 0.0, alpha: float = 0.0) -> Array:
    changed = [np.abs(delta) > epsilon for delta in deltas]
    count = sum(one.astype(int) for one in changed) + np.zeros(base.shape, int)
    merged = np.zeros(base.shape)
    for delta, mine in zip(deltas, changed, strict=True):
        unique, shared = int((mine & (count == 1)).sum()), int((mine & (count > 1)).sum())
        factor = 1 + r * min(max(shared / unique, 0), alpha) if unique else 1
        merged += np.where(mine & (count == 1), factor * delta, 0)
        merged += np.where(mine & (count > 1), delta / np.maximum(count, 1), 0)
    return base + merged


# Against the references.

positive = st.floats(0.01, 2).map(lambda x: round(x, 3))


@quick
@given(w=st.tuples(positive, positive), shape=shapes, seed=seeds, dtype=dtypes, based=st.booleans())
def test_nuslerp_goes_along_the_arc_between_deltas_or_weights(
    w: tuple[float, float], shape: tuple[int, ...], seed: int, dtype: torch.dtype, based: bool
) -> None:
    base, tensors = family(2, *shape, seed=seed, dtype=dtype)
    t = w[1] / (w[0] + w[1])
    origin = doubles(base)[0] if based else 0
    parts = [x - origin for x in doubles(*tensors)]
    got = NuSlerp(weight=list(w))(base, tensors) if based else NuSlerp(weight=list(w))(tensors)
    terms = np.abs(origin) + sum(np.abs(along) for along in parts)
    close(got, origin + along_the_arc(parts[0], parts[1], t), terms=terms)


@pytest.mark.parametrize("row_wise", [True, False])
@pytest.mark.parametrize("shape", [(6, 5), (1, 4), (4, 1), (3, 4, 5), (2, 1, 2, 3), (9,), ()])
def test_nuslerp_has_an_angle_for_each_row_or_each_column(row_wise: bool, shape: tuple[int, ...]) -> None:
    op = NuSlerp(weight=[1.0, 2.0], flatten=False, row_wise=row_wise)
    base, tensors = family(2, *shape, seed=5)
    a, b = doubles(*tensors)
    want = np.zeros(shape)
    axis = -1 if row_wise or len(shape) < 2 else -2
    if len(shape) < 2:
        want = along_the_arc(a, b, 2 / 3)
    else:
        for at in np.ndindex(*np.moveaxis(a, axis, -1).shape[:-1]):
            np.moveaxis(want, axis, -1)[at] = along_the_arc(
                np.moveaxis(a, axis, -1)[at], np.moveaxis(b, axis, -1)[at], 2 / 3
            )
    terms = np.abs(a) + np.abs(b)
    close(op(tensors), want, terms=terms)
    if len(shape) > 1:
        count = math.prod(shape[:-1])
        for rows in range(1, count + 1):
            close(in_blocks(op, tensors, shape, 1, rows), want, terms=terms)
    parts = [x - doubles(base)[0] for x in (a, b)]
    if len(shape) < 2:
        close(op(base, tensors), doubles(base)[0] + along_the_arc(parts[0], parts[1], 2 / 3), terms=terms)


def test_nuslerp_of_weights_is_slerp_at_the_second_ones_share() -> None:
    a, b = normal(100, seed=1), normal(100, seed=2)
    assert same_bits(NuSlerp(weight=[1.0, 3.0])([a, b]), Slerp(t=0.75)([a, b]))
    assert same_bits(NuSlerp(weight=[2.0, 0.0])([a, b]), a)
    assert same_bits(NuSlerp(weight=[0.0, 2.0], flatten=False)([a, b]), b)
    assert same_bits(NuSlerp(weight=[1.0, -1.0])([a, b]), Slerp(t=0.5)([a, b]))


def test_nuslerp_of_nearly_parallel_models_still_follows_the_arc() -> None:
    a = normal(1000, seed=1)
    b = 2 * a + normal(1000, seed=2, spread=0.0005)
    want = along_the_arc(doubles(a)[0], doubles(b)[0], 0.5)
    close(NuSlerp()([a, b]), want)
    assert np.linalg.norm(want - (doubles(a)[0] + doubles(b)[0]) / 2) > 1e-5 * np.linalg.norm(want)


@quick
@given(
    weights=st.lists(positive, min_size=1, max_size=5),
    shape=st.sampled_from([(7,), (3, 5), (257,)]),
    seed=seeds,
    dtype=dtypes,
    normalize=st.booleans(),
    based=st.booleans(),
)
def test_multislerp_is_what_tangents_and_the_exponential_map_give(
    weights: list[float], shape: tuple[int, ...], seed: int, dtype: torch.dtype, normalize: bool, based: bool
) -> None:
    base, tensors = family(len(weights), *shape, seed=seed, dtype=dtype)
    op = MultiSlerp(weight=weights, normalize_weights=normalize)
    origin = doubles(base)[0] if based else 0
    parts = [x - origin for x in doubles(*tensors)]
    want = origin + reference_multislerp(parts, weights, normalize)
    close(op(base, tensors) if based else op(tensors), want, terms=np.abs(want) + sum(np.abs(part) for part in parts))


def test_multislerp_refuses_directions_that_cancel_and_weights_that_do() -> None:
    x, y = normal(50, seed=1), normal(50, seed=2)
    close(MultiSlerp(weight=[2.0, 2.0])([x, -3 * x]), -doubles(x)[0])
    with pytest.raises(RecipeError, match="cancel"):
        MultiSlerp()([x, y, -x, -y])
    with pytest.raises(RecipeError, match="normalize_weights"):
        MultiSlerp(weight=[1.0, -1.0])([x, y])
    zero = torch.zeros(50)
    assert torch.equal(MultiSlerp()([zero, zero, zero]), zero)
    assert torch.equal(MultiSlerp(weight=0.0, normalize_weights=False)([x, y, x]), zero)
    signs = [torch.tensor(value) for value in (1.0, 2.0, -1.0, -4.0)]
    close(MultiSlerp()(signs), np.array(-0.5))


@quick
@given(
    count=st.integers(1, 5),
    shape=st.sampled_from([(7,), (3, 5), (257,), (2, 1, 4)]),
    seed=seeds,
    dtype=dtypes,
    max_iter=st.integers(0, 12),
    shared=st.sampled_from([0.0, 0.5, 30.0]),
)
def test_karcher_takes_the_steps_of_its_definition(
    count: int, shape: tuple[int, ...], seed: int, dtype: torch.dtype, max_iter: int, shared: float
) -> None:
    _, tensors = family(count, *shape, seed=seed, dtype=dtype, shared=shared)
    want = reference_karcher(doubles(*tensors), max_iter)
    # Where vectors are all but opposite the steps wander, and rounding leads them elsewhere.
    if min(math.sin(angle_between(a, b)) for a in doubles(*tensors) for b in [want]) > 1e-3:
        close(Karcher(max_iter=max_iter)(tensors), want, 1e-6, terms=np.sum(np.abs(doubles(*tensors)), axis=0))


def test_karcher_is_the_point_where_the_tangents_cancel() -> None:
    tensors = [normal(400, seed=i, dtype=torch.float64) * (1 + i) for i in range(4)]
    got = Karcher(max_iter=200, tol=1e-9)(tensors).numpy()
    mean = got / np.linalg.norm(got)
    pull = np.zeros_like(mean)
    for one in doubles(*tensors):
        unit = one / np.linalg.norm(one)
        angle = angle_between(unit, mean)
        pull += angle / math.sin(angle) * (unit - math.cos(angle) * mean)
    assert np.linalg.norm(pull) < 1e-7
    assert np.linalg.norm(got) == pytest.approx(np.mean([np.linalg.norm(one) for one in doubles(*tensors)]), rel=1e-12)


def test_karcher_of_opposite_and_zero_tensors_is_defined() -> None:
    a, zero = normal(40, seed=1), torch.zeros(40)
    close(Karcher()([a, -a]), doubles(a)[0])
    close(Karcher()([a, zero]), doubles(a)[0] / 2)
    assert torch.equal(Karcher()([zero, zero]), zero)


@quick
@given(count=st.integers(2, 5), shape=shapes, seed=seeds, dtype=dtypes)
def test_model_stock_goes_as_far_as_the_angles_say(
    count: int, shape: tuple[int, ...], seed: int, dtype: torch.dtype
) -> None:
    base, tensors = family(count, *shape, seed=seed, dtype=dtype, shared=2.0)
    inputs = doubles(base, *tensors)
    deltas = [x - inputs[0] for x in inputs[1:]]
    pairs = [math.cos(angle_between(a, b)) for i, a in enumerate(deltas) for b in deltas[:i]]
    divisor = 1 + (count - 1) * float(np.mean(pairs))
    if abs(divisor) > 0.1:
        terms = np.abs(inputs[0]) + sum(np.abs(x) for x in inputs) / abs(divisor)
        close(ModelStock()(base, tensors), reference_model_stock(inputs[0], inputs[1:]), terms=terms)


def test_model_stock_filter_wise_does_so_in_each_row() -> None:
    for shape in ((6, 5), (2, 3, 4), (8,)):
        base, tensors = family(3, *shape, seed=3, shared=2.0)
        origin, *inputs = [x.reshape(-1, shape[-1]) for x in doubles(base, *tensors)]
        want = [reference_model_stock(row, [x[i] for x in inputs]) for i, row in enumerate(origin)]
        close(ModelStock(filter_wise=True)(base, tensors), np.stack(want))


def test_model_stock_keeps_the_base_where_deltas_are_zero_opposite_or_at_right_angles() -> None:
    base = normal(2, 3, seed=1)
    move = torch.tensor([[0.25, 0.0, 0.0], [0.0, 0.5, 0.0]])
    for op in (ModelStock(), ModelStock(filter_wise=True)):
        assert same_bits(op(base, [base, base]), base)
        close(op(base, [base + move, base - move]), doubles(base)[0])
        close(op(base, [base + move, base + move.flip(1).flip(0) * 0]), doubles(base)[0])
        close(op(base, [base + move] * 3), doubles(base + move)[0])


@quick
@given(shape=shapes, seed=seeds, dtype=dtypes, t=st.sampled_from([0.0, 1e-3, 0.02, 5.0]))
def test_nearswap_takes_what_is_near_and_moves_the_rest(
    shape: tuple[int, ...], seed: int, dtype: torch.dtype, t: float
) -> None:
    base, tensor = normal(*shape, seed=seed, dtype=dtype), normal(*shape, seed=seed + 1, dtype=dtype)
    a, b = doubles(base, tensor)
    v = np.array([min(max(t / abs(x - y), 0), 1) if x != y else 1 for x, y in zip(a.flat, b.flat, strict=True)])
    v = v.reshape(shape)
    close(NearSwap(t=t)(base, tensor), v * b + (1 - v) * a, terms=np.abs(a) + np.abs(b))


@st.composite
def sce_cases(draw: st.DrawFn) -> dict[str, Any]:
    """Values on a coarse grid, so that variances tie and are zero in masses."""
    count, shape = draw(st.integers(1, 4)), draw(st.sampled_from([(), (1,), (5,), (33,), (4, 9), (2, 3, 7)]))
    size = math.prod(shape)
    columns = st.lists(st.integers(-3, 3), min_size=size, max_size=size)
    values = [np.array(draw(columns), dtype=np.float64).reshape(shape) / 64 for _ in range(count + 1)]
    return {
        "base": values[0],
        "deltas": values[1:],
        "topk": draw(st.sampled_from([0.0, 0.01, 0.25, 0.5, 0.9, 1.0])),
        "scope": draw(st.sampled_from(["deltas", "weights_only"])),
        "dtype": draw(dtypes),
    }


@settings(max_examples=60, deadline=None)
@given(case=sce_cases())
def test_sce_is_what_a_sort_of_the_variances_gives(case: dict[str, Any]) -> None:
    base = torch.tensor(case["base"], dtype=case["dtype"])
    inputs = [torch.tensor(case["base"] + delta, dtype=case["dtype"]) for delta in case["deltas"]]
    got = Sce(select_topk=case["topk"], select_scope=case["scope"])(base, inputs)
    close(got, reference_sce(case["base"], case["deltas"], case["topk"], case["scope"]))


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("topk", [0.003, 0.3, 0.95])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sce_of_many_entries_in_blocks_selects_exactly(count: int, topk: float, dtype: torch.dtype) -> None:
    """Small integers on purpose: every variance is exact and most tie, so the count and the order of ties show."""
    size = 2 * LEAF + 777
    draw = np.random.default_rng(count)
    deltas = [draw.integers(-9, 10, size) * draw.integers(0, 2, size) / 32 for _ in range(count)]
    tensors = [torch.zeros(size, dtype=dtype), *(torch.tensor(delta, dtype=dtype) for delta in deltas)]
    flat = np.stack(deltas)
    variance = sum((flat[i] - flat[j]) ** 2 for i in range(count) for j in range(i + 1, count))
    keep = int(np.count_nonzero(variance) * topk)
    selected = np.zeros(size)
    selected[np.argsort(-variance, kind="stable")[:keep]] = 1
    flat = flat * selected
    weights = (flat**2).sum(1) / (flat**2).sum()
    elected = np.where(flat.sum(0) >= 0, 1, -1)
    agree = (np.sign(flat) == elected) * weights[:, None]
    want = np.where(agree.sum(0) > 0, (agree * flat).sum(0) / np.maximum(agree.sum(0), 1e-30), 0)
    got = in_blocks(Sce(select_topk=topk), tensors, (size,), 1, 1)
    close(got, want)
    assert same_bits(got, in_blocks(Sce(select_topk=topk), tensors, (size,), 2, 1))
    assert same_bits(got, Sce(select_topk=topk)(tensors[0], tensors[1:]))


def test_sce_of_many_normal_deltas_selects_as_a_sort_does() -> None:
    base, tensors = family(3, 40, 50, seed=9)
    deltas = doubles(*(tensor - base for tensor in tensors))
    close(Sce(select_topk=0.37)(base, tensors), reference_sce(doubles(base)[0], deltas, 0.37))


def test_sce_weighs_small_deltas_as_it_does_large_ones() -> None:
    base = torch.zeros(4)
    inputs = [torch.tensor([1.0, 2, 3, 4]) * 1e-5, torch.tensor([3.0, 2, 1, 1]) * 1e-5]
    close(Sce()(base, inputs), reference_sce(doubles(base)[0], doubles(*inputs)))


@quick
@given(shape=shapes, seed=seeds, dtype=dtypes)
def test_arcee_fusion_is_what_a_sort_of_the_importances_gives(
    shape: tuple[int, ...], seed: int, dtype: torch.dtype
) -> None:
    base, (tensor,) = family(1, *shape, seed=seed, dtype=dtype)
    assert torch.equal(ArceeFusion()(base, tensor).double(), torch.from_numpy(reference_fusion(*doubles(base, tensor))))


@pytest.mark.parametrize("rows", [63, 100, 640])
def test_arcee_fusion_in_blocks_of_rows_finds_exact_quartiles(rows: int) -> None:
    base, (tensor,) = family(1, 640, 33, seed=4)
    tensor[5:200] = base[5:200]  # a mass of equal importances
    tensor[300:310] += 1
    got = in_blocks(ArceeFusion(), [base, tensor], (640, 33), 1, rows)
    want = reference_fusion(*doubles(base, tensor))
    assert torch.equal(got.double(), torch.from_numpy(want))
    assert 0 < int((got != base).sum()) < 640 * 33 / 2


def test_arcee_fusion_gives_one_of_the_two_bit_for_bit() -> None:
    base, (tensor,) = family(1, 64, 16, seed=2, dtype=torch.bfloat16)
    got = ArceeFusion()(base, tensor)
    assert ((got == base) | (got == tensor)).all()
    assert same_bits(ArceeFusion()(base, base.clone()), base)


@quick
@given(count=st.integers(1, 5), shape=shapes, seed=seeds, dtype=dtypes, epsilon=st.sampled_from([0.0, 0.01, 0.03, 9.0]))
def test_ram_adds_what_one_changed_and_averages_what_several_did(
    count: int, shape: tuple[int, ...], seed: int, dtype: torch.dtype, epsilon: float
) -> None:
    base, tensors = family(count, *shape, seed=seed, dtype=dtype, shared=0.0)
    deltas = doubles(*(tensor - base for tensor in tensors))
    origin = doubles(base)[0]
    terms = np.abs(origin) + sum(np.abs(delta) for delta in deltas)
    close(Ram(epsilon=epsilon)(base, tensors), reference_ram(origin, deltas, epsilon), terms=terms)
    got = RamPlus(epsilon=epsilon, r=0.7, alpha=0.9)(base, tensors)
    close(got, reference_ram(origin, deltas, epsilon, 0.7, 0.9), terms=terms)


def test_ramplus_amplifies_by_what_is_shared() -> None:
    base = torch.zeros(5)
    a, b = torch.tensor([1.0, 1, 1, 1, 0]), torch.tensor([3.0, 0, 0, 0, 1])
    assert Ram()(base, [a, b]).tolist() == [2, 1, 1, 1, 1]
    close(RamPlus(r=0.3, alpha=0.5)(base, [a, b]), np.array([2, 1.1, 1.1, 1.1, 1.15]))


# Rules for all.

EVERY: list[tuple[Op, int]] = [
    (NuSlerp(weight=[0.3, 0.5]), 2),
    (NuSlerp(weight=[0.3, 0.5], flatten=False), 2),
    (NuSlerp(weight=[0.3, 0.5], flatten=False, row_wise=True), 2),
    (MultiSlerp(weight=[0.3, 0.5, 0.4]), 3),
    (Karcher(), 3),
    (ModelStock(), 3),
    (ModelStock(filter_wise=True), 2),
    (NearSwap(t=0.01), 1),
    (Sce(), 2),
    (Sce(select_topk=0.3), 3),
    (Sce(select_topk=0.3, select_scope="weights_only"), 3),
    (ArceeFusion(), 1),
    (Ram(epsilon=0.01), 3),
    (RamPlus(epsilon=0.01), 3),
]
each_op = pytest.mark.parametrize(
    ("op", "count"), EVERY, ids=lambda value: repr(value) if isinstance(value, Op) else ""
)


def called(op: Op, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return op(tensors[0], list(tensors[1:])) if op.needs_base else op(list(tensors))


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_cut_into_blocks_changes_no_bit(op: Op, count: int, dtype: torch.dtype) -> None:
    shape = (3 * LEAF + 1234) // 26, 26
    tensors = [normal(*shape, seed=i, dtype=dtype) for i in range(count + op.needs_base)]
    whole = called(op, tensors)
    for leaves in (1, 2, 4):
        # What a block of rows is follows from the shape alone: here as long as in a run.
        assert same_bits(in_blocks(op, tensors, shape, leaves, shape[0]), whole)


@each_op
def test_blocks_of_rows_as_a_run_cuts_them_give_what_the_whole_gives(op: Op, count: int) -> None:
    shape = (500, 65)
    tensors = [normal(*shape, seed=i, dtype=torch.float64) for i in range(count + op.needs_base)]
    whole = called(op, tensors)
    for rows in (97, 256, 499):
        close(in_blocks(op, tensors, shape, 1, rows), doubles(whole)[0], 1e-13)


@each_op
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (0, 0), (1,), (1, 1), (2, 3), (2, 0, 3)])
def test_small_and_empty_tensors_keep_their_shape_and_are_finite(op: Op, count: int, shape: tuple[int, ...]) -> None:
    many = count + op.needs_base
    for tensors in (
        [normal(*shape, seed=i) for i in range(many)],
        [normal(*shape, seed=1)] * many,
        [torch.zeros(shape)] * many,
        [torch.zeros(shape), *(normal(*shape, seed=i) for i in range(many - 1))],
    ):
        got = called(op, tensors)
        assert got.shape == shape
        assert got.isfinite().all()


@each_op
def test_inputs_are_never_written_to_nor_given_back(op: Op, count: int) -> None:
    tensors = [normal(20, 25, seed=i) for i in range(count + op.needs_base)]
    before = [tensor.clone() for tensor in tensors]
    called(op, tensors).fill_(7)
    ready = resolved(op, count)
    cut = [cut_as(tensor, ready.cut, (20, 25)) for tensor in tensors]
    ready.compute(cut, Block(0, measure(ready, tensors), (20, 25)))
    assert all(same_bits(a, b) for a, b in zip(tensors, before, strict=True))


@each_op
def test_results_have_the_dtype_of_the_first_tensor_and_are_computed_in_float32(op: Op, count: int) -> None:
    tensors = [normal(30, 10, seed=i, dtype=torch.bfloat16) for i in range(count + op.needs_base)]
    got = called(op, tensors)
    assert got.dtype == torch.bfloat16
    assert same_bits(got, called(op, [tensor.float() for tensor in tensors]).to(torch.bfloat16))


@each_op
def test_a_nan_in_any_input_shows_where_an_op_says_so(op: Op, count: int) -> None:
    for which in range(count + op.needs_base):
        for bad in (float("nan"), float("inf")):
            tensors = [normal(30, seed=i) for i in range(count + op.needs_base)]
            tensors[which][5] = bad
            got = called(op, tensors)
            assert not op.shows_non_finite or not got[5].isfinite()


@pytest.mark.parametrize(
    ("op", "counts"),
    [
        (NuSlerp(), [2]),
        (NuSlerp(flatten=False), [2]),
        (NuSlerp(flatten=False, row_wise=True), [2]),
        (MultiSlerp(weight=0.7), [1, 2, 3, 5]),
        (Karcher(), [1, 2, 3, 5]),
        (ModelStock(), [2, 3, 5]),
        (ModelStock(filter_wise=True), [2, 3, 5]),
        (Sce(), [1, 2, 3, 5]),
        (Ram(epsilon=0.0), [1, 2, 3, 5]),
        (RamPlus(epsilon=0.0), [2, 3, 5]),
    ],
    ids=repr,
)
def test_equal_inputs_average_to_themselves(op: Op, counts: Sequence[int]) -> None:
    base, (tensor,) = family(1, 12, 10, seed=1)
    for count in counts:
        got = op(base, [tensor] * count) if op.needs_base else op([tensor] * count)
        close(got, doubles(tensor)[0], 3e-7)


def test_one_input_is_its_own_mean_bit_for_bit() -> None:
    tensor, other = normal(50, seed=1), normal(50, seed=2)
    assert same_bits(Karcher()([tensor]), tensor)
    assert same_bits(MultiSlerp(weight=0.3)([tensor]), tensor)
    assert same_bits(MultiSlerp(weight=[0.0, 0.3])([other, tensor]), tensor)
    close(MultiSlerp(weight=0.5, normalize_weights=False)([tensor]), doubles(tensor)[0] / 2)
    assert not resolved(MultiSlerp(weight=[0.0, 0.3]), 2).measures
    assert not resolved(NuSlerp(weight=[0.0, 1.0]), 2).measures
    assert not resolved(NuSlerp(flatten=False, row_wise=True), 2).measures


@each_op
def test_zero_deltas_give_the_base_bit_for_bit(op: Op, count: int) -> None:
    base = normal(20, 10, seed=1)
    if op.needs_base or op.may_base:
        assert same_bits(op(base, [base.clone() for _ in range(count)]), base)


@quick
@given(seed=seeds, order=st.permutations(range(4)))
def test_the_order_of_the_inputs_matters_to_the_last_place_only(seed: int, order: list[int]) -> None:
    base, tensors = family(4, 8, 9, seed=seed)
    weights = [0.5, 0.25, 1.0, 0.75]
    for first, second in (
        (MultiSlerp(weight=weights), MultiSlerp(weight=[weights[i] for i in order])),
        (Karcher(), Karcher()),
        (ModelStock(), ModelStock()),
        (ModelStock(filter_wise=True), ModelStock(filter_wise=True)),
        (Ram(epsilon=0.01), Ram(epsilon=0.01)),
        (RamPlus(epsilon=0.01), RamPlus(epsilon=0.01)),
        (Sce(), Sce()),
    ):
        before = [base] if first.needs_base else []
        a, b = first(*before, tensors), second(*before, [tensors[i] for i in order])
        assert ((a - b).abs() <= 1e-6 * max(1.0, float(a.abs().max()))).all()


def test_nuslerp_turned_round_is_the_same() -> None:
    a, b = normal(30, 7, seed=1), normal(30, 7, seed=2)
    for options in ({}, {"flatten": False}, {"flatten": False, "row_wise": True}):
        first = NuSlerp(weight=[0.3, 0.5], **options)([a, b])
        second = NuSlerp(weight=[0.5, 0.3], **options)([b, a])
        close(first, doubles(second)[0], 3e-7)


def test_parameters_out_of_their_bounds_are_refused() -> None:
    for build in (
        lambda: NearSwap(),
        lambda: NearSwap(t=-0.1),
        lambda: Karcher(tol=0.0),
        lambda: Karcher(max_iter=-1),
        lambda: Sce(select_topk=1.5),
        lambda: Ram(epsilon=-1.0),
        lambda: RamPlus(alpha=-1.0),
        lambda: NuSlerp(flatten="yes"),  # type: ignore[arg-type]
        lambda: ModelStock(filter_wise=1),  # type: ignore[arg-type]
        lambda: Sce(select_scope="all"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValidationError):
            build()


# Through recipes and files.

NODES = {
    "nuslerp": "{op: nuslerp, base: base, inputs: [{model: a, weight: 0.3}, {model: b, weight: 0.5}]}",
    "nuslerp_rows": "{op: nuslerp, inputs: [a, b], flatten: false, row_wise: true}",
    "nuslerp_columns": "{op: nuslerp, base: base, inputs: [a, b], flatten: false}",
    "multislerp": "{op: multislerp, inputs: [{model: a, weight: 0.3}, {model: b, weight: 0.5}, c]}",
    "karcher": "{op: karcher, inputs: [a, b, c], max_iter: 5}",
    "model_stock": "{op: model_stock, base: base, inputs: [a, b, c]}",
    "model_stock_rows": "{op: model_stock, base: base, inputs: [a, b, c], filter_wise: true}",
    "nearswap": "{op: nearswap, base: base, inputs: [a], t: 0.01}",
    "sce": "{op: sce, base: base, inputs: [a, b, c], select_topk: 0.3}",
    "arcee_fusion": "{op: arcee_fusion, base: base, inputs: [a]}",
    "ramplus": "{op: ramplus, base: base, inputs: [a, b, c], epsilon: 0.01}",
}
OPS_OF_NODES: dict[str, Op] = {
    "nuslerp": NuSlerp(weight=[0.3, 0.5]),
    "nuslerp_rows": NuSlerp(flatten=False, row_wise=True),
    "nuslerp_columns": NuSlerp(flatten=False),
    "multislerp": MultiSlerp(weight=[0.3, 0.5, 1.0]),
    "karcher": Karcher(max_iter=5),
    "model_stock": ModelStock(),
    "model_stock_rows": ModelStock(filter_wise=True),
    "nearswap": NearSwap(t=0.01),
    "sce": Sce(select_topk=0.3),
    "arcee_fusion": ArceeFusion(),
    "ramplus": RamPlus(epsilon=0.01),
}
SHAPES = {
    "embed.weight": (1100, 300),
    "layers.0.experts": (3, 350, 300),
    "layers.0.bias": (301,),
    "layers.0.scale": (),
    "layers.0.none": (0, 4),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for index, name in enumerate(("base", "a", "b", "c")):
        start = {key: normal(*shape, seed=i) for i, (key, shape) in enumerate(SHAPES.items())}
        drawn = {key: normal(*shape, seed=100 * index + i) for i, (key, shape) in enumerate(SHAPES.items())}
        save(folder / name, start if name == "base" else {key: start[key] + drawn[key] for key in SHAPES})
    return folder


@pytest.mark.parametrize("node", NODES)
def test_a_run_gives_what_the_op_gives_whatever_threads_memory_and_device(
    node: str, models: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    names = "".join(f"  {name}: {models / name}\n" for name in ("base", "a", "b", "c") if name in NODES[node])
    recipe.write_text(f"recipe: 1\nmodels:\n{names}nodes:\n  merged: {NODES[node]}\noutput: {{}}\n")
    results = []
    for index, (threads, memory, device) in enumerate(((1, 2**30, "cpu"), (2, 2**26, "cpu"), (3, 2**28, "staged:cpu"))):
        run(load_recipe(recipe), tmp_path / str(index), threads=threads, memory=memory, device=device)
        results.append(weights_of(tmp_path / str(index)))
    given = {name: weights_of(models / name) for name in ("base", "a", "b", "c")}
    op, based = OPS_OF_NODES[node], "base: base" in NODES[node]
    count = 1 if op.most == 1 else 2 if op.most == 2 else 3
    for key in SHAPES:
        tensors = [given[name][key] for name in ("a", "b", "c")[:count]]
        want = op(given["base"][key], tensors) if based else op(tensors)
        assert all(same_bits(results[0][key], other[key]) for other in results[1:]), key
        close(results[0][key], doubles(want)[0], 3e-7)

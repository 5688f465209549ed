"""Ops that drop a part of each delta, by chance or by rank, and the draws behind them.

The references are float64 numpy and plain Python integers, written from the formulas.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from mergeflow import Recipe, run
from mergeflow.errors import RecipeError
from mergeflow.ops import (
    LEAF,
    Block,
    Breadcrumbs,
    BreadcrumbsTies,
    DareLinear,
    DareTies,
    Della,
    DellaLinear,
    DeltaOp,
    EvolveCross,
    Op,
    TaskArithmetic,
    Ties,
    draws,
    measure,
    sparsified,
)
from mergeflow.ops.base import cut_as, spread
from mergeflow.ops.deltas import leaf_sums, masked, norm_parts, norms_around, powers
from mergeflow.settings import Place

Array = NDArray[np.float64]
quick = settings(max_examples=60, deadline=None)
keys_of = st.integers(0, 2**64 - 1)


# The generator.


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 of the paper, on Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [q >> 32 ^ c[1] ^ k[0], q & 0xFFFFFFFF, p >> 32 ^ c[3] ^ k[1], p & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def words_at(key: int, counter: int) -> list[int]:
    return philox([counter & 0xFFFFFFFF, counter >> 32, 0, 0], [key & 0xFFFFFFFF, key >> 32])


def numbers_at(key: int, start: int, size: int) -> Array:
    """u of elements [start, start + size)."""
    drawn = [word for counter in range(start // 4, (start + size + 3) // 4) for word in words_at(key, counter)]
    return np.array([(word >> 8) / 2**24 for word in drawn[start % 4 :][:size]])


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_the_reference_gives_the_known_answers_of_random123(counter: str, key: str, expected: str) -> None:
    c, k, want = ([int(word, 16) for word in text.split()] for text in (counter, key, expected))
    assert philox(c, k) == want


def test_the_generator_gives_the_known_answer_of_random123() -> None:
    assert draws.words(0, 0, 1).tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]


@quick
@given(key=keys_of, first=st.integers(0, 2**60), size=st.integers(1, 9))
def test_words_are_those_of_the_reference_at_any_counter(key: int, first: int, size: int) -> None:
    want = [words_at(key, counter) for counter in range(first, first + size)]
    assert draws.words(key, first, first + size).tolist() == want


@pytest.mark.parametrize("first", [0, 2**32 - 16_390, 2**32 - 3, 2**33 - 1])
def test_pieces_and_the_counters_second_word_leave_no_seam(first: int) -> None:
    found = draws.words(7, first, first + 40_000)
    for place in (0, 2, 3, 16_383, 16_384, 16_389, 16_390, 32_768, 39_999):
        assert found[place].tolist() == words_at(7, first + place), place
    assert np.array_equal(found[20_000:], draws.words(7, first + 20_000, first + 40_000))


@quick
@given(key=keys_of, start=st.integers(0, 2**36), size=st.integers(0, 40), limit=st.floats(0, 1))
def test_numbers_and_masks_start_at_any_element_on_either_path(key: int, start: int, size: int, limit: float) -> None:
    like, want = torch.empty(size), numbers_at(key, start, size)
    assert draws.uniform(key, start, like).double().tolist() == want.tolist()
    assert draws.below(key, start, like, limit).tolist() == (want < limit).tolist()
    there = draws._on_device(key, start, size, torch.device("cpu"))
    assert ((there >> 8) / 2**24).tolist() == want.tolist()


@pytest.mark.parametrize("start", [0, 1, 5, 65_536])
def test_both_paths_draw_the_same_over_several_pieces(start: int) -> None:
    size = 150_001
    there = draws._on_device(99, start, size, torch.device("cpu"))
    here = draws.uniform(99, start, torch.empty(size))
    assert torch.equal(here, (there >> 8).float() * 2**-24)
    for limit in (0.0, 2**-24, 0.3, 1 - 2**-24, 1.0):
        assert torch.equal(draws.below(99, start, torch.empty(size), limit), here.double() < limit)


def test_a_limit_between_two_numbers_is_held_exactly() -> None:
    u = draws.uniform(1, 0, torch.empty(4096)).double()
    for value in u[:20].tolist():
        assert bool(draws.below(1, 0, torch.empty(4096), value)[u == value].any()) is False
        assert bool(draws.below(1, 0, torch.empty(4096), math.nextafter(value, 2))[u == value].all()) is True


def test_threads_that_draw_at_once_draw_what_one_draws() -> None:
    want = [draws.words(key, 0, 50_000) for key in range(4)]
    found: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda k=key: found.update({k: draws.words(k, 0, 50_000)})) for key in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[key], want[key]) for key in range(4))


def test_a_key_is_blake3_over_its_length_prefixed_parts() -> None:
    text = (
        b"\x01\x00\x00\x00\x00\x00\x00\x007"
        b"\x06\x00\x00\x00\x00\x00\x00\x00merged"
        b"\x04\x00\x00\x00\x00\x00\x00\x00math"
        b"\x01\x00\x00\x00\x00\x00\x00\x001"
        b"\x05\x00\x00\x00\x00\x00\x00\x00h.0.w"
    )
    want = int.from_bytes(blake3(text).digest()[:8], "little")
    assert draws.draw_key(("7", "merged"), "math", 1, "h.0.w") == want
    assert draws.draw_key(("7", "merged"), "math", 1, "h.0.w") == 13627698404104369910
    parts = (("7m", "erged"), "math", 1, "h.0.w"), (("7", "merged"), "math", 0, "h.0.w"), (("7",), "math", 1, "h.0.w")
    assert all(draws.draw_key(*other) != want for other in parts)


# References of the ops.


def doubles(*tensors: torch.Tensor) -> list[Array]:
    return [tensor.double().numpy() for tensor in tensors]


def rescaled(before: Array, after: Array, kind: str, probability: Any) -> Array:
    if kind == "none":
        return after
    if kind == "probability":
        return after / probability
    old, new = (
        np.linalg.norm(x.reshape(-1), {"l1": 1, "l2": 2, "linf": np.inf}[kind]) if x.size else 0
        for x in (before, after)
    )
    return after if old < 1e-7 or new < 1e-7 else after * (old / new)


def reference_dare(tau: Array, key: int, density: float, kind: str) -> Array:
    if density == 1:
        return tau
    kept = numbers_at(key, 0, tau.size).reshape(tau.shape) < density
    return rescaled(tau, tau * kept, kind, density)


def reference_della(tau: Array, key: int, density: float, epsilon: float, kind: str, axis: int = -1) -> Array:
    """Ranks by counting: an entry's rank is 1 + how many of its row come before it."""
    if density == 1 or tau.ndim == 0:
        return tau
    rows = np.abs(np.moveaxis(tau, axis if tau.ndim > 1 else 0, -1))
    length = rows.shape[-1]
    if length == 1:
        return tau
    index = np.arange(length)
    smaller = rows[..., None, :] < rows[..., :, None]
    earlier = (rows[..., None, :] == rows[..., :, None]) & (index[None, :] < index[:, None])
    rank = 1 + (smaller | earlier).sum(-1)
    p = np.moveaxis(density - epsilon + 2 * epsilon * (rank - 1) / (length - 1), -1, axis if tau.ndim > 1 else 0)
    kept = numbers_at(key, 0, tau.size).reshape(tau.shape) < p
    return rescaled(tau, np.where(kept, tau, 0), kind, np.where(kept, p, 1))


def reference_crumbs(tau: Array, density: float, gamma: float, kind: str) -> Array:
    flat, n = tau.reshape(-1), tau.size
    descending = sorted(range(n), key=lambda index: (-abs(flat[index]), index))
    top, keep = int(gamma * n), int(density * n)
    if density == 1:
        chosen = descending[top:]
    else:
        ascending = descending[::-1]
        start = max(0, n - keep - top)
        chosen = ascending[start : start + keep]
    kept = np.zeros(n)
    kept[chosen] = flat[chosen]
    return rescaled(tau, kept.reshape(tau.shape), kind, density)


def reference_merge(
    base: Array,
    parts: Sequence[Array],
    weights: Sequence[float],
    *,
    vote: str | None = None,
    normalize: bool = False,
    scale: float = 1.0,
) -> Array:
    products = np.array([weight * part for weight, part in zip(weights, parts, strict=True)])
    if vote is None:
        merged = products.sum(0) / (sum(weights) if normalize else 1)
        return base + scale * merged
    ballots = products if vote == "mass" else np.sign(products)
    elected = np.where(ballots.sum(0) >= 0, 1, -1)
    agree = np.sign(products) == elected
    merged = (products * agree).sum(0)
    if normalize:
        divisor = (agree * np.array(weights).reshape(-1, *[1] * base.ndim)).sum(0)
        safe = np.abs(divisor) >= 1e-8
        merged = np.where(safe, merged / np.where(safe, divisor, 1), 0)
    return base + scale * merged


def keys_for(count: int, seed: int = 0) -> tuple[int, ...]:
    """The keys of an op that is called on plain tensors."""
    return tuple(draws.draw_key((str(seed), ""), str(index), 0, "") for index in range(count))


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Values on a coarse grid, so that magnitudes tie and every sum of one input is exact."""
    count = draw(st.integers(1, 3))
    shape = draw(st.sampled_from([(), (1,), (2,), (7,), (33,), (4, 9), (5, 1), (2, 3, 4), (0,), (2, 0)]))
    size = math.prod(shape)
    columns = st.lists(st.integers(-6, 6), min_size=size, max_size=size)
    return {
        "base": np.array(draw(columns), np.float64).reshape(shape) / 64,
        "deltas": [np.array(draw(columns), np.float64).reshape(shape) / 64 for _ in range(count)],
        "weights": draw(st.lists(st.sampled_from([0.5, 1.0, 2.0, -1.0, 0.0, 0.75]), min_size=count, max_size=count)),
        "densities": draw(st.lists(st.sampled_from([0.2, 0.5, 0.75, 1.0]), min_size=count, max_size=count)),
        "seed": draw(st.integers(0, 5)),
        "rescale": draw(st.sampled_from(["none", "l1", "l2", "linf", "probability"])),
        "vote": draw(st.sampled_from([None, "mass", "count"])),
        "normalize": draw(st.booleans()),
        "scale": draw(st.sampled_from([1.0, 0.5, -1.5])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
    }


def check_case(case: dict[str, Any], kinds: Sequence[Any], parts: Sequence[Array], **options: Any) -> None:
    """The op of a case on its tensors against the merge of `parts`, what the reference keeps of each delta."""
    linear, voting = kinds
    weights, vote, normalize = case["weights"], case["vote"], case["normalize"]
    if vote is None and normalize and abs(sum(weights)) < 1e-8:
        return
    own = {name: case[name] for name in ("rescale", "normalize", "scale")}
    build = linear if vote is None else voting
    op = build(weight=weights, density=case["densities"], **own, **({"vote": vote} if vote else {}), **options)
    base = torch.tensor(case["base"], dtype=case["dtype"])
    inputs = [torch.tensor(case["base"] + delta, dtype=case["dtype"]) for delta in case["deltas"]]
    got = op(base, inputs, seed=case["seed"]).double().numpy()
    want = reference_merge(case["base"], parts, weights, vote=vote, normalize=normalize, scale=case["scale"])
    size = np.abs(case["base"]) + abs(case["scale"]) * sum(
        abs(w) * np.abs(p) for w, p in zip(weights, parts, strict=True)
    )
    sure: Any = True
    if vote:  # where factors make a ballot all but drawn, rounding decides
        products = np.array([weight * part for weight, part in zip(weights, parts, strict=True)])
        total, mass = products.sum(0), np.abs(products).sum(0)
        sure = (np.abs(total) > 1e-5 * mass) | (mass == 0) if vote == "mass" else True
    assert np.isfinite(got).all()
    assert got.shape == want.shape
    assert (np.abs(got - want) <= 2e-6 * np.maximum(size, np.abs(want)) + 1e-12)[
        sure if sure is not True else ...
    ].all()


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_dare_is_what_its_formula_gives_in_every_variant(case: dict[str, Any]) -> None:
    keys = keys_for(len(case["deltas"]), case["seed"])
    parts = [
        reference_dare(tau, key, density, case["rescale"])
        for tau, key, density in zip(case["deltas"], keys, case["densities"], strict=True)
    ]
    check_case(case, (DareLinear, DareTies), parts)


@settings(max_examples=150, deadline=None)
@given(case=cases(), axis=st.sampled_from([-1, 1]))
def test_della_is_what_its_formula_gives_in_every_variant(case: dict[str, Any], axis: int) -> None:
    if axis == 1 and case["rescale"] == "probability":
        return
    keys = keys_for(len(case["deltas"]), case["seed"])
    epsilons = [min(0.15, density) for density in case["densities"]]
    parts = [
        reference_della(tau, key, density, epsilon, case["rescale"], axis)
        for tau, key, density, epsilon in zip(case["deltas"], keys, case["densities"], epsilons, strict=True)
    ]
    check_case(case, (DellaLinear, Della), parts, epsilon=epsilons, rank_axis=axis)


@settings(max_examples=200, deadline=None)
@given(case=cases(), gamma=st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.9, 1.0]))
def test_breadcrumbs_are_what_a_sort_gives_in_every_variant(case: dict[str, Any], gamma: float) -> None:
    parts = [
        reference_crumbs(tau, density, gamma, case["rescale"])
        for tau, density in zip(case["deltas"], case["densities"], strict=True)
    ]
    check_case(case, (Breadcrumbs, BreadcrumbsTies), parts, gamma=gamma)


@quick
@given(
    seed=st.integers(0, 99), crossed=st.sampled_from([0.0, 0.5, 1.0, -0.3]), drawn=st.sampled_from([0.0, 0.3, 0.9, 1.0])
)
def test_evolve_cross_moves_where_it_draws_and_nowhere_else(seed: int, crossed: float, drawn: float) -> None:
    a, b = normal(7, 5, seed=seed), normal(7, 5, seed=seed + 1)
    x, y = doubles(a, b)
    moved = numbers_at(keys_for(2, seed)[1], 0, 35).reshape(7, 5) < drawn
    got = EvolveCross(F=crossed, Cr=drawn)([a, b], seed=seed)
    want = np.where(moved, (1 - crossed) * x + crossed * y, x)
    assert np.abs(got.double().numpy() - want).max() <= 1e-6 * np.abs(want).max()
    assert torch.equal(got[~torch.from_numpy(moved)], a[~torch.from_numpy(moved)])


def test_evolve_cross_knows_which_input_it_is_bit_for_bit() -> None:
    sides = [(0.0, 0.5, 0), (0.5, 0.0, 0), (1.0, 1.0, 1), (1.0, 0.5, None), (0.5, 1.0, None)]
    for crossed, drawn, which in sides:
        assert resolved(EvolveCross(F=crossed, Cr=drawn), 2).only_input(2) == which


# What a run does: blocks of any size, rows as they are cut.


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32, spread: float = 0.02) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread).to(dtype)


def resolved(op: Op, count: int) -> Any:
    return op.resolved(op.values_at(Place("w"), range(count)))


def in_blocks(op: Op, tensors: Sequence[torch.Tensor], leaves: int, rows: int, seed: int = 0) -> torch.Tensor:
    """The op over tensors of the compute dtype (the base first), in blocks of so many leaves, or of so many rows."""
    shape = tuple(tensors[0].shape)
    given = list(tensors)
    if isinstance(op, DeltaOp):
        given = [given[0], *(tensor - given[0] for tensor in given[1:])]
    given = [tensor.reshape(-1) for tensor in given]
    count = len(given) - op.needs_base
    ready, keys, size = resolved(op, count), keys_for(count, seed), len(given[0])

    def blocks(cut: str) -> list[tuple[int, list[torch.Tensor]]]:
        length = {"element": leaves * LEAF, "row": rows * shape[-1], "tensor": size}[cut]
        return [
            (start, [cut_as(one[start : start + length], cut, shape) for one in given])  # type: ignore[arg-type]
            for start in range(0, size, length)
        ]

    known: tuple[Any, ...] = ()
    while (reduction := ready.reduction(known)) is not None:
        if reduction.sample:
            parts = [reduction.block([spread(one) for one in given], Block(0, known, shape, keys))]
        else:
            parts = [reduction.block(cut, Block(start, known, shape, keys)) for start, cut in blocks(reduction.cut)]
        total = parts[0]
        for part in parts[1:]:
            total = reduction.merge([total, part])
        known = (*known, reduction.finish(total))
    made = [ready.compute(cut, Block(start, known, shape, keys)).reshape(-1) for start, cut in blocks(op.cut)]
    return torch.cat(made).reshape(shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(kind), b.view(kind))


EVERY: list[DeltaOp] = [
    DareLinear(density=0.3),
    DareLinear(density=[0.3, 1.0], rescale="l2", weight=[0.3, 0.5]),
    DareTies(density=0.5, rescale="none"),
    DareTies(density=[0.7, 0.2], rescale="linf", vote="count", normalize=True),
    DareTies(density=0.5, rescale="probability", scale=0.3),
    DellaLinear(density=0.4),
    Della(density=[0.5, 1.0], epsilon=0.2, rescale="probability"),
    Della(density=0.6, rescale="none", weight=[0.4, -0.1], vote="count"),
    Della(density=0.6, rank_axis=1),
    Breadcrumbs(density=0.4, gamma=0.05),
    Breadcrumbs(weight=0.5),
    BreadcrumbsTies(density=[0.9, 0.2], gamma=[0.2, 0.0], rescale="l1", vote="count"),
    BreadcrumbsTies(density=0.7, rescale="linf"),
]
each_op = pytest.mark.parametrize("op", EVERY, ids=repr)


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_cut_into_blocks_changes_no_bit(op: DeltaOp, dtype: torch.dtype) -> None:
    shape = (1021, 237)  # neither rows nor tensors are whole bytes of bits, or whole leaves
    base = normal(*shape, seed=1, dtype=torch.bfloat16).to(dtype)
    tensors = [base, *(base + normal(*shape, seed=2 + i, dtype=torch.bfloat16, spread=0.001) for i in range(2))]
    # Rows are cut as the shape says, wherever sums are taken over them; masks alone may be cut in any way.
    whole = in_blocks(op, tensors, 4, 1021) if op.cut == "element" else in_blocks(op, tensors, 4, 100)
    for leaves in (1, 2):
        rows = 100 if getattr(op, "rescale", "none") in ("l1", "l2") else 31 * leaves
        assert same_bits(in_blocks(op, tensors, leaves, rows), whole)


@each_op
def test_masks_that_are_found_again_are_those_that_were_kept(op: DeltaOp, monkeypatch: pytest.MonkeyPatch) -> None:
    base = normal(300, 411, seed=1)
    tensors = [base, *(base + normal(300, 411, seed=2 + i, spread=0.001) for i in range(2))]
    kept = in_blocks(op, tensors, 1, 50)
    monkeypatch.setattr(sparsified, "_MOST_BITS", 1000)
    assert same_bits(in_blocks(op, tensors, 1, 50), kept)


@pytest.mark.parametrize("rescale", ["none", "l1", "l2", "linf"])
def test_ranks_along_the_second_axis_are_found_whatever_the_rows(rescale: Any) -> None:
    base = normal(3, 10, 8, seed=1, dtype=torch.float64)
    other = base + normal(3, 10, 8, seed=2, dtype=torch.float64)
    op = DellaLinear(density=0.5, rank_axis=1, rescale=rescale)
    want = base.numpy() + reference_della((other - base).numpy(), keys_for(1)[0], 0.5, 0.15, rescale, 1)
    for rows in (1, 7, 30):
        got = in_blocks(op, [base, other], 1, rows)
        assert np.abs(got.numpy() - want).max() < 1e-12
    flat = [tensor.reshape(30, 8) for tensor in (base, other)]
    assert same_bits(op(flat[0], flat[1:]), DellaLinear(density=0.5, rescale=rescale)(flat[0], flat[1:]))


# What masks are like.


@pytest.mark.parametrize("density", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("build", [DareLinear, DareTies])
def test_dare_keeps_about_as_many_entries_as_its_density_says(build: Any, density: float) -> None:
    size = 300_000
    for seed in range(3):
        kept = int(build(density=density)(torch.zeros(size), [torch.ones(size)], seed=seed).count_nonzero())
        assert abs(kept - density * size) <= 3 * math.sqrt(density * (1 - density) * size)


def test_della_keeps_large_entries_more_often_than_small_ones() -> None:
    rows, length, density, epsilon = 3000, 100, 0.5, 0.3
    delta = torch.arange(1.0, length + 1).repeat(rows, 1)[:, torch.randperm(length)]
    merged = DellaLinear(density=density, epsilon=epsilon, rescale="none")(torch.zeros(rows, length), [delta], seed=3)
    for rank in (1, 20, 50, 80, 100):
        p = density - epsilon + 2 * epsilon * (rank - 1) / (length - 1)
        kept = int((merged == rank).sum())
        assert abs(kept - p * rows) <= 3 * math.sqrt(p * (1 - p) * rows) + 1e-9, rank
    assert abs(int(merged.count_nonzero()) - density * rows * length) <= 3 * math.sqrt(rows * length) / 2


def test_breadcrumbs_keep_as_many_entries_as_they_say() -> None:
    delta = normal(1000, seed=1)
    for density, gamma, expected in (
        (0.3, 0.1, 300),
        (0.95, 0.1, 950),
        (1.0, 0.1, 900),
        (1.0, 0.0, 1000),
        (0.0001, 0.1, 0),
    ):
        merged = Breadcrumbs(density=density, gamma=gamma)(torch.zeros(1000), [delta])
        assert int(merged.count_nonzero()) == expected, (density, gamma)


def test_breadcrumbs_without_outliers_trim_as_ties_does_also_among_equals() -> None:
    base = torch.zeros(2 * LEAF + 777)
    delta = normal(len(base), seed=3, dtype=torch.bfloat16).float()
    for density in (0.001, 0.25, 0.9):
        trimmed = Ties(density=density)(base, [delta])
        assert same_bits(Breadcrumbs(density=density, gamma=0.0)(base, [delta]), trimmed)


def test_among_equals_the_lowest_index_counts_as_the_largest_at_both_thresholds() -> None:
    size = 2 * LEAF + 50
    delta = torch.full((size,), 0.5)
    for top, keep in ((10, 5), (LEAF, 100), (LEAF - 3, LEAF + 7), (1, size - 2)):
        op = Breadcrumbs(density=(keep + 0.5) / size, gamma=(top + 0.5) / size)
        for leaves in (1, 4):
            got = in_blocks(op, [torch.zeros(size), delta], leaves, 1)
            assert got.nonzero().flatten().tolist() == list(range(top, top + keep)), (top, keep)


def test_masks_of_inputs_and_of_seeds_are_independent() -> None:
    size, density = 200_000, 0.4
    zero, one = torch.zeros(size), torch.ones(size)
    op = DareLinear(density=density, rescale="none", weight=[1.0, 10.0])
    a, b = (op(zero, [one, one], seed=seed) for seed in (1, 2))
    masks = [(a % 10 == 1), (a >= 10), (b % 10 == 1), (b >= 10)]
    for i, first in enumerate(masks):
        for second in masks[i + 1 :]:
            both = int((first & second).sum())
            assert abs(both - density**2 * size) <= 4 * math.sqrt(density**2 * (1 - density**2) * size)


def write(folder: Path, **tensors: torch.Tensor) -> None:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")


def recipe_of(folder: Path, node: dict[str, Any], **more: Any) -> Recipe:
    models = {name: f"./{name}" for name in ("base", "a", "b")}
    return Recipe(
        models=models, nodes={"result": node, **more}, output={"node": "result", "dtype": "float32"}, folder=folder
    )


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Two tensors of one shape, a matrix that is several blocks long, and small ones."""
    shapes = {"x.weight": (40, 30), "y.weight": (40, 30), "long": (301, 1003), "norm": (77,), "one": (1,)}
    base = {name: normal(*shape, seed=index) for index, (name, shape) in enumerate(shapes.items())}
    write(tmp_path / "base", **base)
    for number, name in enumerate(("a", "b")):
        noise = {key: 1 + normal(*value.shape, seed=100 * number + 50, spread=0.1) for key, value in base.items()}
        write(tmp_path / name, **{key: value + noise[key] for key, value in base.items()})
    return tmp_path


NODES: dict[str, dict[str, Any]] = {
    "dare_linear": {"density": 0.3},
    "dare_ties": {"density": 0.5, "rescale": "probability"},
    "della": {"density": 0.5},
    "della_linear": {"density": 0.5, "rank_axis": 1},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.5, "rescale": "l2"},
}


@pytest.mark.parametrize("name", [*NODES, "evolve_cross"])
def test_threads_memory_and_the_way_of_a_device_change_no_byte(models: Path, name: str) -> None:
    node = {"op": name, "base": "base", "inputs": ["a", "b"], **NODES.get(name, {})}
    if name == "evolve_cross":
        node = {"op": name, "inputs": ["a", "b"]}
    recipe = recipe_of(models, node)
    ways: list[dict[str, Any]] = [
        {"threads": 1},
        {"threads": 2, "memory": 2**27 if "della" in name else 2**26},
        {"threads": 2, "memory": 2**30},
        {"device": "staged:cpu"},
    ]
    for index, way in enumerate(ways):
        run(recipe, models / f"out{index}", **way)
    made = [(models / f"out{index}" / "model.safetensors").read_bytes() for index in range(len(ways))]
    assert all(other == made[0] for other in made)


def masks_of(folder: Path, base: Path) -> dict[str, torch.Tensor]:
    merged, origin = (load_file(one / "model.safetensors") for one in (folder, base))
    return {name: merged[name] != origin[name] for name in merged}


def test_tensors_of_one_shape_have_masks_of_their_own_and_edits_elsewhere_change_none(models: Path) -> None:
    node = {"op": "dare_linear", "base": "base", "inputs": ["a"], "density": 0.5, "rescale": "none"}
    run(recipe_of(models, node), models / "out")
    masks = masks_of(models / "out", models / "base")
    x, y = masks["x.weight"], masks["y.weight"]
    assert 500 < int(x.sum()) < 700
    assert 500 < int((x == y).sum()) < 700  # of 1200: as many as chance gives
    run(recipe_of(models, {**node, "inputs": [{"model": "b", "weight": 0.0}, "a"]}), models / "with_b")
    run(recipe_of(models, node, other={"op": "linear", "inputs": ["a", "b"]}), models / "with_node")
    for changed in ("with_b", "with_node"):
        assert all(torch.equal(mask, masks[key]) for key, mask in masks_of(models / changed, models / "base").items())
    run(recipe_of(models, {**node, "seed": 8}), models / "seeded")
    assert not torch.equal(masks_of(models / "seeded", models / "base")["x.weight"], x)


def test_layers_that_a_stack_renumbered_have_masks_of_their_own(tmp_path: Path) -> None:
    """One layer may stand in a stack twice, and layers of two models may have had one number."""
    base = {
        "embed.weight": normal(3, 4, seed=1),
        **{f"layers.{i}.weight": normal(40, 30, seed=2 + i) for i in range(2)},
    }
    write(tmp_path / "base", **base)
    for name in ("a", "b"):
        write(tmp_path / name, **{key: tensor + 1 for key, tensor in base.items()})

    def stack(first: str, second: str) -> dict[str, Any]:
        return {"op": "stack", "layers": [{"model": first, "take": "0-1"}, {"model": second, "take": "1-1"}]}

    node = {"op": "dare_linear", "base": "bases", "inputs": ["deltas"], "density": 0.5, "rescale": "none"}
    for second in ("a", "b"):
        more = {"bases": stack("base", "base"), "deltas": stack("a", second)}
        run(recipe_of(tmp_path, node, **more), tmp_path / f"out_{second}")
        made = load_file(tmp_path / f"out_{second}" / "model.safetensors")
        once, again = (made[f"layers.{number}.weight"] != base["layers.1.weight"] for number in (1, 2))
        assert 500 < int((once == again).sum()) < 700  # of 1200: as many as chance gives


def test_a_renamed_model_has_the_masks_of_the_names_in_its_checkpoint(models: Path) -> None:
    node = {"op": "dare_linear", "base": "base", "inputs": ["a"], "density": 0.5, "rescale": "none"}
    run(recipe_of(models, node), models / "out")
    for name in ("base", "a"):
        tensors = load_file(models / name / "model.safetensors")
        write(models / f"{name}_long", **{f"tower.{key}": tensor for key, tensor in tensors.items()})
    own = {"base": "./base_long", "a": {"path": "./a", "rename": {"*": "tower.*"}}}
    found = Recipe(models=own, nodes={"result": node}, output={"node": "result", "dtype": "float32"}, folder=models)
    run(found, models / "renamed")
    masks = masks_of(models / "out", models / "base")
    renamed = masks_of(models / "renamed", models / "base_long")
    assert all(torch.equal(renamed[f"tower.{name}"], mask) for name, mask in masks.items())


# Rules for all.


@each_op
def test_zero_deltas_give_the_base_bit_for_bit(op: DeltaOp) -> None:
    base = normal(20, 30, seed=1)
    assert same_bits(op(base, [base.clone(), base.clone()]), base)


@each_op
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1,), (1, 1), (5, 1), (2, 3), (2, 1, 3), (0, 2, 3)])
def test_small_and_empty_tensors_keep_their_shape_and_are_finite(op: DeltaOp, shape: tuple[int, ...]) -> None:
    for value in (normal(*shape, seed=1), torch.zeros(shape)):
        got = op(value.clone(), [value + 1, value - 2])
        assert got.shape == shape
        assert got.isfinite().all()


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_are_never_written_to_nor_given_back(op: DeltaOp, dtype: torch.dtype) -> None:
    tensors = [normal(30, 40, seed=i, dtype=dtype) for i in range(3)]
    before = [tensor.clone() for tensor in tensors]
    op(tensors[0], tensors[1:]).fill_(7)
    assert all(same_bits(a, b) for a, b in zip(tensors, before, strict=True))
    ready, keys = resolved(op, 2), keys_for(2)
    known = measure(ready, tensors, keys)
    ready.compute([cut_as(one, op.cut, (30, 40)) for one in tensors], Block(0, known, (30, 40), keys))
    assert all(same_bits(a, b) for a, b in zip(tensors, before, strict=True))


@each_op
def test_a_nan_or_inf_shows_in_the_result_where_the_op_says_so(op: DeltaOp) -> None:
    for which in range(3):
        for bad in (float("nan"), float("inf"), float("-inf")):
            for place in range(6):
                tensors = [normal(2, 3, seed=i) for i in range(3)]
                tensors[which].view(-1)[place] = bad
                assert not op.shows_non_finite or not op(tensors[0], tensors[1:]).view(-1)[place].isfinite()


def test_ops_that_draw_show_what_is_not_finite_and_breadcrumbs_may_hide_it() -> None:
    assert [op.shows_non_finite for op in (DareLinear, DareTies, DellaLinear, Della)] == [True] * 4
    assert [op.shows_non_finite for op in (Breadcrumbs, BreadcrumbsTies, EvolveCross)] == [False] * 3


@pytest.mark.parametrize(
    ("linear", "voting", "options"),
    [(DareLinear, DareTies, {}), (DellaLinear, Della, {}), (Breadcrumbs, BreadcrumbsTies, {"gamma": 0.0})],
)
def test_a_density_of_one_drops_nothing(linear: Any, voting: Any, options: dict[str, Any]) -> None:
    base, a, b = (normal(20, 30, seed=i) for i in range(3))
    weights = [0.3, 0.5]
    for rescale in ("none", "l1", "probability"):
        op = linear(weight=weights, rescale=rescale, **options)
        plain = TaskArithmetic(weight=weights, normalize=op.normalize)
        assert same_bits(op(base, [a, b]), plain(base, [a, b]))
        op = voting(weight=weights, rescale=rescale, **options)
        assert same_bits(op(base, [a, b]), Ties(weight=weights, normalize=op.normalize)(base, [a, b]))
        assert not resolved(op, 2).measures


def test_only_what_needs_a_norm_or_a_threshold_is_measured() -> None:
    measured = (DareLinear(density=0.5), Della(density=0.5), Breadcrumbs(), Breadcrumbs(density=0.5, gamma=0.0))
    drawn = (DareTies(density=0.5, rescale="none"), DareTies(density=0.5, rescale="probability"))
    drawn += (DellaLinear(density=0.5, rescale="none"),)
    assert all(resolved(op, 2).measures for op in measured)
    assert not any(resolved(op, 2).measures for op in drawn)


def test_defaults_are_those_of_the_papers_tools() -> None:
    assert [op.normalize for op in (DareLinear(), DareTies(), Breadcrumbs(), BreadcrumbsTies(), DellaLinear())] == [
        False
    ] * 5
    assert Della().normalize is True
    assert [op.rescale for op in (DareLinear(), Della(), Breadcrumbs())] == ["l1", "l1", "none"]
    assert (Della().epsilon, Breadcrumbs().gamma, EvolveCross().F, EvolveCross().Cr) == (0.15, 0.01, 0.5, 0.5)


def test_probabilities_beyond_one_are_refused_unless_nothing_is_dropped() -> None:
    for density, epsilon in ((0.1, 0.15), (0.9, 0.15), (0.5, 0.6)):
        with pytest.raises(RecipeError, match="must be in \\[0, 1\\]") as caught:
            resolved(Della(density=density, epsilon=epsilon), 2)
        assert "epsilon of at most" in (caught.value.fix or "")
    for density, epsilon in ((1.0, 0.15), (0.7, 0.3), (0.15, 0.15), (0.5, 0.5), (0.9, 0.1)):
        resolved(Della(density=density, epsilon=epsilon), 2)
    with pytest.raises(RecipeError, match="rescaled by probability"):
        resolved(Della(density=0.5, rank_axis=1, rescale="probability"), 1)


@pytest.mark.parametrize("build", [DareLinear, DellaLinear, Breadcrumbs])
def test_weights_that_sum_to_zero_are_refused_where_they_divide(build: Any) -> None:
    with pytest.raises(RecipeError, match="sum of the weights, which is 0"):
        resolved(build(weight=[1.0, -1.0], normalize=True), 2)
    resolved(build(weight=[1.0, -1.0]), 2)


@pytest.mark.parametrize("size", [0, 1, 7, LEAF, LEAF + 1, 4 * LEAF + 999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_leaves_are_exact_to_a_few_units_and_leave_their_values_alone(size: int, dtype: torch.dtype) -> None:
    values = normal(size, seed=1, dtype=dtype).abs()
    before = values.clone()
    found = leaf_sums(values)
    want = [math.fsum(leaf.tolist()) for leaf in values.split(LEAF)] if size else []
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(want, rel=2e-7 if dtype == torch.float32 else 1e-14)
    assert torch.equal(values, before)


@pytest.mark.parametrize("size", [0, 1, 7, LEAF, LEAF + 1, 4 * LEAF + 999])
@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_around_a_mask_are_those_of_what_it_keeps(size: int, norm: Any, dtype: torch.dtype) -> None:
    delta, mask = normal(size, seed=1, dtype=dtype), normal(size, seed=2) > 0
    found = norms_around(delta, mask, norm)
    for got, values in zip(found, (delta, masked(delta, mask)), strict=True):
        assert torch.equal(got, norm_parts(powers(values, norm), norm))

"""Ops on singular vectors, and those of the same papers' company, against slow float64 references written from their formulas."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file
from toys import write_model

from mergeflow import load_recipe, run
from mergeflow.errors import RecipeError
from mergeflow.ops import (
    LEAF,
    Block,
    Cart,
    Consensus,
    DeltaOp,
    IsoC,
    IsoCts,
    Knots,
    Magmax,
    Pcb,
    Star,
    TaskArithmetic,
    Ties,
    Tsv,
    Widen,
    Wudi,
    op_named,
)
from mergeflow.ops.base import spread
from mergeflow.ops.spectral import SpectralOp, preconditioned_svd, thin_svd
from mergeflow.settings import Place

Array = NDArray[np.float64]
quick = settings(max_examples=30, deadline=None)

shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))
counts = st.integers(1, 4)
seeds = st.integers(0, 2**31)

SPECTRAL: list[Callable[[], SpectralOp]] = [
    Tsv,
    IsoC,
    IsoCts,
    lambda: IsoCts(common=0.3),
    Star,
    Cart,
    lambda: Cart(rank=0.5),
    Knots,
    lambda: Knots(density=0.4),
    lambda: Wudi(steps=5),
    lambda: Wudi(method="exact"),
]
ELEMENTWISE: list[Callable[[], DeltaOp]] = [
    Magmax,
    Consensus,
    Pcb,
    lambda: Pcb(ratio=1.0),
    Widen,
    lambda: Widen(side="rows"),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in a run, where each op has one; small products are slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32, spread: float = 0.02) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread).to(dtype)


def models(
    shape: Sequence[int], count: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base, and models that moved a tenth of its size from it."""
    base = normal(*shape, seed=seed, dtype=dtype)
    return base, [base + normal(*shape, seed=seed + 1 + i, spread=0.002, dtype=dtype) for i in range(count)]


def deltas_of(base: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[Array]:
    """The deltas as they are merged: subtracted in the dtype of the models."""
    return [(tensor - base).double().numpy() for tensor in tensors]


def merged(op: DeltaOp, base: torch.Tensor, tensors: Sequence[torch.Tensor]) -> Array:
    """The merged delta in float64, not lost in the rounding of the base."""
    deltas = [tensor - base for tensor in tensors]
    return op(torch.zeros_like(base), deltas).double().numpy()


def relative(got: Array, want: Array) -> float:
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    return float(np.linalg.norm(got - want) / (np.linalg.norm(want) or 1.0))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(whole), b.view(whole))


# The references.


def svd(matrix: Array) -> tuple[Array, Array, Array]:
    return np.linalg.svd(matrix, full_matrices=False)


def orthogonal(matrix: Array) -> Array:
    """The orthogonal factor, without directions that the matrix does not have."""
    u, s, vh = svd(matrix)
    kept = s > 1e-9 * max(s.max(initial=0), 1e-300)
    return np.asarray(u[:, kept] @ vh[kept])


def reference_iso_c(taus: Sequence[Array]) -> Array:
    u, s, vh = svd(sum(taus[1:], taus[0]))
    return np.asarray(s.mean() * (u @ vh))


def reference_iso_cts(taus: Sequence[Array], common: float) -> Array:
    rank, count = min(taus[0].shape), len(taus)
    own = min(round((rank - int(common * rank)) / count), rank // count)
    shared = rank - own * count
    u, s, vh = (part for part in svd(sum(taus[1:], taus[0])))
    lefts, strengths, rights = [u[:, :shared]], [s[:shared]], [vh[:shared]]
    for tau in taus:
        projector = np.eye(len(tau)) - u[:, :shared] @ u[:, :shared].T
        own_u, own_s, own_vh = svd(projector @ tau)
        lefts.append(own_u[:, :own])
        strengths.append(own_s[:own])
        rights.append(own_vh[:own])
    return np.asarray(
        np.concatenate(strengths).mean() * orthogonal(np.concatenate(lefts, 1)) @ orthogonal(np.concatenate(rights))
    )


def reference_tsv(taus: Sequence[Array]) -> Array:
    kept = max(1, min(taus[0].shape) // len(taus))
    parts = [svd(tau) for tau in taus]
    left = orthogonal(np.concatenate([u[:, :kept] for u, _, _ in parts], 1))
    right = orthogonal(np.concatenate([vh[:kept] for _, _, vh in parts]))
    return np.asarray(left @ np.diag(np.concatenate([s[:kept] for _, s, _ in parts])) @ right)


def reference_star(taus: Sequence[Array], eta: float, weights: Sequence[float]) -> Array:
    total = np.zeros_like(taus[0])
    for tau, weight in zip(taus, weights, strict=True):
        u, s, vh = svd(tau)
        kept = 1
        while kept < len(s) and s[:kept].sum() < eta * s.sum():
            kept += 1
        total += weight * (u[:, :kept] * s[:kept] * (s.sum() / s[:kept].sum())) @ vh[:kept]
    return np.asarray(total / sum(weights))


def reference_cart(taus: Sequence[Array], weights: Sequence[float], rank: float, scale: float) -> Array:
    shares = [weight / sum(weights) for weight in weights]
    mean = np.asarray(sum(share * tau for share, tau in zip(shares, taus, strict=True)))
    kept = max(1, int(rank * min(mean.shape)))
    total = mean.copy()
    for share, tau in zip(shares, taus, strict=True):
        u, s, vh = svd(tau - mean)
        total += scale * len(taus) * share * (u[:, :kept] * s[:kept]) @ vh[:kept]
    return np.asarray(total)


def reference_ties(parts: Sequence[Array], weights: Sequence[float], density: float) -> Array:
    flat = [part.reshape(-1) for part in parts]
    kept = max(1, int(density * flat[0].size))
    rows = []
    for part, weight in zip(flat, weights, strict=True):
        order = np.argsort(-np.abs(part), kind="stable")[:kept]
        row = np.zeros_like(part)
        row[order] = part[order]
        rows.append(weight * row)
    table = np.stack(rows)
    elected = np.where(table.sum(0) >= 0, 1, -1)
    agree = (np.sign(table) == elected).astype(float)
    divisor = (agree * np.asarray(weights)[:, None]).sum(0)
    summed = (agree * table).sum(0)
    return np.divide(summed, divisor, out=np.zeros_like(summed), where=divisor != 0).reshape(parts[0].shape)


def reference_knots(taus: Sequence[Array], weights: Sequence[float], density: float) -> Array:
    u, s, vh = svd(np.concatenate(taus, 1))
    kept = s > 1e-6 * s[0]
    parts = np.split(np.diag(s[kept]) @ vh[kept], len(taus), axis=1)
    return np.asarray(u[:, kept] @ reference_ties(parts, weights, density))


def disturbance(found: torch.Tensor, taus: Sequence[Array]) -> torch.Tensor:
    """What WUDI makes small, by its formula."""
    total = torch.zeros((), dtype=torch.float64)
    for tau in map(torch.from_numpy, taus):
        total = total + ((found - tau) @ tau.T).square().sum() / tau.square().sum()
    return total


def reference_wudi(taus: Sequence[Array], steps: int, lr: float) -> Array:
    found = torch.from_numpy(sum(taus[1:], taus[0]).copy()).requires_grad_()
    adam = torch.optim.Adam([found], lr=lr)
    for _ in range(steps):
        adam.zero_grad()
        disturbance(found, taus).backward()  # type: ignore[no-untyped-call]
        adam.step()
    return found.detach().numpy()


def reference_wudi_exact(taus: Sequence[Array]) -> Array:
    """Least squares: the columns of [tau_1^T / |tau_1| ..] on both sides, by a solver of another kind."""
    stacked = np.concatenate([tau / np.linalg.norm(tau) for tau in taus])
    wanted = np.concatenate([(tau @ tau.T) / np.linalg.norm(tau) for tau in taus], axis=1)
    return np.linalg.lstsq(stacked, wanted.T, rcond=1e-10)[0].T


def reference_consensus(taus: Sequence[Array], lam: float, k: int) -> Array:
    total = sum(taus[1:], taus[0])
    masks = sum((np.abs(tau) >= lam * np.abs(total - tau)).astype(int) for tau in taus)
    return np.asarray(total * (masks >= k))


def reference_magmax(taus: Sequence[Array]) -> Array:
    table = np.stack(taus)
    last = len(taus) - 1 - np.abs(table[::-1]).argmax(0)
    return np.take_along_axis(table, last[None], 0)[0]


def softmax(values: Array) -> Array:
    raised = np.exp(values - values.max())
    return np.asarray(raised / raised.sum())


def spanned(values: Array) -> Array:
    low, high = values.min(), values.max()
    return np.zeros_like(values) if low == high else (values - low) / (high - low)


def reference_pcb(taus: Sequence[Array], ratio: float, weights: Sequence[float]) -> Array:
    flat = [tau.reshape(-1) for tau in taus]
    kept = max(1, int(ratio * flat[0].size))
    above, below = np.zeros_like(flat[0]), np.zeros_like(flat[0])
    for tau, weight in zip(flat, weights, strict=True):
        share = softmax(len(taus) * spanned(tau * tau)) * sum(softmax(spanned(tau * other)) for other in flat)
        mask = np.zeros_like(share)
        mask[np.argsort(-share, kind="stable")[:kept]] = 1
        above += mask * share * weight * tau
        below += mask * share
    return np.divide(above, below, out=np.zeros_like(above), where=below != 0).reshape(taus[0].shape)


def reference_widen(base: Array, taus: Sequence[Array], t: float, s: float) -> Array:
    def scores(significance: Array, unit: float) -> Array:
        """`unit` is what whole places are divided by, so that the mean of places is exact."""
        raised = np.exp(significance / unit)
        found = raised / raised.sum(0)
        found[significance > t * significance.mean(1, keepdims=True)] = s
        return np.asarray(found)

    if base.ndim < 2:
        table = np.stack([tau.reshape(-1) for tau in taus])
        return np.asarray((scores(np.abs(table), 1) * table).sum(0).reshape(base.shape))
    flat = base.reshape(-1, base.shape[-1])
    lengths, turns = [], []
    for tau in taus:
        theta = flat + tau.reshape(flat.shape)
        norms = np.linalg.norm(theta, axis=0), np.linalg.norm(flat, axis=0)
        lengths.append(np.abs(norms[0] - norms[1]))
        turns.append(1 - (theta * flat).sum(0) / (norms[0] * norms[1]))
    n = flat.shape[1]
    ranked = []
    for table in (lengths, turns):
        rank = np.zeros((len(taus), n))
        for row, values in zip(rank, table, strict=True):
            row[np.argsort(values, kind="stable")] = np.arange(n)
        ranked.append(rank)
    weight = (scores(ranked[0], n) + scores(ranked[1], n)) / 2
    return np.asarray(sum(w * tau for w, tau in zip(weight[:, None], taus, strict=True)))


# Singular vectors against the references.


@quick
@given(shape=shapes, count=counts, seed=seeds, wide=st.booleans())
def test_iso_c_makes_all_singular_values_their_mean(shape: tuple[int, int], count: int, seed: int, wide: bool) -> None:
    base, tensors = models(shape, count, seed, torch.float64 if wide else torch.float32)
    taus = deltas_of(base, tensors)
    assert relative(merged(IsoC(), base, tensors), reference_iso_c(taus)) < (1e-9 if wide else 1e-5)
    weighted = reference_iso_c([0.5 * tau for tau in taus])
    assert relative(merged(IsoC(weight=0.5, scale=-2.0), base, tensors), -2 * weighted) < (1e-9 if wide else 1e-5)


def test_what_iso_c_gives_has_one_singular_value() -> None:
    base, tensors = models((20, 30), 3, 1)
    values = np.linalg.svd(merged(IsoC(), base, tensors), compute_uv=False)
    assert values == pytest.approx(np.full(20, svd(sum(deltas_of(base, tensors)))[1].mean()), rel=1e-5)


@quick
@given(shape=shapes, count=counts, seed=seeds, common=st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]))
def test_iso_cts_joins_the_common_space_with_what_each_delta_has_outside_it(
    shape: tuple[int, int], count: int, seed: int, common: float
) -> None:
    base, tensors = models(shape, count, seed, torch.float64)
    want = reference_iso_cts(deltas_of(base, tensors), common)
    assert relative(merged(IsoCts(common=common), base, tensors), want) < 1e-7


@pytest.mark.parametrize("shape", [(48, 48), (24, 60), (60, 24)])
@pytest.mark.parametrize("count", [2, 3])
def test_ops_on_singular_vectors_are_exact_to_float32(shape: tuple[int, int], count: int) -> None:
    base, tensors = models(shape, count, 7)
    taus = deltas_of(base, tensors)
    assert relative(merged(IsoCts(), base, tensors), reference_iso_cts(taus, 0.8)) < 1e-6
    assert relative(merged(Tsv(), base, tensors), reference_tsv(taus)) < 1e-6
    assert relative(merged(Star(), base, tensors), reference_star(taus, 0.4, [1] * count)) < 1e-6
    assert relative(merged(Cart(), base, tensors), reference_cart(taus, [1] * count, 0.08, 1)) < 1e-6
    assert relative(merged(Knots(), base, tensors), reference_knots(taus, [1] * count, 1)) < 1e-6
    assert relative(merged(Wudi(), base, tensors), reference_wudi(taus, 300, 1e-5)) < 1e-5
    assert relative(merged(Wudi(method="exact"), base, tensors), reference_wudi_exact(taus)) < 1e-6


def test_a_common_space_of_everything_is_iso_c() -> None:
    base, tensors = models((9, 14), 3, 3)
    assert relative(merged(IsoCts(common=1.0), base, tensors), merged(IsoC(), base, tensors)) < 1e-6


@quick
@given(shape=shapes, count=counts, seed=seeds)
def test_tsv_makes_the_strongest_directions_orthogonal(shape: tuple[int, int], count: int, seed: int) -> None:
    base, tensors = models(shape, count, seed, torch.float64)
    assert relative(merged(Tsv(), base, tensors), reference_tsv(deltas_of(base, tensors))) < 1e-7


def test_tsv_keeps_the_kept_singular_values() -> None:
    base, tensors = models((30, 40), 3, 5)
    kept = np.sort(np.concatenate([svd(tau)[1][:10] for tau in deltas_of(base, tensors)]))[::-1]
    assert np.linalg.svd(merged(Tsv(), base, tensors), compute_uv=False) == pytest.approx(kept, rel=1e-5)


@quick
@given(shape=shapes, count=counts, seed=seeds, eta=st.sampled_from([0.1, 0.4, 0.77, 1.0]))
def test_star_keeps_a_share_of_the_nuclear_norm_and_scales_it_to_all(
    shape: tuple[int, int], count: int, seed: int, eta: float
) -> None:
    base, tensors = models(shape, count, seed)
    weights = [1.0, 0.5, 2.0, 0.25][:count]
    op = Star(eta=eta, weight=weights, scale=0.5)
    want = 0.5 * reference_star(deltas_of(base, tensors), eta, weights)
    assert relative(merged(op, base, tensors), want) < 1e-5


def test_star_without_normalize_is_a_sum() -> None:
    base, tensors = models((9, 14), 3, 3)
    got = merged(Star(normalize=False), base, tensors)
    assert relative(got, 3 * merged(Star(), base, tensors)) < 1e-6
    with pytest.raises(RecipeError, match="divides by the sum of the weights"):
        Star(weight=[1.0, -1.0])(base, tensors[:2])


@quick
@given(
    shape=shapes, count=counts, seed=seeds, rank=st.sampled_from([0.08, 0.3, 0.9]), scale=st.sampled_from([1.0, 0.4])
)
def test_cart_adds_the_strongest_differences_to_the_average(
    shape: tuple[int, int], count: int, seed: int, rank: float, scale: float
) -> None:
    base, tensors = models(shape, count, seed)
    for weights in ([1.0] * count, [1.0, 0.5, 2.0, 0.25][:count]):
        want = reference_cart(deltas_of(base, tensors), weights, rank, scale)
        assert relative(merged(Cart(weight=weights, rank=rank, scale=scale), base, tensors), want) < 1e-5


def test_cart_with_all_directions_is_the_average() -> None:
    base, tensors = models((9, 14), 3, 3)
    average = sum(deltas_of(base, tensors)) / 3
    assert relative(merged(Cart(rank=1.0), base, tensors), average) < 1e-6
    assert relative(merged(Cart(scale=0.0), base, tensors), average) < 1e-6
    assert relative(merged(Cart(), base, tensors), average) > 0.1
    with pytest.raises(RecipeError, match="sum of the weights, which is 0: 1, -1, 0"):
        Cart(weight=[1.0, -1.0, 0.0])(base, tensors)


@quick
@given(shape=shapes, count=counts, seed=seeds, density=st.sampled_from([0.2, 0.5, 1.0]))
def test_knots_is_ties_on_what_one_decomposition_aligns(
    shape: tuple[int, int], count: int, seed: int, density: float
) -> None:
    base, tensors = models(shape, count, seed, torch.float64)
    weights = [1.0, 0.5, 2.0, 0.25][:count]
    got = merged(Knots(weight=weights, density=density, scale=0.7), base, tensors)
    assert relative(got, 0.7 * reference_knots(deltas_of(base, tensors), weights, density)) < 1e-6


# WUDI.


@settings(max_examples=20, deadline=None)
@given(shape=st.tuples(st.integers(1, 6), st.integers(1, 30)), count=counts, seed=seeds, steps=st.integers(0, 20))
def test_wudi_takes_the_steps_of_adam(shape: tuple[int, int], count: int, seed: int, steps: int) -> None:
    """Wide matrices too, whose gradient is taken in another way."""
    base, tensors = models(shape, count, seed, torch.float64)
    want = reference_wudi(deltas_of(base, tensors), steps, 1e-4)
    got = merged(Wudi(steps=steps, lr=1e-4), base, tensors)
    # A single input starts at the minimum, where the reference's slope is rounding.
    assert relative(got, want) < (1e-3 if count == 1 else 1e-6)


@settings(max_examples=20, deadline=None)
@given(shape=st.tuples(st.integers(1, 6), st.integers(1, 30)), count=counts, seed=seeds)
def test_wudi_exact_is_the_smallest_least_squares_solution(shape: tuple[int, int], count: int, seed: int) -> None:
    base, tensors = models(shape, count, seed, torch.float64)
    taus = deltas_of(base, tensors)
    got, want = merged(Wudi(method="exact"), base, tensors), reference_wudi_exact(taus)
    assert (
        float(disturbance(torch.from_numpy(got), taus))
        <= float(disturbance(torch.from_numpy(want), taus)) * 1.000001 + 1e-18
    )
    assert np.linalg.norm(got) <= np.linalg.norm(want) * 1.0001


def test_adam_goes_where_the_exact_minimum_is() -> None:
    base, tensors = models((10, 6), 3, 11)
    taus = deltas_of(base, tensors)
    exact = merged(Wudi(method="exact"), base, tensors)
    distances = [relative(merged(Wudi(steps=steps, lr=1e-4), base, tensors), exact) for steps in (0, 30, 300, 3000)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.05
    losses = [
        float(disturbance(torch.from_numpy(merged(op, base, tensors)), taus))
        for op in (Wudi(steps=0), Wudi(), Wudi(method="exact"))
    ]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("method", ["adam", "exact"])
def test_a_delta_of_zero_has_no_say_in_wudi(method: Any) -> None:
    base, tensors = models((6, 9), 2, 2)
    op = Wudi(method=method, steps=20)
    assert relative(merged(op, base, [*tensors, base]), merged(op, base, tensors)) == 0
    weighted = Wudi(method=method, steps=20, weight=[1.0, 1.0, 0.0])
    assert relative(merged(weighted, base, [*tensors, tensors[0]]), merged(op, base, tensors)) == 0
    assert not merged(Wudi(method=method, weight=0.0), base, tensors).any()


# What holds for all that decompose.


@pytest.mark.parametrize("make", SPECTRAL)
@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0), (1, 1), (1, 7), (7, 1), (5, 5), (3, 20), (20, 3)])
@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_matrices_of_every_form_give_something_finite(
    make: Callable[[], SpectralOp], shape: tuple[int, int], count: int
) -> None:
    base, tensors = models(shape, count, 1)
    got = make()(base, tensors)
    assert got.shape == base.shape
    assert got.isfinite().all()


@pytest.mark.parametrize("make", SPECTRAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_zero_deltas_give_the_base_bit_for_bit(make: Callable[[], SpectralOp], dtype: torch.dtype) -> None:
    base = normal(6, 9, seed=1, dtype=dtype)
    base[0, 0] = -0.0
    assert same_bits(make()(base, [base, base, base]), base)
    assert same_bits(make()(base, [base]), base)


@pytest.mark.parametrize("make", SPECTRAL)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(make: Callable[[], SpectralOp], bad: float) -> None:
    base, tensors = models((6, 9), 2, 1)
    tensors[1][2, 3] = bad
    assert not make()(base, tensors).isfinite().all()


@pytest.mark.parametrize(
    "op",
    [Tsv(), IsoC(), IsoCts(), IsoCts(common=0.3), Star(), Cart(), Cart(rank=0.5), Wudi(method="exact")],
    ids=lambda op: op.name,
)
def test_deltas_of_low_rank_give_what_their_directions_alone_say(op: SpectralOp) -> None:
    """Turning both sides turns the result, which noise in place of the missing directions would not survive."""
    tall, wide = normal(3, 12, 2, seed=1, dtype=torch.float64), normal(3, 2, 15, seed=2, dtype=torch.float64)
    deltas = [a @ b for a, b in zip(tall, wide, strict=True)]
    turn, flip = (torch.linalg.qr(normal(n, n, seed=n, dtype=torch.float64)).Q for n in (12, 15))
    zero = torch.zeros(12, 15)
    got = op(zero, [delta.float() for delta in deltas])
    turned = op(zero, [(turn @ delta @ flip).float() for delta in deltas])
    assert relative(turned.double().numpy(), (turn @ got.double() @ flip).numpy()) < 1e-5


@pytest.mark.parametrize("make", SPECTRAL)
def test_the_order_of_the_inputs_does_not_matter(make: Callable[[], SpectralOp]) -> None:
    base, tensors = models((8, 11), 3, 4)
    assert relative(merged(make(), base, tensors[::-1]), merged(make(), base, tensors)) < 1e-5


@pytest.mark.parametrize(
    "op", [Tsv(), Star(eta=1.0), Cart(), Knots(), Wudi(), Wudi(method="exact")], ids=lambda op: op.name
)
@pytest.mark.parametrize("shape", [(8, 11), (11, 8), (1, 5), (5, 1), (2, 30)])
def test_one_input_gives_that_input(op: SpectralOp, shape: tuple[int, int]) -> None:
    base, tensors = models(shape, 1, 4)
    assert relative(merged(op, base, tensors), deltas_of(base, tensors)[0]) < 1e-6


@pytest.mark.parametrize("op", [Star(eta=1.0), Cart(), Knots()], ids=lambda op: op.name)
@pytest.mark.parametrize("count", [2, 3, 7])
def test_equal_inputs_give_that_input(op: SpectralOp, count: int) -> None:
    base, tensors = models((8, 11), 1, 4)
    assert relative(merged(op, base, tensors * count), deltas_of(base, tensors)[0]) < 1e-6


def test_equal_inputs_of_tsv_give_their_strongest_directions() -> None:
    base, tensors = models((8, 11), 1, 4)
    u, s, vh = svd(deltas_of(base, tensors)[0])
    assert relative(merged(Tsv(), base, tensors * 2), (u[:, :4] * s[:4]) @ vh[:4]) < 1e-6


@pytest.mark.parametrize("make", SPECTRAL)
def test_the_result_has_the_dtype_of_the_base_and_the_same_bits_each_time(make: Callable[[], SpectralOp]) -> None:
    base, tensors = models((8, 11), 3, 4)
    halves = base.bfloat16(), [tensor.bfloat16() for tensor in tensors]
    assert make()(*halves).dtype == torch.bfloat16
    before = [tensor.clone() for tensor in (base, *tensors)]
    assert same_bits(make()(base, tensors), make()(base, tensors))
    assert all(same_bits(old, new) for old, new in zip(before, (base, *tensors), strict=True))


@pytest.mark.parametrize("make", SPECTRAL)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4)])
def test_only_matrices_are_decomposed(make: Callable[[], SpectralOp], shape: tuple[int, ...]) -> None:
    base, tensors = models(shape, 2, 4)
    with pytest.raises(RecipeError, match="two axes"):
        make()(base, tensors)


@quick
@given(shape=st.tuples(st.integers(0, 9), st.integers(0, 9)), rank=st.integers(0, 9), seed=seeds)
def test_the_second_way_of_decomposing_is_as_good_as_the_first(shape: tuple[int, int], rank: int, seed: int) -> None:
    rank = min(rank, *shape)
    matrix = normal(shape[0], rank, seed=seed, dtype=torch.float64) @ normal(
        rank, shape[1], seed=seed + 1, dtype=torch.float64
    )
    u, s, vh = preconditioned_svd(matrix)
    size = float(torch.linalg.matrix_norm(matrix)) if matrix.numel() else 0.0
    torch.testing.assert_close((u * s) @ vh, matrix, rtol=0, atol=1e-13 * size)
    torch.testing.assert_close(s, torch.linalg.svdvals(matrix), rtol=0, atol=1e-13 * size)
    for side in (u.mT @ u, vh @ vh.mT):
        torch.testing.assert_close(side, torch.eye(min(shape), dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_decomposition_that_does_not_converge_is_tried_in_the_second_way(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = normal(7, 5, seed=1, dtype=torch.float64)
    want, decompose, asked = thin_svd(matrix, 1e-7), torch.linalg.svd, []

    def fails_once(tensor: torch.Tensor, **options: Any) -> Any:
        asked.append(tensor)
        if len(asked) == 1:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")  # type: ignore[attr-defined]
        return decompose(tensor, **options)

    monkeypatch.setattr(torch.linalg, "svd", fails_once)
    got = thin_svd(matrix, 1e-7)
    assert len(asked) == 2
    torch.testing.assert_close(got.matrix(), want.matrix())
    torch.testing.assert_close(got.s, want.s)


# What is computed in blocks.


def resolved(op: DeltaOp, count: int) -> Any:
    return op.resolved(op.values_at(Place("w"), range(count)))


def in_blocks(op: DeltaOp, inputs: Sequence[torch.Tensor], size: int) -> torch.Tensor:
    """The op on a base and deltas, in blocks of so many leaves of flat tensors, or of so many rows."""
    ready, shape, rows = resolved(op, len(inputs) - 1), tuple(inputs[0].shape), op.cut == "row"
    given = [tensor.reshape(-1, shape[-1] if shape else 1) if rows else tensor.reshape(-1) for tensor in inputs]
    step, unit = (size, given[0].shape[1]) if rows else (size * LEAF, 1)
    starts = range(0, max(len(given[0]), 1), step)
    blocks = [[tensor[start : start + step] for tensor in given] for start in starts]
    known: tuple[Any, ...] = ()
    while (reduction := ready.reduction(known)) is not None:
        if reduction.sample:
            total = reduction.merge([reduction.block([spread(tensor) for tensor in given], Block(0, known, shape))])
        else:
            total = None
            for start, block in zip(starts, blocks, strict=True):
                part = reduction.block(block, Block(start * unit, known, shape))
                total = part if total is None else reduction.merge([total, part])
        known = (*known, reduction.finish(total))
    parts = [
        ready.compute(block, Block(start * unit, known, shape)) for start, block in zip(starts, blocks, strict=True)
    ]
    return torch.cat(parts).reshape(shape)


any_shape = st.sampled_from([(), (1,), (7,), (3, 5), (5, 3), (1, 9), (9, 1), (2, 3, 4), (40, 30)])


@quick
@given(shape=any_shape, count=st.integers(1, 4), seed=seeds)
def test_magmax_takes_the_delta_that_moved_furthest(shape: tuple[int, ...], count: int, seed: int) -> None:
    base, tensors = models(shape, count, seed)
    weights = [1.0, -2.0, 0.5, 0.25][:count]
    taus = [w * tau for w, tau in zip(weights, deltas_of(base, tensors), strict=True)]
    assert relative(merged(Magmax(weight=weights, scale=0.5), base, tensors), 0.5 * reference_magmax(taus)) < 1e-6


def test_magmax_takes_the_last_among_equals() -> None:
    zero, up = torch.zeros(3), torch.tensor([1.0, 2.0, 0.0])
    assert Magmax()(zero, [up, -up]).tolist() == [-1.0, -2.0, 0.0]
    assert Magmax()(zero, [-up, up]).tolist() == [1.0, 2.0, 0.0]


@quick
@given(shape=any_shape, count=st.integers(2, 4), seed=seeds, lam=st.sampled_from([0.2, 0.4, 1.0]), k=st.integers(0, 2))
def test_consensus_keeps_what_enough_masks_have(
    shape: tuple[int, ...], count: int, seed: int, lam: float, k: int
) -> None:
    base, tensors = models(shape, count, seed)
    want = 0.3 * reference_consensus(deltas_of(base, tensors), lam, k)
    assert relative(merged(Consensus(lam=lam, k=k, scale=0.3), base, tensors), want) < 1e-6


def test_consensus_of_no_masks_is_task_arithmetic() -> None:
    base, tensors = models((5, 6), 3, 1)
    assert same_bits(Consensus(k=0)(base, tensors), TaskArithmetic()(base, tensors))


def test_consensus_refuses_more_masks_than_inputs() -> None:
    base, tensors = models((5, 6), 2, 1)
    with pytest.raises(RecipeError, match="no entry can be in 3 masks of 2 inputs"):
        Consensus(k=3)(base, tensors)


@quick
@given(shape=any_shape, count=st.integers(1, 4), seed=seeds, ratio=st.sampled_from([0.05, 0.3, 1.0]))
def test_pcb_balances_and_drops(shape: tuple[int, ...], count: int, seed: int, ratio: float) -> None:
    base, tensors = models(shape, count, seed)
    weights = [1.0, 1.2, 0.8, -1.0][:count]
    want = 0.5 * reference_pcb(deltas_of(base, tensors), ratio, weights)
    assert relative(merged(Pcb(ratio=ratio, weight=weights, scale=0.5), base, tensors), want) < 1e-6


@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_pcb_is_the_same_in_blocks_of_any_size(ratio: float) -> None:
    base, tensors = models((3 * LEAF + 77,), 3, 1)
    inputs = [base, *(tensor - base for tensor in tensors)]
    found = [in_blocks(Pcb(ratio=ratio), inputs, leaves) for leaves in (1, 2, 5)]
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])
    want = reference_pcb([tensor.double().numpy() for tensor in inputs[1:]], ratio, [1, 1, 1])
    assert relative((found[0] - base).double().numpy(), want) < 1e-5


def test_one_or_equal_inputs_of_pcb_give_that_input_where_nothing_is_dropped() -> None:
    base, tensors = models((5, 6), 1, 1)
    for count in (1, 3):
        assert relative(merged(Pcb(ratio=1.0), base, tensors * count), deltas_of(base, tensors)[0]) < 1e-6


@quick
@given(
    shape=any_shape.filter(lambda shape: shape != (1, 9)),  # one entry turns by nothing or by half a circle
    count=st.integers(1, 4),
    seed=seeds,
    t=st.sampled_from([0.5, 1.0, 1.7]),
    s=st.sampled_from([1.0, 0.3]),
)
def test_widen_weights_columns_by_how_far_they_moved(
    shape: tuple[int, ...], count: int, seed: int, t: float, s: float
) -> None:
    base, tensors = models(shape, count, seed, torch.float64)
    deltas = [tensor - base for tensor in tensors]
    got = (in_blocks(Widen(t=t, s=s), [base, *deltas], 1000) - base).numpy()
    taus = [delta.numpy() for delta in deltas]
    assert relative(got, reference_widen(base.numpy(), taus, t, s)) < 1e-6


def test_widen_by_rows_is_widen_of_the_transposed_matrix() -> None:
    base, tensors = models((30, 50), 3, 1, torch.float64)
    turned = Widen()(base.T.contiguous(), [tensor.T.contiguous() for tensor in tensors]).T
    torch.testing.assert_close(Widen(side="rows")(base, tensors), turned, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("side", ["columns", "rows"])
def test_widen_reads_a_matrix_by_blocks_of_rows(side: Any) -> None:
    base, tensors = models((53, 20), 3, 1)
    inputs = [base, *(tensor - base for tensor in tensors)]
    whole = in_blocks(Widen(side=side), inputs, 53)
    for rows in (1, 7, 52):
        torch.testing.assert_close(in_blocks(Widen(side=side), inputs, rows), whole, rtol=0, atol=1e-8)


def test_one_input_of_widen_gives_that_input() -> None:
    for shape in ((6, 9), (9,), ()):
        base, tensors = models(shape, 1, 1)
        assert relative(merged(Widen(), base, tensors), deltas_of(base, tensors)[0]) < 1e-6


def test_columns_of_zeros_have_directions_too() -> None:
    base, tensors = models((6, 4), 2, 1)
    base[:, 0], tensors[0][:, 0] = 0, 0
    base[:, 1] = 0
    tensors[1][:, 2] = 0
    assert Widen()(base, tensors).isfinite().all()


@pytest.mark.parametrize("make", ELEMENTWISE)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1,), (1, 1), (4, 5), (2, 3, 4)])
def test_zero_deltas_and_tensors_of_every_form_are_defined(make: Callable[[], DeltaOp], shape: tuple[int, ...]) -> None:
    base, tensors = models(shape, 3, 1)
    assert make()(base, tensors).isfinite().all()
    assert same_bits(make()(base, [base, base]), base)


@pytest.mark.parametrize("make", ELEMENTWISE)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_no_op_in_blocks_hides_what_is_not_finite(make: Callable[[], DeltaOp], bad: float, which: int) -> None:
    base, tensors = models((6, 9), 2, 1)
    tensors[which][2, 3] = bad
    assert not make()(base, tensors).isfinite().all()


def test_ties_is_what_knots_turns_into_where_there_is_nothing_to_align() -> None:
    """The left vectors of one row are +-1, so both trim and vote on the same entries."""
    base, tensors = models((1, 40), 3, 1)
    got = merged(Knots(density=0.5), base, tensors)
    assert relative(got, merged(Ties(density=0.5), base, tensors)) < 1e-6


# Through recipes and files.

RUNS: list[tuple[str, dict[str, Any]]] = [
    ("tsv", {}),
    ("iso_c", {}),
    ("iso_cts", {"common": 0.5}),
    ("knots", {"density": 0.3}),
    ("star", {}),
    ("cart", {}),
    ("wudi", {"steps": 4}),
    ("wudi", {"method": "exact"}),
    ("magmax", {}),
    ("consensus", {}),
    ("pcb", {"ratio": 0.3}),
    ("widen", {}),
    ("widen", {"side": "rows"}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` and three fine-tunes of it, with a tensor of several segments and one of one axis."""
    folder = tmp_path_factory.mktemp("models")
    draw = np.random.default_rng(0)
    forms = {"embed_tokens.weight": (20_000, 24), "layers.0.mlp.weight": (48, 64), "layers.0.mlp.bias": (700,)}
    base = {name: draw.standard_normal(shape).astype(np.float32) / 50 for name, shape in forms.items()}
    write_model(folder / "base", base)
    for name in "abc":
        moved = {key: value + draw.standard_normal(value.shape).astype(np.float32) / 500 for key, value in base.items()}
        write_model(folder / name, moved)
    return folder


@pytest.mark.parametrize(("name", "parameters"), RUNS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_run_gives_what_the_op_gives_whatever_the_threads_and_the_memory(
    name: str, parameters: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    node = {"op": name, "base": "base", "inputs": ["a", "b", "c"], **parameters}
    models_ = {one: str(folder / one) for one in ("base", "a", "b", "c")}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"recipe": 1, "name": "merged", "models": models_, "nodes": {"merged": node}}))
    made = []
    for threads, memory in ((1, 2**31), (2, 2**31), (2, 2**28)):
        out = tmp_path / f"{threads}-{memory}"
        run(load_recipe(recipe), out, threads=threads, memory=memory)
        made.append(load_file(out / "model.safetensors"))
    for other in made[1:]:
        assert all(same_bits(made[0][key], other[key]) for key in made[0])
    stored = {one: load_file(folder / one / "model.safetensors") for one in models_}
    op = op_named(name)(**parameters)
    for key, tensor in made[0].items():
        inputs = [stored[one][key] for one in "abc"]
        want = (
            sum(inputs[1:], inputs[0]) / 3 if op.matrices_only and tensor.ndim != 2 else op(stored["base"][key], inputs)
        )
        torch.testing.assert_close(tensor, want, rtol=0, atol=1e-7)

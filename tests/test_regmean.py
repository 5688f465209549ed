"""`regmean` and `fisher` against float64 references written from the formulas, alone and in runs from files on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import files_of, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from test_statistics import facts
from torch import Tensor

from mergeflow import Recipe, plan, run
from mergeflow.checkpoint import open_checkpoint
from mergeflow.checkpoint.statistics import Codec, encode, marks
from mergeflow.errors import MergeflowError, NumericError
from mergeflow.hub import locate
from mergeflow.ops import Block, Fisher, RegMean, measure
from mergeflow.ops.base import numbers
from mergeflow.ops.fisher import FisherMean, Floor
from mergeflow.settings import Place

Array = NDArray[np.float64]
SOLVERS = ("cholesky", "cg", "lstsq")


@dataclass(frozen=True)
class Rows:
    """A tensor that is read by rows."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        return self.tensor[start:stop]


def merged(
    weights: Sequence[Array],
    grams: Sequence[Array],
    base: Array | None = None,
    *,
    c: Sequence[float] | None = None,
    transposed: bool = False,
    reference: int | None = None,
    dtype: torch.dtype = torch.float64,
    n_tokens: Sequence[int] = (),
    codecs: Sequence[str] = (),
    **parameters: Any,
) -> Array:
    """The op at one weight, on arrays in the layout (out, in), or (in, out) on the way where `transposed`."""
    op = RegMean(**parameters)
    ready = op.resolved(op.values_at(Place("w"), range(len(weights))))
    solve = ready.solve(
        c or [1.0] * len(weights),
        based=base is not None,
        reference=reference,
        transposed=transposed,
        module="layer.w",
        n_tokens=n_tokens,
        codecs=codecs,
    )

    def laid(array: Array) -> Rows:
        return Rows(torch.from_numpy(array.T if transposed else array).to(dtype).contiguous())

    given = [laid(one) for one in weights] + ([laid(base)] if base is not None else [])
    found = solve.compute_lazily(
        given + [Rows(torch.from_numpy(np.ascontiguousarray(one)).to(dtype)) for one in grams], Block()
    )
    assert found.dtype == dtype and tuple(found.shape) == given[0].shape
    return (found.mT if transposed else found).double().numpy()


def noise(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def inputs_of(seed: int, n: int, d: int) -> Array:
    """Inputs with correlated channels of different sizes."""
    return noise(seed, n, d) @ (np.eye(d) + 0.4 * noise(seed + 100, d, d) / np.sqrt(d)) * np.linspace(0.5, 3, d)


def gram(x: Array) -> Array:
    return x.T @ x / len(x)


def stacked(xs: Sequence[Array], weights: Sequence[Array], c: Sequence[float], alpha: float) -> tuple[Array, Array]:
    """The rows whose least squares problem regmean is: those of the data, and of the ridge that alpha stands for."""
    rows, right = [], []
    for x, w, share in zip(xs, weights, c, strict=True):
        data = np.sqrt(share * alpha / len(x)) * x
        ridge = np.sqrt(share * (1 - alpha)) * np.diag(np.sqrt((x**2).mean(0)))
        for part in (data, ridge):
            rows.append(part)
            right.append(part @ w.T)
    return np.concatenate(rows), np.concatenate(right)


def oracle(
    xs: Sequence[Array],
    weights: Sequence[Array],
    c: Sequence[float] | None = None,
    alpha: float = 0.9,
    around: Array | None = None,
) -> Array:
    """The smallest correction of `around` (default: the weighted mean) that solves the least squares problem."""
    shares = list(c or [1.0] * len(xs))
    middle = around if around is not None else sum(s * w for s, w in zip(shares, weights, strict=True)) / sum(shares)
    rows, right = stacked(xs, weights, shares, alpha)
    return middle + np.linalg.lstsq(rows, right - rows @ middle.T, rcond=1e-9)[0].T


def objective(w: Array, xs: Sequence[Array], weights: Sequence[Array], c: Sequence[float]) -> float:
    return sum(s * float(((x @ (w - own).T) ** 2).mean(0).sum()) for x, own, s in zip(xs, weights, c, strict=True))


def near(found: Array, right: Array, tolerance: float = 1e-9) -> None:
    assert np.linalg.norm(found - right) <= tolerance * max(np.linalg.norm(right), 1e-30)


# Against least squares


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(7, 12), (12, 12), (20, 5), (1, 6), (9, 1)], ids=str)
def test_it_is_least_squares_on_all_inputs(shape: tuple[int, int], alpha: float, solver: str, transposed: bool) -> None:
    out, d = shape
    xs = [inputs_of(seed, 60 + 10 * seed, d) for seed in range(3)]
    weights = [noise(10 + seed, out, d) for seed in range(3)]
    c = (1.0, 2.5, 0.5)
    right = oracle(xs, weights, c, alpha)
    grams = [gram(x) for x in xs]
    found = merged(weights, grams, c=c, alpha=alpha, solver=solver, transposed=transposed)
    near(found, right, 1e-8)
    single = merged(weights, grams, c=c, alpha=alpha, solver=solver, transposed=transposed, dtype=torch.float32)
    near(single, right, 1e-5)


@settings(deadline=None, max_examples=25)
@given(
    out=st.integers(1, 9),
    d=st.integers(1, 9),
    count=st.integers(1, 4),
    alpha=st.floats(0, 1),
    solver=st.sampled_from(SOLVERS),
    seed=st.integers(0, 1000),
)
def test_any_shapes_and_numbers_of_models_agree_with_least_squares(
    out: int, d: int, count: int, alpha: float, solver: str, seed: int
) -> None:
    xs = [inputs_of(seed + i, 50, d) for i in range(count)]
    weights = [noise(seed + 50 + i, out, d) for i in range(count)]
    near(merged(weights, [gram(x) for x in xs], alpha=alpha, solver=solver), oracle(xs, weights, alpha=alpha), 1e-7)


def test_gradient_descent_comes_to_the_same_weights() -> None:
    xs = [inputs_of(seed, 40, 5) for seed in range(2)]
    weights = [noise(seed, 4, 5) for seed in range(2)]
    w = np.zeros((4, 5))
    total = sum(gram(x) for x in xs)
    for _ in range(20_000):
        slope = sum((w - own) @ gram(x) for x, own in zip(xs, weights, strict=True))
        w = w - slope / np.linalg.eigvalsh(total)[-1]
    near(merged(weights, [gram(x) for x in xs], alpha=1.0), w, 1e-9)


def test_blocks_of_outputs_and_of_gram_rows_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    from mergeflow.ops import regmean

    xs = [inputs_of(seed, 100, 13) for seed in range(2)]
    weights = [noise(seed, 31, 13) for seed in range(2)]
    grams = [gram(x) for x in xs]
    base = noise(9, 31, 13)
    whole = {s: merged(weights, grams, base, scale=0.7, solver=s) for s in SOLVERS}
    monkeypatch.setattr(regmean, "_ENTRIES", 40)
    monkeypatch.setattr(regmean, "_OUTPUTS", 40)
    for solver in SOLVERS:
        for transposed in (False, True):
            near(merged(weights, grams, base, scale=0.7, solver=solver, transposed=transposed), whole[solver], 1e-10)


# The algebra


@pytest.mark.parametrize("solver", SOLVERS)
def test_equal_models_give_that_model_whatever_their_inputs(solver: str) -> None:
    w = noise(1, 6, 8)
    near(merged([w] * 3, [gram(inputs_of(seed, 40, 8)) for seed in range(3)], solver=solver), w, 1e-14)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_white_inputs_give_the_weighted_mean(alpha: float) -> None:
    weights = [noise(seed, 6, 8) for seed in range(3)]
    found = merged(weights, [np.eye(8)] * 3, c=(1.0, 2.0, 3.0), alpha=alpha)
    near(found, (weights[0] + 2 * weights[1] + 3 * weights[2]) / 6, 1e-14)


def test_alpha_0_is_a_weighted_mean_by_channels() -> None:
    xs = [inputs_of(seed, 40, 8) for seed in range(2)]
    weights = [noise(seed, 6, 8) for seed in range(2)]
    s = [(x**2).mean(0) for x in xs]
    right = (3 * s[0] * weights[0] + s[1] * weights[1]) / (3 * s[0] + s[1])
    near(merged(weights, [gram(x) for x in xs], c=(3.0, 1.0), alpha=0.0), right, 1e-13)


def test_a_scale_that_all_grams_share_changes_nothing_and_one_grams_own_does() -> None:
    xs = [inputs_of(seed, 40, 8) for seed in range(2)]
    weights = [noise(seed, 6, 8) for seed in range(2)]
    grams = [gram(x) for x in xs]
    first = merged(weights, grams, ridge=0.01)
    near(merged(weights, [1e6 * g for g in grams], ridge=0.01), first, 1e-12)
    near(merged(weights, [1e-9 * g for g in grams], ridge=0.01), first, 1e-12)
    other = merged(weights, [grams[0], 5 * grams[1]])
    assert np.linalg.norm(other - merged(weights, grams)) > 0.05 * np.linalg.norm(other)
    near(other, merged(weights, grams, c=(1.0, 5.0)), 1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
def test_the_units_of_the_channels_change_nothing(alpha: float) -> None:
    xs = [inputs_of(seed, 60, 8) for seed in range(2)]
    weights = [noise(seed, 6, 8) for seed in range(2)]
    s = np.logspace(-4, 4, 8)
    plain = merged(weights, [gram(x) for x in xs], alpha=alpha)
    near(merged([w / s for w in weights], [gram(x * s) for x in xs], alpha=alpha) * s, plain, 1e-9)


def test_only_alpha_1_survives_a_rotation() -> None:
    xs = [inputs_of(seed, 60, 8) for seed in range(2)]
    weights = [noise(seed, 6, 8) for seed in range(2)]
    q = np.linalg.qr(noise(5, 8, 8))[0]

    def turned(alpha: float) -> Array:
        return merged([w @ q for w in weights], [gram(x @ q) for x in xs], alpha=alpha) @ q.T

    near(turned(1.0), merged(weights, [gram(x) for x in xs], alpha=1.0), 1e-10)
    plain = merged(weights, [gram(x) for x in xs], alpha=0.5)
    assert np.linalg.norm(turned(0.5) - plain) > 1e-3 * np.linalg.norm(plain)


@pytest.mark.parametrize("solver", ["lstsq", "cg"])
def test_inputs_in_orthogonal_spaces_lose_nothing(solver: str) -> None:
    q = np.linalg.qr(noise(5, 12, 12))[0]
    xs = [noise(seed, 50, 5) @ q[5 * seed : 5 * seed + 5] for seed in range(2)]
    weights = [noise(10 + seed, 6, 12) for seed in range(2)]
    found = merged(weights, [gram(x) for x in xs], alpha=1.0, solver=solver)
    for x, w in zip(xs, weights, strict=True):
        near(x @ found.T, x @ w.T, 1e-6)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(lambda t: sum(t) > 0.1))
def test_no_convex_combination_is_nearer_to_the_outputs(shares: list[float]) -> None:
    xs = [inputs_of(seed, 50, 6) for seed in range(3)]
    weights = [noise(seed, 5, 6) for seed in range(3)]
    c = (1.0, 2.0, 0.5)
    best = objective(merged(weights, [gram(x) for x in xs], c=c, alpha=1.0), xs, weights, c)
    mixed = sum(s * w for s, w in zip(shares, weights, strict=True)) / sum(shares)
    assert best <= objective(mixed, xs, weights, c) * (1 + 1e-12)


@pytest.mark.parametrize("transposed", [False, True])
def test_fused_and_split_projections_are_the_same(transposed: bool) -> None:
    xs = [inputs_of(seed, 60, 8) for seed in range(2)]
    fused = [noise(seed, 18, 8) for seed in range(2)]
    grams = [gram(x) for x in xs]
    whole = merged(fused, grams, transposed=transposed)
    for part in (slice(0, 6), slice(6, 12), slice(12, 18)):
        near(merged([w[part] for w in fused], grams, transposed=transposed), whole[part], 1e-12)


def test_a_square_conv1d_is_not_a_linear() -> None:
    xs = [inputs_of(seed, 60, 8) for seed in range(2)]
    weights = [noise(seed, 8, 8) for seed in range(2)]
    grams = [gram(x) for x in xs]
    wrong = merged([w.T for w in weights], grams, transposed=False).T
    right = merged(weights, grams, transposed=True)
    near(right, oracle(xs, weights), 1e-9)
    assert np.linalg.norm(wrong - right) > 0.05 * np.linalg.norm(right)


# Where the data says little or nothing


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_dead_channels_keep_the_reference(alpha: float, solver: str) -> None:
    xs = [inputs_of(seed, 60, 10) for seed in range(2)]
    for x in xs:
        x[:, [0, 4, 9]] = 0
    xs[0][:, 2] = 0  # dead in one model: the other decides
    weights = [noise(seed, 6, 10) for seed in range(2)]
    base = noise(7, 6, 10)
    grams = [gram(x) for x in xs]
    found = merged(weights, grams, alpha=alpha, solver=solver)
    assert np.array_equal(found[:, [0, 4, 9]], ((weights[0] + weights[1]) / 2)[:, [0, 4, 9]])
    near(found, oracle(xs, weights, alpha=alpha), 1e-7)
    onto = merged(weights, grams, base, alpha=alpha, solver=solver, reference=-1)
    assert np.array_equal(onto[:, [0, 4, 9]], base[:, [0, 4, 9]])
    near(onto, oracle(xs, weights, alpha=alpha, around=base), 1e-7)


def test_all_channels_dead_keep_the_reference() -> None:
    weights = [noise(seed, 6, 4) for seed in range(2)]
    for solver in SOLVERS:
        near(merged(weights, [np.zeros((4, 4))] * 2, solver=solver), (weights[0] + weights[1]) / 2, 1e-15)


@pytest.mark.parametrize("solver", SOLVERS)
def test_fewer_tokens_than_dimensions_are_solved_below_alpha_1(solver: str) -> None:
    xs = [inputs_of(seed, 5, 20) for seed in range(2)]
    weights = [noise(seed, 6, 20) for seed in range(2)]
    near(merged(weights, [gram(x) for x in xs], alpha=0.9, solver=solver), oracle(xs, weights), 1e-7)


def test_fewer_tokens_than_dimensions_at_alpha_1_are_an_error_with_all_that_it_says() -> None:
    xs = [inputs_of(seed, 5, 20) for seed in range(2)]
    weights = [noise(seed, 6, 20) for seed in range(2)]
    with pytest.raises(NumericError) as caught:
        merged(weights, [gram(x) for x in xs], alpha=1.0, n_tokens=(5, 5))
    said = str(caught.value)
    assert said.startswith("layer.w: regmean cannot be solved: ")
    for part in ("dimension 20", "n_tokens 5, 5", "alpha 1", "`alpha` (0.9)", "`ridge`", "`solver: lstsq`"):
        assert part in said, part
    with pytest.raises(NumericError, match=r"positive definite|condition of the sum of the Grams is about"):
        merged(weights, [gram(x) for x in xs], alpha=1.0)


@pytest.mark.parametrize("transposed", [False, True])
def test_lstsq_gives_the_smallest_correction(transposed: bool) -> None:
    xs = [inputs_of(seed, 5, 20) for seed in range(2)]
    weights = [noise(seed, 6, 20) for seed in range(2)]
    found = merged(weights, [gram(x) for x in xs], alpha=1.0, solver="lstsq", transposed=transposed)
    near(found, oracle(xs, weights, alpha=1.0), 1e-6)
    base = noise(8, 6, 20)
    onto = merged(weights, [gram(x) for x in xs], base, alpha=1.0, solver="lstsq", reference=-1)
    near(onto, oracle(xs, weights, alpha=1.0, around=base), 1e-6)


def test_an_ill_conditioned_sum_is_solved_to_its_condition() -> None:
    d = 30
    q = np.linalg.qr(noise(1, d, d))[0]
    weights = [noise(10 + seed, 8, d) for seed in range(2)]
    xs = [(noise(seed, 200, d) * np.logspace(0, -4, d)) @ q for seed in range(2)]  # 1e8
    right = oracle(xs, weights, alpha=1.0)
    near(merged(weights, [gram(x) for x in xs], alpha=1.0), right, 10 * 1e8 * np.finfo(float).eps)


@pytest.mark.parametrize(("condition", "fails"), [(1e10, False), (1e14, True)])
def test_a_condition_over_1e12_is_a_failure(condition: float, fails: bool) -> None:
    d = 24
    q = np.linalg.qr(noise(1, d, d))[0]
    matrix = (q * np.logspace(0, -np.log10(condition), d)) @ q.T
    matrix = (matrix + matrix.T) / 2
    weights = [noise(seed, 3, d) for seed in range(2)]
    if not fails:
        assert np.isfinite(merged(weights, [matrix] * 2, alpha=1.0)).all()
        return
    with pytest.raises(NumericError, match="condition of the sum of the Grams is about"):
        merged(weights, [matrix] * 2, alpha=1.0)


def test_a_gram_that_is_not_finite_is_an_error_or_seen() -> None:
    weights = [noise(seed, 3, 6) for seed in range(2)]
    bad = gram(inputs_of(0, 30, 6))
    bad[2, 3] = bad[3, 2] = np.nan
    for solver in SOLVERS:
        try:
            found = merged(weights, [bad, np.eye(6)], solver=solver)
        except NumericError:
            continue
        assert not np.isfinite(found).all(), solver


def test_ridge_pulls_to_the_reference() -> None:
    xs = [inputs_of(seed, 60, 8) for seed in range(2)]
    weights = [noise(seed, 6, 8) for seed in range(2)]
    total = sum(0.9 * gram(x) + 0.1 * np.diag(np.diag(gram(x))) for x in xs)
    middle = (weights[0] + weights[1]) / 2
    right = sum(
        (w - middle) @ (0.9 * gram(x) + 0.1 * np.diag(np.diag(gram(x)))) for x, w in zip(xs, weights, strict=True)
    )
    for ridge in (0.3, 1e9):
        full = total + ridge * np.diag(total).mean() * np.eye(8)
        for solver in SOLVERS:
            found = merged(weights, [gram(x) for x in xs], ridge=ridge, solver=solver)
            near(found, middle + np.linalg.solve(full, right.T).T, 1e-8)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_step_from_a_base_is_scaled(solver: str) -> None:
    xs = [inputs_of(seed, 60, 8) for seed in range(2)]
    weights, base = [noise(seed, 6, 8) for seed in range(2)], noise(5, 6, 8)
    plain = merged(weights, [gram(x) for x in xs], solver=solver)
    found = merged(weights, [gram(x) for x in xs], base, scale=0.3, solver=solver)
    near(found, base + 0.3 * (plain - base), 1e-10)
    at_input = merged(weights, [gram(x) for x in xs], reference=1, alpha=1.0, solver=solver)
    near(at_input, oracle(xs, weights, alpha=1.0), 1e-8)


def test_an_input_of_weight_0_says_nothing() -> None:
    xs = [inputs_of(seed, 60, 8) for seed in range(3)]
    weights = [noise(seed, 6, 8) for seed in range(3)]
    two = merged(weights[:2], [gram(x) for x in xs[:2]])
    for solver in SOLVERS:
        near(merged(weights, [gram(x) for x in xs], c=(1.0, 1.0, 0.0), solver=solver), two, 1e-9)


def test_empty_weights_come_out_empty() -> None:
    found = merged([np.zeros((0, 4))] * 2, [np.eye(4)] * 2)
    assert found.shape == (0, 4)


def test_memory_is_bounded_by_what_the_op_says() -> None:
    solve = (
        RegMean()
        .resolved(RegMean().values_at(Place("w"), range(2)))
        .solve((1, 1), based=False, reference=None, transposed=False)
    )
    shapes = [(768, 3072)] * 2 + [(3072, 3072)] * 2
    assert solve.needed_bytes(shapes) <= 2 * 8 * 3072**2 + 100 * 2**20
    ten = solve.model_copy(update={"weights": (1.0,) * 10})
    assert ten.needed_bytes([(768, 3072)] * 10 + [(3072, 3072)] * 10) == solve.needed_bytes(shapes)


# Against fusion-bench

GOLDEN = Path(__file__).parent / "goldens" / "regmean.safetensors"


def test_it_agrees_with_fusion_bench_on_well_posed_inputs() -> None:
    stored = load_file(GOLDEN)
    cases = {name.split("/")[0] for name in stored}
    assert len(cases) >= 4
    for case in cases:
        alpha = float(stored[f"{case}/alpha"])
        weights = [stored[f"{case}/weight.{i}"].double().numpy() for i in range(3)]
        grams = [stored[f"{case}/gram.{i}"].double().numpy() for i in range(3)]
        transposed = bool(stored[f"{case}/transposed"])
        if transposed:
            weights = [w.T for w in weights]
        found = merged(weights, grams, alpha=alpha, transposed=transposed, dtype=torch.float32)
        right = stored[f"{case}/merged"].double().numpy()
        near(found, right.T if transposed else right, 1e-5)


# Packed Grams


@pytest.mark.parametrize("d", [64, 384])
@pytest.mark.parametrize("alpha", [0.5, 0.9])
def test_the_default_codec_keeps_the_correction(alpha: float, d: int, tmp_path: Path) -> None:
    found = {}
    for codec in ("correlation16", "float32"):
        write_models(tmp_path / codec, d, 48, 4 * d, codec)
        found[codec] = run_regmean(tmp_path / codec, alpha=alpha)["l.0.w.weight"].double()
    middle = sum(weights_of(tmp_path / "float32" / m)["l.0.w.weight"].double() for m in "ab") / 2
    gain = float((found["float32"] - middle).norm())
    assert gain > 0.05 * float(middle.norm())
    assert float((found["correlation16"] - found["float32"]).norm()) <= 2e-2 * gain


def test_what_rounding_makes_indefinite_is_an_error_that_names_the_codec(tmp_path: Path) -> None:
    d, n = 64, 4000
    write_models(tmp_path, d, 8, n, "correlation8", spread=1e-3)
    with pytest.raises(NumericError) as caught:
        run_regmean(tmp_path, alpha=1.0)
    said = str(caught.value)
    assert "merged: l.0.w.weight: regmean cannot be solved" in said
    assert "`correlation8`" in said and "packed32" in said and "n_tokens 4000, 4000" in said
    run_regmean(tmp_path, alpha=0.5)


# Runs


def inputs_like(seed: int, n: int, d: int, spread: float) -> Tensor:
    x = torch.from_numpy(noise(seed, n, d) * spread + noise(seed + 7, n, max(d // 8, 1)) @ noise(3, max(d // 8, 1), d))
    return x.float()


def write_models(
    folder: Path, d: int, out: int, n: int, codec: Codec = "packed32", *, spread: float = 1.0, turned: bool = False
) -> dict[str, Tensor]:
    """Two models of a layer with bias and norm, and their Grams; the inputs by model."""
    folder.mkdir(exist_ok=True)
    xs = {}
    for seed, model in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            name: torch.randn(shape, generator=generator)
            for name, shape in {
                "l.0.w.weight": (d, out) if turned else (out, d),
                "l.0.w.bias": (out,),
                "l.0.extra.weight": (6, 5),
                "norm.weight": (d,),
            }.items()
        }
        tensors["position"] = torch.arange(5)
        (folder / model).mkdir(exist_ok=True)
        save_file(tensors, folder / model / "model.safetensors", {"format": "pt"})
        (folder / model / "config.json").write_text(json.dumps({"model_type": "x"}))
        xs[model] = inputs_like(10 * seed, n, d, spread)
        write_gram(folder, model, xs[model], codec, turned=turned)
    return xs


def write_gram(folder: Path, model: str, x: Tensor, codec: Codec, *, turned: bool = False, **more: Any) -> None:
    gram_folder = folder / f"{model}_gram"
    gram_folder.mkdir(exist_ok=True)
    name = "l.0.w.weight"
    save_file(
        encode("gram", codec, name, (x.double().T @ x.double()) / len(x)),
        gram_folder / "model.safetensors",
        {"format": "pt", "mergeflow.space": "statistics"},
    )
    opened = open_checkpoint(locate(str(folder / model), relative_to=folder))
    told = facts(
        codec=codec,
        groups={name: name},
        n_tokens=len(x),
        transposed=[name] if turned else [],
        model={"digest": "0" * 64, "source": f"./{model}", "files": marks(opened)},
    )
    (gram_folder / "statistics.json").write_bytes(told.model_copy(update=more).encoded())


def regmean_recipe(folder: Path, inputs: Sequence[Mapping[str, Any]] | None = None, **more: Any) -> Recipe:
    node = {
        "op": "regmean",
        "inputs": list(inputs or ({"model": "a", "gram": "a_gram"}, {"model": "b", "gram": "b_gram"})),
        **more,
    }
    names = [one.name for one in sorted(folder.iterdir()) if (one / "config.json").exists()]
    return Recipe(
        folder=folder,
        models={name: f"./{name}" for name in names},
        artifacts={"a_gram": "./a_gram", "b_gram": "./b_gram"},
        nodes={"merged": node},
        output={"like": "a"},
    )


def run_regmean(folder: Path, **more: Any) -> dict[str, Tensor]:
    run(regmean_recipe(folder, **more), folder / "out", force=True)
    return weights_of(folder / "out")


@pytest.mark.parametrize("turned", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("codec", ["float32", "packed32"])
def test_a_recipe_solves_what_has_a_gram_and_averages_the_rest(codec: Codec, turned: bool, tmp_path: Path) -> None:
    xs = write_models(tmp_path, 24, 24, 200, codec, turned=turned)
    found = run_regmean(
        tmp_path, inputs=[{"model": "a", "gram": "a_gram", "weight": 3}, {"model": "b", "gram": "b_gram"}]
    )
    a, b = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    weights = [one["l.0.w.weight"].double().numpy() for one in (a, b)]
    right = oracle([x.double().numpy() for x in xs.values()], [w.T if turned else w for w in weights], (3.0, 1.0), 0.9)
    near(found["l.0.w.weight"].double().numpy(), right.T if turned else right, 1e-5)
    for name in ("l.0.w.bias", "l.0.extra.weight", "norm.weight"):
        near(found[name].double().numpy(), ((3 * a[name] + b[name]) / 4).double().numpy(), 1e-6)
    assert torch.equal(found["position"], a["position"])


def test_threads_memory_and_reading_change_no_bit(tmp_path: Path) -> None:
    write_models(tmp_path, 70, 40, 300, "correlation16")
    recipe = regmean_recipe(tmp_path)
    run(recipe, tmp_path / "first", threads=1)
    for index, options in enumerate(
        ({"threads": 2}, {"memory": 2**26}, {"reading": "pread"}, {"device": "staged:cpu"})
    ):
        run(recipe, tmp_path / f"again{index}", **options)
        assert files_of(tmp_path / f"again{index}") == files_of(tmp_path / "first"), options


def test_a_base_references_and_tokens_in_a_recipe(tmp_path: Path) -> None:
    xs = write_models(tmp_path, 16, 12, 200)
    write_gram(tmp_path, "b", xs["b"], "packed32", n_tokens=600)
    base = {n: torch.randn(t.shape) if t.is_floating_point() else t for n, t in weights_of(tmp_path / "a").items()}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    name = "l.0.w.weight"
    weights = [weights_of(tmp_path / m)[name].double().numpy() for m in "ab"]
    data = [x.double().numpy() for x in xs.values()]
    start = base[name].double().numpy()
    found = run_regmean(tmp_path, base="base", scale=0.5, alpha=1.0)
    near(found[name].double().numpy(), start + 0.5 * (oracle(data, weights, alpha=1.0) - start), 1e-5)
    mean = (weights_of(tmp_path / "a")["norm.weight"] + weights_of(tmp_path / "b")["norm.weight"]) / 2
    near(found["norm.weight"].double().numpy(), mean.double().numpy(), 1e-6)
    tokens = run_regmean(tmp_path, weigh_by="tokens")[name]
    near(tokens.double().numpy(), oracle(data, weights, (1.0, 3.0)), 1e-5)
    for reference in ("base", "b"):
        more = {"base": "base"} if reference == "base" else {}
        again = run_regmean(tmp_path, reference=reference, alpha=1.0, **more)[name]
        near(again.double().numpy(), oracle(data, weights, alpha=1.0), 1e-5)


def test_deltas_stand_for_models_on_a_base(tmp_path: Path) -> None:
    xs = write_models(tmp_path, 16, 12, 200)
    whole = run_regmean(tmp_path, base="b")["l.0.w.weight"]
    recipe = regmean_recipe(
        tmp_path,
        [
            {"model": {"op": "task_vector", "base": "b", "model": "a"}, "gram": "a_gram"},
            {"model": "b", "gram": "b_gram"},
        ],
        base="b",
    )
    run(recipe, tmp_path / "deltas")
    assert len(xs) == 2
    near(weights_of(tmp_path / "deltas")["l.0.w.weight"].double().numpy(), whole.double().numpy(), 1e-6)


def test_renamed_tensors_find_their_grams(tmp_path: Path) -> None:
    write_models(tmp_path, 16, 12, 200)
    plain = run_regmean(tmp_path)
    recipe = regmean_recipe(tmp_path)
    renamed = Recipe(
        folder=tmp_path,
        models={n: {"path": f"./{n}", "rename": {"l.*": "model.layers.*"}} for n in "ab"},
        artifacts={"a_gram": "./a_gram", "b_gram": "./b_gram"},
        nodes={"merged": recipe.resolved["nodes"]["merged"]},
    )
    run(renamed, tmp_path / "renamed")
    assert torch.equal(weights_of(tmp_path / "renamed")["model.layers.0.w.weight"], plain["l.0.w.weight"])


def refusal(folder: Path, **more: Any) -> str:
    with pytest.raises(MergeflowError) as caught:
        plan(regmean_recipe(folder, **more))
    return str(caught.value)


def test_statistics_of_another_model_are_refused_unless_names_are_enough(tmp_path: Path) -> None:
    write_models(tmp_path, 16, 12, 200)
    crossed = [{"model": "a", "gram": "b_gram"}, {"model": "b", "gram": "b_gram"}]
    said = refusal(tmp_path, inputs=crossed)
    assert said.startswith("recipe.nodes.merged.inputs.0.gram: 'b_gram' was collected on another model than 'a': ./b.")
    assert "`for: names`" in said
    plan(regmean_recipe(tmp_path, [{**crossed[0], "for": "names"}, crossed[1]]))


def test_what_cannot_be_told_of_statistics_is_a_warning(tmp_path: Path) -> None:
    write_models(tmp_path, 16, 12, 200)
    (tmp_path / "a/model.safetensors").rename(tmp_path / "a/other.safetensors")
    (warning,) = [one for one in plan(regmean_recipe(tmp_path)).warnings if "cannot be told" in one]
    assert "whether 'a_gram' was collected on 'a' cannot be told from its files; it names ./a" in warning
    told = regmean_recipe(
        tmp_path, [{"model": "a", "gram": "a_gram", "for": "names"}, {"model": "b", "gram": "b_gram"}]
    )
    assert not any("cannot be told" in one for one in plan(told).warnings)


def test_what_is_wrong_with_a_gram_is_said_where_it_is_named(tmp_path: Path) -> None:
    xs = write_models(tmp_path, 16, 12, 200)
    write_gram(tmp_path, "b", inputs_like(1, 200, 12, 1.0), "packed32")
    assert "the Gram is for 12 input channels, and 'l.0.w.weight' has 16" in refusal(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(MergeflowError, match="12 input channels"):
        run_regmean(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == before, "nothing is left half-written"
    write_gram(tmp_path, "b", xs["b"], "packed32", turned=True)
    assert "is stored (in, out) in one model and (out, in) in another" in refusal(tmp_path)
    write_gram(tmp_path, "b", xs["b"], "packed32")
    inputs = [{"model": "a", "gram": "a_gram"}, {"model": "b", "gram": "b"}]
    assert "'b' is a model, and no artifact" in refusal(tmp_path, inputs=inputs)
    inputs[1]["gram"] = "b_grm"
    assert "there is no artifact or node 'b_grm'. Did you mean 'b_gram'?" in refusal(tmp_path, inputs=inputs)
    assert "`gram` is missing" in refusal(tmp_path, inputs=[{"model": "a", "gram": "a_gram"}, "b"])
    assert "`reference: c` names no input" in refusal(tmp_path, reference="c")
    assert "`reference: base` needs a base" in refusal(tmp_path, reference="base")
    assert "the weights" in refusal(tmp_path, weight=0) or "sum of the weights" in refusal(tmp_path, weight=0)


def test_statistics_are_no_models_and_fisher_is_no_gram(tmp_path: Path) -> None:
    write_models(tmp_path, 16, 12, 200)
    with pytest.raises(MergeflowError, match="artifacts"):
        plan(Recipe(folder=tmp_path, models={"a": "./a_gram"}))
    write_fisher(tmp_path, "b", {"l.0.w.weight": torch.rand(12, 16)}, "b_gram")
    said = refusal(tmp_path)
    assert "`gram` needs statistics of kind gram or gram_diag, and 'b_gram' holds fisher_diag" in said


def test_lints_say_what_little_data_and_coarse_codecs_bear(tmp_path: Path) -> None:
    write_models(tmp_path, 16, 12, 32)
    warned = "\n".join(plan(regmean_recipe(tmp_path)).warnings)
    assert "1 matrices in the layers lack a Gram from some input, and take `others`" in warned
    assert "2 Grams of fewer than 4 tokens a dimension, at worst 32 for 16" in warned
    assert "n / (n + d) = 0.67" in warned
    quiet = "\n".join(plan(regmean_recipe(tmp_path, alpha=0.5)).warnings)
    assert "tokens a dimension" not in quiet
    write_models(tmp_path, 16, 12, 200, "correlation16")
    assert "than `correlation16` keeps" in "\n".join(plan(regmean_recipe(tmp_path, alpha=0.97)).warnings)
    write_models(tmp_path, 16, 12, 7)
    said = refusal(tmp_path, alpha=1.0)
    assert "at alpha 1 the Grams of 14 tokens leave directions of 16 dimensions open: 'l.0.w.weight'" in said
    assert "`alpha: 0.9`" in said and "ridge" in said and "`solver: lstsq`" in said
    found = run_regmean(tmp_path, alpha=1.0, solver="lstsq")
    assert torch.isfinite(found["l.0.w.weight"]).all()


def test_an_expert_without_tokens_in_one_model_takes_the_mean_with_a_warning(tmp_path: Path) -> None:
    write_models(tmp_path, 16, 12, 200)
    write_gram(tmp_path, "b", torch.zeros(1, 16), "packed32", n_tokens=0)
    warned = "\n".join(plan(regmean_recipe(tmp_path)).warnings)
    assert "1 matrices saw no token in some input" in warned
    assert "tokens a dimension" not in warned
    a, b = (weights_of(tmp_path / name)["l.0.w.weight"] for name in "ab")
    for alpha in (0.5, 1.0):
        found = run_regmean(tmp_path, alpha=alpha)["l.0.w.weight"]
        assert torch.allclose(found, (a + b) / 2, atol=1e-6)
    others = run_regmean(tmp_path, others={"model": "a"}, only="l.*")["l.0.w.weight"]
    assert torch.equal(others, a)


def test_an_alpha_by_rules_holds_where_it_says(tmp_path: Path) -> None:
    xs = write_models(tmp_path, 16, 12, 200)
    weights = [weights_of(tmp_path / m)["l.0.w.weight"].double().numpy() for m in "ab"]
    found = run_regmean(tmp_path, alpha=[{"match": "l.0.*", "value": 0.2}, {"value": 0.9}])
    data = [x.double().numpy() for x in xs.values()]
    near(found["l.0.w.weight"].double().numpy(), oracle(data, weights, alpha=0.2), 1e-5)


def test_others_of_a_model_stand_where_no_gram_is(tmp_path: Path) -> None:
    write_models(tmp_path, 16, 12, 200)
    found = run_regmean(tmp_path, others={"model": "b"})
    assert torch.equal(found["norm.weight"], weights_of(tmp_path / "b")["norm.weight"])
    plain = run_regmean(tmp_path)
    assert torch.equal(found["l.0.w.weight"], plain["l.0.w.weight"])


# Fisher


def write_fisher(folder: Path, model: str, tensors: Mapping[str, Tensor], name: str = "") -> None:
    target = folder / (name or f"{model}_fisher")
    target.mkdir(exist_ok=True)
    held = {k: v for n, t in tensors.items() for k, v in encode("fisher_diag", "float32", n, t).items()}
    save_file(held, target / "model.safetensors", {"format": "pt", "mergeflow.space": "statistics"})
    opened = open_checkpoint(locate(str(folder / model), relative_to=folder))
    told = facts(kind="fisher_diag", codec="float32", groups={}, model={"digest": "0" * 64, "files": marks(opened)})
    (target / "statistics.json").write_bytes(told.encoded())


def fisher_of(op: Fisher, thetas: Sequence[Array], fishers: Sequence[Array], base: Array | None = None) -> Array:
    ready = op.resolved(op.values_at(Place("w"), range(len(thetas))))
    mean = ready.mean(numbers(ready.weight), [True] * len(thetas))
    given = [torch.from_numpy(one) for pair in zip(thetas, fishers, strict=True) for one in pair]
    if base is not None:
        given.insert(0, torch.from_numpy(base))
    found: Array = mean.compute(given, Block(0, measure(mean, given), given[0].shape)).numpy()
    return found


def test_fisher_is_the_mean_weighted_entry_by_entry() -> None:
    thetas, fishers = [noise(i, 50) for i in range(3)], [np.abs(noise(9 + i, 50)) + 0.01 for i in range(3)]
    c = (1.0, 2.0, 0.5)
    right = np.array(
        [
            sum(c[i] * fishers[i][e] * thetas[i][e] for i in range(3)) / sum(c[i] * fishers[i][e] for i in range(3))
            for e in range(50)
        ]
    )
    near(fisher_of(Fisher(weight=list(c), floor=Floor(abs=0.0)), thetas, fishers), right, 1e-12)
    near(fisher_of(Fisher(weight=list(c)), thetas, [1000 * f for f in fishers]), right, 1e-7)


@pytest.mark.parametrize("normalize", ["none", "model_l2", "trace"])
@pytest.mark.parametrize("floor", [Floor(abs=0.2), Floor(rel=0.5)])
def test_floors_and_norms_are_those_of_the_whole_tensor(normalize: Any, floor: Floor) -> None:
    thetas = [noise(i, 40) for i in range(2)]
    fishers = [np.abs(noise(9, 40)), 30 * np.abs(noise(10, 40))]
    sizes = {"none": [1, 1], "model_l2": [np.sqrt((f**2).sum()) for f in fishers], "trace": [f.sum() for f in fishers]}
    least = [floor.abs if floor.abs is not None else (floor.rel or 0) * f.mean() for f in fishers]
    own = [np.maximum(f, m) / s for f, m, s in zip(fishers, least, sizes[normalize], strict=True)]
    right = (own[0] * thetas[0] + own[1] * thetas[1]) / (own[0] + own[1])
    near(fisher_of(Fisher(normalize=normalize, floor=floor), thetas, fishers), right, 1e-12)


def test_a_prior_corrects_a_base() -> None:
    thetas, base = [noise(i, 40) for i in range(2)], noise(5, 40)
    fishers = [np.abs(noise(9 + i, 40)) for i in range(2)]
    delta, c = 0.3, (1.0, 2.0)
    top = sum(w * (delta + f) * (t - base) for w, f, t in zip(c, fishers, thetas, strict=True))
    right = base + top / (delta + sum(w * f for w, f in zip(c, fishers, strict=True)))
    near(fisher_of(Fisher(prior=delta, weight=list(c)), thetas, fishers, base), right, 1e-12)


def test_no_fisher_information_at_all_is_the_mean() -> None:
    thetas = [noise(i, 40) for i in range(2)]
    for op in (Fisher(), Fisher(floor=Floor(abs=0.0)), Fisher(normalize="trace")):
        near(fisher_of(op, thetas, [np.zeros(40)] * 2), (thetas[0] + thetas[1]) / 2, 1e-12)


def test_the_closed_form_of_logistic_regression_weighs_each_feature() -> None:
    """F_w = E[p (1 - p) x^2]: what the merged weights minimise is the sum of both models' quadratic losses."""
    xs = [inputs_of(seed, 300, 4) for seed in range(2)]
    ws = [noise(seed, 4) for seed in range(2)]
    fishers = []
    for x, w in zip(xs, ws, strict=True):
        p = 1 / (1 + np.exp(-x @ w))
        fishers.append((p * (1 - p))[:, None].__mul__(x**2).mean(0))
    found = fisher_of(Fisher(floor=Floor(abs=0.0)), ws, fishers)

    def loss(point: Array) -> float:
        return sum(float((f * (point - w) ** 2).sum()) for f, w in zip(fishers, ws, strict=True))

    for step in np.eye(4) * 1e-3:
        assert loss(found) < loss(found + step) and loss(found) < loss(found - step)


def fisher_recipe(folder: Path, **more: Any) -> Recipe:
    inputs = [{"model": m, "fisher": f"{m}_fisher"} for m in "ab"]
    return Recipe(
        folder=folder,
        models={"a": "./a", "b": "./b"},
        artifacts={f"{m}_fisher": f"./{m}_fisher" for m in "ab"},
        nodes={"merged": {"op": "fisher", "inputs": inputs, **more}},
        output={"like": "a"},
    )


@pytest.mark.parametrize("normalize", ["none", "model_l2", "trace"])
def test_fisher_in_a_recipe_measures_over_the_model(normalize: str, tmp_path: Path) -> None:
    write_models(tmp_path, 16, 12, 20)
    names = ("l.0.w.weight", "norm.weight", "l.0.w.bias")
    models = {m: weights_of(tmp_path / m) for m in "ab"}
    fishers: dict[str, dict[str, Tensor]] = {}
    for seed, m in enumerate("ab"):
        generator = torch.Generator().manual_seed(50 + seed)
        fishers[m] = {n: torch.rand(models[m][n].shape, generator=generator) * (1 + 9 * seed) for n in names}
        write_fisher(tmp_path, m, fishers[m])
    run(fisher_recipe(tmp_path, normalize=normalize, favor="b", floor={"rel": 0.8}), tmp_path / "out")
    found = weights_of(tmp_path / "out")
    flat = {m: np.concatenate([fishers[m][n].double().numpy().ravel() for n in names]) for m in "ab"}
    size = {"none": lambda f: 1.0, "model_l2": lambda f: np.sqrt((f**2).sum()), "trace": lambda f: f.sum()}[normalize]
    for name in names:
        own = {m: fishers[m][name].double().numpy() for m in "ab"}
        own["b"] = np.maximum(own["b"], 0.8 * flat["b"].mean())
        share = {m: own[m] / size(flat[m]) for m in "ab"}
        top = sum(share[m] * models[m][name].double().numpy() for m in "ab")
        near(found[name].double().numpy(), top / (share["a"] + share["b"]), 1e-6)
    mean = ((models["a"]["l.0.extra.weight"] + models["b"]["l.0.extra.weight"]) / 2).double().numpy()
    near(found["l.0.extra.weight"].double().numpy(), mean, 1e-6)
    run(fisher_recipe(tmp_path, normalize=normalize, favor="b", floor={"rel": 0.8}), tmp_path / "again", threads=2)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "out")


def test_what_is_wrong_with_fisher_is_said_where_it_stands(tmp_path: Path) -> None:
    write_models(tmp_path, 16, 12, 20)
    for m in "ab":
        write_fisher(tmp_path, m, {"norm.weight": torch.rand(16)})

    def said(**more: Any) -> str:
        with pytest.raises(MergeflowError) as caught:
            plan(fisher_recipe(tmp_path, **more))
        return str(caught.value)

    assert "`prior` corrects a base, and the node has none" in said(prior=0.1)
    assert "`base` says nothing here" in said(base="a")
    assert "`favor: c` names no input" in said(favor="c")
    assert "{abs: ...} or {rel: ...}" in said(floor={})
    write_fisher(tmp_path, "b", {"norm.weight": torch.rand(4, 4)})
    assert "the Fisher information of 'norm.weight' has another shape" in said()


def test_a_fisher_mean_is_a_value() -> None:
    one = FisherMean(weights=(1.0, 2.0), floored=(True, False))
    assert one == one.model_copy() and not one.over_model


# AIM


@pytest.mark.parametrize("turned", [False, True], ids=["linear", "conv1d"])
def test_aim_shortens_the_step_where_the_base_is_active(turned: bool, tmp_path: Path) -> None:
    write_models(tmp_path, 16, 12, 20, turned=turned)
    name = "l.0.w.weight"
    activations = torch.from_numpy(np.abs(noise(4, 16))).float()
    (tmp_path / "acts").mkdir()
    save_file(encode("act_absmean", "float32", name, activations), tmp_path / "acts" / "model.safetensors")
    told = facts(kind="act_absmean", codec="float32", groups={name: name}, transposed=[name] if turned else [])
    (tmp_path / "acts" / "statistics.json").write_bytes(told.encoded())
    node = {"op": "aim", "base": "a", "inputs": [{"model": "b", "act_absmean": "acts"}], "omega": 0.3}
    recipe = Recipe(folder=tmp_path, models={"a": "./a", "b": "./b"}, artifacts={"acts": "./acts"}, nodes={"m": node})
    run(recipe, tmp_path / "out")
    found = weights_of(tmp_path / "out")
    a, b = (weights_of(tmp_path / m) for m in "ab")
    s = (activations / activations.max()).double().numpy()
    kept = 1 - 0.7 * (s[:, None] if turned else s[None])
    start, end = a[name].double().numpy(), b[name].double().numpy()
    near(found[name].double().numpy(), start + kept * (end - start), 1e-6)
    near(found["norm.weight"].double().numpy(), b["norm.weight"].double().numpy(), 1e-6)
    run(recipe, tmp_path / "again", threads=2, memory=2**26)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "out")
    told = facts(
        kind="act_absmean",
        codec="float32",
        groups={name: name},
        model={
            "digest": "0" * 64,
            "files": marks(open_checkpoint(locate(str(tmp_path / "b"), relative_to=tmp_path))),
        },
    )
    (tmp_path / "acts" / "statistics.json").write_bytes(told.encoded())
    with pytest.raises(MergeflowError, match="'acts' was collected on another model than 'a'"):
        plan(recipe)


# LOT


@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_lot_is_the_smallest_least_squares_step_and_weighs_gains_by_mean_squares(scale: float, tmp_path: Path) -> None:
    xs = write_models(tmp_path, 16, 12, 5)  # ten tokens for sixteen dimensions
    generator = torch.Generator().manual_seed(9)
    base = {
        n: torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
        for n, t in weights_of(tmp_path / "a").items()
    }
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    squares = {m: torch.from_numpy(noise(20 + i, 16) ** 2).float() for i, m in enumerate("ab")}
    for m in "ab":
        (tmp_path / f"{m}_diag").mkdir()
        save_file(
            encode("gram_diag", "float32", "norm.weight", squares[m]), tmp_path / f"{m}_diag" / "model.safetensors"
        )
        told = facts(kind="gram_diag", codec="float32", groups={"norm.weight": "norm.weight"})
        (tmp_path / f"{m}_diag" / "statistics.json").write_bytes(told.encoded())
    inputs = [
        {"model": "a", "gram": "a_gram", "gram_diag": "a_diag", "weight": 2},
        {"model": "b", "gram": "b_gram", "gram_diag": "b_diag"},
    ]
    recipe = Recipe(
        folder=tmp_path,
        models={n: f"./{n}" for n in ("a", "b", "base")},
        artifacts={f"{m}_{k}": f"./{m}_{k}" for m in "ab" for k in ("gram", "diag")},
        nodes={"m": {"op": "lot", "base": "base", "inputs": inputs, "scale": scale}},
    )
    run(recipe, tmp_path / "out")
    found = {n: t.double().numpy() for n, t in weights_of(tmp_path / "out").items()}
    models = {m: {n: t.double().numpy() for n, t in weights_of(tmp_path / m).items()} for m in ("a", "b", "base")}
    name = "l.0.w.weight"
    whole = oracle(
        [x.double().numpy() for x in xs.values()],
        [models[m][name] for m in "ab"],
        (2.0, 1.0),
        1.0,
        around=models["base"][name],
    )
    near(found[name], models["base"][name] + scale * (whole - models["base"][name]), 1e-5)
    own = {m: squares[m].double().numpy() * c for m, c in zip("ab", (2, 1), strict=True)}
    steps = sum(own[m] * (models[m]["norm.weight"] - models["base"]["norm.weight"]) for m in "ab")
    near(found["norm.weight"], models["base"]["norm.weight"] + scale * steps / (own["a"] + own["b"]), 1e-5)
    mean = (2 * models["a"]["l.0.w.bias"] + models["b"]["l.0.w.bias"]) / 3
    near(found["l.0.w.bias"], mean, 1e-5)


def test_mean_squares_by_channel_serve_as_a_gram_without_correlations(tmp_path: Path) -> None:
    xs = write_models(tmp_path, 16, 12, 50)
    name = "l.0.w.weight"
    squares = {m: xs[m].square().mean(0) for m in "ab"}
    for m in "ab":
        held = encode("gram_diag", "float32", name, squares[m])
        save_file(held, tmp_path / f"{m}_gram" / "model.safetensors")
        told = facts(kind="gram_diag", codec="float32", groups={name: name})
        (tmp_path / f"{m}_gram" / "statistics.json").write_bytes(told.encoded())
    a, b = (weights_of(tmp_path / m)[name].double() for m in "ab")
    s = {m: squares[m].double() for m in "ab"}
    near(run_regmean(tmp_path)[name].double().numpy(), ((s["a"] * a + s["b"] * b) / (s["a"] + s["b"])).numpy(), 1e-5)

"""The seed paper's ordering on real trained models: recipes/digits, made, merged and measured through the public commands.

The oracle is numpy in float64, written from the formulas: its own forward pass, its own gradients.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from scipy.special import erf, softmax
from scipy.stats import norm
from toys import recipe_script

SEEDS = (0, 1, 2)
Array = NDArray[np.float64]
Tensors = Mapping[str, Array]


@pytest.fixture(scope="module")
def digits() -> Iterator[ModuleType]:
    """The scripts of the recipe."""
    with recipe_script("table", "digits") as module:
        yield module


@pytest.fixture(scope="module")
def works(digits: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Data, models and merges of each seed."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGEFLOW_CACHE", str(tmp_path_factory.mktemp("cache")))
        for seed in SEEDS:
            found[seed] = work = tmp_path_factory.mktemp(f"seed-{seed}")
            digits.prepare(work, seed)
            digits.merge(work, work / "merged")
    return found


@pytest.fixture(scope="module")
def measured(digits: ModuleType, works: Mapping[int, Path]) -> dict[int, dict[str, float]]:
    """The accuracies of each seed."""
    return {seed: digits.measured(work, work / "merged", seed) for seed, work in works.items()}


def model(folder: Path) -> Tensors:
    return {name: tensor.astype(np.float64) for name, tensor in load_file(folder / "model.safetensors").items()}


def forward(t: Tensors, x: Array) -> tuple[dict[str, Array], list[tuple[Array, Array, Array]], Array]:
    """What each linear layer reads, what each block's gradient needs, and the logits."""
    reads, kept = {}, []
    for n in range(3):
        name = f"blocks.{n}"
        reads[f"{name}.linear"] = x
        h = x @ t[f"{name}.linear.weight"].T + t[f"{name}.linear.bias"]
        spread = np.sqrt(h.var(-1, keepdims=True) + 1e-5)
        unit = (h - h.mean(-1, keepdims=True)) / spread
        z = unit * t[f"{name}.norm.weight"] + t[f"{name}.norm.bias"]
        kept.append((unit, spread, z))
        x = z * (1 + erf(z / np.sqrt(2))) / 2
    reads["head"] = x
    return reads, kept, x @ t["head.weight"].T + t["head.bias"]


def fisher_of(t: Tensors, x: Array) -> dict[str, Array]:
    """1/N sum_x sum_c p(c|x) (d log p(c|x) / d theta)^2: for one example a layer's gradient is an outer product."""
    reads, kept, logits = forward(t, x)
    chances = softmax(logits, axis=1)
    found = {name: np.zeros_like(tensor) for name, tensor in t.items()}
    for c in range(logits.shape[1]):
        part = chances[:, c : c + 1] / len(x)
        back = np.eye(logits.shape[1])[c] - chances
        found["head.weight"] += (part * back**2).T @ reads["head"] ** 2
        found["head.bias"] += (part * back**2).sum(0)
        back = back @ t["head.weight"]
        for n in (2, 1, 0):
            name, (unit, spread, z) = f"blocks.{n}", kept[n]
            back = back * (norm.cdf(z) + z * norm.pdf(z))
            found[f"{name}.norm.weight"] += (part * (back * unit) ** 2).sum(0)
            found[f"{name}.norm.bias"] += (part * back**2).sum(0)
            back = back * t[f"{name}.norm.weight"]
            back = (back - back.mean(1, keepdims=True) - unit * (back * unit).mean(1, keepdims=True)) / spread
            found[f"{name}.linear.weight"] += (part * back**2).T @ reads[f"{name}.linear"] ** 2
            found[f"{name}.linear.bias"] += (part * back**2).sum(0)
            back = back @ t[f"{name}.linear.weight"]
    return found


def regmean(models: list[Tensors], inputs: list[Array], alpha: float) -> dict[str, Array]:
    """The closed form around the mean, where some model has an input that is not 0."""
    merged = {name: fmean_of([t[name] for t in models]) for name in models[0]}
    reads = [forward(t, x)[0] for t, x in zip(models, inputs, strict=True)]
    for layer in reads[0]:
        grams = [one[layer].T @ one[layer] / len(one[layer]) for one in reads]
        grams = [alpha * g + (1 - alpha) * np.diag(np.diag(g)) for g in grams]
        weights = [t[f"{layer}.weight"] for t in models]
        middle = fmean_of(weights)
        live = np.diag(sum(grams)) > 0
        right = sum(g @ (w - middle).T for g, w in zip(grams, weights, strict=True))[live]
        step = np.zeros_like(middle.T)
        step[live] = np.linalg.solve(sum(grams)[np.ix_(live, live)], right)
        merged[f"{layer}.weight"] = middle + step.T
    return merged


def fmean_of(arrays: list[Array]) -> Array:
    return sum(arrays[1:], arrays[0]) / len(arrays)


def experts(digits: ModuleType, work: Path, seed: int) -> tuple[list[Tensors], list[Array], list[Array]]:
    """The five models, their images, and the images of the test in their domains."""
    parts = digits.parts_of(seed)
    own = [digits.in_domain(parts[domain][0], domain).double().numpy() for domain in digits.DOMAINS]
    test = [digits.in_domain(parts["test"][0], domain).double().numpy() for domain in digits.DOMAINS]
    return [model(work / "models" / domain) for domain in digits.DOMAINS], own, test


def step_error(found: Tensors, right: Tensors, models: list[Tensors]) -> float:
    """How far a merge is from the right one, over how far that is from the mean, in the tensor where this is largest."""
    errors = []
    for name, tensor in right.items():
        far = np.linalg.norm(tensor - fmean_of([t[name] for t in models])) + 1e-3 * np.linalg.norm(tensor)
        errors.append(float(np.linalg.norm(found[name] - tensor) / far))
    return max(errors)


def test_regmean_is_above_fisher_and_the_mean_for_every_seed(measured: Mapping[int, Mapping[str, float]]) -> None:
    for seed in SEEDS:
        assert measured[seed]["regmean"] > max(measured[seed][name] for name in ("fisher", "fisher_raw", "simple"))


def test_the_methods_are_apart_as_in_the_paper(measured: Mapping[int, Mapping[str, float]]) -> None:
    mean = {name: fmean(measured[seed][name] for seed in SEEDS) for name in measured[SEEDS[0]]}
    assert mean["fisher"] - mean["simple"] > 0.005
    assert mean["regmean"] - mean["fisher"] > 0.015
    assert mean["own"] - mean["regmean99"] < 0.06
    assert mean["noise"] < mean["regmean"] - 0.03
    assert mean["few"] < mean["regmean"] - 0.02
    assert mean["best"] < mean["simple"]


def test_accuracies_are_those_of_the_trial_within_two_points(measured: Mapping[int, Mapping[str, float]]) -> None:
    trial = {"simple": 0.856, "fisher": 0.878, "fisher_raw": 0.878, "regmean": 0.915, "regmean99": 0.921, "own": 0.952}
    trial |= {"together": 0.853, "multitask": 0.947, "noise": 0.826, "few": 0.868}
    for name, value in trial.items():
        assert fmean(measured[seed][name] for seed in SEEDS) == pytest.approx(value, abs=0.02), name


def test_merges_are_those_of_the_oracle(digits: ModuleType, works: Mapping[int, Path]) -> None:
    for seed, work in works.items():
        models, own, _ = experts(digits, work, seed)
        noise = [import_module("prepare").noise(seed).double().numpy()] * len(models)
        right: dict[str, Tensors] = {
            "simple": {name: fmean_of([t[name] for t in models]) for name in models[0]},
            "regmean": regmean(models, own, 0.9),
            "regmean99": regmean(models, own, 0.99),
            "few": regmean(models, [x[:10] for x in own], 0.9),
            "noise": regmean(models, noise, 0.9),
        }
        fishers = [fisher_of(t, x) for t, x in zip(models, own, strict=True)]
        sizes = [np.sqrt(sum((f**2).sum() for f in one.values())) for one in fishers]
        for name, scales in (("fisher_raw", [1.0] * len(models)), ("fisher", sizes)):
            shares = [
                {n: np.maximum(f, 1e-6) / scale for n, f in one.items()}
                for one, scale in zip(fishers, scales, strict=True)
            ]
            right[name] = {
                n: sum(f[n] * t[n] for f, t in zip(shares, models, strict=True)) / sum(f[n] for f in shares)
                for n in models[0]
            }
        for name, meant in right.items():
            assert step_error(model(work / "merged" / name), meant, models) < 2e-3, name


def test_accuracy_is_that_of_the_oracles_forward_pass(
    digits: ModuleType, works: Mapping[int, Path], measured: Mapping[int, Mapping[str, float]]
) -> None:
    work = works[0]
    _, _, test = experts(digits, work, 0)
    labels = digits.parts_of(0)["test"][1].numpy()
    for name in digits.MERGES:
        merged = model(work / "merged" / name)
        found = fmean(float((forward(merged, x)[2].argmax(1) == labels).mean()) for x in test)
        assert measured[0][name] == pytest.approx(found, abs=1.01 / len(labels))


def test_statistics_that_are_sent_without_their_data_give_the_same_merge(
    digits: ModuleType, works: Mapping[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEFLOW_CACHE", str(tmp_path / "cache"))
    work = works[0]
    domains = digits.DOMAINS
    for domain in domains:  # what the holder of the data does
        words = [
            "--data",
            str(work / "data" / f"{domain}.jsonl"),
            "--option",
            "codec=packed32",
            "-o",
            str(tmp_path / domain),
        ]
        digits.command("stats", str(work / "models" / domain), "--kind", "gram", *words, "-q")
    recipe: dict[str, Any] = {  # and what the one who merges does
        "recipe": 1,
        "models": {domain: str(work / "models" / domain) for domain in domains},
        "artifacts": {f"gram_{domain}": str(tmp_path / domain) for domain in domains},
        "nodes": {
            "merged": {
                "op": "regmean",
                "alpha": 0.9,
                "inputs": [{"model": domain, "gram": f"gram_{domain}"} for domain in domains],
            }
        },
    }
    (tmp_path / "merge.yaml").write_text(json.dumps(recipe))
    digits.command("run", str(tmp_path / "merge.yaml"), "-o", str(tmp_path / "merged"), "--threads", "1", "-q")
    ours = (tmp_path / "merged" / "model.safetensors").read_bytes()
    assert ours == (work / "merged" / "regmean" / "model.safetensors").read_bytes()

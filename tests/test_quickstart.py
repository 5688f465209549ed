"""The recipes that are shipped: each runs offline on the models in the repository and makes what its formula says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "recipes" / "quickstart"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def digits() -> Iterator[ModuleType]:
    threads = torch.get_num_threads()
    sys.path.insert(0, str(QUICKSTART))
    torch.set_num_threads(1)
    yield import_module("digits")
    sys.path.remove(str(QUICKSTART))
    torch.set_num_threads(threads)


def model(name: str) -> Tensors:
    return load_file(QUICKSTART / "models" / name / "model.safetensors")


def run(recipe: str, out: Path, *more: str) -> Tensors:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "mergeflow", "run", str(ROOT / "recipes" / recipe), "-o", str(out), *more]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(out / "model.safetensors")


def assert_same(made: Tensors, meant: Tensors) -> None:
    assert made.keys() == meant.keys()
    for name in meant:
        torch.testing.assert_close(
            made[name], meant[name], rtol=1e-6, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}"
        )


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    x, y = a.double().flatten(), b.double().flatten()
    cosine = (x @ y / ((x.norm() or 1) * (y.norm() or 1))).clamp(-1, 1)
    if cosine.abs() > 0.9995:
        return ((1 - t) * x + t * y).float().reshape(a.shape)
    angle = cosine.acos()
    mixed = (torch.sin((1 - t) * angle) * x + torch.sin(t * angle) * y) / torch.sin(angle)
    return mixed.float().reshape(a.shape)


def ties(base: Tensor, models: list[Tensor], density: float, scale: float) -> Tensor:
    deltas = torch.stack([m.flatten() - base.flatten() for m in models])
    keep = max(1, int(density * deltas.shape[1]))
    order = deltas.abs().argsort(dim=1, descending=True, stable=True)[:, :keep]
    trimmed = torch.zeros_like(deltas).scatter(1, order, deltas.gather(1, order))
    elected = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
    agree = trimmed.sign() == elected
    merged = (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)
    return base + scale * merged.reshape(base.shape)


def test_the_models_fit_in_the_repository() -> None:
    assert sum(path.stat().st_size for path in (QUICKSTART / "models").rglob("*") if path.is_file()) < 1_500_000


def test_no_image_is_in_two_splits(digits: ModuleType) -> None:
    parts = digits.splits()
    images = torch.cat([images.reshape(-1, 64) for images, _ in parts.values()])
    assert len(images) == 1797
    assert len(images.unique(dim=0)) == 1797


def test_a_domain_only_moves_or_inverts_what_is_in_an_image(digits: ModuleType) -> None:
    images = digits.splits()["base"][0]
    for domain in digits.DOMAINS:
        shown = digits.in_domain(images, domain)
        undone = 1 - shown if domain == "inverted" else shown
        assert torch.equal(undone.sort(1).values, images.reshape(-1, 64).sort(1).values)


def test_each_expert_is_best_in_its_own_domain(digits: ModuleType) -> None:
    test = digits.splits()["test"]
    found = {name: digits.accuracies(digits.load(QUICKSTART / "models" / name), test) for name in digits.DOMAINS}
    for domain in digits.DOMAINS:
        assert max(found, key=lambda name: found[name][domain]) == domain
        assert found[domain][domain] > 0.92


def test_the_quickstart_merge_beats_every_single_model_on_the_mean(digits: ModuleType, tmp_path: Path) -> None:
    made = run("quickstart/merge.yaml", tmp_path / "out")
    base, experts = model("base"), [model(name) for name in digits.DOMAINS]
    assert_same(made, {n: base[n] + sum(0.25 * (e[n] - base[n]) for e in experts) for n in base})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["mergeflow_mlp"]
    test = digits.splits()["test"]
    singles = [QUICKSTART / "models" / name for name in ("base", *digits.DOMAINS)]
    means = [sum(digits.accuracies(digits.load(folder), test).values()) / 5 for folder in [*singles, tmp_path / "out"]]
    assert means[-1] > 0.88
    assert means[-1] > max(means[:-1]) + 0.03


def test_the_weight_of_the_quickstart_can_be_set(tmp_path: Path) -> None:
    assert_same(run("quickstart/merge.yaml", tmp_path / "out", "--set", "weight=0"), model("base"))


def test_average_is_the_mean_of_two(tmp_path: Path) -> None:
    first, second = model("identity"), model("rotated")
    assert_same(run("average.yaml", tmp_path / "out"), {n: (first[n] + second[n]) / 2 for n in first})


def test_ties_trims_votes_and_averages(tmp_path: Path) -> None:
    base, models = model("base"), [model(name) for name in ("identity", "rotated", "shuffled")]
    made = run("ties.yaml", tmp_path / "out")
    assert_same(made, {n: ties(base[n], [m[n] for m in models], density=0.5, scale=0.6) for n in base})


def test_slerp_goes_from_the_first_layer_to_the_last(tmp_path: Path) -> None:
    first, second = model("inverted"), model("shuffled")
    t = {"blocks.0": 0.3, "blocks.1": 0.4, "blocks.2": 0.5}
    made = run("slerp.yaml", tmp_path / "out")
    assert_same(made, {n: slerp(first[n], second[n], t.get(n[:8], 0.5)) for n in first})


def test_select_takes_each_layer_from_where_its_rule_says(tmp_path: Path) -> None:
    first, second = model("inverted"), model("rotated")
    meant = {}
    for name in first:
        if name.startswith(("blocks.0.", "blocks.1.")):
            meant[name] = (first[name] + second[name]) / 2
        else:
            meant[name] = (first if name.startswith("blocks.") else second)[name]
    assert_same(run("select.yaml", tmp_path / "out"), meant)


def test_stack_renumbers_layers_and_the_deeper_model_runs(digits: ModuleType, tmp_path: Path) -> None:
    first, second = model("inverted"), model("rotated")
    meant = {name: first[name] for name in first if name.startswith("head.")}
    for n, (source, layer) in enumerate([(first, 0), (first, 1), (second, 1), (second, 2), (first, 2)]):
        for part in ("linear.weight", "linear.bias", "norm.weight", "norm.bias"):
            factor = 0.5 if n == 4 and part.startswith("linear") else 1.0
            meant[f"blocks.{n}.{part}"] = source[f"blocks.{layer}.{part}"] * factor
    assert_same(run("stack.yaml", tmp_path / "out"), meant)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 5
    deeper = digits.load(tmp_path / "out")
    assert set(digits.accuracies(deeper, digits.splits()["test"])) == set(digits.DOMAINS)


@pytest.mark.slow
def test_training_again_gives_models_as_good(digits: ModuleType, tmp_path: Path) -> None:
    subprocess.run([sys.executable, QUICKSTART / "train.py", tmp_path], check=True)
    test = digits.splits()["test"]
    for name in ("base", *digits.DOMAINS):
        again = digits.accuracies(digits.load(tmp_path / name), test)
        shipped = digits.accuracies(digits.load(QUICKSTART / "models" / name), test)
        assert max(abs(again[domain] - shipped[domain]) for domain in digits.DOMAINS) < 0.05

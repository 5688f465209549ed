"""`op: fuse` from recipe to result: sources are run once and kept, the target is trained, and a run goes on after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_stages import mlp, rows, weights, write_recipe
from toys import call, environment

from mergeflow import pipeline
from mergeflow.errors import InputError, MachineError, NumericError, RecipeError
from mergeflow.ops.fuse import Fuse, Fusion, Loss, Source, Train
from mergeflow.recipe import load_recipe
from mergeflow.stages import models
from mergeflow.stages.fuse import classifying, training

FUSED: dict[str, Any] = {
    "op": "fuse",
    "task": "classification",
    "target": "start",
    "sources": ["a", "b"],
    "data": "rows",
    "train": {"epochs": 3, "batch_size": 16, "lr": 0.01, "warmup_ratio": 0.1, "checkpoint_every": 2},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with models `start`, `a` and `b`, rows for them, and a cache of its own."""
    monkeypatch.setenv("MERGEFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a", "b", "start"), start=1):
        mlp(tmp_path / name, seed)
    rows(tmp_path / "rows.jsonl")
    return tmp_path


def run(here: Path, out: str = "out", *, nodes: Mapping[str, Any] | None = None, **changed: Any) -> pipeline.Result:
    """The fuse, with some of its keys changed, through a recipe on disk."""
    names = [
        path.name for path in here.iterdir() if (path / "config.json").exists() and not path.name.startswith("out")
    ]
    made = write_recipe(
        here,
        {**(nodes or {}), "fused": {**FUSED, **changed}},
        models={name: f"./{name}" for name in sorted(names)},
        output={"node": "fused"},
    )
    return pipeline.run(load_recipe(made), out, threads=1)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that were loaded to run, by the names of their folders, as it goes."""
    loaded: list[str] = []
    load = models.load_model

    def noted(folder: models.Folder, device: str = "cpu") -> Any:
        loaded.append(folder.path.name)
        return load(folder, device)

    monkeypatch.setattr(models, "load_model", noted)
    return loaded


def features(path: Path) -> torch.Tensor:
    return torch.tensor([json.loads(line)["features"] for line in path.read_text().splitlines()])


def given(folder: Path, x: torch.Tensor) -> torch.Tensor:
    """What a mergeflow_mlp says of rows, by code of its own."""
    state = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    x = x.double()
    for block in range(2):
        x = x @ state[f"blocks.{block}.linear.weight"].T + state[f"blocks.{block}.linear.bias"]
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        x = torch.nn.functional.gelu(x * state[f"blocks.{block}.norm.weight"] + state[f"blocks.{block}.norm.bias"])
    return x @ state["head.weight"].T + state["head.bias"]


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> float:
    said = teacher.softmax(1)
    return float((said * (teacher.log_softmax(1) - student.log_softmax(1))).sum(1).mean())


def test_the_target_comes_nearer_to_the_mean_of_its_sources_and_keeps_its_form(here: Path) -> None:
    run(here, "out", train={**FUSED["train"], "epochs": 20})
    x = features(here / "rows.jsonl")
    teacher = (given(here / "a", x) + given(here / "b", x)) / 2
    before, after = (divergence(teacher, given(folder, x)) for folder in (here / "start", here / "out"))
    assert after < 0.3 * before
    start, made = weights(here / "start"), weights(here / "out")
    assert {name: (one.dtype, one.shape) for name, one in made.items()} == {
        name: (one.dtype, one.shape) for name, one in start.items()
    }
    assert json.loads((here / "out/config.json").read_text())["num_labels"] == 3


def test_the_first_loss_is_the_mean_divergence_by_the_formula(here: Path) -> None:
    changed = {"train": {**FUSED["train"], "epochs": 1, "batch_size": 64}, "loss": {"teacher_temperature": 2.0}}
    changed["sources"] = [{"model": "a", "weight": 3.0}, "b"]
    result = run(here, **changed)
    x = features(here / "rows.jsonl")
    teacher = (0.75 * given(here / "a", x) + 0.25 * given(here / "b", x)) / 2
    first = json.loads((artifact(result) / training.METRICS).read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(divergence(teacher, given(here / "start", x)), rel=1e-5)
    assert "<polyline" in (artifact(result) / training.PLOT).read_text()


def artifact(result: pipeline.Result) -> Path:
    """The fused model in the cache."""
    return Path(os.environ["MERGEFLOW_CACHE"]) / "artifacts" / result.stages[-1][1]


# What is kept


def test_a_second_run_runs_no_model_and_a_changed_training_runs_no_source(here: Path, ran: list[str]) -> None:
    run(here)
    assert sorted(ran) == ["a", "b", "start"]
    ran.clear()
    assert run(here, "again").stages[-1][2]
    assert ran == []
    assert weights(here / "again").keys() == weights(here / "out").keys()
    run(here, "other", loss={"student_temperature": 2.0})
    assert ran == ["start"]


def test_one_more_source_and_one_that_changed_run_alone(here: Path, ran: list[str]) -> None:
    run(here)
    mlp(here / "c", 7)
    ran.clear()
    run(here, "three", sources=["a", "b", "c"])
    assert ran == ["c", "start"]
    mlp(here / "b", 8)
    ran.clear()
    run(here, "changed", sources=["a", "b", "c"])
    assert ran == ["b", "start"]


def test_a_lazy_node_is_written_once_and_may_be_target_and_source(here: Path, ran: list[str]) -> None:
    nodes = {"mean": {"op": "linear", "inputs": ["a", "b"]}}
    run(here, nodes=nodes, target="mean", sources=["a", {"model": "mean", "weight": 0.5}])
    kept = sorted((here / "cache/artifacts").iterdir())
    ran.clear()
    run(here, "other", nodes=nodes, target="mean", sources=["a", {"model": "mean", "weight": 0.7}])
    assert len(ran) == 1, "the mean is trained, and no source runs"
    assert set(kept) < set((here / "cache/artifacts").iterdir())


def test_a_fused_model_is_an_input_like_any(here: Path) -> None:
    mean = {"op": "linear", "inputs": ["start", {**FUSED, "sources": ["a"]}, {**FUSED, "sources": ["b"]}]}
    recipe = write_recipe(here, {"mean": mean}, models={name: f"./{name}" for name in ("start", "a", "b")})
    assert not pipeline.plan(load_recipe(recipe)).stages[0].done
    result = pipeline.run(load_recipe(recipe), "out", threads=1)
    parts = [load_file(here / "cache/artifacts" / key / "model.safetensors") for _, key, _ in result.stages]
    whole = weights(here / "out")
    for name, start in weights(here / "start").items():
        mean_of = (start.double() + parts[0][name].double() + parts[1][name].double()) / 3
        assert torch.allclose(whole[name].double(), mean_of, atol=1e-6)


# A kill

KILLED = """
import os, signal, sys
from mergeflow.stages.fuse import {module} as module
from mergeflow.stages.fuse.{module} import {owner} as owner
before, seen = owner.{name}, []
def after(*args, **more):
    seen.append(1)
    if len(seen) == {count}:
        os.kill(os.getpid(), signal.SIGKILL)
    return before(*args, **more)
owner.{name} = after
from mergeflow.cli import main
sys.argv = ["mergeflow", "run", "recipe.yaml", "-o", "out", "--threads", "1", "-q"]
main()
"""


def killed(here: Path, module: str, owner: str, name: str, count: int) -> None:
    """A run that is killed when it calls this for the so-manieth time."""
    code = KILLED.format(module=module, owner=owner, name=name, count=count)
    done = subprocess.run([sys.executable, "-c", code], cwd=here, env=environment(), capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.parametrize("count", [1, 4, 9])
def test_a_training_that_was_killed_ends_in_the_same_bytes(here: Path, count: int, tmp_path_factory: Any) -> None:
    run(here, "whole")
    wanted = (here / "whole/model.safetensors").read_bytes()
    os.environ["MERGEFLOW_CACHE"] = str(tmp_path_factory.mktemp("other"))
    killed(here, "training", "_State", "note", count)
    assert not (here / "out").exists()
    steps: list[int] = []
    note = training._State.note
    training._State.note = lambda self, values: (steps.append(values["step"]), note(self, values))[1]  # type: ignore[method-assign]
    try:
        result = run(here, "out")
    finally:
        training._State.note = note  # type: ignore[method-assign]
    assert (here / "out/model.safetensors").read_bytes() == wanted
    assert steps[0] == (count - 1) // 2 * 2 + 1, "it goes on from the last checkpoint"
    lines = (artifact(result) / training.METRICS).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 13))

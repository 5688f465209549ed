"""Our ops against other packages: golden files that `goldens/make.py` made by mergekit, fusion-bench, sd-mecha and peft.

Nothing of those packages is needed here. Every golden is a test, found in the files; one of an op that we do not have
fails. A distance is |ours - theirs| / |theirs| in L2, for each tensor alone.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save, weights_of
from goldens.inputs import digest, llama, models, write_llamas
from safetensors import safe_open
from torch import Tensor

import mergeflow.ops as ops
from mergeflow import Recipe, load_recipe, run
from mergeflow.ops import Block, draws, measure, op_named
from mergeflow.ops.base import cut_as
from mergeflow.settings import Place

HERE = Path(__file__).parent / "goldens"
FURTHEST: Mapping[str, float] = {"mergekit": 5e-7, "fusion-bench": 1e-5, "sd-mecha": 1e-6, "peft": 1e-6}
"""How far from each package we may be."""
FURTHEST_DRAWN = 1e-6
"""How far from mergekit, with the same random masks."""

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Golden:
    """One merge by another package: what its file says of it."""

    path: Path
    name: str
    op: str
    parameters: Mapping[str, Any]
    kind: str
    inputs: int
    base: bool
    dtype: str
    scope: str
    keys: tuple[int, ...]
    digest: str
    package: str
    version: str
    there: str
    note: str

    def __str__(self) -> str:
        return f"{self.package}: {self.name}"

    def wanted(self) -> Tensors:
        """What the package gave, by the name of the tensor."""
        with safe_open(self.path, "pt") as file:
            start = f"{self.name}/"
            return {one.removeprefix(start): file.get_tensor(one) for one in file.keys() if one.startswith(start)}  # noqa: SIM118

    def given(self) -> tuple[Tensors, list[Tensors]]:
        """The base and the inputs."""
        base, tunes = models(self.kind, self.inputs)
        assert digest(base, tunes) == self.digest, "the golden was made of other models"
        dtype = getattr(torch, self.dtype)
        first, *rest = [{name: torch.from_numpy(one).to(dtype) for name, one in one.items()} for one in (base, *tunes)]
        return first, rest

    @property
    def furthest(self) -> float:
        """How far from it we may be."""
        return FURTHEST_DRAWN if self.keys or self.masked else FURTHEST[self.package]

    @property
    def masked(self) -> bool:
        """Whether the masks that the package drew stand beside its result."""
        return any(name.startswith("mask.") for name in self.wanted())


def _read(path: Path) -> list[Golden]:
    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()["cases"])
    return [Golden(path, name, **{**one, "keys": tuple(one["keys"])}) for name, one in sorted(said.items())]


GOLDENS = [golden for package in FURTHEST for golden in _read(HERE / f"{package}.safetensors")]
REPLAYED = [golden for golden in GOLDENS if golden.masked]
OF_MODELS = [golden for golden in GOLDENS if golden.scope == "model"]
OF_TENSORS = [golden for golden in GOLDENS if golden not in REPLAYED and golden not in OF_MODELS]


def _read_merges() -> dict[str, Any]:
    with safe_open(HERE / "mergekit-yaml.safetensors", "pt") as file:
        return dict(json.loads(file.metadata()["cases"]))


MERGES = _read_merges()
"""Configurations that mergekit's command merged, by name."""


def close(got: Tensor, want: Tensor, furthest: float, what: str) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape), what
    wide, other = got.double(), want.double()
    distance, size = float((wide - other).norm()), float(other.norm())
    assert distance <= furthest * size, (
        f"{what} is {distance / size if size else distance:.2g} from it, not {furthest:g}"
    )


def called(golden: Golden, base: Tensor, inputs: Sequence[Tensor], keys: Sequence[int] = ()) -> Tensor:
    """Our op on one tensor; with keys, as a run calls it with these keys for its draws."""
    op = op_named(golden.op)(**golden.parameters)
    if keys:
        assert op.draws and op.needs_base
        ready = op.resolved(op.values_at(Place("w"), range(len(inputs))))
        shape, keys = tuple(base.shape), tuple(keys)
        given = [base, *(one - base for one in inputs)]
        known = measure(ready, given, keys)
        cut = [cut_as(one, op.cut, shape) for one in given]
        return ready.compute(cut, Block(0, known, shape, keys)).reshape(shape)
    if not golden.base:
        return op(inputs)
    return op(base, inputs) if op.needs_base or op.may_base else op([base, *inputs])


@pytest.mark.parametrize("golden", OF_TENSORS, ids=str)
def test_an_op_gives_what_another_package_gives(golden: Golden) -> None:
    base, inputs = golden.given()
    for name, want in golden.wanted().items():
        got = called(golden, base[name], [one[name] for one in inputs], golden.keys)
        close(got, want, golden.furthest, f"{name} of {golden}")


@pytest.mark.parametrize("golden", REPLAYED, ids=str)
def test_with_the_masks_that_another_package_drew_an_op_gives_its_result(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, inputs = golden.given()
    wanted = golden.wanted()
    masks = {name.removeprefix("mask."): wanted.pop(name) for name in list(wanted) if name.startswith("mask.")}
    assert masks.keys() == wanted.keys()
    for name, want in wanted.items():
        rows = masks[name].reshape(len(inputs), -1)

        def uniform(key: int, start: int, like: Tensor, rows: Tensor = rows) -> Tensor:
            """Numbers for which exactly what the mask keeps is kept: 0, or the greatest there is."""
            dropped = rows[key, start : start + like.numel()] == 0
            return dropped.float().mul_(1 - 2.0**-24)

        def below(key: int, start: int, like: Tensor, limit: float, drawn: Any = uniform) -> Tensor:
            return drawn(key, start, like) < limit

        for function, replacement in (("uniform", uniform), ("below", below)):
            replace_everywhere(monkeypatch, getattr(draws, function), replacement)
        got = called(golden, base[name], [one[name] for one in inputs], range(len(inputs)))
        close(got, want, golden.furthest, f"{name} of {golden}")
        monkeypatch.undo()


def replace_everywhere(monkeypatch: pytest.MonkeyPatch, function: Any, replacement: Any) -> None:
    """Wherever a module of ours has a function under its own name, another."""
    for name, module in list(sys.modules.items()):
        if name.startswith("mergeflow") and vars(module).get(function.__name__) is function:
            monkeypatch.setattr(module, function.__name__, replacement)


@pytest.mark.parametrize("golden", OF_MODELS, ids=str)
def test_a_run_gives_what_another_package_gives_of_whole_models(golden: Golden, tmp_path: Path) -> None:
    base, inputs = golden.given()
    names = [f"task{index}" for index in range(len(inputs))]
    for name, tensors in zip(["base", *names], [base, *inputs], strict=True):
        save(tmp_path / name, tensors)
    known = {name: f"./{name}" for name in ("base", *names)}
    node = {"op": golden.op, "base": "base", "inputs": names, **golden.parameters}
    wanted = golden.wanted()
    got: Tensors = {}
    if golden.op == "emr":
        for task, name in enumerate(names):
            one = {"op": "emr_apply", "emr": "unified", "base": "base", "task": name}
            recipe = Recipe(folder=tmp_path, models=known, nodes={"unified": node, "out": one}, output={"node": "out"})
            found = weights_of(run(recipe, tmp_path / f"out{task}").path)
            got |= {f"{task}/{tensor}": value for tensor, value in found.items()}
    else:
        got = weights_of(run(Recipe(folder=tmp_path, models=known, nodes={"out": node}), tmp_path / "out").path)
    assert got.keys() == wanted.keys()
    for name, want in wanted.items():
        close(got[name], want, golden.furthest, f"{name} of {golden}")


@pytest.mark.parametrize("name", MERGES)
def test_an_imported_configuration_gives_what_the_command_of_mergekit_gives(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergeflow.importing import import_config, write_recipe

    merge = MERGES[name]
    assert write_llamas(tmp_path) == merge["digest"], "the golden was made of other models"
    monkeypatch.chdir(tmp_path)
    Path("config.yml").write_text(merge["config"])
    write_recipe(import_config("config.yml"), "recipe.yaml")
    got = weights_of(run(load_recipe("recipe.yaml"), tmp_path / "out").path)
    shapes = llama(merge["layers"])
    assert {tensor: tuple(one.shape) for tensor, one in got.items()} == shapes
    with safe_open(HERE / "mergekit-yaml.safetensors", "pt") as file:
        joined = file.get_tensor(name)
    for tensor, want in zip(shapes, joined.split([math.prod(shape) for shape in shapes.values()]), strict=True):
        close(got[tensor], want.reshape(shapes[tensor]), FURTHEST["mergekit"], f"{tensor} of {name}")


def test_goldens_come_from_four_packages_and_say_how_they_were_made() -> None:
    assert {golden.package: golden.version for golden in GOLDENS} == {
        "mergekit": "0.1.5",
        "fusion-bench": "0.2.33",
        "sd-mecha": "1.1.8",
        "peft": "0.21.2",
    }
    assert len(REPLAYED) == 4 and len(OF_MODELS) >= 4 and len(MERGES) >= 20
    assert {merge["version"] for merge in MERGES.values()} == {"0.1.5"}
    assert all(golden.there and golden.wanted() for golden in GOLDENS)
    assert sum(path.stat().st_size for path in HERE.iterdir()) < 400_000


def test_every_golden_is_of_an_op_that_there_is() -> None:
    assert {golden.op for golden in GOLDENS} <= ops.all_ops().keys()

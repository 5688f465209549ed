"""mergeflow as a library: what it offers, that all of it is explained, and that code and recipe give the same bits."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkpoints import raw, save, weights_of
from torch import Tensor

import mergeflow
from mergeflow import Plan, Recipe, RecipeError, Result, load_recipe, plan, run
from mergeflow.errors import MergeflowError
from mergeflow.graph import Apply, Load
from mergeflow.ops import (
    OPS,
    Add,
    Cast,
    Linear,
    Op,
    Passthrough,
    Scale,
    Select,
    Slerp,
    TaskArithmetic,
    TaskVector,
    Ties,
)

PACKAGE = Path(mergeflow.__file__).parent
MODULES = ["mergeflow", *(module.name for module in pkgutil.walk_packages([str(PACKAGE)], "mergeflow."))]


def alone(code: str) -> str:
    """What code prints in a process of its own."""
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


# The face


def test_every_name_of_all_can_be_had_and_nothing_public_is_missing_from_it() -> None:
    for name in mergeflow.__all__:
        assert getattr(mergeflow, name) is not None
    assert sorted(mergeflow.__all__) == mergeflow.__all__
    offered = {name for names in mergeflow._HOMES.values() for name in names} | {"__version__"}
    assert set(mergeflow.__all__) == offered == set(dir(mergeflow))
    errors = importlib.import_module("mergeflow.errors")
    tree = {name for name, one in vars(errors).items() if isinstance(one, type) and issubclass(one, MergeflowError)}
    assert tree <= offered, "every error can be caught by its name in mergeflow"
    assert {"load_recipe", "plan", "run", "Recipe", "Plan", "Result"} <= offered


def test_a_star_import_gives_the_face_and_no_more() -> None:
    names: dict[str, Any] = {}
    exec("from mergeflow import *", names)
    names.pop("__builtins__")
    assert names.keys() == set(mergeflow.__all__)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    seen = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(mergeflow.__all__) - {"__version__"} <= seen


def test_no_module_has_the_name_of_a_public_function() -> None:
    public = set(mergeflow.__all__) | set(importlib.import_module("mergeflow.ops").__all__)
    assert not {name.rpartition(".")[2] for name in MODULES if name.count(".") == 1} & public
    for name in MODULES:
        importlib.import_module(name)
    for name in mergeflow.__all__:
        assert not isinstance(getattr(mergeflow, name), ModuleType), name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'mergeflow' has no attribute 'merge'"):
        _ = mergeflow.merge  # type: ignore[attr-defined]


def test_importing_mergeflow_and_checking_a_recipe_load_no_torch() -> None:
    recipe = PACKAGE.parent / "recipes" / "ties.yaml"
    code = f"""
import sys, mergeflow
dir(mergeflow)
assert "torch" not in sys.modules
mergeflow.load_recipe({str(recipe)!r})
from mergeflow.ops import Ties
Ties(density=0.2)
print("torch" in sys.modules, "numpy" in sys.modules)
"""
    assert alone(code) == "False False"


def test_planning_loads_no_torch() -> None:
    recipe = PACKAGE.parent / "recipes" / "ties.yaml"
    code = f"import sys, mergeflow; print(len(mergeflow.plan(mergeflow.load_recipe({str(recipe)!r})).rows) > 0, 'torch' in sys.modules)"
    assert alone(code) == "True False"


def test_the_version_is_that_of_the_package_and_types_are_shipped() -> None:
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    assert f'version = "{mergeflow.__version__}"' in text
    assert (files("mergeflow") / "py.typed").is_file()


# Words


def public(module: ModuleType) -> list[tuple[str, Any]]:
    """The public functions and classes that a module defines, and their public methods."""
    found: list[tuple[str, Any]] = []
    for name, one in vars(module).items():
        if name.startswith("_") or getattr(one, "__module__", "") != module.__name__:
            continue
        if inspect.isfunction(one) or inspect.isclass(one):
            found.append((name, one))
    return found


@pytest.mark.parametrize("name", [name for name in MODULES if name != "mergeflow.__main__"])
def test_every_public_function_and_class_says_what_it_is(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, name
    for known, one in public(module):
        assert (one.__doc__ or "").strip(), f"{name}.{known} has no docstring"
        if inspect.isclass(one):
            assert not (one.__doc__ or "").startswith(f"{one.__name__}("), (
                f"{name}.{known} has only a generated docstring"
            )


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_op_and_each_of_its_parameters_is_explained(op: type[Op]) -> None:
    assert op.__doc__ and op.formula
    assert len(op.__doc__.strip().splitlines()[0]) < 120
    for name, field in op.model_fields.items():
        assert field.description, f"{op.name}: {name}"
    assert op.compute.__doc__ or op is Ties or issubclass(op, mergeflow.ops.DeltaOp)


# Recipes in code


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in enumerate("abc"):
        make = torch.Generator().manual_seed(i)
        save(
            tmp_path / name,
            {"w": torch.randn(70_001, generator=make), "m": torch.randn(33, 50, generator=make).bfloat16()},
        )
    return tmp_path


NODES = {"mean": {"op": "linear", "inputs": [{"model": "a", "weight": 0.25}, "b"]}}


def test_a_recipe_in_code_is_the_recipe_in_the_file(folder: Path) -> None:
    written = folder / "mean.yaml"
    written.write_text(
        "recipe: 1\nmodels: {a: ./a, b: ./b}\nnodes:\n  mean: {op: linear, inputs: [{model: a, weight: 0.25}, b]}\n"
    )
    from_file = load_recipe(written)
    in_code = Recipe(folder=folder, name="mean", models={"a": "./a", "b": "./b"}, nodes=NODES)
    assert in_code.text() == from_file.text()
    assert plan(in_code).digest == plan(from_file).digest
    assert run(from_file, folder / "out").made
    assert not run(in_code, folder / "out").made, "it is the same plan"


def test_a_recipe_in_code_does_not_hold_on_to_what_it_was_made_from(folder: Path) -> None:
    models, nodes = {"a": "./a", "b": "./b"}, {"mean": {"op": "linear", "inputs": ["a", "b"]}}
    recipe = Recipe(folder=folder, models=models, nodes=nodes)
    before = recipe.text()
    models["a"] = "./c"
    nodes["mean"]["inputs"] = ["b"]
    assert recipe.text() == before


def test_a_recipe_in_code_is_checked_like_one_in_a_file() -> None:
    with pytest.raises(RecipeError, match=r"recipe.nodes.mean.op: unknown op 'liner'. Did you mean 'linear'\?"):
        Recipe(models={"a": "./a"}, nodes={"mean": {"op": "liner", "inputs": ["a"]}})
    with pytest.raises(MergeflowError, match="modles"):
        Recipe(modles={"a": "./a"})


def test_a_plan_can_be_looked_at_and_is_a_plain_value(folder: Path) -> None:
    made = plan(Recipe(folder=folder, models={"a": "./a", "b": "./b"}, nodes=NODES))
    assert isinstance(made, Plan)
    assert {row.name: (row.dtype.name, row.shape) for row in made.rows} == {
        "w": ("float32", (70_001,)),
        "m": ("bfloat16", (33, 50)),
    }
    expression = made.rows[0].expression
    assert isinstance(expression, Apply) and isinstance(expression.op, Linear)
    assert all(isinstance(one, Load) for one in expression.inputs)
    assert made.bytes_out >= 4 * 70_001 + 2 * 33 * 50
    with pytest.raises(AttributeError):
        made.name = "other"  # type: ignore[misc]


def test_a_run_tells_what_it_did(folder: Path) -> None:
    size = 4 * 70_001 + 2 * 33 * 50
    told: list[tuple[str, int, int]] = []
    result = run(
        Recipe(folder=folder, models={"a": "./a", "b": "./b"}, nodes=NODES),
        folder / "out",
        progress=lambda *given: told.append(given),
    )
    assert isinstance(result, Result)
    assert (result.path, result.made, result.rows, result.resumed) == (folder / "out", True, 2, 0)
    assert (result.bytes_in, result.bytes_out) == (2 * size, size)
    assert sum(done for what, done, _ in told if what == "write") == size
    assert {total for what, _, total in told if what == "write"} == {size}
    assert {"plan", "rows", "publish"} <= result.seconds.keys()


def test_a_run_without_a_place_goes_to_the_recipes_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    result = run(Recipe(name="called", models={"a": "./a"}, output={"node": "a"}))
    assert result.path.resolve() == folder / "called"


# Ops on plain tensors

CALLS: dict[str, tuple[Op, str, dict[str, Any]]] = {
    "linear": (Linear(weight=0.3), "[a, b, c]", {"inputs": ["a", "b", "c"], "weight": 0.3}),
    "linear, each its weight": (
        Linear(weight=[0.2, 0.7], normalize=False),
        "[a, b]",
        {"inputs": [{"model": "a", "weight": 0.2}, {"model": "b", "weight": 0.7}], "normalize": False},
    ),
    "slerp": (Slerp(t=0.3), "[a, b]", {"inputs": ["a", "b"], "t": 0.3}),
    "task_arithmetic": (
        TaskArithmetic(weight=0.4, scale=1.5),
        "a, [b, c]",
        {"base": "a", "inputs": ["b", "c"], "weight": 0.4, "scale": 1.5},
    ),
    "ties": (Ties(density=0.2), "a, [b, c]", {"base": "a", "inputs": ["b", "c"], "density": 0.2}),
    "ties, rescaled": (
        Ties(density=0.2, rescale="l2", vote="count"),
        "a, [b, c]",
        {"base": "a", "inputs": ["b", "c"], "density": 0.2, "rescale": "l2", "vote": "count"},
    ),
    "task_vector": (TaskVector(), "a, b", {"base": "a", "model": "b"}),
    "scale": (Scale(by=-0.7), "a", {"model": "a", "by": -0.7}),
    "cast": (Cast(to="float8_e5m2"), "a", {"model": "a", "to": "float8_e5m2"}),
    "passthrough": (Passthrough(), "a", {"model": "a"}),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_op_on_plain_tensors_gives_the_bits_of_a_run(name: str, folder: Path) -> None:
    op, call, node = CALLS[name]
    recipe = Recipe(folder=folder, models={m: f"./{m}" for m in "abc"}, nodes={"m": {"op": op.name, **node}})
    got = weights_of(run(recipe, folder / "out").path)
    stored = {m: weights_of(folder / m) for m in "abc"}
    for tensor in ("w", "m"):
        given = {m: stored[m][tensor] for m in "abc"}
        before = {m: raw(one) for m, one in given.items()}
        made: Tensor = eval(f"op({call})", {"op": op, **given})
        assert made.dtype == got[tensor].dtype
        assert raw(made) == raw(got[tensor])
        assert {m: raw(one) for m, one in given.items()} == before, "inputs are never written to"
        assert all(made.data_ptr() != one.data_ptr() for one in given.values())


def test_add_on_plain_tensors_adds_deltas_to_a_base() -> None:
    base, delta = torch.randn(10), torch.randn(10)
    assert torch.equal(Add(weight=0.5)(base, [delta]), base + 0.5 * delta)


def test_ops_refuse_what_only_a_recipe_can_say() -> None:
    a = torch.zeros(3)
    with pytest.raises(RecipeError, match="chooses tensors by name"):
        Select()(a)
    with pytest.raises(RecipeError, match=r"different shapes: \(3,\), \(4,\)"):
        Linear()([a, torch.zeros(4)])
    with pytest.raises(RecipeError, match="never computed on"):
        Linear()([a.long(), a.long()])
    with pytest.raises(RecipeError, match="got 1 inputs, not 2"):
        Slerp(t=0.5)([a])
    with pytest.raises(RecipeError, match="Give each parameter one value"):
        Scale(by={"gradient": [0, 1], "outside": 1})(a)


def test_ops_are_values() -> None:
    assert Ties(density=0.2) == Ties(density=0.2) != Ties(density=0.3)
    with pytest.raises(ValueError, match="frozen"):
        Ties(density=0.2).density = 0.5  # type: ignore[misc]
    with pytest.raises(ValueError, match="density"):
        Ties(density=1.5)
    with pytest.raises(ValueError, match="densty"):
        Ties(densty=0.5)  # type: ignore[call-arg]

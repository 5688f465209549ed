"""`emr` and `emr_apply` against the formulas, through files: what an artifact holds gives each task's model back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import files_of, save, weights_of
from numpy.typing import NDArray
from torch import Tensor

from mergeflow import Recipe, plan, run
from mergeflow.errors import MergeflowError, Problems
from mergeflow.ops import LEAF, Emr

Array = NDArray[np.float64]
TASKS = ("math", "code", "chat")
SHAPES = {"w": (200, 301), "b": (LEAF + 13,), "v": (7,), "s": (), "e": (0, 3)}
MODES = ("per_tensor_mean", "global", "per_tensor")


def models(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    found = {"base": base}
    for task in TASKS:
        step = {n: torch.randn(t.shape, generator=generator) * (0.05 if n == "w" else 0.3) for n, t in base.items()}
        # Some entries do not move at all: a delta of 0 has no sign.
        moved = {n: t * (torch.rand(t.shape, generator=generator) > 0.2) for n, t in step.items()}
        found[task] = {name: (tensor.float() + moved[name]).to(dtype) for name, tensor in base.items()}
    for tensors in found.values():
        tensors["count"] = torch.arange(3)
    return found


def reference(given: dict[str, dict[str, Tensor]], mode: str) -> dict[str, Any]:
    """Unified deltas, masks, scalers and models in float64, entry by entry; deltas as float32 has them."""
    names = list(SHAPES)
    tau = {t: {n: (given[t][n].float() - given["base"][n].float()).double().numpy() for n in names} for t in TASKS}
    unified: dict[str, Array] = {}
    masks: dict[str, dict[str, Array]] = {task: {} for task in TASKS}
    for name in names:
        stacked = np.stack([tau[task][name] for task in TASKS]).reshape(len(TASKS), -1)
        largest = np.zeros(stacked.shape[1])
        for entry in range(stacked.shape[1]):
            column = stacked[:, entry]
            sign = (
                1.0
                if np.float32(np.float32(np.float32(column[0]) + np.float32(column[1])) + np.float32(column[2])) > 0
                else -1.0
            )
            largest[entry] = sign * max((abs(x) for x in column if x * sign > 0), default=0.0)
        unified[name] = largest.reshape(SHAPES[name])
        for task in TASKS:
            masks[task][name] = (tau[task][name] * unified[name] > 0).astype(float)
    scalers: dict[str, dict[str, float]] = {}
    for task in TASKS:
        own = {n: np.abs(tau[task][n]) for n in names}
        kept = {n: np.abs(masks[task][n] * unified[n]) for n in names}
        ratio = lambda a, b: float(a / b) if b else 1.0  # noqa: E731
        if mode == "per_tensor":
            scalers[task] = {n: ratio(own[n].sum(), kept[n].sum()) for n in names}
        else:
            size = (lambda x: x.sum()) if mode == "global" else (lambda x: x.mean() if x.size else 0.0)
            whole = ratio(sum(size(own[n]) for n in names), sum(size(kept[n]) for n in names))
            scalers[task] = dict.fromkeys(names, whole)
    made = {
        t: {n: given["base"][n].double().numpy() + scalers[t][n] * masks[t][n] * unified[n] for n in names}
        for t in TASKS
    }
    return {"unified": unified, "masks": masks, "scalers": scalers, "models": made}


def recipe(folder: Path, nodes: dict[str, Any], **rest: Any) -> Recipe:
    found = {path.name: f"./{path.name}" for path in sorted(folder.iterdir()) if path.name in ("base", *TASKS)}
    return Recipe(folder=folder, name="merged", models=found, nodes=nodes, **rest)


def emr(**more: Any) -> dict[str, Any]:
    return {"op": "emr", "base": "base", "inputs": list(TASKS), **more}


def task_nodes(source: str) -> dict[str, Any]:
    return {f"{task}_again": {"op": "emr_apply", "emr": source, "base": "base", "task": task} for task in TASKS}


def stored(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, Tensor]]:
    given = models(dtype=dtype)
    for name, tensors in given.items():
        save(folder / name, tensors)
    return given


@pytest.mark.parametrize("mode", MODES)
def test_an_artifact_holds_what_the_formulas_say(mode: str, tmp_path: Path) -> None:
    given = stored(tmp_path)
    right = reference(given, mode)
    run(recipe(tmp_path, {"kept": emr(rescale=mode)}), tmp_path / "out", threads=2)
    got = weights_of(tmp_path / "out")
    assert "count" not in str(got.keys()), "integers are the base's, and no delta"
    for name in SHAPES:
        assert np.allclose(got[f"unified.{name}"].numpy(), right["unified"][name], rtol=1e-6, atol=1e-7)
        for task in TASKS:
            packed = got[f"mask.{task}.{name}"]
            assert packed.dtype == torch.uint8 and packed.numel() == -(-given["base"][name].numel() // 8)
            bits = np.unpackbits(packed.numpy(), bitorder="little")
            assert np.array_equal(bits[: right["masks"][task][name].size], right["masks"][task][name].reshape(-1))
            assert not bits[right["masks"][task][name].size :].any()
            key = f"scaler.{task}.{name}" if mode == "per_tensor" else f"scaler.{task}"
            assert got[key].item() == pytest.approx(right["scalers"][task][name], rel=1e-6)
    assert not (tmp_path / "out" / "config.json").exists(), "an artifact is no model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_task_comes_back_from_a_node_and_from_the_artifact(mode: str, dtype: torch.dtype, tmp_path: Path) -> None:
    right = reference(stored(tmp_path, dtype), mode)["models"]
    outputs = {task: {"node": f"{task}_again", "dtype": "float32"} for task in TASKS}
    node = {"kept": emr(rescale=mode), **task_nodes("kept")}
    run(recipe(tmp_path, node, outputs=outputs), tmp_path / "lazy", threads=2)
    run(recipe(tmp_path, {"kept": emr(rescale=mode)}, output={"dtype": "float32"}), tmp_path / "kept")
    again = recipe(tmp_path, task_nodes("a"), outputs=outputs, artifacts={"a": "./kept"})
    run(again, tmp_path / "stored", threads=2)
    for task in TASKS:
        lazy, held = weights_of(tmp_path / "lazy" / task), weights_of(tmp_path / "stored" / task)
        for name in SHAPES:
            error = np.linalg.norm(lazy[name].double().numpy() - right[task][name])
            assert error <= 1e-6 * np.linalg.norm(right[task][name]) + 1e-12
            assert torch.equal(lazy[name], held[name])
        assert torch.equal(lazy["count"], torch.arange(3))
        assert torch.equal(held["count"], torch.arange(3))


def test_one_task_comes_back_whole(tmp_path: Path) -> None:
    given = stored(tmp_path)
    node = {"kept": emr(inputs=["math"]), "back": task_nodes("kept")["math_again"]}
    run(recipe(tmp_path, node), tmp_path / "out")
    for name, tensor in weights_of(tmp_path / "out").items():
        assert torch.allclose(tensor, given["math"][name], rtol=1e-6, atol=1e-7)


def test_tasks_that_learnt_nothing_are_the_base_bit_for_bit(tmp_path: Path) -> None:
    given = stored(tmp_path)
    for task in TASKS:
        save(tmp_path / task, given["base"])
    run(recipe(tmp_path, {"kept": emr(), "back": task_nodes("kept")["code_again"]}), tmp_path / "out")
    assert all(torch.equal(tensor, given["base"][name]) for name, tensor in weights_of(tmp_path / "out").items())


def test_threads_memory_and_reading_change_no_bit_of_an_artifact(tmp_path: Path) -> None:
    stored(tmp_path)
    made = recipe(tmp_path, {"kept": emr()})
    run(made, tmp_path / "first", threads=1)
    run(made, tmp_path / "second", threads=2, memory=2**26, reading="pread")
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")


def said(make: Recipe) -> list[str]:
    with pytest.raises(MergeflowError) as caught:
        plan(make)
    errors = caught.value.errors if isinstance(caught.value, Problems) else (caught.value,)
    return [str(error) for error in errors]


def test_a_task_that_is_not_there_is_refused(tmp_path: Path) -> None:
    stored(tmp_path)
    node = {"op": "emr_apply", "emr": "kept", "base": "base", "task": "maths"}
    assert said(recipe(tmp_path, {"kept": emr(), "back": node})) == [
        "recipe.nodes.back.task: there is no task 'maths'. Did you mean 'math'?"
    ]


def test_a_model_is_no_artifact_and_an_artifact_no_model(tmp_path: Path) -> None:
    stored(tmp_path)
    run(recipe(tmp_path, {"kept": emr()}), tmp_path / "kept")
    node = {"op": "emr_apply", "emr": "base", "base": "base", "task": "math"}
    with pytest.raises(
        MergeflowError, match=r"'base' is a model, and no artifact\. Name its folder under `artifacts:`"
    ):
        recipe(tmp_path, {"back": node})
    (refused,) = said(recipe(tmp_path, {"back": {**node, "emr": "a"}}, artifacts={"a": "./base"}))
    assert "artifacts.a: is no artifact that this mergeflow knows" in refused
    found = Recipe(folder=tmp_path, models={"kept": "./kept"}, nodes={"m": {"op": "scale", "model": "kept", "by": 2.0}})
    assert "holds 'artifact'. Name it under `artifacts:`." in said(found)[0]
    with pytest.raises(MergeflowError, match="'kept' is an artifact, and no model or node"):
        recipe(tmp_path, {"m": {"op": "linear", "inputs": ["base", "kept"]}}, artifacts={"kept": "./kept"})
    mixed = {"kept": emr(), "m": {"op": "linear", "inputs": ["base", "kept"]}}
    assert any("linear mixes artifact and weight inputs" in line for line in said(recipe(tmp_path, mixed)))


def test_a_base_that_the_artifact_was_not_made_with_is_refused(tmp_path: Path) -> None:
    given = stored(tmp_path)
    run(recipe(tmp_path, {"kept": emr()}), tmp_path / "kept")
    save(tmp_path / "base", {**given["base"], "v": torch.zeros(8), "more": torch.zeros(2)})
    lines = said(recipe(tmp_path, {"back": task_nodes("a")["math_again"]}, artifacts={"a": "./kept"}))
    assert any("'a' has 'v' in another shape" in line for line in lines)
    assert any("'a' lacks 'more'" in line for line in lines)


@pytest.mark.parametrize("mode", MODES)
def test_a_task_that_lacks_a_tensor_is_refused_where_it_would_be_left_out(mode: str, tmp_path: Path) -> None:
    given = stored(tmp_path)
    save(tmp_path / "code", {name: tensor for name, tensor in given["code"].items() if name != "v"})
    for nodes in (
        {"kept": emr(rescale=mode, missing="omit")},
        {"kept": emr(rescale=mode, missing="omit"), "back": task_nodes("kept")["math_again"]},
    ):
        (line,) = said(recipe(tmp_path, nodes))
        assert "an input is left out at 'v'. Write `missing: base`" in line
    run(recipe(tmp_path, {"kept": emr(rescale=mode, missing="base")}), tmp_path / "kept")
    made = weights_of(tmp_path / "kept")
    assert not made["mask.code.v"].any()
    assert made["mask.math.v"].any()


def test_integers_that_tasks_do_not_agree_on_are_refused_until_a_rule_chooses(tmp_path: Path) -> None:
    given = stored(tmp_path)
    save(tmp_path / "code", {**given["code"], "count": torch.arange(3) + 1})
    nodes = {"kept": emr(), "back": task_nodes("kept")["code_again"]}
    with pytest.raises(MergeflowError, match="count: integer and boolean tensors are never computed on"):
        run(recipe(tmp_path, nodes), tmp_path / "refused")
    chosen = {"op": "select", "rules": [{"match": "count", "model": "code"}, {"model": "back"}]}
    run(recipe(tmp_path, {**nodes, "whole": chosen}), tmp_path / "whole")
    assert torch.equal(weights_of(tmp_path / "whole")["count"], torch.arange(3) + 1)


def test_an_artifact_says_what_it_is_and_can_be_made_again(tmp_path: Path) -> None:
    stored(tmp_path)
    run(recipe(tmp_path, {"kept": emr()}), tmp_path / "kept")
    manifest = json.loads((tmp_path / "kept" / "mergeflow.json").read_text())
    assert manifest["recipe"]["nodes"]["kept"]["op"] == "emr"
    assert {"unified.w", "mask.math.w", "scaler.math"} <= manifest["tensors"].keys()
    assert "arXiv" in (tmp_path / "kept" / "README.md").read_text()


def test_emr_on_bare_tensors_points_to_a_recipe() -> None:
    with pytest.raises(MergeflowError, match="Use it in a recipe"):
        Emr()(torch.zeros(2), [torch.ones(2)])

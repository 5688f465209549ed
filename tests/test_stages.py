"""Stages from recipe to result: made once, found again by what went into them, foreseen in plans, never half-made."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergeflow import cache, pipeline
from mergeflow.checkpoint.statistics import open_statistics
from mergeflow.document import dump_yaml
from mergeflow.errors import InputError, Interrupted, MergeflowError, NumericError, Problems, RecipeError
from mergeflow.hub import LocalFolder
from mergeflow.pipeline import Result
from mergeflow.recipe import Recipe, load_recipe
from mergeflow.reporting import mermaid
from tests.toys import SOURCE, call

SIZES = {"input_size": 6, "hidden_size": 8, "num_hidden_layers": 2, "num_labels": 3}
GROUPS = ("blocks.0.linear.weight", "blocks.1.linear.weight", "head.weight")


def mlp(folder: Path, seed: int = 1, *, dtype: torch.dtype = torch.float32) -> Path:
    """A `mergeflow_mlp` with random weights."""
    draw = torch.Generator().manual_seed(seed)
    state = {"head.weight": torch.randn(3, 8, generator=draw), "head.bias": torch.zeros(3)}
    for index, width in enumerate((6, 8)):
        state[f"blocks.{index}.linear.weight"] = torch.randn(8, width, generator=draw)
        state[f"blocks.{index}.linear.bias"] = torch.randn(8, generator=draw)
        state[f"blocks.{index}.norm.weight"] = torch.ones(8)
        state[f"blocks.{index}.norm.bias"] = torch.zeros(8)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["MergeflowMLP"], "model_type": "mergeflow_mlp", **SIZES}
    (folder / "config.json").write_text(json.dumps(config))
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rows(path: Path, count: int = 64, seed: int = 0) -> Path:
    values = np.random.RandomState(seed).rand(count, 6)
    lines = [{"features": row.tolist(), "label": int(row[0] * 3)} for row in values]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with models `a` and `b`, rows for them, and a cache of its own."""
    monkeypatch.setenv("MERGEFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    mlp(tmp_path / "a", 1)
    mlp(tmp_path / "b", 2)
    rows(tmp_path / "rows.jsonl")
    rows(tmp_path / "more.jsonl", seed=5)
    return tmp_path


MODELS = {"a": "./a", "b": "./b"}
DATA = {"rows": "./rows.jsonl", "more": {"path": "./more.jsonl", "limit": 40}}
GRAM = {"op": "gram", "model": "a", "data": "rows"}
MERGED: dict[str, Any] = {
    "op": "regmean",
    "inputs": [{"model": "a", "gram": "gram_a"}, {"model": "b", "gram": "gram_b"}],
}


def recipe(nodes: Mapping[str, Any] | None = None, **top: Any) -> Recipe:
    """RegMean of `a` and `b`, each with a Gram made in place; or other nodes."""
    nodes = nodes or {"gram_a": GRAM, "gram_b": {**GRAM, "model": "b", "data": "more"}, "merged": MERGED}
    return Recipe(**{"name": "test", "models": MODELS, "data": DATA, "nodes": nodes, **top})


def gram_of(model: str, data: str = "rows", **keys: Any) -> Recipe:
    """A recipe whose output is the stage."""
    return recipe({"gram": {"op": "gram", "model": model, "data": data, **keys}})


def artifacts(root: Path) -> dict[str, float]:
    """The finished artifacts, each with when its weights were written; anything else that is there fails."""
    folder = root / "cache" / "artifacts"
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        assert not path.name.startswith("."), f"{path.name} was left"
        found[path.name] = (path / "model.safetensors").stat().st_mtime_ns
    return found


def left_over(root: Path) -> list[str]:
    """What lies in the cache, finished or not."""
    return sorted(str(path.relative_to(root / "cache")) for path in (root / "cache").rglob("*") if path.is_file())


def keys(result: Result) -> dict[str, str]:
    return {node: key for node, key, _ in result.stages}


def made_before(result: Result) -> dict[str, bool]:
    return {node: done for node, _, done in result.stages}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def key_of(given: Recipe) -> str:
    """The key of the one stage of a recipe, from headers alone."""
    opened = pipeline.open_models(given)
    (stage,) = pipeline.prepare(given, opened, foresee=pipeline.plan).stages
    return stage.key


def write_recipe(folder: Path, nodes: Mapping[str, Any], **top: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(dump_yaml({"recipe": 1, "name": "test", "models": MODELS, "data": DATA, "nodes": nodes, **top}))
    return path


# Made once


def test_a_second_run_finds_every_artifact_and_gives_the_same_bytes(here: Path) -> None:
    first = pipeline.run(recipe(), "one")
    assert made_before(first) == {"gram_a": False, "gram_b": False}
    written = artifacts(here)
    assert set(written) == set(keys(first).values())
    second = pipeline.run(recipe(), "two")
    assert made_before(second) == {"gram_a": True, "gram_b": True}
    assert artifacts(here) == written
    assert (here / "one/model.safetensors").read_bytes() == (here / "two/model.safetensors").read_bytes()


def test_the_manifest_of_an_artifact_says_on_what_its_last_bits_depend(here: Path) -> None:
    (key,) = keys(pipeline.run(load_recipe(write_recipe(here, {"gram": GRAM})), "out", threads=2)).values()
    manifest = json.loads((here / "cache/artifacts" / key / "mergeflow.json").read_text())
    assert {name: manifest["software"][name] for name in ("device", "threads")} == {"device": "cpu", "threads": "2"}
    assert manifest["software"].keys() == {"mergeflow", "torch", "machine", "device", "threads"}


def test_a_finished_output_still_tells_of_its_stages(here: Path) -> None:
    pipeline.run(recipe(), "one")
    again = pipeline.run(recipe(), "one")
    assert not again.made
    assert made_before(again) == {"gram_a": True, "gram_b": True}


def test_an_artifact_is_shared_by_recipes_that_call_it_otherwise(here: Path) -> None:
    first = pipeline.run(recipe(), "one")
    written = artifacts(here)
    other = Recipe(
        name="other",
        models={"left": "./a"},
        data={"questions": {"path": "./rows.jsonl"}},
        nodes={"seen": {"op": "gram", "model": "left", "data": "questions"}},
    )
    second = pipeline.run(other, "two")
    assert made_before(second) == {"seen": True}
    assert keys(second)["seen"] == keys(first)["gram_a"]
    assert artifacts(here) == written


def test_a_finished_output_does_not_need_its_artifacts_any_more(here: Path) -> None:
    first = pipeline.run(recipe(), "one")
    cache.clear()
    again = pipeline.run(recipe(), "one")
    assert (again.made, again.digest, again.rows, again.stages) == (False, first.digest, first.rows, ())
    assert artifacts(here) == {}, "nothing was collected for what is there already"
    assert call("verify", "one").code == 0
    anew = pipeline.run(recipe(), "two")
    assert made_before(anew) == {"gram_a": False, "gram_b": False}
    assert keys(anew) == keys(first)
    assert (here / "one/model.safetensors").read_bytes() == (here / "two/model.safetensors").read_bytes()
    assert (here / "one/mergeflow.json").read_bytes() == (here / "two/mergeflow.json").read_bytes()


@pytest.mark.parametrize("what", ["data", "model", "recipe"])
def test_an_output_without_its_artifacts_is_made_anew_where_anything_changed(here: Path, what: str) -> None:
    pipeline.run(recipe(), "one")
    cache.clear()
    given = recipe()
    if what == "data":
        rows(here / "rows.jsonl", seed=3)
    elif what == "model":
        mlp(here / "a", 3)
    else:
        given = recipe(
            {"gram_a": GRAM, "gram_b": {**GRAM, "model": "b", "data": "more"}, "merged": {**MERGED, "alpha": 0.5}}
        )
    assert pipeline.run(given, "one", force=True).made
    assert len(artifacts(here)) == 2


def test_stages_that_no_output_needs_are_not_run(here: Path) -> None:
    given = recipe({"unused": GRAM, "half": {"op": "linear", "inputs": ["a", "b"]}}, output={"node": "half"})
    assert pipeline.run(given, "one").stages == ()
    assert artifacts(here) == {}


# Keys


def test_a_key_changes_with_all_that_goes_in(here: Path) -> None:
    found = {key_of(gram_of("a"))}

    def new(given: Recipe) -> None:
        key = key_of(given)
        assert key not in found
        found.add(key)

    new(gram_of("b"))
    new(gram_of("a", "more"))
    new(gram_of("a", codec="float32"))
    new(gram_of("a", batch_size=4))
    new(gram_of("a", only="blocks.*"))
    new(gram_of("a", seed=3))
    new(recipe({"gram": {**GRAM, "op": "gram_diag"}}))
    new(recipe({"gram": GRAM}, seed=7))
    new(recipe({"gram": GRAM}, data={"rows": {"path": "./rows.jsonl", "limit": 10}}))
    rows(here / "rows.jsonl", seed=9)
    new(gram_of("a"))
    mlp(here / "a", 7)
    new(gram_of("a"))
    (here / "a/config.json").write_text((here / "a/config.json").read_text().replace("}", ', "eps": 1}'))
    new(gram_of("a"))
    (here / "a/tokenizer.json").write_text("{}")
    new(gram_of("a"))


def test_a_key_changes_with_data_however_its_path_is_written(here: Path) -> None:
    given = recipe({"gram": GRAM}, data={"rows": {"path": "rows.jsonl"}})
    key = key_of(given)
    assert key == key_of(gram_of("a")), "the path is no part of it"
    rows(here / "rows.jsonl", seed=9)
    assert key_of(given) != key


def test_a_key_changes_with_the_images_that_rows_name(here: Path) -> None:
    (here / "data").mkdir()
    (here / "data/x.png").write_bytes(b"one")
    (here / "data/rows.jsonl").write_text('{"image": "x.png"}\n{"image": "away.png"}\n')
    given = recipe({"gram": GRAM}, data={"rows": {"path": "./data/rows.jsonl"}})
    key = key_of(given)
    assert key == key_of(given)
    (here / "data/x.png").write_bytes(b"two")
    assert key_of(given) != key


def test_a_key_does_not_change_with_names_or_edits_elsewhere(here: Path) -> None:
    key = key_of(gram_of("a"))
    (here / "a/README.md").write_text("A model.")
    assert key_of(recipe({"other": GRAM}, name="else", description="of it")) == key
    assert key_of(recipe({"g": GRAM, "half": {"op": "linear", "inputs": ["a", "b"]}}, output={"node": "g"})) == key
    (here / "below").mkdir()
    moved = Recipe(
        folder=here / "below", name="t", models={"x": "../a"}, data={"y": "../rows.jsonl"},
        nodes={"z": {"op": "gram", "model": "x", "data": "y"}},
    )  # fmt: skip
    # The path is no part of it: only what it holds.
    assert key_of(moved) == key


HALF = {"op": "linear", "inputs": [{"model": "a", "weight": 0.5}, {"model": "b", "weight": 0.5}]}


def test_the_key_of_a_nodes_stage_changes_with_what_the_node_is_and_not_with_its_name(here: Path) -> None:
    def key(node: Mapping[str, Any], name: str = "half", **top: Any) -> str:
        return key_of(recipe({name: node, "gram": {**GRAM, "model": name}}, **top))

    own = key(HALF)
    assert key(HALF, "middle") == own
    renamed = {"models": {"first": "./a", "second": "./b"}}
    inputs = [{"model": "first", "weight": 0.5}, {"model": "second", "weight": 0.5}]
    assert key({**HALF, "inputs": inputs}, **renamed) == own
    others = [
        key({**HALF, "inputs": [{"model": "a", "weight": 0.4}, {"model": "b", "weight": 0.6}]}),
        key({**HALF, "inputs": ["b", "a"]}),
        key({**HALF, "only": "blocks.*", "others": "mean"}),
        key({**HALF, "only": "blocks.*", "others": {"model": "a"}}),
        key({"op": "slerp", "inputs": ["a", "b"], "t": 0.5}),
        key({"op": "task_arithmetic", "base": "a", "inputs": ["b"]}),
        key({"op": "task_arithmetic", "base": "b", "inputs": ["a"]}),
        key({"op": "dare_ties", "base": "a", "inputs": ["b"], "density": 0.5}),
        key({"op": "dare_ties", "base": "a", "inputs": ["b"], "density": 0.5, "seed": 4}),
        key({"op": "dare_ties", "base": "a", "inputs": ["b"], "density": 0.5}, "other"),
    ]
    assert len({own, *others}) == 1 + len(others)
    mlp(here / "b", 9)
    assert key(HALF) != own


# Stages of nodes


def test_a_stage_of_a_node_gives_the_statistics_of_exactly_that_model(here: Path) -> None:
    result = pipeline.run(recipe({"half": HALF, "gram": {**GRAM, "model": "half"}}), "lazy")
    assert made_before(result) == {"gram": False}
    pipeline.run(Recipe(name="half", models=MODELS, nodes={"half": HALF}), "written")
    direct = Recipe(
        name="d", models={"w": "./written"}, data=DATA, nodes={"g": {"op": "gram", "model": "w", "data": "rows"}}
    )
    pipeline.run(direct, "direct")
    lazy, plain = weights(here / "lazy"), weights(here / "direct")
    assert lazy.keys() == plain.keys()
    assert all(torch.equal(lazy[name], plain[name]) for name in lazy)
    # Tensors and not files make the digest: both name one model.
    digests = {
        json.loads((here / name / "statistics.json").read_text())["model"]["digest"] for name in ("lazy", "direct")
    }
    assert len(digests) == 1
    assert not list((here / "cache" / "work").iterdir())


def test_a_stage_of_a_node_that_uses_another_stage(here: Path) -> None:
    nodes = {
        "gram_a": GRAM,
        "gram_b": {**GRAM, "model": "b", "data": "more"},
        "merged": MERGED,
        "gram": {**GRAM, "model": "merged"},
    }
    result = pipeline.run(recipe(nodes), "out")
    assert made_before(result) == {"gram_a": False, "gram_b": False, "gram": False}
    again = pipeline.run(recipe(nodes), "again")
    assert made_before(again) == {"gram_a": True, "gram_b": True, "gram": True}
    pipeline.run(recipe(), "merged")
    direct = Recipe(
        name="d", models={"m": "./merged"}, data=DATA, nodes={"g": {"op": "gram", "model": "m", "data": "rows"}}
    )
    pipeline.run(direct, "direct")
    own, plain = weights(here / "out"), weights(here / "direct")
    assert all(torch.equal(own[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    ("node", "space"),
    [
        ({"op": "task_vector", "base": "a", "model": "b"}, "delta"),
        ({"op": "gram", "model": "b", "data": "rows"}, "statistics"),
    ],
)
def test_a_stage_of_what_is_no_model_is_refused_before_anything_runs(
    here: Path, node: Mapping[str, Any], space: str
) -> None:
    given = recipe({"other": node, "gram": {**GRAM, "model": "other"}})
    for act in (lambda: pipeline.plan(given), lambda: pipeline.run(given, "out")):
        with pytest.raises(RecipeError, match=f"gram runs a model, and got {space}"):
            act()


# Plans


@pytest.mark.parametrize(
    "node",
    [
        {"op": "gram"},
        {"op": "gram", "codec": "packed32", "only": "blocks.*"},
        {"op": "gram_diag"},
        {"op": "input_mean"},
        {"op": "act_absmean"},
        {"op": "fisher_diag"},
    ],
    ids=lambda node: "-".join(str(word) for word in node.values()),
)
@pytest.mark.parametrize("model", ["a", "half"])
def test_a_plan_foresees_the_tensors_of_a_stage(here: Path, node: Mapping[str, Any], model: str) -> None:
    given = recipe({"half": HALF, "stage": {**node, "model": model, "data": "rows"}}, output={"node": "stage"})

    def told() -> dict[str, tuple[str, tuple[int, ...]]]:
        return {row.name: (row.dtype.name, row.shape) for row in pipeline.plan(given).rows}

    before = told()
    assert artifacts(here) == {}
    pipeline.run(given, "out")
    assert told() == before
    written = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in weights(here / "out").items()}
    assert written == before


def test_a_plan_with_stages_reads_no_weight(here: Path) -> None:
    # NaN in the place of every number: who looked at one would say so, as a run does.
    for name in MODELS:
        path = here / name / "model.safetensors"
        length = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        header, size = path.read_bytes()[:length], path.stat().st_size
        path.write_bytes(header + b"\xff" * (size - length))
    made = pipeline.plan(recipe())
    assert {row.name for row in made.rows} >= set(GROUPS)
    assert artifacts(here) == {}
    with pytest.raises(NumericError):
        pipeline.run(recipe(), "out")


def test_a_mistake_elsewhere_in_the_recipe_is_found_before_a_stage_runs(here: Path) -> None:
    given = recipe({"gram_a": GRAM, "gram_b": {**GRAM, "model": "b"}, "merged": {**MERGED, "reference": "c"}})
    with pytest.raises(RecipeError, match="names no input"):
        pipeline.run(given, "out")
    assert left_over(here) == []


# What goes wrong


def fails(path: Path, code: int, *words: str) -> str:
    """The one message of a run that ends with this exit code, and leaves nothing."""
    called = call("run", str(path), "-o", "out", "-q")
    assert called.code == code, called.err
    for word in words:
        assert word in called.err
    assert left_over(path.parent) == []
    assert not (path.parent / "out").exists()
    return called.err


def test_data_that_is_missing_or_holds_nothing_leaves_nothing(here: Path) -> None:
    path = write_recipe(here, {"gram": GRAM})
    (here / "rows.jsonl").unlink()
    fails(path, 3, "recipe.yaml:", "cannot read './rows.jsonl'")
    (here / "rows.jsonl").write_text("")
    fails(path, 3, "recipe.yaml:")
    (here / "rows.jsonl").write_text('{"features": [1, 2]}\n')
    fails(path, 3, "recipe.yaml:", "rows.jsonl")
    (here / "rows.jsonl").write_text("{no json\n")
    fails(path, 3, "recipe.yaml:", "rows.jsonl")


def test_a_model_of_nan_is_a_numeric_error_and_leaves_nothing(here: Path) -> None:
    state = weights(here / "a")
    state["blocks.1.linear.bias"][2] = float("nan")
    save_file(state, here / "a/model.safetensors", metadata={"format": "pt"})
    fails(write_recipe(here, {"gram": GRAM}), 6, "recipe.yaml:")


def test_a_label_that_the_model_does_not_know_leaves_nothing(here: Path) -> None:
    (here / "rows.jsonl").write_text(json.dumps({"features": [0.5] * 6, "label": 9}) + "\n")
    node = {"op": "fisher_diag", "model": "a", "data": "rows", "estimator": "empirical"}
    data = {"rows": {"path": "./rows.jsonl", "label": "label"}}
    fails(write_recipe(here, {"fisher": node}, data=data), 3, "recipe.yaml:", "9")


def test_a_model_of_text_without_a_tokenizer_leaves_nothing(here: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes))
    model.save_pretrained(here / "a")
    (here / "rows.jsonl").write_text('{"text": "some words"}\n')
    fails(write_recipe(here, {"gram": GRAM}), 3, "recipe.yaml:", "tokenizer")


def test_too_few_tokens_are_refused_and_nothing_is_left(here: Path) -> None:
    fails(write_recipe(here, {"gram": {**GRAM, "min_tokens": 65}}), 3, "recipe.yaml:", "65")


def test_one_file_of_a_folder_is_no_model_for_a_stage(here: Path) -> None:
    models = {"a": {"path": "./a", "file": "model.safetensors"}, "b": "./b"}
    fails(write_recipe(here, {"gram": GRAM}, models=models), 2, "runs a whole folder", "recipe.yaml:")


SCRIPT = """
import os, signal, sys
from mergeflow import preparing, pipeline
from mergeflow.recipe import load_recipe
moment = sys.argv[1]
def end(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
if moment == "collecting":
    import mergeflow.stages as stages
    stages.run_stage = end
elif moment == "publishing":
    from mergeflow.writing import Staging
    Staging.publish = end
pipeline.run(load_recipe("recipe.yaml"), "out")
"""


@pytest.mark.parametrize("moment", ["collecting", "publishing"])
def test_a_killed_stage_leaves_nothing_that_looks_finished_and_the_next_run_makes_it(here: Path, moment: str) -> None:
    path = write_recipe(here, {"half": HALF, "gram": {**GRAM, "model": "half"}})
    if moment == "publishing":
        path = write_recipe(here, {"gram": GRAM})
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    killed = subprocess.run([sys.executable, "-c", SCRIPT, moment], env=environment, capture_output=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert list(cache.entries()) == []
    assert left_over(here) != []
    result = pipeline.run(load_recipe(path), "out")
    assert made_before(result) == {"gram": False}
    assert set(artifacts(here)) == set(keys(result).values())
    assert not list((here / "cache" / "work").iterdir())


def test_a_stage_that_is_stopped_says_that_it_begins_anew(here: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if "batches" in what:
            os.kill(os.getpid(), signal.SIGTERM)

    path = write_recipe(here, {"gram": GRAM})
    with pytest.raises(Interrupted, match="stages that are finished stay, this one begins anew"):
        pipeline.run(load_recipe(path), "out", progress=stop)
    assert list(cache.entries()) == []


def test_two_runs_at_once_make_an_artifact_once(here: Path) -> None:
    write_recipe(here, {"gram": GRAM})
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-m", "mergeflow", "run", "recipe.yaml", "-q", "--json", "-o"]
    runs = [
        subprocess.Popen([*command, out], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for out in ("one", "two")
    ]
    ends = [run.communicate(timeout=100) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], ends
    assert len(artifacts(here)) == 1
    assert (here / "one/model.safetensors").read_bytes() == (here / "two/model.safetensors").read_bytes()
    assert not list((here / "cache" / "work").iterdir())


def test_data_that_changes_while_a_stage_runs_takes_the_artifact_back(here: Path) -> None:
    def progress(what: str, done: int, total: int) -> None:
        with (here / "rows.jsonl").open("a") as file:
            file.write("\n")

    with pytest.raises(InputError, match="changed while it ran"):
        pipeline.run(gram_of("a"), "out", progress=progress)
    assert list(cache.entries()) == []


def test_a_damaged_artifact_says_how_to_clear_it(here: Path) -> None:
    result = pipeline.run(gram_of("a"), "one")
    key = keys(result)["gram"]
    (here / "cache/artifacts" / key / "statistics.json").write_text("{}")
    with pytest.raises(InputError, match=f"mergeflow cache clear {key}"):
        pipeline.run(gram_of("a"), "two")
    assert call("cache", "clear", key).code == 0
    assert pipeline.run(gram_of("a"), "two").made


# mergeflow stats


def test_a_statistics_folder_is_an_artifact_that_gives_the_same_bytes(here: Path) -> None:
    pipeline.run(recipe(), "in_place")
    for model, data in (("a", "rows.jsonl"), ("b", "more.jsonl")):
        words = ["--option", "limit=40"] if model == "b" else []
        called = call("stats", model, "--data", data, "-o", f"stats_{model}", "-q", *words)
        assert called.code == 0, called.err
    assert len(artifacts(here)) == 2, "the short way makes the artifacts of the long one"
    (here / "rows.jsonl").unlink()
    published = Recipe(
        name="published",
        models=MODELS,
        artifacts={"gram_a": "./stats_a", "gram_b": {"path": "./stats_b"}},
        nodes={"merged": MERGED},
    )
    pipeline.run(published, "published")
    assert (here / "in_place/model.safetensors").read_bytes() == (here / "published/model.safetensors").read_bytes()


def test_a_statistics_folder_is_a_finished_output_and_no_model(here: Path) -> None:
    assert call("stats", "a", "--data", "rows.jsonl", "-o", "s", "-q", "--option", "codec=float32").code == 0
    manifest = json.loads((here / "s/mergeflow.json").read_text())
    assert set(manifest["tensors"]) == set(weights(here / "s")) == {f"gram.{group}" for group in GROUPS}
    assert "statistics.json" in manifest["files"]
    assert not (here / "s/config.json").exists()
    facts = open_statistics(LocalFolder("s", here / "s")).facts
    assert (facts.kind, facts.codec, facts.n_examples, facts.n_tokens) == ("gram", "float32", 64, 64)
    x = np.array([json.loads(line)["features"] for line in (here / "rows.jsonl").read_text().splitlines()])
    np.testing.assert_allclose(weights(here / "s")[f"gram.{GROUPS[0]}"].numpy(), x.T @ x / 64, rtol=1e-5)
    again = call("stats", "a", "--data", "rows.jsonl", "-o", "s", "-q", "--option", "codec=float32")
    assert (again.code, again.out) == (0, "s: already made\n")
    refused = call("run", str(write_recipe(here, {"c": {"op": "linear", "inputs": ["a", "b"]}},
                                           models={"a": "./s", "b": "./b"})), "-o", "x", "-q")  # fmt: skip
    assert refused.code == 2  # its header is wrong (3), and so is what it lacks (2): the first of them counts
    assert "Name it under `artifacts:`" in refused.err


def test_the_privacy_of_data_holds_for_what_is_published(here: Path) -> None:
    assert call("stats", "a", "--data", "rows.jsonl", "-o", "s", "-q").code == 0
    first = json.loads((here / "rows.jsonl").read_text().splitlines()[0])["features"][0]
    for path in (here / "s").iterdir():
        assert str(first).encode() not in path.read_bytes()


def test_statistics_of_another_checkpoint_are_refused(here: Path) -> None:
    assert call("stats", "b", "--data", "rows.jsonl", "-o", "s", "-q").code == 0
    nodes = {"merged": {"op": "regmean", "inputs": [{"model": "a", "gram": "s"}, {"model": "b", "gram": "s"}]}}
    path = write_recipe(here, nodes, artifacts={"s": "./s"})
    called = call("run", str(path), "-o", "out", "-q")
    assert called.code == 3
    assert "was collected on another model than 'a'" in called.err
    assert "recipe.yaml:" in called.err
    nodes["merged"]["inputs"][0]["for"] = "names"
    assert call("run", str(write_recipe(here, nodes, artifacts={"s": "./s"})), "-o", "out", "-q").code == 0


def test_stages_over_the_wrong_model_are_told_before_they_run(here: Path) -> None:
    node = {"op": "regmean", "inputs": [{"model": "a", "gram": "gram_b"}, {"model": "b", "gram": "gram_b"}]}
    path = write_recipe(here, {"gram_b": {**GRAM, "model": "b"}, "merged": node}, output={"node": "merged"})
    done = call("plan", str(path))
    assert done.code != 0 and "'gram_b' was collected on another model than 'a': ./b" in done.err, done.err
    assert artifacts(here) == {}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--kind", "linear"], "`linear` collects nothing"),
        (["--kind", "gramm"], "gram"),
        (["--option", "codek=float32"], "Did you mean 'codec'?"),
        (["--option", "codec=float31"], "codec"),
    ],
)
def test_words_of_stats_that_mean_nothing_are_refused(here: Path, words: list[str], told: str) -> None:
    called = call("stats", "a", "--data", "rows.jsonl", "-o", "s", "-q", *words)
    assert called.code == 2
    assert told in called.err
    assert left_over(here) == []


# Outputs and recipes


def test_several_outputs_may_be_stages_and_models(here: Path) -> None:
    outputs = {"merged": {"node": "merged"}, "grams": {"node": "gram_a"}}
    result = pipeline.run(recipe(outputs=outputs), "out")
    assert len(result.stages) == 2
    pipeline.run(recipe(), "alone")
    assert (here / "out/merged/model.safetensors").read_bytes() == (here / "alone/model.safetensors").read_bytes()
    assert (here / "out/grams/statistics.json").exists()
    assert not (here / "out/grams/config.json").exists()
    assert open_statistics(LocalFolder("g", here / "out/grams")).facts.kind == "gram"


def test_the_written_recipe_finds_its_data_from_where_it_lies(here: Path) -> None:
    pipeline.run(recipe(), "out/below")
    written = next(path for path in (here / "out/below").iterdir() if path.suffix == ".yaml")
    again = pipeline.run(load_recipe(written), "again")
    assert made_before(again) == {"gram_a": True, "gram_b": True}
    assert (here / "out/below/model.safetensors").read_bytes() == (here / "again/model.safetensors").read_bytes()


def problems(**top: Any) -> list[str]:
    try:
        recipe(**top)
    except Problems as several:
        return [str(error) for error in several.errors]
    except MergeflowError as error:
        return [str(error)]
    return []


GRAMMAR: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown name": (
        {"nodes": {"gram": {**GRAM, "data": "row"}}},
        "nodes.gram.data: there is no data 'row'. Did you mean 'rows'?",
    ),
    "no data section": (
        {"nodes": {"gram": GRAM}, "data": {}},
        "nodes.gram.data: there is no data 'rows'. Name a file under `data:`.",
    ),
    "an unknown field": (
        {"nodes": {"gram": GRAM}, "data": {"rows": {"path": "./r.jsonl", "lable": "y"}}},
        "Did you mean 'label'?",
    ),
    "a stage without data": ({"nodes": {"gram": {"op": "gram", "model": "a"}}}, "data"),
    "data without a path": ({"nodes": {"gram": GRAM}, "data": {"rows": {"label": "y"}}}, "path"),
    "a limit of nothing": ({"nodes": {"gram": GRAM}, "data": {"rows": {"path": "./r", "limit": 0}}}, "limit"),
    "a list of data": ({"nodes": {"gram": GRAM}, "data": ["./rows.jsonl"]}, "data: "),
    "data on a node that reads none": ({"nodes": {"half": {**HALF, "data": "rows"}}}, "data"),
    "a stage with two models": ({"nodes": {"gram": {"op": "gram", "inputs": ["a", "b"], "data": "rows"}}}, "inputs"),
    "a word that no codec has": ({"nodes": {"gram": {**GRAM, "codec": "float8"}}}, "codec"),
}


@pytest.mark.parametrize("what", GRAMMAR)
def test_a_mistake_about_data_is_one_message_and_the_schema_refuses_what_it_can(what: str) -> None:
    from jsonschema import Draft7Validator

    from mergeflow.ops import OPS
    from mergeflow.schema import recipe_schema

    top, told = GRAMMAR[what]
    found = problems(**top)
    assert len(found) == 1, found
    assert told in found[0]
    by_names = ("an unknown name", "no data section")
    whole = {"recipe": 1, "name": "test", "models": MODELS, "data": DATA, **top}
    assert Draft7Validator(recipe_schema(OPS)).is_valid(whole) == (what in by_names)


@pytest.mark.parametrize(
    "data",
    [
        {"rows": "./rows.jsonl"},
        {"rows": {"path": "org/set", "split": "train", "revision": 1, "limit": 5, "seed": 1}},
        {"rows": {"path": "./x.csv", "kind": "csv", "label": 1, "template": "{a} {b}"}},
        {"rows": {"path": "./chat.jsonl", "messages": "messages"}},
        {"rows": {"path": "${where}", "kind": "${how}", "limit": "${n}"}},
    ],
)
def test_the_schema_accepts_what_the_recipe_accepts(data: Any) -> None:
    from jsonschema import Draft7Validator

    from mergeflow.ops import OPS
    from mergeflow.schema import recipe_schema

    top = {"nodes": {"gram": GRAM}, "data": data, "vars": {"where": "./x", "how": "text", "n": 3}}
    assert problems(**top) == []
    errors = list(Draft7Validator(recipe_schema(OPS)).iter_errors({"recipe": 1, "models": MODELS, **top}))
    assert not errors, errors


def test_the_picture_of_a_recipe_shows_stages_and_their_data() -> None:
    picture = mermaid(recipe())
    lines = [line.strip() for line in picture.splitlines()]
    shown = {name: next(line.split("[")[0].split("(")[0] for line in lines if f'"{name}<br/>' in line)
             for name in ("a", "rows", "gram_a", "merged")}  # fmt: skip
    assert f"{shown['a']} --> {shown['gram_a']}" in lines
    assert any(line.startswith(f"{shown['rows']} -. data .->") and line.endswith(shown["gram_a"]) for line in lines)
    assert any(line.startswith(f"{shown['gram_a']} -. gram .->") and line.endswith(shown["merged"]) for line in lines)


def test_a_plan_says_which_stages_would_run_and_which_are_in_the_cache(here: Path) -> None:
    path = write_recipe(here, recipe().resolved["nodes"])
    pipeline.run(gram_of("a"), "gram")
    (key,) = artifacts(here)
    told = json.loads(call("plan", str(path), "--json").out)["stages"]
    assert [(one["node"], one["op"], one["model"], one["data"], one["done"]) for one in told] == [
        ("gram_a", "gram", "a", "rows", True),
        ("gram_b", "gram", "b", "more", False),
    ]
    assert told[0]["key"] == key
    text = call("plan", str(path)).out
    assert any(line.split()[:5] == ["in", "cache", "gram_a", "gram", "of"] for line in text.splitlines())
    assert any(line.split()[:4] == ["runs", "gram_b", "gram", "of"] for line in text.splitlines())


def test_a_plan_says_where_a_stage_runs_on_how_much_and_what_it_takes(here: Path) -> None:
    fisher = {"op": "fisher_diag", "model": "a", "data": "more"}
    data = {**DATA, "more": {"path": "./more.jsonl", "limit": 40, "label": "label"}}
    path = write_recipe(here, {"gram": {**GRAM, "only": "blocks.*"}, "fisher": fisher}, data=data,
                        outputs={"g": {"node": "gram"}, "f": {"node": "fisher"}})  # fmt: skip
    told = json.loads(call("plan", str(path), "--json").out)
    needs = {one["node"]: one["needs"] for one in told["stages"]}
    assert told["device"] == "cpu"
    assert [(needs[node]["rows"], needs[node]["tokens"]) for node in ("gram", "fisher")] == [(64, 64), (40, 40)]
    parameters = (6 * 8 + 3 * 8) + (8 * 8 + 3 * 8) + (3 * 8 + 3)
    assert needs["gram"]["memory"] == 4 * (parameters + 8 * 8)
    assert needs["fisher"]["memory"] == 4 * parameters + 8 * 8 * (8 + 2 * 4)
    pipeline.run(load_recipe(path), "out")
    for name, node in (("g", "gram"), ("f", "fisher")):
        written = sum(one.numel() * one.element_size() for one in weights(here / "out" / name).values())
        assert written <= needs[node]["disk"] <= 2 * written
    rows(here / "rows.jsonl", 63)
    text = call("plan", str(path)).out
    assert "for 63 rows of about 63 tokens in all" in text
    assert "threads, on cpu" in text


def test_a_stage_that_cannot_fit_the_memory_is_refused_before_a_weight_is_read(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(here, {"gram": GRAM})
    with monkeypatch.context() as patch:
        patch.setattr("mergeflow.stages.foreseeing._of_collecting", lambda *_: 10**12)
        for words in (["plan", str(path)], ["run", str(path), "-o", "out", "-q"]):
            called = call(*words)
            assert called.code == 5, called.err
            assert "takes 1,000,000,000,000 bytes of memory" in called.err
            assert "recipe.yaml:" in called.err
            assert "--memory" in called.err
    assert left_over(here) == []
    assert call("run", str(path), "-o", "out", "-q").code == 0


def test_a_plan_says_what_a_regmean_pp_takes(here: Path) -> None:
    node = {"op": "regmean_pp", "inputs": [{"model": "a", "data": "rows"}, {"model": "b", "data": "more"}]}
    path = write_recipe(here, {"merged": node})
    (told,) = json.loads(call("plan", str(path), "--json").out)["stages"]
    needs = told["needs"]
    assert (needs["rows"], needs["tokens"]) == (64 + 40, 64 + 40)
    parameters = (6 * 8 + 3 * 8) + (8 * 8 + 3 * 8) + (3 * 8 + 3)
    assert needs["memory"] == 4 * parameters * 3, "both models and the merged one"
    assert needs["disk"] >= 4 * parameters
    needed = str(needs["memory"] - 1)
    called = call("run", str(path), "-o", "out", "-q", "--memory", needed)
    assert called.code == 5 and "recipe.yaml:" in called.err, called.err


def test_a_plan_of_texts_counts_their_tokens_about(here: Path) -> None:
    pytest.importorskip("transformers")
    from mergeflow.ops.statistics import Gram
    from mergeflow.stages import foreseeing, models
    from tests.test_collecting import saved

    folder = models.open_folder(saved(here / "llama", "llama"))
    # A token of 64 has 1.5 characters; none is longer than the context of 24.
    assert foreseeing.tokens_of(Gram(), folder, [3, 6, 1000]) == 2 + 4 + 24
    assert foreseeing.tokens_of(Gram(max_length=3), folder, [3, 6, 1000]) == 2 + 3 + 3


def test_a_tied_head_is_the_mean_as_its_embedding_is(here: Path) -> None:
    pytest.importorskip("transformers")
    from mergeflow.stages import models
    from tests.test_collecting import llama, saved

    with models.quietly():
        for seed, name in enumerate("ab"):
            shutil.rmtree(here / name)
            torch.manual_seed(seed)
            saved(here / name, "llama", llama(tie_word_embeddings=True))
            state = weights(here / name)
            save_file(
                {n: t + 0.1 * seed for n, t in state.items()}, here / name / "model.safetensors", {"format": "pt"}
            )
        for data in ("rows", "more"):
            (here / f"{data}.jsonl").write_text(
                "".join(f'{{"text": "w{i} w{i + 1} w{i + 3}"}}\n' for i in range(4, 50))
            )
        result = pipeline.run(recipe(), "out")
    a, b, merged = (weights(here / name) for name in ("a", "b", "out"))
    assert result.rows == len(merged) == len(a)
    assert "lm_head.weight" not in merged
    table, query = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"
    assert torch.allclose(merged[table], (a[table] + b[table]) / 2, atol=1e-6)
    assert merged.keys() == a.keys()
    assert all(torch.isfinite(one).all() for one in merged.values())
    assert not torch.equal(merged[query], a[query])


def test_a_run_says_which_stages_it_made_and_which_it_found(here: Path) -> None:
    path = write_recipe(here, {"gram": GRAM})
    first = call("run", str(path), "-o", "one", "-q")
    (key,) = artifacts(here)
    assert first.out.splitlines()[0] == f"gram: made ({key[:12]})"
    second = call("run", str(path), "-o", "two", "-q")
    assert second.out.splitlines()[0] == f"gram: found in the cache ({key[:12]})"
    data = json.loads(call("run", str(path), "-o", "three", "-q", "--json").out)
    assert data["stages"] == [{"node": "gram", "key": key, "in_cache": True}]


def test_inspect_shows_what_a_statistics_folder_holds_and_how_far_it_can_be_trusted(here: Path) -> None:
    pipeline.run(gram_of("a", only="blocks.*"), "s")
    data = json.loads(call("inspect", "s", "--json").out)
    told = data["statistics"]
    assert data["space"] == "statistics"
    assert (told["kind"], told["codec"], told["n_tokens"], told["n_examples"]) == ("gram", "correlation16", 64, 64)
    assert told["groups"] == {
        name: {"weights": [name], "dimension": d, "n_tokens": 64} for name, d in zip(GROUPS[:2], (6, 8), strict=True)
    }
    facts = dict(line.split(None, 1) for line in call("inspect", "./s").out.split("\n\n")[0].splitlines())
    assert facts["statistics"] == "gram, codec correlation16, only blocks.*"
    assert facts["groups"] == "2 inputs of 2 weights, of up to 8 dimensions"
    assert facts["tokens"] == "64 of 64 examples"
    assert facts["conditioning"] == "good: 8 tokens or more for each dimension"
    rows(here / "rows.jsonl", 16)
    pipeline.run(gram_of("a"), "few")
    text = call("inspect", "./few").out
    assert "poor in 3 of 3 groups: 16 tokens for 8 dimensions in blocks.1.linear.weight" in text
    assert "use alpha of 0.67 or less, or collect on 32 tokens" in text

"""`op: regmean_pp` from recipe to result: merged once, found again, foreseen in plans, used by other nodes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import write_examples
from test_stages import artifacts, key_of, keys, made_before, mlp, rows, weights, write_recipe
from toys import call

from mergeflow import pipeline
from mergeflow.checkpoint import open_checkpoint
from mergeflow.errors import InputError, MergeflowError, Problems, RecipeError
from mergeflow.hub import LocalFolder
from mergeflow.ops.regmean_pp import RegMeanPP
from mergeflow.recipe import DataSource, Recipe, load_recipe
from mergeflow.reporting import mermaid
from mergeflow.settings import Each
from mergeflow.stages.regmean_pp import Candidate, MergeJob, run

PP: dict[str, Any] = {
    "op": "regmean_pp",
    "inputs": [{"model": "a", "data": "rows", "weight": 2}, {"model": "b", "data": "more"}],
    "alpha": 0.8,
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with models `a` and `b`, rows for them, and a cache of its own."""
    monkeypatch.setenv("MERGEFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    mlp(tmp_path / "a", 1)
    mlp(tmp_path / "b", 2)
    (tmp_path / "a/preprocessor_config.json").write_text('{"scale": 1}')
    rows(tmp_path / "rows.jsonl")
    rows(tmp_path / "more.jsonl", seed=5)
    return tmp_path


def given(folder: Path, nodes: Mapping[str, Any] | None = None, **top: Any) -> Recipe:
    """A recipe on disk, by default of the merge alone."""
    return load_recipe(write_recipe(folder, nodes or {"merged": PP}, **top))


def directly(here: Path, op: RegMeanPP, *pairs: tuple[str, DataSource], **more: Any) -> dict[str, torch.Tensor]:
    """What the runner writes."""
    written: dict[str, torch.Tensor] = {}
    (here / "work").mkdir(exist_ok=True)
    candidates = tuple(Candidate(here / name, data) for name, data in pairs)
    run(MergeJob(op, candidates, here, here / "work", lambda made, files, said: written.update(made), **more))
    return written


ROWS, MORE = DataSource(path="rows.jsonl"), DataSource(path="more.jsonl", limit=40)


def assert_same(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, one in wanted.items():
        assert found[name].dtype == one.dtype and torch.equal(found[name], one), name


def test_a_recipe_gives_what_the_runner_gives_and_reuses_it(here: Path) -> None:
    first = pipeline.run(given(here), "one", threads=1)
    assert made_before(first) == {"merged": False}
    wanted = directly(here, RegMeanPP(alpha=0.8, weight=[2, 1]), ("a", ROWS), ("b", MORE))
    assert_same(weights(here / "one"), wanted)
    mean = (2 * weights(here / "a")["head.weight"] + weights(here / "b")["head.weight"]) / 3
    assert not torch.allclose(wanted["head.weight"], mean)
    written = artifacts(here)
    second = pipeline.run(given(here), "two", threads=1)
    assert made_before(second) == {"merged": True}
    assert artifacts(here) == written and set(written) == set(keys(first).values())
    assert (here / "one/model.safetensors").read_bytes() == (here / "two/model.safetensors").read_bytes()


def test_the_result_opens_as_a_model_like_the_first_in_the_cache_and_in_the_output(here: Path) -> None:
    result = pipeline.run(given(here), "one", threads=1)
    folder = here / "cache/artifacts" / keys(result)["merged"]
    assert (folder / "config.json").read_bytes() == (here / "a/config.json").read_bytes()
    config = json.loads((here / "a/config.json").read_text())
    assert json.loads((here / "one/config.json").read_text()) == {**config, "dtype": "float32"}
    for path in (folder, here / "one"):
        assert (path / "preprocessor_config.json").read_text() == '{"scale": 1}'
    assert_same(weights(folder), weights(here / "one"))
    card = (here / "one/README.md").read_text()
    assert "regmean_pp" in card and "2508.03121" in card and str(here) not in card


def test_a_plan_foresees_the_tensors_that_a_run_writes(here: Path) -> None:
    before = pipeline.plan(given(here))
    (stage,) = before.stages
    assert (stage.node, stage.op, stage.model, stage.data) == ("merged", "regmean_pp", "a, b", "rows, more")
    assert not stage.done and not artifacts(here)
    told = call("plan", "recipe.yaml").out
    assert "regmean_pp of a, b on rows, more" in told and "no output needs" not in told
    pipeline.run(given(here), "one", threads=1)
    after = pipeline.plan(given(here))
    assert after.digest == before.digest and after.stages[0].done
    made = open_checkpoint(LocalFolder("one", here / "one")).tensors
    assert {row.name: (row.dtype, row.shape) for row in before.rows} == {n: (t.dtype, t.shape) for n, t in made.items()}


def test_a_key_changes_with_models_data_weights_parameters_and_not_with_names(here: Path) -> None:
    own = key_of(given(here))
    inputs = PP["inputs"]
    others = [
        {**PP, "inputs": [{**inputs[0], "data": "more"}, inputs[1]]},
        {**PP, "inputs": [{**inputs[0], "weight": 3}, inputs[1]]},
        {**PP, "inputs": inputs[::-1]},
        {**PP, "alpha": 0.7},
        {**PP, "ridge": 0.1},
        {**PP, "batch_size": 4},
        {**PP, "only": "blocks.*"},
    ]
    found = {key_of(given(here, {"merged": node})) for node in others}
    assert len(found | {own}) == 1 + len(others)
    assert key_of(given(here, {"other": PP}, seed=3)) == own
    (here / "more.jsonl").write_text((here / "more.jsonl").read_text().replace("0.1", "0.2", 1))
    changed = key_of(given(here))
    assert changed != own
    mlp(here / "b", 9)
    assert key_of(given(here)) not in (own, changed)


def test_settings_may_change_over_the_model(here: Path) -> None:
    head = {"match": "head.*", "value": 0}
    node = {**PP, "inputs": [{**PP["inputs"][0], "weight": [head, {"value": 2}]}, PP["inputs"][1]]}
    pipeline.run(given(here, {"merged": node}), "one", threads=1)
    found, plain = weights(here / "one"), directly(here, RegMeanPP(alpha=0.8, weight=[2, 1]), ("a", ROWS), ("b", MORE))
    for name, one in plain.items():
        if name.startswith("head."):
            torch.testing.assert_close(found[name], weights(here / "b")[name])
            assert name == "head.bias" or not torch.allclose(found[name], one)
        else:
            assert torch.equal(found[name], one)


def test_another_node_stands_on_the_merge(here: Path) -> None:
    nodes = {"merged": PP, "half": {"op": "linear", "inputs": ["merged", "b"]}}
    planned = pipeline.plan(given(here, nodes))
    pipeline.run(given(here, nodes), "one", threads=1)
    merged = directly(here, RegMeanPP(alpha=0.8, weight=[2, 1]), ("a", ROWS), ("b", MORE))
    found, other = weights(here / "one"), weights(here / "b")
    assert {row.name for row in planned.rows} == found.keys()
    for name, one in found.items():
        torch.testing.assert_close(one, (merged[name] + other[name]) / 2)
    assert (here / "one/preprocessor_config.json").exists()


def test_nodes_are_merged_and_what_was_merged_is_run_by_other_stages(here: Path) -> None:
    half = {"op": "linear", "inputs": ["a", "b"]}
    nodes = {
        "merged": {"op": "regmean_pp", "inputs": [{"model": half, "data": "rows"}, {"model": "b", "data": "more"}]},
        "seen": {"op": "gram", "model": "merged", "data": "rows", "codec": "float32"},
    }
    planned = pipeline.plan(given(here, nodes))
    assert [stage.done for stage in planned.stages] == [False, False]
    result = pipeline.run(given(here, nodes), "one", threads=1)
    assert keys(result) == {stage.node: stage.key for stage in planned.stages}
    assert {row.name for row in planned.rows} == weights(here / "one").keys()
    statistics = json.loads((here / "one/statistics.json").read_text())
    assert statistics["model"]["source"] == "node merged"
    pipeline.run(given(here, {"half": half}), "half", threads=1)
    merged = directly(here, RegMeanPP(weight=Each((1.0, 1.0))), ("half", ROWS), ("b", MORE))
    assert_same(weights(here / "cache/artifacts" / keys(result)["merged"]), merged)


def test_a_language_model_keeps_the_tokenizer_of_the_first(here: Path) -> None:
    write_examples(here, [RegMeanPP])
    result = pipeline.run(load_recipe(here / "regmean_pp.yaml"), "one", threads=1)
    folder = here / "cache/artifacts" / keys(result)["merged"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        wanted = (here / "first" / name).read_bytes()
        assert (folder / name).read_bytes() == (here / "one" / name).read_bytes() == wanted
    assert weights(here / "one").keys() == weights(here / "first").keys()


def test_the_picture_joins_each_datum_to_the_merge(here: Path) -> None:
    picture = mermaid(given(here))
    assert picture.count("-. data .->") == 2


def refused(here: Path, nodes: Mapping[str, Any], error: type[MergeflowError] = RecipeError, **top: Any) -> str:
    with pytest.raises((error, Problems)) as caught:
        pipeline.plan(given(here, nodes, **top))
    assert not artifacts(here)
    return str(caught.value)


def line_of(here: Path, text: str) -> str:
    lines = (here / "recipe.yaml").read_text().splitlines()
    return f"recipe.yaml:{next(number for number, line in enumerate(lines, start=1) if text in line)}:"


def test_what_cannot_be_merged_is_refused_with_its_place(here: Path) -> None:
    two = PP["inputs"]
    said = refused(here, {"merged": {**PP, "inputs": two[:1]}})
    assert "takes at least 2 inputs, not 1" in said and line_of(here, "inputs:") in said
    said = refused(here, {"merged": {**PP, "inputs": [two[0], {"model": "b"}]}})
    assert "`data`" in said and "recipe.yaml:" in said
    said = refused(here, {"merged": {**PP, "inputs": [two[0], {"model": "b", "data": "mor"}]}})
    assert "there is no data 'mor'. Did you mean 'more'?" in said and "recipe.yaml:" in said
    said = refused(here, {"merged": {**PP, "inputs": [{**one, "weight": 0} for one in two]}})
    assert "the mean divides by the sum of the weights, which is 0" in said and "recipe.yaml:" in said
    delta = {"op": "task_vector", "base": "a", "model": "b"}
    said = refused(here, {"merged": {**PP, "inputs": [two[0], {"model": delta, "data": "more"}]}})
    assert "regmean_pp runs its models, and one is delta" in said and line_of(here, "task_vector") in said
    said = refused(here, {"merged": PP}, InputError, data={"rows": "./rows.jsonl", "more": "./none.jsonl"})
    assert "none.jsonl" in said and line_of(here, "none.jsonl") in said


def test_models_of_other_shapes_are_refused_before_anything_runs(here: Path) -> None:
    other = {"op": "select", "rules": [{"model": "b"}]}
    (here / "c").mkdir()
    config = json.loads((here / "a/config.json").read_text())
    (here / "c/config.json").write_text(json.dumps({**config, "num_labels": 4}))
    state = {**weights(here / "a"), "head.weight": torch.ones(4, 8), "head.bias": torch.ones(4)}
    from safetensors.torch import save_file

    save_file(state, here / "c/model.safetensors", metadata={"format": "pt"})
    for first in ("b", other):
        inputs = [{"model": first, "data": "rows"}, {"model": "c", "data": "more"}]
        said = refused(
            here, {"merged": {"op": "regmean_pp", "inputs": inputs}}, models={"a": "./a", "b": "./b", "c": "./c"}
        )
        assert "'head.bias' is [3] in the first model, and [4]" in said and line_of(here, "merged:") in said

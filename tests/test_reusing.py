"""A stage with another `only`: what the cache holds is taken over, and the bytes are those of a run that had no cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mergeflow import cache, pipeline
from mergeflow.checkpoint.statistics import open_statistics
from mergeflow.errors import MergeflowError
from mergeflow.hub import LocalFolder
from mergeflow.recipe import Recipe
from mergeflow.stages import collecting, fisher, models
from tests.test_collecting import TEXTS, saved
from tests.test_stages import here  # noqa: F401  a fixture

WIDE, NARROW, PART = "*", "blocks.*", ["blocks.0.*", "head.*"]


def asked(kind: str, only: Any, model: str = "a", **more: Any) -> Recipe:
    node = {"op": kind, "model": model, "data": "rows", "only": only, **more}
    data = {"rows": {"path": "./rows.jsonl", "label": "label"}} if kind == "fisher_diag" else {"rows": "./rows.jsonl"}
    return Recipe(name="s", models={model: f"./{model}"}, data=data, nodes={"s": node})


class Counted:
    """How often a model was loaded, or made of its blocks, and how many running means were kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loaded, self.means, self.parameters = 0, 0, 0
        load, zeros, work = models.load_model, collecting.Moments.zeros, fisher.fisher_diagonal

        def load_model(*args: Any, **more: Any) -> Any:
            self.loaded += 1
            return load(*args, **more)

        def zeros_of(*args: Any) -> Any:
            self.means += 1
            return zeros(*args)

        def diagonal(model: Any, *args: Any, **more: Any) -> Any:
            self.parameters += sum(more["wanted"](name) for name, _ in model.named_parameters())
            return work(model, *args, **more)

        monkeypatch.setattr(models, "load_model", load_model)
        monkeypatch.setattr(collecting.Moments, "zeros", zeros_of)
        monkeypatch.setattr(fisher, "fisher_diagonal", diagonal)


def artifact(result: pipeline.Result) -> dict[str, bytes]:
    """The bytes of a stage's artifact."""
    ((_, key, _),) = result.stages
    return {path.name: path.read_bytes() for path in cache.artifact_path(key).iterdir()}


def alone(given: Recipe, here: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> dict[str, bytes]:  # noqa: F811
    """What the stage gives where there is nothing in the cache."""
    with monkeypatch.context() as patch:
        patch.setenv("MERGEFLOW_CACHE", str(here / "empty"))
        found = artifact(pipeline.run(given, here / "alone", **more))
    shutil.rmtree(here / "alone")
    shutil.rmtree(here / "empty")
    return found


KINDS = ["gram", "fisher_diag"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_narrower_run_takes_all_from_the_cache_and_runs_no_model(
    kind: str,
    here: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = alone(asked(kind, PART), here, monkeypatch)
    pipeline.run(asked(kind, WIDE), "wide")
    said: list[str] = []
    counted = Counted(monkeypatch)
    found = pipeline.run(asked(kind, PART), "narrow", progress=lambda what, *_: said.append(what))
    assert [done for _, _, done in found.stages] == [False]
    assert (counted.loaded, counted.means, counted.parameters) == (0, 0, 0)
    assert any(what.startswith("taken from the cache: ") for what in said)
    assert artifact(found) == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_a_wider_run_collects_only_what_is_not_there(
    kind: str,
    here: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = alone(asked(kind, WIDE), here, monkeypatch)
    pipeline.run(asked(kind, NARROW), "narrow")
    counted = Counted(monkeypatch)
    said: list[str] = []
    found = pipeline.run(asked(kind, WIDE), "wide", progress=lambda what, *_: said.append(what))
    taken, of = (2, 3) if kind != "fisher_diag" else (8, 10)
    assert (counted.means, counted.parameters) == ((1, 0) if kind != "fisher_diag" else (0, 2))
    assert any(what.startswith(f"taken from the cache: {taken} of {of} ") for what in said), said
    assert artifact(found) == wanted
    facts = open_statistics(LocalFolder("wide", Path("wide"))).facts
    assert facts.only == (WIDE,)


@pytest.mark.parametrize("kind", KINDS)
def test_several_artifacts_together_may_have_all_that_is_asked_for(
    kind: str,
    here: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = alone(asked(kind, WIDE), here, monkeypatch)
    for number, only in enumerate(("blocks.0.*", "blocks.1.*", "head.*")):
        pipeline.run(asked(kind, only), f"part-{number}")
    assert artifact(pipeline.run(asked(kind, WIDE), "wide")) == wanted


def test_another_model_data_op_or_parameter_gives_nothing_to_reuse(
    here: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline.run(asked("gram", WIDE), "wide")
    counted = Counted(monkeypatch)
    pipeline.run(asked("gram", NARROW, "b"), "model")
    pipeline.run(asked("gram", NARROW, codec="float32"), "codec")
    pipeline.run(asked("gram", NARROW, seed=3), "seed")
    pipeline.run(asked("gram_diag", NARROW), "op")
    (here / "rows.jsonl").write_text((here / "more.jsonl").read_text())
    pipeline.run(asked("gram", NARROW), "data")
    assert (counted.loaded, counted.means) == (5, 10)


def test_what_was_damaged_dropped_or_made_by_other_software_is_collected_anew(
    here: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = alone(asked("gram", NARROW), here, monkeypatch)
    ((_, key, _),) = pipeline.run(asked("gram", WIDE), "wide").stages
    path = cache.artifact_path(key) / "statistics.json"
    whole = path.read_text()
    facts = json.loads(whole)
    for told in (
        "{}",
        json.dumps({**facts, "software": {**facts["software"], "torch": "1.0"}}),
        json.dumps({**facts, "data": {**facts["data"], "batches_dropped": 1}}),
    ):
        path.write_text(told)
        counted = Counted(monkeypatch)
        found = pipeline.run(asked("gram", NARROW), f"narrow-{len(told)}")
        assert counted.loaded == 1
        assert artifact(found) == wanted
        cache.clear(keys=frozenset({found.stages[0][1]}))


def test_patterns_that_name_no_layer_are_refused_with_or_without_a_cache(here: Path) -> None:  # noqa: F811
    told = []
    for kind in ("gram", "fisher_diag"):
        for wide in (False, True):
            if wide:
                pipeline.run(asked(kind, WIDE), f"wide-{kind}")
            with pytest.raises(MergeflowError) as refused:
                pipeline.run(asked(kind, "decoder.*"), "none")
            told.append(str(refused.value))
    assert told[0] == told[1]
    assert told[2] == told[3]


def test_a_model_that_is_walked_block_by_block_reuses_too(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    torch.manual_seed(0)
    with models.quietly():
        saved(here / "llama", "llama")
    (here / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    monkeypatch.setattr("mergeflow.stages.walking.too_large", lambda folder, memory: True)
    wide, narrow = asked("gram", "*", "llama"), asked("gram", "*.self_attn.*", "llama")
    with models.quietly():
        wanted = alone(wide, here, monkeypatch)
        pipeline.run(narrow, "narrow")
        counted = Counted(monkeypatch)
        assert artifact(pipeline.run(wide, "wide")) == wanted
    assert counted.means == 3 * 2 + 1

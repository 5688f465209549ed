"""`op: fuse` from recipe to result: sources are run once and kept, the target is trained, and a run goes on after a kill."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_stages import DATA, mlp, rows, weights, write_recipe
from toys import call, environment

from mergeflow import pipeline, preparing
from mergeflow.errors import InputError, Interrupted, MachineError, NumericError, RecipeError
from mergeflow.graph import Needs
from mergeflow.ops.fuse import Fuse, Fusion, Loss, Source, Train
from mergeflow.recipe import load_recipe
from mergeflow.stages import models
from mergeflow.stages.fuse import classifying, estimating, running, training
from mergeflow.stages.fuse.shards import Shards

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


def run(
    here: Path, out: str = "out", *, node: Mapping[str, Any] = FUSED, nodes: Mapping[str, Any] | None = None,
    corpora: Mapping[str, Any] = DATA, **changed: Any,
) -> pipeline.Result:  # fmt: skip
    """The fuse, with some of its keys changed, through a recipe on disk."""
    names = [
        path.name for path in here.iterdir() if (path / "config.json").exists() and not path.name.startswith("out")
    ]
    made = write_recipe(
        here,
        {**(nodes or {}), "fused": {**node, **changed}},
        models={name: f"./{name}" for name in sorted(names)},
        data=corpora,
        output={"node": "fused"},
    )
    return pipeline.run(load_recipe(made), out, threads=1)


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Inside, a file that is written past so many bytes is refused by the kernel, as one is on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


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


def test_a_training_that_was_killed_goes_on_and_ends_in_the_same_bytes(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: list[str]
) -> None:
    run(here, "whole")
    wanted = (here / "whole/model.safetensors").read_bytes()
    monkeypatch.setenv("MERGEFLOW_CACHE", str(tmp_path / "other"))
    killed(here, "training", "_State", "note", 4)
    assert not (here / "out").exists()
    steps: list[float] = []
    note = training._State.note

    def noted(self: training._State, values: Mapping[str, float]) -> None:
        steps.append(values["step"])
        if len(steps) == 6:
            raise KeyboardInterrupt
        note(self, values)

    monkeypatch.setattr(training._State, "note", noted)
    ran.clear()
    with pytest.raises(KeyboardInterrupt):
        run(here, "out")
    result = run(here, "out")
    assert ran == ["start", "start"], "what the sources gave was kept"
    assert steps == [3, 4, 5, 6, 7, 8, *range(7, 13)], "it goes on from the last checkpoint"
    assert (here / "out/model.safetensors").read_bytes() == wanted
    lines = (artifact(result) / training.METRICS).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 13))


def test_a_training_that_is_stopped_writes_a_checkpoint_and_goes_on_from_that_step(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(here, "whole")
    monkeypatch.setenv("MERGEFLOW_CACHE", str(tmp_path / "other"))
    steps: list[float] = []
    note = training._State.note

    def noted(self: training._State, values: Mapping[str, float]) -> None:
        note(self, values)
        steps.append(values["step"])
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training._State, "note", noted)
    with pytest.raises(Interrupted, match="Run the same command again to go on from here"):
        run(here)
    assert not (here / "out").exists()
    run(here)
    assert steps == list(range(1, 13)), "no step is made twice"
    assert (here / "out/model.safetensors").read_bytes() == (here / "whole/model.safetensors").read_bytes()


def test_a_capture_that_was_killed_goes_on_and_a_torn_shard_is_not_believed(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifying, "EXAMPLES_A_SHARD", 16)
    written: list[str] = []
    write = Shards.write

    def noted(self: Shards, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        write(self, name, tensors)
        written.append(name)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Shards, "write", noted)
    with pytest.raises(KeyboardInterrupt):
        run(here)
    (torn,) = (here / "cache/work").glob("*/made/logits-00001.safetensors")
    torn.write_bytes(torn.read_bytes()[:-1] + b"x")
    run(here)
    assert sorted(written[3:5]) == ["logits-00001.safetensors", "logits-00003.safetensors"]
    assert len(written) == 3 + 2 + 4, "the other source is whole"
    torn_free = (here / "out/model.safetensors").read_bytes()
    monkeypatch.setenv("MERGEFLOW_CACHE", str(here / "other"))
    run(here, "again")
    assert (here / "again/model.safetensors").read_bytes() == torn_free


# What the sources say together


def op(**fields: Any) -> Fuse:
    made = Fuse(task="classification", **{"sources": (Source(), Source()), **fields})
    made.check()
    return made


def test_the_teacher_is_the_weighted_mean_of_logits_or_probabilities() -> None:
    draw = torch.Generator().manual_seed(0)
    one, two = torch.randn(5, 4, generator=draw), torch.randn(5, 4, generator=draw)
    loss = Loss(teacher_temperature=2.0)
    weighted = (Source(weight=3.0), Source(weight=1.0))
    found = classifying.teacher(op(sources=weighted, loss=loss), [one, two])
    assert torch.allclose(found, ((0.75 * one + 0.25 * two) / 2).softmax(1), atol=1e-6)
    mean = Fusion(average="probabilities")
    found = classifying.teacher(op(sources=weighted, loss=loss, fusion=mean), [one, two])
    assert torch.allclose(found, 0.75 * (one / 2).softmax(1) + 0.25 * (two / 2).softmax(1), atol=1e-6)


def test_the_surest_source_is_taken_where_it_is_surer_than_the_start() -> None:
    surest = Fusion(function="max_confidence")
    source = torch.tensor([[4.0, 0.0], [0.5, 0.0], [1.0, 0.0]])
    other = torch.tensor([[0.0, 1.0], [0.0, 0.6], [0.0, 0.5]])
    start = torch.tensor([[0.0, 2.0], [0.0, 3.0], [1.0, 0.0]])
    found = classifying.teacher(op(fusion=surest, include_self=True), [source, other, start])
    assert torch.allclose(found, torch.stack([source[0], start[1], start[2]]).softmax(1))
    found = classifying.teacher(op(fusion=surest), [source, other])
    assert torch.allclose(found, torch.stack([source[0], other[1], source[2]]).softmax(1))


# Training


def test_a_step_of_several_parts_is_that_of_one(here: Path) -> None:
    run(here, "whole", batch_size=16)
    run(here, "parts", batch_size=4)
    for name, one in weights(here / "whole").items():
        assert torch.allclose(one, weights(here / "parts")[name], atol=1e-4), name


def test_what_is_not_trainable_stays_bit_for_bit(here: Path) -> None:
    run(here, train={**FUSED["train"], "trainable": "head.*"})
    start = weights(here / "start")
    changed = {name for name, one in weights(here / "out").items() if not torch.equal(one, start[name])}
    assert changed == {"head.weight", "head.bias"}


def test_bfloat16_products_train_float32_weights(here: Path) -> None:
    run(here, "whole")
    run(here, "half", train={**FUSED["train"], "precision": "bfloat16"})
    whole, half = weights(here / "whole"), weights(here / "half")
    assert all(one.dtype == torch.float32 for one in half.values())
    apart = [(whole[name] - one).norm() / whole[name].norm() for name, one in half.items() if one.ndim == 2]
    assert 0 < max(apart) < 0.05


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_rises_and_falls_as_the_schedule_says(schedule: Any) -> None:
    settings = Train(lr=1.0, warmup_ratio=0.1, schedule=schedule)
    rates = [training.learning_rate(settings, number, 100) for number in range(100)]
    assert rates[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert rates[10] == 1 and rates == [*rates[:10], *sorted(rates[10:], reverse=True)]
    middle = {"cosine": 0.5, "linear": 0.5, "constant": 1.0}[schedule]
    assert rates[55] == pytest.approx(middle)


# What cannot be


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"sources": ["start", "c"]}, RecipeError, "it has 4 labels, and the target 3"),
        ({"sources": [{"model": "named", "label_map": {"x": "0"}}]}, RecipeError, "the source has no label 'x'"),
        ({"sources": [{"model": "named", "label_map": {"cat": "7"}}]}, RecipeError, "the target has no label '7'"),
        ({"sources": [{"model": "named", "label_map": {"cat": "0"}}]}, RecipeError, "no label of the source means '1'"),
        ({"sources": ["named"], "target": "others"}, RecipeError, "its label 'cow' is none of the target's"),
        ({"train": {"trainable": "haed.*"}}, RecipeError, "`trainable: haed.*` fits none of the target's tensors"),
        ({"sources": ["broken"]}, NumericError, "source 1 gives NaN or Inf for 64 of 64 rows so far"),
        ({"data": "more"}, InputError, "has no row that can be used"),
        ({"train": {**FUSED["train"], "lr": 1e30}}, NumericError, "is NaN or Inf at step"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said(here: Path, changed: dict[str, Any], error: type[Exception], words: str) -> None:
    mlp(here / "c", 4)
    relabel(here / "c", num_labels=4)
    relabel(mlp(here / "named", 4), id2label={"0": "cat", "1": "dog", "2": "cow"})
    relabel(mlp(here / "others", 5), id2label={"0": "cat", "1": "dog", "2": "bird"})
    broken = load_file(mlp(here / "broken", 6) / "model.safetensors")
    save_file({**broken, "head.bias": broken["head.bias"] + torch.nan}, here / "broken/model.safetensors")
    (here / "more.jsonl").write_text("")
    with pytest.raises(error) as raised:
        run(here, **changed)
    assert words in str(raised.value)
    assert not (here / "out").exists()


def relabel(folder: Path, **config: Any) -> None:
    given = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**given, **config}))


def test_a_row_of_nan_in_a_thousand_is_left_out_and_counted(here: Path) -> None:
    lines = rows(here / "rows.jsonl", 1000).read_text().splitlines(keepends=True)
    settings = {"batch_size": 64, "train": {**FUSED["train"], "epochs": 1, "batch_size": 64}}
    run(here, "without", **settings)
    (here / "rows.jsonl").write_text("".join([*lines[:500], json.dumps({"features": [3e38] * 6}) + "\n", *lines[500:]]))
    told = call("run", "recipe.yaml", "-o", "out", "--threads", "1")
    assert told.code == 0 and "rows with NaN or Inf, left out: 1" in told.err, told.err
    for name, one in weights(here / "without").items():
        assert torch.allclose(one, weights(here / "out")[name], atol=1e-5), name


def test_labels_are_matched_by_name_or_by_the_map(here: Path) -> None:
    for name, labels in {"a": ("cat", "dog", "cow"), "start": ("cow", "cat", "dog"), "b": ("c", "d", "k")}.items():
        relabel(here / name, id2label=dict(enumerate(labels)))
    target, one, two = (models.open_folder(here / name) for name in ("start", "a", "b"))
    mapped = op(sources=(Source(), Source(label_map={"c": "cat", "d": "dog", "k": "cow"})))
    assert classifying.columns(mapped, target, [one, two], 0) == [2, 0, 1]
    assert classifying.columns(mapped, target, [one, two], 1) == [2, 0, 1]


def test_too_little_memory_is_said_with_the_numbers_before_anything_runs(
    here: Path, monkeypatch: pytest.MonkeyPatch, ran: list[str]
) -> None:
    monkeypatch.setattr(estimating, "training", lambda folder: 16 * 10**12)
    with pytest.raises(
        MachineError, match=r"takes 16,000,000,000,000 bytes of memory beside activations, and may take"
    ):
        run(here)
    assert ran == []


def test_a_plan_says_what_a_fuse_takes_and_refuses_a_disk_that_cannot_hold_it(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(
        here, {"fused": FUSED}, models={name: f"./{name}" for name in ("start", "a", "b")}, output={"node": "fused"}
    )
    (told,) = json.loads(call("plan", str(path), "--json").out)["stages"]
    count = sum(one.numel() for one in weights(here / "start").values())
    captured, checkpoint, result = 2 * 64 * 3 * 4, 12 * count, 4 * count
    assert told["needs"] == {
        "disk": captured + checkpoint + result,
        "memory": 16 * count,
        "seconds": 0.0,
        "rows": None,
        "tokens": None,
    }
    assert "of memory beside activations" in call("plan", str(path)).out
    monkeypatch.setattr(preparing, "free_bytes", lambda path: 1000)
    words = call("plan", str(path)).err
    assert f"takes about {told['needs']['disk']:,} bytes in the cache, and its disk has 1,000 free" in words


@pytest.mark.parametrize(("wanted", "room", "twice"), [("auto", 1, True), ("auto", 1 << 40, False), (False, 1, False)])
def test_activations_are_computed_twice_where_they_would_not_fit(
    here: Path, monkeypatch: pytest.MonkeyPatch, wanted: Any, room: int, twice: bool
) -> None:
    calls: list[str] = []

    class Model:
        supports_gradient_checkpointing = True

        def gradient_checkpointing_enable(self, settings: Any) -> None:
            calls.append("twice")

    monkeypatch.setattr(running, "_room", lambda job: room)
    job = Namespace(op=op(train=Train(gradient_checkpointing=wanted)))
    running._save_memory(job, Model(), models.open_folder(here / "start"), 100)  # type: ignore[arg-type]
    assert bool(calls) == twice


def test_a_disk_that_would_fill_is_said_with_the_numbers(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimating, "needs", lambda *args: Needs(0, 0, 0))
    monkeypatch.setattr(preparing, "free_bytes", lambda path: 100)
    with pytest.raises(MachineError, match=r"the logits of source 1 take 768 bytes, and the cache's disk has 100 free"):
        run(here)


# Classes of transformers


def test_images_teach_a_model_of_another_size(here: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    draw = torch.Generator().manual_seed(0)
    for name, size in (("a", 16), ("start", 8)):
        torch.manual_seed(size)
        shape = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 3}
        layers = {"hidden_size": size, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = ViTForImageClassification(ViTConfig(**shape, **layers, hidden_dropout_prob=0.1))  # type: ignore[arg-type]
        with torch.no_grad():
            model.classifier.weight.mul_(30)
        shutil.rmtree(here / name)
        model.save_pretrained(here / name)
    pixels = torch.rand(32, 1, 8, 8, generator=draw)
    lines = [json.dumps({"features": one}) + "\n" for one in pixels.tolist()]
    (here / "rows.jsonl").write_text("".join(lines))
    run(here, sources=["a"], train={**FUSED["train"], "epochs": 10})
    with torch.no_grad():
        teacher, before, after = (
            ViTForImageClassification.from_pretrained(here / name).eval()(pixels).logits
            for name in ("a", "start", "out")
        )
    assert divergence(teacher, after) < 0.7 * divergence(teacher, before)
    assert json.loads((here / "out/config.json").read_text())["hidden_size"] == 8


def test_rows_of_files_with_one_name_are_not_taken_for_each_other(here: Path) -> None:
    for name in ("x", "y"):
        (here / "data" / name).mkdir(parents=True)
    whole = (here / "rows.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("x", whole[:20]), ("y", whole[20:])):
        (here / "data" / name / "rows.jsonl").write_text("".join(part))
    run(here)
    run(here, "out_two", corpora={"rows": {"path": "./data"}})
    assert (here / "out_two/model.safetensors").read_bytes() == (here / "out/model.safetensors").read_bytes()


def test_rows_with_nan_before_a_stop_count_behind_it_too(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2,100 rows 2 may be without numbers: the third is one too many, wherever a run was stopped between them."""
    monkeypatch.setattr(classifying, "EXAMPLES_A_SHARD", 700)
    state = load_file(here / "a/model.safetensors")
    state["blocks.0.linear.weight"] *= 1e3  # so that the greatest numbers overflow
    save_file(state, here / "a/model.safetensors", metadata={"format": "pt"})
    lines = [json.dumps({"features": [float(number)] * 6}) for number in range(2100)]
    for number in (0, 699, 2099):
        lines[number] = json.dumps({"features": [3e38] * 6})
    (here / "rows.jsonl").write_text("\n".join(lines) + "\n")
    write = Shards.write

    def stopping(self: Shards, name: str, tensors: Any) -> None:
        write(self, name, tensors)
        raise Interrupted("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(Shards, "write", stopping)
        with pytest.raises(Interrupted):
            run(here)
    with pytest.raises(NumericError, match="source 1 gives NaN or Inf for 3 of 2100 rows"):
        run(here)


def test_shards_behind_a_torn_line_of_the_journal_are_known(tmp_path: Path) -> None:
    whole = {"x": torch.ones(3)}
    Shards(tmp_path).write("a", whole)
    with (tmp_path / "journal.jsonl").open("ab") as journal:
        journal.write(b'{"name": "b", "dig')
    Shards(tmp_path).write("c", whole)
    found = Shards(tmp_path)
    assert [found.has(name) for name in "abc"] == [True, False, True]


def test_a_frozen_norm_keeps_its_running_means(here: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3,
        image_size=8,
    )  # fmt: skip
    for seed, name in enumerate(("start", "a")):
        torch.manual_seed(seed)
        shutil.rmtree(here / name)
        ResNetForImageClassification(config).save_pretrained(here / name)
    draw = torch.Generator().manual_seed(0)
    lines = [json.dumps({"features": one}) + "\n" for one in torch.rand(32, 1, 8, 8, generator=draw).tolist()]
    (here / "rows.jsonl").write_text("".join(lines))
    changed = {}
    for out, trainable in (("out_head", ["classifier.*"]), ("out_all", "all")):
        run(here, out, sources=["a"], train={**FUSED["train"], "trainable": trainable})
        before, after = weights(here / "start"), weights(here / out)
        changed[out] = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed["out_head"] == {name for name in weights(here / "start") if name.startswith("classifier.")}
    assert any("running_mean" in name for name in changed["out_all"])


# What is told before a source runs


def nan_in(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    name = min(state)
    save_file({**state, name: state[name] * torch.nan}, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_target_with_nan_is_told_before_a_source_runs(here: Path, ran: list[str]) -> None:
    nan_in(here / "start")
    with pytest.raises(NumericError, match=r"the target's '.*' has NaN or Inf"):
        run(here)
    assert not ran


def test_missing_accelerate_is_told_before_a_source_runs(
    here: Path, monkeypatch: pytest.MonkeyPatch, ran: list[str]
) -> None:
    monkeypatch.setattr(training, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match="needs accelerate"):
        run(here, train={**FUSED["train"], "precision": "bfloat16"})
    assert not ran


def planned(here: Path, **changed: Any) -> str:
    """What a plan of the fuse says against it."""
    models = {name: f"./{name}" for name in ("a", "b", "start")}
    write_recipe(here, {"fused": {**FUSED, **changed}}, models=models, data=DATA, output={"node": "fused"})
    done = call("plan", "recipe.yaml")
    assert done.code in (2, 3), done.err
    return done.err


def test_a_plan_refuses_what_a_class_cannot(here: Path) -> None:
    told = planned(here, train={**FUSED["train"], "gradient_checkpointing": True})
    assert "MergeflowMLP cannot compute its activations twice" in told, told


def test_labels_that_do_not_count_from_zero_are_refused(here: Path) -> None:
    path = here / "a/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "label2id": {"x": 1, "y": 2, "z": 3}}))
    assert "a numbers its labels [1, 2, 3], and its 3 logits count from 0" in planned(here)


@pytest.mark.parametrize("part", ["file: model.safetensors", "only: 'head.*'", "rename: {'head.*': 'tail.*'}"])
def test_a_stage_refuses_a_part_of_a_model(here: Path, part: str) -> None:
    planned_text = (
        "recipe: 1\nname: x\nmodels:\n  start: ./start\n  a:\n    path: ./a\n    " + part + "\n"
        "data: {rows: ./rows.jsonl}\n"
        "nodes: {f: {op: fuse, task: classification, target: start, sources: [a], data: rows}}\n"
    )
    (here / "recipe.yaml").write_text(planned_text)
    done = call("plan", "recipe.yaml")
    assert done.code == 2 and "recipe.yaml:7:" in done.err, done.err
    assert f"`{part.partition(':')[0]}` makes 'a' a part of one" in done.err


def test_a_disk_that_fills_is_told_and_what_is_made_stays(here: Path) -> None:
    run(here, "out_whole", train={**FUSED["train"], "epochs": 1})
    assert call("cache", "clear").code == 0
    limit, told = 1000, 0
    while True:
        with files_of_at_most(limit):
            try:
                run(here, train={**FUSED["train"], "epochs": 1})
                break
            except MachineError as error:
                assert "cannot be written" in str(error), error
                told += 1
        limit = limit * 3 // 2
    assert told >= 3
    assert (here / "out/model.safetensors").read_bytes() == (here / "out_whole/model.safetensors").read_bytes()

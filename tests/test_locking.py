"""Lock, check and `run --locked` through the command line: what is the same passes, what moved is named and measured."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import files_of, save, weights_of
from toys import call

from mergeflow import InputError, RecipeError, load_recipe, run
from mergeflow.locking import check, guard, lock_path, making, read_lock

RECIPE = """\
recipe: 1
name: mean
models: {a: ./a, b: ./b}
nodes: {mean: {op: linear, inputs: [{model: a, weight: 0.5}, {model: b, weight: 0.5}]}}
"""
SHAPES = {
    "model.embed.weight": (300, 64),
    "model.layers.0.mlp.weight": (64, 128),
    "model.layers.1.mlp.weight": (64, 128),
    "norm": (64,),
}


def tensors(seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of two models, its lock beside it, and the working directory in it."""
    for seed, name in enumerate("ab"):
        save(tmp_path / name, tensors(seed))
    (tmp_path / "mean.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    done = call("lock", "mean.yaml", "-q")
    assert done.code == 0, done.err
    return tmp_path


def move(folder: Path, name: str, factor: float) -> None:
    changed = weights_of(folder)
    changed[name] = (changed[name].double() * factor).to(changed[name].dtype)
    shutil.rmtree(folder)
    save(folder, changed)


def test_what_was_locked_is_exactly_what_comes_out_again_and_nothing_is_left_behind(folder: Path) -> None:
    before = sorted(os.listdir(folder))
    done = call("check", "mean.yaml", "-q")
    assert done.code == 0 and "all exactly as locked" in done.out, done.err
    assert sorted(os.listdir(folder)) == before


def test_the_same_lock_is_written_whatever_the_threads_and_the_memory(folder: Path) -> None:
    first = lock_path("mean.yaml").read_bytes()
    for options in (("--threads", "1"), ("--threads", "4", "--memory", "64MiB"), ("--io", "pread")):
        assert call("lock", "mean.yaml", "-q", *options).code == 0
        assert lock_path("mean.yaml").read_bytes() == first


def test_a_lock_is_text_with_a_sorted_line_of_some_500_bytes_for_each_tensor(folder: Path) -> None:
    lines = lock_path("mean.yaml").read_text().splitlines()
    mine = [line for line in lines if line.startswith('  "') and '"digest"' in line]
    assert len(mine) == len(SHAPES) and mine == sorted(mine)
    assert all(450 < len(line) < 620 for line in mine)
    assert json.loads("\n".join(lines))["ops"] == {"linear": 1}


def test_a_tensor_that_moved_is_named_with_its_drift_and_the_check_fails(folder: Path) -> None:
    move(folder / "b", "model.layers.1.mlp.weight", 1.1)
    done = call("check", "mean.yaml", "-q", "--json", "--summary", "summary.md")
    assert done.code == 1
    found = json.loads(done.out)
    assert not found["passed"] and found["changes"] == ["the weights of 'b' changed"]
    [moved] = found["moved"]
    old, new = [weights_of(folder / n)["model.layers.1.mlp.weight"].double() for n in "ab"]
    true = float((0.5 * (new - new / 1.1)).norm() / (0.5 * (old + new / 1.1)).norm())
    assert moved["name"] == "model.layers.1.mlp.weight" and moved["why"] == "drift"
    assert moved["drift"] == pytest.approx(true, rel=0.5) and moved["standard_error"] == pytest.approx(
        moved["drift"] / 8
    )
    assert "model.layers.1.mlp.weight" in (folder / "summary.md").read_text()
    assert call("check", "mean.yaml", "-q", "--tolerance", "0.5").code == 0
    assert call("check", "mean.yaml", "-q", "--tolerance", "1e-6").code == 1


def test_what_the_recipe_expects_decides_and_is_no_part_of_what_is_made(folder: Path) -> None:
    plain = load_recipe("mean.yaml").resolved
    move(folder / "b", "norm", 1.05)
    (folder / "mean.yaml").write_text(
        RECIPE + "expect: {finite: true, drift: [{match: norm, value: 0.5}, {value: 0.0}]}\n"
    )
    assert "the recipe" not in call("check", "mean.yaml", "-q").out
    assert call("check", "mean.yaml", "-q").code == 0
    (folder / "mean.yaml").write_text(RECIPE + "expect: {drift: [{match: '*.mlp.*', value: 0.5}, {value: 0.0}]}\n")
    assert call("check", "mean.yaml", "-q").code == 1
    assert load_recipe("mean.yaml").resolved == plain


def test_a_pattern_that_fits_no_tensor_is_an_error_with_its_place(folder: Path) -> None:
    (folder / "mean.yaml").write_text(RECIPE + "expect:\n  drift: [{match: '*.mpl.*', value: 1.0}, {value: 0.0}]\n")
    done = call("check", "mean.yaml", "-q")
    assert done.code == 2 and "mean.yaml:6:" in done.err and "mlp" in done.err


def test_a_pattern_that_fits_no_tensor_is_said_before_a_weight_is_read(folder: Path) -> None:
    (folder / "mean.yaml").write_text(RECIPE + "expect: {drift: [{match: '*.mpl.*', value: 1.0}, {value: 0.0}]}\n")
    looked: list[str] = []
    with pytest.raises(RecipeError, match="mpl"):
        check(
            load_recipe("mean.yaml"),
            read_lock(lock_path("mean.yaml")),
            progress=lambda what, done, total: looked.append(what),
        )
    assert not looked


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("expect: {finit: true}", "Did you mean 'finite'?"),
        ("expect: {drift: -1.0}", "drift"),
        ("expect: [1]", "`expect` cannot be"),
        ("expect: {eval: [{data: x, metric: accuracy, min: 0.5}]}", "there is no data 'x'"),
        ("data: {x: ./x.csv}\nexpect: {eval: [{data: x, metric: accuracy}]}", "no bound"),
        ("data: {x: ./x.csv}\nexpect: {eval: [{data: x, metric: acc, min: 0.5}]}", "metric"),
        (
            "data: {x: ./x.csv}\nexpect: {eval: [{data: x, metric: accuracy, min: 0.5, max: 0.1}]}",
            "`min` is more than `max`",
        ),
    ],
)
def test_an_expectation_that_says_nothing_is_an_error_of_the_recipe(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"{RECIPE}{text}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert words in str(caught.value) and "r.yaml:" in str(caught.value)


def test_other_shapes_dtypes_and_names_are_told(folder: Path) -> None:
    for seed, name in enumerate("ab"):
        shutil.rmtree(folder / name)
        changed = tensors(seed)
        changed["norm"] = changed["norm"].float()
        changed["model.embed.weight"] = changed["model.embed.weight"][:200]
        changed["head.weight"] = torch.ones(3)
        del changed["model.layers.1.mlp.weight"]
        save(folder / name, changed)
    found = check(load_recipe("mean.yaml"), read_lock(lock_path("mean.yaml")), tolerance=10.0)
    assert {one.name: one.why for one in found.moved} == {
        "norm": "dtype",
        "model.embed.weight": "shape",
        "head.weight": "new",
        "model.layers.1.mlp.weight": "gone",
    }
    assert not found.passed


def test_a_zero_tensor_that_becomes_one_and_a_nan_are_no_small_drift(folder: Path) -> None:
    for name in "ab":
        move(folder / name, "norm", 0.0)
    assert call("lock", "mean.yaml", "-q").code == 0
    changed = weights_of(folder / "a")
    shutil.rmtree(folder / "a")
    changed["norm"] = torch.ones_like(changed["norm"])
    save(folder / "a", changed)
    found = check(load_recipe("mean.yaml"), read_lock(lock_path("mean.yaml")), tolerance=1.0)
    assert [one.drift for one in found.moved] == [math.inf] and not found.passed
    text = RECIPE + "output: {non_finite: keep}\n"
    (folder / "mean.yaml").write_text(text + "expect: {finite: true}\n")
    changed["norm"][3] = math.nan
    shutil.rmtree(folder / "a")
    save(folder / "a", changed)
    done = call("check", "mean.yaml", "-q", "--tolerance", "10")
    assert done.code == 1 and "NOT MET" in done.out and "norm: NaN or Inf" in done.out


# run --locked


def test_a_locked_run_makes_what_was_locked_and_the_same_as_any_run(folder: Path) -> None:
    assert call("run", "mean.yaml", "--locked", "-q", "-o", "x").code == 0
    assert call("run", "mean.yaml", "-q", "-o", "y").code == 0
    x, y = files_of(folder / "x"), files_of(folder / "y")
    assert x == y


def test_a_locked_run_refuses_other_headers_before_it_reads_a_weight(folder: Path) -> None:
    changed = weights_of(folder / "b") | {"norm": torch.ones(64)}
    shutil.rmtree(folder / "b")
    save(folder / "b", changed)
    done = call("run", "mean.yaml", "--locked", "-q")
    assert done.code == 3 and "of 'b' changed" in done.err and not (folder / "mean").exists()
    assert not list(folder.glob(".mean*"))


def test_a_locked_run_refuses_other_weights_under_the_same_headers_and_publishes_nothing(folder: Path) -> None:
    move(folder / "b", "norm", 2.0)
    done = call("run", "mean.yaml", "--locked", "-q")
    assert done.code == 3 and "the weights of 'b' changed" in done.err and "mergeflow lock" in done.err
    assert not (folder / "mean").exists() and not list(folder.glob(".mean*"))
    assert call("run", "mean.yaml", "-q").code == 0
    assert call("run", "mean.yaml", "--locked", "-q").code == 3  # made already, of the wrong weights


def test_a_locked_run_refuses_another_recipe_and_one_without_a_lock(folder: Path) -> None:
    (folder / "mean.yaml").write_text(RECIPE.replace("weight: 0.5}]", "weight: 0.6}]"))
    done = call("run", "mean.yaml", "--locked", "-q")
    assert done.code == 2 and "another one than was locked" in done.err
    os.unlink(lock_path("mean.yaml"))
    for command in ("run", "check"):
        done = call(command, "mean.yaml", "-q", *(["--locked"] if command == "run" else []))
        assert done.code == 2 and "mean.yaml.lock" in done.err and "mergeflow lock" in done.err


# The file


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"lock": 1', '"lock": 2'),
        lambda text: text.replace('"lock": 1', '"lock": 1, "more": 1'),
        lambda text: text.replace('"sums": "', '"sums": "!'),
        lambda text: text.replace('"norm"', '"nrom"', 1),
        lambda text: text.replace('"norm": {', '"norm": {}, "norm": {', 1),
        lambda text: "{" * 100_000,
        lambda text: "\x00\xff",
    ],
)
def test_a_spoilt_lock_is_an_error_that_names_the_file(spoil: Callable[[str], str], folder: Path) -> None:
    path = lock_path("mean.yaml")
    path.write_text(spoil(path.read_text()))
    with pytest.raises(InputError) as caught:
        read_lock(path)
    assert "mean.yaml.lock" in str(caught.value) and "mergeflow lock" in str(caught.value)


def test_a_lock_brings_itself_back(folder: Path) -> None:
    path = lock_path("mean.yaml")
    assert read_lock(path).text() == path.read_text()
    assert path.stat().st_mode & 0o777 == (folder / "mean.yaml").stat().st_mode & 0o777


def test_several_outputs_are_locked_and_checked_each(folder: Path) -> None:
    (folder / "two.yaml").write_text(
        "recipe: 1\nname: two\nmodels: {a: ./a, b: ./b}\n"
        "nodes: {m: {op: linear, inputs: [a, b]}}\noutputs: {mean: {node: m}, same: {node: a}}\n"
        "expect: {drift: [{match: '*.mlp.*', value: 0.5}, {value: 0.0}]}\n"
    )
    assert call("lock", "two.yaml", "-q").code == 0
    lock = read_lock(lock_path("two.yaml"))
    assert set(lock.tensors) == {f"{key}/{name}" for key in ("mean", "same") for name in SHAPES}
    move(folder / "b", "model.layers.0.mlp.weight", 1.1)
    found = check(load_recipe("two.yaml"), lock)
    assert [(one.name, one.allowed) for one in found.moved] == [
        ("mean/model.layers.0.mlp.weight", True)
    ] and found.passed


def test_the_fingerprints_are_those_of_the_written_tensors(folder: Path) -> None:
    from test_fingerprints import fingerprint

    recipe = load_recipe("mean.yaml")
    with making(recipe) as made:
        written = weights_of(made.folder)
        for name, one in made.lock.tensors.items():
            assert one.fingerprint == fingerprint(written[name].reshape(-1), name)
    assert not made.folder.exists()


def test_a_model_that_only_a_stage_runs_is_locked_by_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv("MERGEFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(Path(__file__).parent.parent / "recipes/quickstart/models/base", tmp_path / "a")
    rows = [json.dumps({"x": [0.1 * ((i + j) % 10) for j in range(64)]}) for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "g.yaml").write_text(
        "recipe: 1\nname: g\nmodels: {a: ./a}\ndata: {rows: {path: ./rows.jsonl, features: x}}\n"
        "nodes: {g: {op: gram, model: a, data: rows}}\n"
    )
    assert call("lock", "g.yaml", "-q").code == 0
    assert call("run", "g.yaml", "--locked", "-q").code == 0
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[:-1]))
    done = call("run", "g.yaml", "--locked", "-q", "--force")
    assert done.code == 3 and "the stage 'g'" in done.err


def test_a_guard_takes_what_was_locked(folder: Path) -> None:
    recipe = load_recipe("mean.yaml")
    run(recipe, "out")
    accept = guard(recipe, lock_path("mean.yaml"))
    inputs = json.loads((folder / "out" / "mergeflow.json").read_bytes())["inputs"]
    accept(inputs)
    inputs["a"]["tensors"]["norm"] = "0" * 64
    with pytest.raises(InputError, match="weights of 'a'"):
        accept(inputs)


def test_the_measures_of_the_digits_are_held_to_their_bounds(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    quickstart = Path(__file__).parent.parent / "recipes" / "quickstart"
    text = (quickstart / "merge.yaml").read_text().replace("./models", str(quickstart / "models"))
    rows = [{"x": [0.1 * (i % 10)] * 64, "label": i % 10} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "digits.yaml"
    for bound, good in (("min: 0.0", True), ("min: 0.99", False), ("max: 1.0", True)):
        recipe.write_text(
            f"{text}\ndata: {{rows: {{path: ./rows.jsonl, features: x, label: label}}}}\n"
            f"expect: {{eval: [{{data: rows, metric: accuracy, {bound}}}]}}\n"
        )
        if not lock_path(recipe).exists():
            assert call("lock", str(recipe), "-q", "--scratch", str(tmp_path)).code == 0
        done = call("check", str(recipe), "-q", "--scratch", str(tmp_path))
        assert done.code == (0 if good else 1), done.out + done.err
        assert ("NOT MET" not in done.out) is good and "accuracy on rows" in done.out

"""Models held against each other: changes as float64 arithmetic gives them, and origins as they are known."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from checkpoints import save, save_file, save_sharded
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import call

from mergeflow import InputError, RecipeError, diff, lineage, load_recipe, plan, run
from mergeflow.comparing import STRANGERS, diff_data, diff_svg, diff_text, lineage_data, sample

MODELS = Path(__file__).parent.parent / "recipes/quickstart/models"
DOMAINS = ("identity", "inverted", "rotated", "rolled", "shuffled")


def model(seed: int, *, layers: int = 3, width: int = 96) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {"model.embed.weight": torch.randn(300, width, generator=generator)}
    for n in range(layers):
        found[f"model.layers.{n}.mlp.weight"] = torch.randn(width, 2 * width, generator=generator)
        found[f"model.layers.{n}.norm.weight"] = torch.ones(width)
    return found


def moved(tensors: dict[str, torch.Tensor], seed: int, by: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: one + by * torch.randn(one.shape, generator=generator) for name, one in tensors.items()}


# Two models


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    rows=st.sampled_from([1, 3, 700]),
    columns=st.sampled_from([1, 97, 1500]),
    dtypes=st.tuples(
        *[st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])] * 2
    ),
    threads=st.integers(1, 4),
)
def test_changes_are_those_of_float64(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    rows: int,
    columns: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    threads: int,
) -> None:
    folder = tmp_path_factory.mktemp("pair")
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, columns, generator=generator).to(dtypes[0])
    b = (a.float() + 0.01 * torch.randn(rows, columns, generator=generator)).to(dtypes[1])
    save_file(folder / "a.safetensors", {"w": a}, shift=8)
    save_file(folder / "b.safetensors", {"w": b})
    (found,) = diff(folder / "a.safetensors", folder / "b.safetensors", threads=threads).tensors
    x, y = a.double().flatten(), b.double().flatten()
    assert found.relative == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-9)
    assert found.cosine == pytest.approx(float(x @ y / x.norm() / y.norm()), abs=1e-9)
    assert found.largest == float((y - x).abs().max()) and found.elements == rows * columns
    assert found.equal is (dtypes[0] == dtypes[1] and torch.equal(a.view(torch.uint8), b.view(torch.uint8)))


def test_the_numbers_are_the_same_whatever_the_threads(tmp_path: Path) -> None:
    first, second = model(0, width=512), moved(model(0, width=512), 1, 0.03)
    save_sharded(tmp_path / "a", first, 3)
    save(tmp_path / "b", second)
    told = [
        [diff_data(diff(tmp_path / "a", tmp_path / "b", threads=threads)), _lineage(tmp_path, threads)]
        for threads in (1, 2, 4)
    ]
    assert told[0] == told[1] == told[2]


def _lineage(folder: Path, threads: int) -> object:
    return lineage_data(lineage([folder / "a", folder / "b"], threads=threads))


def test_layers_hold_what_their_tensors_hold_together_and_the_most_changed_comes_first(tmp_path: Path) -> None:
    first, second = model(0), model(0)
    second["model.layers.2.mlp.weight"] *= 1.5
    second["model.layers.0.mlp.weight"] *= 1.1
    save(tmp_path / "a", first)
    save(tmp_path / "b", second)
    found = diff(tmp_path / "a", tmp_path / "b")
    assert [one.name for one in found.layers] == ["model.layers.2", "model.layers.0", "model.layers.1"]
    parts = [first[f"model.layers.2.{name}"].double() for name in ("mlp.weight", "norm.weight")]
    norm = math.sqrt(sum(float((one * one).sum()) for one in parts))
    assert found.layers[0].relative == pytest.approx(0.5 * float(parts[0].norm()) / norm, rel=1e-6)
    assert [one.name for one in found.tensors[:2]] == ["model.layers.2.mlp.weight", "model.layers.0.mlp.weight"]
    assert sum(one.equal for one in found.tensors) == len(first) - 2 and not found.same


def test_what_only_one_has_and_what_is_shaped_or_stored_otherwise_is_named(tmp_path: Path) -> None:
    vocabulary = {"model": {"vocab": {"a": 0, "b": 1, "c": 2}}}
    other = {"model": {"vocab": {"a": 0, "c": 1, "b": 2, "d": 3}}}
    save(
        tmp_path / "a",
        {"w": torch.ones(2, 3), "old": torch.ones(1), "s": torch.ones(2), "t": torch.ones(3)},
        config={"vocab_size": 3, "rope": {"theta": 1.0}, "gone": 1},
    )
    save(
        tmp_path / "b",
        {"w": torch.ones(2, 4), "new": torch.ones(1), "s": torch.ones(2).half(), "t": torch.ones(3)},
        config={"vocab_size": 4, "rope": {"theta": 2.0}},
    )
    (tmp_path / "a/tokenizer.json").write_text(json.dumps(vocabulary))
    (tmp_path / "b/tokenizer.json").write_text(json.dumps(other))
    (tmp_path / "b/chat_template.jinja").write_text("x")
    found = diff(tmp_path / "a", tmp_path / "b")
    assert (found.missing, found.extra) == (("old",), ("new",))
    assert found.shapes == {"w": ((2, 3), (2, 4))} and found.dtypes == {"s": ("float32", "float16")}
    assert found.config == {"vocab_size": (3, 4), "rope.theta": (1.0, 2.0), "gone": (1, None)}
    assert found.files == {"tokenizer.json": "differs", "chat_template.jinja": "only in the second"}
    assert found.tokenizer[0] == "3 tokens, and 4" and "only in the second: 'd'" in found.tokenizer[1]
    assert "2 ids mean another token: 1 is 'b' and 'c'" in found.tokenizer[2]
    text = diff_text(found)
    for words in ("only in the first", "w: 2x3, and 2x4", "rope.theta: 1.0, and 2.0", "s: float32, and float16"):
        assert words in text


def test_a_model_is_the_same_as_its_copy_however_it_is_cut_into_files(tmp_path: Path) -> None:
    save(tmp_path / "a", model(0))
    save_sharded(tmp_path / "b", model(0), 2)
    found = diff(tmp_path / "a", tmp_path / "b")
    assert found.same and found.whole.relative == 0 and diff_text(found).endswith("are the same")


def test_nan_zero_empty_and_whole_numbers_have_changes_too_and_json_stays_json(tmp_path: Path) -> None:
    nan = torch.tensor([1.0, math.nan])
    first = {"z": torch.zeros(4), "n": nan, "e": torch.zeros(0, 3), "i": torch.arange(5), "t": torch.tensor([True])}
    second = {"z": torch.ones(4), "n": nan * 2, "e": torch.zeros(0, 3), "i": torch.arange(5) + 1, "t": first["t"]}
    save(tmp_path / "a", first)
    save(tmp_path / "b", second)
    found = {one.name: one for one in diff(tmp_path / "a", tmp_path / "b").tensors}
    assert found["z"].relative == math.inf and math.isnan(found["n"].relative) and found["e"].equal
    assert found["i"].largest == 1 and found["t"].relative == 0
    done = call("diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json")
    data = json.loads(done.out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert done.code == 0 and {one["name"] for one in data["tensors"]} == set(first)
    assert ElementTree.fromstring(diff_svg(diff(tmp_path / "a", tmp_path / "b"))).tag.endswith("svg")


def test_the_command_prints_a_table_and_draws_a_picture(tmp_path: Path) -> None:
    done = call("diff", str(MODELS / "base"), str(MODELS / "rotated"), "--svg", str(tmp_path / "x.svg"), "-q")
    assert done.code == 0 and "blocks.2 " in done.out and "head.weight" in done.out, done.err
    picture = ElementTree.parse(tmp_path / "x.svg").getroot()
    names = [one.text for one in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert [name for name in names if name and name.startswith("blocks")] == ["blocks.0", "blocks.1", "blocks.2"]
    gone = call("diff", str(MODELS / "base"), str(tmp_path / "nothing"))
    assert gone.code == 3 and "nothing" in gone.err


def test_a_file_that_is_cut_short_is_an_error_that_names_it(tmp_path: Path) -> None:
    save(tmp_path / "a", model(0))
    file = save(tmp_path / "b", model(1)) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors: is cut short"):
        diff(tmp_path / "a", tmp_path / "b")


# Several models


def test_every_pair_of_the_quickstart_s_models_is_known_for_what_it_is() -> None:
    found = lineage([MODELS / name for name in ("base", *DOMAINS)])
    verdicts = {(Path(one.first).name, Path(one.second).name): one for one in found.relations}
    assert len(verdicts) == 15
    for (first, second), one in verdicts.items():
        assert one.verdict == ("parent and child" if first == "base" else "same parent"), (first, second)
        assert one.cosine > 0.95
    assert all(Path(one.parent).name == "base" for one in found.relations if one.parent)


def test_without_their_base_the_quickstart_s_fine_tunes_are_siblings() -> None:
    found = lineage([MODELS / name for name in DOMAINS])
    assert [one.verdict for one in found.relations] == ["sibling"] * 10


def test_fine_tunes_without_their_parent_are_siblings_and_other_seeds_are_strangers(tmp_path: Path) -> None:
    for seed in range(3):
        base = model(seed)
        for child in range(2):
            save(tmp_path / f"{seed}{child}", moved(base, 100 + 10 * seed + child, 0.3))
    names = [f"{seed}{child}" for seed in range(3) for child in range(2)]
    found = lineage([tmp_path / name for name in names])
    for one in found.relations:
        first, second = Path(one.first).name, Path(one.second).name
        assert one.verdict == ("sibling" if first[0] == second[0] else "stranger"), (first, second)


def test_a_model_is_the_same_as_itself_and_a_child_of_its_parent_in_any_order(tmp_path: Path) -> None:
    base = model(0)
    save(tmp_path / "base", base)
    for name, seed, by in (("a", 1, 0.05), ("b", 2, 0.2), ("c", 3, 0.02)):
        save(tmp_path / name, moved(base, seed, by))
    save(tmp_path / "copy", moved(base, 2, 0.2))
    for order in itertools.permutations(("base", "a", "b", "c")):
        found = lineage([tmp_path / name for name in order])
        assert {Path(one.first).name for one in found.relations if one.verdict == "parent and child"} == {"base"}
        assert sum(one.verdict == "same parent" for one in found.relations) == 3
    (one,) = lineage([tmp_path / "b", tmp_path / "copy"]).relations
    assert one.verdict == "same" and one.distance == 0


def test_what_shows_it_is_printed_and_what_cannot_show_it_is_refused(tmp_path: Path) -> None:
    words = [str(MODELS / name) for name in ("base", "rotated", "rolled")]
    done = call("lineage", *words, "-q")
    assert done.code == 0 and "parent of" in done.out and "median of 4 matrices" in done.out, done.err
    assert re.search(r"at .*base: 0\.\d\d to 0\.\d\d", done.out)
    data = json.loads(call("lineage", *words, "--json").out)
    assert [one["verdict"] for one in data["relations"]] == ["parent and child", "parent and child", "same parent"]
    assert data["thresholds"]["strangers_below"] == STRANGERS and len(data["angles"]) == 3
    with pytest.raises(RecipeError, match="two models or more"):
        lineage([MODELS / "base"])
    save(tmp_path / "thin", {"w": torch.ones(5)})
    with pytest.raises(InputError, match="no matrix in common"):
        lineage([MODELS / "base", tmp_path / "thin"])


# Before an average


def recipe(folder: Path, **nodes: object) -> Path:
    (folder / "merge.yaml").write_text(
        json.dumps({"recipe": 1, "models": {"a": "./a", "b": "./b"}, "nodes": nodes or {"m": MEAN}})
    )
    return folder / "merge.yaml"


MEAN = {"op": "linear", "inputs": ["a", "b"]}


def test_plan_run_lock_and_check_warn_of_strangers_and_of_no_one_else(tmp_path: Path) -> None:
    save(tmp_path / "a", {name: one.bfloat16() for name, one in model(0).items()})
    save(tmp_path / "b", {name: one.bfloat16() for name, one in model(1).items()})
    path = recipe(tmp_path)
    done = call("plan", str(path), "-o", str(tmp_path / "out"))
    assert (
        done.code == 0 and "'a' and 'b' look like strangers" in done.out and "KiB of weights were sampled" in done.out
    )
    assert "look like strangers" in call("run", str(path), "-o", str(tmp_path / "out"), "-q").err
    for command in ("lock", "check"):
        done = call(command, str(path), "-q", "--scratch", str(tmp_path))
        assert done.code == 0 and done.err.count("look like strangers") == 1
    save(tmp_path / "b", {name: one.bfloat16() for name, one in moved(model(0), 5, 0.4).items()})
    done = call("plan", str(path), "-o", str(tmp_path / "other"))
    assert "strangers" not in done.out and "KiB of weights were sampled" in done.out
    assert not run(load_recipe(path), tmp_path / "other").warnings


def test_the_quickstart_is_planned_without_a_warning() -> None:
    found = sample(plan(load_recipe(MODELS.parent / "merge.yaml")))
    assert not found.warnings and 0 < found.size < 6 * 8 * 4096 * 4


@pytest.mark.parametrize(
    "nodes",
    [
        {"m": {"op": "select", "rules": [{"match": "*.norm.*", "model": "a"}, {"model": "b"}]}},
        {"m": {"op": "passthrough", "model": "a"}},
    ],
    ids=["select", "passthrough"],
)
def test_nothing_is_read_where_nothing_is_averaged(tmp_path: Path, nodes: dict[str, object]) -> None:
    save(tmp_path / "a", model(0))
    save(tmp_path / "b", model(1))
    assert sample(plan(load_recipe(recipe(tmp_path, **nodes)))).size == 0


def test_the_sample_is_small_however_large_the_models_are(tmp_path: Path) -> None:
    save(tmp_path / "a", model(0, layers=30, width=256))
    save(tmp_path / "b", model(1, layers=30, width=256))
    found = sample(plan(load_recipe(recipe(tmp_path))))
    assert found.size == 2 * 8 * 4096 * 4 and len(found.warnings) == 1


def test_models_too_small_to_tell_are_left_alone(tmp_path: Path) -> None:
    save(tmp_path / "a", {"w": torch.randn(16, 16)})
    save(tmp_path / "b", {"w": torch.randn(16, 16)})
    assert not sample(plan(load_recipe(recipe(tmp_path)))).warnings

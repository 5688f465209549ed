"""Verify through the command line and as a function: what was written is good, and whatever was changed is found and named."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import files_of, save, weights_of
from toys import call, environment, lora_arrays, write_adapter, write_toys

from mergeflow import InputError, MachineError, RecipeError, load_recipe, manifest, run, verify
from mergeflow.manifest import MANIFEST, decode_manifest, encode_manifest

NODES = "nodes: {mean: {op: linear, inputs: [a, b]}, ties: {op: ties, base: base, inputs: [a, b], density: 0.5}}\n"
MODELS = "models: {base: ./base, a: ./a, b: ./b}\n"
RECIPES = {
    "one": f"recipe: 1\nname: one\n{MODELS}{NODES}output: {{node: ties}}\n",
    "shards": f"recipe: 1\nname: shards\n{MODELS}{NODES}output: {{node: mean, shard_size: 200B}}\n",
    "two": f"recipe: 1\nname: two\n{MODELS}{NODES}outputs: {{mean: {{node: mean}}, ties: {{node: ties}}}}\n",
    "delta": f"recipe: 1\nname: delta\n{MODELS}nodes: {{d: {{op: task_vector, base: base, model: a}}}}\noutput: {{node: d}}\n",
    "artifact": f"recipe: 1\nname: kept\n{MODELS}nodes: {{kept: {{op: emr, base: base, inputs: [a, b]}}}}\n",
    "lora": "recipe: 1\nname: lora\nmodels: {base: ./base, l: {adapter: ./adapter}}\n"
    "nodes: {m: {op: add, base: base, inputs: [l]}}\n",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of all recipes, made once; tests copy what they change."""
    folder = tmp_path_factory.mktemp("made")
    write_toys(folder)
    write_adapter(folder / "adapter", lora_arrays())
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(text)
        run(load_recipe(folder / f"{name}.yaml"), folder / name)
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize("name", RECIPES)
def test_what_was_written_is_good_to_the_last_tensor_made_again(made: Path, name: str) -> None:
    done = call("verify", str(made / name), "--replay", "1000", "-q", "--json")
    found = json.loads(done.out)
    assert done.code == 0 and found["passed"] and not found["notes"], done.out
    assert len(found["replayed"]) == found["tensors"] > 0
    files = files_of(made / name)
    assert found["files"] == len(files) and found["bytes"] == sum(map(len, files.values()))


def flips(folders: list[Path], count: int, seed: int) -> tuple[int, list[str]]:
    """How many of `count` changed bytes, drawn over all bytes of all folders, verify finds; and where it finds none."""
    draw = random.Random(seed)
    files = [(folder, path) for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    sizes = [path.stat().st_size for _, path in files]
    found, missed = 0, []
    for _ in range(count):
        # Half of the places by file, so that small files are met as often as large ones.
        folder, path = draw.choice(files) if draw.random() < 0.5 else draw.choices(files, sizes)[0]
        before = path.read_bytes()
        at = draw.randrange(len(before))
        changed = before[at] ^ draw.randrange(1, 256)
        path.write_bytes(before[:at] + bytes([changed]) + before[at + 1 :])
        problems = verify(folder).problems
        name = str(path.relative_to(folder))
        if any(one.file == name for one in problems):
            found += 1
        else:
            missed.append(f"{name} byte {at}: {problems}")
        path.write_bytes(before)
    assert all(verify(folder).passed for folder in folders)
    return found, missed


def test_a_changed_tensor_is_named_and_the_command_leaves_with_1(here: Path) -> None:
    file = here / "one" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    done = call("verify", str(here / "one"), "-q", "--replay", "3")
    assert done.code == 1
    assert "model.safetensors: tensor 'model.norm.weight' was changed since it was written" in done.out
    assert "nothing was made again" in done.out


def test_missing_and_longer_and_shorter_files_are_problems_and_added_ones_are_notes(here: Path) -> None:
    out = here / "one"
    (out / "config.json").unlink()
    with (out / "recipe.yaml").open("a") as file:
        file.write("#\n")
    os.truncate(out / "model.safetensors", 700)
    (out / "mine").mkdir()
    (out / "mine" / "notes.txt").write_text("x")
    found = verify(out)
    assert {one.file for one in found.problems} == {"config.json", "recipe.yaml", "model.safetensors"}
    assert found.notes == ("mine/notes.txt: was added, and is not mergeflow's",)


def test_an_output_of_several_that_is_gone_is_missed(here: Path) -> None:
    shutil.rmtree(here / "two" / "ties")
    (here / "two" / "by hand").write_text("x")
    found = verify(here / "two")
    assert [one.file for one in found.problems] == ["ties/mergeflow.json"]
    assert found.notes == ("by hand: was added, and is not mergeflow's",)
    assert verify(here / "two" / "mean").passed, "each stands for itself"
    shutil.copytree(here / "two" / "mean", here / "two" / "ties")
    assert "is that of the output 'mean'" in verify(here / "two").problems[0].what


def test_what_is_no_output_is_told_so_with_exit_3(here: Path) -> None:
    for path, what in (
        (here / "base", "no mergeflow.json"),
        (here / "none", "no such folder"),
        (here / "one.yaml", ""),
    ):
        done = call("verify", str(path))
        assert done.code == 3 and what in done.err, done.err


def test_a_manifest_cannot_lead_outside_its_folder(here: Path) -> None:
    told = json.loads((here / "one" / MANIFEST).read_bytes())
    del told["digest"]
    (here / "secret").write_text("x")
    for name in ("../secret", str(here / "secret"), "link", "pipe"):
        told["files"] = {name: manifest.file_facts(b"x")}
        (here / "one" / MANIFEST).write_bytes(encode_manifest(told))
        if name == "link":
            (here / "one" / name).symlink_to(here / "secret")
        if name == "pipe":
            os.mkfifo(here / "one" / name)
        (found,) = (one for one in verify(here / "one").problems)
        assert found.file == name and ("outside" in found.what or "not a regular file" in found.what)


def test_a_whole_manifest_of_another_format_is_an_input_error(here: Path) -> None:
    told = json.loads((here / "one" / MANIFEST).read_bytes())
    del told["digest"]
    (here / "one" / MANIFEST).write_bytes(encode_manifest({**told, "format": 99}))
    with pytest.raises(InputError, match="does not read: format"):
        verify(here / "one")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"\xff", b'{"digest": 1}', b"[" * 100_000, b'{"a": "\\ud800", "digest": ""}']
)
def test_bytes_that_are_no_manifest_are_none(content: bytes) -> None:
    assert decode_manifest(content, "x") is None


# Replay


def replayed(folder: Path, *words: str) -> Any:
    return json.loads(call("verify", str(folder), "-q", "--json", *words).out)["replayed"]


def test_a_replay_draws_by_its_seed(made: Path) -> None:
    draws = {tuple(replayed(made / "two", "--replay", "3", "--seed", str(seed))) for seed in range(6)}
    assert len(draws) > 1 and all(len(one) == 3 for one in draws)
    assert replayed(made / "two", "--replay", "3", "--seed", "4") == replayed(
        made / "two", "--replay", "3", "--seed", "4"
    )


def test_inputs_of_a_replay_that_changed_are_named_with_exit_3(here: Path) -> None:
    changed = weights_of(here / "a")
    changed["model.norm.weight"] = changed["model.norm.weight"] + 1
    shutil.rmtree(here / "a")
    save(here / "a", changed)
    again = call("verify", str(here / "one"), "--replay", "100", "-q")
    assert again.code == 3 and "'a'" in again.err and "since the output was made" in again.err, again.err
    assert call("verify", str(here / "one"), "-q").code == 0, "the output itself is as it was"
    shutil.rmtree(here / "a")
    gone = call("verify", str(here / "one"), "--replay", "1", "-q")
    assert gone.code == 3 and "a: no such file or folder" in gone.err, gone.err


def test_a_weight_that_changed_under_the_same_header_is_named(here: Path) -> None:
    file = here / "b" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    again = call("verify", str(here / "one"), "--replay", "100", "-q")
    assert again.code == 3 and "tensor 'model.norm.weight' of the input 'b' has changed" in again.err, again.err


def test_a_tensor_that_the_recipe_does_not_make_is_found_by_a_replay(here: Path) -> None:
    out = here / "one"
    told = json.loads((out / MANIFEST).read_bytes())
    del told["digest"]
    text = (out / "recipe.yaml").read_text().replace("density: 0.5", "density: 0.25").encode()
    (out / "recipe.yaml").write_bytes(text)
    told["retold"]["recipe.yaml"] = manifest.file_facts(text)
    (out / MANIFEST).write_bytes(encode_manifest(told))
    assert call("verify", str(out), "-q").code == 0
    done = call("verify", str(out), "-q", "--replay", "100")
    assert done.code == 1 and "comes out otherwise when it is made again" in done.out


def test_a_folder_without_a_recipe_cannot_be_made_again(here: Path) -> None:
    out = here / "one"
    told = json.loads((out / MANIFEST).read_bytes())
    del told["digest"], told["retold"]
    (out / MANIFEST).write_bytes(encode_manifest(told))
    with pytest.raises(RecipeError, match="nothing of it can be made again"):
        verify(out, replay=1)


def test_statistics_and_the_artifact_behind_them_are_outputs_like_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_stages import mlp, rows

    monkeypatch.setenv("MERGEFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    mlp(tmp_path / "a", 1)
    rows(tmp_path / "rows.jsonl")
    assert call("stats", "a", "--data", "rows.jsonl", "-o", "s", "-q").code == 0
    kept = [path.parent for path in (tmp_path / "cache").rglob(MANIFEST)]
    assert len(kept) == 1 and all(verify(folder).passed for folder in kept)
    shutil.rmtree(tmp_path / "cache")
    done = call("verify", "s", "-q", "--replay", "100")
    assert done.code == 0 and "made again" in done.out, done.out + done.err
    assert flips([tmp_path / "s"], 40, 3) == (40, [])


# What it takes


def test_tensors_of_many_pieces_are_the_same_for_any_number_of_threads_and_load_no_torch(tmp_path: Path) -> None:
    save(tmp_path / "a", {"w": torch.randn(9_000_000), "e": torch.empty(0, 3), "s": torch.tensor(2.0)})
    (tmp_path / "r.yaml").write_text("recipe: 1\nmodels: {a: ./a}\nnodes: {m: {op: scale, model: a, by: 2.0}}\n")
    run(load_recipe(tmp_path / "r.yaml"), tmp_path / "out")
    assert all(verify(tmp_path / "out", threads=threads).passed for threads in (1, 2, 5))
    code = "import sys, mergeflow; print(mergeflow.verify('out').passed, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "True False", done.stderr


def test_an_output_is_replaced_only_by_one_that_reads_back(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files_of(here / "one")
    recipe = load_recipe(here / "shards.yaml")
    lock = threading.Lock()

    class Wrong:
        """A sink that names another digest than that of the bytes: to the reader a disk that gives other bytes back."""

        def __init__(self, sink: Any) -> None:
            self.memory, self.filled, self.sink = sink.memory, sink.filled, sink

        def row_done(self, row: int, digest: str, inputs: Any) -> None:
            with lock:
                self.sink.row_done(row, digest if row else "0" * 64, inputs)

    with pytest.raises(MachineError, match="does not read back as it was made, so what stood there is kept"):
        run(recipe, here / "one", force=True, watch=lambda plan, sink: Wrong(sink))
    assert files_of(here / "one") == before
    assert run(recipe, here / "one", force=True).made
    assert verify(here / "one", replay=100).passed and files_of(here / "one") != before

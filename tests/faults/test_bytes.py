"""Bytes that are wrong: mutated, flipped, hostile or not finite; and bytes that are the same whatever the way."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_checkpoint
import test_document
import test_recipe
import torch
from checkpoints import files_of, save
from safetensors.torch import load_file
from test_checkpoint import HOSTILE
from test_pickles import try_damaged
from test_verifying import RECIPES, flips, made
from trials import SOON, Trials, emptied, kill, large_at, models_at, needs_strace, noise, traced

from mergeflow import NumericError, load_recipe, run

__all__ = ["made"]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large_at(tmp_path_factory.mktemp("large"))


# Mutated


@pytest.mark.slow
@pytest.mark.parametrize("what", ["safetensors headers", "recipes", "recipes, the whole way", "indexes", "pickles"])
def test_mutated_inputs_give_what_they_say_or_our_error(what: str, tmp_path: Path, record: Any) -> None:
    count, outcome = {
        "safetensors headers": (1_000_000, "no crash, no hang over 1 s, no exception but ours"),
        "recipes": (200_000, "file:line:column and a reason, under 0.2 s"),
        "recipes, the whole way": (100_000, "a place and a reason, under 0.2 s"),
        "indexes": (200_000, "exit code 3 or all tensors"),
        "pickles": (50_000, "tensors within the file or our error, no hang over 1 s"),
    }[what]
    if what == "safetensors headers":
        test_checkpoint.try_mutations(count, seed=2)
    elif what == "recipes":
        test_document.fuzz(count, seed=2)
    elif what == "recipes, the whole way":
        test_recipe.fuzz(count, 2, tmp_path)
    elif what == "indexes":
        test_checkpoint.try_indexes(tmp_path, count, seed=2)
    else:
        assert try_damaged(tmp_path, count, seed=2) > 0
    record(f"mutated {what}", count, count, outcome)


# Flipped


@pytest.mark.parametrize("times", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_verify_finds_each_changed_byte_of_outputs(times: int, made: Path, tmp_path: Path, record: Any) -> None:
    shutil.copytree(made, tmp_path / "here")
    found, missed = flips([tmp_path / "here" / name for name in RECIPES], times, times)
    record("one byte flipped in outputs", times, times, f"verify finds {found}")
    assert (found, missed) == (times, [])


@pytest.mark.parametrize("times", [8, pytest.param(300, marks=pytest.mark.slow)])
def test_a_changed_byte_of_the_journal_or_of_what_it_speaks_of_never_reaches_an_output(
    times: int, large: Path, tmp_path: Path, trials: Trials, record: Any
) -> None:
    """Bytes of a journal, and of the rows that are done, are flipped in what a killed run left; the next run ends right."""
    chance, right = random.Random(times), files_of(large / "right")
    target, staging = tmp_path / "out", tmp_path / ".out.staging"
    argv = ("run", large / "recipe.yaml", "-o", target, "--threads", "2")

    def stop(process: int) -> None:
        journal = staging / "journal.jsonl"
        while not (journal.exists() and journal.read_bytes().count(b"\n") > 8):
            time.sleep(0.001)
        kill(process)

    assert trials(*argv, sync=SOON, pause=0.01, watch=stop).code == -9
    staging.rename(tmp_path / "left")
    files = [path for path in sorted((tmp_path / "left").rglob("*")) if path.is_file() and path.stat().st_size]
    taken_up = 0
    for number in range(times):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(tmp_path / "left", staging)
        path = tmp_path / "left" / "journal.jsonl" if number % 2 else chance.choice(files)
        path = staging / path.relative_to(tmp_path / "left")
        content = bytearray(path.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(bytes(content))
        os.utime(path, (0, 0))  # a claim that now names another host would live for a minute
        ended = trials(*argv, "--json")
        if ended.code == 2:  # the head of the journal speaks of another plan, or the claim is no claim
            assert "--fresh" in ended.said, ended.said
            ended = trials(*argv, "--json", "--fresh")
        assert ended.code == 0, ended.said
        assert files_of(target) == right, path
        taken_up += '"resumed": 0' not in ended.said
    record("one bit flipped in the journal and the rows it speaks of", times, times, "all run on to the right bytes")


# The same whatever the way

OPS = {
    "linear": "{op: linear, inputs: [a, {model: b, weight: 0.3}, c]}",
    "ties": "{op: ties, base: a, inputs: [b, c], density: 0.3}",
    "dare": "{op: dare_ties, base: a, inputs: [b, c], density: 0.5}",
    "slerp": "{op: slerp, t: 0.4, inputs: [a, b]}",
    "della": "{op: della, base: a, inputs: [b, c], density: 0.4}",
    "sce": "{op: sce, base: a, inputs: [b, c], select_topk: 0.2}",
}


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_threads_memory_reading_and_kills_change_no_byte(
    every: bool, tmp_path: Path, trials: Trials, record: Any
) -> None:
    models_at(tmp_path, {f"layers.{i}.w": (300, 700) for i in range(6)} | {"embed": (3000, 700), "norm": (700,)})
    nodes = "\n".join(f"  {name}: {text}" for name, text in OPS.items())
    outputs = "\n".join(f"  {name}: {{node: {name}}}" for name in OPS)
    (tmp_path / "r.yaml").write_text(
        f"recipe: 1\nname: all\nmodels: {{a: ./a, b: ./b, c: ./c}}\nnodes:\n{nodes}\noutputs:\n{outputs}\n"
    )
    ways = list(itertools.product(("1", "2", "4"), ("128MiB", "1GiB"), ("mmap", "pread"), (False, True)))
    chosen = ways if every else [ways[0], ways[7], ways[13], ways[22]]
    target, right = tmp_path / "out", None
    for threads, memory, reading, killed in chosen:
        shutil.rmtree(target, ignore_errors=True)
        argv = ("run", tmp_path / "r.yaml", "-o", target, "--threads", threads, "--memory", memory, "--io", reading)
        if killed:

            def stop(process: int) -> None:
                journal = tmp_path / ".out.staging" / "journal.jsonl"
                while not target.exists() and not (journal.exists() and journal.read_bytes().count(b"\n") > 5):
                    time.sleep(0.001)
                kill(process)

            assert trials(*argv, sync=SOON, pause=0.01, watch=stop).code == -9
        ended = trials(*argv)
        assert ended.code == 0, ended.said
        right = right or files_of(target)
        assert files_of(target) == right, (threads, memory, reading, killed)
    told = "same bytes: threads 1, 2, 4; 128 MiB, 1 GiB; mmap, pread; killed and not"
    record(f"bit identity of {len(OPS)} ops", len(ways), len(chosen), told)


# Not finite


@pytest.mark.parametrize("times", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_each_planted_nan_inf_and_overflow_is_named_and_counted(times: int, tmp_path: Path, record: Any) -> None:
    chance = random.Random(times)
    shapes = {"embed.w": (400, 300), "layers.0.w": (200, 300), "layers.1.w": (7, 11), "norm.w": (13,)}
    kinds: dict[str, float] = {"NaN": torch.nan, "Inf": torch.inf, "overflow": 6e4}
    for _ in range(times):
        models = {m: {n: noise(i, *s, dtype=torch.float16) for i, (n, s) in enumerate(shapes.items())} for m in "ab"}
        kind, name, model = chance.choice(list(kinds)), chance.choice(list(shapes)), chance.choice("ab")
        flat = models[model][name].view(-1)
        places = chance.sample(range(len(flat)), chance.randint(1, 5))
        flat[places] = kinds[kind]
        if kind == "overflow":  # both, so that their sum is beyond float16
            models["b" if model == "a" else "a"][name].view(-1)[places] = kinds[kind]
        for folder, tensors in models.items():
            save(tmp_path / folder, tensors)
        op = "add" if kind == "overflow" else chance.choice(["linear", "ties"])
        node = {
            "add": "{op: linear, inputs: [a, b], weight: 1.0, normalize: false}",
            "linear": "{op: linear, inputs: [a, b]}",
            "ties": "{op: ties, base: a, inputs: [b], density: 0.5}",
        }[op]
        (tmp_path / "r.yaml").write_text(f"recipe: 1\nname: m\nmodels: {{a: ./a, b: ./b}}\nnodes: {{m: {node}}}\n")
        with pytest.raises(NumericError) as raised:
            run(load_recipe(tmp_path / "r.yaml"), tmp_path / "out")
        said = str(raised.value)
        assert name in said and re.search(rf"\b{len(places)}\b", said), (kind, places, said)
        assert raised.value.exit_code == 6 and not (tmp_path / "out").exists()
    record("NaN, Inf and overflow planted", times, times, "all named with tensor and count, nothing published")


@pytest.mark.slow
@pytest.mark.parametrize(("op", "bound"), [("linear", 1.10), ("ties", 1.03)])
def test_looking_for_what_is_not_finite_costs_little(op: str, bound: float, tmp_path: Path, record: Any) -> None:
    models_at(tmp_path, {f"layers.{i}.w": (2048, 4096) for i in range(12)})
    node = "{op: linear, inputs: [a, b, c]}" if op == "linear" else "{op: ties, base: a, inputs: [b, c], density: 0.4}"
    seconds: dict[str, list[float]] = {"error": [], "keep": []}
    for _ in range(7):
        for policy, own in seconds.items():
            (tmp_path / "r.yaml").write_text(
                f"recipe: 1\nname: m\nmodels: {{a: ./a, b: ./b, c: ./c}}\nnodes: {{m: {node}}}\noutput: {{non_finite: {policy}}}\n"
            )
            began = time.process_time()
            run(load_recipe(tmp_path / "r.yaml"), tmp_path / "out", threads=2)
            own.append(time.process_time() - began)
            shutil.rmtree(tmp_path / "out")
    ratio = min(seconds["error"]) / min(seconds["keep"])
    record(
        f"looking for NaN and Inf, {op}",
        f"at most {bound:.2f}",
        "7 times each",
        f"{ratio:.3f} of the processor's time without",
    )
    assert ratio <= bound


# Paths


def hostile(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Models and recipes that lead out of their folders: a name for each, made in `folder` when it is asked for."""
    secret = folder / "secret"
    save(emptied(secret), {"w": torch.ones(4, 4)})
    (secret / "tokenizer.json").write_text("{}")

    def fresh() -> Path:
        model = emptied(folder / "models")
        for name in ("a", "b"):
            save(model / name, {"w": noise(1, 4, 4)}, config={"model_type": "toy"})
        return model

    recipe: dict[str, Any] = {
        "recipe": 1,
        "name": "m",
        "models": {"a": "./models/a", "b": "./models/b"},
        "nodes": {"m": {"op": "linear", "inputs": ["a", "b"]}},
    }
    for name in HOSTILE:
        model = fresh()
        (model / "a" / "model.safetensors").rename(model / "a" / "x-1-of-2.safetensors")
        (model / "a" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
        yield f"index entry {ascii(name)[:40]}", recipe
    for name in (
        "../../secret/model.safetensors", str(secret / "model.safetensors"), "x/../../../secret/model.safetensors",
        "~/x.safetensors", "..\\..\\secret\\model.safetensors", "file:///etc/passwd", "a\x00.safetensors", "../b/model.safetensors",
    ):  # fmt: skip
        fresh()
        yield (
            f"file: {ascii(name)[:40]}",
            {**recipe, "models": {"a": {"path": "./models/a", "file": name}, "b": "./models/b"}},
        )
    for name in ("../../secret", str(secret), "..", "a/../../../secret", "\x00"):
        fresh()
        yield (
            f"subfolder: {ascii(name)[:40]}",
            {**recipe, "models": {"a": {"path": "./models/a", "subfolder": name}, "b": "./models/b"}},
        )
    for link in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        model = fresh()
        (model / "a" / link).unlink(missing_ok=True)
        there = secret / (link if (secret / link).exists() else "tokenizer.json")
        (model / "a" / link).symlink_to(there)
        yield f"a link {link} that leads out", recipe
    model = fresh()
    (model / "a" / "model.safetensors").unlink()
    os.mkfifo(model / "a" / "model.safetensors")
    yield "a pipe for a model", recipe
    for name in ("../out", "/tmp/x", "a/../../x", "..", "a\\..\\..\\x"):
        fresh()
        yield f"output {name!a}", {**recipe, "outputs": {name: {"node": "m"}}}
    for name in ("../m", "/m", "m/../../x", ".m", "m\n"):
        fresh()
        yield f"recipe name {name!a}", {**recipe, "name": name}


@pytest.mark.parametrize("part", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_no_hostile_path_is_opened(part: int, tmp_path: Path, trials: Trials, record: Any) -> None:
    """Every file that the process opens is traced: none is that which the path leads to."""
    needs_strace()
    count = refused = 0
    for number, (what, recipe) in enumerate(hostile(tmp_path)):
        if number % part:
            continue
        (tmp_path / "r.yaml").write_text(json.dumps(recipe))
        parent = emptied(tmp_path / "parent")
        ended, calls = traced(
            trials, tmp_path, ("openat", "open", "openat2"), "run", tmp_path / "r.yaml", "-o", parent / "out", pause=0
        )
        assert ended.code in (0, 2, 3), (what, ended)
        opened = [one.text for one in calls if str(tmp_path / "secret") in one.text or "/etc/passwd" in one.text]
        assert not opened, (what, opened)
        allowed = (str(parent), str(trials.folder), "/dev/null", "/tmp/mergeflow-")
        written = [one.text for one in calls if "O_CREAT" in one.text and not any(at in one.text for at in allowed)]
        assert not written, (what, written)
        assert ended.said.replace("\n", "").isprintable(), (what, ended.said)
        if ended.code == 0:  # what is beside weights, and not inside, is left out
            assert not (parent / "out" / "tokenizer.json").exists(), what
            assert load_file(parent / "out" / "model.safetensors")["w"].shape == (4, 4), what
        else:
            assert not list(parent.iterdir()), what
            refused += 1
        count += 1
    record("hostile paths", "60 cases", count, f"{refused} refused, nothing outside the roots opened or written")

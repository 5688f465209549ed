"""Whole commands over repositories of a hub that is a small server on this machine: what they fetch, pin and say."""

from __future__ import annotations

import json
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from hub_server import HubServer
from safetensors.numpy import load_file, save

SHARDS, SHARD = 4, 1_000_000
CONFIG = {"model_type": "toy", "architectures": ["Toy"], "dtype": "float32"}
RECIPE = """\
recipe: 1
name: merged
models: {a: org/a, b: "org/b@v2"}
nodes:
  merged: {op: linear, inputs: [a, b]}
"""


def repository(fill: float, elements: int = SHARD // 4) -> dict[str, bytes]:
    """The files of a repository of four shards, each of one tensor."""
    names = [f"model-{i + 1:05}-of-{SHARDS:05}.safetensors" for i in range(SHARDS)]
    tensors = [f"model.layers.{i}.weight" for i in range(SHARDS)]
    value = np.full((elements // 1000, 1000), fill, dtype=np.float32)
    return {
        "README.md": b"# A model\n",
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors.index.json": json.dumps(
            {"metadata": {}, "weight_map": dict(zip(tensors, names, strict=True))}
        ).encode(),
        "tokenizer.json": json.dumps({"model": {"vocab": {str(i): i for i in range(2000)}}}).encode(),
        **{name: save({tensor: value}) for tensor, name in zip(tensors, names, strict=True)},
    }


def serving(elements: int = SHARD // 4) -> HubServer:
    a, b = repository(1, elements), repository(3, elements)
    return HubServer({"org/a": a, "org/b@v2": b, "org/b": {"config.json": b"{}"}})


@pytest.fixture
def server() -> Iterator[HubServer]:
    with serving() as running:
        yield running


def mergeflow(
    server: HubServer, folder: pathlib.Path, *words: str, recipe: str = RECIPE, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A command in a process whose hub is the server and whose cache is in the folder."""
    (folder / "recipe.yaml").write_text(recipe)
    return subprocess.run(
        [sys.executable, "-m", "mergeflow", *words],
        cwd=folder,
        env=server.environment(folder / "home", **environment),
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_plan_over_two_repositories_fetches_under_a_hundredth_of_their_bytes(tmp_path: pathlib.Path) -> None:
    with serving(elements=1_250_000) as server:
        done = mergeflow(server, tmp_path, "plan", "recipe.yaml", "--json")
        assert done.returncode == 0, done.stderr
        plan = json.loads(done.stdout)
        total = sum(len(content) for files in server.commits.values() for content in files.values())
        assert total > 40_000_000
        assert plan["bytes_in"] == 2 * SHARDS * 5_000_000
        assert 0 < server.bytes_served < total / 100
        assert plan["models"]["a"]["revision"] == server.commit("org/a")
        assert plan["models"]["b"]["revision"] == server.commit("org/b", "v2")


def test_a_run_pins_revisions_and_offline_it_runs_again(server: HubServer, tmp_path: pathlib.Path) -> None:
    done = mergeflow(server, tmp_path, "run", "recipe.yaml", "-o", "out")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    merged = load_file(out / "model-00002-of-00004.safetensors")
    assert (merged["model.layers.1.weight"] == 2).all()
    commits = {"a": server.commit("org/a"), "b": server.commit("org/b", "v2")}
    manifest = json.loads((out / "mergeflow.json").read_text())
    for name, commit in commits.items():
        assert manifest["inputs"][name]["revision"] == commit
        for file in manifest["inputs"][name]["files"].values():
            assert re.fullmatch(r"[0-9a-f]{64}", file["sha256"])
    card = (out / "README.md").read_text()
    assert "org/a" in card and "org/b" in card and "base_model_relation: merge" in card
    assert commits["a"] is not None and commits["a"][:7] in card
    assert commits["b"] is not None and commits["b"][:7] in card
    assert str(tmp_path) not in card
    server.reset()
    again = mergeflow(server, tmp_path, "run", "recipe.yaml", "-o", "again", "-q", HF_HUB_OFFLINE="1")
    assert (again.returncode, server.requests) == (0, []), again.stderr
    for file in sorted(out.iterdir()):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_a_run_fetches_only_the_shards_that_its_rows_need(server: HubServer, tmp_path: pathlib.Path) -> None:
    recipe = RECIPE.replace("a: org/a", "a: {path: org/a, only: '*.layers.1.*'}").replace(
        'b: "org/b@v2"', "b: {path: org/b, revision: v2, only: '*.layers.1.*'}"
    )
    done = mergeflow(server, tmp_path, "run", "recipe.yaml", "-o", "out", recipe=recipe)
    assert done.returncode == 0, done.stderr
    cached = {path.name for path in (tmp_path / "home").rglob("*.safetensors")}
    assert cached == {"model-00002-of-00004.safetensors"}
    assert server.bytes_served < 2 * SHARD + 300_000
    written = [path for path in (tmp_path / "out").iterdir() if path.suffix == ".safetensors"]
    assert len(written) == 1 and list(load_file(written[0])) == ["model.layers.1.weight"]


def test_a_repository_that_only_gives_its_config_is_not_downloaded(server: HubServer, tmp_path: pathlib.Path) -> None:
    recipe = RECIPE.replace("inputs: [a, b]", "inputs: [b, b]") + "output: {node: merged, like: a}\n"
    done = mergeflow(server, tmp_path, "run", "recipe.yaml", "-o", "out", "-q", recipe=recipe)
    assert done.returncode == 0, done.stderr
    assert server.bytes_served < 4 * SHARD + 300_000


def test_a_branch_that_moves_is_another_plan(server: HubServer, tmp_path: pathlib.Path) -> None:
    first = json.loads(mergeflow(server, tmp_path, "plan", "recipe.yaml", "--json").stdout)
    server.push("org/b", repository(5), "v2")
    second = json.loads(mergeflow(server, tmp_path, "plan", "recipe.yaml", "--json").stdout)
    assert first["digest"] != second["digest"]
    assert second["models"]["b"]["revision"] == server.commit("org/b", "v2")


@pytest.mark.parametrize(
    ("old", "new", "code", "message"),
    [
        ("org/a", "org/aa", 3, "recipe.yaml:3:13: org/aa: the hub has no repository 'org/aa', or it is private. "),
        ("org/b@v2", "org/b@v9", 3, "recipe.yaml:3:23: org/b@v9: the repository has no revision 'v9'. "),
        ("a: org/a", "a: {path: org/a, file: x.safetensors}", 3, "x.safetensors: no such file in the repository"),
        ("a: org/a", "a: {path: org/a, subfolder: vae}", 3, "the repository has no folder 'vae'"),
        ('"org/b@v2"', "org/b", 3, "recipe.yaml:3:23: org/b: holds no .safetensors file. "),
    ],
    ids=["repository", "revision", "file", "folder", "weights"],
)
def test_what_the_hub_has_not_is_said_before_anything_is_fetched(
    old: str, new: str, code: int, message: str, server: HubServer, tmp_path: pathlib.Path
) -> None:
    done = mergeflow(server, tmp_path, "run", "recipe.yaml", "-o", "out", recipe=RECIPE.replace(old, new))
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr and done.stderr.startswith("recipe.yaml:3:"), done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "recipe.yaml"]
    assert server.bytes_served < 400_000


def test_two_missing_repositories_are_told_together(server: HubServer, tmp_path: pathlib.Path) -> None:
    recipe = RECIPE.replace("org/a", "org/x").replace("org/b@v2", "org/y")
    done = mergeflow(server, tmp_path, "plan", "recipe.yaml", recipe=recipe)
    assert done.returncode == 3
    assert "org/x" in done.stderr and "org/y" in done.stderr and done.stderr.endswith("2 problems\n")


def test_a_server_that_is_gone_is_the_machines_problem(server: HubServer, tmp_path: pathlib.Path) -> None:
    server.die()
    done = mergeflow(server, tmp_path, "run", "recipe.yaml", "-o", "out")
    assert done.returncode == 5
    assert "org/a: the hub cannot be reached" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_a_download_that_breaks_off_publishes_nothing_and_the_next_run_finishes(
    server: HubServer, tmp_path: pathlib.Path
) -> None:
    server.cut = SHARD // 2
    done = mergeflow(server, tmp_path, "run", "recipe.yaml", "-o", "out", "-q")
    assert (done.returncode, done.stdout) == (5, "")
    assert re.search(r"org/[ab]\S*: .*\..* ", done.stderr) and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()
    server.cut = None
    again = mergeflow(server, tmp_path, "run", "recipe.yaml", "-o", "out", "-q")
    assert again.returncode == 0, again.stderr
    assert (load_file(tmp_path / "out" / "model-00004-of-00004.safetensors")["model.layers.3.weight"] == 2).all()


def test_ctrl_c_while_weights_are_fetched_stops_and_the_next_run_goes_on(
    server: HubServer, tmp_path: pathlib.Path
) -> None:
    code = (
        # One call for a line: several threads fetch, and print() writes a line and its end apart.
        "import os, sys, time, mergeflow.cli as cli\n"
        "def update(self, what, done, total):\n    os.write(1, f'{what}\\n'.encode())\n    time.sleep(0.3)\n"
        "cli._Progress.update = update\n"
        "sys.argv = ['mergeflow', 'run', 'recipe.yaml', '-o', 'out', '-q']\ncli.main()\n"
    )
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=server.environment(tmp_path / "home"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "fetch\n"
        running.send_signal(signal.SIGINT)
        out, errors = running.communicate(timeout=60)
    assert (running.returncode, errors) == (130, "stopped. Run the same command again to go on from here.\n")
    assert "write" not in out and not (tmp_path / "out").exists()
    assert mergeflow(server, tmp_path, "run", "recipe.yaml", "-o", "out", "-q").returncode == 0


def test_offline_without_a_cache_says_how_to_fetch(server: HubServer, tmp_path: pathlib.Path) -> None:
    done = mergeflow(server, tmp_path, "plan", "recipe.yaml", HF_HUB_OFFLINE="1")
    assert done.returncode == 5 and server.requests == []
    assert "HF_HUB_OFFLINE" in done.stderr and "hf download org/a" in done.stderr


def test_inspect_reads_a_repository_by_its_headers(server: HubServer, tmp_path: pathlib.Path) -> None:
    done = mergeflow(server, tmp_path, "inspect", "org/b", "--revision", "v2", "--json")
    assert done.returncode == 0, done.stderr
    assert "model.layers.3.weight" in done.stdout and server.bytes_served < 200_000

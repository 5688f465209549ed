"""The benchmark measures what it says: readable models, a meter that sees memory and bytes, a clean floor."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mergeflow import Recipe
from mergeflow.ops import OPS
from mergeflow.ops.statistics import StageOp

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "merge.py"


@pytest.fixture(scope="module")
def merge() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_merge", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_models_are_llama_shaped_and_fine_tunes_stay_near_the_base(merge: ModuleType, tmp_path: Path) -> None:
    shape = merge.Shape(hidden=16, layers=2, ffn=24, vocab=32, heads=2, kv_heads=1)
    folders = merge.make_models(tmp_path, shape, ("base", "a", "b"), shards=1)
    base, a, b = (load_file(folder / "model.safetensors") for folder in folders.values())
    assert base.keys() == shape.tensors().keys()
    assert {name: tuple(tensor.shape) for name, tensor in base.items()} == shape.tensors()
    name = "model.layers.0.mlp.up_proj.weight"
    assert base[name].dtype == torch.bfloat16
    assert 0 < (a[name] - base[name]).float().abs().max() < 0.01
    assert not torch.equal(a[name], b[name])


def test_sharded_models_have_an_index_that_finds_every_tensor(merge: ModuleType, tmp_path: Path) -> None:
    shape = merge.SHAPES["tiny"]
    folder = merge.make_models(tmp_path, shape, ("base",), shards=3)["base"]
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map.keys() == shape.tensors().keys()
    assert len(set(weight_map.values())) == 3
    for name, file in [*weight_map.items()][::500]:
        with safe_open(folder / file, "pt") as shard:
            assert tuple(shard.get_slice(name).get_shape()) == shape.tensors()[name]


def test_planning_has_thirty_thousand_tensors_in_files_without_data(merge: ModuleType, tmp_path: Path) -> None:
    folder = merge.make_models(tmp_path, merge.SHAPES["plan"], ("base",), shards=1, filled=False)["base"]
    file = folder / "model.safetensors"
    assert len(merge.SHAPES["plan"].tensors()) == 30_000
    assert file.stat().st_blocks * 512 < 16_000_000 < file.stat().st_size


def test_the_meter_sees_seconds_memory_and_bytes(merge: ModuleType, tmp_path: Path) -> None:
    code = (
        "import time; held = bytearray(b'x') * (64 << 20)\n"
        f"with open({str(tmp_path / 'file')!r}, 'wb') as file: file.write(held[:1 << 20])\n"
        """time.sleep(0.1); print('{"seconds": {"a": 1}}')"""
    )
    run = merge.measure([sys.executable, "-c", code])
    assert 0.1 < run.wall < 30
    assert 64 << 20 <= run.rss_anon < 200 << 20
    assert run.io["wchar"] >= 1 << 20
    assert merge.timings(run) == {"a": 1.0}


def test_a_process_that_fails_is_told_with_its_last_words(merge: ModuleType) -> None:
    with pytest.raises(merge.Failed, match=r"(?s)exit code 3.*last words"):
        merge.measure([sys.executable, "-c", "import sys; print('last words', file=sys.stderr); sys.exit(3)"])


def test_a_floor_names_both_ways_to_write_and_leaves_no_file(merge: ModuleType, tmp_path: Path) -> None:
    shape = merge.Shape(hidden=16, layers=2, ffn=24, vocab=32, heads=2, kv_heads=1)
    folder = merge.make_models(tmp_path, shape, ("base",), shards=1)["base"]
    found = merge.floors([folder], 10_001, tmp_path, pairs=1)
    assert {"mmap + buffered and fdatasync", "pread + buffered and fdatasync"} <= found.keys()
    assert all(seconds["total"] >= seconds["write"] > 0 for seconds in found.values())
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_every_recipe_of_the_benchmark_names_its_own_models(merge: ModuleType) -> None:
    for case in merge.CASES.values():
        shape = merge.SHAPES[case.shape or "small"]
        for told in filter(None, (case.node_of(shape), case.mergekit_of(shape))):
            assert all(f'"{name}"' in json.dumps(told) for name in case.models)


def test_every_op_has_a_case_and_every_case_is_a_recipe(merge: ModuleType) -> None:
    used = set()
    for case in merge.CASES.values():
        for size in ("tinyllama", "small"):
            node = case.node_of(merge.SHAPES[size])
            artifacts = {name: f"./{name}" for name in case.artifacts()}
            beside = {"artifacts": artifacts} if artifacts else {}
            Recipe(models={name: f"./{name}" for name in case.models}, nodes={"merged": node}, **beside)
            used |= set(re.findall(r'"op": "(\w+)"', json.dumps(node)))
    stages = {op.name for op in OPS if issubclass(op, StageOp)}
    assert used == {op.name for op in OPS} - stages and set(merge.NO_CASE) == stages


@pytest.mark.parametrize("name", ["regmean", "fisher"])
def test_what_needs_statistics_runs_on_those_that_are_made_for_it(
    merge: ModuleType, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(merge.SHAPES, "small", merge.Shape(hidden=16, layers=1, ffn=24, vocab=32, heads=2, kv_heads=1))
    options = merge.parse(["--size", "small", "--work", str(tmp_path), "--cases", name, "--pairs", "1"])
    bench = merge.Bench(options)
    bench.report.idle = {"wall": 0.0, "import": 0.0, "rss_anon": 0.0}
    bench.side_by_side(name)
    [run] = bench.report.cases[name]["mergeflow"]
    assert run["wall"] > 0 and run["output"] > 2 * 16 * 32
    assert f"- {name}: on models of 256 dimensions, with statistics of random numbers\n" in merge.as_markdown(
        bench.report
    )


def test_a_whole_table_says_why_stages_are_not_in_it(merge: ModuleType, tmp_path: Path) -> None:
    options = merge.parse(["--size", "small", "--work", str(tmp_path)])
    report = merge.Report(machine=merge.machine(options), idle={"wall": 1.0, "import": 1.0, "rss_anon": 0.0})
    report.cases = {name: {} for name in merge.CASES}
    assert (
        "- regmean_pp, gram, gram_diag, input_mean, act_absmean, fisher_diag, fuse: not measured here"
        in merge.as_markdown(report)
    )
    report.cases.popitem()
    assert "not measured" not in merge.as_markdown(report)


def test_what_runs_on_a_part_of_the_model_says_so_below_the_table(merge: ModuleType, tmp_path: Path) -> None:
    options = merge.parse(["--size", "small", "--work", str(tmp_path), "--cases", "linear"])
    report = merge.Report(machine=merge.machine(options), idle={"wall": 1.0, "import": 1.0, "rss_anon": 0.0})
    run = asdict(merge.Run(2.0, 1.0, 0.5, 1 << 20, dict.fromkeys(("rchar", "read_bytes", "wchar", "write_bytes"), 0)))
    report.cases = {name: {"mergeflow": [run], "about": merge.CASES[name].about} for name in ("tsv", "iso_c")}
    text = merge.as_markdown(report)
    assert "| tsv | mergeflow | 2.00 (2.00-2.00) | 1.50 |" in text
    part = "- tsv, iso_c: only at model.layers.0.self_attn.*, the mean elsewhere, with --memory 2GiB: whole matrices are held\n"
    assert part in text


@pytest.mark.slow
def test_the_benchmark_runs_to_its_table(merge: ModuleType, tmp_path: Path) -> None:
    import subprocess

    command = [sys.executable, SCRIPT, "--size", "small", "--pairs", "1", "--work", tmp_path / "work"]
    done = subprocess.run([*command, "--markdown", tmp_path / "t.md"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "SKIPPED mergekit" in done.stderr
    table = (tmp_path / "t.md").read_text()
    assert all(f"| {op.name} | mergeflow |" in table for op in OPS if op.name not in merge.NO_CASE)
    assert "| tiny | mergeflow |" in table and "| threads | 2 threads |" in table

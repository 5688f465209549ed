"""A merge of inputs larger than the memory that it may have."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoints import save_zeros
from test_pipeline import MIB, anonymous, memory_group
from trials import ROOT

from mergeflow import load_recipe, pipeline, plan

LIMIT = 1024 * MIB
INPUTS, EACH = 4, 2 << 30

CODE = """
import os, sys, json
with open(sys.argv[1] + "/cgroup.procs", "w") as file:
    file.write(str(os.getpid()))
sys.path.insert(0, sys.argv[4])
from mergeflow import load_recipe, run
memory = int(sys.argv[5])
run(load_recipe(sys.argv[6]), sys.argv[3] + ".small", memory=memory, threads=2)  # so that all is loaded that a run needs
recipe = load_recipe(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
run(recipe, sys.argv[3], memory=memory, threads=2)
"""


def recipe_over_zeros(folder: Path, op: str, rows: int, columns: int, layers: int) -> Path:
    """A recipe over models of zeros, which take no room on disk."""
    names = "abcd"[:INPUTS]
    for name in names:
        shapes = {f"layers.{i}.w": (rows, columns) for i in range(layers)}
        save_zeros(folder / name / "model.safetensors", shapes, "BF16", 2)
    base = {} if op == "linear" else {"base": "a"}
    node = {"op": op, "inputs": list(names[len(base) :]), **base}
    models = {name: f"./{name}" for name in names}
    (folder / "r.yaml").write_text(json.dumps({"recipe": 1, "models": models, "nodes": {"m": node}}))
    return folder / "r.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("op", ["linear", "ties"])
def test_eight_gibibytes_are_merged_within_one(op: str, tmp_path: Path, record: Any) -> None:
    recipe = recipe_over_zeros(tmp_path / "large", op, 1 << 15, EACH // 2 // 32 >> 15, 32)
    small = recipe_over_zeros(tmp_path / "small", op, 1 << 10, 256, 2)
    budget = pipeline.Budget.of(plan(load_recipe(recipe)), 256 * MIB, 2)
    with memory_group(LIMIT) as group:
        words = [sys.executable, "-c", CODE, group, recipe, tmp_path / "out", ROOT, 256 * MIB, small]
        process = subprocess.Popen(
            [str(word) for word in words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()
        idle = peak = anonymous(process.pid) or 0
        process.stdin.write("\n")
        process.stdin.flush()
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid) or 0)
            time.sleep(0.003)
        _, said = process.communicate()
        files = (group / "memory.oom_control", group / "memory.events")
        told = "".join(path.read_text() for path in files if path.exists())
    assert process.returncode == 0, said
    assert "oom_kill 0" in told or "oom_kill" not in told
    used, planned = peak - idle, budget.peak
    record(
        f"{INPUTS * EACH >> 30} GiB of input in a control group of {LIMIT >> 30} GiB, {op}",
        "RssAnon within 10%",
        1,
        f"no kill; RssAnon grew by {used / MIB:.0f} MiB from {idle / MIB:.0f}, planned {planned / MIB:.0f}",
    )
    assert used <= 1.1 * planned
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) > EACH

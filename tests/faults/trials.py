"""Merges that are harmed on purpose: models to merge, and processes to run `mergeflow` in that may be killed or traced.

A trial is a fork of one server that has imported torch and mergeflow: it costs tenths of a second in place of three. A
trial may be held before its first step until a tracer has taken hold of it. One that hangs is killed, and is a failure.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save, save_sharded
from torch import Tensor

from mergeflow import load_recipe, run

ROOT = Path(__file__).parent.parent.parent
LONGEST = 120.0
"""Seconds after which a trial hangs."""
SOON = (400_000, 0.01)
"""The journal is kept after so many bytes or seconds, so that there is something to go on from."""

SERVER = """
import json, os, sys, time
sys.path.insert(0, {root!r})
sys.dont_write_bytecode = True  # a trial writes nothing but its output
import torch
torch.set_num_threads(1)
import mergeflow, mergeflow.pipeline, mergeflow.executing, mergeflow.publishing, mergeflow.locking
from mergeflow import cli, executing
from mergeflow.writing import staging
for line in sys.stdin:
    task = json.loads(line)
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        said = os.open(task["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1), os.dup2(said, 2)
        staging.SYNC_BYTES, staging.SYNC_SECONDS = task["sync"]
        if task["pause"]:
            update = cli._Progress.update
            def slowly(self, what, done, total):
                time.sleep(task["pause"])
                update(self, what, done, total)
            cli._Progress.update = slowly
        if task["harm"]:
            exec(task["harm"], dict(task=task))
        while task["hold"] and not os.path.exists(task["hold"]):
            time.sleep(0.002)  # by calls that no trial harms
        sys.argv = ["mergeflow", *task["argv"]]
        cli.program()
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """How a trial ended: its exit code (-9 for SIGKILL), what it said, how long it took."""

    code: int
    said: str
    seconds: float


class Trials:
    """`mergeflow` in forks; `watch(process)` is called once a trial has begun."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER.format(root=str(ROOT))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        self.server.communicate()

    def __call__(
        self,
        *argv: object,
        watch: Callable[[int], None] = lambda process: None,
        sync: tuple[int, float] = (256_000_000, 5.0),
        pause: float = 0.0,
        hold: Path | None = None,
        harm: str = "",
    ) -> Ended:
        assert self.server.stdin is not None and self.server.stdout is not None
        said = self.folder / "said"
        task = {
            "argv": [str(word) for word in argv],
            "said": str(said),
            "sync": sync,
            "pause": pause,
            "hold": str(hold) if hold else "",
            "harm": harm,
        }
        self.server.stdin.write(json.dumps(task) + "\n")
        self.server.stdin.flush()
        child = int(self.server.stdout.readline())
        began = time.monotonic()
        hung = threading.Timer(LONGEST, kill, (child,))
        hung.start()
        try:
            watch(child)
            code = int(self.server.stdout.readline())
        finally:
            hung.cancel()
        seconds = time.monotonic() - began
        assert seconds < LONGEST, f"{argv} hung for {seconds:.0f} s and was killed"
        return Ended(code, said.read_text(errors="replace"), seconds)


def kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def handles(process: int, sign: int) -> bool:
    """Whether a process takes a signal up itself, as a run does from when it claims its target; so does one that has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return True
    caught = re.search(r"^SigCgt:\s*(\w+)$", status, re.MULTILINE)
    return caught is None or bool(int(caught[1], 16) >> (sign - 1) & 1)


# What is merged


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def models_at(folder: Path, shapes: Mapping[str, tuple[int, ...]], names: str = "abc", shards: int = 1) -> None:
    for i, name in enumerate(names):
        tensors = {key: noise(100 * i + j, *shape) for j, (key, shape) in enumerate(shapes.items())}
        if shards > 1:
            save_sharded(folder / name, tensors, shards)
        else:
            save(folder / name, tensors, config={"model_type": "toy"})


RECIPE = """
recipe: 1
vars: {density: 0.4}
models: {a: MODELS/a, b: MODELS/b, c: MODELS/c}
nodes: {m: {op: ties, base: a, inputs: [b, c], density: "${density}"}}
output: {shard_size: SIZE}
"""


def recipe_at(folder: Path, shard_size: str) -> Path:
    """A recipe over the models `a`, `b` and `c` here, by whole paths: wherever it is run, each file is to be the same."""
    (folder / "recipe.yaml").write_text(RECIPE.replace("SIZE", shard_size).replace("MODELS", str(folder)))
    return folder / "recipe.yaml"


def large_at(folder: Path) -> Path:
    """Three models of 12 MB, a recipe of three shards, and its outputs in `right` and (of another plan) `old`."""
    models_at(folder, {f"layers.{i}.w": (200, 1000) for i in range(30)})
    recipe = recipe_at(folder, "5MB")
    run(load_recipe(recipe), folder / "right", threads=1)
    run(load_recipe(recipe, settings={"density": 0.9}), folder / "old", threads=1)
    return folder


def small_at(folder: Path) -> Path:
    """Three models of 100 kB, a recipe of two shards, and its outputs in `right` and (of another plan) `old`."""
    models_at(folder, {f"layers.{i}.w": (50, 101) for i in range(10)})
    recipe = recipe_at(folder, "60KB")
    run(load_recipe(recipe), folder / "right", threads=1)
    run(load_recipe(recipe, settings={"density": 0.9}), folder / "old", threads=1)
    return folder


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


# strace


def needs_strace() -> None:
    """Skip, with the reason, where no process can be traced."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed: faults of system calls are not tried")
    tried = subprocess.run(
        ["strace", "-e", "inject=getppid:error=EIO", "true"], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if tried.returncode:
        last = (tried.stderr.strip().splitlines() or ["no reason given"])[-1]
        pytest.skip(f"strace cannot trace here ({last}): faults of system calls are not tried")


@dataclass(frozen=True)
class Call:
    """A system call as strace saw it: the how manieth of its name in its thread, and whether a fault was put in."""

    thread: int
    name: str
    number: int
    text: str
    injected: bool


def traced(
    trials: Trials, folder: Path, calls: Sequence[str], *argv: object, inject: Sequence[str] = (), **options: Any
) -> tuple[Ended, list[Call]]:
    """A trial under strace, from its first step on; `inject` has what `-e inject=` takes."""
    gate, log = folder / "gate", folder / "strace.log"
    gate.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    tracers: list[subprocess.Popen[str]] = []

    def watch(process: int) -> None:
        words = ["strace", "-f", "-y", "-s", "1", "-o", str(log), "-e", f"trace={','.join(calls)}", "-e", "signal=none"]
        tracer = subprocess.Popen(
            [*words, *(word for one in inject for word in ("-e", f"inject={one}")), "-p", str(process)],
            stderr=subprocess.PIPE,
            text=True,
        )
        tracers.append(tracer)
        assert tracer.stderr is not None
        told = tracer.stderr.readline()
        assert "attached" in told, told
        gate.touch()

    ended = trials(*argv, watch=watch, hold=gate, **options)
    tracers[0].communicate()
    return ended, list(_calls(log.read_text(errors="replace")))


def _calls(text: str) -> Iterator[Call]:
    counts: Counter[tuple[int, str]] = Counter()
    unfinished: dict[int, str] = {}
    for line in text.splitlines():
        found = re.match(r"(\d+) +(?:(\w+)\(|<\.\.\. (\w+) resumed>)", line)
        if found is None:
            continue
        thread, name = int(found[1]), found[2] or found[3]
        if found[2]:
            counts[thread, name] += 1
            if "<unfinished ..." in line:
                unfinished[thread] = line
                continue
        yield Call(thread, name, counts[thread, name], unfinished.pop(thread, "") + line, "(INJECTED)" in line)
    for thread, line in unfinished.items():  # what a kill cut off
        name = line.split()[1].partition("(")[0]
        yield Call(thread, name, counts[thread, name], line, False)

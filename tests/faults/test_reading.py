"""Inputs that change while they are read are errors that name the file; wrong tensors never come of it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from checkpoints import files_of
from trials import Trials, large_at

HARMS = ("truncated", "replaced", "overwritten")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large_at(tmp_path_factory.mktemp("large"))


def harm(kind: str, path: Path, chance: random.Random) -> None:
    size = path.stat().st_size
    if kind == "truncated":
        os.truncate(path, chance.randrange(size))
    elif kind == "replaced":
        other = path.with_suffix(".new")
        shutil.copyfile(path, other)
        with other.open("r+b") as file:
            file.seek(size // 2)
            file.write(b"\x3f" * (size - size // 2))
        other.replace(path)
    else:
        with path.open("r+b") as file:
            file.seek(chance.randrange(4096, size))
            file.write(b"\x3f" * 4096)
            os.ftruncate(file.fileno(), size)


@pytest.mark.parametrize("reading", ["mmap", "pread"])
@pytest.mark.parametrize("kind", HARMS)
@pytest.mark.parametrize("times", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_an_input_that_changes_while_it_is_read_gives_no_wrong_tensor(
    times: int, kind: str, reading: str, large: Path, tmp_path: Path, trials: Trials, record: Any
) -> None:
    chance = random.Random(f"{kind} {reading} {times}")
    right, target = files_of(large / "right"), tmp_path / "out"
    argv = ("run", large / "recipe.yaml", "-o", target, "--threads", "2", "--io", reading)
    trials(*argv, pause=0.002)
    shutil.rmtree(target)
    whole = trials(*argv, pause=0.002).seconds
    outcomes: Counter[str] = Counter()
    for _ in range(times):
        shutil.rmtree(target, ignore_errors=True)
        path = large / chance.choice("abc") / "model.safetensors"
        kept, status = path.read_bytes(), path.stat()

        def strike(process: int, path: Path = path) -> None:
            while not list(tmp_path.glob(".out.staging/claim.*")) and not target.exists():
                time.sleep(0.001)
            time.sleep(chance.uniform(0, whole / 2))
            harm(kind, path, chance)

        ended = trials(*argv, pause=0.002, watch=strike)
        about = (ended.code, ended.said)
        if ended.code == 0:
            assert files_of(target) == right, about
            outcomes["exit 0, right bytes (it came too late)"] += 1
        elif ended.code == -signal.SIGBUS:
            assert reading == "mmap" and not target.exists(), about
            outcomes["SIGBUS, nothing published"] += 1
        else:
            assert ended.code == 3 and str(path) in ended.said, about
            assert not target.exists(), about
            outcomes["exit 3 with the file's name"] += 1
        path.write_bytes(kept)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # a plan goes by it
        ended = trials(*argv, "--fresh", "--force")
        assert ended.code == 0 and files_of(target) == right, ended.said
    assert outcomes["exit 3 with the file's name"] > times / 3, outcomes
    told = ", ".join(f"{count}: {what}" for what, count in outcomes.most_common())
    record(f"an input {kind} while read, {reading}", "never wrong tensors", times, told)

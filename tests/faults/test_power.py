"""A power cut at any moment: what has a manifest is whole, and the run goes on. Needs root, a loop device, ext4 and xfs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import files_of
from trials import SOON, Trials, large_at

from mergeflow import verify

SHUTDOWN = 0x8004587D
"""EXT4_IOC_SHUTDOWN, and XFS_IOC_GOINGDOWN too."""
NOTHING_MORE = struct.pack("I", 2)
"""Nothing that waits is written, not even the file system's own log."""
SIZES = {"ext4": 128 << 20, "xfs": 320 << 20}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large_at(tmp_path_factory.mktemp("large"))


class Disk:
    """A file system in a file, which can lose its power."""

    def __init__(self, folder: Path, kind: str) -> None:
        if os.geteuid() != 0:
            pytest.skip("a file system cannot be mounted (needs root): power cuts are not tried")
        if shutil.which(f"mkfs.{kind}") is None:
            pytest.skip(f"mkfs.{kind} is not installed: power cuts on {kind} are not tried")
        self.image, self.path = folder / f"{kind}.img", folder / kind
        self.path.mkdir()
        with self.image.open("wb") as file:
            file.truncate(SIZES[kind])
        made = subprocess.run([f"mkfs.{kind}", "-q", str(self.image)], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"mkfs.{kind} fails here ({made.stderr.strip()}): power cuts on {kind} are not tried")
        tried = self.mount()
        if tried.returncode:
            pytest.skip(f"an image of {kind} cannot be mounted here ({tried.stderr.strip()}): power cuts are not tried")

    def mount(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["mount", "-o", "loop", str(self.image), str(self.path)], capture_output=True, text=True)

    def cut(self) -> None:
        """Lose the power now: what was not durable is gone."""
        opened = os.open(self.path, os.O_RDONLY)
        with contextlib.suppress(OSError):
            fcntl.ioctl(opened, SHUTDOWN, NOTHING_MORE)
        os.close(opened)

    def unmount(self) -> None:
        for _ in range(100):
            if subprocess.run(["umount", str(self.path)], capture_output=True).returncode == 0:
                return
            time.sleep(0.05)
        subprocess.run(["umount", "-l", str(self.path)], check=True)

    def again(self) -> None:
        """The machine starts again."""
        self.unmount()
        mounted = self.mount()
        assert mounted.returncode == 0, mounted.stderr


@pytest.fixture(params=["ext4", "xfs"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Disk]]:
    made = Disk(tmp_path, request.param)
    yield request.param, made
    made.unmount()


@pytest.mark.parametrize("times", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_after_a_power_cut_what_has_a_manifest_is_whole(
    times: int, disk: tuple[str, Disk], large: Path, trials: Trials, record: Any
) -> None:
    kind, made = disk
    chance = random.Random(f"{kind} {times}")
    right, target = files_of(large / "right"), made.path / "out"
    argv = ("run", large / "recipe.yaml", "-o", target, "--threads", "2", "--force")
    trials(*argv, sync=SOON, pause=0.002)
    shutil.rmtree(target)
    whole = trials(*argv, sync=SOON, pause=0.002).seconds
    published = before = resumed = 0
    for number in range(times):
        shutil.rmtree(target)
        old = None
        if number % 2:  # over an output of another plan
            shutil.copytree(large / "old", target)
            old = files_of(target)
        os.sync()

        def cut(process: int) -> None:
            time.sleep(chance.uniform(0.1, 1.05) * whole)
            made.cut()

        ended = trials(*argv, sync=SOON, pause=0.002, watch=cut)
        made.again()
        if (target / "mergeflow.json").exists():
            assert verify(target).passed, ended
            assert files_of(target) in (right, old), ended
            published += files_of(target) == right
        else:
            assert not target.exists() and old is None, ended
        before += ended.code != 0
        journal = made.path / ".out.staging" / "journal.jsonl"
        resumed += journal.exists() and journal.read_bytes().count(b"\n") > 1
        ended = trials(*argv)
        assert ended.code == 0 and files_of(target) == right, ended
        assert sorted(path.name for path in made.path.iterdir() if path.name != "lost+found") == ["out"]
    assert before > times / 3, "too many cuts came after the run's end"
    told = f"all verify and go on to the same bytes ({before} in the run, {published} published, {resumed} taken up)"
    record(f"power cut, {kind}", "all verify", times, told)

"""A run that is killed at any moment, or whose system calls fail, never leaves a bad file under a final name, and goes on."""

from __future__ import annotations

import contextlib
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
from trials import SOON, Call, Trials, emptied, handles, kill, large_at, needs_strace, small_at, traced


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large_at(tmp_path_factory.mktemp("large"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_at(tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("times", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_instants_ends_bit_identical(
    times: int, large: Path, tmp_path: Path, trials: Trials, record: Any
) -> None:
    chance = random.Random(times)
    right = files_of(large / "right")
    target = tmp_path / "out"
    argv = ("run", large / "recipe.yaml", "-o", target, "--threads", "2")
    trials(*argv, sync=SOON, pause=0.002)
    shutil.rmtree(target)
    whole = trials(*argv, sync=SOON, pause=0.002).seconds
    killed = resumed = 0
    for number in range(times):
        if number % 2:  # over an output of another plan
            shutil.rmtree(target)
            shutil.copytree(large / "old", target)
            old = files_of(target)
        else:
            shutil.rmtree(target)
            old = None
        kills = chance.choice((1, 1, 2, 3))
        for _ in range(kills):
            wait = chance.uniform(0, whole)

            def stop(process: int, wait: float = wait) -> None:
                time.sleep(wait)
                kill(process)

            ended = trials(*argv, "--force", sync=SOON, pause=0.002, watch=stop)
            assert ended.code in (0, -signal.SIGKILL), ended.said
            killed += ended.code != 0
            if target.exists():
                assert files_of(target) in (right, old), "what stands at the target is whole at every moment"
            else:
                assert old is None
        journal = tmp_path / ".out.staging" / "journal.jsonl"
        resumed += journal.exists() and journal.read_bytes().count(b"\n") > 1
        ended = trials(*argv, "--force")
        assert ended.code == 0, ended.said
        assert files_of(target) == right
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert killed > times / 2
    assert resumed > times / 10, "too few runs had something to go on from for this to prove anything"
    record(
        "kill -9 at random instants, run again",
        times,
        times,
        f"all bit-identical ({killed} kills, {resumed} with rows to go on from)",
    )


CHANGING = (
    *("openat", "fallocate", "pwrite64", "write", "fsync", "fdatasync", "ftruncate"),
    *("rename", "renameat", "renameat2", "mkdir", "mkdirat", "unlink", "unlinkat", "rmdir"),
)


def _on_output(call: Call, parent: Path) -> bool:
    """Whether a call changes files below the target's parent."""
    if str(parent) not in call.text:
        return False
    return call.name != "openat" or any(flag in call.text for flag in ("O_WRONLY", "O_RDWR", "O_CREAT"))


def _moments(trials: Trials, small: Path, folder: Path, over: bool) -> list[tuple[str, int]]:
    """(call, N) of a run that is left alone: the Nth such call of some thread is on the output."""
    parent = emptied(folder / "parent")
    if over:
        shutil.copytree(small / "old", parent / "out")
    argv = ("run", small / "recipe.yaml", "-o", parent / "out", "--threads", "1", "--force")
    ended, calls = traced(trials, folder, CHANGING, *argv, sync=(1, 0.01))
    assert ended.code == 0, ended.said
    return sorted({(call.name, call.number) for call in calls if _on_output(call, parent)})


def _chosen(moments: list[tuple[str, int]], part: int) -> list[tuple[str, int]]:
    """Every `part`th, and the first of each call."""
    first: dict[str, tuple[str, int]] = {}
    for moment in moments:
        first.setdefault(moment[0], moment)
    return sorted({*first.values(), *moments[::part]}) if part > 1 else moments


PARTS = [pytest.param(12, id="some"), pytest.param(1, id="every", marks=pytest.mark.slow)]


@pytest.mark.parametrize("over", [False, True], ids=["new", "over-an-old-one"])
@pytest.mark.parametrize("part", PARTS)
def test_a_run_killed_in_any_call_that_changes_files_goes_on(
    part: int, over: bool, small: Path, tmp_path: Path, trials: Trials, record: Any
) -> None:
    needs_strace()
    right, old = files_of(small / "right"), files_of(small / "old") if over else None
    moments = _moments(trials, small, tmp_path, over)
    todo = _chosen(moments, part)
    if part == 1:  # calls that came in another thread this time, until a run ends by itself
        last = {name: number for name, number in moments}
        todo = todo + [(name, number + more) for name, number in last.items() for more in range(1, 4)]
    killed = 0
    for name, number in todo:
        parent = emptied(tmp_path / "parent")
        if over:
            shutil.copytree(small / "old", parent / "out")
        argv = ("run", small / "recipe.yaml", "-o", parent / "out", "--threads", "1", "--force")
        ended, _ = traced(
            trials, tmp_path, (name,), *argv, inject=[f"{name}:signal=KILL:when={number}"], sync=(1, 0.01)
        )
        assert ended.code in (0, -signal.SIGKILL), (name, number, ended.said)
        killed += ended.code != 0
        if (parent / "out").exists():
            assert files_of(parent / "out") in (right, old), (name, number)
        else:
            assert not over, (name, number)
        ended = trials(*argv)
        assert ended.code == 0, (name, number, ended.said)
        assert files_of(parent / "out") == right, (name, number)
        assert [path.name for path in parent.iterdir()] == ["out"], (name, number)
    assert killed > len(todo) / 2
    kind = "over an old output" if over else "new output"
    asked = f"all of {len(moments):,}"
    record(
        f"SIGKILL at every N of the calls that change files, {kind}",
        asked,
        len(todo),
        f"all bit-identical ({killed} kills)",
    )


@pytest.mark.parametrize("over", [False, True], ids=["new", "over-an-old-one"])
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("part", PARTS)
def test_a_call_that_fails_is_one_line_and_publishes_nothing(
    part: int, error: str, over: bool, small: Path, tmp_path: Path, trials: Trials, record: Any
) -> None:
    needs_strace()
    right, old = files_of(small / "right"), files_of(small / "old") if over else None
    outcomes: Counter[str] = Counter()
    moments = _moments(trials, small, tmp_path, over)
    for name, number in _chosen(moments, part):
        parent = emptied(tmp_path / "parent")
        if over:
            shutil.copytree(small / "old", parent / "out")
        argv = ("run", small / "recipe.yaml", "-o", parent / "out", "--threads", "1", "--force")
        ended, calls = traced(
            trials, tmp_path, (name,), *argv, inject=[f"{name}:error={error}:when={number}"], sync=(1, 0.01)
        )
        hit = [call for call in calls if call.injected]
        about = (name, number, ended.code, ended.said, [call.text for call in hit])
        if not hit or not all(_on_output(call, parent) for call in hit):
            outcomes["another file or no call was hit"] += 1
            continue
        published = (parent / "out").exists() and files_of(parent / "out") == right
        if ended.code == 0:  # cleaning up after the rename, and what has another way
            assert published, about
            outcomes["exit 0, right bytes"] += 1
        else:
            assert ended.code == 5, about
            said = [line for line in ended.said.splitlines() if ": " in line and str(parent) in line]
            assert len(said) == 1, about
            assert not published, about
            assert (files_of(parent / "out") if (parent / "out").exists() else None) == old, about
            outcomes["exit 5, nothing published"] += 1
        ended = trials(*argv)
        assert ended.code == 0, (about, ended.said)
        assert files_of(parent / "out") == right, about
        assert [path.name for path in parent.iterdir()] == ["out"], about
    kind = "over an old output" if over else "new output"
    assert outcomes["exit 5, nothing published"] > 5
    record(
        f"{error} at every Nth operation on the output, {kind}",
        f"all of {len(moments):,}",
        outcomes.total(),
        ", ".join(f"{count}: {what}" for what, count in outcomes.most_common()) + "; all run again to the right bytes",
    )


@pytest.mark.parametrize("part", PARTS)
def test_a_short_write_changes_nothing(part: int, large: Path, tmp_path: Path, trials: Trials, record: Any) -> None:
    """Every write takes at most 5,000 bytes, or as many as a direct write may."""
    harm = (
        "import os\nwrite, pwrite, n = os.write, os.pwrite, [0]\n"
        "def less(most):\n n[0] += 1\n return most if n[0] % 3 else most // 8 * 8\n"
        "os.write = lambda fd, data: write(fd, data[:less(13)]) if fd > 2 else write(fd, data)\n"
        "os.pwrite = lambda fd, data, at: pwrite(fd, data[:less(MOST)], at)\n"
    )
    counts = [1_048_576, 2_000_000, 4096 * 33] if part == 1 else [1_048_576]
    for most in counts:
        target = tmp_path / f"out{most}"
        ended = trials("run", large / "recipe.yaml", "-o", target, harm=harm.replace("MOST", str(most)))
        assert ended.code == 0, ended.said
        assert files_of(target) == files_of(large / "right")
    record("short writes, every write of a run", "every write", f"{len(counts)} runs", "exit 0, same bytes")


@pytest.mark.parametrize("reading", ["mmap", "pread"])
@pytest.mark.parametrize("part", PARTS)
def test_an_input_that_cannot_be_read_ends_in_3_and_its_name(
    part: int, reading: str, large: Path, tmp_path: Path, trials: Trials, record: Any
) -> None:
    needs_strace()
    names, error = (("preadv", "preadv2"), "EIO") if reading == "pread" else (("madvise",), "EFAULT")
    argv = ("run", large / "recipe.yaml", "-o", tmp_path / "out", "--threads", "1", "--io", reading)
    _, calls = traced(trials, tmp_path, names, *argv)
    call = calls[0].name
    populating = [c for c in calls if call != "madvise" or "READ" in c.text or "0x16" in c.text]
    numbers = sorted({c.number for c in populating})
    assert len(numbers) > 10
    step = max(1, len(numbers) // (60 if part == 1 else 5))
    tried = 0
    for number in numbers[::step]:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        ended, calls = traced(trials, tmp_path, (call,), *argv, inject=[f"{call}:error={error}:when={number}"])
        hit = [c for c in calls if c.injected]
        if not hit or any(c.name == "madvise" and not ("READ" in c.text or "0x16" in c.text) for c in hit):
            continue
        tried += 1
        assert ended.code == 3, (number, ended.code, ended.said, [c.text for c in hit])
        said = ended.said.strip().splitlines()[-1]
        assert "model.safetensors" in said, said
        assert not (tmp_path / "out").exists()
        ended = trials(*argv)
        assert ended.code == 0, ended.said
        assert files_of(tmp_path / "out") == files_of(large / "right")
    assert tried
    record(
        f"EIO on an input, {reading}",
        f"of {len(numbers):,}",
        tried,
        "all exit 3 with the file's name, run again to the right bytes",
    )


@pytest.mark.parametrize("times", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_a_signal_ends_a_run_within_five_seconds(
    times: int, large: Path, tmp_path: Path, trials: Trials, record: Any
) -> None:
    chance = random.Random(times)
    slowest = 0.0
    argv = ("run", large / "recipe.yaml", "-o", tmp_path / "out")
    for number in range(times):
        sign = (signal.SIGINT, signal.SIGTERM)[number % 2]
        sent = [0.0]

        def send(process: int, sign: int = sign, sent: list[float] = sent) -> None:
            while not handles(process, signal.SIGTERM):  # Python itself handles SIGINT
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.2))
            sent[0] = time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, sign)

        ended = trials(*argv, pause=0.05, watch=send)
        slowest = max(slowest, time.monotonic() - sent[0])
        assert ended.code == 128 + sign, (ended.code, ended.said)
        assert "Run the same command again to go on from here." in ended.said
        assert not (tmp_path / "out").exists()
    assert slowest < 5
    assert trials(*argv).code == 0
    assert files_of(tmp_path / "out") == files_of(large / "right")
    record("SIGINT and SIGTERM on an element op", "within 5 s", times, f"slowest exit {slowest:.2f} s")

"""Who may write into a staging folder: one process at a time, and no lock that a person must clear.

The process that created the claim with the highest number holds the folder. Creating it is exclusive
(O_EXCL, which every file system has, unlike links and locks); the winner then looks again: where it finds a higher
number, or a lower one that lives, it withdraws and tries again. So a stale claim is taken over by creating the next
number, and of two that try at once only one can succeed; nothing is ever deleted that might be someone's. A claim is
stale when its process is gone, or, for another host or container, when its heartbeat is older than a minute.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mergeflow.errors import ClaimedError, MergeflowError, RecipeError
from mergeflow.writing.disk import created, named, write_all

BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
UNREADABLE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Holder:
    """The process behind a claim; `world` tells one boot and one container from another on hosts of the same name."""

    host: str
    world: str
    pid: int
    start: str

    @classmethod
    def here(cls) -> Holder:
        return cls(socket.gethostname(), _world(), os.getpid(), _process_start(os.getpid()) or "")

    def lives(self, age: float, here: Holder) -> bool:
        if (self.host, self.world) == (here.host, here.world):
            return _process_start(self.pid) in (self.start, "unknown")
        return age <= STALE_SECONDS


class Claim:
    """The right to write into a staging folder; see the module."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._status = os.lstat(path)
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def take(cls, folder: Path, target: Path) -> Claim:
        """Hold `folder`, making it where it is missing; ClaimedError says who holds it."""
        here = Holder.here()
        text = json.dumps({"host": here.host, "world": here.world, "pid": here.pid, "start": here.start}).encode()
        unreadable: dict[int, float] = {}
        while True:
            with named(folder, "cannot be written"):
                with contextlib.suppress(FileExistsError):
                    folder.mkdir()
                if not stat.S_ISDIR(os.lstat(folder).st_mode):
                    raise RecipeError("is in the way, and is not a folder", where=str(folder), fix="Move it away.")
                try:
                    standing = _claims(folder)
                    states = [_claim_state(folder, number, here, unreadable) for number in standing]
                    if living := next((who for who in states if isinstance(who, str)), None):
                        raise ClaimedError(
                            f"is being written by {living}",
                            where=str(target),
                            fix="Wait for it to end, or give another folder with -o.",
                        )
                    if None in states:
                        time.sleep(0.02)
                        continue
                    number = max(standing, default=-1) + 1
                    path = folder / f"claim.{number}"
                    with created(path, exclusive=True) as fd:
                        try:
                            write_all(fd, text)
                        except OSError:
                            path.unlink(missing_ok=True)
                            raise
                    standing = _claims(folder)
                    rivals = [n for n in standing if n < number and _claim_state(folder, n, here, unreadable) != ""]
                    if max(standing, default=-1) == number and not rivals:
                        for lower in standing[:-1]:
                            (folder / f"claim.{lower}").unlink(missing_ok=True)
                        return cls(path)
                    path.unlink(missing_ok=True)
                except FileExistsError:
                    continue  # another one took this number
                except FileNotFoundError:
                    pass  # the folder's holder has just finished and removed it
            time.sleep(random.uniform(0.001, 0.05))

    def beat(self, lost: Callable[[MergeflowError], None]) -> None:
        """Start the heartbeat; `lost` is told when another run took the claim over."""

        def body() -> None:
            while not self._end.wait(BEAT_SECONDS):
                if self.lost():
                    lost(ClaimedError("another run took this output over", where=str(self.path.parent)))
                    return
                with contextlib.suppress(OSError):  # the next beat tries again
                    os.utime(self.path)

        self._thread = threading.Thread(target=body, name="mergeflow-heartbeat", daemon=True)
        self._thread.start()

    def lost(self) -> bool:
        try:
            found = os.lstat(self.path)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return (found.st_dev, found.st_ino) != (self._status.st_dev, self._status.st_ino)

    def release(self) -> None:
        """Give the folder back, and remove it if it is empty."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError):
            if not self.lost():
                self.path.unlink()
            self.path.parent.rmdir()


def is_held(folder: Path) -> bool:
    """Whether a live run holds a folder, or one is just about to."""
    here, unreadable = Holder.here(), dict[int, float]()
    try:
        return any(_claim_state(folder, number, here, unreadable) != "" for number in _claims(folder))
    except OSError:
        return False


def _claims(folder: Path) -> list[int]:
    return sorted(int(name[6:]) for name in os.listdir(folder) if re.fullmatch(r"claim\.\d{1,9}", name))


def _claim_state(folder: Path, number: int, here: Holder, unreadable: dict[int, float]) -> str | None:
    """Who holds this claim, in words; empty when it is stale or gone; None when it must be looked at again.

    A claim without its text belongs to a process between creating and writing it, or to one that died there. It is
    given a second; a process that needed longer finds the next number taken, and withdraws.
    """
    path = folder / f"claim.{number}"
    try:
        age = max(0.0, time.time() - os.lstat(path).st_mtime)
        fields = json.loads(path.read_bytes())
        holder = Holder(str(fields["host"]), str(fields["world"]), int(fields["pid"]), str(fields["start"]))
    except FileNotFoundError:
        return ""
    except (ValueError, TypeError, KeyError):
        since = unreadable.setdefault(number, time.monotonic())
        return None if time.monotonic() - since < UNREADABLE_SECONDS else ""
    if not holder.lives(age, here):
        return ""
    return f"process {holder.pid} on {holder.host} (last sign of life {age:.0f} s ago)"


def _world() -> str:
    """What pids of this process's kind are unique in: one boot of one machine, and one pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _process_start(pid: int) -> str | None:
    """The start time of a process that runs, `unknown` where it cannot be seen, None for one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except (OSError, OverflowError):
        return "unknown"
    return "unknown"

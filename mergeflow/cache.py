"""Where the artifacts of stages lie: a folder each, addressed by the hash of all that went into it.

    $MERGEFLOW_CACHE/artifacts/<key>/        finished, with a manifest; never changed again
    $MERGEFLOW_CACHE/artifacts/.<key>.staging/   what a run makes, or a killed run left (mergeflow.writing)
    $MERGEFLOW_CACHE/work/<key>/             what a stage keeps to go on after a kill: its own business, gone when it is done

The key says what would be made, so that a finished artifact is found before anything runs. This module names places, lists
and clears them; what is in an artifact, its stage knows.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from mergeflow.errors import MachineError

ARTIFACTS, WORK = "artifacts", "work"
KEY = 40
"""Characters of a key: 160 bits in hex."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What lies under a key, finished or not: its folders, bytes on disk, and when it was made or used last (seconds since 1970)."""

    key: str
    paths: tuple[Path, ...]
    size: int
    used: float


def root() -> Path:
    """`$MERGEFLOW_CACHE`, else `~/.cache/mergeflow`. Raises MachineError where there is no home either."""
    given = os.environ.get("MERGEFLOW_CACHE")
    try:
        return Path(given).expanduser() if given else Path.home() / ".cache" / "mergeflow"
    except RuntimeError:
        raise MachineError("there is no home folder for the cache", fix="Set MERGEFLOW_CACHE.") from None


def artifact_key(parts: Mapping[str, Any]) -> str:
    """The key of what is made from these parts: plain data that says all that changes the result."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return blake3(text.encode()).hexdigest()[:KEY]


def artifact_path(key: str) -> Path:
    """Where the artifact of a key lies, or will."""
    return root() / ARTIFACTS / key


def work_path(key: str) -> Path:
    """Where the stage of a key may keep what it needs to go on after a kill."""
    return root() / WORK / key


def mark_used(path: Path) -> None:
    """Note that an artifact was used now; not being able to is no problem."""
    try:
        os.utime(path)
    except OSError:
        return


def entries() -> Iterator[Entry]:
    """The finished artifacts, the one used last first."""
    found = []
    for path in _folders(root() / ARTIFACTS):
        if not path.name.startswith("."):
            found.append(Entry(path.name, (path,), sum(one.st_size for one in _files(path)), path.stat().st_mtime))
    yield from sorted(found, key=lambda entry: (-entry.used, entry.key))


def unfinished() -> Iterator[Entry]:
    """What stages keep that have not come to their end, the one touched last first: by key, whatever there is of it."""
    paths: dict[str, list[Path]] = {path.name: [path] for path in _folders(root() / WORK)}
    for path in _folders(root() / ARTIFACTS):
        if named := re.fullmatch(r"\.(.+)\.(?:staging|gone-\d+)", path.name):
            paths.setdefault(named[1], []).append(path)
    found = []
    for key, own in paths.items():
        files = [one for path in own for one in _files(path)]
        used = max([one.st_mtime for one in files] or [path.stat().st_mtime for path in own])
        found.append(Entry(key, tuple(own), sum(one.st_size for one in files), used))
    yield from sorted(found, key=lambda entry: (-entry.used, entry.key))


def _folders(parent: Path) -> list[Path]:
    return [path for path in parent.iterdir() if path.is_dir() and not path.is_symlink()] if parent.is_dir() else []


def _files(folder: Path) -> list[os.stat_result]:
    """The files below a folder as they were seen; a run may be taking some away meanwhile."""
    found = []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if stat.S_ISREG((seen := path.lstat()).st_mode):
                found.append(seen)
    return found


def clear(*, older_than: float | None = None, keys: frozenset[str] | None = None) -> list[Entry]:
    """Delete finished artifacts, all or those not used for so many seconds, or of these keys; what was deleted.

    A folder is taken out of the way by one rename before it is deleted, so that no half of it looks finished.
    """
    gone = [entry for entry in entries() if _chosen(entry, older_than, keys)]
    for entry in gone:
        _delete(entry.paths[0], entry.key)
    return gone


def clear_unfinished(
    held: Callable[[Path], bool], *, older_than: float | None = None, keys: frozenset[str] | None = None
) -> list[Entry]:
    """Delete what unfinished stages keep, chosen as by `clear`; what was deleted. A folder that is `held` by a live run stays."""
    gone = [entry for entry in unfinished() if _chosen(entry, older_than, keys) and not any(map(held, entry.paths))]
    for entry in gone:
        for path in entry.paths:
            _delete(path, entry.key)
    return gone


def _chosen(entry: Entry, older_than: float | None, keys: frozenset[str] | None) -> bool:
    if older_than is not None and time.time() - entry.used < older_than:
        return False
    return keys is None or entry.key in keys


def _delete(path: Path, key: str) -> None:
    aside = root() / ARTIFACTS / f".{key}.gone-{os.getpid()}"
    try:
        if path != aside:
            aside.parent.mkdir(parents=True, exist_ok=True)
            path.rename(aside)
        shutil.rmtree(aside)
    except OSError as error:
        raise MachineError(f"cannot be deleted: {error.strerror}", where=str(path)) from None

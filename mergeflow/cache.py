"""Where the artifacts of stages lie: a folder each, addressed by the hash of all that went into it.

    $MERGEFLOW_CACHE/artifacts/<key>/        finished, with a manifest; never changed again
    $MERGEFLOW_CACHE/artifacts/.<key>.staging/   what a run makes, or a killed run left (mergeflow.writing)
    $MERGEFLOW_CACHE/work/<key>/             what a stage keeps to go on after a kill: its own business, gone when it is done

The key says what would be made, so that a finished artifact is found before anything runs. This module names places, lists
and clears them; what is in an artifact, its stage knows.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
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
    """A finished artifact: its key, folder, bytes on disk, and when it was made or used last (seconds since 1970)."""

    key: str
    path: Path
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
    folder = root() / ARTIFACTS
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.name.startswith("."):
            files = [one for one in path.rglob("*") if one.is_file() and not one.is_symlink()]
            found.append(Entry(path.name, path, sum(one.stat().st_size for one in files), path.stat().st_mtime))
    yield from sorted(found, key=lambda entry: (-entry.used, entry.key))


def clear(*, older_than: float | None = None, keys: frozenset[str] | None = None) -> list[Entry]:
    """Delete finished artifacts, all or those not used for so many seconds, or of these keys; what was deleted.

    A folder is taken out of the way by one rename before it is deleted, so that no half of it looks finished. What a run is
    making is left alone.
    """
    gone = []
    for entry in list(entries()):
        if older_than is not None and time.time() - entry.used < older_than:
            continue
        if keys is not None and entry.key not in keys:
            continue
        aside = entry.path.with_name(f".{entry.key}.gone-{os.getpid()}")
        try:
            entry.path.rename(aside)
            shutil.rmtree(aside)
            shutil.rmtree(root() / WORK / entry.key, ignore_errors=True)
        except OSError as error:
            raise MachineError(f"cannot be deleted: {error.strerror}", where=str(entry.path)) from None
        gone.append(entry)
    return gone

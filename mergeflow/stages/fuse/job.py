"""What a `fuse` may use of the engine: the models, the data, and a place for what it makes on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeflow.errors import Interrupted
from mergeflow.ops.fuse import Fuse
from mergeflow.stages import Write

if TYPE_CHECKING:
    from mergeflow.recipe.grammar import DataSource

VERSION = 3
"""Of what is kept between runs: goes up whenever its numbers or its form change."""

Kept = Callable[[Mapping[str, Any], Callable[[Path], None]], Path]
"""`kept(parts, make)`: the folder of what these parts decide. Where the cache lacks it, `make` fills a folder, which may hold what
a killed run made of the same, and that folder is published whole."""


@dataclass(frozen=True)
class FuseJob:
    """One fuse. `target` and `sources` are local Hugging Face folders, `digests` what their weights and side files are (the target's
    first); `corpus` says what the data is, `free` how many bytes the cache's disk has left; the rest is as in `StageJob`."""

    op: Fuse
    target: Path
    sources: tuple[Path, ...]
    digests: tuple[str, ...]
    data: DataSource
    corpus: Any
    folder: Path
    work: Path
    write: Write
    kept: Kept
    free: Callable[[], int]
    device: str = "cpu"
    memory: int = 2 << 30
    threads: int = 1
    seed: int = 0
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    stop: threading.Event = field(default_factory=threading.Event)

    def check_stop(self) -> None:
        """Raises Interrupted where the run was asked to stop."""
        if self.stop.is_set():
            raise Interrupted("stopped")

    @property
    def teachers(self) -> tuple[tuple[int, Path, str], ...]:
        """The sources and, where it is one, the start: the position among the op's sources, folder and digest of each."""
        found = [(index, path, self.digests[index + 1]) for index, path in enumerate(self.sources)]
        return (*found, *([(-1, self.target, self.digests[0])] if self.op.self_too else []))

"""Tensors in files beside each other, made one after the other, each whole or not there.

A shard is written beside, made durable and renamed; then a line of the journal tells its digest. A run that goes on after a kill
takes a shard for made only where its bytes have that digest, so none is made twice and no torn one is believed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from mergeflow.errors import InputError
from mergeflow.stages import scratch

if TYPE_CHECKING:
    from torch import Tensor

JOURNAL = "journal.jsonl"


class Shards:
    """The shards of a folder, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[str, str] = {}
        try:
            journal = (folder / JOURNAL).read_bytes()
        except FileNotFoundError:
            journal = b""
        self.torn = not journal.endswith(b"\n") and bool(journal)
        for line in journal.splitlines():
            try:
                told = json.loads(line)
                self.known[str(told["name"])] = str(told["digest"])
            except (ValueError, TypeError, KeyError):
                continue  # torn by a kill: what it would have told is made again

    def has(self, name: str) -> bool:
        """Whether a shard is there, its bytes as they were written."""
        try:
            return name in self.known and _digest(self.folder / name) == self.known[name]
        except OSError:
            return False

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Make a shard. Raises MachineError where the disk is full or fails."""
        path, part = self.folder / name, self.folder / f"{name}.part"
        with scratch.written(path):
            scratch.save(part, {key: one.contiguous() for key, one in tensors.items()})
            digest = _digest(part)
            scratch.durable(part)
            os.replace(part, path)
            with (self.folder / JOURNAL).open("ab") as journal:
                journal.write(b"\n" if self.torn else b"")
                journal.write(json.dumps({"name": name, "digest": digest}).encode() + b"\n")
                journal.flush()
                os.fsync(journal.fileno())
        self.torn = False
        self.known[name] = digest

    def read(self, name: str) -> dict[str, Tensor]:
        """A shard's tensors. Raises InputError where it is damaged."""
        from safetensors.torch import load_file

        try:
            return load_file(self.folder / name)
        except Exception as error:
            raise InputError(
                f"cannot be read: {error}", where=str(self.folder / name), fix="Clear it: `mergeflow cache clear`."
            ) from None


def _digest(path: Path) -> str:
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()

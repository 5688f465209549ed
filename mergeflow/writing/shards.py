"""One shard's file: its space, and its extents written around the page cache where the file system lets us."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mergeflow.digests import PIECE, piece_digest
from mergeflow.writing.disk import REFUSED, allocate, at

if TYPE_CHECKING:
    from mergeflow.graph import Shard

BLOCK = 4096
"""What O_DIRECT wants offsets, lengths and memory to be multiples of; a file system that wants more refuses."""


class ShardFile:
    """One shard's file: its extents by number, written around the page cache where the file system lets us."""

    def __init__(self, folder: Path, shard: Shard, extent: int) -> None:
        self.shard = shard
        self.path = folder / shard.output / shard.file
        self.part = self.path.with_name(f"{self.path.name}.part")
        self.extents = -(-shard.size // extent)
        self.first = 0  # of the extents of all shards, the number of this one's first
        self.dirty = False
        self._extent = extent
        self._direct = hasattr(os, "O_DIRECT") and extent % BLOCK == 0
        self.padded = -(-shard.size // BLOCK) * BLOCK if self._direct else shard.size
        self._fds: dict[bool, int] = {}
        self._opening = threading.Lock()

    def length(self, number: int) -> int:
        return min(self._extent, self.shard.size - number * self._extent)

    def allocated(self) -> int:
        try:
            return os.lstat(self.part).st_blocks * 512
        except FileNotFoundError:
            return 0

    def reserve(self) -> bool:
        """Create the file at its padded size; False where the file system cannot promise the space."""
        fd = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            with at(self.part):
                promised = allocate(fd, self.padded)
                os.ftruncate(fd, self.padded)
        finally:
            os.close(fd)
        return promised

    def has_header(self) -> bool:
        with at(self.part):
            found = os.pread(self._fd(direct=False), len(self.shard.header), 0)
        return found == self.shard.header

    def put_header(self, number: int, view: memoryview) -> None:
        start = number * self._extent
        if start < len(self.shard.header):
            piece = self.shard.header[start : start + self._extent]
            view[: len(piece)] = piece

    def load(self, number: int, view: memoryview) -> None:
        """Read back what the file holds of an extent."""
        with at(self.part):
            done, length = 0, self.length(number)
            while done < length:
                count = os.preadv(self._fd(direct=False), [view[done:length]], number * self._extent + done)
                if not count:
                    raise OSError(errno.EIO, "the file is shorter than it was", str(self.part))
                done += count

    def write(self, number: int, view: memoryview) -> None:
        """Write an extent, honouring short writes; through the cache where direct writing is refused."""
        start, direct, done = number * self._extent, self._direct, 0
        length = min(self._extent, self.padded - start)
        with at(self.part):
            while done < length:
                try:
                    count = os.pwrite(self._fd(direct), view[done:length], start + done)
                except OSError as error:
                    if not direct or error.errno not in REFUSED:
                        raise
                    direct = self._direct = False
                    continue
                if count <= 0:
                    raise OSError(errno.EIO, "a write wrote nothing", str(self.part))
                done += count
                if direct and done < length and done % BLOCK:
                    # A direct write must go on where a block begins; one that got nowhere goes through the cache.
                    direct = count >= BLOCK
                    done -= done % BLOCK

    def sync(self) -> None:
        with at(self.part):
            for fd in list(self._fds.values()):
                os.fdatasync(fd)

    def finish(self) -> None:
        """Cut the padding off, make the file durable, and give it its name."""
        fd = os.open(self.part, os.O_RDWR | os.O_CLOEXEC)
        try:
            with at(self.part):
                os.ftruncate(fd, self.shard.size)
                os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(self.part, self.path)

    def close(self) -> None:
        with self._opening:
            while self._fds:
                os.close(self._fds.popitem()[1])

    def _fd(self, direct: bool) -> int:
        fd = self._fds.get(direct)
        if fd is None:
            with self._opening:
                if direct not in self._fds:
                    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_DIRECT if direct else 0)
                    self._fds[direct] = os.open(self.part, flags)
                fd = self._fds[direct]
        return fd


def piece_digests(reader: int, start: int, size: int) -> Iterator[bytes]:
    """The digests of a tensor's pieces, read from a file at `start`; a file that is too short gives other ones."""
    buffer = memoryview(bytearray(min(size, PIECE)))
    for begin in range(0, size, PIECE):
        want, done = min(PIECE, size - begin), 0
        while done < want:
            count = os.preadv(reader, [buffer[done:want]], start + begin + done)
            if not count:
                break
            done += count
        if want == PIECE and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(reader, start + begin, want, os.POSIX_FADV_DONTNEED)
        yield piece_digest(buffer[:done])

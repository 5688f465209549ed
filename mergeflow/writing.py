"""Everything that touches the output's file system: a staging folder beside the target, and one rename at the end.

    <parent>/.<out>.staging/        made first, removed last; found again by the next run of the same plan
        claim.<n>                   who is writing: host, process, start time; its mtime is the heartbeat
        journal.jsonl               first line: the plan; then one line a row that is durable
        out/                        what becomes <parent>/<out>: shards as `<file>.part`, side files as they are

It alone creates, writes, renames and deletes below the target's parent. It knows rows only as ranges of bytes in
shards: what fills them is the caller's, who asks for the memory of a range (`memory`), fills and hashes it, says so
(`filled`), and names the digest of a whole row (`row_done`), from any thread, in any order. `publish` makes it a folder.

**Extents.** A shard is cut every 4 MiB of file offset. Rows follow each other without gaps and so are not aligned, but
extents are: the caller fills the extent's own page-aligned memory, and a full extent is written with O_DIRECT, which
was measured several times faster than the page cache and an fsync, costs no copy, and leaves the cache to the inputs.
The last extent of a shard is written padded to 4 KiB and the file cut to its size before it is renamed, so that no file
is written through the cache and around it at once. Where O_DIRECT is refused the same writes go through the cache.

Memory is bounded: buffers come from a pool. When it is empty a caller waits while writes are under way; when none is,
every buffer is held by an extent with holes, and the oldest one that nobody is filling is written as it is, to be read
back when the rest of it comes (whatever is on disk already, from that or from a run before, is read back before an
extent is filled on). Only when all of them are being filled at this moment an extra buffer is made: so nobody waits for
something that only he can bring about.

**Nothing is named before it is durable.** A row goes into the journal when the extents under it are written and
`fdatasync`ed, every 256 MB or 5 s: no system call belongs to a row, and a crash costs what came since. A run that
starts over a journal hashes the rows it names again and takes only those that are equal.

**Claim.** The process that created the claim with the highest number holds the folder. Creating it is exclusive
(O_EXCL, which every file system has, unlike links and locks); the winner then looks again: where it finds a higher
number, or a lower one that lives, it withdraws and tries again. So a stale claim is taken over by creating the next
number, and of two that try at once only one can succeed; nothing is ever deleted that might be someone's. A claim is
stale when its process is gone, or, for another host or container, when its heartbeat is older than a minute. The claim,
like the journal, lies outside `out/`: it holds until the rename is done and what was replaced is deleted, and the
published folder never contains either.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import random
import re
import shutil
import socket
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from blake3 import blake3

from mergeflow.digests import PIECE, piece_digest, tensor_digest
from mergeflow.errors import ClaimedError, InputError, MachineError, MergeflowError, RecipeError

if TYPE_CHECKING:
    from mergeflow.graph import Row, Shard

MANIFEST = "mergeflow.json"
"""The file that makes a folder an output of mergeflow; its key `plan` holds the plan's digest."""

EXTENT = 4 << 20
POOL = 64 << 20
FEWEST_BUFFERS = 8
SYNC_BYTES = 256_000_000
SYNC_SECONDS = 5.0
BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
UNREADABLE_SECONDS = 1.0
BLOCK = 4096
"""What O_DIRECT wants offsets, lengths and memory to be multiples of; a file system that wants more refuses."""

REFUSED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
FULL = (errno.ENOSPC, errno.EDQUOT)
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Finished:
    """A row that is done: its tensor digest (mergeflow.digests) and the digests of the inputs it was made from."""

    digest: str
    inputs: Mapping[str, str]


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write on the file system of `path` or, before it exists, of its nearest parent."""
    path = Path(os.path.abspath(path))
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    with _named(path, "cannot be asked for its free space"):
        numbers = os.statvfs(path)
    return numbers.f_bavail * numbers.f_frsize


def finished_digest(target: Path) -> str | None:
    """The plan digest in the manifest of a finished output; None for anything else, and for nothing at all."""
    try:
        manifest = json.loads((target / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    digest = manifest.get("plan") if isinstance(manifest, dict) else None
    return digest if isinstance(digest, str) else None


def repair(target: Path) -> None:
    """Set right what a run left that was killed at its very end; to be called before looking at `target`.

    Puts an output back that was moved aside and not yet replaced, and deletes a replaced output and a staging folder
    whose plan `target` is already. Does nothing while another run holds the claim.
    """
    target = Path(os.path.abspath(target))
    container, aside = _container(target), _aside(target)
    if not os.path.lexists(container) and not os.path.lexists(aside):
        return
    with contextlib.suppress(ClaimedError):
        claim = _Claim.take(container, target)
        try:
            _set_right(container, target)
            if not os.path.lexists(container / _JOURNAL):
                _clear(container)
        finally:
            claim.release()


class Staging:
    """A folder in the making: memory for its rows, a journal of what is durable, and one rename at the end.

    Made by `Staging.open`; a context manager. Leaving it before `publish` keeps the staging folder for the next run to
    go on with, and gives the claim back. `memory`, `filled` and `row_done` may be called from any thread; after a write
    has failed each of them, and `finish` and `publish`, raises that failure.
    """

    def __init__(
        self,
        target: Path,
        claim: _Claim,
        shards: Sequence[Shard],
        rows: Sequence[Row],
        force: bool,
        pool_bytes: int,
        extent: int,
    ) -> None:
        self.target = target
        self.path = _container(target) / "out"
        self.finished: Mapping[int, Finished] = {}
        self._container = _container(target)
        self._claim = claim
        self._force = force
        self._rows = rows
        self._extent = extent
        self._files = [_File(self.path, shard, extent) for shard in shards]
        self._starts = [row.offset for row in rows]
        self._sizes = [row.nbytes for row in rows]
        self._sides: dict[str, Path] = {}
        self._journal = -1
        self._stopped = False
        self._published = False

        first, self._where = 0, []
        for file in self._files:
            file.first = first
            self._where += [(file, index) for index in range(file.extents)]
            first += file.extents
        self._stored = bytearray(first)  # all that was filled of this extent is in the file
        self._kept = bytearray(first)  # the file has bytes of this extent that its buffer must start from
        self._left = [file.length(index) for file, index in self._where]
        self._row_left = list(self._sizes)
        self._first = [self._files[row.shard].first for row in rows]

        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)  # a buffer came back, or nothing will ever again
        self._work = threading.Condition(self._lock)  # an extent is queued
        self._tick = threading.Condition(self._lock)  # enough is written to be worth a sync
        self._syncing = threading.Lock()
        self._live: dict[int, _Extent] = {}
        self._queue: deque[_Extent] = deque()
        self._under_way = 0
        self._free: list[mmap.mmap] = []
        self._made = 0
        self._most = max(FEWEST_BUFFERS, pool_bytes // extent)
        self._pending: list[int] = []
        self._done: dict[int, Finished] = {}
        self._unsynced = 0
        self._failure: MergeflowError | None = None
        self._threads: list[threading.Thread] = []

    @classmethod
    def open(
        cls,
        target: Path,
        *,
        digest: str,
        parts: Mapping[str, str],
        shards: Sequence[Shard],
        rows: Sequence[Row],
        force: bool = False,
        fresh: bool = False,
        pool_bytes: int = POOL,
        extent_bytes: int = EXTENT,
        writers: int = 2,
    ) -> Self:
        """Claim the target, reserve its space, and take up what a run of the same plan left.

        `digest` names the plan; `parts` are digests of what went into it, kept to say what changed. `pool_bytes` bounds
        the memory of extents, of which there are at least eight.

        Raises RecipeError for a target that exists (unless `force`, which replaces an output of mergeflow or an empty
        folder, and nothing else) and for a staging folder of another plan (unless `fresh`); ClaimedError for one that
        another run holds; MachineError where the disk is too small, read-only or failing.
        """
        target = Path(os.path.abspath(target))
        _refuse(target, force)
        _make_parents(target)
        claim = _Claim.take(_container(target), target)
        container = _container(target)
        try:
            with _named(container, "cannot be written"):
                _set_right(container, target)
                _refuse(target, force)
                if fresh:
                    _clear(container)
                found = _read_journal(container / _JOURNAL, digest, parts)
                staging = cls(target, claim, shards, rows, force, pool_bytes, extent_bytes)
                staging._check_layout()
                staging._lay_out(found)
                staging._begin_journal(digest, parts)
            staging._start(writers)
        except BaseException:
            if not os.path.lexists(container / _JOURNAL):
                with contextlib.suppress(OSError):
                    _clear(container)
            claim.release()
            raise
        return staging

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._published:
            return
        try:
            with contextlib.suppress(MergeflowError):
                self._save()
        finally:
            self._stop()
            self._claim.release()

    def memory(self, row: int, start: int, stop: int) -> list[memoryview]:
        """Writable memory for bytes [start, stop) of a row: pieces in order, valid until `filled` says they are final.

        Waits for a buffer while writes are under way. Raises MachineError when a write has failed.
        """
        begin, end = self._range(row, start, stop)
        size, first = self._extent, self._first[row]
        pieces: list[memoryview] = []
        with self._lock:
            self._raise_failure()
            while begin < end:
                index = first + begin // size
                extent = self._live.get(index)
                if extent is None or extent.queued:
                    extent = self._acquire(index)
                low = begin % size
                high = min(size, low + end - begin)
                pieces.append(extent.view[low:high])
                extent.handed += high - low
                begin += high - low
        return pieces

    def filled(self, row: int, start: int, stop: int) -> None:
        """Bytes [start, stop) of a row are final, and hashed: their memory may be written and used again at once.

        Each byte of a row is to be filled once.
        """
        begin, end = self._range(row, start, stop)
        size, first = self._extent, self._first[row]
        with self._lock:
            self._raise_failure()
            self._row_left[row] -= end - begin
            if self._row_left[row] < 0:
                raise MergeflowError("bytes were filled twice", where=self._rows[row].name)
            while begin < end:
                index = first + begin // size
                length = min(size - begin % size, end - begin)
                self._live[index].filled += length
                self._left[index] -= length
                if not self._left[index]:
                    self._send(index)
                begin += length

    def row_done(self, row: int, digest: str, inputs: Mapping[str, str]) -> None:
        """All bytes of a row are filled: journal it with its tensor digest, and its inputs', once it is durable."""
        with self._lock:
            self._raise_failure()
            if self._row_left[row] or row in self._done:
                raise MergeflowError("a row was called done that is not, or twice", where=self._rows[row].name)
            self._done[row] = Finished(digest, inputs)
            self._pending.append(row)

    def add(self, file: str, content: bytes) -> None:
        """Put a side file into the folder; `file` is a path below it. It is made durable by `publish`."""
        path = self._side(file)
        with _named(path, "cannot be written"), _created(path) as out:
            _write_all(out, content)

    def copy(self, file: str, source: Path) -> None:
        """Put a copy of `source`'s bytes into the folder (not its mode or times); InputError if it cannot be read."""
        path = self._side(file)
        try:
            reader = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise InputError(f"cannot be read ({error.strerror})", where=str(source)) from None
        try:
            if not stat.S_ISREG(os.fstat(reader).st_mode):
                raise InputError("is not a file", where=str(source))
            with _named(path, "cannot be written"), _created(path) as out:
                while block := _read_block(reader, source):
                    _write_all(out, block)
        finally:
            os.close(reader)

    def finish(self) -> dict[int, Finished]:
        """Wait until every row is durable and journalled, and give what each one is, those of earlier runs included.

        Raises MachineError when a write failed, and a bug's error that names the rows that were never done.
        """
        with self._lock:
            self._raise_failure()
            missing = [row.name for index, row in enumerate(self._rows) if index not in self._done]
            if missing:
                names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
                raise MergeflowError(f"{len(missing)} rows were never finished: {names}", where=str(self.target))
            self._wait_for_writes()
        self._sync()
        return dict(sorted(self._done.items()))

    def publish(self) -> None:
        """Make everything durable and let the folder appear at the target, all at once.

        With `force` an output that stands there is exchanged for the new one, then deleted. Whatever fails before the
        rename is durable leaves the target as it was and the staging folder for the next run.
        """
        self.finish()
        self._stop()
        with _named(self.target, "cannot be finished"):
            for file in self._files:
                file.finish()
            folders = {self.path, *(file.path.parent for file in self._files)}
            for path in self._sides.values():
                _sync_path(path)
                folders |= {folder for folder in path.parents if folder.is_relative_to(self.path)}
            for folder in sorted(folders, reverse=True):
                _sync_path(folder)
            self._commit()
        self._published = True
        # The output is there and durable. What cannot be deleted now is deleted by the next run.
        with contextlib.suppress(OSError):
            os.unlink(self._container / _JOURNAL)
        with contextlib.suppress(OSError):
            _remove(_aside(self.target))
        with contextlib.suppress(OSError):
            _clear(self._container)
        self._claim.release()

    def discard(self) -> None:
        """Remove the staging folder and all that was made; the next run begins anew."""
        if self._published:
            return
        self._stop()
        with _named(self._container, "cannot be removed"):
            _clear(self._container)
        self._claim.release()
        self._published = True

    # Before the first row: the folder, its space, and what is in it already.

    def _check_layout(self) -> None:
        """A plan whose rows do not cover a shard exactly, or whose files leave the folder, is a bug found here."""
        ends = [len(shard.header) for shard in (file.shard for file in self._files)]
        for index in sorted(range(len(self._rows)), key=lambda i: (self._rows[i].shard, self._starts[i])):
            row = self._rows[index]
            if self._starts[index] != ends[row.shard]:
                raise MergeflowError("does not follow the row before it in its shard", where=row.name)
            ends[row.shard] += self._sizes[index]
        for file, end in zip(self._files, ends, strict=True):
            _inside(f"{file.shard.output}/{file.shard.file}" if file.shard.output else file.shard.file)
            if end != file.shard.size:
                raise MergeflowError(f"has rows up to byte {end}, not {file.shard.size}", where=file.shard.file)
        if len({file.path for file in self._files}) != len(self._files):
            raise MergeflowError("two shards have the same file", where=str(self.target))

    def _lay_out(self, found: Mapping[int, Finished]) -> None:
        """Make the folder and its files at their full size; keep what `found` names and the disk still holds."""
        if not found:
            _remove(self.path)
        wanted = {file.part for file in self._files}
        for file in self._files:
            # A run that was killed while publishing had some shards renamed already.
            if found and not os.path.lexists(file.part) and _is_file(file.path):
                os.rename(file.path, file.part)
        _keep_only(self.path, wanted)
        folders = {self.path}
        for file in self._files:
            folders |= {folder for folder in file.part.parents if folder.is_relative_to(self.path)}
        for folder in sorted(folders):
            folder.mkdir(exist_ok=True)
        self.finished = self._rehash({row: what for row, what in found.items() if row < len(self._rows)})
        self._done = dict(self.finished)
        self._reserve()
        for folder in sorted(folders, reverse=True):
            _sync_path(folder)
        _sync_path(self._container)
        _sync_path(self._container.parent)
        self._count()

    def _rehash(self, found: Mapping[int, Finished]) -> dict[int, Finished]:
        """Those of `found` whose bytes in the files have the digest that the journal gives them."""
        readers: dict[int, int] = {}
        try:
            for index in {self._rows[row].shard for row in found}:
                with contextlib.suppress(OSError):
                    readers[index] = os.open(self._files[index].part, os.O_RDONLY | os.O_CLOEXEC)

            def equal(row: int) -> bool:
                reader = readers.get(self._rows[row].shard)
                if reader is None:
                    return False
                try:
                    pieces = list(_piece_digests(reader, self._starts[row], self._sizes[row]))
                except OSError:  # a block that cannot be read is a row to be made again
                    return False
                return tensor_digest(pieces, self._rows[row].dtype.name, self._rows[row].shape) == found[row].digest

            pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "mergeflow-rehash")
            try:
                order = sorted(found, key=lambda row: (self._rows[row].shard, self._starts[row]))
                return {row: found[row] for row, same in zip(order, pool.map(equal, order), strict=True) if same}
            finally:
                pool.shutdown(cancel_futures=True)
        finally:
            for reader in readers.values():
                os.close(reader)

    def _reserve(self) -> None:
        """Give every shard its blocks on disk now, so that a full disk is found before the work and not after."""
        wanted = sum(max(0, file.padded - file.allocated()) for file in self._files)
        missing = wanted - free_bytes(self._container)
        created: list[Path] = []
        promised = True
        try:
            for file in self._files:
                if not os.path.lexists(file.part):
                    created.append(file.part)
                promised = file.reserve() and promised
            if not promised and missing > 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._files[0].part))
        except OSError as error:
            for path in created:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            raise self._problem(error, self.target, missing) from None

    def _count(self) -> None:
        """Tell the extents what is in the files already, and what of them is not to be waited for."""
        touched: set[int] = set()
        for row in self.finished:
            self._row_left[row] = 0
            touched.update(self._settle(self._files[self._rows[row].shard], self._starts[row], self._sizes[row]))
        for file in self._files:
            header = range(file.first, file.first + -(-len(file.shard.header) // self._extent))
            if touched.intersection(header) and file.has_header():
                touched.update(header)
            elif touched.intersection(header):
                for index in header:
                    touched.discard(index)
                    self._kept[index] = 1
            self._settle(file, 0, len(file.shard.header))
        for index in touched:
            self._kept[index] = 1
            self._stored[index] = not self._left[index]

    def _settle(self, file: _File, start: int, size: int) -> range:
        """The extents under a range of a shard, once that range is no longer counted as left to fill."""
        if not size:
            return range(0)
        span = range(start // self._extent, (start + size - 1) // self._extent + 1)
        for index in span:
            begin = index * self._extent
            self._left[file.first + index] -= min(start + size, begin + self._extent) - max(start, begin)
        return range(file.first + span.start, file.first + span.stop)

    def _begin_journal(self, digest: str, parts: Mapping[str, str]) -> None:
        """Write the journal anew, of what was found whole, so that a torn line of the last run ends nothing of this."""
        lines = [_journal_line({"digest": digest, "parts": dict(parts)})]
        lines += [self._row_line(row) for row in self.finished]
        fresh = self._container / f"{_JOURNAL}.new"
        with _created(fresh) as out:
            _write_all(out, b"".join(lines))
            os.fsync(out)
        os.rename(fresh, self._container / _JOURNAL)
        _sync_path(self._container)
        self._journal = os.open(self._container / _JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def _row_line(self, row: int) -> bytes:
        done = self._done[row]
        return _journal_line({"row": row, "name": self._rows[row].name, "digest": done.digest, "inputs": done.inputs})

    def _start(self, writers: int) -> None:
        """Start the threads, and write the extents that no row will fill."""
        bodies: list[tuple[str, Callable[[], None]]] = [("write", self._write_extents)] * max(1, writers)
        for name, body in [*bodies, ("journal", self._keep_journal)]:
            thread = threading.Thread(target=self._guarded, args=(body,), name=f"mergeflow-{name}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._claim.beat(self._fail)
        with self._lock:
            for index, left in enumerate(self._left):
                if not left and not self._stored[index]:
                    self._acquire(index)
                    self._send(index)

    # Extents. All of these but the bodies of threads are called with the lock held.

    def _range(self, row: int, start: int, stop: int) -> tuple[int, int]:
        if not 0 <= start <= stop <= self._sizes[row]:
            raise MergeflowError(f"bytes {start} to {stop} are not in this row", where=self._rows[row].name)
        if row in self.finished:
            raise MergeflowError("was finished by an earlier run", where=self._rows[row].name)
        return self._starts[row] + start, self._starts[row] + stop

    def _acquire(self, index: int) -> _Extent:
        """The extent's buffer, with what is in the file or header already; waits for one as the module says."""
        while True:
            self._raise_failure()
            extent = self._live.get(index)
            if extent is not None and not extent.queued:
                return extent
            if extent is None and (self._free or self._made < self._most):
                break
            if self._under_way:
                self._room.wait()
            elif idle := next((i for i, e in self._live.items() if e.handed == e.filled), None):
                self._send(idle)
            else:
                break
        if self._free:
            buffer = self._free.pop()
        else:
            buffer = mmap.mmap(-1, max(self._extent, BLOCK), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._made += 1
        file, number = self._where[index]
        extent = _Extent(index, file, number, buffer, memoryview(buffer))
        try:
            if self._kept[index]:
                file.load(number, extent.view)
        except OSError as error:
            self._fail(self._problem(error, file.part, 0), locked=True)
            self._raise_failure()
        file.put_header(number, extent.view)
        self._stored[index] = 0
        self._live[index] = extent
        return extent

    def _send(self, index: int) -> None:
        extent = self._live[index]
        extent.queued = True
        self._queue.append(extent)
        self._under_way += 1
        self._work.notify()

    def _wait_for_writes(self) -> None:
        while self._under_way:
            self._raise_failure()
            self._room.wait()
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            failed = self._failure
            raise type(failed)(failed.what, where=failed.where, fix=failed.fix)
        if self._stopped:
            raise MergeflowError("the staging folder was closed", where=str(self.target))

    def _fail(self, error: MergeflowError, *, locked: bool = False) -> None:
        """Keep the first failure for the callers, and wake whoever waits."""
        with contextlib.nullcontext() if locked else self._lock:
            self._failure = self._failure or error
            for condition in (self._room, self._work, self._tick):
                condition.notify_all()

    def _problem(self, error: OSError, path: Path, missing: int) -> MachineError:
        """The one line for a failed write; for a full disk with the bytes that are missing."""
        reason = error.strerror or str(error)
        if error.errno not in FULL:
            return MachineError(f"cannot be written ({reason})", where=str(path))
        lack = f"; {missing:,} bytes are missing" if missing > 0 else ""
        return MachineError(
            f"the disk is too small ({reason}{lack})",
            where=str(path),
            fix="Free some space and run the same command again, or give a folder on another disk with -o.",
        )

    # The threads.

    def _guarded(self, body: Callable[[], None]) -> None:
        """Run a thread's body so that its end, of whatever kind, is never something that others wait for in vain."""
        try:
            body()
        except OSError as error:
            left = sum(self._where[i][0].length(self._where[i][1]) for i, done in enumerate(self._stored) if not done)
            try:
                missing = left - free_bytes(self._container) if error.errno in FULL else 0
            except MachineError:
                missing = 0
            path = Path(error.filename) if error.filename else self.target
            self._fail(self._problem(error, path, missing))
        except MergeflowError as error:
            self._fail(error)
        finally:
            if not self._stopped and self._failure is None:
                self._fail(MergeflowError("a thread of the writer ended by itself", where=str(self.target)))

    def _write_extents(self) -> None:
        while True:
            with self._lock:
                while not self._queue:
                    if self._stopped or self._failure is not None:
                        return
                    self._work.wait()
                extent = self._queue.popleft()
            extent.file.write(extent.number, extent.view)
            with self._lock:
                del self._live[extent.index]
                self._stored[extent.index] = self._kept[extent.index] = 1
                extent.file.dirty = True
                self._under_way -= 1
                if self._made > self._most:
                    self._made -= 1
                else:
                    self._free.append(extent.buffer)
                self._unsynced += self._extent
                if self._unsynced >= SYNC_BYTES:
                    self._tick.notify()
                self._room.notify_all()

    def _keep_journal(self) -> None:
        last = time.monotonic()
        while True:
            with self._lock:
                while self._unsynced < SYNC_BYTES and (rest := last + SYNC_SECONDS - time.monotonic()) > 0:
                    if self._stopped or self._failure is not None:
                        return
                    self._tick.wait(rest)
                if self._stopped or self._failure is not None:
                    return
            self._sync()
            last = time.monotonic()

    def _sync(self) -> None:
        """Make durable what is written, then name the rows it completes in the journal, then make that durable."""
        with self._syncing:
            with self._lock:
                ready = [row for row in self._pending if self._is_stored(row)]
                done = set(ready)
                self._pending = [row for row in self._pending if row not in done]
                dirty = [file for file in self._files if file.dirty]
                complete = [file for file in dirty if not self._stored.count(0, file.first, file.first + file.extents)]
                for file in dirty:
                    file.dirty = False
                self._unsynced = 0
            try:
                for file in dirty:
                    file.sync()
                for file in complete:
                    file.close()
                if ready:
                    with _at(self._container / _JOURNAL):
                        _write_all(self._journal, b"".join(map(self._row_line, ready)))
                        os.fsync(self._journal)
            except OSError as error:
                self._fail(self._problem(error, Path(error.filename or self.target), 0))
        with self._lock:
            self._raise_failure()

    def _is_stored(self, row: int) -> bool:
        size = self._sizes[row]
        if not size:
            return True
        low = self._first[row] + self._starts[row] // self._extent
        high = self._first[row] + (self._starts[row] + size - 1) // self._extent
        return self._stored.find(0, low, high + 1) < 0

    # The end.

    def _save(self) -> None:
        """Write what holds finished rows, full or not, and journal them, for the run that goes on from here."""
        with self._lock:
            self._raise_failure()
            for row in self._pending:
                low = self._first[row] + self._starts[row] // self._extent
                high = self._first[row] + max(0, self._starts[row] + self._sizes[row] - 1) // self._extent
                for index in range(low, high + 1):
                    extent = self._live.get(index)
                    if extent is not None and not extent.queued:
                        self._send(index)
            self._wait_for_writes()
        self._sync()

    def _stop(self) -> None:
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
            for condition in (self._room, self._work, self._tick):
                condition.notify_all()
        for thread in self._threads:
            thread.join()
        for file in self._files:
            file.close()
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1

    def _side(self, file: str) -> Path:
        """The path of a side file, checked and with its folders made."""
        path = self.path / _inside(file)
        if any(path in (shard.path, shard.part) for shard in self._files):
            raise RecipeError("is the name of a weights file, and of a side file", where=file)
        with _named(path, "cannot be written"):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._sides[file] = path
        return path

    def _commit(self) -> None:
        """The one rename, made durable; what fails is undone."""
        if self._claim.lost():
            raise ClaimedError("another run took this output over", where=str(self.target))
        exchanged = moved = False
        if self._force and os.path.lexists(self.target):
            _refuse(self.target, True)
            try:
                _rename(self.path, self.target, RENAME_EXCHANGE)
                exchanged = True
            except OSError as error:
                if error.errno not in REFUSED:
                    raise
                os.rename(self.target, _aside(self.target))
                moved = True
        try:
            if not exchanged:
                try:
                    _rename(self.path, self.target, RENAME_NOREPLACE)
                except OSError as error:
                    if error.errno not in REFUSED:
                        raise
                    if os.path.lexists(self.target):
                        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.target)) from None
                    os.rename(self.path, self.target)
            _sync_path(self.target.parent)
            _sync_path(self._container)
        except FileExistsError:
            raise RecipeError(
                "appeared while this run was at work",
                where=str(self.target),
                fix="Move it away and run the same command again, or replace it with --force.",
            ) from None
        except OSError:
            with contextlib.suppress(OSError):
                if exchanged:
                    _rename(self.path, self.target, RENAME_EXCHANGE)
                elif not os.path.lexists(self.path):
                    os.rename(self.target, self.path)
            with contextlib.suppress(OSError):
                if moved and not os.path.lexists(self.target):
                    os.rename(_aside(self.target), self.target)
            raise


@dataclass(slots=True)
class _Extent:
    """A piece of a shard that is being filled; `handed` and `filled` count bytes given out and declared final."""

    index: int
    file: _File
    number: int
    buffer: mmap.mmap
    view: memoryview
    handed: int = 0
    filled: int = 0
    queued: bool = False


class _File:
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
            with _at(self.part):
                promised = _allocate(fd, self.padded)
                os.ftruncate(fd, self.padded)
        finally:
            os.close(fd)
        return promised

    def has_header(self) -> bool:
        with _at(self.part):
            found = os.pread(self._fd(direct=False), len(self.shard.header), 0)
        return found == self.shard.header

    def put_header(self, number: int, view: memoryview) -> None:
        start = number * self._extent
        if start < len(self.shard.header):
            piece = self.shard.header[start : start + self._extent]
            view[: len(piece)] = piece

    def load(self, number: int, view: memoryview) -> None:
        """Read back what the file holds of an extent."""
        with _at(self.part):
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
        with _at(self.part):
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
        with _at(self.part):
            for fd in list(self._fds.values()):
                os.fdatasync(fd)

    def finish(self) -> None:
        """Cut the padding off, make the file durable, and give it its name."""
        fd = os.open(self.part, os.O_RDWR | os.O_CLOEXEC)
        try:
            with _at(self.part):
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


@dataclass(frozen=True, slots=True)
class _Holder:
    """The process behind a claim; `world` tells one boot and one container from another on hosts of the same name."""

    host: str
    world: str
    pid: int
    start: str

    @classmethod
    def here(cls) -> _Holder:
        return cls(socket.gethostname(), _world(), os.getpid(), _process_start(os.getpid()) or "")

    def lives(self, age: float, here: _Holder) -> bool:
        if (self.host, self.world) == (here.host, here.world):
            return _process_start(self.pid) in (self.start, "unknown")
        return age <= STALE_SECONDS


class _Claim:
    """The right to write into a staging folder; see the module."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._status = os.lstat(path)
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def take(cls, folder: Path, target: Path) -> _Claim:
        """Hold `folder`, making it where it is missing; ClaimedError says who holds it."""
        here = _Holder.here()
        text = json.dumps({"host": here.host, "world": here.world, "pid": here.pid, "start": here.start}).encode()
        unreadable: dict[int, float] = {}
        while True:
            with _named(folder, "cannot be written"):
                folder.mkdir(exist_ok=True)
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
                    with _created(path, exclusive=True) as fd:
                        try:
                            _write_all(fd, text)
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


def _claims(folder: Path) -> list[int]:
    return sorted(int(name[6:]) for name in os.listdir(folder) if re.fullmatch(r"claim\.\d{1,9}", name))


def _claim_state(folder: Path, number: int, here: _Holder, unreadable: dict[int, float]) -> str | None:
    """Who holds this claim, in words; empty when it is stale or gone; None when it must be looked at again.

    A claim without its text belongs to a process between creating and writing it, or to one that died there. It is
    given a second; a process that needed longer finds the next number taken, and withdraws.
    """
    path = folder / f"claim.{number}"
    try:
        age = max(0.0, time.time() - os.lstat(path).st_mtime)
        fields = json.loads(path.read_bytes())
        holder = _Holder(str(fields["host"]), str(fields["world"]), int(fields["pid"]), str(fields["start"]))
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


_JOURNAL = "journal.jsonl"


def _journal_line(record: Mapping[str, Any]) -> bytes:
    """A line of the journal: the record, and a check of its own text, so that a changed line is not believed."""
    text = _ENCODE({**record, "check": ""})
    return text.replace('"check":""', f'"check":"{blake3(text.encode()).hexdigest(length=8)}"', 1).encode() + b"\n"


_ENCODE = json.JSONEncoder(separators=(",", ":"), sort_keys=True).encode


def _journal_records(content: bytes) -> Iterator[dict[str, Any]]:
    for line in content.split(b"\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and _journal_line(record) == line + b"\n":
            yield record


def _read_journal(path: Path, digest: str, parts: Mapping[str, str]) -> dict[int, Finished]:
    """The rows a run of this plan has journalled; RecipeError for another plan's journal, which says what changed."""
    try:
        records = list(_journal_records(path.read_bytes()))
    except FileNotFoundError:
        return {}
    if not records or "parts" not in records[0]:
        return {}
    head, *lines = records
    if head["digest"] != digest:
        changed = [part for part in parts if head["parts"].get(part) != parts[part]]
        raise RecipeError(
            f"an unfinished run of another plan is here: {' and '.join(changed) or 'plan'} changed since",
            where=str(path.parent),
            fix="Forget it with --fresh, or give another folder with -o.",
        )
    return {line["row"]: Finished(line["digest"], line["inputs"]) for line in lines if "row" in line}


def _container(target: Path) -> Path:
    return target.with_name(f".{target.name}.staging")


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _refuse(target: Path, force: bool) -> None:
    """Raise for a target that must not be written or replaced."""
    where = str(target)
    if not target.name:
        raise RecipeError("cannot be an output folder", where=where, fix="Give a folder with -o.")
    if target.is_symlink():
        raise RecipeError("is a symbolic link", where=where, fix="Give the folder it should become with -o.")
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise RecipeError("is a file, and the output is a folder", where=where, fix="Give another name with -o.")
    if os.path.ismount(target):
        raise RecipeError("is a mount point, which no rename replaces", where=where, fix="Give a folder in it with -o.")
    if not force:
        raise RecipeError("exists", where=where, fix="Give another folder with -o, or replace it with --force.")
    if not (target / MANIFEST).is_file() and any(target.iterdir()):
        raise RecipeError(
            f"was not made by mergeflow (it has no {MANIFEST}), and --force would delete what is in it",
            where=where,
            fix="Give another folder with -o, or move it away.",
        )


def _make_parents(target: Path) -> None:
    missing = [folder for folder in target.parents if not os.path.lexists(folder)]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise RecipeError(
            "cannot be made below a file", where=str(target), fix="Give another folder with -o."
        ) from None
    except OSError as error:
        raise MachineError(f"cannot be made ({error.strerror})", where=str(target.parent)) from None
    with _named(target.parent, "cannot be written"):
        for folder in missing:
            _sync_path(folder.parent)


def _set_right(container: Path, target: Path) -> None:
    """Undo or complete what a run left that was killed between the rename and its end; needs the claim."""
    aside = _aside(target)
    if os.path.lexists(aside):
        if os.path.lexists(target):
            _remove(aside)
        else:
            os.rename(aside, target)
            _sync_path(target.parent)
    made = finished_digest(target)
    if made is not None:
        with contextlib.suppress(FileNotFoundError):
            head = next(_journal_records((container / _JOURNAL).read_bytes()), {})
            if head.get("digest") == made:
                os.unlink(container / _JOURNAL)


def _clear(container: Path) -> None:
    """Empty a staging folder but for claims; the journal first, since without it the rest means nothing."""
    (container / _JOURNAL).unlink(missing_ok=True)
    for name in os.listdir(container):
        if not name.startswith("claim."):
            _remove(container / name)


def _keep_only(folder: Path, wanted: set[Path]) -> None:
    """Remove all files below `folder` but `wanted`, and folders that hold none of them; follows no links."""
    if not os.path.lexists(folder):
        return
    if not stat.S_ISDIR(os.lstat(folder).st_mode):
        os.unlink(folder)
        return
    for entry in list(os.scandir(folder)):
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False) and any(file.is_relative_to(path) for file in wanted):
            _keep_only(path, wanted)
        elif path not in wanted or not entry.is_file(follow_symlinks=False):
            _remove(path)


def _remove(path: Path) -> None:
    try:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path)
        else:
            os.unlink(path)
    except FileNotFoundError:
        pass


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _inside(file: str) -> str:
    """`file`, if it is a path that stays below the folder it is relative to."""
    if "\0" in file or any(part in ("", ".", "..") for part in file.split("/")):
        raise RecipeError("is not a path inside the output folder", where=file or "''")
    return file


def _piece_digests(reader: int, start: int, size: int) -> Iterator[bytes]:
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


def _read_block(reader: int, source: Path) -> bytes:
    try:
        return os.read(reader, EXTENT)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", where=str(source)) from None


def _write_all(fd: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]


def _sync_path(path: Path) -> None:
    """fsync a file or folder; a file system that cannot sync folders says EINVAL, and has nothing better."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with _at(path):
            os.fsync(fd)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
    finally:
        os.close(fd)


def _allocate(fd: int, size: int) -> bool:
    """Reserve `size` bytes; False where the file system has no such promise.

    The call itself and not posix_fallocate, whose substitute in the C library writes to every block of the file.
    """
    call = getattr(_libc, "fallocate", None)
    while call is not None and size:
        if not call(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
            return True
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return not size


def _rename(old: Path, new: Path, flags: int) -> None:
    """renameat2; ENOSYS where the C library has none."""
    call = getattr(_libc, "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    here = -100  # AT_FDCWD
    if call(here, os.fsencode(old), here, os.fsencode(new), ctypes.c_uint(flags)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(old), None, str(new))


@contextlib.contextmanager
def _created(path: Path, *, exclusive: bool = False) -> Iterator[int]:
    """A descriptor of a new, empty file, with the mode the umask gives."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_EXCL if exclusive else os.O_TRUNC)
    fd = os.open(path, flags, 0o666)
    try:
        with _at(path):
            yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _at(path: Path) -> Iterator[None]:
    """Give an OSError of a call on a descriptor the path that it was about."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def _named(path: Path, what: str) -> Iterator[None]:
    """Turn an OSError into a MachineError that names the path it was about, or `path`."""
    try:
        yield
    except OSError as error:
        where = str(error.filename or path)
        space = "Free some space and run the same command again." if error.errno in FULL else ""
        raise MachineError(f"{what} ({error.strerror or error})", where=where, fix=space) from None

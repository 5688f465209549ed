"""The folder in the making; the design is in the package's docstring."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from mergeflow.digests import tensor_digest
from mergeflow.errors import ClaimedError, InputError, Interrupted, MachineError, MergeflowError, RecipeError
from mergeflow.writing.claim import Claim
from mergeflow.writing.disk import (
    FEWER_FILES,
    FULL,
    REFUSED,
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    TOO_MANY,
    at,
    created,
    free_bytes,
    is_file,
    keep_only,
    named,
    remove,
    rename,
    sync_path,
    write_all,
)
from mergeflow.writing.journal import FRESH_JOURNAL, JOURNAL, Finished, journal_line, read_journal
from mergeflow.writing.shards import BLOCK, ShardFile, piece_digests
from mergeflow.writing.target import (
    MADE,
    aside_of,
    clear,
    container_of,
    delete_replaced,
    make_parents,
    refuse,
    refuse_strange,
    set_right,
)

if TYPE_CHECKING:
    from mergeflow.graph import Row, Shard

EXTENT = 4 << 20
POOL = 64 << 20
FEWEST_BUFFERS = 8
SYNC_BYTES = 256_000_000
SYNC_SECONDS = 5.0


class Staging:
    """A folder in the making: memory for its rows, a journal of what is durable, and one rename at the end.

    Made by `Staging.open`; a context manager. Leaving it before `publish` keeps the staging folder for the next run to
    go on with, and gives the claim back. `memory`, `filled` and `row_done` may be called from any thread; after a write
    has failed each of them, and `finish` and `publish`, raises that failure.
    """

    def __init__(
        self,
        target: Path,
        claim: Claim,
        shards: Sequence[Shard],
        rows: Sequence[Row],
        force: bool,
        pool_bytes: int,
        extent: int,
    ) -> None:
        self.target = target
        self.path = container_of(target) / MADE
        self.finished: Mapping[int, Finished] = {}
        self._container = container_of(target)
        self._claim = claim
        self._force = force
        self._rows = rows
        self._extent = extent
        self._files = [ShardFile(self.path, shard, extent) for shard in shards]
        self._starts = [row.offset for row in rows]
        self._sizes = [row.nbytes for row in rows]
        self._sides: dict[str, Path] = {}
        self._journal = -1
        self._stopped = False
        self._published = False
        self._moved = False  # what was at the target stands aside

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
        stop: threading.Event | None = None,
    ) -> Self:
        """Claim the target, reserve its space, and take up what a run of the same plan left.

        `digest` names the plan, as the manifest does; `parts` are digests of all that a run must have in common with the
        one whose rows it takes up, kept to say what changed. `pool_bytes` bounds the memory of extents, of which there are
        at least eight. `stop` ends the hashing of what is there.

        Raises RecipeError for a target that exists (unless `force`, which replaces an output of mergeflow or an empty
        folder, and nothing else), for a staging folder of another plan (unless `fresh`) and for one that is not ours;
        ClaimedError for one that another run holds; MachineError where the disk is too small, read-only or failing;
        Interrupted when stopped, with the staging folder kept.
        """
        target = Path(os.path.abspath(target))
        refuse(target, force)
        container = container_of(target)
        refuse_strange(container)
        make_parents(target)
        claim = Claim.take(container, target)
        try:
            staging = cls(target, claim, shards, rows, force, pool_bytes, extent_bytes)
            # From here on, since hashing again what is there can take longer than a claim lives without a sign of life.
            claim.beat(staging._fail)
            with named(container, "cannot be written"):
                set_right(container, target)
                refuse(target, force)
                if fresh:
                    clear(container)
                found = read_journal(container / JOURNAL, digest, parts)
                staging._check_layout()
                staging._lay_out(found, stop or threading.Event())
                staging._begin_journal(digest, parts)
            staging._start(writers)
        except BaseException:
            if not os.path.lexists(container / JOURNAL):
                with contextlib.suppress(OSError):
                    clear(container)
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
        with named(path, "cannot be written"), created(path) as out:
            write_all(out, content)

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
            with named(path, "cannot be written"), created(path) as out:
                while block := _read_block(reader, source):
                    write_all(out, block)
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

    def publish(self, verify: Callable[[Path], None] = lambda folder: None) -> None:
        """Make everything durable and let the folder appear at the target, all at once.

        With `force` an output that stands there is exchanged for the new one, then deleted, once `verify` has looked at the new one, where
        it was made, and raised nothing. Whatever fails before the
        rename is durable leaves the target as it was and the staging folder for the next run.
        """
        self.finish()
        self._stop()
        with named(self.target, "cannot be finished"):
            for file in self._files:
                file.finish()
            folders = {self.path, *(file.path.parent for file in self._files)}
            for path in self._sides.values():
                sync_path(path)
                folders |= {folder for folder in path.parents if folder.is_relative_to(self.path)}
            for folder in sorted(folders, reverse=True):
                sync_path(folder)
            if self._force and os.path.lexists(self.target):
                verify(self.path)
            self._commit()
        self._published = True
        # The output is there and durable. What cannot be deleted now is deleted by the next run.
        with contextlib.suppress(OSError):
            os.unlink(self._container / JOURNAL)
        if self._moved:
            with contextlib.suppress(OSError):
                delete_replaced(self._container, aside_of(self.target))
        with contextlib.suppress(OSError):
            clear(self._container)
        self._claim.release()

    def discard(self) -> None:
        """Remove the staging folder and all that was made; the next run begins anew."""
        if self._published:
            return
        self._stop()
        with named(self._container, "cannot be removed"):
            clear(self._container)
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

    def _lay_out(self, found: Mapping[int, Finished], stop: threading.Event) -> None:
        """Make the folder and its files at their full size; keep what `found` names and the disk still holds."""
        if not found:
            remove(self.path)
        wanted = {file.part for file in self._files}
        for file in self._files:
            # A run that was killed while publishing had some shards renamed already.
            if found and not os.path.lexists(file.part) and is_file(file.path):
                os.rename(file.path, file.part)
        keep_only(self.path, wanted)
        folders = {self.path}
        for file in self._files:
            folders |= {folder for folder in file.part.parents if folder.is_relative_to(self.path)}
        for folder in sorted(folders):
            folder.mkdir(exist_ok=True)
        self.finished = self._rehash({row: what for row, what in found.items() if row < len(self._rows)}, stop)
        self._done = dict(self.finished)
        self._reserve()
        for folder in sorted(folders, reverse=True):
            sync_path(folder)
        sync_path(self._container)
        sync_path(self._container.parent)
        self._count()

    def _rehash(self, found: Mapping[int, Finished], stop: threading.Event) -> dict[int, Finished]:
        """Those of `found` whose bytes in the files have the digest that the journal gives them."""

        def equal(index: int) -> bool:
            row, pieces = self._rows[index], []
            try:
                # A file is opened for each of its rows: of many shards no more are open than threads read.
                reader = os.open(self._files[row.shard].part, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    for piece in piece_digests(reader, row.offset, row.nbytes):
                        pieces.append(piece)
                        if stop.is_set():
                            raise Interrupted("stopped")
                        if self._failure is not None:  # the claim is lost
                            raise self._failure
                finally:
                    os.close(reader)
            except OSError:  # a block that cannot be read is a row to be made again
                return False
            return tensor_digest(pieces, row.dtype.name, row.shape) == found[index].digest

        pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "mergeflow-rehash")
        try:
            order = sorted(found, key=lambda row: (self._rows[row].shard, self._starts[row]))
            return {row: found[row] for row, same in zip(order, pool.map(equal, order), strict=True) if same}
        finally:
            pool.shutdown(cancel_futures=True)

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

    def _settle(self, file: ShardFile, start: int, size: int) -> range:
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
        lines = [journal_line({"digest": digest, "parts": dict(parts)})]
        lines += [self._row_line(row) for row in self.finished]
        fresh = self._container / FRESH_JOURNAL
        with created(fresh) as out:
            write_all(out, b"".join(lines))
            os.fsync(out)
        os.rename(fresh, self._container / JOURNAL)
        sync_path(self._container)
        self._journal = os.open(self._container / JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def _row_line(self, row: int) -> bytes:
        done = self._done[row]
        return journal_line({"row": row, "name": self._rows[row].name, "digest": done.digest, "inputs": done.inputs})

    def _start(self, writers: int) -> None:
        """Start the threads, and write the extents that no row will fill."""
        bodies: list[tuple[str, Callable[[], None]]] = [("write", self._write_extents)] * max(1, writers)
        for name, body in [*bodies, ("journal", self._keep_journal)]:
            thread = threading.Thread(target=self._guarded, args=(body,), name=f"mergeflow-{name}", daemon=True)
            self._threads.append(thread)
            thread.start()
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
        if error.errno in TOO_MANY:
            return MachineError(f"cannot be written ({reason})", where=str(path), fix=FEWER_FILES)
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
                    with at(self._container / JOURNAL):
                        write_all(self._journal, b"".join(map(self._row_line, ready)))
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
        with named(path, "cannot be written"):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._sides[file] = path
        return path

    def _put_aside(self) -> None:
        """Move what is at the target out of the way, over nothing or an empty folder."""
        aside = aside_of(self.target)
        try:
            os.rename(self.target, aside)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise RecipeError(
                "is in the way of replacing the output, and mergeflow did not make it",
                where=str(aside),
                fix="Move it away and run the same command again.",
            ) from None
        self._moved = True

    def _commit(self) -> None:
        """The one rename, made durable; what fails is undone."""
        if self._claim.lost():
            raise ClaimedError("another run took this output over", where=str(self.target))
        exchanged = False
        if self._force and os.path.lexists(self.target):
            refuse(self.target, True)
            try:
                rename(self.path, self.target, RENAME_EXCHANGE)
                exchanged = True
            except OSError as error:
                if error.errno not in REFUSED:
                    raise
                self._put_aside()
        try:
            if not exchanged:
                try:
                    rename(self.path, self.target, RENAME_NOREPLACE)
                except OSError as error:
                    if error.errno not in REFUSED:
                        raise
                    if os.path.lexists(self.target):
                        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.target)) from None
                    os.rename(self.path, self.target)
            sync_path(self.target.parent)
            sync_path(self._container)
        except FileExistsError:
            raise RecipeError(
                "appeared while this run was at work",
                where=str(self.target),
                fix="Move it away and run the same command again, or replace it with --force.",
            ) from None
        except OSError:
            with contextlib.suppress(OSError):
                if exchanged:
                    rename(self.path, self.target, RENAME_EXCHANGE)
                elif not os.path.lexists(self.path):
                    os.rename(self.target, self.path)
            with contextlib.suppress(OSError):
                if self._moved and not os.path.lexists(self.target):
                    os.rename(aside_of(self.target), self.target)
                    self._moved = False
            raise


@dataclass(slots=True)
class _Extent:
    """A piece of a shard that is being filled; `handed` and `filled` count bytes given out and declared final."""

    index: int
    file: ShardFile
    number: int
    buffer: mmap.mmap
    view: memoryview
    handed: int = 0
    filled: int = 0
    queued: bool = False


def _inside(file: str) -> str:
    """`file`, if it is a path that stays below the folder it is relative to."""
    if "\0" in file or any(part in ("", ".", "..") for part in file.split("/")):
        raise RecipeError("is not a path inside the output folder", where=file or "''")
    return file


def _read_block(reader: int, source: Path) -> bytes:
    try:
        return os.read(reader, EXTENT)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", where=str(source)) from None

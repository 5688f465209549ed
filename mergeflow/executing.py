"""Rows are filled here, block by block: the only module that computes.

A row's expression becomes a short program: its loads and ops in order, each value dropped after its last use. A row is cut into
segments of `SEGMENT` elements, and a segment into blocks that fit the processor's cache; threads share nothing but the queue of
segments. A measure is a round of segments before those that write. All cuts are constants or follow from the shape, and partial
results are merged in order, so threads, memory and timing change no bit of the output; the budget chooses only how much is in flight.

Files are mapped read-only. A segment's pages are populated by one call before they are touched, so that a file that fails or shrinks
is an error with a name and not a dead process; `pread` closes what is left of that race, and is taken for file systems where it matters.
A segment is a whole number of 4 MiB pieces in every dtype, so one thread hashes a piece from its first byte to its last.
Ops on rows get blocks of whole rows, laid over the tensor by its shape alone; a block across the border of two segments is made
for both, and each keeps its part.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import mmap
import os
import resource
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from blake3 import blake3

from mergeflow.checkpoint import StoredTensor
from mergeflow.digests import PIECE, tensor_digest
from mergeflow.dtypes import BY_NAME, DType, torch_dtype
from mergeflow.errors import InputError, Interrupted, MachineError, MergeflowError, NumericError, Problems, RecipeError
from mergeflow.graph import Apply, Expression, Load, Made, Measure, Plan, loads_of, shape_of
from mergeflow.ops.base import LEAF, SPREAD_RUN, SPREAD_RUNS, Block, Cut, Op, Reduction, cut_as, spread

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SEGMENT = 4 * 2**20
"""Elements that one thread makes at a time: at least one piece of 4 MiB in every dtype."""
LARGEST_BLOCK = 4 * LEAF
"""Elements computed at once: 1 MiB in float32."""
AHEAD = 64 * 2**20
"""Bytes that the kernel is asked to read before they are needed."""
SMALL = LEAF
"""Rows of at most this many elements are made many at a time, since the queue would cost more than they do."""

Reading = Literal["auto", "mmap", "pread"]


class Sink(Protocol):
    """Where rows go; a row is known by its index in the plan. Thread safe."""

    def memory(self, row: int, start: int, stop: int) -> list[memoryview]:
        """Writable memory, in order, for bytes [start, stop) of a row."""

    def filled(self, row: int, start: int, stop: int) -> None:
        """These bytes are final."""

    def row_done(self, row: int, digest: str, inputs: Mapping[str, str]) -> None:
        """All bytes of the row are filled; `inputs` are digests of tensors that were read for it, by `model/name`."""


@dataclass(slots=True)
class Report:
    """What a run did: bytes read from inputs and made, and seconds of all threads by what they were spent on."""

    bytes_in: int = 0
    bytes_out: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"hash": 0.0, "check": 0.0})

    def add(self, other: Report) -> None:
        self.bytes_in += other.bytes_in
        self.bytes_out += other.bytes_out
        for key, value in other.seconds.items():
            self.seconds[key] = self.seconds.get(key, 0.0) + value


@dataclass(frozen=True, slots=True)
class _Step:
    """One value of a program: what makes it, where its inputs are, and which values are not needed after it."""

    expression: Expression
    inputs: tuple[int, ...]
    drops: tuple[int, ...]


@dataclass(frozen=True)
class _Program:
    """The values of some expressions, in an order that makes each after its inputs.

    What every block asks of it is found once.
    """

    steps: tuple[_Step, ...]
    results: tuple[int, ...]
    live: int
    """The greatest number of values that are held at once, with one more for each input of a measure or of an op that has one."""

    @property
    def loads(self) -> Iterator[Load]:
        for step in self.steps:
            yield from loads_of(step.expression)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensors that it works on."""
        return shape_of(self.steps[self.results[0]].expression)

    @cached_property
    def cut(self) -> Cut:
        """What can be computed alone: what the most demanding of its parts asks for."""
        parts = {op.cut for op in self.ops}
        parts |= {step.expression.source.cut for step in self.steps if isinstance(step.expression, Made)}
        return "tensor" if "tensor" in parts else "row" if "row" in parts else "element"

    @cached_property
    def read_later(self) -> frozenset[int]:
        """Positions of the leaves that only ops read which read for themselves."""
        users: dict[int, list[Expression]] = {}
        for step in self.steps:
            for one in step.inputs:
                users.setdefault(one, []).append(step.expression)
        return frozenset(
            one
            for one, by in users.items()
            if not isinstance(self.steps[one].expression, Apply)
            and all(isinstance(user, Apply) and user.op.lazy for user in by)
        )

    @cached_property
    def mixed(self) -> bool:
        """Whether some of it is made by rows, and some measured by leaves."""
        leaves = any(
            isinstance(step.expression, Apply)
            and step.expression.op.cut == "element"
            and step.expression.measure is not None
            for step in self.steps
        )
        return leaves and self.cut == "row"

    @cached_property
    def temporaries(self) -> int:
        """Blocks that are held beyond its values."""
        return max((op.temporaries for op in self.ops), default=_MADE)

    @property
    def held(self) -> int:
        """Elements that making tensors, one after the other, holds beyond blocks."""
        made = [step.expression for step in self.steps if isinstance(step.expression, Made)]
        return max((one.source.held(one.shape) for one in made), default=0)

    @property
    def measures(self) -> Iterator[Measure]:
        for step in self.steps:
            if isinstance(step.expression, Apply) and step.expression.measure is not None:
                yield step.expression.measure

    @property
    def measure_bytes(self) -> int:
        """Bytes that the most demanding of the measures holds: they are taken one after the other."""
        return max((one.op.measure_bytes(len(one.over[0])) for one in self.measures), default=0)

    @property
    def ops(self) -> Iterator[Op]:
        for step in self.steps:
            if isinstance(step.expression, Apply):
                yield step.expression.op


def _program(results: Sequence[Expression]) -> _Program:
    order: list[Expression] = []
    index: dict[int, int] = {}

    def visit(expression: Expression) -> None:
        if id(expression) in index:
            return
        if isinstance(expression, Apply):
            for one in expression.inputs:
                visit(one)
        index[id(expression)] = len(order)
        order.append(expression)

    for expression in results:
        visit(expression)
    last: dict[int, int] = {}
    for position, expression in enumerate(order):
        for one in expression.inputs if isinstance(expression, Apply) else ():
            last[index[id(one)]] = position
    kept = tuple(index[id(expression)] for expression in results)
    drops: dict[int, list[int]] = {}
    for value, position in last.items():
        if value not in kept:
            drops.setdefault(position, []).append(value)
    steps, live, most = [], 0, 0
    for position, expression in enumerate(order):
        inputs = tuple(index[id(one)] for one in expression.inputs) if isinstance(expression, Apply) else ()
        dropped = tuple(drops.get(position, ()))
        live += 1
        most = max(most, live)
        live -= len(dropped)
        steps.append(_Step(expression, inputs, dropped))
    made = [len(one.inputs) for one in order if isinstance(one, Apply) and one.measure is not None]
    return _Program(tuple(steps), kept, most + max([len(results) - 1, *made]))


def _find_shared(program: _Program, found: dict[int, Measure]) -> None:
    """Add a program's measures over several tensors to `found`, each after those that its own tensors need."""
    for measure in program.measures:
        if len(measure.over) > 1 and id(measure) not in found:
            for inputs in measure.over:
                _find_shared(_program(inputs), found)
            found[id(measure)] = measure


_MADE = 4
"""Blocks that making or converting a tensor may hold beyond the result."""


class _Files:
    """The input files, opened once each, as flat tensors of any range; stored bytes, never written to."""

    def __init__(self, paths: Mapping[tuple[str, str], Path], reading: Reading) -> None:
        _allow_open_files()
        self.open: dict[Path, _File] = {}
        self.of: dict[tuple[str, str], _File] = {}
        try:
            for key, path in paths.items():
                if path not in self.open:
                    self.open[path] = _File(path, reading)
                self.of[key] = self.open[path]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for file in self.open.values():
            file.close()

    def check_unchanged(self) -> None:
        """Raise InputError if a file is not what it was when it was opened."""
        for file in self.open.values():
            file.check_unchanged()

    def read(self, load: Load, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a stored tensor, flat, in its dtype."""
        return self.of[load.model, load.tensor.file].read(load.tensor, start, stop)

    def spread(self, load: Load) -> Tensor:
        """Up to a leaf of elements of a stored tensor, taken evenly (mergeflow.ops.base.spread)."""
        import torch

        runs = []
        for start, stop in _spread_runs(load.tensor.elements):
            self.prepare(load, start, stop)
            runs.append(self.read(load, start, stop))
        return runs[0] if len(runs) == 1 else torch.cat(runs)

    def prepare(self, load: Load, start: int, stop: int) -> None:
        self.of[load.model, load.tensor.file].prepare(*_span(load.tensor, start, stop))

    def ahead(self, load: Load) -> None:
        self.of[load.model, load.tensor.file].ahead(load.tensor.begin, load.tensor.end)

    def behind(self, load: Load, start: int, stop: int) -> None:
        self.of[load.model, load.tensor.file].behind(*_span(load.tensor, start, stop))


def _spread_runs(elements: int) -> list[tuple[int, int]]:
    """The runs of elements that a sample of a tensor has (mergeflow.ops.base.spread)."""
    if elements <= LEAF:
        return [(0, elements)]
    step = elements // SPREAD_RUNS
    return [(start, start + SPREAD_RUN) for start in range(0, step * SPREAD_RUNS, step)]


def _span(tensor: StoredTensor, start: int, stop: int) -> tuple[int, int]:
    if tensor.strides:  # its rows are anywhere in what it covers
        return tensor.begin, tensor.end
    return tensor.begin + start * tensor.dtype.size, tensor.begin + stop * tensor.dtype.size


_libc = ctypes.CDLL(None, use_errno=True)
_POPULATE_READ = 22
_EHWPOISON = 133
# File systems on which a page can fail or vanish under a mapping: NFS, SMB, CIFS, FUSE, 9p, AFS, Ceph, vfat, exFAT.
_READ_BY_CALL = {
    0x6969,
    0x517B,
    0xFF534D42,
    0xFE534D42,
    0x65735546,
    0x01021997,
    0x5346414F,
    0x00C36400,
    0x4D44,
    0x2011BAB0,
}


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def _keep_freed_memory() -> None:
    """Let malloc keep blocks that were freed, for the next ones: else each is mapped, zeroed and unmapped again."""
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_M_MMAP_THRESHOLD, 2**25)
        _libc.mallopt(_M_TRIM_THRESHOLD, 2**28)


_SLIVERS = tuple(size for size in range(24, 105, 16) for _ in range(7))
"""What fits the smallest pieces of memory, as many of each as the C library lays aside for a thread."""
_TOO_LARGE = 2048
"""Bytes that the C library lays aside for no thread."""


def _splits_blocks() -> bool:
    """Whether the C library is a glibc before 2.39 (https://sourceware.org/bugzilla/show_bug.cgi?id=30723)."""
    if not hasattr(_libc, "gnu_get_libc_version"):
        return False
    _libc.gnu_get_libc_version.restype = ctypes.c_char_p
    major, minor = _libc.gnu_get_libc_version().split(b".")[:2]
    return (int(major), int(minor)) < (2, 39)


if _splits_blocks():
    _here = ctypes.PyDLL(None)  # for calls that are over at once: the interpreter's lock is kept
    _here.malloc.argtypes, _here.malloc.restype = [ctypes.c_size_t], ctypes.c_size_t
    _here.realloc.argtypes, _here.realloc.restype = [ctypes.c_size_t, ctypes.c_size_t], ctypes.c_size_t
    _here.free.argtypes, _here.free.restype = [ctypes.c_size_t], None

    def _between_blocks(elements: int) -> None:
        """Let what the blocks before this left behind become whole again, where they were large ones.

        torch wants memory aligned to 64 bytes. For that an older glibc cuts up to 96 bytes off both ends of a larger piece
        and lays these slivers aside for the thread, where they count as used: the block between two of them is never
        joined with what is free beside it, and is itself too short, by those bytes, for the next block of its size. A thread
        that uses 6 MiB so came to hold 30. What was laid aside is taken, grown into the free memory behind it, and freed as
        a piece that is not laid aside but joined with what is free on both sides.
        """
        if elements > SMALL:
            for address in list(map(_here.malloc, _SLIVERS)):
                _here.free(_here.realloc(address, _TOO_LARGE) or address)

else:

    def _between_blocks(elements: int) -> None:
        """Nothing: freed memory is joined at once."""


def _file_system(path: Path) -> int:
    """The magic number of the file system that holds a file; 0 where it cannot be told."""
    buffer = (ctypes.c_long * 64)()
    return int(buffer[0]) & 0xFFFFFFFF if _libc.statfs(os.fsencode(path), ctypes.byref(buffer)) == 0 else 0


def _allow_open_files() -> None:
    """Let this process open as many files as it may: a mapped file takes two descriptors, and a model can have hundreds."""
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)


def _too_many(error: OSError, path: Path) -> MachineError:
    return MachineError(
        f"cannot open the file: {error.strerror}",
        where=str(path),
        fix="Let a process open more files (`ulimit -n`), or merge models of fewer shards.",
    )


class _File:
    """One file, mapped or read by call."""

    def __init__(self, path: Path, reading: Reading) -> None:
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise _too_many(error, path) from None
            raise InputError(f"cannot open the file: {error.strerror}", where=str(path)) from None
        self.map: mmap.mmap | None = None
        self.bytes: Tensor | None = None
        try:
            self.stamp = _stamp(os.fstat(self.descriptor))
            if reading == "mmap" or (reading == "auto" and _file_system(path) not in _READ_BY_CALL):
                self._map()
        except BaseException:
            self.close()
            raise

    def _map(self) -> None:
        """Map the file; one that cannot be mapped stays one that is read by call."""
        import torch

        try:
            self.map = mmap.mmap(self.descriptor, 0, prot=mmap.PROT_READ)
        except (
            OSError
        ) as error:  # mmap takes a descriptor of its own; else the file system or the address space refuses
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise _too_many(error, self.path) from None
            return
        except ValueError:
            if os.fstat(self.descriptor).st_size:
                return
            raise InputError("the file became empty", where=str(self.path), fix="Fetch or write it again.") from None
        with warnings.catch_warnings():
            # torch warns that writes to a read-only buffer are undefined; there are none.
            warnings.simplefilter("ignore", UserWarning)
            self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)
        self.address = self.bytes.data_ptr()

    def close(self) -> None:
        self.bytes = None
        if self.map is not None:
            # A tensor that still looks into the map (in a traceback, say) keeps it open until it goes.
            with contextlib.suppress(BufferError):
                self.map.close()
        os.close(self.descriptor)

    def check_unchanged(self) -> None:
        try:
            same = _stamp(os.fstat(self.descriptor)) == _stamp(os.stat(self.path)) == self.stamp
        except OSError:
            same = False
        if not same:
            raise InputError(
                "the file changed while it was read", where=str(self.path), fix="Run again when nothing writes to it."
            )

    def read(self, tensor: StoredTensor, start: int, stop: int) -> Tensor:
        if tensor.strides:
            inner = tensor.elements // tensor.shape[0]
            top, bottom = start // inner, -(-stop // inner)
            rows = self._stretch(tensor, 0, 0).as_strided(tensor.shape, tensor.strides)[top:bottom]
            return rows.contiguous().view(-1)[start - top * inner : stop - top * inner]
        return self._stretch(tensor, start, stop)

    def _stretch(self, tensor: StoredTensor, start: int, stop: int) -> Tensor:
        """What lies between two elements of a tensor in the file; of one with strides, all that it covers."""
        import torch

        first, end = _span(tensor, start, stop)
        if self.bytes is not None:
            raw = self.bytes[first:end]
            if self.address + first & tensor.dtype.size - 1 or first & tensor.dtype.size - 1:
                raw = raw.clone()
        else:
            raw = torch.empty(end - first, dtype=torch.uint8)
            self._pread(_bytes(raw), first)
        return raw.view(torch_dtype(tensor.dtype))

    def _pread(self, into: memoryview, offset: int) -> None:
        while into:
            try:
                got = os.preadv(self.descriptor, [into], offset)
            except OSError as error:
                raise InputError(f"reading failed at byte {offset}: {error.strerror}", where=str(self.path)) from None
            if got == 0:
                raise InputError(
                    f"the file ends at byte {offset} while it is read",
                    where=str(self.path),
                    fix="Fetch or write it again.",
                )
            into, offset = into[got:], offset + got

    def prepare(self, start: int, stop: int) -> None:
        """Bring pages in and map them, so that a failing disk is an error here and not a signal later."""
        if self.map is None or stop <= start:
            return
        if os.fstat(self.descriptor).st_size < stop:
            raise InputError(
                "the file became shorter while it is read", where=str(self.path), fix="Fetch or write it again."
            )
        if self._advise(_POPULATE_READ, start, stop) and ctypes.get_errno() in (errno.EFAULT, _EHWPOISON):
            raise InputError(
                f"the disk cannot read bytes {start} to {stop}",
                where=str(self.path),
                fix="Fetch or copy the file again.",
            )

    def ahead(self, start: int, stop: int) -> None:
        with contextlib.suppress(OSError):
            os.posix_fadvise(self.descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)

    def behind(self, start: int, stop: int) -> None:
        if self.map is not None and stop > start:
            self._advise(mmap.MADV_DONTNEED, start, stop)
        with contextlib.suppress(OSError):
            os.posix_fadvise(self.descriptor, start, stop - start, os.POSIX_FADV_DONTNEED)

    def _advise(self, advice: int, start: int, stop: int) -> int:
        # Through libc, since the mmap module holds the interpreter's lock while the disk works.
        start -= start % mmap.PAGESIZE
        return int(_libc.madvise(ctypes.c_void_p(self.address + start), ctypes.c_size_t(stop - start), advice))


def _stamp(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class _Cpu:
    """Blocks are computed where they are read."""

    block = LARGEST_BLOCK

    def loaded(self, raw: Tensor, compute: torch.dtype | None) -> Tensor:
        return raw if compute is None else raw.to(compute)

    def placed(self, made: Tensor) -> Tensor:
        """A tensor that was made, where blocks are computed."""
        return made

    def stored(self, result: Tensor, into: Sequence[Tensor]) -> None:
        start = 0
        for piece in into:
            piece.copy_(result[start : start + piece.numel()])
            start += piece.numel()

    def entered(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()


class _Staged(_Cpu):
    """Blocks go to a device and come back through pinned buffers, each thread on a stream of its own.

    Conversion happens on the device, so that only stored bytes cross the bus. On a device without streams (the CPU, in tests)
    the same path runs without pinning.
    """

    block = SEGMENT

    def __init__(self, device: str) -> None:
        import torch

        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.local = threading.local()

    def entered(self) -> contextlib.AbstractContextManager[Any]:
        import torch

        if not self.cuda:
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[Any] = torch.cuda.stream(
            torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        )
        return context

    def _buffer(self, slot: str, like: Tensor) -> Tensor:
        """A pinned buffer of this thread, made once for each use and grown when needed."""
        import torch

        size = like.numel() * like.element_size()
        buffer: Tensor | None = getattr(self.local, slot, None)
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self.cuda)
            setattr(self.local, slot, buffer)
        return buffer[:size].view(like.dtype)

    def _wait(self) -> None:
        import torch

        if self.cuda:
            torch.cuda.current_stream(self.device).synchronize()

    def loaded(self, raw: Tensor, compute: torch.dtype | None) -> Tensor:
        staged = self._buffer("up", raw)
        self._wait()
        staged.copy_(raw)
        there = staged.to(self.device, non_blocking=True)
        if there is staged:
            there = staged.clone()
        return there if compute is None else there.to(compute)

    def placed(self, made: Tensor) -> Tensor:
        return made.to(self.device)

    def stored(self, result: Tensor, into: Sequence[Tensor]) -> None:
        rounded = result.to(into[0].dtype)
        staged = self._buffer("down", rounded)
        staged.copy_(rounded, non_blocking=True)
        self._wait()
        super().stored(staged, into)


class _Hashes:
    """BLAKE3 of consecutive 4 MiB pieces of one stretch of bytes that starts at a piece."""

    __slots__ = ("current", "filled", "pieces")

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.current = blake3()
        self.filled = 0

    def update(self, data: memoryview) -> None:
        while data:
            part = data[: PIECE - self.filled]
            self.current.update(part)
            self.filled += len(part)
            data = data[len(part) :]
            if self.filled == PIECE:
                self.finish()

    def finish(self) -> list[bytes]:
        if self.filled:
            self.pieces.append(self.current.digest())
            self.current, self.filled = blake3(), 0
        return self.pieces


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    found: Any = tensor.view(torch.uint8).numpy()
    return memoryview(found)


class _Run:
    """A row or a shared measure on its way: the measures it needs, round by round, then the segments that write it."""

    def __init__(self, engine: _Engine, row: int | None, measures: Sequence[Measure] = ()) -> None:
        self.engine, self.row = engine, row
        self.measured: dict[int, tuple[Any, ...]] = {}
        self.measures = list(measures)
        self.program: _Program | None = None
        if row is not None:
            self.program = _program([engine.plan.rows[row].expression])
            self.measures = engine.unmeasured(self.program)
        self.reduction: Reduction | None = None
        self.parts: dict[int, Any] = {}
        self.total: Any = None
        self.merged = 0
        self.left = 0
        self.pieces: dict[tuple[int, int], list[bytes]] = {}
        self.writing = False

    def known(self, measure: Measure | None) -> tuple[Any, ...]:
        if measure is None:
            return ()
        return self.engine.measured.get(id(measure)) or self.measured.get(id(measure), ())

    def next_tasks(self) -> list[tuple[_Run, int]]:
        """Finish the round that is done and lay out the next; no tasks when the run is over."""
        while self.measures:
            measure = self.measures[0]
            known = self.known(measure)
            if self.reduction is not None:
                known = (*known, self.reduction.finish(self.total))
                self.measured[id(measure)] = known
            self.reduction = measure.op.reduction(known)
            if self.reduction is not None:
                self.programs = [_program(inputs) for inputs in measure.over]
                sizes = [math.prod(program.shape) for program in self.programs]
                self.before = [0, *accumulate(-(-size // LEAF) for size in sizes)]
                self.spans = [
                    (index, start, stop)
                    for index, (program, size) in enumerate(zip(self.programs, sizes, strict=True))
                    for start, stop in (
                        [(0, size)]
                        if self.reduction.sample
                        else _segments(
                            size, program.shape, _measured_by(program.cut, self.reduction.cut), measuring=True
                        )
                    )
                ]
                self.parts, self.total, self.merged = {}, None, 0
                self.left = len(self.spans)
                return [(self, index) for index in range(len(self.spans))]
            self.measured.setdefault(id(measure), known)
            if self.row is None:
                self.engine.measured[id(measure)] = self.measured[id(measure)]
            self.measures.pop(0)
        if self.row is None or self.writing:
            return []
        self.writing = True
        self.reduction = None
        if self.program is None:
            raise AssertionError("a row has a program")
        shape = self.program.shape
        bits = self.engine.plan.rows[self.row].bits
        cut = "element" if self.program.mixed else self.program.cut
        self.spans = [(0, a, b) for a, b in _segments(math.prod(shape), shape, cut, bits=bits)]
        self.left = len(self.spans)
        return [(self, index) for index in range(len(self.spans))]


def _measured_by(program: Cut, reduction: Cut) -> Cut:
    """How what a program makes is cut for a reduction: flat ones need whole leaves, also of what is made by rows."""
    return "tensor" if "tensor" in (program, reduction) else reduction


def _rows_block(shape: tuple[int, ...]) -> int:
    """Elements of a block of whole rows: as the shape alone says, at least one row."""
    length = shape[-1] if shape else 1
    return max(LARGEST_BLOCK // max(length, 1), 1) * max(length, 1)


def _segments(
    elements: int, shape: tuple[int, ...], cut: Cut, *, measuring: bool = False, bits: bool = False
) -> list[tuple[int, int]]:
    """A whole tensor where an op needs it whole; at least one segment, so that an empty tensor is looked at too.

    A measure's segments are whole blocks of rows, where it needs rows. Rows longer than a quarter of a segment are not worth
    making twice: then the tensor is one segment.
    """
    step = 8 * SEGMENT if bits else SEGMENT
    if cut == "row":
        block = _rows_block(shape)
        if measuring:
            step = max(step // block, 1) * block
        elif block > step // 4:
            step = max(elements, 1)
    elif cut == "tensor":
        step = max(elements, 1)
    return [(start, min(start + step, elements)) for start in range(0, max(elements, 1), step)]


def threads_for(threads: int | None) -> int:
    """Worker threads: as asked, else the processors that this process may use."""
    return threads or len(os.sched_getaffinity(0))


def block_of(values: int, compute_size: int, memory: int, threads: int, largest: int = LARGEST_BLOCK) -> int:
    """Elements of a block: the largest power of two of leaves of which so many fit a thread's share of memory, at least one leaf."""
    block = largest
    share = memory / 4 / threads  # the rest is for what a measure holds
    while block > LEAF and values * block * compute_size > share:
        block //= 2
    return block


def peak_memory(plan: Plan, memory: int, threads: int) -> int:
    """Bytes beyond an idle process that computing needs at most: the blocks of all threads, at the most demanding row."""
    worst = 0
    programs: dict[Any, _Program] = {}
    for row in plan.rows:
        # A model has few kinds of rows: their programs are alike but for the tensors.
        kind = _kind(row.expression, {})
        program = programs.get(kind)
        if program is None:
            program = programs[kind] = _program([row.expression])
        elements, values = math.prod(shape_of(row.expression)), program.live + program.temporaries
        block = elements
        if program.cut == "element":
            block = min(block, block_of(values, row.compute.size, memory, threads))
        elif program.cut == "row":
            block = min(block, (2 if program.mixed else 1) * _rows_block(shape_of(row.expression)) + LEAF)
        blocks = (_made_on_the_way(program) if program.read_later else values) * block * row.compute.size
        blocks += _needed(program)
        # In a tensor of one leaf a measure sees all there is at once, and holds no more than that.
        measure = program.measure_bytes if elements > LEAF else min(program.measure_bytes, 4 * blocks)
        worst = max(worst, blocks + measure + program.held * row.compute.size)
    return worst * threads


def _made_on_the_way(program: _Program) -> int:
    """How many of a program's values ops make."""
    return sum(isinstance(step.expression, Apply) for step in program.steps)


def _needed(program: _Program) -> int:
    """Bytes that ops which read for themselves say they hold at most."""
    needed = 0
    for step in program.steps:
        if isinstance(step.expression, Apply) and step.expression.op.lazy:
            needed = max(needed, step.expression.op.needed_bytes([shape_of(one) for one in step.expression.inputs]))
    return needed


def _kind(expression: Expression, seen: dict[int, int]) -> Any:
    """The form of an expression: its ops, and which of its parts are one and the same."""
    known = seen.get(id(expression))
    if known is not None:
        return known
    seen[id(expression)] = len(seen)
    if isinstance(expression, Apply):
        return (id(expression.op), *[_kind(one, seen) for one in expression.inputs])
    return (expression.source, expression.shape) if isinstance(expression, Made) else None


class _Engine:
    """One execution of a plan."""

    def __init__(
        self,
        plan: Plan,
        files: _Files,
        sink: Sink,
        *,
        device: _Cpu,
        threads: int,
        memory: int,
        stop: threading.Event,
        progress: Callable[[int, int], None],
        drop_behind: bool,
    ) -> None:
        self.plan, self.files, self.sink, self.device = plan, files, sink, device
        self.threads, self.memory, self.stop, self.progress = threads, memory, stop, progress
        self.drop_behind = drop_behind
        self.measured: dict[int, tuple[Any, ...]] = {}
        self.lock = threading.Condition()
        self.ready: deque[tuple[_Run, int]] = deque()
        self.fresh: Iterator[list[_Run]] = iter(())
        self.running = 0
        self.errors: list[BaseException] = []
        self.numeric: list[NumericError] = []
        self.beyond: Counter[int] = Counter()
        """Of rows, how many values are too large for the dtype."""
        self.report = Report()
        self.owned: dict[int, list[Load]] = {}

    def run(self, rows: Sequence[int]) -> Report:
        seen: set[int] = set()
        shared: dict[int, Measure] = {}
        for index in rows:
            mine: list[Load] = []
            program = _program([self.plan.rows[index].expression])
            for load in program.loads:
                if id(load) not in seen:
                    seen.add(id(load))
                    mine.append(load)
            self.owned[index] = mine
            _find_shared(program, shared)
        for measure in shared.values():
            below = (_Run(self, None, self.unmeasured(_program(inputs))) for inputs in measure.over)
            self._work([run] for run in below if run.measures)
            self._work([[_Run(self, None, [measure])]])
        self._work(self._batches(rows))
        numeric = [*self.numeric, *(self._overflow(row, count) for row, count in sorted(self.beyond.items()))]
        if numeric:
            raise numeric[0] if len(numeric) == 1 else Problems(numeric)
        return self.report

    def unmeasured(self, program: _Program) -> list[Measure]:
        """The measures that a program needs and that are not known yet, each after those below it."""
        return [measure for measure in program.measures if id(measure) not in self.measured]

    def _batches(self, rows: Sequence[int]) -> Iterator[list[_Run]]:
        """Rows as they are started: one at a time, small ones together, with the kernel reading ahead of them."""
        ahead, asked = 0, deque[int]()
        position = 0
        batch: list[_Run] = []
        size = 0
        for place, index in enumerate(rows):
            while position < len(rows) and (position <= place or ahead < AHEAD):
                amount = 0
                for load in self.owned[rows[position]]:
                    self.files.ahead(load)
                    amount += load.tensor.nbytes
                asked.append(amount)
                ahead += amount
                position += 1
            ahead -= asked.popleft()
            run = _Run(self, index)
            elements = self.plan.rows[index].elements
            if elements > SMALL:
                if batch:
                    yield batch
                    batch, size = [], 0
                yield [run]
                continue
            batch.append(run)
            size += elements + 1024
            if size > SEGMENT // 4:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _work(self, batches: Any) -> None:
        import torch

        self.fresh = iter(batches)
        _keep_freed_memory()
        before = torch.get_num_threads()
        # Reductions and matrix products change with the number of threads inside an op; blocks are the parallelism here.
        torch.set_num_threads(1)
        workers = [threading.Thread(target=self._worker, name=f"mergeflow-{i}") for i in range(self.threads)]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                # With a timeout, so that signals are handled while the workers work.
                while worker.is_alive():
                    worker.join(0.2)
        except BaseException:
            self.stop.set()
            raise
        finally:
            for worker in workers:
                if worker.ident is not None:
                    worker.join()
            torch.set_num_threads(before)
        if self.errors:
            raise self.errors[0]
        if self.stop.is_set():
            raise Interrupted("stopped")

    def _worker(self) -> None:
        import torch

        torch.set_num_threads(1)
        report = Report()
        try:
            with self.device.entered(), torch.inference_mode():
                while (tasks := self._take()) is not None:
                    for run, index in tasks:
                        while True:
                            self._segment(run, index, report)
                            following = self._after(run, len(tasks) > 1)
                            if following is None:
                                break
                            run, index = following
        except BaseException as error:  # the main thread raises it again
            with self.lock:
                self.errors.append(error)
                self.stop.set()
                self.lock.notify_all()
        finally:
            with self.lock:
                self.report.add(report)

    def _take(self) -> list[tuple[_Run, int]] | None:
        """The next segment, or the next batch of small rows (each of one segment); None when all is done."""
        with self.lock:
            while not self.stop.is_set():
                if self.ready:
                    return [self.ready.popleft()]
                batch = next(self.fresh, None)
                if batch is not None:
                    self.running += len(batch)
                    tasks = [task for run in batch for task in run.next_tasks()]
                    if len(batch) > 1:
                        return tasks
                    self.ready.extend(tasks)
                    if len(tasks) > 1:
                        self.lock.notify_all()
                    continue
                if self.running == 0:
                    self.lock.notify_all()
                    return None
                self.lock.wait()
            return None

    def _after(self, run: _Run, alone: bool) -> tuple[_Run, int] | None:
        """A segment is done: lay out the run's next round when it was the last. `alone`: this thread takes the round itself."""
        with self.lock:
            run.left -= 1
            if run.left:
                return None
        tasks = run.next_tasks()
        if alone and len(tasks) == 1:
            return tasks[0]
        with self.lock:
            if tasks:
                self.ready.extendleft(reversed(tasks))
            else:
                self.running -= 1
            self.lock.notify_all()
        return None

    # Segments

    def _segment(self, run: _Run, index: int, report: Report) -> None:
        try:
            if run.writing:
                self._write(run, index, report)
            else:
                self._measure(run, index, report)
        except MergeflowError as error:
            if run.row is not None and not isinstance(error, Interrupted | MachineError):
                row = self.plan.rows[run.row]
                raise error.placed(f"{row.node}: {row.name}") from None
            raise

    def _blocks(self, program: _Program, start: int, stop: int, cut: Cut) -> Iterator[tuple[int, int]]:
        """The blocks that cover a segment; of rows the first and the last may reach beyond it."""
        elements = math.prod(program.shape)
        if cut == "row":
            block = _rows_block(program.shape)
            start -= start % block
        elif cut == "tensor":
            block = max(elements, 1)
        else:
            values, size = program.live + program.temporaries, _compute_dtype(program).size
            block, elements = block_of(values, size, self.memory, self.threads, self.device.block), stop
        for first in range(start, max(stop, start + 1), block):
            if self.stop.is_set():
                raise Interrupted("stopped")
            yield first, min(first + block, elements)

    def _measure(self, run: _Run, index: int, report: Report) -> None:
        which, start, stop = run.spans[index]
        program, reduction = run.programs[which], run.reduction
        if reduction is None:
            raise AssertionError("a measuring run has a reduction")
        measure = run.measures[0]
        at = Block(
            start,
            run.known(measure),
            program.shape,
            measure.keys[which] if measure.keys else (),
            run.before[which],
        )
        cut = _measured_by(program.cut, reduction.cut)
        merged: list[Any] = []
        self._prepare(program, start, stop)
        for first, end in [(start, stop)] if reduction.sample else self._blocks(program, start, stop, cut):
            results = [program.steps[result].expression for result in program.results]
            if reduction.sample and program.cut == "row":
                found = [self._spread_of(run, one, stop) for one in results]
            elif program.cut == "row" and (program.mixed or cut == "element"):
                found = [self._at(run, one, first, end, {}) for one in results]
            else:
                found = self._results(run, program, first, end, sample=reduction.sample and program.cut == "element")
                found = [spread(one) for one in found] if reduction.sample else found
            given = found if reduction.sample else [cut_as(one, reduction.cut, program.shape) for one in found]
            part = reduction.block(given, replace(at, start=first))
            del found, given  # before the next block is made
            merged = [reduction.merge([*merged, part])] if merged else [part]
            _between_blocks(end - first)
            if not reduction.sample:
                report.bytes_in += _stored_bytes(program, end - first)
                self.progress(_stored_bytes(program, end - first), 0)
        with self.lock:
            run.parts[index] = merged[0]
            # In the order of the segments, whichever is done first; few wait, since they are taken in that order too.
            while run.merged in run.parts:
                part = run.parts.pop(run.merged)
                run.total = part if run.merged == 0 else reduction.merge([run.total, part])
                run.merged += 1

    def _prepare(self, program: _Program, start: int, stop: int) -> None:
        if program.cut == "row":
            block = _rows_block(program.shape)
            start, stop = start - start % block, min(stop + -stop % block, math.prod(program.shape))
        for step in program.steps:
            if isinstance(step.expression, Load):
                elements = step.expression.tensor.elements
                self.files.prepare(step.expression, *((0, elements) if program.cut == "tensor" else (start, stop)))
            for load in step.expression.loads if isinstance(step.expression, Made) else ():
                self.files.prepare(load, 0, load.tensor.elements)

    def _values(
        self,
        run: _Run,
        program: _Program,
        start: int,
        stop: int,
        *,
        raw: dict[int, Tensor] | None = None,
        suspects: list[str] | None = None,
        sample: bool = False,
    ) -> dict[int, Tensor]:
        """The results of a program on a block, or on a sample of it.

        `raw`, if given, receives what was read; `suspects` the ops that would hide a NaN or Inf that they were given.
        Each op is computed in float32, or in float64 if any of its own inputs is: what a measure sees of it is then what
        the row sees, whatever stands above.
        """
        import torch

        values: dict[int, Any] = {}
        # Integers, and a tensor that no op touches, are given as they are stored.
        as_stored = _exact(program) or len(program.steps) == 1
        later = program.read_later
        for position, step in enumerate(program.steps):
            expression = step.expression
            # Where an op takes whole tensors they need not be of one size.
            first, end = (0, math.prod(shape_of(expression))) if program.cut == "tensor" else (start, stop)
            if position in later:
                values[position] = _Later(self, expression)
            elif isinstance(expression, Load):
                stored = self.files.spread(expression) if sample else self.files.read(expression, first, end)
                if raw is not None:
                    raw[position] = stored
                values[position] = self.device.loaded(stored, None if as_stored else _computed_in(expression))
            elif isinstance(expression, Made):
                spans = _spread_runs(math.prod(expression.shape)) if sample else [(first, end)]
                runs = [self._made(expression, *span) for span in spans]
                values[position] = runs[0] if len(runs) == 1 else torch.cat(runs)
            elif expression.op.lazy:
                given = [
                    one if isinstance(one, _Later) else _Here(one, shape_of(of))
                    for one, of in zip((values[one] for one in step.inputs), expression.inputs, strict=True)
                ]
                at = Block(0, run.known(expression.measure), shape_of(expression), expression.keys, expression.before)
                values[position] = expression.op.compute_lazily(given, at).reshape(-1)
            else:
                inputs = [values[one] for one in step.inputs]
                if not as_stored and len({one.dtype for one in inputs}) > 1:
                    inputs = [one.to(torch.float64) for one in inputs]
                if suspects is not None and not expression.op.shows_non_finite:
                    suspects += [expression.op.name] * (not all(_finite(one, None) for one in inputs))
                at = Block(
                    start, run.known(expression.measure), shape_of(expression), expression.keys, expression.before
                )
                values[position] = _applied(expression.op, inputs, at, [shape_of(one) for one in expression.inputs])
            for one in step.drops:
                del values[one]
        return values

    def _results(self, run: _Run, program: _Program, start: int, stop: int, *, sample: bool) -> list[Tensor]:
        """What a measure's program makes of a block, or of a sample of it; its other values end with the call."""
        values = self._values(run, program, start, stop, sample=sample)
        return [values[result] for result in program.results]

    def _spread_of(self, run: _Run, expression: Expression, elements: int) -> Tensor:
        """A sample of what is made by rows (mergeflow.ops.base.spread)."""
        import torch

        return torch.cat([self._at(run, expression, *span, {}) for span in _spread_runs(elements)])

    def _at(
        self,
        run: _Run,
        expression: Expression,
        start: int,
        stop: int,
        known: dict[Any, Tensor],
        suspects: list[str] | None = None,
    ) -> Tensor:
        """Elements [start, stop) of what an expression makes, flat, where some of it is made by rows and some by leaves.

        Each op is given the stretch that it must have around these, rows or whole leaves, and no other cut than it has alone.
        `known` keeps what was made for this stretch.
        """
        import torch

        key = (id(expression), start, stop)
        if key in known:
            return known[key]
        size, shape = math.prod(shape_of(expression)), shape_of(expression)
        unit = 1
        if isinstance(expression, Made) and expression.source.cut == "row":
            unit = max(shape[-1], 1)
        elif isinstance(expression, Apply):
            unit = {"tensor": max(size, 1), "row": _rows_block(shape), "element": LEAF}[expression.op.cut]
        first, end = start - start % unit, min(stop + -stop % unit, size)
        if isinstance(expression, Load):
            self.files.prepare(expression, first, end)
            found = self.device.loaded(self.files.read(expression, first, end), _computed_in(expression))
        elif isinstance(expression, Made):
            found = self._made(expression, first, end)
        else:
            op = expression.op
            inputs = [self._at(run, one, first, end, known, suspects) for one in expression.inputs]
            if len({one.dtype for one in inputs}) > 1:
                inputs = [one.to(torch.float64) for one in inputs]
            if suspects is not None and not op.shows_non_finite:
                suspects += [op.name] * (not all(_finite(one, None) for one in inputs))
            at = Block(first, run.known(expression.measure), shape, expression.keys, expression.before)
            found = _applied(op, inputs, at, [shape_of(one) for one in expression.inputs])
        found = found[start - first : stop - first]
        known[key] = found
        return found

    def _made(self, expression: Made, start: int, stop: int) -> Tensor:
        """Elements of a tensor that its source makes."""
        made = expression.source.make(
            lambda which, first, end: self.device.loaded(self.files.read(expression.loads[which], first, end), None),
            start,
            stop,
            expression.shape,
            _computed_in(expression),
        )
        return self.device.placed(made)

    def rows(self, leaf: Load | Made, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a leaf, flat, in its compute dtype, where blocks are computed."""
        if isinstance(leaf, Made):
            for load in leaf.loads:
                self.files.prepare(load, 0, load.tensor.elements)
            return self._made(leaf, start, stop)
        self.files.prepare(leaf, start, stop)
        return self.device.loaded(self.files.read(leaf, start, stop), _computed_in(leaf))

    def _write(self, run: _Run, index: int, report: Report) -> None:
        import torch

        if run.row is None or run.program is None:
            raise AssertionError("only rows are written")
        row, program = self.plan.rows[run.row], run.program
        _, start, stop = run.spans[index]
        size, out = row.dtype.size, torch_dtype(row.dtype)
        owned = {id(load) for load in self.owned[run.row]}
        later = program.read_later
        plain = () if program.mixed else enumerate(program.steps)  # else stretches overlap: hashed when the row is done
        hashed = {p: _Hashes() for p, s in plain if id(s.expression) in owned and p not in later}
        digests = _Hashes()

        def into_bytes(place: int) -> int:
            return -(-place // 8) if row.bits else place * size

        memory = self.sink.memory(run.row, into_bytes(start), into_bytes(stop)) if stop > start else []
        pieces = [torch.frombuffer(piece, dtype=out) for piece in memory]
        self._prepare(program, start, stop)
        broken = False
        for first, end in self._blocks(program, start, stop, "element" if program.mixed else program.cut):
            raw: dict[int, Tensor] = {}
            suspects: list[str] | None = [] if row.check_finite else None
            if program.mixed:
                result = self._at(run, row.expression, first, end, {}, suspects)
            else:
                result = self._values(run, program, first, end, raw=raw, suspects=suspects)[program.results[0]]
            mine = slice(max(start - first, 0), max(min(end, stop) - first, 0))
            first, end = first + mine.start, first + mine.stop
            if end == first:
                continue
            result = result[mine]
            clock = time.perf_counter()
            if row.check_finite and (suspects or not _finite(result, row.dtype)):
                broken = True
                if self._not_finite(run.row, program, suspects or [], result):
                    break
                continue
            report.seconds["check"] += time.perf_counter() - clock
            if row.bits:
                result = _packed(result)
                into = _slices(pieces, (first - start) // 8, -(-(end - start) // 8))
            else:
                into = _slices(pieces, first - start, end - start)
            self.device.stored(result, into)
            clock = time.perf_counter()
            for position, hashes in hashed.items():
                hashes.update(_bytes(raw[position] if program.cut == "tensor" else raw[position][mine]))
            for piece in into:
                digests.update(_bytes(piece))
            report.seconds["hash"] += time.perf_counter() - clock
            bytes_in, bytes_out = _stored_bytes(program, end - first), into_bytes(end) - into_bytes(first)
            report.bytes_in += bytes_in
            report.bytes_out += bytes_out
            self.progress(bytes_in, bytes_out)
            del result  # before the next block is made
            _between_blocks(end - first)
        if stop > start:
            self.sink.filled(run.row, into_bytes(start), into_bytes(stop))
        if broken:  # the row is never done and so never kept; its memory went back, or a sink would run out of it
            return
        for position, hashes in hashed.items():
            run.pieces[position, index] = hashes.finish()
        run.pieces[-1, index] = digests.finish()
        if self.drop_behind:
            for step in program.steps:
                if isinstance(step.expression, Load):
                    self.files.behind(step.expression, start, stop)
        self._finish_row(run, list(hashed))

    def _finish_row(self, run: _Run, hashed: Sequence[int]) -> None:
        """When the last segment is in, tell the sink the digests of the row and of the tensors that it was the first to read."""
        if run.row is None or run.program is None:
            raise AssertionError("only rows are written")
        count = len(run.spans)
        with self.lock:
            if sum((-1, index) in run.pieces for index in range(count)) < count or run.row not in self.owned:
                return
            owned = self.owned.pop(run.row)
        row = self.plan.rows[run.row]
        inputs = {}
        read = {id(run.program.steps[position].expression) for position in hashed}
        for one in owned:
            if id(one) not in read:
                inputs[f"{one.model}/{one.tensor.name}"] = self._digest(one)
        for position in hashed:
            load = run.program.steps[position].expression
            if isinstance(load, Load):
                found = [piece for index in range(count) for piece in run.pieces[position, index]]
                inputs[f"{load.model}/{load.tensor.name}"] = tensor_digest(
                    found, load.tensor.dtype.name, load.tensor.shape
                )
        made = [piece for index in range(count) for piece in run.pieces[-1, index]]
        self.sink.row_done(run.row, tensor_digest(made, row.dtype.name, row.shape), inputs)

    def _digest(self, load: Load) -> str:
        """The digest of a stored tensor that was not read from end to end."""
        hashes = _Hashes()
        for start, stop in _segments(load.tensor.elements, load.tensor.shape, "element"):
            self.files.prepare(load, start, stop)
            if stop > start:
                hashes.update(_bytes(self.files.read(load, start, stop)))
        return tensor_digest(hashes.finish(), load.tensor.dtype.name, load.tensor.shape)

    def _not_finite(self, index: int, program: _Program, suspects: Sequence[str], result: Tensor) -> bool:
        """Note why a row is not finite: NaN and Inf counted in each tensor it reads, or values too large for the dtype.

        Whether all is said of the row; values that are too large are counted block by block.
        """
        import torch

        row = self.plan.rows[index]
        with self.lock:
            if any(error.where == f"{row.node}: {row.name}" for error in self.numeric):
                return True
            counting = index in self.beyond
        if counting:
            with self.lock:
                self.beyond[index] += _overflows(result, row.dtype)
            return False
        found = []
        for load in program.loads:
            nan = inf = 0
            for start in range(0, load.tensor.elements, LARGEST_BLOCK):
                part = self.files.read(load, start, min(start + LARGEST_BLOCK, load.tensor.elements)).to(torch.float64)
                nan += int(part.isnan().sum())
                inf += int(part.isinf().sum())
            if nan or inf:
                counts = " and ".join(f"{n} {word}" for n, word in ((nan, "NaN"), (inf, "Inf")) if n)
                found.append(f"'{load.tensor.name}' of '{load.model}' has {counts}")
        if found:
            what, fix = "; ".join(found), "Mend the checkpoint, or write `non_finite: keep` under `output:`."
        elif suspects:
            what = f"a value overflows before it comes to '{suspects[0]}'"
            fix = "Round to a wider dtype there, or use smaller weights."
        else:
            with self.lock:
                self.beyond[index] += _overflows(result, row.dtype)
            return False
        with self.lock:
            error = NumericError(what, where=f"{row.node}: {row.name}", fix=fix)
            if all(other.where != error.where for other in self.numeric):
                self.numeric.append(error)
        return True

    def _overflow(self, index: int, count: int) -> NumericError:
        row = self.plan.rows[index]
        return NumericError(
            f"{count} value{'s overflow' if count > 1 else ' overflows'} {row.dtype.name} (its largest is {row.dtype.largest:g})",
            where=f"{row.node}: {row.name}",
            fix="Write a wider `dtype:` under `output:`, or smaller weights.",
        )


def _compute_dtype(program: _Program) -> DType:
    wide = any(load.tensor.dtype.name == "float64" for load in program.loads)
    return BY_NAME["float64" if wide else "float32"]


def _computed_in(leaf: Load | Made) -> torch.dtype:
    """The dtype in which a leaf is computed with."""
    import torch

    return torch.float64 if any(load.tensor.dtype.name == "float64" for load in loads_of(leaf)) else torch.float32


@dataclass(frozen=True, slots=True)
class _Later:
    """A leaf that an op reads when it wants it, by rows."""

    engine: _Engine
    leaf: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.leaf)

    def rows(self, start: int, stop: int) -> Tensor:
        shape = self.shape
        length = math.prod(shape[1:])
        return self.engine.rows(self.leaf, start * length, stop * length).reshape(stop - start, *shape[1:])


@dataclass(frozen=True, slots=True)
class _Here:
    """A tensor that is at hand, for an op that reads by rows."""

    tensor: Tensor
    shape: tuple[int, ...]

    def rows(self, start: int, stop: int) -> Tensor:
        return self.tensor.reshape(self.shape)[start:stop]


def _applied(op: Op, inputs: Sequence[Tensor], block: Block, shapes: Sequence[tuple[int, ...]]) -> Tensor:
    """An op on flat inputs of these shapes, given to it as it wants them cut; the result is flat."""
    import torch

    if op.cut == "element" or not inputs:
        return op.compute(inputs, block).reshape(-1)
    if op.cut == "tensor":
        whole = [cut_as(one, "tensor", shape) for one, shape in zip(inputs, shapes, strict=True)]
        return op.compute(whole, block).reshape(-1)
    # Where something else in the row needs the whole tensor, rows are still cut as they are everywhere.
    size = _rows_block(block.shape)
    made = [
        op.compute(
            [cut_as(one[start : start + size], "row", block.shape) for one in inputs],
            replace(block, start=block.start + start),
        ).reshape(-1)
        for start in range(0, max(len(inputs[0]), 1), size)
    ]
    return made[0] if len(made) == 1 else torch.cat(made)


def _packed(truth: Tensor) -> Tensor:
    """Eight truth values to a byte, the first in the lowest bit."""
    import numpy as np
    import torch

    return torch.from_numpy(np.packbits(np.asarray(truth.cpu()) != 0, bitorder="little"))


def _exact(program: _Program) -> bool:
    return any(op.exact for op in program.ops)


def _stored_bytes(program: _Program, elements: int) -> int:
    total = 0
    for step in program.steps:
        if program.cut == "tensor":
            total += sum(load.tensor.nbytes for load in loads_of(step.expression))
        elif isinstance(step.expression, Load):
            total += step.expression.tensor.dtype.size * elements
        elif isinstance(step.expression, Made):
            whole = sum(load.tensor.nbytes for load in step.expression.loads)
            total += whole * elements // max(math.prod(step.expression.shape), 1)
    return total


def _slices(pieces: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """Elements [start, stop) of tensors that stand one after the other."""
    found, offset = [], 0
    for piece in pieces:
        length = piece.numel()
        first, end = max(start - offset, 0), min(stop - offset, length)
        if first < end:
            found.append(piece[first:end])
        offset += length
    return found


def _finite(values: Tensor, dtype: DType | None) -> bool:
    """Whether all values are finite and stay so in `dtype`. Works on every float dtype; aminmax knows neither float8 nor empty tensors."""
    import torch

    if not values.is_floating_point() or not values.numel():
        return True
    if values.element_size() == 1:
        values = values.float()
    low, high = torch.aminmax(values)
    largest = dtype.largest if dtype is not None and dtype.largest is not None else float("inf")
    least, most = float(low), float(high)
    if -largest <= least and most <= largest and least > -float("inf") and most < float("inf"):
        return True
    # Between the largest value and half a step beyond it, rounding still gives the largest.
    inside = least == least and -float("inf") < least and most < float("inf") and dtype is not None and dtype.size > 1
    return bool(inside and dtype is not None and torch.isfinite(values.to(torch_dtype(dtype))).all())


def _overflows(values: Tensor, dtype: DType) -> int:
    """How many values are too large for a dtype; half a step beyond its largest still rounds to that."""
    import torch

    if dtype.size > 1:
        return int((~torch.isfinite(values.to(torch_dtype(dtype)))).sum())
    assert dtype.largest is not None
    return int((values.abs() > dtype.largest).sum())


def check_tied(plan: Plan, paths: Mapping[tuple[str, str], Path], reading: Reading = "auto") -> None:
    """Hold stored heads against the embeddings that their configs tie them to. Raises RecipeError where they differ."""
    import torch

    if not plan.equal:
        return
    with contextlib.closing(_Files(paths, reading)) as files:
        for pair in plan.equal:
            kept, dropped = Load(pair.model, pair.kept), Load(pair.model, pair.dropped)
            for start in range(0, pair.kept.elements, SEGMENT):
                stop = min(start + SEGMENT, pair.kept.elements)
                files.prepare(kept, start, stop)
                files.prepare(dropped, start, stop)
                if not torch.equal(*(files.read(load, start, stop).view(torch.uint8) for load in (kept, dropped))):
                    raise RecipeError(
                        f"the config of '{pair.model}' ties '{pair.dropped.name}' to '{pair.kept.name}', and the stored values differ",
                        where=pair.model,
                        fix="Write `tied: untie` under `output:` to merge both, or `tied: trust_config` to drop the stored one.",
                    )


def execute(
    plan: Plan,
    paths: Mapping[tuple[str, str], Path],
    sink: Sink,
    *,
    finished: Mapping[int, Any] | None = None,
    device: str = "cpu",
    threads: int | None = None,
    memory: int = 2**30,
    reading: Reading = "auto",
    stop: threading.Event | None = None,
    progress: Callable[[int, int], None] = lambda bytes_in, bytes_out: None,
    drop_behind: bool = False,
) -> Report:
    """Fill the rows of a plan, but for those `finished` before, in the order of what they read, into `sink`.

    `paths` gives the local file of each (model, file) that rows read; `memory` is in bytes; `stop` ends the work after the blocks
    in flight. `device` is `cpu`, `cuda`, `cuda:1`, or `staged:cpu`, which takes the way of a device on the CPU.
    Raises NumericError (all rows looked at, one error a row), InputError, MachineError, RecipeError for integer tensors that differ,
    Interrupted when stopped.
    """
    way = _Cpu() if device == "cpu" else _Staged(device.removeprefix("staged:"))
    position = {model: place for place, model in enumerate(plan.models)}

    def place_of_first_load(index: int) -> tuple[int, str, int]:
        expression: Expression | None = plan.rows[index].expression
        while isinstance(expression, Apply):
            expression = next(iter(expression.inputs), None)
        load = next(iter(loads_of(expression)), None) if expression else None
        return (position[load.model], load.tensor.file, load.tensor.begin) if load else (-1, "", 0)

    # In the order of the files, so that reading is one sweep, and rows of several outputs over one tensor follow each other
    # while it is in the page cache; rows that need nothing from a file come first.
    rows = sorted((i for i in range(len(plan.rows)) if not finished or i not in finished), key=place_of_first_load)
    with contextlib.closing(_Files(paths, reading)) as files:
        engine = _Engine(
            plan,
            files,
            sink,
            device=way,
            threads=threads_for(threads),
            memory=memory,
            stop=stop or threading.Event(),
            progress=progress,
            drop_behind=drop_behind,
        )
        try:
            report = engine.run(rows)
        except (NumericError, RecipeError, Problems):
            # Values that are wrong because the file is another one now are no fault of the values.
            files.check_unchanged()
            raise
        files.check_unchanged()
    return report

"""What is asked of the file system, each call with an error that names its path; knows nothing of outputs."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from mergeflow.errors import MachineError

REFUSED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
FULL = (errno.ENOSPC, errno.EDQUOT)
TOO_MANY = (errno.EMFILE, errno.ENFILE)
FEWER_FILES = "Let a process open more files (`ulimit -n`), or write fewer shards (`shard_size:` under `output:`)."
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write on the file system of `path` or, before it exists, of its nearest parent."""
    path = Path(os.path.abspath(path))
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    with named(path, "cannot be asked for its free space"):
        numbers = os.statvfs(path)
    return numbers.f_bavail * numbers.f_frsize


def write_all(fd: int, content: bytes) -> None:
    """Write all of `content`, however little a call takes of it."""
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]


def sync_path(path: Path) -> None:
    """fsync a file or folder; a file system that cannot sync folders says EINVAL, and has nothing better."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with at(path):
            os.fsync(fd)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
    finally:
        os.close(fd)


def allocate(fd: int, size: int) -> bool:
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


def rename(old: Path, new: Path, flags: int) -> None:
    """renameat2; ENOSYS where the C library has none."""
    call = getattr(_libc, "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    here = -100  # AT_FDCWD
    if call(here, os.fsencode(old), here, os.fsencode(new), ctypes.c_uint(flags)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(old), None, str(new))


def keep_only(folder: Path, wanted: set[Path]) -> None:
    """Remove all files below `folder` but `wanted`, and folders that hold none of them; follows no links."""
    if not os.path.lexists(folder):
        return
    if not stat.S_ISDIR(os.lstat(folder).st_mode):
        os.unlink(folder)
        return
    for entry in list(os.scandir(folder)):
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False) and any(file.is_relative_to(path) for file in wanted):
            keep_only(path, wanted)
        elif path not in wanted or not entry.is_file(follow_symlinks=False):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all in it; nothing there is fine."""
    try:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path)
        else:
            os.unlink(path)
    except FileNotFoundError:
        pass


def is_file(path: Path) -> bool:
    """Whether a regular file is here, and not a link to one."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


@contextlib.contextmanager
def created(path: Path, *, exclusive: bool = False) -> Iterator[int]:
    """A descriptor of a new, empty file, with the mode the umask gives."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_EXCL if exclusive else os.O_TRUNC)
    fd = os.open(path, flags, 0o666)
    try:
        with at(path):
            yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def at(path: Path) -> Iterator[None]:
    """Give an OSError of a call on a descriptor the path that it was about."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def named(path: Path, what: str) -> Iterator[None]:
    """Turn an OSError into a MachineError that names the path it was about, or `path`."""
    try:
        yield
    except OSError as error:
        where = str(error.filename or path)
        fix = "Free some space and run the same command again." if error.errno in FULL else ""
        if error.errno in TOO_MANY:
            fix = FEWER_FILES
        raise MachineError(f"{what} ({error.strerror or error})", where=where, fix=fix) from None

"""A model's name or path -> a `Folder` whose files can be listed, read in part, and brought to the local disk.

The only module that imports huggingface_hub, and it does so inside functions: that import is slow, and a recipe whose
models are local never pays for it. huggingface_hub reads its own environment (endpoint, cache, token, offline mode).

A hub repository is resolved once, to a commit; everything after is asked of that commit, so a branch that moves during
a run changes nothing. Small files go through the standard cache, so that a later offline run finds them; weights are
read by range until `local` asks for the file. Offline, the cache alone is looked at. huggingface_hub has many
exceptions and those of its HTTP library show through; `_translated` is the one place that makes them ours.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

from mergeflow.errors import InputError, MachineError, MergeflowError, RecipeError, did_you_mean

T = TypeVar("T")

Progress = Callable[[int], None]
"""Called with the count of bytes that arrived since the last call, from any thread."""

SMALL_FILE = 64 * 1024 * 1024
DOWNLOADS = 4
TRIES = 3
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
_LOCAL = re.compile(r"\.{1,2}(/|$)|/|~")
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"({_PART}/{_PART})(?:@(.+))?", re.DOTALL)
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/+-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Folder(Protocol):
    """The files of a model, wherever they are. Names are posix paths relative to the folder."""

    @property
    def label(self) -> str:
        """The folder as the recipe wrote it: `org/x@rev`, `./math`."""
        ...

    @property
    def revision(self) -> str | None:
        """The commit on the hub; None for a local folder."""
        ...

    def names(self) -> tuple[str, ...]:
        """All files, sorted; of a local folder those at the top and one level below."""
        ...

    def exists(self, name: str) -> bool:
        """Whether the folder has a file of this name."""
        ...

    def size(self, name: str) -> int:
        """Bytes of a file. Raises InputError when there is none, MachineError when offline and not in the cache."""
        ...

    def read(self, name: str, limit: int = SMALL_FILE) -> bytes:
        """A small file whole. Raises InputError when it is larger than `limit` bytes."""
        ...

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Exactly the bytes from `start` up to `stop`. Raises InputError when the file ends before `stop`."""
        ...

    def local(self, names: Sequence[str], progress: Progress | None = None) -> dict[str, Path]:
        """Paths on the local disk of these files, downloaded where needed."""
        ...

    def sha256(self, name: str) -> str | None:
        """The SHA-256 that the hub states for a large file; None where it states none."""
        ...


def place_of(folder: Folder, name: str) -> str:
    """What messages call a file of a folder: `org/x@rev/model.safetensors`, `./math/config.json`."""
    own = getattr(folder, "only_file", None)
    return folder.label if own == name else f"{folder.label.rstrip('/')}/{name}"


def is_local(path: str) -> bool:
    """Whether a recipe's `path` is a local one: it starts with ./ ../ / or ~, is . or .., or ends in .safetensors."""
    return _LOCAL.match(path) is not None or path.endswith(".safetensors")


def locate(path: str, *, revision: str | None = None, subfolder: str | None = None, relative_to: Path) -> Folder:
    """The folder that a recipe's `path` names; local paths are relative to `relative_to`.

    Of a hub repository the commit and the list of files are fetched here. Raises RecipeError when `path` can be neither
    a local path nor a repository, InputError when there is nothing there, MachineError when the hub cannot be reached.
    """
    if "\0" in path:
        raise RecipeError("a path cannot hold a NUL character", where=path)
    below = _subfolder(subfolder, path)
    if is_local(path):
        if revision is not None:
            raise RecipeError("a local path has no revision", where=path, fix="Leave out `revision:`.")
        return _locate_local(path, below, relative_to)
    found = _REPOSITORY.fullmatch(path)
    beside = os.path.exists(relative_to / path)
    hint = f"For the local one beside the recipe write './{path}'." if beside else ""
    if found is None or ".." in found[1] or "--" in found[1]:
        raise RecipeError(
            f"'{path}' is neither a local path nor a repository",
            fix=hint
            or "Local paths start with ./ ../ / or ~; a repository is called owner/name or owner/name@revision.",
        )
    repository, short = found.groups()
    if short is not None and revision is not None and short != revision:
        raise RecipeError(f"'{path}' names one revision and `revision: {revision}` another", fix="Keep one of them.")
    wanted = revision if short is None else short
    if wanted is not None and (_REVISION.fullmatch(wanted) is None or ".." in wanted or wanted.endswith("/")):
        raise RecipeError(f"'{wanted}' cannot be a revision", where=path, fix="Give a branch, a tag or a commit.")
    label = repository if wanted is None else f"{repository}@{wanted}"
    try:
        return _locate_on_hub(repository, wanted, below, label)
    except MergeflowError as error:
        error.fix = f"{error.fix} {hint}".strip()
        raise


def _subfolder(subfolder: str | None, path: str) -> str:
    """A subfolder as a clean posix path, empty for none."""
    parts = PurePosixPath(subfolder or "").parts
    if "\\" in (subfolder or "") or "\0" in (subfolder or "") or any(part in ("..", "/", "//") for part in parts):
        raise RecipeError(f"subfolder '{subfolder}' leads outside", where=path, fix="Name a folder inside the model's.")
    return "/".join(parts)


def _locate_local(path: str, below: str, relative_to: Path) -> LocalFolder:
    try:
        target = Path(os.path.abspath(relative_to / Path(path).expanduser())) / below
        mode = target.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        where = f"{path}/{below}" if below else path
        raise InputError("no such file or folder", where=where, fix=_nearest(target)) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"cannot be read: {_reason(error)}", where=path) from None
    label = f"{path.rstrip('/')}/{below}" if below else path
    if stat.S_ISDIR(mode):
        return LocalFolder(label, target)
    if not stat.S_ISREG(mode):
        raise InputError("is neither a file nor a folder", where=label)
    return LocalFolder(label, target.parent, target.name)


def _nearest(target: Path) -> str:
    try:
        return did_you_mean(target.name, os.listdir(target.parent))
    except OSError:
        return f"{target.parent} does not exist either."


def _reason(error: BaseException) -> str:
    """The words of an error of the system, without its number and path."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).strip().splitlines()[0] if str(text).strip() else type(error).__name__


@dataclass(frozen=True)
class LocalFolder:
    """A folder on this machine. `only_file` names the one weight file that the recipe's path pointed at."""

    label: str
    root: Path
    only_file: str | None = None

    @property
    def revision(self) -> None:
        return None

    def names(self) -> tuple[str, ...]:
        found = []
        try:
            for name in os.listdir(self.root):
                path = self.root / name
                if path.is_file():
                    found.append(name)
                elif path.is_dir() and not path.is_symlink() and not name.startswith("."):
                    found += [f"{name}/{inner}" for inner in os.listdir(path) if (path / inner).is_file()]
        except OSError as error:
            raise InputError(f"cannot be listed: {_reason(error)}", where=self.label) from None
        return tuple(sorted(found))

    def exists(self, name: str) -> bool:
        return (self.root / name).is_file()

    def size(self, name: str) -> int:
        with self.opened(name) as descriptor:
            return os.fstat(descriptor).st_size

    def read(self, name: str, limit: int = SMALL_FILE) -> bytes:
        with self.opened(name) as descriptor:
            size = os.fstat(descriptor).st_size
            _check_small(size, limit, place_of(self, name))
            return _pread(descriptor, 0, size, place_of(self, name))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        with self.opened(name) as descriptor:
            return _pread(descriptor, start, stop, place_of(self, name))

    def local(self, names: Sequence[str], progress: Progress | None = None) -> dict[str, Path]:
        paths = {}
        for name in names:
            with self.opened(name):
                paths[name] = self.root / name
        return paths

    def sha256(self, name: str) -> str | None:
        return None

    @contextmanager
    def opened(self, name: str) -> Iterator[int]:
        """A descriptor of a regular file inside the folder; pipes and devices are refused without waiting for them."""
        where = place_of(self, name)
        try:
            real = (self.root / name).resolve(strict=True)
            if not self._inside(real):
                raise InputError(
                    "is a link that leads outside the folder",
                    where=where,
                    fix="Copy the file, or give the path of the folder that it is in.",
                )
            descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        except (FileNotFoundError, NotADirectoryError):
            near = did_you_mean(name, self.names())
            raise InputError("no such file", where=where, fix=near) from None
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"cannot be read: {_reason(error)}", where=where) from None
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InputError("is not a regular file", where=where)
            yield descriptor
        finally:
            os.close(descriptor)

    def _inside(self, real: Path) -> bool:
        """Whether a resolved path is in the folder or, for one in the hub's cache, in that cache's store of blobs."""
        root = self.root.resolve()
        allowed = [root]
        parts = root.parts
        if "snapshots" in parts:
            at = len(parts) - 1 - parts[::-1].index("snapshots")
            if at >= 1 and parts[at - 1].startswith("models--"):
                repository = Path(*parts[:at])
                allowed += [repository / "blobs", repository.parent / "blobs"]
        return any(real.is_relative_to(folder) for folder in allowed)


def _check_small(size: int, limit: int, where: str) -> None:
    if size > limit:
        raise InputError(f"is {size} bytes long, more than the {limit} expected of such a file", where=where)


def _pread(descriptor: int, start: int, stop: int, where: str) -> bytes:
    """Bytes `start` to `stop` of an open file."""
    pieces = []
    try:
        while start < stop:
            piece = os.pread(descriptor, min(stop - start, 1 << 30), start)
            if not piece:
                raise InputError(f"ends at byte {start}, before byte {stop}", where=where, fix="Was it cut short?")
            pieces.append(piece)
            start += len(piece)
    except OSError as error:
        raise InputError(f"cannot be read: {_reason(error)}", where=where) from None
    return b"".join(pieces)


@dataclass(frozen=True)
class _HubFile:
    size: int
    sha256: str | None


@dataclass(frozen=True)
class HubFolder:
    """A repository at one commit. `offline` folders are what the cache holds of it."""

    label: str
    revision: str
    repository: str
    subfolder: str = ""
    asked: str = "main"
    offline: bool = False
    files: Mapping[str, _HubFile] = field(default_factory=dict, repr=False)

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.files))

    def exists(self, name: str) -> bool:
        return name in self.files

    def size(self, name: str) -> int:
        return self._file(name).size

    def sha256(self, name: str) -> str | None:
        return self._file(name).sha256

    def read(self, name: str, limit: int = SMALL_FILE) -> bytes:
        _check_small(self.size(name), limit, place_of(self, name))
        return self.local([name])[name].read_bytes()

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        size, where = self.size(name), place_of(self, name)
        if stop > size:
            raise InputError(f"ends at byte {size}, before byte {stop}", where=where, fix="Was it cut short?")
        if start >= stop:
            return b""
        cached = self._cached(name)
        if cached is not None:
            with cached.open("rb") as file:
                return _pread(file.fileno(), start, stop, where)
        with _translated(self, where):
            return _get_range(self._url(name), start, stop, size, where)

    def local(self, names: Sequence[str], progress: Progress | None = None) -> dict[str, Path]:
        for name in names:
            self._file(name)
        stopped = threading.Event()
        pool = ThreadPoolExecutor(max_workers=DOWNLOADS, thread_name_prefix="download")
        try:
            fetched = [pool.submit(self._fetch, name, progress, stopped) for name in dict.fromkeys(names)]
            paths = dict(zip(dict.fromkeys(names), [future.result() for future in fetched], strict=True))
        finally:
            # An interrupt or an error must not wait for gigabytes that nobody will use.
            stopped.set()
            pool.shutdown(cancel_futures=True)
        self._remember_revision()
        return paths

    def _file(self, name: str) -> _HubFile:
        if name in self.files:
            return self.files[name]
        where = place_of(self, name)
        if self.offline:
            raise MachineError(
                "is not in the cache, and HF_HUB_OFFLINE forbids fetching it",
                where=where,
                fix=f"Unset HF_HUB_OFFLINE, or fetch it beforehand: `hf download {self.repository} {self._path(name)} "
                f"--revision {self.revision}`.",
            )
        raise InputError("no such file in the repository", where=where, fix=did_you_mean(name, self.files))

    def _path(self, name: str) -> str:
        return f"{self.subfolder}/{name}" if self.subfolder else name

    def _url(self, name: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repository, self._path(name), revision=self.revision)

    def _cached(self, name: str) -> Path | None:
        """The path of a file in the cache, if it is there whole."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repository, self._path(name), revision=self.revision)
        if not isinstance(found, str):
            return None
        size, expected = os.stat(found).st_size, self.files[name].size
        if size != expected:
            raise InputError(
                f"its copy in the cache has {size} bytes and the hub's has {expected}",
                where=place_of(self, name),
                fix=f"Delete {found} and run again.",
            )
        return Path(found)

    def _fetch(self, name: str, progress: Progress | None, stopped: threading.Event) -> Path:
        """The path of one file in the cache, downloaded if it is not there."""
        cached = self._cached(name)
        if cached is not None:
            return cached
        from huggingface_hub import hf_hub_download

        with _translated(self, place_of(self, name)):
            hf_hub_download(
                self.repository,
                self._path(name),
                revision=self.revision,
                tqdm_class=_bar(progress, stopped),
            )
        cached = self._cached(name)
        if cached is None:
            raise MachineError("was downloaded and is not in the cache", where=place_of(self, name))
        return cached

    def _remember_revision(self) -> None:
        """Note in the cache which commit a branch or tag meant: an offline run then resolves it the same way.

        huggingface_hub does so only for downloads by branch, which could meet another commit than the one pinned here.
        """
        if self.asked == self.revision or self.offline:
            return
        note = _cache_folder(self.repository) / "refs" / self.asked
        try:
            if note.is_file() and note.read_text() == self.revision:
                return
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(self.revision)
        except OSError:
            return  # a cache that cannot be written to still serves this run


def _cache_folder(repository: str) -> Path:
    """Where the standard cache keeps a model: `<cache>/models--owner--name`, with `refs/`, `snapshots/`, `blobs/`."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"


def _locate_on_hub(repository: str, wanted: str | None, subfolder: str, label: str) -> HubFolder:
    from huggingface_hub import HfApi, constants, is_offline_mode

    asked = wanted or "main"
    if is_offline_mode():
        return _locate_in_cache(repository, asked, subfolder, label)
    blank = HubFolder(label, asked, repository, subfolder, asked)
    with _translated(blank, label):
        timeout = max(30.0, constants.HF_HUB_DOWNLOAD_TIMEOUT)
        info = _tried(
            lambda: HfApi().model_info(repository, revision=wanted, files_metadata=True, timeout=timeout), where=label
        )
    if info.sha is None or _COMMIT.fullmatch(info.sha) is None:
        raise MachineError(
            "the server does not answer like a hub: it names no commit", where=label, fix="Check HF_ENDPOINT."
        )
    prefix = f"{subfolder}/" if subfolder else ""
    files = {}
    for sibling in info.siblings or ():
        path = sibling.rfilename
        if path.startswith(prefix) and sibling.size is not None and _harmless(path):
            digest = sibling.lfs.sha256 if sibling.lfs else None
            files[path[len(prefix) :]] = _HubFile(sibling.size, digest)
    if not files:
        folders = {str(PurePosixPath(s.rfilename).parent) for s in info.siblings or ()} - {"."}
        raise InputError(
            f"the repository has no folder '{subfolder}'" if subfolder else "the repository has no files",
            where=label,
            fix=did_you_mean(subfolder, folders),
        )
    return HubFolder(label, info.sha, repository, subfolder, asked, False, files)


def _harmless(path: str) -> bool:
    """Whether a path from the hub stays inside the folder it is joined to."""
    return "\\" not in path and not any(part in ("", ".", "..") for part in path.split("/"))


def _locate_in_cache(repository: str, asked: str, subfolder: str, label: str) -> HubFolder:
    """The repository as far as the cache holds it."""
    cache = _cache_folder(repository)
    fetch = f"Unset HF_HUB_OFFLINE, or fetch it beforehand: `hf download {repository} --revision {asked}`."
    if not (cache / "snapshots").is_dir():
        raise MachineError("is not in the cache, and HF_HUB_OFFLINE forbids fetching it", where=label, fix=fetch)
    note = cache / "refs" / asked
    commits = sorted(folder.name for folder in (cache / "snapshots").iterdir() if folder.is_dir())
    if note.is_file():
        commit = note.read_text().strip()
    else:
        fitting = [commit for commit in commits if re.fullmatch(r"[0-9a-f]{4,40}", asked) and commit.startswith(asked)]
        commit = fitting[0] if len(fitting) == 1 else ""
    if commit not in commits:
        raise MachineError(
            f"revision '{asked}' is not in the cache, and HF_HUB_OFFLINE forbids fetching it",
            where=label,
            fix=f"{fetch} The cache has {', '.join(commits[:5])}." if commits else fetch,
        )
    root = cache / "snapshots" / commit / subfolder
    files = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            blob = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
            digest = blob if _SHA256.fullmatch(blob) else None
            files[path.relative_to(root).as_posix()] = _HubFile(path.stat().st_size, digest)
    return HubFolder(label, commit, repository, subfolder, asked, True, files)


def _bar(progress: Progress | None, stopped: threading.Event) -> type[Any]:
    """A tqdm class that shows nothing, passes the bytes on, and ends a download that nobody waits for."""
    from tqdm import tqdm

    class Quiet(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if stopped.is_set():
                raise InterruptedError("the download was given up")
            if progress is not None and n:
                progress(int(n))
            return None

    return Quiet


def _get_range(url: str, start: int, stop: int, size: int, where: str) -> bytes:
    """Bytes `start` to `stop` of a file of `size` bytes, by one HTTP request, redirects followed."""
    from huggingface_hub import constants, get_session, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    # Compressed answers would make lengths and ranges mean something else.
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}

    def get() -> bytes:
        with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as answer:
            if answer.status_code >= 400:
                answer.read()
            hf_raise_for_status(answer)
            if answer.status_code != 206 and (start, stop) != (0, size):
                raise MachineError(
                    "the server sends whole files only, not parts of them",
                    where=where,
                    fix="Fetch the model beforehand with `hf download`: what is in the cache is read from there.",
                )
            pieces, count = [], 0
            for piece in answer.iter_bytes():
                pieces.append(piece)
                count += len(piece)
                if count > stop - start:
                    break
            if count != stop - start:
                raise ConnectionError(f"{count} bytes came where {stop - start} were asked for")
            return b"".join(pieces)

    return _tried(get, where=where)


def _tried(action: Callable[[], T], where: str) -> T:
    """The result of `action`, tried again after a moment when the network or the server failed."""
    for attempt in range(1, TRIES):
        try:
            return action()
        except _network_errors() as error:
            if not _worth_another_try(error):
                raise
            time.sleep(0.5 * attempt)
    return action()


def _network_errors() -> tuple[type[Exception], ...]:
    """What an HTTP request of huggingface_hub may raise, whichever HTTP library it stands on."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *HfHubHTTPError.__bases__)


def _worth_another_try(error: Exception) -> bool:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return not isinstance(error, OfflineModeIsEnabled)


@contextmanager
def _translated(folder: HubFolder, where: str) -> Iterator[None]:
    """Run a request for `folder`; what huggingface_hub raises becomes one of our errors."""
    from huggingface_hub import constants, errors

    login = "log in with `hf auth login`"
    unavailable = "Try again; what is already in the cache can be used with HF_HUB_OFFLINE=1."
    page = f"{constants.ENDPOINT}/{folder.repository}"
    try:
        yield
    except MergeflowError:
        raise
    except errors.GatedRepoError:
        raise InputError(
            "the repository is gated, and this account has no access to it",
            where=where,
            fix=f"Ask for access at {page}, then {login}.",
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"the hub has no repository '{folder.repository}', or it is private",
            where=where,
            fix=f"Check the name at {page}; for a private one {login}.",
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(
            f"the repository has no revision '{folder.asked}'",
            where=where,
            fix=f"Branches, tags and commits are listed at {page}/commits/main.",
        ) from None
    except errors.LocalEntryNotFoundError as error:
        reason = _reason(error.__cause__ or error)
        raise MachineError(f"the hub cannot be reached: {reason}", where=where, fix=unavailable) from None
    except errors.EntryNotFoundError:
        raise InputError("no such file in the repository", where=where) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise InputError(f"the hub refused access ({status})", where=where, fix=f"To get it, {login}.") from None
        if status == 429:
            raise MachineError(
                "the hub allows no more requests for now (429)", where=where, fix=f"Wait a few minutes, or {login}."
            ) from None
        raise MachineError(f"the hub answered with error {status}", where=where, fix=unavailable) from None
    except _network_errors() as error:
        # Errors of sockets have no file name, and those of a full disk have none either.
        if isinstance(error, OSError) and (error.errno in _DISK or error.filename is not None):
            raise MachineError(
                f"cannot be written to the cache: {_reason(error)}",
                where=where,
                fix=f"The cache is {constants.HF_HUB_CACHE}; HF_HOME puts it elsewhere.",
            ) from None
        raise MachineError(f"the hub cannot be reached: {_reason(error)}", where=where, fix=unavailable) from None
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        # What huggingface_hub says of answers that are not a hub's, and of transfers that its own library gave up.
        raise MachineError(
            f"the server at {constants.ENDPOINT} does not answer like a hub: {_reason(error)}",
            where=where,
            fix="Check HF_ENDPOINT and the network, then try again.",
        ) from None

"""What a written folder says of itself: the bytes of its manifest, and the folder held against them.

The manifest covers every byte of the folder. A tensor has its digest (`mergeflow.digests`), and its file the digest of the header
before it, which with the tensors makes up the whole file; every other file has one of its contents, and the manifest one of itself.
So one changed byte anywhere is found, and said to be in that tensor or file. It is no signature: who can write to the folder can
write a new manifest.

The digests are read off the files anew, in pieces, by several threads, with some MiB a thread however large a tensor is. Nothing is
written here, and no file outside the folder is opened.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergeflow import __version__
from mergeflow.checkpoint import StoredTensor, parse_header
from mergeflow.checkpoint.safetensors import header_end
from mergeflow.digests import PIECE, tensor_digest
from mergeflow.errors import InputError
from mergeflow.hub import LocalFolder

MANIFEST = "mergeflow.json"
"""The file that makes a folder an output of mergeflow."""
FORMAT = 2
LARGEST_MANIFEST = 512 * 2**20
RUN = 8 * PIECE
"""Bytes that a thread hashes at a time."""
MANY = 1000
"""Tensors in a run at most."""
READ = 2**20
"""Bytes read at once: what fits a processor's cache is hashed while it is there."""

Hex = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class FileFacts(_Part):
    """A file beside the weights: bytes, and the hex BLAKE3 of its contents."""

    size: int
    digest: Hex


class ShardFacts(_Part):
    """A file of weights: bytes, and the hex BLAKE3 of its 8 length bytes, its header's JSON and what fills that up."""

    size: int
    header: Hex


class TensorFacts(_Part):
    """A tensor: the file it is in, its torch dtype and shape, and its digest (`mergeflow.digests`)."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    digest: Hex


class Manifest(_Part):
    """What a manifest says of the folder that it is in; what it says of where that came from is kept as it is.

    `files` travel with the weights; `retold` are card and recipe, which say again what the manifest says, with paths as they are seen
    from the folder. `output` is the key of this output (empty for an only one), `outputs` the keys of all of its recipe.
    """

    format: Literal[2]
    output: str = ""
    outputs: tuple[str, ...] = ("",)
    shards: dict[str, ShardFacts]
    tensors: dict[str, TensorFacts]
    files: dict[str, FileFacts]
    retold: dict[str, FileFacts] = {}
    inputs: dict[str, Any] = {}
    software: dict[str, str] = {}


def software() -> dict[str, str]:
    """What makes an output, as its manifest says: versions, and the machine's kind."""
    return {"mergeflow": __version__, "torch": version("torch"), "machine": platform.machine()}


def encode_manifest(facts: Mapping[str, Any]) -> bytes:
    """The bytes of a manifest: `facts` as JSON with sorted keys, and as `digest` the hex BLAKE3 of the same without it."""
    return _text({**facts, "digest": blake3(_text(facts)).hexdigest()})


def _text(facts: Mapping[str, Any]) -> bytes:
    return (json.dumps(facts, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def decode_manifest(content: bytes, where: str) -> Manifest | None:
    """What a manifest says; None when its bytes are not those that were written.

    Raises InputError for one that is whole, and says other things than this version of mergeflow reads.
    """
    try:
        facts = json.loads(content)
        if not isinstance(facts, dict) or facts.pop("digest", None) is None or encode_manifest(facts) != content:
            return None
    except (ValueError, RecursionError):
        return None
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        at = ".".join(map(str, first["loc"]))
        raise InputError(
            f"is a manifest that this version does not read: {at}: {first['msg']}",
            where=where,
            fix="Verify it with the version of mergeflow that made it.",
        ) from None


def shard_facts(header: bytes, size: int) -> dict[str, Any]:
    """What a manifest says of a file of weights with this header (8 length bytes and JSON) and of `size` bytes."""
    return {"size": size, "header": blake3(header).hexdigest()}


def file_facts(content: bytes) -> dict[str, Any]:
    """What a manifest says of a file beside the weights."""
    return {"size": len(content), "digest": blake3(content).hexdigest()}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as the manifest says: in which file, in which tensor of it (empty for none), and what."""

    file: str
    what: str
    tensor: str = ""


@dataclass(frozen=True, slots=True)
class Checked:
    """A folder held against its manifest: what that says (None when it is damaged itself), and what is not so.

    `extra` are files that the manifest does not know; `size` counts the bytes that were read.
    """

    manifest: Manifest | None
    problems: tuple[Problem, ...] = ()
    extra: tuple[str, ...] = ()
    size: int = 0


def check_folder(
    folder: Path,
    label: str = "",
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Checked:
    """Read every byte of a folder that mergeflow wrote and hold it against the folder's manifest.

    `label` is what messages call the folder; `progress` is told of bytes read since the last call, and in all. Raises InputError
    where there is no manifest that can be read.
    """
    here = LocalFolder(label or str(folder), folder)
    content = here.read(MANIFEST, LARGEST_MANIFEST)
    manifest = decode_manifest(content, f"{here.label}/{MANIFEST}")
    if manifest is None:
        return Checked(
            None, (Problem(MANIFEST, "was changed since it was written, so nothing can be held against it"),)
        )
    beside = {**manifest.files, **manifest.retold}
    problems: list[Problem] = []
    stored: dict[str, list[StoredTensor]] = {}
    for file, facts in manifest.shards.items():
        found = _shard(here, file, facts, manifest)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            stored[file] = found
    strange = [(n, one.file) for n, one in manifest.tensors.items() if one.file not in manifest.shards]
    problems += [Problem(file, "is in a file that the manifest does not know", name) for name, file in strange]

    runs = [(file, run) for file, tensors in stored.items() for run in _runs(tensors)]
    size = sum(end - begin for _, run in runs for _, begin, end in run) + sum(one.size for one in beside.values())
    pieces: dict[str, dict[int, bytes]] = {tensor.name: {} for tensors in stored.values() for tensor in tensors}
    unread: dict[str, str] = {}

    def hash_run(given: tuple[str, Sequence[tuple[StoredTensor, int, int]]]) -> None:
        file, run = given
        try:
            with here.opened(file) as descriptor:
                for tensor, begin, end in run:
                    for start in range(begin, end, PIECE):
                        pieces[tensor.name][start] = _digest(descriptor, start, min(start + PIECE, end))
                    progress(end - begin, size)
        except (InputError, OSError) as error:
            for tensor, _, _ in run:
                unread.setdefault(tensor.name, _why(error))

    def hash_file(given: tuple[str, FileFacts]) -> Problem | None:
        file, facts = given
        try:
            with here.opened(file) as descriptor:
                length = os.fstat(descriptor).st_size
                if length != facts.size:
                    return Problem(file, _other_size(length, facts.size))
                same = _digest(descriptor, 0, length).hex() == facts.digest
            progress(facts.size, size)
        except (InputError, OSError) as error:
            return Problem(file, _why(error))
        return None if same else Problem(file, "was changed since it was written")

    pool = ThreadPoolExecutor(threads or len(os.sched_getaffinity(0)), "mergeflow-verify")
    try:
        for _ in pool.map(hash_run, runs):
            pass
        problems += [one for one in pool.map(hash_file, beside.items()) if one is not None]
    finally:
        pool.shutdown(cancel_futures=True)
    for file, tensors in stored.items():
        for tensor in tensors:
            told = manifest.tensors[tensor.name]
            found_pieces = [piece for _, piece in sorted(pieces[tensor.name].items())]
            if tensor.name in unread:
                problems.append(Problem(file, unread[tensor.name], tensor.name))
            elif tensor_digest(found_pieces, told.dtype, told.shape) != told.digest:
                problems.append(Problem(file, "was changed since it was written", tensor.name))
    read = sum(manifest.shards[file].size for file in stored) + sum(one.size for one in beside.values())
    known = {MANIFEST, *manifest.shards, *beside}
    extra = tuple(name for name in files_below(folder) if name not in known)
    return Checked(manifest, tuple(sorted(problems, key=_place)), extra, read + len(content))


def files_below(folder: Path) -> Iterator[str]:
    """The path of each file below a folder, relative to it, sorted; links to folders are not followed."""
    found = []
    for above, _, names in os.walk(folder):
        found += [os.path.relpath(os.path.join(above, name), folder) for name in names]
    yield from sorted(found)


def _place(problem: Problem) -> tuple[str, str]:
    return problem.file, problem.tensor


def _shard(folder: LocalFolder, file: str, facts: ShardFacts, manifest: Manifest) -> list[StoredTensor] | Problem:
    """The tensors of a file of weights, or what is wrong with its size or header."""
    told = {name: one for name, one in manifest.tensors.items() if one.file == file}
    lost = f"; its {len(told)} tensors were not looked at" if told else ""
    try:
        size = folder.size(file)
        if size != facts.size:
            return Problem(file, f"{_other_size(size, facts.size)}{lost}")
        end = header_end(folder.read_range(file, 0, min(8, size)), size, file)
        header = folder.read_range(file, 0, end)
        if blake3(header).hexdigest() != facts.header:
            return Problem(file, f"the header was changed since it was written{lost}")
        tensors, _ = parse_header(header, size, file, file=file)
    except InputError as error:
        return Problem(file, f"{error.what}{lost}")
    if {one.name: (one.dtype.name, one.shape) for one in tensors} != {n: (t.dtype, t.shape) for n, t in told.items()}:
        return Problem(file, f"holds other tensors than the manifest says{lost}")
    return tensors


def _runs(tensors: Sequence[StoredTensor]) -> Iterator[list[tuple[StoredTensor, int, int]]]:
    """The tensors of a file cut into runs of some MiB: parts of a tensor are whole pieces of it but for the last."""
    run: list[tuple[StoredTensor, int, int]] = []
    held = 0
    for tensor in tensors:
        for begin in range(tensor.begin, tensor.end, RUN):
            end = min(begin + RUN, tensor.end)
            run.append((tensor, begin, end))
            held += end - begin
            if held >= RUN or len(run) >= MANY:
                yield run
                run, held = [], 0
    if run:
        yield run


def _digest(descriptor: int, start: int, stop: int) -> bytes:
    """BLAKE3 over bytes `start` to `stop` of a file, or up to its end where that comes before."""
    hasher = blake3()
    buffer = memoryview(bytearray(min(READ, max(stop - start, 0))))
    while start < stop:
        count = os.preadv(descriptor, [buffer[: stop - start]], start)
        if not count:
            break
        hasher.update(buffer[:count])
        start += count
    return hasher.digest()


def _other_size(size: int, told: int) -> str:
    return f"has {size:,} bytes, not {told:,}"


def _why(error: InputError | OSError) -> str:
    return error.what if isinstance(error, InputError) else f"cannot be read: {error.strerror}"

"""What can be read as a model: headers now, bytes later.

`open_checkpoint` reads a folder's index, config and headers, and no weight. All names in an index or a header come from
strangers: an entry that is not the plain name of a regular file in the folder is an error before anything is opened,
and an index that does not say exactly what the files hold is one too: a stale index silently loses or mixes tensors.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from mergeflow.checkpoint.pickles import PICKLES, mark, read_pickle
from mergeflow.checkpoint.safetensors import (
    LARGEST_HEADER,
    DuplicateKey,
    StoredTensor,
    encode_header,
    header_end,
    parse_header,
    unique,
)
from mergeflow.errors import InputError, MergeflowError, RecipeError, raise_all
from mergeflow.hub import Folder, HubFolder, Progress, place_of

__all__ = ["Checkpoint", "StoredTensor", "WeightFile", "encode_header", "open_checkpoint", "parse_header"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"
FIRST_READ = (1024, 64 * 1024)
READERS = 8
PICKLED_INDEX = "pytorch_model.bin.index.json"
PICKLED_SINGLE = "pytorch_model.bin"
OF_TRAINING = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.bin", "scheduler.pt", "scaler.pt")
"""Pickles that trainers leave beside a model."""
ALLOW = (
    "Safetensors are safer: load the model with transformers and call save_pretrained. "
    "If you know whom these are from, give --allow-pickle, by which only tensors are read."
)
WRITE_FIRST = (
    "What runs models reads safetensors: write them first, with a recipe whose output's node is this model, "
    "and `mergeflow run --allow-pickle`."
)
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A file of weights: `size` in bytes, `header_digest` the hex BLAKE3 of its 8 length bytes and JSON.

    Of a pickle it is that of its program and of the archive's directory.
    """

    name: str
    size: int
    header_digest: str


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model as its headers tell it.

    `tensors` by name, in order of file name and offset; `files` by name; `config` is config.json, `metadata` what the
    headers say beside their tensors.
    """

    folder: Folder
    tensors: Mapping[str, StoredTensor]
    files: Mapping[str, WeightFile]
    config: Mapping[str, Any] | None
    metadata: Mapping[str, str]

    @property
    def pickled(self) -> bool:
        """Whether its weights are pickles, which only mergeflow's own engine reads with care."""
        return any(name.endswith(PICKLES) for name in self.files)

    @property
    def deciding(self) -> Mapping[str, str]:
        """Files beside the weights that decide what those mean: hex BLAKE3 of their bytes by name."""
        return {}

    def paths(self, files: Iterable[str] | None = None, progress: Progress | None = None) -> dict[str, Path]:
        """Local paths of these weight files (default: all), downloaded where needed.

        Raises InputError when a file is not what it was when the checkpoint was opened.
        """
        wanted = tuple(self.files if files is None else files)
        paths = self.folder.local(wanted, progress)
        for name, path in paths.items():
            _check_unchanged(path, self.files[name], place_of(self.folder, name))
        return paths

    def stamp(self, name: str) -> str:
        """What changes when a file's bytes do, without reading them: size and time of change, or the hub's own digest."""
        if self.folder.revision is not None:
            return self.folder.sha256(name) or self.folder.revision
        status = self.folder.local([name])[name].stat()
        return f"{status.st_size} {status.st_mtime_ns}"

    def json(self, name: str) -> Any | None:
        """A JSON file beside the weights; None when there is none. Raises InputError when it cannot be read as JSON."""
        return read_json(self.folder, name) if self.folder.exists(name) else None


def open_checkpoint(folder: Folder, *, file: str | None = None, allow_pickle: bool = False) -> Checkpoint:
    """The checkpoint in a folder, by headers alone; `file` names one weight file (or index) instead of the usual ones.

    With `allow_pickle` pickles are read where there are no safetensors, those of a hub once they are fetched whole. Raises InputError
    when there is no model, or index and headers contradict each other or themselves.
    """
    name = file or getattr(folder, "only_file", None) or _usual_file(folder, allow_pickle)
    if name.endswith((*PICKLES, ".bin.index.json")) and not allow_pickle:
        raise InputError("is a pickle, which can run code when it is opened", where=place_of(folder, name), fix=ALLOW)
    if file is not None:
        _check_chosen(folder, file)
    index = _read_index(folder, name) if name.endswith(".index.json") else None
    files = sorted(set(index.values())) if index is not None else [name]
    if index is not None:
        _check_there(folder, files, name)
    headers = _read_headers(folder, files)
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for weights, stored, notes in headers:
        metadata.update(notes)
        for tensor in stored:
            if tensor.name in tensors:
                raise InputError(
                    f"tensor '{tensor.name}' is also in {tensors[tensor.name].file}",
                    where=place_of(folder, weights.name),
                    fix="Write the model again with one copy of each tensor.",
                )
            tensors[tensor.name] = tensor
    if index is not None:
        _check_index(index, tensors, place_of(folder, name))
    config = read_json(folder, "config.json") if folder.exists("config.json") else None
    if config is not None and not isinstance(config, dict):
        raise InputError("is not a JSON object", where=place_of(folder, "config.json"))
    return Checkpoint(folder, tensors, {weights.name: weights for weights, _, _ in headers}, config, metadata)


def _check_there(folder: Folder, files: Iterable[str], index: str) -> None:
    """Each file that an index names must be there."""
    errors: list[MergeflowError] = []
    for name in files:
        try:
            folder.size(name)
        except InputError as error:
            if error.what.startswith("no such file"):
                error.fix = f"{index} names it: fetch the whole model again."
            errors.append(error)
    raise_all(errors)


def _usual_file(folder: Folder, allow_pickle: bool) -> str:
    """The index or weight file of a folder when the recipe names none."""
    names = [name for name in folder.names() if "/" not in name]
    if holds_adapter(folder):
        raise InputError("is an adapter, not a model", where=folder.label, fix="Write `adapter:` in place of `path:`.")
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    weights = [name for name in names if name.endswith(".safetensors")]
    if INDEX in indexes or len(indexes) == 1:
        return INDEX if INDEX in indexes else indexes[0]
    if SINGLE in weights:
        return SINGLE
    if len(weights) == 1 and not indexes:
        shard = _SHARD.search(weights[0])
        if shard is not None and int(shard[2]) > 1:
            raise InputError(
                f"holds one of {int(shard[2])} shards and no index", where=folder.label, fix="Fetch the whole model."
            )
        return weights[0]
    if weights or indexes:
        raise InputError(
            f"holds several models: {_listed(indexes or weights)}", where=folder.label, fix="Name one with `file:`."
        )
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles and allow_pickle:
        return _usual_pickle(folder, names, [name for name in pickles if name not in OF_TRAINING] or pickles)
    if pickles:
        raise InputError(
            f"holds pickles only ({_listed(pickles)}), which can run code when they are opened and are not read",
            where=folder.label,
            fix=ALLOW,
        )
    below = [name for name in folder.names() if name.endswith(".safetensors")]
    raise InputError(
        "holds no .safetensors file",
        where=folder.label,
        fix=f"There is {_listed(below)}: name a folder with `subfolder:`." if below else "Is it a model's folder?",
    )


def _usual_pickle(folder: Folder, names: Sequence[str], pickles: Sequence[str]) -> str:
    """The index or pickled file of a folder that has no safetensors."""
    for usual in (PICKLED_INDEX, PICKLED_SINGLE):
        if usual in names:
            return usual
    if len(pickles) > 1:
        raise InputError(f"holds several pickles: {_listed(pickles)}", where=folder.label, fix="Name one with `file:`.")
    return pickles[0]


def holds_adapter(folder: Folder) -> bool:
    """Whether a folder holds a LoRA adapter, and no model of its own beside it."""
    names = {name for name in folder.names() if "/" not in name}
    models = {name for name in names if name.endswith((".safetensors", ".safetensors.index.json"))}
    return ADAPTER_CONFIG in names and bool(names & {ADAPTER_WEIGHTS, ADAPTER_PICKLE}) and models <= {ADAPTER_WEIGHTS}


def _check_chosen(folder: Folder, file: str) -> None:
    """`file:` must be a file of weights or an index inside the folder."""
    if not all(_is_plain(part) for part in file.split("/")):
        raise RecipeError(f"file '{file}' leads outside the model's folder", where=folder.label)
    if not file.endswith((".safetensors", ".safetensors.index.json", ".bin.index.json", *PICKLES)):
        raise InputError("is not a .safetensors file or an index", where=place_of(folder, file))
    if not folder.exists(file):
        folder.size(file)  # says why: no such file, or not in the cache


def _is_plain(name: str) -> bool:
    """Whether a name is that of a file in the folder itself, on any system."""
    return (
        0 < len(name) <= 255
        and name.isprintable()
        and name not in (".", "..")
        and not any(mark in name for mark in '/\\:*?"<>|')
        and name == name.strip()
    )


def _listed(names: Iterable[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    shown = list(names)
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more


def read_json(folder: Folder, name: str, *, once: bool = False) -> Any:
    """A JSON file of a folder. Raises InputError when it cannot be read as JSON, and with `once` for a key that stands twice."""
    where = place_of(folder, name)
    try:
        return json.loads(folder.read(name).decode("utf-8-sig"), object_pairs_hook=unique if once else None)
    except DuplicateKey as error:
        raise InputError(
            f"has the key '{str(error)[:80]}' twice", where=where, fix="The file cannot be trusted; fetch it again."
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputError(f"is not JSON: {reason}", where=where, fix="Fetch or copy the file again.") from None


def _read_index(folder: Folder, name: str) -> dict[str, str]:
    """The weight map of an index: tensor name -> file name below `folder`, each entry checked."""
    where = place_of(folder, name)
    index = read_json(folder, name, once=True)
    entries = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise InputError("has no weight_map", where=where, fix="Is it the index of a sharded model?")
    beside = f"{name.rpartition('/')[0]}/" if "/" in name else ""
    endings = PICKLES if name.endswith(".bin.index.json") else (".safetensors",)
    found: dict[str, str] = {}
    plain: set[str] = set()
    for tensor, file in entries.items():
        if file not in plain if isinstance(file, str) else True:
            if not isinstance(file, str) or not _is_plain(file):
                raise InputError(
                    f"puts tensor '{tensor[:80]}' in {str(file)[:80]!r}, which is not the plain name of a file",
                    where=where,
                    fix="An index may only name files in its own folder.",
                )
            if not file.endswith(endings):
                raise InputError(f"names {file}, which is not a {endings[0]} file", where=where)
            plain.add(file)
        found[tensor] = beside + file
    return found


def _check_index(index: Mapping[str, str], tensors: Mapping[str, StoredTensor], where: str) -> None:
    """The index and the headers must name the same tensors in the same files."""
    errors: list[MergeflowError] = []
    stale = "The index is stale: fetch the whole model again, or write it again."
    absent = [name for name in index if name not in tensors]
    if absent:
        errors.append(InputError(f"names tensors that no file has: {_listed(absent)}", where=where, fix=stale))
    unnamed = [name for name in tensors if name not in index]
    if unnamed:
        errors.append(InputError(f"lacks tensors that its files have: {_listed(unnamed)}", where=where, fix=stale))
    moved = [
        f"{name} ({tensors[name].file})" for name in index if name in tensors and tensors[name].file != index[name]
    ]
    if moved:
        errors.append(InputError(f"names the wrong file for: {_listed(moved)}", where=where, fix=stale))
    raise_all(errors)


Header = tuple[WeightFile, list[StoredTensor], dict[str, str]]


def _read_headers(folder: Folder, files: list[str]) -> list[Header]:
    """The header of each file; over the network several at a time. All that is wrong is reported together."""

    def attempt(file: str) -> Header | MergeflowError:
        try:
            return _read_header(folder, file)
        except MergeflowError as error:
            return error

    if isinstance(folder, HubFolder) and len(files) > 1:
        with ThreadPoolExecutor(max_workers=READERS, thread_name_prefix="header") as pool:
            results = list(pool.map(attempt, files))
    else:
        results = [attempt(file) for file in files]
    raise_all([result for result in results if isinstance(result, MergeflowError)])
    return [result for result in results if not isinstance(result, MergeflowError)]


def _read_header(folder: Folder, file: str) -> Header:
    """One file's header: a first read that mostly holds all of it, and a second one for exactly the rest.

    The first is a small part of the file however small that is, so that planning fetches little of any repository.
    """
    where, size = place_of(folder, file), folder.size(file)
    if file.endswith(PICKLES):
        pickled, digest, size = read_pickle(folder.local([file])[file], where, file)
        return WeightFile(file, size, digest), pickled, {}
    least, most = FIRST_READ
    data = folder.read_range(file, 0, min(max(size // 256, least), most, size))
    end = header_end(data, size, where)
    if end > len(data):
        data += folder.read_range(file, len(data), end)
    tensors, metadata = parse_header(data, size, where, file=file)
    return WeightFile(file, size, blake3(data[:end]).hexdigest()), tensors, metadata


def _check_unchanged(path: Path, weights: WeightFile, where: str) -> None:
    """The file on disk must have the size and header that were planned with."""
    if weights.name.endswith(PICKLES):
        digest, size = mark(path, where)
        if (size, digest) != (weights.size, weights.header_digest):
            raise InputError("changed since it was opened", where=where, fix="Start again, and leave the file alone.")
        return
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(8)
            length = min(int.from_bytes(first, "little"), LARGEST_HEADER)
            digest = blake3(first + file.read(length)).hexdigest()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=where) from None
    if (size, digest) != (weights.size, weights.header_digest):
        raise InputError("changed since it was opened", where=where, fix="Start again, and leave the file alone.")

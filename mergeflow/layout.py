"""Where each tensor of an output goes: which file, at which offset, under which exact header.

All shapes are known before a weight is read, so a file's header is final before its first byte. Inside a file wider dtypes come
first, so that every tensor is aligned to its own size although tensors follow each other without gaps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from mergeflow.checkpoint import encode_header
from mergeflow.dtypes import DType

DEFAULT_SHARD_SIZE = 5_000_000_000
_NUMBERED = re.compile(r"(.*?)(-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor to place: `like_file` is the file that holds it in the model whose files the output follows."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    like_file: str | None = None

    @property
    def nbytes(self) -> int:
        count = self.dtype.size
        for length in self.shape:
            count *= length
        return count


@dataclass(frozen=True, slots=True)
class File:
    """One file of weights: the exact header, each tensor's absolute offset in bytes, and the size of the whole."""

    name: str
    header: bytes
    offsets: Mapping[str, int]
    size: int


def lay_out(
    tensors: Sequence[Tensor], *, like_files: Sequence[str], shard_size: int | None, metadata: Mapping[str, str]
) -> tuple[list[File], tuple[str, bytes] | None]:
    """The files of an output, and its index (name and content) where there are several.

    Without `shard_size` the tensors go into files named and filled as those of `like`, without the folders that these lie
    in; where that leaves a file empty or gives two one name, and with `shard_size`, they are packed anew in order. A tensor
    larger than `shard_size` has a file of its own.
    """
    plain = {name: _written(name) for name in like_files}
    follows = len(set(plain.values())) == len(plain) and {t.like_file for t in tensors} - {None} == set(like_files)
    found = _NUMBERED.fullmatch(plain[like_files[0]]) if like_files else None
    stem = found[1] if found else "model"
    groups: dict[str, list[Tensor]] = {}
    if shard_size is None and like_files and follows:
        for tensor in tensors:
            groups.setdefault(tensor.like_file or like_files[-1], []).append(tensor)
        groups = {plain[name]: groups[name] for name in like_files}
    else:
        packed = _packed(tensors, shard_size or DEFAULT_SHARD_SIZE)
        count = len(packed)
        groups = {
            f"{stem}.safetensors" if count == 1 else f"{stem}-{i:05d}-of-{count:05d}.safetensors": group
            for i, group in enumerate(packed, start=1)
        }
    files = []
    for name, group in groups.items():
        ordered = sorted(group, key=lambda tensor: -tensor.dtype.size)
        header, offsets = encode_header([(t.name, t.dtype, t.shape) for t in ordered], metadata)
        size = len(header) + sum(t.nbytes for t in ordered)
        files.append(File(name, header, {t.name: offset for t, offset in zip(ordered, offsets, strict=True)}, size))
    if len(files) == 1:
        return files, None
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors)},
        "weight_map": {t.name: name for name, group in sorted(groups.items()) for t in group},
    }
    return files, (f"{stem}.safetensors.index.json", (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())


def _packed(tensors: Sequence[Tensor], limit: int) -> list[list[Tensor]]:
    packed: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if packed[-1] and filled + tensor.nbytes > limit:
            packed.append([])
            filled = 0
        packed[-1].append(tensor)
        filled += tensor.nbytes
    return packed


def _written(file: str) -> str:
    """What a file of weights is called in an output, whose files are safetensors: `pytorch_model.bin` is model.safetensors."""
    name = PurePosixPath(file)
    return name.name if name.suffix == ".safetensors" else f"{name.stem.removeprefix('pytorch_')}.safetensors"

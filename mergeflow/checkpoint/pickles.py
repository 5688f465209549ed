"""Pickled weights (`pytorch_model.bin`, `.pt`): where each tensor lies in the file, learnt without running what the pickle says.

A pickle is a program. This module is only entered where a person said `--allow-pickle`, and even then the program meets three
doors: its instructions are read as a list and may name nothing but what rebuilds tensors; `torch.load(weights_only=True)` of a
torch without known holes then follows them for the device `meta`, where a tensor has a shape and no memory, so that no weight is
read; and what comes out must be a plain mapping of names to dense tensors, each within one entry of the archive.

torch writes such a file as a zip archive without compression: each storage is a stretch of the file, and so a tensor is a stretch
of it too, to be read later as one of safetensors is. Two tensors may share a storage (tied weights), and one may step through it in
another order (a transposed view). Files of torch before 1.6 are no archives and are refused: they could only be read whole.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from mergeflow.checkpoint.safetensors import (
    AGAIN,
    LARGEST_HEADER,
    LONGEST_NAME,
    MOST_DIMENSIONS,
    MOST_TENSORS,
    StoredTensor,
    is_unicode,
)
from mergeflow.dtypes import BY_NAME
from mergeflow.errors import InputError, MachineError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LEAST_TORCH = (2, 10)
LARGEST_DIRECTORY = 128 * 1024 * 1024
SAVE_ALONE = "Save its weights alone, best as safetensors: safetensors.torch.save_file(state_dict, PATH)."

NEEDED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
    "torch._utils _rebuild_parameter",
    "torch.storage UntypedStorage",
    "torch.storage TypedStorage",
    *(
        f"torch {kind}Storage"
        for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
    ),
    *(f"torch {name}" for name in BY_NAME),
}
"""What a pickle of plain tensors names."""


def read_pickle(path: Path, where: str, file: str) -> tuple[list[StoredTensor], str, int]:
    """The tensors of a pickled file, the digest of what tells them (`mark`), and the file's size in bytes.

    They come in the order that safetensors gives them, so that a merge has the same bytes from either.
    `where` is what messages call the file, `file` the name that the tensors get. Raises InputError for what is not exactly a mapping
    of names to dense tensors, MachineError where torch is too old to be trusted with it.
    """
    program, stretches, digest, size = _opened(path, where)
    _check_program(program, where)
    found = _load(path, where)
    if not isinstance(found, Mapping):
        raise InputError(f"holds a {type(found).__name__}, not tensors by name", where=where, fix=SAVE_ALONE)
    if len(found) > MOST_TENSORS:
        raise InputError(f"has {len(found)} tensors, more than the {MOST_TENSORS} that are read", where=where)
    tensors = [_tensor(name, tensor, stretches, file, where) for name, tensor in found.items()]
    tensors.sort(key=lambda tensor: (-tensor.dtype.size, tensor.name))
    return tensors, digest, size


def mark(path: Path, where: str) -> tuple[str, int]:
    """Hex BLAKE3 of a file's program and its directory, which holds the checksum of each storage; and its size in bytes."""
    _, _, digest, size = _opened(path, where)
    return digest, size


def _opened(path: Path, where: str) -> tuple[bytes, dict[int, int], str, int]:
    """The program of a file, where each entry of the archive begins and ends, `mark`'s digest and the file's size.

    Raises InputError unless the archive is one that torch writes.
    """
    try:
        with path.open("rb") as raw:
            size = os.fstat(raw.fileno()).st_size
            first = raw.read(64)
            if not first.startswith(b"PK\x03\x04"):
                raise InputError(_stranger(first), where=where, fix=_mended(first))
            _check_directory(raw, size, where)
            with zipfile.ZipFile(raw) as archive:
                infos = archive.infolist()
                packed = next((one.filename for one in infos if one.compress_type != zipfile.ZIP_STORED), None)
                if packed is not None:
                    raise InputError(
                        f"is compressed ('{packed[:80]}'), and torch writes plain archives", where=where, fix=AGAIN
                    )
                named = {one.filename.partition("/")[2]: one for one in infos}
                program = named.get("data.pkl")
                if program is None or "constants.pkl" in named:
                    kind = "is a TorchScript program" if "constants.pkl" in named else "is an archive without data.pkl"
                    raise InputError(f"{kind}, not weights that torch.save wrote", where=where, fix=SAVE_ALONE)
                if program.file_size > LARGEST_HEADER:
                    raise InputError(
                        f"has a data.pkl of {program.file_size} bytes, more than the {LARGEST_HEADER} that are read",
                        where=where,
                    )
                order = named.get("byteorder")
                if order is not None and (order.file_size > 16 or archive.read(order) != b"little"):
                    raise InputError("was written on a big-endian machine", where=where, fix=SAVE_ALONE)
                text = archive.read(program)
                stretches = dict(_stretch(raw, one, size) for one in infos)
                raw.seek(archive.start_dir)
                return text, stretches, blake3(text + raw.read()).hexdigest(), size
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", where=where) from None
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"is a damaged archive: {_first_line(error)}", where=where, fix=AGAIN) from None


def _stretch(raw: io.BufferedReader, entry: zipfile.ZipInfo, size: int) -> tuple[int, int]:
    """Where the bytes of an entry begin, behind its name and padding, and where they end."""
    raw.seek(entry.header_offset)
    head = raw.read(30)
    if len(head) < 30 or not head.startswith(b"PK\x03\x04"):
        raise ValueError(f"'{entry.filename[:80]}' is not where the directory says")
    begin = entry.header_offset + 30 + sum(struct.unpack_from("<HH", head, 26))
    if begin + entry.file_size > size:
        raise ValueError(f"'{entry.filename[:80]}' ends behind the file")
    return begin, begin + entry.file_size


def _stranger(first: bytes) -> str:
    if first.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights themselves"
    if first.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "is a pickle of the kind that torch wrote before 1.6, which can only be read whole"
    return "is not a file that torch.save wrote"


def _mended(first: bytes) -> str:
    if first.startswith(b"version https://git-lfs"):
        return "Run `git lfs pull` in its folder."
    if first.startswith(b"\x80"):
        return "Write it again: torch.save(torch.load(PATH, weights_only=True), PATH), or better as safetensors."
    return AGAIN


def _check_directory(raw: io.BufferedReader, size: int, where: str) -> None:
    """The archive's directory must be of a size that tensors need: zipfile makes an object of each entry."""
    tail = min(size, 66_000)
    raw.seek(size - tail)
    end = raw.read(tail)
    at = end.rfind(b"PK\x05\x06")
    if at < 0 or at + 22 > len(end):
        raise InputError("is an archive without an end (cut short?)", where=where, fix=AGAIN)
    count, length = int.from_bytes(end[at + 10 : at + 12], "little"), int.from_bytes(end[at + 12 : at + 16], "little")
    if count == 0xFFFF or length == 0xFFFFFFFF:
        large = end.rfind(b"PK\x06\x06", 0, at)
        if large >= 0 and large + 48 <= len(end):
            count = int.from_bytes(end[large + 32 : large + 40], "little")
            length = int.from_bytes(end[large + 40 : large + 48], "little")
    if count > MOST_TENSORS + 1000 or length > LARGEST_DIRECTORY:
        raise InputError(f"is an archive of {count} entries, more than are read", where=where)
    raw.seek(0)


def _check_program(program: bytes, where: str) -> None:
    """Raise InputError where a pickle names anything but what rebuilds tensors. Nothing of it is run."""
    try:
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name == "GLOBAL" and argument not in NEEDED:
                asked = str(argument).replace(" ", ".")
            elif opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
                asked = str(argument or opcode.name).replace(" ", ".")
            else:
                continue
            raise InputError(
                f"asks for '{asked[:80]}', which plain weights never do: it is not opened",
                where=where,
                fix="Trust it no further, or ask its author for safetensors.",
            )
    except (ValueError, IndexError, UnicodeError, OverflowError) as error:
        raise InputError(f"has a data.pkl that is no pickle: {_first_line(error)}", where=where, fix=AGAIN) from None


def _load(path: Path, where: str) -> Any:
    import torch

    numbers = torch.__version__.split("+")[0].split(".")[:2]
    if tuple(int(number) for number in numbers if number.isdigit()) < LEAST_TORCH:
        raise MachineError(
            f"torch {torch.__version__} is installed, and pickles are read with 2.10 or newer only",
            where=where,
            fix="Update torch.",
        )
    try:
        return torch.load(os.fspath(path), weights_only=True, map_location="meta")
    except Exception as error:  # torch answers a damaged file with nearly any
        raise InputError(f"torch cannot read it as weights: {_first_line(error)}", where=where, fix=AGAIN) from None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200].rstrip(". ") if lines else type(error).__name__


def _tensor(name: Any, tensor: Any, stretches: Mapping[int, int], file: str, where: str) -> StoredTensor:
    """One entry of what was loaded, as a stretch of the file; `stretches` are the archive's entries, where each begins and ends."""
    import torch

    def wrong(what: str, fix: str = "") -> InputError:
        return InputError(f"tensor '{str(name)[:80]}' {what}", where=where, fix=fix)

    if not isinstance(name, str) or not is_unicode(name) or len(name.encode()) > LONGEST_NAME:
        raise InputError(f"has {str(name)[:80]!r} for the name of a tensor", where=where, fix=SAVE_ALONE)
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        kind = type(tensor).__name__
        raise InputError(f"holds '{name[:80]}', a {kind} and no tensor", where=where, fix=SAVE_ALONE)
    dtype = BY_NAME.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None or tensor.layout != torch.strided or tensor.is_quantized:
        raise wrong(f"is of a kind that is not read ({tensor.dtype}, {tensor.layout})", SAVE_ALONE)
    if tensor.dim() > MOST_DIMENSIONS:
        raise wrong(f"has {tensor.dim()} dimensions, more than {MOST_DIMENSIONS}")
    shape, strides = tuple(tensor.shape), tuple(tensor.stride())
    covered = _covered(shape, strides) * dtype.size
    if not covered:
        return StoredTensor(name, dtype, shape, file, 0, 0)
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    begin = (start or 0) + tensor.storage_offset() * dtype.size
    if start is None or start not in stretches or begin < start or begin + covered > stretches[start]:
        raise wrong("does not lie in the file as a whole", AGAIN)
    return StoredTensor(name, dtype, shape, file, begin, begin + covered, () if tensor.is_contiguous() else strides)


def _covered(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from a tensor's first to its last in memory; 0 for one without elements."""
    if not math.prod(shape):
        return 0
    return 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))

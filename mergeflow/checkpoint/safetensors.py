"""Safetensors headers: bytes -> tensors with absolute offsets, and tensors -> the exact bytes of a header.

Headers are read and written here and nowhere else, without the safetensors package, for three reasons: its reader
wants the whole file where a hub repository gives a range; it passes duplicate names and takes 743 MiB for a hostile
header of 73 MB; and a plan must know an output file's header to the byte before any tensor exists. Whatever the bytes,
reading ends in tensors or in an InputError.

The format: 8 bytes (length n of the JSON, little-endian), n bytes of JSON ``{name: {dtype, shape, data_offsets}}``
with an optional ``__metadata__`` of strings, then the tensors' bytes, without gaps or overlaps up to the file's end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from mergeflow.dtypes import BY_STORED, DType
from mergeflow.errors import InputError, RecipeError, did_you_mean

LARGEST_HEADER = 25_000_000
MOST_TENSORS = 500_000
MOST_DIMENSIONS = 16
LONGEST_NAME = 512
LARGEST_NUMBER = 2**62
ALIGNMENT = 64
METADATA = "__metadata__"
AGAIN = "Fetch or copy the file again."


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor as weight file `file` holds it: bytes `begin` to `end`, counted from the start of the file."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int
    strides: tuple[int, ...] = ()
    """Elements from one place of an axis to the next, of a pickled tensor that does not lie row by row; else empty."""

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.elements * self.dtype.size if self.strides else self.end - self.begin

    @property
    def elements(self) -> int:
        """Count of elements; 1 for a scalar."""
        return math.prod(self.shape) if self.strides else (self.end - self.begin) // self.dtype.size


class DuplicateKey(ValueError):
    """A JSON object with the same key twice; the text is the key."""


def header_end(first: bytes, file_size: int, where: str) -> int:
    """Bytes of the header with its 8 length bytes, read off the `first` 8 bytes (or more) of a file.

    Raises InputError when that cannot be a safetensors header.
    """
    if file_size < 8 or len(first) < 8:
        raise InputError(
            f"is {file_size} bytes long, too short for a safetensors file (cut short?)", where=where, fix=AGAIN
        )
    length = int.from_bytes(first[:8], "little")
    if 8 + length > file_size and first.startswith(b"version "):
        raise InputError(
            "is a Git LFS pointer, not the weights themselves", where=where, fix="Run `git lfs pull` in its folder."
        )
    if 8 + length > file_size and first.startswith((b"PK\x03\x04", b"\x80\x02")):
        raise InputError(
            "is a pickle under another name, not safetensors",
            where=where,
            fix="Call it by its right name (.bin), or better convert it with safetensors.torch.save_file.",
        )
    if length > LARGEST_HEADER:
        raise InputError(
            f"claims a header of {length} bytes, more than the {LARGEST_HEADER} that are read",
            where=where,
            fix="The file is damaged, or no safetensors file.",
        )
    if 8 + length > file_size:
        raise InputError(
            f"ends inside its header: it takes {8 + length} bytes and the file has {file_size} (cut short?)",
            where=where,
            fix=AGAIN,
        )
    return 8 + length


def parse_header(
    data: bytes, file_size: int, where: str, *, file: str = ""
) -> tuple[list[StoredTensor], dict[str, str]]:
    """The tensors, by offset, and the metadata of a safetensors file.

    `data` is the beginning of the file, at least its whole header; `where` is what messages call the file, `file` the
    name that the tensors get. Raises InputError for any header that is not exactly right.
    """
    end = header_end(data[:32], file_size, where)
    if len(data) < end:
        raise InputError(f"ends inside its header: {end} bytes were expected, {len(data)} came", where=where, fix=AGAIN)
    header = _decode(data[8:end], where)
    metadata = _metadata(header.pop(METADATA, {}), where)
    if len(header) > MOST_TENSORS:
        raise InputError(f"has {len(header)} tensors, more than the {MOST_TENSORS} that are read", where=where)
    tensors = [_tensor(name, entry, end, file, where) for name, entry in header.items()]
    tensors.sort(key=_position)
    _check_coverage(tensors, end, file_size, where)
    return tensors, metadata


def _position(tensor: StoredTensor) -> tuple[int, int]:
    return tensor.begin, tensor.end


def _decode(text: bytes, where: str) -> dict[str, Any]:
    """The JSON object of a header, with no key twice and no number but 0, 1, 2...

    Looking for a key that comes twice doubles the time of parsing. Without escapes each string is two quotes, and each tensor has
    five strings (its name, three keys, a dtype): where there are just as many, none was lost to another of the same name.
    """
    if not text.startswith(b"{"):
        raise InputError("is not a safetensors file: its header is not JSON", where=where)
    # Each tensor takes two lists: nesting and empty lists by the million are refused before they take memory.
    if text.count(b"[") > 4 * MOST_TENSORS or text.count(b"{") > 2 * MOST_TENSORS:
        raise InputError(f"has more than the {MOST_TENSORS} tensors that are read", where=where)
    read = partial(
        json.loads,
        parse_int=_whole if b"-" in text else None,
        parse_float=_not_whole,
        parse_constant=_not_whole,
    )
    try:
        words = text.decode("utf-8")
        header = read(words) if b"\\" not in text else None
        if not isinstance(header, dict) or text.count(b'"') != 2 * _strings(header):
            header = read(words, object_pairs_hook=unique)
    except DuplicateKey as error:
        raise InputError(
            f"has the name '{error}' twice in its header",
            where=where,
            fix="The file cannot be trusted; write it again.",
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputError(f"has a header that cannot be read: {reason}", where=where, fix=AGAIN) from None
    if not isinstance(header, dict):
        raise InputError("has a header that is not a JSON object", where=where)
    return header


def _strings(header: Mapping[str, Any]) -> int:
    """How many strings a header has if each of its tensors is what it should be, which is checked later."""
    notes = header.get(METADATA)
    return 5 * len(header) + (2 * len(notes) - 4 if isinstance(notes, dict) else 0)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """What `object_pairs_hook` of json takes for an object whose keys may stand only once. Raises DuplicateKey."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        name = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise DuplicateKey(name)
    return found


def _whole(text: str) -> int:
    return _not_whole(text) if text.startswith("-") else int(text)


def _not_whole(text: str) -> NoReturn:
    raise ValueError(f"{text[:40]} is not a whole number")


def _metadata(found: Any, where: str) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise InputError(f"has a {METADATA} that does not map strings to strings", where=where)
    if not all(is_unicode(key) and is_unicode(value) for key, value in found.items()):
        raise InputError(f"has a {METADATA} that is not valid Unicode", where=where)
    return found


def is_unicode(text: str) -> bool:
    """Whether a string can be written: JSON can spell halves of characters, which nothing else reads."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _tensor(name: str, entry: Any, data_start: int, file: str, where: str) -> StoredTensor:
    """One entry of a header, checked by itself."""

    def wrong(what: str, fix: str = AGAIN) -> InputError:
        shown = name if len(name) <= 80 else f"{name[:80]}..."
        return InputError(f"tensor '{shown}' {what}", where=where, fix=fix)

    if not is_unicode(name):
        raise wrong("has a name that is not valid Unicode")
    size = len(name) if name.isascii() else len(name.encode("utf-8"))
    if size > LONGEST_NAME:
        raise wrong(f"has a name of {size} bytes, more than {LONGEST_NAME}")
    if type(entry) is not dict or len(entry) != 3:
        raise wrong("does not have exactly dtype, shape and data_offsets")
    try:
        stored, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    except KeyError as missing:
        raise wrong(f"has no {missing.args[0]}") from None
    dtype = BY_STORED.get(stored) if type(stored) is str else None
    if dtype is None:
        raise wrong(
            f"has dtype {str(stored)[:40]}, which is not read",
            fix=f"{did_you_mean(str(stored)[:40], BY_STORED)} Dtypes that are read: {', '.join(BY_STORED)}.".strip(),
        )
    if type(shape) is not list or type(offsets) is not list or len(offsets) != 2:
        raise wrong("has a shape that is not a list, or data_offsets that are not two numbers")
    if len(shape) > MOST_DIMENSIONS:
        raise wrong(f"has {len(shape)} dimensions, more than {MOST_DIMENSIONS}")
    nbytes = dtype.size
    for length in shape:
        if type(length) is not int or not 0 <= length <= LARGEST_NUMBER:
            raise wrong("has a length in its shape that is not a whole number of 0 to 2^62")
        nbytes *= length
    begin, end = offsets
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end <= LARGEST_NUMBER:
        raise wrong("has data_offsets that are not two whole numbers in order")
    if end - begin != nbytes:
        raise wrong(f"takes {nbytes} bytes by its shape and dtype, and {end - begin} by its offsets")
    return StoredTensor(name, dtype, tuple(shape), file, data_start + begin, data_start + end)


def _check_coverage(tensors: Sequence[StoredTensor], data_start: int, file_size: int, where: str) -> None:
    """Tensors in order of offset must follow each other from `data_start` to the end of the file."""
    reached, before = data_start, ""
    for tensor in tensors:
        if tensor.begin != reached:
            kind = "overlaps" if tensor.begin < reached else "leaves a hole after"
            neighbour = f"tensor '{before}'" if before else "the header"
            raise InputError(f"tensor '{tensor.name}' {kind} {neighbour}", where=where, fix="The file is damaged.")
        reached, before = tensor.end, tensor.name
    if reached > file_size:
        raise InputError(
            f"is cut short: its header describes {reached} bytes and the file has {file_size}", where=where, fix=AGAIN
        )
    if reached < file_size:
        raise InputError(
            f"has {file_size - reached} bytes after its last tensor: its header describes {reached} bytes, "
            f"the file has {file_size}",
            where=where,
            fix=AGAIN,
        )


def encode_header(
    tensors: Sequence[tuple[str, DType, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, list[int]]:
    """The header of a file that holds `tensors` in this order without gaps, and each one's offset in the file.

    The bytes depend on the arguments alone: metadata sorted by key, JSON without spaces, filled up with spaces so that
    the data starts at a multiple of 64 bytes. Tensors stay aligned when larger dtypes come first. Raises RecipeError
    for what `parse_header` would refuse.
    """
    entries: dict[str, Any] = {METADATA: {key: metadata[key] for key in sorted(metadata)}} if metadata else {}
    names = {METADATA}
    relative = [0]
    for name, dtype, shape in tensors:
        if name in names:
            raise RecipeError(f"an output file cannot hold two tensors with the name '{name}'")
        if len(name.encode("utf-8")) > LONGEST_NAME or len(shape) > MOST_DIMENSIONS:
            raise RecipeError(
                f"tensor '{name[:80]}' cannot be written: its name has over {LONGEST_NAME} bytes, or its shape "
                f"over {MOST_DIMENSIONS} dimensions"
            )
        names.add(name)
        nbytes = dtype.size
        for length in shape:
            nbytes *= length
        begin = relative[-1]
        entries[name] = {"dtype": dtype.stored, "shape": shape, "data_offsets": (begin, begin + nbytes)}
        relative.append(begin + nbytes)
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > LARGEST_HEADER or len(tensors) > MOST_TENSORS:
        raise RecipeError(
            f"an output file of {len(tensors)} tensors needs a header of {len(text)} bytes, more than can be read back",
            fix="Give the output a smaller shard_size.",
        )
    header = len(text).to_bytes(8, "little") + text
    return header, [len(header) + offset for offset in relative[:-1]]

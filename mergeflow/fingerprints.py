"""What a lock remembers of a tensor, so that a change can be measured without keeping the tensor: a norm and 32 sums.

The sums are a count sketch (Charikar, Chen, Farach-Colton 2002): each element is added, with a sign, to one of 32 buckets, both
drawn by Philox for the tensor's name and the element's index. The difference of two sketches is the sketch of the difference, and the sum
of its squares has the mean ||new - old||^2 and a standard error of sqrt(2 / 32) of that: so a drift is known to 12.5 % of
itself, whether it is 1e-7 or 1, from 256 bytes.

A bucket and a sign for each element alone would cost several times what a merge does. So elements stand in rows of 32, and a block of
2^20 of them has 32,768 rows in 1,024 groups. A row is added to its group's with a sign of its own; the 1,024 x 32 sums that
come of it are then spread over the buckets, each with a sign. Two elements share what was drawn for them only if they stand in one
lane of one group, which adds at most 32 / 1,024 to the variance, whatever the tensor's structure. Which rows make a group is one
drawn order, and moves from block to block. The rows are read once, by torch's `embedding_bag`, which adds them one after
the other: so is every sum here, whatever the threads, and multiplying by a sign is exact. Rows are added in float32, or in
float64 where the tensor is wider; all else is float64. The norm is kept to five digits: it is there to divide by.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from mergeflow.dtypes import torch_dtype
from mergeflow.ops.draws import words

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from mergeflow.executing import Sink
    from mergeflow.graph import Row

BUCKETS = 32
BLOCK = 2**20
"""Elements that are sketched at once."""
CHUNK = 4 * BLOCK
"""Elements whose sums are kept until those before them are there."""
_ROWS = BLOCK // BUCKETS
_GROUPS = 1024
STANDARD_ERROR = 0.125
"""Of an estimated drift, as a part of it."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The Euclidean norm of a tensor, and its 32 sums (float64)."""

    norm: float
    sums: tuple[float, ...]

    def text(self) -> str:
        """The sums as base64 of little-endian float64: 344 characters."""
        return base64.b64encode(struct.pack(f"<{BUCKETS}d", *self.sums)).decode("ascii")

    @classmethod
    def of_text(cls, norm: float, text: str) -> Fingerprint:
        """The fingerprint that a lock holds. Raises ValueError for a text that is none."""
        raw = base64.b64decode(text, validate=True)
        if len(raw) != 8 * BUCKETS:
            raise ValueError(f"a sketch has {8 * BUCKETS} bytes, this has {len(raw)}")
        return cls(norm, struct.unpack(f"<{BUCKETS}d", raw))


def drift(old: Fingerprint, new: Fingerprint) -> float:
    """About ||new - old|| / ||old|| of two tensors of one name and shape, to a standard error of `STANDARD_ERROR` of itself.

    Infinite where the old one is zero and the new one is not, NaN where either holds NaN or Inf.
    """
    distance = math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(new.sums, old.sums, strict=True)))
    if math.isnan(distance) or not math.isfinite(old.norm) or not math.isfinite(new.norm):
        return math.nan
    if not old.norm:
        return math.inf if new.norm else 0.0
    return distance / old.norm


@lru_cache(maxsize=1)
def _order() -> NDArray[Any]:
    """The rows of a block in the order of their groups, 32 of each."""
    import numpy as np

    return np.argsort(words(0, 0, _ROWS // 4).reshape(-1), kind="stable")


@lru_cache(maxsize=64)
def _bags(rows: int) -> tuple[Tensor, Tensor]:
    """Of a block of so many rows those of each group, one group after the other, and where each group begins."""
    import numpy as np
    import torch

    order = _order()
    there = order < rows
    counts = np.add.reduce(there.reshape(_GROUPS, -1), axis=1)
    return torch.from_numpy(order[there]), torch.from_numpy(np.cumsum(counts) - counts)


@lru_cache(maxsize=1)
def _buckets() -> tuple[NDArray[Any], NDArray[Any]]:
    """The bucket and the sign of each lane of each group, flat."""
    import numpy as np

    drawn = words(1, 0, _GROUPS * BUCKETS // 4).reshape(-1)
    return (drawn >> 8) % BUCKETS, 1.0 - 2.0 * (drawn >> 31).astype(np.float64)


class Sketch:
    """The fingerprint of one tensor on its way; any thread may add any chunk, in any order."""

    def __init__(self, name: str) -> None:
        digest = blake3(b"mergeflow fingerprint\n" + name.encode()).digest(16)
        self._sign_key, self._block_key = (int.from_bytes(digest[n : n + 8], "little") for n in (0, 8))
        self._chunks: dict[int, tuple[NDArray[Any], float]] = {}

    def add(self, start: int, pieces: Sequence[Tensor]) -> None:
        """Take elements from `start` on, a multiple of `CHUNK`: flat tensors of the stored dtype that follow each other.

        They end where the tensor ends or a chunk does.
        """
        if start % CHUNK:
            raise ValueError(f"a chunk starts at a multiple of {CHUNK}, not at {start}")
        blocks = _blocks(pieces)
        size = sum(len(one) for one in pieces)
        for number in range(start // CHUNK, -(-(start + size) // CHUNK)):
            self._chunks[number] = self._chunk(number, min(start + size - number * CHUNK, CHUNK), blocks)

    def finish(self) -> Fingerprint:
        """The fingerprint, when every chunk is in."""
        import numpy as np

        total, square = np.zeros(BUCKETS), 0.0
        with np.errstate(over="ignore", invalid="ignore"):  # NaN and Inf are told by the norm
            for number in range(len(self._chunks)):
                sums, squares = self._chunks[number]
                total += sums
                square += squares
        norm = float(f"{math.sqrt(square):.5g}") if square == square else math.nan
        return Fingerprint(norm, tuple(float(one) for one in total))

    def _chunk(self, number: int, size: int, blocks: Iterator[Tensor]) -> tuple[NDArray[Any], float]:
        """Of the next `size` elements, which are one chunk, the 32 sums and the sum of squares."""
        import numpy as np

        first, count = number * CHUNK // BLOCK, -(-size // BLOCK)
        moved = words(self._block_key, first // 4, first // 4 + 1).reshape(-1) % _GROUPS
        # A bit for each row, 128 to a counter.
        start, rows = first * _ROWS // 128, -(-size // BUCKETS)
        bits = np.unpackbits(words(self._sign_key, start, start + -(-rows // 128)).view(np.uint8), bitorder="little")
        signs = 1 - 2 * bits.astype(np.float32)
        group, square, sums = np.arange(_GROUPS), 0.0, np.zeros((_GROUPS, BUCKETS))
        with np.errstate(over="ignore", invalid="ignore"):
            for n in range(count):
                found, squares = _block(next(blocks), signs[n * _ROWS : (n + 1) * _ROWS])
                sums += found[group ^ int(moved[n])]
                square += squares
            bucket, sign = _buckets()
            return np.bincount(bucket, weights=sums.reshape(-1) * sign, minlength=BUCKETS), square


def _block(values: Tensor, signs: NDArray[Any]) -> tuple[NDArray[Any], float]:
    """Of one block the sums of each lane of each group, (1024, 32) in float64, and the sum of squares.

    `signs` are those of its rows, in the order of their groups.
    """
    import torch
    from torch.nn.functional import embedding_bag, pad

    rows = -(-len(values) // BUCKETS)
    order, begins = _bags(rows)
    narrow = values.dtype is torch.bool or (values.element_size() <= 4 and values.is_floating_point())
    given = values.to(torch.float32 if narrow else torch.float64)
    square = float(torch.dot(given, given))
    if narrow and not math.isfinite(square):  # beyond float32, or NaN or Inf
        given = given.double()
        square = float(torch.dot(given, given))
    if len(given) % BUCKETS:
        given = pad(given, (0, -len(given) % BUCKETS))
    weights = torch.from_numpy(signs[:rows]).to(given.dtype)
    sums = embedding_bag(order, given.view(rows, BUCKETS), begins, mode="sum", per_sample_weights=weights)
    found: NDArray[Any] = sums.to(torch.float64).numpy()
    return found, square


def _blocks(pieces: Sequence[Tensor]) -> Iterator[Tensor]:
    """Tensors that follow each other, cut anew into blocks."""
    import torch

    held: list[Tensor] = []
    size = 0
    for piece in pieces:
        while len(piece):
            part = piece[: BLOCK - size]
            piece = piece[len(part) :]
            held.append(part)
            size += len(part)
            if size == BLOCK:
                yield held[0] if len(held) == 1 else torch.cat(held)
                held, size = [], 0
    if held:
        yield held[0] if len(held) == 1 else torch.cat(held)


class Fingerprinting:
    """A sink that fingerprints every row on its way into another sink, in the threads that fill it.

    Rows are read where they are made, in the writer's own memory: so what is fingerprinted is what is stored.
    """

    def __init__(self, rows: Sequence[Row], sink: Sink) -> None:
        self._rows, self._sink = rows, sink
        self._sketches = [Sketch(row.name) for row in rows]
        self._filling: dict[tuple[int, int], list[memoryview]] = {}

    def memory(self, row: int, start: int, stop: int) -> list[memoryview]:
        found = self._sink.memory(row, start, stop)
        self._filling[row, start] = found
        return found

    def filled(self, row: int, start: int, stop: int) -> None:
        import torch

        dtype, size = torch_dtype(self._rows[row].dtype), self._rows[row].dtype.size
        pieces = [torch.frombuffer(one, dtype=dtype) for one in self._filling.pop((row, start))]
        self._sketches[row].add(start // size, pieces)
        self._sink.filled(row, start, stop)

    def row_done(self, row: int, digest: str, inputs: Mapping[str, str]) -> None:
        self._sink.row_done(row, digest, inputs)

    def finish(self) -> dict[tuple[str, str], Fingerprint]:
        """The fingerprints of all rows, by output and name, when the run is over."""
        return {(row.output, row.name): one.finish() for row, one in zip(self._rows, self._sketches, strict=True)}

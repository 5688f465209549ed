"""Random numbers that depend on nothing but their key and their place: Philox4x32-10 as a counter-based generator.

Salmon et al. 2011, doi:10.1145/2063384.2063405. The four words of counter c (128 bits, the low word first) are the numbers of
elements 4 c to 4 c + 3; a number is u = (word >> 8) 2^-24, in [0, 1). So any part of a tensor can be drawn alone, in any
order, by any thread, and an edit elsewhere in a recipe changes no number.

On the CPU a round is four numpy operations in place over some thousands of counters that stay in the processor's second cache,
since there the draws are what a random merge waits for. With the 64-bit products of a round in two rows, the high words of the
last products stand 32 bits after the low ones of the products before, so one XOR of the rows as 32-bit words, one of them moved by
a word, joins what the next round joins. Elsewhere the same is done by torch in int64.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from blake3 import blake3

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFF_FFFF
_CHUNK = 32_768
"""Counters that are worked on at once: few enough for the caches, and so many that calling numpy costs little."""


def draw_key(seed: Sequence[str], model: str, count: int, tensor: str) -> int:
    """The 64-bit key of the draws for one tensor of one input.

    The first 8 bytes (low byte first) of BLAKE3 over the length-prefixed parts: the seed (the recipe's and the node's name, or
    the node's own), the input's model name, its count among equal names, and the tensor's name in its checkpoint.
    """
    digest = blake3()
    for part in (*seed, model, str(count), tensor):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(8), "little")


def uniform(key: int, start: int, like: Tensor) -> Tensor:
    """The numbers u of the elements from `start` on, flat, as many as `like` has: float32, on its device."""
    import numpy as np
    import torch

    size = like.numel()
    if not like.is_cpu:
        return _on_device(key, start, size, like.device).bitwise_right_shift_(8).float().mul_(2.0**-24)
    found = torch.empty(size, dtype=torch.float32)
    into: Any = found.numpy()
    for first, skip, rows in _pieces(key, start, size):
        part = _in_order(rows, np.uint64).view(np.uint32)[skip : skip + size - first]
        into[first : first + len(part)] = part >> 8
    return found.mul_(2.0**-24)


def below(key: int, start: int, like: Tensor, limit: float) -> Tensor:
    """Whether u < `limit`, for the elements from `start` on, flat, as many as `like` has: bool, on its device."""
    import numpy as np
    import torch

    size, least = like.numel(), math.ceil(limit * 2**24) << 8  # u < limit where the word is less than this
    if least > _LOW:
        return torch.ones(size, dtype=torch.bool, device=like.device)
    if not like.is_cpu:
        return _on_device(key, start, size, like.device) < least
    found = torch.empty(size, dtype=torch.bool)
    into: Any = found.numpy()
    for first, skip, rows in _pieces(key, start, size):
        kept = rows < np.uint32(least)
        if skip == 0 and first + kept.size <= size:
            _in_order(kept, np.uint16, into[first : first + kept.size].view(np.uint16))
        else:
            part = _in_order(kept, np.uint16).view(np.bool_)[skip : skip + size - first]
            into[first : first + len(part)] = part
    return found


def words(key: int, first: int, stop: int) -> NDArray[Any]:
    """The words of counters [first, stop): (stop - first, 4) in uint32."""
    import numpy as np

    found = np.empty((stop - first, 4), np.uint32)
    for start, _, rows in _pieces(key, 4 * first, found.size):
        part = _in_order(rows, np.uint64).view(np.uint32).reshape(-1, 4)
        found[start // 4 :][: len(part)] = part
    return found


def _in_order(rows: NDArray[Any], pair: Any, into: NDArray[Any] | None = None) -> NDArray[Any]:
    """Two rows of pairs, each of the size of `pair`, as one pair of each row after the other."""
    import numpy as np

    pairs = rows.view(pair)
    found = np.empty(pairs.size, pair) if into is None else into
    for column, row in enumerate(pairs):
        found[column::2] = row
    return found


def _pieces(key: int, start: int, size: int) -> Iterator[tuple[int, int, NDArray[Any]]]:
    """The words of `size` elements from `start` on, in pieces that hold until the next is asked for.

    Of each the place among the elements, how many of its words come before that, and its words: the first two of each
    counter in a row, the others in a second.
    """
    first, stop = start // 4, -(-(start + size) // 4)
    while first < stop:
        # A piece ends where the counter's second word changes.
        end = min(first + _CHUNK, stop, (first >> 32) + 1 << 32)
        skip = max(start - 4 * first, 0)
        yield 4 * first + skip - start, skip, _philox(key, first, end - first)
        first = end


class _Scratch(threading.local):
    """What a thread works in: the products of a round and of the one before, in rows, and numbers that are always needed."""

    def __init__(self) -> None:
        import numpy as np

        # Longer than a chunk, for the XOR that is moved by a word.
        self.products = tuple(np.zeros((2, _CHUNK + 8), np.uint64) for _ in range(2))
        self.ramp = np.arange(_CHUNK, dtype=np.uint64) * np.uint64(_MULTIPLIERS[0])
        self.multipliers = tuple(_column(*_MULTIPLIERS, n) for n in range(_ROUNDS))
        self.shift, self.low = np.uint64(32), np.uint64(_LOW)


@cache
def _scratch() -> _Scratch:
    return _Scratch()


@lru_cache(maxsize=64)
def _keys(key: int) -> tuple[tuple[int, int], ...]:
    """The keys of the rounds."""
    return tuple((key + n * _WEYL[0] & _LOW, (key >> 32) + n * _WEYL[1] & _LOW) for n in range(_ROUNDS))


@lru_cache(maxsize=64)
def _columns(key: int) -> tuple[NDArray[Any], ...]:
    """What the rows of `_philox` are joined with after each round: its keys, in the order of the words that come out."""
    return tuple(_column(*keys, n + 1) for n, keys in enumerate(_keys(key)))


def _column(first: int, third: int, n: int) -> NDArray[Any]:
    """Numbers for the first and the third word before round n, as a column in the order of its rows."""
    import numpy as np

    return np.array([first, third] if n % 4 in (1, 2) else [third, first], np.uint64).reshape(2, 1)


def _philox(key: int, first: int, size: int) -> NDArray[Any]:
    """The words of `size` counters from `first` on: two rows of uint32, the first two words of each counter and the others.

    A row becomes in place what the next round but one has there, so its words change places: before rounds 1 and 2 of four the
    first row holds the first word, before the others the third. The first rounds are short, since three words of the
    counter are the same in all of the piece.
    """
    import numpy as np

    scratch = _scratch()
    keys, columns, multipliers, shift, low = _keys(key), _columns(key), scratch.multipliers, scratch.shift, scratch.low
    rows = tuple(products[:, :size] for products in scratch.products)
    halves = tuple(products.view(np.uint32)[:, : 2 * size] for products in scratch.products)
    moved = tuple(products.view(np.uint32)[:, 1 : 2 * size + 1] for products in scratch.products)
    a, b = rows
    # Round 0: the first word's products; round 1: the third word's, the first word's being one number.
    same = _MULTIPLIERS[0] * (first >> 32 ^ keys[0][0])
    np.add(scratch.ramp[:size], np.uint64(_MULTIPLIERS[0] * (first & _LOW)), out=b[1])
    np.right_shift(b[1], shift, out=a[1])
    np.bitwise_xor(a[1], np.uint64(keys[0][1]), out=a[1])
    np.multiply(a[1], np.uint64(_MULTIPLIERS[1]), out=a[1])
    # Round 2.
    np.right_shift(a[1], shift, out=b[0])
    np.bitwise_and(b[1], low, out=b[1])
    np.bitwise_xor(b, _column(keys[1][0], same >> 32 ^ keys[1][1], 2), out=b)
    np.multiply(b, multipliers[2], out=b)
    # Round 3.
    np.bitwise_xor(halves[0][1], moved[1][1], out=halves[0][1])
    np.bitwise_and(a[1], low, out=a[1])
    np.right_shift(b[0], shift, out=a[0])
    np.bitwise_xor(a, _column(keys[2][0], same & _LOW ^ keys[2][1], 3), out=a)
    np.multiply(a, multipliers[3], out=a)
    for n in range(3, _ROUNDS):
        now, last = 1 - n % 2, n % 2
        a = rows[last]
        np.bitwise_xor(halves[last], moved[now][::-1] if n % 2 else moved[now], out=halves[last])
        if n + 1 < _ROUNDS:
            np.bitwise_and(a, low, out=a)
            np.bitwise_xor(a, columns[n], out=a)
            np.multiply(a, multipliers[n + 1], out=a)
    np.bitwise_xor(a, columns[-1], out=a)
    halves[last][:, 1::2] = halves[now][::-1, ::2]
    return halves[last]


def _on_device(key: int, start: int, size: int, device: torch.device) -> Tensor:
    """The words of `size` elements from `start` on, in int64, by torch: products wrap around as bits do."""
    import torch

    first, stop = start // 4, -(-(start + size) // 4)
    counter = torch.arange(first, stop, dtype=torch.int64, device=device)
    a, b, c, d = counter & _LOW, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)
    for one, two in _keys(key):
        p, q = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b = (q >> 32 & _LOW).bitwise_xor_(b).bitwise_xor_(one), q & _LOW
        c, d = (p >> 32 & _LOW).bitwise_xor_(d).bitwise_xor_(two), p & _LOW
    return torch.stack((a, b, c, d), dim=1).reshape(-1)[start % 4 :][:size]

"""Random numbers that depend on nothing but their key and their place: Philox4x32-10 as a counter-based generator.

Salmon et al. 2011, doi:10.1145/2063384.2063405. The four words of counter c (128 bits, the low word first) are the numbers of
elements 4 c to 4 c + 3; a number is u = (word >> 8) 2^-24, in [0, 1). So any part of a tensor can be drawn alone, in any
order, by any thread, and an edit elsewhere in a recipe changes no number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from blake3 import blake3

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFF_FFFF
_CHUNK = 8192
"""Counters that are worked on at once: their words stay in the processor's nearest caches."""


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


def words(key: int, first: int, stop: int) -> NDArray[Any]:
    """The words of counters [first, stop): (stop - first, 4) in uint32."""
    import numpy as np

    found = np.empty((stop - first, 4), np.uint32)
    for start in range(first, stop, _CHUNK):
        end = min(start + _CHUNK, stop)
        for column, word in enumerate(_philox(key, start, end)):
            found[start - first : end - first, column] = word
    return found


def _philox(key: int, first: int, stop: int) -> list[NDArray[Any]]:
    """The four words of counters [first, stop), in uint64."""
    import numpy as np

    low, shift = np.uint64(_LOW), np.uint64(32)
    counter = np.arange(first, stop, dtype=np.uint64)
    c = [counter & low, counter >> shift, np.zeros_like(counter), np.zeros_like(counter)]
    k = [key & _LOW, key >> 32]
    for _ in range(_ROUNDS):
        p = [c[0] * np.uint64(_MULTIPLIERS[0]), c[2] * np.uint64(_MULTIPLIERS[1])]
        c = [(p[1] >> shift) ^ c[1] ^ np.uint64(k[0]), p[1] & low, (p[0] >> shift) ^ c[3] ^ np.uint64(k[1]), p[0] & low]
        k = [(one + weyl) & _LOW for one, weyl in zip(k, _WEYL, strict=True)]
    return c


def uniform(key: int, start: int, like: Tensor) -> Tensor:
    """The numbers u of the elements from `start` on, flat, as many as `like` has: float32, on its device."""
    import torch

    size = like.numel()
    drawn = words(key, start // 4, -(-(start + size) // 4)).reshape(-1)[start % 4 :][:size]
    found = torch.from_numpy((drawn >> 8).astype("float32")).mul_(2.0**-24)
    return found.to(like.device)

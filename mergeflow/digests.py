"""The digest of a tensor: defined once, for those who write it, read it again and name it in a manifest.

It is made of the digests of pieces, so that pieces can be hashed where and when they are made, in any order and by any
thread, and a tensor larger than memory is never held. It covers dtype and shape, so that equal bytes with another
meaning have another digest. Nothing here reads or writes a file.
"""

from __future__ import annotations

from collections.abc import Sequence

from blake3 import blake3

PIECE = 4 << 20
"""Bytes in each piece of a tensor but the last, counted from the tensor's own first byte."""


def piece_digest(*parts: bytes | bytearray | memoryview) -> bytes:
    """BLAKE3 (32 bytes) over one piece, which may lie in several parts of memory, in order; releases the GIL."""
    hasher = blake3()
    for part in parts:
        hasher.update(part)
    return hasher.digest()


def tensor_digest(pieces: Sequence[bytes], dtype: str, shape: Sequence[int]) -> str:
    r"""Hex BLAKE3 over `pieces` and what the bytes mean.

    `pieces` are the `piece_digest`s of the tensor's bytes (little-endian, row-major) cut every `PIECE` bytes: as many
    as that gives, none for a tensor without elements. `dtype` is torch's name for it. What is hashed is the pieces'
    digests one after the other, then in ASCII a newline, `dtype`, a newline, the lengths of `shape` in decimal joined
    by commas, a newline: ``\nbfloat16\n2048,5632\n``, and ``\nfloat32\n\n`` for a tensor without dimensions.
    """
    hasher = blake3(b"".join(pieces))
    hasher.update(f"\n{dtype}\n{','.join(map(str, shape))}\n".encode("ascii"))
    return hasher.hexdigest()

"""Edit distances between tokens, many at once, for FuseLLM's way to pair tokens and vocabularies (arXiv:2401.10491).

A token is compared without the mark that a space stands before it, which tokenizers write differently.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MARKS = ("Ġ", "▁")
_CELLS = 1 << 22
"""Pairs of one length that are compared at once."""


def bare(token: str) -> str:
    """A token without the marks of spaces; one of marks alone as it is with one space each."""
    found = token
    for mark in MARKS:
        found = found.replace(mark, "")
    return found or " " * len(token)


def distances(rows: Sequence[str], columns: Sequence[str]) -> NDArray[np.int16]:
    """(rows, columns) int16: the Levenshtein distance of each pair."""
    left, right = _codes(rows), _codes(columns)
    lengths = np.array([len(word) for word in rows], dtype=np.int64)
    widths = np.array([len(word) for word in columns], dtype=np.int64)
    found = np.zeros((len(rows), len(columns)), dtype=np.int16)
    step = max(1, _CELLS // max(1, len(columns) * (right.shape[1] + 1)))
    for start in range(0, len(rows), step):
        some = slice(start, start + step)
        found[some] = _table(left[some], lengths[some], right, widths)
    return found


def _codes(words: Sequence[str]) -> NDArray[np.uint32]:
    """(words, longest): code points, 0 behind a word's end."""
    longest = max(map(len, words), default=0)
    flat = "".join(word.ljust(longest, "\0") for word in words).encode("utf-32-le")
    return np.frombuffer(flat, dtype=np.uint32).reshape(len(words), longest)


def _table(
    left: NDArray[np.uint32], lengths: NDArray[np.int64], right: NDArray[np.uint32], widths: NDArray[np.int64]
) -> NDArray[np.int16]:
    """One row of the table of Wagner and Fischer for all pairs, from the first character of the left words to the last."""
    width = right.shape[1]
    steps = np.arange(width + 1, dtype=np.int16)
    row = np.broadcast_to(steps, (len(left), len(right), width + 1)).copy()
    found = np.zeros((len(left), len(right)), dtype=np.int16)
    pick = np.broadcast_to(widths[None, :, None], (len(left), len(right), 1))
    for index in range(left.shape[1] + 1):
        ending = lengths == index
        if ending.any():
            found[ending] = np.take_along_axis(row[ending], pick[ending], axis=2)[..., 0]
        if index == left.shape[1]:
            break
        differ = left[:, index, None, None] != right[None]
        after = np.empty_like(row)
        after[..., 0] = index + 1
        np.minimum(row[..., 1:] + 1, row[..., :-1] + differ, out=after[..., 1:])
        # An insertion costs one for each step to the right: the least of what stands before, counted from there.
        row = np.minimum.accumulate(after - steps, axis=2) + steps
    return found

"""Tokens of two tokenizers over the same documents -> which position of the source teaches which of the target.

Position i of the target predicts its token i + 1, from a text that ends at byte e_i. The source position that has read the same text
teaches it. Where several tokens end at one byte (what a template adds, a space that only the tokenizer sees) they are paired from
the right, since the last of them predicts the text that follows; at a document's end from the left, since the first of them
predicts what the template adds.

Which source tokens spell the target's next token is kept too: a path of positions, whose log-probabilities add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mergeflow.stages import scratch
from mergeflow.stages.fuse.distances import bare, distances
from mergeflow.stages.fuse.tokenising import Integers, Tokenised, Tokenizer, read_tensors

ALIGNED = "aligned.safetensors"
_RANKS = 64
"""Tokens at one byte that are told apart."""


@dataclass(frozen=True, eq=False)
class Aligned:
    """For each token of the target the position of the source, within the document, that teaches its position, and the one at
    which the source has spelled the target's next token; (tokens,) int32, -1 where there is none.

    A position with `starts` but no `stops` predicts from the same text another stretch of it.
    """

    starts: NDArray[np.int32]
    stops: NDArray[np.int32]

    def save(self, folder: Path) -> None:
        """Write both."""
        scratch.save(folder / ALIGNED, {"starts": self.starts, "stops": self.stops})

    @classmethod
    def open(cls, folder: Path) -> Aligned:
        """What `save` wrote. Raises InputError where it is damaged."""
        read = read_tensors(folder / ALIGNED)
        return cls(read["starts"], read["stops"])


def align(source: Tokenised, target: Tokenised, valid: Literal["both_ends", "end"] = "both_ends") -> Aligned:
    """Pair positions that have read the same bytes, in O(n + m).

    `both_ends`: only where the source also has a border behind the target's next token.
    """
    keys, wanted = _keys(source), _keys(target)
    at = np.searchsorted(keys, wanted)
    found = np.append(keys, -1)[at] == wanted
    starts = np.where(found, at, -1)

    places, following = source.places, _following(target)
    last = _last(source)
    reached = np.searchsorted(places, following)
    spelled = np.append(places, -1)[reached] == following
    nothing = following == target.places  # the next token covers no bytes: the source's next one must cover none either
    after = np.where(found & ~np.append(last, True)[at], at + 1, len(places))
    spelled = np.where(nothing, np.append(places, -1)[after] == following, spelled)
    reached = np.where(nothing, after, reached)
    able = found & ~_last(target) & ~np.append(last, True)[at]
    stops = np.where(able & spelled, reached, -1)
    starts = np.where(able & ((stops >= 0) | (valid == "end")), starts, -1)
    return Aligned(_within(starts, source, target), _within(stops, source, target))


def _keys(tokens: Tokenised) -> Integers:
    """(tokens,), rising: the place where each ends, and its rank among those that end there."""
    places = tokens.places
    index = np.arange(len(places))
    fresh = np.append(True, places[1:] != places[:-1])[: len(places)]
    first = np.maximum.accumulate(np.where(fresh, index, 0))
    close = np.append(fresh[1:], True)[: len(places)]
    final = np.minimum.accumulate(np.where(close, index, len(places))[::-1])[::-1]
    # At a document's end counted from the left; but a document that is all at one byte has no end of its own.
    ending = _last(tokens)[final] & (tokens.ends > 0) if len(places) else fresh
    rank = np.where(ending, np.minimum(index - first, _RANKS - 1), _RANKS - 1 - np.minimum(final - index, _RANKS - 1))
    keys: Integers = places * _RANKS + rank
    return keys


def _last(tokens: Tokenised) -> NDArray[np.bool_]:
    """(tokens,): whether a token is the last of its document, which predicts none."""
    last = np.zeros(len(tokens.ids), dtype=bool)
    last[tokens.offsets[1:][np.diff(tokens.offsets) > 0] - 1] = True
    return last


def _following(tokens: Tokenised) -> Integers:
    """(tokens,): the place where the next token ends; -2 behind a document's last."""
    return np.where(_last(tokens), -2, np.append(tokens.places[1:], -2)[: len(tokens.ids)])


def _within(positions: Integers, source: Tokenised, target: Tokenised) -> NDArray[np.int32]:
    """Positions among all tokens of the source -> within their documents."""
    starts = np.repeat(source.offsets[:-1], np.diff(target.offsets))
    return np.where(positions >= 0, positions - starts, -1).astype(np.int32)


# Stretches of text that both spell


@dataclass(frozen=True, eq=False)
class Stretches:
    """The stretches of a document between the borders that both tokenizers have: for each position of the source and of the target
    the number of the stretch that its prediction lies in, (tokens - 1,) int64, -1 where it lies in none."""

    source: Integers
    target: Integers
    count: int


def stretches(source: NDArray[np.int32], target: NDArray[np.int32]) -> Stretches:
    """The stretches of one document, by the byte ends of its tokens in both tokenizers."""
    both = np.intersect1d(source, target)
    count = max(len(both) - 1, 0)
    return Stretches(_numbers(source, both, count), _numbers(target, both, count), count)


def _numbers(ends: NDArray[np.int32], borders: NDArray[np.int32], count: int) -> Integers:
    """(tokens - 1,): the stretch of each next token; one without bytes is in none."""
    if len(ends) < 2:
        return np.zeros(0, dtype=np.int64)
    start, stop = ends[:-1], ends[1:]
    number = np.searchsorted(borders, start, side="right") - 1
    number[(number >= count) | (start == stop)] = -1
    return number.astype(np.int64)


# Dynamic time warping


def warp(
    source: Tokenised, target: Tokenised, readers: tuple[Tokenizer, Tokenizer], projection: NDArray[np.int32]
) -> Aligned:
    """Pair tokens along the cheapest path of edit distances, as FuseLLM does, where one stands for one and `projection` maps it.

    In place of the published pairs, whose position predicted the current token once more, a position is paired where its next
    token is. O(n m) for each document.
    """
    starts = np.full(len(target.ids), -1, dtype=np.int32)
    words = [np.array([bare(token or "") for token in reader.tokens], dtype=object) for reader in readers]
    for document in range(len(target.lengths)):
        (ours, _), (theirs, _) = source.document(document), target.document(document)
        if not len(ours) or not len(theirs):
            continue
        columns, which = np.unique(theirs, return_inverse=True)
        rows, whose = np.unique(ours, return_inverse=True)
        costs = distances(list(words[0][rows]), list(words[1][columns]))[np.ix_(whose, which)]
        partner = _alone(path(costs), len(theirs))
        paired = partner > 0
        paired &= projection[ours[partner]] == theirs
        here = starts[target.offsets[document] : target.offsets[document + 1]]
        here[:-1] = np.where(paired[1:], partner[1:] - 1, -1)
    return Aligned(starts, np.where(starts >= 0, starts + 1, -1).astype(np.int32))


def path(costs: NDArray[Any]) -> list[tuple[int, int]]:
    """The pairs (row, column) along the cheapest way through a matrix of costs, from the first pair to the last; of equal ways
    back the diagonal, then up (the row before), then left."""
    rows, columns = costs.shape
    total = np.full((rows + 1, columns + 1), np.inf)
    total[0, 0] = 0
    flat, width = total.reshape(-1), columns + 1
    for diagonal in range(rows + columns - 1):
        # All cells of one diagonal at once: each needs those of the two before alone.
        low, high = max(0, diagonal - columns + 1), min(rows - 1, diagonal)
        row = np.arange(low, high + 1)
        column = diagonal - row
        at = row * width + column
        best = np.minimum(np.minimum(flat[at], flat[at + 1]), flat[at + width])
        flat[at + width + 1] = costs[row, column] + best
    row, column = rows, columns
    found = [(row - 1, column - 1)]
    while row > 1 or column > 1:
        moves = (total[row - 1, column - 1], total[row - 1, column], total[row, column - 1])
        move = int(np.argmin(moves))
        row, column = row - (move != 2), column - (move != 1)
        found.append((row - 1, column - 1))
    return found[::-1]


def _alone(pairs: list[tuple[int, int]], columns: int) -> Integers:
    """(columns,): the row that a column is paired with, where it is with one alone; else -1."""
    at = np.array(pairs)
    times = np.bincount(at[:, 1], minlength=columns)
    found = np.full(columns, -1, dtype=np.int64)
    found[at[:, 1]] = at[:, 0]
    found[times != 1] = -1
    return found

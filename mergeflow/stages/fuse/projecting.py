"""Ids of a source's vocabulary -> ids of the target's, so that what a source gives its tokens counts for tokens of the target.

`project` goes by bytes: the target's token of the same bytes, else the longest that the source's token begins with, since that is
what the target would say first. Special tokens go by what they are for. `min_edit` is FuseLLM's: the target's token with the
smallest edit distance, without the marks of spaces (arXiv:2401.10491). `exact` maps equal bytes and roles alone.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mergeflow.stages.fuse.distances import bare, distances
from mergeflow.stages.fuse.tokenising import Tokenizer

_ROWS = 256
_LIKE = {"bos": ("bos", "cls"), "cls": ("cls", "bos"), "eos": ("eos", "sep"), "sep": ("sep", "eos")}
"""The roles of the target that stand for one of the source, the best first; any other stands for itself."""


def vocabulary_map(
    source: Tokenizer, target: Tokenizer, kind: Literal["project", "min_edit", "exact"] = "project"
) -> NDArray[np.int32]:
    """(source.size,) int32: the target's id for each of the source's; -1 where there is none.

    Equal vocabularies map each id to itself.
    """
    found = np.full(source.size, -1, dtype=np.int32)
    written = {token: number for number, token in enumerate(target.tokens) if token is not None}
    spelled = _by_bytes(target)
    longest = max(map(len, spelled), default=0)
    roles = _roles(source, target)
    left = []
    for number, (token, piece) in enumerate(zip(source.tokens, source.pieces, strict=True)):
        if token is None:
            continue
        same = written.get(token, -1)
        if same >= 0 and target.pieces[same] == piece and (number not in roles or same in target.roles.values()):
            found[number] = same
        elif piece is None:
            found[number] = roles.get(number, -1)
        elif kind == "min_edit":
            left.append(number)
        elif piece in spelled:
            found[number] = spelled[piece]
        elif kind == "project":
            beginnings = (piece[:length] for length in range(min(longest, len(piece) - 1), 0, -1))
            found[number] = next((spelled[one] for one in beginnings if one in spelled), -1)
    if left:
        found[left] = _nearest([source.tokens[one] or "" for one in left], target)
    return found


def _by_bytes(target: Tokenizer) -> dict[bytes, int]:
    """The id for each stretch of bytes; of several the one that is written in full, not as a byte's number."""
    found: dict[bytes, int] = {}
    for number, (token, piece) in enumerate(zip(target.tokens, target.pieces, strict=True)):
        if piece and token is not None:
            known = found.get(piece)
            if known is None or (target.tokens[known] or "").startswith("<0x"):
                found[piece] = number
    return found


def _roles(source: Tokenizer, target: Tokenizer) -> dict[int, int]:
    """Special ids of the source and what is for the same in the target."""
    found: dict[int, int] = {}
    for role, number in source.roles.items():
        likes = [target.roles[like] for like in _LIKE.get(role, (role,)) if like in target.roles]
        if likes and number not in found:
            found[number] = likes[0]
    return found


def _nearest(words: list[str], target: Tokenizer) -> NDArray[np.int32]:
    """The id with the smallest edit distance to each word, the lowest of several."""
    ids = np.array([number for number, piece in enumerate(target.pieces) if piece is not None], dtype=np.int32)
    bares = [bare(target.tokens[number] or "") for number in ids]
    order = np.argsort([len(word) for word in bares], kind="stable")
    lengths = np.array([len(bares[number]) for number in order])
    found = np.full(len(words), -1, dtype=np.int32)
    by_length: dict[int, list[int]] = {}
    for index, word in enumerate(words):
        by_length.setdefault(len(bare(word)), []).append(index)
    sizes = np.unique(lengths)
    for length, group in by_length.items():
        for begin in range(0, len(group), _ROWS):
            some = group[begin : begin + _ROWS]
            texts = [bare(words[index]) for index in some]
            best = np.full(len(some), 1 << 14, dtype=np.int64)
            chosen = np.full(len(some), -1, dtype=np.int64)
            # Words of another length differ at least by what they are longer: the nearest lengths first, until none can win.
            for size in sorted(sizes, key=lambda one: abs(int(one) - length)):
                if abs(int(size) - length) > best.max():
                    break
                here = np.sort(order[np.searchsorted(lengths, size) : np.searchsorted(lengths, size, side="right")])
                table = distances(texts, [bares[number] for number in here])
                at = table.argmin(axis=1)
                least = table[np.arange(len(some)), at].astype(np.int64)
                better = (least < best) | ((least == best) & (here[at] < chosen))
                best, chosen = np.where(better, least, best), np.where(better, here[at], chosen)
            found[some] = np.where(chosen >= 0, ids[chosen], -1)
    return found

"""What a source says in its own tokens -> what the target is to say in its own.

A position of the target whose text the source has read too gets the source's probabilities, each on the id that its token's bytes
map to; the masses of several tokens on one id are summed. Where the source spells the target's next token in several of its own,
their product is that token's probability exactly (chunk correction), and the others are scaled down if they no longer fit.
What is on no id is the tail: one class more. At other positions the true next token alone is taught, or nothing.

The first column is always the true next token, so that a student's log-probabilities are picked once for all that is minimised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from mergeflow.stages.fuse.aligning import stretches
from mergeflow.stages.fuse.capturing import Document
from mergeflow.stages.fuse.tokenising import Integers

if TYPE_CHECKING:
    from torch import Tensor

Floats32 = NDArray[np.float32]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Targets:
    """What the target is to say at n positions: `ids` (n, K) int64, the true next token first; `probs` (n, K) float32; `kept` (n, K)
    bool, where a column says something (each id at most once a row); `tail` (n,) float32, the probability of all other ids together;
    `valid` (n,) bool, where anything is taught. At a valid position the kept probabilities and the tail sum to 1.
    """

    ids: Integers
    probs: Floats32
    kept: Bools
    tail: Floats32
    valid: Bools

    def tensors(self, device: str = "cpu") -> dict[str, Tensor]:
        """The same for torch."""
        import torch

        return {name: torch.from_numpy(getattr(self, name)).to(device) for name in self.__dataclass_fields__}


def targets(
    document: Document,
    starts: NDArray[np.int32],
    stops: NDArray[np.int32],
    ids: NDArray[np.int32],
    projection: NDArray[np.int32],
    *,
    unmatched: Literal["gold", "skip"] = "gold",
    chunk_correction: bool = True,
) -> Targets:
    """What a source teaches over one document: `starts`, `stops` as `aligning` gives them and `ids`, each (tokens,), are the target's."""
    following = ids[1:].astype(np.int64)
    at = starts[:-1].astype(np.int64)[: len(following)]
    matched = at >= 0
    place = at[matched]
    mapped = projection[document.ids[place]].astype(np.int64)
    masses: Floats = np.exp(document.log_probs[place].astype(np.float64))
    if document.complete:
        masses /= masses.sum(axis=1, keepdims=True)
    mapped[masses == 0] = -1
    found, probs, kept = _collected(mapped, masses, following[matched])
    if chunk_correction:
        _correct(probs, kept, document.true, place, stops[:-1].astype(np.int64)[: len(following)][matched])
    total = probs.sum(axis=1)
    over = total > 1
    probs[over] /= total[over, None]
    # A complete distribution has no tail but what maps to no id; what rounding leaves of one is none.
    rest = np.maximum(1 - probs.sum(axis=1), 0)
    if document.complete:
        whole = (mapped >= 0).all(axis=1)
        probs[whole] /= probs[whole].sum(axis=1, keepdims=True)
        rest[whole] = 0

    count, width = len(following), found.shape[1]
    made = Targets(
        np.zeros((count, width), dtype=np.int64),
        np.zeros((count, width), dtype=np.float32),
        np.zeros((count, width), dtype=bool),
        np.zeros(count, dtype=np.float32),
        matched | (unmatched == "gold"),
    )
    made.ids[:, 0] = following
    made.ids[matched], made.probs[matched], made.kept[matched], made.tail[matched] = found, probs, kept, rest
    if unmatched == "gold":
        made.probs[~matched, 0] = 1
        made.kept[~matched, 0] = True
    return made


def _correct(probs: Floats, kept: Bools, true: Floats32, place: Integers, stops: Integers) -> None:
    """Put the probability of the source's path over the next token in the first column, and scale the others to fit."""
    sums = np.concatenate([[0.0], np.cumsum(true.astype(np.float64))])
    spelled = stops >= 0
    exact = np.exp(sums[stops[spelled]] - sums[place[spelled]])
    others = probs[spelled, 1:].sum(axis=1)
    scale = np.minimum(1, (1 - exact) / np.maximum(others, 1e-300))
    rows = np.flatnonzero(spelled)
    probs[rows, 1:] *= np.maximum(scale, 0)[:, None]
    probs[rows, 0] = exact
    kept[rows, 0] = True


def _collected(ids: Integers, masses: Floats, first: Integers) -> tuple[Integers, Floats, Bools]:
    """Masses of equal ids of a row summed, those of `first` in the first column, which is kept only where a mass was on it; id -1 is
    nowhere. Three arrays (rows, columns): ids, masses, and where there is one."""
    rows, width = ids.shape
    ours = ids == first[:, None]
    lead, has = np.where(ours, masses, 0).sum(axis=1), ours.any(axis=1)
    rest = np.where(ours, -1, ids)
    order = np.argsort(rest, axis=1, kind="stable")
    rest, weights = np.take_along_axis(rest, order, axis=1), np.take_along_axis(masses, order, axis=1)
    fresh = rest >= 0
    fresh[:, 1:] &= rest[:, 1:] != rest[:, :-1]
    column = np.cumsum(fresh, axis=1)  # 0 for what is nowhere: the first column takes its own below
    most = int(column.max(initial=0)) + 1
    row = np.repeat(np.arange(rows), width).reshape(rows, width)
    inside = rest >= 0
    flat = (row * most + column)[inside]
    probs = np.bincount(flat, weights[inside], minlength=rows * most).astype(np.float64).reshape(rows, most)
    found: Integers = np.zeros((rows, most), dtype=np.int64)
    found.reshape(-1)[flat] = rest[inside]
    kept: Bools = np.zeros((rows, most), dtype=bool)
    if width:
        kept |= np.arange(most) <= column[:, -1:]
    found[:, 0], probs[:, 0], kept[:, 0] = first, lead, has
    return found, probs, kept


def mix(given: Sequence[Targets], shares: Sequence[float] | Floats) -> Targets:
    """Several sources' targets over the same positions as one, by their shares.

    An id that one source keeps and another has in its tail has the first one's part alone; the rest stays in the tail. Where a source
    teaches nothing the others' shares make up the whole.
    """
    chosen = [(one, float(share)) for one, share in zip(given, shares, strict=True) if share > 0]
    if len(chosen) == 1:
        return chosen[0][0]
    weights = np.stack([share * one.valid for one, share in chosen])
    total = weights.sum(axis=0)
    weights /= np.where(total > 0, total, 1)
    ids = np.concatenate([np.where(one.kept, one.ids, -1) for one, _ in chosen], axis=1)
    masses = [one.probs * weight[:, None] for (one, _), weight in zip(chosen, weights, strict=True)]
    ids[~np.concatenate([np.repeat((weight > 0)[:, None], one.ids.shape[1], axis=1)
                         for (one, _), weight in zip(chosen, weights, strict=True)], axis=1)] = -1  # fmt: skip
    found, probs, kept = _collected(ids, np.concatenate(masses, axis=1), chosen[0][0].ids[:, 0])
    tail = sum(one.tail * weight for (one, _), weight in zip(chosen, weights, strict=True))
    return Targets(found, probs.astype(np.float32), kept, np.asarray(tail, dtype=np.float32), total > 0)


def join(given: Sequence[Targets]) -> Targets:
    """Targets one after the other, as wide as the widest."""
    width = max(one.ids.shape[1] for one in given)

    def wide(name: str) -> NDArray[np.generic]:
        parts = [getattr(one, name) for one in given]
        return np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in parts])

    return Targets(
        wide("ids"),  # type: ignore[arg-type]
        wide("probs"),  # type: ignore[arg-type]
        wide("kept"),  # type: ignore[arg-type]
        np.concatenate([one.tail for one in given]),
        np.concatenate([one.valid for one in given]),
    )


# Stretches


@dataclass(frozen=True, eq=False)
class Chunks:
    """What a source says of the stretches of text between borders that it shares with the target: `index` (n,) int64, the stretch
    that each prediction of the target belongs to, -1 for none; `said` (stretches,) float32, the source's log-probability of each."""

    index: Integers
    said: Floats32


def chunks(true: Floats32, source: NDArray[np.int32], target: NDArray[np.int32]) -> Chunks:
    """The stretches of one document: the source's log-probabilities of its tokens, and the byte ends of both tokenisations."""
    found = stretches(source, target)
    inside = found.source >= 0
    said = np.bincount(found.source[inside], true[inside].astype(np.float64), minlength=found.count)
    return Chunks(found.target, said.astype(np.float32))


def join_chunks(given: Sequence[Chunks]) -> Chunks:
    """Stretches of documents one after the other."""
    before = np.cumsum([0, *(len(one.said) for one in given)])
    index = [np.where(one.index >= 0, one.index + start, -1) for one, start in zip(given, before[:-1], strict=True)]
    return Chunks(np.concatenate(index), np.concatenate([one.said for one in given]))

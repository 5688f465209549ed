"""A language model over documents -> the likeliest next tokens at each position, kept on disk.

What is kept are log-probabilities, never raw logits: of a few logits the true probabilities cannot be had back. With them goes the
log-probability of the token that did follow, which may not be among the likeliest. A model's logits beyond its tokenizer's ids are
of padding and do not count.

Documents are put into shards in their order, and within a shard run longest first in batches of like lengths; where a shard ends
and what a batch holds follows from the lengths alone. So a run that goes on after a kill makes what an unbroken one would have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mergeflow.errors import InputError, NumericError
from mergeflow.stages import models, scratch
from mergeflow.stages.collecting import MOST_DROPPED
from mergeflow.stages.fuse.shards import Shards
from mergeflow.stages.fuse.tokenising import Integers, Tokenised, read_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

SCORES = "scores.safetensors"
TOKENS_A_SHARD = 1 << 16
SHARDS_OPEN = 128
"""Of one source. A file that is mapped is an open one: of 10^8 tokens there are 1,500, and a process may have 1,024."""
_LOGITS_AT_ONCE = 1 << 24
"""Logits whose likeliest are looked for at once."""

Dtype = Literal["float16", "float32"]


def disk_bytes(tokens: int, top_k: int, vocab: int, dtype: Dtype = "float16") -> int:
    """Bytes that the capture of so many tokens takes, with their ids and byte ends, at most: 12 a token, and of each of the likeliest
    its id (2 bytes, of a larger vocabulary than 65,536 4) and its log-probability."""
    one = (2 if vocab <= 1 << 16 else 4) + (2 if dtype == "float16" else 4)
    return tokens * (12 + min(top_k, vocab) * one)


@dataclass(frozen=True, eq=False)
class Document:
    """What a source says at each position of a document but the last: (tokens - 1, k) ids and their log-probabilities, the likeliest
    first (-inf where fewer are kept), and (tokens - 1,) the log-probability of the token that follows.

    `complete`: every id of the vocabulary is there.
    """

    ids: Integers
    log_probs: NDArray[np.float32]
    true: NDArray[np.float32]
    complete: bool = False


@dataclass(frozen=True, eq=False)
class Captured:
    """What a source says of documents. By document: `nll` (float64, nats) the negative log-likelihood of its text as far as it was
    predicted, over `tokens` tokens and `bytes` bytes; `bad` where there was NaN or Inf, which is for nobody's use."""

    folder: Path
    nll: NDArray[np.float64]
    tokens: Integers
    bytes: Integers
    bad: NDArray[np.bool_]
    shards: Integers
    offsets: Integers
    complete: bool
    _open: dict[int, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> Captured:
        """What `capture` filled this folder with. Raises InputError where it is damaged."""
        read = read_tensors(folder / SCORES)
        names = ("nll", "tokens", "bytes", "bad", "shards", "offsets")
        complete = bool(read["complete"][0])
        return cls(folder=folder, complete=complete, **{name: read[name] for name in names})

    def document(self, number: int) -> Document:
        """What it says of one document. Raises InputError where the shard is damaged."""
        shard = int(np.searchsorted(self.shards, number, side="right")) - 1
        first = self.offsets[self.shards[shard]]
        start, stop = int(self.offsets[number] - first), int(self.offsets[number + 1] - first)
        read = self._shard(shard)
        true = read["true"][start:stop]
        if "log_probs" not in read:
            none = np.zeros((stop - start, 0), dtype=np.float32)
            return Document(none.astype(np.int64), none, true)
        if "counts" not in read:
            ids, log_probs = read["ids"][start:stop], read["log_probs"][start:stop]
            return Document(ids.astype(np.int64), log_probs.astype(np.float32), true, self.complete)
        ends = read["ends"]
        begin, end = (int(ends[start - 1]) if start else 0), (int(ends[stop - 1]) if stop else 0)
        counts = read["counts"][start:stop].astype(np.int64)
        shape = (stop - start, int(counts.max(initial=0)))
        inside = np.arange(shape[1]) < counts[:, None]
        ids, log_probs = np.zeros(shape, dtype=np.int64), np.full(shape, -np.inf, dtype=np.float32)
        ids[inside], log_probs[inside] = read["ids"][begin:end], read["log_probs"][begin:end]
        return Document(ids, log_probs, true)

    def _shard(self, number: int) -> Mapping[str, Any]:
        """A shard's arrays, mapped from the file: what is not looked at is not read."""
        found: dict[str, Any] | None = self._open.pop(number, None)
        if found is None:
            found = mapped(self.folder / _name(number))
            if "counts" in found:
                found["ends"] = np.cumsum(found["counts"], dtype=np.int64)
            if len(self._open) >= SHARDS_OPEN:
                del self._open[next(iter(self._open))]  # the one that has not been asked for the longest
        self._open[number] = found
        return found


def mapped(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a safetensors file, mapped. Raises InputError where it is damaged."""
    try:
        whole = np.memmap(path, dtype=np.uint8, mode="r")
        size = int(whole[:8].view(np.uint64)[0])
        header = json.loads(whole[8 : 8 + size].tobytes())
        header.pop("__metadata__", None)
        return {
            name: whole[8 + size :][slice(*told["data_offsets"])].view(_NUMPY[told["dtype"]]).reshape(told["shape"])
            for name, told in header.items()
        }
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise InputError(
            f"cannot be read: {error}", where=str(path), fix="Clear it: `mergeflow cache clear`."
        ) from None


_NUMPY = {"F16": np.float16, "F32": np.float32, "U16": np.uint16, "I32": np.int32}


def _name(shard: int) -> str:
    return f"said-{shard:05}.safetensors"


# Running


@dataclass(frozen=True)
class _Keep:
    """What of a position is kept."""

    vocab: int
    top_k: int
    min_mass: float | None
    dtype: Dtype


def capture(
    model: nn.Module,
    tokenised: Tokenised,
    folder: Path,
    *,
    vocab: int,
    top_k: int,
    min_mass: float | None = None,
    dtype: Dtype = "float16",
    batch_tokens: int = 4096,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
    check_stop: Callable[[], None] = lambda: None,
) -> None:
    """Run a causal language model over documents and fill `folder` with what it says. Shards that are there are not made again.

    At each position the `top_k` likeliest ids below `vocab` are kept, or with `min_mass` as few of them as have this much
    probability together; 0 keeps the following token's log-probability alone. A batch has at most `batch_tokens` tokens, or one
    document. `progress` is called with the tokens done since the last call, and of how many.

    Raises InputError where the model lacks ids that the tokenizer gives, NumericError where over 0.1% of documents give NaN or Inf.
    """
    import torch

    models.check_ids(int(tokenised.ids.max(initial=0)), len(model.get_input_embeddings().weight))  # type: ignore[operator]
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    vocab = vocab if head is None else min(vocab, len(head.weight))  # a tokenizer may have ids that no logit is of
    keep = _Keep(vocab, min(top_k, vocab), min_mass, dtype)
    sizes = np.diff(tokenised.offsets)
    starts = _shard_starts(sizes)
    shards = Shards(folder)
    scores: list[dict[str, NDArray[Any]]] = []
    bad = 0
    with torch.inference_mode():
        for number, (first, last) in enumerate(zip(starts, [*starts[1:], len(sizes)], strict=True)):
            name = _name(number)
            if shards.has(name):
                progress(int(sizes[first:last].sum()), len(tokenised.ids))
            else:
                shards.write(name, _said(model, tokenised, range(first, last), keep, batch_tokens, device,
                                         progress, check_stop))  # fmt: skip
            scores.append(_scores(tokenised, range(first, last), shards.read(name)["true"].numpy()))
            wrong = scores[-1]["bad"]
            bad += int(wrong.sum())
            if bad > MOST_DROPPED * len(sizes):
                raise NumericError(
                    f"the model gives NaN or Inf for {bad} of {len(sizes)} documents so far",
                    fix="Look at its weights; at most 0.1% of documents are left out.",
                )
    offsets = np.concatenate([[0], np.cumsum(np.maximum(sizes - 1, 0))]).astype(np.int64)
    whole = {key: np.concatenate([one[key] for one in scores]) for key in scores[0]}
    complete = np.array([keep.top_k == vocab and min_mass is None])
    scratch.save(folder / SCORES, {**whole, "shards": np.array(starts), "offsets": offsets, "complete": complete})


def _shard_starts(sizes: Integers) -> list[int]:
    """The first document of each shard: one begins where those before have reached another 65,536 tokens."""
    before = np.cumsum(sizes) - sizes
    shard = before // TOKENS_A_SHARD
    return [int(one) for one in np.flatnonzero(np.append(True, shard[1:] != shard[:-1])[: len(sizes)])]


def batches(sizes: Integers, documents: range, batch_tokens: int) -> Iterator[list[int]]:
    """Documents that run together, the longest first: no more than `batch_tokens` with their padding, but at least one. Those of
    fewer than two tokens run in none, since nothing of them is predicted."""
    batch: list[int] = []
    for number in sorted((one for one in documents if sizes[one] > 1), key=lambda one: -sizes[one]):
        if batch and (len(batch) + 1) * sizes[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def inputs(tokenised: Tokenised, batch: list[int], device: str = "cpu") -> dict[str, Tensor]:
    """Documents as a model reads them: filled up on the right, where a causal model does not look from the left."""
    import torch

    rows = [tokenised.document(number)[0] for number in batch]
    ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return {"input_ids": torch.from_numpy(ids).to(device), "attention_mask": torch.from_numpy(mask).to(device)}


def _said(
    model: nn.Module,
    tokenised: Tokenised,
    documents: range,
    keep: _Keep,
    batch_tokens: int,
    device: str,
    progress: Callable[[int, int], None],
    check_stop: Callable[[], None],
) -> dict[str, Tensor]:
    """One shard: what the model says of documents, in their order."""
    import torch

    sizes = np.diff(tokenised.offsets)
    found: dict[int, dict[str, Tensor]] = {}
    for batch in batches(sizes, documents, batch_tokens):
        check_stop()
        given = inputs(tokenised, batch, device)
        logits = model(**given, use_cache=False).logits
        for row, number in enumerate(batch):
            length = int(sizes[number])
            found[number] = _kept(logits[row, : length - 1], given["input_ids"][row, 1:length], keep)
        progress(int(sizes[batch].sum()), len(tokenised.ids))
    progress(int(sum(sizes[number] for number in documents if sizes[number] < 2)), len(tokenised.ids))
    none = _kept(torch.zeros(0, keep.vocab), torch.zeros(0, dtype=torch.int64), keep)
    made = [found[number] for number in documents if number in found] or [none]
    return {key: torch.cat([one[key] for one in made]) for key in none}


def _kept(logits: Tensor, following: Tensor, keep: _Keep) -> dict[str, Tensor]:
    """What of (positions, ids) logits is kept; rows that hold NaN or Inf have NaN for the following token's log-probability."""
    import torch

    step = max(1, _LOGITS_AT_ONCE // max(keep.vocab, 1))
    parts = [
        _rows(logits[start : start + step, : keep.vocab].float(), following[start : start + step], keep)
        for start in range(0, max(len(logits), 1), step)
    ]
    return {key: torch.cat([part[key] for part in parts]).cpu() for key in parts[0]}


def _rows(logits: Tensor, following: Tensor, keep: _Keep) -> dict[str, Tensor]:
    import torch

    total = logits.logsumexp(1)
    true = logits.gather(1, following[:, None])[:, 0] - total
    true = torch.where(torch.isfinite(true), true, torch.nan)
    if not keep.top_k:
        return {"true": true}
    values, ids = logits.topk(keep.top_k, dim=1)
    log_probs = values - total[:, None]
    small = torch.uint16 if keep.vocab <= 1 << 16 else torch.int32
    kept_ids, kept = ids.to(small), log_probs.to(getattr(torch, keep.dtype))
    if keep.min_mass is None:
        return {"true": true, "ids": kept_ids, "log_probs": kept}
    # One is kept while those before it have less than the mass that is asked for.
    mass = log_probs.exp()
    inside = mass.cumsum(1) - mass < keep.min_mass
    counts = inside.sum(1, dtype=torch.int32)
    flat = inside.flatten().nonzero()[:, 0]
    return {
        "true": true,
        "counts": counts,
        "ids": kept_ids.flatten().to(torch.int32)[flat].to(small),
        "log_probs": kept.flatten()[flat],
    }


def _scores(tokenised: Tokenised, documents: range, true: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """By document what its text costs the model. Tokens that a template adds behind the text are not of the text."""
    count = len(documents)
    made: dict[str, NDArray[Any]] = {
        "nll": np.zeros(count),
        "tokens": np.zeros(count, dtype=np.int64),
        "bytes": np.zeros(count, dtype=np.int64),
        "bad": np.zeros(count, dtype=bool),
    }
    at = 0
    for index, number in enumerate(documents):
        _, ends = tokenised.document(number)
        if len(ends) < 2:
            continue
        said = true[at : at + len(ends) - 1]
        at += len(said)
        text = ends[:-1] < ends[-1]
        made["bad"][index] = not np.isfinite(said).all()
        made["nll"][index] = -float(said[text].astype(np.float64).sum())
        made["tokens"][index] = int(text.sum())
        made["bytes"][index] = int(ends[-1] - ends[0])
    return made

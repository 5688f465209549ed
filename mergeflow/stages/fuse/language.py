"""Language models: what the sources say of texts, and lessons made of it in the target's own tokens (FuseLLM, arXiv:2401.10491).

Each step on the way is kept in the cache under what decides it: the documents, by their own bytes from there on; a tokenizer's
tokens; what a source says of them; pairs and vocabularies of two tokenizers, which no weight changes. So a source whose weights
change runs again alone, and another loss, fusion or training runs none.

In training, documents are packed into rows, in which none sees another, or stand one to a row.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from mergeflow.errors import InputError, MachineError, MergeflowError, RecipeError
from mergeflow.ops.fuse import Fuse
from mergeflow.stages import data, models, scratch
from mergeflow.stages.fuse import aligning, capturing, losses, projecting, selecting, teaching, tokenising
from mergeflow.stages.fuse.capturing import Captured
from mergeflow.stages.fuse.job import VERSION, FuseJob
from mergeflow.stages.fuse.tokenising import Corpus, Tokenised, Tokenizer
from mergeflow.stages.fuse.training import Lessons, Step, order

if TYPE_CHECKING:
    from torch import Tensor, nn

MAP = "vocabulary.safetensors"
NO_CONTEXT = 2048
"""Tokens of a document where neither a model nor the recipe says how many it reads."""


def check(op: Fuse, target: models.Folder, sources: Sequence[models.Folder]) -> None:
    """Raises RecipeError for what configs show not to go together."""
    for folder in (target, *sources):
        if folder.task != "causal":
            raise RecipeError(
                f"{folder.architecture} is no causal language model",
                fix="Fuse causal language models, or write `task: classification`.",
            )
        if op.max_length is not None and folder.context is not None and op.max_length > folder.context:
            raise RecipeError(
                f"{folder.path.name} reads {folder.context} tokens, and documents are to have {op.max_length}",
                where="max_length",
                fix=f"Write {folder.context} or less, or leave it out.",
            )
    if op.pack and not _takes_places(target):
        raise RecipeError(
            f"{target.architecture} cannot be told which tokens stand where, so documents cannot share a row",
            where="pack",
            fix="Write `pack: false`.",
        )


# What is kept


@dataclass(frozen=True, eq=False)
class Source:
    """One source over the documents: its tokens, what it says, and how both come to the target's tokens (None for ALM, which goes
    by stretches of text)."""

    tokens: Tokenised
    said: Captured
    pairs: aligning.Aligned | None
    vocabulary: NDArray[np.int32] | None


class _Kept:
    """What is made of the data, from the cache or anew."""

    def __init__(self, job: FuseJob, target: models.Folder) -> None:
        self.job, self.target = job, target
        paths = dict.fromkeys((job.target, *(path for _, path, _ in job.teachers)))
        self.readers = {path: tokenising.load(path) for path in paths}
        folders = {path: target if path == job.target else models.open_folder(path) for path in self.readers}
        self.longest = {path: folder.longest(job.op.max_length, NO_CONTEXT) for path, folder in folders.items()}
        self.corpus = self._corpus()
        whole = blake3(self.corpus.lengths.tobytes())
        for text in self.corpus.texts:
            whole.update(text.encode())
        self.digest = whole.hexdigest()

    def make(self, what: str, parts: Mapping[str, Any], fill: Callable[[Path], None]) -> Path:
        """The folder of what these parts decide."""
        return self.job.kept({"fuse": what, "version": VERSION, **parts}, fill)

    def _corpus(self) -> Corpus:
        job = self.job
        readers = sorted({(self.readers[path].digest, self.longest[path]) for path in self.readers})
        parts = {"corpus": job.corpus, "target": job.digests[0], "readers": readers}

        def fill(folder: Path) -> None:
            source = job.data.model_copy(update={"label": None})
            texts = data.read_texts(source, job.folder, self.target)
            # One tokenizer may have two contexts.
            each = [(reader, self.longest[path]) for path, reader in self.readers.items()]
            try:
                made = tokenising.cut([text for _, text in texts.texts], each)
            except InputError as error:
                raise error.placed(job.data.path) from None
            made.save(folder)

        return Corpus.open(self.make("documents", parts, fill))

    def check_packing(self) -> None:
        """Hold a packed row of the target against its documents alone, once. Raises RecipeError where they differ."""
        longest = self.longest[self.job.target]
        device = self.job.device
        parts = {
            "target": self.job.digests[0],
            "longest": longest,
            "transformers": models.transformers().__version__,
            "device": device.partition(":")[0],
        }

        def fill(folder: Path) -> None:
            off = _packed_off(self.target, longest, device)
            if not off <= ALIKE:
                raise RecipeError(
                    f"{self.target.architecture} says something else of documents that share a row (log-probabilities are up to "
                    f"{off:.2g} off)",
                    where="pack",
                    fix="Write `pack: false`.",
                )
            scratch.put(folder / "alike.json", json.dumps({"off": off}).encode())

        self.make("packing", parts, fill)

    def tokens(self, path: Path) -> Tokenised:
        """The documents as a model reads them."""
        reader = self.readers[path]
        parts = {"documents": self.digest, "tokenizer": reader.digest}
        return Tokenised.open(
            self.make("tokens", parts, lambda folder: tokenising.tokenise(reader, self.corpus.texts).save(folder))
        )

    def said(self, index: int, path: Path, digest: str) -> Captured:
        """What a source (-1: the start) says of the documents."""
        import torch

        job, op, reader = self.job, self.job.op, self.readers[path]
        own = op.sources[index] if index >= 0 else None
        dtype, batch = (own.dtype, own.batch_tokens) if own else ("float32", op.train.micro_batch_tokens)
        stretches = op.loss.kind == "alm"
        settings: dict[str, Any] = {"top_k": 0} if stretches else op.capture.model_dump(mode="json")
        parts = {
            "documents": self.digest,
            "tokenizer": reader.digest,
            "model": digest,
            "dtype": dtype,
            "batch_tokens": batch,
            "capture": settings,
            "device": job.device.partition(":")[0],
        }
        what = "the start" if index < 0 else f"source {index + 1}"

        def fill(folder: Path) -> None:
            tokens = self.tokens(path)
            needed = capturing.disk_bytes(len(tokens.ids), settings["top_k"], reader.size, op.capture.dtype)
            if needed > job.free():
                raise MachineError(
                    f"what {what} says takes {needed:,} bytes, and the cache's disk has {job.free():,} free",
                    fix="Make room, write less in `capture: top_k`, or set MERGEFLOW_CACHE to a folder on another disk.",
                )
            model = models.load_model(models.open_folder(path), job.device).to(getattr(torch, dtype))
            try:
                capturing.capture(
                    model,
                    tokens,
                    folder,
                    vocab=reader.size,
                    batch_tokens=batch,
                    device=job.device,
                    progress=lambda done, total: job.progress(f"capture tokens of {what}", done, total),
                    check_stop=job.check_stop,
                    **settings,
                )
            except InputError as error:
                raise error.placed(str(path)) from None
            except MergeflowError as error:
                raise error.placed(what) from None

        return Captured.open(self.make("said", parts, fill))

    def source(self, index: int, path: Path, digest: str) -> Source:
        """A source, with all that brings it to the target's tokens."""
        op, ours, theirs = self.job.op, self.readers[self.job.target], self.readers[path]
        said = self.said(index, path, digest)
        tokens = self.tokens(path)
        if op.loss.kind == "alm":
            return Source(tokens, said, None, None)
        vocabulary = self._vocabulary(theirs, ours)
        align = op.align
        parts = {
            "documents": self.digest,
            "tokenizers": [theirs.digest, ours.digest],
            "align": [align.method, align.vocab if align.method == "dtw" else align.valid],
        }

        def fill(folder: Path) -> None:
            target = self.tokens(self.job.target)
            if align.method == "dtw":
                aligning.warp(tokens, target, (theirs, ours), vocabulary).save(folder)
            else:
                aligning.align(tokens, target, align.valid).save(folder)

        # A token that the target's tokenizer has and its model has no row for cannot be said by it.
        rows = self.target.number("vocab_size")
        vocabulary = np.where(vocabulary < rows, vocabulary, -1) if rows else vocabulary
        return Source(tokens, said, aligning.Aligned.open(self.make("pairs", parts, fill)), vocabulary)

    def _vocabulary(self, source: Tokenizer, target: Tokenizer) -> NDArray[np.int32]:
        kind = self.job.op.align.vocab

        def fill(folder: Path) -> None:
            scratch.save(folder / MAP, {"ids": projecting.vocabulary_map(source, target, kind)})

        parts = {"tokenizers": [source.digest, target.digest], "kind": kind}
        found: NDArray[np.int32] = tokenising.read_tensors(self.make("vocabulary", parts, fill) / MAP)["ids"]
        return found


# Lessons


Row = tuple[int, ...]
"""Documents that stand one behind the other."""

HIDDEN = np.float32(-3.3895313892515355e38)
"""What is added to the score of a position that is not to be seen: the least of bfloat16. (Eager attention adds a mask, true or not.)"""

ALIKE = 1e-3
"""How far log-probabilities in a row of two documents may be from those of each alone: rounding leaves 1e-5 and less."""


@dataclass(frozen=True, eq=False)
class TextStep(Step):
    """A step of texts. `taught`: over how much its fusion loss is a mean, positions or stretches times their sources' shares."""

    taught: float


class Texts(Lessons):
    """Documents in the target's tokens, and what each source says of them: w L_CLM + (1 - w) L_FUSE.

    L_CLM is a mean over the predictions of a step, L_FUSE over those of them for which a source says something, or over the
    stretches of text. So neither depends on what of a step runs together.
    """

    def __init__(self, op: Fuse, tokens: Tokenised, vocab: int, longest: int, sources: Sequence[Source], seed: int,
                 device: str) -> None:  # fmt: skip
        self.op, self.target, self.vocab, self.longest, self.sources = op, tokens, vocab, longest, sources
        self.seed, self.device = seed, device
        self.sizes = np.diff(tokens.offsets)
        bad = np.zeros(len(self.sizes), dtype=bool)
        for source in sources:
            bad |= source.said.bad
        self.documents = np.flatnonzero((self.sizes > 1) & ~bad)
        self.dropped = int(bad.sum())

    @property
    def tokens(self) -> int:
        """The most tokens that run together."""
        return max(self.op.train.micro_batch_tokens, self.longest if self.op.pack else int(self.sizes.max(initial=0)))

    @cached_property
    def shares(self) -> NDArray[np.float64]:
        """(sources, documents): how much each source counts for a document alone."""
        return self._choose([(one,) for one in range(len(self.sizes))])

    def _choose(self, groups: Sequence[Row]) -> NDArray[np.float64]:
        """(sources, groups): how much each source counts for documents together."""
        fusion = self.op.fusion
        rates = []
        for source in self.sources:
            sums, units = selecting.score(source.said, fusion.metric)
            rates.append(selecting.rate(*(np.array([one[list(row)].sum() for row in groups]) for one in (sums, units))))
        function: Any = self.op.function
        return selecting.choose(np.stack(rates), function, fusion.temperature, self.op.weights)

    def epoch(self, number: int) -> Sequence[TextStep]:
        """Steps of rows in the order of the seed; of each step those of like lengths run together."""
        train = self.op.train
        shuffled = self.documents[order(len(self.documents), self.seed, number)].tolist()
        rows = self._rows(shuffled)
        steps: list[TextStep] = []
        own: list[Row] = []
        tokens = 0
        for index, row in enumerate(rows):
            own.append(row)
            tokens += self._length(row)
            if tokens >= train.batch_tokens or index + 1 == len(rows):
                steps.append(self._step(own))
                own, tokens = [], 0
        return steps

    def _length(self, row: Row) -> int:
        return int(self.sizes[list(row)].sum())

    def _rows(self, documents: Sequence[int]) -> list[Row]:
        if not self.op.pack:
            return [(one,) for one in documents]
        rows: list[Row] = []
        row: list[int] = []
        tokens = 0
        for one in documents:
            if row and tokens + int(self.sizes[one]) > self.longest:
                rows.append(tuple(row))
                row, tokens = [], 0
            row.append(one)
            tokens += int(self.sizes[one])
        return [*rows, tuple(row)]

    def _step(self, rows: Sequence[Row]) -> TextStep:
        parts: list[tuple[Row, ...]] = []
        part: list[Row] = []
        for row in sorted(rows, key=self._length, reverse=True):
            if part and (len(part) + 1) * self._length(part[0]) > self.op.train.micro_batch_tokens:
                parts.append(tuple(part))
                part = []
            part.append(row)
        parts.append(tuple(part))
        tokens = sum(self._length(row) for row in rows)
        taught = self._taught(rows) if self.op.teaches else 0.0
        return TextStep(tuple(parts), sum(map(len, rows)), tokens, taught)

    def _taught(self, rows: Sequence[Row]) -> float:
        """Over how much the fusion loss of some rows is a mean."""
        documents = [one for row in rows for one in row]
        stretches = self.op.loss.kind == "alm"
        if not stretches and self.op.align.unmatched == "gold":
            return float((self.sizes[documents] - 1).sum())
        shares = self._weights(rows)
        if stretches:
            return float((self.stretches[:, documents] * np.stack(shares, axis=1)).sum())
        total = 0
        for one, own in zip(documents, shares, strict=True):
            last = self.target.offsets[one + 1] - 1  # of the last token nothing follows
            pairs = [
                source.pairs for source, share in zip(self.sources, own, strict=True) if share > 0 and source.pairs
            ]
            said = [(found.starts[self.target.offsets[one] : last] >= 0) for found in pairs]
            total += int(np.logical_or.reduce(said).sum())
        return float(total)

    @cached_property
    def stretches(self) -> NDArray[np.int64]:
        """(sources, documents): the stretches of text between borders that a source shares with the target."""
        return np.array(
            [
                [
                    aligning.stretches(source.tokens.document(one)[1], self.target.document(one)[1]).count
                    for one in range(len(self.sizes))
                ]
                for source in self.sources
            ]
        )

    def losses(self, model: nn.Module, step: Step, part: Any, done: float) -> Mapping[str, Tensor]:
        """What some rows lose, as their share of the step's means."""
        assert isinstance(step, TextStep)
        inputs, at = self._inputs(part)
        logits = model(**inputs, use_cache=False).logits[..., : self.vocab].float()
        documents = [one for row in part for one in row]
        count = step.tokens - step.documents  # predictions of the whole step
        weight = self.op.loss.clm_weight
        if weight == 1:
            following = self._following(documents).to(logits.device)
            own = _picked(logits.log_softmax(-1), at, following[:, None])[:, 0]
            loss = -own.sum() / count
            return {"loss": loss, "clm_loss": loss.detach()}
        if self.op.loss.kind == "alm":
            following = self._following(documents).to(logits.device)
            own = _picked(logits.log_softmax(-1), at, following[:, None])[:, 0]
            lost = self._stretches(own, part)
        else:
            own, lost = self._distributions(logits, at, part)
        clm, fused = -own.sum() / count, lost / (step.taught or 1)
        loss = weight * clm + (1 - weight) * fused
        return {"loss": loss, "clm_loss": clm.detach(), "fuse_loss": fused.detach()}

    def _following(self, documents: Sequence[int]) -> Tensor:
        import torch

        found = [self.target.document(one)[0][1:] for one in documents]
        return torch.from_numpy(np.concatenate(found).astype(np.int64))

    def _inputs(self, part: Sequence[Row]) -> tuple[dict[str, Tensor], Tensor]:
        """Rows as the model reads them, and where in the rows together each prediction stands."""
        import torch

        width = max(map(self._length, part))
        ids = np.zeros((len(part), width), dtype=np.int64)
        places, owners = np.zeros_like(ids), np.full_like(ids, -1)
        at: list[NDArray[np.int64]] = []
        for index, row in enumerate(part):
            start = 0
            for one in row:
                own, _ = self.target.document(one)
                stop = start + len(own)
                ids[index, start:stop], places[index, start:stop] = own, np.arange(len(own))
                owners[index, start:stop] = one
                at.append(index * width + np.arange(start, stop - 1))
                start = stop
        inputs: dict[str, NDArray[np.int64] | NDArray[np.float32]] = {"input_ids": ids}
        if all(len(row) == 1 for row in part):
            inputs["attention_mask"] = (owners >= 0).astype(np.int64)
        else:
            inputs["attention_mask"] = _mask(owners)
            inputs["position_ids"] = places
        found = {name: torch.from_numpy(one).to(self.device) for name, one in inputs.items()}
        return found, torch.from_numpy(np.concatenate(at)).to(self.device)

    def _weights(self, part: Sequence[Row]) -> list[NDArray[np.float64]]:
        """For each document of some rows the share of each source."""
        if self.op.fusion.granularity == "document":
            return [self.shares[:, one] for row in part for one in row]
        shares = self._choose(part)
        return [shares[:, index] for index, row in enumerate(part) for _ in row]

    def _distributions(self, logits: Tensor, at: Tensor, part: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """The log-probabilities of the true tokens, and the losses against what the sources say, summed."""
        settings, align = self.op.loss, self.op.align
        found = []
        for one, shares in zip([one for row in part for one in row], self._weights(part), strict=True):
            here = slice(self.target.offsets[one], self.target.offsets[one + 1])
            given = [
                teaching.targets(
                    source.said.document(one),
                    source.pairs.starts[here],
                    source.pairs.stops[here],
                    self.target.ids[here],
                    source.vocabulary,
                    unmatched=align.unmatched,
                    chunk_correction=align.chunk_correction,
                )
                for source, share in zip(self.sources, shares, strict=True)
                if share > 0 and source.pairs is not None and source.vocabulary is not None
            ]
            found.append(teaching.mix(given, [share for share in shares if share > 0]))
        taught = teaching.join(found).tensors(self.device)
        student = _picked(logits.log_softmax(-1), at, taught["ids"])
        own = student[:, 0]
        if settings.student_temperature != 1:
            student = _picked((logits / settings.student_temperature).log_softmax(-1), at, taught["ids"])
        lost = losses.fuse_loss(
            student,
            taught,
            kind="kl" if settings.kind == "kl" else "soft_ce",
            tail=settings.tail,
            teacher_temperature=settings.teacher_temperature,
        )
        return own, lost.sum()

    def _stretches(self, own: Tensor, part: Sequence[Row]) -> Tensor:
        """The losses against the probabilities that the sources give to stretches of text, summed by the sources' shares."""
        import torch

        documents, shares = [one for row in part for one in row], self._weights(part)
        total = own.new_zeros(())
        for number, source in enumerate(self.sources):
            found = [
                teaching.chunks(
                    source.said.document(one).true, source.tokens.document(one)[1], self.target.document(one)[1]
                )
                for one in documents
            ]
            each = np.repeat([share[number] for share in shares], [len(one.said) for one in found])
            joined = teaching.join_chunks(found)
            index, said = (torch.from_numpy(one).to(own.device) for one in (joined.index, joined.said))
            lost = losses.alm_loss(own, index, said, self.op.loss.alm_tau)
            total = total + (lost * torch.from_numpy(each).to(lost)).sum()
        return total


def _mask(owners: NDArray[np.int64]) -> NDArray[np.float32]:
    """What is added to the scores of (rows, 1, places, places), by the document at each place (rows, places).

    Each sees those before it in its own document; padding sees itself, since a row of no one is NaN.
    """
    same = owners[:, :, None] == owners[:, None, :]
    return np.where(same & np.tri(owners.shape[1], dtype=bool), np.float32(0), HIDDEN)[:, None]


def _picked(log_probs: Tensor, at: Tensor, ids: Tensor) -> Tensor:
    """(n, K): of (rows, places, V) log-probabilities those of `ids` (n, K) at the places `at` (n,) in all rows together."""
    vocab = log_probs.shape[-1]
    return log_probs.flatten().take(at[:, None] * vocab + ids)


def lessons(job: FuseJob, target: models.Folder, sources: Sequence[models.Folder], seed: int) -> Texts:
    """Run what has not been run, and make lessons of it. Raises InputError where no document is left or the target lacks ids that its
    tokenizer gives, RecipeError where documents say something else when they share a row."""
    op = job.op.settled
    job = replace(job, op=op)
    kept = _Kept(job, target)
    if op.pack:
        kept.check_packing()
    tokens = kept.tokens(job.target)
    models.check_ids(int(tokens.ids.max(initial=0)), target.number("vocab_size"), str(target.path))
    teachers = job.teachers if op.teaches else ()
    found = [kept.source(*one) for one in teachers]
    reader, longest = kept.readers[job.target], kept.longest[job.target]
    texts = Texts(op, tokens, reader.size, longest, found, seed, job.device)
    if not len(texts.documents):
        raise InputError("has no document that all models can read", where=job.data.path)
    if texts.dropped:
        job.progress(f"documents with NaN or Inf, left out: {texts.dropped}", 0, 0)
    return texts


def _packed_off(target: models.Folder, longest: int, device: str) -> float:
    """How far log-probabilities of two documents in one row are from those of each alone, at most: much where a model hands a state
    on from token to token, or where a given mask replaces its windows."""
    import torch

    first = longest - 2
    if first < 1:
        return 0.0
    ids = torch.randint(target.number("vocab_size") or 2, (longest,), generator=torch.Generator().manual_seed(0))
    mask = torch.from_numpy(_mask((np.arange(longest)[None] >= first).astype(np.int64)))
    places = torch.cat([torch.arange(first), torch.arange(longest - first)])
    ids, mask, places = (one.to(device) for one in (ids, mask, places))
    model = models.load_model(target, device).float().eval()
    with torch.no_grad():
        packed = model(input_ids=ids[None], attention_mask=mask, position_ids=places[None], use_cache=False).logits[0]
        alone = torch.cat([model(input_ids=own[None], use_cache=False).logits[0] for own in (ids[:first], ids[first:])])
    # Logits are many: no more copies of all of them.
    pieces = [(packed[at : at + 64], alone[at : at + 64]) for at in range(0, longest, 64)]
    return max(float((one.log_softmax(-1) - other.log_softmax(-1)).abs().max()) for one, other in pieces)


def _takes_places(folder: models.Folder) -> bool:
    """Whether a model's class reads where each token stands."""
    made = getattr(models.transformers(), folder.architecture, None)
    return made is not None and "position_ids" in inspect.signature(made.forward).parameters

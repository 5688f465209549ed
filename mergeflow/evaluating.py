"""How good a model is on data: accuracy and macro-F1 of a classifier, bits per byte and perplexity of a language model.

The same loading of models and reading of data as the stages', so that what is measured is what was collected on. A language
model reads each text whole, in windows of its context: nothing is cut, and each token is predicted once. Bits per byte are over
the UTF-8 bytes of the texts, so that models with different tokenizers can be compared; perplexity is by token, so they cannot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mergeflow.checkpoint import open_checkpoint
from mergeflow.errors import InputError, MachineError, NumericError, RecipeError
from mergeflow.hub import LocalFolder, locate
from mergeflow.planning import SPACE_KEY
from mergeflow.stages import data, models

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mergeflow.recipe.grammar import DataSource

Kind = Literal["classification", "language model"]
Progress = Callable[[str, int, int], None]
"""Called with what is read, the count of examples since the last call, and of how many."""

CLASSIFIERS = ("features", "images", "classifier", "tokens")
MEASURES: Mapping[Kind, tuple[str, ...]] = {
    "classification": ("accuracy", "macro_f1"),
    "language model": ("bits_per_byte", "perplexity"),
}
_MOST_LOGITS = 1 << 27
"""Logits of a language model that are made at once, at most: 512 MiB in float32."""
_SIDE_FILES = (".json", ".txt", ".model", ".jinja")


@dataclass(frozen=True)
class Result:
    """What came out on one entry of data. `left_out` rows could not be used, `cut` texts were longer than the context."""

    data: str
    n_examples: int
    left_out: int
    cut: int
    n_tokens: int
    n_bytes: int | None
    measures: Mapping[str, float]


@dataclass(frozen=True)
class Evaluation:
    """A model's results, in the order of the data."""

    model: str
    architecture: str
    kind: Kind
    results: tuple[Result, ...]

    @property
    def means(self) -> dict[str, float]:
        """The plain mean of each measure over the entries of data; of perplexities there is none."""
        names = [name for name in MEASURES[self.kind] if name != "perplexity"]
        return {name: math.fsum(one.measures[name] for one in self.results) / len(self.results) for name in names}


def model_folder(model: str, relative_to: Path) -> Path:
    """The local folder of a model, with its config, tokenizer and weights: of a hub repository they are fetched.

    Raises InputError, RecipeError, MachineError.
    """
    found = locate(model, relative_to=relative_to)
    if isinstance(found, LocalFolder):
        if found.only_file is not None:
            raise RecipeError("is one file, and a model that runs is a folder", where=model, fix="Name its folder.")
        return found.root
    weights = tuple(open_checkpoint(found).files)
    side = tuple(name for name in found.names() if "/" not in name and name.endswith(_SIDE_FILES))
    if "config.json" not in side:
        raise InputError("holds no config.json", where=found.label, fix="A model that runs is a whole repository.")
    return found.local([*side, *weights])["config.json"].parent


def evaluate(
    model: Path,
    sources: Sequence[DataSource],
    *,
    relative_to: Path,
    label: str | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Evaluation:
    """Run the model of a local folder on each entry of data and measure it.

    Labels are read from the field `label` where an entry names none. All data is read and checked before the weights are.
    Raises InputError for a model or data that cannot be used or a label that the model does not know, RecipeError for a model
    that gives neither classes nor next tokens, NumericError where the model gives NaN or Inf.
    """
    folder = models.open_folder(model)
    kind = _kind(folder)
    if kind == "classification":
        named = [s if s.label is not None else s.model_copy(update={"label": "label"}) for s in sources]
        read = [data.read_examples(source, relative_to, folder, max_length) for source in named]
        measure: Callable[..., Result] = _classes
    else:
        read = [data.read_texts(source, relative_to, folder, max_length) for source in sources]  # type: ignore[misc]
        measure = _texts
    with _computing(threads):
        net = models.load_model(folder, device)
        results = tuple(
            measure(net, one, source.path, folder, batch_size, device, progress)
            for source, one in zip(sources, read, strict=True)
        )
    return Evaluation(label or str(model), folder.architecture, kind, results)


def _kind(folder: models.Folder) -> Kind:
    """What can be measured of a model, from its config and headers alone."""
    where = str(folder.path)
    space = folder.checkpoint.metadata.get(SPACE_KEY, "weight")
    if space != "weight":
        raise RecipeError(f"holds {space}, no model that runs", where=where, fix="Evaluate what a merge makes of it.")
    if folder.task == "causal":
        return "language model"
    if folder.task not in CLASSIFIERS or (folder.task == "images" and "Classification" not in folder.architecture):
        raise RecipeError(
            f"{folder.architecture} gives neither classes nor next tokens",
            where=where,
            fix="Evaluate a classifier or a causal language model.",
        )
    problem = folder.config.get("problem_type")
    if folder.n_labels < 2 or problem in ("regression", "multi_label_classification"):
        given = problem if isinstance(problem, str) else f"{folder.n_labels} label"
        raise RecipeError(
            f"its classifier ({given}) does not choose one of several classes",
            where=where,
            fix="Accuracy and F1 are of classes that exclude one another.",
        )
    return "classification"


@contextmanager
def _computing(threads: int | None) -> Iterator[None]:
    """Torch without gradients, on this many threads; what does not fit is an error of the machine."""
    import torch

    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        with torch.inference_mode():
            yield
    except torch.OutOfMemoryError:
        raise MachineError(
            "the device has too little memory", fix="Give --batch-size less, or use another device."
        ) from None
    finally:
        torch.set_num_threads(before)


def _logits(net: nn.Module, inputs: Mapping[str, Tensor], places: Sequence[str], mask: Tensor | None) -> Tensor:
    """What the model gives for a batch; where it counts, all is finite."""
    import torch

    output = net(**inputs)
    logits: Tensor = output if isinstance(output, torch.Tensor) else output.logits
    finite = torch.isfinite(logits)
    if mask is not None and logits.ndim == 3:
        finite |= ~mask[..., None]
    if not finite.all():
        first = int((~finite).flatten(1).any(1).nonzero()[0])
        raise NumericError("the model gives NaN or Inf for it", where=places[first], fix="Look at the model's weights.")
    return logits


# Classes


def _classes(
    net: nn.Module,
    examples: data.Examples,
    label: str,
    folder: models.Folder,
    batch_size: int,
    device: str,
    progress: Progress,
) -> Result:
    """Count which class was found for which."""
    import torch

    if getattr(net, "config", None) is not None and getattr(net.config, "pad_token_id", None) is None:
        net.config.pad_token_id = examples.pad  # type: ignore[union-attr]  # classifiers with a decoder look for it
    counts = torch.zeros(0, 0, dtype=torch.long)
    tokens = 0
    for batch in examples.batches(batch_size, device):
        logits = _logits(net, batch.inputs, [example.where for example in batch.examples], batch.mask)
        meant, found = batch.labels, logits.argmax(-1)
        if meant is None:
            raise InputError("has rows without a label", where=label, fix="Name the field: `label: ...`.")
        if counts.numel() == 0:
            counts = torch.zeros(logits.shape[-1], logits.shape[-1], dtype=torch.long)
        chosen = meant >= 0
        pairs = (meant[chosen] * logits.shape[-1] + found[chosen]).flatten().cpu()
        counts += torch.bincount(pairs, minlength=counts.numel()).reshape(counts.shape)
        tokens += batch.tokens
        progress(label, len(batch.examples), len(examples.examples))
    if not counts.any():
        raise InputError("has no token with a label", where=label, fix="Name the field of its labels: `label: ...`.")
    return Result(
        data=label,
        n_examples=len(examples.examples),
        left_out=examples.counts.unusable,
        cut=examples.counts.cut,
        n_tokens=tokens,
        n_bytes=None,
        measures=class_measures(counts.tolist()),
    )


def class_measures(counts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Accuracy and macro-F1 of a table: `counts[i][j]` rows of class i were taken for class j.

    Macro-F1 is the plain mean over the classes that occur, as a label or as an answer, of 2 TP / (2 TP + FP + FN).
    """
    size = range(len(counts))
    total = sum(map(sum, counts))
    right = [counts[i][i] for i in size]
    seen = [sum(counts[i]) + sum(counts[j][i] for j in size) for i in size]
    scores = [2 * right[i] / seen[i] for i in size if seen[i]]
    return {"accuracy": sum(right) / total, "macro_f1": math.fsum(scores) / len(scores)}


# Texts


@dataclass(frozen=True, slots=True)
class _Window:
    """What the model reads at once, and the tokens that it is to predict at the last places of it."""

    where: str
    inputs: tuple[int, ...]
    targets: tuple[int, ...]


def _texts(
    net: nn.Module,
    texts: data.Texts,
    label: str,
    folder: models.Folder,
    batch_size: int,
    device: str,
    progress: Progress,
) -> Result:
    """Sum the surprise of every token, the first ones after the token that starts or ends a text."""
    tokenizer = texts.tokenizer
    known = [tokenizer.bos_token_id, tokenizer.eos_token_id, folder.config.get("bos_token_id")]
    start = next((token for token in known if isinstance(token, int)), None)
    windows: list[_Window] = []
    tokens = size = unpredicted = highest = 0
    for where, text in texts.texts:
        with models.quietly():
            ids = tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"]
        size += len(text.encode())
        tokens += len(ids)
        highest = max(highest, *ids) if ids else highest
        unpredicted += start is None and bool(ids)
        windows += windows_of(where, ids, start, texts.longest)
    if not tokens:
        raise InputError("has texts without tokens alone", where=label)
    models.check_ids(highest, folder.number("vocab_size"), str(folder.path))
    vocabulary = _vocabulary(net, folder)
    # Where nothing can stand before a first token, it is charged as one of the vocabulary's, all equally likely.
    nats = [unpredicted * math.log(vocabulary)]
    for batch in _grouped(windows, batch_size, max(_MOST_LOGITS // vocabulary, 1)):
        nats += _surprises(net, batch, texts.pad, device)
        progress(label, len(batch), len(windows))
    total = math.fsum(nats)
    return Result(
        data=label,
        n_examples=len(texts.texts),
        left_out=texts.counts.unusable,
        cut=0,
        n_tokens=tokens,
        n_bytes=size,
        measures={
            "bits_per_byte": total / math.log(2) / size,
            "perplexity": math.exp(min(total / tokens, 700.0)),  # float64 ends there
        },
    )


def windows_of(where: str, ids: Sequence[int], start: int | None, longest: int) -> Iterator[_Window]:
    """The windows of one text: together they predict each token once, each of the later ones with as much before it as fits."""
    known = ([] if start is None else [start]) + list(ids)
    last = 0
    while last < len(known) - 1:
        end = min(last + longest, len(known) - 1)
        begin = max(end - longest, 0)
        yield _Window(where, tuple(known[begin:end]), tuple(known[last + 1 : end + 1]))
        last = end


def _grouped(windows: Sequence[_Window], most: int, tokens: int) -> Iterator[Sequence[_Window]]:
    """Neighbours that run together: at most so many, and so many tokens when padded, but at least one."""
    batch: list[_Window] = []
    for window in windows:
        longest = max(len(one.inputs) for one in [*batch, window])
        if batch and (len(batch) == most or longest * (len(batch) + 1) > tokens):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _surprises(net: nn.Module, windows: Sequence[_Window], pad: int, device: str) -> list[float]:
    """-log p of each window's targets together, in nats."""
    import torch

    longest = max(len(window.inputs) for window in windows)
    ids = torch.full((len(windows), longest), pad, dtype=torch.long)
    mask = torch.zeros((len(windows), longest), dtype=torch.bool)
    for row, window in enumerate(windows):
        ids[row, : len(window.inputs)] = torch.tensor(window.inputs)
        mask[row, : len(window.inputs)] = True
    mask = mask.to(device)
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.long()}
    logits = _logits(net, inputs, [window.where for window in windows], mask)
    found = []
    for row, window in enumerate(windows):
        end, count = len(window.inputs), len(window.targets)
        targets = torch.tensor(window.targets, device=logits.device)
        own = torch.nn.functional.cross_entropy(logits[row, end - count : end].float(), targets, reduction="none")
        found.append(float(own.double().sum()))
    return found


def _vocabulary(net: nn.Module, folder: models.Folder) -> int:
    """How many tokens a language model chooses from."""
    config: Any = getattr(net, "config", None)
    size = getattr(config, "vocab_size", None) or folder.config.get("vocab_size")
    if not isinstance(size, int) or size < 1:
        raise InputError("has no `vocab_size`", where=str(folder.path / "config.json"))
    return size


# Words


def evaluation_data(evaluation: Evaluation) -> dict[str, Any]:
    """JSON-ready."""
    results = [
        {
            "data": one.data,
            "n_examples": one.n_examples,
            "left_out": one.left_out,
            "cut": one.cut,
            "n_tokens": one.n_tokens,
            **({} if one.n_bytes is None else {"n_bytes": one.n_bytes}),
            **one.measures,
        }
        for one in evaluation.results
    ]
    return {
        "model": evaluation.model,
        "architecture": evaluation.architecture,
        "kind": evaluation.kind,
        "results": results,
        "mean": evaluation.means,
    }


def evaluation_text(evaluation: Evaluation) -> str:
    """A table for a person: a line for each entry of data, and their mean."""
    names = MEASURES[evaluation.kind]
    rows = [["data", "examples", *(name.replace("_", " ") for name in names)]]
    rows += [
        [one.data, str(one.n_examples), *(f"{one.measures[name]:.4f}" for name in names)] for one in evaluation.results
    ]
    if len(evaluation.results) > 1:
        means = evaluation.means
        rows.append(["mean", "", *(f"{means[name]:.4f}" if name in means else "" for name in names)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([f"{row[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]
    return "\n".join([f"{evaluation.model}  {evaluation.architecture}", "", *lines])


def warnings(evaluation: Evaluation) -> list[str]:
    """What a person should know of how the data was read."""
    found = []
    for one in evaluation.results:
        if one.left_out:
            found.append(f"{one.data}: {one.left_out} rows could not be used and were left out")
        if one.cut:
            found.append(f"{one.data}: {one.cut} texts are longer than the model's context and were cut")
    return found

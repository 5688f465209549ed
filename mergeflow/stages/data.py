"""Rows of data -> batches of tensors that a model reads, in one fixed order.

Rows come from JSONL, CSV, Parquet, text files (a line is a row), folders of images (the folder's name is the label), or a hub
data set. A row that lacks what is asked of it is left out and counted; a label that the model does not know is an error, since
the data is then for another model. What is longer than the context is cut and counted. A `Place` (file and line) goes with
each row, so that a message can say where to look.

Texts are padded on the right, and a mask goes with each batch, since padding never counts. For a model of two texts the
decoder's length is never the encoder's: what reads a tensor can then be told by its shape.
"""

from __future__ import annotations

import contextlib
import csv
import heapq
import io
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from mergeflow.errors import InputError, MachineError, RecipeError, did_you_mean
from mergeflow.stages import models

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mergeflow.recipe.grammar import DataSource

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
KINDS: Mapping[str, str] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
    **dict.fromkeys(IMAGES, "images"),
}
MOST_LINE = 1 << 26
"""Characters of a line, or of a field of CSV: whole files without a line's end are no rows."""

NO_CONTEXT = 512
"""Tokens of a text where neither the model nor its tokenizer says how many it reads."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read: where it stands, and its fields."""

    where: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One row as the model reads it: token ids or `values` (numbers, pixels), and what is to come out.

    `label` is a class; `target` the tokens of a second text, or a label for each token (-100 where none counts).
    """

    where: str
    ids: tuple[int, ...] = ()
    values: Tensor | None = None
    label: int | None = None
    target: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Examples that run together. `inputs` are the model's keyword arguments.

    `mask` (examples, tokens) is true where a token counts, `decoder_mask` the same for a second text; None where nothing is
    padded, as with images. `labels`: a class each, or labels in the shape of the tokens; None where the data has none.
    """

    number: int
    examples: tuple[Example, ...]
    inputs: Mapping[str, Tensor]
    mask: Tensor | None = None
    decoder_mask: Tensor | None = None
    labels: Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many tokens count; of numbers and images the examples."""
        return len(self.examples) if self.mask is None else int(self.mask.sum())


@dataclass
class Counts:
    """What became of the rows."""

    unusable: int = 0
    cut: int = 0
    first_unusable: str = ""

    def leave_out(self, where: str, why: str) -> None:
        """Count a row that cannot be used."""
        self.unusable += 1
        self.first_unusable = self.first_unusable or f"{where}: {why}"


@dataclass(frozen=True, eq=False)
class Examples:
    """All usable rows, in order, and what was done with the others."""

    examples: tuple[Example, ...]
    counts: Counts
    task: models.Task
    pad: int = 0
    start: int = 0

    def batches(self, size: int, device: str = "cpu") -> Iterator[Batch]:
        """Batches of `size` neighbouring examples, the last one smaller."""
        for number, begin in enumerate(range(0, len(self.examples), size)):
            yield self.batch(self.examples[begin : begin + size], number, device)

    def batch(self, examples: Sequence[Example], number: int = 0, device: str = "cpu") -> Batch:
        """One batch of these examples."""
        import torch

        examples = tuple(examples)
        if self.task in ("features", "images"):
            stacked = torch.stack([example.values for example in examples if example.values is not None]).to(device)
            name = "features" if self.task == "features" else "pixel_values"
            return Batch(number, examples, {name: stacked}, labels=_labels(examples, device))
        ids, mask = _padded([example.ids for example in examples], self.pad, device)
        inputs = {"input_ids": ids, "attention_mask": mask.long()}
        if self.task == "seq2seq":
            targets = [example.target or () for example in examples]
            length = max(map(len, targets))
            second, decoder_mask = _padded(targets, self.pad, device, length + (length == ids.shape[1]))
            # Teacher-forced: the decoder reads the target moved on by one, behind its start token.
            moved = torch.cat([torch.full_like(second[:, :1], self.start), second[:, :-1]], dim=1)
            inputs |= {"decoder_input_ids": moved, "decoder_attention_mask": decoder_mask.long()}
            labels = second.masked_fill(~decoder_mask, -100)
            return Batch(number, examples, inputs, mask, decoder_mask, labels)
        if self.task == "tokens":
            given = [example.target for example in examples]
            if any(one is None for one in given):
                return Batch(number, examples, inputs, mask)
            marks, _ = _padded([one or () for one in given], -100, device, ids.shape[1])
            return Batch(number, examples, inputs, mask, labels=marks)
        if self.task == "causal":
            return Batch(number, examples, inputs, mask, labels=ids.masked_fill(~mask, -100))
        return Batch(number, examples, inputs, mask, labels=_labels(examples, device))


def _labels(examples: Sequence[Example], device: str) -> Tensor | None:
    import torch

    given = [example.label for example in examples if example.label is not None]
    return torch.tensor(given, device=device) if len(given) == len(examples) else None


def _padded(rows: Sequence[Sequence[int]], pad: int, device: str, length: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of numbers as one matrix, filled up on the right, and where they are."""
    import torch

    length = max(length, *map(len, rows)) if rows else length
    ids = torch.full((len(rows), length), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), length), dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[index, : len(row)] = True
    return ids.to(device), mask.to(device)


# Rows


def read_rows(source: DataSource, folder: Path, counts: Counts) -> Iterator[Row]:
    """The rows that `limit` and `seed` allow, in the order of the data. Raises InputError, MachineError."""
    rows = _all_rows(source, folder, counts)
    if source.limit is None:
        return rows
    if source.seed is None:
        return (row for _, row in zip(range(source.limit), rows, strict=False))
    # The rows of the smallest hashes: which are drawn depends on the seed and a row's place alone, and one pass finds them.
    seed = f"{source.seed} "
    drawn = heapq.nsmallest(
        source.limit, ((blake3(f"{seed}{index}".encode()).digest(), index, row) for index, row in enumerate(rows))
    )
    return iter([row for _, _, row in sorted(drawn, key=lambda one: one[1])])


def local_path(source: DataSource, folder: Path) -> Path | None:
    """Where the data lies, or should; None for a hub data set."""
    local = Path(source.path).expanduser()
    path = local if local.is_absolute() else folder / local
    named = source.path.startswith((".", "/", "~")) or local.suffix.lower() in KINDS or path.exists()
    return None if source.kind == "hub" or (source.kind is None and not named) else path


def _all_rows(source: DataSource, folder: Path, counts: Counts) -> Iterator[Row]:
    path = local_path(source, folder)
    if path is None:
        yield from _hub_rows(source)
        return
    if not path.exists():
        raise InputError(
            "there is no such file or folder", where=source.path, fix="Data paths are relative to the recipe."
        )
    if not path.is_dir() and not path.is_file():
        raise InputError("is neither a file nor a folder", where=source.path, fix="Put its rows into a file.")
    if path.is_dir() and source.kind is None:
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in KINDS)
        found = {KINDS[file.suffix.lower()] for file in files}
        if len(found) > 1:
            raise InputError(
                f"holds files of several kinds: {', '.join(sorted(found))}", where=source.path, fix="Set `kind:`."
            )
    elif path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and KINDS.get(f.suffix.lower()) == source.kind)
    else:
        files = [path]
    if not files:
        raise InputError("holds no data", where=source.path, fix=f"Files that are read: {', '.join(KINDS)}.")
    for file in files:
        kind = source.kind or KINDS.get(file.suffix.lower())
        if kind is None:
            raise InputError(
                f"has an ending that is not known: '{file.suffix}'", where=str(file), fix="Set `kind:`, or rename it."
            )
        try:
            yield from (_with_image(row, file) for row in _READERS[kind](file, path, counts))
        except UnicodeDecodeError as error:
            raise InputError(f"is not UTF-8: {error.reason} at byte {error.start}", where=str(file)) from None
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror or error}", where=str(file)) from None


def _with_image(row: Row, file: Path) -> Row:
    """The same row; an image that it names lies where its name leads from the file that the row is in."""
    image = row.fields.get("image")
    return Row(row.where, {**row.fields, "image": file.parent / image}) if isinstance(image, str) else row


def images_named(source: DataSource, folder: Path) -> Iterator[Path]:
    """The files of images that rows name, where the first row names one. Raises as `read_rows` does."""
    for row in read_rows(source, folder, Counts()):
        image = row.fields.get("image")
        if not isinstance(image, Path):
            return
        yield image


def _named(file: Path, root: Path) -> str:
    """A file as rows and messages name it: in a folder of data by its path there, since names alone may come twice."""
    return file.relative_to(root).as_posix() if file != root else file.name


def _jsonl(file: Path, root: Path, counts: Counts) -> Iterator[Row]:
    if file.suffix.lower() == ".json":
        yield from _json(file, root, counts)
        return
    for number, line in _lines(file):
        where = f"{_named(file, root)}:{number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            counts.leave_out(where, "is not JSON")
            continue
        if isinstance(fields, dict):
            yield Row(where, fields)
        else:
            counts.leave_out(where, "is not a JSON object")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines that hold something, each with its number. Raises InputError for one that is too long to be a row."""
    with file.open(encoding="utf-8-sig") as lines:
        number = 0
        while line := lines.readline(MOST_LINE):
            number += 1
            if len(line) == MOST_LINE and not line.endswith("\n"):
                raise InputError(
                    f"has a line of over {MOST_LINE:,} characters",
                    where=f"{file}:{number}",
                    fix="A row is a line of its own.",
                )
            if line.strip():
                yield number, line


def _json(file: Path, root: Path, counts: Counts) -> Iterator[Row]:
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not JSON: {error}", where=str(file), fix="One object a line is a .jsonl file.") from None
    if not isinstance(found, list):
        raise InputError("is not a list of objects", where=str(file), fix="One object a line is a .jsonl file.")
    for number, fields in enumerate(found, start=1):
        if isinstance(fields, dict):
            yield Row(f"{_named(file, root)}:{number}", fields)
        else:
            counts.leave_out(f"{_named(file, root)}:{number}", "is not a JSON object")


def _csv(file: Path, root: Path, counts: Counts) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig", newline="") as lines, _long_fields():
        # Strict, since a quote that is never closed would take in all rows behind it without a word.
        reader = csv.DictReader(lines, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            columns = [name for name in reader.fieldnames or () if name]
            if twice := next((name for name in columns if columns.count(name) > 1), None):
                raise InputError(
                    f"names the column '{twice[:60]}' twice",
                    where=f"{file}:1",
                    fix="Give each column a name of its own.",
                )
            for fields in reader:
                where = f"{_named(file, root)}:{reader.line_num}"
                if None in fields or None in fields.values():
                    counts.leave_out(where, "has another number of fields than the first line")
                else:
                    yield Row(where, fields)
        except csv.Error as error:
            # Where the row begins: an open quote is seen at the end of the file alone.
            raise InputError(f"is not CSV: {error}", where=f"{file}:{reader.line_num + 1}") from None


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """While this holds, a field of CSV may be as long as a document; csv has one limit for the whole process."""
    before = csv.field_size_limit(MOST_LINE)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parquet(file: Path, root: Path, counts: Counts) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise MachineError(
            "reading Parquet needs pyarrow, which is not installed",
            where=str(file),
            fix="Install it: `pip install pyarrow`.",
        ) from None
    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches():
            for fields in batch.to_pylist():
                number += 1
                yield Row(f"{_named(file, root)}:{number}", fields)
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        raise InputError(f"is not Parquet that can be read: {str(error)[:200]}", where=str(file)) from None


def _text(file: Path, root: Path, counts: Counts) -> Iterator[Row]:
    for number, line in _lines(file):
        yield Row(f"{_named(file, root)}:{number}", {"text": line.strip()})


def _images(file: Path, root: Path, counts: Counts) -> Iterator[Row]:
    inside = file.relative_to(root).parts
    yield Row(_named(file, root), {"image": file, **({"label": inside[0]} if len(inside) > 1 else {})})


_READERS: Mapping[str, Callable[[Path, Path, Counts], Iterator[Row]]] = {
    "jsonl": _jsonl,
    "csv": _csv,
    "parquet": _parquet,
    "text": _text,
    "images": _images,
}


def _hub_rows(source: DataSource) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise MachineError(
            "is no file here, and reading a hub data set needs the package datasets, which is not installed",
            where=source.path,
            fix="Install it with `pip install 'mergeflow[datasets]'`, or give the path of a file.",
        ) from None
    if source.split is None:
        raise RecipeError("a hub data set needs its split", where=source.path, fix="Add `split: train`.")
    try:
        found = datasets.load_dataset(source.path, split=source.split, revision=source.revision)
    except Exception as error:
        raise InputError(f"cannot be loaded: {str(error)[:300]}", where=source.path) from error
    for number, fields in enumerate(found, start=1):
        yield Row(f"{source.path}[{source.split}]:{number}", fields)


# Examples


def read_examples(
    source: DataSource, where_from: Path, folder: models.Folder, max_length: int | None = None
) -> Examples:
    """All rows of the data as the model reads them. Raises InputError where none is usable, or a label is not known."""
    counts = Counts()
    encode = _ENCODERS[folder.task](source, folder, max_length, counts)
    found, row = [], None
    for row in read_rows(source, where_from, counts):
        example = encode(row)
        if example is not None:
            found.append(example)
    if not found:
        raise _unusable(source, counts)
    texts = encode if isinstance(encode, _Text) else None
    if texts is not None:
        highest = max(max(one.ids, default=0) for one in found)
        models.check_ids(highest, folder.number("vocab_size"), str(folder.path))
    return Examples(tuple(found), counts, folder.task, texts.pad if texts else 0, texts.start if texts else 0)


@dataclass(frozen=True, eq=False)
class Texts:
    """All usable texts, whole and in order, with the place of each; and the tokenizer of the model that is to read them."""

    texts: tuple[tuple[str, str], ...]
    counts: Counts
    tokenizer: Any
    longest: int
    pad: int


def read_texts(source: DataSource, where_from: Path, folder: models.Folder, max_length: int | None = None) -> Texts:
    """All texts of the data as they are: `longest` says what the model reads at once. Raises InputError where there is none."""
    counts = Counts()
    encode = _Text(source, folder, max_length, counts)
    found = [(row.where, encode.text(row)) for row in read_rows(source, where_from, counts)]
    usable = tuple((where, text) for where, text in found if text is not None)
    if not usable:
        raise _unusable(source, counts)
    return Texts(usable, counts, encode.tokenizer, encode.longest, encode.pad)


def _unusable(source: DataSource, counts: Counts) -> InputError:
    first = counts.first_unusable or "there are no rows"
    return InputError(f"has no row that can be used ({first})", where=source.path, fix="Name the fields: `text: ...`.")


@dataclass
class _Labels:
    """Labels as the data has them -> numbers of classes. Raises InputError for one that the model does not know."""

    source: DataSource
    folder: models.Folder
    names: Mapping[str, int] | None = field(init=False)

    def __post_init__(self) -> None:
        self.names = self.folder.labels

    def number(self, value: Any, where: str) -> int:
        """The number of one label."""
        if self.names is not None and str(value) in self.names:
            return self.names[str(value)]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        text = str(value)
        if not isinstance(value, bool) and re.fullmatch("[0-9]{1,9}", text) and int(text) < self.folder.n_labels:
            return int(text)
        known = list(self.names or map(str, range(self.folder.n_labels)))
        shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
        raise InputError(
            f"the label '{text[:60]}' is none that the model knows",
            where=where,
            fix=f"{did_you_mean(text[:60], known)} Its labels: {shown}.".strip(),
        )


class _Encoder(ABC):
    """What makes an example of a row, or None where it cannot be used."""

    def __init__(self, source: DataSource, folder: models.Folder, max_length: int | None, counts: Counts) -> None:
        self.source = source
        self.folder = folder
        self.counts = counts
        self.labels = _Labels(source, folder)
        self.max_length = max_length

    @abstractmethod
    def __call__(self, row: Row) -> Example | None:
        """The example of a row."""

    def lacks(self, row: Row, why: str) -> None:
        """Count the row as unusable."""
        self.counts.leave_out(row.where, why)

    def label(self, row: Row) -> tuple[bool, Any]:
        """Whether the row has what is asked of it, and its label; None where none is asked for."""
        if self.source.label is None:
            return True, None
        value = row.fields.get(self.source.label)
        if value is None or value == "":
            self.lacks(row, f"lacks the field '{self.source.label}'")
            return False, None
        return True, value


class _Numbers(_Encoder):
    """Rows of numbers, and images."""

    def __init__(self, source: DataSource, folder: models.Folder, max_length: int | None, counts: Counts) -> None:
        super().__init__(source, folder, max_length, counts)
        self.dtype = models.compute_dtype(folder)
        self.size = folder.config.get("input_size")
        self.processor: Any = None

    def __call__(self, row: Row) -> Example | None:
        values = self.pixels(row) if "image" in row.fields and self.source.features is None else self.numbers(row)
        if values is None:
            return None
        there, label = self.label(row)
        if not there:
            return None
        number = None if label is None else self.labels.number(label, row.where)
        return Example(row.where, values=values, label=number)

    def numbers(self, row: Row) -> Tensor | None:
        """The field of numbers; of an image, (channels, height, width) as the model reads them."""
        import torch

        name = self.source.features or "features"
        value = row.fields.get(name)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                value = None
        try:
            values = torch.tensor(value, dtype=self.dtype)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            self.lacks(row, f"has no list of numbers in its field '{name}'")
            return None
        if self.folder.task == "features":
            values = values.reshape(-1)
            if len(values) != self.size:
                self.lacks(row, f"has {len(values)} numbers in its field '{name}', and the model reads {self.size}")
                return None
            return values
        return values if self.fits(values, row, name) else None

    def fits(self, values: Tensor, row: Row, name: str) -> bool:
        """Whether pixels have the shape that the model reads."""
        size = self.folder.image_size
        height, width = size if isinstance(size, list) else (size, size)
        wanted = (self.folder.config.get("num_channels", 3), height, width)
        if tuple(values.shape) != wanted:
            self.lacks(row, f"has shape {list(values.shape)} in its field '{name}', and the model reads {list(wanted)}")
            return False
        return True

    def pixels(self, row: Row) -> Tensor | None:
        """An image, through the model's own processor."""
        import torch

        image = self.opened(row)
        if image is None:
            return None
        if self.folder.task == "features":
            flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).to(self.dtype) / 255
            if len(flat) != self.size:
                self.lacks(row, f"has {len(flat)} pixels, and the model reads {self.size}")
                return None
            return flat
        if self.processor is None:
            self.processor = self.make_processor()
        made = self.processor(images=image, return_tensors="pt")
        values: Tensor = made["pixel_values"][0].to(self.dtype)
        return values

    def opened(self, row: Row) -> Any:
        try:
            from PIL import Image
        except ImportError:
            raise MachineError(
                "reading images needs Pillow, which is not installed",
                where=row.where,
                fix="Install it: `pip install pillow`.",
            ) from None
        value = row.fields["image"]
        if isinstance(value, Mapping):  # as Parquet files of the hub hold images
            value = value.get("bytes") or value.get("path")
        if not isinstance(value, Path | str | bytes | Image.Image):
            self.lacks(row, "holds no image")
            return None
        try:
            found: Any = io.BytesIO(value) if isinstance(value, bytes) else value
            image = found if isinstance(found, Image.Image) else Image.open(found)
            return image.convert("L" if self.folder.task == "features" else "RGB")
        except Exception:  # whatever the reader of one format makes of a damaged file
            self.lacks(row, "is no image that can be read")
        return None

    def make_processor(self) -> Any:
        library = models.transformers()
        try:
            with models.quietly():
                return library.AutoImageProcessor.from_pretrained(
                    self.folder.path, local_files_only=True, trust_remote_code=False, backend="pil"
                )
        except Exception as error:
            raise InputError(
                f"its image processor cannot be loaded: {str(error).strip().splitlines()[0][:200]}",
                where=str(self.folder.path),
                fix="Put its preprocessor_config.json beside its config.json.",
            ) from error


class _Text(_Encoder):
    """Texts, through the model's own tokenizer."""

    def __init__(self, source: DataSource, folder: models.Folder, max_length: int | None, counts: Counts) -> None:
        super().__init__(source, folder, max_length, counts)
        if [source.text, source.template, source.messages].count(None) < 2:
            raise RecipeError("`text`, `template` and `messages` are three ways to say the same", fix="Keep one.")
        self.tokenizer = self.make_tokenizer()
        own = self.tokenizer.model_max_length
        own = own if isinstance(own, int) and own < 10**9 else None
        longest = folder.longest(max_length, own or NO_CONTEXT)
        self.longest = min(longest, own) if own else longest
        ids = (self.tokenizer.pad_token_id, folder.config.get("pad_token_id"), self.tokenizer.eos_token_id, 0)
        self.pad = next(one for one in ids if isinstance(one, int) and one >= 0)
        start = folder.config.get("decoder_start_token_id")
        self.start = start if isinstance(start, int) else self.pad

    def make_tokenizer(self) -> Any:
        library = models.transformers()
        fix = "Put its tokenizer files (tokenizer.json, tokenizer_config.json) beside its config.json."
        try:
            with models.quietly():
                tokenizer = library.AutoTokenizer.from_pretrained(
                    self.folder.path, local_files_only=True, trust_remote_code=False
                )
        except Exception as error:
            raise InputError(
                f"its tokenizer cannot be loaded: {str(error).strip().splitlines()[0][:200]}",
                where=str(self.folder.path),
                fix=fix,
            ) from error
        # Of some classes transformers makes a tokenizer that knows no word where there is no file.
        files = set(tokenizer.vocab_files_names.values())
        if files and not any((self.folder.path / name).exists() for name in (*files, "tokenizer.json")):
            raise InputError("its tokenizer cannot be loaded: it has no files", where=str(self.folder.path), fix=fix)
        return tokenizer

    def __call__(self, row: Row) -> Example | None:
        text = self.text(row)
        if text is None:
            return None
        there, label = self.label(row)
        if not there:
            return None
        if self.folder.task == "tokens" and isinstance(text, list):
            return self.marked(row, text, label)
        ids = self.ids(text, special=self.source.messages is None)
        if not ids:
            self.lacks(row, "has a text without tokens")
            return None
        if self.folder.task == "classifier":
            return Example(row.where, ids, label=None if label is None else self.labels.number(label, row.where))
        if self.folder.task == "tokens" and label is not None:
            raise InputError(
                "a label for each token needs a text that is a list of words",
                where=row.where,
                fix="Name a field of words.",
            )
        if self.folder.task == "seq2seq":
            if label is None:
                raise RecipeError(
                    f"{self.folder.architecture} runs teacher-forced, so the data must have what it is to write",
                    where=self.source.path,
                    fix="Name the field: `label: ...`.",
                )
            target = self.ids(label, target=True) if isinstance(label, str) and _whole(label) else ()
            if not target:
                self.lacks(row, f"has no text in its field '{self.source.label}'")
                return None
            return Example(row.where, ids, target=target)
        return Example(row.where, ids)

    def ids(self, text: str, *, special: bool = True, target: bool = False) -> tuple[int, ...]:
        """The tokens of a text, cut to what the model reads."""
        more = {"text_target": text} if target else {"text": text}
        with models.quietly():
            found: list[int] = self.tokenizer(**more, add_special_tokens=special, truncation=False)["input_ids"]
            if len(found) > self.longest:
                self.counts.cut += 1
                # Cut by the tokenizer, which keeps a closing special token.
                found = self.tokenizer(**more, add_special_tokens=special, truncation=True, max_length=self.longest)[
                    "input_ids"
                ]
        return tuple(found)

    def text(self, row: Row) -> Any:
        """The row's text; a list of words where tokens are labelled; None where it has none that can be encoded."""
        found = self.found(row)
        if found is not None and not all(map(_whole, [found] if isinstance(found, str) else found)):
            self.lacks(row, "has half a character (a lone surrogate) in its text")
            return None
        return found

    def found(self, row: Row) -> Any:
        """The text as the row has it."""
        if self.source.template is not None:
            return self.filled(row, self.source.template)
        if self.source.messages is not None:
            return self.chat(row, self.source.messages)
        name = self.source.text or "text"
        value = row.fields.get(name)
        words = isinstance(value, list) and bool(value) and all(isinstance(word, str) for word in value)
        if words and self.folder.task == "tokens":
            return value
        if not isinstance(value, str) or not value.strip():
            self.lacks(row, f"has no text in its field '{name}'")
            return None
        return value

    def filled(self, row: Row, template: str) -> str | None:
        """The template with the row's fields in it: names in braces alone, no expressions."""
        lacks: list[str] = []

        def put(found: re.Match[str]) -> str:
            if found[0] in ("{{", "}}"):
                return found[0][0]
            value = row.fields.get(found[1])
            if value is None or isinstance(value, list | dict):
                lacks.append(found[1])
            return str(value)

        text = re.sub(r"\{\{|\}\}|\{([^{}]+)\}", put, template)
        if lacks:
            self.lacks(row, f"lacks the field '{lacks[0]}'")
            return None
        return text

    def chat(self, row: Row, name: str) -> str | None:
        """A list of {role, content} through the tokenizer's chat template."""
        value = row.fields.get(name)
        if not (
            isinstance(value, list)
            and value
            and all(isinstance(one, dict) and {"role", "content"} <= one.keys() for one in value)
        ):
            self.lacks(row, f"has no list of messages in its field '{name}'")
            return None
        if not self.tokenizer.chat_template:
            raise InputError(
                "has no chat template, and the data has `messages:`",
                where=str(self.folder.path),
                fix="Use `text:` or `template:`, or a model with a chat template.",
            )
        try:
            text: str = self.tokenizer.apply_chat_template(value, tokenize=False)
        except Exception as error:
            self.lacks(row, f"does not go through the chat template: {str(error)[:100]}")
            return None
        return text

    def marked(self, row: Row, words: Sequence[str], labels: Any) -> Example | None:
        """Words with a label each: the first token of a word has its label, the others none."""
        if labels is not None and (not isinstance(labels, list) or len(labels) != len(words)):
            self.lacks(row, "has another number of labels than words")
            return None
        with models.quietly():
            full = self.tokenizer(words, is_split_into_words=True, truncation=False)["input_ids"]
            self.counts.cut += len(full) > self.longest
            found = self.tokenizer(words, is_split_into_words=True, truncation=True, max_length=self.longest)
        if not found["input_ids"]:
            self.lacks(row, "has no token")
            return None
        if labels is None:
            return Example(row.where, tuple(found["input_ids"]))
        target, before = [], None
        for word in found.word_ids():
            fresh = word is not None and word != before
            target.append(self.labels.number(labels[word], row.where) if fresh else -100)
            before = word
        return Example(row.where, tuple(found["input_ids"]), target=tuple(target))


def _whole(text: str) -> bool:
    """Whether a text can be encoded: JSON may name halves of a character, which are none."""
    return not any("\ud800" <= character <= "\udfff" for character in text) if not text.isascii() else True


_ENCODERS: Mapping[models.Task, type[_Encoder]] = {
    "features": _Numbers,
    "images": _Numbers,
    "seq2seq": _Text,
    "classifier": _Text,
    "tokens": _Text,
    "causal": _Text,
    "encoder": _Text,
}


def batches_of(count: int, size: int) -> int:
    """How many batches `count` examples make."""
    return math.ceil(count / size)


def first_rows(batch: Batch, count: int, examples: Examples) -> Batch:
    """A batch of the first `count` examples of one alone."""
    device = next(iter(batch.inputs.values())).device
    return examples.batch(batch.examples[:count], batch.number, str(device))


def to(inputs: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """Inputs on a device."""
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def tokens_in(batches: Iterable[Batch]) -> int:
    """How many tokens count in all."""
    return sum(batch.tokens for batch in batches)

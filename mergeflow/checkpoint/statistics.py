"""Statistics of a model's inputs or gradients: a folder of safetensors and `statistics.json` -> tensors by weight.

A *group* is one distinct input of linear layers, by the name of the first weight that reads it: what q, k and v read is kept
once. Values are means over tokens, never sums. Here is what a folder holds and how a matrix is packed; how values are come by
is a stage's business, and what is done with them an op's.

A Gram matrix is symmetric, and what counts of it are correlations: packed as the upper triangle of float16 correlations with a
float32 diagonal it takes a byte an entry. Never as float16 itself, which overflows once an activation passes 256. Rows of it
are unpacked as they are asked for, by index arithmetic on panels: neither the matrix nor its indices are ever held whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergeflow.checkpoint import Checkpoint, open_checkpoint, read_json
from mergeflow.checkpoint.safetensors import StoredTensor
from mergeflow.checkpoint.sources import Read, Source
from mergeflow.dtypes import BY_NAME
from mergeflow.errors import InputError, NumericError, RecipeError, raise_all
from mergeflow.hub import Folder, place_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

STATISTICS = "statistics.json"
FORMAT = 1
AGAIN = "Collect the statistics again, or fetch the folder again."

Kind = Literal["gram", "gram_diag", "input_mean", "act_absmean", "fisher_diag"]
Codec = Literal["float32", "packed32", "correlation16", "correlation8", "diagonal"]
CODECS: tuple[Codec, ...] = ("float32", "packed32", "correlation16", "correlation8", "diagonal")
"""How a Gram matrix is stored; statistics of other kinds are float32 as they are."""
LOSSY: tuple[Codec, ...] = ("correlation16", "correlation8")
PREFIX: Mapping[str, str] = {
    "gram": "gram",
    "gram_diag": "gram_diag",
    "input_mean": "input_mean",
    "act_absmean": "act_absmean",
    "fisher_diag": "fisher",
}

_INDICES = 1 << 18
"""Indices that are held at once, in unpacking."""


# What a folder holds


def stored(kind: Kind, codec: Codec, group: str, shape: Sequence[int]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of one group: dtype and shape by name. `shape` is (d, d) of a Gram, else the statistic's own."""
    name = f"{PREFIX[kind]}.{group}"
    if kind != "gram":
        return {name: ("float32", tuple(shape))}
    d = shape[0]
    if codec == "float32":
        return {name: ("float32", (d, d))}
    if codec == "packed32":
        return {f"{name}.triangle": ("float32", (d * (d + 1) // 2,))}
    diagonal: dict[str, tuple[str, tuple[int, ...]]] = {f"{name}.diagonal": ("float32", (d,))}
    if codec == "diagonal":
        return diagonal
    dtype = "float16" if codec == "correlation16" else "int8"
    return {f"{name}.correlation": (dtype, (d * (d - 1) // 2,)), **diagonal}


def encode(kind: Kind, codec: Codec, group: str, values: Tensor) -> dict[str, Tensor]:
    """The tensors that hold one group's statistic, as `stored` says. Raises NumericError where it is not finite.

    `values`: a Gram (d, d) of which the upper triangle is read, else the statistic in its own shape; any float dtype.
    """
    import torch

    name = f"{PREFIX[kind]}.{group}"
    if not bool(torch.isfinite(values).all()):
        raise NumericError(
            f"the {kind} of '{group}' has NaN or Inf",
            fix="Look at the data and the model: an activation is not finite, or too large for its dtype.",
        )
    if kind != "gram":
        return {name: values.detach().to("cpu", torch.float32).contiguous()}
    if values.ndim != 2 or values.shape[0] != values.shape[1]:
        raise RecipeError(f"the Gram of '{group}' has shape {list(values.shape)}, and is no square matrix")
    gram = values.detach().cpu()
    if codec == "float32":
        upper = gram.to(torch.float32).triu()
        return {name: upper + upper.triu(1).mT}
    if codec == "packed32":
        return {f"{name}.triangle": _packed(gram, torch.float32)}
    diagonal = gram.diagonal().to(torch.float32, copy=True)
    if bool((diagonal < 0).any()):
        raise NumericError(f"the Gram of '{group}' has a negative diagonal, and is no mean of squares")
    found = {f"{name}.diagonal": diagonal}
    if codec != "diagonal":
        # By the diagonal as it is stored, so that what is unpacked is c times the roots of just that.
        root = diagonal.double().sqrt()
        inverse = torch.where(root > 0, 1 / root, 0.0)
        found[f"{name}.correlation"] = _correlations(gram, inverse, codec)
    return dict(sorted(found.items()))


def _packed(gram: Tensor, dtype: torch.dtype) -> Tensor:
    """The upper triangle with the diagonal, row by row."""
    import torch

    d = len(gram)
    packed = torch.empty(d * (d + 1) // 2, dtype=dtype)
    for row in range(d):
        start = _start(row, d, strict=False)
        packed[start : start + d - row] = gram[row, row:]
    return packed


def _correlations(gram: Tensor, inverse: Tensor, codec: Codec) -> Tensor:
    """The strict upper triangle of G_ij / sqrt(G_ii G_jj), row by row."""
    import torch

    d = len(gram)
    packed = torch.empty(d * (d - 1) // 2, dtype=torch.float16 if codec == "correlation16" else torch.int8)
    for row in range(d - 1):
        c = (gram[row, row + 1 :].double() * (inverse[row + 1 :] * inverse[row])).clamp_(-1, 1)
        start = _start(row, d, strict=True)
        packed[start : start + d - 1 - row] = c if codec == "correlation16" else c.mul_(127).round_()
    return packed


def _start(row: int, d: int, *, strict: bool) -> int:
    """Where the entries of a row begin in a packed upper triangle of a (d, d) matrix, without the diagonal if `strict`."""
    length = d - 1 if strict else d
    return row * length - row * (row - 1) // 2


# Rows of a matrix, out of what is stored


@dataclass(frozen=True, slots=True)
class _Symmetric(Source):
    """Rows of a symmetric matrix from its packed upper triangle: what stands right of the diagonal lies there as it is,
    what stands left of it is gathered from the rows above."""

    cut: ClassVar[Literal["element", "row"]] = "row"
    strict: ClassVar[bool]
    """Whether the triangle is without the diagonal."""

    def unpacked(self, read: Read, first: int, last: int, d: int, compute: torch.dtype) -> Tensor:
        """Rows [first, last) of the (d, d) matrix as stored; the diagonal of a strict one is 0."""
        import torch

        if last <= first:
            return torch.zeros(0, d, dtype=compute)
        strict = self.strict
        begin = _start(first, d, strict=strict)
        flat = read(0, begin, _start(last, d, strict=strict))
        made = torch.zeros(last - first, d, dtype=compute, device=flat.device)
        for row in range(first, last):
            start, column = _start(row, d, strict=strict) - begin, row + strict
            made[row - first, column:] = flat[start : start + d - column]
        own = made[:, first:last]
        own += own.triu(1).mT
        columns = torch.arange(first, last, device=flat.device)
        step = max(_INDICES // max(last - first, d), 1)
        for top in range(0, first, step):
            bottom = min(top + step, first)
            rows = torch.arange(top, bottom, device=flat.device)[:, None]
            begin = _start(top, d, strict=strict)
            flat = read(0, begin, _start(bottom, d, strict=strict))
            length = d - strict
            # Row i begins at i * length - i (i - 1) / 2, and its entry in column j is the (j - i - strict)-th there.
            at = rows * (length - 1) - rows * (rows - 1) // 2 + (columns - int(strict) - begin)
            made[:, top:bottom] = flat[at.reshape(-1)].reshape(bottom - top, last - first).mT
        return made

    def held(self, shape: tuple[int, ...]) -> int:
        """Indices, in elements of float32, and the stretch of the triangle that they point into."""
        return 8 * max(_INDICES, shape[-1])


@dataclass(frozen=True, slots=True)
class Triangle(_Symmetric):
    """A symmetric matrix from its upper triangle with the diagonal, row by row."""

    strict: ClassVar[bool] = False

    def make(self, read: Read, start: int, stop: int, shape: tuple[int, ...], compute: torch.dtype) -> Tensor:
        """Rows [start / d, stop / d)."""
        d = shape[-1]
        return self.unpacked(read, start // max(d, 1), stop // max(d, 1), d, compute).reshape(-1)


@dataclass(frozen=True, slots=True)
class Correlation(_Symmetric):
    """A Gram matrix from its correlations, float16 or int8 as `scale` times them, and its diagonal: c_ij sqrt(G_ii G_jj)."""

    scale: int = 1
    strict: ClassVar[bool] = True

    def make(self, read: Read, start: int, stop: int, shape: tuple[int, ...], compute: torch.dtype) -> Tensor:
        """Rows [start / d, stop / d)."""
        import torch

        d = shape[-1]
        first, last = start // max(d, 1), stop // max(d, 1)
        made = self.unpacked(read, first, last, d, compute)
        diagonal = read(1, 0, d).to(compute)
        root = diagonal.sqrt()
        # c (s_i s_j): a product of the two roots first is the same for (i, j) and (j, i), and so is the entry.
        step = max(_INDICES // max(d, 1), 1)
        for top in range(0, last - first, step):
            rows = made[top : top + step]
            rows *= root[first + top : first + top + len(rows), None] * root
        if self.scale != 1:
            made /= self.scale
        place = torch.arange(last - first, device=made.device)
        made[place, place + first] = diagonal[first:last]
        return made.reshape(-1)


@dataclass(frozen=True, slots=True)
class Diagonal(Source):
    """A matrix that is 0 off its diagonal, which is stored."""

    cut: ClassVar[Literal["element", "row"]] = "row"

    def make(self, read: Read, start: int, stop: int, shape: tuple[int, ...], compute: torch.dtype) -> Tensor:
        """Rows [start / d, stop / d)."""
        import torch

        d = shape[-1]
        first, last = start // max(d, 1), stop // max(d, 1)
        made = torch.zeros(last - first, d, dtype=compute)
        place = torch.arange(last - first)
        made[place, place + first] = read(0, first, last).to("cpu", compute)
        return made.reshape(-1)


def decoder(kind: Kind, codec: Codec) -> Source | None:
    """What makes rows of a Gram out of a group's tensors, in the order of `parts`; None where they are stored as such."""
    if kind == "gram_diag" or codec == "diagonal":
        return Diagonal()
    if codec == "packed32":
        return Triangle()
    if codec in LOSSY:
        return Correlation(1 if codec == "correlation16" else 127)
    return None


def parts(kind: Kind, codec: Codec, group: str) -> tuple[str, ...]:
    """The names of a group's tensors, in the order in which `decoder` reads them."""
    return tuple(stored(kind, codec, group, (1, 1)))


# statistics.json


class StageOp(BaseModel):
    """The op that collected: its name and version, and its parameters beside them."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str
    version: int = 1


class ModelNote(BaseModel):
    """The model whose statistics these are. `digest` is over its tensors and survives other shards, and so does `sampled`; `files`
    are `marks`."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    digest: str
    source: str = ""
    revision: str | None = None
    files: dict[str, str] = Field(default_factory=dict)
    sampled: str = ""


class Facts(BaseModel):
    """statistics.json.

    `groups` says for each weight which group it reads; `tokens` how many tokens a group saw, where that is not `n_tokens`;
    `transposed` which weights are stored (in, out); `skipped` why a weight has none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    format: Literal[1] = 1
    kind: Kind
    codec: Codec = "float32"
    dtype: Literal["float32", "float64"] = "float32"
    op: StageOp
    model: ModelNote
    only: tuple[str, ...] | None = None
    data: Any = None
    n_examples: int = Field(ge=0)
    n_tokens: int = Field(ge=0)
    seed: int = 0
    groups: dict[str, str] = Field(default_factory=dict)
    tokens: dict[str, int] = Field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    skipped: dict[str, str] = Field(default_factory=dict)
    software: dict[str, str] = Field(default_factory=dict)

    def encoded(self) -> bytes:
        """The file's bytes."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False).encode() + b"\n"


@dataclass(frozen=True, eq=False)
class Statistics(Checkpoint):
    """A folder of statistics as its headers and statistics.json tell it."""

    facts: Facts
    facts_digest: str

    @property
    def deciding(self) -> Mapping[str, str]:
        return {STATISTICS: self.facts_digest}

    @cached_property
    def turned(self) -> frozenset[str]:
        """Weights that are stored (in, out)."""
        return frozenset(self.facts.transposed)

    def group(self, weight: str) -> str | None:
        """The group that a weight reads; of Fisher diagonals, the weight itself; None where nothing was collected."""
        if self.facts.kind == "fisher_diag":
            return weight if f"{PREFIX['fisher_diag']}.{weight}" in self.tensors else None
        return self.facts.groups.get(weight)

    def n_tokens(self, weight: str) -> int:
        """How many tokens a weight's group saw."""
        return self.facts.tokens.get(self.group(weight) or "", self.facts.n_tokens)

    def parts(self, weight: str) -> tuple[StoredTensor, ...]:
        """The stored tensors of a weight's group, in the order in which `decoder` reads them; none where it has no group."""
        group = self.group(weight)
        return () if group is None else tuple(self.tensors[name] for name in self.names(group))

    def names(self, group: str) -> tuple[str, ...]:
        """The names of a group's tensors, in the order in which `decoder` reads them."""
        return parts(self.facts.kind, self.facts.codec, group)

    def dimension(self, weight: str) -> int:
        """How many input channels a weight's group has; 0 where it has no group."""
        group = self.group(weight)
        if group is None or self.facts.kind == "fisher_diag":
            return 0
        last = self.tensors[self.names(group)[-1]]
        if self.facts.kind == "gram" and self.facts.codec == "packed32":
            return _side(last.elements)
        return last.shape[-1]

    @property
    def decoder(self) -> Source | None:
        """What makes rows of a Gram out of `parts`."""
        return decoder(self.facts.kind, self.facts.codec)


def _side(elements: int) -> int:
    """d of d (d + 1) / 2."""
    from math import isqrt

    return (isqrt(8 * elements + 1) - 1) // 2


def open_statistics(folder: Folder) -> Statistics:
    """The statistics in a folder, by headers and statistics.json. Raises InputError where these contradict each other."""
    if not folder.exists(STATISTICS):
        raise InputError(
            f"holds no {STATISTICS}",
            where=folder.label,
            fix="Name the folder that a stage such as `op: gram` wrote.",
        )
    where = place_of(folder, STATISTICS)
    facts = _facts(read_json(folder, STATISTICS), where)
    found = open_checkpoint(folder)
    _check(facts, found.tensors, where)
    digest = blake3(folder.read(STATISTICS)).hexdigest()
    return Statistics(found.folder, found.tensors, found.files, found.config, found.metadata, facts, digest)


def _facts(told: Any, where: str) -> Facts:
    if not isinstance(told, dict):
        raise InputError("is not a JSON object", where=where, fix=AGAIN)
    if told.get("format") != FORMAT:
        raise InputError(
            f"is of format {str(told.get('format'))[:40]}, and this mergeflow reads {FORMAT}",
            where=where,
            fix="Use the mergeflow that wrote it, or collect the statistics again.",
        )
    try:
        return Facts.model_validate_json(json.dumps(told))
    except ValidationError as error:
        errors = [
            InputError(
                f"`{'.'.join(map(str, one['loc']))[:120]}`: {one['msg'][:1].lower()}{one['msg'][1:]}",
                where=where,
                fix=AGAIN,
            )
            for one in error.errors()[:10]
        ]
        raise_all(errors)
        raise AssertionError("a ValidationError has errors") from None


def _check(facts: Facts, tensors: Mapping[str, StoredTensor], where: str) -> None:
    """Every group must have its tensors, of one size, and every tensor a group."""
    groups = list(dict.fromkeys(facts.groups.values()))
    prefix = PREFIX[facts.kind] + "."
    if facts.kind == "fisher_diag":
        groups = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    known: set[str] = set()
    for group in groups:
        names = parts(facts.kind, facts.codec, group)
        lacks = [name for name in names if name not in tensors]
        if lacks:
            raise InputError(f"the group '{group}' lacks its tensor '{lacks[0]}'", where=where, fix=AGAIN)
        known.update(names)
        last = tensors[names[-1]]
        shape: tuple[int, ...] = last.shape
        if facts.kind == "gram":
            shape = (_side(last.elements),) * 2 if facts.codec == "packed32" else (last.shape or (0,))[-1:] * 2
        elif facts.kind != "fisher_diag":
            shape = (last.elements,)
        for name, (dtype, wanted) in stored(facts.kind, facts.codec, group, shape).items():
            if (tensors[name].dtype, tensors[name].shape) != (BY_NAME[dtype], wanted):
                raise InputError(
                    f"'{name}' is {tensors[name].dtype.name} {list(tensors[name].shape)}, and `{facts.codec}` "
                    f"holds {dtype} {list(wanted)} there",
                    where=where,
                    fix=AGAIN,
                )
    beyond = next((name for name in tensors if name not in known), None)
    if beyond is not None:
        raise InputError(f"the files have a tensor of no group: '{beyond}'", where=where, fix=AGAIN)
    if facts.kind != "fisher_diag":
        odd = next((name for name in facts.transposed if name not in facts.groups), None)
        if odd is not None:
            raise InputError(f"`transposed` names '{odd}', which has no group", where=where, fix=AGAIN)


# Which model it is of

STRETCHES, STRETCH = 8, 4096


def model_digest(tensors: Iterable[tuple[str, str, Sequence[int], str]]) -> str:
    """Hex BLAKE3 over the name, dtype, shape and digest of each tensor: the same however they are dealt to files."""
    lines = sorted(json.dumps([name, dtype, list(shape), digest]) for name, dtype, shape, digest in tensors)
    return blake3("\n".join(lines).encode()).hexdigest()


def marks(checkpoint: Checkpoint) -> dict[str, str]:
    """By weight file, what tells it from another without reading all of it: BLAKE3 of its size, header, and some stretches.

    Models of one family have the same headers; what was trained differs nearly everywhere.
    """
    found = {}
    for name, file in checkpoint.files.items():
        hasher = blake3(f"{file.size} {file.header_digest}".encode())
        for index in range(STRETCHES):
            start = max(file.size - STRETCH, 0) * (index + 1) // STRETCHES
            hasher.update(checkpoint.folder.read_range(name, start, min(start + STRETCH, file.size)))
        found[name] = hasher.hexdigest()
    return found


SAMPLED_TENSORS = 64


def sampled(checkpoint: Checkpoint) -> str:
    """What tells a model from another however its tensors are dealt to files: BLAKE3 of the names, dtypes and shapes of all, and of
    some bytes in the middle of some."""
    names = sorted(checkpoint.tensors)
    hasher = blake3()
    for name in names:
        tensor = checkpoint.tensors[name]
        hasher.update(json.dumps([name, tensor.dtype.name, list(tensor.shape)]).encode())
    for index in range(min(SAMPLED_TENSORS, len(names))):
        tensor = checkpoint.tensors[names[index * len(names) // min(SAMPLED_TENSORS, len(names))]]
        start = tensor.begin + max(tensor.end - tensor.begin - STRETCH, 0) // 2
        hasher.update(checkpoint.folder.read_range(tensor.file, start, min(start + STRETCH, tensor.end)))
    return hasher.hexdigest()


def of_another(facts: Facts, checkpoint: Checkpoint) -> bool | None:
    """Whether a model's files say that statistics are of another; None where that cannot be told.

    Files of the same names are held against each other. Under other names the same tensors may lie in them: then some bytes of
    some tensors are, where the statistics say what these were.
    """
    note, folder = facts.model, checkpoint.folder
    if note.revision and folder.revision and note.revision == folder.revision:
        return False
    if note.files and note.files.keys() == checkpoint.files.keys():
        return marks(checkpoint) != note.files
    return sampled(checkpoint) != note.sampled if note.sampled else None

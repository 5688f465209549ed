"""Models held against each other: how far two are apart (`diff`), and whether several come from one (`lineage`).

`diff` reads the tensors that both models have once, in leaves of 65,536 elements by threads that share nothing, and sums in
float64: within a leaf by torch on one thread, over leaves exactly (`math.fsum`). So the numbers are the same whatever the
threads, and memory is a few MiB a thread however large the models are. Files are read by call: one that is cut short
meanwhile is an error.

`lineage` looks at tensors of two dimensions. Training from a model moves its weights little and in a direction of its own;
training from another start ends at weights that have nothing to do with them. Two numbers show it:

- The **cosine** of two models' weights, the median over their tensors: `STRANGERS` and above they are related. Seen on the
  six classifiers of `recipes/quickstart/models`: 0.97 to 0.99. On 36 classifiers of that kind (six seeds, each with five
  fine-tunes of 20 steps of AdamW at 1e-3 up to 300 steps at 1e-2): 0.70 to 0.99 within a seed (90 pairs), -0.01 to 0.02
  between seeds (540 pairs).
- The **angle at a model** between the ways to two others, as a cosine. Fine-tunes of one parent leave it in directions of
  their own, so it is small there, and about a half at each fine-tune, where both ways lead over the parent. Seen on the
  quickstart's models: 0.10 to 0.13 at the base (10 pairs of fine-tunes), 0.45 to 0.71 at the fine-tunes (50). On three
  times three fine-tunes of all-MiniLM-L6-v2 for one task in different domains, which have more in common: 0.17 to 0.34 at
  the base (9 pairs), 0.44 to 0.73 at the fine-tunes (27). `RIGHT_ANGLE` was put between these. The model of the smallest
  angles is called the parent where they are below it for every pair. It takes the parent and two of its children. A step
  between parent and children looks like the parent, and where that is not given, so does a fine-tune that moved much less
  than the others.

Relatives whose neurons were permuted, or that were trained until little is left of where they began, are called strangers
too: place by place their weights have as little in common.

`sample` is the small look that a plan takes before it averages: a few KiB of a few tensors of each local model, since that
is all that it takes to tell strangers (over 8,000 elements the cosine of strangers is below 0.05), and averaging them gives
a model that knows nothing, after hours perhaps and with no other sign.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from mergeflow.checkpoint import ADAPTER_WEIGHTS, Checkpoint, StoredTensor, holds_adapter, open_checkpoint
from mergeflow.dtypes import torch_dtype
from mergeflow.errors import InputError, RecipeError, printable
from mergeflow.graph import Apply, Expression, Load, Plan
from mergeflow.hub import locate
from mergeflow.manifest import MANIFEST
from mergeflow.ops.base import LEAF
from mergeflow.planning.vocabulary import Vocabularies
from mergeflow.publishing import CARD, RECIPE

if TYPE_CHECKING:
    from torch import Tensor

STRANGERS = 0.2
"""The median cosine of weights below which two models have nothing to do with each other."""
RIGHT_ANGLE = 0.4
"""The cosine of an angle that counts as a right one."""
RUN = 16
"""Leaves that a thread takes at a time."""
SHOWN = 40
"""Tensors that a table shows before it says how many more there are."""
LEAST_WIDTH = 8
"""Of a matrix that `lineage` looks at, both lengths: narrower ones are near each other by chance."""

Progress = Callable[[int, int], None]
"""Called with bytes read since the last call, and in all."""


@dataclass(frozen=True, slots=True)
class Change:
    """How far a tensor, or a layer's tensors together, of one model are from the other's.

    `relative` is ||b - a|| / ||a|| (infinite where a is zero and b is not), `cosine` that of the two as vectors (NaN where
    one is zero), `largest` the largest |b - a|; all in float64 of the stored values. `equal` says that the stored bytes and
    dtypes are the same.
    """

    name: str
    relative: float
    cosine: float
    largest: float
    norm: float
    elements: int
    equal: bool


@dataclass(frozen=True, slots=True)
class Difference:
    """Two models held against each other, `models` being what they are called.

    `tensors` and `layers` have what moved most first; `layers` are the numbered stacks' layers. `missing` are tensors that
    only the first has, `extra` those that only the second has; `shapes` and `dtypes` hold both of what differs. `config`
    has both values of each key of config.json and generation_config.json that differs (None for a key that is not there);
    `tokenizer` are sentences; `files` says of each other small file that differs how.
    """

    models: tuple[str, str]
    whole: Change
    tensors: tuple[Change, ...]
    layers: tuple[Change, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    dtypes: Mapping[str, tuple[str, str]]
    config: Mapping[str, tuple[Any, Any]]
    tokenizer: tuple[str, ...]
    files: Mapping[str, str]

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        lists = (self.missing, self.extra, self.shapes, self.dtypes, self.config, self.tokenizer, self.files)
        return self.whole.equal and not any(lists)


@dataclass(frozen=True, slots=True)
class Relation:
    """What two models are to each other: `same`, `parent and child` (`first` being the parent), `same parent`, `sibling` or `stranger`.

    `same parent` have their parent among the models that were given (`parent`), `sibling`s come from one that was not.
    `cosine` is the median over the matrices that both have, `tensors` their number, `distance` the norm of all differences
    over that of the first.
    """

    first: str
    second: str
    verdict: str
    cosine: float
    distance: float
    tensors: int
    parent: str = ""


@dataclass(frozen=True, slots=True)
class Lineage:
    """Several models and what each two of them are to each other.

    `angles` are the cosines of the angles at each model between the ways to each two of its relatives, as (model, first,
    second).
    """

    models: tuple[str, ...]
    relations: tuple[Relation, ...]
    angles: Mapping[tuple[str, str, str], float] = field(default_factory=dict)


def open_model(model: str | Path, revision: str | None = None) -> Checkpoint:
    """The checkpoint of a folder, a `.safetensors` file, a LoRA adapter's own matrices, or a hub name.

    What is there on this machine is meant, whatever its name looks like.
    """
    path = os.fspath(model)
    if os.path.exists(path) and not path.startswith(("/", "./", "../", "~")):
        path = f"./{path}"
    folder = locate(path, revision=revision, relative_to=Path())
    return open_checkpoint(folder, file=ADAPTER_WEIGHTS if holds_adapter(folder) else None)


# Reading


class _Readers:
    """The files of some models, opened once each; ranges of tensors come as new flat tensors of the stored dtype."""

    def __init__(self, models: Sequence[Checkpoint], files: Sequence[set[str]]) -> None:
        self._open: dict[tuple[int, str], tuple[int, Path, tuple[int, int]]] = {}
        self._stack = ExitStack()
        try:
            for number, (model, wanted) in enumerate(zip(models, files, strict=True)):
                for name, path in model.paths(sorted(wanted)).items():
                    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    self._stack.callback(os.close, descriptor)
                    self._open[number, name] = descriptor, path, _stamp(descriptor)
        except OSError as error:
            self._stack.close()
            raise InputError(f"cannot be opened: {error.strerror}", where=str(error.filename)) from None
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> _Readers:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def read(self, model: int, tensor: StoredTensor, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a tensor."""
        import torch

        raw = torch.empty((stop - start) * tensor.dtype.size, dtype=torch.uint8)
        view: Any = raw.numpy()
        into, (descriptor, path, _) = memoryview(view), self._open[model, tensor.file]
        offset = tensor.begin + start * tensor.dtype.size
        while into:
            try:
                got = os.preadv(descriptor, [into], offset)
            except OSError as error:
                raise InputError(f"reading failed at byte {offset}: {error.strerror}", where=str(path)) from None
            if not got:
                raise InputError(f"the file ends at byte {offset} while it is read", where=str(path))
            into, offset = into[got:], offset + got
        return raw.view(torch_dtype(tensor.dtype))

    def check_unchanged(self) -> None:
        """Raise InputError for a file that changed while it was read."""
        for descriptor, path, before in self._open.values():
            if _stamp(descriptor) != before:
                raise InputError(
                    "the file changed while it was read", where=str(path), fix="Run again when nothing writes to it."
                )


def _stamp(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def _runs(elements: int) -> Iterator[tuple[int, int]]:
    """The stretches of a tensor that a thread takes at a time."""
    for start in range(0, elements, RUN * LEAF):
        yield start, min(start + RUN * LEAF, elements)


@contextmanager
def _workers(threads: int | None) -> Iterator[ThreadPoolExecutor]:
    """Threads of which each computes alone: sums of a tensor that several threads make have other bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(
        threads or len(os.sched_getaffinity(0)), "mergeflow-compare", initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


# Two models


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums over a stretch of two tensors: of a*a, b*b, a*b and (b - a)**2, the largest |b - a|, and whether the bytes are equal."""

    aa: float
    bb: float
    ab: float
    dd: float
    largest: float
    equal: bool
    elements: int

    @classmethod
    def all(cls, parts: Sequence[_Sums]) -> _Sums:
        """The sums over stretches that follow each other: exact, whatever their order."""
        aa, bb, ab, dd = (_total([getattr(one, name) for one in parts]) for name in ("aa", "bb", "ab", "dd"))
        largest = max((one.largest for one in parts), key=lambda x: math.inf if x != x else x, default=0.0)
        return cls(aa, bb, ab, dd, largest, all(one.equal for one in parts), sum(one.elements for one in parts))

    def change(self, name: str) -> Change:
        """These sums as a person wants them."""
        changed = math.sqrt(self.dd / self.aa) if self.aa else math.inf
        relative = changed if self.dd else 0.0
        norms = math.sqrt(self.aa) * math.sqrt(self.bb)
        cosine = max(-1.0, min(1.0, self.ab / norms)) if norms and math.isfinite(norms) else math.nan
        norm = math.sqrt(self.aa)
        return Change(name, relative, cosine, self.largest, norm, self.elements, self.equal)


def _total(values: Sequence[float]) -> float:
    """The exact sum, rounded once; NaN and Inf as usual."""
    try:
        return math.fsum(values)
    except (ValueError, OverflowError):  # fsum refuses Inf - Inf, and what overflows on the way
        return sum(values)


def _leaf(a: Tensor, b: Tensor) -> _Sums:
    import torch

    x = a.to(torch.float64)
    if a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
        aa = float(torch.dot(x, x))
        return _Sums(aa, aa, aa, 0.0, 0.0, True, len(x))
    y = b.to(torch.float64)
    aa, bb, ab = (float(torch.dot(*pair)) for pair in ((x, x), (y, y), (x, y)))
    d = y.sub_(x)
    return _Sums(aa, bb, ab, float(torch.dot(d, d)), float(d.abs_().max()), False, len(x))


def diff(
    first: str | Path,
    second: str | Path,
    *,
    threads: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Difference:
    """How far the second model is from the first: two folders, `.safetensors` files or hub names.

    Raises InputError for a model that cannot be read, or changes while it is.
    """
    models = open_model(first), open_model(second)
    a, b = (model.tensors for model in models)
    both = [name for name in a if name in b]
    alike = [name for name in both if a[name].shape == b[name].shape]
    total = sum(a[name].nbytes + b[name].nbytes for name in alike)
    tasks = [(name, *run) for name in alike for run in _runs(a[name].elements)]
    with _Readers(models, [{side[name].file for name in alike} for side in (a, b)]) as readers:

        def measure(task: tuple[str, int, int]) -> _Sums:
            name, start, stop = task
            parts = []
            for at in range(start, stop, LEAF):
                end = min(at + LEAF, stop)
                parts.append(_leaf(readers.read(0, a[name], at, end), readers.read(1, b[name], at, end)))
            progress((stop - start) * (a[name].dtype.size + b[name].dtype.size), total)
            return _Sums.all(parts)

        found: dict[str, list[_Sums]] = {name: [] for name in alike}
        with _workers(threads) as pool:
            for (name, _, _), sums in zip(tasks, pool.map(measure, tasks), strict=True):
                found[name].append(sums)
        readers.check_unchanged()
    tensors = {name: _Sums.all(parts) for name, parts in found.items()}
    layers: dict[str, list[_Sums]] = {}
    for name, sums in tensors.items():
        layer = _layer(name)
        if layer is not None:
            layers.setdefault(layer, []).append(sums)
    return Difference(
        (os.fspath(first), os.fspath(second)),
        _Sums.all(list(tensors.values())).change(""),
        _by_size(sums.change(name) for name, sums in tensors.items()),
        _by_size(_Sums.all(parts).change(name) for name, parts in layers.items()),
        tuple(name for name in a if name not in b),
        tuple(name for name in b if name not in a),
        {name: (a[name].shape, b[name].shape) for name in both if a[name].shape != b[name].shape},
        {name: (a[name].dtype.name, b[name].dtype.name) for name in both if a[name].dtype != b[name].dtype},
        _config(*models),
        _tokenizer(*models),
        _files(*models),
    )


def _by_size(changes: Iterator[Change]) -> tuple[Change, ...]:
    return tuple(
        sorted(changes, key=lambda one: (-(math.inf if one.relative != one.relative else one.relative), one.name))
    )


def _layer(name: str) -> str | None:
    """`model.layers.3` of `model.layers.3.mlp.weight`: the first number that something follows; None outside the stacks."""
    parts = name.split(".")
    found = next((i for i, part in enumerate(parts[:-1]) if part.isascii() and part.isdigit()), None)
    return None if found is None else ".".join(parts[: found + 1])


CONFIGS = ("config.json", "generation_config.json")
BESIDE = (".json", ".txt", ".model", ".jinja", ".tiktoken")
OURS = (MANIFEST, RECIPE, CARD)
"""What a merge says of itself, which differs between any two."""


def _config(a: Checkpoint, b: Checkpoint) -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for file in CONFIGS:
        before, now = (_flat(model.json(file)) for model in (a, b))
        prefix = "" if file == CONFIGS[0] else "generation."
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key) or (key in before) != (key in now):
                found[prefix + key] = before.get(key), now.get(key)
    return found


def _flat(value: Any, above: str = "") -> dict[str, Any]:
    """A nested object as one of dotted keys."""
    if not isinstance(value, dict):
        return {above: value} if above else {}
    found: dict[str, Any] = {}
    for key, one in value.items():
        found |= _flat(one, f"{above}.{key}" if above else key)
    return found


def _tokenizer(a: Checkpoint, b: Checkpoint) -> tuple[str, ...]:
    """Sentences on how two tokenizers differ, in the tokens they know and what these mean."""
    vocabularies = Vocabularies({"a": a, "b": b})
    before, now = (vocabularies.tokens(name) for name in ("a", "b"))
    if not before or not now:
        return ("only one model has a tokenizer",) if before or now else ()
    said = []
    if len(before) != len(now):
        said.append(f"{len(before)} tokens, and {len(now)}")
    for words, mine, theirs in (("first", before, now), ("second", now, before)):
        known = set(theirs.values())
        own = [token for _, token in sorted(mine.items()) if token not in known]
        if own:
            more = ", ..." if len(own) > 5 else ""
            said.append(f"{len(own)} tokens only in the {words}: {', '.join(map(repr, own[:5]))}{more}")
    moved = sorted(i for i in before.keys() & now.keys() if before[i] != now[i])
    if moved:
        first = ", ".join(f"{i} is {before[i]!r} and {now[i]!r}" for i in moved[:5])
        said.append(f"{len(moved)} ids mean another token: {first}{', ...' if len(moved) > 5 else ''}")
    return tuple(said)


def _files(a: Checkpoint, b: Checkpoint) -> dict[str, str]:
    """Small files beside the weights that differ; what config and index say is told elsewhere."""
    skipped = (*CONFIGS, *OURS)

    def digests(model: Checkpoint) -> dict[str, str]:
        names = (
            n for n in model.folder.names() if "/" not in n and n.endswith(BESIDE) and not n.endswith(".index.json")
        )
        return {name: blake3(model.folder.read(name)).hexdigest() for name in names if name not in skipped}

    if any(getattr(model.folder, "only_file", None) for model in (a, b)):  # a file alone says nothing of its folder
        return {}
    before, now = digests(a), digests(b)
    return {
        name: "differs" if name in before and name in now else f"only in the {'first' if name in before else 'second'}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    }


def diff_data(found: Difference) -> dict[str, Any]:
    """A difference as JSON-ready data; numbers that JSON has no word for are None."""

    def change(one: Change) -> dict[str, Any]:
        return {
            "name": one.name,
            "relative": _number(one.relative),
            "cosine": _number(one.cosine),
            "largest": _number(one.largest),
            "norm": _number(one.norm),
            "elements": one.elements,
            "equal": one.equal,
        }

    whole = change(found.whole)
    del whole["name"]
    return {
        "models": list(found.models),
        "same": found.same,
        "whole": whole,
        "tensors": [change(one) for one in found.tensors],
        "layers": [change(one) for one in found.layers],
        "missing": list(found.missing),
        "extra": list(found.extra),
        "shapes": {name: [list(one) for one in pair] for name, pair in found.shapes.items()},
        "dtypes": {name: list(pair) for name, pair in found.dtypes.items()},
        "config": {key: list(pair) for key, pair in found.config.items()},
        "tokenizer": list(found.tokenizer),
        "files": dict(found.files),
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def diff_text(found: Difference, *, shown: int = SHOWN) -> str:
    """A difference for a person: what moved most first."""
    first, second = found.models
    if found.same:
        return printable(f"{first} and {second} are the same")
    lines = [f"{first}  ->  {second}", ""]
    equal = sum(one.equal for one in found.tensors)
    if found.tensors:
        lines += [f"  together {_told(found.whole)}; {equal} of {len(found.tensors)} tensors are equal"]
    for title, changes in (("layer", found.layers), ("tensor", tuple(o for o in found.tensors if not o.equal))):
        if changes:
            width = max(len(title), *(len(one.name) for one in changes[:shown]))
            lines += ["", f"  {title:<{width}}  {'||b-a||/||a||':>13}  {'cosine':>9}  {'max |b-a|':>9}"]
            lines += [
                f"  {one.name:<{width}}  {one.relative:>13.3g}  {one.cosine:>9.6f}  {one.largest:>9.3g}"
                for one in changes[:shown]
            ]
            lines += [f"  and {len(changes) - shown} more"] * (len(changes) > shown)
    sections: list[tuple[str, list[str]]] = [
        ("only in the first", list(found.missing)),
        ("only in the second", list(found.extra)),
        ("shapes", [f"{name}: {_shape(a)}, and {_shape(b)}" for name, (a, b) in found.shapes.items()]),
        ("dtypes", [f"{name}: {a}, and {b}" for name, (a, b) in found.dtypes.items()]),
        ("config", [f"{key}: {_json(a)}, and {_json(b)}" for key, (a, b) in found.config.items()]),
        ("tokenizer", list(found.tokenizer)),
        ("files", [f"{name}: {what}" for name, what in found.files.items()]),
    ]
    for title, words in sections:
        if words:
            lines += ["", f"  {title}", *(f"    {word}" for word in words[:shown])]
            lines += [f"    and {len(words) - shown} more"] * (len(words) > shown)
    return printable("\n".join(lines))


def _told(one: Change) -> str:
    return f"{one.relative:.3g} of the norm, cosine {one.cosine:.6f}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _json(value: Any) -> str:
    text = json.dumps(value)
    return "nothing" if value is None else text if len(text) <= 80 else f"{text[:77]}..."


def diff_svg(found: Difference) -> str:
    """A picture of the relative change of each layer, in the layers' order, as SVG."""
    from html import escape

    def order(one: Change) -> tuple[str, int]:
        stack, _, number = one.name.rpartition(".")
        return stack, int(number)

    changes = sorted(found.layers, key=order) or sorted(found.tensors, key=lambda one: one.name)
    finite = [one.relative for one in changes if math.isfinite(one.relative)]
    most = max(finite, default=0.0) or 1.0
    left = 16 + 7 * max((len(one.name) for one in changes), default=0)
    width, height = left + 420, 40 + 18 * len(changes)
    title = escape(printable(f"{found.models[0]} -> {found.models[1]}: ||b - a|| / ||a||"))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="monospace" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/><text x="8" y="18">{title}</text>',
    ]
    for number, one in enumerate(changes):
        top, known = 32 + 18 * number, math.isfinite(one.relative)
        bar = 300 * one.relative / most if known else 300
        parts.append(
            f'<text x="8" y="{top + 10}">{escape(printable(one.name))}</text>'
            f'<rect x="{left}" y="{top}" width="{bar:.1f}" height="12" fill="{"#4477aa" if known else "#cc3311"}"/>'
            f'<text x="{left + bar + 6:.1f}" y="{top + 10}">{one.relative:.3g}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


# Several models


def lineage(
    models: Sequence[str | Path], *, threads: int | None = None, progress: Progress = lambda done, total: None
) -> Lineage:
    """What two or more models are to each other, from the matrices that they have in common; each is read once.

    Raises RecipeError for fewer than two models, InputError for one that cannot be read, or where two have no matrix in common.
    """
    import torch

    if len(models) < 2:
        raise RecipeError("takes two models or more", where="lineage")
    labels = tuple(os.fspath(model) for model in models)
    opened = [open_model(model) for model in models]
    names = [
        name
        for name, tensor in opened[0].tensors.items()
        if _is_matrix(tensor)
        and all(name in one.tensors and one.tensors[name].shape == tensor.shape for one in opened)
        and all(_is_matrix(one.tensors[name]) for one in opened)
    ]
    if not names:
        raise InputError(
            f"have no matrix in common that is at least {LEAST_WIDTH} wide (their names or shapes differ)",
            where=" and ".join(labels),
            fix="Models of different architectures have no common origin that weights could show.",
        )
    total = sum(one.tensors[name].nbytes for name in names for one in opened)
    tasks = [(name, *run) for name in names for run in _runs(opened[0].tensors[name].elements)]
    pairs = list(itertools.combinations(range(len(opened)), 2))
    with _Readers(opened, [{one.tensors[name].file for name in names} for one in opened]) as readers:

        def measure(task: tuple[str, int, int]) -> list[float]:
            """Squares of norms, dots and squares of distances over a stretch, each an exact sum over its leaves."""
            name, start, stop = task
            leaves = []
            for at in range(start, stop, LEAF):
                end = min(at + LEAF, stop)
                values = [readers.read(n, one.tensors[name], at, end).double() for n, one in enumerate(opened)]
                sums = [float(torch.dot(x, x)) for x in values]
                for i, j in pairs:
                    gap = values[j] - values[i]
                    sums += [float(torch.dot(values[i], values[j])), float(torch.dot(gap, gap))]
                leaves.append(sums)
            progress((stop - start) * sum(one.tensors[name].dtype.size for one in opened), total)
            return [_total(column) for column in zip(*leaves, strict=True)]

        found: dict[str, list[list[float]]] = {name: [] for name in names}
        with _workers(threads) as pool:
            for (name, _, _), sums in zip(tasks, pool.map(measure, tasks), strict=True):
                found[name].append(sums)
        readers.check_unchanged()
    tensors = [[_total(column) for column in zip(*parts, strict=True)] for parts in found.values()]
    count = len(opened)
    squares = [_total([sums[n] for sums in tensors]) for n in range(count)]
    cosines: dict[tuple[int, int], float] = {}
    gaps: dict[tuple[int, int], float] = {}
    for number, (i, j) in enumerate(pairs):
        dot, gap = count + 2 * number, count + 2 * number + 1
        seen = [_cosine(sums[dot], sums[i], sums[j]) for sums in tensors]
        seen = [one for one in seen if one == one]
        cosines[i, j] = median(seen) if seen else math.nan
        gaps[i, j] = gaps[j, i] = _total([sums[gap] for sums in tensors])
    return _judged(labels, cosines, gaps, squares, len(names))


def _is_matrix(tensor: StoredTensor) -> bool:
    return len(tensor.shape) == 2 and min(tensor.shape) >= LEAST_WIDTH and tensor.dtype.kind == "float"


def _cosine(dot: float, first: float, second: float) -> float:
    """The cosine of two vectors from their product and squared norms; NaN where one is zero or not finite."""
    norms = math.sqrt(first) * math.sqrt(second) if first >= 0 and second >= 0 else math.nan
    return dot / norms if norms and math.isfinite(norms) else math.nan


def _judged(
    labels: tuple[str, ...],
    cosines: Mapping[tuple[int, int], float],
    gaps: Mapping[tuple[int, int], float],
    squares: Sequence[float],
    tensors: int,
) -> Lineage:
    """The verdicts that cosines and squared distances lead to."""
    numbers = range(len(labels))
    related = {pair for pair, cosine in cosines.items() if cosine >= STRANGERS}
    related |= {(j, i) for i, j in related}
    angles: dict[tuple[int, int, int], float] = {}
    for at in numbers:
        others = [n for n in numbers if (at, n) in related and gaps[at, n] > 0]
        for i, j in itertools.combinations(others, 2):
            angles[at, i, j] = (gaps[at, i] + gaps[at, j] - gaps[i, j]) / (2 * math.sqrt(gaps[at, i] * gaps[at, j]))
    widest: dict[int, float] = {}
    children: dict[int, set[int]] = {}
    for (at, i, j), cosine in angles.items():
        if gaps[i, j] > 0:
            widest[at] = max(cosine, widest.get(at, -1.0))
            children.setdefault(at, set()).update((i, j))
    parents: dict[int, set[int]] = {}
    for at in sorted(widest, key=widest.__getitem__):
        # A child that moved little stands near its parent, and looks like one where the parent itself is not known.
        if widest[at] < RIGHT_ANGLE and not any(at in below for below in parents.values()):
            parents[at] = children[at]
    relations = []
    for (i, j), cosine in cosines.items():
        first, second, parent, verdict = i, j, "", "sibling"
        above = [p for p, children in parents.items() if i in children and j in children]
        if gaps[i, j] == 0:
            verdict = "same"
        elif (i, j) not in related:
            verdict = "stranger"
        elif i in parents and j in parents[i]:
            verdict = "parent and child"
        elif j in parents and i in parents[j]:
            verdict, first, second = "parent and child", j, i
        elif above:
            verdict, parent = "same parent", labels[above[0]]
        distance = math.sqrt(gaps[i, j] / squares[first]) if squares[first] else math.inf
        relations.append(Relation(labels[first], labels[second], verdict, cosine, distance, tensors, parent))
    named = {(labels[p], labels[i], labels[j]): cosine for (p, i, j), cosine in angles.items()}
    return Lineage(labels, tuple(relations), named)


def lineage_data(found: Lineage) -> dict[str, Any]:
    """A lineage as JSON-ready data, with its evidence."""
    return {
        "models": list(found.models),
        "relations": [
            {
                "first": one.first,
                "second": one.second,
                "verdict": one.verdict,
                "parent": one.parent or None,
                "cosine": _number(one.cosine),
                "distance": _number(one.distance),
                "tensors": one.tensors,
            }
            for one in found.relations
        ],
        "angles": [
            {"at": at, "first": first, "second": second, "cosine": _number(cosine)}
            for (at, first, second), cosine in found.angles.items()
        ],
        "thresholds": {"strangers_below": STRANGERS, "right_angle_below": RIGHT_ANGLE},
    }


def lineage_text(found: Lineage) -> str:
    """A lineage for a person: each two models, what they are to each other, and what shows it."""
    lines = []
    for one in found.relations:
        words = f"{one.verdict} ({one.parent})" if one.parent else one.verdict
        what = "parent of" if one.verdict == "parent and child" else "and"
        lines.append(f"{one.first} {what} {one.second}: {words}")
        lines.append(
            f"  cosine of weights {one.cosine:.4f} (median of {one.tensors} matrices; strangers are below {STRANGERS}), "
            f"distance {one.distance:.3g} of the norm"
        )
    if found.angles:
        lines += ["", f"angles between the ways to two others, as cosines; at a parent all are below {RIGHT_ANGLE}:"]
        for model in found.models:
            here = [cosine for (at, _, _), cosine in found.angles.items() if at == model]
            if here:
                lines.append(f"  at {model}: {min(here):.2f} to {max(here):.2f}")
    return printable("\n".join(lines))


# What a plan looks at before it averages


SAMPLE_TENSORS = 8
SAMPLE_RUNS = 8
SAMPLE_RUN = 512
"""Elements that are read in a row; so a model's sample has 32,768 elements at most."""
LEAST_SAMPLE = 8192
"""Elements below which a sample says nothing: models so small are left alone."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What a plan read of the weights that it averages: a warning for each two strangers, and the bytes."""

    warnings: tuple[str, ...] = ()
    size: int = 0


def sample(plan: Plan) -> Sample:
    """Look at a few KiB of the models whose weights a plan's rows put together, for those that are strangers.

    Looks at models on this machine only, at matrices of float32, float64, float16 or bfloat16 that one row reads from
    several of them. A model that cannot be read here is left to the run, which says why. No torch is needed.
    """
    local = {name: one for name, one in plan.models.items() if type(one) is Checkpoint and one.folder.revision is None}
    groups: dict[frozenset[str], list[dict[str, StoredTensor]]] = {}
    for row in plan.rows:
        loads = _averaged(row.expression, row.shape)
        here = {
            name: tensor
            for name, tensor in loads.items()
            if name in local and tensor.dtype.name in _FLOATS and not tensor.strides
        }
        if len(here) > 1 and len(row.shape) == 2 and min(row.shape) >= 2 * LEAST_WIDTH and row.elements >= SAMPLE_RUN:
            groups.setdefault(frozenset(here), []).append(here)
    known: dict[tuple[str, str], Any] = {}
    size = 0
    strangers: dict[tuple[str, str], float] = {}
    for models, rows in groups.items():
        count = min(SAMPLE_TENSORS, len(rows))
        chosen = [rows[(2 * n + 1) * len(rows) // (2 * count)] for n in range(count)]
        for name in sorted(models):
            for row_tensors in chosen:
                tensor = row_tensors[name]
                if (name, tensor.name) not in known:
                    known[name, tensor.name] = _looked_at(local[name], tensor)
                    size += len(known[name, tensor.name]) * tensor.dtype.size
        for first, second in itertools.combinations(sorted(models), 2):
            pairs = [(known[first, row[first].name], known[second, row[second].name]) for row in chosen]
            pairs = [(x, y) for x, y in pairs if len(x) == len(y) and len(x)]
            seen = [_cosine(float(x @ y), float(x @ x), float(y @ y)) for x, y in pairs]
            seen = [one for one in seen if one == one]
            if sum(len(x) for x, _ in pairs) >= LEAST_SAMPLE and seen and median(seen) < STRANGERS:
                strangers.setdefault((first, second), median(seen))
    warnings = tuple(
        f"'{first}' and '{second}' look like strangers: the cosine of their weights is {cosine:.2f}, and 0.7 or more where "
        f"both come from one model. What strangers average to knows nothing; see `mergeflow lineage`"
        for (first, second), cosine in strangers.items()
    )
    return Sample(warnings, size)


_FLOATS = ("float32", "float64", "float16", "bfloat16")


def _averaged(expression: Expression, shape: tuple[int, ...]) -> dict[str, StoredTensor]:
    """The stored tensors of a row's own shape that ops put together in it, by model."""
    found: dict[str, StoredTensor] = {}
    seen: set[int] = set()
    todo = [expression]
    while todo:
        one = todo.pop()
        if isinstance(one, Apply) and id(one) not in seen:
            seen.add(id(one))
            todo += one.inputs
        elif isinstance(one, Load) and one.tensor.shape == shape:
            found.setdefault(one.model, one.tensor)
    return found


def _looked_at(model: Checkpoint, tensor: StoredTensor) -> Any:
    """Up to `SAMPLE_RUNS` runs of a tensor, spread evenly, as float64; empty where they cannot be read."""
    import numpy as np

    count = min(SAMPLE_RUNS, max(1, tensor.elements // SAMPLE_RUN))
    length, parts = min(SAMPLE_RUN, tensor.elements), []
    try:
        for n in range(count):
            start = n * tensor.elements // count
            begin = tensor.begin + start * tensor.dtype.size
            raw = model.folder.read_range(tensor.file, begin, begin + length * tensor.dtype.size)
            if tensor.dtype.name == "bfloat16":
                parts.append((np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64))
            else:
                parts.append(np.frombuffer(raw, np.dtype(tensor.dtype.name).newbyteorder("<")).astype(np.float64))
    except InputError:
        return np.zeros(0)
    return np.concatenate(parts)

"""A mergekit YAML becomes a recipe that gives the same numbers, or every reason why it cannot, with its line.

The way: documents read with their positions -> merges (`_Merge`: what mergekit would understand) -> nodes of a recipe,
checked like any recipe -> its text, with what was done differently as comments. Only the YAML is looked at, no model.
What mergekit 0.1.5 does and a recipe says otherwise is written out:

- A parameter is looked for at the source, the slice, the module and the top, each a value, a gradient or filters; filters
  that fit nowhere fall through to the next. Here that is one list of rules, and mergekit's default ends it where ours differs.
- A filter is a plain substring: `mlp` becomes `*mlp*`, `layers.1` becomes `*layers.1*` (which takes layer 10 too, as there).
  mergekit passes over a filter that fits no tensor; here planning refuses the rule, with the nearest names, since
  a typo looks the same. Filters of one value stand in one list, of which one needs to fit.
- A gradient runs over the slice (`over:`), and what is outside of the layers takes its first value (`outside:`). In
  a slice of one layer that layer takes the last. (A whole model of one layer is not known to be one: it takes the first.)
- mergekit takes a base that is not among the models for one more input of `linear` and `karcher`; so does the recipe.
- A slice cuts: nodes merge whole models, and a `stack` takes the layers. So a model with more layers than a configuration
  says is cut as it is there, though a slice of all layers looks as if it could do without.
- A merge that another one reads was rounded to its dtype on disk: a `cast` stands between.
- mergekit rounds inputs to `dtype` before it computes; here they are merged as stored and rounded once.

mergekit reads YAML 1.1 through PyYAML and we read 1.2: `1e-5` is a text there that pydantic takes for the number it is here,
`yes`, `no`, `on` and `off` are texts here that are taken for the truth values they are there, and what would be
another number (`010`) is an error. Keys and parameters that mergekit does not know are ignored there and errors here.
A parameter that it knows and that this method has no use for is left out and noted.
"""

from __future__ import annotations

import os
import posixpath
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mergeflow.document import WIDTH, Document, dump_yaml, read_documents
from mergeflow.errors import MachineError, MergeflowError, Problems, RecipeError, did_you_mean, raise_all
from mergeflow.ops import Op, op_named
from mergeflow.recipe import NAME, RECIPE_NAME, Recipe

Keys = tuple[str | int, ...]
Scalar = bool | int | float | str

MOST_PROBLEMS = 100
MOST_ITEMS = 500
"""Entries of one list of a configuration: what a stranger's file makes of them grows with the square."""

REQUIRED: Any = object()
"""The default of a parameter that mergekit asks for."""


@dataclass(frozen=True, slots=True)
class _Parameter:
    """A parameter of a mergekit method: our word for it, its kind, whose it is, and mergekit's default in our terms.

    `ours` is empty where the parameter changes no number. A `model`'s is looked for at each source, a `shared` one is not.
    """

    ours: str
    kind: Literal["number", "share", "flag", "opposite", "rescale", "count"]
    of: Literal["model", "shared"]
    default: Any = REQUIRED
    also_base: bool = False


@dataclass(frozen=True, slots=True)
class _Method:
    """A mergekit method: our op, what it does with a base, how many inputs it takes (the base counted), its parameters.

    `base`: `needed`, `optional`, or `input` (an input like the others). With `ends` the base is the first input of our op.
    """

    op: str
    base: Literal["needed", "optional", "input"]
    parameters: Mapping[str, _Parameter]
    fewest: int = 1
    most: int | None = None
    ends: bool = False
    draws: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """What our op is told so that it does as mergekit does."""


_WEIGHT = _Parameter("weight", "number", "model")
_NO_EFFECT = _Parameter("", "flag", "shared", False)


def _arithmetic(op: str, normalize: bool, rescale: bool, **own: _Parameter) -> _Method:
    """A method of the task arithmetic family."""
    sparse = op != "task_arithmetic"
    return _Method(
        op,
        "needed",
        {
            "weight": _WEIGHT,
            "density": _Parameter("density" if sparse else "", "share", "model", 1.0),
            **own,
            "normalize": _Parameter("normalize", "flag", "shared", normalize),
            "rescale": _Parameter("rescale" if sparse else "", "rescale", "shared", "l1" if rescale else "none"),
            "lambda": _Parameter("scale", "number", "shared", 1.0),
            "int8_mask": _NO_EFFECT,
        },
        draws=op.startswith(("dare", "della")),
        fixed={"rank_axis": 1} if op.startswith("della") else {},
    )


_GAMMA = _Parameter("gamma", "number", "model", 0.01)
_EPSILON = _Parameter("epsilon", "number", "model", 0.15)
_CHANGED = _Parameter("epsilon", "number", "shared", 1e-5)

METHODS: Mapping[str, _Method] = {
    "linear": _Method(
        "linear",
        "input",
        {
            "weight": _Parameter("weight", "number", "model", also_base=True),
            "normalize": _Parameter("normalize", "flag", "shared", True),
        },
    ),
    "slerp": _Method("slerp", "needed", {"t": _Parameter("t", "number", "shared")}, 2, 2, ends=True),
    "nuslerp": _Method(
        "nuslerp",
        "optional",
        {
            "weight": _WEIGHT,
            # mergekit calls the vectors along the last axis columns, and we call them rows.
            "nuslerp_row_wise": _Parameter("row_wise", "opposite", "shared", True),
            "nuslerp_flatten": _Parameter("flatten", "flag", "shared", True),
        },
        2,
        3,
    ),
    "multislerp": _Method(
        "multislerp",
        "optional",
        {
            "weight": _WEIGHT,
            "normalize_weights": _Parameter("normalize_weights", "flag", "shared", True),
            "eps": _Parameter("eps", "number", "shared", 1e-8),
        },
    ),
    "karcher": _Method(
        "karcher",
        "input",
        {
            "max_iter": _Parameter("max_iter", "count", "shared", 10),
            "tol": _Parameter("tol", "number", "shared", 1e-5),
        },
    ),
    "model_stock": _Method(
        "model_stock", "needed", {"filter_wise": _Parameter("filter_wise", "flag", "shared", False)}, 3
    ),
    "nearswap": _Method("nearswap", "needed", {"t": _Parameter("t", "number", "shared")}, 2, 2),
    "arcee_fusion": _Method("arcee_fusion", "needed", {}, 2, 2),
    "sce": _Method(
        "sce",
        "needed",
        {"select_topk": _Parameter("select_topk", "share", "shared", 1.0), "int8_mask": _NO_EFFECT},
    ),
    "ram": _Method("ram", "needed", {"epsilon": _CHANGED}),
    "ramplus_tl": _Method(
        "ramplus",
        "needed",
        {
            "r": _Parameter("r", "number", "shared", 0.1),
            "alpha": _Parameter("alpha", "number", "shared", 0.2),
            "epsilon": _CHANGED,
        },
    ),
    "passthrough": _Method(
        "passthrough", "input", {"scale": _Parameter("scale", "number", "model", 1.0, also_base=True)}, 1, 1
    ),
    "task_arithmetic": _arithmetic("task_arithmetic", False, False),
    "ties": _arithmetic("ties", True, False),
    "dare_ties": _arithmetic("dare_ties", False, True),
    "dare_linear": _arithmetic("dare_linear", False, True),
    "breadcrumbs": _arithmetic("breadcrumbs", False, False, gamma=_GAMMA),
    "breadcrumbs_ties": _arithmetic("breadcrumbs_ties", False, False, gamma=_GAMMA),
    "della": _arithmetic("della", True, True, epsilon=_EPSILON),
    "della_linear": _arithmetic("della_linear", False, True, epsilon=_EPSILON),
}
"""Every method of mergekit 0.1.5."""

PARAMETERS = frozenset(name for method in METHODS.values() for name in method.parameters)

_TOP = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "modules",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "name",
)
_OTHER_TOOLS = {
    **dict.fromkeys(
        ("experts", "gate_mode", "experts_per_token", "shared_experts"),
        "a mixture of experts made of dense models (mergekit-moe) is no merge of tensors, and cannot be brought over",
    ),
    "layer_slices": "this is the form of bakllama, which cannot be brought over; mergekit writes it as `slices:`",
    "genome": "a search over merges (mergekit-evolve) cannot be brought over; bring over the merge that it found",
}
_HALF = ("float16", "bfloat16")
_DTYPES = (*_HALF, "float32", "float64")
_TRUE = ("true", "yes", "on", "y", "t", "1")
_FALSE = ("false", "no", "off", "n", "f", "0")
_TRUTHS = {"flag": (False, True), "opposite": (True, False), "rescale": ("none", "l1")}
"""What false and true are in our terms."""
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_OCTAL = re.compile(r"[-+]?0[0-7]+")
_HUB = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*")
_SHORT_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/+-]*")


@dataclass(frozen=True, slots=True)
class _Reference:
    """A model as mergekit names it; two are the same model where all of it is equal."""

    path: str
    revision: str | None = None
    lora: tuple[str, str | None] | None = None

    def __str__(self) -> str:
        parts = [(self.path, self.revision), *([self.lora] if self.lora else [])]
        return "+".join(path if revision is None else f"{path}@{revision}" for path, revision in parts)


@dataclass(frozen=True, slots=True)
class _Rule:
    """One rule of a parameter: the filter (None fits all), one value or the points of a gradient, and where it stands."""

    filter: str | None
    values: tuple[Any, ...]
    where: str


Settings = Mapping[str, tuple[_Rule, ...]]


@dataclass(frozen=True, slots=True)
class _Source:
    """A model that goes into a slice, with its own parameters; `layers` are the first and the last, None is all."""

    model: _Reference
    parameters: Settings
    layers: tuple[int, int] | None
    where: str


@dataclass(frozen=True, slots=True)
class _Slice:
    """Models that are merged over their layers."""

    sources: tuple[_Source, ...]
    base: _Reference | None
    parameters: Settings
    where: str


@dataclass(frozen=True, slots=True)
class _Merge:
    """One document: one merge. `outer` are the parameters of the module and the top, in the order they are looked at."""

    name: str | None
    method: str
    base: _Reference | None
    slices: tuple[_Slice, ...]
    outer: tuple[Settings, ...]
    dtype: str | None
    out_dtype: str | None
    tokenizer: _Reference | Literal["base"] | None
    where: str
    base_where: str


class _TooMany(Exception):
    """Enough problems were found."""


@dataclass(slots=True)
class _Report:
    """What was found wrong, and what a person should know of the rest, each with its place."""

    errors: list[MergeflowError] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)

    def problem(self, what: str, where: str, fix: str = "") -> None:
        self.errors.append(RecipeError(what, where=where, fix=fix))
        if len(self.errors) >= MOST_PROBLEMS:
            raise _TooMany

    def note(self, text: str, where: str) -> None:
        self.notes.setdefault(text, []).append(where)


@dataclass(frozen=True, slots=True)
class Imported:
    """A recipe that was brought over: its text, and notes on what was left out or done another way."""

    text: str
    notes: tuple[str, ...]


def import_config(path: str | Path, *, into: str | Path | None = None) -> Imported:
    """The recipe for a mergekit configuration; local models are written relative to `into`, the folder it will stand in.

    A relative path of a model is taken from the working folder, as mergekit does, or from the configuration's own where
    only that has it. Raises RecipeError, or Problems, with file:line:column of all that cannot be brought over.
    """
    path = Path(path)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        raise RecipeError("there is no such file", where=str(path), fix=near or "Give a mergekit YAML.") from None
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", where=str(path)) from None
    report = _Report()
    documents = read_documents(text, str(path))
    if not documents:
        raise RecipeError("the file is empty", where=str(path), fix="Give a mergekit YAML.")
    builder = _Builder(report, path, Path(into) if into is not None else Path())
    with suppress(_TooMany):
        merges = [merge for document in documents if (merge := _Reader(document, report).merge()) is not None]
        _check_names(merges, report)
        raise_all(report.errors)
        builder.build(merges)
    raise_all(report.errors)
    return builder.finished()


def write_recipe(imported: Imported, path: str | Path, *, force: bool = False) -> None:
    """Write the text to a file that is not there yet, or is replaced with `force`. Raises RecipeError, MachineError."""
    path = Path(path)
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(imported.text)
    except FileExistsError:
        raise RecipeError("there is such a file already", where=str(path), fix="Give --force to replace it.") from None
    except OSError as error:
        raise MachineError(f"cannot be written: {error.strerror}", where=str(path)) from None


def _check_names(merges: Sequence[_Merge], report: _Report) -> None:
    seen: dict[str | None, str] = {}
    for merge in merges:
        if merge.name in seen:
            what = f"a second merge is called '{merge.name}'" if merge.name else "a second merge has no `name`"
            report.problem(what, merge.where, f"The first is at {seen[merge.name]}: give each its own.")
        seen.setdefault(merge.name, merge.where)


class _Reader:
    """From a document to its merge; what mergekit would not take, or a recipe cannot say, is a problem."""

    def __init__(self, document: Document, report: _Report) -> None:
        self.document = document
        self.report = report

    def where(self, keys: Keys, *, key: bool = False) -> str:
        return self.document.where(keys, key)

    def problem(self, what: str, keys: Keys, fix: str = "", *, key: bool = False) -> None:
        self.report.problem(what, self.where(keys, key=key), fix)

    def merge(self) -> _Merge | None:
        """The merge, or None where its method or its models cannot be told."""
        data = self.document.data
        if not isinstance(data, dict):
            self.problem("a mergekit configuration is a mapping", (), "It starts with e.g. `merge_method: ties`.")
            return None
        other = next((key for key in data if key in _OTHER_TOOLS), None)
        if other is not None:
            self.problem(_OTHER_TOOLS[other], (other,), key=True)
            return None
        if "recipe" in data or "nodes" in data:
            self.problem("this is a recipe already", (), "Check it by `mergeflow validate`.")
            return None
        self.check_keys(data, _TOP, ())
        method = self.method(data)
        base, base_where = self.reference(data.get("base_model"), ("base_model",)), self.where(("base_model",))
        module, inside, at = self.module(data)
        slices = self.slices(inside, at, method) if inside else ()
        outer = [self.parameters(module, (*at, "parameters"), method, "model")] if module else []
        outer.append(self.parameters(data.get("parameters"), ("parameters",), method, "model"))
        dtype, out_dtype = self.dtype(data, "dtype"), self.dtype(data, "out_dtype")
        tokenizer = self.tokenizer(data)
        if data.get("chat_template"):
            self.problem(
                "a chat template cannot be brought over: the output takes that of its tokenizer's model",
                ("chat_template",),
                "Name that model in `tokenizer_source:`, or write the template into the output's files afterwards.",
                key=True,
            )
        name = data.get("name")
        if name is not None and not isinstance(name, str):
            self.problem("a name is text", ("name",), "Put it in quotes.")
            name = None
        if not method or not slices:
            return None
        return _Merge(
            name,
            method,
            base,
            slices,
            tuple(outer),
            dtype,
            out_dtype,
            tokenizer,
            self.where(("merge_method",)),
            base_where,
        )

    def check_keys(self, data: Mapping[str, Any], known: Sequence[str], at: Keys) -> None:
        for key in data:
            if key in known:
                continue
            near = did_you_mean(key, known)
            if not near and key in PARAMETERS:
                near = "Write it under `parameters:`."
            self.problem(
                f"mergekit ignores the key '{_cut(key)}' here",
                (*at, key),
                near or f"Keys here are {', '.join(known)}.",
                key=True,
            )

    def method(self, data: Mapping[str, Any]) -> str:
        method = data.get("merge_method")
        if isinstance(method, str) and method in METHODS:
            return method
        if method is None:
            self.problem("there is no `merge_method`", (), "It names one of mergekit's methods, e.g. ties.")
        else:
            near = did_you_mean(str(method)[:100], METHODS)
            self.problem(
                f"mergekit 0.1.5 has no method '{_cut(str(method))}'",
                ("merge_method",),
                near or f"It has {', '.join(METHODS)}.",
            )
        return ""

    def module(self, data: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any] | None, Keys]:
        """The parameters of the one module, and what holds `models` or `slices`, with its place."""
        given = [key for key in ("models", "slices", "modules") if data.get(key)]
        if len(given) != 1:
            told = f"`{'`, `'.join(given)}` stand together" if given else "there is nothing to merge"
            self.problem(told, (given[1],) if given else (), "Write one of `models:`, `slices:` and `modules:`.")
            return None, None, ()
        if given != ["modules"]:
            return None, data, ()
        modules = data["modules"]
        if not isinstance(modules, dict):
            self.problem("`modules` is a mapping of names to models or slices", ("modules",))
            return None, None, ()
        for name in modules:
            if name != "default" or len(modules) > 1:
                self.problem(
                    f"the module '{_cut(name)}' cannot be brought over: its tensors' names are in mergekit's own tables",
                    ("modules", name),
                    "Write a recipe with `only:`, one node for each part of the model.",
                    key=True,
                )
                return None, None, ()
        at: Keys = ("modules", "default")
        inside = modules["default"]
        if not isinstance(inside, dict) or (not inside.get("models")) is (not inside.get("slices")):
            self.problem("a module holds `models` or `slices`", at)
            return None, None, ()
        self.check_keys(inside, ("models", "slices", "parameters"), at)
        return inside.get("parameters") or {}, inside, at

    # Models and slices

    def slices(self, data: Mapping[str, Any], at: Keys, method: str) -> tuple[_Slice, ...]:
        if data.get("models"):
            at = (*at, "models")
            sources = self.sources(data["models"], at, method, sliced=False)
            return (_Slice(sources, None, {}, self.where(at)),) if sources else ()
        at = (*at, "slices")
        found = []
        if not self.is_list(data["slices"], at):
            return ()
        for index, given in enumerate(data["slices"]):
            here = (*at, index)
            if not isinstance(given, dict) or not given.get("sources"):
                self.problem("a slice is a mapping with `sources`", here)
                continue
            self.check_keys(given, ("sources", "base_model", "parameters", "residual_weight"), here)
            if given.get("residual_weight") is not None:
                self.report.note(
                    "`residual_weight` has no effect in mergekit: left out", self.where((*here, "residual_weight"))
                )
            sources = self.sources(given["sources"], (*here, "sources"), method, sliced=True)
            lengths = {source.layers[1] - source.layers[0] for source in sources if source.layers}
            if len(lengths) > 1:
                self.problem("the sources of a slice have different numbers of layers", (*here, "sources"))
            base = self.reference(given.get("base_model"), (*here, "base_model"))
            own = self.parameters(given.get("parameters"), (*here, "parameters"), method, "model")
            if sources:
                found.append(_Slice(sources, base, own, self.where(here)))
        if len(found) == len(data["slices"]) and len(found[-1].sources) > len(found[0].sources):
            self.problem(
                "the last slice has more sources than the first: mergekit then merges only some of them behind the layers",
                (*at, len(found) - 1),
                "Write the recipe by hand, to say what is meant there.",
            )
        return tuple(found)

    def sources(self, data: Any, at: Keys, method: str, *, sliced: bool) -> tuple[_Source, ...]:
        if not self.is_list(data, at):
            return ()
        known = ("model", "layer_range", "parameters") if sliced else ("model", "parameters")
        found: list[_Source] = []
        for index, given in enumerate(data):
            here = (*at, index)
            if not isinstance(given, dict):
                self.problem("an item here is a mapping with `model`", here, "Write e.g. `- model: org/name`.")
                continue
            if not sliced and "layer_range" in given:
                self.problem(
                    "mergekit ignores `layer_range` under `models`", (*here, "layer_range"), "Use `slices:`.", key=True
                )
            self.check_keys(given, (*known, "layer_range"), here)
            model = self.reference(given.get("model"), (*here, "model"))
            layers = self.layers(given.get("layer_range"), (*here, "layer_range")) if sliced else None
            own = self.parameters(given.get("parameters"), (*here, "parameters"), method, "source")
            if model is None:
                if given.get("model") is None:
                    self.problem("`model` is missing", here, "Write e.g. `model: org/name`.")
            elif any(model == other.model for other in found):
                self.problem("mergekit takes a model once in one slice", (*here, "model"), "Take one of them out.")
            elif layers is not None or not sliced:
                found.append(_Source(model, own, layers, self.where((*here, "model"))))
        return tuple(found) if len(found) == len(data) else ()

    def is_list(self, data: Any, at: Keys) -> bool:
        if not isinstance(data, list):
            self.problem(f"`{at[-1]}` is a list", at)
        elif len(data) > MOST_ITEMS:
            self.problem(f"a list of more than {MOST_ITEMS} entries cannot be brought over", at)
        return isinstance(data, list) and len(data) <= MOST_ITEMS

    def layers(self, value: Any, at: Keys) -> tuple[int, int] | None:
        """The first and the last layer of a range, whose end mergekit leaves out."""
        if not isinstance(value, list) or len(value) != 2:
            self.problem("`layer_range` is a list of two numbers", at, "Write e.g. `layer_range: [0, 16]`.")
            return None
        ends = [self.scalar(end, (*at, index), "count") for index, end in enumerate(value)]
        if ends[0] is None or ends[1] is None:
            return None
        if not 0 <= ends[0] < ends[1]:
            self.problem(f"the range {ends[0]} to {ends[1]} has no layers", at, "The end is the layer after the last.")
            return None
        return ends[0], ends[1] - 1

    def reference(self, value: Any, at: Keys) -> _Reference | None:
        if value is None:
            return None
        if isinstance(value, dict):
            self.check_keys(value, ("model", "lora", "override_architecture"), at)
            if value.get("override_architecture") is not None:
                self.problem(
                    "`override_architecture` cannot be brought over: a recipe merges the tensors that are there",
                    (*at, "override_architecture"),
                    "Take it out.",
                    key=True,
                )
            model = self.path(value.get("model"), (*at, "model"))
            lora = self.path(value["lora"], (*at, "lora")) if value.get("lora") is not None else None
            return _Reference(*model, lora) if model else None
        if not isinstance(value, str):
            self.problem("a model is a path or the name of a repository", at, "Put it in quotes.")
            return None
        parts = value.split("+")
        if len(parts) > 2 or not all(parts):
            self.problem(f"mergekit cannot read '{_cut(value)}'", at, "A model and its LoRA are joined by one '+'.")
            return None
        found = [self.path(part, at) for part in parts]
        return _Reference(*found[0], *found[1:]) if found[0] else None

    def path(self, value: Any, at: Keys) -> tuple[str, str | None] | None:
        """A path and its revision, from `path@revision` or a mapping."""
        if isinstance(value, dict):
            self.check_keys(value, ("path", "revision"), at)
            found, revision = value.get("path"), value.get("revision")
            if isinstance(revision, (int, float)) and not isinstance(revision, bool):
                revision = self.document.texts.get((*at, "revision"))
        else:
            found, revision = value, None
            if isinstance(value, str) and "@" in value:
                found, _, revision = value.partition("@")
        if not isinstance(found, str) or not found or not isinstance(revision, str | None) or "@" in (revision or ""):
            self.problem(f"mergekit cannot read the model {_shown(value)}", at, "Write a path, or path@revision.")
            return None
        return found, revision or None

    # Parameters

    def parameters(self, data: Any, at: Keys, method: str, level: Literal["source", "model"]) -> Settings:
        """The parameters that the method reads here; `source` is the level where shared ones are not looked for."""
        if data is None:
            return {}
        if not isinstance(data, dict):
            self.problem("`parameters` is a mapping of names to values", at)
            return {}
        found = {}
        for name, value in data.items():
            here = (*at, name)
            known = METHODS[method].parameters.get(name) if method else None
            if name not in PARAMETERS:
                near = did_you_mean(name, PARAMETERS)
                what = f"mergekit ignores the parameter '{_cut(name)}', which none of its methods has"
                self.problem(what, here, near or "Take it out.", key=True)
            elif known is None or not known.ours:
                if method:
                    self.report.note(f"`{name}` has no effect in {method}: left out", self.where(here, key=True))
            elif level == "source" and known.of == "shared":
                self.report.note(
                    f"mergekit does not look for `{name}` at a model of {method}: left out there",
                    self.where(here, key=True),
                )
            else:
                found[name] = self.setting(value, here, known)
        return found

    def setting(self, value: Any, at: Keys, parameter: _Parameter) -> tuple[_Rule, ...]:
        """A value, a gradient, or filters, as rules; a filter that cannot fit any name is left out."""
        if isinstance(value, list) and not self.is_list(value, at):
            return ()
        items = value if isinstance(value, list) and any(isinstance(item, dict) for item in value) else [value]
        rules = []
        for index, item in enumerate(items):
            here = (*at, index) if items is value else at
            fits = None
            if isinstance(item, dict):
                self.check_keys(item, ("value", "filter"), here)
                fits = item.get("filter")
                if fits is not None and not isinstance(fits, str):
                    self.problem("a filter is text", (*here, "filter"), "Put it in quotes.")
                    continue
                if "value" not in item:
                    self.problem("`value` is missing", here, "Write e.g. `- {filter: mlp, value: 0.5}`.")
                    continue
                item, here = item["value"], (*here, "value")
            elif items is value:
                self.problem("filters and numbers cannot stand in one list", here, "Write `- value: ...`.")
                continue
            points = item if isinstance(item, list) else [item]
            values = tuple(
                self.scalar(point, (*here, i) if points is item else here, parameter.kind)
                for i, point in enumerate(points)
            )
            where = self.where(here)
            if fits not in (None, "", "*") and re.search(r"[*{}]", fits):
                what = (
                    "a filter is a plain part of a name in mergekit, so one with '*', '{' or '}' fits nothing: left out"
                )
                self.report.note(what, where)
            elif values and None not in values:
                rules.append(_Rule(None if fits in (None, "", "*") else fits, values, where))
        return tuple(rules)

    def scalar(self, value: Any, at: Keys, kind: str) -> Any:
        """The value as mergekit takes it; None where that is a problem."""
        text = self.document.texts.get(at, "")
        if _OCTAL.fullmatch(text) and kind not in _TRUTHS:
            what = f"`{text}` is {int(text, 8)} for mergekit (YAML 1.1) and {int(text)} by YAML 1.2"
            self.problem(what, at, "Write the number that is meant, without the 0 in front.")
            return None
        if kind in _TRUTHS:
            word = value.lower() if isinstance(value, str) else str(int(value)) if value in (0, 1) else ""
            if word in (*_TRUE, *_FALSE):
                return _TRUTHS[kind][word in _TRUE]
            self.problem(f"{_shown(value)} is neither true nor false", at)
            return None
        if isinstance(value, str) and _FLOAT.fullmatch(value):
            value = float(value)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            self.problem(f"{_shown(value)} is no number", at)
            return None
        if kind == "count":
            if value != int(value):
                self.problem(f"{_shown(value)} is no whole number", at)
                return None
            return int(value)
        if kind == "share" and value > 1:
            self.report.note(f"a share of {value} is 1 in mergekit, and written so", self.where(at))
            return 1.0
        if kind == "share" and value <= 0:
            what = f"a share of {value} keeps nothing in mergekit, and a recipe asks for more than 0"
            self.problem(what, at, "Leave the model out, or give it a small share.")
            return None
        return value

    # The output

    def dtype(self, data: Mapping[str, Any], key: str) -> str | None:
        value = data.get(key)
        if not value:
            return None
        name = value.removeprefix("torch.") if isinstance(value, str) else ""
        if name not in _DTYPES:
            self.problem(f"{_shown(value)} is no dtype of a merge", (key,), f"Write one of {', '.join(_DTYPES)}.")
            return None
        if key == "dtype" and name == "float64":
            what = (
                "mergekit computes in float64 with `dtype: float64`; mergeflow does where an input is stored in float64"
            )
            self.report.note(what, self.where((key,)))
        return name

    def tokenizer(self, data: Mapping[str, Any]) -> _Reference | Literal["base"] | None:
        source, at = data.get("tokenizer_source"), ("tokenizer_source",)
        block = data.get("tokenizer")
        if block is not None:
            if source is not None:
                self.problem("`tokenizer_source` and `tokenizer` stand together", ("tokenizer",), key=True)
            if not isinstance(block, dict):
                self.problem("`tokenizer` is a mapping with `source`", ("tokenizer",))
                return None
            self.check_keys(block, ("source", "tokens", "pad_to_multiple_of"), ("tokenizer",))
            for key, what in (
                ("tokens", "choosing the embedding of single tokens"),
                ("pad_to_multiple_of", "padding the vocabulary"),
            ):
                if block.get(key):
                    fix = "Take it out: the vocabulary stays that of the models."
                    self.problem(f"{what} cannot be brought over", ("tokenizer", key), fix, key=True)
            source, at = block.get("source", "union"), ("tokenizer", "source")  # type: ignore[assignment]
        if source == "union":
            self.problem(
                "a union of tokenizers (mergekit's default for `tokenizer:`) cannot be brought over",
                at,
                "Choose one: `tokenizer_source: base`, or a model.",
            )
            return None
        return "base" if source == "base" else self.reference(source, at)


class _Builder:
    """From merges to the sections of a recipe. Nodes come in the order they need each other."""

    def __init__(self, report: _Report, path: Path, into: Path) -> None:
        self.report = report
        self.path = path
        self.into = into
        self.models: dict[str, Any] = {}
        self.nodes: dict[str, dict[str, Any]] = {}
        self.output: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}
        self.name = path.stem
        self.comments: dict[str, list[str]] = {}
        self.known: dict[Any, str] = {}
        """What is there already, by what it is: a model's path, or the content of a helping node."""
        self.taken: dict[str, int] = {}
        """The names that are taken, each with the number that the next one like it gets."""
        self.names: dict[str | None, str] = {}
        """What the node of each merge is called."""
        self.merges: dict[str, _Merge] = {}
        self.made: dict[str | None, str] = {}
        self.open: list[str | None] = []
        self.origins: dict[str, str] = {}
        """Where in the configuration a part of the recipe comes from, by its keys."""
        self.remarks: list[str] = []

    def build(self, merges: Sequence[_Merge]) -> None:
        self.merges = {merge.name: merge for merge in merges if merge.name}
        read = {
            reference.path
            for merge in merges
            for reference in _references(merge)
            if reference.path in self.merges and reference.path != merge.name
        }
        last = [merge for merge in merges if merge.name not in read]
        if not last:
            self.report.problem("each merge reads another one: they go in a circle", merges[0].where)
            return
        self.names = {merge.name: self.fresh(_identifier(merge.name or "merged")) for merge in merges}
        for merge in last:
            self.merge(merge)
        for merge in merges:
            if merge.name not in self.made and not self.report.errors:
                self.merge(merge)  # nothing leads to it but the circle that it is in, which this finds
        if self.report.errors:
            return
        if len(last) == 1:
            self.output = self.output_of(last[0])
            self.name = last[0].name or self.name
        else:
            self.outputs = {self.names[merge.name]: self.output_of(merge) for merge in last}

    def finished(self) -> Imported:
        """The text, once the recipe was checked as any other is."""
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", self.name).strip("._-")[:96]
        data: dict[str, Any] = {"recipe": 1, "name": name if re.fullmatch(RECIPE_NAME, name) else "merged"}
        data |= {"models": self.models, **({"nodes": self.nodes} if self.nodes else {})}
        data |= {"outputs": self.outputs} if self.outputs else {"output": self.output}
        try:
            Recipe(**data)
        except MergeflowError as error:
            raise_all([self.placed(one) for one in (error.errors if isinstance(error, Problems) else (error,))])
        notes = [f"{_places(where)}: {text}" for text, where in self.report.notes.items()]
        lines = [f"# Brought over from mergekit's {self.path.name} by `mergeflow import`."]
        if self.report.notes or self.remarks:
            lines.append("#")
            told = [f"{_lines(where)}: {text}" for text, where in self.report.notes.items()]
            for text in (*told, *dict.fromkeys(self.remarks)):
                lines += textwrap.wrap(text, WIDTH, initial_indent="# - ", subsequent_indent="#   ")
        lines.append("")
        lines += dump_yaml({key: value for key, value in data.items() if key in ("recipe", "name")}).splitlines()
        for key in ("models", "nodes", "outputs", "output"):
            if key not in data:
                continue
            lines.append("")
            if key == "nodes":
                lines.append("nodes:")
                for name, node in self.nodes.items():
                    lines += [f"  # {comment}" for comment in self.comments.get(name, ())]
                    lines += dump_yaml({"nodes": {name: node}}).splitlines()[1:]
            else:
                lines += dump_yaml({key: data[key]}).splitlines()
        return Imported("\n".join(lines) + "\n", tuple(notes))

    def placed(self, error: MergeflowError) -> MergeflowError:
        """A problem of the recipe at the place in the configuration that it comes from."""
        keys = error.where.removeprefix("recipe.")
        while keys and keys not in self.origins:
            keys = keys.rpartition(".")[0]
        error.where = self.origins.get(keys, str(self.path))
        return error

    # Models

    def reference(self, reference: _Reference, where: str) -> str:
        """The name of the model or node that a reference stands for."""
        if reference.path in self.merges:
            name = self.intermediate(self.merges[reference.path], where)
        else:
            name = self.model(reference.path, reference.revision, where, "path")
        if reference.lora is None:
            return name
        lora = self.model(*reference.lora, where, "adapter")
        self.remarks.append(
            "mergekit rounds a model with its LoRA to the model's dtype before it merges; here the sum stays in float32."
        )
        return self.helper(f"{name}_{lora}", {"op": "add", "base": name, "inputs": [lora]}, where)

    def intermediate(self, merge: _Merge, where: str) -> str:
        """The node of a merge that another one reads, rounded as mergekit wrote it to disk."""
        if merge.name in self.open:
            circle = " -> ".join(str(name) for name in (*self.open, merge.name))
            self.report.problem(f"the merges go in a circle: {circle}", where)
            return str(merge.name)
        return self.rounded(self.merge(merge), (merge.dtype, merge.out_dtype), where)

    def rounded(self, name: str, dtypes: Sequence[str | None], where: str) -> str:
        """The node, rounded to each of these dtypes that rounds."""
        for dtype in dict.fromkeys(dtypes):
            if dtype in _HALF:
                name = self.helper(f"{name}_{dtype}", {"op": "cast", "model": name, "to": dtype}, where)
        return name

    def model(self, path: str, revision: str | None, where: str, word: str) -> str:
        """The name of a checkpoint's entry under `models:`."""
        key = (word, path, revision)
        if key in self.known:
            return self.known[key]
        local = self.local(path)
        if local is None and not _HUB.fullmatch(path):
            self.report.problem(
                f"'{_cut(path)}' is neither a folder here nor the name of a repository",
                where,
                "Write a path that starts with ./ or /, or owner/name.",
            )
        if local is not None and revision is not None:
            self.report.note("a local folder has no revision: left out", where)
            revision = None
        name = self.known[key] = self.fresh(_identifier(posixpath.basename((local or path).rstrip("/"))), path)
        entry: Any = local or path
        if word == "adapter":
            entry = {"adapter": entry, **({"revision": revision} if revision else {})}
        elif revision is not None:
            short = _SHORT_REVISION.fullmatch(revision)
            entry = f"{entry}@{revision}" if short else {"path": entry, "revision": revision}
        self.models[name] = entry
        self.origins[f"models.{name}"] = where
        return name

    def local(self, path: str) -> str | None:
        """A local path as the recipe writes it, relative to its own folder; None for a repository."""
        if path.startswith(("/", "~")):
            return path
        beside = next((folder for folder in (Path(), self.path.parent) if (folder / path).exists()), None)
        explicit = path.startswith(("./", "../")) or path in (".", "..") or path.endswith(".safetensors")
        if beside is None and not explicit and path.count("/") < 2:
            return None
        found = os.path.relpath((beside or Path()) / path, self.into)
        return found if found.startswith("..") else f"./{found}" if found != "." else "."

    def fresh(self, name: str, path: str = "") -> str:
        """The name, or one like it that is not taken: with its owner in front, then with a number behind."""
        owner = posixpath.basename(posixpath.dirname(path.rstrip("/"))) if path else ""
        names = [name, *([_identifier(f"{owner}_{name}")] if owner.strip(".") else [])]
        found = next((one for one in names if one not in self.taken), name)
        while found in self.taken:
            self.taken[name] += 1
            found = f"{name}_{self.taken[name]}"
        self.taken[found] = 1
        return found

    def helper(self, name: str, node: dict[str, Any], where: str) -> str:
        """The name of a node; one that is there with the same content is used again."""
        key = repr(node)
        if key not in self.known:
            self.known[key] = self.fresh(name)
            self.put(self.known[key], node, where)
        return self.known[key]

    def put(self, name: str, node: dict[str, Any], where: str, places: Mapping[str, str] | None = None) -> None:
        """Add a node; `places` says where its keys come from."""
        self.nodes[name] = node
        self.origins[f"nodes.{name}"] = where
        self.origins |= {f"nodes.{name}.{keys}": place for keys, place in (places or {}).items()}

    # Merges

    def merge(self, merge: _Merge) -> str:
        """The name of the node that a merge is; made once."""
        if merge.name in self.made:
            return self.made[merge.name]
        self.open.append(merge.name)
        name = self.names[merge.name]
        if merge.slices[0].sources[0].layers is None:
            node, places = self.merged(merge, merge.slices[0], 0)
            self.put(name, node, merge.where, places)
            self.remark(name, merge)
        else:
            self.put(name, self.stacked(merge, name), merge.where)
        self.made[merge.name] = name
        self.open.pop()
        return name

    def remark(self, name: str, merge: _Merge) -> None:
        if METHODS[merge.method].draws and self.nodes[name]["op"] != "passthrough":
            self.comments[name] = [
                "Its random draws are not those of mergekit's generator: the same keep rate, other elements."
            ]

    def stacked(self, merge: _Merge, name: str) -> dict[str, Any]:
        """Slices behind one another: what each gives, and the layers that are taken of it."""
        layers = []
        start = 0
        for index, one in enumerate(merge.slices):
            first, last = self.span(one)
            node, places = self.merged(merge, one, start)
            if node["op"] == "passthrough" and "scale" not in node:
                model = str(node["model"])
            elif node["op"] == "passthrough":
                model = self.helper(f"{node['model']}_scaled", node, one.where)
            else:
                model = self.fresh("layers" if len(merge.slices) == 1 else f"{name}_slice_{index}")
                self.put(model, node, one.where, places)
                self.remark(model, merge)
            layers.append({"model": model, "take": f"{first}-{last}"})
            start += last - first + 1
        return {"op": "stack", "layers": layers}

    def span(self, one: _Slice) -> tuple[int, int]:
        """The layers of a slice as its node counts them: as the models do where all are cut alike, else from 0."""
        ranges = {source.layers for source in one.sources if source.layers}
        first, last = next(iter(ranges))
        return (first, last) if len(ranges) == 1 else (0, last - first)

    def merged(self, merge: _Merge, one: _Slice, start: int) -> tuple[dict[str, Any], dict[str, str]]:
        """The node for one slice, or for whole models, and where its keys come from.

        `start` is the slice's first layer in the output.
        """
        method = METHODS[merge.method]
        sources, base = self.inputs_of(merge, one)
        if not self.check_count(merge, method, sources, base, one):
            return _spoiled()
        span = self.span(one) if one.sources[0].layers else None
        first = sorted(sources, key=lambda source: source.model != base)
        names = {source.model: self.cut(source, span) for source in first}
        others = [source for source in sources if source.model != base]
        for source in sources:
            for word in source.parameters if source.model == base else ():
                what = f"mergekit does not look for `{word}` at the base of {merge.method}: left out there"
                self.report.note(what, source.parameters[word][0].where)
        if base is not None and not others:
            return {"op": "passthrough", "model": names[base]}, {}
        try:
            op = op_named(method.op)
        except RecipeError as error:
            self.report.problem(f"mergeflow has no op '{method.op}'", merge.where, error.fix)
            return _spoiled()
        if len(others) == 1 and op.fewest > 1 and base is None:
            return {"op": "passthrough", "model": names[others[0].model]}, {}
        node: dict[str, Any] = {"op": method.op}
        if base is not None and not method.ends:
            node["base"] = names[base]
        inputs: list[dict[str, Any]] = [{"model": names[source.model]} for source in others]
        whole: dict[str, Any] = {}
        places: dict[str, str] = {}
        outer = (one.parameters, *merge.outer)
        for word, parameter in method.parameters.items():
            if not parameter.ours:
                continue
            if parameter.of == "shared":
                rules = self.found(word, parameter, outer, one.where)
                shifted = span is not None and span[0] != start
                value = self.written(word, parameter, op, rules, span, shifted)
                if value is not None and value != _default(op, parameter):
                    whole[parameter.ours] = value
                    places[parameter.ours] = rules[0].where
            else:
                self.per_input(word, parameter, op, others, outer, span, whole, inputs)
        if whole.get("flatten", True) is True:
            whole.pop("row_wise", None)  # one vector has neither rows nor columns
        for word, parameter in method.parameters.items():
            if parameter.ours in whole and parameter.ours not in op.model_fields:
                what = f"mergeflow's {op.name} has no parameter for `{word}`"
                self.report.problem(what, places.get(parameter.ours, one.where), "Leave it at mergekit's default.")
        if op.takes == "model":
            node = {"op": method.op, **inputs[0], **whole}
        else:
            if base is not None and method.ends:
                inputs.insert(0, {"model": names[base]})
                others.insert(0, next(source for source in sources if source.model == base))
            node["inputs"] = [item["model"] if len(item) == 1 else item for item in inputs]
            node |= whole | {word: value for word, value in method.fixed.items() if word in op.model_fields}
            places |= {f"inputs.{index}": source.where for index, source in enumerate(others)}
        return node, places

    def inputs_of(self, merge: _Merge, one: _Slice) -> tuple[list[_Source], _Reference | None]:
        """All that is merged, in order, and which of it is the base."""
        method = METHODS[merge.method]
        sources = list(one.sources)
        base = one.base or merge.base
        whole = one.sources[0].layers is None
        if base is not None and whole and all(source.model != base for source in sources):
            sources.append(_Source(base, {}, None, merge.base_where))
            if method.base == "input":
                self.report.note(
                    f"mergekit takes the `base_model` of {merge.method} for one more input: so does the recipe",
                    merge.base_where,
                )
        return sources, None if method.base == "input" else base

    def check_count(
        self, merge: _Merge, method: _Method, sources: Sequence[_Source], base: _Reference | None, one: _Slice
    ) -> bool:
        if method.base == "needed" and base is None:
            self.report.problem(f"{merge.method} needs a `base_model`", one.where, "Name the model of the others.")
            return False
        if base is not None and all(source.model != base for source in sources):
            what = f"the base '{_cut(str(base))}' is not among the sources of this slice, as {merge.method} needs it"
            self.report.problem(what, one.where, "Add it to `sources`, with its `layer_range`.")
            return False
        most = method.most if method.base != "optional" or base is not None or method.most is None else method.most - 1
        fewest = method.fewest + (method.base == "optional" and base is not None)
        if len(sources) < fewest or (most is not None and len(sources) > most):
            asked = f"{fewest}" if fewest == most else f"at least {fewest}" if most is None else f"{fewest} to {most}"
            models = "model" if asked == "1" else "models"
            counted = ", the base counted" if base is not None else ""
            self.report.problem(f"{merge.method} takes {asked} {models}{counted}, not {len(sources)}", one.where)
            return False
        return True

    def cut(self, source: _Source, span: tuple[int, int] | None) -> str:
        """A model; where the sources of a slice are cut differently, the part of it that is meant, counted from 0."""
        name = self.reference(source.model, source.where)
        if span is None or source.layers == span or source.layers is None:
            return name
        first, last = source.layers
        node = {"op": "stack", "layers": [{"model": name, "take": f"{first}-{last}"}]}
        return self.helper(f"{name}_{first}_{last}", node, source.where)

    # Parameters

    def found(self, word: str, parameter: _Parameter, levels: Sequence[Settings], where: str) -> tuple[_Rule, ...]:
        """The rules that hold, from all levels up to the first rule that fits all; empty where a value is missing."""
        rules: list[_Rule] = []
        for level in levels:
            for rule in level.get(word, ()):
                rules.append(rule)
                if rule.filter is None:
                    return tuple(rules)
        if parameter.default is REQUIRED:
            what = f"`{word}` is missing" if not rules else f"`{word}` is missing where no filter fits"
            self.report.problem(what, rules[-1].where if rules else where, "mergekit has no default for it.")
            return ()
        return (*rules, _Rule(None, (parameter.default,), where))

    def per_input(
        self,
        word: str,
        parameter: _Parameter,
        op: type[Op],
        sources: Sequence[_Source],
        outer: tuple[Settings, ...],
        span: tuple[int, int] | None,
        whole: dict[str, Any],
        inputs: Sequence[dict[str, Any]],
    ) -> None:
        """A parameter that each model may give: what all share on the node, a model's own on its input."""
        ours, default = parameter.ours, _default(op, parameter)
        values = []
        for source in sources:
            levels = (source.parameters, *outer)
            rules = self.found(word, parameter, levels, source.where)
            if parameter.ours == "gamma":
                rules = self.without_outliers(rules, levels)
            shifted = source.layers is not None and span is not None and source.layers[0] != span[0]
            values.append(self.written(word, parameter, op, rules, span, shifted))
        mark = op.settings().get(ours)
        if mark is None or not mark.per_input:
            if any(value != values[0] for value in values):
                what = f"`{ours}` of {op.name} has one value for all inputs, and the models give several for `{word}`"
                self.report.problem(what, sources[0].where)
            elif values[0] is not None and values[0] != default:
                whole[ours] = values[0]
            return
        own = [word in source.parameters for source in sources]
        shared = next((value for value, is_own in zip(values, own, strict=True) if not is_own), None)
        if shared is not None and shared != default:
            whole[ours] = shared
        for value, item in zip(values, inputs, strict=True):
            if value is not None and value != whole.get(ours, default):
                item[ours] = value

    def without_outliers(self, gamma: tuple[_Rule, ...], levels: Sequence[Settings]) -> tuple[_Rule, ...]:
        """gamma of breadcrumbs, with 0 where the density is 1: mergekit then drops nothing, and we would drop outliers."""
        density = [rule for level in levels for rule in level.get("density", ())]
        end = next((index for index, rule in enumerate(density) if rule.filter is None), None)
        density = [*density, _Rule(None, (1.0,), gamma[0].where)] if end is None else density[: end + 1]
        if not any(1 in rule.values for rule in density) or all(set(rule.values) == {0} for rule in gamma):
            return gamma
        gradient = next((rule for rule in density if 1 in rule.values and set(rule.values) != {1}), None)
        if gradient is not None or (len(density) > 1 and len(gamma) > 1):
            self.report.problem(
                "mergekit drops no outliers where the density is 1, and a recipe cannot say where that is",
                (gradient or density[0]).where,
                "Keep the density below 1, give `gamma: 0`, or give `gamma` one value.",
            )
            return gamma
        if len(density) == 1:
            return (_Rule(None, (0.0,), gamma[0].where),)
        return tuple(
            _Rule(rule.filter, (0.0,) if 1 in rule.values else gamma[0].values, rule.where) for rule in density
        )

    def written(
        self,
        word: str,
        parameter: _Parameter,
        op: type[Op],
        rules: Sequence[_Rule],
        span: tuple[int, int] | None,
        shifted: bool,
    ) -> Any:
        """The rules as a recipe writes them: a value, a gradient, or a list."""
        written: list[tuple[list[str], Any]] = []
        seen = set()
        for rule in rules:
            if rule.filter in seen:
                continue
            seen.add(rule.filter)
            if rule.filter is not None and shifted and re.search(r"\d", rule.filter):
                self.report.problem(
                    f"the filter '{_cut(rule.filter)}' names a layer, and layers have other numbers in this slice",
                    rule.where,
                    "Write this merge as a recipe by hand.",
                )
            value = self.value(word, parameter, rule, span)
            pattern = [] if rule.filter is None else [f"*{rule.filter}*"]
            if pattern:
                self.remarks.append(
                    "mergekit passes over a filter that fits no tensor; here planning names the rule: take it out then."
                )
            if written and written[-1][1] == value:
                written[-1] = ([*written[-1][0], *pattern] if pattern else [], value)
            else:
                written.append((pattern, value))
        if not written:
            return None
        if len(written) == 1 and not written[0][0]:
            only = written[0][1]
            if not isinstance(only, dict) or parameter.ours in op.settings():
                return only
        if parameter.ours not in op.settings():
            if parameter.ours in op.model_fields:
                what = f"`{parameter.ours}` of {op.name} has one value for all tensors"
                self.report.problem(what, rules[0].where, f"Give `{word}` one value.")
            return None
        return [
            {"match": patterns[0] if len(patterns) == 1 else patterns, "value": value} if patterns else {"value": value}
            for patterns, value in written
        ]

    def value(self, word: str, parameter: _Parameter, rule: _Rule, span: tuple[int, int] | None) -> Any:
        """One value, or a gradient that gives each layer, and what is outside of them, what mergekit gives it."""
        values = rule.values
        if all(value == values[0] for value in values):
            return values[0]
        if parameter.kind not in ("number", "share"):
            what = f"a list of values that are no numbers chooses by layer in mergekit, and `{word}` cannot"
            self.report.problem(what, rule.where, f"Give `{word}` one value.")
            return values[0]
        if span is None:
            return {"gradient": list(values), "outside": values[0]}
        if span[0] == span[1]:
            return {"gradient": [values[-1]] * 2, "over": f"{span[0]}-{span[1]}", "outside": values[0]}
        return {"gradient": list(values), "over": f"{span[0]}-{span[1]}", "outside": values[0]}

    # The output

    def output_of(self, merge: _Merge) -> dict[str, Any]:
        """What a merge's output takes from which model, and its dtype."""
        name = self.made[merge.name]
        found: dict[str, Any] = {"node": name}
        leaf = self.leaf(name)
        base = self.leaf(self.reference(merge.base, merge.base_where)) if merge.base is not None else leaf
        if base != leaf:
            found["like"] = base
        if isinstance(merge.tokenizer, _Reference):
            tokenizer = self.leaf(self.reference(merge.tokenizer, merge.where))
            if tokenizer != base:
                found["tokenizer"] = tokenizer
        if merge.tokenizer is not None:
            self.remarks.append(
                "mergekit moves the rows of embeddings to the tokenizer's ids and cuts what it does not use; here models "
                "whose tokenizers disagree are refused, and no row is moved or cut."
            )
        if merge.out_dtype not in (None, merge.dtype):
            found["node"] = self.rounded(name, (merge.dtype,), merge.where)
        dtype = merge.out_dtype or merge.dtype
        if dtype is not None:
            found["dtype"] = dtype
        if merge.dtype in _HALF:
            self.remarks.append(
                f"mergekit rounds inputs to {merge.dtype} and computes in it or in float32; here they are merged as they "
                "are stored, in float32, and rounded once."
            )
        return found

    def leaf(self, name: str) -> str:
        """The model that a node stands on: what its output is like, if nothing else is said."""
        while name in self.nodes:
            node = self.nodes[name]
            first = node.get("base") or node.get("model") or (node.get("inputs") or node["layers"])[0]
            name = first["model"] if isinstance(first, dict) else first
        return name


def _spoiled() -> tuple[dict[str, Any], dict[str, str]]:
    """What stands for a node of which a problem was noted."""
    return {"op": "passthrough", "model": ""}, {}


def _references(merge: _Merge) -> Iterator[_Reference]:
    """All models that a merge names."""
    yield from (source.model for one in merge.slices for source in one.sources)
    yield from (one.base for one in merge.slices if one.base)
    yield from (merge.base,) if merge.base else ()
    yield from (merge.tokenizer,) if isinstance(merge.tokenizer, _Reference) else ()


def _default(op: type[Op], parameter: _Parameter) -> Any:
    """Our default of a parameter, None where it must be given; mergekit's where our op goes without the parameter."""
    info = op.model_fields.get(parameter.ours)
    if info is None:
        return parameter.default
    return None if info.is_required() else info.default


def _identifier(text: str) -> str:
    """A name for a model or node that reads like the text."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", text)[:60].strip("_-") or "model"
    return name if re.match(NAME, name) else f"m{name}"


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _shown(value: Any) -> str:
    kinds = {dict: "a mapping", list: "a list", type(None): "nothing"}
    return kinds.get(type(value)) or f"'{_cut(str(value))}'"


def _places(where: Sequence[str]) -> str:
    return where[0] if len(where) == 1 else f"{where[0]} and {len(where) - 1} more"


def _lines(where: Sequence[str]) -> str:
    numbers = list(dict.fromkeys(one.rsplit(":", 2)[-2] for one in where))
    more = ", ..." if len(numbers) > 8 else ""
    return f"line{'s' if len(numbers) > 1 else ''} {', '.join(numbers[:8])}{more}"

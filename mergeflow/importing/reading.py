"""From the documents of a configuration to merges, as mergekit understands them, or to problems with their places.

Keys and parameters that mergekit does not know are ignored there and problems here. What a stranger's file can make slow (long
lists, many problems) is bounded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mergeflow.document import Document
from mergeflow.errors import MergeflowError, RecipeError, did_you_mean
from mergeflow.importing.methods import METHODS, PARAMETERS, TRUTHS, Parameter

Keys = tuple[str | int, ...]

MOST_PROBLEMS = 100
MOST_ITEMS = 256
"""Entries of one list of a configuration: what a stranger's file makes of them grows with the square."""

HALF = ("float16", "bfloat16")
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
DTYPES = (*HALF, "float32", "float64")
_TRUE = ("true", "yes", "on", "y", "t", "1")
_FALSE = ("false", "no", "off", "n", "f", "0")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_OCTAL = re.compile(r"[-+]?0[0-7]+")


@dataclass(frozen=True, slots=True)
class Reference:
    """A model as mergekit names it; two are the same model where all of it is equal."""

    path: str
    revision: str | None = None
    lora: tuple[str, str | None] | None = None

    def __str__(self) -> str:
        parts = [(self.path, self.revision), *([self.lora] if self.lora else [])]
        return "+".join(path if revision is None else f"{path}@{revision}" for path, revision in parts)


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of a parameter: the filter (None fits all), one value or the points of a gradient, and where it stands."""

    filter: str | None
    values: tuple[Any, ...]
    where: str


Settings = Mapping[str, tuple[Rule, ...]]


@dataclass(frozen=True, slots=True)
class Source:
    """A model that goes into a slice, with its own parameters; `layers` are the first and the last, None is all."""

    model: Reference
    parameters: Settings
    layers: tuple[int, int] | None
    where: str


@dataclass(frozen=True, slots=True)
class Slice:
    """Models that are merged over their layers."""

    sources: tuple[Source, ...]
    base: Reference | None
    parameters: Settings
    where: str


@dataclass(frozen=True, slots=True)
class Merge:
    """One document: one merge. `outer` are the parameters of the module and the top, in the order they are looked at."""

    name: str | None
    method: str
    base: Reference | None
    slices: tuple[Slice, ...]
    outer: tuple[Settings, ...]
    dtype: str | None
    out_dtype: str | None
    tokenizer: Reference | Literal["base"] | None
    where: str
    base_where: str


class TooMany(Exception):
    """Enough problems were found."""


@dataclass(slots=True)
class Report:
    """What was found wrong, and what a person should know of the rest, each with its place."""

    errors: list[MergeflowError] = field(default_factory=list)
    notes: dict[str, dict[str, None]] = field(default_factory=dict)
    """The places of each note, in order."""

    def problem(self, what: str, where: str, fix: str = "") -> None:
        self.errors.append(RecipeError(what, where=where, fix=fix))
        if len(self.errors) >= MOST_PROBLEMS:
            raise TooMany

    def note(self, text: str, where: str) -> None:
        self.notes.setdefault(text, {})[where] = None


def check_names(merges: Sequence[Merge], report: Report) -> None:
    """Note merges that have one name, or none, together."""
    seen: dict[str | None, str] = {}
    for merge in merges:
        if merge.name in seen:
            what = f"a second merge is called '{merge.name}'" if merge.name else "a second merge has no `name`"
            report.problem(what, merge.where, f"The first is at {seen[merge.name]}: give each its own.")
        seen.setdefault(merge.name, merge.where)


class Reader:
    """From a document to its merge; what mergekit would not take, or a recipe cannot say, is a problem."""

    def __init__(self, document: Document, report: Report) -> None:
        self.document = document
        self.report = report

    def where(self, keys: Keys, *, key: bool = False) -> str:
        return self.document.where(keys, key)

    def problem(self, what: str, keys: Keys, fix: str = "", *, key: bool = False) -> None:
        self.report.problem(what, self.where(keys, key=key), fix)

    def merge(self) -> Merge | None:
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
        return Merge(
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
                f"mergekit ignores the key '{cut(key)}' here",
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
                f"mergekit 0.1.5 has no method '{cut(str(method))}'",
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
                    f"the module '{cut(name)}' cannot be brought over: its tensors' names are in mergekit's own tables",
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

    def slices(self, data: Mapping[str, Any], at: Keys, method: str) -> tuple[Slice, ...]:
        if data.get("models"):
            at = (*at, "models")
            sources = self.sources(data["models"], at, method, sliced=False)
            return (Slice(sources, None, {}, self.where(at)),) if sources else ()
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
                found.append(Slice(sources, base, own, self.where(here)))
        if len(found) == len(data["slices"]) and len(found[-1].sources) > len(found[0].sources):
            self.problem(
                "the last slice has more sources than the first: mergekit then merges only some of them behind the layers",
                (*at, len(found) - 1),
                "Write the recipe by hand, to say what is meant there.",
            )
        return tuple(found)

    def sources(self, data: Any, at: Keys, method: str, *, sliced: bool) -> tuple[Source, ...]:
        if not self.is_list(data, at):
            return ()
        known = ("model", "layer_range", "parameters") if sliced else ("model", "parameters")
        found: list[Source] = []
        for index, given in enumerate(data):
            here = (*at, index)
            if not isinstance(given, dict):
                self.problem("an item here is a mapping with `model`", here, "Write e.g. `- model: org/name`.")
                continue
            if not sliced and "layer_range" in given:
                self.problem(
                    "mergekit ignores `layer_range` under `models`", (*here, "layer_range"), "Use `slices:`.", key=True
                )
            self.check_keys({key: one for key, one in given.items() if key != "layer_range"}, known, here)
            model = self.reference(given.get("model"), (*here, "model"))
            layers = self.layers(given.get("layer_range"), (*here, "layer_range")) if sliced else None
            own = self.parameters(given.get("parameters"), (*here, "parameters"), method, "source")
            if model is None:
                if given.get("model") is None:
                    self.problem("`model` is missing", here, "Write e.g. `model: org/name`.")
            elif any(model == other.model for other in found):
                self.problem("mergekit takes a model once in one slice", (*here, "model"), "Take one of them out.")
            elif layers is not None or not sliced:
                found.append(Source(model, own, layers, self.where((*here, "model"))))
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

    def reference(self, value: Any, at: Keys) -> Reference | None:
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
            return Reference(*model, lora) if model else None
        if not isinstance(value, str):
            self.problem("a model is a path or the name of a repository", at, "Put it in quotes.")
            return None
        parts = value.split("+")
        if len(parts) > 2 or not all(parts):
            self.problem(f"mergekit cannot read '{cut(value)}'", at, "A model and its LoRA are joined by one '+'.")
            return None
        found = [self.path(part, at) for part in parts]
        return Reference(*found[0], *found[1:]) if found[0] else None

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
                what = f"mergekit ignores the parameter '{cut(name)}', which none of its methods has"
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

    def setting(self, value: Any, at: Keys, parameter: Parameter) -> tuple[Rule, ...]:
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
                rules.append(Rule(None if fits in (None, "", "*") else fits, values, where))
        return tuple(rules)

    def scalar(self, value: Any, at: Keys, kind: str) -> Any:
        """The value as mergekit takes it; None where that is a problem."""
        text = self.document.texts.get(at, "")
        if _OCTAL.fullmatch(text) and kind not in TRUTHS:
            what = f"`{text}` is {int(text, 8)} for mergekit (YAML 1.1) and {int(text)} by YAML 1.2"
            self.problem(what, at, "Write the number that is meant, without the 0 in front.")
            return None
        if kind in TRUTHS:
            word = value.lower() if isinstance(value, str) else str(int(value)) if value in (0, 1) else ""
            if word in (*_TRUE, *_FALSE):
                return TRUTHS[kind][word in _TRUE]
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
        if name not in DTYPES:
            self.problem(f"{_shown(value)} is no dtype of a merge", (key,), f"Write one of {', '.join(DTYPES)}.")
            return None
        if key == "dtype" and name == "float64":
            what = (
                "mergekit computes in float64 with `dtype: float64`; mergeflow does where an input is stored in float64"
            )
            self.report.note(what, self.where((key,)))
        return name

    def tokenizer(self, data: Mapping[str, Any]) -> Reference | Literal["base"] | None:
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


def cut(text: str) -> str:
    """At most 60 characters of a text of unknown length, for a message."""
    return text if len(text) <= 60 else text[:57] + "..."


def _shown(value: Any) -> str:
    kinds = {dict: "a mapping", list: "a list", type(None): "nothing"}
    return kinds.get(type(value)) or f"'{cut(str(value))}'"

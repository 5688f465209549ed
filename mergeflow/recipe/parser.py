"""From a document to the parts of a recipe, or to every problem at once with its place in the file.

The way: variables put in -> nodes written in place given names of their own -> each section checked by its pydantic
model -> references and cycles. A problem does not stop the way: what it spoils is left out, and what is left is checked.
What a stranger's file can make slow (nearest names, lines of problems, chains of nodes) is bounded here.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from pydantic import BaseModel, ValidationError

from mergeflow.document import Document
from mergeflow.errors import MergeflowError, RecipeError, did_you_mean, raise_all
from mergeflow.ops import Op, op_named
from mergeflow.ops.fuse import Fuse, Source
from mergeflow.ops.statistics import StageOp
from mergeflow.recipe.grammar import (
    NAME,
    RECIPE_NAME,
    ArtifactSource,
    DataSource,
    ExpectSection,
    ModelSource,
    OthersModel,
    OutputSection,
    node_section,
)
from mergeflow.settings import Each, fall_back

Path = tuple[str | int, ...]

DEEPEST = 200
"""Nodes that may stand on each other: what a person writes has a few, and the planner walks them by recursion."""

MOST_PROBLEMS = 100


MERGEKIT_WORDS = {
    "merge_method": "Write `op:` on a node under `nodes:`; `mergeflow import` brings a whole file over.",
    "base_model": "Write `base:` on the node, with a name from `models:`.",
    "parameters": "Parameters stand right on the node, or on one of its inputs.",
    "lambda": "Write `scale:`.",
    "filter": "Write rules: `[{match: '*.mlp.*', value: ...}, {value: ...}]`.",
    "out_dtype": "Write `dtype:` under `output:`.",
    "dtype": "Write `dtype:` under `output:`; the computing is in float32 or better.",
    "tokenizer_source": "Write `tokenizer:` under `output:`, with a name from `models:`.",
    "layer_range": "Choose layers by a pattern, e.g. `only: '*.layers.{0-15}.*'`, or stack them by `op: stack` with "
    "`take: '0-15'` (both ends included).",
    "slices": "Stack layers by `op: stack`, or choose them by `op: select` with rules.",
    "sources": "Write `inputs:` on the node.",
}

TOP = (
    "recipe",
    "name",
    "description",
    "seed",
    "vars",
    "models",
    "artifacts",
    "data",
    "nodes",
    "output",
    "outputs",
    "expect",
)
NOT_MADE = ("recipe", "name", "vars", "expect")
"""Keys that are no part of what is made, or have another form there."""


@dataclass(frozen=True, slots=True)
class Written:
    """A scalar with its text as it was written: 123 and `0123`."""

    value: Any
    text: str


@dataclass(frozen=True, slots=True)
class Input:
    """One input of a node: a model or node, and the base its delta is taken from (the node's where None).

    `keys` are what goes with the model by the op's own words: an artifact, or a node that makes one. `by_names` says that it may be
    another model's with the same tensors.
    """

    model: str
    base: str | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    by_names: bool = False
    data: str | None = None
    """What a stage runs the model on: a name from `data:`."""


@dataclass(frozen=True, slots=True)
class Node:
    """An op with its inputs. `rules` holds the patterns of `select`, in the order of `inputs`.

    `takes` holds the first and last layer that `stack` takes of each input, `rest` what gives the tensors outside the blocks.

    With `only`, the other tensors come from the node `others`, or are the mean of the inputs where that is None.
    """

    name: str
    op: Op
    inputs: tuple[Input, ...]
    base: str | None = None
    rules: tuple[tuple[str, ...] | None, ...] = ()
    takes: tuple[tuple[int, int], ...] = ()
    rest: str | None = None
    only: tuple[str, ...] | None = None
    others: str | None = None
    missing: Any = "error"
    mismatch: Any = "error"
    extra: Any = "error"
    vocab: str = "error"
    seed: int | None = None
    path: Path = ()

    @property
    def references(self) -> Iterator[str]:
        """The names of all models and nodes that this node may read."""
        for one in self.inputs:
            yield one.model
            if one.base:
                yield one.base
            yield from one.keys.values()
        if self.base:
            yield self.base
        if self.others:
            yield self.others
        if self.rest:
            yield self.rest


@dataclass(frozen=True, slots=True)
class Output:
    """One output: the node that is written and what stands beside it."""

    key: str
    node: str
    like: str | None = None
    tokenizer: str | None = None
    dtype: Any = None
    shard_size: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)
    tied: str | None = None
    non_finite: str = "error"
    path: Path = ()


@dataclass(frozen=True, slots=True)
class Parts:
    """What a recipe says, checked. `resolved` is its data with variables put in, and nothing that does not count.

    `expect` is what the result is held against, and makes nothing.
    """

    name: str
    description: str
    seed: int
    models: Mapping[str, ModelSource]
    artifacts: Mapping[str, ArtifactSource]
    data: Mapping[str, DataSource]
    nodes: Mapping[str, Node]
    outputs: Mapping[str, Output]
    resolved: Mapping[str, Any]
    expect: ExpectSection


def parse(document: Document, settings: Mapping[str, Any], default_name: str) -> Parts:
    """The parts of the recipe in a document. Raises RecipeError, or Problems with several."""
    return _Parser(document, settings, default_name).parts()


def place_in(document: Document, path: Path, key: bool = False) -> str:
    """`file:line:column` of a part of a document, or its keys where the recipe was built in Python."""
    if () in document.positions:
        return document.where(path, key=key)
    return ".".join(map(str, (document.source, *path)))


class _TooMany(Exception):
    """Enough problems were found."""


class _Parser:
    """One pass over one document; problems are collected and raised together."""

    def __init__(self, document: Document, settings: Mapping[str, Any], default_name: str) -> None:
        self.document = document
        self.settings = settings
        self.default_name = default_name
        self.errors: list[MergeflowError] = []
        self.spoiled: set[Path] = set()
        """Where a variable is missing: said once, and nothing more about the value that is not there."""
        self.pending: dict[str, tuple[dict[str, Any], Path]] = {}
        self.models: dict[str, ModelSource] = {}
        self.artifacts: dict[str, ArtifactSource] = {}
        self.sources: dict[str, DataSource] = {}
        self.nodes: dict[str, Node] = {}
        self.later: set[str] = set()
        """Nodes whose op cannot be used yet: references to them are no further problems."""

    def where(self, path: Path, key: bool = False) -> str:
        return place_in(self.document, path, key)

    def problem(self, what: str, path: Path, fix: str = "", *, key: bool = False) -> None:
        if path in self.spoiled:
            return
        self.errors.append(RecipeError(what, where=self.where(path, key), fix=fix))
        if len(self.errors) >= MOST_PROBLEMS:
            raise _TooMany

    def parts(self) -> Parts:
        try:
            parts = self.read()
        except _TooMany:
            parts = None
        raise_all(self.errors)
        assert parts is not None
        return parts

    def read(self) -> Parts | None:
        data = self.document.data
        if not isinstance(data, dict):
            self.problem("a recipe is a mapping", (), "Start with the line `recipe: 1`.")
            return None
        self.check_keys(data)
        if "merge_method" in data or "slices" in data:
            return None  # a whole file of mergekit's: its words were answered, the rest would only repeat it
        self.check_version(data)
        data = self.with_variables(data)
        self.check_kinds(data)
        name = self.name(data)
        if data.get("models") or not self.errors:
            self.read_models(data.get("models"))
        self.read_artifacts(data.get("artifacts") or {})
        self.read_data(data.get("data") or {})
        self.read_nodes(data.get("nodes") or {})
        outputs = self.outputs(data)
        expect = self.expect(data.get("expect") or {}, outputs)
        if self.errors or expect is None:
            return None
        own = {k: v for k, v in data.items() if k not in NOT_MADE and not k.startswith("x-")}
        return Parts(
            name=name,
            description=data.get("description") or "",
            seed=data.get("seed") or 0,
            models=self.models,
            artifacts=self.artifacts,
            data=self.sources,
            nodes=self.nodes,
            outputs=outputs,
            resolved={"recipe": 1, "name": name, **_escaped(own)},
            expect=expect,
        )

    # The top level

    def check_keys(self, data: Mapping[str, Any]) -> None:
        for key in data:
            if key in OutputSection.model_fields and key not in MERGEKIT_WORDS:
                self.problem(f"`{key}` stands under `output:`", (key,), f"Write `output: {{{key}: ...}}`.", key=True)
            elif key not in TOP and not key.startswith("x-"):
                self.unknown_key(key, TOP, (key,))

    def check_version(self, data: Mapping[str, Any]) -> None:
        if "recipe" not in data:
            self.problem("the version of the format is missing", (), "Start with the line `recipe: 1`.")
        elif data["recipe"] != 1 or isinstance(data["recipe"], bool):
            self.problem(
                f"this is version {_shown(data['recipe'])} of the format",
                ("recipe",),
                "This mergeflow reads `recipe: 1`.",
            )

    def check_kinds(self, data: dict[str, Any]) -> None:
        """A section of the wrong kind is a problem, and is left out."""
        for key, kind, words in (
            ("models", dict, "a mapping of names to checkpoints, e.g. {a: ./a}"),
            ("artifacts", dict, "a mapping of names to folders, e.g. {merged: ./merged}"),
            ("data", dict, "a mapping of names to files, e.g. {questions: {path: ./data.jsonl}}"),
            ("nodes", dict, "a mapping of names to ops"),
            ("output", dict, "a mapping, e.g. {dtype: bfloat16}"),
            ("outputs", dict, "a mapping of names to outputs"),
            ("expect", dict, "a mapping, e.g. {finite: true}"),
            ("description", str, "text"),
            ("seed", int, "a whole number"),
        ):
            value = data.get(key)
            if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
                self.problem(f"`{key}` cannot be {_kind(value)}", (key,), f"Write {words}.")
                data[key] = {} if kind is dict else None
        if data.get("seed") is not None and not 0 <= data["seed"] < 2**63:
            self.problem("`seed` is negative or too large", ("seed",), "It lies between 0 and 2^63 - 1.")

    def unknown_key(self, key: str, known: Sequence[str], path: Path) -> None:
        if key == "adapter":
            fix = "Write `models: {NAME: {adapter: ./folder}}`, and NAME here."
            self.problem("`adapter` stands under `models:`", path, fix, key=True)
        elif key in MERGEKIT_WORDS:
            self.problem(f"`{key}` is mergekit's word", path, MERGEKIT_WORDS[key], key=True)
        else:
            fix = _near(key, known) or f"Keys here are {', '.join(known)}."
            self.problem(f"unknown key {_shown(key)}", path, fix, key=True)

    def name(self, data: Mapping[str, Any]) -> str:
        given = data.get("name")
        name = self.default_name if given is None else given
        if not isinstance(name, str) or not re.fullmatch(RECIPE_NAME, name):
            fix = "A name has letters, digits, '.', '_' and '-', starts with a letter or digit, and has at most 96 characters."
            if given is None:
                fix = f"Add `name:` to the recipe. {fix}"
            self.problem(f"{_shown(name)} cannot be the recipe's name", ("name",), fix)
        return str(name)

    def check_name(self, name: str, path: Path) -> None:
        if not re.fullmatch(NAME, name):
            self.problem(
                f"{_shown(name)} cannot be a name",
                path,
                "Names have letters, digits, '_' and '-', and start with a letter or '_'.",
                key=True,
            )

    # Variables

    def with_variables(self, data: Mapping[str, Any]) -> dict[str, Any]:
        values = self.variables(data.get("vars"))
        return {
            key: value if key in ("vars", "recipe") or key.startswith("x-") else self.put_in(value, (key,), values)
            for key, value in data.items()
        }

    def variables(self, declared: Any) -> dict[str, Written]:
        """The value of each variable, as declared or as set."""
        if declared is None:
            declared = {}
        elif not isinstance(declared, dict):
            self.problem("`vars` is a mapping of names to values", ("vars",))
            declared = {}
        values: dict[str, Written] = {}
        for name, value in declared.items():
            self.check_name(name, ("vars", name))
            if isinstance(value, dict | list):
                self.problem(
                    f"the variable {_shown(name)} is no scalar",
                    ("vars", name),
                    "A variable is one number, word or truth value.",
                )
                value = ""
            values[name] = self.written(value, ("vars", name))
        for name, value in self.settings.items():
            if name not in declared:
                fix = _near(name, declared)
                self.errors.append(
                    RecipeError(
                        f"the recipe has no variable '{name}'",
                        where="--set",
                        fix=fix or (f"It has {', '.join(declared)}." if declared else "Declare it under `vars:`."),
                    )
                )
            values[name] = value if isinstance(value, Written) else Written(value, _text(value))
        return values

    def written(self, value: Any, path: Path) -> Written:
        """A scalar and its text as the file spells it."""
        return Written(value, value if isinstance(value, str) else self.document.texts.get(path, _text(value)))

    def put_in(self, value: Any, path: Path, values: Mapping[str, Written]) -> Any:
        """A value with variables put in, and with its text in place of a number where it is a word."""
        if isinstance(value, dict):
            return {key: self.put_in(inner, (*path, key), values) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.put_in(inner, (*path, index), values) for index, inner in enumerate(value)]
        word = _is_word(path)
        if not isinstance(value, str):
            return self.written(value, path).text if word and value is not None else value
        if "${" not in value:
            return value
        whole = re.fullmatch(r"\$\{([^{}]*)\}", value)
        if whole:
            found = self.variable(whole[1], path, values)
            return found.text if word and found.value is not None else found.value

        def piece(match: re.Match[str]) -> str:
            if match[0] == "$${":
                return "${"
            if match[1] is None:
                self.problem("a '${' is not closed", path, "Write ${name}, or $${ for the characters themselves.")
                return ""
            if not word:
                self.problem(
                    "a variable inside a longer text works only in `name`, `path` and `revision`",
                    path,
                    "Let it be the whole value.",
                )
            return self.variable(match[1], path, values).text

        return re.sub(r"\$\$\{|\$\{(?:([^{}]*)\})?", piece, value)

    def variable(self, name: str, path: Path, values: Mapping[str, Written]) -> Written:
        if name not in values:
            fix = _near(name, values) or "Declare it under `vars:`."
            self.problem(f"there is no variable {_shown(name)}", path, fix)
            self.spoiled.add(path)
            return Written("", "")
        return values[name]

    # Models

    def read_models(self, data: Any) -> None:
        if not data:
            self.problem(
                "the recipe has no `models:`", (), "Add the checkpoints to merge, e.g. `models: {a: ./a, b: ./b}`."
            )
            return
        for name, given in data.items():
            path: Path = ("models", name)
            self.check_name(name, path)
            if isinstance(given, str):
                given = {"path": given}
                self.spoiled |= {(*path, "path")} if path in self.spoiled else set()
            found = self.checked(ModelSource, given, path)
            if found is not None:
                self.check_source(found, path)
                self.check_rename(found, path)
            # A model that cannot be read is there all the same: what refers to it is no further problem.
            self.models[name] = found or ModelSource(path=".")

    def read_artifacts(self, data: Mapping[str, Any]) -> None:
        for name, given in data.items():
            path: Path = ("artifacts", name)
            self.check_name(name, path)
            if name in self.models:
                self.problem(f"{_shown(name)} is a model already", path, "Give the artifact another name.", key=True)
            found = self.checked(ArtifactSource, {"path": given} if isinstance(given, str) else given, path)
            self.artifacts[name] = found or ArtifactSource(path=".")

    def check_source(self, source: ModelSource, path: Path) -> None:
        """A model is a checkpoint or an adapter; what an adapter is needs no words."""
        if source.path is None and source.adapter is None:
            about = ModelSource.model_fields["path"].description
            self.problem("`path` is missing", path, f"Add `path:`: {about}")
        elif source.path is not None and source.adapter is not None:
            fix = "Make them two models, and put the adapter onto the other: `{op: add, base: ..., inputs: [...]}`."
            self.problem("a model has `path` or `adapter`, not both", (*path, "adapter"), fix, key=True)
        for word, why in (
            ("file", "an adapter's weights are adapter_model.safetensors"),
            ("space", "an adapter is always a delta"),
        ):
            if source.adapter is not None and getattr(source, word) is not None:
                self.problem(f"`{word}` says nothing here: {why}", (*path, word), "Leave it out.", key=True)

    def read_data(self, data: Mapping[str, Any]) -> None:
        for name, given in data.items():
            path: Path = ("data", name)
            self.check_name(name, path)
            found = self.checked(DataSource, {"path": given} if isinstance(given, str) else given, path)
            self.sources[name] = found or DataSource(path=".")

    def check_rename(self, source: ModelSource, path: Path) -> None:
        for old, new in (source.rename or {}).items():
            if old.count("*") > 1 or new.count("*") != old.count("*") or not old or not new:
                self.problem(
                    f"the rename '{old}' -> '{new}' needs the same star on both sides, at most one",
                    (*path, "rename", old),
                    "Write e.g. `rename: {'language_model.*': '*'}`.",
                )

    # Sections

    def checked(self, model: type[BaseModel], data: Any, path: Path, op: type[Op] | None = None) -> Any:
        """The section as its pydantic model, or None with its problems noted."""
        if not isinstance(data, dict):
            self.problem(f"this is a mapping, not {_kind(data)}", path)
            return None
        try:
            return model.model_validate(data)
        except ValidationError as error:
            details = error.errors(include_url=False, include_input=False)
            for detail in details:
                self.explain(detail, model, data, path, op, alone=len(details) == 1)
            return None

    def explain(
        self, detail: Any, model: type[BaseModel], data: Any, path: Path, op: type[Op] | None, *, alone: bool
    ) -> None:
        """One line for one of pydantic's errors, at the place of the value in the file."""
        inner = _inside(detail["loc"], data)
        here: Any = data
        siblings: Any = ()
        for step in inner:
            siblings, here = here, here[step]
        full, kind, last = (*path, *inner), detail["type"], detail["loc"][-1] if detail["loc"] else ""
        if kind == "extra_forbidden":
            key = str(inner[-1])
            if op is not None and len(inner) == 1 and key in ("base", "model", "inputs", "rules", "layers", "emr"):
                fix = "Leave it out." if key == "base" else f"It takes {_takes(op)}."
                self.problem(f"`{op.name}` has no `{key}`", full, fix, key=True)
            else:
                self.unknown_key(key, _keys_at(model, inner, siblings), full)
        elif kind == "missing":
            places = {"model", "inputs", "rules", "layers", "emr", "sources"}
            if op is not None and detail["loc"] == (last,) and last in places and places & data.keys():
                return  # the key that stands in its place is answered
            about = model.model_fields[last].description if detail["loc"] == (last,) else None
            self.problem(f"`{last}` is missing", full, f"Add `{last}:`{f': {about}' if about else '.'}")
        elif kind == "too_short" and not alone:
            return  # an item that failed is not counted: its own line says more
        else:
            what, fix = _expectation(detail, here, inner)
            self.problem(f"{_label(inner)} cannot be {_shown(here)}: {what}", full, fix)

    # Nodes

    def read_nodes(self, data: Mapping[str, Any]) -> None:
        for name, given in data.items():
            path: Path = ("nodes", name)
            self.check_name(name, path)
            if name in self.models or name in self.artifacts:
                self.problem(
                    f"{_shown(name)} is {'a model' if name in self.models else 'an artifact'} already",
                    path,
                    "Models, artifacts and nodes share their names: give the node another.",
                    key=True,
                )
            elif not isinstance(given, dict):
                self.problem("a node is a mapping with an `op`", path, "Write e.g. `{op: linear, inputs: [a, b]}`.")
                self.later.add(name)
            else:
                self.expand(name, given, path)
        for name, (given, path) in self.pending.items():
            node = self.node(name, given, path)
            if node is not None:
                self.nodes[name] = node
        for node in self.nodes.values():
            for reference, at in self.references(node):
                if reference in self.pending or reference in self.later:
                    continue
                if at[-1] == "emr" or at[-1] in node.op.input_keys:
                    self.check_artifact(reference, at)
                elif reference in self.artifacts:
                    fix = "Use it where an op takes an artifact, e.g. `{op: emr_apply, emr: ...}`."
                    self.problem(f"{_shown(reference)} is an artifact, and no model or node", at, fix)
                else:
                    self.check_known(reference, [*self.models, *self.pending], at, "model or node")
        self.check_cycles()

    def check_artifact(self, name: str, at: Path) -> None:
        if name in self.models:
            self.problem(f"{_shown(name)} is a model, and no artifact", at, "Name its folder under `artifacts:`.")
        elif name not in self.artifacts:
            fix = _near(name, [*self.artifacts, *self.pending]) or "Name its folder under `artifacts:`."
            self.problem(f"there is no artifact or node {_shown(name)}", at, fix)

    def check_known(self, name: str, known: Sequence[str], at: Path, what: str) -> None:
        if name in self.models or name in known or not self.models:
            return  # without any models that is the problem
        listed = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
        self.problem(f"there is no {what} {_shown(name)}", at, _near(name, known) or f"There are {listed or 'none'}.")

    def references(self, node: Node) -> Iterator[tuple[str, Path]]:
        for index, one in enumerate(node.inputs):
            single = node.op.takes in ("model", "emr") or (node.op.takes == "sources" and index == 0)
            word = "target" if node.op.takes == "sources" and single else node.op.takes
            at: Path = (*node.path, word) if single else (*node.path, word, index - (word == "sources"))
            yield one.model, at if single else (*at, "model")
            if one.base:
                yield one.base, (*at, "base")
            for key, name in one.keys.items():
                yield name, (*at, key)
        if node.base:
            yield node.base, (*node.path, "base")
        if node.others:
            yield node.others, (*node.path, "others", "model")
        if node.rest:
            yield node.rest, (*node.path, "rest", "model")

    def expand(self, name: str, given: dict[str, Any], path: Path) -> None:
        """Give each node that is written in place a name of its own, and leave that name where it stood."""

        def placed(value: Any, part: str, at: Path) -> Any:
            if isinstance(value, dict) and "op" in value:
                self.expand(f"{name}.{part}", value, at)
                return f"{name}.{part}"
            return value

        def holder(value: Any, part: str, at: Path) -> Any:
            """An item that is a name, a node in place, or a mapping with `model:`."""
            value = placed(value, part, at)
            if isinstance(value, str):
                if at in self.spoiled:
                    self.spoiled.add((*at, "model"))
                return {"model": value}
            if isinstance(value, dict):
                value = dict(value)
                for key in value:
                    value[key] = placed(value[key], part if key == "model" else f"{part}.{key}", (*at, key))
            return value

        node = dict(given)
        self.pending[name] = (node, path)
        for key, part in (("model", "0"), ("emr", "0"), ("base", "base"), ("target", "target")):
            if key in node:
                node[key] = placed(node[key], part, (*path, key))
        for key in ("inputs", "rules", "layers", "sources"):
            if isinstance(node.get(key), list):
                node[key] = [holder(item, str(i), (*path, key, i)) for i, item in enumerate(node[key])]
        for key in ("others", "rest"):
            if isinstance(node.get(key), dict):
                node[key] = holder(node[key], key, (*path, key))

    def node(self, name: str, given: dict[str, Any], path: Path) -> Node | None:
        word = given.get("op")
        if not isinstance(word, str):
            words = [key for key in given if key in MERGEKIT_WORDS]
            for key in words:
                self.unknown_key(key, (), (*path, key))
            if not words or "op" in given:
                self.problem(
                    "the node has no `op`", (*path, "op") if "op" in given else path, "Write e.g. `op: linear`."
                )
            return None
        try:
            op_class = op_named(word[:100])
        except RecipeError as error:
            self.problem(error.what, (*path, "op"), error.fix)
            return None
        section = self.checked(node_section(op_class), given, path, op_class)
        return None if section is None else self.built(name, op_class, section, path)

    def built(self, name: str, op_class: type[Op], section: Any, path: Path) -> Node | None:
        """The node of a section that fits its op's grammar."""
        single = op_class.takes in ("model", "emr")
        items = [section] if single else getattr(section, op_class.takes)
        count = len(items)
        if count < op_class.fewest or (op_class.most is not None and count > op_class.most):
            wanted = op_class.fewest if op_class.fewest == op_class.most else f"at least {op_class.fewest}"
            self.problem(
                f"`{op_class.name}` takes {wanted} inputs, not {count}", (*path, op_class.takes), f"Give it {wanted}."
            )
            return None
        rules = tuple(item.match for item in items) if op_class.takes == "rules" else ()
        if rules and (rules[-1] is not None or None in rules[:-1]):
            self.problem(
                "only the last rule has no `match`, and it must have none",
                (*path, "rules"),
                "So every tensor has a model.",
            )
            return None
        for index, item in enumerate(items):
            self.check_data(getattr(item, "data", None), path if single else (*path, op_class.takes, index))
        if op_class.takes == "sources":
            self.check_data(section.data, path)
        op = self.op(op_class, section, () if single else items, path)
        if op is None:
            return None
        only, others = getattr(section, "only", None), getattr(section, "others", None)
        if only is not None and others is None and not issubclass(op_class, StageOp):
            fix = "Say where the other tensors come from: `others: mean` or `others: {model: NAME}`."
            self.problem("`only` needs `others`", (*path, "only"), fix, key=True)
        if others is not None and only is None and not op_class.matrices_only:
            fix = "Say which tensors the op acts on by `only:`, or leave `others` out."
            self.problem("`others` needs `only`", (*path, "others"), fix, key=True)
        words = ("missing", "mismatch", "extra", "vocab", "seed")
        target = (Input(section.target, data=section.data),) if op_class.takes == "sources" else ()
        return Node(
            name=name,
            op=op,
            inputs=target
            + tuple(
                Input(
                    getattr(item, op_class.takes if single else "model"),
                    None if single else getattr(item, "base", None),
                    {key: getattr(item, key) for key in op_class.input_keys if getattr(item, key) is not None},
                    by_names=getattr(item, "for", "model") == "names",
                    data=getattr(item, "data", None),
                )
                for item in items
            ),
            base=getattr(section, "base", None),
            rules=rules,
            takes=tuple(_ends(item.take) for item in items) if op_class.takes == "layers" else (),
            rest=section.rest.model if op_class.takes == "layers" and section.rest else None,
            only=only,
            others=others.model if isinstance(others, OthersModel) else None,
            path=path,
            **{word: getattr(section, word) for word in words if hasattr(section, word)},
        )

    def check_data(self, name: str | None, at: Path) -> None:
        """What a stage runs a model on must be there."""
        if name is not None and name not in self.sources and isinstance(self.document.data.get("data") or {}, dict):
            listed = f"There are {', '.join(self.sources)}." if self.sources else "Name a file under `data:`."
            self.problem(f"there is no data {_shown(name)}", (*at, "data"), _near(name, self.sources) or listed)

    def op(self, op_class: type[Op], section: Any, items: Sequence[Any], path: Path) -> Op | None:
        """The op with its parameters: a setting that inputs give for themselves becomes one for each input."""
        fields = {name: info.default for name, info in op_class.model_fields.items()}
        fields.update({name: getattr(section, name) for name in fields if name in section.model_fields_set})
        for name, mark in op_class.settings().items():
            info = op_class.model_fields[name]
            whole = None if info.is_required() and name not in section.model_fields_set else fields[name]
            own = [getattr(item, name, None) for item in items] if mark.per_input else []
            each = [fall_back(one, whole) for one in own]
            lacking = whole is None and (
                not each or any(one is None or (isinstance(one, tuple) and one[-1].value is None) for one in each)
            )
            if lacking:
                self.problem(f"`{name}` is missing", path, f"Add `{name}:`: {info.description}")
                return None
            fields[name] = Each(each) if any(one is not None for one in own) else whole
        if op_class.takes == "sources":
            fields["sources"] = tuple(Source(**one.model_dump(exclude={"model"}, exclude_unset=True)) for one in items)
        op = op_class.model_construct(**fields)
        wrong = list(op.problems()) if isinstance(op, Fuse) else []
        for where, what, fix in wrong:
            self.problem(what, (*path, *where), fix)
        return None if wrong else op

    def check_cycles(self) -> None:
        """No node may need itself, and no chain of nodes be longer than the planner walks."""
        depth: dict[str, int] = {}
        for start in self.nodes:
            if start in depth:
                continue
            trail = {start: self.below(start)}
            while trail:
                name = next(reversed(trail))
                for reference in trail[name]:
                    if reference in trail:
                        names = list(trail)
                        circle = [*names[names.index(reference) :], reference]
                        shown = circle if len(circle) <= 8 else [*circle[:4], "...", *circle[-3:]]
                        self.problem(
                            f"the nodes go in a circle: {' -> '.join(shown)}",
                            self.nodes[name].path,
                            "A node cannot need itself.",
                            key=True,
                        )
                        return
                    if reference not in depth:
                        trail[reference] = self.below(reference)
                        break
                else:
                    del trail[name]
                    depth[name] = 1 + max((depth[reference] for reference in self.below(name)), default=0)
                    if depth[name] > DEEPEST:
                        self.problem(
                            f"more than {DEEPEST} nodes stand on each other",
                            self.nodes[name].path,
                            "Write fewer, with more inputs.",
                            key=True,
                        )
                        return

    def below(self, name: str) -> Iterator[str]:
        """The nodes that a node reads."""
        return (reference for reference in self.nodes[name].references if reference in self.nodes)

    # Outputs

    def outputs(self, data: Mapping[str, Any]) -> dict[str, Output]:
        several = data.get("outputs")
        if several is None:
            found = self.output("", data.get("output") or {}, ("output",))
            return {"": found} if found else {}
        if data.get("output") is not None:
            fix = "Move `output` into `outputs`."
            self.problem("a recipe has `output` or `outputs`, not both", ("outputs",), fix, key=True)
        elif not several:
            self.problem("`outputs` names none", ("outputs",), "Write e.g. `outputs: {a: {node: NAME}}`.")
        all_found = {}
        for key, one in several.items():
            self.check_name(key, ("outputs", key))
            found = self.output(key, {} if one is None else one, ("outputs", key))
            if found:
                all_found[key] = found
        return all_found

    def output(self, key: str, given: Any, path: Path) -> Output | None:
        if isinstance(given, dict) and isinstance(given.get("node"), dict) and "op" in given["node"]:
            self.problem("an output names its node", (*path, "node"), "Put the node under `nodes:` and its name here.")
            return None
        section = self.checked(OutputSection, given, path)
        if section is None:
            return None
        for word in ("like", "tokenizer"):
            if getattr(section, word) is not None:
                self.check_known(getattr(section, word), list(self.models), (*path, word), "model")
        if section.node is not None and section.node not in self.pending and section.node not in self.later:
            self.check_known(section.node, [*self.models, *self.pending], (*path, "node"), "model or node")
        node = section.node or self.default_node(path)
        if node is None:
            return None
        fields = {name: getattr(section, name) for name in OutputSection.model_fields}
        return Output(key=key, path=path, **{**fields, "node": node})

    def expect(self, given: Mapping[str, Any], outputs: Mapping[str, Output]) -> ExpectSection | None:
        """What the result is held against; its data and outputs must be there, and each measure has a bound."""
        found: ExpectSection | None = self.checked(ExpectSection, given, ("expect",))
        for index, one in enumerate(found.eval if found else ()):
            path: Path = ("expect", "eval", index)
            self.check_data(one.data, path)
            if one.min is None and one.max is None:
                self.problem("the measure has no bound", path, "Add `min:` or `max:`.")
            elif one.min is not None and one.max is not None and one.min > one.max:
                self.problem("no value can keep these bounds: `min` is more than `max`", path)
            if one.output is None and len(outputs) > 1:
                self.problem(
                    "which output? The recipe has several", path, f"Add `output:`, one of {', '.join(outputs)}."
                )
            elif one.output is not None and not self.errors:
                self.check_known(one.output, [key for key in outputs if key], (*path, "output"), "output")
        return found

    def default_node(self, path: Path) -> str | None:
        """The one node that no other node uses, or the one model of a recipe without nodes."""
        used = {reference for node in self.nodes.values() for reference in node.references}
        free = [name for name in self.pending if name not in used]
        if len(free) == 1:
            return free[0]
        if not self.pending and len(self.models) == 1:
            return next(iter(self.models))
        if not self.errors:
            choice = f"{', '.join(free)} are used by no other node" if free else "the recipe has no nodes"
            self.problem(f"which node is the output? {choice}", path, "Name it: `output: {node: NAME}`.")
        return None


def _is_word(path: Path) -> bool:
    """Whether the value at a path is a word whatever it looks like, and may have variables inside."""
    if path == ("name",):
        return True
    if path[0] == "data" and len(path) == 3:
        return path[2] not in ("limit", "seed")
    return path[0] in ("models", "artifacts", "data") and (
        len(path) == 2 or (len(path) == 3 and path[2] in ("path", "adapter", "revision", "subfolder", "file"))
    )


def _escaped(value: Any) -> Any:
    """Data with variables put in, so that it reads back as it is: a `${` in it is no variable."""
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    return value.replace("${", "$${") if isinstance(value, str) else value


def _text(value: Any) -> str:
    """A scalar that no file spells, as YAML would."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _near(word: str, known: Iterable[str]) -> str:
    """The nearest name, where the words are few and short enough for that to be quick."""
    names = [name for _, name in zip(range(200), known, strict=False) if len(name) <= 60]
    return did_you_mean(word, names) if len(word) <= 60 else ""


def _takes(op: type[Op]) -> str:
    return {
        "model": "one `model:`",
        "emr": "`emr:`, a node or an artifact",
        "inputs": "a list of `inputs:`",
        "rules": "`rules:`, each with a `model:`",
        "layers": "`layers:`, each with a `model:` and what to `take:`",
        "sources": "a `target:` and a list of `sources:`",
    }[op.takes]


def _ends(take: str) -> tuple[int, int]:
    """The first and last layer of a range as the grammar gives it."""
    first, last = take.split("-")
    return int(first), int(last)


def _inside(location: Sequence[Any], data: Any) -> list[str | int]:
    """The steps of pydantic's location that lead into the data: tags of unions stand there too, and may be keys as well."""
    if not location:
        return []
    step, rest = location[0], location[1:]
    skipped = _inside(rest, data)
    if not ((isinstance(data, dict) and step in data) or (isinstance(data, list) and isinstance(step, int))):
        return skipped
    taken = [step, *_inside(rest, data[step])]
    return max(taken, skipped, key=lambda steps: (steps[-1:] == [location[-1]], len(steps)))


def _keys_at(model: Any, steps: Sequence[str | int], siblings: Iterable[str]) -> list[str]:
    """The keys of the section that an unknown key stands in, which of several it shares the most `siblings` with."""

    def sections(annotation: Any) -> Iterator[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield annotation
        for inner in typing.get_args(annotation):
            yield from sections(inner)

    names = [step for step in steps if isinstance(step, str)]
    for name, after in pairwise(names):
        if name in model.model_fields:
            found = list(sections(model.model_fields[name].annotation))
            if not found:
                return []
            like = {after, *siblings}
            model = max(found, key=lambda one: len(like & one.model_fields.keys()))
    first = ("op", "base", "model", "emr", "inputs", "rules", "layers", "rest")
    return sorted(model.model_fields, key=lambda key: first.index(key) if key in first else len(first))


_KINDS = {
    "tuple_type": "it is a list",
    "float_type": "it is a number",
    "int_type": "it is a whole number",
    "string_type": "it is text",
    "bool_type": "it is true or false",
    "dict_type": "it is a mapping",
    "model_type": "it is a name or a mapping with `model:`",
    "model_attributes_type": "it is a name or a mapping with `model:`",
}


def _expectation(detail: Any, value: Any, inner: Sequence[str | int]) -> tuple[str, str]:
    """What should stand in place of a value, by pydantic's error about it, and how to write it."""
    kind = detail["type"]
    what = detail["msg"].replace("Input should be", "it should be").replace("String should", "it should")
    what = what.replace("Tuple should", "it should").removeprefix("Value error, ")
    word = inner[-1] if inner else ""
    if word in ("match", "only") and isinstance(value, dict):
        braces = "{" + ",".join(value) + "}"
        return "a pattern with braces needs quotes", f'Write `{word}: "{braces}"`.'
    if word == "rest" and isinstance(value, str):
        return "it is {model: NAME}", f"Write `rest: {{model: {value}}}`." if value else ""
    if word == "others" and isinstance(value, str):
        return "it is `mean` or {model: NAME}", f"Write `others: {{model: {value}}}`." if value else ""
    if isinstance(value, list) and value and all(isinstance(one, int | float) for one in value):
        points = ", ".join(map(str, value[:8]))
        return "a bare list is no setting", f"For values over the layers write `{{gradient: [{points}]}}`."
    if kind == "literal_error" and isinstance(value, str):
        return what, _near(value, re.findall(r"'([^']+)'", detail["msg"]))
    return _KINDS.get(kind, what), ""


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    return {dict: "a mapping", list: "a list", str: "text", bool: "a truth value"}.get(type(value), "a number")


def _label(path: Sequence[str | int]) -> str:
    words = [str(step) for step in path if isinstance(step, str)]
    return f"`{words[-1]}`" if words else "this"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    text = {True: "true", False: "false", None: "null"}[value] if value is None or isinstance(value, bool) else ""
    text = text or repr(value[:60] if isinstance(value, str | list) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""The recipe: YAML (or Python data) in, a checked `Recipe` out, or every problem at once with its place in the file.

Knows the grammar and the op classes, and no files: paths are words here. The way is: text -> data with positions
(`mergeflow.document`) -> variables put in -> nodes written in place given names of their own -> each section checked by a
pydantic model -> references and cycles. A node's model is made from its op's class, on demand, so that the grammar, the
JSON Schema (`mergeflow.schema` reads the same models) and the op cannot drift apart, and `validate` builds only what a recipe uses.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Strict,
    Tag,
    ValidationError,
    create_model,
)
from pydantic_core import PydanticCustomError

from mergeflow.document import Document, dump_yaml, read_document
from mergeflow.errors import MergeflowError, RecipeError, did_you_mean, raise_all
from mergeflow.ops import Op, op_named
from mergeflow.settings import Count, Each, FloatName, Patterns, fall_back, setting_of

Path_ = tuple[str | int, ...]

DEEPEST = 200
"""Nodes that may stand on each other: what a person writes has a few, and the planner walks them by recursion."""

NAME = r"^[A-Za-z_][A-Za-z0-9_-]*$"
RECIPE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$"

LATER = {
    "adapter": "LoRA adapters as models come with a later version of mergeflow.",
    "artifacts": "Statistics and other artifacts come with a later version of mergeflow.",
    "data": "Stages, and the data they read, come with a later version of mergeflow.",
    "expect": "Checks on the result come with a later version of mergeflow.",
}
"""Keys of the format whose time has not come: refused with a sentence, never ignored."""

LATER_OPS = ("gram", "gram_diag", "input_mean", "act_absmean", "fisher_diag", "regmean", "fisher", "fuse")

MERGEKIT_WORDS = {
    "merge_method": "Write `op:` on a node under `nodes:`.",
    "base_model": "Write `base:` on the node, with a name from `models:`.",
    "parameters": "Parameters stand right on the node, or on one of its inputs.",
    "lambda": "Write `scale:`.",
    "filter": "Write rules: `[{match: '*.mlp.*', value: ...}, {value: ...}]`.",
    "out_dtype": "Write `dtype:` under `output:`.",
    "dtype": "Write `dtype:` under `output:`; the computing is in float32 or better.",
    "tokenizer_source": "Write `tokenizer:` under `output:`, with a name from `models:`.",
    "layer_range": "Choose layers by a pattern, e.g. `only: '*.layers.{0-15}.*'` (both ends included).",
    "slices": "Choose layers by `op: select` with rules.",
    "sources": "Write `inputs:` on the node.",
}

Reference = Annotated[
    str, Strict(), Field(min_length=1, description="A name from `models:` or `nodes:`, or a node in place.")
]
Text = Annotated[str, Strict()]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


def _size(value: Any) -> Any:
    """Bytes of `5GB` (10^9) or `5GiB` (2^30)."""
    if isinstance(value, str):
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kKMGT])(i)?)?B", value.strip())
        if not found:
            raise PydanticCustomError("size", "a size is written as 5GB (10^9 bytes) or 5GiB (2^30 bytes)")
        power = " kMGT".index((found[2] or " ").replace("K", "k"))
        return int(float(found[1]) * (1024 if found[3] else 1000) ** power)
    return value


Size = Annotated[int, Strict(), Field(ge=1), BeforeValidator(_size)]


def parse_size(text: str) -> int:
    """The number of bytes of a size as recipes and options write it. Raises RecipeError."""
    try:
        return int(_size(text if not text.isdigit() else int(text)))
    except PydanticCustomError as error:
        raise RecipeError(f"'{text}' is no size: {error.message()}") from None


class ModelSource(_Section):
    """A checkpoint: a Hugging Face folder, a `.safetensors` file, or a hub repository."""

    path: Text = Field(
        min_length=1,
        description="A hub repository (owner/name), or a local path (./x, ../x, /x, ~/x, or x.safetensors).",
    )
    revision: Text | None = Field(default=None, description="A hub commit, tag or branch.")
    subfolder: Text | None = Field(default=None, description="The folder in the repository that holds the model.")
    file: Text | None = Field(
        default=None, description="The .safetensors file or index to read, where there are several."
    )
    only: Patterns | None = Field(default=None, description="Which of the checkpoint's tensors the model has.")
    rename: dict[Text, Text] | None = Field(
        default=None,
        description="New names, e.g. {'language_model.*': '*'}: a pattern with at most one star, and its replacement.",
    )
    space: Literal["weight", "delta"] | None = Field(
        default=None, description="What the tensors are; default: what the file's header says, else weight."
    )


class OthersModel(_Section):
    """The node or model that gives the tensors that `only` leaves out."""

    model: Reference


def _others_shape(value: Any) -> str:
    return "model" if isinstance(value, Mapping | OthersModel) else "mean"


Others = Annotated[
    Annotated[Literal["mean"], Tag("mean")] | Annotated[OthersModel, Tag("model")], Discriminator(_others_shape)
]


class SelectRule(_Section):
    """One rule of `select`: where it holds, and the model or node whose tensor is taken there."""

    match: Patterns | None = Field(
        default=None, description="A glob over tensor names, or a list of them; the last rule has none."
    )
    model: Reference


class _NodeSection(_Section):
    """Keys that every computing node has."""

    only: Patterns | None = Field(
        default=None, description="The op acts on these tensors; `others` says where the rest comes from."
    )
    others: Others | None = Field(
        default=None, description="The tensors that `only` leaves out: `mean` of the inputs, or {model: NODE}."
    )
    missing: setting_of(Literal["error", "base", "omit"]) = Field(  # type: ignore[valid-type]
        default="error",
        description="An input lacks a tensor: error; base (its delta is 0); omit (it is left out, weights renormalised).",
    )
    mismatch: setting_of(Literal["error", "base", "omit"]) = Field(  # type: ignore[valid-type]
        default="error", description="An input's tensor has another shape: the same words as `missing`."
    )
    extra: setting_of(Literal["error", "drop", "keep"]) = Field(  # type: ignore[valid-type]
        default="error",
        description="An input has a tensor that the node's names lack: error, drop, or keep it as it is.",
    )
    vocab: Literal["error", "ignore"] = Field(
        default="error", description="Tokenizers that give one id to different tokens: error, or ignore."
    )
    seed: Count | None = Field(
        default=None, description="Seed of this node's random draws; default: the recipe's, with the node's name."
    )


class OutputSection(_Section):
    """What is written, and how."""

    node: Reference | None = Field(
        default=None, description="The node (or model) to write; default: the one that no other node uses."
    )
    like: Text | None = Field(
        default=None,
        description="The model whose config, side files, file names and dtypes the output takes; default: the node's base or first input.",
    )
    tokenizer: Text | None = Field(
        default=None, description="The model whose tokenizer and chat template the output takes; default: like."
    )
    dtype: setting_of(FloatName) | None = Field(  # type: ignore[valid-type]
        default=None, description="Dtype of the floating tensors; default: that of `like`, tensor by tensor."
    )
    shard_size: Size | None = Field(
        default=None, description="Largest file, e.g. 5GB; default: the files that `like` has."
    )
    config: dict[str, Any] = Field(default_factory=dict, description="Keys to set in config.json.")
    card: dict[str, Any] = Field(default_factory=dict, description="Metadata of the model card: license, tags, ...")
    tied: Literal["untie", "trust_config"] | None = Field(
        default=None,
        description="Where inputs disagree on a tied head: untie writes it, trust_config follows `like`'s config.",
    )
    non_finite: Literal["error", "keep"] = Field(
        default="error", description="NaN or Inf in an input or the result: error, or keep it."
    )


@dataclass(frozen=True, slots=True)
class Input:
    """One input of a node: a model or node, and the base its delta is taken from (the node's where None)."""

    model: str
    base: str | None = None


@dataclass(frozen=True, slots=True)
class Node:
    """An op with its inputs. `inputs` of `select` stand in the order of `rules`."""

    name: str
    op: Op
    inputs: tuple[Input, ...]
    base: str | None = None
    rules: tuple[tuple[str, ...] | None, ...] = ()
    only: tuple[str, ...] | None = None
    others: str | None = None
    """`mean`, or the name of a node with a leading `@`-free name as written; None without `only`."""
    others_mean: bool = False
    missing: Any = "error"
    mismatch: Any = "error"
    extra: Any = "error"
    vocab: str = "error"
    seed: int | None = None
    path: Path_ = ()

    @property
    def references(self) -> Iterator[str]:
        """The names of all models and nodes that this node may read."""
        for one in self.inputs:
            yield one.model
            if one.base:
                yield one.base
        if self.base:
            yield self.base
        if self.others:
            yield self.others


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
    path: Path_ = ()


class Recipe:
    """A checked recipe.

    ``Recipe(models={"a": "./a", "b": "./b"}, nodes={"mean": {"op": "linear", "inputs": ["a", "b"]}})`` takes what the YAML
    file holds, as Python data (`recipe: 1` may be left out); local paths are relative to `folder`.
    Raises RecipeError, or Problems with each of several.
    """

    name: str
    description: str
    seed: int
    models: Mapping[str, ModelSource]
    nodes: Mapping[str, Node]
    outputs: Mapping[str, Output]
    resolved: Mapping[str, Any]
    """The recipe's data with variables put in: what makes the result, and what the output carries."""
    folder: Path
    """What local paths are relative to."""

    def __init__(self, *, folder: str | Path = ".", **data: Any) -> None:
        document = Document(source="recipe", data={"recipe": 1, **copy.deepcopy(data)}, positions={}, keys={}, texts={})
        _Parser(document, {}, "merge").into(self, Path(folder))

    def where(self, path: Path_, *, key: bool = False) -> str:
        """The place of a part of the recipe, as `file:line:column`, or as its keys where it has no file."""
        return self._where(path, key)

    _where: Callable[[Path_, bool], str]

    def text(self) -> str:
        """The resolved recipe as YAML."""
        return dump_yaml(self.resolved)


def load_recipe(path: str | Path, *, settings: Mapping[str, Any] | None = None) -> Recipe:
    """Read and check a recipe file; `settings` gives values to declared `vars` (`--set` on the command line).

    Raises RecipeError (or Problems) with file:line:column of each problem.
    """
    path = Path(path)
    try:
        text = path.read_bytes()
    except IsADirectoryError:
        raise RecipeError("a recipe is a file, and this is a folder", where=str(path)) from None
    except FileNotFoundError:
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        raise RecipeError(
            "there is no such recipe", where=str(path), fix=near or "Give the path of a YAML file."
        ) from None
    except OSError as error:
        raise RecipeError(f"cannot read the recipe: {error.strerror}", where=str(path)) from None
    stem = path.resolve().parent.name if path.stem in ("merge", "recipe") else path.stem
    recipe = object.__new__(Recipe)
    _Parser(read_document(text, str(path)), settings or {}, stem).into(recipe, path.parent)
    return recipe


class _Parser:
    """One pass over one document; problems are collected and raised together."""

    def __init__(self, document: Document, settings: Mapping[str, Any], default_name: str) -> None:
        self.document = document
        self.settings = settings
        self.default_name = default_name
        self.errors: list[MergeflowError] = []
        self.pending: dict[str, tuple[dict[str, Any], Path_]] = {}

    def where(self, path: Path_, key: bool = False) -> str:
        if self.document.positions:
            return self.document.where(path, key=key)
        return ".".join(map(str, (self.document.source, *path)))

    def problem(self, what: str, path: Path_, fix: str = "", *, key: bool = False) -> None:
        self.errors.append(RecipeError(what, where=self.where(path, key), fix=fix))

    def into(self, recipe: Recipe, folder: Path) -> None:
        data = self.document.data
        if not isinstance(data, dict):
            raise RecipeError("a recipe is a mapping", where=self.where(()), fix="Start with the line `recipe: 1`.")
        self.check_top(data)
        data = self.with_variables(data)
        raise_all(self.errors)
        models = self.models(data.get("models"))
        nodes = self.nodes(data.get("nodes"), models)
        outputs = self.outputs(data, models, nodes)
        raise_all(self.errors)
        recipe.name = self.name(data)
        recipe.description = data.get("description") or ""
        recipe.seed = data.get("seed", 0)
        recipe.models, recipe.nodes, recipe.outputs = models, nodes, outputs
        recipe.resolved = {
            "recipe": 1,
            "name": recipe.name,
            **{k: v for k, v in data.items() if k not in ("recipe", "name", "vars") and not k.startswith("x-")},
        }
        recipe.folder = folder
        recipe._where = self.where
        raise_all(self.errors)

    def check_top(self, data: Mapping[str, Any]) -> None:
        known = ("recipe", "name", "description", "seed", "vars", "models", "nodes", "output", "outputs")
        for key in data:
            if key in LATER:
                self.problem(f"`{key}` cannot be used yet", (key,), LATER[key], key=True)
            elif key not in known and not key.startswith("x-"):
                self.unknown_key(key, known, (key,))
        if "merge_method" in data or "slices" in data:
            return
        if "recipe" not in data:
            self.problem("the version of the format is missing", (), "Start with the line `recipe: 1`.")
        elif data["recipe"] != 1 or data["recipe"] is True:
            self.problem(
                f"this is version {data['recipe']!r} of the format", ("recipe",), "This mergeflow reads `recipe: 1`."
            )
        for key, kind, words in (
            ("vars", dict, "a mapping of names to values"),
            ("models", dict, "a mapping of names to checkpoints, e.g. {a: ./a}"),
            ("nodes", dict, "a mapping of names to ops"),
            ("output", dict, "a mapping, e.g. {dtype: bfloat16}"),
            ("outputs", dict, "a mapping of names to outputs"),
            ("description", str, "text"),
            ("seed", int, "a whole number"),
        ):
            value = data.get(key)
            if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
                self.problem(f"`{key}` is {words}", (key,))
        if isinstance(data.get("seed"), int) and not 0 <= data["seed"] < 2**63:
            self.problem("`seed` lies between 0 and 2^63 - 1", ("seed",))

    def unknown_key(self, key: str, known: Sequence[str], path: Path_) -> None:
        if key in LATER:
            self.problem(f"`{key}` cannot be used yet", path, LATER[key], key=True)
        elif key in MERGEKIT_WORDS and key not in known:
            self.problem(f"`{key}` is mergekit's word", path, MERGEKIT_WORDS[key], key=True)
        else:
            near = did_you_mean(str(key), known)
            self.problem(f"unknown key '{key}'", path, near or f"Keys here are {', '.join(known)}.", key=True)

    def name(self, data: Mapping[str, Any]) -> str:
        given = self.as_written(data.get("name"), ("name",))
        name = self.default_name if given is None else given
        if not isinstance(name, str) or not re.match(RECIPE_NAME, name):
            fix = "A name has letters, digits, '.', '_' and '-', starts with a letter or digit, and has at most 96 characters."
            if given is None:
                fix = f"Add `name:` to the recipe. {fix}"
            self.problem(f"'{name}' cannot be the recipe's name", ("name",), fix)
        return str(name)

    def as_written(self, value: Any, path: Path_) -> Any:
        """A scalar as the file spells it, where it is a word although YAML reads a number."""
        if value is None or isinstance(value, str | dict | list):
            return value
        return self.document.texts.get(path, str(value))

    # Variables

    def with_variables(self, data: dict[str, Any]) -> dict[str, Any]:
        declared = data.get("vars") or {}
        values: dict[str, Any] = {}
        if not isinstance(declared, dict):
            return data
        for name, value in declared.items():
            if not re.match(NAME, name):
                self.problem(
                    f"'{name}' cannot be a variable's name",
                    ("vars", name),
                    "Use letters, digits, '_' and '-'.",
                    key=True,
                )
            if isinstance(value, dict | list):
                self.problem(
                    f"the variable '{name}' is no scalar",
                    ("vars", name),
                    "A variable is one number, word or truth value.",
                )
            values[name] = value
        for name, value in self.settings.items():
            if name not in declared:
                near = did_you_mean(name, declared)
                self.errors.append(
                    RecipeError(
                        f"the recipe has no variable '{name}'",
                        where="--set",
                        fix=near or (f"It has {', '.join(declared)}." if declared else "Declare it under `vars:`."),
                    )
                )
            values[name] = value
        return {
            key: value if key in ("vars", "recipe") or key.startswith("x-") else self.put_in(value, (key,), values)
            for key, value in data.items()
        }

    def put_in(self, value: Any, path: Path_, values: Mapping[str, Any]) -> Any:
        if isinstance(value, dict):
            return {key: self.put_in(inner, (*path, key), values) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.put_in(inner, (*path, index), values) for index, inner in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value

        def found(name: str) -> Any:
            if name not in values:
                self.problem(
                    f"there is no variable '{name}'", path, did_you_mean(name, values) or "Declare it under `vars:`."
                )
                return ""
            return values[name]

        whole = re.fullmatch(r"\$\{([^{}]*)\}", value)
        if whole:
            return found(whole[1])

        def piece(match: re.Match[str]) -> str:
            if match[0] == "$${":
                return "${"
            if match[1] is None:
                self.problem("a '${' is not closed", path, "Write ${name}, or $${ for the characters themselves.")
                return ""
            if path[-1] not in ("name", "path", "revision") and not (len(path) == 2 and path[0] == "models"):
                self.problem(
                    "a variable inside a longer string works only in `name`, `path` and `revision`",
                    path,
                    "Let it be the whole value.",
                )
            return str(found(match[1]))

        return re.sub(r"\$\$\{|\$\{(?:([^{}]*)\})?", piece, value)

    # Models

    def models(self, data: Any) -> dict[str, ModelSource]:
        models: dict[str, ModelSource] = {}
        if data is None:
            self.problem(
                "the recipe has no `models:`", (), "Add the checkpoints to merge, e.g. `models: {a: ./a, b: ./b}`."
            )
            return models
        for name, given in data.items():
            path: Path_ = ("models", name)
            self.check_name(name, path)
            if isinstance(given, dict):
                for key in ("path", "revision", "subfolder", "file"):
                    if key in given:
                        given = {**given, key: self.as_written(given[key], (*path, key))}
                found = self.checked(ModelSource, given, path)
            else:
                found = self.checked(ModelSource, {"path": self.as_written(given, path)}, path)
            if found is not None:
                self.check_rename(found, path)
                models[name] = found
        return models

    def check_rename(self, source: ModelSource, path: Path_) -> None:
        for old, new in (source.rename or {}).items():
            if old.count("*") > 1 or new.count("*") != old.count("*"):
                self.problem(
                    f"the rename '{old}' -> '{new}' needs the same star on both sides, at most one",
                    (*path, "rename", old),
                    "Write e.g. `rename: {'language_model.*': '*'}`.",
                )

    def check_name(self, name: str, path: Path_) -> None:
        if not re.match(NAME, name):
            self.problem(
                f"'{name}' cannot be a name",
                path,
                "Names have letters, digits, '_' and '-', and start with a letter or '_'.",
                key=True,
            )

    def checked(self, model: type[BaseModel], data: Any, path: Path_) -> Any:
        """The section as its pydantic model, or None with its problems noted."""
        if not isinstance(data, dict):
            self.problem(f"this is a mapping, not {_kind(data)}", path)
            return None
        try:
            return model.model_validate(data)
        except ValidationError as error:
            self.explain(error, model, data, path)
            return None

    def explain(self, error: ValidationError, model: type[BaseModel], data: Any, path: Path_) -> None:
        details = error.errors(include_url=False)
        for detail in details:
            # Tags of unions stand in the location too; what is not in the data is left out.
            inner: list[str | int] = []
            here: Any = data
            step: Any
            kind, known = detail["type"], model
            for step in detail["loc"]:
                if (isinstance(here, dict) and step in here) or (
                    isinstance(here, list) and isinstance(step, int) and step < len(here)
                ):
                    inner.append(step)
                    here = here[step]
            full = (*path, *inner)
            if kind == "extra_forbidden":
                self.unknown_key(str(inner[-1]), _keys_at(known, inner[:-1]), full)
            elif kind == "missing":
                self.problem(f"`{detail['loc'][-1]}` is missing", full, f"Add `{detail['loc'][-1]}:`.")
            elif kind == "too_short" and len(details) > 1:
                continue  # an item that failed is not counted: its own line says more
            elif kind == "setting" or (
                kind.endswith("_type") and isinstance(here, list) and not any(isinstance(x, dict) for x in here)
            ):
                fix = "Write `{gradient: [...]}` for values over the layers." if isinstance(here, list) and here else ""
                self.problem(f"{_label(inner)} cannot be {_shown(here)}: {_sentence(detail['msg'])}", full, fix)
            else:
                fix = ""
                if kind == "literal_error" and isinstance(here, str):
                    fix = did_you_mean(here, re.findall(r"'([^']+)'", detail["msg"]))
                self.problem(f"{_label(inner)} cannot be {_shown(here)}: {_sentence(detail['msg'])}", full, fix)

    # Nodes

    def nodes(self, data: Any, models: Mapping[str, ModelSource]) -> dict[str, Node]:
        for name, given in (data or {}).items():
            path: Path_ = ("nodes", name)
            self.check_name(name, path)
            if name in models:
                self.problem(
                    f"'{name}' is a model already",
                    path,
                    "Models and nodes share their names: give the node another.",
                    key=True,
                )
            elif not isinstance(given, dict):
                self.problem("a node is a mapping with an `op`", path, "Write e.g. `{op: linear, inputs: [a, b]}`.")
            else:
                self.expand(name, given, path)
        nodes: dict[str, Node] = {}
        for name, (given, path) in self.pending.items():
            node = self.node(name, given, path)
            if node is not None:
                nodes[name] = node
        known = [*models, *self.pending]
        for node in nodes.values():
            for reference, at in self.references(node):
                if reference not in models and reference not in self.pending:
                    near = did_you_mean(reference, known)
                    self.problem(
                        f"there is no model or node '{reference}'",
                        at,
                        near or f"There are {', '.join(known) or 'none'}.",
                    )
        self.check_cycles(nodes)
        return nodes

    def references(self, node: Node) -> Iterator[tuple[str, Path_]]:
        for index, one in enumerate(node.inputs):
            key = {"model": "model", "rules": "rules"}.get(node.op.takes, "inputs")
            at: Path_ = (*node.path, key) if key == "model" else (*node.path, key, index)
            yield one.model, at if key == "model" else (*at, "model")
            if one.base:
                yield one.base, (*at, "base")
        if node.base:
            yield node.base, (*node.path, "base")
        if node.others:
            yield node.others, (*node.path, "others", "model")

    def expand(self, name: str, given: dict[str, Any], path: Path_) -> None:
        """Give each node that is written in place a name of its own, and leave that name where it stood."""

        def placed(value: Any, part: str, at: Path_) -> Any:
            if isinstance(value, dict) and "op" in value:
                self.expand(f"{name}.{part}", value, at)
                return f"{name}.{part}"
            return value

        def holder(value: Any, part: str, at: Path_) -> Any:
            """An item that is a name, a node in place, or a mapping with `model:`."""
            value = placed(value, part, at)
            if isinstance(value, str):
                return {"model": value}
            if isinstance(value, dict):
                value = dict(value)
                for key, suffix in (("model", part), ("base", f"{part}.base")):
                    if key in value:
                        value[key] = placed(value[key], suffix, (*at, key))
            return value

        node = dict(given)
        self.pending[name] = (node, path)
        for key, part in (("model", "0"), ("base", "base")):
            if key in node:
                node[key] = placed(node[key], part, (*path, key))
        for key in ("inputs", "rules"):
            if isinstance(node.get(key), list):
                node[key] = [holder(item, str(i), (*path, key, i)) for i, item in enumerate(node[key])]
        if isinstance(node.get("others"), dict):
            node["others"] = holder(node["others"], "others", (*path, "others"))

    def node(self, name: str, given: dict[str, Any], path: Path_) -> Node | None:
        word = given.get("op")
        if not isinstance(word, str):
            for key in given:
                if key in MERGEKIT_WORDS:
                    self.unknown_key(key, (), (*path, key))
            self.problem("the node has no `op`", path, "Say what it computes, e.g. `op: linear`.")
            return None
        if word in LATER_OPS:
            self.problem(
                f"the op '{word}' cannot be used yet",
                (*path, "op"),
                "Stages and statistics come with a later version of mergeflow.",
            )
            return None
        try:
            op_class = op_named(word)
        except RecipeError as error:
            self.errors.append(error.placed(self.where((*path, "op"))))
            return None
        section = self.checked(node_section(op_class), given, path)
        return None if section is None else self.built(name, op_class, section, given, path)

    def built(self, name: str, op_class: type[Op], section: Any, given: Mapping[str, Any], path: Path_) -> Node | None:
        """The node of a section that fits its op's grammar."""
        items = (
            [section.model]
            if op_class.takes == "model"
            else section.inputs
            if op_class.takes == "inputs"
            else section.rules
        )
        sections = [] if op_class.takes == "model" else list(items)
        key = "inputs" if op_class.takes == "inputs" else op_class.takes
        count = len(items)
        if count < op_class.fewest or (op_class.most is not None and count > op_class.most):
            wanted = op_class.fewest if op_class.fewest == op_class.most else f"at least {op_class.fewest}"
            self.problem(f"{op_class.name} takes {wanted} inputs, not {count}", (*path, key))
            return None
        fields: dict[str, Any] = {}
        settings = op_class.settings()
        for field_name, info in op_class.model_fields.items():
            own = getattr(section, field_name) if field_name in section.model_fields_set else None
            if field_name not in settings:
                if own is not None:
                    fields[field_name] = own
                continue
            value = own if own is not None else (None if info.is_required() else info.default)
            if settings[field_name].per_input and any(getattr(item, field_name, None) is not None for item in sections):
                each = [fall_back(getattr(item, field_name, None), value) for item in sections]
                lacking = [index for index, one in enumerate(each) if one is None]
                value = None if lacking else Each(each)
            if value is None:
                self.problem(f"`{field_name}` is missing", path, f"Add `{field_name}:`: {info.description}")
                return None
            fields[field_name] = value
        op = op_class.model_construct(**{**{n: i.default for n, i in op_class.model_fields.items()}, **fields})
        rules: tuple[tuple[str, ...] | None, ...] = ()
        if op_class.takes == "rules":
            rules = tuple(item.match for item in items)
            if rules[-1] is not None or any(rule is None for rule in rules[:-1]):
                self.problem(
                    "only the last rule has no `match`, and it must have none",
                    (*path, "rules"),
                    "So every tensor has a model.",
                )
                return None
        inputs = (
            (Input(section.model),)
            if op_class.takes == "model"
            else tuple(Input(item.model, getattr(item, "base", None)) for item in items)
        )
        only = getattr(section, "only", None)
        others = getattr(section, "others", None)
        if (only is None) != (others is None):
            what, fix = (
                (
                    "`only` needs `others`",
                    "Say where the other tensors come from: `others: mean` or `others: {model: NAME}`.",
                )
                if others is None
                else ("`others` needs `only`", "Say which tensors the op acts on by `only:`, or leave `others` out.")
            )
            self.problem(what, (*path, "only" if others is None else "others"), fix, key=True)
        return Node(
            name=name,
            op=op,
            inputs=inputs,
            base=getattr(section, "base", None),
            rules=rules,
            only=only,
            others=others.model if isinstance(others, OthersModel) else None,
            others_mean=others == "mean",
            missing=getattr(section, "missing", "error"),
            mismatch=getattr(section, "mismatch", "error"),
            extra=getattr(section, "extra", "error"),
            vocab=getattr(section, "vocab", "error"),
            seed=getattr(section, "seed", None),
            path=path,
        )

    def check_cycles(self, nodes: Mapping[str, Node]) -> None:
        """No node may need itself, and no chain of nodes be longer than the planner walks."""
        depth: dict[str, int] = {}
        for start in nodes:
            trail = [start]
            walks = [iter(nodes[start].references)]
            while trail and start not in depth:
                for reference in walks[-1]:
                    if reference in trail:
                        circle = " -> ".join([*trail[trail.index(reference) :], reference])
                        self.problem(
                            f"the nodes go in a circle: {circle}",
                            nodes[trail[-1]].path,
                            "A node cannot need itself.",
                            key=True,
                        )
                        return
                    if reference in nodes and reference not in depth:
                        trail.append(reference)
                        walks.append(iter(nodes[reference].references))
                        break
                else:
                    name = trail.pop()
                    walks.pop()
                    depth[name] = 1 + max((depth.get(reference, 0) for reference in nodes[name].references), default=0)
            if depth[start] > DEEPEST:
                self.problem(
                    f"more than {DEEPEST} nodes stand on each other",
                    nodes[start].path,
                    "Write fewer, with more inputs.",
                    key=True,
                )
                return

    # Outputs

    def outputs(
        self, data: Mapping[str, Any], models: Mapping[str, ModelSource], nodes: Mapping[str, Node]
    ) -> dict[str, Output]:
        if data.get("output") is not None and data.get("outputs") is not None:
            self.problem(
                "a recipe has `output` or `outputs`, not both", ("outputs",), "Move `output` into `outputs`.", key=True
            )
            return {}
        given = data.get("outputs")
        if given is None:
            found = self.output("", data.get("output") or {}, ("output",), models, nodes)
            return {"": found} if found else {}
        found_all = {}
        for key, one in given.items():
            self.check_name(key, ("outputs", key))
            found = self.output(key, one if one is not None else {}, ("outputs", key), models, nodes)
            if found:
                found_all[key] = found
        if not given:
            self.problem("`outputs` names none", ("outputs",))
        return found_all

    def output(
        self, key: str, given: Any, path: Path_, models: Mapping[str, ModelSource], nodes: Mapping[str, Node]
    ) -> Output | None:
        if isinstance(given, dict) and isinstance(given.get("node"), dict):
            self.problem("an output names its node", (*path, "node"), "Put the node under `nodes:` and its name here.")
            return None
        section = self.checked(OutputSection, given, path)
        if section is None:
            return None
        for field_name, choice in (("like", models), ("tokenizer", models), ("node", {**models, **self.pending})):
            name = getattr(section, field_name)
            if name is not None and name not in choice:
                what = "model or node" if field_name == "node" else "model"
                near = did_you_mean(name, choice)
                self.problem(
                    f"there is no {what} '{name}'",
                    (*path, field_name),
                    near or f"There are {', '.join(choice) or 'none'}.",
                )
        node = section.node or self.default_node(path, models, nodes)
        if node is None:
            return None
        return Output(
            key=key, path=path, **{**{n: getattr(section, n) for n in OutputSection.model_fields}, "node": node}
        )

    def default_node(self, path: Path_, models: Mapping[str, ModelSource], nodes: Mapping[str, Node]) -> str | None:
        used = {reference for node in nodes.values() for reference in node.references}
        free = [name for name in self.pending if name not in used]
        if len(free) == 1:
            return free[0]
        if not self.pending and len(models) == 1:
            return next(iter(models))
        if not self.errors:
            choice = f"{', '.join(free)} are used by no other node" if free else "the recipe has no nodes"
            self.problem(f"which node is the output? {choice}", path, "Name it: `output: {node: NAME}`.")
        return None


@lru_cache(maxsize=256)
def input_section(op_class: type[Op]) -> type[BaseModel]:
    """The grammar of one input of an op: the model, its own base, and the parameters an input may give for itself."""
    fields: dict[str, Any] = {"model": (Reference, Field())}
    if op_class.needs_base:
        fields["base"] = (
            Reference | None,
            Field(default=None, description="What this input's delta is taken from; default: the node's base."),
        )
    for name, mark in op_class.settings().items():
        if mark.per_input:
            info = op_class.model_fields[name]
            fields[name] = (setting_of(mark.kind, open_ended=True), Field(default=None, description=info.description))
    return create_model(
        f"{op_class.__name__}Input", __base__=_Section, __doc__=f"One input of {op_class.name}.", **fields
    )


@lru_cache(maxsize=256)
def node_section(op_class: type[Op]) -> type[BaseModel]:
    """The grammar of a node with this op, made from the op's class."""
    word: Any = Literal[op_class.name]
    fields: dict[str, Any] = {"op": (word, Field(description=_summary(op_class)))}
    if op_class.takes == "model":
        fields["model"] = (Reference, Field())
    elif op_class.takes == "inputs":
        item: Any = input_section(op_class)
        fields["inputs"] = (
            tuple[item, ...],
            Field(min_length=1, description="What the op works on, in order."),
        )
    else:
        fields["rules"] = (
            tuple[SelectRule, ...],
            Field(min_length=1, description="Tried in order; the last has no `match`."),
        )
    if op_class.needs_base:
        fields["base"] = (Reference, Field(description="The model that the others were trained from."))
    settings = op_class.settings()
    for name, info in op_class.model_fields.items():
        if name in settings:
            optional = settings[name].per_input or not info.is_required()
            default = (None if info.is_required() else info.default) if optional else ...
            fields[name] = (setting_of(settings[name].kind), Field(default=default, description=info.description))
        else:
            fields[name] = (info.annotation, info)
    base = _Section if op_class.takes == "rules" else _NodeSection
    return create_model(f"{op_class.__name__}Node", __base__=base, __doc__=_summary(op_class), **fields)


def _summary(op_class: type[Op]) -> str:
    return (op_class.__doc__ or "").strip().split("\n")[0]


def _keys_at(model: Any, steps: Sequence[str | int]) -> list[str]:
    """The keys of the section at this place below a model, as far as they can be told from its fields."""
    import typing

    def sections(annotation: Any) -> Iterator[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield annotation
        for inner in typing.get_args(annotation):
            yield from sections(inner)

    for step in steps:
        if isinstance(step, str) and step in model.model_fields:
            found = list(sections(model.model_fields[step].annotation))
            if not found:
                return []
            model = found[0]
    return list(model.model_fields)


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    return {dict: "a mapping", list: "a list", str: "text", bool: "a truth value"}.get(type(value), "a number")


def _label(path: Sequence[str | int]) -> str:
    words = [str(step) for step in path if isinstance(step, str)]
    return f"`{words[-1]}`" if words else "this"


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, dict) else "a mapping"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _sentence(message: str) -> str:
    return (
        message.replace("Input should be", "it should be")
        .replace("String should", "it should")
        .removeprefix("Value error, ")
    )


__all__ = ["Input", "ModelSource", "Node", "Output", "Recipe", "load_recipe", "parse_size"]

"""The recipe: YAML (or Python data) in, a checked `Recipe` out, or every problem at once with its place in the file.

Knows the grammar (`grammar.py`: a pydantic model for each section) and how a document becomes a recipe (`parser.py`), and no
files but the recipe's own: paths are words here. Nothing in it needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergeflow.document import MAX_DEPTH, Document, dump_yaml, read_document
from mergeflow.errors import RecipeError, did_you_mean
from mergeflow.recipe.grammar import (
    NAME,
    RECIPE_NAME,
    ArtifactSource,
    DataSource,
    ExpectSection,
    ModelSource,
    OthersModel,
    OutputSection,
    SelectRule,
    StackRest,
    input_section,
    node_section,
    parse_size,
)
from mergeflow.recipe.parser import Input, Node, Output, Parts, Written, parse, place_in

__all__ = [
    "NAME",
    "RECIPE_NAME",
    "ArtifactSource",
    "DataSource",
    "ExpectSection",
    "Input",
    "ModelSource",
    "Node",
    "OthersModel",
    "Output",
    "OutputSection",
    "Recipe",
    "SelectRule",
    "StackRest",
    "input_section",
    "load_recipe",
    "node_section",
    "parse_size",
    "read_settings",
]


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
    artifacts: Mapping[str, ArtifactSource]
    data: Mapping[str, DataSource]
    nodes: Mapping[str, Node]
    """All nodes by name, those written in place too (`parent.0`, `parent.base`)."""
    outputs: Mapping[str, Output]
    """By key; one `output:` has the key ''."""
    resolved: Mapping[str, Any]
    """The recipe's data with variables put in: what makes the result, and what the output carries."""
    expect: ExpectSection
    """What `mergeflow check` holds the result against; it is no part of what is made."""
    folder: Path
    """What local paths are relative to."""

    def __init__(self, *, folder: str | Path = ".", **data: Any) -> None:
        document = Document("recipe", {"recipe": 1, **_plain(data)}, positions={}, keys={}, texts={})
        self._set(document, parse(document, {}, "merge"), Path(folder))

    def _set(self, document: Document, parts: Parts, folder: Path) -> None:
        self._document, self.folder = document, folder
        self.name, self.description, self.seed = parts.name, parts.description, parts.seed
        self.models, self.artifacts, self.data = parts.models, parts.artifacts, parts.data
        self.nodes, self.outputs = parts.nodes, parts.outputs
        self.resolved, self.expect = parts.resolved, parts.expect

    def __repr__(self) -> str:
        return f"Recipe(name={self.name!r}, models={list(self.models)}, nodes={list(self.nodes)}, outputs={list(self.outputs)})"

    def where(self, path: tuple[str | int, ...], *, key: bool = False) -> str:
        """The place of a part of the recipe, as `file:line:column`, or as its keys where it has no file."""
        return place_in(self._document, path, key)

    def with_made(self, sources: Mapping[str, ArtifactSource | ModelSource]) -> Recipe:
        """The same recipe with artifacts or models in the place of these nodes; what it says of itself stays as it was."""
        found = object.__new__(Recipe)
        found.__dict__.update(self.__dict__)
        found.models = {**self.models, **{n: one for n, one in sources.items() if isinstance(one, ModelSource)}}
        found.artifacts = {
            **self.artifacts,
            **{n: one for n, one in sources.items() if isinstance(one, ArtifactSource)},
        }
        found.nodes = {name: node for name, node in self.nodes.items() if name not in sources}
        return found

    def giving(self, node: str) -> Recipe:
        """The same recipe with this node as its only output."""
        found = object.__new__(Recipe)
        found.__dict__.update(self.__dict__)
        found.outputs = {"": Output(key="", node=node, path=("nodes", node.partition(".")[0]))}
        return found

    def text(self) -> str:
        """The resolved recipe as YAML."""
        return dump_yaml(self.resolved)


def load_recipe(path: str | Path, *, settings: Mapping[str, Any] | None = None) -> Recipe:
    """Read and check a recipe file; `settings` gives values to declared `vars` (`--set`, see `read_settings`).

    Raises RecipeError (or Problems) with file:line:column of each problem.
    """
    path = Path(path)
    try:
        text = path.read_bytes()
    except IsADirectoryError:
        files = sorted(str(path / found.name) for found in path.glob("*.y*ml"))
        fix = f"Give the file itself: {', '.join(files[:5])}." if files else "Give the path of a YAML file."
        raise RecipeError("a recipe is a file, and this is a folder", where=str(path), fix=fix) from None
    except FileNotFoundError:
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        raise RecipeError(
            "there is no such recipe", where=str(path), fix=near or "Give the path of a YAML file."
        ) from None
    except OSError as error:
        raise RecipeError(f"cannot read the recipe: {error.strerror}", where=str(path)) from None
    stem = path.resolve().parent.name if path.stem in ("merge", "recipe") else path.stem
    document = read_document(text, str(path))
    recipe = object.__new__(Recipe)
    recipe._set(document, parse(document, settings or {}, stem), path.parent)
    return recipe


def read_settings(words: Sequence[str]) -> dict[str, Any]:
    """What `load_recipe` takes as `settings`, from words such as `weight=0.4` on the command line.

    A value is a YAML scalar, and keeps its text: `rev=0123` stays so as a revision. Raises RecipeError.
    """
    settings: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise RecipeError(f"'{word}' has no value", where="--set", fix="Write --set name=value.")
        document = read_document(text, f"--set {name}")
        if isinstance(document.data, dict | list):
            raise RecipeError(
                f"'{text}' is no scalar", where=f"--set {name}", fix="Give one number, word or truth value."
            )
        written = document.data if isinstance(document.data, str) else document.texts.get((), text)
        settings[name] = Written(document.data, written)
    return settings


def _plain(value: Any, depth: int = 0) -> Any:
    """Python data as a document holds it: dict, list and scalars, no part of it shared."""
    if depth > MAX_DEPTH:
        raise RecipeError(f"lists and mappings are nested more than {MAX_DEPTH} deep", where="recipe")
    if isinstance(value, Mapping):
        wrong = next((key for key in value if not isinstance(key, str)), None)
        if wrong is not None:
            raise RecipeError(f"a key is text, not {wrong!r}", where="recipe")
        return {key: _plain(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, depth + 1) for inner in value]
    if isinstance(value, Path):
        return str(value)
    if value is not None and not isinstance(value, str | int | float):
        raise RecipeError(f"a recipe holds no {type(value).__name__}", where="recipe", fix="Use plain data.")
    return value

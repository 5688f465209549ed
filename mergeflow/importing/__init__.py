"""A mergekit YAML becomes a recipe that gives the same numbers, or every reason why it cannot, with its line.

The way: documents read with their positions -> merges (`Merge`: what mergekit would understand) -> nodes of a recipe,
checked like any recipe -> its text, with what was done differently as comments. Models need not be there.
What mergekit 0.1.5 does and a recipe says otherwise is written out:

- A parameter is looked for at the source, the slice, the module and the top, each a value, a gradient or filters; filters
  that fit nowhere fall through to the next. Here that is one list of rules, and mergekit's default ends it where ours differs.
- A filter is a plain substring: `mlp` becomes `*mlp*`, `layers.1` becomes `*layers.1*` (which takes layer 10 too, as there).
  mergekit passes over a filter that fits no tensor. Where the model is on this machine its headers tell, and the filter is
  left out and noted; else the rule is written, and planning names it, since a typo looks the same. Filters of one value
  stand in one list, of which one needs to fit.
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

from contextlib import suppress
from pathlib import Path

from mergeflow.document import read_documents
from mergeflow.errors import MachineError, RecipeError, did_you_mean, raise_all
from mergeflow.importing.building import Builder, Imported
from mergeflow.importing.reading import Reader, Report, TooMany, check_names

__all__ = ["Imported", "import_config", "write_recipe"]


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
    report = Report()
    documents = read_documents(text, str(path))
    if not documents:
        raise RecipeError("the file is empty", where=str(path), fix="Give a mergekit YAML.")
    builder = Builder(report, path, Path(into) if into is not None else Path())
    with suppress(TooMany):
        merges = [merge for document in documents if (merge := Reader(document, report).merge()) is not None]
        check_names(merges, report)
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

"""mergeflow's own commands from a script: the same words as on the command line, without a process for each."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path


def command(*words: str) -> str:
    """What `mergeflow WORDS...` prints."""
    from mergeflow.cli import commands

    with contextlib.redirect_stdout(io.StringIO()) as told:
        commands.main(list(words), prog_name="mergeflow", standalone_mode=False)
    return told.getvalue()


def accuracies(model: Path, files: Sequence[Path], *options: str) -> list[float]:
    """`mergeflow eval`: how much a classifier gets right of the rows of each file."""
    return measures("accuracy", model, files, *options)


def measures(name: str, model: Path, files: Sequence[Path], *options: str) -> list[float]:
    """`mergeflow eval`: one of its measures of a model on each file."""
    data = [word for file in files for word in ("--data", str(file))]
    told = json.loads(command("eval", str(model), *data, *options, "--json", "-q"))
    return [one[name] for one in told["results"]]

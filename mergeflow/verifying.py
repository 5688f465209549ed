"""A written output held against its own manifest, and on request against its own recipe.

Every byte of every file is read (`mergeflow.manifest`): a changed byte, a missing file, a file that is too long are problems, and
files that somebody added are noted. A replay draws some tensors and makes them again from the recipe inside the output, out of the
inputs that the manifest names, and compares bits: the folder is then not only what was written, but what the recipe makes. Inputs that
changed since are an error and no failed check, since nothing can be said of the output then. Nothing is written here.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeflow import pipeline
from mergeflow.errors import InputError, MergeflowError, RecipeError, printable, raise_all
from mergeflow.manifest import MANIFEST, Manifest, Problem, check_folder, files_below, software
from mergeflow.pipeline import Progress
from mergeflow.publishing import RECIPE
from mergeflow.recipe import load_recipe

if TYPE_CHECKING:
    from mergeflow.executing import Reading

SHOWN = 20
"""Problems and notes that a person is shown before it says how many more there are."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What was looked at and what is wrong: files, tensors and bytes that were read, problems, and what is worth a note.

    `outputs` are the keys of the outputs that were found (one empty key for an only one); `replayed` the tensors that were made again.
    """

    path: Path
    outputs: tuple[str, ...]
    files: int
    tensors: int
    size: int
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    replayed: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every byte is as it was written, and every tensor that was made again came out the same."""
        return not self.problems


def verify(
    out: str | Path,
    *,
    replay: int = 0,
    seed: int = 0,
    device: str = "cpu",
    threads: int | None = None,
    memory: int | None = None,
    reading: Reading = "auto",
    allow_pickle: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Verification:
    """Hold an output folder against its manifest: a merge, several of one recipe (`OUT/<key>/`), an adapter, statistics.

    With `replay` so many tensors, drawn by `seed`, are made again from the recipe inside the output; `device`, `threads`, `memory`
    (bytes), `reading` and `allow_pickle` say how, as in `run`. Raises InputError for a folder that is no output, and for inputs of a
    replay that are missing or have changed; RecipeError for a replay of an output that has no recipe.
    """
    target = Path(out)
    folders = _folders(target)
    told: dict[str, Manifest] = {}
    problems: list[Problem] = []
    extra: list[str] = []
    files = tensors = size = 0
    for key in sorted(folders):
        if not os.path.lexists(target / key / MANIFEST):
            problems.append(
                Problem(_below(key, MANIFEST), "is missing, and the recipe of the others makes this output too")
            )
            continue
        found = check_folder(
            target / key,
            _below_path(str(out), key),
            threads=threads,
            progress=lambda done, total: progress("read", done, total),
        )
        problems += [replace(one, file=_below(key, one.file)) for one in found.problems]
        extra += [_below(key, name) for name in found.extra]
        size += found.size
        if found.manifest is not None:
            told[key] = found.manifest
            files += 1 + len(found.manifest.shards) + len(found.manifest.files) + len(found.manifest.retold)
            tensors += len(found.manifest.tensors)
            if key and found.manifest.output not in ("", key):
                problems.append(Problem(_below(key, MANIFEST), f"is that of the output '{found.manifest.output}'"))
    if "" not in folders:
        extra += [name for name in files_below(target) if name.partition("/")[0] not in folders]
    notes = [f"{name}: was added, and is not mergeflow's" for name in sorted(extra)]
    replayed: list[str] = []
    if replay and problems:
        notes.append("nothing was made again, since the output is not as it was written")
    elif replay:
        how = {
            "device": device,
            "threads": threads,
            "memory": memory,
            "reading": reading,
            "allow_pickle": allow_pickle,
            "progress": progress,
        }
        drawn = _drawn(told, replay, seed)
        for key, names in drawn.items():
            wrong = _replayed(target, key, told[key], names, how)
            problems += wrong
            replayed += [_below(key, name) for name in names]
            if wrong:
                notes += _other_software(told[key])
    return Verification(
        target,
        tuple(sorted(folders)),
        files,
        tensors,
        size,
        tuple(problems),
        tuple(dict.fromkeys(notes)),
        tuple(replayed),
    )


def _folders(target: Path) -> set[str]:
    """The keys of the outputs below a folder: the empty one for an output itself. Raises InputError where there is none."""
    if os.path.lexists(target / MANIFEST):
        return {""}
    try:
        keys = {entry.name for entry in os.scandir(target) if os.path.lexists(os.path.join(entry.path, MANIFEST))}
    except FileNotFoundError:
        raise InputError("no such folder", where=str(target)) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(target)) from None
    if not keys:
        raise InputError(
            f"is no output of mergeflow: it has no {MANIFEST}",
            where=str(target),
            fix="Name the folder that a run wrote.",
        )
    return keys | {key for found in keys for key in _siblings(target / found) if key}


def _siblings(folder: Path) -> tuple[str, ...]:
    """The keys of all outputs of the recipe that made one; none where its manifest cannot say so."""
    try:
        told = json.loads((folder / MANIFEST).read_bytes())["outputs"]
        return tuple(key for key in told if isinstance(key, str) and "/" not in key and key not in (".", ".."))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ()


def _below(key: str, name: str) -> str:
    return f"{key}/{name}" if key else name


def _below_path(path: str, key: str) -> str:
    return f"{path.rstrip('/')}/{key}" if key else path


# Replay


def _drawn(told: Mapping[str, Manifest], count: int, seed: int) -> dict[str, list[str]]:
    """`count` tensors of all outputs, or all where there are fewer, by output."""
    names = [(key, name) for key in sorted(told) for name in sorted(told[key].tensors)]
    found: dict[str, list[str]] = {}
    for key, name in sorted(random.Random(seed).sample(names, min(count, len(names)))):
        found.setdefault(key, []).append(name)
    return found


def _replayed(target: Path, key: str, told: Manifest, names: list[str], how: dict[str, Any]) -> list[Problem]:
    """Those of an output's tensors that come out otherwise when they are made again."""
    if RECIPE not in told.retold:
        raise RecipeError(
            f"has no {RECIPE}, so nothing of it can be made again", where=str(target / key), fix="Leave out --replay."
        )
    recipe = load_recipe(target / key / RECIPE)
    sources = {*recipe.models, *recipe.artifacts}

    def accept(inputs: Mapping[str, Any]) -> None:
        raise_all(list(_changed(told.inputs, inputs, sources)))

    made = pipeline.recompute(recipe, {(told.output, name) for name in names}, accept, **how)
    problems = []
    for name in names:
        digest = made.get((told.output, name))
        if digest != told.tensors[name].digest:
            what = "is not made by the recipe" if digest is None else "comes out otherwise when it is made again"
            problems.append(Problem(_below(key, told.tensors[name].file), what, name))
    return problems


def _changed(told: Mapping[str, Any], found: Mapping[str, Any], sources: set[str]) -> Iterator[MergeflowError]:
    """An error for each input that is not what the output was made of; what stages made is no input."""
    for name in sorted(sources & told.keys() & found.keys()):
        before, now = told[name], found[name]
        if what := _difference(name, before, now):
            yield InputError(
                what, where=str(now["source"]), fix="Bring back what the output was made of, or leave out --replay."
            )


def _difference(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How an input is another one than it was, in words; empty where it is not."""
    if before["revision"] != now["revision"]:
        return f"the input '{name}' is at revision {now['revision']}, and the output was made of {before['revision']}"
    for file in sorted({*before["files"], *now["files"]}):
        old, new = before["files"].get(file), now["files"].get(file)
        if old != new:
            how = "is gone" if new is None else "is new" if old is None else "has changed"
            return f"{file} of the input '{name}' {how} since the output was made"
    for tensor, digest in sorted(now["tensors"].items()):
        if before["tensors"].get(tensor, digest) != digest:
            return f"tensor '{tensor}' of the input '{name}' has changed since the output was made"
    return ""


def _other_software(told: Manifest) -> Iterator[str]:
    for name, version in sorted(software().items()):
        if told.software.get(name, version) != version:
            yield f"{name} was {told.software[name]}, is {version}: other software may give other bits"


# Words


def verification_data(found: Verification) -> dict[str, Any]:
    """JSON-ready."""
    return {
        "path": str(found.path),
        "passed": found.passed,
        "outputs": list(found.outputs),
        "files": found.files,
        "tensors": found.tensors,
        "bytes": found.size,
        "problems": [{"file": one.file, "tensor": one.tensor or None, "what": one.what} for one in found.problems],
        "notes": list(found.notes),
        "replayed": list(found.replayed),
    }


def verification_text(found: Verification) -> str:
    """For a person: the verdict, then what is wrong, then notes."""
    wrong = len(found.problems)
    verdict = "good" if found.passed else f"FAILED, {wrong} {'problem' if wrong == 1 else 'problems'}"
    again = f", {len(found.replayed)} made again" if found.replayed else ""
    lines = [f"{found.path}: {verdict}, {found.files} files, {found.tensors} tensors{again}"]
    told = [f"{one.file}: {f'tensor {one.tensor!r} ' if one.tensor else ''}{one.what}" for one in found.problems]
    for kind in (told, [f"note: {note}" for note in found.notes]):
        lines += [f"  {line}" for line in kind[:SHOWN]]
        if len(kind) > SHOWN:
            lines.append(f"  and {len(kind) - SHOWN} more")
    return printable("\n".join(lines))

"""The target, and what a run may find there: what is refused, what is replaced, what a killed run left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from pathlib import Path

from mergeflow.errors import ClaimedError, MachineError, RecipeError
from mergeflow.manifest import MANIFEST
from mergeflow.writing.claim import Claim
from mergeflow.writing.disk import named, remove, sync_path
from mergeflow.writing.journal import FRESH_JOURNAL, JOURNAL, journal_records

MADE = "out"
"""What becomes the target, below its staging folder."""


def finished_digest(target: Path) -> str | None:
    """The plan digest in the manifest of a finished output; None for anything else, and for nothing at all.

    An output of several has a manifest in each of its subfolders, all of one plan, and nothing beside them.
    """
    if os.path.lexists(target / MANIFEST):
        return _plan_in(target)
    try:
        plans = {_plan_in(target / name) for name in os.listdir(target)}
    except OSError:
        return None
    return plans.pop() if len(plans) == 1 else None


def _plan_in(folder: Path) -> str | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    digest = manifest.get("plan") if isinstance(manifest, dict) else None
    return digest if isinstance(digest, str) else None


def repair(target: Path) -> None:
    """Set right what a run left that was killed at its very end; to be called before looking at `target`.

    Puts an output back that was moved aside and not yet replaced, and deletes a replaced output and a staging folder
    whose plan `target` is already. Does nothing while another run holds the claim, and leaves folders of these names
    alone that no run can have made.
    """
    target = Path(os.path.abspath(target))
    container = container_of(target)
    if _strange(container) or not (os.path.lexists(container) or _was_replaced(aside_of(target))):
        return
    with contextlib.suppress(ClaimedError):
        claim = Claim.take(container, target)
        try:
            set_right(container, target)
            if not os.path.lexists(container / JOURNAL):
                clear(container)
        finally:
            claim.release()


def container_of(target: Path) -> Path:
    """The staging folder of a target."""
    return target.with_name(f".{target.name}.staging")


def aside_of(target: Path) -> Path:
    """Where a replaced output stands for a moment, on a file system that cannot exchange two folders."""
    return target.with_name(f".{target.name}.old")


def _was_replaced(aside: Path) -> bool:
    """Whether this can be a replaced output: only an empty folder or a finished output is ever replaced."""
    try:
        return stat.S_ISDIR(os.lstat(aside).st_mode) and (finished_digest(aside) is not None or not os.listdir(aside))
    except OSError:
        return False


def _strange(container: Path) -> str:
    """A name in a staging folder that no run can have left there; empty where there is none."""
    try:
        names = sorted(os.listdir(container))
    except OSError:  # not there, or what taking the claim says more about
        return ""
    ours = (JOURNAL, FRESH_JOURNAL, MADE)
    return next((name for name in names if name not in ours and not re.fullmatch(r"claim\.\d{1,9}", name)), "")


def refuse_strange(container: Path) -> None:
    """Raise for a folder that has a staging folder's name and holds what no run puts there; nothing is touched."""
    if name := _strange(container):
        raise RecipeError(
            f"is in the way, since it holds '{name}', which mergeflow did not make",
            where=str(container),
            fix="Move it away, or give another folder with -o.",
        )


def refuse(target: Path, force: bool) -> None:
    """Raise for a target that must not be written or replaced."""
    where = str(target)
    if not target.name:
        raise RecipeError("cannot be an output folder", where=where, fix="Give a folder with -o.")
    if target.is_symlink():
        raise RecipeError("is a symbolic link", where=where, fix="Give the folder it should become with -o.")
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise RecipeError("is a file, and the output is a folder", where=where, fix="Give another name with -o.")
    if os.path.ismount(target):
        raise RecipeError("is a mount point, which no rename replaces", where=where, fix="Give a folder in it with -o.")
    if finished_digest(target) is None and any(target.iterdir()):
        raise RecipeError(
            f"exists, and was not made by mergeflow (it has no {MANIFEST} that names a plan), so it is never replaced",
            where=where,
            fix="Give another folder with -o, or move it away.",
        )
    if not force:
        raise RecipeError("exists", where=where, fix="Give another folder with -o, or replace it with --force.")


def make_parents(target: Path) -> None:
    """Make the folders above the target, and make that durable."""
    missing = [folder for folder in target.parents if not os.path.lexists(folder)]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise RecipeError(
            "cannot be made below a file", where=str(target), fix="Give another folder with -o."
        ) from None
    except OSError as error:
        raise MachineError(f"cannot be made ({error.strerror})", where=str(target.parent)) from None
    with named(target.parent, "cannot be written"):
        for folder in missing:
            sync_path(folder.parent)


def set_right(container: Path, target: Path) -> None:
    """Undo or complete what a run left that was killed between the rename and its end; needs the claim."""
    aside = aside_of(target)
    if _was_replaced(aside):
        if os.path.lexists(target):
            delete_replaced(container, aside)
        else:
            os.rename(aside, target)
            sync_path(target.parent)
    made = finished_digest(target)
    if made is not None:
        with contextlib.suppress(FileNotFoundError):
            head = next(journal_records((container / JOURNAL).read_bytes()), {})
            if head.get("digest") == made:
                os.unlink(container / JOURNAL)


def delete_replaced(container: Path, aside: Path) -> None:
    """Delete a replaced output, in the staging folder: there a half deleted one is still known as ours."""
    made = container / MADE
    if not os.path.lexists(made):
        os.rename(aside, made)
        aside = made
    remove(aside)


def clear(container: Path) -> None:
    """Remove what a run makes in a staging folder, but for claims; the journal first: without it the rest means nothing."""
    for name in (JOURNAL, FRESH_JOURNAL, MADE):
        remove(container / name)

"""What planning finds: problems, gathered so that one kind at one place is one line however many tensors it concerns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from mergeflow.errors import MergeflowError, RecipeError, did_you_mean
from mergeflow.settings import Place, matches


class Findings:
    """Problems, warnings and notes, in the order they were found."""

    def __init__(self) -> None:
        self.errors: dict[str, MergeflowError] = {}
        self.gathered: dict[tuple[str, str, str], dict[str, None]] = {}
        self.warnings: dict[str, None] = {}
        self.notes: dict[str, None] = {}

    def add(self, error: MergeflowError) -> None:
        """Keep a problem, once."""
        self.errors.setdefault(str(error), error)

    def gather(self, where: str, what: str, fix: str, name: str) -> None:
        """Note that `what` (`{names}` and `{count} tensors` stand for them) holds for this tensor too."""
        self.gathered.setdefault((where, what, fix), {})[name] = None

    def all(self) -> list[MergeflowError]:
        """Every problem; those of many tensors as one line each."""
        lines = [
            RecipeError(
                what.replace("{names}", some(list(names))).replace("{count} tensors", counted(len(names))),
                where=where,
                fix=fix,
            )
            for (where, what, fix), names in self.gathered.items()
        ]
        return [*self.errors.values(), *lines]


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few of the names, and how many more there are."""
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def counted(count: int) -> str:
    """`1 tensor`, `2 tensors`."""
    return f"{count} tensor{'s' * (count != 1)}"


def nearest(pattern: str, names: Iterable[str]) -> str:
    """What a pattern that fits no name may have meant: its unknown words replaced by the nearest ones, or the nearest name."""
    alike: dict[str, str] = {}
    for name in names:
        alike.setdefault(re.sub(r"\d+", "0", name), name)
    examples = list(alike.values())[:1000]
    known = {word for name in examples for word in name.split(".")}

    def better(found: re.Match[str]) -> str:
        word = found[0]
        near = did_you_mean(word, known) if word not in known and not word.isdigit() else ""
        return near[len("Did you mean '") : -2] if near else word

    improved = re.sub(r"[A-Za-z_]\w+", better, pattern)
    if improved != pattern and any(matches([improved], Place(name)) for name in examples):
        return f"Did you mean '{improved}'?"
    return did_you_mean(pattern, examples) or f"Names are such as {some(examples)}."

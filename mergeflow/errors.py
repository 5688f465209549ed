"""What can go wrong, as one tree; each error knows where it happened, what to do about it, and its exit code.

    MergeflowError            70  a bug, unless a subclass says otherwise
    ├── RecipeError            2  the recipe, the command line, or tensors that do not fit together
    ├── InputError             3  an input is missing, damaged or changed
    ├── ClaimedError           4  another live run holds the output
    ├── MachineError           5  disk, memory, network
    ├── NumericError           6  NaN, Inf, overflow
    ├── Interrupted      130/143  a signal stopped the run
    └── Problems      the first of 2, 3, 5, 6 among several errors, reported together

An error is raised short where it happens and given its place once, at the border, with `placed`.
It prints as ``where: what. fix``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Self


class MergeflowError(Exception):
    """One problem: `what` is wrong, `where`, and how to mend it (`fix`); all three are plain text."""

    exit_code: int = 70

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.fix = fix

    def placed(self, where: str) -> Self:
        """The same error with `where` in front of the place it already had."""
        self.where = f"{where}: {self.where}" if self.where else where
        return self

    def __str__(self) -> str:
        text = printable(f"{self.where}: {self.what}" if self.where else self.what)
        if not self.fix:
            return text
        return f"{text}{'' if text.endswith(('.', '?', '!')) else '.'} {printable(self.fix)}"


class RecipeError(MergeflowError):
    """The recipe or the command line asks for something that cannot be."""

    exit_code = 2


class InputError(MergeflowError):
    """A checkpoint is missing, damaged, changed while read, or not what it says it is."""

    exit_code = 3


class ClaimedError(MergeflowError):
    """Another live run is writing this output."""

    exit_code = 4


class MachineError(MergeflowError):
    """The machine cannot do it: disk, memory, network."""

    exit_code = 5


class NumericError(MergeflowError):
    """A weight is NaN or Inf, or a value overflows the dtype it is written in."""

    exit_code = 6


class Interrupted(MergeflowError):
    """A signal stopped the run; `exit_code` is 128 + the signal's number."""

    exit_code = 130

    def __init__(self, what: str, *, signal_number: int = 2, where: str = "", fix: str = "") -> None:
        super().__init__(what, where=where, fix=fix)
        self.exit_code = 128 + signal_number


class Problems(MergeflowError):
    """Several errors at once; `errors` keeps them in the order they were found."""

    def __init__(self, errors: Sequence[MergeflowError]) -> None:
        self.errors = tuple(errors)
        super().__init__("\n".join(str(error) for error in self.errors))
        codes = {error.exit_code for error in self.errors}
        self.exit_code = next((code for code in (2, 3, 5, 6) if code in codes), max(codes, default=70))

    def placed(self, where: str) -> Self:
        """The same errors, each with `where` in front of its place."""
        for error in self.errors:
            error.placed(where)
        return self

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)


def raise_all(errors: Sequence[MergeflowError]) -> None:
    """Raise what was collected: nothing, the one error, or all of them as `Problems`."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise Problems(errors)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`Did you mean 'x'?` for the nearest of `known`, or an empty string when nothing is near."""
    names = sorted(set(known))
    folded = {name.lower().replace("-", "_"): name for name in reversed(names)}
    near = difflib.get_close_matches(word.lower().replace("-", "_"), folded, n=1, cutoff=0.6)
    return f"Did you mean '{folded[near[0]]}'?" if near else ""


def printable(text: str) -> str:
    """`text` with control characters escaped, so that a name from a file cannot move the cursor or hide a line."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)

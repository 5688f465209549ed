"""What planning finds: problems, gathered so that one kind at one place is one line however many tensors it concerns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mergeflow.errors import MergeflowError, RecipeError, did_you_mean
from mergeflow.settings import Gradient, Place, matches


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

    def check_setting(self, setting: Any, at: Mapping[str, Place], where: str) -> None:
        """The patterns of a setting's rules, and the layers of its gradients, must be there."""
        if isinstance(setting, tuple):
            self.check_rules([rule.match for rule in setting], at, where)
            for rule in setting:
                if isinstance(rule.value, Gradient):
                    here = {name: place for name, place in at.items() if matches(rule.match or ("*",), place)}
                    self.check_setting(rule.value, here or at, where)
        elif isinstance(setting, Gradient) and setting.over is None:
            # Without `outside` each tensor is a problem of its own.
            if setting.outside is not None and all(place.layers is None for place in at.values()):
                self.warnings[
                    f"{where}: the gradient never applies, since none of its tensors is in a numbered layer: "
                    f"all take `outside: {setting.outside}`"
                ] = None
        elif isinstance(setting, Gradient) and setting.over is not None:
            first, last = map(int, setting.over.split("-"))
            if not any(place.layer is not None and first <= place.layer <= last for place in at.values()):
                layers = sorted({place.layer for place in at.values() if place.layer is not None})
                fix = f"Layers run from {layers[0]} to {layers[-1]}." if layers else "There are no numbered layers."
                self.add(RecipeError(f"`over: {setting.over}` covers none of the layers", where=where, fix=fix))

    def check_rules(self, rules: Sequence[tuple[str, ...] | None], at: Mapping[str, Place], where: str) -> None:
        """A rule that fits nothing is a problem, one that is hidden by those before it a warning."""
        waiting = {index for index, rule in enumerate(rules) if rule is not None}
        for place in at.values():
            if not waiting:
                return
            for index, rule in enumerate(rules):
                if rule is None or matches(rule, place):
                    waiting.discard(index)
                    break
        for index in sorted(waiting):
            rule = rules[index] or ()
            shown = ", ".join(rule)
            if any(matches(rule, place) for place in at.values()):
                self.warnings[f"{where}: the rule '{shown}' is hidden by the rules before it"] = None
            else:
                self.add(
                    RecipeError(
                        f"the pattern '{shown}' fits none of the {len(at)} tensors"
                        if len(rule) == 1
                        else f"the patterns '{shown}' fit none of the {len(at)} tensors",
                        where=where,
                        fix=nearest(rule[0], at),
                    )
                )

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

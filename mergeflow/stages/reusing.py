"""What the cache holds of a stage that was asked for other weights: `only` restricts what is collected, a later run extends it.

A statistic of one input, or of one weight, is the same whatever else was collected with it. So what another artifact of the same
op on the same model and data has is taken over as it is, and where one has all that is asked for, no model is run. Left alone
are artifacts that had something to drop, since what is dropped may depend on what is looked at, and those of other software,
whose last bits may differ: what a stage gives does not depend on what happened to be there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from mergeflow.checkpoint.statistics import Statistics
from mergeflow.settings import matches, places
from mergeflow.stages import StageJob, naming

if TYPE_CHECKING:
    from torch import Tensor


def usable(job: StageJob, software: Mapping[str, str]) -> tuple[Statistics, ...]:
    """The artifacts whose statistics are those that this job would collect."""
    return tuple(
        one
        for one in job.known
        if one.facts.software == software
        and isinstance(one.facts.data, dict)
        and not any(one.facts.data.get(key) for key in ("batches_dropped", "examples_dropped"))
    )


def covering(known: Sequence[Statistics], tensors: Sequence[str], only: tuple[str, ...] | None) -> Statistics | None:
    """The first artifact that was asked for every one of a model's tensors that `only` names."""
    wanted = chosen(tensors, only)
    return next((one for one in known if wanted <= chosen(tensors, one.facts.only)), None)


def chosen(names: Sequence[str], only: tuple[str, ...] | None) -> set[str]:
    """The names that the patterns fit."""
    at = places(names)
    return {name for name in names if only is None or matches(only, at[name])}


class Taken(Mapping[str, "Tensor"]):
    """Tensors of artifacts, read when they are asked for, in the order of their names."""

    def __init__(self, homes: Mapping[str, Statistics]) -> None:
        self.homes = homes

    def __getitem__(self, name: str) -> Tensor:
        return naming.read_tensor(self.homes[name], name)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.homes))

    def __len__(self) -> int:
        return len(self.homes)

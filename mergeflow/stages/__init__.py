"""Stages: nodes that run a model on data and leave an artifact. The only room in which models run.

A runner is found by its op's class; it gets a `StageJob`, in which all it may use of the engine stands, and writes through
`StageJob.write`, so that no runner knows where artifacts lie or how a folder is made whole. Importing this module loads
neither torch nor transformers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeflow.errors import Interrupted
from mergeflow.ops.statistics import ActAbsmean, FisherDiag, Gram, GramDiag, InputMean, StatisticsOp

if TYPE_CHECKING:
    from torch import Tensor

    from mergeflow.checkpoint import Checkpoint
    from mergeflow.checkpoint.statistics import Statistics
    from mergeflow.recipe.grammar import DataSource

Write = Callable[[Mapping[str, "Tensor"], Mapping[str, bytes], Mapping[str, str]], None]
"""`write(tensors, files, metadata)`: make the artifact of these tensors, in this order, with these side files and this metadata
in the safetensors headers. Tensors are asked for one at a time, and may be made when they are."""

Shape = tuple[str, tuple[int, ...]]
"""A dtype by its torch name, and a shape."""


@dataclass(frozen=True)
class StageJob:
    """One run of a stage.

    `model` is a local Hugging Face folder; `source` what `statistics.json` says of it; `data` what is read, its relative paths
    taken from `folder`; `only` patterns over the checkpoint's tensor names; `work` a scratch folder of this job alone; `memory`
    the bytes that it may hold; `progress` is told what is being done, how many since it was last told, and of how many; `known` are
    artifacts of the same op, model and data with another `only`.
    """

    op: StatisticsOp
    model: Path
    source: Mapping[str, Any]
    data: DataSource | None
    folder: Path
    work: Path
    write: Write
    only: tuple[str, ...] | None = None
    device: str = "cpu"
    memory: int = 2 << 30
    threads: int = 1
    seed: int = 0
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    stop: threading.Event = field(default_factory=threading.Event)
    known: tuple[Statistics, ...] = ()

    def check_stop(self) -> None:
        """Raises Interrupted where the run was asked to stop."""
        if self.stop.is_set():
            raise stopped()


def stopped() -> Interrupted:
    """A stage was stopped that keeps nothing of what it has done so far."""
    return Interrupted(
        "stopped", fix="Run the same command again: stages that are finished stay, this one begins anew."
    )


@dataclass(frozen=True)
class Predicted:
    """What a stage would write: `tensors` by name, the group that each weight reads, why others have none, and which weights are
    stored (in, out)."""

    tensors: Mapping[str, Shape]
    groups: Mapping[str, str]
    skipped: Mapping[str, str]
    transposed: tuple[str, ...] = ()


RUNNERS: Mapping[type[StatisticsOp], str] = {
    Gram: "mergeflow.stages.collecting",
    GramDiag: "mergeflow.stages.collecting",
    InputMean: "mergeflow.stages.collecting",
    ActAbsmean: "mergeflow.stages.collecting",
    FisherDiag: "mergeflow.stages.fisher",
}
"""The module of each op's runner: its `run(job)` makes the artifact, its `predict(op, folder, only)` says what that will hold."""


def run_stage(job: StageJob) -> None:
    """Run the model on the data and write what the op collects, or raise and write nothing."""
    import_module(RUNNERS[type(job.op)]).run(job)


def predict(
    op: StatisticsOp, model: Path, only: tuple[str, ...] | None = None, checkpoint: Checkpoint | None = None
) -> Predicted:
    """What a run would write, from config.json and headers alone: no weight is read and no data.

    `checkpoint` is the model's, where it has been opened already: a hub model's weights need not be in the folder then.
    """
    from mergeflow.stages import models

    found: Predicted = import_module(RUNNERS[type(op)]).predict(op, models.open_folder(model, checkpoint), only)
    return found

"""`fuse`: sources are run and kept, the target is trained, and what comes out is a checkpoint like the target's.

What the models are decides what is kept and what a lesson is (`classifying`, `language`); this module holds what all tasks share: the
checks before the long work, the order of things, and what is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergeflow.errors import MachineError, RecipeError
from mergeflow.ops.fuse import Fuse
from mergeflow.settings import matches, places
from mergeflow.stages import collecting, models
from mergeflow.stages.fuse import classifying, language, training
from mergeflow.stages.fuse.job import FuseJob
from mergeflow.stages.regmean_pp import METADATA, side_files

if TYPE_CHECKING:
    from torch import nn

TASKS: Mapping[str, Any] = {"classification": classifying, "causal_lm": language}


def run(job: FuseJob) -> None:
    """Make the fused model and write it: the target's tensors, config and tokenizer, the values of every step, and a plot.

    Raises RecipeError for models or parameters that do not go together, MachineError where memory or disk do not suffice,
    InputError for data or models that cannot be used, NumericError where there are too many NaN or Inf.
    """
    import torch

    op = job.op
    target = models.open_folder(job.target)
    sources = [models.open_folder(path) for path in job.sources]
    check(job.op, target, sources)
    _check_memory(job, target, sources)
    seed = job.seed if op.train.seed is None else op.train.seed
    with collecting.threads(job.threads), torch.no_grad():
        task = TASKS[op.task]
        lessons = task.lessons(job, target, sources, seed)
        model = models.load_model(target, job.device)
        if isinstance(lessons, classifying.Classes):
            collecting.settle(model, lessons.examples)
        names = training.names_of(model, target)
        training.unfreeze(model, names, target.checkpoint, op.train.trainable)
        _save_memory(job, model, target)
        course = training.Course(op.train, job.work, seed, job.device, job.progress, job.check_stop)
        metrics = training.train(model, lessons, course)
        written = training.Trained(model, names, target.checkpoint)
        job.write(written, {**side_files(target.path), **training.record(metrics)}, METADATA)


def check(op: Fuse, target: models.Folder, sources: Sequence[models.Folder]) -> None:
    """Raises RecipeError for what headers and configs show not to go together: before anything runs, and for a plan."""
    TASKS[op.task].check(op, target, sources)
    trainable = op.train.trainable
    if trainable != "all" and not any(matches(trainable, at) for at in places(target.checkpoint.tensors).values()):
        raise RecipeError(
            f"`trainable: {', '.join(trainable)}` fits none of the target's tensors",
            where="train.trainable",
            fix=f"They are called like {', '.join(sorted(target.checkpoint.tensors)[:3])}.",
        )


def elements(folder: models.Folder) -> int:
    """How many numbers a model has."""
    return sum(tensor.elements for tensor in folder.checkpoint.tensors.values() if tensor.dtype.kind == "float")


def needed_memory(op: Fuse, target: models.Folder, sources: Sequence[models.Folder]) -> int:
    """Bytes that are held at most, but for activations: a source that runs, or the target with its gradients and AdamW's means."""
    widths = [2 if one.dtype in ("bfloat16", "float16") else 4 for one in op.sources]
    running = [elements(folder) * width for folder, width in zip(sources, widths, strict=True)]
    return max(*running, elements(target) * training.BYTES_A_PARAMETER)


def _check_memory(job: FuseJob, target: models.Folder, sources: Sequence[models.Folder]) -> None:
    needed = needed_memory(job.op, target, sources)
    if job.device == "cpu" and needed > job.memory:
        raise MachineError(
            f"training takes {needed:,} bytes beside activations, and may take {job.memory:,}",
            fix="Give it more --memory, or a smaller target.",
        )


def _save_memory(job: FuseJob, model: nn.Module, target: models.Folder) -> None:
    """Compute activations twice where that is asked for, or they would not fit beside the rest."""
    wanted = job.op.train.gradient_checkpointing
    able = bool(getattr(model, "supports_gradient_checkpointing", False))
    if wanted is True and not able:
        raise RecipeError(
            f"{target.architecture} cannot compute its activations twice",
            where="train.gradient_checkpointing",
            fix="Leave it out.",
        )
    if wanted is True:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]

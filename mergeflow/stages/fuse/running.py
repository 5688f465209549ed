"""`fuse`: sources are run and kept, the target is trained, and what comes out is a checkpoint like the target's.

What the models are decides what is kept and what a lesson is (`classifying`, `language`); this module holds what all tasks share: the
checks before the long work, the order of things, and what is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergeflow.errors import NumericError, RecipeError
from mergeflow.ops.fuse import Fuse
from mergeflow.settings import matches, places
from mergeflow.stages import collecting, models, naming
from mergeflow.stages.fuse import classifying, estimating, language, training
from mergeflow.stages.fuse.job import FuseJob
from mergeflow.stages.regmean_pp import METADATA, side_files

if TYPE_CHECKING:
    from torch import nn

TASKS: Mapping[str, Any] = {"classification": classifying, "causal_lm": language}


def run(job: FuseJob) -> None:
    """Make the fused model and write it: the target's tensors, config and tokenizer, the values of every step, and a plot.

    Raises RecipeError for models or parameters that do not go together, MachineError where the disk or the device does not suffice,
    InputError for data or models that cannot be used, NumericError where there are too many NaN or Inf.
    """
    import torch

    op = job.op
    target = models.open_folder(job.target)
    sources = [models.open_folder(path) for path in job.sources]
    check(job.op, target, sources)
    training.check_means(op.train, job.device)
    _check_finite(target)
    seed = job.seed if op.train.seed is None else op.train.seed
    with collecting.threads(job.threads), torch.no_grad():
        task = TASKS[op.task]
        lessons = task.lessons(job, target, sources, seed)
        model = models.load_model(target, job.device)
        if isinstance(lessons, classifying.Classes):
            collecting.settle(model, lessons.examples)
        names = training.names_of(target, model)
        training.unfreeze(model, names, target.checkpoint, op.train.trainable)
        _save_memory(job, model, target, lessons.tokens)
        course = training.Course(op.train, job.work, seed, job.device, job.progress, job.check_stop)
        metrics = training.train(model, lessons, course)
        written = training.Trained(model, names, target.checkpoint)
        job.write(written, {**side_files(target.path), **training.record(metrics)}, METADATA)


def check(op: Fuse, target: models.Folder, sources: Sequence[models.Folder]) -> None:
    """Raises RecipeError for what headers and configs show not to go together: before anything runs, and for a plan."""
    TASKS[op.task].check(op, target, sources)
    training.names_of(target)
    if op.train.gradient_checkpointing is True and not _able(getattr(models.transformers(), target.architecture, None)):
        raise RecipeError(
            f"{target.architecture} cannot compute its activations twice",
            where="train.gradient_checkpointing",
            fix="Leave it out.",
        )
    trainable = op.train.trainable
    if trainable != "all" and not any(matches(trainable, at) for at in places(target.checkpoint.tensors).values()):
        raise RecipeError(
            f"`trainable: {', '.join(trainable)}` fits none of the target's tensors",
            where="train.trainable",
            fix=f"They are called like {', '.join(sorted(target.checkpoint.tensors)[:3])}.",
        )


def _save_memory(job: FuseJob, model: nn.Module, target: models.Folder, tokens: int) -> None:
    """Compute activations twice where that is asked for, or with `auto` where those of so many tokens would not fit."""
    wanted = job.op.train.gradient_checkpointing
    if wanted == "auto":
        needed = estimating.training(target) + estimating.activations(target, tokens)
        wanted = _able(model) and needed > _room(job)
    if wanted:
        # Of transformers 5 the later versions have another name for it.
        enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def _able(model: object) -> bool:
    """Whether a model, or its class, can compute its activations twice."""
    return bool(getattr(model, "supports_gradient_checkpointing", False))


def _check_finite(target: models.Folder) -> None:
    """Raises NumericError for a target with NaN or Inf, before its sources run."""
    import torch

    for name, tensor in target.checkpoint.tensors.items():
        if tensor.dtype.kind != "float":
            continue
        if not bool(torch.isfinite(naming.read_tensor(target.checkpoint, name).float()).all()):
            raise NumericError(f"the target's '{name}' has NaN or Inf", where=str(target.path), fix="Make it anew.")


def _room(job: FuseJob) -> int:
    """Bytes of memory that the device lends."""
    import torch

    return job.memory if job.device == "cpu" else torch.cuda.mem_get_info(job.device)[1]

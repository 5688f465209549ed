"""Classifiers: what the sources give for inputs without labels, and lessons made of it (FedDF, arXiv:2006.07242).

A source runs once over the rows that it can read, and its logits are kept as they are, in float32. What the teacher says of a row
is made of them when training starts, since that costs less than to read it back: another fusion runs no source again. A row
counts where every source and the target can read it, and each gives numbers for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeflow.errors import InputError, MachineError, NumericError, RecipeError, did_you_mean
from mergeflow.ops.fuse import Fuse
from mergeflow.stages import collecting, data, models, scratch
from mergeflow.stages.fuse.job import VERSION, FuseJob
from mergeflow.stages.fuse.shards import Shards
from mergeflow.stages.fuse.training import Lessons, Step, order

if TYPE_CHECKING:
    from torch import Tensor, nn

TASKS = ("features", "images", "classifier")
ROWS, EXAMPLES_A_SHARD = "rows.json", 4096


# Labels


def check(op: Fuse, target: models.Folder, sources: Sequence[models.Folder]) -> None:
    """Raises RecipeError for what configs show not to go together."""
    for folder in (target, *sources):
        kind = folder.config.get("problem_type")
        if folder.task not in TASKS or (folder.task == "images" and "Classification" not in folder.architecture):
            raise RecipeError(
                f"{folder.architecture} is no classifier", fix="Fuse classifiers, or write `task: causal_lm`."
            )
        if folder.n_labels < 2 or kind in ("regression", "multi_label_classification"):
            given = kind if isinstance(kind, str) else f"{folder.n_labels} label"
            raise RecipeError(f"{folder.path.name} ({given}) does not choose one of several classes")
        if folder.labels and sorted(folder.labels.values()) != list(range(folder.n_labels)):
            raise RecipeError(
                f"{folder.path.name} numbers its labels {sorted(folder.labels.values())[:8]}, and its {folder.n_labels} logits count "
                "from 0",
                fix="Mend `label2id` and `id2label` in its config.json.",
            )
    for index in range(len(sources)):
        columns(op, target, sources, index)


def columns(op: Fuse, target: models.Folder, sources: Sequence[models.Folder], index: int) -> list[int]:
    """For each label of the target the source's logit that means the same.

    By `label_map`, or by name, or by number where one of the two has no names. Raises RecipeError where some label has none.
    """
    source = sources[index]
    given = op.sources[index].label_map
    wanted, have = _names(target), _names(source)
    where = f"sources.{index}"
    if given is None:
        if target.labels is None or source.labels is None:
            if target.n_labels != source.n_labels:
                raise RecipeError(
                    f"it has {source.n_labels} labels, and the target {target.n_labels}",
                    where=where,
                    fix="Fuse models of one set of labels.",
                )
            return list(range(target.n_labels))
        given = {name: name for name in have}
    for name, own, whose in [
        *((name, have, "source") for name in given),
        *((name, wanted, "target") for name in given.values()),
    ]:
        if name not in own:
            raise RecipeError(
                f"the {whose} has no label '{name[:60]}'" if op.sources[index].label_map else
                f"its label '{name[:60]}' is none of the target's",
                where=where,
                fix=f"{did_you_mean(name[:60], own)} Write `label_map:`, with a label of the target for each of the source: "
                f"{', '.join(list(own)[:8])}.".strip(),
            )  # fmt: skip
    found = {wanted[to]: have[name] for name, to in given.items()}
    lacks = [name for name, number in wanted.items() if number not in found]
    if lacks or len(found) != len(given):
        twice = sorted({to for to in given.values() if list(given.values()).count(to) > 1})
        raise RecipeError(
            f"no label of the source means '{lacks[0]}'"
            if lacks
            else f"several labels of the source mean '{twice[0]}'",
            where=where,
            fix="Each label of the target is that of one of the source.",
        )
    return [found[number] for number in range(target.n_labels)]


def _names(folder: models.Folder) -> Mapping[str, int]:
    return folder.labels or {str(number): number for number in range(folder.n_labels)}


# Capture


@dataclass(frozen=True, eq=False)
class Captured:
    """What one source gives: the places of the rows that it can read, and (rows, labels) logits, NaN where it gave none."""

    rows: tuple[str, ...]
    logits: Tensor


def captured(job: FuseJob, index: int, folder: models.Folder, digest: str) -> Captured:
    """The logits of a source (-1: of the start), from the cache, or by running it."""
    import torch

    op = job.op
    dtype = op.sources[index].dtype if index >= 0 else "float32"
    parts = {
        "fuse": "logits",
        "version": VERSION,
        "corpus": job.corpus,
        "model": digest,
        "dtype": dtype,
        "batch_size": op.batch_size,
        "max_length": op.max_length,
        "device": job.device.partition(":")[0],
    }
    what = "the start" if index < 0 else f"source {index + 1}"
    made = job.kept(parts, lambda path: _capture(job, folder, dtype, what, path))
    shards = Shards(made)
    rows = json.loads((made / ROWS).read_bytes())
    names = [_shard(start) for start in range(0, len(rows), EXAMPLES_A_SHARD)]
    return Captured(tuple(rows), torch.cat([shards.read(name)["logits"] for name in names]))


def _shard(start: int) -> str:
    return f"logits-{start // EXAMPLES_A_SHARD:05}.safetensors"


def _capture(job: FuseJob, folder: models.Folder, dtype: str, what: str, path: Path) -> None:
    """Run a source over the data, shard by shard; those that a killed run made stay."""
    import torch

    examples = read(job, folder)
    needed, free = len(examples.examples) * folder.n_labels * 4, job.free()
    if needed > free:
        raise MachineError(
            f"the logits of {what} take {needed:,} bytes, and the cache's disk has {free:,} free",
            fix="Make room, or set MERGEFLOW_CACHE to a folder on another disk.",
        )
    shards = Shards(path)
    model: nn.Module | None = None
    dropped = 0
    total = len(examples.examples)
    for start in range(0, total, EXAMPLES_A_SHARD):
        part = examples.examples[start : start + EXAMPLES_A_SHARD]
        made = shards.has(_shard(start))
        if made:
            whole = shards.read(_shard(start))["logits"]
            job.progress(f"capture rows of {what}", len(part), total)
        else:
            if model is None:
                model = models.load_model(folder, job.device).to(getattr(torch, dtype))
                collecting.settle(model, examples)
            found = []
            for begin in range(0, len(part), job.op.batch_size):
                job.check_stop()
                batch = examples.batch(part[begin : begin + job.op.batch_size], device=job.device)
                found.append(logits(model, batch, dtype).float().cpu())
                job.progress(f"capture rows of {what}", len(batch.examples), total)
            whole = torch.cat(found)
        good = torch.isfinite(whole).all(1)
        dropped += int((~good).sum())
        if dropped > collecting.MOST_DROPPED * total:
            first = part[int((~good).nonzero()[0])].where
            raise NumericError(
                f"{what} gives NaN or Inf for {dropped} of {total} rows so far (first: {first})",
                fix="Look at its weights; at most 0.1% of rows are left out.",
            )
        if not made:
            whole[~good] = torch.nan
            shards.write(_shard(start), {"logits": whole})
    scratch.put(path / ROWS, json.dumps([example.where for example in examples.examples]).encode())


def logits(model: nn.Module, batch: data.Batch, dtype: str = "float32") -> Tensor:
    """(examples, labels), in the model's dtype."""
    import torch

    inputs = {
        name: value.to(getattr(torch, dtype)) if dtype != "float32" and value.is_floating_point() else value
        for name, value in batch.inputs.items()
    }
    output: Any = model(**inputs)
    found: Tensor = output if isinstance(output, torch.Tensor) else output.logits
    return found


def read(job: FuseJob, folder: models.Folder) -> data.Examples:
    """The rows as a model reads them; labels are not looked at."""
    source = job.data.model_copy(update={"label": None})
    return data.read_examples(source, job.folder, folder, job.op.max_length)


# Fusion


def teacher(op: Fuse, given: Sequence[Tensor]) -> Tensor:
    """What the sources say together: (rows, labels) probabilities, of their logits over the same rows and labels.

    avg: softmax(sum_k w_k z_k / T), or with `average: probabilities` sum_k w_k softmax(z_k / T), the weights summing to 1;
    max_confidence: the softmax(z_k / T) of the source whose greatest probability is the highest; of equal ones the start's counts.
    """
    import torch

    temperature = op.loss.teacher_temperature
    stacked = torch.stack(list(given)).double()
    if op.function == "max_confidence":
        # The start stands last, and is looked at first.
        order = [len(given) - 1, *range(len(given) - 1)] if op.include_self else list(range(len(given)))
        sure = stacked[order].softmax(2).amax(2)
        chosen = torch.tensor(order)[sure.argmax(0)]
        picked = stacked[chosen, torch.arange(stacked.shape[1])]
        return (picked / temperature).softmax(1).float()
    weights = torch.tensor(op.weights, dtype=torch.float64)
    weights = (weights / weights.sum())[:, None, None]
    if op.fusion.average == "probabilities":
        return ((stacked / temperature).softmax(2) * weights).sum(0).float()
    return ((stacked * weights).sum(0) / temperature).softmax(1).float()


class Classes(Lessons):
    """Rows, and what the teacher says of each: KL(teacher || softmax(f(x) / T)), the mean over the rows of a step."""

    DOCUMENTS = TOKENS = "rows"

    def __init__(self, op: Fuse, examples: data.Examples, rows: Sequence[data.Example], said: Tensor, seed: int,
                 device: str) -> None:  # fmt: skip
        self.op, self.examples, self.rows, self.said = op, examples, rows, said
        self.seed, self.device = seed, device

    @property
    def tokens(self) -> int:
        """Of the longest rows; those of images and numbers count as one."""
        return self.op.batch_size * max(len(row.ids) or 1 for row in self.rows)

    def epoch(self, number: int) -> Sequence[Step]:
        """Steps of `train.batch_size` rows in parts of `batch_size`."""
        size = self.op.train.batch_size
        shuffled = order(len(self.rows), self.seed, number)
        steps = []
        for start in range(0, len(shuffled), size):
            own = shuffled[start : start + size]
            parts = tuple(tuple(own[at : at + self.op.batch_size]) for at in range(0, len(own), self.op.batch_size))
            steps.append(Step(parts, len(own), len(own)))
        return steps

    def losses(self, model: nn.Module, step: Step, part: Any, done: float) -> Mapping[str, Tensor]:
        """The divergence of some rows, as their share of the step's mean."""
        import torch

        batch = self.examples.batch([self.rows[index] for index in part], device=self.device)
        found = logits(model, batch).float() / self.op.loss.student_temperature
        said = self.said[list(part)].to(found.device)
        divergence = torch.nn.functional.kl_div(found.log_softmax(1), said, reduction="sum")
        return {"loss": divergence / step.documents}


def lessons(job: FuseJob, target: models.Folder, sources: Sequence[models.Folder], seed: int) -> Classes:
    """Run what has not been run, and make lessons of it. Raises InputError where no row is left."""
    import torch

    op = job.op
    examples = read(job, target)
    given: list[Captured] = []
    for index, _, digest in job.teachers:
        folder = sources[index] if index >= 0 else target
        found = captured(job, index, folder, digest)
        if index >= 0:
            found = Captured(found.rows, found.logits[:, columns(op, target, sources, index)])
        given.append(found)
    at = [{where: row for row, where in enumerate(one.rows)} for one in given]
    shared = [example for example in examples.examples if all(example.where in one for one in at)]
    if not shared:
        raise InputError("has no row that all models can read", where=job.data.path)
    picked = [one.logits[[own[example.where] for example in shared]] for one, own in zip(given, at, strict=True)]
    good = torch.stack([torch.isfinite(one).all(1) for one in picked]).all(0)
    rows = [example for example, keep in zip(shared, good.tolist(), strict=True) if keep]
    for count, why in (
        (len(examples.examples) - len(shared), "rows that some model cannot read"),
        (len(shared) - len(rows), "rows with NaN or Inf"),
    ):
        if count:
            job.progress(f"{why}, left out: {count}", 0, 0)
    return Classes(op, examples, rows, teacher(op, [one[good] for one in picked]), seed, job.device)

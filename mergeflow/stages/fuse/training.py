"""A model and its lessons -> the model trained on them, step by step, with checkpoints to go on from.

The loop knows no task: what a step is made of and what is minimised, `Lessons` say. All that decides a step follows from the
seed and the step's number: its data, its learning rate, and what dropout draws, since the generators are seeded anew for each. So
a checkpoint needs the weights, AdamW's state and the number of steps alone, and a run that was killed ends, on one thread of one
processor, in the same bytes as one that never was. A checkpoint is written beside and renamed; what a killed run left is
otherwise not believed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from mergeflow.checkpoint import Checkpoint
from mergeflow.errors import InputError, Interrupted, MachineError, NumericError, RecipeError
from mergeflow.ops.fuse import Train
from mergeflow.settings import matches, places
from mergeflow.stages import models, naming, scratch

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

CHECKPOINT, METRICS, PLOT = "checkpoint.safetensors", "metrics.jsonl", "losses.svg"


@dataclass(frozen=True, eq=False)
class Step:
    """One optimiser step: parts that run one after the other, and how many documents (or examples) and tokens they are."""

    parts: tuple[Any, ...]
    documents: int
    tokens: int


class Lessons(ABC):
    """What a model is trained on."""

    DOCUMENTS = "documents"
    """What its data is made of, in the words of progress."""
    TOKENS = "tokens"
    """What the sizes of its steps count, in the same words."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """The most tokens that run together."""

    @abstractmethod
    def epoch(self, number: int) -> Sequence[Step]:
        """The steps of an epoch, in order, by its number from 0."""

    @abstractmethod
    def losses(self, model: nn.Module, step: Step, part: Any, done: float) -> Mapping[str, Tensor]:
        """What one part adds to the values of its step: scalars, of which `loss` is minimised.

        `done` is the share of all steps that are behind, from 0 to 1.
        """


@dataclass(frozen=True)
class Course:
    """How to train: the settings, where a killed run's checkpoint lies, and what the way lends."""

    settings: Train
    work: Path
    seed: int
    device: str = "cpu"
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    check_stop: Callable[[], None] = lambda: None


def train(model: nn.Module, lessons: Lessons, course: Course) -> list[dict[str, float]]:
    """Train a model's parameters that require gradients; the values of every step, in order.

    Goes on from the checkpoint in `course.work`. Raises NumericError where a loss or gradient is NaN or Inf, MachineError where
    the device has too little memory or accelerate is needed and missing, and Interrupted after it wrote a checkpoint.
    """
    import torch

    steps = [(epoch, step) for epoch in range(course.settings.epochs) for step in lessons.epoch(epoch)]
    total = len(steps)
    optimiser = _optimiser(model, course.settings)
    state = _State(model, optimiser, course.work)
    metrics = state.load()
    told = _Told(course.progress, lessons, sum(step.documents for _, step in steps))
    told.skip(sum(step.documents for _, step in steps[: len(metrics)]))
    devices = [torch.device(course.device)] if course.device != "cpu" else []
    with torch.random.fork_rng(devices), torch.enable_grad(), _means(course) as means:
        model, optimiser = means.prepare(model, optimiser)
        _to_train(model)
        for number in range(len(metrics), total):
            try:
                course.check_stop()
            except Interrupted:
                state.save(metrics)
                raise
            epoch, step = steps[number]
            torch.manual_seed(_seed_of(course.seed, number))
            values = _take(model, optimiser, lessons, step, number, total, course.settings, means)
            metrics.append({"step": number + 1, "epoch": epoch + 1, **values})
            state.note(metrics[-1])
            told(step, values["loss"])
            if (number + 1) % course.settings.checkpoint_every == 0 and number + 1 < total:
                state.save(metrics)
    model.eval()
    return metrics


def _to_train(model: nn.Module) -> None:
    """Put a model in training mode; norms that are frozen go by the means that they have, and leave them as they are."""
    from torch.nn.modules.batchnorm import _BatchNorm

    model.train()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, _BatchNorm) and own and not any(one.requires_grad for one in own):
            module.eval()


def _take(
    model: nn.Module,
    optimiser: Any,
    lessons: Lessons,
    step: Step,
    number: int,
    total: int,
    settings: Train,
    means: _Means,
) -> dict[str, float]:
    """One optimiser step; its values."""
    import torch

    rate = learning_rate(settings, number, total)
    for group in optimiser.param_groups:
        group["lr"] = rate
    sums: dict[str, float] = {}
    for part in step.parts:
        with means.computing():
            found = lessons.losses(model, step, part, number / total)
        if not bool(torch.isfinite(found["loss"])):
            raise NumericError(f"the loss is NaN or Inf at step {number + 1}", fix="Lower `lr`, or look at the data.")
        means.backward(found["loss"])
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach())
    parameters = [one for group in optimiser.param_groups for one in group["params"]]
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, settings.grad_clip or math.inf))
    if not math.isfinite(norm):
        raise NumericError(f"the gradient is NaN or Inf at step {number + 1}", fix="Lower `lr`, or look at the data.")
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return {**sums, "gradient_norm": norm, "lr": rate}


def learning_rate(settings: Train, number: int, total: int) -> float:
    """The learning rate of the step with this number from 0: up over the warm-up, then down as the schedule says."""
    warm = math.ceil(settings.warmup_ratio * total)
    if number < warm:
        return settings.lr * (number + 1) / warm
    gone = (number - warm) / max(total - warm, 1)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * gone)), "linear": 1 - gone, "constant": 1.0}[settings.schedule]
    return settings.lr * left


def _seed_of(seed: int, number: int) -> int:
    """The seed of one step's draws, unlike that of any other."""
    return int.from_bytes(blake3(f"{seed} {number}".encode()).digest()[:7], "little")


def order(count: int, seed: int, epoch: int) -> list[int]:
    """The numbers below `count` in the order of an epoch."""
    import torch

    draw = torch.Generator().manual_seed(_seed_of(seed, -1 - epoch))
    shuffled: list[int] = torch.randperm(count, generator=draw).tolist()
    return shuffled


def _optimiser(model: nn.Module, settings: Train) -> torch.optim.AdamW:
    """AdamW over what requires gradients; matrices decay, norms and biases do not."""
    import torch

    chosen = [one for one in model.parameters() if one.requires_grad]
    groups = [
        {"params": [one for one in chosen if one.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [one for one in chosen if one.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([one for one in groups if one["params"]], lr=settings.lr, betas=settings.betas)


class _Means:
    """What computes: plain torch."""

    def prepare(self, model: nn.Module, optimiser: Any) -> tuple[nn.Module, Any]:
        """The model and its optimiser as the loop uses them."""
        return model, optimiser

    def computing(self) -> contextlib.AbstractContextManager[object]:
        """Where losses are computed."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients."""
        loss.backward()  # type: ignore[no-untyped-call]


class _Accelerated(_Means):
    """What computes: accelerate, which knows devices and dtypes."""

    def __init__(self, course: Course) -> None:
        import torch
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier run in this process
        if course.device != "cpu":
            torch.cuda.set_device(course.device if ":" in course.device else 0)
        precision = "bf16" if course.settings.precision == "bfloat16" else "no"
        self.accelerator: Any = Accelerator(cpu=course.device == "cpu", mixed_precision=precision)

    def prepare(self, model: nn.Module, optimiser: Any) -> tuple[nn.Module, Any]:
        """The model on its device, its forward in the chosen precision."""
        made: tuple[nn.Module, Any] = self.accelerator.prepare(model, optimiser)
        return made

    def computing(self) -> contextlib.AbstractContextManager[object]:
        """Where losses are computed, in the chosen precision."""
        found: contextlib.AbstractContextManager[object] = self.accelerator.autocast()
        return found

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients."""
        self.accelerator.backward(loss)


def check_means(settings: Train, device: str) -> None:
    """Raises MachineError where training needs accelerate, and it is missing."""
    if _accelerated(settings, device) and find_spec("accelerate") is None:
        raise MachineError(
            "training on another device or in bfloat16 needs accelerate, which is not installed", fix=models.EXTRA
        )


def _accelerated(settings: Train, device: str) -> bool:
    return device != "cpu" or settings.precision != "float32"


@contextlib.contextmanager
def _means(course: Course) -> Iterator[_Means]:
    """What computes: torch alone where there is neither another device nor another precision, so that nothing is between."""
    import torch

    try:
        yield _Accelerated(course) if _accelerated(course.settings, course.device) else _Means()
    except torch.OutOfMemoryError:
        raise MachineError(
            "the device has too little memory",
            fix="Write less in `micro_batch_tokens` (or `batch_size`), or `gradient_checkpointing: true`.",
        ) from None


class _Told:
    """Progress: documents since it was last told, with tokens a second and the loss in the words."""

    def __init__(self, progress: Callable[[str, int, int], None], lessons: Lessons, total: int) -> None:
        self.progress, self.total = progress, total
        self.what, self.unit = f"train on {lessons.DOCUMENTS}", lessons.TOKENS
        self.start, self.tokens = time.monotonic(), 0

    def skip(self, documents: int) -> None:
        """What an earlier run has done."""
        if documents:
            self.progress(self.what, documents, self.total)

    def __call__(self, step: Step, loss: float) -> None:
        """One step more."""
        self.tokens += step.tokens
        rate = self.tokens / max(time.monotonic() - self.start, 1e-9)
        self.progress(f"{self.what}, loss {loss:.4f}, {rate:,.0f} {self.unit}/s", step.documents, self.total)


class _State:
    """What a checkpoint holds, and the file it is in."""

    def __init__(self, model: nn.Module, optimiser: torch.optim.AdamW, work: Path) -> None:
        self.model, self.optimiser, self.work = model, optimiser, work
        self.path, self.metrics = work / CHECKPOINT, work / METRICS
        self.trained = {name: one for name, one in model.named_parameters() if one.requires_grad}

    def note(self, values: Mapping[str, float]) -> None:
        """Write down one step's values."""
        with scratch.written(self.metrics), self.metrics.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def save(self, metrics: Sequence[Mapping[str, float]]) -> None:
        """Write a checkpoint beside, make it durable, and put it in the place of the last."""
        self.work.mkdir(parents=True, exist_ok=True)
        scratch.put(self.metrics, "".join(json.dumps(one) + "\n" for one in metrics).encode())
        tensors: dict[str, Tensor] = {}
        for name, value in self.model.state_dict().items():
            tensors.setdefault(f"model/{name}", value.detach().cpu().clone())
        for name, parameter in self.trained.items():
            for key, value in self.optimiser.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value.detach().cpu().clone()
        part = self.path.with_suffix(".part")
        scratch.save(part, tensors, metadata={"step": str(len(metrics))})
        with scratch.written(part):
            scratch.durable(part)
            os.replace(part, self.path)
            scratch.durable(self.work)

    def load(self) -> list[dict[str, float]]:
        """Put the last checkpoint into the model and its optimiser; the values of the steps that it is behind."""
        from safetensors import safe_open

        self.work.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            self.metrics.unlink(missing_ok=True)
            return []
        with safe_open(self.path, "pt") as file:
            count = int(file.metadata()["step"])
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        self.model.load_state_dict(
            {name.removeprefix("model/"): value for name, value in found.items() if name.startswith("model/")}
        )
        for name, parameter in self.trained.items():
            own = {key: found.get(f"{key}/{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            kept = {key: value for key, value in own.items() if value is not None}
            if kept:
                # AdamW counts its steps on the CPU.
                on = {key: value if key == "step" else value.to(parameter.device) for key, value in kept.items()}
                self.optimiser.state[parameter] = on
        lines = self.metrics.read_bytes().splitlines()[:count]
        metrics: list[dict[str, float]] = [json.loads(line) for line in lines]
        if len(metrics) != count:
            raise InputError("is damaged", where=str(self.metrics), fix="Delete it, and run again.")
        scratch.put(self.metrics, b"".join(line + b"\n" for line in lines))
        return metrics


# The model in training and the checkpoint that it comes from


def unfreeze(model: nn.Module, names: naming.Names, checkpoint: Checkpoint, trainable: str | tuple[str, ...]) -> None:
    """Let the parameters of these tensors be trained. Raises RecipeError where patterns hit none."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    at = places(checkpoint.tensors)
    hit = False
    for parameter, pieces in names.pieces.items():
        chosen = trainable == "all" or any(matches(tuple(trainable), at[piece.tensor]) for piece in pieces)
        own = parameters.get(parameter)
        if chosen and own is not None and own.is_floating_point():
            own.requires_grad_(True)
            hit = True
    if not hit:
        raise RecipeError(
            f"`trainable: {', '.join(trainable)}` fits none of the target's {len(at)} tensors",
            fix=f"They are called like {', '.join(sorted(at)[:3])}.",
        )


def names_of(folder: models.Folder, model: nn.Module | None = None) -> naming.Names:
    """Where the target's tensors lie in its model, as headers show it, and with the model, by their values too.

    Raises InputError for one that could not be written back.
    """
    names = naming.names_of(model or models.empty_model(folder), naming.shapes(folder.checkpoint))
    if model is not None:
        names = naming.checked(names, model, folder.checkpoint)
    for name, why in names.lost.items():
        if why != NOT_READ:
            raise InputError(f"'{name}' cannot be trained: {why}", where=str(folder.path))
    return names


NOT_READ = "the model's class has no such parameter"


class Trained(Mapping[str, "Tensor"]):
    """A trained model as the tensors of the checkpoint that it comes from, by name, in their dtypes and shapes.

    Each is made when it is asked for. A tensor that the model's class does not read is given as it is stored.
    """

    def __init__(self, model: nn.Module, names: naming.Names, checkpoint: Checkpoint) -> None:
        self.state: dict[str, Tensor] = model.state_dict()
        self.checkpoint = checkpoint
        self.pieces: dict[str, list[naming.Piece]] = {}
        for pieces in names.pieces.values():
            for piece in pieces:
                self.pieces.setdefault(piece.tensor, []).append(piece)

    def __getitem__(self, name: str) -> Tensor:
        import torch

        from mergeflow.dtypes import torch_dtype

        stored = self.checkpoint.tensors[name]
        if name not in self.pieces:
            return naming.read_tensor(self.checkpoint, name)
        found = []
        for piece in sorted(self.pieces[name], key=lambda piece: piece.start):
            whole = self.state[piece.parameter]
            inside = whole if piece.expert is None else whole[piece.expert]
            found.append(inside if not stored.shape else inside[piece.at : piece.at + piece.rows])
        value = found[0] if len(found) == 1 else torch.cat(found)
        made = value.detach().to("cpu", torch_dtype(stored.dtype), copy=True).contiguous()
        if made.is_floating_point() and not bool(torch.isfinite(made).all()):
            raise NumericError(f"the trained '{name}' has NaN or Inf in {stored.dtype.name}", fix="Lower `lr`.")
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.checkpoint.tensors))

    def __len__(self) -> int:
        return len(self.checkpoint.tensors)


# The record


def record(metrics: Sequence[Mapping[str, float]]) -> dict[str, bytes]:
    """The values of all steps as JSON lines, and a plot of the losses."""
    lines = "".join(json.dumps(one) + "\n" for one in metrics)
    return {METRICS: lines.encode(), PLOT: plot(metrics).encode()}


WIDTH, HEIGHT, MARGIN = 720, 360, 48
COLOURS = ("#1f6feb", "#d1642e", "#2e8b57")


def plot(metrics: Sequence[Mapping[str, float]]) -> str:
    """An SVG of each loss over the steps."""
    names = [name for name in metrics[0] if "loss" in name] if metrics else []
    values = [one[name] for one in metrics for name in names]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    high = high if high > low else low + 1

    def place(index: int, value: float) -> str:
        x = MARGIN + (WIDTH - 2 * MARGIN) * index / max(len(metrics) - 1, 1)
        y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (value - low) / (high - low)
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<path d="M{MARGIN},{MARGIN} V{HEIGHT - MARGIN} H{WIDTH - MARGIN}" fill="none" stroke="#888"/>',
        f'<text x="4" y="{MARGIN}">{high:.4g}</text><text x="4" y="{HEIGHT - MARGIN}">{low:.4g}</text>',
        f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - 16}" text-anchor="end">step {len(metrics)}</text>',
    ]
    for index, name in enumerate(names):
        points = " ".join(place(at, one[name]) for at, one in enumerate(metrics))
        colour = COLOURS[index % len(COLOURS)]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(f'<text x="{MARGIN + 8 + 120 * index}" y="24" fill="{colour}">{name.replace("_", " ")}</text>')
    return "\n".join([*parts, "</svg>", ""])

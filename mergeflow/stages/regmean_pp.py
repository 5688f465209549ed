"""RegMean++: RegMean whose Grams come from what the merged model's own layers give (arXiv:2508.03121).

RegMean asks of each linear weight to be near every model's own on the inputs that this model's own lower layers made. The merged
model has other lower layers, and its weights meet other inputs. Here the Grams of a block are those of its inputs in the merged
model: blocks are merged from the first to the last, and each model's block runs, on that model's data, behind the merged blocks.
So no Gram can be collected, published or cached beforehand by whoever holds one model: all models and all data must be at hand
at once, and that is why this is a stage of its own and no option of `op: regmean`. What it leaves is an artifact too, but of
weights: the tensors of the first model by name, which a node gives like those of any model.

The order of things, for a model of the form inputs -> block 0 .. block L-1 -> end:
 1. All that is not solved is the weighted mean at once: embeddings, norms, biases, and weights that `only` leaves out.
 2. The merged model's inputs to block 0 are kept for each batch of each model's data.
 3. For each block: every model's own block runs on the kept inputs of its data, and gives Grams; the block's linear weights are
    solved as `op: regmean` solves them; the merged block then runs on the same inputs, and what it gives is kept in their place.
 4. What comes behind the blocks (a pooler, a head) is one more block.
Within a block a model's own layers feed each other, as published. Each block of each model runs once over its data, the merged
one once over all of it: twice the runs of collecting Grams. The models are held in memory, and the kept inputs on disk where
they are many.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeflow.errors import MachineError, RecipeError
from mergeflow.hub import SMALL_FILE
from mergeflow.ops.base import numbers
from mergeflow.ops.regmean_pp import RegMeanPP
from mergeflow.ops.unchanged import differing
from mergeflow.settings import places
from mergeflow.stages import Write, collecting, data, models, naming, stopped, walking

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mergeflow.recipe.grammar import DataSource
    from mergeflow.stages.data import Batch


METADATA = {"format": "pt"}
"""What the headers of a merged model say beside its tensors: it is a checkpoint like any."""

SIDE_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Files beside the first model's weights that go with the merged one as they are, so that it opens: config, tokenizer, template."""


def is_side_file(name: str) -> bool:
    """Whether a file of the first model goes with the merged one."""
    return "/" not in name and name.endswith(SIDE_FILES) and not name.endswith((".index.json", "mergeflow.json"))


def side_files(folder: Path) -> dict[str, bytes]:
    """The first model's side files by name; what is too large for one, no output copies either."""
    found = [path for path in sorted(folder.iterdir()) if is_side_file(path.name) and path.is_file()]
    return {path.name: path.read_bytes() for path in found if path.stat().st_size <= SMALL_FILE}


@dataclass(frozen=True)
class Candidate:
    """A model to merge: a local Hugging Face folder, and the data its Grams are to be of."""

    model: Path
    data: DataSource


@dataclass(frozen=True)
class MergeJob:
    """One merge. `op` says how a weight is solved, with its settings over the model; `only` which are; the rest is as in
    `StageJob`."""

    op: RegMeanPP
    candidates: tuple[Candidate, ...]
    folder: Path
    work: Path
    write: Write
    only: tuple[str, ...] | None = None
    device: str = "cpu"
    memory: int = 2 << 30
    threads: int = 1
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    stop: threading.Event = field(default_factory=threading.Event)


def run(job: MergeJob) -> None:
    """Merge, and write the tensors of the first model by name, in their dtypes.

    Raises RecipeError for models of different tensors or without a stack of blocks, MachineError where they do not fit the memory,
    NumericError where a weight cannot be solved or over 0.1% of batches have a NaN or Inf, InputError for bad data.
    """
    import torch

    folders = [models.open_folder(one.model) for one in job.candidates]
    check(job.op, folders)
    _check_memory(job, folders)
    with collecting.threads(job.threads), torch.no_grad():
        sides = [_load(job, number, folder) for number, folder in enumerate(folders)]
        merging = _Merging(job, sides, models.load_model(folders[0], job.device))
        merging.walk()
        job.write(_Written(merging), side_files(folders[0].path), METADATA)


def check(op: RegMeanPP, folders: Sequence[models.Folder]) -> None:
    """Raises RecipeError for what headers and configs show to be no merge: before anything runs, and for a plan."""
    if len(folders) < 2:
        raise RecipeError("regmean_pp merges two models or more")
    resolved(op, folders[0], len(folders))
    if folders[0].task == "seq2seq":
        raise RecipeError(f"{folders[0].architecture} has two stacks of blocks", fix="Use `op: regmean`.")
    first = naming.shapes(folders[0].checkpoint)
    for folder in folders[1:]:
        other = naming.shapes(folder.checkpoint)
        odd = next((name for name in sorted(first.keys() | other.keys()) if first.get(name) != other.get(name)), None)
        if odd is not None:
            raise RecipeError(
                f"'{odd}' is {list(first.get(odd, ())) if odd in first else 'not there'} in the first model, and "
                f"{list(other[odd]) if odd in other else 'not there'} in {folder.path.name}",
                fix="regmean_pp merges models of the same tensors.",
            )


def resolved(op: RegMeanPP, folder: models.Folder, count: int) -> dict[str, RegMeanPP]:
    """The op at each tensor of so many models like this. Raises RecipeError where a setting has no value or weights are all 0."""
    return {
        name: op.resolved(op.values_at(place, range(count)))
        for name, place in places(folder.checkpoint.tensors).items()
    }


def needed_bytes(folders: Sequence[models.Folder]) -> int:
    """Bytes of the models and of the merged one, which are in memory together."""
    return (len(folders) + 1) * folders[0].elements * models.compute_dtype(folders[0]).itemsize


def _check_memory(job: MergeJob, folders: Sequence[models.Folder]) -> None:
    needed = needed_bytes(folders)
    if needed > job.memory:
        raise MachineError(
            f"{len(folders)} models and the merged one take {needed:,} bytes, and may take {job.memory:,}",
            fix="Give it more --memory, or use `op: regmean`, which reads its models by rows.",
        )


@dataclass
class _Side:
    """One model with its data, and what its Grams are collected by."""

    model: nn.Module
    folder: models.Folder
    examples: data.Examples
    collector: collecting.Collector
    blocks: Sequence[nn.Module]
    outputs: walking._Outputs


def _load(job: MergeJob, number: int, folder: models.Folder) -> _Side:
    candidate = job.candidates[number]
    examples = data.read_examples(candidate.data, job.folder, folder, job.op.max_length)
    model = models.load_model(folder, job.device)
    collecting.settle(model, examples)
    names = naming.checked(naming.names_of(model, naming.shapes(folder.checkpoint)), model, folder.checkpoint)
    share = job.memory // 8 // len(job.candidates)
    return _Side(
        model,
        folder,
        examples,
        collecting.Collector(model, names, "gram", models.compute_dtype(folder), job.device),
        blocks_of(model, folder),
        walking._Outputs(job.work / f"outputs-{number}", share),
    )


def blocks_of(model: nn.Module, folder: models.Folder) -> Sequence[nn.Module]:
    """The list of like blocks that holds the most parameters. Raises RecipeError where a model has none."""
    from torch import nn

    stacks: list[list[nn.Module]] = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
    ]
    if not stacks:
        raise RecipeError(f"{folder.architecture} is no stack of like blocks", fix="Use `op: regmean`.")
    return max(stacks, key=lambda stack: sum(one.numel() for block in stack for one in block.parameters()))


class _Done(Exception):
    """The block at work has run."""


@dataclass
class _Merging:
    """The merged model in the making."""

    job: MergeJob
    sides: list[_Side]
    model: nn.Module
    blocks: Sequence[nn.Module] = field(init=False)
    names: naming.Names = field(init=False)
    pieces: dict[str, list[naming.Piece]] = field(default_factory=dict)
    in_tuples: bool = False
    """Whether blocks give tuples, whose first is what the next reads."""

    def __post_init__(self) -> None:
        first = self.sides[0]
        collecting.settle(self.model, first.examples)
        self.blocks = blocks_of(self.model, first.folder)
        self.names = first.collector.names
        for pieces in self.names.pieces.values():
            for piece in pieces:
                self.pieces.setdefault(piece.tensor, []).append(piece)
        self.state: dict[str, Tensor] = self.model.state_dict()
        self.at = resolved(self.job.op, first.folder, len(self.sides))

    def walk(self) -> None:
        """Merge from the first block to what comes behind the last."""
        for name in self.pieces:
            self.put(name, self.mean(name))
        self.look()
        for index, side in enumerate(self.sides):
            for batch in self.told(side):
                self.embed(index, batch)
        for at in range(len(self.blocks)):
            self.solve([partial(self.through, index, at, side.blocks[at]) for index, side in enumerate(self.sides)])
            for index, side in enumerate(self.sides):
                for batch in self.told(side):
                    self.through(index, at, None, batch)
        self.solve([partial(self.behind, index) for index in range(len(self.sides))])
        for side in self.sides:
            shutil.rmtree(side.outputs.folder, ignore_errors=True)

    def told(self, side: _Side) -> Iterator[Batch]:
        """The batches of a model's data, with a look at `stop` before each and word of each."""
        total = sum(data.batches_of(len(one.examples.examples), self.job.op.batch_size) for one in self.sides)
        for batch in side.examples.batches(self.job.op.batch_size, self.job.device):
            if self.job.stop.is_set():
                raise stopped()
            yield batch
            self.job.progress("batches through layers", 1, 2 * total * (len(self.blocks) + 1))

    # Running

    def look(self) -> None:
        """See in one run how the model calls its blocks. Raises RecipeError where that is not each once, in their order."""
        called: list[int] = []

        def hook(module: nn.Module, args: object, made: object, number: int) -> None:
            called.append(number)
            self.in_tuples = isinstance(made, tuple)

        handles = [
            block.register_forward_hook(partial(hook, number=number)) for number, block in enumerate(self.blocks)
        ]
        try:
            side = self.sides[0]
            collecting.forward(self.model, side.examples.batch(side.examples.examples[:1], device=self.job.device))
        finally:
            for handle in handles:
                handle.remove()
        if called != list(range(len(self.blocks))):
            raise RecipeError(
                f"{self.sides[0].folder.architecture} does not run its blocks one after the other, each once",
                fix="Use `op: regmean`.",
            )

    @contextlib.contextmanager
    def _standing_in(self, blocks: Sequence[nn.Module], at: int, work: Callable[..., object]) -> Iterator[None]:
        """Blocks before `at` as the identity, and `work` in place of block `at`."""

        def identity(*args: Any, **kwargs: Any) -> object:
            return self._given(walking._first(args, kwargs))

        try:
            for block in blocks[:at]:
                block.forward = identity
            blocks[at].forward = work
            yield
        finally:
            for block in blocks:
                block.__dict__.pop("forward", None)

    def _given(self, tensor: Tensor) -> object:
        return (tensor,) if self.in_tuples else tensor

    def embed(self, index: int, batch: Batch) -> None:
        """Keep what the merged model's first block reads."""

        def catch(*args: Any, **kwargs: Any) -> object:
            self.sides[index].outputs.put(batch.number, walking._first(args, kwargs))
            raise _Done

        with self._standing_in(self.blocks, 0, catch), contextlib.suppress(_Done):
            collecting.forward(self.model, batch)

    def through(self, index: int, at: int, block: nn.Module | None, batch: Batch) -> None:
        """Run a batch through a model's own block behind the merged ones; or, with none, the merged block, whose output is kept."""
        outputs = self.sides[index].outputs
        given = outputs.get(batch.number, self.job.device)
        merged = self.blocks[at]

        def work(*args: Any, **kwargs: Any) -> object:
            args, kwargs = ((given, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": given})
            if block is not None:
                block(*args, **kwargs)
            else:
                made = type(merged).forward(merged, *args, **kwargs)
                outputs.put(batch.number, made[0] if isinstance(made, tuple) else made)
            raise _Done

        with self._standing_in(self.blocks, at, work), contextlib.suppress(_Done):
            collecting.forward(self.model, batch)

    def behind(self, index: int, batch: Batch) -> None:
        """Run a batch through what comes behind the blocks in a model, behind the merged blocks."""
        side = self.sides[index]
        given = side.outputs.get(batch.number, self.job.device)
        with self._standing_in(side.blocks, len(side.blocks) - 1, lambda *args, **kwargs: self._given(given)):
            collecting.forward(side.model, batch)

    # Merging

    def solve(self, runs: Sequence[Callable[[Batch], object]]) -> None:
        """Solve the weights whose layers the runs call, one run for each model, and put them into the merged model."""
        found: list[dict[str, collecting.Moments]] = []
        for side, run in zip(self.sides, runs, strict=True):
            count = data.batches_of(len(side.examples.examples), self.job.op.batch_size)
            first = next(iter(side.examples.batches(self.job.op.batch_size, self.job.device)))
            groups = collecting.chosen(side.collector.learn(partial(run, first)), self.job.only)
            moments = side.collector.measure(groups, self.told(side), run)
            collecting.check_dropped(side.collector.dropped, count)
            found.append({weight: moments[group.name] for group in groups for weight in group.weights})
        turned = set(self.sides[0].collector.transposed)
        for name in found[0]:
            if name in self.pieces and all(name in one for one in found):
                self.put(name, self._solved(name, [one[name] for one in found], name in turned))

    def _solved(self, name: str, moments: Sequence[collecting.Moments], transposed: bool) -> Tensor:
        """A weight, by the Grams of its inputs."""
        from mergeflow.ops.base import Block

        op = self.at[name].solving()
        shape = self.sides[0].folder.checkpoint.tensors[name].shape
        weights = list(numbers(op.weight))
        if op.weigh_by == "tokens":
            weights = [weight * one.rows for weight, one in zip(weights, moments, strict=True)]
        if not any(weights):
            return self.mean(name)
        own = [self.read(side, name).reshape(shape[0], -1) for side in self.sides]
        solving = op.solve(
            weights,
            based=False,
            reference=None,
            transposed=transposed,
            module=name,
            n_tokens=[one.rows for one in moments],
        )
        inputs = [_Held(one) for one in (*own, *(one.mean.to(own[0].dtype) for one in moments))]
        merged: Tensor = solving.compute_lazily(inputs, Block(shape=tuple(own[0].shape)))
        return merged.reshape(shape)

    def read(self, side: _Side, name: str) -> Tensor:
        """A tensor of a model's checkpoint, in the dtype that is computed in."""
        stored = naming.read_tensor(side.folder.checkpoint, name)
        return stored.to(models.compute_dtype(side.folder)) if stored.is_floating_point() else stored

    def mean(self, name: str) -> Tensor:
        """The weighted mean of a tensor. Raises RecipeError for integers and booleans that are not equal."""
        import torch

        first = self.read(self.sides[0], name)
        if not first.is_floating_point():
            if not all(first.equal(self.read(side, name)) for side in self.sides[1:]):
                raise differing().placed(name)
            return first
        total = torch.zeros(first.shape, dtype=torch.float64)
        weights = numbers(self.at[name].weight)
        for side, weight in zip(self.sides, weights, strict=True):
            if weight:
                total += self.read(side, name).to(torch.float64) * weight
        return total.div_(sum(weights)).to(first.dtype)

    def put(self, name: str, value: Tensor) -> None:
        """Put a checkpoint's tensor into the merged model's parameters."""
        for piece in self.pieces[name]:
            inside = self._inside(piece)
            (inside if not value.shape else inside[piece.at : piece.at + piece.rows]).copy_(
                value if not value.shape else value[piece.start : piece.start + piece.rows]
            )

    def take(self, name: str) -> Tensor:
        """A tensor of the merged model, in the dtype that the first model stores it in."""
        import torch

        from mergeflow.dtypes import torch_dtype

        stored = self.sides[0].folder.checkpoint.tensors[name]
        value = self.mean(name) if name not in self.pieces else None
        if value is None:
            parts = sorted(self.pieces[name], key=lambda piece: piece.start)
            cut = [
                self._inside(piece) if not stored.shape else self._inside(piece)[piece.at : piece.at + piece.rows]
                for piece in parts
            ]
            value = cut[0] if len(cut) == 1 else torch.cat(cut)
        return value.detach().to("cpu", torch_dtype(stored.dtype), copy=True).contiguous()

    def _inside(self, piece: naming.Piece) -> Tensor:
        whole = self.state[piece.parameter]
        return whole if piece.expert is None else whole[piece.expert]


@dataclass(frozen=True, eq=False)
class _Held:
    """A matrix in memory, by rows."""

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.matrix.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop)."""
        return self.matrix[start:stop]


class _Written(Mapping[str, "Tensor"]):
    """The merged tensors by name, each made when it is asked for."""

    def __init__(self, merging: _Merging) -> None:
        self._merging = merging
        self._names = sorted(merging.sides[0].folder.checkpoint.tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._merging.take(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

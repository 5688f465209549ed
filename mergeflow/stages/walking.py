"""The block walker: statistics of a model that is larger than memory, one block after the other.

A decoder is a list of blocks, each of which reads what the one before gave. So the outputs of one block for all batches are
kept (in the scratch folder where they are many), a block's weights are read from their files, all batches run through it, and
it is dropped: every weight is read once.

The model's own forward makes what a block is given beside its input (masks, positions), whatever the family: all blocks but the
one at work stand in as the identity, the one at work is given the kept input in place of its own, and the run ends behind it.
So a walk computes what the whole model would, to the bit. A model that is no such list is run by mergeflow.stages.offloading.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeflow.stages import collecting, data, models, naming, offloading, scratch
from mergeflow.stages.filling import Filling, give_back

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mergeflow.stages import StageJob
    from mergeflow.stages.data import Batch


class _Done(Exception):
    """The block at work has run: what comes after it is of no interest."""


def too_large(folder: models.Folder, memory: int) -> bool:
    """Whether a model takes more than half of the memory, as it runs."""
    if folder.ours:
        return False
    return folder.elements * models.compute_dtype(folder).itemsize > memory // 2


@dataclass
class _Outputs:
    """What the block before gave for each batch, in memory or in files, in the order of the batches."""

    folder: Path
    memory: int
    kept: dict[int, Tensor] = field(default_factory=dict)
    held: int = 0

    def put(self, number: int, tensor: Tensor) -> None:
        """Keep the output for a batch, in place of the one before."""
        before = self.kept.pop(number, None)
        self.held -= 0 if before is None else before.nbytes
        if self.held + tensor.nbytes <= self.memory:
            self.kept[number] = tensor.detach()
            self.held += tensor.nbytes
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch.save(self._path(number), {"x": tensor.detach().cpu().contiguous()})

    def get(self, number: int, device: str) -> Tensor:
        """The output for a batch."""
        from safetensors import safe_open

        if number in self.kept:
            return self.kept[number].to(device)
        with safe_open(self._path(number), "pt") as file:
            found: Tensor = file.get_tensor("x")
        return found.clone().to(device)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06}.safetensors"


@dataclass
class Walker(Filling):
    """A model whose blocks get their weights one at a time."""

    outputs: _Outputs
    stack: str
    blocks: Sequence[nn.Module]
    results: int | None = None
    """How many values a block gives; None where it gives one that stands alone. Known once one has run."""

    @property
    def embedding(self) -> str:
        """The parameter that turns tokens into vectors: large, and needed before all blocks alone."""
        return self._weight_of(self.model.get_input_embeddings())  # type: ignore[operator]

    def head(self) -> list[str]:
        """The parameter that turns vectors into tokens, if the model has one: large, and needed behind all blocks alone."""
        found: Any = getattr(self.model, "get_output_embeddings", lambda: None)()
        return [] if found is None else [self._weight_of(found)]

    def _weight_of(self, module: Any) -> str:
        """The first name of a module's weight, under which `named_parameters` has it."""
        return next(name for name, parameter in self.model.named_parameters() if parameter is module.weight)

    def outside(self) -> list[str]:
        """Parameters that stand in no block."""
        return [name for name, _ in self.model.named_parameters() if not name.startswith(f"{self.stack}.")]

    def inside(self, index: int) -> list[str]:
        """The parameters of a block."""
        prefix = f"{self.stack}.{index}."
        return [name for name, _ in self.model.named_parameters() if name.startswith(prefix)]

    @contextlib.contextmanager
    def _standing_in(self, at: int, work: Callable[..., Any]) -> Iterator[None]:
        """Blocks before `at` as the identity, and `work` in place of block `at`."""
        try:
            for block in self.blocks[:at]:
                block.forward = lambda *args, **kwargs: self._as_block(_first(args, kwargs))
            self.blocks[at].forward = work
            yield
        finally:
            for block in self.blocks:
                block.__dict__.pop("forward", None)

    def _as_block(self, output: Tensor) -> Any:
        """An output in the form in which a block gives it."""
        return output if self.results is None else (output, *[None] * (self.results - 1))

    def embed(self, batch: Batch) -> None:
        """Keep what the first block is given."""

        def catch(*args: Any, **kwargs: Any) -> Tensor:
            self.outputs.put(batch.number, _first(args, kwargs))
            raise _Done

        with self._standing_in(0, catch), contextlib.suppress(_Done):
            collecting.forward(self.model, batch)

    def through(self, index: int, batch: Batch, *, final: bool) -> None:
        """Run a batch through one block, and keep what comes out if nothing more is to read what goes in."""
        block = self.blocks[index]
        own = type(block).forward
        given = self.outputs.get(batch.number, self.device)

        def work(*args: Any, **kwargs: Any) -> Tensor:
            args, kwargs = ((given, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": given})
            made = own(block, *args, **kwargs)
            self.results = len(made) if isinstance(made, tuple) else None
            if final:
                self.outputs.put(batch.number, made[0] if isinstance(made, tuple) else made)
            raise _Done

        with self._standing_in(index, work), contextlib.suppress(_Done):
            self._forward(batch, given)
        give_back()

    def behind(self, batch: Batch, *, final: bool = True) -> None:
        """Run a batch through what comes after the blocks."""
        given = self.outputs.get(batch.number, self.device)
        with self._standing_in(len(self.blocks) - 1, lambda *args, **kwargs: self._as_block(given)):
            self._forward(batch, given)

    def _forward(self, batch: Batch, given: Tensor) -> None:
        inputs = {name: tensor for name, tensor in batch.inputs.items() if name != "input_ids"}
        self.model(**inputs, inputs_embeds=given, use_cache=False)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def stack_of(model: nn.Module, folder: models.Folder) -> tuple[str, Sequence[nn.Module]] | None:
    """The list of blocks that holds most of a decoder's weights, and its name; None where there is none."""
    from torch import nn

    total = sum(parameter.numel() for parameter in model.parameters())
    table = None
    if folder.task in ("causal", "classifier", "tokens", "encoder"):
        table = model.get_input_embeddings()  # type: ignore[operator]
    # Vectors of a block stand in for those of tokens, so they must be as wide.
    width = getattr(model.config, "hidden_size", None)
    if isinstance(table, nn.Embedding) and table.embedding_dim == width:
        for name, module in model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) > 1:
                inside = sum(parameter.numel() for parameter in module.parameters())
                if 2 * (inside + table.weight.numel()) > total and len({type(block) for block in module}) == 1:
                    return name, list(module)
    return None


def collect(job: StageJob, folder: models.Folder, examples: data.Examples) -> collecting.Collected:
    """Collect block by block; the groups of one block are put away before the next block is read."""
    op, size = job.op, job.op.batch_size
    model = models.empty_model(folder, buffers=True)
    collecting.settle(model, examples)
    names = naming.names_of(model, naming.shapes(folder.checkpoint))
    stack = stack_of(model, folder)
    if stack is None:
        return offloading.collect(job, folder, examples, model, names)
    outputs = _Outputs(job.work / "outputs", job.memory // 8)
    walker = Walker(model, folder, names, job.device, outputs, *stack)
    kind, dtype = collecting.kind_of(op), collecting.accumulator(op)
    collector = collecting.Collector(model, names, kind, dtype, job.device)
    wanted = collector.wanted(job.only)
    behind = any(not parameter.startswith(f"{walker.stack}.") for parameter in wanted)
    numbers = [
        int(name.removeprefix(f"{walker.stack}.").split(".")[0]) for name in wanted if name.startswith(walker.stack)
    ]
    last = len(walker.blocks) if behind else max(numbers) + 1
    count = data.batches_of(len(examples.examples), size)
    kept = collecting.Kept(job.work / "groups")
    rows: dict[str, int] = {}
    groups: list[collecting.Group] = []
    first = next(iter(examples.batches(size, job.device)))

    def told() -> Iterator[Batch]:
        for batch in examples.batches(size, job.device):
            job.check_stop()
            yield batch
            collecting.check_dropped(collector.dropped, count)
            job.progress("batches through layers", 1, count * (1 + last + behind))

    def measure(run: Callable[..., None]) -> None:
        here = collecting.chosen(collector.learn(lambda: run(first, final=False)), job.only)
        parts = list(collecting.passes(collecting.taken(job, here, kept, rows), kind, dtype, job.memory)) or [()]
        for part in parts:
            final = part is parts[-1]
            found = collector.measure(part, told(), partial(run, final=final))
            for name, moments in found.items():
                collecting.keep(kept, op, name, moments, rows)
        groups.extend(here)

    table, outside = walker.embedding, walker.outside()
    head = [] if behind else [name for name in walker.head() if name != table]
    walker.fill([name for name in outside if name not in head])
    for batch in told():
        walker.embed(batch)
    walker.empty([table])
    for index in range(last):
        inside = walker.inside(index)
        walker.fill(inside)
        measure(partial(walker.through, index))
        walker.empty(inside)
    if behind:
        walker.fill([table] if table in walker.head() else [])
        measure(walker.behind)
    collector.finish()
    shutil.rmtree(outputs.folder, ignore_errors=True)
    tokens = data.tokens_in(examples.batches(size))
    return collecting.Collected(
        tuple(groups), rows, collector.lost, collector.transposed, len(collector.dropped), tokens, kept
    )

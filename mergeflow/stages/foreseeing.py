"""What the stages of statistics take of disk, memory and time, from headers, configs and the size of data: no weight is read.

For a person who wonders whether to begin, and for refusing what cannot fit. `memory` is what a run cannot do without: where it
may take more than twice the model, all of the model is loaded, else it is run block by block (mergeflow.stages.walking and
offloading). A Fisher diagonal needs all weights at once, since gradients go all the way back, and squares of some parameters;
`regmean_pp` all models and the merged one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mergeflow.graph import Needs
from mergeflow.ops.regmean_pp import RegMeanPP
from mergeflow.ops.statistics import FisherDiag, Gram, StatisticsOp
from mergeflow.stages import collecting, data, fisher, models, naming, offloading, regmean_pp, walking
from mergeflow.stages.fuse.estimating import CHARACTERS_A_BIT, OPERATIONS

if TYPE_CHECKING:
    from torch import nn

    from mergeflow.checkpoint.statistics import Statistics

BYTES_A_SECOND = 1e9
"""What is read of a model, twice: once for its digest, once to run it."""


def needs(op: StatisticsOp, folder: models.Folder, made: Statistics, rows: Sequence[int], device: str) -> Needs:
    """What a stage takes. `made` is what it would write, by headers; `rows` are the characters of text in each row."""
    tokens = tokens_of(op, folder, rows)
    width = models.compute_dtype(folder).itemsize
    written = sum(tensor.nbytes for tensor in made.tensors.values())
    model = models.empty_model(folder)
    sides = {group: made.dimension(weight) for weight, group in made.facts.groups.items()}
    if isinstance(op, FisherDiag):
        kept, memory = 0, _of_fisher(folder, made, model)
        operations = folder.elements * tokens * (2 + 4 * _columns(op, folder))
    else:
        squares = [side * side if op.kind == "gram" else side for side in sides.values()]
        kept = written + (0 if folder.ours else tokens * _width(folder) * width)
        memory = _of_collecting(folder, made, model, 4 * max(squares, default=0))
        operations = tokens * (2 * folder.elements + 2 * sum(squares))
    return Needs(
        disk=written + kept,
        memory=memory,
        seconds=_seconds(operations, 2 * folder.nbytes, device),
        rows=len(rows),
        tokens=tokens,
    )


def needs_of_merge(
    op: RegMeanPP, folders: Sequence[models.Folder], rows: Sequence[Sequence[int]], device: str
) -> Needs:
    """What a `regmean_pp` takes; `rows` are the characters of text in each row of each model's data.

    Each model's data runs through its own blocks and through the merged ones, and what a block gives for all of it is kept.
    """
    first = folders[0]
    tokens = sum(tokens_of(op, first, own) for own in rows)
    foreseen = collecting.predict(Gram(codec="float32"), first)
    squares = sum(math.prod(shape) for _, shape in foreseen.tensors.values())
    operations = tokens * (4 * first.elements + 2 * squares)
    return Needs(
        disk=first.nbytes + tokens * _width(first) * models.compute_dtype(first).itemsize,
        memory=regmean_pp.needed_bytes(folders),
        seconds=_seconds(operations, 2 * len(folders) * first.nbytes, device),
        rows=sum(len(own) for own in rows),
        tokens=tokens,
    )


def _seconds(operations: float, read: int, device: str) -> float:
    """Seconds of so many operations, and of reading so many bytes."""
    return round(operations / OPERATIONS["cpu" if device == "cpu" else "cuda"] + read / BYTES_A_SECOND, 1)


def tokens_of(op: StatisticsOp | RegMeanPP, folder: models.Folder, rows: Sequence[int]) -> int:
    """About how many tokens the model reads: of images and of numbers one a row."""
    if folder.task in ("images", "features"):
        return len(rows)
    vocabulary = folder.number("vocab_size")
    characters = max(1.0, CHARACTERS_A_BIT * math.log2(max(vocabulary, 2)))
    longest = folder.longest(op.max_length, data.NO_CONTEXT)
    return sum(min(math.ceil(size / characters), longest) for size in rows)


def _of_collecting(folder: models.Folder, made: Statistics, model: nn.Module, mean: int) -> int:
    """Bytes of weights that are in memory at once at least, and of one running mean, which is there while a block is."""
    sizes = {name: one.nbytes for name, one in model.named_parameters()}
    stack = None if folder.ours else walking.stack_of(model, folder)
    if folder.ours:
        return sum(sizes.values()) + mean
    if stack is None:
        return offloading.least_bytes(model, offloading.blocks_of(model)) + mean
    name, blocks = stack
    inside = sum(size for own, size in sizes.items() if own.startswith(f"{name}."))
    block = max(sum(one.nbytes for one in one_block.parameters()) for one_block in blocks)
    table: Any = model.get_input_embeddings().weight  # type: ignore[operator]
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    pieces = naming.names_of(model, naming.shapes(folder.checkpoint)).pieces
    within = {piece.tensor for own, found in pieces.items() if own.startswith(f"{name}.") for piece in found}
    behind = any(weight not in within for weight in made.facts.groups)
    outside = sum(sizes.values()) - inside
    if head is not None and head.weight is not table and not behind:
        outside -= int(head.weight.nbytes)
    return max(outside, outside - int(table.nbytes) + block + mean)


def _of_fisher(folder: models.Folder, made: Statistics, model: nn.Module) -> int:
    """Bytes of all weights, and of the sums of squares of the largest parameter."""
    weights = sum(one.nbytes for one in model.parameters())
    largest = max((tensor.elements for tensor in made.tensors.values()), default=0)
    return weights + largest * fisher.bytes_beside(models.compute_dtype(folder).itemsize)


def _columns(op: FisherDiag, folder: models.Folder) -> int:
    """Backward passes of an example."""
    if op.estimator == "expected":
        return max(folder.n_labels - 1, 1)
    return op.samples if op.estimator == "sampled" else 1


def _width(folder: models.Folder) -> int:
    return folder.number("hidden_size", "n_embd", "d_model")

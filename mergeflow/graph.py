"""A plan as plain data: a merge is a table, and each row is one output tensor and the expression that makes it.

Nothing here computes, reads or writes. Expressions compare by identity: planning makes each one once, so that two rows
that need the same thing hold the same object, and an executor can find what is shared with a dict keyed by `id`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mergeflow.checkpoint import Checkpoint, StoredTensor
from mergeflow.checkpoint.sources import Source
from mergeflow.dtypes import DType
from mergeflow.ops.base import Op


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    """A tensor as it stands in a checkpoint; `model` is the recipe's name for the checkpoint."""

    model: str
    tensor: StoredTensor


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """A tensor that no file holds as such: `source` makes its elements from those of `loads`."""

    source: Source
    loads: tuple[Load, ...]
    dtype: DType
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Measure:
    """Global numbers an op needs before its blocks can be computed, e.g. a norm or the threshold of a trim.

    `over` holds the inputs of each tensor that is measured: one tuple for a measure within a tensor, one for each
    floating tensor of the node for a measure over the model. `keys` are those of a random op's draws, for each of `over`.
    Rows that need the same numbers share one `Measure`.
    """

    op: Op
    over: tuple[tuple[Expression, ...], ...]
    keys: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Apply:
    """An op on the tensors that its inputs make. `op` is resolved: each setting has its value at this tensor.

    `keys` are those of a random op's draws, one for each input. `before` counts the leaves that stand before this tensor in a
    measure over several. `of` is the shape of a result that has no inputs to take it from.
    """

    op: Op
    inputs: tuple[Expression, ...]
    measure: Measure | None = None
    keys: tuple[int, ...] = ()
    before: int = 0
    of: tuple[int, ...] = ()


Expression = Load | Made | Apply


def shape_of(expression: Expression) -> tuple[int, ...]:
    """The shape of what an expression makes: that of its inputs, which is the same for all."""
    while isinstance(expression, Apply):
        if not expression.inputs:
            return expression.of
        expression = expression.inputs[0]
    return expression.tensor.shape if isinstance(expression, Load) else expression.shape


def loads_of(expression: Expression) -> tuple[Load, ...]:
    """The stored tensors that a leaf reads; none for an op."""
    if isinstance(expression, Load):
        return (expression,)
    return expression.loads if isinstance(expression, Made) else ()


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One output tensor: what makes it, and where its bytes go.

    `compute` is the dtype the expression is evaluated in; `shard` an index into `Plan.shards`; `offset` counts bytes
    from the start of the shard's file. A row of `bits` holds the truth of what the expression makes, eight elements to a byte,
    the first in the lowest bit.
    """

    output: str
    node: str
    name: str
    expression: Expression
    dtype: DType
    shape: tuple[int, ...]
    shard: int
    offset: int
    compute: DType
    check_finite: bool = True
    bits: bool = False

    @property
    def elements(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.size


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """One output file: its path below the output folder, its exact header (8 length bytes and JSON), and its size."""

    output: str
    file: str
    header: bytes
    size: int


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file that is written beside the shards: `content` as it stands, or a copy of `name` out of a model's folder."""

    output: str
    file: str
    content: bytes | None = None
    model: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class EqualTensors:
    """Two stored tensors that the config calls tied: the run holds their bytes against each other before it writes."""

    model: str
    kept: StoredTensor
    dropped: StoredTensor


@dataclass(frozen=True, slots=True)
class LayerSource:
    """Where a layer of a stack comes from: a layer of a model or node, which the recipe calls `source`.

    `model` is the entry of `models:` that the names and the config of that layer come from, `model_layer` its number there.
    """

    source: str
    layer: int
    model: str
    model_layer: int


@dataclass(frozen=True, slots=True)
class Stacked:
    """A numbered stack that the node `node` made: its prefix, and where each of its layers comes from, in order.

    `like` holds the number of layers of each stack of the model whose config the output takes.
    """

    node: str
    blocks: str
    layers: tuple[LayerSource, ...]
    like: Mapping[str, int] = field(default_factory=dict)

    def runs(self) -> list[tuple[str, str, str]]:
        """Layers, the model or node they come from, and which these are there, as ranges: `("4-7", "b", "8-11")`."""
        runs: list[tuple[int, int]] = []
        for n, one in enumerate(self.layers):
            before = self.layers[n - 1]
            if n and (one.source, one.layer) == (before.source, before.layer + 1):
                runs[-1] = runs[-1][0], n
            else:
                runs.append((n, n))

        def span(first: int, last: int) -> str:
            return str(first) if first == last else f"{first}-{last}"

        own = self.layers
        return [(span(a, b), own[a].source, span(own[a].layer, own[b].layer)) for a, b in runs]


@dataclass(frozen=True, slots=True)
class Needs:
    """About what a stage takes: bytes on the cache's disk, bytes of memory beside activations, and seconds; and of the data the
    rows and tokens, where these were counted."""

    disk: int
    memory: int
    seconds: float
    rows: int | None = None
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """A stage of a recipe: its node and op, the model or node that it runs, on what data, the key of its artifact in the
    cache, whether that is there (`done`), and what making it takes, where that can be told."""

    node: str
    op: str
    model: str
    data: str | None
    key: str
    done: bool
    needs: Needs | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Everything that headers can tell about a run.

    `recipe` is the resolved recipe; `models` are the opened checkpoints by the recipe's names; `spaces` says of each output
    what its tensors are, `stacks` which of its numbered stacks `stack` made; `stages` are what runs before any row, their
    tensors foreseen where they have not run yet; `loads` are all tensors that rows read, once each. `parts` are named digests
    of all that decides the result, `digest` a hex BLAKE3 over them.
    """

    name: str
    recipe: Mapping[str, Any]
    models: Mapping[str, Checkpoint]
    rows: tuple[Row, ...]
    shards: tuple[Shard, ...]
    side_files: tuple[SideFile, ...]
    loads: tuple[Load, ...] = ()
    equal: tuple[EqualTensors, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    digest: str = ""
    parts: Mapping[str, str] = field(default_factory=dict)
    spaces: Mapping[str, str] = field(default_factory=dict)
    stacks: Mapping[str, tuple[Stacked, ...]] = field(default_factory=dict)
    stages: tuple[PlannedStage, ...] = ()

    @property
    def bytes_in(self) -> int:
        """Bytes of all tensors that rows read, once each."""
        return sum(load.tensor.nbytes for load in self.loads)

    @property
    def bytes_out(self) -> int:
        return sum(shard.size for shard in self.shards)

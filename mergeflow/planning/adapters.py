"""An adapter as the recipe sees it: deltas by the names of its base's tensors, and zeros, which read nothing, everywhere else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergeflow.checkpoint import ADAPTER_WEIGHTS, StoredTensor
from mergeflow.checkpoint.adapter import MERGE, Adapter, Update
from mergeflow.graph import Expression, Load, Made
from mergeflow.ops.unchanged import Unchanged
from mergeflow.planning.expressions import Expressions
from mergeflow.planning.models import HEADS, ModelTable, SourceTable, Table
from mergeflow.recipe import ModelSource

if TYPE_CHECKING:
    from mergeflow.planning.planner import Planner

CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")
"""Layers that models of GPT-2's kind store transposed, square or not."""


class AdapterTable(SourceTable):
    """What an adapter changes.

    A whole weight (`modules_to_save`, a bias) is given as such: what uses it takes the base from it, as from any model.
    """

    sparse = True
    space = "delta"

    def __init__(self, planner: Planner, name: str, source: ModelSource, adapter: Adapter) -> None:
        super().__init__(planner, name, adapter)
        given = {one: _as_tensor(update, update.shapes[0]) for one, update in adapter.updates.items()}
        self.tensors = self._renamed(source, self._chosen(source, given))
        self.updates = {new: adapter.updates[tensor.name] for new, tensor in self.tensors.items()}
        self.flag = adapter.transposed
        self.transposed = dict.fromkeys(self.tensors, self.flag)
        self.places = self._places()
        self.made: dict[str, Expression] = {}
        self.lowrank: dict[str, Expression] = {}

    def settle_layouts(self, models: Sequence[ModelTable]) -> None:
        """Find out which matrices the base stores as (in, out), as Conv1D does.

        The config's flag does not tell: peft changes it as it meets layers of both kinds, and saves what the last one was. So
        the shapes in the recipe's models say it. What is square goes with the layers of its own name, else with all others
        (a head aside, which is never a Conv1D), else by the flag.
        """
        seen: dict[str, bool] = {}
        turning = {name: update for name, update in self.updates.items() if update.turns}
        for name, update in turning.items():
            stored = (model.tensors[name].shape for model in models if name in model.tensors)
            shape = next((shape for shape in stored if shape in update.shapes), None)
            if len(update.shapes) == 2 and shape is not None:
                seen[name] = shape == update.shapes[1]
        by_layer: dict[str, set[bool]] = {}
        for name, transposed in seen.items():
            by_layer.setdefault(_layer(name), set()).add(transposed)
        others = {transposed for name, transposed in seen.items() if not name.endswith(HEADS)}
        heads = any(name.endswith(HEADS) for name in turning)
        for name, update in turning.items():
            if len(update.shapes) == 2:
                self.transposed[name] = seen.get(name, self.flag)
                shape = update.shapes[self.transposed[name]]
                self.tensors[name] = _as_tensor(update, shape)
                continue
            ways = by_layer.get(_layer(name)) or others or {self.flag}
            if len(ways) > 1 or (not others and heads and not self.flag and _layer(name) in CONV1D):
                self.findings.gather(
                    self.where,
                    "{names} is square, and nothing tells whether the base stores it transposed, as Conv1D does",
                    MERGE,
                    name,
                )
            self.transposed[name] = next(iter(ways))

    def expression(self, name: str) -> Expression:
        found = self.made.get(name)
        if found is None:
            saved = self.updates[name].saved
            found = self.made[name] = Load(self.name, saved) if saved is not None else self._lowrank(name)
        return found

    def gives_delta(self, name: str) -> bool:
        return self.updates[name].saved is None

    def beside(self, name: str) -> Expression | None:
        update = self.updates[name]
        return self._lowrank(name) if update.saved is not None and update.up is not None else None

    def _lowrank(self, name: str) -> Expression:
        found = self.lowrank.get(name)
        if found is None:
            update = self.updates[name]
            assert update.up is not None and update.down is not None, "it has a low-rank part"
            source = update.source(transposed=self.transposed[name] and update.turns)
            loads = Load(self.name, update.up), Load(self.name, update.down)
            found = self.lowrank[name] = Made(source, loads, update.dtype, self.tensors[name].shape)
        return found


class Filled(Table):
    """A sparse table as a whole one: the tensors of a model, zeros where the sparse one has none."""

    space = "delta"

    def __init__(self, table: Table, model: ModelTable, make: Expressions) -> None:
        self.table, self.model, self.make = table, model, make
        self.leaf, self.added = table.leaf, table.added
        self.tensors = {**model.tensors, **table.tensors}
        self.places = {**model.places, **table.places}
        self.made: dict[str, Expression] = {}

    def expression(self, name: str) -> Expression:
        if name in self.table.tensors:
            return self.table.expression(name)
        stored = self.tensors[name]
        if stored.dtype.kind == "float":
            return self.make.zeros(stored.shape)
        if name not in self.made:
            self.made[name] = self.make.apply(
                Unchanged(deltas=(False,), gives_delta=True), (self.model.expression(name),)
            )
        return self.made[name]

    def gives_delta(self, name: str) -> bool:
        return name not in self.table.tensors or self.table.gives_delta(name)


def _as_tensor(update: Update, shape: tuple[int, ...]) -> StoredTensor:
    """A tensor of the base as the adapter knows it."""
    return StoredTensor(update.name, update.dtype, shape, ADAPTER_WEIGHTS, 0, math.prod(shape) * update.dtype.size)


def _layer(name: str) -> str:
    """The layer's own name: `q_proj` of `model.layers.0.self_attn.q_proj.weight`."""
    return name.rpartition(".")[0].rpartition(".")[2]

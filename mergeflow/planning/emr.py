"""`emr` as tables: the parts that an artifact holds, and the models that `emr_apply` makes of a node or of an artifact."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Protocol

from mergeflow.checkpoint import Checkpoint, StoredTensor
from mergeflow.checkpoint.sources import Bits, Everywhere
from mergeflow.dtypes import BY_NAME
from mergeflow.errors import InputError, RecipeError, did_you_mean
from mergeflow.graph import Apply, Expression, Load, Made, Measure
from mergeflow.ops.emr import Emr, EmrApply, EmrMask, EmrScaler, EmrStored, EmrTask, EmrUnified
from mergeflow.planning.models import SPACE_KEY, Table
from mergeflow.planning.nodes import NodeTable, Ready
from mergeflow.recipe import Node
from mergeflow.settings import places

if TYPE_CHECKING:
    from mergeflow.planning.planner import Planner

KIND_KEY = "mergeflow.artifact"
"""The key of a file's metadata that says what kind of artifact it holds, in JSON."""


class Tasks(Protocol):
    """What makes models of tasks."""

    tasks: tuple[str, ...]

    def task_model(self, name: str, task: str, base: Expression) -> Expression | None:
        """A task's tensor of this name; None where the artifact has none."""


class EmrTable(Table):
    """The parts of an `emr` node: its artifact's tensors."""

    def __init__(self, planner: Planner, node: Node) -> None:
        self.node = NodeTable(planner, node)
        assert isinstance(node.op, Emr)
        self.op, self.space, self.leaf = node.op, "artifact", self.node.leaf
        self.tasks = tuple(one.model for one in node.inputs)
        findings = planner.findings
        twice = next((task for task in self.tasks if self.tasks.count(task) > 1), None)
        if twice:
            fix = "Give the model another name under `models:`, so that its task has one."
            findings.add(RecipeError(f"the task '{twice}' is there twice", where=self.node.where("inputs"), fix=fix))
        if node.only is not None:
            fix = "Write `only:` on the models."
            findings.add(
                RecipeError("an artifact holds all or nothing of a tensor", where=self.node.where("only"), fix=fix)
            )
        self.tensors: dict[str, StoredTensor] = {}
        self.parts: dict[str, tuple[str, int]] = {}
        for name, tensor in self.node.tensors.items():
            if tensor.dtype.kind == "float":
                self._add_parts(name, tensor)
        if node.op.over_model:
            self._add_scalers("", next(iter(self.parts.values()), ("", 0))[0])
        self.places = places(self.tensors)
        self.bits = {name for name in self.tensors if name.startswith("mask.")}
        self.fixed = {name for name in self.tensors if name.startswith("scaler.")}
        self.metadata = {KIND_KEY: json.dumps({"kind": "emr", "tasks": self.tasks, "rescale": node.op.rescale})}
        self.made: dict[str, Expression] = {}

    def _add_parts(self, name: str, tensor: StoredTensor) -> None:
        self._add(f"unified.{name}", tensor.dtype.name, tensor.shape, (name, -1))
        for index, task in enumerate(self.tasks):
            self._add(f"mask.{task}.{name}", "uint8", (-(-tensor.elements // 8),), (name, index))
        if not self.op.over_model:
            self._add_scalers(f".{name}", name)

    def _add_scalers(self, suffix: str, name: str) -> None:
        for index, task in enumerate(self.tasks):
            self._add(f"scaler.{task}{suffix}", "float32", (), (name, index))

    def _add(self, part: str, dtype: str, shape: tuple[int, ...], of: tuple[str, int]) -> None:
        kind = BY_NAME[dtype]
        self.tensors[part] = StoredTensor(part, kind, shape, "", 0, math.prod(shape) * kind.size)
        self.parts[part] = of

    def expression(self, name: str) -> Expression:
        """What makes a part."""
        found = self.made.get(name)
        if found is None:
            found = self.made[name] = self._made(name)
        return found

    def _made(self, part: str) -> Expression:
        name, task = self.parts[part]
        ready = self._ready(name)
        if not isinstance(ready, Ready):
            return ready  # a problem was noted
        if part.startswith("unified."):
            return Apply(EmrUnified(), ready.inputs)
        if part.startswith("mask."):
            return Apply(EmrMask(task=task), ready.inputs)
        return Apply(EmrScaler(task=task), (), self._measure(name, ready))

    def _ready(self, name: str) -> Ready | Expression:
        """The base and a delta for each task, or what stands there where a problem was noted."""
        ready = self.node.readied(name)
        if isinstance(ready, Ready) and not self.op.over_model and len(ready.inputs) != len(self.tasks) + 1:
            self.node.findings.gather(
                self.node.where(),
                "`emr` keeps a mask for each task, and an input is left out at {names}",
                "Write `missing: base` or `mismatch: base` in place of `omit`.",
                name,
            )
        return ready

    def _measure(self, name: str, ready: Ready) -> Measure:
        return self.node.measure()[0] if self.op.over_model else Measure(ready.op, (ready.inputs,))

    def task_model(self, name: str, task: str, base: Expression) -> Expression | None:
        """A task's tensor of this name; None where the artifact has none."""
        if name not in self.node.tensors:
            return None
        ready = self._ready(name)
        if not isinstance(ready, Ready):
            return ready
        op = EmrTask(task=self.tasks.index(task))
        return Apply(op, (base, *ready.inputs), self._measure(name, ready))

    def settled(self, name: str, base: Table) -> Expression | None:
        """An integer or boolean tensor that is never computed on: the base's, which the run holds against the inputs'."""
        return self.node.expression(name) if base is self.node.base and name in self.node.tensors else None


class EmrArtifact(Table):
    """An artifact of `emr` on disk."""

    def __init__(self, planner: Planner, name: str, checkpoint: Checkpoint) -> None:
        self.leaf, self.space = name, "artifact"
        self.tensors = dict(checkpoint.tensors)
        self.places = places(self.tensors)
        where = planner.recipe.where(("artifacts", name))
        try:
            told = json.loads(checkpoint.metadata.get(KIND_KEY, ""))
            self.tasks: tuple[str, ...] = tuple(map(str, told["tasks"])) if told["kind"] == "emr" else ()
        except (ValueError, KeyError, TypeError):
            self.tasks = ()
        if not self.tasks or checkpoint.metadata.get(SPACE_KEY) != "artifact":
            planner.findings.add(
                InputError("is no artifact that this mergeflow knows", where=where, fix="Name the folder of an `emr`.")
            )
        self.loads = {name: Load(self.leaf, tensor) for name, tensor in self.tensors.items()}
        lacks = [
            f"mask.{task}.{part.removeprefix('unified.')}"
            for part in self.tensors
            if part.startswith("unified.")
            for task in self.tasks
            if f"mask.{task}.{part.removeprefix('unified.')}" not in self.tensors
            or not self._scaler(task, part.removeprefix("unified."))
        ]
        if lacks:
            fix = "Fetch or make the artifact again."
            planner.findings.add(InputError(f"lacks a mask or a scaler: '{lacks[0]}'", where=where, fix=fix))

    def _scaler(self, task: str, name: str) -> str:
        """The scaler of a task for a tensor, or an empty string."""
        both = (f"scaler.{task}.{name}", f"scaler.{task}")
        return next((one for one in both if one in self.tensors and self.tensors[one].elements == 1), "")

    def expression(self, name: str) -> Expression:
        """A stored part."""
        return self.loads[name]

    def task_model(self, name: str, task: str, base: Expression) -> Expression | None:
        """A task's tensor of this name; None where the artifact has none."""
        unified = self.loads.get(f"unified.{name}")
        if unified is None:
            return None
        kind, shape = BY_NAME["float32"], unified.tensor.shape
        mask = Made(Bits(), (self.loads[f"mask.{task}.{name}"],), kind, shape)
        scaler = Made(Everywhere(), (self.loads[self._scaler(task, name)],), kind, shape)
        return Apply(EmrStored(), (base, unified, mask, scaler))

    def settled(self, name: str, base: Table) -> Expression | None:
        """None: the artifact holds no integers."""
        return None


class EmrApplyTable(NodeTable):
    """One task's model: names, integers and what the artifact lacks nothing of from the base."""

    def __init__(self, planner: Planner, node: Node) -> None:
        super().__init__(planner, node)
        op, source = node.op, self.inputs[0]
        assert isinstance(op, EmrApply)
        self.task = op.task
        self.source: EmrTable | EmrArtifact | None = source if isinstance(source, EmrTable | EmrArtifact) else None
        if self.source is not None and not self.source.tasks:
            self.source = None  # which was said
        elif self.source is not None and self.task not in self.source.tasks:
            fix = did_you_mean(self.task, self.source.tasks) or f"There are {', '.join(self.source.tasks)}."
            self.findings.add(RecipeError(f"there is no task '{self.task}'", where=self.where("task"), fix=fix))
            self.source = None

    def _extra_names(self) -> None:
        """The parts of an artifact are no names of a model's; what it has beyond the base is an error."""
        self.beyond = {}
        source = self.inputs[0]
        if isinstance(source, EmrArtifact):
            for part in source.tensors:
                name = part.removeprefix("unified.")
                if name != part and name not in self.tensors:
                    self.findings.gather(
                        self.where("base"),
                        "lacks {names}, which the artifact has",
                        "Name the base it was made with.",
                        name,
                    )

    def _made(self, name: str) -> Expression:
        assert self.base is not None
        base, stored = self.base.expression(name), self.tensors[name]
        if self.source is not None and stored.dtype.kind != "float":
            return self.source.settled(name, self.base) or base
        if self.source is None:
            return base
        unified = self.source.tensors.get(f"unified.{name}")
        if unified is None or unified.shape != stored.shape:
            what = "lacks {names}" if unified is None else "has {names} in another shape"
            self.findings.gather(
                self.where("emr"),
                f"'{self.node.inputs[0].model}' {what}",
                "Give it the base that it was made with.",
                name,
            )
            return base
        return self.source.task_model(name, self.task, base) or base

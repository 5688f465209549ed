"""One plan in the making: the tables of models and nodes, then the rows and files of each output."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from blake3 import blake3

from mergeflow import __version__
from mergeflow.checkpoint import Checkpoint
from mergeflow.checkpoint.adapter import Adapter
from mergeflow.checkpoint.statistics import Statistics
from mergeflow.dtypes import BY_NAME, DType
from mergeflow.errors import RecipeError, raise_all
from mergeflow.graph import Apply, EqualTensors, Expression, Load, Plan, Row, Shard, SideFile, Stacked
from mergeflow.layout import Tensor, lay_out
from mergeflow.planning.adapters import AdapterTable, Filled
from mergeflow.planning.emr import EmrApplyTable, EmrArtifact, EmrTable
from mergeflow.planning.expressions import FLOAT32, FLOAT64, Expressions, loads
from mergeflow.planning.findings import Findings, some
from mergeflow.planning.models import SPACE_KEY, ModelTable, Table, packed, quantised, settle_ties
from mergeflow.planning.nodes import NodeTable
from mergeflow.planning.stacks import StackTable, counterparts, numbered_stacks
from mergeflow.planning.statistics import AimTable, FisherTable, LotTable, RegmeanTable, StatisticsTable
from mergeflow.planning.vocabulary import Vocabularies
from mergeflow.recipe import Node, Output, Recipe
from mergeflow.settings import Place, value_at

NO_MODEL = ("artifact", "statistics")
"""Spaces of what is no model: nothing of a model stands beside it."""

KINDS: Mapping[str, Callable[[Planner, Node], Table]] = {
    "aim": AimTable,
    "emr": EmrTable,
    "emr_apply": EmrApplyTable,
    "fisher": FisherTable,
    "lot": LotTable,
    "regmean": RegmeanTable,
    "stack": StackTable,
}
"""Ops whose nodes are tables of their own kind."""


def default_like(recipe: Recipe, name: str) -> str:
    """The entry of `models:` that a node takes its config from: base, else first input.

    Of `select` it is that of the rule without `match`, of `stack` its `rest`, else its first entry.
    """
    while name in recipe.nodes:
        node = recipe.nodes[name]
        name = node.rest or node.base or node.inputs[-1 if node.op.takes == "rules" else 0].model
    return name


def references(recipe: Recipe, names: Iterable[str]) -> set[str]:
    """The models and nodes of these names, and all that the nodes are made of."""
    wanted: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name not in wanted:
            wanted.add(name)
            todo += recipe.nodes[name].references if name in recipe.nodes else ()
    return wanted


def keeps_quantisation(rows: Iterable[Row], like: str, checkpoint: Checkpoint) -> bool:
    """Whether an output's rows are all those of its quantised `like` as stored, so that what its config says of them holds."""
    return bool(quantised(checkpoint)) and all(
        isinstance(row.expression, Load) and row.expression.model == like and row.dtype is row.expression.tensor.dtype
        for row in rows
    )


class Planner:
    """Everything that is shared while one plan is made."""

    def __init__(self, recipe: Recipe, models: Mapping[str, Checkpoint]) -> None:
        self.recipe, self.models = recipe, models
        self.findings = Findings()
        stored = (tensor for checkpoint in models.values() for tensor in checkpoint.tensors.values())
        self.expressions = Expressions(any_wide=any(tensor.dtype is FLOAT64 for tensor in stored))
        self.vocabularies = Vocabularies(models)
        self.equal: list[EqualTensors] = []
        self.known_places: dict[Any, Mapping[str, Place]] = {}
        self.rows: list[Row] = []
        self.shards: list[Shard] = []
        self.side_files: list[SideFile] = []
        self.stacks: dict[str, tuple[Stacked, ...]] = {}
        self.tables: dict[str, Table] = {}
        for name, checkpoint in models.items():
            if isinstance(checkpoint, Statistics):
                self.tables[name] = StatisticsTable(self, name, checkpoint)
            elif name in recipe.artifacts:
                self.tables[name] = EmrArtifact(self, name, checkpoint)
            elif isinstance(checkpoint, Adapter):
                self.tables[name] = AdapterTable(self, name, recipe.models[name], checkpoint)
            else:
                self.tables[name] = ModelTable(self, name, recipe.models[name], checkpoint)
        opened = [table for table in self.tables.values() if isinstance(table, ModelTable)]
        settle_ties(opened, *self._tied(), references(recipe, [output.node for output in recipe.outputs.values()]))
        for table in self.tables.values():
            if isinstance(table, AdapterTable):
                table.settle_layouts(opened)

    def _tied(self) -> tuple[str | None, str]:
        """The outputs' word for tied heads, and the model whose config it means."""
        outputs = list(self.recipe.outputs.values())
        if len({output.tied for output in outputs}) > 1:
            self.findings.add(
                RecipeError(
                    "the outputs say different things in `tied`",
                    where=self.recipe.where(outputs[-1].path),
                    fix="Give every output the same word.",
                )
            )
        return outputs[0].tied, outputs[0].like or default_like(self.recipe, outputs[0].node)

    def table(self, name: str) -> Table:
        """The table of a model or node, made once."""
        found = self.tables.get(name)
        if found is None:
            node = self.recipe.nodes[name]
            found = self.tables[name] = KINDS.get(node.op.name, NodeTable)(self, node)
        return found

    def is_tied(self, model: str) -> bool:
        """Whether a model's config ties its head to the embedding."""
        table = self.tables.get(model)
        return isinstance(table, ModelTable) and table.tied

    # Outputs

    def plan(self) -> Plan:
        """The plan. Raises every problem found, together."""
        for output in self.recipe.outputs.values():
            self._output(output)
        raise_all(self.findings.all())
        if not self.rows:
            raise RecipeError("the output has no tensors", fix="Look at `only:` of the models and nodes.")
        parts = self._digests()
        return Plan(
            name=self.recipe.name,
            recipe=self.recipe.resolved,
            models=self.models,
            rows=tuple(self.rows),
            shards=tuple(self.shards),
            side_files=tuple(self.side_files),
            loads=tuple(loads(*(row.expression for row in self.rows))),
            equal=tuple(self.equal),
            warnings=tuple(self.findings.warnings),
            notes=tuple(self.findings.notes),
            digest=plan_digest(parts),
            parts=parts,
            spaces={output.key: self.table(output.node).space for output in self.recipe.outputs.values()},
            stacks=self.stacks,
        )

    def _output(self, output: Output) -> None:
        table = self.table(output.node)
        given = self.tables[output.like or default_like(self.recipe, output.node)]
        like = given if isinstance(given, ModelTable) else None
        if table.space in NO_MODEL:
            like = None
        elif like is None:
            self.findings.add(
                RecipeError(
                    f"the output would be like '{given.leaf}', which is no model and has no config of one",
                    where=self.recipe.where((*output.path, "like") if output.like else output.path),
                    fix="Name its base under `like:`.",
                )
            )
            return
        if table.sparse and like is not None:
            table = Filled(table, like, self.expressions)
        others = self._check_like(output, table, like) if like is not None else {}
        self.findings.check_setting(output.dtype, table.places, self.recipe.where((*output.path, "dtype")))
        tensors: list[Tensor] = []
        expressions: list[Expression] = []
        for name, stored in table.tensors.items():
            expression = table.expression(name)
            if table.space == "delta" and not table.gives_delta(name):
                self.findings.gather(
                    self.recipe.where(output.path),
                    f"the adapter '{table.leaf}' holds whole weights, whose deltas need its base: {{names}}",
                    "Put it onto its base, `{op: add, base: ..., inputs: [...]}`, and write that, or its `task_vector`.",
                    name,
                )
            model = like.tensors.get(others.get(name, "")) if like is not None else None
            dtype = stored.dtype
            if dtype.kind == "float" and name not in table.fixed:
                dtype = self._dtype(output, table.places[name], expression) or (model or stored).dtype
            expressions.append(expression)
            tensors.append(Tensor(name, dtype, stored.shape, model.file if model and not table.stacked else None))
        metadata = {"format": "pt", **table.metadata}
        if table.space != "weight":
            metadata[SPACE_KEY] = table.space
        like_files = list(like.checkpoint.files) if like is not None else []
        size = output.shard_size or (self._stacked_size(table, like) if like is not None else None)
        files, index = lay_out(tensors, like_files=like_files, shard_size=size, metadata=metadata)
        layers = numbered_stacks(like.tensors) if table.stacked and like is not None else {}
        counts = {prefix: len(found) for prefix, found in layers.items()}
        self.stacks[output.key] = tuple(replace(one, like=counts) for one in table.stacked.values())
        home = {
            name: (shard, offset)
            for shard, file in enumerate(files, start=len(self.shards))
            for name, offset in file.offsets.items()
        }
        self.shards += [Shard(output.key, file.name, file.header, file.size) for file in files]
        rows = [
            Row(
                output=output.key,
                node=output.node,
                name=tensor.name,
                expression=expression,
                dtype=tensor.dtype,
                shape=tensor.shape,
                shard=home[tensor.name][0],
                offset=home[tensor.name][1],
                compute=FLOAT64 if self.expressions.is_wide(expression) else FLOAT32,
                check_finite=output.non_finite == "error" and tensor.dtype.kind == "float",
                bits=tensor.name in table.bits,
            )
            for tensor, expression in zip(tensors, expressions, strict=True)
        ]
        self.rows += rows
        if like is not None:
            self._check_quantised(output, rows, like)
            self._check_tokenizer(output, table, like)
        for name in table.side_files:
            self.side_files.append(SideFile(output.key, name, model=table.leaf, name=name))
        if index is not None:
            self.side_files.append(SideFile(output.key, index[0], index[1]))

    def _stacked_size(self, table: Table, like: ModelTable) -> int | None:
        """How large a file of stacked layers may be, which are not dealt to the files of `like`: as its largest of several."""
        sizes = [file.size for file in like.checkpoint.files.values()]
        return max(sizes) if table.stacked and len(sizes) > 1 else None

    def _dtype(self, output: Output, place: Place, expression: Expression) -> DType | None:
        """The dtype that the output, or a `cast` at the end, asks for at a place."""
        if output.dtype is not None:
            return BY_NAME[value_at(output.dtype, place)]
        rounded = expression.op.result_dtype() if isinstance(expression, Apply) else None
        return BY_NAME[rounded] if rounded else None

    def _check_quantised(self, output: Output, rows: Sequence[Row], like: ModelTable) -> None:
        """Quantised tensors go out only with the config that explains them: all of `like`, as stored."""
        names = {name for name, table in self.tables.items() if isinstance(table, ModelTable) and table.quantised}
        if not names or "quantization_config" in output.config or self.findings.all():
            return
        if keeps_quantisation(rows, like.name, like.checkpoint):
            return
        found = [(load, row.name) for row in rows for load in loads(row.expression) if load.model in names]
        found = [(load, name) for load, name in found if packed(load.tensor)]
        if found:
            owner = self.tables[found[0][0].model]
            self.findings.add(
                RecipeError(
                    f"'{owner.leaf}' is quantised ({owner.quantised}), and the output would hold some of its tensors without "
                    f"all that explains them: {some([name for _, name in found])}",
                    where=self.recipe.where(output.path),
                    fix=f"Give out '{owner.leaf}' whole, in its own dtypes and with `like: {owner.leaf}`, "
                    "or use the checkpoint it was quantised from.",
                )
            )

    def _check_tokenizer(self, output: Output, table: Table, like: ModelTable) -> None:
        """A warning where rows of the vocabulary mean other words than the tokenizer that goes with the output."""
        tokenizer = output.tokenizer or like.name
        where = self.recipe.where((*output.path, "tokenizer"))
        for name, place in table.places.items():
            for model in self.expressions.speakers(table.expression(name)) if place.vocab else ():
                clash = self.vocabularies.clash(tokenizer, model)
                if clash:
                    self.findings.warnings[f"{where}: {clash}. The output has rows of '{model}'"] = None

    def _check_like(self, output: Output, table: Table, like: ModelTable) -> dict[str, str]:
        """For each tensor that of `like` which it stands for: all must have one, but for those kept by `extra: keep`."""
        others, has = counterparts(table, like)
        lacks = [name for name in table.tensors if name not in others and name not in table.added]
        unlike = [n for n, other in others.items() if like.tensors[other].shape != table.tensors[n].shape]
        # A row takes the dtype that `like` has, and only a float may be rounded to another.
        kinds = [n for n, other in others.items() if like.tensors[other].dtype.kind != table.tensors[n].dtype.kind]
        if lacks:
            difference = f"lacks {some(lacks)}"
        elif has:
            difference = f"has {some(has)} beyond it"
        elif unlike:
            difference = f"has {some(unlike)} in another shape"
        elif kinds:
            mine, theirs = table.tensors[kinds[0]].dtype.name, like.tensors[others[kinds[0]]].dtype.name
            difference = f"has {some(kinds)} as {theirs}, not {mine}"
        else:
            return others
        self.findings.add(
            RecipeError(
                f"`like: {like.name}` must have the tensors of '{output.node}', and it {difference}",
                where=self.recipe.where((*output.path, "like")),
                fix="Name a model under `like:` that has the same tensors.",
            )
        )
        return others

    def _digests(self) -> dict[str, str]:
        """Named digests of all that goes into the plan's digest, so that a refusal can say what changed."""
        inputs = [
            (
                name,
                checkpoint.folder.revision,
                [(f.name, f.size, f.header_digest) for f in checkpoint.files.values()],
                *sorted(checkpoint.deciding.items()),
            )
            for name, checkpoint in self.models.items()
        ]
        stamps = [
            (name, [checkpoint.stamp(file) for file in checkpoint.files]) for name, checkpoint in self.models.items()
        ]
        layout = [
            [(s.output, s.file, blake3(s.header).hexdigest(), s.size) for s in self.shards],
            [(row.output, row.name, row.shard, row.offset) for row in self.rows],
        ]
        return {
            "the recipe": _digest(self.recipe.resolved),
            "the inputs' headers": _digest(inputs),
            "the inputs' files (size or time of change)": _digest(stamps),
            "the layout of the output": _digest(layout),
            "the version of mergeflow": __version__,
            "the version of torch": version("torch"),
        }


def plan_digest(parts: Mapping[str, str]) -> str:
    """Hex BLAKE3 over the named digests of a plan."""
    return blake3("\n".join(f"{key} {value}" for key, value in parts.items()).encode()).hexdigest()


def _digest(data: Any) -> str:
    return blake3(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

"""A recipe and the headers of its models become a plan: the only module that knows both.

Each model and each node is a table from tensor names to expressions; a node's table asks the tables below it, tensor by tensor,
only for what an output asks of it, and keeps each expression that it made, so that what two rows share is one object.
Everything that headers can show is found here, before a weight is read, and reported together: problems of one kind at one
input are one line with a count, not a line for each tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from blake3 import blake3

from mergeflow import __version__
from mergeflow.checkpoint import Checkpoint, StoredTensor
from mergeflow.dtypes import BY_NAME, DType
from mergeflow.errors import InputError, MergeflowError, RecipeError, did_you_mean, raise_all
from mergeflow.graph import Apply, EqualTensors, Expression, Load, Measure, Plan, Row, Shard, SideFile
from mergeflow.layout import Tensor, lay_out
from mergeflow.ops import Linear, Op, TaskArithmetic, TaskVector
from mergeflow.ops.base import DeltaOp, Space
from mergeflow.ops.unchanged import Unchanged
from mergeflow.recipe import ModelSource, Node, Output, Recipe
from mergeflow.settings import Place, matches, places, rules_in, value_at

SPACE_KEY = "mergeflow.space"
"""The key in a safetensors header's metadata that says what the tensors are."""

FLOAT32, FLOAT64 = BY_NAME["float32"], BY_NAME["float64"]
HEADS = ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "shared.weight")
QUANTISED = (
    ".weight_scale",
    ".weight_scale_inv",
    "_scale_inv",
    ".qweight",
    ".qzeros",
    ".absmax",
    ".quant_map",
    ".weight_packed",
)


def needed_models(recipe: Recipe) -> list[str]:
    """The models that the outputs ask for, in the recipe's order: inputs of nodes, `like` and `tokenizer`."""
    wanted: set[str] = set()
    todo = [output.node for output in recipe.outputs.values()]
    todo += [name for output in recipe.outputs.values() for name in (output.like, output.tokenizer) if name]
    while todo:
        name = todo.pop()
        if name not in wanted:
            wanted.add(name)
            todo += recipe.nodes[name].references if name in recipe.nodes else ()
    return [name for name in recipe.models if name in wanted]


def default_like(recipe: Recipe, name: str) -> str | None:
    """The entry of `models:` that a node takes its names from: base, else first input, of `select` the rule without `match`."""
    while name in recipe.nodes:
        node = recipe.nodes[name]
        name = node.base or node.inputs[-1 if node.op.takes == "rules" else 0].model
    return name


class _Problems:
    """Problems as they are found; those of one kind at one place are gathered into one line."""

    def __init__(self) -> None:
        self.errors: list[MergeflowError] = []
        self.gathered: dict[tuple[str, str, str], list[str]] = {}
        self.warnings: list[str] = []

    def add(self, error: MergeflowError) -> None:
        if all(str(error) != str(other) for other in self.errors):
            self.errors.append(error)

    def gather(self, where: str, what: str, fix: str, name: str) -> None:
        """Note that `what` (with `{names}` where the tensors go) holds for this tensor too."""
        self.gathered.setdefault((where, what, fix), []).append(name)

    def all(self) -> list[MergeflowError]:
        lines = [
            RecipeError(what.replace("{names}", some(names)).replace("{count}", str(len(names))), where=where, fix=fix)
            for (where, what, fix), names in self.gathered.items()
        ]
        return [*self.errors, *lines]


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few of the names, and how many more there are."""
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


class _Table:
    """What a model or node gives: its tensors by name, as stored where the names come from, and an expression for each."""

    space: Space
    tensors: dict[str, StoredTensor]
    places: dict[str, Place]
    leaf: str
    """The entry of `models:` that the names come from."""

    def expression(self, name: str) -> Expression:
        raise NotImplementedError


class _ModelTable(_Table):
    """A checkpoint as the recipe sees it: after `only`, `rename` and the rule for tied heads."""

    def __init__(self, planner: _Planner, name: str, source: ModelSource, checkpoint: Checkpoint) -> None:
        self.name = self.leaf = name
        self.checkpoint = checkpoint
        self.where = planner.recipe.where(("models", name))
        self.tensors = self._renamed(planner, source, checkpoint.tensors)
        declared = checkpoint.metadata.get(SPACE_KEY, "weight")
        if source.space and SPACE_KEY in checkpoint.metadata and source.space != declared:
            planner.problems.add(
                RecipeError(
                    f"the file says that it holds a {declared}, the recipe says {source.space}", where=self.where
                )
            )
        self.space = source.space or ("delta" if declared == "delta" else "weight")
        self._tie(planner)
        self.places = places(self.tensors, self._vocabulary())
        self.quantised = self._quantised()
        self.loads: dict[str, Expression] = {}

    def _renamed(
        self, planner: _Planner, source: ModelSource, stored: Mapping[str, StoredTensor]
    ) -> dict[str, StoredTensor]:
        tensors = dict(stored)
        if source.only is not None:
            kept = places(tensors)
            tensors = {name: tensor for name, tensor in tensors.items() if matches(source.only, kept[name])}
            if not tensors:
                near = did_you_mean(source.only[0], stored)
                planner.problems.add(
                    RecipeError(
                        f"`only: {', '.join(source.only)}` fits none of the {len(stored)} tensors",
                        where=self.where,
                        fix=near,
                    )
                )
        if not source.rename:
            return tensors
        unused = dict(source.rename)
        renamed: dict[str, StoredTensor] = {}
        for name, tensor in tensors.items():
            new = name
            for old, replacement in source.rename.items():
                before, star, after = old.partition("*")
                if name == old or (
                    star and len(name) >= len(old) - 1 and name.startswith(before) and name.endswith(after)
                ):
                    new = (
                        replacement.replace("*", name[len(before) : len(name) - len(after)], 1) if star else replacement
                    )
                    unused.pop(old, None)
                    break
            if new in renamed:
                planner.problems.add(RecipeError(f"the rename gives two tensors the name '{new}'", where=self.where))
            renamed[new] = tensor
        for old in unused:
            planner.problems.add(
                RecipeError(f"the rename '{old}' fits no tensor", where=self.where, fix=did_you_mean(old, tensors))
            )
        return renamed

    def _vocabulary(self) -> list[str]:
        config = self.checkpoint.config or {}
        rows = _from_config(config, "vocab_size")
        if isinstance(rows, int):
            inside = places(self.tensors)
            return [n for n, t in self.tensors.items() if t.shape[:1] == (rows,) and inside[n].layers is None]
        return [n for n, t in self.tensors.items() if len(t.shape) == 2 and n.endswith((*EMBEDDINGS, *HEADS))]

    def _tie(self, planner: _Planner) -> None:
        self.head = next((n for n in self.tensors for h in HEADS if n == h or n.endswith(f".{h}")), None)
        self.embedding = next((n for n in self.tensors for e in EMBEDDINGS if n == e or n.endswith(f".{e}")), None)
        self.tied = (
            _from_config(self.checkpoint.config or {}, "tie_word_embeddings") is True and self.embedding is not None
        )
        if self.tied and self.head and self.embedding and planner.tied != "untie":
            kept, dropped = self.tensors[self.embedding], self.tensors.pop(self.head)
            if planner.tied is None:
                if (kept.shape, kept.dtype) != (dropped.shape, dropped.dtype):
                    planner.problems.add(_tied_differently(self.name, self.head, self.where))
                planner.equal.append(EqualTensors(self.name, kept, dropped))
            planner.notes.append(f"{self.name}: '{dropped.name}' is tied to '{kept.name}' and left out")

    def give_head(self, head: str) -> None:
        """Let the embedding stand for the head that a tied checkpoint does not store."""
        if self.tied and head not in self.tensors and self.embedding:
            self.tensors[head] = self.tensors[self.embedding]
            self.places = places(self.tensors, [*self._vocabulary(), head])

    def drop_head(self) -> None:
        if self.head:
            self.tensors.pop(self.head, None)

    def _quantised(self) -> str:
        if (self.checkpoint.config or {}).get("quantization_config"):
            return "its config.json has a quantization_config"
        found = next((name for name in self.tensors if name.endswith(QUANTISED)), None)
        return f"it has '{found}'" if found else ""

    def expression(self, name: str) -> Expression:
        found = self.loads.get(name)
        if found is None:
            found = self.loads[name] = Load(self.name, self.tensors[name])
        return found


def _tied_differently(model: str, head: str, where: str) -> RecipeError:
    return RecipeError(
        f"the config of '{model}' ties '{head}' to the embedding, and the file stores another tensor for it",
        where=where,
        fix="Write `tied: untie` under `output:` to merge both, or `tied: trust_config` to drop the stored one.",
    )


def _from_config(config: Mapping[str, Any], key: str) -> Any:
    """A key of config.json, or of its text_config."""
    inner = config.get("text_config")
    return config.get(key, inner.get(key) if isinstance(inner, Mapping) else None)


@dataclass(frozen=True, slots=True)
class _Given:
    """What one input gives for one tensor: its index, expression and the stored tensor that stands for it."""

    index: int
    expression: Expression


class _NodeTable(_Table):
    """A node: names from its base or first input, expressions from its op."""

    def __init__(self, planner: _Planner, node: Node) -> None:
        self.planner, self.node, self.problems = planner, node, planner.problems
        self.where = planner.recipe.where(node.path)
        self.inputs = [planner.table(one.model) for one in node.inputs]
        self.base = planner.table(node.base) if node.base else None
        self.bases = [planner.table(one.base) if one.base else self.base for one in node.inputs]
        self.others = planner.table(node.others) if node.others else None
        self.made: dict[str, Expression] = {}
        self.kept: dict[str, int] = {}
        self.all = range(len(self.inputs))
        self.space = self._space()
        if node.op.takes == "rules":
            self._selected_names()
        else:
            source = self.base or self.inputs[0]
            self.leaf = source.leaf
            self.tensors, self.places = source.tensors, source.places
            self._extra_names()
        self._check_patterns()
        self._check_vocabulary()
        self.checked_quantised = False

    def at_input(self, index: int) -> str:
        key = {"model": ("model",), "rules": ("rules", index)}.get(self.node.op.takes, ("inputs", index))
        return self.planner.recipe.where((*self.node.path, *key))

    def _space(self) -> Space:
        try:
            space = self.node.op.space(self.base.space if self.base else None, [table.space for table in self.inputs])
            for base in self.bases:
                if base is not None and base is not self.base and base.space != "weight":
                    raise RecipeError(f"an input's base is a {base.space}", fix="A base must give weights.")
            if self.others is not None and self.others.space != space:
                raise RecipeError(
                    f"`others` gives a {self.others.space}, and the op a {space}", fix="Both must be of one space."
                )
            return space
        except RecipeError as error:
            self.problems.add(error.placed(self.where))
            return "weight"

    def _selected_names(self) -> None:
        """Names of `select`: all names of its models, each from the first rule that fits it."""
        self.leaf = self.inputs[-1].leaf
        self.tensors, self.chosen = {}, {}
        named: dict[str, Place] = {}
        for table in (self.inputs[-1], *self.inputs[:-1]):
            for name in table.tensors:
                named.setdefault(name, table.places[name])
        for name, place in named.items():
            index = next(i for i, rule in enumerate(self.node.rules) if rule is None or matches(rule, place))
            if name in self.inputs[index].tensors:
                self.tensors[name] = self.inputs[index].tensors[name]
                self.chosen[name] = index
            else:
                holder = next(
                    one.model for one, t in zip(self.node.inputs, self.inputs, strict=True) if name in t.tensors
                )
                self.problems.gather(
                    self.at_input(index),
                    f"the rule chooses '{self.node.inputs[index].model}', which lacks {{names}}",
                    f"Add a rule that takes them from '{holder}'.",
                    name,
                )
        self.places = places(self.tensors, [n for n in self.tensors if named[n].vocab])

    def _extra_names(self) -> None:
        """Names that inputs have beyond the node's: an error, dropped, or kept from the one input that has them."""
        beyond: dict[str, list[int]] = {}
        for index, table in enumerate(self.inputs):
            if table.tensors is not self.tensors:
                for name in table.tensors.keys() - self.tensors.keys():
                    beyond.setdefault(name, []).append(index)
        if not beyond:
            return
        # The order of sets changes with the hash seed: the inputs' own order is the only one.
        ordered = [n for table in self.inputs for n in table.tensors if n in beyond]
        extended: dict[str, StoredTensor] = {}
        for name in dict.fromkeys(ordered):
            place = self.inputs[beyond[name][0]].places[name]
            if self.node.only is not None and not matches(self.node.only, place):
                continue
            index = beyond[name][0]
            policy = self._policy(self.node.extra, place)
            if policy == "keep" and len(beyond[name]) > 1:
                holders = ", ".join(self.node.inputs[i].model for i in beyond[name])
                self.problems.gather(
                    self.where,
                    f"`extra: keep` finds {{names}} in several inputs ({holders})",
                    "Choose by `op: select`, or drop them.",
                    name,
                )
            elif policy == "keep" and self.inputs[index].space != self.space:
                self.problems.gather(
                    self.where,
                    f"`extra: keep` would put a {self.inputs[index].space} among {self.space}s: {{names}}",
                    "Drop them.",
                    name,
                )
            elif policy == "keep":
                extended[name] = self.inputs[index].tensors[name]
                self.kept[name] = index
            elif policy == "error":
                owner = self.node.inputs[index].model
                base = self.node.base or self.node.inputs[0].model
                fix = _rename_line(owner, self.inputs[index].tensors, self.tensors) or (
                    "Write `extra: drop` or `extra: keep` on the node."
                )
                head = getattr(self.planner.tables.get(self.leaf), "tied", False) and name.endswith(HEADS)
                if head:
                    fix = (
                        "One is tied and the other is not: write `tied: untie` or `tied: trust_config` under `output:`."
                    )
                self.problems.gather(
                    self.at_input(index), f"{owner} has {{count}} tensors that {base} lacks: {{names}}", fix, name
                )
        if extended:
            self.tensors = {**self.tensors, **extended}
            vocabulary = [n for t in self.inputs for n, p in t.places.items() if p.vocab]
            self.places = places(self.tensors, vocabulary)

    def _policy(self, setting: Any, place: Place) -> str:
        return setting if isinstance(setting, str) else str(value_at(setting, place))

    def _check_patterns(self) -> None:
        """Each rule must fit something, checked against all names of the node, asked for or not."""
        node, recipe = self.node, self.planner.recipe
        lists: list[tuple[str, list[tuple[str, ...] | None]]] = []
        for name in node.op.settings():
            value = getattr(node.op, name)
            lists += [(name, [rule.match for rule in rules]) for rules in rules_in(value)]
        for name in ("missing", "mismatch", "extra"):
            lists += [(name, [rule.match for rule in rules]) for rules in rules_in(getattr(node, name))]
        if node.only is not None:
            lists.append(("only", [node.only]))
        if node.rules:
            lists.append(("rules", list(node.rules)))
        for key, rules in lists:
            self.planner.check_rules(
                rules, self.places, recipe.where((*node.path, key)), self.node.extra if key == "extra" else None
            )

    def _check_vocabulary(self) -> None:
        if self.node.vocab == "ignore" or not any(place.vocab for place in self.places.values()):
            return
        if self.node.op.takes == "rules":
            return
        for index, table in enumerate(self.inputs):
            clash = self.planner.token_clash(self.leaf, table.leaf)
            if clash:
                self.problems.add(
                    RecipeError(
                        f"the tokenizers of '{self.leaf}' and '{table.leaf}' give the same ids to different tokens: {clash}",
                        where=self.at_input(index),
                        fix="Their rows mean different words. Write `vocab: ignore` on the node to merge them all the same.",
                    )
                )

    def expression(self, name: str) -> Expression:
        found = self.made.get(name)
        if found is None:
            found = self.made[name] = self._make(name)
        return found

    def _make(self, name: str) -> Expression:
        node, place = self.node, self.places[name]
        if name in self.kept:
            return self.inputs[self.kept[name]].expression(name)
        if node.op.takes == "rules":
            return self.inputs[self.chosen[name]].expression(name)
        op = node.op
        if node.only is not None and not matches(node.only, place):
            if self.others is not None:
                if name not in self.others.tensors:
                    self.problems.gather(
                        self.where,
                        f"`others: {{model: {node.others}}}` lacks {{names}}",
                        "Choose a model that has them.",
                        name,
                    )
                    return self._fallen()
                return self.others.expression(name)
            op = self._mean()
        given = self._given(name, place, op)
        if given is None:
            return self._fallen()
        base = self.base.expression(name) if self.base is not None else None
        if not given:
            if base is not None:
                return base
            self.problems.gather(
                self.where, "no input is left for {names}", "Every input lacks it or has another shape.", name
            )
            return self._fallen()
        return self._applied(op, given, base, name, place)

    def _mean(self) -> Op:
        """What `others: mean` computes: the weighted mean of the inputs (of what they learnt, where there is a base)."""
        weight = getattr(self.node.op, "weight", 1.0)
        if isinstance(self.node.op, DeltaOp):
            return self.planner.mean_op(TaskArithmetic, weight)
        return self.planner.mean_op(Linear, weight)

    def _fallen(self) -> Expression:
        """Something to stand where a problem was noted, so that the others are found too; never part of a finished plan."""
        table = self.inputs[0]
        return table.expression(next(iter(table.tensors)))

    def _given(self, name: str, place: Place, op: Op) -> list[_Given] | None:
        """What each input gives for a tensor after the rules for missing and unlike ones; None where there is a problem."""
        node, wanted = self.node, self.tensors[name]
        given: list[_Given] = []
        sound = True
        for index, table in enumerate(self.inputs):
            stored = table.tensors.get(name)
            if stored is None:
                policy, key = self._policy(node.missing, place), "missing"
            elif stored.shape != wanted.shape:
                policy, key = self._policy(node.mismatch, place), "mismatch"
            else:
                if (stored.dtype.kind != wanted.dtype.kind) or (
                    stored.dtype.kind != "float" and stored.dtype != wanted.dtype
                ):
                    self.problems.gather(
                        self.at_input(index),
                        f"{{names}} is {stored.dtype.name} in '{node.inputs[index].model}' and {wanted.dtype.name} in '{self.leaf}'",
                        "Integer and boolean tensors are never computed on or cast: choose one by `op: select`.",
                        name,
                    )
                    sound = False
                    continue
                given.append(_Given(index, table.expression(name)))
                continue
            if policy == "omit":
                continue
            if policy == "base" and self.base is not None and isinstance(op, DeltaOp):
                base = self.base.expression(name)
                given.append(_Given(index, self.planner.difference(base, base)))
                continue
            sound = False
            if policy == "base":
                self.problems.gather(
                    self.at_input(index),
                    f"`{key}: base` needs an op with a base, for {{names}}",
                    "Write `omit`, or use an op on deltas.",
                    name,
                )
            elif key == "missing":
                self._missing(index, name)
            else:
                self._mismatch(index, name, place)
        return given if sound else None

    def _missing(self, index: int, name: str) -> None:
        table, owner = self.inputs[index], self.node.inputs[index].model
        source = self.node.base or self.node.inputs[0].model
        fix = (
            _rename_line(owner, table.tensors, self.tensors)
            or "Write `missing: omit` (or `base`) on the node, with rules if need be."
        )
        if name.endswith(HEADS) and getattr(self.planner.tables.get(table.leaf), "tied", False):
            fix = f"'{table.leaf}' is tied and '{self.leaf}' is not: write `tied: untie` or `tied: trust_config` under `output:`."
        self.problems.gather(self.at_input(index), f"{owner} lacks {{count}} tensors of {source}: {{names}}", fix, name)

    def _mismatch(self, index: int, name: str, place: Place) -> None:
        mine, theirs = self.tensors[name].shape, self.inputs[index].tensors[name].shape
        owner = self.node.inputs[index].model
        if (place.vocab or self.inputs[index].places[name].vocab) and mine[1:] == theirs[1:]:
            self.problems.gather(
                self.at_input(index),
                f"the vocabularies differ: {theirs[0]} rows in '{owner}', {mine[0]} in '{self.leaf}' ({{names}})",
                "Rows of different vocabularies mean different words. Merge the rest with `mismatch: base` or `omit` for '@vocab'.",
                name,
            )
        else:
            self.problems.gather(
                self.at_input(index),
                f"{{names}} has shape {list(theirs)} in '{owner}', and {list(mine)} in '{self.leaf}'",
                "Write `mismatch: omit` (or `base`) on the node, with rules if need be.",
                name,
            )

    def _applied(self, op: Op, given: list[_Given], base: Expression | None, name: str, place: Place) -> Expression:
        planner = self.planner
        if self.tensors[name].dtype.kind != "float":
            return self._unchanged(op, given, base)
        if len(given) < op.fewest:
            return given[0].expression
        kept = [one.index for one in given]
        try:
            ready = planner.resolved(op, place, kept, self.all)
        except RecipeError as error:
            self.problems.gather(self.where, f"at {{names}}: {error.what}", error.fix, name)
            return self._fallen()
        only = ready.only_input(len(given)) if base is None else None
        if only is not None:
            return given[only].expression
        self._check_quantised()
        expressions = []
        for one in given:
            expression = one.expression
            if isinstance(op, DeltaOp) and self.inputs[one.index].space == "weight":
                own = self.bases[one.index]
                if own is None or base is None:
                    raise AssertionError("an op on deltas has a base")
                if own is not self.base and (
                    name not in own.tensors or own.tensors[name].shape != self.tensors[name].shape
                ):
                    self.problems.gather(
                        self.at_input(one.index),
                        "the input's own base lacks, or has in another shape, {names}",
                        "Give it the base it was trained from.",
                        name,
                    )
                    return self._fallen()
                from_base = own.expression(name)
                if expression is not planner.differences.get((id(from_base), id(from_base))):
                    expression = planner.difference(expression, from_base)
            expressions.append(expression)
        inputs = tuple(expressions) if base is None else (base, *expressions)
        return planner.apply(ready, inputs)

    def _unchanged(self, op: Op, given: list[_Given], base: Expression | None) -> Expression:
        """Integers and booleans are never computed on: they must be equal, which the run looks at."""
        expressions = [one.expression for one in given]
        deltas = [self.inputs[one.index].space == "delta" for one in given]
        if base is not None:
            expressions, deltas = [base, *expressions], [False, *deltas]
        gives_delta = self.space == "delta" and not all(deltas)
        distinct = dict(zip(map(id, expressions), zip(expressions, deltas, strict=True), strict=True))
        if len(distinct) == 1 and not gives_delta:
            return expressions[0]
        inputs, flags = zip(*distinct.values(), strict=True)
        return self.planner.apply(Unchanged(deltas=flags, gives_delta=gives_delta), inputs)

    def _check_quantised(self) -> None:
        if self.checked_quantised:
            return
        self.checked_quantised = True
        for index, table in enumerate([*self.inputs, *([self.base] if self.base else [])]):
            reason = getattr(table, "quantised", "")
            if reason:
                where = (
                    self.at_input(index)
                    if index < len(self.inputs)
                    else self.planner.recipe.where((*self.node.path, "base"))
                )
                self.problems.add(
                    RecipeError(
                        f"'{table.leaf}' is quantised ({reason})",
                        where=where,
                        fix="Its numbers mean nothing without their scales: use the checkpoint it was quantised from.",
                    )
                )


def _rename_line(owner: str, theirs: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The `rename:` line that makes two models' names fit, where a common prefix is all that differs."""
    if not wanted:
        return ""
    for some_name in list(wanted)[:3]:
        for other in theirs:
            longer, shorter = (other, some_name) if len(other) > len(some_name) else (some_name, other)
            if longer != shorter and longer.endswith(f".{shorter}"):
                prefix = longer[: -len(shorter)]
                rename = f"{{'{prefix}*': '*'}}" if longer is other else f"{{'*': '{prefix}*'}}"
                new = {n.removeprefix(prefix) if longer is other else prefix + n for n in theirs}
                if len(new & wanted.keys()) * 2 > len(wanted):
                    return f"A prefix is all that differs: write `rename: {rename}` on '{owner}' under `models:`."
    return ""


class _Planner:
    """Everything that is shared while one plan is made."""

    def __init__(self, recipe: Recipe, models: Mapping[str, Checkpoint]) -> None:
        self.recipe, self.models = recipe, models
        self.problems = _Problems()
        self.equal: list[EqualTensors] = []
        self.notes: list[str] = []
        words = {output.tied for output in recipe.outputs.values()}
        if len(words) > 1:
            self.problems.add(
                RecipeError("the outputs say different things in `tied`", fix="Give every output the same word.")
            )
        self.tied = next(iter(words), None)
        self.tables: dict[str, _Table] = {}
        self.differences: dict[tuple[int, int], Expression] = {}
        self.wide: dict[int, bool] = {}
        self.ready: dict[Any, Op] = {}
        self.measures: dict[int, bool] = {}
        self.keep: list[Any] = []
        self.vocabularies: dict[str, Any] = {}
        self.clashes: dict[tuple[str, str], str] = {}
        self.means: dict[Any, Op] = {}
        for name, checkpoint in models.items():
            self.tables[name] = _ModelTable(self, name, recipe.models[name], checkpoint)
        self._settle_ties()

    def _settle_ties(self) -> None:
        """Follow `tied: untie | trust_config` for models of which some are tied and others not."""
        tables = [table for table in self.tables.values() if isinstance(table, _ModelTable)]
        if self.tied is None or not any(table.tied for table in tables):
            return
        like = next(iter(self.recipe.outputs.values()))
        like_name = like.like or default_like(self.recipe, like.node)
        ties = getattr(self.tables.get(like_name or ""), "tied", False)
        if self.tied == "trust_config" and ties:
            for table in tables:
                table.drop_head()
        else:
            head = next((table.head for table in tables if table.head), HEADS[0])
            for table in tables:
                table.give_head(head)

    def table(self, name: str) -> _Table:
        """The table of a model or node, made once. Chains of nodes are walked without recursion being deep: names come first."""
        found = self.tables.get(name)
        if found is None:
            found = self.tables[name] = _NodeTable(self, self.recipe.nodes[name])
        return found

    def mean_op(self, op_class: type[Any], weight: Any) -> Op:
        key = (op_class, id(weight))
        if key not in self.means:
            self.keep.append(weight)
            fields = {name: info.default for name, info in op_class.model_fields.items()}
            self.means[key] = op_class.model_construct(**{**fields, "weight": weight, "normalize": True})
        return self.means[key]

    def resolved(self, op: Op, place: Place, kept: Sequence[int], everything: range) -> Op:
        """The op with its settings' values at a place, for the inputs that are kept; equal values share one op."""
        whole = len(kept) == len(everything)
        values: tuple[Any, ...]
        key: Any = (id(op), len(kept)) if whole else None
        if key in self.ready:
            return self.ready[key]
        if whole and op.uniform:
            values = op.values_at(place, kept)
        else:
            values = op.values_at(place, kept)
            if not whole:
                values = self._renormalised(op, values, place, everything)
            key = (id(op), len(kept), values)
            if key in self.ready:
                return self.ready[key]
        self.keep.append(op)
        found = self.ready[key] = op.resolved(values)
        return found

    def _renormalised(self, op: Op, values: tuple[Any, ...], place: Place, everything: range) -> tuple[Any, ...]:
        """Weights of the inputs that are left, scaled so that their sum stays, where the op does not divide by it anyway."""
        names = list(op.settings())
        if "weight" not in names or getattr(op, "normalize", False):
            return values
        index = names.index("weight")
        total = sum(op.values_at(place, everything)[index])
        left = sum(values[index])
        if abs(left) < 1e-8:
            raise RecipeError(
                "the weights of the inputs that are left sum to 0", fix="Change the weights, or `missing:`."
            )
        return (*values[:index], tuple(weight * total / left for weight in values[index]), *values[index + 1 :])

    def difference(self, model: Expression, base: Expression) -> Expression:
        key = (id(model), id(base))
        if key not in self.differences:
            self.differences[key] = self.apply(_SUBTRACT, (base, model))
        return self.differences[key]

    def apply(self, op: Op, inputs: tuple[Expression, ...]) -> Apply:
        if id(op) not in self.measures:
            self.keep.append(op)
            self.measures[id(op)] = op.measures
        made = Apply(op, inputs, Measure(op, (inputs,)) if self.measures[id(op)] else None)
        self.wide[id(made)] = any(map(self.is_wide, inputs))
        self.keep.append(made)
        return made

    def is_wide(self, expression: Expression) -> bool:
        """Whether an expression reads float64 and so is computed in it."""
        if isinstance(expression, Load):
            return expression.tensor.dtype is FLOAT64
        return self.wide[id(expression)]

    def check_rules(
        self, rules: Sequence[tuple[str, ...] | None], at: Mapping[str, Place], where: str, beyond: Any = None
    ) -> None:
        if beyond is not None:
            return  # rules of `extra` are about names that the node does not have
        hidden = set(at)
        for rule in rules:
            if rule is None:
                continue
            hit = {name for name, place in at.items() if matches(rule, place)}
            if not hit:
                near = did_you_mean(rule[0], at) or f"Names are such as {some(list(at))}."
                shown = rule[0] if len(rule) == 1 else f"[{', '.join(rule)}]"
                self.problems.add(
                    RecipeError(f"the pattern '{shown}' fits none of the {len(at)} tensors", where=where, fix=near)
                )
            elif not hit & hidden:
                self.problems.warnings.append(f"{where}: the rule '{', '.join(rule)}' is hidden by the rules before it")
            hidden -= hit

    # Vocabularies

    def token_clash(self, first: str, second: str) -> str:
        """The first five ids to which two models' tokenizers give different tokens, as text; empty where they agree."""
        if first == second or first not in self.models or second not in self.models:
            return ""
        if (first, second) not in self.clashes:
            mine, theirs = self._vocabulary(first), self._vocabulary(second)
            differ = (
                [i for i in sorted(mine.keys() & theirs.keys()) if mine[i] != theirs[i]] if mine is not theirs else []
            )
            shown = ", ".join(f"{i} is '{mine[i]}' and '{theirs[i]}'" for i in differ[:5])
            self.clashes[first, second] = shown if len(differ) <= 5 else f"{shown} ({len(differ)} ids in all)"
        return self.clashes[first, second]

    def _vocabulary(self, model: str) -> dict[int, str]:
        """Tokens by id, out of the model's tokenizer files; empty where it has none. Equal files share one object."""
        if model in self.vocabularies:
            found: dict[int, str] = self.vocabularies[model]
            return found
        folder = self.models[model].folder
        tokens: dict[int, str] = {}
        for name in ("tokenizer.json", "vocab.json", "vocab.txt"):
            if not folder.exists(name):
                continue
            content = folder.read(name)
            digest = blake3(content).hexdigest()
            if digest in self.vocabularies:
                tokens = self.vocabularies[digest]
            else:
                tokens = self.vocabularies[digest] = _tokens(name, content, f"{self.models[model].folder.label}/{name}")
            break
        self.vocabularies[model] = tokens
        return tokens

    # Outputs

    def plan(self) -> Plan:
        rows: list[Row] = []
        shards: list[Shard] = []
        side_files: list[SideFile] = []
        for output in self.recipe.outputs.values():
            self._output(output, rows, shards, side_files)
        raise_all(self.problems.all())
        if not rows:
            raise RecipeError("the output has no tensors", fix="Look at `only:` of the models and nodes.")
        parts = self._digests(rows, shards)
        digest = blake3("\n".join(f"{key} {value}" for key, value in parts.items()).encode()).hexdigest()
        return Plan(
            name=self.recipe.name,
            recipe=self.recipe.resolved,
            models=self.models,
            rows=tuple(rows),
            shards=tuple(shards),
            side_files=tuple(side_files),
            equal=tuple(self.equal),
            warnings=tuple(dict.fromkeys(self.problems.warnings)),
            notes=tuple(self.notes),
            digest=digest,
            parts=parts,
            spaces={output.key: self.table(output.node).space for output in self.recipe.outputs.values()},
        )

    def _output(self, output: Output, rows: list[Row], shards: list[Shard], side_files: list[SideFile]) -> None:
        table = self.table(output.node)
        where = self.recipe.where(output.path)
        like_name = output.like or default_like(self.recipe, output.node)
        like = self.tables.get(like_name or "")
        if not isinstance(like, _ModelTable):
            raise AssertionError(f"'{like_name}' is an entry of models")
        if like.tensors.keys() != table.tensors.keys():
            lacks = [name for name in table.tensors if name not in like.tensors]
            has = [name for name in like.tensors if name not in table.tensors]
            kept = getattr(table, "kept", {})
            if has or any(name not in kept for name in lacks):
                difference = f"lacks {some(lacks)}" if lacks else f"has {some(has)} beyond it"
                self.problems.add(
                    RecipeError(
                        f"`like: {like_name}` must have the tensors of '{output.node}', and it {difference}",
                        where=where,
                        fix="Name a model under `like:` that has the same tensors.",
                    )
                )
        if output.dtype is not None:
            for rules in rules_in(output.dtype):
                self.check_rules(
                    [rule.match for rule in rules], table.places, self.recipe.where((*output.path, "dtype"))
                )
        tensors: list[Tensor] = []
        made: list[tuple[str, Expression, DType, DType]] = []
        for name, stored in table.tensors.items():
            expression = table.expression(name)
            model = like.tensors.get(name, stored)
            if stored.dtype.kind != "float":
                dtype = stored.dtype
            elif output.dtype is not None:
                dtype = BY_NAME[value_at(output.dtype, table.places[name])]
            else:
                rounded = expression.op.result_dtype() if isinstance(expression, Apply) else None
                dtype = BY_NAME[rounded] if rounded else model.dtype
            made.append((name, expression, dtype, FLOAT64 if self.is_wide(expression) else FLOAT32))
            tensors.append(Tensor(name, dtype, stored.shape, model.file if name in like.tensors else None))
        metadata = {"format": "pt"} if table.space == "weight" else {"format": "pt", SPACE_KEY: table.space}
        files, index = lay_out(
            tensors, like_files=list(like.checkpoint.files), shard_size=output.shard_size, metadata=metadata
        )
        home = {name: (len(shards) + i, file.offsets[name]) for i, file in enumerate(files) for name in file.offsets}
        shards += [Shard(output.key, file.name, file.header, file.size) for file in files]
        for (name, expression, dtype, compute), tensor in zip(made, tensors, strict=True):
            shard, offset = home[name]
            finite = output.non_finite == "error" and dtype.kind == "float"
            rows.append(
                Row(output.key, output.node, name, expression, dtype, tensor.shape, shard, offset, compute, finite)
            )
        if index is not None:
            side_files.append(SideFile(output.key, index[0], index[1]))

    def _digests(self, rows: Sequence[Row], shards: Sequence[Shard]) -> dict[str, str]:
        """Named digests of all that goes into the plan's digest, so that a refusal can say what changed."""
        inputs = [
            (name, checkpoint.folder.revision, [(f.name, f.size, f.header_digest) for f in checkpoint.files.values()])
            for name, checkpoint in self.models.items()
        ]
        stamps = [
            (name, [_stamp(checkpoint, file) for file in checkpoint.files]) for name, checkpoint in self.models.items()
        ]
        layout = [(s.output, s.file, s.header.hex(), s.size) for s in shards]
        return {
            "the recipe": _digest(self.recipe.resolved),
            "the inputs' headers": _digest(inputs),
            "the inputs' files (size or time of change)": _digest(stamps),
            "the layout of the output": _digest([layout, [(r.output, r.name, r.shard, r.offset) for r in rows]]),
            "the version of mergeflow": __version__,
            "the version of torch": version("torch"),
        }


_SUBTRACT = TaskVector()


def _stamp(checkpoint: Checkpoint, file: str) -> str:
    """What changes when a file's bytes do, without reading them: size and time of change, or the hub's own digest."""
    if checkpoint.folder.revision is not None:
        return checkpoint.folder.sha256(file) or checkpoint.folder.revision
    status = checkpoint.folder.local([file])[file].stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _digest(data: Any) -> str:
    return blake3(json.dumps(data, sort_keys=True, separators=(",", ":"), default=str).encode()).hexdigest()


def _tokens(name: str, content: bytes, where: str) -> dict[int, str]:
    """Tokens by id of a tokenizer file; ids that a file gives twice keep the first."""
    try:
        if name == "vocab.txt":
            return dict(enumerate(content.decode("utf-8").splitlines()))
        data = json.loads(content)
        if name == "vocab.json":
            return {int(i): str(token) for token, i in data.items()}
        vocabulary = (data.get("model") or {}).get("vocab") or {}
        tokens = (
            {int(i): str(token) for token, i in vocabulary.items()}
            if isinstance(vocabulary, dict)
            else {i: str(item[0]) for i, item in enumerate(vocabulary)}
        )
        return {**tokens, **{int(added["id"]): str(added["content"]) for added in data.get("added_tokens") or ()}}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise InputError(
            f"this is no tokenizer file that can be read ({error})", where=where, fix="Mend or remove it."
        ) from None


def loads(*expressions: Expression) -> Iterator[Load]:
    """Each tensor that expressions read, once, in the order of the inputs."""
    seen: set[int] = set()
    todo: list[Expression] = list(reversed(expressions))
    while todo:
        expression = todo.pop()
        if id(expression) in seen:
            continue
        seen.add(id(expression))
        if isinstance(expression, Load):
            yield expression
        else:
            todo += reversed(expression.inputs)


def make_plan(recipe: Recipe, models: Mapping[str, Checkpoint]) -> Plan:
    """The plan of a recipe. `models` holds the opened checkpoint of each of `needed_models(recipe)`.

    Raises every problem that headers can show, together.
    """
    return _Planner(recipe, models).plan()


def like_and_tokenizer(recipe: Recipe, output: Output) -> tuple[str, str]:
    """The models whose config and whose tokenizer an output takes."""
    like = output.like or default_like(recipe, output.node) or ""
    return like, output.tokenizer or like

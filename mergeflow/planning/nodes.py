"""A node as a table: names from its base or first input, an expression for each from its op."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeflow.checkpoint import StoredTensor
from mergeflow.errors import RecipeError
from mergeflow.graph import Apply, Expression, LayerSource, Measure, Stacked
from mergeflow.ops import Op
from mergeflow.ops.base import LEAF, DeltaOp, Space
from mergeflow.ops.draws import draw_key
from mergeflow.ops.unchanged import Unchanged
from mergeflow.planning.expressions import BOTH, ONTO, is_zeros, mean_like
from mergeflow.planning.models import HEADS, Table, rename_line
from mergeflow.recipe import Node
from mergeflow.settings import Each, Place, Rule, constant, in_stack, matches, places, value_at

if TYPE_CHECKING:
    from mergeflow.planning.planner import Planner


@dataclass(frozen=True, slots=True)
class Ready:
    """An op at one tensor, resolved, with its inputs (the base first, if it takes one) and the keys of its draws.

    `onto` is the base that the result is added to, for an op that may do without one.
    """

    op: Op
    inputs: tuple[Expression, ...]
    keys: tuple[int, ...] = ()
    onto: Expression | None = None


class NodeTable(Table):
    """What a node gives. Names, spaces and patterns are checked when it is made, tensors as they are asked for."""

    def __init__(self, planner: Planner, node: Node) -> None:
        self.planner, self.node, self.findings = planner, node, planner.findings
        self.make = planner.expressions
        self.inputs = [planner.table(one.model) for one in node.inputs]
        self.base = planner.table(node.base) if node.base else None
        self.bases = [planner.table(one.base) if one.base else self.base for one in node.inputs]
        self.others = planner.table(node.others) if node.others else None
        self.made: dict[str, Expression] = {}
        self.ready: dict[str, Ready | Expression] = {}
        self.shared: tuple[Measure, dict[str, int]] | None = None
        self.holders: dict[str, Table] = {}
        """Tensors that are somebody else's as they are: of `select`, and of `extra: keep`."""
        self.fixes: dict[int, str] = {}
        self.told_quantised = False
        self.space = self._space()
        self.quantised = next((one.quantised for one in self._sources() if one.quantised), "")
        self._names()
        self._check_patterns()
        if node.op.matrices_only:
            rest = [n for n, t in self.tensors.items() if t.dtype.kind == "float" and len(t.shape) != 2]
            giver = f"come from '{node.others}'" if node.others else "are the mean of the inputs"
            if rest:
                self.findings.notes[f"{self.where()}: {node.op.name} acts on matrices; {len(rest)} tensors {giver}"] = (
                    None
                )

    def _sources(self) -> list[Table]:
        return [one for one in (*self.inputs, *self.bases, self.base, self.others) if one is not None]

    def where(self, *steps: str | int) -> str:
        """The place of a key of the node in the recipe."""
        return self.planner.recipe.where((*self.node.path, *steps))

    def at_input(self, index: int) -> str:
        """The place of an input in the recipe."""
        takes = self.node.op.takes
        return self.where(takes, index) if takes in ("inputs", "rules", "layers") else self.where(takes)

    # Spaces and names

    def _space(self) -> Space:
        try:
            space = self.node.op.space(self.base.space if self.base else None, [table.space for table in self.inputs])
            for index, one in enumerate(self.node.inputs):
                if one.base and self.inputs[index].space == "delta":
                    raise RecipeError(
                        f"'{one.model}' is a delta already, so its own `base: {one.base}` would say nothing",
                        where=self.at_input(index),
                        fix="Leave `base` out there.",
                    )
                if one.base and self.base is None:
                    raise RecipeError(
                        f"'{one.model}' has a base of its own, and the node has none",
                        where=self.at_input(index),
                        fix="Write `base:` on the node too: what the deltas are added to.",
                    )
            for base in self.bases:
                if base is not None and base is not self.base and base.space != "weight":
                    raise RecipeError(f"an input's base is a {base.space}", fix="A base must give weights.")
            if self.others is not None and self.others.space != space:
                raise RecipeError(
                    f"`others` gives a {self.others.space}, and the op a {space}", fix="Both must be of one space."
                )
            return space
        except RecipeError as error:
            self.findings.add(error if error.where else error.placed(self.where()))
            return "weight"

    def _names(self) -> None:
        """Names of the base or the first input, and what `extra: keep` adds."""
        if self.node.op.takes == "rules":
            self._selected_names()
            return
        # A sparse table's names are not all there is: they come from another input where there is one.
        source = self.base or next((one for one in self.inputs if not one.sparse), self.inputs[0])
        self.leaf, self.added, self.stacked = source.leaf, source.added, source.stacked
        self.tensors, self.places = source.tensors, source.places
        if source.sparse:
            self.sparse = True
            self._united_names()
        self._extra_names()

    def _selected_names(self) -> None:
        """Names of `select`: all names of its models, each from the first rule that fits it."""
        self.leaf = self.inputs[-1].leaf
        self.tensors = {}
        first: dict[str, Table] = {}
        for table in (self.inputs[-1], *self.inputs[:-1]):
            for name in table.tensors:
                first.setdefault(name, table)
        vocab = []
        for name, table in first.items():
            place = table.places[name]
            index = next(i for i, rule in enumerate(self.node.rules) if rule is None or matches(rule, place))
            chosen = self.inputs[index]
            if name not in chosen.tensors and chosen.sparse:
                self.made[name] = self.make.zeros(table.tensors[name].shape)
                self.tensors[name] = table.tensors[name]
                vocab += [name] if place.vocab else []
                continue
            if name not in chosen.tensors:
                owner = next(i for i, one in enumerate(self.inputs) if one is table)
                self.findings.gather(
                    self.at_input(index),
                    f"the rule chooses '{self.node.inputs[index].model}', which lacks {{names}}",
                    f"Add a rule that takes them from '{self.node.inputs[owner].model}'.",
                    name,
                )
                chosen = table  # so that what is wrong is said once
            self.tensors[name], self.holders[name] = chosen.tensors[name], chosen
            vocab += [name] if chosen.places[name].vocab else []
        self.added = {name for one in self.inputs for name in one.added}
        self.sparse = all(one.sparse for one in self.inputs)
        self.places = places(self.tensors, vocab)
        self.stacked = self._selected_stacks()

    def _selected_stacks(self) -> dict[str, Stacked]:
        """The stacks of `select` that any of its models got by `stack`: each layer from where its first tensor is from."""
        prefixes = {prefix for one in self.inputs for prefix in one.stacked}
        owners = {id(table): one.model for table, one in zip(self.inputs, self.node.inputs, strict=True)}
        found: dict[str, dict[int, LayerSource]] = {}
        for name, table in self.holders.items() if prefixes else ():
            stack, number, _ = in_stack(name) or ("", -1, "")
            if number < 0 or stack not in prefixes or number in found.setdefault(stack, {}):
                continue
            below = table.stacked.get(stack)
            own = LayerSource(owners[id(table)], number, table.leaf, number)
            found[stack][number] = below.layers[number] if below else own
        return {
            stack: Stacked(self.node.name, stack, tuple(layers[number] for number in sorted(layers)))
            for stack, layers in found.items()
        }

    def _united_names(self) -> None:
        """Names of sparse inputs: all that any of them has, since the others are zero there."""
        for table in self.inputs[1:]:
            if not table.tensors.keys() <= self.tensors.keys():
                self.tensors = {**table.tensors, **self.tensors}
                self.places = places(self.tensors, [n for t in self.inputs for n, p in t.places.items() if p.vocab])

    def _extra_names(self) -> None:
        """Names that inputs have beyond the node's: an error, dropped, or kept from the one input that has them."""
        beyond: dict[str, list[int]] = {}
        tables = [*self.inputs, *([self.others] if self.others else [])]
        for index, table in enumerate(tables):
            if table.tensors is self.tensors or table.tensors.keys() <= self.tensors.keys():
                continue
            for name in table.tensors:
                if name not in self.tensors and self._consults(table, table.places[name]):
                    beyond.setdefault(name, []).append(index)
        self.beyond = {name: tables[indices[0]].places[name] for name, indices in beyond.items()}
        kept: dict[str, StoredTensor] = {}
        for name, indices in beyond.items():
            policy = value_at(self.node.extra, self.beyond[name])
            if policy == "keep" and self._can_keep(name, [tables[index] for index in indices]):
                self.holders[name] = tables[indices[0]]
                kept[name] = self.holders[name].tensors[name]
            elif policy == "error":
                self._extra(indices[0], name)
        if kept:
            self.tensors = {**self.tensors, **kept}
            self.added = {*self.added, *kept}
            self.places = places(
                self.tensors, [n for t in (self.base, *tables) if t for n, p in t.places.items() if p.vocab]
            )

    def _consults(self, table: Table, place: Place) -> bool:
        """Whether a tensor at a place is taken from a table: inputs give what `only` names, `others` the rest."""
        if self.others is None:
            return True
        return self._acts(place, table.tensors[place.name]) is (table is not self.others)

    def _acts(self, place: Place, tensor: StoredTensor) -> bool:
        """Whether the op is for a tensor, or `others` says where it comes from."""
        if self.node.op.matrices_only and (len(tensor.shape) != 2 or not tensor.elements):
            return False
        return self.node.only is None or matches(self.node.only, place)

    def _can_keep(self, name: str, holders: Sequence[Table]) -> bool:
        if len(holders) > 1:
            self.findings.gather(
                self.where(),
                "`extra: keep` finds {names} in several inputs",
                "Choose by `op: select`, or drop them.",
                name,
            )
        elif holders[0].space != self.space:
            self.findings.gather(
                self.where(),
                f"`extra: keep` would put a {holders[0].space} among {self.space}s: {{names}}",
                "Drop them.",
                name,
            )
        else:
            return True
        return False

    def _extra(self, index: int, name: str) -> None:
        mine = self.node.base or self.node.inputs[0].model
        if index < len(self.inputs):
            owner, table, where = self.node.inputs[index].model, self.inputs[index], self.at_input(index)
        else:
            assert self.others is not None
            owner, table, where = str(self.node.others), self.others, self.where("others")
        fix = self._tie_fix(name, table) or self._rename_fix(index, owner, table)
        self.findings.gather(
            where,
            f"'{owner}' has {{count}} tensors that '{mine}' lacks: {{names}}",
            fix
            or (
                "Is it an adapter of another base? `extra: drop` on the node leaves them out."
                if table.sparse
                else "Write `extra: drop` or `extra: keep` on the node."
            ),
            name,
        )

    def _tie_fix(self, name: str, other: Table) -> str:
        """What to write where a head is missing because one model is tied and another is not."""
        mine, theirs = self.planner.is_tied(self.leaf), self.planner.is_tied(other.leaf)
        if other.sparse and mine and name.endswith(HEADS):
            return f"'{self.leaf}' ties its head to the embedding: write `tied: untie` under `output:`."
        if mine == theirs or not name.endswith(HEADS):
            return ""
        tied, loose = (self.leaf, other.leaf) if mine else (other.leaf, self.leaf)
        return f"'{tied}' is tied and '{loose}' is not: write `tied: untie` or `tied: trust_config` under `output:`."

    def _rename_fix(self, index: int, owner: str, table: Table) -> str:
        if index not in self.fixes:
            self.fixes[index] = rename_line(owner, table.tensors.keys(), self.tensors.keys(), sparse=table.sparse)
        return self.fixes[index]

    # Patterns

    def _check_patterns(self) -> None:
        """Each rule must fit something, checked against all names of the node, asked for or not."""
        node = self.node
        for name in node.op.settings():
            self._check_setting(getattr(node.op, name), self.places, name)
        for name in ("missing", "mismatch"):
            self._check_setting(getattr(node, name), self.places, name)
        if node.op.takes != "rules":
            self._check_setting(node.extra, {**self.places, **self.beyond}, "extra")
        for name in node.op.model_settings if node.op.over_model else ():
            own = getattr(node.op, name)
            if not constant(own):
                self.findings.add(
                    RecipeError(
                        f"`{name}` changes over the model, and `{node.op.name}` measures the whole model here",
                        where=self.where(name),
                        fix="Give it one value for each input.",
                    )
                )
        if node.only is not None:
            self.findings.check_rules([node.only], self.places, self.where("only"))
        if node.rules:
            self.findings.check_rules(node.rules, self.places, self.where("rules"))

    def _check_setting(
        self, setting: Any, at: Mapping[str, Place], name: str, each: Sequence[Mapping[str, Place]] = ()
    ) -> None:
        """Check a setting against the places it is asked for at; `each` holds those of each input, where they differ."""
        if not isinstance(setting, Each):
            self.findings.check_setting(setting, at, self.where(name))
            return
        # A rule of the node that an input's own rules hide holds for the other inputs: it is checked once, without them.
        shared: dict[int, Rule[Any]] = {}
        counts: dict[int, int] = {}
        for one in setting:
            for rule in one if isinstance(one, tuple) else ():
                shared[id(rule)] = rule
                counts[id(rule)] = counts.get(id(rule), 0) + 1
        for index, one in enumerate(setting):
            if isinstance(one, tuple):
                one = tuple(rule for rule in one if counts[id(rule)] == 1)
            where = self.where(self.node.op.takes, index, name)
            self.findings.check_setting(one, each[index] if each else at, where)
        self.findings.check_setting(
            tuple(rule for key, rule in shared.items() if counts[key] > 1), at, self.where(name)
        )

    # Tensors

    def expression(self, name: str) -> Expression:
        found = self.made.get(name)
        if found is None:
            found = self.made[name] = self._made(name)
        return found

    def _made(self, name: str) -> Expression:
        if name in self.holders:
            return self._in_space(name, self.holders[name])
        ready = self.ready.get(name) or self.ready.setdefault(name, self._resolved(name))
        if not isinstance(ready, Ready):
            return ready
        if ready.op.over_model and self.make.measured(ready.op):
            measure, before = self.measure()
            made = Apply(ready.op, ready.inputs, measure, ready.keys, before[name])
        else:
            made = self.make.apply(ready.op, ready.inputs, ready.keys)
        if ready.onto is not None:
            made = self.make.apply(ONTO, (ready.onto, made))
        if self.places[name].vocab and self.node.vocab == "ignore":
            self.make.agreed[id(made)] = next(self.make.speakers(made))
        return made

    def _in_space(self, name: str, table: Table) -> Expression:
        """What a table gives for a tensor, in the node's own space."""
        if self.space == "delta" and not table.gives_delta(name):
            self._whole_weight(name, table.leaf, self.where())
            return self._fallen()
        return table.expression(name)

    def _whole_weight(self, name: str, adapter: str, where: str) -> None:
        """Note that an adapter holds a whole weight, where its delta is asked for and no base is there to take from it."""
        self.findings.gather(
            where,
            f"the adapter '{adapter}' holds whole weights, whose deltas need its base: {{names}}",
            f"Put it onto its base first, `{{op: add, base: ..., inputs: [{adapter}]}}`, "
            "and use that, or its `task_vector`, here.",
            name,
        )

    def readied(self, name: str) -> Ready | Expression:
        """The op at a tensor with its inputs, or the expression that stands there where nothing is computed."""
        return self.ready.get(name) or self.ready.setdefault(name, self._resolved(name))

    def _whole(self) -> int:
        """How many inputs a readied op has where none is left out."""
        return len(self.inputs) + (self.base is not None)

    def measure(self) -> tuple[Measure, dict[str, int]]:
        """The measure of an op over the model, and how many leaves stand before each tensor in it."""
        if self.shared is None:
            over, keys = [], []
            before: dict[str, int] = {}
            leaves, op = 0, self.node.op
            whole = self._whole()
            wide: dict[bool, list[str]] = {True: [], False: []}
            for name in sorted(self.tensors):
                if name in self.holders:
                    continue
                ready = self.readied(name)
                if isinstance(ready, Ready) and ready.op.over_model:
                    over.append(ready.inputs)
                    keys.append(ready.keys)
                    before[name], op = leaves, ready.op
                    leaves += -(-self.tensors[name].elements // LEAF)
                    wide[any(map(self.make.is_wide, ready.inputs))].append(name)
                    if len(ready.inputs) != whole:
                        self.findings.gather(
                            self.where(),
                            f"`{op.name}` measures the whole model, and an input is left out at {{names}}",
                            "Write `missing: base` or `mismatch: base` in place of `omit`.",
                            name,
                        )
            if wide[False] and not op.has_parts:
                for name in wide[True]:
                    self.findings.gather(
                        self.where(),
                        f"`{op.name}` compares the entries of the whole model, and float64 stands beside narrower dtypes at {{names}}",
                        "Leave them out by `only:`, or compare within each tensor.",
                        name,
                    )
            self.shared = Measure(op, tuple(over), tuple(keys) if any(keys) else ()), before
        return self.shared

    def _resolved(self, name: str) -> Ready | Expression:
        """The op at a tensor with its inputs, or the expression that stands there where nothing is computed."""
        node, place, op = self.node, self.places[name], self.node.op
        if not self._acts(place, self.tensors[name]):
            if self.others is not None:
                return self._from_others(name, self.others)
            op = self._mean(op)
        given = self._given(name, place, op)
        if given is None:
            return self._fallen()
        kept, expressions, are_deltas = given
        base = self.base.expression(name) if self.base is not None else None
        if not kept:
            if base is None or op.has_parts:
                self.findings.gather(
                    self.where(), "no input is left for {names}", "Every input lacks it or has another shape.", name
                )
                return self._fallen()
            return base if self.space == "weight" else self.make.difference(base, base)
        on_deltas = self._on_deltas(op) and self.space == "weight" and not op.over_model
        if base is not None and on_deltas and all(map(is_zeros, expressions)):
            return base
        if self.tensors[name].dtype.kind != "float":
            return self._unchanged(expressions, are_deltas, base)
        if len(kept) < op.fewest:
            op = self._mean(op)
        try:
            ready = self.make.resolved(op, place, kept, len(self.inputs))
        except RecipeError as error:
            # What concerns many tensors is one line: the names stand before it.
            what = error.what.replace(f"'{name}'", "it")
            self.findings.gather(self.where(), f"at {{names}}: {what}", error.fix, name)
            return self._fallen()
        if base is None and self.space == "delta" and not all(are_deltas):
            for index, is_delta in zip(kept, are_deltas, strict=True):
                if not is_delta:
                    self._whole_weight(name, self.inputs[index].leaf, self.at_input(index))
            return self._fallen()
        only = ready.only_input(len(kept)) if base is None else None
        if only is not None:
            return expressions[only]
        if self.quantised:
            self._tell_quantised()
        if place.vocab and node.vocab != "ignore":
            self._check_tokens(name, kept, expressions, base)
        if self._on_deltas(op):
            deltas = [
                expression if is_delta else self._delta(name, index, expression)
                for index, expression, is_delta in zip(kept, expressions, are_deltas, strict=True)
            ]
            if None in deltas:
                return self._fallen()
            expressions = [delta for delta in deltas if delta is not None]
        return self._readied(ready, name, kept, expressions, base)

    def _readied(
        self, op: Op, name: str, kept: Sequence[int], expressions: Sequence[Expression], base: Expression | None
    ) -> Ready | Expression:
        """A resolved op with what it works on: of the inputs `kept`, their weights or, of an op on deltas, their deltas."""
        keys = self._keys(name, kept) if op.draws else ()
        if op.may_base:
            return Ready(op, tuple(expressions), keys, onto=base)
        return Ready(op, tuple(expressions) if base is None else (base, *expressions), keys)

    def _mean(self, op: Op) -> Op:
        """What stands where the op does not act and `others` names nobody."""
        return mean_like(op, based=self.base is not None)

    def _on_deltas(self, op: Op) -> bool:
        """Whether an op is given what its inputs learnt since a base."""
        return isinstance(op, DeltaOp) or (op.may_base and self.base is not None)

    def _keys(self, name: str, kept: Sequence[int]) -> tuple[int, ...]:
        """The keys of a random op's draws at a tensor: an edit elsewhere in the recipe changes none of them."""
        node, recipe = self.node, self.planner.recipe
        seed = (str(recipe.seed), node.name) if node.seed is None else (str(node.seed),)
        models = [one.model for one in node.inputs]
        keys = []
        for index in kept:
            table = self.inputs[index]
            own = table.tensors.get(name, self.tensors[name]).name
            stack = in_stack(name)
            if stack and stack[0] in table.stacked:
                own = name  # layers that `stack` renumbered are no checkpoint's: one may stand there twice
            keys.append(draw_key(seed, models[index], models[:index].count(models[index]), own))
        return tuple(keys)

    def _fallen(self) -> Expression:
        """Something to stand where a problem was noted, so that the others are found too; never part of a finished plan."""
        table = next(one for one in (*self.inputs, self) if one.tensors)
        return table.expression(next(iter(table.tensors)))

    def _from_others(self, name: str, others: Table) -> Expression:
        stored, wanted = others.tensors.get(name), self.tensors[name]
        if stored is None and others.sparse:
            return self.make.zeros(wanted.shape)
        what = ""
        if stored is None:
            what = "lacks {names}"
        elif stored.shape != wanted.shape:
            what = f"has {{names}} in shape {list(stored.shape)}, not {list(wanted.shape)}"
        elif _unlike(stored, wanted):
            what = f"has {{names}} as {stored.dtype.name}, not {wanted.dtype.name}"
        if what:
            self.findings.gather(
                self.where("others"),
                f"'{self.node.others}' {what}",
                "Choose a model that fits, or change `only:`.",
                name,
            )
            return self._fallen()
        return self._in_space(name, others)

    def _given(self, name: str, place: Place, op: Op) -> tuple[list[int], list[Expression], list[bool]] | None:
        """What inputs give for a tensor after the rules for missing and unlike ones, and which of that is a delta."""
        wanted = self.tensors[name]
        kept: list[int] = []
        expressions: list[Expression] = []
        are_deltas: list[bool] = []
        sound = True
        for index, table in enumerate(self.inputs):
            stored = table.tensors.get(name)
            if stored is None and table.sparse:
                kept.append(index)
                expressions.append(self.make.zeros(wanted.shape))
                are_deltas.append(True)
                continue
            if stored is None or stored.shape != wanted.shape:
                key = "missing" if stored is None else "mismatch"
                policy = value_at(getattr(self.node, key), place)
                if policy == "omit":
                    continue
                if policy == "base" and self.base is not None:
                    # The input is taken to be the base here: its delta is 0.
                    base = self.base.expression(name)
                    kept.append(index)
                    expressions.append(self.make.difference(base, base) if self._on_deltas(op) else base)
                    are_deltas.append(self._on_deltas(op))
                    continue
                sound = False
                if policy == "base":
                    self.findings.gather(
                        self.at_input(index),
                        f"`{key}: base` needs an op with a base, for {{names}}",
                        "Write `omit`, or use an op on deltas.",
                        name,
                    )
                elif stored is None:
                    self._missing(index, name)
                else:
                    self._mismatch(index, name, place)
            elif stored.dtype is not wanted.dtype and _unlike(stored, wanted):
                sound = False
                self.findings.gather(
                    self.at_input(index),
                    f"{{names}} is {stored.dtype.name} in '{self.node.inputs[index].model}' and {wanted.dtype.name} in '{self.leaf}'",
                    "Integer and boolean tensors are never computed on or cast: choose one by `op: select`.",
                    name,
                )
            else:
                kept.append(index)
                expressions.append(table.expression(name))
                are_deltas.append(table.gives_delta(name))
        return (kept, expressions, are_deltas) if sound else None

    def _missing(self, index: int, name: str) -> None:
        table, owner = self.inputs[index], self.node.inputs[index].model
        source = self.node.base or self.node.inputs[0].model
        self.findings.gather(
            self.at_input(index),
            f"'{owner}' lacks {{count}} tensors of '{source}': {{names}}",
            self._tie_fix(name, table)
            or self._rename_fix(index, owner, table)
            or "Write `missing: omit` (or `base`) on the node, with rules if need be.",
            name,
        )

    def _mismatch(self, index: int, name: str, place: Place) -> None:
        mine, theirs = self.tensors[name].shape, self.inputs[index].tensors[name].shape
        owner = self.node.inputs[index].model
        if (place.vocab or self.inputs[index].places[name].vocab) and mine[1:] == theirs[1:] and mine and theirs:
            self.findings.gather(
                self.at_input(index),
                f"the vocabularies differ: {theirs[0]} rows in '{owner}', {mine[0]} in '{self.leaf}' ({{names}})",
                "To merge the rest, write `mismatch: [{match: '@vocab', value: omit}, {value: error}]` on the node.",
                name,
            )
        else:
            self.findings.gather(
                self.at_input(index),
                f"{{names}} has shape {list(theirs)} in '{owner}', and {list(mine)} in '{self.leaf}'",
                "Write `mismatch: omit` (or `base`) on the node, with rules if need be.",
                name,
            )

    def _delta(self, name: str, index: int, expression: Expression) -> Expression | None:
        """What an input learnt since its own base, else the node's; None where a problem was noted."""
        base = self.bases[index]
        assert base is not None, "the grammar asks for a base"
        if base is not self.base:
            stored, wanted = base.tensors.get(name), self.tensors[name]
            if stored is None or stored.shape != wanted.shape or _unlike(stored, wanted):
                self.findings.gather(
                    self.at_input(index),
                    "the input's own base lacks, or has in another shape, {names}",
                    "Give it the base it was trained from.",
                    name,
                )
                return None
        difference = self.make.difference(expression, base.expression(name))
        beside = self.inputs[index].beside(name)
        return difference if beside is None else self.make.apply(BOTH, (difference, beside))

    def _unchanged(
        self, expressions: Iterable[Expression], are_deltas: Iterable[bool], base: Expression | None
    ) -> Expression:
        """Integers and booleans are never computed on: they must be equal, which the run looks at."""
        given = {id(one): (one, is_delta) for one, is_delta in zip(expressions, are_deltas, strict=True)}
        given = {key: pair for key, pair in given.items() if not is_zeros(pair[0])}
        if base is not None:
            given = {id(base): (base, False), **given}
        gives_delta = self.space == "delta" and not all(is_delta for _, is_delta in given.values())
        if len(given) == 1 and not gives_delta:
            return next(iter(given.values()))[0]
        inputs, flags = zip(*given.values(), strict=True)
        return self.make.apply(Unchanged(deltas=flags, gives_delta=gives_delta), inputs)

    def _check_tokens(
        self, name: str, kept: Iterable[int], expressions: Iterable[Expression], base: Expression | None
    ) -> None:
        """All models whose rows a vocabulary tensor is made of must mean the same words, however deep they are nested."""
        given = [(base, self.where("base"))] if base is not None else []
        for index, expression in zip(kept, expressions, strict=True):
            given.append((expression, self.at_input(index)))
            own = self.bases[index]
            if own is not None and own is not self.base and name in own.tensors:
                given.append((own.expression(name), self.where("inputs", index, "base")))
        first = next((model for one, _ in given for model in self.make.speakers(one)), "")
        for expression, where in given:
            for model in self.make.speakers(expression):
                clash = self.planner.vocabularies.clash(first, model)
                if clash:
                    self.findings.add(
                        RecipeError(
                            clash,
                            where=where,
                            fix="Their rows mean different words. "
                            "Write `vocab: ignore` on the node to merge them all the same.",
                        )
                    )

    def _tell_quantised(self) -> None:
        if self.told_quantised:
            return
        self.told_quantised = True
        named = [(self.node.inputs[i].model, table, self.at_input(i)) for i, table in enumerate(self.inputs)]
        if self.base is not None:
            named.append((str(self.node.base), self.base, self.where("base")))
        for index, (one, own) in enumerate(zip(self.node.inputs, self.bases, strict=True)):
            if one.base and own is not None:
                named.append((one.base, own, self.where("inputs", index, "base")))
        for name, table, where in named:
            if table.quantised:
                self.findings.add(
                    RecipeError(
                        f"'{name}' is quantised ({table.quantised})",
                        where=where,
                        fix="Its numbers mean nothing without their scales: use the checkpoint it was quantised from.",
                    )
                )


def _unlike(stored: StoredTensor, wanted: StoredTensor) -> bool:
    """Whether two tensors cannot meet: integers and booleans must be of one dtype, floats may differ."""
    return stored.dtype is not wanted.dtype and not (stored.dtype.kind == wanted.dtype.kind == "float")

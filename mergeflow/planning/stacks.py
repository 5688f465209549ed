"""`stack` as a table: which layer of which model stands where, and what an output of stacked layers is held against.

A stack of layers is a prefix before the first number in a name (`settings.in_stack`). Layers of a model are of one or a few
kinds (the same tensors in the same shapes), and the kinds of the model that gives names and config are those that any taken
layer must be of: nothing here knows an architecture by its name, but for the words that tell what stands before the blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeflow.checkpoint import StoredTensor
from mergeflow.dtypes import DType
from mergeflow.errors import RecipeError, did_you_mean
from mergeflow.graph import Expression, LayerSource, Stacked
from mergeflow.ops import Scale, Stack
from mergeflow.ops.base import Space
from mergeflow.planning.models import HEADS, Table, from_config, rename_line
from mergeflow.planning.nodes import NodeTable, _unlike
from mergeflow.recipe import Node
from mergeflow.settings import Each, Place, in_stack, places, runs

if TYPE_CHECKING:
    from mergeflow.planning.planner import Planner

Layers = dict[int, dict[str, str]]
"""The layers of a stack: by number, each tensor's whole name by what follows the number in it."""

MOST_LAYERS = 10_000
"""Layers that a stack may have: a stack of stacks of stacks, which a line each writes, must not fill the memory."""

_FIRST = re.compile(
    r"(^|[._])(embed|emb[._]|wte\b|wpe\b|tok_emb|shared\b|patch|pos_|position|class_embed|stem\b|project_in\b"
    r"|(cls|mask|reg|register|dist|storage)_tokens?\b|conv[0-9]?\.|feature_(extractor|projection)"
    r"|pre_?(layer|la?yr?)?_?norm|ln_pre|norm_pre)"
)
_TOWER = re.compile(r"(^|[._])(vision|visual|image|audio|speech|multi_modal_projector|mm_projector|connector|aligner)")


@dataclass(frozen=True, slots=True)
class _Origin:
    """Whose tensor stands in the output, by which name, and which entry scales it (none outside the blocks)."""

    table: Table
    name: str
    entry: int | None = None


class StackTable(NodeTable):
    """What `stack` gives: the taken layers, renumbered, and what is outside the blocks."""

    def __init__(self, planner: Planner, node: Node) -> None:
        self.rest = planner.table(node.rest) if node.rest else None
        self.origins: dict[str, _Origin] = {}
        self.stacks: dict[int, dict[str, Layers]] = {}
        self.openings: dict[int, frozenset[str]] = {}
        assert isinstance(node.op, Stack), "no other op takes layers"
        self.op = node.op
        given = self.op.scale if isinstance(self.op.scale, Each) else [self.op.scale] * len(node.inputs)
        self.scales = [Scale.model_construct(by=one) for one in given]
        self.sound, self.told = False, False
        super().__init__(planner, node)

    def _sources(self) -> list[Table]:
        return [*super()._sources(), *([self.rest] if self.rest else [])]

    def _space(self) -> Space:
        space = super()._space()
        if self.rest is not None and self.rest.space != space:
            self.findings.add(
                RecipeError(
                    f"`rest` gives a {self.rest.space}, and the layers are {space}s",
                    where=self.where("rest"),
                    fix="All must be of one space.",
                )
            )
        return space

    def owner(self, index: int | None) -> str:
        """What the recipe calls an entry's model, or that of `rest`."""
        return str(self.node.rest) if index is None else self.node.inputs[index].model

    def stacks_of(self, table: Table) -> dict[str, Layers]:
        """The numbered stacks of a table, found once."""
        found = self.stacks.get(id(table))
        if found is None:
            found = self.stacks[id(table)] = numbered_stacks(table.tensors)
        return found

    def _names(self) -> None:
        self.model = self.rest or self.inputs[0]
        self.leaf = self.model.leaf
        self.named = self.owner(None if self.rest else 0)
        blocks = self._blocks()
        taken = self._taken(blocks) if blocks is not None else None
        if blocks is None or taken is None:
            self._taken_as_it_is()
            return
        self._check_layers(blocks, taken)
        outside = self._outside(blocks)
        if self.told:
            self._taken_as_it_is()
            return
        self.sound = True
        before = {name: one for name, one in outside.items() if stands_before(name, blocks)}
        self.origins = {**before, **self._inside(blocks, taken), **outside}
        self.tensors = {name: one.table.tensors[one.name] for name, one in self.origins.items()}
        self.added = {name for name, one in self.origins.items() if one.name in one.table.added}
        vocab = [name for name, one in self.origins.items() if one.table.places[one.name].vocab]
        self.places = places(self.tensors, vocab)
        self.stacked = self._stacked(blocks, taken)
        self._tell(blocks, taken)

    def _taken_as_it_is(self) -> None:
        """What is wrong was said: a model as it is stands for the stack, so that the rest can be looked at."""
        self.tensors, self.places, self.stacked = self.model.tensors, self.model.places, self.model.stacked
        self.origins = {name: _Origin(self.model, name) for name in self.tensors}

    def _gather(self, index: int, what: str, fix: str, name: str) -> None:
        """Note what is wrong with a tensor of an entry."""
        self.told = True
        self.findings.gather(self.at_input(index), what, fix, name)

    # Which layers

    def _blocks(self) -> str | None:
        """The prefix of the stack; None where a problem was noted."""
        given = self.op.blocks
        owners: list[tuple[Table, int | None]] = [(table, index) for index, table in enumerate(self.inputs)]
        owners += [(self.rest, None)] if self.rest else []
        for table, index in owners:
            if table.sparse:
                fix = "Put it onto its base first, `{op: add, base: ..., inputs: [...]}`, and stack what that gives."
                self._problem(f"'{self.owner(index)}' has deltas of some tensors only, and no whole layers", index, fix)
                return None
            if table.space not in ("weight", "delta"):
                fix = "Stack models or deltas, such as what `emr_apply` makes of an artifact."
                self._problem(f"'{self.owner(index)}' is an {table.space}, and has no layers to stack", index, fix)
                return None
        own = self.stacks_of(self.model)
        if given is None:
            for table, index in owners:
                several = self.stacks_of(table)
                if len(several) > 1:
                    self._problem(
                        f"'{self.owner(index)}' has several numbered stacks: {_listed(several)}",
                        index,
                        f"Name the one to stack, e.g. `blocks: {max(several, key=lambda one: len(several[one]))}`; "
                        "the others belong to what is outside.",
                    )
                    return None
        elif given not in own:
            fix = did_you_mean(given, own) or (f"Its stacks are {_listed(own)}." if own else "It has none.")
            what = f"'{self.named}' has no numbered stack '{given}'"
            self.findings.add(RecipeError(what, where=self.where("blocks"), fix=fix))
            return None
        blocks = given if given is not None else next(iter(own), None)
        for table, index in owners:
            theirs = self.stacks_of(table)
            if blocks is None or blocks not in theirs:
                what = "has no numbered layers" if not theirs else f"has no numbered stack '{blocks}'"
                fix = "Only models whose names have numbers, such as 'layers.0.weight', have layers to stack."
                if theirs and blocks is not None:
                    fix = rename_line(self.owner(index), table.tensors.keys(), self.model.tensors.keys())
                    fix = fix or f"Its stacks are {_listed(theirs)}: only layers of one architecture can be stacked."
                self._problem(f"'{self.owner(index)}' {what}", index, fix)
                return None
        return blocks

    def _problem(self, what: str, index: int | None, fix: str) -> None:
        where = self.where("rest") if index is None else self.at_input(index)
        self.findings.add(RecipeError(what, where=where, fix=fix))

    def _taken(self, blocks: str) -> list[tuple[int, int]] | None:
        """Entry and number of each layer, in the order of the output; None where a problem was noted."""
        taken: list[tuple[int, int]] = []
        sound = True
        for index, (first, last) in enumerate(self.node.takes):
            layers = self.stacks_of(self.inputs[index])[blocks]
            numbers = sorted(number for number in layers if first <= number <= last)
            if len(numbers) < last - first + 1:
                sound = False
                self.findings.add(
                    RecipeError(
                        f"'{self.owner(index)}' {f'has no layer {first}' if first == last else f'lacks some of the layers {first}-{last}'}",
                        where=self.where("layers", index, "take"),
                        fix=f"It has {_runs(sorted(layers))}, and both ends of a range are included.",
                    )
                )
            taken += [(index, number) for number in numbers]
        if len(taken) > MOST_LAYERS:
            sound = False
            self.findings.add(
                RecipeError(
                    f"the stack would have {len(taken)} layers, and {MOST_LAYERS} are the most",
                    where=self.where("layers"),
                    fix="Take fewer.",
                )
            )
        return taken if sound else None

    def _check_layers(self, blocks: str, taken: Sequence[tuple[int, int]]) -> None:
        """Each taken layer must be of a kind that the layers of the model have which gives names and config."""
        own = self.stacks_of(self.model)[blocks]
        alone = opening(own)
        kinds = {frozenset(parts) - alone for parts in own.values()}
        known: dict[str, dict[tuple[tuple[int, ...], DType], StoredTensor]] = {}
        for parts in own.values():
            for part, name in parts.items():
                tensor = self.model.tensors[name]
                known.setdefault(part, {}).setdefault((tensor.shape, tensor.dtype), tensor)
        fix = f"Only layers of one architecture and size can be stacked, and names and config are those of '{self.named}'."
        seen: set[tuple[int, int]] = set()
        for index, number in taken:
            table = self.inputs[index]
            if (id(table), number) in seen:
                continue
            seen.add((id(table), number))
            layers = self.stacks_of(table)[blocks]
            parts = layers[number]
            kind = frozenset(parts) - self._opening(table, blocks, number)
            if kind not in kinds:
                near = max(kinds, key=lambda one: (len(one & kind), -len(one), sorted(one)))
                for part in sorted(near - kind):
                    what = f"'{self.owner(index)}' lacks {{names}}, which layers of '{self.named}' have"
                    self._gather(index, what, fix, _join(blocks, number, part))
                for part in sorted(kind - near):
                    what = f"'{self.owner(index)}' has {{names}}, which layers of '{self.named}' lack"
                    self._gather(index, what, fix, parts[part])
            for part, name in parts.items():
                stored, wanted = table.tensors[name], list(known.get(part, {}).values())
                if wanted and all(stored.shape != one.shape for one in wanted):
                    mine, theirs = list(wanted[0].shape), list(stored.shape)
                    what = f"{{names}} has shape {theirs} in '{self.owner(index)}', and {mine} in '{self.named}'"
                    self._gather(index, what, fix, name)
                elif wanted and all(_unlike(stored, one) for one in wanted):
                    what = f"{{names}} is {stored.dtype.name} in '{self.owner(index)}' and {wanted[0].dtype.name} in '{self.named}'"
                    self._gather(index, what, fix, name)
        self._warn_of_kinds(blocks, taken)

    def _warn_of_kinds(self, blocks: str, taken: Sequence[tuple[int, int]]) -> None:
        """A warning where a layer stands where the model has one of another kind, and no list in its config says so."""
        known: dict[tuple[int, int], frozenset[tuple[str, tuple[int, ...]]]] = {}

        def kind(table: Table, number: int) -> frozenset[tuple[str, tuple[int, ...]]]:
            key = id(table), number
            if key not in known:
                parts, alone = self.stacks_of(table)[blocks][number], self._opening(table, blocks, number)
                known[key] = frozenset(
                    (part, table.tensors[name].shape) for part, name in parts.items() if part not in alone
                )
            return known[key]

        own = sorted(self.stacks_of(self.model)[blocks])
        kinds = [kind(self.model, number) for number in own]
        config = self.planner.models[self.leaf].config or {}
        if len(set(kinds)) == 1 or any(
            isinstance(from_config(config, key), list) for key in ("layer_types", "layers_block_type")
        ):
            return
        there = [kind(self.inputs[index], number) for index, number in taken]
        moved = [n for n, one in enumerate(there) if one != kinds[min(n, len(kinds) - 1)]]
        if moved:
            self.findings.warnings[
                f"{self.where()}: layers of '{self.named}' are of several kinds, and those at {_runs(moved)} are of another kind "
                "than it has there. Look whether its config can say so, and set it under `output.config`"
            ] = None

    def _opening(self, table: Table, blocks: str, number: int) -> frozenset[str]:
        """Of a layer, the tensors that speak for the whole stack."""
        layers = self.stacks_of(table)[blocks]
        if number != min(layers):
            return frozenset()
        found = self.openings.get(id(table))
        if found is None:
            # A stack of one layer does not show it, but has what the first layer has of the model that gives names.
            named = opening(self.stacks_of(self.model)[blocks]) & layers[number].keys()
            found = self.openings[id(table)] = opening(layers) | named
        return found

    # Which tensors

    def _inside(self, blocks: str, taken: Sequence[tuple[int, int]]) -> dict[str, _Origin]:
        found: dict[str, _Origin] = {}
        left: dict[str, list[int]] = {}
        for n, (index, number) in enumerate(taken):
            table = self.inputs[index]
            alone = self._opening(table, blocks, number)
            for part, name in self.stacks_of(table)[blocks][number].items():
                if n and part in alone:
                    left.setdefault(f"{self.owner(index)}: '{name}'", []).append(n)
                else:
                    found[_join(blocks, n, part)] = _Origin(table, name, index)
        own = self.stacks_of(self.model)[blocks]
        for part in opening(own):
            if _join(blocks, 0, part) not in found:
                found[_join(blocks, 0, part)] = _Origin(self.model, own[min(own)][part])
        for what, where in left.items():
            self.findings.notes[
                f"{what} speaks for the whole stack, and is left out of layer{'s' * (len(where) > 1)} {_runs(where)} of '{self.node.name}'"
            ] = None
        return found

    def _outside(self, blocks: str) -> dict[str, _Origin]:
        """What is outside the blocks: of `rest`, or of the first entry's model before them and of the last's after them."""
        first, last = self.rest or self.inputs[0], self.rest or self.inputs[-1]
        found: dict[str, _Origin] = {}
        fix = f"Write `rest: {{model: {self.owner(0)}}}` to take all that is outside the blocks from there."
        owner, other = self.owner(None if self.rest else 0), self.owner(None if self.rest else len(self.inputs) - 1)
        for name, mine in first.tensors.items():
            if _is_in(name, blocks):
                continue
            table = first if stands_before(name, blocks) else last
            stored = table.tensors.get(name)
            found[name] = _Origin(table if stored else first, name)
            if stored is None:
                what = f"'{other}' lacks {{names}}, which '{owner}' has after the blocks"
                self._gather(-1, what, self._tie_fix(name, table) or fix, name)
            elif stored.shape != mine.shape:
                what = f"{{names}} has shape {list(stored.shape)} in '{other}', and {list(mine.shape)} in '{owner}'"
                self._gather(-1, what, fix, name)
            elif _unlike(stored, mine):
                what = f"{{names}} is {stored.dtype.name} in '{other}' and {mine.dtype.name} in '{owner}'"
                self._gather(-1, what, fix, name)
        for name in last.tensors:
            if name not in found and not _is_in(name, blocks):
                side = "before" if stands_before(name, blocks) else "after"
                what = f"'{other}' has {{names}} {side} the blocks, which '{owner}' lacks"
                self._gather(-1, what, self._tie_fix(name, last) or fix, name)
        return found

    def at_input(self, index: int) -> str:
        """The place of an entry in the recipe, counted from the end where it is negative."""
        return super().at_input(index % len(self.inputs))

    def _stacked(self, blocks: str, taken: Sequence[tuple[int, int]]) -> dict[str, Stacked]:
        """Where the layers come from: those of this stack, and those of other stacks that come along from a node below."""
        layers = []
        for index, number in taken:
            table, owner = self.inputs[index], self.owner(index)
            below = table.stacked.get(blocks)
            if below is None:
                layers.append(LayerSource(owner, number, table.leaf, number))
            elif below.node == owner:
                layers.append(below.layers[number])
            else:
                inner = below.layers[number]
                layers.append(LayerSource(owner, number, inner.model, inner.model_layer))
        found = {blocks: Stacked(self.node.name, blocks, tuple(layers))}
        for origin in dict.fromkeys(one.table for one in self.origins.values()):
            for prefix, stacked in origin.stacked.items():
                here = next((one for name, one in self.origins.items() if _is_in(name, prefix)), None)
                if prefix != blocks and here is not None and here.table is origin:
                    found[prefix] = stacked
        return found

    def _tell(self, blocks: str, taken: Sequence[tuple[int, int]]) -> None:
        """A note that says which layer comes from where."""
        own = Stacked(self.node.name, blocks, tuple(LayerSource(self.owner(i), n, "", n) for i, n in taken))
        found = own.runs()
        shown = [f"{to} <- {source} {layers}" for to, source, layers in found[:20]]
        more = f" and {len(found) - 20} runs more" if len(found) > 20 else ""
        self.findings.notes[f"'{self.node.name}' has {len(taken)} layers: {', '.join(shown)}{more}"] = None

    # Patterns and tensors

    def _check_patterns(self) -> None:
        if not self.sound:
            return
        each: list[dict[str, Place]] = [{} for _ in self.inputs]
        for name, one in self.origins.items():
            if one.entry is not None:
                each[one.entry][name] = self.places[name]
        inside = {name: place for at in each for name, place in at.items()}
        self._check_setting(self.op.scale, inside, "scale", each)

    def _made(self, name: str) -> Expression:
        origin, place = self.origins[name], self.places[name]
        expression = origin.table.expression(origin.name)
        if origin.entry is None:
            return expression
        try:
            ready = self.make.resolved(self.scales[origin.entry], place, [0], 1)
        except RecipeError as error:
            what = error.what.replace(f"'{name}'", "it")
            self.findings.gather(self.at_input(origin.entry), f"at {{names}}: {what}", error.fix, name)
            return expression
        if ready.only_input(1) == 0:
            return expression
        kind = self.tensors[name].dtype
        if kind.kind != "float":
            self.findings.gather(
                self.at_input(origin.entry),
                f"{{names}} is {kind.name}, and integer and boolean tensors are never scaled",
                "Begin the `scale` with a rule of value 1 for them.",
                name,
            )
            return expression
        if self.quantised:
            self._tell_quantised()
        return self.make.apply(ready, (expression,))


def numbered_stacks(names: Iterable[str]) -> dict[str, Layers]:
    """The stacks of a model by prefix."""
    found: dict[str, Layers] = {}
    for name in names:
        at = in_stack(name)
        if at is not None:
            found.setdefault(at[0], {}).setdefault(at[1], {})[at[2]] = name
    return found


def opening(layers: Layers) -> frozenset[str]:
    """What the first layer of a stack has beyond all others, where it has all that they have (T5's relative positions)."""
    first = min(layers)
    others = [parts.keys() for number, parts in layers.items() if number != first]
    if not others or any(parts - layers[first].keys() for parts in others):
        return frozenset()
    return frozenset(layers[first].keys() - set().union(*others))


def stands_before(name: str, blocks: str) -> bool:
    """Whether a tensor outside a stack is used before its layers, by the words in its name."""
    parts, own = name.split("."), blocks.split(".")
    here = next((word for part in own for word in ("encoder", "decoder") if word in part), None)
    if here == "encoder" and any("decoder" in part for part in parts):
        return False
    if here == "decoder" and any("encoder" in part for part in parts) and not any("decoder" in part for part in parts):
        return True
    mine, tower = _TOWER.search(blocks), _TOWER.search(name)
    if bool(mine) is not bool(tower):
        return tower is not None
    return _FIRST.search(name) is not None and not any(name == head or name.endswith(f".{head}") for head in HEADS)


def counterparts(table: Table, like: Table) -> tuple[dict[str, str], list[str]]:
    """For each tensor of a table that of `like` which it stands for, and the names of `like` that none stands for.

    The same name, but in a stack that was made: there it is the layer of the same number as the one it came from, else any
    layer that has such a tensor, best in the same shape.
    """
    if not table.stacked:
        return {name: name for name in table.tensors if name in like.tensors}, [
            name for name in like.tensors if name not in table.tensors
        ]
    found: dict[str, str] = {}
    theirs = numbered_stacks(like.tensors)
    holders: dict[tuple[str, str], dict[int, str]] = {}
    shaped: dict[tuple[str, str, tuple[int, ...]], str] = {}
    for prefix in table.stacked:
        for number, parts in sorted(theirs.get(prefix, {}).items()):
            for part, name in parts.items():
                holders.setdefault((prefix, part), {})[number] = name
                shaped[prefix, part, like.tensors[name].shape] = name
    met: set[tuple[str, str]] = set()
    for name, stored in table.tensors.items():
        at = in_stack(name)
        stacked = table.stacked.get(at[0]) if at else None
        if at is None or stacked is None:
            if name in like.tensors:
                found[name] = name
            continue
        prefix, layer, part = at
        met.add((prefix, part))
        options = holders.get((prefix, part))
        if options is None:
            continue
        other = options.get(stacked.layers[layer].model_layer if layer < len(stacked.layers) else -1)
        if other is None or like.tensors[other].shape != stored.shape:
            other = shaped.get((prefix, part, stored.shape), options[max(options)])
        found[name] = other
    has = []
    for name in like.tensors:
        at = in_stack(name)
        if (at[0], at[2]) not in met if at and at[0] in table.stacked else name not in table.tensors:
            has.append(name)
    return found, has


def _is_in(name: str, blocks: str) -> bool:
    at = in_stack(name)
    return at is not None and at[0] == blocks


def _join(blocks: str, number: int, part: str) -> str:
    return f"{blocks}.{number}.{part}" if blocks else f"{number}.{part}"


def _listed(stacks: Mapping[str, Layers]) -> str:
    shown = [f"'{prefix}' ({len(layers)} layers)" for prefix, layers in list(stacks.items())[:8]]
    return ", ".join(shown) + (f" and {len(stacks) - 8} more" if len(stacks) > 8 else "")


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _runs(numbers: Sequence[int]) -> str:
    """Sorted numbers as ranges: `0-3, 5`."""
    found = runs(numbers)
    shown = ", ".join(_span(*run) for run in found[:8])
    return shown if len(found) <= 8 else f"{shown}, ..."

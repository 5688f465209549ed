"""Statistics as tables, and the nodes that use them: each weight goes with what was collected about it.

A weight is looked up by its name in the checkpoint, whatever a model's `rename` calls it. Where an input lacks what the op
needs, the node's `others` gives the tensor, by default the mean with the op's own weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mergeflow.checkpoint import StoredTensor
from mergeflow.checkpoint.sources import Along
from mergeflow.checkpoint.statistics import LOSSY, STATISTICS, Kind, Statistics, of_another
from mergeflow.errors import InputError, RecipeError, did_you_mean
from mergeflow.graph import Expression, Load, Made
from mergeflow.ops.aim import Aim, AimStep
from mergeflow.ops.base import Op, number, numbers
from mergeflow.ops.fisher import Fisher, FisherMean, refuse_prior_without_base
from mergeflow.ops.linear import Linear
from mergeflow.ops.lot import Lot
from mergeflow.ops.regmean import RegMean, Solve
from mergeflow.ops.task_arithmetic import TaskArithmetic
from mergeflow.planning.expressions import FLOAT32, ONTO
from mergeflow.planning.findings import counted
from mergeflow.planning.models import ModelTable, Table
from mergeflow.planning.nodes import NodeTable, Ready
from mergeflow.recipe import Node
from mergeflow.settings import Each, Place, matches, places, value_at

if TYPE_CHECKING:
    from mergeflow.planning.planner import Planner

ENOUGH = 4
"""Tokens for each dimension, below which a Gram says little about the directions in which inputs vary least."""
SAFE_ALPHA = 0.95
"""The greatest alpha at which correlations of 16 bits or fewer are no risk."""


class StatisticsTable(Table):
    """A folder of statistics: looked up by the names that weights have in their checkpoint."""

    def __init__(self, planner: Planner, name: str, checkpoint: Statistics) -> None:
        self.leaf, self.space = name, "statistics"
        self.checkpoint, self.facts = checkpoint, checkpoint.facts
        self.tensors = dict(checkpoint.tensors)
        self.places = places(self.tensors)
        self.loads = {tensor: Load(name, stored) for tensor, stored in self.tensors.items()}
        self.made: dict[str, Expression] = {}
        self.side_files, self.fixed = (STATISTICS,), set(self.tensors)
        self.metadata = {key: value for key, value in checkpoint.metadata.items() if key.startswith("mergeflow.")}

    def expression(self, name: str) -> Expression:
        """A stored part."""
        return self.loads[name]

    @property
    def kind(self) -> Kind:
        return self.facts.kind

    def has(self, weight: str) -> bool:
        """Whether anything was collected for a weight."""
        return self.checkpoint.group(weight) is not None

    def gram(self, weight: str) -> Expression | None:
        """The Gram (d, d) of a weight's inputs, the same object for all weights that read one input; None without one."""
        if self.kind not in ("gram", "gram_diag"):
            return None
        group = self.checkpoint.group(weight)
        if group is None:
            return None
        found = self.made.get(group)
        if found is None:
            loads = tuple(self.loads[name] for name in self.checkpoint.names(group))
            source, d = self.checkpoint.decoder, self.checkpoint.dimension(weight)
            found = self.made[group] = loads[0] if source is None else Made(source, loads, FLOAT32, (d, d))
        return found

    def fisher(self, tensor: str) -> Expression | None:
        """The diagonal Fisher information of a tensor, of its shape; None where there is none."""
        if self.kind != "fisher_diag" or not self.has(tensor):
            return None
        return self.loads[self.checkpoint.names(tensor)[0]]

    def along(self, weight: str, shape: tuple[int, ...]) -> Expression | None:
        """A statistic of a weight's input channels, at every place of a matrix or vector of this shape; None without one."""
        if self.kind not in ("act_absmean", "gram_diag", "input_mean") or not self.has(weight):
            return None
        load = self.loads[self.checkpoint.names(self.checkpoint.group(weight) or "")[0]]
        turned = weight in self.checkpoint.turned
        if load.tensor.shape != (shape[0 if turned else -1],):
            return None
        return Made(Along(rows=turned), (load,), FLOAT32, shape)


def check_owner(planner: Planner, name: str, table: StatisticsTable, owner: str, where: str) -> None:
    """Note an error where statistics are of another model than their owner, and a warning where that cannot be told."""
    model, told = planner.table(owner), table.facts.model.source
    other: bool | None = None  # of a node, which has no files yet, only what was collected on it by its name is known
    if isinstance(model, ModelTable):
        other = of_another(table.facts, model.checkpoint)
    elif told == f"node {owner}":
        other = False
    if other:
        planner.findings.add(
            InputError(
                f"'{name}' was collected on another model than '{owner}'" + (f": {told}" if told else ""),
                where=where,
                fix="Collect statistics of this model, or write `for: names` on the input to use them all the same.",
            )
        )
    elif other is None:
        planner.findings.warnings[
            f"{where}: whether '{name}' was collected on '{owner}' cannot be told from its files"
            + (f"; it names {told}" if told else "")
        ] = None


class StatedTable(NodeTable):
    """A node whose inputs each have statistics beside their model."""

    key: str
    """The key of an input that names them."""
    kinds: tuple[Kind, ...]
    """What they may be."""

    def __init__(self, planner: Planner, node: Node) -> None:
        self.statistics: list[StatisticsTable | None] = []
        for index, one in enumerate(node.inputs):
            table = planner.table(one.keys[self.key])
            where = planner.recipe.where((*node.path, "inputs", index, self.key))
            if not isinstance(table, StatisticsTable) or table.kind not in self.kinds:
                held = table.kind if isinstance(table, StatisticsTable) else f"{table.space}s"
                planner.findings.add(
                    RecipeError(
                        f"`{self.key}` needs statistics of kind {' or '.join(self.kinds)}, and '{one.keys[self.key]}' holds {held}",
                        where=where,
                        fix=f"Name a folder or node of `op: {self.kinds[0]}`.",
                    )
                )
                self.statistics.append(None)
                continue
            self.statistics.append(table)
            if not one.by_names:
                check_owner(planner, one.keys[self.key], table, self.measured_on(node, index), where)
        super().__init__(planner, node)
        self._lint()

    def measured_on(self, node: Node, index: int) -> str:
        """The model that an input's statistics must be of."""
        return (node.base if node.op.keys_of_base else None) or node.inputs[index].model

    @property
    def sound(self) -> bool:
        """Whether every input has statistics of the right kind."""
        return None not in self.statistics

    def stored(self, index: int, name: str) -> str:
        """The name that an input's tensor has in its checkpoint; where the input lacks it, that of the node's own tensor."""
        found = self.inputs[index].tensors.get(name) or self.tensors.get(name)
        return name if found is None else found.name

    def known(self, index: int, name: str, place: Place) -> bool:
        """Whether an input has statistics for a tensor, or is left out there."""
        table, model = self.statistics[index], self.inputs[index]
        if name not in model.tensors and not model.sparse and value_at(self.node.missing, place) == "omit":
            return True
        return table is not None and table.has(self.stored(index, name))

    def _acts(self, place: Place, tensor: StoredTensor) -> bool:
        """Where every input has statistics."""
        return super()._acts(place, tensor) and all(
            self.known(index, place.name, place) for index in range(len(self.inputs))
        )

    def _on_deltas(self, op: Op) -> bool:
        """The op itself is given weights, what stands in its place as that wants it."""
        return not isinstance(op, RegMean | Lot | Fisher | Aim) and super()._on_deltas(op)

    def _mean(self, op: Op) -> Op:
        """The mean with the op's own weights."""
        weight = getattr(op, "weight", 1.0)
        if self.base is not None:
            return TaskArithmetic.model_construct(weight=weight, normalize=True, scale=1.0)
        return Linear.model_construct(weight=weight, normalize=True)

    def _weights(
        self, name: str, kept: Sequence[int], expressions: Sequence[Expression], base: Expression | None
    ) -> list[Expression]:
        """What the inputs give for a tensor as weights: deltas put onto the base, where there is one."""
        if base is None:
            return list(expressions)
        found = []
        for index, one in zip(kept, expressions, strict=True):
            table = self.inputs[index]
            lacks = name not in table.tensors
            is_delta = table.sparse if lacks else table.gives_delta(name)
            found.append(self.make.apply(ONTO, (base, one)) if is_delta else one)
        return found

    def _index_of(self, model: str, word: str) -> int | None:
        """The input of a model's name; None, with the problem noted, where there is none."""
        names = [one.model for one in self.node.inputs]
        if model in names:
            return names.index(model)
        fix = did_you_mean(model, names) or f"Inputs are {', '.join(names)}."
        self.findings.add(RecipeError(f"`{word}: {model}` names no input", where=self.where(word), fix=fix))
        return None

    def _lint(self) -> None:
        """Warnings about all tensors together."""

    def _warn(self, text: str) -> None:
        self.findings.warnings[f"{self.where()}: {text}"] = None


class RegmeanTable(StatedTable):
    """`regmean`: each matrix that has a Gram from every input is solved."""

    key = "gram"
    kinds = ("gram", "gram_diag")
    op: RegMean

    def __init__(self, planner: Planner, node: Node) -> None:
        if isinstance(node.op, RegMean):
            self.op = node.op
        super().__init__(planner, node)
        self.reference = self._reference()

    def _acts(self, place: Place, tensor: StoredTensor) -> bool:
        """Where every input has a Gram, and of some token at least."""
        return super()._acts(place, tensor) and not self._idle(place.name)

    def _idle(self, name: str) -> bool:
        """Whether a Gram saw no token, as that of an expert to which none was routed: it would leave all to the other inputs."""
        found = ((table, self.stored(index, name)) for index, table in enumerate(self.statistics))
        return any(table is not None and table.has(own) and not table.checkpoint.n_tokens(own) for table, own in found)

    def _reference(self) -> int | None:
        word = self.op.reference
        if word == "mean":
            return None
        if word == "base":
            if self.base is None:
                fix = "Add `base:` to the node, or leave `reference` out."
                self.findings.add(RecipeError("`reference: base` needs a base", where=self.where("reference"), fix=fix))
            return -1
        return self._index_of(word, "reference")

    def _readied(
        self, op: Op, name: str, kept: Sequence[int], expressions: Sequence[Expression], base: Expression | None
    ) -> Ready | Expression:
        if not isinstance(op, RegMean) or not self.sound:
            return super()._readied(op, name, kept, expressions, base)
        tables = [table for index in kept if (table := self.statistics[index]) is not None]
        stored = [self.stored(index, name) for index in kept]
        turned = {own in table.checkpoint.turned for own, table in zip(stored, tables, strict=True)}
        if len(turned) > 1:
            self.findings.gather(
                self.where(),
                "{names} is stored (in, out) in one model and (out, in) in another, as their statistics say",
                "Convert one of the models, or leave the tensor to `others` with `only`.",
                name,
            )
            return self._fallen()
        transposed = turned == {True}
        shape = self.tensors[name].shape
        d = shape[0 if transposed else 1]
        for index, own, table in zip(kept, stored, tables, strict=True):
            if table.checkpoint.dimension(own) != d:
                self.findings.gather(
                    self.where("inputs", index, "gram"),
                    f"the Gram is for {table.checkpoint.dimension(own)} input channels, and {{names}} has {d}",
                    "Collect the Grams on this model.",
                    name,
                )
                return self._fallen()
        tokens = [table.checkpoint.n_tokens(own) for own, table in zip(stored, tables, strict=True)]
        grams = [gram for own, table in zip(stored, tables, strict=True) if (gram := table.gram(own)) is not None]
        if self._hopeless(op, sum(tokens), d):
            self.findings.gather(
                self.where("alpha"),
                f"at alpha 1 the Grams of {sum(tokens)} tokens leave directions of {d} dimensions open: {{names}}",
                "Write `alpha: 0.9`, a `ridge` such as 1e-3, or `solver: lstsq` for the smallest correction.",
                name,
            )
            return self._fallen()
        weights = numbers(op.weight)
        if op.weigh_by == "tokens" and any(tokens):
            weights = tuple(weight * count for weight, count in zip(weights, tokens, strict=True))
        reference = self.reference
        if reference is not None and reference >= 0:
            if reference not in kept:
                self.findings.gather(
                    self.where("reference"), f"'{op.reference}' lacks {{names}}", "Choose another reference.", name
                )
                return self._fallen()
            reference = kept.index(reference)
        based = base is not None and (number(op.scale) != 1 or reference == -1)
        made = op.solve(
            weights,
            based=based,
            reference=reference,
            transposed=transposed,
            module=f"{self.node.name}: {name}",
            n_tokens=tokens,
            codecs=[table.facts.codec for table in tables],
        )
        models = self._weights(name, kept, expressions, base)
        return Ready(made, (*models, *([base] if based and base is not None else []), *grams))

    @staticmethod
    def _hopeless(op: RegMean, tokens: int, d: int) -> bool:
        alone = op.solver != "lstsq" and not number(op.ridge) and number(op.alpha) == 1
        return alone and 0 < tokens < d

    def _made(self, name: str) -> Expression:
        made = super()._made(name)
        ready = self.ready.get(name)
        if isinstance(ready, Ready) and isinstance(ready.op, Solve) and self.places[name].vocab:
            # Its words are those of the models, which were compared; a Gram has none.
            self.make.agreed[id(made)] = next(self.make.speakers(ready.inputs[0]))
        return made

    def _lint(self) -> None:
        """No Gram where one might be, few tokens, and what a coarse codec bears."""
        lacking, idle, few, worst = 0, 0, 0, (1.0, 0, 0)
        coarse: set[str] = set()
        for name, tensor in self.tensors.items():
            place = self.places[name]
            if not super(StatedTable, self)._acts(place, tensor) or tensor.dtype.kind != "float":
                continue
            if self._idle(name):
                idle += 1
                continue
            if not self._acts(place, tensor):
                lacking += place.layers is not None and not place.vocab
                continue
            alpha = self._alpha(place)
            for index, table in enumerate(self.statistics):
                own = self.stored(index, name)
                if table is None or alpha is None or not table.has(own):
                    continue
                d, n = table.checkpoint.dimension(own), table.checkpoint.n_tokens(own)
                if n < ENOUGH * d and alpha > n / max(n + d, 1):
                    few += 1
                    worst = min(worst, (n / max(n + d, 1), n, d))
                if table.facts.codec in LOSSY and alpha > SAFE_ALPHA:
                    coarse.add(table.facts.codec)
        if lacking:
            self._warn(f"{lacking} matrices in the layers lack a Gram from some input, and take `others`")
        if idle:
            self._warn(
                f"{idle} matrices saw no token in some input, as an expert to which none is routed, and take `others`"
            )
        if few:
            share, n, d = worst
            self._warn(
                f"{counted(few).replace('tensor', 'Gram')} of fewer than {ENOUGH} tokens a dimension, at worst {n} for {d}: "
                f"an alpha of at most n / (n + d) = {share:.2g} suits these"
            )
        for codec in sorted(coarse):
            self._warn(f"an alpha over {SAFE_ALPHA} asks more of a Gram than `{codec}` keeps: use `packed32`, or 0.9")

    def _alpha(self, place: Place) -> float | None:
        try:
            found: Any = self.op.values_at(place, range(len(self.inputs)))
        except RecipeError:
            return None  # said where the tensor is planned
        return float(found[list(self.op.settings()).index("alpha")])


class LotTable(RegmeanTable):
    """`lot`: matrices as `regmean` around the base, and gains by the mean squares of what they multiply."""

    def __init__(self, planner: Planner, node: Node) -> None:
        assert isinstance(node.op, Lot)
        self.op = node.op.at_matrix()
        self.gains: list[StatisticsTable | None] = []
        for index, one in enumerate(node.inputs):
            name = one.keys.get("gram_diag")
            table = planner.table(name) if name else None
            if table is not None and not (isinstance(table, StatisticsTable) and table.kind == "gram_diag"):
                planner.findings.add(
                    RecipeError(
                        f"`gram_diag` needs statistics of kind gram_diag, and '{name}' holds another",
                        where=planner.recipe.where((*node.path, "inputs", index, "gram_diag")),
                        fix="Name a folder or node of `op: gram_diag`.",
                    )
                )
            self.gains.append(table if isinstance(table, StatisticsTable) and table.kind == "gram_diag" else None)
            if name and (given := self.gains[-1]) is not None and not one.by_names:
                where = planner.recipe.where((*node.path, "inputs", index, "gram_diag"))
                check_owner(planner, name, given, self.measured_on(node, index), where)
        super().__init__(planner, node)

    def _acts(self, place: Place, tensor: StoredTensor) -> bool:
        return super()._acts(place, tensor) or (
            len(tensor.shape) == 1
            and (self.node.only is None or matches(self.node.only, place))
            and all(one is not None and one.has(self.stored(i, place.name)) for i, one in enumerate(self.gains))
        )

    def _readied(
        self, op: Op, name: str, kept: Sequence[int], expressions: Sequence[Expression], base: Expression | None
    ) -> Ready | Expression:
        if not isinstance(op, Lot) or base is None:
            return super()._readied(op, name, kept, expressions, base)
        if len(self.tensors[name].shape) == 2:
            return super()._readied(op.at_matrix(), name, kept, expressions, base)
        squares = []
        for index in kept:
            table = self.gains[index]
            found = table and table.along(self.stored(index, name), self.tensors[name].shape)
            if not found:
                self.findings.gather(
                    self.where("inputs", index, "gram_diag"),
                    "the mean squares of {names} are of another number of channels",
                    "Collect them on this model.",
                    name,
                )
                return self._fallen()
            squares.append(found)
        pairs = zip(self._weights(name, kept, expressions, base), squares, strict=True)
        given = tuple(one for pair in pairs for one in pair)
        if number(op.scale) == 1:
            return Ready(op.at_gain(), given)
        mean = self.make.apply(op.at_gain(), given)
        step = TaskArithmetic.model_construct(weight=Each((1.0,)), normalize=False, scale=number(op.scale))
        return Ready(step, (base, self.make.difference(mean, base)))

    def _lint(self) -> None:
        """The smallest correction is no risk where tokens are few; mean squares that nothing uses are said."""
        gains = (name for name, tensor in self.tensors.items() if len(tensor.shape) == 1)
        used = any(
            all(one is not None and one.has(self.stored(i, name)) for i, one in enumerate(self.gains)) for name in gains
        )
        if any(self.gains) and not used:
            self._warn(
                "`gram_diag` of its inputs holds mean squares of no gain that all of them have: it changes nothing"
            )


class FisherTable(StatedTable):
    """`fisher`: every tensor that has Fisher information from each input is averaged by it."""

    key = "fisher"
    kinds = ("fisher_diag",)

    def __init__(self, planner: Planner, node: Node) -> None:
        assert isinstance(node.op, Fisher)
        self.op = node.op
        self.means: dict[tuple[int, tuple[bool, ...]], FisherMean] = {}
        """One op for all tensors where the resolved one is the same."""
        super().__init__(planner, node)
        self.favored = None if self.op.favor is None else self._index_of(self.op.favor, "favor")
        try:
            refuse_prior_without_base(self.op, based=self.base is not None)
        except RecipeError as error:
            self.findings.add(error.placed(self.where()))

    def _whole(self) -> int:
        """Each with its Fisher information, and the base where there is one."""
        return 2 * len(self.inputs) + (self.base is not None)

    def _readied(
        self, op: Op, name: str, kept: Sequence[int], expressions: Sequence[Expression], base: Expression | None
    ) -> Ready | Expression:
        if not isinstance(op, Fisher) or not self.sound:
            return super()._readied(op, name, kept, expressions, base)
        fishers: list[Expression] = []
        for index in kept:
            table, stored = self.statistics[index], self.stored(index, name)
            found = None if table is None else table.fisher(stored)
            if not isinstance(found, Load) or found.tensor.shape != self.tensors[name].shape:
                self.findings.gather(
                    self.where("inputs", index, "fisher"),
                    "the Fisher information of {names} has another shape",
                    "Collect it on this model.",
                    name,
                )
                return self._fallen()
            fishers.append(found)
        floored = tuple(self.op.favor is None or index == self.favored for index in kept)
        pairs = zip(self._weights(name, kept, expressions, base), fishers, strict=True)
        given = [one for pair in pairs for one in pair]
        key = id(op), floored
        made = self.means.get(key)
        if made is None:
            made = self.means[key] = op.mean(numbers(op.weight), floored)
        return Ready(made, (base, *given) if base is not None else tuple(given))

    def _made(self, name: str) -> Expression:
        made = super()._made(name)
        ready = self.ready.get(name)
        if isinstance(ready, Ready) and isinstance(ready.op, FisherMean) and self.places[name].vocab:
            self.make.agreed[id(made)] = next(self.make.speakers(ready.inputs[0]))
        return made


class AimTable(StatedTable):
    """`aim`: each matrix whose input channels have activations is stepped to by channels."""

    key = "act_absmean"
    kinds = ("act_absmean",)

    def _readied(
        self, op: Op, name: str, kept: Sequence[int], expressions: Sequence[Expression], base: Expression | None
    ) -> Ready | Expression:
        table = self.statistics[0]
        if not isinstance(op, Aim) or table is None or base is None:
            return super()._readied(op, name, kept, expressions, base)
        found = table.along(self.stored(0, name), self.tensors[name].shape)
        if found is None:
            self.findings.gather(
                self.where("inputs", 0, self.key),
                "the activations of {names} are of another number of channels",
                "Collect them on the base.",
                name,
            )
            return self._fallen()
        (model,) = self._weights(name, kept, expressions, base)
        key = id(op)
        made = self.steps.get(key)
        if made is None:
            made = self.steps[key] = op.step()
        return Ready(made, (base, model, found))

    def __init__(self, planner: Planner, node: Node) -> None:
        self.steps: dict[int, AimStep] = {}
        """One op for all tensors where the resolved one is the same."""
        super().__init__(planner, node)

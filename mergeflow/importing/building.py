"""From merges to the sections of a recipe, and to its text."""

from __future__ import annotations

import os
import posixpath
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeflow.document import WIDTH, dump_yaml, read_document
from mergeflow.errors import MergeflowError, Problems, RecipeError, printable, raise_all
from mergeflow.importing.methods import METHODS, REQUIRED, Method, Parameter
from mergeflow.importing.reading import HALF, Merge, Reference, Report, Rule, Settings, Slice, Source, cut
from mergeflow.ops import Op, op_named
from mergeflow.recipe import NAME, RECIPE_NAME, Recipe

_HUB = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*")
_SHORT_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/+-]*")


@dataclass(frozen=True, slots=True)
class Imported:
    """A recipe that was brought over: its text, and notes on what was left out or done another way."""

    text: str
    notes: tuple[str, ...]


class Builder:
    """From merges to the sections of a recipe. Nodes come in the order they need each other."""

    def __init__(self, report: Report, path: Path, into: Path) -> None:
        self.report = report
        self.path = path
        self.into = into
        self.models: dict[str, Any] = {}
        self.nodes: dict[str, dict[str, Any]] = {}
        self.output: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}
        self.name = path.stem
        self.comments: dict[str, list[str]] = {}
        self.known: dict[Any, str] = {}
        """What is there already, by what it is: a model's path, or the content of a helping node."""
        self.taken: dict[str, int] = {}
        """The names that are taken, each with the number that the next one like it gets."""
        self.names: dict[str | None, str] = {}
        """What the node of each merge is called."""
        self.merges: dict[str, Merge] = {}
        self.made: dict[str | None, str] = {}
        self.open: list[str | None] = []
        self.origins: dict[str, str] = {}
        """Where in the configuration a part of the recipe comes from, by its keys."""
        self.remarks: list[str] = []
        self.headers: dict[str, str | None] = {}

    def build(self, merges: Sequence[Merge]) -> None:
        self.merges = {merge.name: merge for merge in merges if merge.name}
        read = {
            reference.path
            for merge in merges
            for reference in _references(merge)
            if reference.path in self.merges and reference.path != merge.name
        }
        last = [merge for merge in merges if merge.name not in read]
        if not last:
            self.report.problem("each merge reads another one: they go in a circle", merges[0].where)
            return
        self.names = {merge.name: self.fresh(_identifier(merge.name or "merged")) for merge in merges}
        for merge in last:
            self.merge(merge)
        for merge in merges:
            if merge.name not in self.made and not self.report.errors:
                self.merge(merge)  # nothing leads to it but the circle that it is in, which this finds
        if self.report.errors:
            return
        if len(last) == 1:
            self.output = self.output_of(last[0])
            self.name = last[0].name or self.name
        else:
            self.outputs = {self.names[merge.name]: self.output_of(merge) for merge in last}

    def finished(self) -> Imported:
        """The text, once the recipe was checked as any other is."""
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", self.name).strip("._-")[:96]
        data: dict[str, Any] = {"recipe": 1, "name": name if re.fullmatch(RECIPE_NAME, name) else "merged"}
        data |= {"models": self.models, **({"nodes": self.nodes} if self.nodes else {})}
        data |= {"outputs": self.outputs} if self.outputs else {"output": self.output}
        try:
            Recipe(**data)
        except MergeflowError as error:
            raise_all([self.placed(one) for one in (error.errors if isinstance(error, Problems) else (error,))])
        notes = [f"{_places(tuple(where))}: {text}" for text, where in self.report.notes.items()]
        source = printable(self.path.name).replace("\n", " ")
        lines = [f"# Brought over from mergekit's {source} by `mergeflow import`."]
        if self.report.notes or self.remarks:
            lines.append("#")
            told = [f"{_lines(tuple(where))}: {text}" for text, where in self.report.notes.items()]
            for text in (*told, *dict.fromkeys(self.remarks)):
                lines += textwrap.wrap(printable(text), WIDTH, initial_indent="# - ", subsequent_indent="#   ")
        lines.append("")
        lines += dump_yaml({key: value for key, value in data.items() if key in ("recipe", "name")}).splitlines()
        for key in ("models", "nodes", "outputs", "output"):
            if key not in data:
                continue
            lines.append("")
            if key == "nodes":
                lines.append("nodes:")
                for name, node in self.nodes.items():
                    lines += [f"  # {comment}" for comment in self.comments.get(name, ())]
                    lines += dump_yaml({"nodes": {name: node}}).splitlines()[1:]
            else:
                lines += dump_yaml({key: data[key]}).splitlines()
        text = "\n".join(lines) + "\n"
        try:
            read_document(text, str(self.path))
        except RecipeError as error:
            what = f"what is written in few words here is too large as a recipe: {error.what}"
            raise RecipeError(what, where=str(self.path), fix="Give fewer models their own rules.") from None
        return Imported(text, tuple(notes))

    def placed(self, error: MergeflowError) -> MergeflowError:
        """A problem of the recipe at the place in the configuration that it comes from."""
        keys = error.where.removeprefix("recipe.")
        while keys and keys not in self.origins:
            keys = keys.rpartition(".")[0]
        error.where = self.origins.get(keys, str(self.path))
        return error

    # Models

    def reference(self, reference: Reference, where: str) -> str:
        """The name of the model or node that a reference stands for."""
        if reference.path in self.merges:
            name = self.intermediate(self.merges[reference.path], where)
        else:
            name = self.model(reference.path, reference.revision, where, "path")
        if reference.lora is None:
            return name
        lora = self.model(*reference.lora, where, "adapter")
        self.remarks.append(
            "mergekit rounds a model with its LoRA to the model's dtype before it merges; here the sum stays in float32."
        )
        return self.helper(f"{name}_{lora}", {"op": "add", "base": name, "inputs": [lora]}, where)

    def intermediate(self, merge: Merge, where: str) -> str:
        """The node of a merge that another one reads, rounded as mergekit wrote it to disk."""
        if merge.name in self.open:
            circle = " -> ".join(name or "the one without a name" for name in (*self.open, merge.name))
            self.report.problem(f"the merges go in a circle: {circle}", where)
            return str(merge.name)
        if merge.tokenizer is not None:
            self.report.note("the tokenizer of a merge that another one reads says nothing: left out", merge.where)
        return self.rounded(self.merge(merge), (merge.dtype, merge.out_dtype), where)

    def rounded(self, name: str, dtypes: Sequence[str | None], where: str) -> str:
        """The node, rounded to each of these dtypes that rounds."""
        for dtype in dict.fromkeys(dtypes):
            if dtype in HALF:
                name = self.helper(f"{name}_{dtype}", {"op": "cast", "model": name, "to": dtype}, where)
        return name

    def model(self, path: str, revision: str | None, where: str, word: str) -> str:
        """The name of a checkpoint's entry under `models:`."""
        key = (word, path, revision)
        if key in self.known:
            return self.known[key]
        local = self.local(path)
        if local is None and not _HUB.fullmatch(path):
            self.report.problem(
                f"'{cut(path)}' is neither a folder here nor the name of a repository",
                where,
                "Write a path that starts with ./ or /, or owner/name.",
            )
        if local is not None and revision is not None:
            self.report.note("a local folder has no revision: left out", where)
            revision = None
        name = self.known[key] = self.fresh(_identifier(posixpath.basename((local or path).rstrip("/"))), path)
        entry: Any = local or path
        if word == "adapter":
            entry = {"adapter": entry, **({"revision": revision} if revision else {})}
        elif revision is not None:
            short = _SHORT_REVISION.fullmatch(revision)
            entry = f"{entry}@{revision}" if short else {"path": entry, "revision": revision}
        self.models[name] = entry
        self.origins[f"models.{name}"] = where
        return name

    def local(self, path: str) -> str | None:
        """A local path as the recipe writes it, relative to its own folder; None for a repository."""
        if path.startswith(("/", "~")):
            return path
        beside = next((folder for folder in (Path(), self.path.parent) if os.path.exists(folder / path)), None)
        explicit = path.startswith(("./", "../")) or path in (".", "..") or path.endswith(".safetensors")
        if beside is None and not explicit and path.count("/") < 2:
            return None
        found = os.path.relpath((beside or Path()) / path, self.into)
        return found if found.startswith("..") else f"./{found}" if found != "." else "."

    def fresh(self, name: str, path: str = "") -> str:
        """The name, or one like it that is not taken: with its owner in front, then with a number behind."""
        owner = posixpath.basename(posixpath.dirname(path.rstrip("/"))) if path else ""
        names = [name, *([_identifier(f"{owner}_{name}")] if owner.strip(".") else [])]
        found = next((one for one in names if one not in self.taken), name)
        while found in self.taken:
            self.taken[name] += 1
            found = f"{name}_{self.taken[name]}"
        self.taken[found] = 1
        return found

    def helper(self, name: str, node: dict[str, Any], where: str) -> str:
        """The name of a node; one that is there with the same content is used again."""
        key = repr(node)
        if key not in self.known:
            self.known[key] = self.fresh(name)
            self.put(self.known[key], node, where)
        return self.known[key]

    def put(self, name: str, node: dict[str, Any], where: str, places: Mapping[str, str] | None = None) -> None:
        """Add a node; `places` says where its keys come from."""
        self.nodes[name] = node
        self.origins[f"nodes.{name}"] = where
        self.origins |= {f"nodes.{name}.{keys}": place for keys, place in (places or {}).items()}

    # Merges

    def merge(self, merge: Merge) -> str:
        """The name of the node that a merge is; made once."""
        if merge.name in self.made:
            return self.made[merge.name]
        self.open.append(merge.name)
        name = self.names[merge.name]
        if merge.slices[0].sources[0].layers is None:
            node, places = self.merged(merge, merge.slices[0], 0)
            self.put(name, node, merge.where, places)
            self.remark(name, merge)
        else:
            self.put(name, self.stacked(merge, name), merge.where)
        self.made[merge.name] = name
        self.open.pop()
        return name

    def remark(self, name: str, merge: Merge) -> None:
        if METHODS[merge.method].draws and self.nodes[name]["op"] != "passthrough":
            self.comments[name] = [
                "Its random draws are not those of mergekit's generator: the same keep rate, other elements."
            ]

    def stacked(self, merge: Merge, name: str) -> dict[str, Any]:
        """Slices behind one another: what each gives, and the layers that are taken of it."""
        layers = []
        start = 0
        for index, one in enumerate(merge.slices):
            first, last = self.span(one)
            node, places = self.merged(merge, one, start)
            if node["op"] == "passthrough" and "scale" not in node:
                model = str(node["model"])
            elif node["op"] == "passthrough":
                model = self.helper(f"{node['model']}_scaled", node, one.where)
            else:
                model = self.fresh("layers" if len(merge.slices) == 1 else f"{name}_slice_{index}")
                self.put(model, node, one.where, places)
                self.remark(model, merge)
            layers.append({"model": model, "take": f"{first}-{last}"})
            start += last - first + 1
        return {"op": "stack", "layers": layers}

    def span(self, one: Slice) -> tuple[int, int]:
        """The layers of a slice as its node counts them: as the models do where all are cut alike, else from 0."""
        ranges = {source.layers for source in one.sources if source.layers}
        first, last = next(iter(ranges))
        return (first, last) if len(ranges) == 1 else (0, last - first)

    def merged(self, merge: Merge, one: Slice, start: int) -> tuple[dict[str, Any], dict[str, str]]:
        """The node for one slice, or for whole models, and where its keys come from.

        `start` is the slice's first layer in the output.
        """
        method = METHODS[merge.method]
        sources, base = self.inputs_of(merge, one)
        if not self.check_count(merge, method, sources, base, one):
            return _spoiled()
        span = self.span(one) if one.sources[0].layers else None
        ordered = sorted(sources, key=lambda source: source.model != base)
        alike = all(source.layers == sources[0].layers for source in sources)
        names = {source.model: self.part(source, whole=alike) for source in ordered}
        others = [source for source in sources if source.model != base]
        for source in sources:
            for word in source.parameters if source.model == base else ():
                what = f"mergekit does not look for `{word}` at the base of {merge.method}: left out there"
                self.report.note(what, source.parameters[word][0].where)
        if base is not None and not others:
            return {"op": "passthrough", "model": names[base]}, {}
        try:
            op = op_named(method.op)
        except RecipeError as error:
            self.report.problem(f"mergeflow has no op '{method.op}'", merge.where, error.fix)
            return _spoiled()
        if len(others) == 1 and op.fewest > 1 and base is None:
            return {"op": "passthrough", "model": names[others[0].model]}, {}
        node: dict[str, Any] = {"op": method.op}
        if base is not None and not method.ends:
            node["base"] = names[base]
        inputs: list[dict[str, Any]] = [{"model": names[source.model]} for source in others]
        whole: dict[str, Any] = {}
        places: dict[str, str] = {}
        outer = (one.parameters, *merge.outer)
        for word, parameter in method.parameters.items():
            if not parameter.ours:
                continue
            if parameter.of == "shared":
                rules = self.that_fit(self.found(word, parameter, outer, one.where), ordered[0].model)
                shifted = span is not None and span[0] != start
                value = self.written(word, parameter, op, rules, span, shifted)
                if value is not None and value != _default(op, parameter):
                    whole[parameter.ours] = value
                    places[parameter.ours] = rules[0].where
            else:
                self.per_input(word, parameter, op, others, outer, span, whole, inputs)
        if whole.get("flatten", True) is True:
            whole.pop("row_wise", None)  # one vector has neither rows nor columns
        for word, parameter in method.parameters.items():
            if parameter.ours in whole and parameter.ours not in op.model_fields:
                what = f"mergeflow's {op.name} has no parameter for `{word}`"
                self.report.problem(what, places.get(parameter.ours, one.where), "Leave it at mergekit's default.")
        if op.takes == "model":
            node = {"op": method.op, **inputs[0], **whole}
        else:
            if base is not None and method.ends:
                inputs.insert(0, {"model": names[base]})
                others.insert(0, next(source for source in sources if source.model == base))
            node["inputs"] = [item["model"] if len(item) == 1 else item for item in inputs]
            node |= whole | {word: value for word, value in method.fixed.items() if word in op.model_fields}
            places |= {f"inputs.{index}": source.where for index, source in enumerate(others)}
        return node, places

    def inputs_of(self, merge: Merge, one: Slice) -> tuple[list[Source], Reference | None]:
        """All that is merged, in order, and which of it is the base."""
        method = METHODS[merge.method]
        sources = list(one.sources)
        base = one.base or merge.base
        whole = one.sources[0].layers is None
        if base is not None and whole and all(source.model != base for source in sources):
            sources.append(Source(base, {}, None, merge.base_where))
            if method.base == "input":
                self.report.note(
                    f"mergekit takes the `base_model` of {merge.method} for one more input: so does the recipe",
                    merge.base_where,
                )
        return sources, None if method.base == "input" else base

    def check_count(
        self, merge: Merge, method: Method, sources: Sequence[Source], base: Reference | None, one: Slice
    ) -> bool:
        if method.base == "needed" and base is None:
            self.report.problem(f"{merge.method} needs a `base_model`", one.where, "Name the model of the others.")
            return False
        if base is not None and all(source.model != base for source in sources):
            what = f"the base '{cut(str(base))}' is not among the sources of this slice, as {merge.method} needs it"
            self.report.problem(what, one.where, "Add it to `sources`, with its `layer_range`.")
            return False
        most = method.most if method.base != "optional" or base is not None or method.most is None else method.most - 1
        fewest = method.fewest + (method.base == "optional" and base is not None)
        if len(sources) < fewest or (most is not None and len(sources) > most):
            asked = f"{fewest}" if fewest == most else f"at least {fewest}" if most is None else f"{fewest} to {most}"
            models = "model" if asked == "1" else "models"
            counted = ", the base counted" if base is not None else ""
            self.report.problem(f"{merge.method} takes {asked} {models}{counted}, not {len(sources)}", one.where)
            return False
        return True

    def part(self, source: Source, *, whole: bool) -> str:
        """A model; where the sources of a slice are cut differently, the part of it that is meant, counted from 0."""
        name = self.reference(source.model, source.where)
        if whole or source.layers is None:
            return name
        first, last = source.layers
        node = {"op": "stack", "layers": [{"model": name, "take": f"{first}-{last}"}]}
        return self.helper(f"{name}_{first}_{last}", node, source.where)

    # Parameters

    def found(self, word: str, parameter: Parameter, levels: Sequence[Settings], where: str) -> tuple[Rule, ...]:
        """The rules that hold, from all levels up to the first rule that fits all; empty where a value is missing."""
        rules: list[Rule] = []
        for level in levels:
            for rule in level.get(word, ()):
                rules.append(rule)
                if rule.filter is None:
                    return tuple(rules)
        if parameter.default is REQUIRED:
            what = f"`{word}` is missing" if not rules else f"`{word}` is missing where no filter fits"
            self.report.problem(what, rules[-1].where if rules else where, "mergekit has no default for it.")
            return ()
        return (*rules, Rule(None, (parameter.default,), where))

    def per_input(
        self,
        word: str,
        parameter: Parameter,
        op: type[Op],
        sources: Sequence[Source],
        outer: tuple[Settings, ...],
        span: tuple[int, int] | None,
        whole: dict[str, Any],
        inputs: Sequence[dict[str, Any]],
    ) -> None:
        """A parameter that each model may give: what all share on the node, a model's own on its input."""
        ours, default = parameter.ours, _default(op, parameter)
        values = []
        for source in sources:
            levels = (source.parameters, *outer)
            rules = self.found(word, parameter, levels, source.where)
            if parameter.ours == "gamma":
                rules = self.without_outliers(rules, levels)
            shifted = source.layers is not None and span is not None and source.layers[0] != span[0]
            rules = self.that_fit(rules, source.model)
            values.append(self.written(word, parameter, op, rules, span, shifted))
        mark = op.settings().get(ours)
        if mark is None or not mark.per_input:
            if any(value != values[0] for value in values):
                what = f"`{ours}` of {op.name} has one value for all inputs, and the models give several for `{word}`"
                self.report.problem(what, sources[0].where)
            elif values[0] is not None and values[0] != default:
                whole[ours] = values[0]
            return
        own = [word in source.parameters for source in sources]
        shared = next((value for value, is_own in zip(values, own, strict=True) if not is_own), None)
        if shared is not None and shared != default:
            whole[ours] = shared
        for value, item in zip(values, inputs, strict=True):
            if value is not None and value != whole.get(ours, default):
                item[ours] = value

    def without_outliers(self, gamma: tuple[Rule, ...], levels: Sequence[Settings]) -> tuple[Rule, ...]:
        """gamma of breadcrumbs, with 0 where the density is 1: mergekit then drops nothing, and we would drop outliers."""
        density = [rule for level in levels for rule in level.get("density", ())]
        end = next((index for index, rule in enumerate(density) if rule.filter is None), None)
        density = [*density, Rule(None, (1.0,), gamma[0].where)] if end is None else density[: end + 1]
        if not any(1 in rule.values for rule in density) or all(set(rule.values) == {0} for rule in gamma):
            return gamma
        gradient = next((rule for rule in density if 1 in rule.values and set(rule.values) != {1}), None)
        if gradient is not None or (len(density) > 1 and len(gamma) > 1):
            self.report.problem(
                "mergekit drops no outliers where the density is 1, and a recipe cannot say where that is",
                (gradient or density[0]).where,
                "Keep the density below 1, give `gamma: 0`, or give `gamma` one value.",
            )
            return gamma
        if len(density) == 1:
            return (Rule(None, (0.0,), gamma[0].where),)
        return tuple(Rule(rule.filter, (0.0,) if 1 in rule.values else gamma[0].values, rule.where) for rule in density)

    def that_fit(self, rules: tuple[Rule, ...], model: Reference) -> tuple[Rule, ...]:
        """The rules without those whose filter fits no tensor of a model, where its names can be looked up here."""
        if all(rule.filter is None for rule in rules):
            return rules
        names = self.tensors(model)
        if names is None:
            self.remarks.append(
                "mergekit passes over a filter that fits no tensor; here planning names the rule: take it out then."
            )
            return rules
        kept = []
        for rule in rules:
            if rule.filter is None or rule.filter in names:
                kept.append(rule)
            else:
                what = f"the filter '{cut(rule.filter)}' fits no tensor, and mergekit passes over it: left out"
                self.report.note(what, rule.where)
        return tuple(kept)

    def tensors(self, model: Reference) -> str | None:
        """The names of a model's tensors, a line each; None where the model is not on this machine."""
        from mergeflow.checkpoint import open_checkpoint
        from mergeflow.hub import locate

        path = self.local(model.path)
        if path is None or model.path in self.merges:
            return None
        if path not in self.headers:
            try:
                self.headers[path] = "\n".join(open_checkpoint(locate(path, relative_to=self.into)).tensors)
            except MergeflowError:
                self.headers[path] = None
        return self.headers[path]

    def written(
        self,
        word: str,
        parameter: Parameter,
        op: type[Op],
        rules: Sequence[Rule],
        span: tuple[int, int] | None,
        shifted: bool,
    ) -> Any:
        """The rules as a recipe writes them: a value, a gradient, or a list."""
        written: list[tuple[list[str], Any]] = []
        seen = set()
        for rule in rules:
            if rule.filter in seen:
                continue
            seen.add(rule.filter)
            if rule.filter is not None and shifted and re.search(r"\d", rule.filter):
                self.report.problem(
                    f"the filter '{cut(rule.filter)}' names a layer, and layers have other numbers in this slice",
                    rule.where,
                    "Write this merge as a recipe by hand.",
                )
            value = self.value(word, parameter, rule, span)
            pattern = [] if rule.filter is None else [f"*{rule.filter}*"]
            if written and written[-1][1] == value:
                written[-1] = ([*written[-1][0], *pattern] if pattern else [], value)
            else:
                written.append((pattern, value))
        if not written:
            return None
        if len(written) == 1 and not written[0][0]:
            only = written[0][1]
            if not isinstance(only, dict) or parameter.ours in op.settings():
                return only
        if parameter.ours not in op.settings():
            if parameter.ours in op.model_fields:
                what = f"`{parameter.ours}` of {op.name} has one value for all tensors"
                self.report.problem(what, rules[0].where, f"Give `{word}` one value.")
            return None
        return [
            {"match": patterns[0] if len(patterns) == 1 else patterns, "value": value} if patterns else {"value": value}
            for patterns, value in written
        ]

    def value(self, word: str, parameter: Parameter, rule: Rule, span: tuple[int, int] | None) -> Any:
        """One value, or a gradient that gives each layer, and what is outside of them, what mergekit gives it."""
        values = rule.values
        if all(value == values[0] for value in values):
            return values[0]
        if parameter.kind not in ("number", "share"):
            what = f"a list of values that are no numbers chooses by layer in mergekit, and `{word}` cannot"
            self.report.problem(what, rule.where, f"Give `{word}` one value.")
            return values[0]
        if span is None:
            return {"gradient": list(values), "outside": values[0]}
        if span[0] == span[1]:
            return {"gradient": [values[-1]] * 2, "over": f"{span[0]}-{span[1]}", "outside": values[0]}
        return {"gradient": list(values), "over": f"{span[0]}-{span[1]}", "outside": values[0]}

    # The output

    def output_of(self, merge: Merge) -> dict[str, Any]:
        """What a merge's output takes from which model, and its dtype."""
        name = self.made[merge.name]
        found: dict[str, Any] = {"node": name}
        leaf = self.leaf(name)
        base = self.leaf(self.reference(merge.base, merge.base_where)) if merge.base is not None else leaf
        if base != leaf:
            found["like"] = base
        if isinstance(merge.tokenizer, Reference):
            tokenizer = self.leaf(self.reference(merge.tokenizer, merge.where))
            if tokenizer != base:
                found["tokenizer"] = tokenizer
        if merge.tokenizer is not None:
            self.remarks.append(
                "mergekit moves the rows of embeddings to the tokenizer's ids and cuts what it does not use; here models "
                "whose tokenizers disagree are refused, and no row is moved or cut."
            )
        if merge.out_dtype not in (None, merge.dtype):
            found["node"] = self.rounded(name, (merge.dtype,), merge.where)
        dtype = merge.out_dtype or merge.dtype
        if dtype is not None:
            found["dtype"] = dtype
        if merge.dtype in HALF:
            self.remarks.append(
                f"mergekit rounds inputs to {merge.dtype} and computes in it or in float32; here they are merged as they "
                "are stored, in float32, and rounded once."
            )
        return found

    def leaf(self, name: str) -> str:
        """The model that a node stands on: what its output is like, if nothing else is said."""
        while name in self.nodes:
            node = self.nodes[name]
            first = node.get("base") or node.get("model") or (node.get("inputs") or node["layers"])[0]
            name = first["model"] if isinstance(first, dict) else first
        return name


def _spoiled() -> tuple[dict[str, Any], dict[str, str]]:
    """What stands for a node of which a problem was noted."""
    return {"op": "passthrough", "model": ""}, {}


def _references(merge: Merge) -> Iterator[Reference]:
    """All models that a merge names."""
    yield from (source.model for one in merge.slices for source in one.sources)
    yield from (one.base for one in merge.slices if one.base)
    yield from (merge.base,) if merge.base else ()
    yield from (merge.tokenizer,) if isinstance(merge.tokenizer, Reference) else ()


def _default(op: type[Op], parameter: Parameter) -> Any:
    """Our default of a parameter, None where it must be given; mergekit's where our op goes without the parameter."""
    info = op.model_fields.get(parameter.ours)
    if info is None:
        return parameter.default
    return None if info.is_required() else info.default


def _identifier(text: str) -> str:
    """A name for a model or node that reads like the text."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", text)[:60].strip("_-") or "model"
    return name if re.match(NAME, name) else f"m{name}"


def _places(where: Sequence[str]) -> str:
    return where[0] if len(where) == 1 else f"{where[0]} and {len(where) - 1} more"


def _lines(where: Sequence[str]) -> str:
    numbers = list(dict.fromkeys(one.rsplit(":", 2)[-2] for one in where))
    more = ", ..." if len(numbers) > 8 else ""
    return f"line{'s' if len(numbers) > 1 else ''} {', '.join(numbers[:8])}{more}"

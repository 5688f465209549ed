"""A checkpoint as the recipe sees it: its tensors by name, after `only`, `rename` and the rules for tied heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mergeflow.checkpoint import Checkpoint, StoredTensor
from mergeflow.errors import InputError, RecipeError
from mergeflow.graph import EqualTensors, Expression, Load, Stacked
from mergeflow.ops.base import Space
from mergeflow.planning.findings import nearest
from mergeflow.recipe import ModelSource
from mergeflow.settings import Place, matches, places

if TYPE_CHECKING:
    from mergeflow.planning.planner import Planner

SPACE_KEY = "mergeflow.space"
"""The key in a safetensors header's metadata that says what the tensors are."""

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


class Table(ABC):
    """What a model or node gives: its tensors by name, as stored where the names come from, and an expression for each."""

    space: Space
    tensors: dict[str, StoredTensor]
    places: Mapping[str, Place]
    leaf: str
    """The entry of `models:` that the names come from."""
    stacked: Mapping[str, Stacked] = MappingProxyType({})
    """The numbered stacks that `stack` made, by prefix: their names are not those of the leaf."""
    added: Collection[str] = ()
    """Names beyond those of the leaf, which `extra: keep` brought in."""
    bits: Collection[str] = ()
    """Names of tensors that hold truth values, eight to a byte."""
    fixed: Collection[str] = ()
    """Names of tensors whose dtype no output changes."""
    metadata: Mapping[str, str] = {}
    """What a file's header says of them beside their space."""
    quantised: str = ""
    """Why the numbers mean nothing by themselves, or an empty string."""
    sparse: bool = False
    """Whether it gives deltas, and a tensor that it lacks is a delta of zeros."""

    @abstractmethod
    def expression(self, name: str) -> Expression:
        """What makes a tensor; the same object each time."""

    def gives_delta(self, name: str) -> bool:
        """Whether `expression` is a delta; an adapter may hold the whole weight in its place."""
        return self.space == "delta"

    def beside(self, name: str) -> Expression | None:
        """A delta that is added to what a whole weight in the place of a delta changes."""
        return None


class SourceTable(Table):
    """An entry of `models:`: what its `only` and `rename` leave of a checkpoint's tensors."""

    def __init__(self, planner: Planner, name: str, checkpoint: Checkpoint) -> None:
        self.name = self.leaf = name
        self.checkpoint, self.config = checkpoint, checkpoint.config or {}
        self.planner, self.findings = planner, planner.findings
        self.where = planner.recipe.where(("models", name))

    def _chosen(self, source: ModelSource, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
        """The tensors that the model's `only` names, by their names in the file."""
        if source.only is None:
            return dict(stored)
        at = _with_vocabulary(places(stored), vocabulary(stored, self.config))
        tensors = {name: tensor for name, tensor in stored.items() if matches(source.only, at[name])}
        if not tensors:
            tensors = dict(stored)  # so that what is wrong is said once
            self.findings.add(
                RecipeError(
                    f"`only: {', '.join(source.only)}` fits none of the {len(stored)} tensors",
                    where=self.where,
                    fix=nearest(source.only[0], stored),
                )
            )
        return tensors

    def _renamed(self, source: ModelSource, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        if not source.rename:
            return tensors
        unused = dict(source.rename)
        renamed: dict[str, StoredTensor] = {}
        for name, tensor in tensors.items():
            new = name
            for old, replacement in source.rename.items():
                inner = _starred(old, name)
                if inner is not None:
                    new = replacement.replace("*", inner, 1)
                    unused.pop(old, None)
                    break
            if new in renamed:
                self.findings.gather(
                    self.where, "the rename gives two tensors the name {names}", "Choose other names.", new
                )
            renamed[new] = tensor
        for old in unused:
            self.findings.add(
                RecipeError(f"the rename '{old}' fits no tensor", where=self.where, fix=nearest(old, tensors))
            )
        return renamed

    def _places(self) -> Mapping[str, Place]:
        """The tensors' places; those of a model before with the same names, which are most of the time there is."""
        vocab = vocabulary(self.tensors, self.config)
        key = tuple(self.tensors), tuple(vocab)
        known = self.planner.known_places
        if key not in known:
            known[key] = _with_vocabulary(places(self.tensors), vocab)
        return known[key]


class ModelTable(SourceTable):
    """A checkpoint's tensors. `tied` says that the config ties the head to the embedding."""

    def __init__(self, planner: Planner, name: str, source: ModelSource, checkpoint: Checkpoint) -> None:
        super().__init__(planner, name, checkpoint)
        self.space = self._space(source.space)
        self.tensors = self._renamed(source, self._chosen(source, checkpoint.tensors))
        self.head = ending(self.tensors, HEADS)
        self.embedding = ending(self.tensors, EMBEDDINGS)
        self.tied = from_config(self.config, "tie_word_embeddings") is True and self.embedding is not None
        self.quantised = quantised(checkpoint)
        self.places = self._places()
        self.loads: dict[str, Load] = {}

    def expression(self, name: str) -> Load:
        tensor = self.tensors[name]
        found = self.loads.get(tensor.name)
        if found is None:
            found = self.loads[tensor.name] = Load(self.name, tensor)
        return found

    def _space(self, given: Space | None) -> Space:
        stored = self.checkpoint.metadata.get(SPACE_KEY)
        if stored not in (None, "weight", "delta"):
            fix = "Name it under `artifacts:`." if stored in ("artifact", "statistics") else ""
            self.findings.add(InputError(f"the file's header says that it holds '{stored}'", where=self.where, fix=fix))
            return "weight"
        if given and stored and given != stored:
            self.findings.add(
                RecipeError(
                    f"the file says that it holds a {stored}, and the recipe a {given}",
                    where=self.where,
                    fix="Leave `space:` out.",
                )
            )
        return "delta" if (stored or given) == "delta" else "weight"

    # Tied heads: a head that the config ties to the embedding is no tensor of its own.

    def drop_tied_head(self, *, compare: bool) -> None:
        """Leave out a head that is tied and stored all the same; `compare` has the run look that it is equal."""
        if not (self.tied and self.head and self.embedding):
            return
        kept, dropped = self.tensors[self.embedding], self.tensors[self.head]
        if compare:
            if (kept.shape, kept.dtype) != (dropped.shape, dropped.dtype):
                self.findings.add(
                    RecipeError(
                        f"the config of '{self.name}' ties '{self.head}' to the embedding, and the file stores another",
                        where=self.where,
                        fix="Write `tied: untie` under `output:` to merge both, or `tied: trust_config` to drop it.",
                    )
                )
            self.planner.equal.append(EqualTensors(self.name, kept, dropped))
        self.findings.notes[f"{self.name}: '{self.head}' is tied to '{self.embedding}' and left out"] = None
        self.drop_head()

    def drop_head(self) -> None:
        """Leave out the head."""
        if self.head and self.tensors.pop(self.head, None) is not None:
            self.places = self._places()

    def give_head(self, head: str) -> None:
        """Let the embedding stand for the head that a tied checkpoint does not store."""
        if self.tied and self.embedding and head not in self.tensors:
            self.tensors[head] = self.tensors[self.embedding]
            self.places = self._places()


def quantised(checkpoint: Checkpoint) -> str:
    """Why a checkpoint's numbers mean nothing without their scales, told from its config and the names as stored; else ''."""
    if from_config(checkpoint.config or {}, "quantization_config"):
        return "its config.json has a quantization_config"
    found = next((name for name in checkpoint.tensors if name.endswith(QUANTISED)), None)
    return f"it has '{found}'" if found else ""


def packed(tensor: StoredTensor) -> bool:
    """Whether a quantised model's tensor holds packed numbers or their scales, not weights as any model has them."""
    return tensor.dtype.kind != "float" or tensor.dtype.size < 2 or tensor.name.endswith(QUANTISED)


def settle_ties(tables: Sequence[ModelTable], word: str | None, like: str | None, merged: Collection[str]) -> None:
    """Follow `tied`: None drops equal heads of tied models, untie gives every model one, trust_config does as `like`.

    Heads are compared of the models that are `merged`: one that only lends its config or tokenizer may store any head.
    """
    if word is None:
        for table in tables:
            if table.name in merged:
                table.drop_tied_head(compare=True)
            elif table.tied:
                table.drop_head()
        return
    follows = next((table.tied for table in tables if table.name == like), False)
    if word == "trust_config":
        for table in tables:
            table.drop_tied_head(compare=False)
    if not any(table.tied for table in tables):
        return
    if word == "trust_config" and follows:
        for table in tables:
            table.drop_head()
        return
    head = next((table.head for table in tables if table.head), HEADS[0])
    for table in tables:
        table.give_head(head)


def vocabulary(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> list[str]:
    """Names of the tensors whose first axis is the vocabulary: embedding, head, and what has as many rows outside the blocks."""
    named = [n for n, t in tensors.items() if len(t.shape) == 2 and n.endswith((*EMBEDDINGS, *HEADS))]
    rows = {tensors[name].shape[0] for name in named}
    size = from_config(config, "vocab_size")
    if isinstance(size, int):
        rows.add(size)
    if not rows:
        return []
    wide = {tensors[name].shape[1] for name in named}
    found = [
        name
        for name, tensor in tensors.items()
        if tensor.shape
        and tensor.shape[0] in rows
        # A vector of that length may be a norm's, unless it is a bias longer than the model is wide.
        and (len(tensor.shape) > 1 or ("bias" in name and tensor.shape[0] not in wide))
    ]
    outside = places(found)
    return [name for name in found if outside[name].layers is None]


def ending(names: Iterable[str], ends: tuple[str, ...]) -> str | None:
    """The first name that is one of `ends`, or has it after a dot."""
    dotted = tuple(f".{end}" for end in ends)
    return next((name for name in names if name in ends or name.endswith(dotted)), None)


def from_config(config: Mapping[str, Any], key: str) -> Any:
    """A key of config.json, or of its text_config."""
    inner = config.get("text_config")
    return config.get(key, inner.get(key) if isinstance(inner, Mapping) else None)


def rename_line(owner: str, theirs: Collection[str], wanted: Collection[str], *, sparse: bool = False) -> str:
    """The `rename:` line that makes two models' names fit, where a prefix is all that differs; else an empty string.

    It must fit most of the wanted names, or most of theirs where they are `sparse`.
    """
    few, many = (theirs, wanted) if sparse else (wanted, theirs)
    first = list(few)[:3]
    if not first:
        return ""
    longer = _prefixes(many, first)
    shorter = set.intersection(*({n[: -len(t)] for t in _tails(n) if t in many} for n in first)) - {""}
    for prefix in sorted(longer)[:5]:
        if 2 * len({name.removeprefix(prefix) for name in many} & set(few)) > len(few):
            return _rename(owner, *(("*", f"{prefix}*") if sparse else (f"{prefix}*", "*")))
    for prefix in sorted(shorter)[:5]:
        if 2 * len({prefix + name for name in many} & set(few)) > len(few):
            return _rename(owner, *((f"{prefix}*", "*") if sparse else ("*", f"{prefix}*")))
    return ""


def _rename(owner: str, old: str, new: str) -> str:
    return f"A prefix is all that differs: write `rename: {{'{old}': '{new}'}}` on '{owner}' under `models:`."


def _prefixes(theirs: Collection[str], first: Sequence[str]) -> set[str]:
    """What stands before each of `first` in some of their names."""
    return set.intersection(
        *({other[: -len(name)] for other in theirs if other.endswith(f".{name}")} for name in first)
    )


def _tails(name: str) -> list[str]:
    """What follows each dot of a name."""
    parts = name.split(".")
    return [".".join(parts[index:]) for index in range(1, len(parts))]


def _starred(pattern: str, name: str) -> str | None:
    """What the star of a pattern stands for in a name (an empty string without a star); None where it does not fit."""
    before, star, after = pattern.partition("*")
    if not star:
        return "" if name == pattern else None
    if len(name) >= len(before) + len(after) and name.startswith(before) and name.endswith(after):
        return name[len(before) : len(name) - len(after)]
    return None


def _with_vocabulary(at: dict[str, Place], names: Iterable[str]) -> dict[str, Place]:
    for name in names:
        at[name] = replace(at[name], vocab=True)
    return at

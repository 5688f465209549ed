"""The grammar of a recipe's sections, as pydantic models: what a model, a node, an input and an output may say.

A node's section is made from its op's class, on demand, so that the grammar, the JSON Schema (`mergeflow.schema` reads the
same models) and the op cannot drift apart, and `validate` builds only what a recipe uses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Strict, Tag, create_model
from pydantic_core import PydanticCustomError

from mergeflow.errors import RecipeError
from mergeflow.ops import Op
from mergeflow.ops.fuse import Source
from mergeflow.ops.statistics import StageOp, collector_of
from mergeflow.settings import Count, Flag, FloatName, NonNegative, Number, Patterns, setting_of

NAME = r"^[A-Za-z_][A-Za-z0-9_-]*$"
RECIPE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$"

Reference = Annotated[
    str, Strict(), Field(min_length=1, description="A name from `models:` or `nodes:`, or a node in place.")
]
Text = Annotated[str, Strict()]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


def _size(value: Any) -> Any:
    """Bytes of `5GB` (10^9) or `5GiB` (2^30)."""
    if isinstance(value, str):
        found = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*(?:([kKMGT])(i)?)?B\s*", value)
        if not found:
            raise PydanticCustomError("size", "a size is written as 5GB (10^9 bytes) or 5GiB (2^30 bytes)")
        power = " kMGT".index((found[2] or " ").replace("K", "k"))
        return int(float(found[1]) * (1024 if found[3] else 1000) ** power)
    return value


Size = Annotated[int, Strict(), Field(ge=1, le=2**63 - 1), BeforeValidator(_size)]


def parse_size(text: str) -> int:
    """The number of bytes of a size as recipes and options write it. Raises RecipeError."""
    try:
        size = int(text) if re.fullmatch("[0-9]{1,18}", text) else int(_size(text))
    except PydanticCustomError as error:
        raise RecipeError(f"'{text}' is no size: {error.message()}") from None
    if size < 1:
        raise RecipeError(f"'{text}' is no size: it must be at least one byte")
    return size


class ModelSource(_Section):
    """A checkpoint: a Hugging Face folder, a `.safetensors` file, or a hub repository; or a LoRA adapter."""

    path: Text | None = Field(
        default=None,
        min_length=1,
        description="A hub repository (owner/name), or a local path (./x, ../x, /x, ~/x, or x.safetensors).",
    )
    adapter: Text | None = Field(
        default=None,
        min_length=1,
        description="In place of `path`: a LoRA adapter as peft saves it, a folder or hub repository; it is a delta.",
    )
    revision: Text | None = Field(default=None, description="A hub commit, tag or branch.")
    subfolder: Text | None = Field(default=None, description="The folder in the repository that holds the model.")
    file: Text | None = Field(
        default=None, description="The .safetensors file or index to read, where there are several."
    )
    only: Patterns | None = Field(default=None, description="Which of the checkpoint's tensors the model has.")
    rename: dict[Text, Text] | None = Field(
        default=None,
        description="New names, e.g. {'language_model.*': '*'}: a pattern with at most one star, and its replacement.",
    )
    space: Literal["weight", "delta"] | None = Field(
        default=None, description="What the tensors are; default: what the file's header says, else weight."
    )

    @property
    def location(self) -> str:
        """Where it is: `path`, or `adapter`."""
        return self.adapter or self.path or ""


class ArtifactSource(_Section):
    """What a run made that is no model: a folder, or a hub repository."""

    path: Text = Field(min_length=1, description="A hub repository (owner/name), or a local path (./x, ../x, /x, ~/x).")
    revision: Text | None = Field(default=None, description="A hub commit, tag or branch.")
    subfolder: Text | None = Field(default=None, description="The folder in the repository that holds it.")

    @property
    def location(self) -> str:
        """Where it is."""
        return self.path

    @property
    def file(self) -> None:
        """An artifact is read by its usual files."""


class DataSource(_Section):
    """What a stage reads: a file or folder of rows, or a hub data set. The rows themselves go into no artifact."""

    path: Text = Field(
        min_length=1,
        description="A file (.jsonl, .json, .csv, .tsv, .parquet, .txt), a folder of such files or of images, or a hub data set.",
    )
    kind: Literal["jsonl", "csv", "parquet", "text", "images", "hub"] | None = Field(
        default=None, description="How to read it; default: by the ending of the file's name."
    )
    split: Text | None = Field(default=None, description="The split of a hub data set, e.g. train.")
    revision: Text | None = Field(default=None, description="A hub commit, tag or branch.")
    text: Text | None = Field(default=None, description="The field that holds the text; default: text.")
    template: Text | None = Field(
        default=None, description='The text made of several fields, e.g. "{question} {answer}"; {{ and }} are braces.'
    )
    messages: Text | None = Field(
        default=None,
        description="The field that holds a chat: a list of {role, content}, put through the chat template.",
    )
    features: Text | None = Field(
        default=None, description="The field that holds numbers: a row for mergeflow_mlp, or an image's pixels."
    )
    label: Text | None = Field(
        default=None,
        description="The field that holds the label: a name or number of a class, a list of them for each token, or the text "
        "to be written by a model that reads one text and writes another.",
    )
    limit: Annotated[int, Strict(), Field(ge=1)] | None = Field(
        default=None, description="At most so many rows: the first, or with `seed` some drawn at random."
    )
    seed: Count | None = Field(default=None, description="Draw the rows that `limit` allows; they keep their order.")


class OthersModel(_Section):
    """The node or model that gives the tensors that `only` leaves out."""

    model: Reference


def _others_shape(value: Any) -> str:
    return "model" if isinstance(value, Mapping | OthersModel) else "mean"


Others = Annotated[
    Annotated[Literal["mean"], Tag("mean")] | Annotated[OthersModel, Tag("model")], Discriminator(_others_shape)
]


class SelectRule(_Section):
    """One rule of `select`: where it holds, and the model or node whose tensor is taken there."""

    match: Patterns | None = Field(
        default=None, description="A glob over tensor names, or a list of them; the last rule has none."
    )
    model: Reference


def _take(value: Any) -> Any:
    """`7` as `7-7`, and a range that does not run backwards."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    found = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", text) if isinstance(text, str) else None
    if found is None:
        raise PydanticCustomError("take", "layers are written as '0-15' (both ends included), or one as 7")
    first, last = int(found[1]), int(found[2] or found[1])
    if first > last:
        raise PydanticCustomError("take", "the range runs backwards: write '{right}'", {"right": f"{last}-{first}"})
    return f"{first}-{last}"


Take = Annotated[str, Strict(), Field(pattern=r"^[0-9]{1,9}(-[0-9]{1,9})?$"), BeforeValidator(_take)]


class StackRest(_Section):
    """The node or model that gives what is outside the blocks of a stack."""

    model: Reference


class _NodeSection(_Section):
    """Keys that every computing node has."""

    only: Patterns | None = Field(
        default=None, description="The op acts on these tensors; `others` says where the rest comes from."
    )
    others: Others | None = Field(
        default=None, description="The tensors that `only` leaves out: `mean` of the inputs, or {model: NODE}."
    )
    missing: setting_of(Literal["error", "base", "omit"]) = Field(  # type: ignore[valid-type]
        default="error",
        description="An input lacks a tensor: error; base (its delta is 0); omit (it is left out, weights renormalised).",
    )
    mismatch: setting_of(Literal["error", "base", "omit"]) = Field(  # type: ignore[valid-type]
        default="error", description="An input's tensor has another shape: the same words as `missing`."
    )
    extra: setting_of(Literal["error", "drop", "keep"]) = Field(  # type: ignore[valid-type]
        default="error",
        description="An input has a tensor that the node's names lack: error, drop, or keep it as it is.",
    )
    vocab: Literal["error", "ignore"] = Field(
        default="error", description="Tokenizers that give one id to different tokens: error, or ignore."
    )
    seed: Count | None = Field(
        default=None, description="Seed of this node's random draws; default: the recipe's, with the node's name."
    )


class OutputSection(_Section):
    """What is written, and how."""

    node: Reference | None = Field(
        default=None, description="The node (or model) to write; default: the one that no other node uses."
    )
    like: Text | None = Field(
        default=None,
        description="The model whose config, side files, file names and dtypes the output takes; default: the node's base or first input.",
    )
    tokenizer: Text | None = Field(
        default=None, description="The model whose tokenizer and chat template the output takes; default: like."
    )
    dtype: setting_of(FloatName) | None = Field(  # type: ignore[valid-type]
        default=None, description="Dtype of the floating tensors; default: that of `like`, tensor by tensor."
    )
    shard_size: Size | None = Field(
        default=None, description="Largest file, e.g. 5GB; default: the files that `like` has."
    )
    config: dict[str, Any] = Field(default_factory=dict, description="Keys to set in config.json.")
    card: dict[str, Any] = Field(default_factory=dict, description="Metadata of the model card: license, tags, ...")
    tied: Literal["untie", "trust_config"] | None = Field(
        default=None,
        description="Where inputs disagree on a tied head: untie writes it, trust_config follows `like`'s config.",
    )
    non_finite: Literal["error", "keep"] = Field(
        default="error", description="NaN or Inf in an input or the result: error, or keep it."
    )


class ExpectedMeasure(_Section):
    """A measure of the result on data, and the bounds it must keep, as `mergeflow eval` measures it."""

    data: Text = Field(min_length=1, description="What it is measured on: a name from `data:`.")
    metric: Literal["accuracy", "macro_f1", "bits_per_byte", "perplexity"] = Field(description="What is measured.")
    min: Number | None = Field(default=None, description="The least that is good.")
    max: Number | None = Field(default=None, description="The most that is good.")
    output: Text | None = Field(default=None, description="Which of several outputs: its name under `outputs:`.")


class ExpectSection(_Section):
    """What `mergeflow check` holds the result against, beside the lock; it changes nothing of what is made."""

    finite: Flag = Field(default=False, description="No tensor may hold NaN or Inf.")
    drift: setting_of(NonNegative) | None = Field(  # type: ignore[valid-type]
        default=None,
        description="The most that a tensor may differ from the locked one: ||new - old|| / ||old||; a value or rules.",
    )
    eval: tuple[ExpectedMeasure, ...] = Field(default=(), description="Measures of the result, with their bounds.")


_DATA: Any = (Text, Field(min_length=1, description="What it is run on: a name from `data:`."))


@lru_cache(maxsize=256)
def input_section(op_class: type[Op]) -> type[BaseModel]:
    """The grammar of one input of an op: the model, its own base, and the parameters an input may give for itself."""
    fields: dict[str, Any] = {"model": (Reference, Field())}
    if issubclass(op_class, StageOp) and op_class.needs_data and op_class.takes == "inputs":
        fields["data"] = _DATA
    if op_class.needs_base or op_class.may_base:
        fields["base"] = (
            Reference | None,
            Field(default=None, description="What this input's delta is taken from; default: the node's base."),
        )
    for key in op_class.input_keys:
        about = f"A node with `op: {collector_of(key)}`, or an entry of `artifacts:`, with statistics of this model."
        if key in op_class.optional_keys:
            fields[key] = (Reference | None, Field(default=None, description=about))
        else:
            fields[key] = (Reference, Field(description=about))
    if op_class.input_keys:
        fields["for"] = (
            Literal["model", "names"],
            Field(
                default="model",
                description="The statistics must be of this very model; or, `names`, of any with these tensors.",
            ),
        )
    if op_class.takes == "layers":
        fields["take"] = (Take, Field(description="The first and last layer to take, e.g. '0-15': both are included."))
    if op_class.takes == "sources":
        fields |= {name: (info.annotation, info) for name, info in Source.model_fields.items()}
    for name, mark in op_class.settings().items():
        if mark.per_input:
            info = op_class.model_fields[name]
            fields[name] = (setting_of(mark.kind, open_ended=True), Field(default=None, description=info.description))
    return create_model(
        f"{op_class.__name__}Input", __base__=_Section, __doc__=f"One input of {op_class.name}.", **fields
    )


@lru_cache(maxsize=256)
def node_section(op_class: type[Op]) -> type[BaseModel]:
    """The grammar of a node with this op, made from the op's class."""
    word: Any = Literal[op_class.name]
    fields: dict[str, Any] = {"op": (word, Field(description=_summary(op_class)))}
    if op_class.takes == "model":
        fields["model"] = (Reference, Field())
    elif op_class.takes == "emr":
        fields["emr"] = (Reference, Field(description="A node with `op: emr`, or an artifact that one made."))
    elif op_class.takes == "inputs":
        item: Any = input_section(op_class)
        fields["inputs"] = (
            tuple[item, ...],
            Field(min_length=1, description="What the op works on, in order."),
        )
    elif op_class.takes == "layers":
        entry: Any = input_section(op_class)
        fields["layers"] = (
            tuple[entry, ...],
            Field(min_length=1, description="The layers of the output, in order; a model may come twice."),
        )
        fields["rest"] = (
            StackRest | None,
            Field(
                default=None,
                description="What gives the tensors outside the blocks; default: the first entry's model gives what stands "
                "before them, the last's what stands after.",
            ),
        )
    elif op_class.takes == "rules":
        fields["rules"] = (
            tuple[SelectRule, ...],
            Field(min_length=1, description="Tried in order; the last has no `match`."),
        )
    if op_class.needs_base:
        fields["base"] = (Reference, Field(description="The model that the others were trained from."))
    elif op_class.may_base:
        fields["base"] = (
            Reference | None,
            Field(
                default=None, description="The model that the others were trained from: then deltas are merged onto it."
            ),
        )
    settings = op_class.settings()
    for name, info in op_class.model_fields.items():
        if name in settings:
            optional = settings[name].per_input or not info.is_required()
            default = (None if info.is_required() else info.default) if optional else ...
            fields[name] = (setting_of(settings[name].kind), Field(default=default, description=info.description))
        else:
            fields[name] = (info.annotation, info)
    if issubclass(op_class, StageOp):
        fields |= _stage_fields(op_class)
        return create_model(f"{op_class.__name__}Node", __base__=_Section, __doc__=_summary(op_class), **fields)
    base = _Section if op_class.takes in ("rules", "layers", "emr") else _NodeSection
    return create_model(f"{op_class.__name__}Node", __base__=base, __doc__=_summary(op_class), **fields)


def _stage_fields(op_class: type[StageOp]) -> dict[str, Any]:
    """What a stage's node says beside its op's own parameters and its models."""
    fields: dict[str, Any] = {}
    if op_class.takes == "sources":
        fields["target"] = (
            Reference,
            Field(description="The model that is trained: start, architecture and tokenizer."),
        )
        item: Any = input_section(op_class)
        fields["sources"] = (
            tuple[item, ...],
            Field(min_length=op_class.fewest, description="The models whose predictions are distilled, in order."),
        )
        fields["data"] = _DATA
    about = "The tensors that are solved; default: every linear weight."
    if op_class.takes == "model":
        fields["model"] = (Reference, Field(description="The model that is run."))
        if op_class.needs_data:
            fields["data"] = _DATA
        about = "The tensors whose statistics are collected."
    if op_class.takes != "sources":
        fields["only"] = (Patterns | None, Field(default=None, description=about))
    if op_class.seeded:
        fields["seed"] = (Count | None, Field(default=None, description="Seed of the stage; default: the recipe's."))
    return fields


def _summary(op_class: type[Op]) -> str:
    return (op_class.__doc__ or "").strip().split("\n")[0]

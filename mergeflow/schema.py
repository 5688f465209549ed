"""The recipe's grammar for editors (JSON Schema) and its ops for readers (`mergeflow ops`), both read off the classes.

Nothing is written twice: sections are the pydantic models that check a recipe, nodes are made from the op classes, and
what stands here by hand is only what those models cannot know: names and nodes in place where a model may stand, `${var}`,
the top level. The dialect is draft 7, which editors read, where pydantic writes 2020-12. No torch is needed.

The schema may accept what `load_recipe` refuses (names that do not exist, two open rules, a value that a variable makes
wrong). It refuses nothing that `load_recipe` accepts but paths and files that are numbers, and keys without a value
(`only:` and nothing after it), which are allowed on the top level alone: in a section they are a line that somebody has
not finished.
"""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema, models_json_schema
from pydantic_core import core_schema

from mergeflow.errors import RecipeError
from mergeflow.ops import Op, all_ops, op_named
from mergeflow.ops.base import Space
from mergeflow.ops.fuse import SILENT, Fuse, Source
from mergeflow.ops.statistics import StageOp, StatisticsOp, collector_of
from mergeflow.recipe import (
    NAME,
    RECIPE_NAME,
    ArtifactSource,
    DataSource,
    ExpectSection,
    ModelSource,
    OthersModel,
    OutputSection,
    SelectRule,
    StackRest,
    input_section,
    node_section,
)
from mergeflow.settings import Gradient, Rule, _last_rule_is_open

DIALECT = "http://json-schema.org/draft-07/schema#"
VARIABLE = r"^\$\{[^{}]+\}$"
TAKE = r"^[0-9]{1,9}(-[0-9]{1,9})?$"
SIZE = r"^\s*\d+(\.\d+)?\s*([kKMGT]i?)?B\s*$"

Schema = dict[str, Any]

_GRAMMAR = ("op", "base", "model", "emr", "target", "data", "inputs", "sources", "rules", "layers", "rest")
_WORDS = ("revision", "subfolder", "split", "text", "template", "messages", "features", "label")
_LISTED = ("inputs", "layers", "sources")
"""The lists whose items are sections of the op's own."""
_SAID = {"fisher_diag": {"estimator": "sampled"}, "fuse": {"task": "classification"}}
"""What an op says in an example in place of a default that is not for every model."""
_REFS = "#/definitions/{model}"
_SHARED_FROM = 3
_WORTH_SHARING = 200
"""A key that this many sections have with the same meaning is defined once, unless it is short (in characters)."""


def recipe_schema(ops: Iterable[type[Op]] | None = None) -> Schema:
    """The JSON Schema (draft 7) of a recipe file; default: with every op that is installed.

    Raises RecipeError where an op of another package cannot be loaded.
    """
    classes = tuple(all_ops().values() if ops is None else ops)
    definitions = _definitions(classes)
    nodes = {"type": ["object", "null"], "propertyNames": {"pattern": NAME}, "additionalProperties": _ref("node")}
    output = {"anyOf": [_ref("output"), {"type": "null"}]}
    top: dict[str, Schema] = {
        "recipe": {"const": 1, "description": "The version of this format."},
        "name": {
            "type": ["string", "number", "boolean", "null"],
            "pattern": rf"{RECIPE_NAME}|\$\{{",
            "description": "The recipe's name, and the default name of the output folder; default: the file's name.",
        },
        "description": {"type": ["string", "null"], "description": "What the result is, for the model card."},
        "seed": {
            **_or_variable({"type": "integer", "minimum": 0, "maximum": 2**63 - 1}),
            "default": 0,
            "description": "Seed of every random draw.",
        },
        "vars": {
            "type": ["object", "null"],
            "propertyNames": {"pattern": NAME},
            "additionalProperties": {"type": ["string", "number", "boolean", "null"]},
            "description": "Values used as ${name}, which --set name=value replaces on the command line.",
        },
        "models": {
            "type": "object",
            "minProperties": 1,
            "propertyNames": {"pattern": NAME},
            "additionalProperties": {
                "anyOf": [
                    {
                        "type": "string",
                        "minLength": 1,
                        "description": "A hub repository (owner/name or owner/name@revision), or a local path (./x).",
                    },
                    _ref("model"),
                ]
            },
            "description": "The checkpoints, by the names that the recipe calls them.",
        },
        "artifacts": {
            "type": ["object", "null"],
            "propertyNames": {"pattern": NAME},
            "additionalProperties": {"anyOf": [{"type": "string", "minLength": 1}, _ref("artifact")]},
            "description": "What runs made that is no model, by the names that the recipe calls it.",
        },
        "data": {
            "type": ["object", "null"],
            "propertyNames": {"pattern": NAME},
            "additionalProperties": {
                "anyOf": [
                    {
                        "type": "string",
                        "minLength": 1,
                        "description": "A file or folder (./x), or a hub data set (owner/name).",
                    },
                    _ref("data"),
                ]
            },
            "description": "What stages run models on, by the names that the recipe calls it.",
        },
        "nodes": {**nodes, "description": "The graph: each node is an op with its inputs, which are models or nodes."},
        "output": {**output, "description": "What is written; default: the one node that no other node uses."},
        "outputs": {
            "type": ["object", "null"],
            "minProperties": 1,
            "propertyNames": {"pattern": NAME},
            "additionalProperties": output,
            "description": "Several outputs of one run, each in a folder of this name; in place of `output`.",
        },
        "expect": {
            "anyOf": [_ref("expect"), {"type": "null"}],
            "description": "What `mergeflow check` holds the result against, beside the lock.",
        },
    }
    return {
        "$schema": DIALECT,
        "$comment": "Generated by `mergeflow schema` from the op classes; not to be edited.",
        "title": "mergeflow recipe",
        "description": "What a merged checkpoint is made of, and how.",
        "type": "object",
        "required": ["recipe", "models"],
        "properties": top,
        "patternProperties": {"^x-": {"description": "Ignored: a place for anchors."}},
        "additionalProperties": False,
        "not": {"required": ["output", "outputs"]},
        "definitions": definitions,
    }


def schema_text(ops: Iterable[type[Op]] | None = None) -> str:
    """The text of schemas/recipe.schema.json."""
    return json.dumps(recipe_schema(ops), indent=2, ensure_ascii=False) + "\n"


def _ref(name: str) -> Schema:
    return {"$ref": _REFS.format(model=name)}


class _Draft7(GenerateJsonSchema):
    """Pydantic's models in draft 7, with `${var}` where a scalar stands, and without titles made of field names."""

    schema_dialect = DIALECT

    def sort(self, value: Schema, parent_key: str | None = None) -> Schema:
        return value

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def model_schema(self, schema: core_schema.ModelSchema) -> Schema:
        found = super().model_schema(schema)
        found.pop("title", None)
        return found

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> Schema:
        found = super().default_schema(schema)
        if found.get("default", 0) is None:
            del found["default"]
        return found

    def nullable_schema(self, schema: core_schema.NullableSchema) -> Schema:
        return self.generate_inner(schema["schema"])

    def bool_schema(self, schema: core_schema.BoolSchema) -> Schema:
        return _or_variable(super().bool_schema(schema))

    def int_schema(self, schema: core_schema.IntSchema) -> Schema:
        return _or_variable(super().int_schema(schema))

    def float_schema(self, schema: core_schema.FloatSchema) -> Schema:
        return _or_variable(super().float_schema(schema))

    def str_schema(self, schema: core_schema.StringSchema) -> Schema:
        return _or_variable(super().str_schema(schema))

    def literal_schema(self, schema: core_schema.LiteralSchema) -> Schema:
        return _or_variable(super().literal_schema(schema))

    def tuple_schema(self, schema: core_schema.TupleSchema) -> Schema:
        found = super().tuple_schema(schema)
        if "prefixItems" in found:
            found["additionalItems"] = found.pop("items", True)
            found["items"] = found.pop("prefixItems")
        return found

    def function_after_schema(self, schema: core_schema.AfterValidatorFunctionSchema) -> Schema:
        found = super().function_after_schema(schema)
        if schema["function"]["function"] is _last_rule_is_open:
            # That it is the last cannot be said in draft 7; that there is one can.
            found["contains"] = {"properties": {"match": False}}
        return found


def _or_variable(schema: Schema) -> Schema:
    """A scalar's schema that also takes a variable: keywords for numbers do not look at strings, nor `pattern` at numbers."""
    kind = schema.get("type")
    if "const" in schema:
        return schema
    if "enum" in schema or (kind == "string" and not {"pattern", "maxLength", "format"}.isdisjoint(schema)):
        return {"anyOf": [schema, {"type": "string", "pattern": VARIABLE}]}
    return schema if kind == "string" else {**schema, "type": [kind, "string"], "pattern": VARIABLE}


def _definitions(ops: Sequence[type[Op]]) -> dict[str, Schema]:
    """All sections by name, with references to each other."""
    names: dict[type[BaseModel], str] = {
        ModelSource: "model",
        ArtifactSource: "artifact",
        DataSource: "data",
        OutputSection: "output",
        ExpectSection: "expect",
        OthersModel: "others.model",
        SelectRule: "rule.select",
        StackRest: "rest.stack",
    }
    entries: dict[type[BaseModel], str] = {input_section(op): f"input.{op.name}" for op in ops if op.takes in _LISTED}
    nodes: dict[type[BaseModel], str] = {node_section(op): f"node.{op.name}" for op in ops}
    # What is inside goes first: a section that is built takes what is there, and else builds it again for each key.
    for model in (*Gradient.__subclasses__(), *Rule.__subclasses__(), *names, *entries):
        model.model_rebuild()
    names |= nodes | entries
    refs, found = models_json_schema(
        [(model, "validation") for model in names], ref_template=_REFS, schema_generator=_Draft7
    )
    raw: dict[str, Schema] = found["$defs"]
    called = {refs[model, "validation"]["$ref"].rpartition("/")[2]: name for model, name in names.items()}
    for key, schema in raw.items():
        called.setdefault(key, _generic_name(key, schema, set(called.values())))
    sections: dict[str, Schema] = {called[key]: _adapted(raw[key], called) for key in raw}
    for op in ops:
        _open_node(op, sections[f"node.{op.name}"])
    inputs = [f"input.{op.name}" for op in ops if op.takes in _LISTED]
    for name in ("others.model", "rule.select", "rest.stack", *inputs):
        _open_references(sections[name])
    for op in ops:
        if op.takes in _LISTED:
            _open_references(sections[f"input.{op.name}"], op.input_keys)
    for name in ("model", "artifact", "data"):
        _open_words(sections[name])
    sections["model"]["oneOf"] = [
        {"required": ["path"]},
        {"required": ["adapter"], "not": {"anyOf": [{"required": ["file"]}, {"required": ["space"]}]}},
    ]
    for name in (f"input.{op.name}" for op in ops if op.takes == "layers"):
        own = sections[name]["properties"]["take"]
        words = {"type": ["integer", "string"], "minimum": 0, "pattern": f"{TAKE}|{VARIABLE}"}
        sections[name]["properties"]["take"] = {**words, "description": own["description"]}
    size = sections["output"]["properties"]["shard_size"]
    size.update({"type": ["integer", "string"], "pattern": f"{SIZE}|{VARIABLE}"})
    shared = _shared(sections)
    reference = {
        "anyOf": [{"type": "string", "minLength": 1}, _ref("node")],
        "description": "A name from `models:` or `nodes:`, or a node in place.",
    }
    node = {
        "description": "An op with its inputs.",
        "type": "object",
        "required": ["op"],
        "oneOf": [_ref(f"node.{op.name}") for op in ops],
    }
    ordered = {name: sections[name] for name in ("model", "artifact", "data", "output", "expect")} | {
        "node": node,
        "reference": reference,
    }
    for op in ops:
        ordered |= {name: sections[name] for name in (f"node.{op.name}", f"input.{op.name}") if name in sections}
    return ordered | dict(sorted((shared | {k: v for k, v in sections.items() if k not in ordered}).items()))


def _generic_name(key: str, schema: Schema, taken: set[str]) -> str:
    """A short name for the definition of a gradient or rule, made of what its values are; other names stay."""
    kind = key.split("_")[0]
    inside = {"Gradient": ("gradient", "items"), "Rule": ("value",)}.get(kind)
    if inside is None:
        return key
    values = schema["properties"]
    for step in inside:
        values = values[step]
    words = _words(values.get("oneOf", [values])[0])
    parts = re.findall(r"\w+", words.replace("fraction in (0", "fraction above 0"))
    name = f"{kind.lower()}.{'-'.join(parts if len(parts) < 6 else [parts[0], 'to', parts[-1]])}"
    while name in taken:
        name += "-other"
    return name


def _adapted(value: Any, called: Mapping[str, str]) -> Any:
    """A schema of pydantic with our names, and in the words of draft 7."""
    if isinstance(value, list):
        return [_adapted(item, called) for item in value]
    if not isinstance(value, dict):
        return value
    found = {
        key: {name: _adapted(inner, called) for name, inner in item.items()}
        if key == "properties"
        else _adapted(item, called)
        for key, item in value.items()
        if not (key == "default" and "$ref" in value)
    }
    if "$ref" in found:
        ref = _ref(called[str(found.pop("$ref")).rpartition("/")[2]])
        return {"allOf": [ref], **found} if found else ref  # draft 7 ignores what stands beside a $ref
    if found.get("type") == "array" and "minLength" in found:
        found["minItems"] = found.pop("minLength")
    return found


def _open_references(section: Schema, keys: Sequence[str] = ("model", "emr", "base", "target")) -> None:
    """Let a node stand in place where a section names a model, or what goes with it."""
    for key in keys:
        own = section["properties"].get(key)
        if own is not None:
            section["properties"][key] = {"allOf": [_ref("reference")], "description": own["description"]}


def _open_words(section: Schema) -> None:
    """Let scalars stand that are taken as they are written: `revision: 0123`."""
    for key in _WORDS:
        if key in section["properties"]:
            section["properties"][key]["type"] = ["string", "number", "boolean"]


def _open_node(op: type[Op], section: Schema) -> None:
    """What the pydantic models of a node cannot know: they see a node after names were put for nodes in place."""
    properties: dict[str, Schema] = section["properties"]
    lines = [_summary(op), op.formula, *([op.paper] if op.paper else [])]
    section["description"] = properties["op"]["description"] = "\n\n".join(lines)
    _open_references(section)
    name = {"type": "string", "minLength": 1, "description": "The name of a model or node."}
    if op.takes == "layers":
        given = properties["rest"]
        properties["rest"] = {"anyOf": [_ref("rest.stack"), _ref("node")], "description": given["description"]}
    elif op.takes in ("inputs", "rules", "sources"):
        key = op.takes
        alone = properties[key]["items"]
        needs_more = set(op.input_keys) - set(op.optional_keys) or (issubclass(op, StageOp) and key == "inputs")
        items = alone if needs_more else {"anyOf": [name, alone, _ref("node")]}
        bounds = {"minItems": op.fewest, **({"maxItems": op.most} if op.most is not None else {})}
        rest = {"contains": {"properties": {"match": False}}} if key == "rules" else {}
        properties[key] = {
            "type": "array",
            "items": items,
            **bounds,
            **rest,
            "description": properties[key]["description"],
        }
    if "others" in properties:
        others = properties["others"]
        others["oneOf"] = [*others["oneOf"], _ref("node")]
        section["dependencies"] = {"only": ["others"], **({} if op.matrices_only else {"others": ["only"]})}
    first = [key for key in _GRAMMAR if key in properties]
    own = [key for key in op.model_fields if key in properties]
    section["properties"] = {key: properties[key] for key in dict.fromkeys([*first, *own, *properties])}


def _shared(sections: Mapping[str, Schema]) -> dict[str, Schema]:
    """Keys that mean the same in several sections, taken out of them to be defined once."""
    uses: Counter[tuple[str, str]] = Counter()
    for section in sections.values():
        uses.update((key, json.dumps(schema)) for key, schema in section.get("properties", {}).items())
    shared: dict[str, str] = {}
    for (key, text), count in uses.most_common():
        if count >= _SHARED_FROM and len(text) > _WORTH_SHARING:
            shared.setdefault(key, text)
    for section in sections.values():
        for key, schema in section.get("properties", {}).items():
            if shared.get(key) == json.dumps(schema):
                section["properties"][key] = _ref(f"key.{key}")
    return {f"key.{key}": json.loads(text) for key, text in shared.items()}


# The table of ops


@dataclass(frozen=True, slots=True)
class _Parameter:
    """A parameter as a reader sees it; `default` is JSON, None where it must be given."""

    name: str
    words: str
    setting: bool
    per_input: bool
    required: bool
    default: Any
    description: str
    schema: Schema
    parts: tuple[tuple[str, str], ...] = ()


def _short(name: str, info: FieldInfo) -> str:
    """A parameter with its default, told without a schema, which would take a second for all ops."""
    if info.is_required():
        return name
    return f"{name}={_scalar(info.default)}"


def ops_table(ops: Sequence[type[Op]] | None = None, *, markdown: bool = False) -> str:
    """Each op (default: all there are): what it does, its formula and paper, its parameters with their defaults."""
    rows = []
    for op in tuple(ops or all_ops().values()):
        own = {name: info for name, info in op.model_fields.items() if name not in _GRAMMAR}
        rows.append((op, [_short(name, info) for name, info in own.items()]))
    if not markdown:
        width = max(len(op.name) for op, _ in rows)
        lines = []
        for op, given in rows:
            facts = [op.formula, " ".join(given), op.paper or ""]
            lines += [
                f"{op.name:<{width}}  {_summary(op)}",
                f"{'':<{width}}  {' | '.join(fact for fact in facts if fact)}",
            ]
        return "\n".join(lines) + "\n"
    lines = ["| op | what it does | formula | parameters | paper |", "| --- | --- | --- | --- | --- |"]
    for op, given in rows:
        names = ", ".join(f"`{one}`" for one in given)
        cells = (f"`{op.name}`", _summary(op), f"`{op.formula}`", names, _link(op.paper))
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def op_page(name: str) -> str:
    """One op in full, with a recipe to copy. Raises RecipeError with the nearest name where there is none."""
    op = op_named(name)
    parameters = _parameters(op, _definitions((op,)))
    facts = [
        ("formula", op.formula),
        *([("paper", op.paper)] if op.paper else []),
        ("takes", _takes(op)),
        ("gives", _gives(op)),
        (
            "bytes",
            "portable: the same on any x86-64 processor with AVX2 or better"
            if op.portable
            else "same_cpu: the same on the same model of processor",
        ),
    ]
    parts = [op.name, inspect.cleandoc(op.__doc__ or ""), "\n".join(f"{word:<8} {text}" for word, text in facts)]
    if parameters:
        parts.append("Parameters\n" + "\n".join(_parameter_lines(parameters)))
    every = [key for key in node_section(op).model_fields if key not in (*_GRAMMAR, *op.model_fields)]
    if every:
        parts.append(f"Keys of every node\n  {', '.join(every)}")
    parts.append("Example\n" + "".join(f"  {line}".rstrip() + "\n" for line in example(op, parameters).splitlines()))
    return "\n\n".join(parts)


def example(op: type[Op], parameters: Sequence[_Parameter] = ()) -> str:
    """A small complete recipe with the op and each of its parameters, which may be given if they are known."""
    count = min(max(op.fewest, 2), op.most or 2)
    names = ["first", "second", "third", *(f"model_{i}" for i in range(4, count + 1))][:count]
    if op.takes == "sources":
        names = ["start", "expert"]
    pair = op.takes in ("rules", "layers", "emr")
    models = [*(["base"] if op.needs_base else []), *(["first", "second"] if pair else names)]
    deltas = getattr(op, "deltas_only", False)
    items = [f"{{op: task_vector, base: base, model: {name}}}" if deltas else name for name in names]
    data: list[str] = []
    nodes = ["  kept: {op: emr, base: base, inputs: [first, second]}"] if op.takes == "emr" else []
    named = _named_keys(op)
    if named:
        run = ["base"] if op.keys_of_base else names
        data = [f"  {name}_data: ./{name}.jsonl" for name in run]
        nodes += [
            f"  {name}_{key}: {{op: {kind}, model: {name}, data: {name}_data"
            + "".join(f", {word}: {value}" for word, value in _SAID.get(kind, {}).items())
            + "}"
            for key, kind in ((key, collector_of(key)) for key in named)
            for name in run
        ]
        items = [
            f"{{model: {name}, {', '.join(f'{key}: {of}_{key}' for key in named)}}}"
            for name, of in zip(names, run * len(names) if op.keys_of_base else run, strict=False)
        ]
    collects = issubclass(op, StatisticsOp)
    if collects or op.takes == "sources":
        data = ["  texts: ./texts.jsonl"]
    elif issubclass(op, StageOp):
        data = [f"  {name}_data: ./{name}.jsonl" for name in names]
        items = [f"{{model: {name}, data: {name}_data}}" for name in names]
    lines = [
        "recipe: 1",
        f"name: {op.name.replace('_', '-')}-example",
        "models:",
        *(f"  {name}: ./{name}" for name in models),
        *(["data:", *data] if data else []),
        "nodes:",
        *nodes,
        "  collected:" if collects else "  merged:",
        f"    op: {op.name}",
    ]
    if op.needs_base:
        lines.append("    base: base")
    if op.takes == "model":
        lines.append(f"    model: {items[0]}")
        if data:
            lines.append("    data: texts")
    elif op.takes == "emr":
        lines.append("    emr: kept")
    elif op.takes == "sources":
        target, *sources = items
        lines += [f"    target: {target}", "    sources:", *(f"      - {item}" for item in sources), "    data: texts"]
    elif op.takes == "rules":
        lines += ["    rules:", '      - {match: "*.self_attn.*", model: first}', "      - {model: second}"]
    elif op.takes == "layers":
        lines += [
            "    layers:",
            '      - {model: first, take: "0-1"}',
            '      - {model: second, take: "1-2"}',
            "    rest: {model: first}",
        ]
    else:
        lines += ["    inputs:", *(f"      - {item}" for item in items)]
    said: Mapping[str, Any] = _SAID.get(op.name, {})
    silent = SILENT[said["task"]] if issubclass(op, Fuse) else {}
    values = [(one, said.get(one.name, _sample(one))) for one in parameters or _parameters(op)]
    given = [
        line
        for one, value in values
        if value is not None and one.name not in silent.get("", ())
        for line in _lines(one.name, value, one.description, silent.get(one.name, ()))
    ]
    width = max((len(line) for line, _ in given), default=0)
    return "\n".join([*lines, *(f"{line:<{width}}  # {note}" for line, note in given)]) + "\n"


def _lines(name: str, value: Any, about: str, silent: Sequence[str]) -> list[tuple[str, str]]:
    """A parameter as a recipe writes it, each line with what it is: settings that stand together below their name."""
    if not isinstance(value, BaseModel):
        return [(f"    {name}: {_scalar(value)}", about)]
    fields = {key: info for key, info in type(value).model_fields.items() if key not in silent}
    return [
        (f"    {name}:", about),
        *(
            (f"      {key}: {_scalar(getattr(value, key))}", info.description or "")
            for key, info in fields.items()
            if getattr(value, key) is not None
        ),
    ]


def _parameters(op: type[Op], sections: Mapping[str, Schema] | None = None) -> list[_Parameter]:
    """The parameters of an op, in the order of its class."""
    definitions = _definitions((op,)) if sections is None else sections
    section = definitions[f"node.{op.name}"]
    settings = op.settings()
    found = []
    for name, info in op.model_fields.items():
        schema: Schema = section["properties"][name]
        if "$ref" in schema:
            schema = definitions[schema["$ref"].rpartition("/")[2]]
        if "allOf" in schema:
            schema = {**definitions[schema["allOf"][0]["$ref"].rpartition("/")[2]], **schema}
        value = schema["oneOf"][0] if name in settings else schema
        found.append(
            _Parameter(
                name=name,
                words=_words(value),
                setting=name in settings,
                per_input=name in settings and settings[name].per_input,
                required=info.is_required(),
                default=info.default if isinstance(info.default, BaseModel) else schema.get("default"),
                description=info.description or "",
                schema=value,
                parts=_parts(info.annotation),
            )
        )
    return found


def _parts(annotation: Any) -> tuple[tuple[str, str], ...]:
    """The settings that stand together under one parameter: each with its default, and what it is."""
    inner = [annotation, *get_args(annotation)]
    section = next((one for one in inner if isinstance(one, type) and issubclass(one, BaseModel)), None)
    fields = {} if section is None else section.model_fields
    return tuple((_short(name, info), info.description or "") for name, info in fields.items())


def _parameter_lines(parameters: Sequence[_Parameter]) -> list[str]:
    width = max(len(one.name) for one in parameters)
    lines = []
    for one in parameters:
        default = "what stands below" if isinstance(one.default, BaseModel) else _scalar(one.default)
        notes = [one.words, "required" if one.required else f"default {default}"]
        if one.per_input:
            notes.append("of the node or of each input")
        if not one.setting:
            notes.append("one value for the whole model")
        lines += [f"  {one.name:<{width}}  {'; '.join(notes)}", f"  {'':<{width}}  {one.description}"]
        lines += [f"  {'':<{width}}    {given}: {about}" for given, about in one.parts]
    if any(one.setting for one in parameters):
        over = "a list of rules {match: ..., value: ...}"
        if any(one.setting and _numeric(one.schema) for one in parameters):
            over = "{gradient: [...]} (numbers only), or " + over
        lines += ["", f"  Instead of one value: {over}."]
    return lines


def _named_keys(op: type[Op]) -> list[str]:
    """The keys that an example gives each input."""
    return [key for key in op.input_keys if key not in op.optional_keys]


def _numeric(schema: Schema) -> bool:
    return "number" in schema.get("type", ())


def _summary(op: type[Op]) -> str:
    return (op.__doc__ or "").strip().split("\n")[0]


def _takes(op: type[Op]) -> str:
    """What a recipe gives the op to work on."""
    if op.takes == "model":
        words = "model: one model or node"
        if issubclass(op, StageOp) and op.needs_data:
            words += "; data: a name from `data:`"
    elif op.takes == "emr":
        words = "emr: a node with `op: emr`, or an artifact"
    elif op.takes == "sources":
        words = (
            "target: a model or node; sources: 1 or more, names or {model: ..., "
            + ", ".join(Source.model_fields)
            + "}; "
            "data: a name from `data:`"
        )
    elif op.takes == "rules":
        words = "rules: a list of {match: ..., model: ...}, the last without match"
    elif op.takes == "layers":
        words = (
            'layers: a list of {model: ..., take: "0-15"}, models or nodes; '
            "rest: {model: ...}, for what is outside the blocks (may be left out)"
        )
    else:
        count = str(op.fewest) if op.most == op.fewest else f"{op.fewest} or more"
        if op.most is not None and op.most != op.fewest:
            count = f"{op.fewest} to {op.most}"
        words = f"inputs: {count}, models or nodes"
        if issubclass(op, StageOp):
            words = f"inputs: {count}, of {{model: ..., data: ...}}: models or nodes, each with a name from `data:`"
        if op.input_keys:
            own = ", ".join(f"{key}: ..." for key in op.input_keys)
            words = f"inputs: {count}, of {{model: ..., {own}}}"
            for key in op.input_keys:
                words += f"; {key}: a node with `op: {collector_of(key)}`, or an artifact"
    if op.may_base:
        return f"base: a model or node, if deltas are to be merged; {words}"
    return f"base: a model or node; {words}" if op.needs_base else words


def _gives(op: type[Op]) -> str:
    """The space of the result for inputs of each space."""
    probe = op.model_construct()
    words = []
    spaces: tuple[Space, ...] = ("artifact",) if op.takes == "emr" else ("weight", "delta")
    for given in spaces:
        try:
            space = probe.space("weight" if op.needs_base else None, [given] * max(op.fewest, 1))
        except RecipeError:
            continue
        words.append(f"{space} from {given}s")
    return ", ".join(words)


def _words(schema: Schema) -> str:
    """The type of a value in words: `fraction in (0, 1]`, `true or false`, `none, l1 or l2`."""
    schema = schema["anyOf"][0] if "anyOf" in schema else schema
    choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if choices is not None:
        *most, last = map(str, choices)
        return f"{', '.join(most)} or {last}" if most else last
    kind = _kind(schema)
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if kind in ("number", "integer"):
        least, greatest = (low if above is None else above), (high if below is None else below)
        noun = "whole number" if kind == "integer" else "number"
        if greatest is None or greatest >= 2**53:
            if least is None:
                return noun
            return f"{noun} above {least}" if above is not None else f"{noun} from {least}"
        if least is None:
            return f"{noun} below {greatest}" if below is not None else f"{noun} up to {greatest}"
        noun = "fraction" if kind == "number" and least >= 0 and greatest <= 1 else noun
        return f"{noun} in {'[' if above is None else '('}{least}, {greatest}{']' if below is None else ')'}"
    return {"boolean": "true or false", "string": "text", "array": "list", "object": "mapping"}.get(kind, kind)


def _kind(schema: Schema) -> str:
    """The JSON type of a value, the first where a variable may stand too."""
    kinds = schema.get("type", "object" if "$ref" in schema else "anything")
    return str(kinds[0] if isinstance(kinds, list) else kinds)


def _sample(parameter: _Parameter) -> Any:
    """A value that fits: the default, or one in the middle of what is allowed."""
    if not parameter.required:
        return parameter.default
    schema = parameter.schema["anyOf"][0] if "anyOf" in parameter.schema else parameter.schema
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return "bfloat16" if "bfloat16" in schema["enum"] else schema["enum"][0]
    kind = _kind(schema)
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    if kind == "number":
        middle = (low + high) / 2 if low is not None and high is not None else None
        return (0.5 if low is None else low + 0.5) if middle is None else middle
    if parameter.name == "task":
        return "first"
    return {"integer": (low or 0) + 1, "boolean": True, "array": [], "object": {}}.get(kind, "text")


def _scalar(value: Any) -> str:
    """A value as YAML writes it."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_none=True)
        return f"{{{', '.join(f'{key}: {_scalar(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", value) and value.lower() not in _YAML_WORDS:
        return value
    return json.dumps(value)


_YAML_WORDS = ("true", "false", "null")


def _link(paper: str | None) -> str:
    """A paper as a link, where its name says where it is."""
    if paper is None:
        return ""
    kind, _, name = paper.partition(":")
    address = {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}.get(kind)
    return f"[{paper}]({address}{name})" if address else paper

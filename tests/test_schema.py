"""The JSON Schema says what the recipe's grammar says, the file in schemas/ is what it says, and pages can be copied."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator

from mergeflow.document import dump_yaml, read_document
from mergeflow.errors import MergeflowError, RecipeError
from mergeflow.ops import OPS, Op
from mergeflow.recipe import Recipe, load_recipe
from mergeflow.schema import example, op_page, ops_table, recipe_schema, schema_text
from mergeflow.settings import Count, Number, Setting, setting

ROOT = Path(__file__).parent.parent
SCHEMA = recipe_schema(OPS)
VALIDATOR = Draft7Validator(SCHEMA)

MODELS: dict[str, Any] = {"base": "./base", "a": "org/a@main", "b": {"path": "./b", "revision": "main"}}
TIES: dict[str, Any] = {"op": "ties", "base": "base", "inputs": ["a", {"model": "b", "weight": 0.5, "density": 0.2}]}
VECTOR: dict[str, Any] = {"op": "task_vector", "base": "base", "model": "a"}
GRAM: dict[str, Any] = {"op": "gram", "model": "a", "data": "texts"}
FISHER: dict[str, Any] = {
    "op": "fisher",
    "inputs": [{"model": "a", "fisher": {"op": "fisher_diag", "model": "a", "data": "texts"}}],
}
DATA: dict[str, Any] = {"texts": "./texts.jsonl"}
HALF: dict[str, Any] = {"gradient": [0.2, 0.8], "outside": 0.5}


def whole(node: Any = None, **top: Any) -> dict[str, Any]:
    """A recipe with one node, and other keys on its top level (None takes one out)."""
    nodes = {"nodes": {"merged": TIES if node is None else node}}
    data = {"recipe": 1, "name": "test", "models": MODELS, **nodes, **top}
    return copy.deepcopy({key: value for key, value in data.items() if value is not None})


def linear(**keys: Any) -> dict[str, Any]:
    return whole({"op": "linear", "inputs": ["a", "b"], **keys})


RIGHT: dict[str, dict[str, Any]] = {
    "linear": linear(),
    "slerp": whole({"op": "slerp", "inputs": ["a", "b"], "t": HALF}),
    "task_arithmetic": whole({"op": "task_arithmetic", "base": "base", "inputs": ["a"], "scale": 2, "normalize": True}),
    "ties": whole(),
    "task_vector": whole(VECTOR),
    "add": whole({"op": "add", "base": "base", "inputs": [VECTOR, {"model": VECTOR, "weight": -1}]}),
    "scale": whole({"op": "scale", "model": VECTOR, "by": 0.5}),
    "cast": whole({"op": "cast", "model": "a", "to": [{"match": "*norm*", "value": "float32"}, {"value": "bfloat16"}]}),
    "passthrough": whole({"op": "passthrough", "model": "a"}),
    "select": whole({"op": "select", "rules": [{"match": ["*.mlp.*", "@vocab"], "model": "a"}, {"model": VECTOR}]}),
    "select with a bare name at its end": whole({"op": "select", "rules": [{"match": "@blocks", "model": "a"}, "b"]}),
    "stack": whole(
        {
            "op": "stack",
            "layers": [{"model": "a", "take": "0-15"}, {"model": VECTOR, "take": 7, "scale": HALF}],
            "rest": {"model": "a"},
            "blocks": "encoder.block",
            "scale": 0.5,
        }
    ),
    "a stack with the rest in place": whole(
        {
            "op": "stack",
            "layers": [{"model": "a", "take": "${n}", "scale": [{"match": "*", "value": 2}]}],
            "rest": VECTOR,
        },
        vars={"n": 3},
    ),
    "rules with gradients": linear(
        weight=[{"match": "*.mlp.*", "value": {"gradient": [0, 1], "over": "0-3"}}, {"value": 1}]
    ),
    "an input's rules without a last one": linear(
        inputs=["a", {"model": "b", "weight": [{"match": "*.mlp.*", "value": 2}]}]
    ),
    "only and others mean": linear(only="*.mlp.*", others="mean"),
    "others as a node in place": linear(only=["*.mlp.*"], others={"op": "passthrough", "model": "a"}),
    "others as a model": linear(only=["*.mlp.*"], others={"model": {"op": "linear", "inputs": ["a", "b"]}}),
    "a base in place": whole({**TIES, "base": {"op": "linear", "inputs": ["a", "b"]}}),
    "policies": whole(
        {**TIES, "missing": "omit", "mismatch": [{"match": "*", "value": "base"}, {"value": "error"}], "extra": "drop"}
    ),
    "variables": whole(
        {
            **TIES,
            "density": "${d}",
            "normalize": "${n}",
            "seed": "${s}",
            "vote": "${v}",
            "weight": {"gradient": [0, "${d}"]},
        },
        vars={"d": 0.5, "n": False, "s": 3, "v": "count", "size": "5GB", "dtype": "float32", "rev": 1},
        models={**MODELS, "b": {"path": "./b-${rev}", "revision": "${rev}"}},
        output={"shard_size": "${size}", "dtype": "${dtype}"},
    ),
    "every key of an output": whole(
        output={
            "node": "merged",
            "like": "base",
            "tokenizer": "a",
            "dtype": "bfloat16",
            "shard_size": "5GiB",
            "config": {"max_position_embeddings": 8192},
            "card": {"license": "mit", "tags": ["x"]},
            "tied": "untie",
            "non_finite": "keep",
        }
    ),
    "a size in bytes": whole(output={"shard_size": 1_000_000}),
    "several outputs": whole(outputs={"one": {"node": "merged"}, "two": {"node": "a"}}),
    "a model alone": whole(nodes=None, models={"a": "./a"}),
    "every key of a model": whole(
        models={
            **MODELS,
            "a": {"path": "org/a", "revision": 123, "subfolder": "x", "file": "m.safetensors"},
            "c": {"path": "./c", "only": "language_model.*", "rename": {"language_model.*": "*"}, "space": "delta"},
        }
    ),
    "a name that reads as a number, and anchors": whole(name=1.5, seed=7, description="x", **{"x-any": [1, {"y": 2}]}),
    "a stage": whole({**GRAM, "only": ["*.mlp.*"], "seed": 3, "codec": "packed32", "min_tokens": 1000}, data=DATA),
    "statistics in place": whole(
        {
            "op": "regmean",
            "base": "base",
            "inputs": [
                {"model": "a", "gram": GRAM, "weight": HALF},
                {"model": "b", "gram": "kept", "for": "names"},
            ],
            "alpha": [{"match": "*.mlp.*", "value": 0.5}, {"value": 0.9}],
        },
        data=DATA,
        artifacts={"kept": "org/b-gram"},
    ),
    "fisher with a floor of the mean": whole(
        {**FISHER, "floor": {"rel": "${r}"}, "favor": "a"}, data=DATA, vars={"r": 0.1}
    ),
    "every key of data": whole(
        data={
            "hub": {"path": "org/set", "kind": "hub", "split": "train", "revision": 12, "limit": 100, "seed": 3},
            "table": {"path": "./t.csv", "text": 1, "label": "y", "template": "{a} {b}"},
            "chats": {"path": "./c.jsonl", "messages": "turns", "features": "x"},
            "plain": "./texts",
        }
    ),
    "artifacts": whole(
        {"op": "emr_apply", "emr": "kept", "base": "base", "task": "math"},
        artifacts={"kept": {"path": "org/kept", "revision": 12, "subfolder": "x"}, "other": "./other"},
    ),
}
for op in OPS:
    RIGHT.setdefault(op.name, read_document(example(op).encode(), op.name).data)

WRONG: dict[str, dict[str, Any]] = {
    "an unknown op": whole({"op": "tyes", "inputs": ["a"]}),
    "an op of a later version": whole({"op": "fuse", "inputs": ["a", "b"]}),
    "a stage without its data": whole({"op": "gram", "model": "a"}, data=DATA),
    "a stage with another stage's key": whole({**GRAM, "estimator": "expected"}, data=DATA),
    "a stage with another op's keys": whole({**GRAM, "others": "mean"}, data=DATA),
    "a stage of an unknown codec": whole({**GRAM, "codec": "float16"}, data=DATA),
    "regmean of names alone": whole({"op": "regmean", "inputs": ["a", "b"]}),
    "regmean of an input without its gram": whole({"op": "regmean", "inputs": [{"model": "a"}]}),
    "regmean of another op's statistics": whole(
        {"op": "regmean", "inputs": [{"model": "a", "fisher": GRAM}]}, data=DATA
    ),
    "statistics for something else": whole(
        {"op": "regmean", "inputs": [{"model": "a", "gram": GRAM, "for": "shapes"}]}, data=DATA
    ),
    "a floor of nothing": whole({**FISHER, "floor": {}}, data=DATA),
    "a floor of both": whole({**FISHER, "floor": {"abs": 1e-6, "rel": 1e-3}}, data=DATA),
    "a floor that is a number": whole({**FISHER, "floor": 1e-6}, data=DATA),
    "data without a path": whole(data={"texts": {"limit": 3}}),
    "data of no row": whole(data={"texts": {"path": "./t.jsonl", "limit": 0}}),
    "an unknown key in data": whole(data={"texts": {"path": "./t.jsonl", "field": "text"}}),
    "data of an unknown kind": whole(data={"texts": {"path": "./t.bin", "kind": "pickle"}}),
    "data that is a list": whole(data={"texts": ["./t.jsonl"]}),
    "the name of data with a dot": whole(data={"a.b": "./t.jsonl"}),
    "no op": whole({"inputs": ["a", "b"]}),
    "an unknown key in a node": linear(wieght=1),
    "another op's key": linear(density=0.5),
    "an unknown key in an input": linear(inputs=["a", {"model": "b", "wieght": 1}]),
    "a node's key in an input": linear(inputs=["a", {"model": "b", "normalize": True}]),
    "an input without a model": linear(inputs=["a", {"weight": 1}]),
    "an unknown key in a rule": linear(weight=[{"where": "x", "value": 1}, {"value": 1}]),
    "an unknown key in a gradient": linear(weight={"gradient": [0, 1], "layers": 3}),
    "an unknown key in an output": whole(output={"dtyp": "float32"}),
    "an unknown key in a model": whole(models={**MODELS, "c": {"path": "./c", "revison": "x"}}),
    "an unknown key on the top": whole(merge_method="ties"),
    "checks of a later version": whole(expect={"loss": 1}),
    "a density of 2": whole({**TIES, "density": 2}),
    "a density of 0": whole({**TIES, "density": 0}),
    "a density in words": whole({**TIES, "density": "high"}),
    "a weight that is a truth value": linear(weight=True),
    "a truth value that is a number": linear(normalize=1),
    "a gradient of one value": linear(weight={"gradient": [0.5]}),
    "a gradient of truth values": linear(normalize={"gradient": [True, False]}),
    "a bare list as a gradient": linear(weight=[0.2, 0.8]),
    "a range that is none": linear(weight={"gradient": [0, 1], "over": "8"}),
    "a rule without a value": linear(weight=[{"match": "*.mlp.*"}, {"value": 1}]),
    "rules without an open one": linear(weight=[{"match": "*.mlp.*", "value": 1}]),
    "no rules": linear(weight=[]),
    "missing inputs": whole({"op": "linear"}),
    "no inputs": linear(inputs=[]),
    "inputs that are no list": linear(inputs="a"),
    "three inputs of slerp": whole({"op": "slerp", "inputs": ["a", "b", "base"], "t": 0.5}),
    "slerp without t": whole({"op": "slerp", "inputs": ["a", "b"]}),
    "no base": whole({"op": "ties", "inputs": ["a", "b"]}),
    "inputs where a model is asked for": whole({"op": "scale", "inputs": ["a"], "by": 1}),
    "an unknown dtype": whole({"op": "cast", "model": "a", "to": "float31"}),
    "an unknown policy": linear(missing="ignore"),
    "only without others": linear(only="*.mlp.*"),
    "others that are no mapping": linear(only="*.mlp.*", others="a"),
    "a wrong node in place": linear(inputs=["a", {"op": "scale", "model": "b", "bye": 1}]),
    "a stack of names alone": whole({"op": "stack", "layers": ["a", "b"]}),
    "a stack that takes no range": whole({"op": "stack", "layers": [{"model": "a", "take": "0-"}]}),
    "a stack with a rest by its name": whole({"op": "stack", "layers": [{"model": "a", "take": "0-1"}], "rest": "a"}),
    "select without an open rule": whole({"op": "select", "rules": [{"match": "*", "model": "a"}]}),
    "output and outputs": whole(output={"node": "merged"}, outputs={"x": {"node": "merged"}}),
    "an output's node in place": whole(output={"node": {"op": "linear", "inputs": ["a", "b"]}}),
    "no outputs": whole(outputs={}),
    "a size without a unit": whole(output={"shard_size": "5 gigabytes"}),
    "another version": whole(recipe=2),
    "no version": {key: value for key, value in whole().items() if key != "recipe"},
    "no models": whole(models=None),
    "a model that is a list": whole(models={**MODELS, "c": ["./c"]}),
    "a model without a path": whole(models={**MODELS, "c": {"revision": "main"}}),
    "a name that is none": whole(name="a/b"),
    "a node's name with a dot": whole(nodes={"a.b": TIES}),
    "a seed below 0": whole(seed=-1),
    "a variable that is a list": whole(vars={"x": [1]}),
    "a node that is a list": whole(nodes={"merged": ["a", "b"]}),
}


def accepted_by_the_parser(data: Any) -> bool:
    try:
        Recipe(**data)
    except MergeflowError:
        return False
    return True


def complaint(data: Any) -> str:
    return next((f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(data)), "")


def test_the_schema_is_a_schema_of_draft_7() -> None:
    Draft7Validator.check_schema(SCHEMA)
    text = json.dumps(SCHEMA)
    assert not [word for word in ("$defs", "prefixItems", "dependentRequired", "unevaluated") if f'"{word}' in text]


def test_every_reference_leads_somewhere_and_stands_alone() -> None:
    for part in parts_of(SCHEMA):
        if "$ref" in part:
            assert set(part) == {"$ref"}, "draft 7 ignores what stands beside a $ref"
            assert part["$ref"].removeprefix("#/definitions/") in SCHEMA["definitions"]


def test_every_key_has_a_description() -> None:
    for part in parts_of(SCHEMA):
        if part.get("properties", {}).get("match") is False:
            continue
        for key, value in part.get("properties", {}).items():
            target = SCHEMA["definitions"][value["$ref"].removeprefix("#/definitions/")] if "$ref" in value else value
            assert target.get("description"), key


def parts_of(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from parts_of(inner)


def test_the_file_in_schemas_is_fresh() -> None:
    path = ROOT / "schemas" / "recipe.schema.json"
    fresh = path.read_text(encoding="utf-8") == schema_text(OPS)
    assert fresh, "the schema has changed; renew the file by `mergeflow schema > schemas/recipe.schema.json`"


RECIPES = sorted(p for p in (ROOT / "recipes").rglob("*.y*ml") if "/." not in str(p.relative_to(ROOT)))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_the_repository_are_accepted(path: Path) -> None:
    data = read_document(path.read_bytes(), str(path)).data
    assert not complaint(data)
    load_recipe(path)


@pytest.mark.parametrize("data", RIGHT.values(), ids=RIGHT.keys())
def test_a_right_recipe_is_accepted_by_schema_and_parser(data: dict[str, Any], tmp_path: Path) -> None:
    assert not complaint(data)
    path = tmp_path / "right.yaml"
    path.write_text(dump_yaml(data))
    load_recipe(path)


@pytest.mark.parametrize("data", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_recipe_is_refused_by_schema_and_parser(data: dict[str, Any], tmp_path: Path) -> None:
    assert complaint(data)
    path = tmp_path / "wrong.yaml"
    path.write_text(dump_yaml(data))
    with pytest.raises(MergeflowError) as caught:
        load_recipe(path)
    assert caught.value.exit_code == 2


def test_right_recipes_use_every_op() -> None:
    assert {op.name for op in OPS} <= RIGHT.keys()


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places_in(inner, (*path, key))


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_the_schema_refuses_nothing_that_the_parser_accepts(draw: st.DataObject) -> None:
    data = copy.deepcopy(draw.draw(st.sampled_from(list(RIGHT.values()))))
    # Of the top level only names, models and so on are changed: it is written by hand, and tested above.
    path = draw.draw(st.sampled_from([path for path in places_in(data) if len(path) > 1]))
    holder = data
    for step in path[:-1]:
        holder = holder[step]
    values = [0, 1, 0.5, -3, 2, True, "a", "b", "x", "", "mean", "${x}", [], {}, ["a"], {"model": "a"}, {"value": 1}]
    values += [{"gradient": [0, 1]}, [{"value": 0.5}], {"op": "linear", "inputs": ["a"]}, "bfloat16", "error"]
    change = draw.draw(st.sampled_from(["replace", "delete", "add"]))
    if change == "delete":
        del holder[path[-1]]
    elif change == "replace" or isinstance(holder, list):
        holder[path[-1]] = draw.draw(st.sampled_from(values))
    else:
        keys = ["model", "base", "weight", "density", "only", "others", "match", "value", "op", "seed", "t", "scale"]
        holder[draw.draw(st.sampled_from(keys))] = draw.draw(st.sampled_from(values))
    # No checkpoint or file is called by a number, so the schema may say so where the parser takes the scalar as written.
    sources = [*data["models"].values(), *(data.get("data") or {}).values()]
    models = [model if isinstance(model, dict) else {"path": model} for model in sources]
    assume(not any(isinstance(model.get(key), int | float) for model in models for key in ("path", "file")))
    if accepted_by_the_parser(data):
        assert not complaint(data)


def test_a_variable_may_stand_for_any_scalar_of_a_node_but_not_for_part_of_it() -> None:
    assert not complaint(linear(weight="${w}", normalize="${n}", missing="${m}", vocab="${v}", seed="${s}"))
    assert complaint(linear(weight="1${w}"))
    assert complaint(linear(weight="${}"))


def test_an_op_of_another_package_is_in_the_schema_and_its_page_can_be_copied(tmp_path: Path) -> None:
    class Outside(Op):
        """Do something from outside."""

        name = "outside"
        formula = "x | y"
        fewest = 3

        amount: Setting[Number] = setting(..., "How much.")
        pair: tuple[int, str] = (1, "a")
        times: Count = 2
        note: str | None = None

        def compute(self, inputs: Any, block: Any) -> Any:
            return inputs[0]

    schema = recipe_schema([*OPS, Outside])
    Draft7Validator.check_schema(schema)
    node = {"op": "outside", "inputs": ["a", "b", "base"], "amount": 1, "pair": [2, "b"], "times": 3}
    Draft7Validator(schema).validate(whole(node))
    assert list(Draft7Validator(schema).iter_errors(whole({**node, "pair": ["b", 2]})))
    assert list(Draft7Validator(schema).iter_errors(whole({**node, "inputs": ["a", "b"]})))
    assert complaint(whole(node))


def test_making_the_schema_is_quick_and_needs_no_torch() -> None:
    # Processors differ by more than a change to the schema may cost: so it is held against a loop of some 0.06 s.
    code = (
        "import sys, time; import mergeflow.schema as s; start = time.process_time(); s.schema_text(); "
        "s.ops_table(); s.op_page('ties'); assert 'torch' not in sys.modules; made = time.process_time(); "
        "sum(i * i for i in range(1_000_000)); print((made - start) / (time.process_time() - made))"
    )
    best = 99.0
    for _ in range(3):
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        best = min(best, float(found.stdout))
        if best < 10:
            return
        time.sleep(0.5)
    raise AssertionError(f"{best} times the loop")


def test_the_table_has_each_op_with_its_parameters() -> None:
    lines = ops_table().splitlines()
    assert [line.split()[0] for line in lines[: 2 * len(OPS) : 2]] == [op.name for op in OPS]
    ties = lines[2 * [op.name for op in OPS].index("ties") + 1]
    assert "arXiv:2306.01708" in ties and "density=1.0" in ties and "rescale=none" in ties and "theta_0" in ties


def test_the_table_in_markdown_is_a_table() -> None:
    head, rule, *rows = ops_table(markdown=True).splitlines()
    cells = head.count("|")
    assert set(rule) == set("| -")
    assert len(rows) >= len(OPS)
    assert all(row.replace("\\|", "").count("|") == cells for row in rows)
    assert "[arXiv:2306.01708](https://arxiv.org/abs/2306.01708)" in ops_table(markdown=True)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_a_page_says_everything_and_its_example_is_a_recipe(op: type[Op], tmp_path: Path) -> None:
    page = op_page(op.name)
    assert op.formula in page and (op.paper or "") in page
    for name, info in op.model_fields.items():
        assert f"  {name}" in page and (info.description or "") in page
    path = tmp_path / "example.yaml"
    path.write_text("".join(line[2:] + "\n" for line in page.partition("Example\n")[2].splitlines()))
    recipe = load_recipe(path)
    assert recipe.nodes[recipe.outputs[""].node].op.name == op.name
    assert not complaint(read_document(path.read_bytes(), str(path)).data)


def test_a_page_tells_types_in_words() -> None:
    page = op_page("ties")
    for words in (
        "density    fraction in (0, 1]; default 1.0; of the node or of each input",
        "normalize  true or false; default true",
        "vote       mass or count; default mass; one value for the whole model",
        "weight from weights, weight from deltas",
        "portable: ",
    ):
        assert words in page
    assert "same_cpu: " in op_page("slerp")
    assert "t  fraction in [0, 1]; required" in op_page("slerp")
    assert "weight from deltas" in op_page("add") and "from weights" not in op_page("add")
    assert "delta from weights" in op_page("task_vector")


def test_a_page_of_an_unknown_op_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'ties'"):
        op_page("tyes")

"""Recipes and headers become plans: names, spaces, missing tensors, ties, vocabularies, patterns, and what is told of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from clock import seconds
from safetensors.torch import load_file, save_file

from mergeflow import pipeline
from mergeflow.checkpoint import encode_header
from mergeflow.dtypes import BY_NAME
from mergeflow.errors import MergeflowError, Problems
from mergeflow.graph import Apply, Expression, Load, Plan
from mergeflow.ops import Linear, TaskArithmetic, TaskVector, Ties
from mergeflow.ops.unchanged import Unchanged
from mergeflow.planning import keeps_quantisation, loads, needed_models
from mergeflow.recipe import Recipe

Shapes = Mapping[str, Any]

LLAMA: dict[str, Any] = {
    "model.embed_tokens.weight": (10, 4),
    **{
        f"model.layers.{layer}.{part}.weight": (4, 4)
        for layer in range(4)
        for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
    },
    "model.norm.weight": (4,),
    "lm_head.weight": (10, 4),
}
CONFIG = {"vocab_size": 10, "tie_word_embeddings": False}
EMBED, HEAD, NORM, UP = (
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.norm.weight",
    "model.layers.0.mlp.up_proj.weight",
)


class Workshop:
    """A folder of small checkpoints that hold headers and zeros, and the plans of recipes over them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def model(
        self,
        name: str,
        tensors: Shapes = LLAMA,
        *,
        config: Mapping[str, Any] | None = CONFIG,
        dtype: str = "bfloat16",
        metadata: Mapping[str, str] | None = None,
        tokens: list[str] | None = None,
        change: Shapes | None = None,
    ) -> str:
        """A checkpoint: tensors are shapes, or (dtype, shape); `change` replaces some, None takes one away."""
        entries = []
        for tensor, given in {**tensors, **(change or {})}.items():
            if given is not None:
                kind, shape = given if given and isinstance(given[0], str) else (dtype, given)
                entries.append((tensor, BY_NAME[kind], tuple(shape)))
        header, offsets = encode_header(entries, metadata or {"format": "pt"})
        size = len(header)
        if entries:
            last = entries[-1]
            size = offsets[-1] + last[1].size * int(torch.Size(last[2]).numel())
        (self.folder / name).mkdir()
        with (self.folder / name / "model.safetensors").open("wb") as file:
            file.write(header)
            file.truncate(size)
        if config is not None:
            (self.folder / name / "config.json").write_text(json.dumps(config))
        if tokens is not None:
            vocabulary = {"model": {"vocab": {token: i for i, token in enumerate(tokens)}}}
            (self.folder / name / "tokenizer.json").write_text(json.dumps(vocabulary))
        return name

    def stored(self, name: str, tensors: Mapping[str, torch.Tensor], **options: Any) -> str:
        """A checkpoint of real numbers."""
        self.model(name, {}, **options)
        metadata = options.get("metadata") or {"format": "pt"}
        save_file(dict(tensors), self.folder / name / "model.safetensors", dict(metadata))
        return name

    def recipe(self, nodes: Mapping[str, Any], output: Mapping[str, Any] | None = None, **more: Any) -> Recipe:
        models = {path.name: f"./{path.name}" for path in sorted(self.folder.iterdir()) if path.is_dir()}
        if "outputs" not in more:
            more["output"] = dict(output or {})
        return Recipe(models={**models, **more.pop("models", {})}, nodes=nodes, folder=self.folder, **more)

    def plan(self, nodes: Mapping[str, Any], output: Mapping[str, Any] | None = None, **more: Any) -> Plan:
        return pipeline.plan(self.recipe(nodes, output, **more))

    def refused(self, nodes: Mapping[str, Any], output: Mapping[str, Any] | None = None, **more: Any) -> list[str]:
        with pytest.raises(MergeflowError) as caught:
            self.plan(nodes, output, **more)
        errors = caught.value.errors if isinstance(caught.value, Problems) else (caught.value,)
        assert all(error.where and error.fix for error in errors), caught.value
        return [str(error) for error in errors]

    def run(self, nodes: Mapping[str, Any], output: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        out = self.folder.parent / f"out-{len(list(self.folder.parent.iterdir()))}"
        pipeline.run(self.recipe(nodes, output, **more), out, threads=1, memory=2**26)
        return {str(file.relative_to(out)): load_file(file) for file in sorted(out.rglob("*.safetensors"))}


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    (tmp_path / "models").mkdir()
    return Workshop(tmp_path / "models")


@pytest.fixture
def llamas(shop: Workshop) -> Workshop:
    for name in ("base", "a", "b"):
        shop.model(name)
    return shop


def rows(plan: Plan) -> dict[str, Expression]:
    return {row.name: row.expression for row in plan.rows}


def text(expression: Expression) -> str:
    """An expression with the models it reads: `linear(a, b)`."""
    if isinstance(expression, Apply):
        return f"{expression.op.name}({', '.join(map(text, expression.inputs))})"
    return expression.model


def linear(*inputs: Any, **more: Any) -> dict[str, Any]:
    return {"m": {"op": "linear", "inputs": list(inputs), **more}}


def arithmetic(*inputs: Any, **more: Any) -> dict[str, Any]:
    return {"m": {"op": "task_arithmetic", "base": "base", "inputs": list(inputs), **more}}


def weights(plan: Plan) -> dict[str, Any]:
    return {
        name: tuple(found.op.weight)  # type: ignore[attr-defined]
        for name, found in rows(plan).items()
        if isinstance(found, Apply)
    }


# Rows and names.


def test_each_tensor_is_a_row_with_its_expression(llamas: Workshop) -> None:
    plan = llamas.plan(linear("a", "b"))
    assert [row.name for row in plan.rows] == list(LLAMA)
    assert {text(one) for one in rows(plan).values()} == {"linear(a, b)"}
    assert {(row.dtype.name, row.compute.name) for row in plan.rows} == {("bfloat16", "float32")}
    assert [row.shape for row in plan.rows] == list(LLAMA.values())


def test_deltas_are_taken_of_weights_and_deltas_are_used_as_they_are(llamas: Workshop) -> None:
    nodes = {
        "d": {"op": "task_vector", "base": "base", "model": "b"},
        "m": {"op": "task_arithmetic", "base": "base", "inputs": ["a", "d", {"model": "a", "base": "b"}]},
    }
    found = rows(llamas.plan(nodes))[UP]
    assert text(found) == "task_arithmetic(base, task_vector(base, a), task_vector(base, b), task_vector(b, a))"


def test_what_two_rows_and_two_outputs_need_is_one_object(llamas: Workshop) -> None:
    nodes = {
        "d": {"op": "task_vector", "base": "base", "model": "a"},
        "x": {"op": "add", "base": "base", "inputs": ["d"]},
        "y": {"op": "add", "base": "base", "inputs": [{"model": "d", "weight": 2.0}, {"model": "d", "weight": 3.0}]},
    }
    plan = llamas.plan(nodes, outputs={"one": {"node": "x"}, "two": {"node": "y"}})
    one, two = (row.expression for row in plan.rows if row.name == UP)
    assert isinstance(one, Apply)
    assert isinstance(two, Apply)
    assert one.inputs[0] is two.inputs[0]
    assert one.inputs[1] is two.inputs[1] is two.inputs[2]
    assert len(list(loads(*(row.expression for row in plan.rows)))) == 2 * len(LLAMA)
    ops = {id(row.expression.op) for row in plan.rows if isinstance(row.expression, Apply)}
    assert len(ops) == 2


def test_only_what_the_outputs_ask_for_is_opened(llamas: Workshop) -> None:
    (llamas.folder / "broken").mkdir()
    nodes = {**linear("a", "b"), "n": {"op": "linear", "inputs": ["broken", "m"]}}
    recipe = llamas.recipe(nodes, {"node": "m"})
    assert needed_models(recipe) == ["a", "b"]
    assert set(pipeline.plan(recipe).models) == {"a", "b"}
    assert needed_models(llamas.recipe(nodes, {"node": "m", "tokenizer": "base"})) == ["a", "b", "base"]
    assert any("broken" in line for line in llamas.refused(nodes, {"node": "n"}))


def test_names_are_the_bases_else_the_first_inputs(shop: Workshop) -> None:
    shop.model("base", change={HEAD: None})
    shop.model("a")
    assert list(rows(shop.plan(arithmetic("a", extra="drop")))) == [name for name in LLAMA if name != HEAD]
    assert list(rows(shop.plan(linear("a", "base", missing="omit")))) == list(LLAMA)


def test_like_is_the_base_then_the_first_input_down_to_a_model(shop: Workshop) -> None:
    shop.model("base", dtype="float32")
    for name in ("a", "b"):
        shop.model(name)
    nodes = {
        "low": {"op": "linear", "inputs": ["a", "b"]},
        "m": {"op": "task_arithmetic", "base": "base", "inputs": ["low"]},
        "s": {"op": "select", "rules": [{"match": "*.mlp.*", "model": "m"}, {"model": "low"}]},
    }
    assert {row.dtype.name for row in shop.plan(nodes, {"node": "m"}).rows} == {"float32"}
    assert {row.dtype.name for row in shop.plan(nodes, {"node": "s"}).rows} == {"bfloat16"}
    assert {row.dtype.name for row in shop.plan(nodes, {"node": "s", "like": "base"}).rows} == {"float32"}


def test_like_must_have_the_same_tensors(llamas: Workshop) -> None:
    llamas.model("small", change={NORM: None})
    llamas.model("big", change={"extra.weight": (3,)})
    llamas.model("wide", change={NORM: (5,)})
    for name, words in (
        ("small", "lacks 'model.norm.weight'"),
        ("big", "has 'extra.weight' beyond"),
        ("wide", "has 'model.norm.weight' in another shape"),
    ):
        (line,) = llamas.refused(linear("a", "b"), {"like": name})
        assert f"`like: {name}` must have the tensors of 'm', and it {words}" in line


def test_like_must_hold_numbers_of_the_same_kind(llamas: Workshop) -> None:
    llamas.model("whole", change={NORM: ("int32", (4,))})
    llamas.model("flags", change={NORM: ("bool", (4,))})
    for name, dtype in (("whole", "int32"), ("flags", "bool")):
        for output in ({"like": name}, {"like": name, "dtype": "float32"}):
            (line,) = llamas.refused(linear("a", "b"), output)
            assert f"and it has 'model.norm.weight' as {dtype}, not bfloat16" in line
    (line,) = llamas.refused(linear("whole"), {"like": "a"})
    assert "and it has 'model.norm.weight' as bfloat16, not int32" in line


# Output dtypes.


def test_dtypes_are_those_of_like_or_of_the_outputs_rules(llamas: Workshop) -> None:
    rules = [{"match": "@vocab", "value": "float32"}, {"value": "float16"}]
    dtypes = {row.name: row.dtype.name for row in llamas.plan(linear("a", "b"), {"dtype": rules}).rows}
    assert {name for name, dtype in dtypes.items() if dtype == "float32"} == {EMBED, HEAD}
    assert set(dtypes.values()) == {"float32", "float16"}
    assert "fits none" in llamas.refused(linear("a", "b"), {"dtype": [{"match": "x", "value": "float32"}, *rules]})[0]


def test_a_cast_at_the_end_sets_the_dtype(llamas: Workshop) -> None:
    to = [{"match": "*.norm.*", "value": "float32"}, {"value": "float16"}]
    nodes = {"m": {"op": "cast", "model": {"op": "linear", "inputs": ["a", "b"]}, "to": to}}
    dtypes = {row.name: row.dtype.name for row in llamas.plan(nodes).rows}
    assert dtypes[NORM] == "float32"
    assert dtypes[UP] == "float16"
    assert {row.dtype.name for row in llamas.plan(nodes, {"dtype": "float64"}).rows} == {"float64"}


def test_float64_is_computed_in_float64_and_mixed_dtypes_in_float32(shop: Workshop) -> None:
    shop.model("a", change={NORM: ("float64", (4,))})
    shop.model("b", dtype="float16")
    plan = shop.plan({"m": {"op": "scale", "by": 2.0, "model": {"op": "linear", "inputs": ["b", "a"]}}})
    assert {row.name: row.compute.name for row in plan.rows if row.compute.name == "float64"} == {NORM: "float64"}
    assert {row.dtype.name for row in plan.rows} == {"float16"}


# Spaces.


@pytest.mark.parametrize(
    ("nodes", "what"),
    [
        (linear("a", {"op": "task_vector", "base": "base", "model": "b"}), "linear mixes delta and weight inputs"),
        (
            {"m": {"op": "add", "base": "base", "inputs": ["a"]}},
            "add adds deltas, and an input is a model's weights. Make a delta of it first",
        ),
        (
            {"m": {"op": "ties", "base": {"op": "task_vector", "base": "base", "model": "a"}, "inputs": ["b"]}},
            "the base of ties is a delta",
        ),
        (
            {"m": {"op": "task_vector", "base": "base", "model": {"op": "task_vector", "base": "base", "model": "b"}}},
            "task_vector subtracts a base from a model",
        ),
        (
            arithmetic({"model": "a", "base": {"op": "task_vector", "base": "base", "model": "b"}}),
            "an input's base is a delta",
        ),
        (
            arithmetic({"model": {"op": "task_vector", "base": "base", "model": "b"}, "base": "a"}),
            "is a delta already, so its own `base: a` would say nothing",
        ),
        (
            arithmetic("a", only="*.mlp.*", others={"op": "task_vector", "base": "base", "model": "b"}),
            "`others` gives a delta, and the op a weight",
        ),
        (
            {
                "m": {"op": "select", "rules": [{"match": "*.mlp.*", "model": "x"}, "a"]},
                "x": {"op": "task_vector", "base": "base", "model": "b"},
            },
            "select mixes delta and weight inputs",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_added_is_an_error_with_the_sentence_that_mends_it(
    llamas: Workshop, nodes: dict[str, Any], what: str
) -> None:
    (line,) = llamas.refused(nodes, {"node": "m"})
    assert what in line
    assert line.startswith("recipe.nodes.m")


def test_an_output_may_be_a_delta_and_reads_back_as_one(shop: Workshop) -> None:
    base, a = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 5.0])}
    shop.stored("base", base)
    shop.stored("a", a)
    vector = {"m": {"op": "task_vector", "base": "base", "model": "a"}}
    plan = shop.plan(vector)
    assert plan.spaces == {"": "delta"}
    assert b'"mergeflow.space":"delta"' in plan.shards[0].header
    pipeline.run(shop.recipe(vector), shop.folder / "tv", threads=1)
    nodes = {"m": {"op": "add", "base": "base", "inputs": [{"model": "tv", "weight": 0.5}]}}
    ((_, made),) = shop.run(nodes).items()
    assert made["w"].tolist() == [2.0, 3.5]
    assert text(rows(shop.plan(nodes))["w"]) == "add(base, tv)"
    (line,) = shop.refused(nodes, models={"tv": {"path": "./tv", "space": "weight"}})
    assert "the file says that it holds a delta, and the recipe a weight" in line


def test_a_recipe_may_say_that_a_file_is_a_delta(llamas: Workshop) -> None:
    nodes = {"m": {"op": "add", "base": "base", "inputs": ["a"]}}
    assert text(rows(llamas.plan(nodes, models={"a": {"path": "./a", "space": "delta"}}))[UP]) == "add(base, a)"
    llamas.model("odd", metadata={"mergeflow.space": "banana"})
    with pytest.raises(MergeflowError, match="banana"):
        llamas.plan(linear("odd"))


# only and others.


def test_the_op_acts_on_only_and_the_rest_is_the_mean_or_another_model(llamas: Workshop) -> None:
    found = rows(llamas.plan(arithmetic("a", "b", weight=0.3, only="*.mlp.*", others={"model": "base"})))
    assert text(found[UP]) == "task_arithmetic(base, task_vector(base, a), task_vector(base, b))"
    assert text(found[NORM]) == "base"
    plan = llamas.plan(
        linear("a", "b", weight=[{"match": "*.mlp.*", "value": 3.0}, {"value": -1.0}], only="*.mlp.*", others="mean")
    )
    assert weights(plan)[UP] == (3.0, 3.0)
    assert weights(plan)[NORM] == (1.0, 1.0)
    mean = rows(llamas.plan(arithmetic("a", "b", weight=0.3, only="*.mlp.*", others="mean")))[NORM]
    assert isinstance(mean, Apply)
    assert isinstance(mean.op, TaskArithmetic)
    assert mean.op.normalize is True
    vector = {"op": "task_vector", "base": "base", "model": "a", "only": "*.mlp.*", "others": "mean"}
    assert text(rows(llamas.plan({"m": vector}))[NORM]) == "task_vector(base, a)"
    scale = {"op": "scale", "by": 2.0, "model": "a", "only": "*.mlp.*", "others": "mean"}
    assert text(rows(llamas.plan({"m": scale}))[NORM]) == "a"


def test_the_mean_of_others_is_the_mean(shop: Workshop) -> None:
    for name, value in (("base", 1.0), ("a", 2.0), ("b", 6.0)):
        shop.stored(name, {"x": torch.full((3,), value), "y": torch.full((3,), value)})
    (made,) = shop.run(arithmetic("a", "b", weight=2.0, only="x", others="mean")).values()
    assert made["x"].tolist() == [13.0] * 3
    assert made["y"].tolist() == [4.0] * 3


def test_others_must_fit(llamas: Workshop) -> None:
    llamas.model("small", change={NORM: None})
    llamas.model("wide", change={NORM: (5,)})
    llamas.model("whole", change={NORM: ("int64", (4,))})
    llamas.model("more", change={"model.extra": (4,)})
    for name, what in (
        ("small", "'small' lacks 'model.norm.weight'"),
        ("wide", "'wide' has 'model.norm.weight' in shape [5], not [4]"),
        ("whole", "'whole' has 'model.norm.weight' as int64, not bfloat16"),
        ("more", "'more' has 1 tensor that 'a' lacks: 'model.extra'"),
    ):
        (line,) = llamas.refused(linear("a", "b", only="*.mlp.*", others={"model": name}))
        assert what in line
    # What `only` does not name is not taken from the inputs, and what it names not from `others`.
    llamas.model("x", change={"model.extra": (4,)})
    llamas.plan(linear("a", "x", only="*.mlp.*", others={"model": "b"}))


# Missing, mismatch, extra.


def test_a_missing_tensor_is_an_error_unless_a_rule_says_more(shop: Workshop) -> None:
    shop.model("base")
    shop.model("a")
    shop.model("b", change={NORM: None, UP: None})
    (line,) = shop.refused(linear("a", "b"))
    assert line.startswith(
        f"recipe.nodes.m.inputs.1: 'b' lacks 2 tensors of 'a': '{UP}', '{NORM}'. Write `missing: omit`"
    )
    assert text(rows(shop.plan(linear("a", "b", missing="omit")))[NORM]) == "a"
    rules = [{"match": NORM, "value": "omit"}, {"value": "error"}]
    (line,) = shop.refused(linear("a", "b", missing=rules))
    assert NORM not in line
    assert UP in line
    (line,) = shop.refused(linear("a", "b", missing="base"))
    assert "`missing: base` needs an op with a base" in line


def test_missing_base_is_a_delta_of_zero_and_omit_renormalises(shop: Workshop) -> None:
    x, y = torch.tensor([1.0]), torch.tensor([10.0])
    shop.stored("base", {"x": x, "y": y})
    shop.stored("a", {"x": x + 1, "y": y + 1})
    shop.stored("b", {"x": x + 4})
    inputs = ({"model": "a", "weight": 0.25}, {"model": "b", "weight": 0.5})
    made = {policy: shop.run(arithmetic(*inputs, missing=policy)) for policy in ("base", "omit")}
    (base,), (omit,) = made["base"].values(), made["omit"].values()
    assert base["x"].tolist() == omit["x"].tolist() == [1 + 0.25 + 2.0]
    assert base["y"].tolist() == [10.25]
    assert omit["y"].tolist() == [10.75]
    (mean,) = shop.run(arithmetic(*inputs, missing="omit", normalize=True)).values()
    assert mean["y"].tolist() == [11.0]
    # An input's own base does not matter where the input is taken to be the node's base.
    own = ({"model": "a"}, {"model": "b", "base": "a"})
    (made_own,) = shop.run(arithmetic(*own, missing="base")).values()
    assert made_own["y"].tolist() == [11.0]
    vector = {"m": {"op": "task_vector", "base": "base", "model": "b", "missing": "base"}}
    (delta,) = shop.run(vector).values()
    assert delta["y"].tolist() == [0.0]
    (delta,) = shop.run({"m": {**vector["m"], "missing": "omit"}}).values()
    assert delta["y"].tolist() == [0.0]


def test_weights_that_cancel_without_an_input_are_an_error(shop: Workshop) -> None:
    shop.model("base")
    for name in ("a", "b"):
        shop.model(name)
    shop.model("c", change={NORM: None})
    inputs = ({"model": "a", "weight": 0.0}, {"model": "b", "weight": 0.0}, {"model": "c", "weight": 1.0})
    (line,) = shop.refused(arithmetic(*inputs, missing="omit"))
    assert "at 'model.norm.weight': the weights of the inputs that are left sum to 0" in line


def test_weights_of_both_signs_are_never_scaled_to_make_up_for_an_input(shop: Workshop) -> None:
    for name in ("base", "a", "b"):
        shop.model(name)
    shop.model("c", change={NORM: None})
    for left in (-1.0, -0.9, 0.5):
        inputs = ({"model": "a", "weight": 1.0}, {"model": "b", "weight": left}, {"model": "c", "weight": -0.2})
        (line,) = shop.refused(arithmetic(*inputs, missing="omit"))
        assert "at 'model.norm.weight': weights of both signs cannot be scaled" in line
        assert "Write `base` in place of `omit`" in line
        shop.plan(arithmetic(*inputs, missing="base"))
    negative = ({"model": "a", "weight": -0.5}, {"model": "c", "weight": -0.5})
    assert weights(shop.plan(arithmetic(*negative, missing="omit")))[NORM] == (-1.0,)
    divided = ({"model": "a", "weight": 1.0}, {"model": "b", "weight": -0.5}, {"model": "c", "weight": 1.0})
    assert weights(shop.plan(linear(*divided, missing="omit")))[NORM] == (1.0, -0.5)


def test_every_input_left_out_gives_the_base_or_an_error(shop: Workshop) -> None:
    shop.model("base")
    shop.model("a", change={NORM: None})
    assert text(rows(shop.plan(arithmetic("a", missing="omit")))[NORM]) == "base"
    shop.model("c", change={NORM: (7,)})
    assert text(rows(shop.plan(arithmetic("c", mismatch="omit")))[NORM]) == "base"
    both = {"m": {"op": "slerp", "t": 0.5, "inputs": ["base", "a"], "missing": "omit"}}
    assert text(rows(shop.plan(both))[NORM]) == "base"


def test_another_shape_is_an_error_unless_a_rule_says_more(shop: Workshop) -> None:
    shop.model("base")
    shop.model("a")
    shop.model("b", change={NORM: (5,)})
    (line,) = shop.refused(linear("a", "b"))
    assert f"'{NORM}' has shape [5] in 'b', and [4] in 'a'. Write `mismatch: omit`" in line
    assert text(rows(shop.plan(linear("a", "b", mismatch="omit")))[NORM]) == "a"
    found = rows(shop.plan(arithmetic("a", "b", mismatch="base")))[NORM]
    assert text(found) == "task_arithmetic(base, task_vector(base, a), task_vector(base, base))"


def test_an_extra_tensor_is_an_error_dropped_or_kept(llamas: Workshop) -> None:
    llamas.model("c", change={"head.weight": (2, 4), "head.bias": (2,)})
    (line,) = llamas.refused(linear("a", "c"))
    assert (
        "recipe.nodes.m.inputs.1: 'c' has 2 tensors that 'a' lacks: 'head.weight', 'head.bias'. Write `extra: drop`"
        in line
    )
    assert list(rows(llamas.plan(linear("a", "c", extra="drop")))) == list(LLAMA)
    found = rows(llamas.plan(linear("a", "c", extra="keep")))
    assert list(found) == [*LLAMA, "head.weight", "head.bias"]
    assert text(found["head.bias"]) == "c"
    rules = [{"match": "*.bias", "value": "drop"}, {"value": "keep"}]
    assert list(rows(llamas.plan(linear("a", "c", extra=rules)))) == [*LLAMA, "head.weight"]
    above = {"n": {"op": "scale", "by": 2.0, "model": "m"}, **linear("a", "c", extra="keep")}
    assert text(rows(llamas.plan(above))["head.bias"]) == "scale(c)"
    llamas.model("d", change={"head.bias": (2,)})
    (line,) = llamas.refused(linear("a", "c", "d", extra=[{"match": "*.weight", "value": "drop"}, {"value": "keep"}]))
    assert "`extra: keep` finds 'head.bias' in several inputs" in line
    delta = {"op": "task_vector", "base": "base", "model": "c", "extra": "drop"}
    llamas.plan(arithmetic("a", delta))
    (line,) = llamas.refused({"m": {**delta, "extra": "keep"}})
    assert "would put a weight among deltas" in line


def test_a_prefix_that_is_all_that_differs_is_told_with_the_line_to_write(llamas: Workshop) -> None:
    llamas.model("tower", {f"language_model.{name}": shape for name, shape in LLAMA.items()} | {"vision.w": (3,)})
    lines = llamas.refused(linear("a", "tower"))
    rename = "write `rename: {'language_model.*': '*'}` on 'tower' under `models:`."
    assert any("'tower' lacks 15 tensors of 'a'" in line and rename in line for line in lines)
    models = {"tower": {"path": "./tower", "only": "language_model.*", "rename": {"language_model.*": "*"}}}
    assert text(rows(llamas.plan(linear("a", "tower"), models=models))[UP]) == "linear(a, tower)"
    lines = llamas.refused(linear("tower", "a"))
    assert any("write `rename: {'*': 'language_model.*'}` on 'a' under `models:`." in line for line in lines)


# only and rename of models.


def test_a_models_rename_must_fit_and_not_collide(llamas: Workshop) -> None:
    def told(**source: Any) -> list[str]:
        return llamas.refused(linear("a", "b"), models={"b": {"path": "./b", **source}})

    assert "the rename 'modle.*' fits no tensor" in told(rename={"modle.*": "x.*"})[0]
    assert any("the rename gives two tensors the name 'x'" in line for line in told(rename={HEAD: "x", NORM: "x"}))
    (line,) = told(only="*.mpl.*")
    assert "`only: *.mpl.*` fits none of the 15 tensors. Did you mean '*.mlp.*'?" in line
    whole = {"b": {"path": "./b", "rename": {"model.*.weight": "m.*.w"}}}
    found = rows(llamas.plan(linear("b"), models=whole))
    assert "m.layers.0.mlp.up_proj.w" in found
    load = found["m.norm.w"]
    assert isinstance(load, Load)
    assert load.tensor.name == NORM
    assert list(rows(llamas.plan({}, {"node": "b"}, models={"b": {"path": "./b", "only": "@vocab"}}))) == [EMBED, HEAD]


# select.


def test_select_takes_each_tensor_from_the_first_rule_that_fits(llamas: Workshop) -> None:
    llamas.model("ints", change={UP: ("int64", (4, 4))})
    rules = [{"match": "*.{0-1}.*", "model": "a"}, {"match": "@vocab", "model": "b"}, "base"]
    found = rows(llamas.plan({"m": {"op": "select", "rules": rules}}))
    assert [text(found[name]) for name in (UP, EMBED, NORM)] == ["a", "b", "base"]
    assert all(isinstance(one, Load) for one in found.values())


def test_select_never_falls_through(llamas: Workshop) -> None:
    llamas.model("small", change={NORM: None})
    (line,) = llamas.refused({"m": {"op": "select", "rules": [{"match": "*norm*", "model": "small"}, "a"]}})
    assert line.startswith("recipe.nodes.m.rules.0: the rule chooses 'small', which lacks 'model.norm.weight'.")
    assert "Add a rule that takes them from 'a'." in line


# Integers and booleans.


def test_integers_are_never_computed_on(shop: Workshop) -> None:
    ids = {"ids": torch.tensor([1, 2]), "w": torch.tensor([1.0])}
    for name in ("base", "a", "b"):
        shop.stored(name, ids)
    shop.stored("c", {**ids, "ids": torch.tensor([1, 3])})
    shop.stored("d", {**ids, "ids": torch.tensor([1, 2], dtype=torch.int32)})
    found = rows(shop.plan(arithmetic("a", "b", weight=0.5)))["ids"]
    assert isinstance(found, Apply)
    assert found.op == Unchanged(deltas=(False, False, False))
    (made,) = shop.run(arithmetic("a", "b", weight=0.5)).values()
    assert made["ids"].tolist() == [1, 2]
    assert made["ids"].dtype == torch.int64
    assert shop.plan(linear("a", "b"), {"dtype": "float16"}).rows[0].dtype.name == "int64"
    with pytest.raises(MergeflowError, match="never computed on"):
        shop.run(linear("a", "c"))
    (line,) = shop.refused(linear("a", "d"))
    assert "'ids' is int32 in 'd' and int64 in 'a'" in line
    (made,) = shop.run({"m": {"op": "task_vector", "base": "base", "model": "a"}}).values()
    assert made["ids"].tolist() == [0, 0]
    only = linear("a", "c", only="w", others={"model": "c"})
    (made,) = shop.run(only).values()
    assert made["ids"].tolist() == [1, 3]


# Quantised inputs.


@pytest.mark.parametrize(
    ("config", "extra"),
    [
        ({"quantization_config": {"bits": 8}}, {}),
        ({"text_config": {"quantization_config": {"bits": 8}}}, {}),
        ({}, {UP.replace(".weight", ".weight_scale"): (1,)}),
        ({}, {UP + "_scale_inv": (1,)}),
        ({}, {UP.replace(".weight", ".qweight"): ("int32", (1,))}),
        ({}, {UP + ".absmax": (1,)}),
    ],
)
def test_quantised_inputs_are_refused_for_computing_and_copied_otherwise(
    llamas: Workshop, config: dict[str, Any], extra: dict[str, Any]
) -> None:
    for name in ("q", "r"):
        llamas.model(name, {**LLAMA, **extra}, config={**CONFIG, **config})
    for nodes in (linear("q", "r"), {"m": {"op": "scale", "model": "q", "by": 2.0}}):
        assert any("'q' is quantised" in line and "without their scales" in line for line in llamas.refused(nodes))
    nested = {"s": {"op": "select", "rules": ["q"]}, **linear("s", "r")}
    assert any("'s' is quantised" in line for line in llamas.refused(nested))
    assert text(rows(llamas.plan({"m": {"op": "passthrough", "model": "q"}}))[UP]) == "q"
    assert text(rows(llamas.plan({}, {"node": "q"}))[UP]) == "q"
    assert text(rows(llamas.plan({"m": {"op": "select", "rules": ["q"]}}))[UP]) == "q"


def test_a_quantised_base_of_an_input_is_told(llamas: Workshop) -> None:
    llamas.model("q", config={**CONFIG, "quantization_config": {"bits": 8}})
    (line,) = llamas.refused(arithmetic("a", {"model": "b", "base": "q"}))
    assert line.startswith("recipe.nodes.m.inputs.1.base: 'q' is quantised")


def test_a_quantised_model_is_known_by_the_names_that_it_stores(llamas: Workshop) -> None:
    scale = UP.replace(".weight", ".weight_scale")
    llamas.model("q", change={scale: (1,)})
    for source in ({"only": ["*.weight"]}, {"rename": {scale: "x"}}):
        models = {"q": {"path": "./q", **source}}
        lines = llamas.refused({"m": {"op": "scale", "model": "q", "by": 2.0}}, models=models)
        assert any(f"'q' is quantised (it has '{scale}')" in line for line in lines)


def test_quantised_tensors_go_out_whole_and_as_they_are_or_not_at_all(llamas: Workshop) -> None:
    config = {**CONFIG, "quantization_config": {"bits": 8}}
    for name in ("q", "r"):
        llamas.model(name, change={UP: ("float8_e4m3fn", (4, 4))}, config=config)

    def kept(plan: Plan) -> bool:
        return keeps_quantisation(plan.rows, "q", plan.models["q"])

    assert kept(llamas.plan({}, {"node": "q"}))
    assert kept(llamas.plan({"m": {"op": "passthrough", "model": "q"}}))
    assert not keeps_quantisation(llamas.plan({}, {"node": "a"}).rows, "a", llamas.plan({}, {"node": "a"}).models["a"])
    norm = {"m": {"op": "select", "rules": [{"match": "*norm*", "model": "r"}, "q"]}}
    up = {"m": {"op": "select", "rules": [{"match": UP, "model": "q"}, "a"]}}
    for nodes, output in (
        (norm, {}),
        (up, {}),
        ({}, {"node": "q", "dtype": "bfloat16"}),
        ({}, {"node": "q", "like": "a"}),
    ):
        (line,) = llamas.refused(nodes, output)
        assert line.startswith("recipe.output: 'q' is quantised (its config.json has a quantization_config)")
        assert f"without all that explains them: '{UP}'" in line
        assert "`like: q`" in line
    plain = {"m": {"op": "select", "rules": [{"match": "*norm*", "model": "q"}, "a"]}}
    assert text(rows(llamas.plan(plain))[NORM]) == "q"
    explained = {"config": {"quantization_config": {"bits": 8}}}
    assert text(rows(llamas.plan(norm, explained))[UP]) == "q"


# Tied heads.

TIED = {"vocab_size": 10, "tie_word_embeddings": True}


def test_a_tied_head_that_is_stored_too_is_dropped_when_equal(shop: Workshop) -> None:
    embedding = torch.arange(40.0).reshape(10, 4)
    for name in ("a", "b"):
        shop.stored(name, {EMBED: embedding, NORM: torch.ones(4), HEAD: embedding.clone()}, config=TIED)
    plan = shop.plan(linear("a", "b"))
    assert HEAD not in rows(plan)
    assert [(pair.kept.name, pair.dropped.name) for pair in plan.equal] == [(EMBED, HEAD)] * 2
    assert "tied to" in plan.notes[0]
    (made,) = shop.run(linear("a", "b")).values()
    assert set(made) == {EMBED, NORM}
    shop.stored("c", {EMBED: embedding, NORM: torch.ones(4), HEAD: embedding + 1}, config={"text_config": TIED})
    with pytest.raises(MergeflowError, match=r"tied: untie"):
        shop.run(linear("a", "c"))
    (trusting,) = shop.run(linear("a", "c"), {"tied": "trust_config"}).values()
    assert set(trusting) == {EMBED, NORM}
    (untied,) = shop.run(linear("a", "c"), {"tied": "untie"}).values()
    assert untied[HEAD][0, 0] == 0.5
    assert untied[EMBED][0, 0] == 0.0


def test_some_tied_and_others_not_is_an_error_that_names_both_words(shop: Workshop) -> None:
    shop.model("t", config=TIED, change={HEAD: None})
    shop.model("u")
    words = "'t' is tied and 'u' is not: write `tied: untie` or `tied: trust_config` under `output:`."
    for order in (("t", "u"), ("u", "t")):
        (line,) = shop.refused(linear(*order))
        assert words in line
        plan = shop.plan(linear(*order), {"tied": "untie"})
        assert text(rows(plan)[HEAD]) == f"linear({', '.join(order)})"
        trusting = shop.plan(linear(*order), {"tied": "trust_config"})
        assert (HEAD in rows(trusting)) is (order[0] == "u")
    head = rows(shop.plan(linear("u", "t"), {"tied": "untie"}))[HEAD]
    assert isinstance(head, Apply)
    load = head.inputs[1]
    assert isinstance(load, Load)
    assert load.tensor.name == EMBED
    everywhere = [{"match": HEAD, "value": 2.0}, {"value": 1.0}]
    assert "fits none" in shop.refused(linear("t", weight=everywhere))[0]


def test_a_tied_head_of_another_shape_is_an_error_when_planning(shop: Workshop) -> None:
    shop.model("t", config=TIED, change={HEAD: (12, 4)})
    (line,) = shop.refused(linear("t"))
    assert "ties 'lm_head.weight' to the embedding, and the file stores another" in line


def test_a_model_that_lends_its_config_or_tokenizer_may_store_any_head(shop: Workshop) -> None:
    without = {HEAD: None}
    for name in ("a", "b"):
        shop.model(name, config=TIED, change=without)
    shop.model("lender", config=TIED)
    shop.model("speaker", config=TIED, change={HEAD: (12, 4)})
    plan = shop.plan(linear("a", "b"), {"like": "lender", "tokenizer": "speaker"})
    assert HEAD not in rows(plan)
    assert plan.equal == ()
    assert plan.notes == ()


# Vocabularies.


def test_vocabularies_of_different_sizes_are_told_with_both(shop: Workshop) -> None:
    shop.model("a")
    shop.model("b", config={"vocab_size": 12}, change={EMBED: (12, 4), HEAD: (12, 4)})
    (line,) = shop.refused(linear("a", "b"))
    assert "the vocabularies differ: 12 rows in 'b', 10 in 'a'" in line
    found = rows(shop.plan(linear("a", "b", mismatch=[{"match": "@vocab", "value": "omit"}, {"value": "error"}])))
    assert text(found[EMBED]) == "a"
    assert text(found[UP]) == "linear(a, b)"


def test_tokens_with_different_ids_are_told_with_the_first_five(shop: Workshop) -> None:
    tokens = list("abcdefghij")
    for name in ("a", "same"):
        shop.model(name, tokens=tokens)
    shop.model("b", tokens=[*"jabcdefghi"])
    shop.model("longer", tokens=[*tokens, "extra"])
    shop.plan(linear("a", "same", "longer"))
    lines = shop.refused(linear("a", "b"))
    assert len(lines) == 1
    assert (
        "recipe.nodes.m.inputs.1: the tokenizers of 'a' and 'b' mean different tokens by 10 ids: 0 is 'a' and 'j'"
        in lines[0]
    )
    assert "4 is 'e' and 'd', and 5 more" in lines[0]
    assert "Write `vocab: ignore` on the node" in lines[0]
    shop.plan(linear("a", "b", vocab="ignore"))
    shop.plan(linear("a", "b", only="@blocks", others={"model": "a"}))
    shop.plan({"m": {"op": "select", "rules": [{"match": "@blocks", "model": "b"}, "a"]}})


def test_tokens_are_compared_of_the_models_that_the_rows_come_from(shop: Workshop) -> None:
    for name in ("a", "base"):
        shop.model(name, tokens=list("abcdefghij"))
    for name in ("b", "c"):
        shop.model(name, tokens=list("jabcdefghi"))
    chosen = {"s": {"op": "select", "rules": [{"match": "@vocab", "model": "b"}, "a"]}}
    (line,) = shop.refused({**chosen, **linear("a", "s")})
    assert line.startswith("recipe.nodes.m.inputs.1: the tokenizers of 'a' and 'b' mean different tokens")
    # The rows of `s` are those of `b`, whatever gives it the rest.
    shop.plan({**chosen, **linear("s", "c")})
    beside = {"s": linear("a", "base", only="@blocks", others={"model": "b"})["m"]}
    (line,) = shop.refused({**beside, **linear("a", "s")})
    assert "'a' and 'b' mean different tokens" in line
    (line,) = shop.refused(arithmetic("a", {"model": "base", "base": "b"}))
    assert line.startswith("recipe.nodes.m.inputs.1.base: the tokenizers of 'base' and 'b'")
    # What one node was told to ignore is not asked again above it.
    ignored = {"s": linear("a", "b", vocab="ignore")["m"]}
    shop.plan({**ignored, **linear("a", "s")})
    (line,) = shop.refused({**ignored, **linear("c", "s")})
    assert "'c' and 'a' mean different tokens" in line


def test_a_tokenizer_that_does_not_speak_the_outputs_words_is_a_warning(shop: Workshop) -> None:
    shop.model("a", tokens=list("abcdefghij"))
    shop.model("b", tokens=list("jabcdefghi"))
    chosen = {"s": {"op": "select", "rules": [{"match": "@vocab", "model": "b"}, "a"]}}
    (warning,) = (line for line in shop.plan(chosen).warnings if "mean different tokens" in line)
    assert warning.startswith("recipe.output.tokenizer: the tokenizers of 'a' and 'b' mean different tokens by 10 ids")
    assert "and 5 more" in warning
    assert "rows of 'b'" in warning
    for nodes, output in ((chosen, {"tokenizer": "b"}), (linear("a", "b", vocab="ignore"), {}), ({}, {"node": "b"})):
        assert not any("mean different tokens" in line for line in shop.plan(nodes, output).warnings)


def test_a_tokenizer_file_that_cannot_be_read_is_told(shop: Workshop) -> None:
    shop.model("a", tokens=list("abc"))
    shop.model("b")
    (shop.folder / "b" / "tokenizer.json").write_text("[1]")
    with pytest.raises(MergeflowError, match=r"b/tokenizer.json: this is no tokenizer file"):
        shop.plan(linear("a", "b"))


def test_sets_are_read_from_headers(shop: Workshop) -> None:
    wide = {"odd_embedding": (10, 4), "odd_head": (10, 4), "norm": (4,), "h.0.up": (10, 4), "head.bias": (10,)}
    shop.model("a", wide)
    shop.model("b", wide)
    rules = [
        {"match": "@vocab", "value": 1.0},
        {"match": "@blocks", "value": 2.0},
        {"match": "@outside", "value": 3.0},
        {"value": 4.0},
    ]
    found = weights(shop.plan(linear("a", "b", weight=rules)))
    assert {name: pair[0] for name, pair in found.items()} == {
        "odd_embedding": 1.0, "odd_head": 1.0, "head.bias": 1.0, "h.0.up": 2.0, "norm": 3.0,
    }  # fmt: skip


# Patterns and settings.


def test_a_pattern_that_fits_nothing_names_the_nearest(llamas: Workshop) -> None:
    rules = [{"match": "*.mpl.*", "value": 1.0}, {"value": 2.0}]
    (line,) = llamas.refused(linear("a", "b", weight=rules))
    assert line == "recipe.nodes.m.weight: the pattern '*.mpl.*' fits none of the 15 tensors. Did you mean '*.mlp.*'?"
    (line,) = llamas.refused(linear({"model": "a", "weight": rules}, "b"))
    assert line.startswith("recipe.nodes.m.inputs.0.weight: ")
    (line,) = llamas.refused(linear("a", "b", only=["x.*", "y.*"], others="mean"))
    assert "the patterns 'x.*, y.*' fit none" in line
    llamas.plan(linear("a", "b", only=["x.*", "*.mlp.*"], others="mean"))
    for key in ("missing", "mismatch", "extra"):
        word = {"extra": "drop"}.get(key, "omit")
        (line,) = llamas.refused(linear("a", "b", **{key: [{"match": "x", "value": word}, {"value": "error"}]}))
        assert line.startswith(f"recipe.nodes.m.{key}: the pattern 'x'")
    (line,) = llamas.refused({"m": {"op": "select", "rules": [{"match": "x", "model": "a"}, "b"]}})
    assert line.startswith("recipe.nodes.m.rules: the pattern 'x'")


def test_patterns_are_checked_against_all_names_of_the_node_asked_for_or_not(llamas: Workshop) -> None:
    rules = [{"match": "*.mlp.*", "value": 1.0}, {"value": 2.0}]
    nodes = {
        "m": {"op": "select", "rules": [{"match": "*.mlp.*", "model": "a"}, "n"]},
        "n": linear("a", "b", weight=rules)["m"],
    }
    llamas.plan(nodes)


def test_a_rule_hidden_by_those_before_it_is_a_warning(llamas: Workshop) -> None:
    rules = [{"match": "*.mlp.*", "value": 1.0}, {"match": "*.up_proj.*", "value": 3.0}, {"value": 2.0}]
    plan = llamas.plan(linear("a", "b", weight=rules))
    assert plan.warnings == ("recipe.nodes.m.weight: the rule '*.up_proj.*' is hidden by the rules before it",)
    own = {"model": "a", "weight": [{"match": "*.mlp.*", "value": 5.0}]}
    plan = llamas.plan(linear(own, "b", weight=[{"match": "*.mlp.*", "value": 1.0}, {"value": 2.0}]))
    assert plan.warnings == ()
    assert weights(plan)[UP] == (5.0, 1.0)
    assert weights(plan)[NORM] == (2.0, 2.0)


def test_a_gradient_runs_over_the_layers_and_asks_for_what_is_outside(llamas: Workshop) -> None:
    (line,) = llamas.refused(linear({"model": "a", "weight": {"gradient": [0.0, 3.0]}}, "b"))
    assert "at 'model.embed_tokens.weight', 'model.norm.weight', 'lm_head.weight'" in line
    assert "Add `outside: 0.0` beside `gradient:`" in line
    own = {"model": "a", "weight": {"gradient": [0.0, 3.0], "outside": 7.0}}
    found = weights(llamas.plan(linear(own, "b")))
    assert [found[f"model.layers.{layer}.mlp.up_proj.weight"][0] for layer in range(4)] == [0.0, 1.0, 2.0, 3.0]
    assert found[NORM] == (7.0, 1.0)
    own["weight"] = {"gradient": [0.0, 3.0], "over": "2-3", "outside": 9.0}
    found = weights(llamas.plan(linear(own, "b")))
    assert [found[f"model.layers.{layer}.mlp.up_proj.weight"][0] for layer in range(4)] == [9.0, 9.0, 0.0, 3.0]
    own["weight"] = {"gradient": [0.0, 3.0], "over": "7-9", "outside": 9.0}
    (line,) = llamas.refused(linear(own, "b"))
    assert line.endswith("`over: 7-9` covers none of the layers. Layers run from 0 to 3.")


def test_a_gradient_over_no_layer_at_all_is_a_warning(llamas: Workshop) -> None:
    gradient = {"gradient": [0.0, 1.0], "outside": 0.5}
    llamas.model("flat", {"x": (4,), "y": (4,)})
    words = "the gradient never applies, since none of its tensors is in a numbered layer: all take `outside: 0.5`"
    flat = {"m": {"op": "scale", "model": "flat", "by": gradient}}
    assert llamas.plan(flat).warnings == (f"recipe.nodes.m.by: {words}",)
    rules = [{"match": "@outside", "value": gradient}, {"value": 1.0}]
    assert llamas.plan(linear("a", "b", weight=rules)).warnings == (f"recipe.nodes.m.weight: {words}",)
    assert llamas.plan(linear("a", "b", weight=gradient, normalize=False)).warnings == ()


def test_weights_that_sum_to_zero_somewhere_are_an_error_with_the_place(llamas: Workshop) -> None:
    rules = [{"match": "*.norm.*", "value": -1.0}, {"value": 1.0}]
    (line,) = llamas.refused(linear("a", {"model": "b", "weight": rules}))
    assert line.startswith("recipe.nodes.m: at 'model.norm.weight': ")


def test_all_problems_of_headers_come_at_once(llamas: Workshop) -> None:
    llamas.model("small", change={NORM: None})
    llamas.model("wide", change={UP: (5, 4)})
    llamas.model("q", config={**CONFIG, "quantization_config": {}, "text_config": {"quantization_config": {"x": 1}}})
    lines = llamas.refused(
        linear("a", "small", "wide", weight=[{"match": "zz", "value": 1.0}, {"value": 1.0}]), {"like": "base"}
    )
    assert len(lines) == 3


# The plan as a whole.


def test_several_outputs_are_one_plan(llamas: Workshop) -> None:
    nodes = {**linear("a", "b"), "n": {"op": "linear", "inputs": ["a", "base"]}}
    plan = llamas.plan(nodes, outputs={"x": {"node": "m", "dtype": "float16"}, "y": {"node": "n"}, "z": {"node": "a"}})
    assert [row.output for row in plan.rows] == ["x"] * 15 + ["y"] * 15 + ["z"] * 15
    assert {(row.output, row.dtype.name) for row in plan.rows} == {
        ("x", "float16"),
        ("y", "bfloat16"),
        ("z", "bfloat16"),
    }
    assert [(shard.output, shard.file) for shard in plan.shards] == [(key, "model.safetensors") for key in "xyz"]
    assert all(plan.shards[row.shard].output == row.output for row in plan.rows)
    lines = llamas.refused(nodes, outputs={"x": {"node": "m", "tied": "untie"}, "y": {"node": "n"}})
    assert "the outputs say different things in `tied`" in lines[0]


def test_non_finite_keep_turns_the_look_off(llamas: Workshop) -> None:
    assert all(row.check_finite for row in llamas.plan(linear("a", "b")).rows)
    assert not any(row.check_finite for row in llamas.plan(linear("a", "b"), {"non_finite": "keep"}).rows)


def test_one_input_is_given_as_it_is(llamas: Workshop) -> None:
    for nodes in (
        linear("a"),
        {"m": {"op": "passthrough", "model": "a"}},
        {"m": {"op": "scale", "model": "a", "by": 1}},
    ):
        assert {text(one) for one in rows(llamas.plan(nodes)).values()} == {"a"}


def test_the_digest_changes_with_what_decides_the_result(llamas: Workshop) -> None:
    plan = llamas.plan(linear("a", "b"))
    assert llamas.plan(linear("a", "b")).digest == plan.digest
    assert llamas.plan(linear("a", "b", weight=2.0)).parts["the recipe"] != plan.parts["the recipe"]
    assert llamas.plan(linear("a", "b"), {"shard_size": 10}).digest != plan.digest
    os.utime(llamas.folder / "a" / "model.safetensors", (1, 1))
    changed = llamas.plan(linear("a", "b"))
    assert {key for key in plan.parts if plan.parts[key] != changed.parts[key]} == {
        "the inputs' files (size or time of change)"
    }


def test_the_plan_does_not_depend_on_the_hash_seed(llamas: Workshop) -> None:
    llamas.model("c", change={f"extra.{index}.w": (2,) for index in range(8)} | {NORM: None})
    recipe = llamas.recipe(
        {
            **linear("a", "c", "b", extra="keep", missing="omit"),
            "s": {"op": "select", "rules": [{"match": "*.mlp.*", "model": "c"}, "m"]},
        }
    )
    path = llamas.folder.parent / "r.yaml"
    path.write_text(recipe.text().replace("./", "./models/"))
    code = (
        "import sys, mergeflow as m; p = m.plan(m.load_recipe(sys.argv[1])); print(p.digest, [r.name for r in p.rows])"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code, str(path)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True, capture_output=True, text=True,
        ).stdout
        for seed in ("0", "1")
    }  # fmt: skip
    assert len(printed) == 1


def test_a_chain_of_two_hundred_nodes_is_planned(shop: Workshop) -> None:
    shop.model("a", {"w": (2,)})
    nodes = {f"n{i}": {"op": "scale", "by": 2.0, "model": f"n{i + 1}" if i < 199 else "a"} for i in range(200)}
    assert text(rows(shop.plan(nodes))["w"]).count("scale") == 200


def test_thirty_thousand_tensors_through_two_nodes_are_planned_quickly(shop: Workshop) -> None:
    tensors = {f"model.layers.{i // 300}.experts.{i % 300}.w.weight": (64, 64) for i in range(30_000)}
    for name in ("a", "b", "c"):
        shop.model(name, tensors, config=None)
    nodes = {
        "m": {"op": "task_arithmetic", "base": "a", "weight": 0.3, "inputs": ["b", "c"]},
        "s": linear(
            "m", {"model": "a", "weight": [{"match": "*.{3-9}.*", "value": {"gradient": [0.1, 0.9]}}, {"value": 0.4}]}
        )["m"],
    }
    plans: list[Plan] = []
    assert seconds(lambda: plans.append(shop.plan(nodes)), 6) < 6  # some 2 s; the benchmark holds the figure
    assert len(plans[0].rows) == 30_000


def test_many_problems_of_many_tensors_are_told_quickly(shop: Workshop) -> None:
    tensors = {f"model.layers.{i // 300}.experts.{i % 300}.w.weight": (4,) for i in range(30_000)}
    shop.model("a", tensors, config=None)
    shop.model("b", {f"x.{name}": (4,) for name in tensors}, config=None)
    shop.model("c", {f"y{i}.{name}": (4,) for i, name in enumerate(tensors)}, config=None)
    nodes = linear("a", "b", "c", weight={"gradient": [0, 1], "over": "0-3"}, only="*.expert.*", others="mean")
    lines: list[str] = []
    assert seconds(lambda: lines.extend(shop.refused(nodes)), 6) < 6
    assert lines and len(set(lines)) < 10


def test_the_numbers_are_those_of_plain_torch(shop: Workshop) -> None:
    generator = torch.Generator().manual_seed(0)
    made = {
        name: {key: torch.randn(shape, generator=generator) for key, shape in LLAMA.items()}
        for name in ("base", "a", "b", "c")
    }
    for name, tensors in made.items():
        shop.stored(name, tensors, config=CONFIG)
    nodes = {
        "d": {"op": "task_vector", "base": "base", "model": "b"},
        "m": {
            "op": "task_arithmetic",
            "base": "base",
            "inputs": [
                {"model": "a", "weight": 0.5},
                {"model": "d", "weight": [{"match": "*.mlp.*", "value": 2.0}]},
                {"model": "c", "base": "a"},
            ],
            "scale": {"gradient": [0.0, 1.0], "outside": 0.5},
        },
        "s": {"op": "select", "rules": [{"match": "*norm*", "model": {"op": "scale", "by": 3.0, "model": "a"}}, "m"]},
    }
    (found,) = shop.run(nodes).values()
    base, a, b, c = (made[name] for name in ("base", "a", "b", "c"))
    for name in LLAMA:
        layer = int(name.split(".")[2]) if "layers" in name else None
        scale = 0.5 if layer is None else layer / 3
        delta = (
            0.5 * (a[name] - base[name]) + (2.0 if "mlp" in name else 1.0) * (b[name] - base[name]) + c[name] - a[name]
        )
        wanted = 3 * a[name] if "norm" in name else base[name] + scale * delta
        torch.testing.assert_close(found[name], wanted, rtol=1e-6, atol=1e-6)


def test_a_mean_op_is_the_ops_own() -> None:
    from mergeflow.ops import Scale
    from mergeflow.planning.expressions import mean_like

    assert isinstance(mean_like(TaskVector(), based=True), TaskVector)
    assert isinstance(mean_like(Scale(by=2.0), based=False), Linear)
    assert isinstance(mean_like(Ties(), based=True), TaskArithmetic)

"""A recipe's grammar: each sentence of the contract that needs no model, and what a wrong recipe is told."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from clock import seconds

from mergeflow.errors import MergeflowError, Problems, RecipeError
from mergeflow.ops import Linear, Slerp, TaskArithmetic, Ties
from mergeflow.recipe import Recipe, load_recipe, parse_size, read_settings
from mergeflow.settings import Each, Gradient, Place, value_at

MODELS = {"a": "./a", "b": "./b", "base": "./base"}


def load(tmp_path: Path, text: str, *settings: str, file: str = "chat.yaml") -> Recipe:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return load_recipe(path, settings=read_settings(settings))


def node(**given: Any) -> Any:
    """The one node of a recipe built in Python."""
    return Recipe(models=MODELS, nodes={"m": given}).nodes["m"]


def problems(tmp_path: Path, text: str, *settings: str) -> list[str]:
    """What a wrong recipe is told, line by line, without the folder."""
    with pytest.raises(MergeflowError) as caught:
        load(tmp_path, text, *settings)
    errors = caught.value.errors if isinstance(caught.value, Problems) else (caught.value,)
    assert all(error.where and error.exit_code == 2 for error in errors)
    return [str(error).removeprefix(f"{tmp_path}/") for error in errors]


HEAD = "recipe: 1\nmodels: {a: ./a, b: ./b, base: ./base}\n"


# The top level.


def test_a_recipe_has_what_its_file_says(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        """
recipe: 1
name: chat-math
description: A chat model that can count.
seed: 7
vars: {math_weight: 0.6}
x-rules: &attention ["*.self_attn.*", "*.attention.*"]
models:
  base: {path: meta-llama/Llama-3.2-1B, revision: 4e20de3}
  chat: org/chat-1b@9f31c2
  math: ./math
  tower: {path: org/vlm, only: "language_model.*", rename: {"language_model.*": "*"}}
  code: {path: ./code-delta, space: delta}
nodes:
  skills:
    op: task_arithmetic
    base: base
    inputs:
      - {model: chat, weight: 0.4}
      - {model: math, weight: "${math_weight}"}
      - code
    scale:
      - {match: "*.mlp.*", value: {gradient: [0.2, 0.8, 0.5]}}
      - {value: 1.0}
  result:
    op: linear
    inputs: [chat, math]
    only: *attention
    others: {model: skills}
output:
  node: result
  like: base
  tokenizer: chat
  dtype: bfloat16
  shard_size: 5GB
  config: {max_position_embeddings: 8192}
  card: {license: llama3.2, tags: [math]}
""",
    )
    assert (recipe.name, recipe.description, recipe.seed) == ("chat-math", "A chat model that can count.", 7)
    assert recipe.models["base"].revision == "4e20de3"
    assert recipe.models["chat"].path == "org/chat-1b@9f31c2"
    assert recipe.models["tower"].only == ("language_model.*",)
    assert recipe.models["code"].space == "delta"
    skills, result = recipe.nodes["skills"], recipe.nodes["result"]
    assert isinstance(skills.op, TaskArithmetic)
    assert skills.op.weight == Each((0.4, 0.6, 1.0))
    assert [one.model for one in skills.inputs] == ["chat", "math", "code"]
    assert value_at(skills.op.scale, Place("layers.1.mlp.w", 1, (0, 1, 2))) == 0.8
    assert result.only == ("*.self_attn.*", "*.attention.*")
    assert result.others == "skills"
    output = recipe.outputs[""]
    assert (output.node, output.like, output.tokenizer, output.dtype) == ("result", "base", "chat", "bfloat16")
    assert output.shard_size == 5 * 10**9
    assert output.config == {"max_position_embeddings": 8192}
    assert "x-rules" not in recipe.resolved
    assert "vars" not in recipe.resolved
    assert recipe.resolved["nodes"]["skills"]["inputs"][1]["weight"] == 0.6


def test_the_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    text = HEAD + "vars: {w: 0.25, r: 0123}\nname: n-${r}\ndescription: '$${w} stays'\n"
    text += "nodes: {m: {op: linear, inputs: [{model: a, weight: '${w}'}, b]}}\noutput: {card: {note: '$${x} $$ y'}}\n"
    recipe = load(tmp_path, text)
    assert recipe.description == "${w} stays"
    assert recipe.outputs[""].card == {"note": "${x} $$ y"}
    again = load(tmp_path, recipe.text(), file="other.yaml")
    assert again.resolved == recipe.resolved
    assert again.text() == recipe.text()
    assert (again.name, again.description) == ("n-0123", "${w} stays")
    assert again.outputs[""].card == recipe.outputs[""].card


@pytest.mark.parametrize(
    ("file", "name"),
    [("chat.yaml", "chat"), ("soup/merge.yaml", "soup"), ("soup/recipe.yaml", "soup"), ("v1.2.yaml", "v1.2")],
)
def test_the_name_is_the_files_or_its_folders(tmp_path: Path, file: str, name: str) -> None:
    assert load(tmp_path, HEAD + "output: {node: a}", file=file).name == name


@pytest.mark.parametrize("name", ["-a", "a b", "'a\n'", ".a", "a/b", "''", "[a]", "a" * 97])
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    (line,) = problems(tmp_path, HEAD + f"output: {{node: a}}\nname: {name}\n")
    assert "cannot be the recipe's name" in line
    assert line.startswith("chat.yaml:4:7:")


def test_a_file_name_that_is_no_name_asks_for_one(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Add `name:`"):
        load(tmp_path, HEAD + "output: {node: a}", file="my recipe.yaml")


def test_words_keep_their_text_as_written(tmp_path: Path) -> None:
    text = (
        "recipe: 1\nname: 0123\nmodels: {a: {path: 007, revision: 0123, subfolder: 1e3, file: true}, b: 1_0, c: 0x1F}\n"
    )
    recipe = load(tmp_path, text + "output: {node: a}")
    assert recipe.name == "0123"
    a = recipe.models["a"]
    assert (a.path, a.revision, a.subfolder, a.file) == ("007", "0123", "1e3", "true")
    assert recipe.models["c"].path == "0x1F"
    assert load(tmp_path, recipe.text(), file="b.yaml").models == recipe.models


def test_numbers_follow_yaml_1_2(tmp_path: Path) -> None:
    recipe = load(tmp_path, HEAD + "nodes: {m: {op: linear, weight: 1e-5, inputs: [a, b]}}\noutput: {card: {on: no}}")
    assert recipe.nodes["m"].op.weight == 1e-5  # type: ignore[attr-defined]
    assert recipe.outputs[""].card == {"on": "no"}


def test_nodes_may_be_empty_and_an_output_may_be_a_model(tmp_path: Path) -> None:
    recipe = load(tmp_path, HEAD + "output: {node: b}")
    assert recipe.outputs[""].node == "b"
    assert not recipe.nodes
    assert load(tmp_path, "recipe: 1\nmodels: {a: ./a}\nnodes:\n").outputs[""].node == "a"


def test_the_output_is_the_node_that_no_other_uses(tmp_path: Path) -> None:
    nodes = "nodes: {x: {op: linear, inputs: [y, a]}, y: {op: linear, inputs: [a, b]}}"
    assert load(tmp_path, HEAD + nodes).outputs[""].node == "x"
    (line,) = problems(tmp_path, HEAD + "nodes: {x: {op: linear, inputs: [a]}, y: {op: linear, inputs: [a, b]}}")
    assert "which node is the output? x, y are used by no other node. Name it: `output: {node: NAME}`." in line
    assert "the recipe has no nodes" in problems(tmp_path, HEAD)[0]


def test_several_outputs_have_keys(tmp_path: Path) -> None:
    nodes = "nodes: {x: {op: linear, inputs: [a, b]}, y: {op: linear, inputs: [a, base]}}\n"
    recipe = load(tmp_path, HEAD + nodes + "outputs: {one: {node: x, like: a}, two: {node: y}}")
    assert {key: output.node for key, output in recipe.outputs.items()} == {"one": "x", "two": "y"}
    assert recipe.outputs["one"].key == "one"
    both = problems(tmp_path, HEAD + nodes + "outputs: {one: {node: x}}\noutput: {node: x}")
    assert any("not both" in line for line in both)
    assert "names none" in problems(tmp_path, HEAD + nodes + "outputs: {}")[0]
    assert "'a b' cannot be a name" in problems(tmp_path, HEAD + nodes + "outputs: {a b: {node: x}}")[0]


# Variables.

VARS = HEAD + "vars: {w: 0.5, on: true, word: hello, rev: 0123}\n"


def test_a_variable_alone_keeps_its_type(tmp_path: Path) -> None:
    text = VARS + "nodes: {m: {op: linear, inputs: [{model: a, weight: '${w}'}, b], normalize: '${on}'}}\nseed: ${n}\n"
    recipe = load(tmp_path, text.replace("vars: {", "vars: {n: 3, "))
    assert recipe.nodes["m"].op == Linear(weight=[0.5, 1.0], normalize=True)
    assert recipe.seed == 3


def test_a_variable_inside_a_word_is_its_text(tmp_path: Path) -> None:
    text = (
        VARS.replace("./a", "'./m-${rev}'").replace("./base", "'${word}/x'")
        + "name: n-${rev}-${word}\noutput: {node: a}"
    )
    recipe = load(tmp_path, text)
    assert recipe.name == "n-0123-hello"
    assert recipe.models["a"].path == "./m-0123"
    assert recipe.models["base"].path == "hello/x"
    text = VARS.replace("./a", "{path: x/y, revision: '${rev}'}") + "output: {node: a}"
    assert load(tmp_path, text).models["a"].revision == "0123"
    assert load(tmp_path, text, "rev=0777").models["a"].revision == "0777"
    assert load(tmp_path, text, "rev='0778'").models["a"].revision == "0778"


@pytest.mark.parametrize(
    "rest",
    [
        "description: a ${word}\noutput: {node: a}",
        "output: {node: a, card: {name: 'x ${word}'}}",
        "output: {node: a, like: 'x${word}'}",
        "nodes: {m: {op: linear, inputs: [a, b], only: 'x.${word}.*', others: mean}}",
    ],
)
def test_a_variable_inside_another_text_is_refused(tmp_path: Path, rest: str) -> None:
    assert "inside a longer text works only in `name`, `path` and `revision`" in problems(tmp_path, VARS + rest)[0]


def test_keys_and_anchors_are_never_substituted(tmp_path: Path) -> None:
    recipe = load(tmp_path, VARS + "x-y: ${nothing}\noutput: {node: a, card: {'${word}': 1}}")
    assert recipe.outputs[""].card == {"${word}": 1}
    assert load(tmp_path, recipe.text(), file="b.yaml").outputs[""].card == {"${word}": 1}


def test_set_gives_a_declared_variable_another_value_and_makes_another_recipe(tmp_path: Path) -> None:
    text = VARS + "nodes: {m: {op: linear, weight: '${w}', inputs: [a, b]}}"
    recipe = load(tmp_path, text, "w=1e-2")
    assert recipe.nodes["m"].op.weight == 0.01  # type: ignore[attr-defined]
    assert recipe.resolved["nodes"]["m"]["weight"] == 0.01
    assert recipe.resolved != load(tmp_path, text).resolved
    assert problems(tmp_path, text, "wort=1") == ["--set: the recipe has no variable 'wort'. Did you mean 'word'?"]
    assert "cannot be 'high': it is a number" in problems(tmp_path, text, "w=high")[0]
    for word, what in (("w", "has no value"), ("w=[1]", "no scalar"), ("w={a: 1}", "no scalar")):
        with pytest.raises(RecipeError, match=what):
            read_settings([word])


def test_variables_are_named_and_scalar(tmp_path: Path) -> None:
    end = "output: {node: a}\n"
    assert "no scalar" in problems(tmp_path, HEAD + end + "vars: {w: [1]}")[0]
    assert "cannot be a name" in problems(tmp_path, HEAD + end + "vars: {1w: 1}")[0]
    assert "a mapping of names to values" in problems(tmp_path, HEAD + end + "vars: [1]")[0]
    (line,) = problems(tmp_path, HEAD + "vars: {weight: 1}\nnodes: {m: {op: linear, weight: '${wieght}', inputs: [a]}}")
    assert line == "chat.yaml:4:33: there is no variable 'wieght'. Did you mean 'weight'?"
    (line,) = problems(tmp_path, HEAD + "nodes: {m: {op: linear, inputs: ['${x}', a]}}")
    assert "there is no variable 'x'. Declare it under `vars:`." in line
    (line,) = problems(tmp_path, HEAD.replace("./a", "'x${'") + end)
    assert "'${' is not closed" in line


# Nodes and inputs.


def test_short_forms_mean_the_long_ones() -> None:
    short = Recipe(models=MODELS, nodes={"m": {"op": "linear", "inputs": ["a", "b"]}})
    long = Recipe(models=MODELS, nodes={"m": {"op": "linear", "inputs": [{"model": "a"}, {"model": "b"}]}})
    assert short.nodes == long.nodes
    one = node(op="task_vector", base="base", model="a")
    assert [x.model for x in one.inputs] == ["a"]
    assert one.base == "base"
    assert node(op="scale", model="a", by=0.5).op.by == 0.5


def test_an_inputs_own_parameter_wins_and_its_rules_fall_back_to_the_nodes() -> None:
    own = [{"match": "*.mlp.*", "value": 0.1}]
    given = node(
        op="ties", base="base", density=0.4, inputs=[{"model": "a", "density": own}, {"model": "b", "weight": 2}]
    )
    assert isinstance(given.op, Ties)
    assert value_at(given.op.density, Place("x.mlp.w")) == (0.1, 0.4)
    assert value_at(given.op.density, Place("x")) == (0.4, 0.4)
    assert value_at(given.op.weight, Place("x")) == (1.0, 2.0)
    rules = [{"match": "*.mlp.*", "value": 0.2}, {"value": 0.9}]
    given = node(
        op="ties", base="base", density=rules, inputs=[{"model": "a", "density": [{"match": "x", "value": 0.5}]}]
    )
    assert [value_at(given.op.density, Place(name)) for name in ("x", "a.mlp.b", "y")] == [(0.5,), (0.2,), (0.9,)]


def test_a_node_may_stand_in_place_and_is_named_by_its_position() -> None:
    inner = {"op": "task_vector", "base": "base", "model": "a"}
    nodes = {
        "m": {
            "op": "task_arithmetic",
            "base": {"op": "linear", "inputs": ["base", "b"]},
            "inputs": ["a", inner, {"model": {"op": "scale", "by": 2.0, "model": inner}, "weight": 0.3}],
        },
        "pick": {"op": "select", "rules": [{"match": "x", "model": {"op": "scale", "model": "a", "by": 1}}, "m"]},
        "t": {"op": "cast", "to": "float16", "model": {"op": "linear", "inputs": ["pick"]}},
        "o": {"op": "linear", "inputs": ["t"], "only": "x", "others": {"op": "linear", "inputs": ["a"]}},
    }
    recipe = Recipe(models=MODELS, nodes=nodes)
    assert set(recipe.nodes) == {"m", "m.base", "m.1", "m.2", "m.2.0", "pick", "pick.0", "t", "t.0", "o", "o.others"}
    assert [one.model for one in recipe.nodes["m"].inputs] == ["a", "m.1", "m.2"]
    assert recipe.nodes["m"].base == "m.base"
    assert recipe.nodes["m"].op.weight == Each((1.0, 1.0, 0.3))  # type: ignore[attr-defined]
    assert recipe.nodes["o"].others == "o.others"
    own = {"op": "ties", "base": "base", "inputs": [{"model": "a", "base": {"op": "linear", "inputs": ["b"]}}]}
    assert Recipe(models=MODELS, nodes={"m": own}).nodes["m"].inputs[0].base == "m.0.base"


def test_a_problem_in_place_has_its_place(tmp_path: Path) -> None:
    (line,) = problems(tmp_path, HEAD + "nodes:\n  m: {op: linear, inputs: [a, {op: scale, model: b, bye: 2, by: 1}]}")
    assert line == "chat.yaml:4:53: unknown key 'bye'. Did you mean 'by'?"


def test_references_may_come_in_any_order(tmp_path: Path) -> None:
    recipe = load(tmp_path, HEAD + "nodes: {x: {op: linear, inputs: [y]}, y: {op: linear, inputs: [a]}}")
    assert list(recipe.nodes) == ["x", "y"]


@pytest.mark.parametrize(
    ("nodes", "what"),
    [
        ("{m: {op: linear, inputs: [a, c]}}", "3:37: there is no model or node 'c'. There are a, b, base, m."),
        ("{m: {op: linear, inputs: [bas]}}", "3:34: there is no model or node 'bas'. Did you mean 'base'?"),
        ("{m: {op: ties, base: bse, inputs: [a]}}", "3:29: there is no model or node 'bse'. Did you mean 'base'?"),
        ("{m: {op: linear, inputs: [a], only: x, others: {model: q}}}", "3:63: there is no model or node 'q'"),
        ("{m: {op: linear, inputs: [m]}}", "3:9: the nodes go in a circle: m -> m. A node cannot need itself."),
        ("{m: {op: linear, inputs: [n]}, n: {op: linear, inputs: [m]}}", "the nodes go in a circle: m -> n -> m"),
        ("{a: {op: linear, inputs: [b]}}", "3:9: 'a' is a model already. Models, artifacts and nodes share their names"),
        ("{1m: {op: linear, inputs: [b]}}", "'1m' cannot be a name"),
        ("{m: linear}", "3:12: a node is a mapping with an `op`"),
        ("{m: {inputs: [a]}}", "3:12: the node has no `op`. Write e.g. `op: linear`."),
        ("{m: {op: 3, inputs: [a]}}", "3:17: the node has no `op`"),
        ("{m: {op: liner, inputs: [a]}}", "3:17: unknown op 'liner'. Did you mean 'linear'?"),
        ("{m: {op: linear, inputs: [a], wieght: 1}}", "3:38: unknown key 'wieght'. Did you mean 'weight'?"),
        ("{m: {op: linear, inputs: [{model: a, wieght: 1}]}}", "3:45: unknown key 'wieght'. Did you mean 'weight'?"),
        ("{m: {op: linear, inputs: [a], zzz: 1}}", "unknown key 'zzz'. Keys here are op, inputs, "),
        ("{m: {op: linear, inputs: []}}", "`inputs` cannot be []"),
        ("{m: {op: linear}}", "`inputs` is missing. Add `inputs:`"),
        ("{m: {op: linear, inputs: a}}", "`inputs` cannot be 'a': it is a list"),
        ("{m: {op: linear, inputs: [3]}}", "it is a name or a mapping with `model:`"),
        ("{m: {op: linear, inputs: [a], base: b}}", "3:38: `linear` has no `base`"),
        ("{m: {op: task_vector, base: a, inputs: [b]}}", "`task_vector` has no `inputs`. It takes one `model:`."),
        ("{m: {op: linear, model: b}}", "`linear` has no `model`. It takes a list of `inputs:`."),
        ("{m: {op: task_vector, model: b}}", "`base` is missing"),
        ("{m: {op: scale, model: b}}", "`by` is missing"),
        ("{m: {op: slerp, inputs: [a, b]}}", "`t` is missing"),
        ("{m: {op: slerp, t: 0.5, inputs: [a]}}", "`slerp` takes 2 inputs, not 1"),
        ("{m: {op: slerp, t: 0.5, inputs: [a, b, base]}}", "`slerp` takes 2 inputs, not 3"),
        ("{m: {op: slerp, t: 1.5, inputs: [a, b]}}", "`t` cannot be 1.5: it should be less than or equal to 1"),
        ("{m: {op: ties, base: a, density: 0, inputs: [b]}}", "`density` cannot be 0: it should be greater than 0"),
        ("{m: {op: linear, weight: .nan, inputs: [b]}}", "nan"),
        ("{m: {op: linear, weight: '1', inputs: [b]}}", "`weight` cannot be '1': it is a number"),
        ("{m: {op: linear, normalize: 1, inputs: [b]}}", "`normalize` cannot be 1: it is true or false"),
        ("{m: {op: linear, missing: bse, inputs: [b]}}", "Did you mean 'base'?"),
        ("{m: {op: linear, missing: keep, inputs: [b]}}", "it should be 'error', 'base' or 'omit'"),
        ("{m: {op: linear, extra: base, inputs: [b]}}", "it should be 'error', 'drop' or 'keep'"),
        ("{m: {op: linear, vocab: union, inputs: [b]}}", "it should be 'error' or 'ignore'"),
        ("{m: {op: linear, only: x, inputs: [b]}}", "3:25: `only` needs `others`. Say where"),
        ("{m: {op: linear, others: mean, inputs: [b]}}", "3:25: `others` needs `only`"),
        ("{m: {op: linear, only: x, others: a, inputs: [b]}}", "Write `others: {model: a}`."),
        ("{m: {op: select, rules: [{match: x, model: a}]}}", "only the last rule has no `match`"),
        ("{m: {op: select, rules: [a, b]}}", "only the last rule has no `match`"),
        ("{m: {op: linear, weight: [{match: x, value: 1}], inputs: [b]}}", "the last rule needs to have no `match`"),
        ("{m: {op: linear, weight: [{value: 1}, {value: 1}], inputs: [b]}}", "only the last rule may leave out `match`"),
        ("{m: {op: linear, weight: [0.1, 0.9], inputs: [b]}}", "Write `{gradient: [0.1, 0.9]}`.".lower()),
        ("{m: {op: linear, weight: {gradient: [1]}, inputs: [b]}}", "`gradient` cannot be [1]"),
        ("{m: {op: linear, weight: {gradient: [1, 2], over: 3}, inputs: [b]}}", "`over` cannot be 3"),
        ("{m: {op: linear, weight: {gradient: [1, 2], outsid: 3}, inputs: [b]}}", "Did you mean 'outside'?"),
        ("{m: {op: linear, weight: [{match: {0-3}, value: 1}, {value: 2}], inputs: [b]}}", 'Write `match: "{0-3}"`.'),
        ("{m: {op: linear, only: {q,k}, others: mean, inputs: [b]}}", 'Write `only: "{q,k}"`.'),
        ("{m: {op: linear, only: '{3-1}', others: mean, inputs: [b]}}", "runs backwards"),
        ("{m: {op: linear, only: '@x', others: mean, inputs: [b]}}", "unknown set '@x'"),
        ("{m: {op: linear, only: *.mlp.*, others: mean, inputs: [b]}}", 'needs quotes: "*.mlp.*"'),
        ("{m: {op: linear, only: @vocab, others: mean, inputs: [b]}}", 'Put it in quotes: "@vocab".'),
    ],
)  # fmt: skip
def test_a_wrong_node_is_told_what_is_wrong(tmp_path: Path, nodes: str, what: str) -> None:
    lines = problems(tmp_path, HEAD + f"nodes: {nodes}")
    assert len(lines) == 1, lines
    assert what.lower() in lines[0].lower()


@pytest.mark.parametrize(
    ("models", "what"),
    [
        ("{a: {}}", "2:13: `path` is missing"),
        ("{a: }", "2:13: this is a mapping, not nothing"),
        ("{a: ''}", "cannot be ''"),
        ("{a: [x]}", "2:13: this is a mapping, not a list"),
        ("{a: {path: ./x, revison: 1}}", "2:25: unknown key 'revison'. Did you mean 'revision'?"),
        ("{a: {path: ./x, space: weights}}", "Did you mean 'weight'?"),
        ("{a: {path: ./x, only: []}}", "a list of patterns needs at least one"),
        ("{a: {path: ./x, rename: {'a.*': b}}}", "needs the same star on both sides"),
        ("{a: {path: ./x, rename: {'*.*': '*.*'}}}", "needs the same star on both sides"),
        ("{a.b: ./x}", "'a.b' cannot be a name"),
        ("{'': ./x}", "'' cannot be a name"),
        ("{}", "the recipe has no `models:`"),
        ("[a, b]", "a mapping of names to checkpoints"),
        ("{a: {path: ./x, adapter: ./lora}}", "2:25: a model has `path` or `adapter`, not both"),
        ("{a: {adapter: ./lora, file: x.safetensors}}", "`file` says nothing here"),
        ("{a: {adapter: ./lora, space: delta}}", "`space` says nothing here: an adapter is always a delta"),
        ("{a: {adapter: ''}}", "cannot be ''"),
    ],
)
def test_a_wrong_model_is_told_what_is_wrong(tmp_path: Path, models: str, what: str) -> None:
    lines = problems(tmp_path, f"recipe: 1\nmodels: {models}\n" + "output: {node: a}" * ("a:" in models))
    assert len(lines) == 1, lines
    assert what in lines[0]


@pytest.mark.parametrize(
    ("output", "what"),
    [
        ("{node: x}", "there is no model or node 'x'"),
        ("{node: a, like: m}", "there is no model 'm'"),
        ("{node: a, tokenizer: bas}", "there is no model 'bas'. Did you mean 'base'?"),
        ("{node: a, dtype: bf16}", "Did you mean 'bfloat16'?"),
        ("{node: a, dtype: int8}", "`dtype` cannot be 'int8'"),
        ("{node: a, shard_size: 5}", ""),
        ("{node: a, shard_size: 5 gigs}", "a size is written as 5GB"),
        ("{node: a, shard_size: 0GB}", "greater than or equal to 1"),
        ("{node: a, tied: both}", "it should be 'untie' or 'trust_config'"),
        ("{node: a, non_finite: drop}", "it should be 'error' or 'keep'"),
        ("{node: a, dtyp: x}", "unknown key 'dtyp'. Did you mean 'dtype'?"),
        ("{node: {op: linear, inputs: [a]}}", "an output names its node"),
        ("[a]", "`output`"),
    ],
)
def test_a_wrong_output_is_told_what_is_wrong(tmp_path: Path, output: str, what: str) -> None:
    text = HEAD + f"nodes: {{m: {{op: linear, inputs: [a]}}}}\noutput: {output}"
    if not what:
        load(tmp_path, text)
        return
    lines = problems(tmp_path, text)
    assert len(lines) == 1, lines
    assert what in lines[0]
    assert lines[0].startswith("chat.yaml:4:")


def test_the_output_dtype_may_be_rules(tmp_path: Path) -> None:
    rules = "[{match: '@vocab', value: float32}, {value: bfloat16}]"
    output = load(tmp_path, HEAD + f"output: {{node: a, dtype: {rules}}}").outputs[""]
    assert value_at(output.dtype, Place("x", vocab=True)) == "float32"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("models: {a: ./a}", "the version of the format is missing. Start with the line `recipe: 1`."),
        ("recipe: 2\nmodels: {a: ./a}", "1:9: this is version 2 of the format"),
        ("recipe: true\nmodels: {a: ./a}", "this is version true"),
        ("recipe: [1]\nmodels: {a: ./a}", "this is version [1]"),
        ("recipe: 1", "the recipe has no `models:`"),
        ("", "a recipe is a mapping"),
        ("- 1", "a recipe is a mapping"),
        ("recipe: 1\nmodels: {a: ./a}\nmodel: {}", "3:1: unknown key 'model'. Did you mean 'models'?"),
        ("recipe: 1\nmodels: {a: ./a}\nseed: -1", "3:7: `seed`"),
        ("recipe: 1\nmodels: {a: ./a}\nseed: true", "3:7: `seed`"),
        ("recipe: 1\nmodels: {a: ./a}\nseed: 1.5", "whole number"),
        ("recipe: 1\nmodels: {a: ./a}\ndescription: [x]", "3:14: `description`"),
        ("recipe: 1\nmodels: {a: ./a}\ntokenizer: a", "`tokenizer` stands under `output:`"),
        ("recipe: 1\nmodels: {a: ./a}\nmodels: {a: ./a}", "3:1: the key 'models' is here twice"),
        ("recipe: 1\nmodels: {a: ./a}\nartifacts: {a: ./x}", "'a' is a model already. Give the artifact another name."),
        ("recipe: 1\nmodels: {a: ./a}\nartifacts: {g: {path: x, only: y}}", "unknown key 'only'"),
        (
            "recipe: 1\nmodels: {a: ./a}\ndata: {d: ./d}\n"
            "nodes: {g: {op: fuse, task: classification, target: a, sources: [{model: b, weight: 0}], data: d}}",
            "all weights are 0",
        ),
        ("recipe: 1\nmodels: {a: ./a}\nnodes: {g: {op: gram, model: a, data: q}}", "there is no data 'q'"),
        ("recipe: 1\nmodels: {a: ./a}\nnodes: {g: {op: stack, layers: []}}", "`layers` cannot be []"),
        ("recipe: 1\nmodels: {a: ./a}\nnodes: {g: {op: linear, inputs: [{adapter: x}]}}", "`adapter` stands under `models:`"),
    ],
)  # fmt: skip
def test_a_wrong_top_level_is_told_what_is_wrong(tmp_path: Path, text: str, what: str) -> None:
    lines = problems(tmp_path, text)
    assert any(what in line for line in lines), lines
    assert len(lines) == 1 + ("adapter: x" in text), lines


def test_an_op_that_is_not_known_is_said_once(tmp_path: Path) -> None:
    text = HEAD + "nodes: {g: {op: fsue, target: a}, m: {op: linear, inputs: [a, g]}}"
    assert len(problems(tmp_path, text)) == 1


def test_all_problems_come_at_once_with_line_and_column(tmp_path: Path) -> None:
    text = """recipe: 1
sed: 3
models:
  a: {path: ./a, revison: x}
  b: ./b
nodes:
  m:
    op: linear
    inputs:
      - {model: a, wieght: 0.3}
      - c
    normalise: true
  n: {op: tis, base: a, inputs: [b]}
output: {node: m, dtype: bf16, like: d}
"""
    places = [line.split(": ")[0].removeprefix("chat.yaml:") for line in problems(tmp_path, text)]
    assert places[:5] == ["2:1", "4:18", "10:20", "12:5", "13:11"]
    assert "14:26" in places


def test_a_recipe_file_that_is_none_says_so(tmp_path: Path) -> None:
    (tmp_path / "merge.yaml").write_text("x")
    with pytest.raises(RecipeError, match="this is a folder"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match=r"there is no such recipe.*Did you mean 'merge.yaml'"):
        load_recipe(tmp_path / "merg.yaml")
    with pytest.raises(RecipeError, match="there is no such recipe"):
        load_recipe(tmp_path / "no" / "x.yaml")


# mergekit's words.


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("base_model: a", "`base:`"),
        ("merge_method: ties", "`op:`"),
        ("parameters: {weight: 1}", "right on the node"),
        ("lambda: 1", "`scale:`"),
        ("filter: mlp", "rules"),
        ("dtype: float16", "under `output:`"),
        ("layer_range: [0, 4]", "both ends included"),
        ("out_dtype: float16", "under `output:`"),
        ("tokenizer_source: base", "`tokenizer:`"),
    ],
)
def test_mergekits_words_are_answered_with_ours(tmp_path: Path, key: str, what: str) -> None:
    (line,) = problems(tmp_path, HEAD + f"nodes: {{m: {{op: ties, base: base, {key}, inputs: [a]}}}}")
    assert "is mergekit's word" in line
    assert what in line
    lines = problems(tmp_path, HEAD + f"output: {{node: a}}\n{key}")
    assert what in lines[0]


def test_mergekits_filter_in_a_rule_is_answered(tmp_path: Path) -> None:
    text = HEAD + "nodes: {m: {op: slerp, inputs: [a, b], t: [{filter: mlp, value: 0.1}, {value: 0.5}]}}"
    (line,) = problems(tmp_path, text)
    assert "`filter` is mergekit's word. Write rules" in line


def test_a_whole_file_of_mergekits_gives_a_few_clear_lines(tmp_path: Path) -> None:
    text = """models:
  - model: org/a
    parameters: {density: 0.5, weight: 0.3}
  - model: org/b
    parameters: {density: [1, 0.7, 0.1], weight: [{filter: mlp, value: 0.5}, {value: 0}]}
merge_method: ties
base_model: org/base
parameters: {normalize: true}
dtype: float16
"""
    lines = problems(tmp_path, text)
    assert 1 <= len(lines) <= 5
    assert "`merge_method` is mergekit's word" in lines[0]
    slices = "slices:\n- sources:\n  - {model: a, layer_range: [0, 3]}\nmerge_method: passthrough\ndtype: float16\n"
    assert len(problems(tmp_path, slices)) <= 4


# In Python.


def test_a_recipe_in_python_is_the_same_as_in_yaml(tmp_path: Path) -> None:
    rules = [{"match": "*.mlp.*", "value": 0.3}]
    data: dict[str, Any] = {
        "name": "x",
        "models": {"a": "./a", "b": {"path": "./b"}},
        "nodes": {"m": {"op": "linear", "inputs": ({"model": "a", "weight": rules}, "b")}},
        "output": {"node": "m"},
    }
    recipe = Recipe(**data, folder=tmp_path)
    again = load(tmp_path, recipe.text())
    assert (again.nodes, again.models, again.outputs) == (recipe.nodes, recipe.models, recipe.outputs)
    assert recipe.folder == tmp_path
    data["nodes"]["m"]["op"] = "other"
    assert recipe.resolved["nodes"]["m"]["op"] == "linear"


def test_a_wrong_recipe_in_python_names_its_keys() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe(models={"a": "./a"}, nodes={"m": {"op": "linear", "inputs": [{"model": "a", "wight": 1}]}})
    assert str(caught.value) == "recipe.nodes.m.inputs.0.wight: unknown key 'wight'. Did you mean 'weight'?"
    for wrong in ({1: "./a"}, {"a": object()}, {"a": {"path": 3j}}):
        with pytest.raises(RecipeError):
            Recipe(models=wrong)
    nested: Any = "a"
    for _ in range(100):
        nested = {"op": "linear", "inputs": [nested]}
    with pytest.raises(RecipeError, match="nested more than"):
        Recipe(models={"a": "./a"}, nodes={"m": nested})


# Sizes.


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("5GiB", 5 * 2**30), ("1.5 MB", 1_500_000), ("64MiB", 2**26), ("10kB", 10_000), ("7B", 7), ("12", 12)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5", "GB", "-1GB", "5gb", "5G", "1e3MB", "0B", "0", "²B", "9" * 400 + "GB", "²"])
def test_what_is_no_size_is_refused(text: str) -> None:
    if text == "5":
        assert parse_size(text) == 5
        return
    with pytest.raises(RecipeError, match="is no size"):
        parse_size(text)


# Strangers.


def test_a_long_chain_and_a_long_circle_answer_at_once(tmp_path: Path) -> None:
    def chain(count: int, end: str) -> str:
        links = [f"  n{i}: {{op: linear, inputs: [{f'n{i + 1}' if i + 1 < count else end}]}}\n" for i in range(count)]
        return HEAD + "nodes:\n" + "".join(links)

    load(tmp_path, chain(200, "a"))
    assert "more than 200 nodes stand on each other" in problems(tmp_path, chain(201, "a"))[0]
    assert seconds(lambda: problems(tmp_path, chain(3000, "n0")), 2) < 2
    assert len(problems(tmp_path, chain(3000, "n0"))[0]) < 500


def test_a_flood_of_problems_is_cut_off(tmp_path: Path) -> None:
    text = HEAD + "nodes:\n" + "".join(f"  n{i}: {{op: linear, inputs: [x{i}, y{i}]}}\n" for i in range(2000))
    assert len(problems(tmp_path, text)) <= 100
    assert seconds(lambda: problems(tmp_path, text), 1) < 1


def test_checking_a_recipe_loads_no_torch(tmp_path: Path) -> None:
    nodes = "nodes: {m: {op: slerp, t: 0.5, inputs: [a, b]}, t: {op: ties, base: a, inputs: [m]}}"
    (tmp_path / "r.yaml").write_text(HEAD + nodes)
    code = "import sys; from mergeflow import load_recipe; load_recipe(sys.argv[1]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "r.yaml")], check=True)


SEED = """recipe: 1
name: fuzz
seed: 7
vars: {w: 0.6, rev: 0123}
x-rules: &attention ["*.self_attn.*", "*.mlp.*"]
models:
  base: {path: org/base, revision: "${rev}"}
  a: ./a
  tower: {path: org/vlm, only: "language_model.*", rename: {"language_model.*": "*"}}
nodes:
  skills:
    op: task_arithmetic
    base: base
    inputs:
      - {model: a, weight: 0.4}
      - {model: {op: task_vector, base: base, model: tower}, weight: "${w}"}
    scale:
      - {match: "*.{0-3}.*", value: {gradient: [0.2, 0.8], over: "0-3", outside: 1}}
      - {value: 1.0}
  pick: {op: select, rules: [{match: "@vocab", model: a}, {model: skills}]}
  result:
    op: ties
    base: base
    inputs: [a, pick]
    density: 0.2
    only: *attention
    others: {model: skills}
    missing: [{match: "*", value: omit}, {value: error}]
output: {node: result, like: base, dtype: [{match: "@vocab", value: float32}, {value: bfloat16}], shard_size: 5GB}
"""
PIECES = [
    "{", "}", "[", "]", ":", ",", "\n", "  ", "-", "*", "&a", "*a", "<<", "${w}", "${", "$${", "null", "true", "0123", "1e999",
    ".nan", "'", '"', "#", "|", "@vocab", "{0-3}", "gradient", "match", "model", "op", "base", "inputs", "linear", "select",
    "only", "others", "mean", "x" * 300, "ä", "\t", "?", "!", "%", "-1", "99999999999999999999", "lambda", "adapter", "data",
]  # fmt: skip


def mutated(random_: random.Random) -> str:
    text = SEED
    for _ in range(random_.randint(1, 4)):
        start = random_.randrange(len(text))
        stop = min(len(text), start + random_.choice((0, 1, 3, 10, 40)))
        choice = random_.random()
        if choice < 0.6:
            piece = random_.choice(PIECES)
        elif choice < 0.8:
            other = random_.randrange(len(text))
            piece = text[other : other + random_.randint(1, 60)]
        else:
            piece = ""
        text = text[:start] + piece + text[stop:]
    return text


def fuzz(count: int, seed: int, tmp_path: Path) -> None:
    random_ = random.Random(seed)
    path = tmp_path / "fuzz.yaml"

    def read() -> None:
        text = path.read_text(encoding="utf-8")
        try:
            recipe = load_recipe(path)
            recipe.text()
        except MergeflowError as error:
            for one in error.errors if isinstance(error, Problems) else (error,):
                assert one.where, text
                assert one.exit_code == 2, text

    gc.collect()
    gc.freeze()  # what other tests left in this process is not to be looked through while a recipe is timed
    for _ in range(count):
        path.write_text(mutated(random_), encoding="utf-8")
        assert seconds(read, 0.2) < 0.2, path.read_text(encoding="utf-8")
    gc.unfreeze()


def test_mutated_recipes_give_problems_with_places_and_nothing_else(tmp_path: Path) -> None:
    load(tmp_path, SEED)
    fuzz(3000, 1, tmp_path)


def test_settings_keep_their_shapes() -> None:
    given = node(op="slerp", t={"gradient": [0, 1], "over": "8-23", "outside": 0.5}, inputs=["a", "b"])
    assert isinstance(given.op, Slerp)
    assert isinstance(given.op.t, Gradient)

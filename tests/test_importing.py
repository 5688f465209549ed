"""mergekit's YAML brought over: 25 configurations that cover every key, what cannot be brought over, and the numbers.

`MERGEFLOW_UPDATE_RECIPES=1 pytest tests/test_importing.py` writes `mergekit_recipes/` anew, to be read in the diff.
`compare_mergekit.py` holds the same configurations against mergekit itself.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from toys import call, environment, write_model

from mergeflow.document import MAX_DOCUMENTS, read_document, read_documents
from mergeflow.errors import MergeflowError, Problems, RecipeError
from mergeflow.importing import import_config
from mergeflow.importing.methods import METHODS, PARAMETERS
from mergeflow.recipe import load_recipe

HERE = pathlib.Path(__file__).parent
CONFIGS = {path.stem: path for path in sorted((HERE / "mergekit_configs").glob("*.yml"))}
RECIPES = HERE / "mergekit_recipes"
LAYERS = 6
Arrays = dict[str, "np.ndarray[Any, Any]"]


@pytest.fixture
def inside(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def imported(config: str, folder: pathlib.Path, name: str = "config") -> Any:
    """The data of the recipe for a configuration."""
    (folder / f"{name}.yml").write_text(config)
    return read_document(import_config(folder / f"{name}.yml").text, "recipe").data


def problems(config: str, folder: pathlib.Path) -> list[str]:
    """What is said of a configuration that cannot be brought over, without the folder."""
    (folder / "c.yml").write_text(config)
    with pytest.raises(MergeflowError) as caught:
        import_config("c.yml")
    error = caught.value
    assert error.exit_code == 2
    return [str(one) for one in (error.errors if isinstance(error, Problems) else (error,))]


# The 25 configurations


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_becomes_the_recipe_that_is_written_down_and_validates(name: str, inside: pathlib.Path) -> None:
    (inside / f"{name}.yml").write_bytes(CONFIGS[name].read_bytes())
    done = call("import", f"{name}.yml", "-o", "recipe.yaml")
    assert (done.code, done.out) == (0, "recipe.yaml: written\n"), done.err
    assert call("validate", "recipe.yaml").code == 0
    text = (inside / "recipe.yaml").read_text()
    if os.environ.get("MERGEFLOW_UPDATE_RECIPES"):
        RECIPES.mkdir(exist_ok=True)
        (RECIPES / f"{name}.yaml").write_text(text)
    assert text == (RECIPES / f"{name}.yaml").read_text()


def test_there_are_25_configurations_and_no_recipe_without_one() -> None:
    assert len(CONFIGS) == 25
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(CONFIGS)


def keys_in(data: Any) -> Iterator[str]:
    if isinstance(data, dict):
        for key, value in data.items():
            yield key
            yield from keys_in(value)
    elif isinstance(data, list):
        for item in data:
            yield from keys_in(item)


def test_the_configurations_cover_every_method_parameter_and_key_that_can_be_brought_over() -> None:
    documents = [one.data for path in CONFIGS.values() for one in read_documents(path.read_bytes(), path.name)]
    assert {one["merge_method"] for one in documents} == set(METHODS)
    keys = set(keys_in(documents))
    assert keys >= PARAMETERS
    assert keys - PARAMETERS == {
        *("merge_method", "base_model", "models", "slices", "modules", "default", "sources", "parameters", "name"),
        *("model", "layer_range", "residual_weight", "value", "filter", "path", "revision"),
        *("dtype", "out_dtype", "tokenizer_source", "tokenizer", "source"),
    }


# Numbers: what mergekit's rules say, in float64, against a run of the imported recipe


def llama(seed: int, like: Arrays | None = None, layers: int = LAYERS) -> Arrays:
    """The tensors of a small Llama, or of a fine-tune of one."""
    draw = np.random.default_rng(seed)
    parts = {"self_attn.q_proj": (4, 4), "self_attn.o_proj": (4, 4), "mlp.down_proj": (4, 6), "input_layernorm": (4,)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (8, 4)}
    shapes |= {f"model.layers.{i}.{part}.weight": shape for i in range(layers) for part, shape in parts.items()}
    shapes |= {"model.norm.weight": (4,), "lm_head.weight": (8, 4)}
    made = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return made if like is None else {name: (like[name] + 0.1 * made[name]).astype(np.float32) for name in made}


@pytest.fixture
def models(inside: pathlib.Path) -> dict[str, Arrays]:
    base = llama(0)
    made = {"base": base, **{name: llama(seed, base) for seed, name in enumerate("abc", 1)}}
    config = {"model_type": "llama", "vocab_size": 8, "num_hidden_layers": LAYERS, "dtype": "float32"}
    for name, tensors in made.items():
        write_model(inside / name, tensors, config=config)
    return made


def run(config: str, folder: pathlib.Path) -> Arrays:
    """The tensors of the imported recipe's output."""
    (folder / "config.yml").write_text(config)
    assert call("import", "config.yml", "-o", "recipe.yaml").code == 0
    done = call("run", "recipe.yaml", "-o", "out", "-q", "--force")
    assert done.code == 0, done.err
    return load_file(folder / "out" / "model.safetensors")


def layer_of(name: str) -> int | None:
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


def close(got: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, rtol=2e-6, atol=1e-7, err_msg=name)


def test_a_gradient_runs_over_the_layers_and_what_is_outside_takes_its_first_value(
    models: dict[str, Arrays], inside: pathlib.Path
) -> None:
    got = run(
        "merge_method: linear\nparameters: {normalize: false}\nmodels:\n"
        "  - {model: ./a, parameters: {weight: [0.2, 1.0, 0.4]}}\n  - {model: ./b, parameters: {weight: 0.5}}\n",
        inside,
    )
    points = np.interp(np.arange(LAYERS), [0, 2.5, 5], [0.2, 1.0, 0.4])
    wanted = {}
    for name, a in models["a"].items():
        layer = layer_of(name)
        weight = 0.2 if layer is None else points[layer]
        wanted[name] = weight * a.astype(np.float64) + 0.5 * models["b"][name]
    close(got, wanted)


def test_filters_fall_through_from_the_model_to_the_top_and_the_first_that_fits_wins(
    models: dict[str, Arrays], inside: pathlib.Path
) -> None:
    got = run(
        """\
merge_method: task_arithmetic
base_model: ./base
models:
  - model: ./a
    parameters:
      weight:
        - {filter: o_proj, value: 0.1}
        - {filter: self_attn, value: 0.2}
        - {filter: layers.1, value: [0.3, 0.8]}
parameters:
  weight: [{filter: lm_head, value: 0.6}, {filter: "*", value: 0.7}, {value: 9}]
""",
        inside,
    )

    def weight(name: str) -> float:
        if "o_proj" in name:
            return 0.1
        if "self_attn" in name:
            return 0.2
        if "layers.1" in name:
            return 0.3 + 0.5 * 1 / (LAYERS - 1)
        return 0.6 if "lm_head" in name else 0.7

    base = models["base"]
    close(got, {n: base[n] + weight(n) * (a.astype(np.float64) - base[n]) for n, a in models["a"].items()})


def test_layers_are_stacked_as_their_ranges_say_and_projections_can_be_set_to_0(
    models: dict[str, Arrays], inside: pathlib.Path
) -> None:
    got = run(CONFIGS["passthrough_stack"].read_text().replace("tokenizer_source: base\n", ""), inside)
    a, b = models["a"], models["b"]
    wanted: Arrays = {name: value for name, value in a.items() if layer_of(name) is None}
    order = [*((a, i) for i in range(4)), *((b, i) for i in range(2, 5)), *((a, i) for i in range(3, 6))]
    for number, (model, layer) in enumerate(order):
        for name, value in model.items():
            if layer_of(name) == layer:
                part = name.split(".", 3)[3]
                zero = model is b and ("o_proj" in part or "down_proj" in part)
                wanted[f"model.layers.{number}.{part}"] = value * 0 if zero else value
    close(got, wanted)


def test_each_slice_has_its_own_gradient_and_embeddings_are_the_first_slices_heads_the_last_ones(
    models: dict[str, Arrays], inside: pathlib.Path
) -> None:
    got = run(
        """\
merge_method: linear
slices:
  - sources:
      - {model: ./a, layer_range: [0, 3], parameters: {weight: [0.2, 0.6]}}
      - {model: ./b, layer_range: [0, 3]}
  - sources:
      - {model: ./b, layer_range: [2, 3], parameters: {weight: [0.1, 0.9]}}
      - {model: ./c, layer_range: [5, 6]}
  - sources:
      - {model: ./a, layer_range: [0, 2]}
      - {model: ./c, layer_range: [4, 6], parameters: {weight: [0.3, 0.5]}}
    parameters: {weight: 2}
parameters: {normalize: false, weight: 1}
""",
        inside,
    )
    a, b, c = ({n: v.astype(np.float64) for n, v in models[name].items()} for name in "abc")

    def layer(first: float, x: Arrays, i: int, second: float, y: Arrays, j: int) -> Arrays:
        parts = [name.split(".", 3)[3] for name in x if layer_of(name) == 0]
        at = "model.layers.{}.{}".format
        return {part: first * x[at(i, part)] + second * y[at(j, part)] for part in parts}

    layers = [
        layer(0.2, a, 0, 1, b, 0),
        layer(0.4, a, 1, 1, b, 1),
        layer(0.6, a, 2, 1, b, 2),
        layer(0.9, b, 2, 1, c, 5),
        layer(2, a, 0, 0.3, c, 4),
        layer(2, a, 1, 0.5, c, 5),
    ]
    wanted = {f"model.layers.{i}.{part}": value for i, parts in enumerate(layers) for part, value in parts.items()}
    wanted["model.embed_tokens.weight"] = 0.2 * a["model.embed_tokens.weight"] + b["model.embed_tokens.weight"]
    for name in ("model.norm.weight", "lm_head.weight"):
        wanted[name] = 2 * a[name] + 0.3 * c[name]
    close(got, wanted)


def test_a_slice_of_the_first_layers_cuts_the_model(models: dict[str, Arrays], inside: pathlib.Path) -> None:
    got = run(
        "merge_method: linear\nparameters: {weight: 1}\n"
        "slices: [{sources: [{model: ./a, layer_range: [0, 4]}, {model: ./b, layer_range: [0, 4]}]}]\n",
        inside,
    )
    assert {layer_of(name) for name in got} == {None, 0, 1, 2, 3}
    assert read_document((inside / "out" / "config.json").read_text(), "c").data["num_hidden_layers"] == 4


def test_a_base_of_linear_is_one_more_input(models: dict[str, Arrays], inside: pathlib.Path) -> None:
    got = run(
        "merge_method: linear\nbase_model: ./base\nmodels: [{model: ./a}, {model: ./b}]\nparameters: {weight: 1}\n",
        inside,
    )
    close(got, {n: (v.astype(np.float64) + models["b"][n] + models["base"][n]) / 3 for n, v in models["a"].items()})


def test_merges_that_read_each_other_are_one_recipe(models: dict[str, Arrays], inside: pathlib.Path) -> None:
    got = run(
        """\
name: second
merge_method: task_arithmetic
base_model: first
models: [{model: ./c, parameters: {weight: 0.5}}]
---
name: first
merge_method: linear
models: [{model: ./a}, {model: ./b}]
parameters: {weight: 1}
""",
        inside,
    )
    first = {n: (v.astype(np.float64) + models["b"][n]) / 2 for n, v in models["a"].items()}
    close(got, {n: (v + models["c"][n]) / 2 for n, v in first.items()})
    assert load_recipe(inside / "recipe.yaml").name == "second"


def test_a_lora_is_added_to_its_base_before_the_merge(models: dict[str, Arrays], inside: pathlib.Path) -> None:
    draw = np.random.default_rng(9)
    down, up = (draw.standard_normal(shape).astype(np.float32) for shape in ((2, 4), (4, 2)))
    name = "model.layers.3.self_attn.q_proj"
    (inside / "lora").mkdir()
    save_file(
        {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up},
        inside / "lora" / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "bias": "none"}
    (inside / "lora" / "adapter_config.json").write_text(json.dumps(config))
    got = run("merge_method: linear\nmodels: [{model: ./a+./lora}, {model: ./b}]\nparameters: {weight: 1}\n", inside)
    wanted = {n: (v.astype(np.float64) + models["b"][n]) / 2 for n, v in models["a"].items()}
    wanted[f"{name}.weight"] += 3 * (up.astype(np.float64) @ down) / 2
    close(got, wanted)


# What is written, and how


def test_mergekits_defaults_are_written_where_ours_differ_and_only_there(inside: pathlib.Path) -> None:
    made = imported(
        "merge_method: task_arithmetic\nbase_model: ./base\nmodels: [{model: ./a, parameters: {weight: 1.0}}]\n", inside
    )
    assert made["nodes"] == {"merged": {"op": "task_arithmetic", "base": "base", "inputs": ["a"]}}
    made = imported(
        "merge_method: ties\nbase_model: ./base\nmodels: [{model: ./a}]\n"
        "parameters: {weight: 2, normalize: true, density: 1.0, lambda: 1, rescale: on}\n",
        inside,
    )
    assert made["nodes"]["merged"] == {"op": "ties", "base": "base", "inputs": ["a"], "weight": 2, "rescale": "l1"}


def test_filters_of_one_value_stand_in_one_list_and_what_says_nothing_new_is_left_out(inside: pathlib.Path) -> None:
    made = imported(
        """\
merge_method: slerp
base_model: ./a
models: [{model: ./b}]
parameters:
  t:
    - {filter: self_attn, value: 0.3}
    - {filter: mlp, value: 0.3}
    - {filter: norm, value: [0.5, 0.5]}
    - {filter: self_attn, value: 0.9}
    - {filter: lm_head, value: 0.5}
    - value: 0.5
""",
        inside,
    )
    t = made["nodes"]["merged"]["t"]
    assert t == [{"match": ["*self_attn*", "*mlp*"], "value": 0.3}, {"value": 0.5}]


def test_a_filter_that_fits_nothing_is_left_out_where_the_models_are_here(
    models: dict[str, Arrays], inside: pathlib.Path
) -> None:
    config = (
        "merge_method: linear\nmodels: [{model: a}, {model: ./b}]\nparameters:\n"
        "  weight: [{filter: k_proj, value: 3}, {filter: o_proj, value: 2}, {value: 1}]\n"
        "  normalize: [{filter: bias, value: false}, {value: true}]\n"
    )
    rules = [{"match": "*o_proj*", "value": 2}, {"value": 1}]
    made = imported(config, inside)
    assert made["nodes"]["merged"] == {"op": "linear", "inputs": ["a", "b"], "weight": rules}
    assert import_config("config.yml").notes == (
        "config.yml:4:36: the filter 'k_proj' fits no tensor, and mergekit passes over it: left out",
        "config.yml:5:37: the filter 'bias' fits no tensor, and mergekit passes over it: left out",
    )
    assert len(run(config, inside)) == len(models["a"])
    away = imported(config.replace("model: a", "model: org/a").replace("./b", "org/b"), inside)
    assert away["nodes"]["merged"]["weight"] == [{"match": "*k_proj*", "value": 3}, *rules]


def test_texts_are_read_as_mergekit_takes_them(inside: pathlib.Path) -> None:
    made = imported(
        "merge_method: linear\nmodels: [{model: ./a, parameters: {weight: 2.5e-1}}, {model: ./b}]\n"
        "parameters: {weight: '1e-5', normalize: No}\n",
        inside,
    )
    assert made["nodes"]["merged"] == {
        "op": "linear",
        "inputs": [{"model": "a", "weight": 0.25}, "b"],
        "weight": 1e-5,
        "normalize": False,
    }


@pytest.mark.parametrize(
    ("keys", "output"),
    [
        ("", {}),
        ("dtype: torch.bfloat16", {"dtype": "bfloat16"}),
        ("dtype: float32\nout_dtype: float16", {"dtype": "float16"}),
        ("out_dtype: bfloat16", {"dtype": "bfloat16"}),
        ("tokenizer_source: base", {}),
        ("tokenizer_source: ./b", {"tokenizer": "b"}),
        ("tokenizer: {source: ./b}", {"tokenizer": "b"}),
        ("tokenizer: {source: base, tokens: {}, pad_to_multiple_of: null}", {}),
        ("base_model: ./b", {"like": "b"}),
    ],
)
def test_dtypes_tokenizer_and_config_go_to_the_output(keys: str, output: dict[str, Any], inside: pathlib.Path) -> None:
    made = imported(f"merge_method: linear\nmodels: [{{model: ./a}}]\nparameters: {{weight: 1}}\n{keys}\n", inside)
    assert made["output"] == {"node": "merged", **output}


def test_a_result_of_half_precision_that_is_written_wider_is_rounded_first(inside: pathlib.Path) -> None:
    made = imported(
        "merge_method: linear\nmodels: [{model: ./a}]\nparameters: {weight: 1}\ndtype: bfloat16\nout_dtype: float32\n",
        inside,
    )
    assert made["nodes"]["merged_bfloat16"] == {"op": "cast", "model": "merged", "to": "bfloat16"}
    assert made["output"] == {"node": "merged_bfloat16", "dtype": "float32"}


def test_models_get_short_names_that_are_not_taken(inside: pathlib.Path) -> None:
    paths = ["org/7b-v0.1", "other/7b-v0.1", "other/7b-v0.1@main", "./merged", "./x/7b-v0.1/", "org/ok@a@b"]
    sources = "".join(f"  - {{model: '{path}'}}\n" for path in paths[:-1])
    made = imported(f"merge_method: karcher\nmodels:\n{sources}", inside)
    assert made["models"] == {
        "m7b-v0_1": "org/7b-v0.1",
        "other_m7b-v0_1": "other/7b-v0.1",
        "m7b-v0_1_2": "other/7b-v0.1@main",
        "merged_2": "./merged",
        "x_m7b-v0_1": "./x/7b-v0.1",
    }


def test_local_paths_are_relative_to_the_recipe(inside: pathlib.Path) -> None:
    for name in ("models/a", "configs/b", "recipes"):
        (inside / name).mkdir(parents=True)
    (inside / "configs" / "c.yml").write_text(
        "merge_method: karcher\n"
        "models: [{model: models/a}, {model: b}, {model: /far/c}, {model: ../d}, {model: org/e}, {model: ~/f}]\n"
    )
    found = import_config("configs/c.yml", into="recipes")
    assert list(read_document(found.text, "r").data["models"].values()) == [
        *("../models/a", "../configs/b", "/far/c", "../../d", "org/e", "~/f")
    ]
    here = import_config("configs/c.yml")
    assert read_document(here.text, "r").data["models"]["a"] == "./models/a"


def test_several_merges_that_none_reads_are_several_outputs(inside: pathlib.Path) -> None:
    one = "merge_method: linear\nmodels: [{model: shared}, {model: ./b}]\nparameters: {weight: 1}\n"
    shared = "---\nname: shared\nmerge_method: karcher\nmodels: [{model: ./a}, {model: ./c}]\n"
    made = imported(f"name: y_z\n{one}---\nname: y.z\n{one}{shared}", inside)
    assert made["outputs"] == {"y_z": {"node": "y_z"}, "y_z_2": {"node": "y_z_2"}}
    assert list(made["nodes"]) == ["shared", "y_z", "y_z_2"] and "output" not in made


def test_a_merge_that_another_reads_is_rounded_as_on_disk(inside: pathlib.Path) -> None:
    made = imported(
        "name: x\nmerge_method: karcher\nmodels: [{model: ./a}, {model: ./b}]\ndtype: bfloat16\nout_dtype: float16\n"
        "---\nmerge_method: passthrough\nmodels: [{model: x}]\n",
        inside,
    )
    assert made["nodes"]["x_bfloat16"] == {"op": "cast", "model": "x", "to": "bfloat16"}
    assert made["nodes"]["x_bfloat16_float16"] == {"op": "cast", "model": "x_bfloat16", "to": "float16"}
    assert made["nodes"]["merged"] == {"op": "passthrough", "model": "x_bfloat16_float16"}


def test_breadcrumbs_drop_no_outliers_where_the_density_is_1(inside: pathlib.Path) -> None:
    made = imported(
        """\
merge_method: breadcrumbs
base_model: ./base
models:
  - {model: ./a, parameters: {density: [{filter: mlp, value: 1}, {value: 0.5}]}}
  - {model: ./b, parameters: {density: [{filter: mlp, value: 0.5}], gamma: 0.2}}
  - {model: ./c, parameters: {density: 0.9, gamma: [0.1, 0.2]}}
parameters: {weight: 1}
""",
        inside,
    )
    node = made["nodes"]["merged"]
    assert node["gamma"] == [{"match": "*mlp*", "value": 0.0}, {"value": 0.01}]
    assert [one.get("gamma") for one in node["inputs"]] == [
        None,
        [{"match": "*mlp*", "value": 0.2}, {"value": 0.0}],
        {"gradient": [0.1, 0.2], "outside": 0.1},
    ]


@pytest.mark.parametrize(("stem", "name"), [("my merge (2)", "my-merge-2"), ("_", "merged"), ("a.b", "a.b")])
def test_a_recipe_is_called_as_the_configuration_is(stem: str, name: str, inside: pathlib.Path) -> None:
    assert imported(START, inside, stem)["name"] == name
    assert imported("name: own\n" + START, inside, stem)["name"] == "own"


def test_what_a_merge_in_between_says_of_its_tokenizer_is_left_out_and_said(inside: pathlib.Path) -> None:
    between = "name: x\nmerge_method: passthrough\nmodels: [{model: ./a}]\ntokenizer_source: base\n"
    (inside / "c.yml").write_text(f"{between}---\nmerge_method: passthrough\nmodels: [{{model: x}}]\n")
    found = import_config("c.yml")
    assert found.notes == ("c.yml:2:15: the tokenizer of a merge that another one reads says nothing: left out",)


def test_what_a_comment_holds_cannot_leave_it(inside: pathlib.Path) -> None:
    name = "c\nmodels.yml"
    (inside / name).write_text(
        'merge_method: linear\nmodels: [{model: ./a}]\nparameters: {weight: [{filter: "*\\u2028\\nx: {", value: 1}, {value: 1}]}\n'
    )
    text = import_config(name).text
    assert list(read_document(text, "r").data) == ["recipe", "name", "models", "nodes", "output"]


def test_what_changes_nothing_is_left_out_and_said_with_its_lines(inside: pathlib.Path) -> None:
    (inside / "c.yml").write_text(
        """\
merge_method: model_stock
base_model: ./base
models:
  - {model: ./a, parameters: {weight: 1}}
  - {model: ./b, parameters: {weight: 1}}
parameters:
  filter_wise: [{filter: "*.mlp.*", value: true}, {value: false}]
"""
    )
    done = call("import", "c.yml")
    assert done.code == 0 and "filter_wise" not in done.out.split("nodes:")[1]
    assert done.err.splitlines() == [
        "note: c.yml:4:31 and 1 more: `weight` has no effect in model_stock: left out",
        "note: c.yml:7:44: a filter is a plain part of a name in mergekit, so one with '*', '{' or '}' fits nothing: "
        "left out",
    ]
    header = [line for line in done.out.splitlines() if line.startswith("#")]
    assert header[:3] == [
        "# Brought over from mergekit's c.yml by `mergeflow import`.",
        "#",
        "# - lines 4, 5: `weight` has no effect in model_stock: left out",
    ]


# What cannot be brought over


START = "merge_method: linear\nmodels: [{model: ./a}]\nparameters: {weight: 1}\n"
REFUSED = {
    "union": (
        START + "tokenizer_source: union\n",
        "c.yml:4:19: a union of tokenizers (mergekit's default for `tokenizer:`) cannot be brought over. "
        "Choose one: `tokenizer_source: base`, or a model.",
    ),
    "union by default": (
        START + "tokenizer:\n  pad_to_multiple_of: null\n",
        "c.yml:5:3: a union of tokenizers (mergekit's default for `tokenizer:`) cannot be brought over. "
        "Choose one: `tokenizer_source: base`, or a model.",
    ),
    "tokens": (
        START + "tokenizer: {source: base, tokens: {x: {source: ./a}}}\n",
        "c.yml:4:27: choosing the embedding of single tokens cannot be brought over. "
        "Take it out: the vocabulary stays that of the models.",
    ),
    "padding": (
        START + "tokenizer: {source: base, pad_to_multiple_of: 8}\n",
        "c.yml:4:27: padding the vocabulary cannot be brought over. "
        "Take it out: the vocabulary stays that of the models.",
    ),
    "two tokenizers": (
        START + "tokenizer: {source: base}\ntokenizer_source: base\n",
        "c.yml:4:1: `tokenizer_source` and `tokenizer` stand together",
    ),
    "chat template": (
        START + "chat_template: auto\n",
        "c.yml:4:1: a chat template cannot be brought over: the output takes that of its tokenizer's model. "
        "Name that model in `tokenizer_source:`, or write the template into the output's files afterwards.",
    ),
    "mixture of experts": (
        "base_model: ./a\ngate_mode: hidden\nexperts: [{source_model: ./b}]\n",
        "c.yml:2:1: a mixture of experts made of dense models (mergekit-moe) is no merge of tensors, "
        "and cannot be brought over",
    ),
    "modules": (
        "merge_method: linear\nmodules:\n  vision_tower: {models: [{model: ./a}]}\n",
        "c.yml:3:3: the module 'vision_tower' cannot be brought over: its tensors' names are in mergekit's own tables. "
        "Write a recipe with `only:`, one node for each part of the model.",
    ),
    "unknown method": (
        "merge_method: tise\nmodels: [{model: ./a}]\n",
        "c.yml:1:15: mergekit 0.1.5 has no method 'tise'. Did you mean 'ties'?",
    ),
    "no method": (
        "models: [{model: ./a}]\n",
        "c.yml:1:1: there is no `merge_method`. It names one of mergekit's methods, e.g. ties.",
    ),
    "unknown key": (
        START + "out_dtyp: float32\n",
        "c.yml:4:1: mergekit ignores the key 'out_dtyp' here. Did you mean 'out_dtype'?",
    ),
    "a parameter outside of parameters": (
        START + "normalize: true\n",
        "c.yml:4:1: mergekit ignores the key 'normalize' here. Write it under `parameters:`.",
    ),
    "unknown parameter": (
        "merge_method: linear\nmodels: [{model: ./a, parameters: {weight: 1, densty: 0.5}}]\n",
        "c.yml:2:47: mergekit ignores the parameter 'densty', which none of its methods has. Did you mean 'density'?",
    ),
    "missing weight": (
        "merge_method: linear\nmodels: [{model: ./a}]\n",
        "c.yml:2:18: `weight` is missing. mergekit has no default for it.",
    ),
    "weight missing where no filter fits": (
        "merge_method: linear\nmodels: [{model: ./a, parameters: {weight: {filter: mlp, value: 1}}}]\n",
        "c.yml:2:65: `weight` is missing where no filter fits. mergekit has no default for it.",
    ),
    "no base": (
        "merge_method: ties\nmodels: [{model: ./a}]\n",
        "c.yml:2:9: ties needs a `base_model`. Name the model of the others.",
    ),
    "base not in the slice": (
        "merge_method: slerp\nbase_model: ./base\nparameters: {t: 0.5}\nslices:\n"
        "  - sources: [{model: ./a, layer_range: [0, 2]}, {model: ./b, layer_range: [0, 2]}]\n",
        "c.yml:5:5: the base './base' is not among the sources of this slice, as slerp needs it. "
        "Add it to `sources`, with its `layer_range`.",
    ),
    "too many models": (
        "merge_method: slerp\nbase_model: ./a\nmodels: [{model: ./b}, {model: ./c}]\nparameters: {t: 0.5}\n",
        "c.yml:3:9: slerp takes 2 models, the base counted, not 3",
    ),
    "a model twice": (
        "merge_method: karcher\nmodels: [{model: ./a}, {model: ./a}]\n",
        "c.yml:2:32: mergekit takes a model once in one slice. Take one of them out.",
    ),
    "different lengths": (
        "merge_method: karcher\nslices:\n"
        "  - sources: [{model: ./a, layer_range: [0, 2]}, {model: ./b, layer_range: [0, 3]}]\n",
        "c.yml:3:14: the sources of a slice have different numbers of layers",
    ),
    "empty range": (
        "merge_method: passthrough\nslices: [{sources: [{model: ./a, layer_range: [4, 4]}]}]\n",
        "c.yml:2:47: the range 4 to 4 has no layers. The end is the layer after the last.",
    ),
    "octal": (
        "merge_method: passthrough\nslices: [{sources: [{model: ./a, layer_range: [0, 010]}]}]\n",
        "c.yml:2:51: `010` is 8 for mergekit (YAML 1.1) and 10 by YAML 1.2. "
        "Write the number that is meant, without the 0 in front.",
    ),
    "a filter on layers that have other numbers": (
        "merge_method: karcher\nslices: [{sources: [{model: ./a, layer_range: [2, 4]}, {model: ./b, layer_range: [2, 4]}]}]\n"
        "parameters: {tol: [{filter: layers.0, value: 1e-6}, {value: 1e-5}]}\n",
        "c.yml:3:46: the filter 'layers.0' names a layer, and layers have other numbers in this slice. "
        "Write this merge as a recipe by hand.",
    ),
    "more sources behind than in front": (
        "merge_method: linear\nparameters: {weight: 1}\nslices:\n  - sources: [{model: ./a, layer_range: [0, 2]}]\n"
        "  - sources: [{model: ./a, layer_range: [2, 4]}, {model: ./b, layer_range: [2, 4]}]\n",
        "c.yml:5:5: the last slice has more sources than the first: mergekit then merges only some of them behind the "
        "layers. Write the recipe by hand, to say what is meant there.",
    ),
    "a share of nothing": (
        "merge_method: ties\nbase_model: ./base\nmodels: [{model: ./a, parameters: {weight: 1, density: 0}}]\n",
        "c.yml:3:56: a share of 0 keeps nothing in mergekit, and a recipe asks for more than 0. "
        "Leave the model out, or give it a small share.",
    ),
    "out of range": (
        "merge_method: slerp\nbase_model: ./a\nmodels: [{model: ./b}]\nparameters: {t: 1.5}\n",
        "c.yml:4:17: `t` cannot be 1.5: it should be less than or equal to 1",
    ),
    "flags by layer": (
        "merge_method: linear\nmodels: [{model: ./a}]\nparameters: {weight: 1, normalize: [true, false]}\n",
        "c.yml:3:36: a list of values that are no numbers chooses by layer in mergekit, and `normalize` cannot. "
        "Give `normalize` one value.",
    ),
    "no number": (
        "merge_method: linear\nmodels: [{model: ./a}]\nparameters: {weight: much}\n",
        "c.yml:3:22: 'much' is no number",
    ),
    "numbers among filters": (
        "merge_method: linear\nmodels: [{model: ./a}]\nparameters: {weight: [{filter: mlp, value: 1}, 2]}\n",
        "c.yml:3:48: filters and numbers cannot stand in one list. Write `- value: ...`.",
    ),
    "no repository": (
        "merge_method: passthrough\nmodels: [{model: gpt2}]\n",
        "c.yml:2:18: 'gpt2' is neither a folder here nor the name of a repository. "
        "Write a path that starts with ./ or /, or owner/name.",
    ),
    "two revisions": (
        "merge_method: passthrough\nmodels: [{model: org/x@a@b}]\n",
        "c.yml:2:18: mergekit cannot read the model 'org/x@a@b'. Write a path, or path@revision.",
    ),
    "two LoRAs": (
        "merge_method: passthrough\nmodels: [{model: org/x+org/y+org/z}]\n",
        "c.yml:2:18: mergekit cannot read 'org/x+org/y+org/z'. A model and its LoRA are joined by one '+'.",
    ),
    "architecture": (
        "merge_method: passthrough\nmodels: [{model: {model: ./a, override_architecture: LlamaForCausalLM}}]\n",
        "c.yml:2:31: `override_architecture` cannot be brought over: a recipe merges the tensors that are there. "
        "Take it out.",
    ),
    "a circle": (
        "name: x\nmerge_method: passthrough\nmodels: [{model: y}]\n---\n"
        "name: y\nmerge_method: passthrough\nmodels: [{model: x}]\n",
        "c.yml:2:15: each merge reads another one: they go in a circle",
    ),
    "a circle that one reads": (
        "merge_method: passthrough\nmodels: [{model: x}]\n---\nname: x\nmerge_method: passthrough\n"
        "models: [{model: y}]\n---\nname: y\nmerge_method: passthrough\nmodels: [{model: x}]\n",
        "c.yml:10:18: the merges go in a circle: the one without a name -> x -> y -> x",
    ),
    "a circle beside a merge": (
        START + "---\nname: x\nmerge_method: passthrough\nmodels: [{model: y}]\n---\n"
        "name: y\nmerge_method: passthrough\nmodels: [{model: x}]\n",
        "c.yml:11:18: the merges go in a circle: x -> y -> x",
    ),
    "itself": (
        "name: x\nmerge_method: passthrough\nmodels: [{model: x}]\n",
        "c.yml:3:18: the merges go in a circle: x -> x",
    ),
    "a base for passthrough": (
        "merge_method: passthrough\nbase_model: ./b\nmodels: [{model: ./a}]\n",
        "c.yml:3:9: passthrough takes 1 model, not 2",
    ),
    "very many models": (
        "merge_method: karcher\nmodels: [" + "{model: ./a}, " * 257 + "]\n",
        "c.yml:2:9: a list of more than 256 entries cannot be brought over",
    ),
    "outliers where the density is 1": (
        "merge_method: breadcrumbs\nbase_model: ./base\n"
        "models: [{model: ./a, parameters: {weight: 1, density: [1, 0.5]}}]\n",
        "c.yml:3:56: mergekit drops no outliers where the density is 1, and a recipe cannot say where that is. "
        "Keep the density below 1, give `gamma: 0`, or give `gamma` one value.",
    ),
    "more than a recipe holds": (
        "merge_method: linear\nparameters: {weight: ["
        + "".join(f"{{filter: f{i}, value: {i}}}, " for i in range(250))
        + "{value: 1}]}\nmodels:\n"
        + "".join(f"  - {{model: ./m{i}, parameters: {{weight: {{filter: x, value: {i}}}}}}}\n" for i in range(250)),
        "c.yml: what is written in few words here is too large as a recipe: a recipe has at most 1 MiB. "
        "Give fewer models their own rules.",
    ),
    "one name twice": (
        "name: x\nmerge_method: passthrough\nmodels: [{model: ./a}]\n---\n"
        "name: x\nmerge_method: passthrough\nmodels: [{model: ./b}]\n",
        "c.yml:6:15: a second merge is called 'x'. The first is at c.yml:2:15: give each its own.",
    ),
    "a recipe": (
        "recipe: 1\nmodels: {a: ./a}\n",
        "c.yml:1:1: this is a recipe already. Check it by `mergeflow validate`.",
    ),
    "int64": (
        START + "dtype: int64\n",
        "c.yml:4:8: 'int64' is no dtype of a merge. Write one of float16, bfloat16, float32, float64.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_brought_over_is_named_with_its_line(name: str, inside: pathlib.Path) -> None:
    config, message = REFUSED[name]
    assert problems(config, inside) == [message]


def test_all_problems_come_at_once_and_nothing_is_written(inside: pathlib.Path) -> None:
    config = (
        "merge_method: ties\nbase_model: ./base\nmodels: [{model: ./a, parameters: {weight: x, densty: 1}}]\n"
        "chat_template: auto\ntokenizer_source: union\n---\nmerge_method: nope\nmodels: [{model: 7}]\nseed: 1\n"
    )
    found = problems(config, inside)
    assert [one.split(": ")[0] for one in found] == [
        *("c.yml:3:44", "c.yml:3:47", "c.yml:5:19", "c.yml:4:1", "c.yml:9:1", "c.yml:7:15", "c.yml:8:18")
    ]
    done = call("import", "c.yml", "-o", "recipe.yaml")
    assert (done.code, done.out) == (2, "") and done.err.endswith("7 problems\n")
    assert not (inside / "recipe.yaml").exists()


# The command, and files


def test_a_file_that_is_there_is_replaced_only_with_force(inside: pathlib.Path) -> None:
    (inside / "c.yml").write_text(START)
    (inside / "recipe.yaml").write_text("mine")
    done = call("import", "c.yml", "-o", "recipe.yaml")
    assert (done.code, done.err) == (
        2,
        "recipe.yaml: there is such a file already. Give --force to replace it.\n",
    )
    assert (inside / "recipe.yaml").read_text() == "mine"
    assert call("import", "c.yml", "-o", "recipe.yaml", "--force").code == 0
    assert (inside / "recipe.yaml").read_text() == call("import", "c.yml").out


def test_a_file_that_is_not_there_or_empty_is_told(inside: pathlib.Path) -> None:
    (inside / "merge.yml").write_text("# nothing\n---\n")
    assert call("import", "merg.yml").err == "merg.yml: there is no such file. Did you mean 'merge.yml'?\n"
    assert call("import", "merge.yml").err == "merge.yml: the file is empty. Give a mergekit YAML.\n"
    assert call("import", ".").code == 2


def test_importing_loads_nothing_heavy(inside: pathlib.Path) -> None:
    (inside / "c.yml").write_text(START)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mergeflow", "import", "c.yml"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "mergeflow.importing" in loaded
    assert not loaded & {"torch", "huggingface_hub", "transformers", "numpy"}


def test_a_file_that_cannot_be_written_is_an_error_of_the_machine(inside: pathlib.Path) -> None:
    (inside / "c.yml").write_text(START)
    done = call("import", "c.yml", "-o", "no/such/recipe.yaml")
    assert (done.code, done.err) == (5, "no/such/recipe.yaml: cannot be written: No such file or directory\n")


# Documents


def test_the_documents_of_a_file_keep_the_places_of_their_lines() -> None:
    found = read_documents("# one\na: 1\n---\nb:\n  - 2\n--- {c: x}\n---\n# empty\n---\nd: |\n  --- no\n", "f.yml")
    assert [one.data for one in found] == [{"a": 1}, {"b": [2]}, {"c": "x"}, {"d": "--- no\n"}]
    assert [one.where((key,)) for one, key in zip(found, "abcd", strict=True)] == [
        *("f.yml:2:4", "f.yml:5:3", "f.yml:6:9", "f.yml:10:4")
    ]


def test_problems_of_all_documents_come_together() -> None:
    with pytest.raises(Problems) as caught:
        read_documents("a: 1\na: 2\n---\nb: {\n---\nc: !x 1\n", "f.yml")
    assert [one.where for one in caught.value.errors] == ["f.yml:2:1", "f.yml:4:4", "f.yml:6:4"]


def test_a_file_of_very_many_documents_is_refused_at_once() -> None:
    with pytest.raises(RecipeError, match=f"more than {MAX_DOCUMENTS} documents"):
        read_documents("---\n" * 200_000, "f.yml")


# Whatever a stranger writes


def words(*known: str) -> st.SearchStrategy[str]:
    return st.sampled_from(known) | st.text(max_size=6)


values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.floats(-2, 2)
    | words("./a", "./b", "yes", "a+b", "x@1", "1e-3"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            words("value", "filter", "model", "path", "weight", "sources", "layer_range"), inner, max_size=3
        )
    ),
    max_leaves=6,
)
parameters = st.dictionaries(st.sampled_from(sorted(PARAMETERS)), values, max_size=4)
model = st.fixed_dictionaries(
    {"model": st.sampled_from(["./a", "./b", "./c", "org/x@main"])},
    optional={"parameters": parameters, "layer_range": st.sampled_from([[0, 2], [2, 4], [1, 3], [0, 1]])},
)
configs = st.fixed_dictionaries(
    {"merge_method": st.sampled_from(sorted(METHODS))},
    optional={
        "models": st.lists(model, max_size=3) | values,
        "slices": st.lists(st.fixed_dictionaries({"sources": st.lists(model, max_size=3)}), max_size=3) | values,
        "modules": values,
        "base_model": st.sampled_from(["./a", "./base"]) | values,
        "parameters": parameters | values,
        "dtype": words("float32", "bfloat16"),
        "out_dtype": words("float16"),
        "tokenizer": values,
        "tokenizer_source": values,
        "name": words("x"),
        "chat_template": values,
    },
)


@settings(max_examples=300, deadline=None)
@given(config=configs)
def test_any_configuration_is_brought_over_whole_or_refused(
    config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    from mergeflow.document import dump_yaml

    folder = tmp_path_factory.getbasetemp()
    try:
        (folder / "any.yml").write_text(dump_yaml(config))
        found = import_config(folder / "any.yml")
    except MergeflowError as error:
        assert error.exit_code == 2
        return
    (folder / "any.recipe.yaml").write_text(found.text)
    load_recipe(folder / "any.recipe.yaml")

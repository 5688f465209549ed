"""`stack`: layers of several models become one model, which transformers loads and whose config says what it is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file
from torch import Tensor
from toys import call, write_model

import mergeflow
from mergeflow import pipeline
from mergeflow.errors import MergeflowError, Problems
from mergeflow.graph import LayerSource, Stacked
from mergeflow.ops import Stack
from mergeflow.planning.stacks import MOST_LAYERS, stands_before
from mergeflow.recipe import Recipe, load_recipe
from mergeflow.reporting import mermaid
from mergeflow.restacking import restacked
from mergeflow.schema import example

TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}
CAUSAL = {**TEXT, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
KINDS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 2}
BART = {"vocab_size": 64, "d_model": 16, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 2}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32}
TAKEN = [("a", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
LAYERS = [{"model": model, "take": take} for model, take in (("a", "0-1"), ("b", 1), ("a", 2), ("b", "2-2"))]


@dataclass(frozen=True)
class Family:
    """An architecture, the stack of its that is stacked, and which tensors outside are expected from the first, a."""

    auto: Any
    config: Callable[[], Any]
    blocks: str
    before: Sequence[str]
    counts: Mapping[str, Any]
    """What config.json must say afterwards of the layers, now five."""
    named: bool = False
    """Whether the recipe must name the stack."""
    opening: Sequence[str] = ()
    """What only the first layer has."""
    shard_size: str = "5GB"


FAMILIES = {
    "llama": Family(
        transformers.AutoModelForCausalLM,
        lambda: transformers.LlamaConfig(**CAUSAL, tie_word_embeddings=False),
        "model.layers",
        ["model.embed_tokens.weight"],
        {"num_hidden_layers": 5},
        shard_size="8KB",
    ),
    "qwen2, tied, with a list of kinds": Family(
        transformers.AutoModelForCausalLM,
        lambda: transformers.Qwen2Config(
            **CAUSAL, tie_word_embeddings=True, use_sliding_window=True, max_window_layers=4, layer_types=KINDS
        ),
        "model.layers",
        ["model.embed_tokens.weight"],
        {"num_hidden_layers": 5, "max_window_layers": 5},
    ),
    "gpt2": Family(
        transformers.AutoModelForCausalLM,
        lambda: transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=4, n_head=2, n_positions=32),
        "transformer.h",
        ["transformer.wte.weight", "transformer.wpe.weight"],
        {"n_layer": 5},
    ),
    "gpt neo, with its own way to say kinds": Family(
        transformers.AutoModelForCausalLM,
        lambda: transformers.GPTNeoConfig(
            vocab_size=64,
            hidden_size=16,
            num_layers=4,
            num_heads=2,
            max_position_embeddings=32,
            attention_types=[[["global", "local"], 2]],
        ),
        "transformer.h",
        ["transformer.wte.weight", "transformer.wpe.weight"],
        {"num_layers": 5, "attention_layers": ["global", "local", "local", "global", "global"]},
    ),
    "bert": Family(
        transformers.AutoModel,
        lambda: transformers.BertConfig(**TEXT),
        "encoder.layer",
        [
            "embeddings.word_embeddings.weight",
            "embeddings.position_embeddings.weight",
            "embeddings.token_type_embeddings.weight",
            "embeddings.LayerNorm.weight",
            "embeddings.LayerNorm.bias",
        ],
        {"num_hidden_layers": 5},
    ),
    "bert with a head": Family(
        transformers.AutoModelForSequenceClassification,
        lambda: transformers.BertConfig(**TEXT, num_labels=3),
        "bert.encoder.layer",
        [
            "bert.embeddings.word_embeddings.weight",
            "bert.embeddings.position_embeddings.weight",
            "bert.embeddings.token_type_embeddings.weight",
            "bert.embeddings.LayerNorm.weight",
            "bert.embeddings.LayerNorm.bias",
        ],
        {"num_hidden_layers": 5},
    ),
    "vit": Family(
        transformers.AutoModelForImageClassification,
        lambda: transformers.ViTConfig(
            **{k: v for k, v in TEXT.items() if k != "vocab_size"}, image_size=8, patch_size=4
        ),
        "vit.encoder.layer",
        [
            "vit.embeddings.cls_token",
            "vit.embeddings.position_embeddings",
            "vit.embeddings.patch_embeddings.projection.weight",
            "vit.embeddings.patch_embeddings.projection.bias",
        ],
        {"num_hidden_layers": 5},
    ),
    "the encoder of t5": Family(
        transformers.AutoModelForSeq2SeqLM,
        lambda: transformers.T5Config(**T5, decoder_start_token_id=0, pad_token_id=0),
        "encoder.block",
        ["shared.weight"],
        {"num_layers": 5, "num_decoder_layers": 3},
        named=True,
        opening=["layer.0.SelfAttention.relative_attention_bias.weight"],
    ),
    "the decoder of t5": Family(
        transformers.AutoModelForSeq2SeqLM,
        lambda: transformers.T5Config(**T5, decoder_start_token_id=0, pad_token_id=0),
        "decoder.block",
        ["shared.weight", "encoder.*"],
        {"num_layers": 3, "num_decoder_layers": 5},
        named=True,
        opening=["layer.0.SelfAttention.relative_attention_bias.weight"],
    ),
    "the decoder of bart": Family(
        transformers.AutoModelForSeq2SeqLM,
        lambda: transformers.BartConfig(**BART),
        "model.decoder.layers",
        ["model.shared.weight", "model.encoder.*", "model.decoder.embed_*", "model.decoder.layernorm_embedding.*"],
        {"encoder_layers": 3, "decoder_layers": 5},
        named=True,
    ),
    "the language model of llava": Family(
        transformers.AutoModelForImageTextToText,
        lambda: llava(),
        "language_model.model.layers",
        ["language_model.model.embed_tokens.weight", "vision_tower.*", "multi_modal_projector.*"],
        {"text_config.num_hidden_layers": 5, "vision_config.num_hidden_layers": 4},
        named=True,
    ),
    "the eyes of llava": Family(
        transformers.AutoModelForImageTextToText,
        lambda: llava(),
        "vision_tower.encoder.layers",
        ["vision_tower.embeddings.*", "vision_tower.pre_layrnorm.*"],
        {"text_config.num_hidden_layers": 4, "vision_config.num_hidden_layers": 5},
        named=True,
    ),
    "gemma3": Family(
        transformers.AutoModelForCausalLM,
        lambda: transformers.Gemma3TextConfig(**CAUSAL, head_dim=8, layer_types=KINDS),
        "model.layers",
        ["model.embed_tokens.weight"],
        {"num_hidden_layers": 5},
    ),
}


def llava() -> Any:
    vision = transformers.CLIPVisionConfig(
        **{k: v for k, v in TEXT.items() if k != "vocab_size"}, image_size=8, patch_size=4
    )
    return transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**CAUSAL), image_token_index=63
    )


@pytest.fixture(autouse=True)
def no_bars_and_one_thread() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    transformers.utils.logging.enable_progress_bar()


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, read by safetensors' own reader."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found


def fits(name: str, patterns: Sequence[str]) -> bool:
    return any(re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), name) for pattern in patterns)


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Path]:
    """A family, and a folder with two random models of it."""
    family, folder = FAMILIES[request.param], tmp_path_factory.mktemp("stack")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        family.auto.from_config(family.config()).to(torch.bfloat16).save_pretrained(
            folder / name, max_shard_size=family.shard_size
        )
    return family, folder


def made_by(folder: Path, node: Mapping[str, Any], out: Path, **more: Any) -> Path:
    names = {path.name: f"./{path.name}" for path in sorted(folder.iterdir()) if (path / "model.safetensors").exists()}
    names |= {path.name: f"./{path.name}" for path in sorted(folder.iterdir()) if (path / "config.json").exists()}
    more.setdefault("nodes", {"m": dict(node)})
    pipeline.run(Recipe(models=names, folder=folder, **more), out, threads=1, memory=2**26)
    return out


def test_what_is_stacked_loads_and_is_layer_by_layer_what_was_taken(
    models: tuple[Family, Path], tmp_path: Path
) -> None:
    family, folder = models
    node = {"op": "stack", "layers": LAYERS, **({"blocks": family.blocks} if family.named else {})}
    out = made_by(folder, node, tmp_path / "out")
    own = {name: tensors(folder / name) for name in "ab"}
    pattern = re.compile(rf"{re.escape(family.blocks)}\.(\d+)\.(.*)")
    wanted: dict[str, Tensor] = {}
    for name in own["a"]:
        if not pattern.fullmatch(name):
            wanted[name] = own["a" if fits(name, family.before) else "b"][name]
    for n, (model, layer) in enumerate(TAKEN):
        for name, value in own[model].items():
            at = pattern.fullmatch(name)
            if at and int(at[1]) == layer:
                wanted[f"{family.blocks}.{n}.{at[2]}"] = value
    got = tensors(out)
    assert got.keys() == wanted.keys()
    unlike = [
        name for name, value in wanted.items() if got[name].dtype != value.dtype or not torch.equal(got[name], value)
    ]
    assert not unlike
    assert any(fits(name, family.before) for name in wanted)
    assert len([n for n in wanted if n.startswith(f"{family.blocks}.0.")]) >= len(family.opening)
    config = json.loads((out / "config.json").read_text())
    for key, count in family.counts.items():
        section, _, last = key.rpartition(".")
        assert (config[section] if section else config)[last] == count, key
    if "layer_types" in config:
        assert config["layer_types"] == [KINDS[layer] for _, layer in TAKEN]
    loaded, info = family.auto.from_pretrained(out, output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    state = loaded.state_dict()
    for name in wanted.keys() & state.keys():
        assert torch.equal(state[name], wanted[name]), name
    run(family, loaded)


def run(family: Family, model: Any) -> None:
    """A forward pass gives finite numbers."""
    ids = torch.arange(1, 9)[None]
    if family.auto is transformers.AutoModelForImageClassification:
        given = {"pixel_values": torch.ones(1, 3, 8, 8, dtype=torch.bfloat16)}
    elif family.auto is transformers.AutoModelForSeq2SeqLM:
        given = {"input_ids": ids, "decoder_input_ids": ids}
    else:
        given = {"input_ids": ids}
    with torch.inference_mode():
        assert torch.isfinite(next(iter(model(**given).values()))).all()


def test_a_stack_of_all_layers_of_one_model_is_that_model(models: tuple[Family, Path], tmp_path: Path) -> None:
    family, folder = models
    numbers = re.findall(rf"{re.escape(family.blocks)}\.(\d+)", " ".join(tensors(folder / "a")))
    count = max(map(int, numbers)) + 1
    node = {"op": "stack", "layers": [{"model": "a", "take": f"0-{count - 1}"}], "blocks": family.blocks}
    out = made_by(folder, node, tmp_path / "out")
    own, got = tensors(folder / "a"), tensors(out)
    assert got.keys() == own.keys() and all(torch.equal(got[name], own[name]) for name in own)
    mine, theirs = (json.loads((path / "config.json").read_text()) for path in (out, folder / "a"))
    assert mine == theirs


# Toys: names and numbers only.


def toy(seed: int, layers: int = 4, width: int = 3, **more: tuple[int, ...]) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (8, width)}
    shapes |= {f"model.layers.{i}.mlp.weight": (width, width) for i in range(layers)}
    shapes |= {f"model.layers.{i}.norm.weight": (width,) for i in range(layers)}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (8, width)}
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in {**shapes, **more}.items()}


CONFIG = {"model_type": "toy", "num_hidden_layers": 4, "tie_word_embeddings": False}


class Shop:
    """A folder of toy models, and what recipes over them make or say."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.models, self.count = folder, {}, 0  # type: ignore[var-annotated]

    def model(self, name: str, arrays: Mapping[str, Any], *, shards: int = 1, **config: Any) -> dict[str, Any]:
        write_model(self.folder / name, arrays, config={**CONFIG, **config}, shards=shards)
        self.models[name] = {"path": f"./{name}"}
        return dict(arrays)

    def recipe(self, nodes: Mapping[str, Any], **more: Any) -> Recipe:
        if "op" in nodes:
            nodes = {"m": nodes}
        return Recipe(models=self.models, nodes=nodes, folder=self.folder, **more)

    def plan(self, nodes: Mapping[str, Any], **more: Any) -> mergeflow.Plan:
        return pipeline.plan(self.recipe(nodes, **more))

    def make(self, nodes: Mapping[str, Any], **more: Any) -> Path:
        self.count += 1
        out = self.folder / f"out-{self.count}"
        pipeline.run(self.recipe(nodes, **more), out, threads=1, memory=2**26)
        return out

    def refused(self, nodes: Mapping[str, Any], **more: Any) -> list[str]:
        with pytest.raises(MergeflowError) as caught:
            self.plan(nodes, **more)
        errors = caught.value.errors if isinstance(caught.value, Problems) else (caught.value,)
        return [str(error) for error in errors]


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    shop = Shop(tmp_path)
    shop.model("a", toy(0))
    shop.model("b", toy(1))
    return shop


def stack(*layers: Any, **more: Any) -> dict[str, Any]:
    """`stack(("a", "0-1"), ("b", 3, 0.5))`: model, take and scale."""
    keys = ("model", "take", "scale")
    return {"op": "stack", "layers": [dict(zip(keys, one, strict=False)) for one in layers], **more}


def made(out: Path) -> dict[str, Any]:
    return {name: value for path in sorted(out.glob("*.safetensors")) for name, value in load_file(path).items()}


def config_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "config.json").read_text())
    return found


TAKES = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.integers(0, 5)).map(lambda t: (t[0], *sorted(t[1:]))),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shop, dict[str, dict[str, Any]]]:
    shop = Shop(tmp_path_factory.mktemp("three"))
    kinds = {name: [f"{name}{i}" for i in range(6)] for name in "abc"}
    own = {
        name: shop.model(name, toy(seed, 6), num_hidden_layers=6, layer_types=kinds[name])
        for seed, name in enumerate("abc")
    }
    return shop, own


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(takes=TAKES, rest=st.sampled_from([None, "a", "b", "c"]))
def test_any_list_of_takes_gives_these_layers_in_this_order(
    three: tuple[Shop, dict[str, dict[str, Any]]], takes: list[tuple[str, int, int]], rest: str | None
) -> None:
    shop, own = three
    node = stack(*((m, f"{first}-{last}") for m, first, last in takes), **({"rest": {"model": rest}} if rest else {}))
    out = shop.make(node)
    flat = [(model, layer) for model, first, last in takes for layer in range(first, last + 1)]
    first, last = rest or takes[0][0], rest or takes[-1][0]
    wanted = {
        "model.embed_tokens.weight": own[first]["model.embed_tokens.weight"],
        "model.norm.weight": own[last]["model.norm.weight"],
        "lm_head.weight": own[last]["lm_head.weight"],
    }
    for n, (model, layer) in enumerate(flat):
        for part in ("mlp.weight", "norm.weight"):
            wanted[f"model.layers.{n}.{part}"] = own[model][f"model.layers.{layer}.{part}"]
    got = made(out)
    assert got.keys() == wanted.keys()
    assert all(got[name].tobytes() == value.tobytes() for name, value in wanted.items())
    assert config_of(out)["num_hidden_layers"] == len(flat)
    assert config_of(out)["layer_types"] == [f"{model}{layer}" for model, layer in flat]


def test_scale_multiplies_an_entry_by_rules_over_the_names_of_the_output(shop: Shop) -> None:
    a, b = toy(0), toy(1)
    rules = [{"match": "*.layers.3.*", "value": 0.0}, {"match": "*.mlp.*", "value": 0.25}]
    got = made(shop.make(stack(("a", "0-1"), ("b", "2-3", rules), ("a", "1", 2.0))))
    for name, factor, right in (
        ("0.mlp", 1, a["model.layers.0.mlp.weight"]),
        ("2.mlp", 0.25, b["model.layers.2.mlp.weight"]),
        ("2.norm", 1, b["model.layers.2.norm.weight"]),
        ("3.mlp", 0, b["model.layers.3.mlp.weight"]),
        ("3.norm", 0, b["model.layers.3.norm.weight"]),
        ("4.norm", 2, a["model.layers.1.norm.weight"]),
    ):
        assert np.array_equal(got[f"model.layers.{name}.weight"], right * np.float32(factor)), name
    assert np.array_equal(got["model.norm.weight"], a["model.norm.weight"])


def test_a_scale_of_the_node_holds_for_entries_without_their_own_and_never_outside_the_blocks(shop: Shop) -> None:
    a, b = toy(0), toy(1)
    gradient = {"gradient": [0.0, 3.0]}
    got = made(shop.make(stack(("a", "0-1"), ("b", "0", 5.0), ("b", "3"), scale=gradient)))
    factors = [(a, 0, 0.0), (a, 1, 1.0), (b, 0, 5.0), (b, 3, 3.0)]
    for n, (source, layer, factor) in enumerate(factors):
        right = source[f"model.layers.{layer}.mlp.weight"] * np.float32(factor)
        assert np.array_equal(got[f"model.layers.{n}.mlp.weight"], right), n
    assert got["lm_head.weight"].tobytes() == b["lm_head.weight"].tobytes()


def test_a_scale_of_one_computes_nothing(shop: Shop) -> None:
    plan = shop.plan(stack(("a", "0-1", 1.0), ("b", "0", [{"match": "*.mlp.*", "value": 1}, {"value": 1.0}])))
    assert plan.bytes_in == plan.bytes_out - sum(len(shard.header) for shard in plan.shards)
    assert not any(type(row.expression).__name__ == "Apply" for row in plan.rows)


def test_a_layer_that_is_taken_twice_is_read_once(shop: Shop) -> None:
    plan = shop.plan(stack(("a", "0"), ("a", "0"), ("a", "0", 2.0)))
    assert len(plan.loads) == 2 + 3 and len(plan.rows) == 3 * 2 + 3


def test_integer_tensors_come_along_and_are_never_scaled(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    arrays = {**toy(0), **{f"model.layers.{i}.count": np.arange(i, i + 3) for i in range(4)}}
    shop.model("a", arrays)
    got = made(shop.make(stack(("a", "2-3"), ("a", "0"))))
    assert [got[f"model.layers.{n}.count"].tolist() for n in range(3)] == [[2, 3, 4], [3, 4, 5], [0, 1, 2]]
    assert got["model.layers.0.count"].dtype == np.int64
    assert shop.refused(stack(("a", "0"), ("a", "1-2", 0.5))) == [
        "recipe.nodes.m.layers.1: 'model.layers.1.count', 'model.layers.2.count' is int64, and integer and boolean tensors are "
        "never scaled. Begin the `scale` with a rule of value 1 for them."
    ]
    rules = [{"match": "*.count", "value": 1}, {"value": 0.5}]
    assert made(shop.make(stack(("a", "0"), ("a", "1-2", rules))))["model.layers.2.count"].tolist() == [2, 3, 4]


def test_entries_and_the_rest_may_be_nodes_in_place_and_stacks_of_stacks(shop: Shop) -> None:
    a, b = toy(0), toy(1)
    mean = {"op": "linear", "inputs": ["a", "b"]}
    inner = stack(("b", "3"), ("a", "0"))
    node = stack((mean, "1-2"), (inner, "0-1"), (inner, "0"), rest=mean)
    out = shop.make(node)
    got, part = made(out), "model.layers.{}.mlp.weight"
    for n, right in enumerate(
        [
            (a[part.format(1)] + b[part.format(1)]) / 2,
            (a[part.format(2)] + b[part.format(2)]) / 2,
            b[part.format(3)],
            a[part.format(0)],
            b[part.format(3)],
        ]
    ):
        assert np.allclose(got[part.format(n)], right, rtol=1e-6, atol=0), n
    assert np.allclose(got["lm_head.weight"], (a["lm_head.weight"] + b["lm_head.weight"]) / 2, rtol=1e-6, atol=0)
    assert config_of(out)["num_hidden_layers"] == 5
    recipe = shop.recipe(node)
    assert set(recipe.nodes) == {"m", "m.0", "m.1", "m.2", "m.rest"}


@pytest.mark.parametrize(
    "above",
    [
        {"op": "slerp", "inputs": ["one", "two"], "t": 0.5},
        {"op": "linear", "inputs": ["one", "two"]},
        {"op": "task_arithmetic", "base": "one", "inputs": ["two"]},
        {"op": "cast", "model": "one", "to": "float16"},
        {"op": "select", "rules": [{"match": "*norm*", "model": "two"}, "one"]},
        {"op": "select", "rules": [{"match": "@blocks", "model": "one"}, "b"]},
        stack(("one", "0-5")),
    ],
)
def test_the_config_follows_stacks_below_other_ops(shop: Shop, above: Mapping[str, Any]) -> None:
    nodes = {"one": stack(("a", "0-3"), ("b", "2-3")), "two": stack(("b", "0-3"), ("a", "2-3")), "m": above}
    out = shop.make(nodes, output={"node": "m"})
    assert config_of(out)["num_hidden_layers"] == 6
    assert len([name for name in made(out) if name.endswith("mlp.weight")]) == 6


def test_what_a_select_chooses_layer_by_layer_is_followed_layer_by_layer(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    for seed, name in enumerate("abc"):
        shop.model(name, toy(seed), layer_types=[f"{name}{i}" for i in range(4)])
    nodes = {
        "one": stack(("a", "0-3"), ("b", "2-3")),
        "two": stack(("c", "0-2"), ("c", "1-3")),
        "m": {
            "op": "select",
            "rules": [{"match": "*.{2-4}.*", "model": "one"}, {"match": "@blocks", "model": "two"}, "b"],
        },
    }
    out = shop.make(nodes, output={"node": "m"})
    assert config_of(out)["layer_types"] == ["c0", "c1", "a2", "a3", "b2", "c3"]
    assert made(out)["model.layers.4.mlp.weight"].tobytes() == toy(1)["model.layers.2.mlp.weight"].tobytes()
    assert "| 2-3 | `a` | 2-3 |\n| 4 | `b` | 2 |\n" in (out / "README.md").read_text()


def test_the_tensors_of_a_delta_are_stacked_too(shop: Shop) -> None:
    a, b = toy(0), toy(1)
    learnt = {"op": "task_vector", "base": "a", "model": "b"}
    nodes = {
        "deep": stack(("a", "0-3"), ("a", "3")),
        "learnt": stack((learnt, "0-3"), (learnt, "3")),
        "m": {"op": "add", "base": "deep", "inputs": [{"model": "learnt", "weight": 0.5}]},
    }
    got = made(shop.make(nodes, output={"node": "m"}))
    x, y = a["model.layers.3.mlp.weight"], b["model.layers.3.mlp.weight"]
    assert np.allclose(got["model.layers.4.mlp.weight"], x + (y - x) * np.float32(0.5), rtol=1e-6, atol=1e-7)
    assert "a delta, and the layers are weights" in shop.refused(stack(("a", "0"), rest=learnt))[0]


# What stands outside the blocks.


def test_names_say_what_stands_before_the_blocks() -> None:
    llama, bert, t5, vlm = "model.layers", "bert.encoder.layer", "encoder.block", "language_model.model.layers"
    for name, blocks, before in (
        ("model.embed_tokens.weight", llama, True),
        ("model.norm.weight", llama, False),
        ("lm_head.weight", llama, False),
        ("gpt_neox.embed_in.weight", "gpt_neox.layers", True),
        ("embed_out.weight", "gpt_neox.layers", False),
        ("transformer.word_embeddings_layernorm.weight", "transformer.h", True),
        ("transformer.ln_f.weight", "transformer.h", False),
        ("bert.embeddings.LayerNorm.bias", bert, True),
        ("bert.pooler.dense.weight", bert, False),
        ("cls.predictions.decoder.weight", bert, False),
        ("cls.predictions.transform.dense.weight", bert, False),
        ("shared.weight", t5, True),
        ("encoder.final_layer_norm.weight", t5, False),
        ("decoder.embed_tokens.weight", t5, False),
        ("decoder.block.0.layer.0.SelfAttention.q.weight", t5, False),
        ("encoder.embed_tokens.weight", "decoder.block", True),
        ("encoder.final_layer_norm.weight", "decoder.block", True),
        ("decoder.final_layer_norm.weight", "decoder.block", False),
        ("vision_model.embeddings.class_embedding", "vision_model.encoder.layers", True),
        ("vision_model.pre_layrnorm.weight", "vision_model.encoder.layers", True),
        ("vision_model.post_layernorm.weight", "vision_model.encoder.layers", False),
        ("vision_tower.encoder.layers.0.norm.weight", vlm, True),
        ("multi_modal_projector.linear.weight", vlm, True),
        ("language_model.lm_head.weight", "vision_tower.encoder.layers", False),
        ("cls_token", "blocks", True),
        ("pos_embed", "blocks", True),
        ("patch_embed.proj.weight", "blocks", True),
        ("norm_pre.weight", "blocks", True),
        ("fc_norm.weight", "blocks", False),
        ("head.weight", "blocks", False),
    ):
        assert stands_before(name, blocks) is before, (name, blocks)


def test_what_the_last_model_lacks_or_has_outside_the_blocks_is_an_error_and_rest_is_the_way_out(shop: Shop) -> None:
    shop.model("c", {**{k: v for k, v in toy(2).items() if k != "lm_head.weight"}, "score.weight": np.ones((2, 3))})
    fix = "Write `rest: {model: a}` to take all that is outside the blocks from there."
    assert shop.refused(stack(("a", "0-1"), ("c", "0-1"))) == [
        f"recipe.nodes.m.layers.1: 'c' lacks 'lm_head.weight', which 'a' has after the blocks. {fix}",
        f"recipe.nodes.m.layers.1: 'c' has 'score.weight' after the blocks, which 'a' lacks. {fix}",
    ]
    assert "lm_head.weight" in made(shop.make(stack(("a", "0-1"), ("c", "0-1"), rest={"model": "a"})))
    bare = {k: v for k, v in toy(3).items() if "embed" not in k}
    shop.model("bare", bare)
    assert shop.refused(stack(("bare", "0-1"), ("a", "0-1"))) == [
        "recipe.nodes.m.layers.1: 'a' has 'model.embed_tokens.weight' before the blocks, which 'bare' lacks. "
        f"{fix.replace('model: a', 'model: bare')}"
    ]
    wide = {**toy(3), "lm_head.weight": np.ones((9, 3), np.float32)}
    shop.model("d", wide)
    assert shop.refused(stack(("a", "0-1"), ("d", "0-1"))) == [
        f"recipe.nodes.m.layers.1: 'lm_head.weight' has shape [9, 3] in 'd', and [8, 3] in 'a'. {fix}"
    ]


def test_a_tied_head_is_the_embedding_of_the_first(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    a, b = toy(0), toy(1)
    for name, arrays in (("a", a), ("b", b)):
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
        shop.model(name, arrays, tie_word_embeddings=True)
    shop.model("loose", toy(2))
    out = shop.make(stack(("a", "0-1"), ("b", "0-1")))
    assert "lm_head.weight" not in made(out) and config_of(out)["tie_word_embeddings"] is True
    assert np.array_equal(made(out)["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    (line,) = shop.refused(stack(("a", "0-1"), ("loose", "0-1")))
    assert line == (
        "recipe.nodes.m.layers.1: 'loose' has 'lm_head.weight' after the blocks, which 'a' lacks. 'a' is tied and 'loose' is "
        "not: write `tied: untie` or `tied: trust_config` under `output:`."
    )
    untied = shop.make(stack(("a", "0-1"), ("loose", "0-1")), output={"tied": "untie"})
    assert config_of(untied)["tie_word_embeddings"] is False
    assert np.array_equal(made(untied)["lm_head.weight"], toy(2)["lm_head.weight"])


# What only the first layer has.


def opened(seed: int, layers: int = 3) -> dict[str, Any]:
    arrays = toy(seed, layers)
    return {**arrays, "model.layers.0.bias.weight": np.full((2,), seed, np.float32)}


def test_what_speaks_for_the_whole_stack_stays_in_its_first_layer(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    for seed, name in enumerate("ab"):
        shop.model(name, opened(seed), num_hidden_layers=3)
    bias = "model.layers.{}.bias.weight"
    for node, value in (
        (stack(("b", "0-2"), ("a", "0-2")), 1),
        (stack(("b", "1-2"), ("a", "0-2")), 1),
        (stack(("b", "1-2"), ("a", "0-2"), rest={"model": "a"}), 0),
        (stack(("b", "0"), ("a", "0-2"), rest={"model": "a"}), 1),
    ):
        got = made(shop.make(node))
        assert [name for name in got if "bias" in name] == [bias.format(0)]
        assert got[bias.format(0)].tolist() == [value, value]
    plan = shop.plan(stack(("b", "0-2"), ("a", "0-2"), ("a", "0")))
    assert (
        "a: 'model.layers.0.bias.weight' speaks for the whole stack, and is left out of layers 3, 6 of 'm'"
        in plan.notes
    )


def test_layers_of_several_kinds_are_stacked_and_moving_one_is_a_warning(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    arrays = toy(0, 4)
    arrays["model.layers.0.dense.weight"] = arrays.pop("model.layers.0.mlp.weight")
    shop.model("a", arrays)
    assert not shop.plan(stack(("a", "0-2"), ("a", "1-3"))).warnings
    plan = shop.plan(stack(("a", "0-2"), ("a", "0-3")))
    assert plan.warnings == (
        "recipe.nodes.m: layers of 'a' are of several kinds, and those at 3 are of another kind than it has there. "
        "Look whether its config can say so, and set it under `output.config`",
    )
    assert "model.layers.3.dense.weight" in {row.name for row in plan.rows}
    shop.model("kinds", arrays, layer_types=["dense", "moe", "moe", "moe"])
    out = shop.make(stack(("kinds", "0-2"), ("kinds", "0-3")))
    assert config_of(out)["layer_types"] == ["dense", "moe", "moe", "dense", "moe", "moe", "moe"]


# config.json.


def layers_of(*taken: tuple[str, int], blocks: str = "model.layers", **like: int) -> Stacked:
    counts = {key.replace("_", "."): count for key, count in like.items()} or {blocks: 4}
    return Stacked("m", blocks, tuple(LayerSource(m, n, m, n) for m, n in taken), counts)


@pytest.mark.parametrize(
    ("blocks", "like", "config", "wanted"),
    [
        ("transformer.h", {}, {"n_layer": 4, "n_head": 4}, {"n_layer": 2, "n_head": 4}),
        ("layers", {}, {"num_layers": 4}, {"num_layers": 2}),
        (
            "model.language_model.layers",
            {"model.visual.blocks": 4},
            {"text_config": {"num_hidden_layers": 4}, "vision_config": {"depth": 4}},
            {"text_config": {"num_hidden_layers": 2}, "vision_config": {"depth": 4}},
        ),
        (
            "model.visual.blocks",
            {"model.language_model.layers": 4},
            {"text_config": {"num_hidden_layers": 4}, "vision_config": {"depth": 4}},
            {"text_config": {"num_hidden_layers": 4}, "vision_config": {"depth": 2}},
        ),
        ("vision_model.encoder.layers", {}, {"num_hidden_layers": 4}, {"num_hidden_layers": 2}),
        ("model.decoder.layers", {}, {"num_hidden_layers": 4}, {"num_hidden_layers": 2}),
        (
            "model.encoder.layers",
            {"model.decoder.layers": 4},
            {"encoder_layers": 4, "decoder_layers": 4, "num_hidden_layers": 4},
            {"encoder_layers": 2, "decoder_layers": 4, "num_hidden_layers": 2},
        ),
        (
            "model.decoder.layers",
            {"model.encoder.layers": 4},
            {"encoder_layers": 4, "decoder_layers": 4, "num_hidden_layers": 4},
            {"encoder_layers": 4, "decoder_layers": 2, "num_hidden_layers": 4},
        ),
        (
            "encoder.block",
            {"decoder.block": 4},
            {"num_layers": 4},
            {"num_layers": 2, "num_decoder_layers": 4},
        ),
        (
            "decoder.block",
            {"encoder.block": 4},
            {"num_layers": 4},
            {"num_layers": 4, "num_decoder_layers": 2},
        ),
        (
            "decoder.model.layers",
            {"encoder.encoder.layer": 4},
            {"encoder": {"num_hidden_layers": 4}, "decoder": {"num_hidden_layers": 4}},
            {"encoder": {"num_hidden_layers": 4}, "decoder": {"num_hidden_layers": 2}},
        ),
    ],
)
def test_the_key_that_counts_the_layers_is_found_in_each_family(
    blocks: str, like: dict[str, int], config: dict[str, Any], wanted: dict[str, Any]
) -> None:
    stacked = Stacked("m", blocks, (LayerSource("a", 0, "a", 0), LayerSource("a", 3, "a", 3)), {blocks: 4, **like})
    assert restacked(config, [stacked], {"a": config}, {}) == (wanted, [])


def test_both_stacks_of_an_encoder_and_decoder_can_be_stacked_in_turn(tmp_path: Path) -> None:
    arrays = {"shared.weight": np.ones((8, 3), np.float32)}
    for part in ("encoder", "decoder"):
        arrays |= {f"{part}.block.{i}.w": np.full((3,), i, np.float32) for i in range(2)}
    shop = Shop(tmp_path)
    write_model(tmp_path / "t5", arrays, config={"num_layers": 2})
    shop.models["t5"] = {"path": "./t5"}
    nodes = {
        "deep": stack(("t5", "0-1"), ("t5", "0-1"), blocks="encoder.block"),
        "m": stack(("deep", "0-1"), ("deep", "1"), blocks="decoder.block"),
    }
    out = shop.make(nodes, output={"node": "m"})
    assert config_of(out)["num_layers"] == 4 and config_of(out)["num_decoder_layers"] == 3
    got = made(out)
    assert [int(got[f"encoder.block.{n}.w"][0]) for n in range(4)] == [0, 1, 0, 1]
    assert [int(got[f"decoder.block.{n}.w"][0]) for n in range(3)] == [0, 1, 1]


def test_per_layer_lists_follow_the_layers_of_the_models_they_come_from() -> None:
    a = {
        "num_hidden_layers": 4,
        "layer_types": ["a0", "a1", "a2", "a3"],
        "intermediate_size": [10, 11, 12, 13],
        "architectures": ["W", "X", "Y", "Z"],
        "eos_token_id": [1, 2, 3, 4],
        "image_mean": [0, 0, 0, 0],
        "three": [1, 2, 3],
        "mlp_only_layers": [0, 3],
        "max_window_layers": 4,
        "first_k_dense_replace": 1,
    }
    b = {**a, "layer_types": ["b0", "b1", "b2", "b3"], "intermediate_size": [20, 21, 22, 23], "mlp_only_layers": [2]}
    stacked = layers_of(("a", 0), ("a", 3), ("b", 2), ("b", 3), ("a", 3))
    got, warnings = restacked(a, [stacked], {"a": a, "b": b}, {})
    assert not warnings
    assert got == {
        **a,
        "num_hidden_layers": 5,
        "layer_types": ["a0", "a3", "b2", "b3", "a3"],
        "intermediate_size": [10, 13, 22, 23, 13],
        "mlp_only_layers": [0, 1, 2, 4],
        "max_window_layers": 5,
    }
    short, _ = restacked({**a, "max_window_layers": 3}, [layers_of(("a", 0))], {"a": a}, {})
    assert short["max_window_layers"] == 1 and short["first_k_dense_replace"] == 1


def test_what_a_config_cannot_be_made_to_say_is_a_warning(shop: Shop) -> None:
    shop.model("odd", toy(2), num_hidden_layers=7)
    node = stack(("odd", "0-1"))
    line = (
        "output: no key of config.json says that 'model.layers' has 4 layers, so none was changed. "
        "Set the one that counts them to 2 under `config:`"
    )
    assert line in shop.plan(node).warnings
    set_by_hand = shop.make(node, output={"config": {"num_hidden_layers": 2}})
    assert config_of(set_by_hand)["num_hidden_layers"] == 2
    assert line not in shop.plan(node, output={"config": {"num_hidden_layers": 2}}).warnings
    config = {
        "num_hidden_layers": 4,
        "layer_types": list("wxyz"),
        "sliding_window_pattern": 2,
        "decoder_sparse_step": 2,
    }
    _, warnings = restacked(config, [layers_of(("a", 0), ("b", 2))], {"a": config, "b": {}}, {})
    assert warnings == [
        "`layer_types` of config.json is not said of the layers of 'b', so they take what it says of the layers of these "
        "numbers. Look at it, and set `layer_types` under `config:`",
        "`decoder_sparse_step: 2` of config.json gives layers their kind by their number, and in 'model.layers' layers have "
        "moved. Take whole periods, or set the kinds under `config:`",
    ]
    assert not restacked(config, [layers_of(("a", 2), ("a", 3))], {"a": config}, {})[1]


def test_the_outputs_own_config_wins(shop: Shop) -> None:
    out = shop.make(stack(("a", "0-1")), output={"config": {"num_hidden_layers": 99}})
    assert config_of(out)["num_hidden_layers"] == 99


# `like`, dtypes and files.


def test_like_is_the_rest_or_the_first_and_another_like_fits_modulo_the_number_of_the_layer(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    for seed, name in enumerate(("a", "b", "c")):
        shop.model(name, toy(seed, 4 + seed), num_hidden_layers=4 + seed, who=name)
    node = stack(("a", "0-3"), ("b", "3-4"))
    assert config_of(shop.make(node))["who"] == "a"
    assert config_of(shop.make({**node, "rest": {"model": "c"}}))["who"] == "c"
    out = shop.make(node, output={"like": "b"})
    assert (config_of(out)["who"], config_of(out)["num_hidden_layers"]) == ("b", 6)
    shop.model("d", {k.replace("mlp", "ffn"): v for k, v in toy(3).items()})
    (line,) = shop.refused(node, output={"like": "d"})
    assert line == (
        "recipe.output.like: `like: d` must have the tensors of 'm', and it lacks 'model.layers.0.mlp.weight', "
        "'model.layers.1.mlp.weight', 'model.layers.2.mlp.weight' and 3 more. Name a model under `like:` that has the same tensors."
    )


def test_a_layer_takes_the_dtype_that_like_has_for_the_layer_it_came_from(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    arrays = toy(0)
    half = {name: value.astype(np.float16) if ".3." in name else value for name, value in arrays.items()}
    shop.model("a", half)
    shop.model("b", {name: value.astype(np.float16) for name, value in toy(1, 5).items()}, num_hidden_layers=5)
    got = made(shop.make(stack(("a", "3"), ("a", "0"), ("b", "2-4"))))
    kinds = [got[f"model.layers.{n}.mlp.weight"].dtype.name for n in range(5)]
    assert kinds == ["float16", "float32", "float32", "float16", "float16"]


def test_files_are_no_larger_than_those_of_like(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    shop.model("a", toy(0, width=32), shards=3)
    shop.model("b", toy(1, width=32))
    out = shop.make(stack(("a", "0-3"), ("a", "0-3")))
    largest = max(path.stat().st_size for path in (tmp_path / "a").glob("*.safetensors"))
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 3 and all((out / name).stat().st_size <= largest + 2000 for name in files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(made(out)) and set(index["weight_map"].values()) == set(files)
    assert [path.name for path in shop.make(stack(("b", "0-3"), ("b", "0-3"))).glob("*.safetensors")] == [
        "model.safetensors"
    ]


# What is said of it.


def test_plan_card_and_manifest_say_which_layer_came_from_where(shop: Shop) -> None:
    node = stack(("a", "0-2"), ("b", "2"), ("b", "3"), ("a", "0", 0.5))
    assert "'m' has 6 layers: 0-2 <- a 0-2, 3-4 <- b 2-3, 5 <- a 0" in shop.plan(node).notes
    out = shop.make(node)
    card = (out / "README.md").read_text()
    assert "## Layers\n\n`model.layers`, as node `m` stacks it:\n\n| layers | from | its layers |\n" in card
    assert "| 0-2 | `a` | 0-2 |\n| 3-4 | `b` | 2-3 |\n| 5 | `a` | 0 |\n" in card
    assert "- `scale`\n- `stack`\n" in card
    manifest = json.loads((out / "mergeflow.json").read_text())
    assert manifest["layers"]["model.layers"][1] == {"layers": "3-4", "source": "b", "source_layers": "2-3"}
    plain = json.loads((shop.make({"op": "linear", "inputs": ["a", "b"]}) / "mergeflow.json").read_text())
    assert "layers" not in plain
    graph = mermaid(shop.recipe({"m": {**node, "rest": {"model": "b"}}}))
    assert '-->|"0-2"|' in graph and '-->|"3"|' in graph and "-. rest .->" in graph


def test_the_written_recipe_makes_the_same_bytes_again(shop: Shop) -> None:
    out = shop.make(stack(("a", "0-2"), ("b", 3, 0.5), rest={"model": "b"}))
    again = shop.folder / "again"
    pipeline.run(load_recipe(out / "recipe.yaml"), again, threads=2, memory=2**27)
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert (again / "config.json").read_bytes() == (out / "config.json").read_bytes()


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in enumerate(("first", "second")):
        write_model(tmp_path / name, toy(seed, 3), config={**CONFIG, "num_hidden_layers": 3})
    (tmp_path / "stack.yaml").write_text(example(Stack))
    monkeypatch.chdir(tmp_path)
    done = call("run", "stack.yaml", "-q")
    assert done.code == 0, done.err
    assert config_of(tmp_path / "stack-example")["num_hidden_layers"] == 4
    assert "layers: a list of {model: ..., take:" in call("ops", "stack").out


# Refusals.


def test_layers_that_do_not_exist_are_an_error_with_those_that_do(shop: Shop) -> None:
    shop.model("gap", {k: v for k, v in toy(2, 6).items() if ".3." not in k}, num_hidden_layers=6)
    assert shop.refused(stack(("a", "2-4"), ("gap", 3), ("gap", "0-999999999"))) == [
        "recipe.nodes.m.layers.0.take: 'a' lacks some of the layers 2-4. It has 0-3, and both ends of a range are included.",
        "recipe.nodes.m.layers.1.take: 'gap' has no layer 3. It has 0-2, 4-5, and both ends of a range are included.",
        "recipe.nodes.m.layers.2.take: 'gap' lacks some of the layers 0-999999999. It has 0-2, 4-5, and both ends of a "
        "range are included.",
    ]


@pytest.mark.parametrize(
    ("node", "line"),
    [
        (
            stack(("a", "3-1")),
            "recipe.nodes.m.layers.0.take: `take` cannot be '3-1': the range runs backwards: write '1-3'",
        ),
        (
            stack(("a", "all")),
            "recipe.nodes.m.layers.0.take: `take` cannot be 'all': layers are written as '0-15' (both ends included), or one as 7",
        ),
        (
            stack(("a", True)),
            "recipe.nodes.m.layers.0.take: `take` cannot be true: layers are written as '0-15' (both ends included), or one as 7",
        ),
        (
            {"op": "stack", "layers": ["a"]},
            "recipe.nodes.m.layers.0: `take` is missing. Add `take:`.",
        ),
        (
            {"op": "stack", "layers": []},
            "recipe.nodes.m.layers: `layers` cannot be []: it should have at least 1 item after validation, not 0",
        ),
        (
            {"op": "stack", "inputs": ["a"]},
            "recipe.nodes.m.inputs: `stack` has no `inputs`. It takes `layers:`, each with a `model:` and what to `take:`.",
        ),
        (
            {"op": "linear", "layers": ["a"]},
            "recipe.nodes.m.layers: `linear` has no `layers`. It takes a list of `inputs:`.",
        ),
        (
            stack(("a", "0-1"), rest="b"),
            "recipe.nodes.m.rest: `rest` cannot be 'b': it is {model: NAME}. Write `rest: {model: b}`.",
        ),
        (
            stack(("a", "0-1"), rest={"model": "d"}),
            "recipe.nodes.m.rest.model: there is no model or node 'd'. There are a, b, m.",
        ),
        (
            stack(("a", "0-1"), only="*"),
            "recipe.nodes.m.only: unknown key 'only'. Keys here are op, layers, rest, scale, blocks.",
        ),
        (
            {"op": "stack", "layers": [{"model": "a", "takes": "0-1", "take": "0"}]},
            "recipe.nodes.m.layers.0.takes: unknown key 'takes'. Did you mean 'take'?",
        ),
    ],
)
def test_what_the_grammar_refuses(shop: Shop, node: Mapping[str, Any], line: str) -> None:
    with pytest.raises(MergeflowError) as caught:
        shop.recipe(node)
    assert str(caught.value) == line


def test_several_stacks_must_be_told_apart(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    arrays = {f"{part}.block.{i}.w": np.ones(3) for part in ("encoder", "decoder") for i in range(2 + (part < "e"))}
    shop.model("t", {**arrays, "shared.weight": np.ones((4, 3))})
    assert shop.refused(stack(("t", "0-1"))) == [
        "recipe.nodes.m.layers.0: 't' has several numbered stacks: 'decoder.block' (3 layers), 'encoder.block' (2 layers). Name the "
        "one to stack, e.g. `blocks: decoder.block`; the others belong to what is outside."
    ]
    assert shop.refused(stack(("t", "0-1"), blocks="encoder.blocks")) == [
        "recipe.nodes.m.blocks: 't' has no numbered stack 'encoder.blocks'. Did you mean 'encoder.block'?"
    ]
    assert shop.refused(stack(("t", "0-1"), blocks="x")) == [
        "recipe.nodes.m.blocks: 't' has no numbered stack 'x'. Its stacks are 'decoder.block' (3 layers), 'encoder.block' (2 layers)."
    ]


def test_models_without_layers_or_of_another_architecture_are_refused(shop: Shop) -> None:
    shop.model("flat", {"w": np.ones(3, np.float32)})
    shop.model("bert", {k.replace("model.layers", "encoder.layer"): v for k, v in toy(2).items()})
    shop.model("deeper", {f"language.{k}": v for k, v in toy(2).items()})
    shop.model("other", {k.replace("mlp", "ffn"): v for k, v in toy(2).items()})
    shop.model("wide", toy(2, width=5))
    fix = "Only layers of one architecture and size can be stacked, and names and config are those of 'a'."
    assert shop.refused(stack(("flat", "0-1"))) == [
        "recipe.nodes.m.layers.0: 'flat' has no numbered layers. Only models whose names have numbers, such as 'layers.0.weight', have "
        "layers to stack."
    ]
    assert shop.refused(stack(("a", "0-1"), ("bert", "0-1"))) == [
        "recipe.nodes.m.layers.1: 'bert' has no numbered stack 'model.layers'. Its stacks are 'encoder.layer' (4 layers): only "
        "layers of one architecture can be stacked."
    ]
    assert shop.refused(stack(("a", "0-1"), ("deeper", "0-1"))) == [
        "recipe.nodes.m.layers.1: 'deeper' has no numbered stack 'model.layers'. A prefix is all that differs: write "
        "`rename: {'language.*': '*'}` on 'deeper' under `models:`."
    ]
    assert shop.refused(stack(("a", "0-1"), ("other", "3"), rest={"model": "a"})) == [
        f"recipe.nodes.m.layers.1: 'other' lacks 'model.layers.3.mlp.weight', which layers of 'a' have. {fix}",
        f"recipe.nodes.m.layers.1: 'other' has 'model.layers.3.ffn.weight', which layers of 'a' lack. {fix}",
    ]
    assert shop.refused(stack(("a", "0-1"), ("wide", "0-1"), rest={"model": "a"})) == [
        "recipe.nodes.m.layers.1: 'model.layers.0.mlp.weight', 'model.layers.1.mlp.weight' has shape [5, 5] in 'wide', and [3, 3] in "
        f"'a'. {fix}",
        "recipe.nodes.m.layers.1: 'model.layers.0.norm.weight', 'model.layers.1.norm.weight' has shape [5] in 'wide', and [3] in "
        f"'a'. {fix}",
    ]


def test_a_rule_that_fits_no_layer_of_its_entry_is_an_error(shop: Shop) -> None:
    rules = [{"match": "*.layers.0.*", "value": 0.5}, {"value": 1}]
    (line,) = shop.refused(stack(("a", "0-1"), ("b", "0-1", rules)))
    assert line.startswith("recipe.nodes.m.layers.1.scale: the pattern '*.layers.0.*' fits none of the 4 tensors.")
    (line,) = shop.refused(stack(("a", "0-1"), ("b", "0-1"), scale=[{"match": "*embed*", "value": 2}, {"value": 1}]))
    assert line.startswith("recipe.nodes.m.scale: the pattern '*embed*' fits none of the 8 tensors.")


def test_a_quantised_model_is_stacked_as_it_is_and_never_scaled(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    arrays = {**toy(0), **{f"model.layers.{i}.mlp.weight_scale": np.ones(1, np.float32) for i in range(4)}}
    shop.model("q", arrays, quantization_config={"bits": 8})
    out = shop.make(stack(("q", "0-3"), ("q", "2-3")))
    assert config_of(out)["quantization_config"] == {"bits": 8} and config_of(out)["num_hidden_layers"] == 6
    lines = shop.refused(stack(("q", "0-3"), ("q", "2-3", 0.5)))
    assert all("'q' is quantised (its config.json has a quantization_config)." in line for line in lines)


def test_stacks_of_stacks_do_not_grow_without_end(shop: Shop) -> None:
    nodes: dict[str, Any] = {"s0": stack(("a", "0-3"), ("a", "0-3"))}
    for i in range(1, 14):
        size = 8 * 2 ** (i - 1) - 1
        nodes[f"s{i}"] = stack((f"s{i - 1}", f"0-{size}"), (f"s{i - 1}", f"0-{size}"))
    lines = shop.refused(nodes)
    assert any(
        f"the stack would have 16384 layers, and {MOST_LAYERS} are the most. Take fewer." in line for line in lines
    )


def test_an_artifact_has_no_layers_to_stack(shop: Shop) -> None:
    merged = {"op": "emr", "base": "a", "inputs": ["b"]}
    assert shop.refused(stack((merged, "0-1"))) == [
        "recipe.nodes.m.layers.0: 'm.0' is an artifact, and has no layers to stack. Stack models or deltas, such as what "
        "`emr_apply` makes of an artifact."
    ]


def test_tensors_in_memory_cannot_be_stacked() -> None:
    with pytest.raises(MergeflowError, match="stack chooses tensors by name"):
        Stack()([torch.ones(2)])
    with pytest.raises(TypeError, match="when it is planned"):
        Stack().compute([], None)  # type: ignore[arg-type]

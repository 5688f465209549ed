"""Merges of real architectures, small: what mergeflow writes loads with transformers, and holds what plain torch computes."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor

import mergeflow

RECIPE = """\
recipe: 1
name: merged
models: {base: ./base, a: ./a, b: ./b}
nodes:
  mean: {op: linear, inputs: [{model: a, weight: 0.7}, {model: b, weight: 0.3}]}
  trimmed: {op: ties, base: base, inputs: [a, b], density: 0.3, weight: 1.0}
outputs:
  linear: {node: mean}
  ties: {node: trimmed}
"""
TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CAUSAL = {**TEXT, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IMAGE = {"image_size": 16, "patch_size": 8, "num_labels": 3}


@dataclass(frozen=True)
class Family:
    """An architecture as it is built, stored and loaded."""

    auto: Any
    config: Callable[[], Any]
    dtype: torch.dtype
    shard_size: str = "5GB"


FAMILIES = {
    "llama": Family(
        transformers.AutoModelForCausalLM,
        lambda: transformers.LlamaConfig(**CAUSAL, tie_word_embeddings=False),
        torch.bfloat16,
        "20KB",
    ),
    "qwen3": Family(
        transformers.AutoModelForCausalLM,
        lambda: transformers.Qwen3Config(**CAUSAL, head_dim=8, tie_word_embeddings=True),
        torch.bfloat16,
    ),
    "bert": Family(transformers.AutoModel, lambda: transformers.BertConfig(**TEXT), torch.float32, "30KB"),
    "vit": Family(
        transformers.AutoModelForImageClassification,
        lambda: transformers.ViTConfig(**{**TEXT, **IMAGE}),
        torch.float32,
    ),
    "t5": Family(
        transformers.AutoModelForSeq2SeqLM,
        lambda: transformers.T5Config(
            vocab_size=96,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
            tie_word_embeddings=True,
        ),
        torch.float32,
        "40KB",
    ),
    "mixtral": Family(
        transformers.AutoModelForCausalLM,
        lambda: transformers.MixtralConfig(**CAUSAL, num_local_experts=4, num_experts_per_tok=2),
        torch.bfloat16,
        "50KB",
    ),
}


@pytest.fixture(autouse=True)
def no_bars_and_logs_that_are_seen() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.enable_propagation()
    yield
    transformers.utils.logging.disable_propagation()
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module", params=FAMILIES)
def merged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, pathlib.Path]:
    """The name of a family, and a folder with its three models and what a run made of them in `out`."""
    folder = tmp_path_factory.mktemp(request.param)
    make_models(FAMILIES[request.param], folder)
    (folder / "recipe.yaml").write_text(RECIPE)
    result = mergeflow.run(mergeflow.load_recipe(folder / "recipe.yaml"), folder / "out", threads=2)
    assert result.made
    return request.param, folder


def make_models(family: Family, folder: pathlib.Path) -> None:
    """A base and two fine-tunes of it by random noise, with a tokenizer and, for BERT, the old int64 buffer."""
    torch.manual_seed(0)
    model = family.auto.from_config(family.config()).to(family.dtype)
    trained = {name: value.detach().clone() for name, value in model.named_parameters()}
    for index, name in enumerate(("base", "a", "b")):
        torch.manual_seed(index)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                noise = torch.randn_like(parameter, dtype=torch.float32) * 0.02 * bool(index)
                parameter.copy_(trained[key].float() + noise)
        model.save_pretrained(folder / name, max_shard_size=family.shard_size)
        if family.auto is not transformers.AutoModelForImageClassification:
            tokenizer().save_pretrained(folder / name)
        if family.auto is transformers.AutoModel:
            add_buffer(folder / name)


def add_buffer(folder: pathlib.Path) -> None:
    """Store `embeddings.position_ids`, as checkpoints of years ago do."""
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    file = index["weight_map"]["embeddings.word_embeddings.weight"]
    save_file(
        {**load_file(folder / file), "embeddings.position_ids": torch.arange(512).expand(1, -1).contiguous()},
        folder / file,
        metadata={"format": "pt"},
    )
    index["weight_map"]["embeddings.position_ids"] = file
    index_path.write_text(json.dumps(index))


def tokenizer() -> Any:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 96)}}
    inner = Tokenizer(WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )


def tensors(folder: pathlib.Path) -> dict[str, Tensor]:
    """Every tensor of a folder, read by safetensors' own reader."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["format"] == "pt"
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found


def expected_linear(a: Tensor, b: Tensor) -> Tensor:
    return (0.7 * a.double() + 0.3 * b.double()).to(a.dtype)


def expected_ties(base: Tensor, a: Tensor, b: Tensor, density: float = 0.3) -> Tensor:
    """TIES of whole tensors in a dozen lines of torch."""
    kept = []
    for one in (a, b):
        delta = one.float() - base.float()
        count = max(1, int(density * delta.numel()))
        # Largest first, the lowest index first among equals.
        order = torch.sort(delta.abs().flatten(), descending=True, stable=True).indices[:count]
        mask = torch.zeros(delta.numel(), dtype=torch.bool)
        mask[order] = True
        kept.append(torch.where(mask.view_as(delta), delta, 0.0))
    stack = torch.stack(kept)
    sign = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    agreeing = (stack * sign) > 0
    total = (stack * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)
    return (base.float() + total).to(base.dtype)


def expected(folder: pathlib.Path, op: str) -> dict[str, Tensor]:
    base, a, b = (tensors(folder / name) for name in ("base", "a", "b"))
    made = {}
    for name, one in a.items():
        if not one.is_floating_point():
            made[name] = one
        elif op == "linear":
            made[name] = expected_linear(one, b[name])
        else:
            made[name] = expected_ties(base[name], one, b[name])
    return made


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Equal up to the last bit of float32's rounding, or one step of bfloat16."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        if not value.is_floating_point():
            assert torch.equal(found[name], value), name
        else:
            step = 2.0**-7 if value.dtype is torch.bfloat16 else 1e-6
            torch.testing.assert_close(
                found[name], value, rtol=step, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.mark.parametrize("op", ["linear", "ties"])
def test_the_output_holds_what_plain_torch_computes(merged: tuple[str, pathlib.Path], op: str) -> None:
    _, folder = merged
    found, base = tensors(folder / "out" / op), tensors(folder / "base")
    assert_same(found, expected(folder, op))
    assert not all(torch.equal(found[name], base[name]) for name in base)


@pytest.mark.parametrize("op", ["linear", "ties"])
def test_the_output_loads_without_a_missing_key_or_a_warning(
    merged: tuple[str, pathlib.Path], op: str, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, folder = merged
    family = FAMILIES[name]
    # What plain torch computes, in a folder of its own: transformers may fuse or split what it loads.
    reference = tmp_path / "reference"
    reference.mkdir()
    save_file(expected(folder, op), reference / "model.safetensors", metadata={"format": "pt"})
    (reference / "config.json").write_bytes((folder / "a" / "config.json").read_bytes())
    loaded, info = family.auto.from_pretrained(folder / "out" / op, output_loading_info=True, dtype="auto")
    wanted = family.auto.from_pretrained(reference, dtype="auto")
    assert not any(info.values()), info
    assert not caplog.records, caplog.text
    assert_same(dict(loaded.state_dict()), dict(wanted.state_dict()))
    assert loaded.dtype == family.dtype
    for parameter in loaded.parameters():
        assert torch.isfinite(parameter).all()


def test_a_tensor_that_is_missing_would_be_seen(
    merged: tuple[str, pathlib.Path], tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The test above can fail."""
    name, folder = merged
    found = tensors(folder / "a")
    dropped = next(key for key in found if key.endswith("norm.weight") or "LayerNorm" in key or "layernorm" in key)
    del found[dropped]
    save_file(found, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "a" / "config.json").read_bytes())
    _, info = FAMILIES[name].auto.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] and caplog.records


def test_an_integer_buffer_survives_bit_by_bit(merged: tuple[str, pathlib.Path]) -> None:
    name, folder = merged
    for op in ("linear", "ties"):
        found = tensors(folder / "out" / op)
        assert ("embeddings.position_ids" in found) == (name == "bert")
        if name == "bert":
            assert torch.equal(found["embeddings.position_ids"], torch.arange(512).expand(1, -1))


@pytest.mark.parametrize("op", ["linear", "ties"])
def test_the_config_has_the_dtype_and_nothing_of_where_it_came_from(merged: tuple[str, pathlib.Path], op: str) -> None:
    name, folder = merged
    config = json.loads((folder / "out" / op / "config.json").read_text())
    source = json.loads((folder / "a" / "config.json").read_text())
    assert config["dtype"] == str(FAMILIES[name].dtype).removeprefix("torch.")
    assert "_name_or_path" not in config and "torch_dtype" not in config
    assert {k: v for k, v in config.items() if k != "dtype"} == {k: v for k, v in source.items() if k != "dtype"}


@pytest.mark.parametrize("op", ["linear", "ties"])
def test_files_are_named_and_indexed_as_the_model_it_is_like(merged: tuple[str, pathlib.Path], op: str) -> None:
    _, folder = merged
    out, like = folder / "out" / op, folder / ("a" if op == "linear" else "base")
    assert [p.name for p in sorted(out.glob("*.safetensors*"))] == [p.name for p in sorted(like.glob("*.safetensors*"))]
    index = out / "model.safetensors.index.json"
    if index.exists():
        mine, theirs = json.loads(index.read_text()), json.loads((like / index.name).read_text())
        assert mine["weight_map"] == theirs["weight_map"]
        total = sum(value.numel() * value.element_size() for value in tensors(out).values())
        assert mine["metadata"]["total_size"] == total


def test_tied_heads_are_stored_once(merged: tuple[str, pathlib.Path]) -> None:
    name, folder = merged
    found = tensors(folder / "out" / "linear")
    if name == "qwen3":
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder / "out" / "linear")
        assert "lm_head.weight" not in found
        assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    if name == "llama":
        assert "lm_head.weight" in found


def test_tokenizer_and_generation_config_travel_along(merged: tuple[str, pathlib.Path]) -> None:
    name, folder = merged
    for op, like in (("linear", "a"), ("ties", "base")):
        out = folder / "out" / op
        if name != "vit":
            text = "w5 w17 w3"
            mine, theirs = (transformers.AutoTokenizer.from_pretrained(path) for path in (out, folder / like))
            assert mine(text).input_ids == theirs(text).input_ids == [5, 17, 3]
            assert mine.eos_token == "</s>"
        generation = folder / like / "generation_config.json"
        if generation.exists():
            mine, theirs = (transformers.GenerationConfig.from_pretrained(path) for path in (out, folder / like))
            assert mine.to_dict() == theirs.to_dict()
        assert generation.exists() == (out / "generation_config.json").exists()


def test_a_merged_language_model_generates(merged: tuple[str, pathlib.Path]) -> None:
    name, folder = merged
    if FAMILIES[name].auto is not transformers.AutoModelForCausalLM:
        pytest.skip("no language model")
    out = folder / "out" / "ties"
    model, words = (
        transformers.AutoModelForCausalLM.from_pretrained(out),
        transformers.AutoTokenizer.from_pretrained(out),
    )
    made = model.generate(**words("w5 w17", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert made.shape[0] == 1 and 2 < made.shape[1] <= 6


def test_another_dtype_is_written_and_named_in_the_config(merged: tuple[str, pathlib.Path]) -> None:
    name, folder = merged
    (folder / "half.yaml").write_text(
        RECIPE.replace("linear: {node: mean}", "linear: {node: mean, dtype: float16, shard_size: 30kB}")
    )
    mergeflow.run(mergeflow.load_recipe(folder / "half.yaml"), folder / "half", threads=2)
    config = json.loads((folder / "half" / "linear" / "config.json").read_text())
    assert config["dtype"] == "float16"
    loaded, info = FAMILIES[name].auto.from_pretrained(
        folder / "half" / "linear", output_loading_info=True, dtype="auto"
    )
    assert not any(info.values()), info
    assert loaded.dtype == torch.float16
    assert len(list((folder / "half" / "linear").glob("*.safetensors"))) > 1

"""What `mergeflow inspect` says: header facts, folded names, and nothing that a terminal would act on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from clock import seconds

from mergeflow.checkpoint import encode_header, open_checkpoint
from mergeflow.dtypes import BY_NAME
from mergeflow.hub import locate
from mergeflow.inspecting import folded, inspect_model, inspect_text
from mergeflow.settings import Place, matcher

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]

LLAMA: dict[str, tuple[str, tuple[int, ...]]] = {
    "model.embed_tokens.weight": ("bfloat16", (32, 8)),
    **{f"model.layers.{i}.mlp.up_proj.weight": ("bfloat16", (16, 8)) for i in range(12)},
    **{f"model.layers.{i}.norm.weight": ("float32", (8,)) for i in range(12)},
    "lm_head.weight": ("bfloat16", (32, 8)),
}


def write(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file of zeros."""
    stored = [(name, BY_NAME[dtype], shape) for name, (dtype, shape) in tensors.items()]
    header, offsets = encode_header(stored, metadata or {})
    end = len(header)
    for (_, dtype, shape), offset in zip(stored, offsets, strict=True):
        size = dtype.size
        for length in shape:
            size *= length
        end = offset + size
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + bytes(end - len(header)))


def model(folder: Path, tensors: Tensors, config: Any = None, metadata: Mapping[str, str] | None = None) -> Path:
    write(folder / "model.safetensors", tensors, metadata)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def inspected(path: Path) -> dict[str, Any]:
    data = inspect_model(open_checkpoint(locate(str(path), relative_to=Path("."))))
    assert json.loads(json.dumps(data)) == data, "ready for JSON"
    return data


def shown(path: Path) -> str:
    return inspect_text(inspected(path))


def names(*given: str, dtype: str = "float32", shape: Sequence[int] = (2,)) -> list[dict[str, Any]]:
    return [{"name": name, "dtype": dtype, "shape": list(shape)} for name in given]


def lines(tensors: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name, _ in folded(tensors)]


def test_a_folder_shows_its_facts(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32}
    path = model(tmp_path, LLAMA, {**config, "tie_word_embeddings": False}, {"format": "pt"})
    data = inspected(path)
    assert data["source"] == str(tmp_path) and data["revision"] is None
    assert data["files"] == [{"name": "model.safetensors", "size": data["size"]}]
    assert data["size"] == (path / "model.safetensors").stat().st_size
    assert data["architectures"] == ["LlamaForCausalLM"] and data["model_type"] == "llama"
    assert data["count"] == len(data["tensors"]) == 26
    bfloat16, float32 = 2 * 32 * 8 + 12 * 16 * 8, 12 * 8
    assert data["parameters"] == {
        "total": bfloat16 + float32,
        "by_dtype": {"bfloat16": bfloat16, "float32": float32},
    }
    assert data["stacks"] == [{"prefix": "model.layers", "layers": 12, "numbers": "0-11"}]
    assert data["vocabulary"] == {"rows": 32, "embedding": "model.embed_tokens.weight", "config": 32}
    assert data["tied"] == {"config": False, "head": "lm_head.weight"}
    assert (data["space"], data["quantised"], data["mergeflow"]) == ("weight", None, None)
    assert data["metadata"] == {"format": "pt"}


def test_the_text_folds_tensors_over_layer_numbers(tmp_path: Path) -> None:
    text = shown(model(tmp_path, LLAMA, {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}))
    head, _, table = text.partition("\n\n")
    assert table.splitlines() == [
        "model.embed_tokens.weight               [32, 8]  bfloat16",
        "model.layers.{0-11}.mlp.up_proj.weight  [16, 8]  bfloat16  x12",
        "model.layers.{0-11}.norm.weight         [8]      float32   x12",
        "lm_head.weight                          [32, 8]  bfloat16",
    ]
    assert "tied head     yes; lm_head.weight is stored" in head
    assert "layers        model.layers {0-11} x12" in head
    assert "parameters    2,144 (bfloat16 2,048, float32 96)" in head


def test_every_tensor_is_in_the_data(tmp_path: Path) -> None:
    data = inspected(model(tmp_path, LLAMA))
    assert {one["name"]: (one["dtype"], tuple(one["shape"])) for one in data["tensors"]} == LLAMA
    assert data["tensors"][0] == {
        "name": "model.embed_tokens.weight",
        "dtype": "bfloat16",
        "shape": [32, 8],
        "file": "model.safetensors",
        "size": 512,
    }


def test_a_single_file_is_shown_too(tmp_path: Path) -> None:
    write(tmp_path / "other.safetensors", LLAMA)
    data = inspected(tmp_path / "other.safetensors")
    assert data["source"].endswith("other.safetensors") and data["architectures"] == []
    assert "config.json does not say; lm_head.weight is stored" in inspect_text(data)


def test_a_sharded_folder_lists_its_first_files_and_the_sum(tmp_path: Path) -> None:
    weight_map = {}
    for i in range(1, 6):
        file = f"model-{i:05d}-of-00005.safetensors"
        write(tmp_path / file, {f"layers.{i}.weight": ("float32", (4, i))})
        weight_map[f"layers.{i}.weight"] = file
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    data = inspected(tmp_path)
    assert len(data["files"]) == 5 and data["size"] == sum(file["size"] for file in data["files"])
    text = inspect_text(data)
    assert "model-00003-of-00005.safetensors" in text and "00004-of" not in text
    assert " and 2 more, " in text
    assert data["tensors"][4]["file"] == "model-00005-of-00005.safetensors"


def test_integer_boolean_and_scalar_tensors_are_counted(tmp_path: Path) -> None:
    tensors = {"ids": ("int64", (3,)), "mask": ("bool", (2, 2)), "steps": ("int32", ()), "none": ("float16", (0, 4))}
    data = inspected(model(tmp_path, tensors))
    assert data["parameters"]["total"] == 8
    assert data["parameters"]["by_dtype"] == {"int64": 3, "bool": 4, "int32": 1, "float16": 0}
    assert "steps  []      int32" in inspect_text(data)


def test_a_checkpoint_without_tensors_is_shown(tmp_path: Path) -> None:
    data = inspected(model(tmp_path, {}))
    assert data["count"] == 0 and data["parameters"] == {"total": 0, "by_dtype": {}} and data["stacks"] == []
    text = inspect_text(data)
    assert text.endswith("no tensors") and "parameters  0" in text


def test_a_delta_says_so(tmp_path: Path) -> None:
    text = shown(model(tmp_path, {"w": ("float32", (2,))}, metadata={"mergeflow.space": "delta"}))
    assert "space       delta" in text and "mergeflow.space: delta" in text


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        ({"w.weight": ("int8", (2,)), "w.weight_scale": ("float32", (1,))}, {}, "it has the tensor w.weight_scale"),
        ({"w": ("float32", (2,))}, {"quantization_config": {"bits": 4}}, "config.json has a quantization_config"),
    ],
)
def test_a_quantised_checkpoint_says_why(tmp_path: Path, tensors: Tensors, config: Any, words: str) -> None:
    path = model(tmp_path, tensors, config)
    assert inspected(path)["quantised"] == words
    assert f"yes: {words}" in shown(path)


def test_the_text_config_of_a_larger_model_is_read(tmp_path: Path) -> None:
    config = {"text_config": {"vocab_size": 40, "tie_word_embeddings": True}}
    data = inspected(model(tmp_path, {"language_model.model.embed_tokens.weight": ("float16", (32, 2))}, config))
    assert data["vocabulary"] == {"rows": 32, "embedding": "language_model.model.embed_tokens.weight", "config": 40}
    assert data["tied"] == {"config": True, "head": None}
    text = inspect_text(data)
    assert "32 rows in language_model.model.embed_tokens.weight, 40 by config.json" in text
    assert "yes; no head is stored" in text


def test_a_config_of_nonsense_is_no_obstacle(tmp_path: Path) -> None:
    config = {
        "architectures": "Llama",
        "model_type": 3,
        "vocab_size": True,
        "tie_word_embeddings": "no",
        "text_config": [],
    }
    data = inspected(model(tmp_path, LLAMA, config))
    assert data["architectures"] == [] and data["model_type"] is None
    assert data["vocabulary"]["config"] is None and data["tied"]["config"] is None
    assert "architecture" not in inspect_text(data)


def test_control_characters_are_escaped_in_the_text_and_kept_in_the_data(tmp_path: Path) -> None:
    hostile = "a\x1b[2J\nb\u202e.weight"
    tensors = {hostile: ("float32", (2,)), "schicht.0.größe": ("float32", (2,)), "層.1.重み": ("float32", (2,))}
    metadata = {"note\r": "x\x07\n" + "y" * 500}
    data = inspected(model(tmp_path, tensors, {"architectures": ["E\x1b]0;x\x07"], "model_type": "t\n"}, metadata))
    assert data["tensors"][0]["name"] == hostile and data["metadata"] == metadata
    text = inspect_text(data)
    assert all(character.isprintable() or character == "\n" for character in text)
    assert "a\\x1b[2J\\nb\\u202e.weight" in text
    assert "schicht.0.größe" in text and "層.1.重み" in text
    assert "note\\r: x\\x07\\ny" in text and "(503 characters)" in text


def test_an_output_of_mergeflow_shows_what_its_manifest_says(tmp_path: Path) -> None:
    path = model(tmp_path, {"w": ("float32", (2,))})
    manifest = {
        "name": "chat-math",
        "plan": "ab" * 32,
        "software": {"mergeflow": "0.1.0"},
        "inputs": {"a": {"source": "org/a", "revision": "123"}, "b": {"source": "./b", "revision": None}},
    }
    (path / "mergeflow.json").write_text(json.dumps(manifest))
    data = inspected(path)
    assert data["mergeflow"]["recipe"] == "chat-math" and data["mergeflow"]["plan"] == "ab" * 32
    assert f"mergeflow 0.1.0: recipe chat-math, plan {'ab' * 32}, from org/a@123, ./b" in inspect_text(data)


@pytest.mark.parametrize("text", ["{", "[1]", '{"inputs": 3, "software": []}', '{"inputs": {"a": 1}}'])
def test_a_manifest_of_nonsense_is_no_obstacle(tmp_path: Path, text: str) -> None:
    path = model(tmp_path, {"w": ("float32", (2,))})
    (path / "mergeflow.json").write_text(text)
    assert "tensors" in shown(path)


def test_experts_are_folded_with_their_layers() -> None:
    tensors = names(*(f"layers.{i}.experts.{j}.w1.weight" for i in range(3, 6) for j in range(8)))
    [(name, held)] = folded(tensors)
    assert name == "layers.{3-5}.experts.{0-7}.w1.weight" and len(held) == 24


def test_numbers_that_make_no_full_grid_are_never_folded_over_what_is_not_there() -> None:
    tensors = names("a.0.0.w", "a.0.1.w", "a.1.0.w", "b.0.w", "b.4.w", "b.8.w", "b.9.w")
    found = dict(folded(tensors))
    assert {name: [one["name"] for one in held] for name, held in found.items()} == {
        "a.{0-1}.0.w": ["a.0.0.w", "a.1.0.w"],
        "a.0.1.w": ["a.0.1.w"],
        "b.{0,4,8-9}.w": ["b.0.w", "b.4.w", "b.8.w", "b.9.w"],
    }
    fits = {name: [one["name"] for one in tensors if matcher(name)(Place(one["name"]))] for name in found}
    assert fits == {name: [one["name"] for one in held] for name, held in found.items()}, "a line is a pattern"


def test_shapes_and_dtypes_that_differ_stay_apart() -> None:
    tensors = [*names("l.0.w", "l.1.w"), *names("l.2.w", shape=(3,)), *names("l.3.w", dtype="int8")]
    assert lines(tensors) == ["l.{0-1}.w", "l.2.w", "l.3.w"]


def test_numbers_written_in_another_way_are_names() -> None:
    assert lines(names("l.00.w", "l.01.w", "l.².w")) == ["l.00.w", "l.01.w", "l.².w"]


def test_leading_zeros_still_make_a_stack(tmp_path: Path) -> None:
    data = inspected(model(tmp_path, {"l.00.w": ("float32", (2,)), "l.01.w": ("float32", (2,)), "w.3": ("int8", (1,))}))
    assert data["stacks"] == [{"prefix": "l", "layers": 2, "numbers": "0-1"}]


def test_folding_hostile_names_takes_little_time() -> None:
    diagonal = names(*(f"a.{i}.{i}.w" for i in range(20_000)))
    long = names(*(f"{'1.' * 200}{i}.{i}" for i in range(2_000)))
    assert sum(len(held) for _, held in folded([*diagonal, *long])) == 22_000
    assert seconds(lambda: list(folded([*diagonal, *long])), 1) < 1


def test_no_torch_is_needed() -> None:
    code = "import sys, mergeflow.inspecting; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)

"""Where tensors go: files as `like` has them or packed anew, exact headers, offsets, and the index."""

from __future__ import annotations

import json

import pytest

from mergeflow.checkpoint import parse_header
from mergeflow.dtypes import BY_NAME
from mergeflow.layout import File, Tensor, lay_out

TWO = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def tensor(name: str, elements: int, like: str | None = TWO[0], dtype: str = "float32") -> Tensor:
    return Tensor(name, BY_NAME[dtype], (elements,), like)


def names(files: list[File]) -> dict[str, list[str]]:
    return {file.name: list(file.offsets) for file in files}


def laid(
    tensors: list[Tensor], like: list[str] | None = None, size: int | None = None
) -> tuple[list[File], tuple[str, bytes] | None]:
    return lay_out(tensors, like_files=TWO if like is None else like, shard_size=size, metadata={"format": "pt"})


def test_files_are_those_of_like() -> None:
    files, index = laid([tensor("a", 2), tensor("b", 2, TWO[1]), tensor("c", 2)])
    assert names(files) == {TWO[0]: ["a", "c"], TWO[1]: ["b"]}
    assert index is not None
    assert index[0] == "model.safetensors.index.json"
    assert json.loads(index[1]) == {
        "metadata": {"total_size": 24},
        "weight_map": {"a": TWO[0], "b": TWO[1], "c": TWO[0]},
    }


def test_one_file_keeps_its_name_and_has_no_index() -> None:
    files, index = laid([tensor("a", 2, "adapter_x.safetensors")], ["adapter_x.safetensors"])
    assert names(files) == {"adapter_x.safetensors": ["a"]}
    assert index is None


def test_folders_that_the_files_of_like_lie_in_are_left_behind() -> None:
    files, index = laid([tensor("a", 2, "sub/model.safetensors")], ["sub/model.safetensors"])
    assert names(files) == {"model.safetensors": ["a"]}
    assert index is None
    deep = [f"sub/{name}" for name in TWO]
    files, index = laid([tensor("a", 2, deep[0]), tensor("b", 2, deep[1])], deep)
    assert names(files) == {TWO[0]: ["a"], TWO[1]: ["b"]}
    assert index is not None
    assert index[0] == "model.safetensors.index.json"
    assert json.loads(index[1])["weight_map"] == {"a": TWO[0], "b": TWO[1]}
    same = ["x/model.safetensors", "y/model.safetensors"]
    files, _ = laid([tensor("a", 2, same[0]), tensor("b", 2, same[1])], same)
    assert names(files) == {"model.safetensors": ["a", "b"]}


def test_a_tensor_that_like_lacks_goes_into_its_last_file() -> None:
    files, _ = laid([tensor("a", 2), tensor("b", 2, TWO[1]), tensor("new", 2, None)])
    assert names(files)[TWO[1]] == ["b", "new"]


def test_where_a_file_of_like_would_be_empty_the_tensors_are_packed_anew() -> None:
    files, index = laid([tensor("a", 2), tensor("b", 2)])
    assert names(files) == {"model.safetensors": ["a", "b"]}
    assert index is None


def test_a_shard_size_packs_in_order_and_a_larger_tensor_has_a_file_of_its_own() -> None:
    tensors = [tensor("a", 2), tensor("b", 2), tensor("big", 100), tensor("c", 3), tensor("d", 1, TWO[1])]
    files, index = laid(tensors, size=16)
    assert names(files) == {
        "model-00001-of-00003.safetensors": ["a", "b"],
        "model-00002-of-00003.safetensors": ["big"],
        "model-00003-of-00003.safetensors": ["c", "d"],
    }
    assert index is not None
    assert json.loads(index[1])["metadata"]["total_size"] == 108 * 4


def test_packed_files_take_the_stem_of_like() -> None:
    files, index = laid([tensor("a", 2), tensor("b", 2)], ["diffusion_pytorch_model.safetensors"], size=8)
    assert [file.name for file in files] == [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert index is not None
    assert index[0] == "diffusion_pytorch_model.safetensors.index.json"
    assert [file.name for file in laid([tensor("a", 2)], [])[0]] == ["model.safetensors"]


@pytest.mark.parametrize("size", [None, 50])
def test_headers_read_back_and_every_tensor_is_aligned_to_its_dtype(size: int | None) -> None:
    dtypes = ["bool", "bfloat16", "float64", "uint8", "float32", "int64", "float8_e5m2", "float16"]
    tensors = [tensor(f"t{i}", i % 5, TWO[i % 2], dtypes[i % len(dtypes)]) for i in range(40)]
    files, _ = laid(tensors, size=size)
    seen = {}
    for file in files:
        stored, metadata = parse_header(file.header, file.size, file.name, file=file.name)
        assert metadata == {"format": "pt"}
        assert {one.name: one.begin for one in stored} == dict(file.offsets)
        assert all(one.begin % one.dtype.size == 0 for one in stored)
        assert stored[-1].end == file.size
        seen.update({one.name: (one.dtype, one.shape) for one in stored})
    assert seen == {one.name: (one.dtype, one.shape) for one in tensors}


def test_the_same_tensors_give_the_same_bytes() -> None:
    tensors = [tensor("a", 2), tensor("b", 2, TWO[1])]
    assert laid(tensors) == laid(list(tensors))

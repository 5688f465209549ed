"""The folder of statistics: what is packed comes back, cut anywhere; what is wrong in it is said with its place."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from mergeflow.checkpoint import open_checkpoint
from mergeflow.checkpoint import statistics as stats
from mergeflow.checkpoint.statistics import CODECS, Codec, Facts, decoder, encode, open_statistics, stored
from mergeflow.dtypes import BY_NAME, torch_dtype
from mergeflow.errors import InputError, MergeflowError, NumericError, RecipeError
from mergeflow.hub import locate

Array = NDArray[np.float64]


def gram_of(d: int, n: int, seed: int = 0, dead: tuple[int, ...] = ()) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) @ torch.randn(
        d, d, generator=generator, dtype=torch.float64
    )
    x *= torch.logspace(-3, 3, d, dtype=torch.float64)
    x[:, list(dead)] = 0
    return (x.T @ x / n).float()


def rows_from(tensors: dict[str, Tensor], codec: Codec, d: int, first: int, last: int) -> Tensor:
    source = decoder("gram", codec)
    parts = [tensors[name].reshape(-1) for name in stored("gram", codec, "g", (d, d))]
    if source is None:
        return parts[0].reshape(d, d)[first:last]

    def read(which: int, start: int, stop: int) -> Tensor:
        assert 0 <= start <= stop <= len(parts[which])
        return parts[which][start:stop]

    return source.make(read, first * d, last * d, (d, d), torch.float32).reshape(last - first, d)


def unpacked(tensors: dict[str, Tensor], codec: Codec, d: int) -> Array:
    """The matrix, entry by entry, from what the format says."""
    made = np.zeros((d, d))
    names = list(tensors)
    if codec == "float32":
        return tensors["gram.g"].double().numpy()
    if codec == "packed32":
        flat = tensors["gram.g.triangle"].double().numpy()
        at = 0
        for i in range(d):
            for j in range(i, d):
                made[i, j] = made[j, i] = flat[at]
                at += 1
        return made
    diagonal = tensors["gram.g.diagonal"].double().numpy()
    if codec != "diagonal":
        flat = tensors["gram.g.correlation"].double().numpy() / (127 if codec == "correlation8" else 1)
        at = 0
        for i in range(d):
            for j in range(i + 1, d):
                made[i, j] = made[j, i] = flat[at] * np.sqrt(diagonal[i] * diagonal[j])
                at += 1
    assert sorted(names) == names
    return made + np.diag(diagonal)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("d", [1, 2, 3, 37])
def test_a_packed_gram_is_laid_out_as_the_format_says(codec: Codec, d: int) -> None:
    gram = gram_of(d, 50, dead=(d - 1,) if d > 2 else ())
    tensors = encode("gram", codec, "g", gram)
    said = stored("gram", codec, "g", (d, d))
    assert {n: (torch_dtype(BY_NAME[dtype]), shape) for n, (dtype, shape) in said.items()} == {
        n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()
    }
    right = unpacked(tensors, codec, d)
    got = rows_from(tensors, codec, d, 0, d).double().numpy()
    assert np.array_equal(got, got.T), "symmetric to the last bit"
    assert np.allclose(got, right, rtol=3e-7, atol=0)
    scale = np.sqrt(np.outer(np.diag(gram), np.diag(gram)))
    off = {"float32": 0, "packed32": 0, "correlation16": 5e-4, "correlation8": 0.5 / 127 + 1e-6, "diagonal": 1}[codec]
    assert np.all(np.abs(got - gram.double().numpy()) <= off * scale + 1e-6 * scale)
    assert np.array_equal(np.diag(got), np.diag(gram.double().numpy()))


@settings(deadline=None, max_examples=50)
@given(codec=st.sampled_from(CODECS), d=st.integers(1, 40), data=st.data())
def test_any_cut_of_the_rows_gives_the_same_bits(codec: Codec, d: int, data: st.DataObject) -> None:
    tensors = encode("gram", codec, "g", gram_of(d, 60))
    whole = rows_from(tensors, codec, d, 0, d)
    cuts = sorted({0, d, *data.draw(st.lists(st.integers(0, d), max_size=4))})
    parts = [rows_from(tensors, codec, d, a, b) for a, b in pairwise(cuts)]
    assert torch.equal(torch.cat(parts), whole)


def test_few_rows_of_a_large_gram_need_few_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    d = 300
    tensors = encode("gram", "correlation16", "g", gram_of(d, 400))
    whole = rows_from(tensors, "correlation16", d, 0, d)
    monkeypatch.setattr(stats, "_INDICES", 1000)
    longest = 0
    source = decoder("gram", "correlation16")
    assert source is not None
    parts = [tensors["gram.g.correlation"], tensors["gram.g.diagonal"]]

    def read(which: int, start: int, stop: int) -> Tensor:
        nonlocal longest
        longest = max(longest, stop - start)
        return parts[which][start:stop]

    got = source.make(read, 290 * d, 300 * d, (d, d), torch.float32)
    assert torch.equal(got.reshape(10, d), whole[290:])
    assert longest <= 1000, "it reads in stretches, whatever the size of the matrix"


@pytest.mark.parametrize("d", [384, 768])
def test_the_default_codec_takes_a_byte_an_entry(d: int, tmp_path: Path) -> None:
    save_file(
        encode("gram", "correlation16", "model.layers.0.q_proj.weight", gram_of(d, d)), tmp_path / "g.safetensors"
    )
    assert (tmp_path / "g.safetensors").stat().st_size <= 1.02 * d * d


def test_activations_in_the_thousands_do_not_overflow_the_default_codec() -> None:
    gram = gram_of(12, 50) * 1e12
    assert gram.max() > torch.finfo(torch.float16).max * 1e3
    got = rows_from(encode("gram", "correlation16", "g", gram), "correlation16", 12, 0, 12)
    assert torch.isfinite(got).all()
    scale = torch.outer(gram.diagonal(), gram.diagonal()).sqrt()
    assert ((got - gram).abs() <= 6e-4 * scale).all()


def test_what_is_no_gram_is_refused() -> None:
    with pytest.raises(NumericError, match="NaN or Inf"):
        encode("gram", "correlation16", "g", torch.full((3, 3), torch.nan))
    with pytest.raises(NumericError, match="negative diagonal"):
        encode("gram", "correlation16", "g", -torch.eye(3))
    with pytest.raises(RecipeError, match="no square matrix"):
        encode("gram", "correlation16", "g", torch.ones(3, 4))


# The folder


def facts(**more: Any) -> Facts:
    told = {
        "kind": "gram",
        "codec": "correlation16",
        "op": {"name": "gram", "version": 1},
        "model": {"digest": "0" * 64},
        "n_examples": 5,
        "n_tokens": 60,
        "groups": {"a.q.weight": "a.q.weight", "a.k.weight": "a.q.weight"},
        **more,
    }
    return Facts.model_validate(told)


def write(folder: Path, tensors: dict[str, Tensor], told: Facts | dict[str, Any] | bytes) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt", "mergeflow.space": "statistics"})
    content = (
        told.encoded() if isinstance(told, Facts) else told if isinstance(told, bytes) else json.dumps(told).encode()
    )
    (folder / "statistics.json").write_bytes(content)
    return folder


def opened(folder: Path) -> stats.Statistics:
    return open_statistics(locate(str(folder), relative_to=folder))


def test_a_folder_is_looked_up_by_weights(tmp_path: Path) -> None:
    tensors = encode("gram", "correlation16", "a.q.weight", gram_of(12, 60))
    found = opened(write(tmp_path / "s", tensors, facts(tokens={"a.q.weight": 7}, transposed=["a.k.weight"])))
    assert found.group("a.k.weight") == "a.q.weight"
    assert found.group("a.v.weight") is None
    assert found.dimension("a.k.weight") == 12
    assert found.n_tokens("a.k.weight") == 7
    assert found.turned == {"a.k.weight"}
    assert [one.name for one in found.parts("a.k.weight")] == [
        "gram.a.q.weight.correlation",
        "gram.a.q.weight.diagonal",
    ]
    assert found.parts("a.v.weight") == ()
    again = opened(tmp_path / "s")
    assert again.facts == found.facts and dict(again.deciding) == dict(found.deciding)


@pytest.mark.parametrize("codec", CODECS)
def test_the_dimension_is_told_by_any_codec(codec: Codec, tmp_path: Path) -> None:
    tensors = encode("gram", codec, "a.q.weight", gram_of(13, 60))
    assert opened(write(tmp_path / "s", tensors, facts(codec=codec))).dimension("a.q.weight") == 13


def test_fisher_diagonals_are_looked_up_by_the_tensor_itself(tmp_path: Path) -> None:
    tensors = encode("fisher_diag", "float32", "a.bias", torch.rand(3, 4, dtype=torch.float64))
    found = opened(write(tmp_path / "s", tensors, facts(kind="fisher_diag", codec="float32", groups={})))
    assert found.group("a.bias") == "a.bias" and found.group("b") is None
    assert [one.shape for one in found.parts("a.bias")] == [(3, 4)]


BROKEN: dict[str, tuple[Any, str]] = {
    "no object": (b"[1]", "statistics.json: is not a JSON object"),
    "no json": (b"{", "statistics.json: is not JSON"),
    "a later format": ({"format": 2}, "statistics.json: is of format 2, and this mergeflow reads 1"),
    "another kind": ({"kind": "hessian"}, "statistics.json: `kind`: input should be"),
    "an unknown key": ({"unheard": 1}, "statistics.json: `unheard`: extra inputs are not permitted"),
    "negative tokens": ({"n_tokens": -1}, "statistics.json: `n_tokens`: input should be greater than or equal to 0"),
    "a group without tensors": ({"groups": {"w": "z"}}, "the group 'z' lacks its tensor 'gram.z.correlation'"),
    "another codec": ({"codec": "correlation8"}, "is float16 [66], and `correlation8` holds int8 [66] there"),
    "tensors of no group": (
        {"codec": "diagonal"},
        "the files have a tensor of no group: 'gram.a.q.weight.correlation'",
    ),
    "a turned weight without group": ({"transposed": ["z"]}, "`transposed` names 'z', which has no group"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_wrong_in_a_folder_is_said_with_its_place(how: str, tmp_path: Path) -> None:
    change, message = BROKEN[how]
    told = change if isinstance(change, bytes) else {**json.loads(facts().encoded()), **change}
    write(tmp_path / "s", encode("gram", "correlation16", "a.q.weight", gram_of(12, 60)), told)
    with pytest.raises(InputError) as caught:
        opened(tmp_path / "s")
    assert message in str(caught.value)
    assert caught.value.fix


def test_a_folder_without_its_json_is_no_statistics(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(MergeflowError, match=r"holds no statistics\.json.* Name the folder that a stage"):
        opened(tmp_path)


# Which model


def model(folder: Path, scale: float = 1.0, file: str = "model.safetensors") -> Any:
    folder.mkdir()
    save_file({"w": torch.arange(200_000).float() * scale, "b": torch.ones(3)}, folder / file)
    return open_checkpoint(locate(str(folder), relative_to=folder))


def test_a_model_trained_further_has_other_marks_and_the_same_header(tmp_path: Path) -> None:
    first, same, trained = model(tmp_path / "a"), model(tmp_path / "b"), model(tmp_path / "c", 1.5)
    assert first.files == trained.files, "the headers say nothing"
    told = facts(model={"digest": "0" * 64, "files": stats.marks(first)})
    assert not stats.of_another(told, same)
    assert stats.of_another(told, trained)
    other, again = model(tmp_path / "d", 1.5, "other.safetensors"), model(tmp_path / "e", 1.0, "other.safetensors")
    assert stats.of_another(told, other) is None, "which cannot be told"
    told = facts(model={"digest": "0" * 64, "files": stats.marks(first), "sampled": stats.sampled(first)})
    assert stats.of_another(told, other), "however its tensors are dealt to files"
    assert stats.of_another(told, again) is False


def test_the_digest_of_a_model_is_the_same_in_any_order() -> None:
    one, two = ("a", "float32", (2, 3), "aa"), ("b", "float16", (), "bb")
    assert stats.model_digest([one, two]) == stats.model_digest([two, one])
    assert stats.model_digest([one]) != stats.model_digest([two])

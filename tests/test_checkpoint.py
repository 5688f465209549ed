"""Checkpoints on disk: what safetensors writes is read exactly, what lies is refused with a message that says how."""

from __future__ import annotations

import json
import os
import pathlib
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import safetensors
import torch
from blake3 import blake3
from safetensors.torch import save_file, save_model

from mergeflow.checkpoint import Checkpoint, encode_header, open_checkpoint, parse_header
from mergeflow.dtypes import BY_NAME, BY_STORED, DTYPES, torch_dtype
from mergeflow.errors import InputError, MergeflowError, Problems, RecipeError
from mergeflow.hub import locate

F32, U8 = BY_NAME["float32"], BY_NAME["uint8"]


def opened(folder: pathlib.Path, **more: Any) -> Checkpoint:
    return open_checkpoint(locate(".", relative_to=folder), **more)


def tensor_of(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor made of nothing but what the checkpoint says of it."""
    stored = checkpoint.tensors[name]
    data = bytearray(checkpoint.folder.read_range(stored.file, stored.begin, stored.end))
    if not data:
        return torch.empty(stored.shape, dtype=torch_dtype(stored.dtype))
    return torch.frombuffer(data, dtype=torch_dtype(stored.dtype)).reshape(stored.shape)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def file_of(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """The bytes of a file with this header, given as JSON or as what becomes JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# What is right is read.


def test_every_dtype_that_safetensors_writes_is_read_byte_for_byte(tmp_path: pathlib.Path) -> None:
    tensors = {}
    for dtype in DTYPES:
        raw = (
            torch.randint(0, 2, (24,), dtype=torch.uint8) if dtype.kind == "boolean" else torch.arange(24 * dtype.size)
        )
        tensors[dtype.name] = raw.to(torch.uint8).view(torch_dtype(dtype)).reshape(2, 3, 4)
    tensors |= {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 7),
        "empty.too": torch.empty(3, 0, dtype=torch.int8),
        "Ж漢\n\x1b[31m": torch.ones(1),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt", "by": "a test"})
    checkpoint = opened(tmp_path)
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        stored = checkpoint.tensors[name]
        assert (stored.shape, stored.nbytes, stored.elements) == (tensor.shape, tensor.nbytes, tensor.numel())
        assert torch.equal(bits(tensor_of(checkpoint, name)), bits(tensor)), name
    assert checkpoint.metadata == {"format": "pt", "by": "a test"}
    assert checkpoint.config is None
    positions = [(stored.begin, stored.end) for stored in checkpoint.tensors.values()]
    assert positions == sorted(positions)


def test_a_model_saved_with_shared_tensors_is_read(tmp_path: pathlib.Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    save_model(model, str(tmp_path / "model.safetensors"))
    assert list(opened(tmp_path).tensors) == ["0.weight"]


def test_a_header_that_leaves_the_data_unaligned_is_read(tmp_path: pathlib.Path) -> None:
    values = torch.tensor([1.5, -2.0])
    (tmp_path / "model.safetensors").write_bytes(file_of({"w": entry()}, values.numpy().tobytes()))
    checkpoint = opened(tmp_path)
    assert checkpoint.tensors["w"].begin % 4 != 0
    assert torch.equal(tensor_of(checkpoint, "w"), values)


def test_a_file_without_tensors_is_a_checkpoint_without_tensors(tmp_path: pathlib.Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(file_of({}))
    assert opened(tmp_path).tensors == {}


def sharded(folder: pathlib.Path, index: str = "model.safetensors.index.json") -> dict[str, torch.Tensor]:
    """Three tensors in two shards with an index."""
    tensors = {name: torch.randn(3, 2) for name in ("a", "b", "c")}
    save_file({"b": tensors["b"], "c": tensors["c"]}, folder / "x-1-of-2.safetensors", metadata={"one": "1"})
    save_file({"a": tensors["a"]}, folder / "x-2-of-2.safetensors", metadata={"two": "2"})
    weight_map = {"a": "x-2-of-2.safetensors", "b": "x-1-of-2.safetensors", "c": "x-1-of-2.safetensors"}
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return tensors


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json"])
def test_a_sharded_folder_is_read_through_its_index(tmp_path: pathlib.Path, index: str) -> None:
    tensors = sharded(tmp_path, index)
    save_file({"other": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "limit": Infinity}')
    checkpoint = opened(tmp_path)
    assert list(checkpoint.tensors) == ["b", "c", "a"]
    assert all(torch.equal(tensor_of(checkpoint, name), tensor) for name, tensor in tensors.items())
    assert checkpoint.metadata == {"one": "1", "two": "2"}
    assert checkpoint.config == {"model_type": "llama", "limit": float("inf")}
    assert checkpoint.paths() == {name: tmp_path / name for name in ("x-1-of-2.safetensors", "x-2-of-2.safetensors")}
    assert checkpoint.paths(["x-2-of-2.safetensors"]) == {"x-2-of-2.safetensors": tmp_path / "x-2-of-2.safetensors"}
    for name, file in checkpoint.files.items():
        content = (tmp_path / name).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        assert (file.name, file.size, file.header_digest) == (name, len(content), blake3(content[:end]).hexdigest())


def test_the_file_is_the_index_then_model_safetensors_then_the_only_one(tmp_path: pathlib.Path) -> None:
    save_file({"only": torch.ones(1)}, tmp_path / "any.safetensors")
    assert list(opened(tmp_path).tensors) == ["only"]
    save_file({"model": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(opened(tmp_path).tensors) == ["model"]
    sharded(tmp_path)
    assert list(opened(tmp_path).tensors) == ["b", "c", "a"]
    assert list(opened(tmp_path, file="any.safetensors").tensors) == ["only"]
    assert list(opened(tmp_path, file="model.safetensors.index.json").tensors) == ["b", "c", "a"]


def test_a_path_to_one_file_opens_that_file(tmp_path: pathlib.Path) -> None:
    for name in ("one", "two"):
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    checkpoint = open_checkpoint(locate("./two.safetensors", relative_to=tmp_path))
    assert list(checkpoint.tensors) == ["two"]
    (tmp_path / "two.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match=r"^\./two\.safetensors: is 5 bytes long"):
        open_checkpoint(locate("./two.safetensors", relative_to=tmp_path))


def test_a_file_in_a_subfolder_can_be_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "sub").mkdir()
    sharded(tmp_path / "sub")
    assert list(opened(tmp_path, file="sub/x-2-of-2.safetensors").tensors) == ["a"]
    assert len(opened(tmp_path, file="sub/model.safetensors.index.json").tensors) == 3


def test_side_files_are_read_as_json_or_are_none(tmp_path: pathlib.Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "tokenizer.json").write_bytes(b'\xef\xbb\xbf{"version": "1.0"}')
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    checkpoint = opened(tmp_path)
    assert checkpoint.json("tokenizer.json") == {"version": "1.0"}
    assert checkpoint.json("absent.json") is None
    for name in ("bad.json", "deep.json", "bytes.json"):
        with pytest.raises(InputError, match=rf"{name}: is not JSON: "):
            checkpoint.json(name)


def test_a_file_that_changes_after_it_was_opened_is_noticed(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(4)}, path)
    checkpoint = opened(tmp_path)
    save_file({"v": torch.ones(4)}, path)
    with pytest.raises(InputError, match=r"model\.safetensors: changed since it was opened"):
        checkpoint.paths()
    os.truncate(path, 4)
    with pytest.raises(InputError, match="changed since it was opened"):
        checkpoint.paths()
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        checkpoint.paths()


# What is wrong with a folder has its own message.


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ([], "holds no .safetensors file. Is it a model's folder?"),
        (["sub/model.safetensors"], "There is sub/model.safetensors: name a folder with `subfolder:`."),
        (
            ["a.safetensors", "b.safetensors"],
            "holds several models: a.safetensors, b.safetensors. Name one with `file:`.",
        ),
        (
            ["a.safetensors.index.json", "b.safetensors.index.json", "c.safetensors"],
            "holds several models: a.safetensors.index.json, b.safetensors.index.json. Name one",
        ),
        (["model-00001-of-00003.safetensors"], "holds one of 3 shards and no index. Fetch the whole model."),
        (["pytorch_model.bin", "x.pt"], "holds pickles only (pytorch_model.bin, x.pt), which can run code"),
        (["pytorch_model.bin"], "Safetensors are safer: load the model with transformers and call save_pretrained"),
    ],
)
def test_a_folder_without_one_clear_model_says_what_it_has(tmp_path: pathlib.Path, files: list[str], text: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(file_of({}))
    with pytest.raises(InputError) as caught:
        opened(tmp_path)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("modle.safetensors", "modle.safetensors: no such file. Did you mean 'model.safetensors'?"),
        ("pytorch_model.bin", "is a pickle, which can run code"),
        ("config.json", "is not a .safetensors file or an index"),
        ("../model.safetensors", "leads outside the model's folder"),
        ("/etc/model.safetensors", "leads outside the model's folder"),
        ("C:model.safetensors", "leads outside the model's folder"),
    ],
)
def test_a_file_that_cannot_be_chosen_says_why(tmp_path: pathlib.Path, file: str, text: str) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MergeflowError) as caught:
        opened(tmp_path, file=file)
    assert text in str(caught.value)


def test_an_index_that_names_a_tensor_twice_is_an_error(tmp_path: pathlib.Path) -> None:
    """JSON keeps the last of two: what the first stood for would be dropped without a word."""
    sharded(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('"a":', '"c":'))
    with pytest.raises(InputError, match=r"index\.json: has the key 'c' twice\. The file cannot be trusted"):
        opened(tmp_path)


def test_a_config_that_is_no_object_is_an_error(tmp_path: pathlib.Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(InputError, match=r"config\.json: is not a JSON object"):
        opened(tmp_path)


HOSTILE = [
    "../model.safetensors",
    "../../etc/passwd",
    "..",
    ".",
    "",
    " ",
    "/etc/passwd",
    "/model.safetensors",
    "//host/share/model.safetensors",
    "sub/model.safetensors",
    "./x-1-of-2.safetensors",
    "sub/../x-1-of-2.safetensors",
    "..\\model.safetensors",
    "sub\\model.safetensors",
    "\\\\host\\share\\model.safetensors",
    "C:\\model.safetensors",
    "C:model.safetensors",
    "C:/model.safetensors",
    "file:///etc/passwd",
    "https://example.com/model.safetensors",
    "x-1-of-2.safetensors\0.png",
    "x-1-of-2.safetensors\n",
    "\x1b[2Jx.safetensors",
    "~/model.safetensors",
    "x" * 300 + ".safetensors",
    "con|x.safetensors",
    "\ud800.safetensors",
    "x-1-of-2.safetensors ",
    7,
    None,
    True,
    1.5,
    ["x-1-of-2.safetensors"],
    {"file": "x-1-of-2.safetensors"},
]


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name)[:30])
def test_an_index_entry_that_is_not_a_plain_file_name_opens_nothing(
    tmp_path: pathlib.Path, name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    sharded(folder)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["a"] = name
    path.write_text(json.dumps(index))
    real, seen = os.open, []

    def watched(opened: Any, *more: Any, **named: Any) -> int:
        seen.append(os.fspath(opened))
        return real(opened, *more, **named)

    monkeypatch.setattr(os, "open", watched)
    with pytest.raises(InputError, match="is not the plain name of a file") as caught:
        opened(folder)
    assert str(caught.value).isprintable()
    assert [pathlib.Path(p) for p in seen] == [path]


@pytest.mark.parametrize("kind", ["link outside", "link to a device", "pipe", "folder", "link to itself", "absent"])
def test_an_index_entry_that_is_no_regular_file_inside_is_an_error(tmp_path: pathlib.Path, kind: str) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    sharded(folder)
    shard = folder / "x-2-of-2.safetensors"
    shard.rename(tmp_path / "outside.safetensors")
    if kind == "link outside":
        shard.symlink_to("../outside.safetensors")
    elif kind == "link to a device":
        shard.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(shard)
    elif kind == "folder":
        shard.mkdir()
    elif kind == "link to itself":
        shard.symlink_to(shard.name)
    with pytest.raises(InputError, match=r"x-2-of-2\.safetensors: (is a link that leads|is not a reg|cannot|no such)"):
        opened(folder)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.pop("b"), "lacks tensors that its files have: b. The index is stale"),
        (lambda m: m.update(z="x-1-of-2.safetensors"), "names tensors that no file has: z. The index is stale"),
        (lambda m: m.update(a="x-1-of-2.safetensors"), "names the wrong file for: a (x-2-of-2.safetensors)"),
        (lambda m: m.update({f"t{i}": "x-1-of-2.safetensors" for i in range(9)}), "t0, t1, t2, t3, t4 and 4 more"),
        (lambda m: m.update(a="pytorch_model.bin"), "names pytorch_model.bin, which is not a .safetensors file"),
        (lambda m: m.update(a="gone.safetensors"), "gone.safetensors: no such file"),
        (lambda m: m.clear(), "has no weight_map"),
    ],
)
def test_an_index_that_does_not_match_its_files_is_an_error(
    tmp_path: pathlib.Path, change: Callable[[dict[str, str]], None], text: str
) -> None:
    sharded(tmp_path)
    save_file({"a": torch.ones(1), "d": torch.ones(1)}, tmp_path / "unrelated.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    # One entry still names the second shard, so that what is tested is the comparison and not which files are read.
    change(index["weight_map"])
    if "wrong file" in text:
        save_file({"a": torch.ones(1), "e": torch.ones(1)}, tmp_path / "x-2-of-2.safetensors")
        index["weight_map"]["e"] = "x-2-of-2.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(InputError if "several" not in text else Problems) as caught:
        opened(tmp_path)
    assert text in str(caught.value)


def test_a_tensor_in_two_files_is_an_error(tmp_path: pathlib.Path) -> None:
    sharded(tmp_path)
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "x-2-of-2.safetensors")
    with pytest.raises(InputError, match=r"x-2-of-2\.safetensors: tensor 'b' is also in x-1-of-2\.safetensors"):
        opened(tmp_path)


def test_all_damaged_shards_are_reported_at_once(tmp_path: pathlib.Path) -> None:
    sharded(tmp_path)
    for number in (1, 2):
        os.truncate(tmp_path / f"x-{number}-of-2.safetensors", 100)
    with pytest.raises(Problems) as caught:
        opened(tmp_path)
    assert len(caught.value.errors) == 2
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": []}', "[" * 50_000, '{"weight_map": {"a": NaN}}']
)
def test_an_index_that_is_no_index_is_an_error(tmp_path: pathlib.Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=r"index\.json: "):
        opened(tmp_path)


# What is wrong with a header has its own message.

DATA = bytes(8)
ENTRY = b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
WRONG: list[tuple[bytes, str]] = [
    (b"", "is 0 bytes long, too short"),
    (b"1234567", "is 7 bytes long, too short"),
    (file_of(b"{}", length=10**9), "claims a header of 1000000000 bytes, more than the 25000000"),
    (file_of(b"{}", length=2**64 - 1), "claims a header of"),
    (file_of(b"{}", length=900), "ends inside its header: it takes 908 bytes and the file has 10"),
    (file_of(b""), "its header is not JSON"),
    (file_of(b"[]"), "its header is not JSON"),
    (file_of(b' {"a":1}'), "its header is not JSON"),
    (file_of(b"{nonsense}"), "has a header that cannot be read"),
    (file_of(b'{"a":\xff}'), "has a header that cannot be read"),
    (file_of(b"{" + b'"a":{' * 60_000), "nested too deeply"),
    (file_of(b'{"a":' + b"[" * 60_000), "nested too deeply"),
    (file_of(b'{"a":' + b"[" * 2_000_001), "more than the 500000 tensors"),
    (file_of(b'{"a":' + b"9" * 5000 + b"}"), "has a header that cannot be read"),
    (file_of(b'{"a":' + ENTRY + b',"a":' + ENTRY + b"}", DATA), "has the name 'a' twice"),
    (file_of(b'{"a":{"dtype":"F32",' + ENTRY[1:] + b"}", DATA), "has the name 'dtype' twice"),
    (file_of(b'{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}', DATA), "2.0 is not a whole number"),
    (file_of(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', DATA), "NaN is not a whole number"),
    (file_of({"__metadata__": {"a": 1}}), "does not map strings to strings"),
    (file_of({"__metadata__": []}), "does not map strings to strings"),
    (file_of({"__metadata__": {"a": "\ud800"}}), "has a __metadata__ that is not valid Unicode"),
    (file_of({"a": 1}), "tensor 'a' does not have exactly dtype, shape and data_offsets"),
    (file_of({"a": {"dtype": "F32"}}), "tensor 'a' does not have exactly"),
    (file_of({"a": {**entry(), "more": 1}}, DATA), "tensor 'a' does not have exactly"),
    (file_of({"a": {"dtype": "F32", "shape": [2], "offsets": [0, 8]}}, DATA), "tensor 'a' has no data_offsets"),
    (file_of({"a": entry("F33")}, DATA), "tensor 'a' has dtype F33, which is not read. Did you mean 'F32'?"),
    (file_of({"a": entry("F4")}, DATA), "tensor 'a' has dtype F4, which is not read"),
    (file_of({"a": entry(["F32"])}, DATA), "tensor 'a' has dtype ['F32']"),
    (file_of({"a": entry(None)}, DATA), "tensor 'a' has dtype None"),
    (file_of({"a": entry(shape=2)}, DATA), "has a shape that is not a list"),
    (file_of({"a": entry(offsets={})}, DATA), "data_offsets that are not two numbers"),
    (file_of({"a": entry(offsets=(0, 8, 8))}, DATA), "data_offsets that are not two numbers"),
    (file_of({"a": entry(shape=[True, 2])}, DATA), "has a length in its shape"),
    (file_of({"a": entry(shape=[-2])}, DATA), "-2 is not a whole number"),
    (file_of({"a": entry(shape=["2"])}, DATA), "has a length in its shape"),
    (file_of({"a": entry(shape=[2**70])}, DATA), "has a length in its shape"),
    (file_of({"a": entry(shape=[1] * 17)}, DATA), "has 17 dimensions, more than 16"),
    (file_of({"a": entry(shape=[2**62] * 16)}, DATA), "bytes by its shape and dtype"),
    (file_of({"a": entry(shape=[3])}, DATA), "tensor 'a' takes 12 bytes by its shape and dtype, and 8 by its offsets"),
    (file_of({"a": entry(offsets=(8, 0))}, DATA), "are not two whole numbers in order"),
    (file_of({"a": entry(offsets=(-8, 0))}, DATA), "-8 is not a whole number"),
    (file_of(b'{"a":' + ENTRY.replace(b"[0", b"[-0") + b"}", DATA), "-0 is not a whole number"),
    (file_of({"a": entry(offsets=(0, True))}, DATA), "are not two whole numbers in order"),
    (file_of({"a": entry(offsets=(4, 12))}, DATA + DATA), "tensor 'a' leaves a hole after the header"),
    (file_of({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "tensor 'b' leaves a hole after tensor 'a'"),
    (file_of({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "tensor 'b' overlaps tensor 'a'"),
    (file_of({"a": entry(), "b": entry()}, DATA), "tensor 'b' overlaps tensor 'a'"),
    (file_of({"a": entry()}, DATA[:-1]), "is cut short: its header describes 77 bytes and the file has 76"),
    (file_of({"a": entry()}, DATA + b"x"), "has 1 bytes after its last tensor"),
    (file_of({}, b"x"), "has 1 bytes after its last tensor"),
    (file_of({"n" * 513: entry()}, DATA), "has a name of 513 bytes, more than 512"),
    (file_of({"ж" * 257: entry()}, DATA), "has a name of 514 bytes, more than 512"),
    (file_of(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', DATA), "is not valid Unicode"),
    (file_of({"\x1b[31m": entry(shape=[3])}, DATA), r"tensor '\x1b[31m' takes"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "is a Git LFS pointer"),
    (b"PK\x03\x04" + bytes(100), "is a pickle under another name"),
    (b"\x80\x02}q\x00(X\x01\x00" + bytes(100), "is a pickle under another name"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "text"), WRONG, ids=range(len(WRONG)))
def test_a_header_that_lies_is_an_error_that_says_how(content: bytes, text: str) -> None:
    began = time.perf_counter()
    with pytest.raises(InputError) as caught:
        parse_header(content, len(content), "m.safetensors")
    assert text in str(caught.value)
    assert str(caught.value).startswith("m.safetensors: ")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600
    assert time.perf_counter() - began < 1


def test_too_many_tensors_are_refused() -> None:
    text = ",".join(f'"{i}":{{}}' for i in range(500_001))
    with pytest.raises(InputError, match="has 500001 tensors, more than the 500000"):
        content = file_of(f"{{{text}}}".encode())
        parse_header(content, len(content), "m")


def test_a_header_that_came_in_part_is_an_error() -> None:
    content = file_of({"a": entry()}, DATA)
    with pytest.raises(InputError, match="69 bytes were expected, 30 came"):
        parse_header(content[:30], len(content), "m")


# No bytes but right ones pass.


def valid_files(draw: random.Random) -> list[bytes]:
    """Small files that are right, of many shapes and dtypes."""
    files = []
    for _ in range(20):
        tensors = [
            (
                f"layers.{i}.{draw.choice('abcж')}",
                draw.choice(DTYPES),
                tuple(draw.choices(range(4), k=draw.randrange(4))),
            )
            for i in range(draw.randrange(5))
        ]
        tensors.sort(key=lambda tensor: -tensor[1].size)
        header, offsets = encode_header(tensors, {"k": "v"} if draw.random() < 0.5 else {})
        _, dtype, shape = tensors[-1] if tensors else ("", U8, (0,))
        size = (offsets[-1] if offsets else len(header)) + dtype.size * _product(shape)
        files.append(header + bytes(size - len(header)))
    return files


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


TOKENS = [b"[", b"]", b"{", b"}", b",", b":", b'"', b"\\", b"-", b"0", b"99999999999999999999", b"null", b"true",
          b"NaN", b"1e9", b"\\u0000", b"\\ud800", b'"__metadata__"', b'"dtype"', b'"F64"', b"\xff", b"\0"]  # fmt: skip


def mutated(content: bytes, draw: random.Random) -> bytes:
    """The file with a few bytes, tokens or spans of its header changed, its length bytes sometimes put right again."""
    end = 8 + int.from_bytes(content[:8], "little")
    head, data = bytearray(content[:end]), content[end:]
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        at = draw.randrange(len(head)) if draw.random() < 0.3 else draw.randrange(min(8, len(head) - 1), len(head))
        kind = draw.randrange(7)
        if kind == 0:
            head[at] = draw.randrange(256)
        elif kind == 1:
            head[at] ^= 1 << draw.randrange(8)
        elif kind == 2:
            head[at:at] = draw.choice(TOKENS)
        elif kind == 3:
            del head[at : at + draw.randrange(1, 12)]
        elif kind == 4:
            token = draw.choice(TOKENS)
            head[at : at + len(token)] = token
        elif kind == 5:
            other = draw.randrange(len(head))
            head[at:at] = head[other : other + draw.randrange(1, 40)]
        else:
            digits = [i for i in range(8, len(head)) if 48 <= head[i] <= 57]
            if digits:
                head[draw.choice(digits)] = draw.choice(b"0123456789")
        if len(head) < 10:
            break
    if draw.random() < 0.8 and len(head) >= 8:
        head[:8] = (len(head) - 8).to_bytes(8, "little")
    return bytes(head) + (data if draw.random() < 0.9 else data[: draw.randrange(len(data) + 1)])


def try_mutations(count: int, seed: int) -> None:
    """Whatever passes must be whole, and right for safetensors, too; no exception but InputError may come."""
    draw = random.Random(seed)
    files = valid_files(draw)
    passed = 0
    for number in range(count):
        content = mutated(draw.choice(files), draw)
        began = time.perf_counter()
        try:
            tensors, _ = parse_header(content, len(content), "m")
        except InputError as error:
            assert str(error).isprintable()
            continue
        finally:
            assert time.perf_counter() - began < 1
        passed += 1
        assert all(0 < t.begin <= t.end <= len(content) and t.nbytes == t.elements * t.dtype.size for t in tensors)
        if number % 4 == 0:
            theirs = {name: (info["dtype"], tuple(info["shape"])) for name, info in safetensors.deserialize(content)}
            assert theirs == {t.name: (t.dtype.stored, t.shape) for t in tensors}
    assert passed > 0


def test_mutated_headers_give_tensors_or_our_error_and_nothing_else() -> None:
    try_mutations(50_000, seed=1)


def test_mutated_indexes_give_a_checkpoint_or_our_error_and_nothing_else(tmp_path: pathlib.Path) -> None:
    try_indexes(tmp_path, 1000, seed=3)


def try_indexes(tmp_path: pathlib.Path, count: int, seed: int) -> None:
    sharded(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    right, draw = path.read_bytes(), random.Random(seed)
    for _ in range(count):
        path.write_bytes(mutated(file_of(right), draw)[8:])
        try:
            assert len(opened(tmp_path).tensors) == 3
        except MergeflowError as error:
            assert error.exit_code == 3


# Headers of our own.


def test_headers_of_ours_are_read_by_safetensors_and_by_us(tmp_path: pathlib.Path) -> None:
    wanted = [(dtype.name, dtype, (2, 3)) for dtype in sorted(DTYPES, key=lambda dtype: -dtype.size)]
    wanted += [("scalar", U8, ()), ("empty", U8, (0, 5)), ('quote"Ж\n', U8, (1,))]
    header, offsets = encode_header(wanted, {"format": "pt", "a": "Ж"})
    values = {name: os.urandom(dtype.size * _product(shape)) for name, dtype, shape in wanted}
    values["bool"] = bytes([0, 1, 1, 0, 1, 0])
    path = tmp_path / "model.safetensors"
    path.write_bytes(header + b"".join(values[name] for name, _, _ in wanted))
    assert len(header) % 64 == 0
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "a": "Ж"}
        for (name, dtype, shape), offset in zip(wanted, offsets, strict=True):
            tensor = file.get_tensor(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (torch_dtype(dtype), shape)
            assert bytes(tensor.reshape(-1).view(torch.uint8).tolist()) == values[name]
            assert offset % dtype.size == 0
    checkpoint = opened(tmp_path)
    assert [(t.name, t.dtype, t.shape, t.begin) for t in checkpoint.tensors.values()] == [
        (*tensor, offset) for tensor, offset in sorted(zip(wanted, offsets, strict=True), key=lambda pair: pair[1])
    ]


def test_the_bytes_of_a_header_are_these() -> None:
    header, offsets = encode_header([("b", F32, (2, 3)), ("a", U8, ())], {"z": "1", "a": "2"})
    text = (
        '{"__metadata__":{"a":"2","z":"1"},'
        '"b":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
        '"a":{"dtype":"U8","shape":[],"data_offsets":[24,25]}}'
    )
    assert header == (184).to_bytes(8, "little") + text.encode().ljust(184)
    assert offsets == [192, 216]
    assert encode_header([], {}) == ((56).to_bytes(8, "little") + b"{}".ljust(56), [])


def test_a_header_that_could_not_be_read_back_is_not_written() -> None:
    for tensors, text in (
        ([("a", F32, ()), ("a", F32, ())], "two tensors with the name 'a'"),
        ([("__metadata__", F32, ())], "two tensors with the name '__metadata__'"),
        ([("n" * 513, F32, ())], "cannot be written"),
        ([("n", F32, (1,) * 17)], "cannot be written"),
        ([(f"{i:0500}", F32, ()) for i in range(50_000)], "smaller shard_size"),
    ):
        with pytest.raises(RecipeError, match=text):
            encode_header(tensors, {})


def test_thirty_thousand_tensors_are_read_in_well_under_a_second() -> None:
    wanted = [(f"model.layers.{i}.mlp.experts.down_proj.weight", F32, (16, 4)) for i in range(30_000)]
    header, offsets = encode_header(wanted, {})
    times = []
    for _ in range(3):
        began = time.process_time()
        tensors, _ = parse_header(header, offsets[-1] + 256, "m")
        times.append(time.process_time() - began)
    assert len(tensors) == 30_000
    assert min(times) < 0.5  # 0.15 s on a machine of 2024


def test_the_table_of_dtypes_is_the_one_of_the_format() -> None:
    assert len(BY_STORED) == len(DTYPES)

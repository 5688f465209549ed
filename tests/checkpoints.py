"""Checkpoints on disk for tests, written and read by code that shares nothing with mergeflow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import safe_open
from torch import Tensor

STORED = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def raw(tensor: Tensor) -> bytes:
    """A tensor's bytes, whatever its dtype and shape."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def save_file(path: Path, tensors: Mapping[str, Tensor], *, shift: int = 0) -> Path:
    """A safetensors file with the tensors in this order, its data `shift` bytes after a multiple of 64."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": STORED[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header).encode()
    text += b" " * ((shift - len(text) - 8) % 64)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(raw(tensor))
    return path


def save(
    folder: Path, tensors: Mapping[str, Tensor], *, shift: int = 0, config: Mapping[str, Any] | None = None
) -> Path:
    """A model's folder with one file."""
    save_file(folder / "model.safetensors", tensors, shift=shift)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_sharded(folder: Path, tensors: Mapping[str, Tensor], shards: int) -> Path:
    """A model's folder with the tensors dealt out to several files in turn, and an index."""
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    home = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files:
        save_file(folder / file, {name: tensor for name, tensor in tensors.items() if home[name] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": home}))
    return folder


def save_zeros(path: Path, shapes: Mapping[str, tuple[int, ...]], stored: str = "F32", size: int = 4) -> Path:
    """A sparse file of zeros: many bytes in no time."""
    header, end = {}, 0
    for name, shape in shapes.items():
        count = size * int(torch.Size(shape).numel())
        header[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [end, end + count]}
        end += count
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def weights_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by safetensors' own reader."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  not a dict
                found[name] = file.get_tensor(name).clone()  # not a view of the file, which a test may harm
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def digest_of(tensor: Tensor) -> str:
    """The digest of a tensor as the manifest is to give it, made anew from its definition."""
    data = raw(tensor)
    pieces = b"".join(blake3(data[i : i + 2**22]).digest() for i in range(0, len(data), 2**22))
    name = str(tensor.dtype).removeprefix("torch.")
    return blake3(pieces + f"\n{name}\n{','.join(map(str, tensor.shape))}\n".encode()).hexdigest()


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal in name, dtype, shape and every bit."""
    return first.keys() == second.keys() and all(
        first[n].dtype == second[n].dtype and first[n].shape == second[n].shape and raw(first[n]) == raw(second[n])
        for n in first
    )

"""Toy checkpoints on disk, and the command line called in this process: what tests of whole commands share."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mergeflow import cli

CONFIG = {"model_type": "toy", "vocab_size": 8, "dtype": "float32"}
SOURCE = pathlib.Path(__file__).parent.parent
Arrays = Mapping[str, "np.ndarray[Any, Any]"]


def arrays(seed: int, *, rows: int = 8, layers: int = 2, like: Arrays | None = None) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of a toy language model; with `like`, those of a fine-tune of it."""
    draw = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (rows, 4)}
    shapes |= {f"model.layers.{i}.mlp.weight": (4, 4) for i in range(layers)}
    shapes["model.norm.weight"] = (4,)
    made = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return (
        made if like is None else {name: (like[name] + 0.1 * value).astype(np.float32) for name, value in made.items()}
    )


def write_model(
    folder: pathlib.Path, tensors: Arrays, *, config: Mapping[str, Any] | None = CONFIG, shards: int = 1
) -> pathlib.Path:
    """A Hugging Face folder with these tensors, in one file or dealt to several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    home = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(home.values()):
        save_file({n: tensors[n] for n in tensors if home[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": home}))
    return folder


def write_toys(folder: pathlib.Path) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    """`base`, `a` and `b` in a folder: one model and two fine-tunes of it; their tensors."""
    base = arrays(0)
    made = {"base": base, "a": arrays(1, like=base), "b": arrays(2, like=base)}
    for name, tensors in made.items():
        write_model(folder / name, tensors)
    return made


LORA: Mapping[str, Any] = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["mlp"],
    "fan_in_fan_out": False,
    "use_rslora": False,
    "init_lora_weights": True,
    "lora_dropout": 0.1,
    "base_model_name_or_path": "base",
}
"""The part of an adapter_config.json that counts."""


def lora_arrays(seed: int = 7, *, layers: int = 2, rank: int = 2) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of a LoRA adapter of the toys, under the names that peft gives them."""
    draw = np.random.default_rng(seed)
    made = {}
    for i in range(layers):
        for half, shape in (("A", (rank, 4)), ("B", (4, rank))):
            name = f"base_model.model.model.layers.{i}.mlp.lora_{half}.weight"
            made[name] = draw.standard_normal(shape).astype(np.float32)
    return made


def write_adapter(folder: pathlib.Path, tensors: Arrays, **config: Any) -> pathlib.Path:
    """An adapter's folder as peft writes it; `config` replaces keys of `LORA`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**LORA, **config}))
    save_file(dict(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@dataclass(frozen=True)
class Called:
    """What a command left: its exit code, and what it printed."""

    code: int
    out: str
    err: str


def call(*words: str) -> Called:
    """The command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    import sys

    argv = sys.argv
    sys.argv = ["mergeflow", *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    finally:
        sys.argv = argv
    return Called(code, out.getvalue(), err.getvalue())


def environment(**more: str) -> dict[str, str]:
    """The environment of a process that imports this mergeflow and reaches no hub."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    path = os.pathsep.join(filter(None, (str(SOURCE), os.environ.get("PYTHONPATH"))))
    return {**kept, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **more}


def tree(folder: pathlib.Path) -> Sequence[str]:
    """Every path below a folder, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@contextlib.contextmanager
def recipe_script(module: str, *folders: str) -> Iterator[ModuleType]:
    """A script that stands in these folders of recipes/, imported, while torch has one thread."""
    import torch

    paths = [str(SOURCE / "recipes" / name) for name in (*folders, "quickstart")]
    threads = torch.get_num_threads()
    sys.path[:0] = paths
    torch.set_num_threads(1)
    try:
        yield import_module(module)
    finally:
        torch.set_num_threads(threads)
        for path in paths:
            sys.path.remove(path)

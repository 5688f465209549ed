"""The examples that `mergeflow ops NAME` prints, and checkpoints that they run on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from checkpoints import save

from mergeflow.checkpoint.statistics import Facts, Kind, encode
from mergeflow.ops import OPS, Op
from mergeflow.schema import op_page

LAYERS, HIDDEN, FFN, VOCAB = 4, 8, 12, 16


def example_of(name: str) -> str:
    """The recipe at the end of an op's page, as somebody copies it."""
    lines = op_page(name).partition("Example\n")[2].splitlines()
    return "".join(line[2:] + "\n" for line in lines)


def llama(seed: int) -> dict[str, torch.Tensor]:
    """The tensors of a small Llama-like model."""
    draw = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        for name, shape in {
            "input_layernorm": (HIDDEN,),
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "post_attention_layernorm": (HIDDEN,),
            "mlp.up_proj": (FFN, HIDDEN),
            "mlp.down_proj": (HIDDEN, FFN),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    return {name: torch.randn(shape, generator=draw) * 0.1 for name, shape in shapes.items()}


CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": LAYERS}
CONFIG |= {"hidden_size": HIDDEN, "intermediate_size": FFN, "vocab_size": VOCAB, "tie_word_embeddings": False}


def write_models(folder: Path, recipe: dict[str, Any]) -> None:
    """The checkpoints that a recipe names, where they are not there yet."""
    for seed, name in enumerate(sorted(recipe["models"])):
        if not (folder / name).exists():
            save(folder / name, llama(seed), config=CONFIG)
    for node in recipe["nodes"].values():
        for index, one in enumerate(node.get("inputs", ())):
            for key in one.keys() & KINDS.keys() if isinstance(one, dict) else ():
                write_statistics(folder / one[key], KINDS[key], index)


KINDS: dict[str, Kind] = {"gram": "gram", "fisher": "fisher_diag", "act_absmean": "act_absmean"}
"""What the keys of inputs name."""


def write_statistics(folder: Path, kind: Kind, seed: int) -> None:
    """Statistics of such a model, of each matrix in its layers."""
    names = {name: tensor for name, tensor in llama(seed).items() if ".layers." in name and tensor.ndim == 2}
    held = {}
    for name, tensor in names.items():
        x = torch.randn(4 * tensor.shape[1], tensor.shape[1], generator=torch.Generator().manual_seed(seed))
        values = {"gram": x.T @ x / len(x), "act_absmean": x.abs().mean(0)}.get(kind, tensor.square())
        held.update(encode(kind, "packed32", name, values))
    facts = Facts.model_validate(
        {
            "kind": kind,
            "codec": "packed32" if kind == "gram" else "float32",
            "op": {"name": kind},
            "model": {"digest": "0" * 64},
            "n_examples": 32,
            "n_tokens": 1000,
            "groups": {name: name for name in names} if kind != "fisher_diag" else {},
        }
    )
    save(folder, held)
    (folder / "statistics.json").write_bytes(facts.encoded())


def write_examples(folder: Path, ops: Iterable[type[Op]] = OPS) -> None:
    """A recipe file for each op, and the models of all."""
    for op in ops:
        text = example_of(op.name)
        (folder / f"{op.name}.yaml").write_text(text)
        write_models(folder, yaml.safe_load(text))


def every_op(ops: Iterable[type[Op]] = OPS) -> dict[str, Any]:
    """One recipe with the examples of all ops, each an output of its own."""
    recipe: dict[str, Any] = {"recipe": 1, "name": "every-op", "models": {}, "nodes": {}, "outputs": {}}
    for op in ops:
        one = yaml.safe_load(example_of(op.name))
        recipe["models"] |= one["models"]
        recipe.setdefault("artifacts", {}).update(one.get("artifacts", {}))
        called = {name: op.name if name == "merged" else f"{op.name}_{name}" for name in one["nodes"]}
        recipe["nodes"] |= {called[name]: _renamed(node, called) for name, node in one["nodes"].items()}
        recipe["outputs"][op.name] = {"node": op.name, **one.get("output", {})}
    return recipe


def _renamed(value: Any, called: dict[str, str]) -> Any:
    """A node with other names for the nodes that it refers to."""
    if isinstance(value, dict):
        return {key: inner if key == "op" else _renamed(inner, called) for key, inner in value.items()}
    if isinstance(value, list):
        return [_renamed(inner, called) for inner in value]
    return called.get(value, value) if isinstance(value, str) else value

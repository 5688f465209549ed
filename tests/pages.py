"""The examples that `mergeflow ops NAME` prints, and checkpoints that they run on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from checkpoints import save

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
            "self_attn.k_proj": (HIDDEN, HIDDEN),
            "self_attn.v_proj": (HIDDEN, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "post_attention_layernorm": (HIDDEN,),
            "mlp.gate_proj": (FFN, HIDDEN),
            "mlp.up_proj": (FFN, HIDDEN),
            "mlp.down_proj": (HIDDEN, FFN),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    return {name: torch.randn(shape, generator=draw) * 0.1 for name, shape in shapes.items()}


CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": LAYERS}
CONFIG |= {"hidden_size": HIDDEN, "intermediate_size": FFN, "vocab_size": VOCAB, "tie_word_embeddings": False}
CONFIG |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
WORDS = ("[PAD]", "[UNK]", *(f"w{number}" for number in range(VOCAB - 2)))


def classifier(seed: int) -> dict[str, torch.Tensor]:
    """The tensors of a small Llama-like classifier of texts."""
    tensors = llama(seed)
    return {
        **{name: one for name, one in tensors.items() if name != "lm_head.weight"},
        "score.weight": tensors["lm_head.weight"][:3],
    }


def classifiers(recipe: dict[str, Any]) -> set[str]:
    """The models of a recipe that must be classifiers."""
    fuses = [node for node in recipe["nodes"].values() if node["op"] == "fuse"]
    return {name for node in fuses for name in (node["target"], *node["sources"])}


def write_models(folder: Path, recipe: dict[str, Any]) -> None:
    """The checkpoints and the data that a recipe names, where they are not there yet."""
    for seed, name in enumerate(sorted(recipe["models"])):
        if not (folder / name).exists():
            if name in classifiers(recipe):
                labels = {"id2label": {str(n): f"LABEL_{n}" for n in range(3)}, "pad_token_id": 0}
                save(
                    folder / name,
                    classifier(seed),
                    config={**CONFIG, **labels, "architectures": ["LlamaForSequenceClassification"]},
                )
            else:
                save(folder / name, llama(seed), config=CONFIG)
            write_tokenizer(folder / name)
    for seed, path in enumerate(sorted(recipe.get("data", {}).values())):
        draw = random.Random(seed)
        texts = [" ".join(draw.choices(WORDS[2:], k=draw.randint(2, 12))) for _ in range(20)]
        (folder / path).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words, one for each row of the embedding."""
    model = {"type": "WordLevel", "vocab": {word: at for at, word in enumerate(WORDS)}, "unk_token": "[UNK]"}
    made = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(made))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_examples(folder: Path, ops: Iterable[type[Op]] = OPS) -> None:
    """A recipe file for each op, and the models of all."""
    for op in ops:
        text = example_of(op.name)
        (folder / f"{op.name}.yaml").write_text(text)
        write_models(folder, yaml.safe_load(text))


def every_op(ops: Iterable[type[Op]] = OPS) -> dict[str, Any]:
    """One recipe with the examples of all ops, each an output of its own."""
    recipe: dict[str, Any] = {"recipe": 1, "name": "every-op", "models": {}, "data": {}, "nodes": {}, "outputs": {}}
    for op in ops:
        one = yaml.safe_load(example_of(op.name))
        recipe["models"] |= one["models"]
        recipe["data"] |= one.get("data", {})
        called = {name: f"{op.name}_{name}" for name in one["nodes"]} | {[*one["nodes"]][-1]: op.name}
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

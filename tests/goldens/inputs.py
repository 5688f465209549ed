"""The models that golden files are made of: by numpy alone, the same to the last bit wherever they are made.

`make.py` hands them to other packages, `test_goldens.py` to our ops. Numbers are sums of twelve 16-bit draws (near to normal)
from the raw words of PCG64, which numpy promises to keep; every weight is a whole multiple of 2^-22 below 2^22 of them, so
that float32 holds it, and the delta to its base too, exactly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

Array = NDArray[Any]
Model = dict[str, Array]

SHAPES: Mapping[str, tuple[int, ...]] = {
    "embed.weight": (12, 16),
    "experts.weight": (2, 6, 5),
    "mlp.weight": (16, 10),
    "norm.weight": (40,),
}
"""The tensors of a model, sorted by name."""

LAYERS, HIDDEN, INNER, HEADS, WORDS = 6, 4, 6, 2, 12
LLAMA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS // 2,
    "vocab_size": WORDS,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
"""The config of the smallest Llama that commands merge."""
LLAMAS = ("base", "a", "b", "c")
"""The folders of Llamas: a base and its fine-tunes."""

KINDS = ("dense", "sparse", "near")
"""Deltas that are all of one size; half of them zero; or of all sizes from 1e-6 to 1e-1."""


def models(kind: str, count: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> tuple[Model, list[Model]]:
    """A base and `count` fine-tunes of it, float32, whose deltas are of one of `KINDS`."""
    base: Model = {}
    tunes: list[Model] = [{} for _ in range(count)]
    for place, (name, shape) in enumerate(shapes.items()):
        own = _bells(shape, (0, place)) * 4
        base[name] = (own * 2.0**-22).astype(np.float32)
        for index, tune in enumerate(tunes, 1):
            step = _deltas(kind, shape, (index, place))
            tune[name] = ((own + step) * 2.0**-22).astype(np.float32)
            assert np.array_equal(tune[name] - base[name], (step * 2.0**-22).astype(np.float32))
    return base, tunes


def _deltas(kind: str, shape: tuple[int, ...], seed: Sequence[int]) -> Array:
    """Deltas as whole numbers (in 2^-22)."""
    step = _bells(shape, (*seed, 1))
    match kind:
        case "dense":
            return step
        case "sparse":
            return np.where(_words(shape, (*seed, 2)) >> np.uint64(63) == 0, step, 0)
        case "near":
            return step >> (_words(shape, (*seed, 2)) >> np.uint64(60)).astype(np.int64)
    raise ValueError(f"no kind {kind}, only {', '.join(KINDS)}")


def _words(shape: tuple[int, ...], seed: Sequence[int]) -> Array:
    """Raw words of a stream of their own."""
    return np.random.PCG64(seed).random_raw(int(np.prod(shape))).reshape(shape)


def _bells(shape: tuple[int, ...], seed: Sequence[int]) -> Array:
    """Whole numbers near to normal around 0, of standard deviation 2^16: sums of twelve 16-bit draws."""
    raw = np.random.PCG64(seed).random_raw(3 * int(np.prod(shape))).reshape(*shape, 3, 1)
    drawn = raw >> np.arange(0, 64, 16, dtype=np.uint64) & np.uint64(0xFFFF)
    return drawn.astype(np.int64).sum(axis=(-2, -1)) - 6 * 65_535


def llama(layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    """The tensors of the Llama, sorted by name, with so many layers."""
    layer = {
        "input_layernorm": (HIDDEN,),
        "mlp.down_proj": (HIDDEN, INNER),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "post_attention_layernorm": (HIDDEN,),
        "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    }
    found = {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in layer.items()}
    outside = {"lm_head.weight": (WORDS, HIDDEN), "model.embed_tokens.weight": (WORDS, HIDDEN)}
    return dict(sorted((found | outside | {"model.norm.weight": (HIDDEN,)}).items()))


def write_llamas(folder: Path) -> str:
    """The folders of `LLAMAS`, each with a config and a tokenizer of whole words; their digest."""
    base, tunes = models("dense", len(LLAMAS) - 1, llama())
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(WORDS)}, "unk_token": "w0"},
    }
    for name, model in zip(LLAMAS, (base, *tunes), strict=True):
        (folder / name).mkdir()
        save_file(model, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(LLAMA))
        (folder / name / "tokenizer.json").write_text(json.dumps(tokenizer))
        (folder / name / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return digest(base, tunes)


def digest(base: Model, tunes: Sequence[Model]) -> str:
    """A short digest of models, by which a golden knows that it was made of the same."""
    found = hashlib.sha256()
    for model in (base, *tunes):
        for name in sorted(model):
            found.update(name.encode() + np.ascontiguousarray(model[name]).tobytes())
    return found.hexdigest()[:16]

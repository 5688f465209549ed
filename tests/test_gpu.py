"""A CUDA device gives the CPU's result up to rounding, through the real pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergeflow import Recipe, run

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

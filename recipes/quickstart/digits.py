"""The data and the model of the quickstart: handwritten digits in five domains, and a small MLP classifier.

A domain is a fixed way to rearrange or invert the 8x8 images of scikit-learn's digits. Every image belongs to one split
only, whatever the domain: what a model is tested on, no model has seen in any form. Nothing here needs a download.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

DOMAINS = ("identity", "inverted", "rotated", "rolled", "shuffled")
SHAPE = {"input_size": 64, "hidden_size": 128, "num_hidden_layers": 3, "num_labels": 10}
BASE_IMAGES, EXPERT_IMAGES, VALIDATION_IMAGES = 60, 228, 200
Images = tuple[Tensor, Tensor]


def in_domain(images: Tensor, domain: str) -> Tensor:
    """`images` (N, 8, 8) as they look in `domain`, flattened to (N, 64)."""
    if domain == "inverted":
        images = 1 - images
    elif domain == "rotated":
        images = images.rot90(1, (1, 2))
    elif domain == "rolled":
        images = images.roll((3, 3), (1, 2))
    elif domain == "shuffled":
        patches = images.reshape(-1, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(-1, 16, 2, 2)
        order = torch.from_numpy(np.random.RandomState(0).permutation(16))
        images = patches[:, order].reshape(-1, 4, 4, 2, 2).permute(0, 1, 3, 2, 4)
    return images.reshape(-1, 64)


def splits(seed: int = 0, validation: int = VALIDATION_IMAGES) -> dict[str, Images]:
    """All 1,797 images in disjoint parts: `base`, one for each domain's expert, `validation` and `test` (what is left)."""
    digits = load_digits()
    order = np.random.RandomState(seed).permutation(len(digits.target))
    images = torch.from_numpy(digits.images[order]).float() / 16
    labels = torch.from_numpy(digits.target[order]).long()
    sizes = {"base": BASE_IMAGES, **dict.fromkeys(DOMAINS, EXPERT_IMAGES), "validation": validation}
    parts, start = {}, 0
    for name, size in sizes.items():
        parts[name] = images[start : start + size], labels[start : start + size]
        start += size
    return {**parts, "test": (images[start:], labels[start:])}


class Block(nn.Module):
    """Linear, LayerNorm, GELU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs) -> (N, outputs)."""
        return nn.functional.gelu(self.norm(self.linear(x)))


class MLP(nn.Module):
    """The classifier: `num_hidden_layers` blocks and a head; its tensors are `blocks.N.*` and `head.*`."""

    def __init__(self, input_size: int, hidden_size: int, num_hidden_layers: int, num_labels: int) -> None:
        super().__init__()
        sizes = [input_size] + [hidden_size] * num_hidden_layers
        self.blocks = nn.ModuleList(Block(a, b) for a, b in pairwise(sizes))
        self.head = nn.Linear(hidden_size, num_labels)

    def forward(self, x: Tensor) -> Tensor:
        """Flat images (N, input_size) -> logits (N, num_labels)."""
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def save(model: MLP, folder: Path) -> None:
    """Write `model` as a Hugging Face style folder: config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["mergeflow_mlp"], "model_type": "mergeflow_mlp", "dtype": "float32", **SHAPE}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def load(folder: Path) -> MLP:
    """Read a folder that `save` or a merge has written."""
    config = json.loads((folder / "config.json").read_text())
    model = MLP(**{name: config[name] for name in SHAPE})
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


@torch.no_grad()
def accuracies(model: MLP, part: Images) -> dict[str, float]:
    """The part of the images of `part` that `model` gets right, for each domain."""
    images, labels = part
    return {d: (model(in_domain(images, d)).argmax(1) == labels).float().mean().item() for d in DOMAINS}

"""Train the models of the quickstart again: a weak base, and one fine-tune of it for each domain.

Usage: train.py [FOLDER]    (default: models/ beside this file; about ten seconds)

The base sees 60 images in all five domains; each expert goes on from it with 228 images of its own in its one domain.
One thread and fixed seeds: the same versions of torch and numpy on the same processor give the same files.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from digits import DOMAINS, MLP, SHAPE, in_domain, save, splits
from torch import Tensor, nn

STEPS, LEARNING_RATE, BATCH, NOISE = 200, 1e-3, 64, 0.1


def fit(model: MLP, inputs: Tensor, labels: Tensor, seed: int, *, batch: int = BATCH, steps: int = STEPS) -> MLP:
    """Train `model` in place on (N, 64) inputs, with noise on them, and give it back."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (batch,), generator=generator)
        noise = NOISE * torch.randn(batch, inputs.shape[1], generator=generator)
        loss = nn.functional.cross_entropy(model(inputs[chosen] + noise), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def main() -> None:
    """Train and save all six models."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "models"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parts = splits()
    images, labels = parts["base"]
    everywhere = torch.cat([in_domain(images, domain) for domain in DOMAINS])
    base = fit(MLP(**SHAPE), everywhere, labels.repeat(len(DOMAINS)), seed=0)
    save(base, folder / "base")
    for seed, domain in enumerate(DOMAINS, start=1):
        images, labels = parts[domain]
        save(fit(copy.deepcopy(base), in_domain(images, domain), labels, seed), folder / domain)


if __name__ == "__main__":
    main()

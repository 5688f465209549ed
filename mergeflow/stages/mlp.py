"""`mergeflow_mlp`: a small classifier of rows of numbers, for experiments that need no download.

A Hugging Face style folder with `model_type: mergeflow_mlp` in its config.json holds one: `blocks.N.linear`, `blocks.N.norm`
and `head`. It is ours, so it runs without transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mergeflow.errors import InputError

SIZES = ("input_size", "hidden_size", "num_hidden_layers", "num_labels")


class MergeflowBlock(nn.Module):
    """Linear, LayerNorm, GELU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs) -> (N, outputs)."""
        return nn.functional.gelu(self.norm(self.linear(x)))


class MergeflowMLP(nn.Module):
    """`num_hidden_layers` blocks and a head. Sizes are read from a config.json. Raises InputError where one is missing."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        for name in SIZES:
            if type(config.get(name)) is not int or config[name] < 1:
                raise InputError(
                    f"`{name}` is not a number of 1 or more", fix=f"mergeflow_mlp needs {', '.join(SIZES)}."
                )
        sizes = [config["input_size"]] + [config["hidden_size"]] * config["num_hidden_layers"]
        self.blocks = nn.ModuleList(MergeflowBlock(a, b) for a, b in pairwise(sizes))
        self.head = nn.Linear(config["hidden_size"], config["num_labels"])

    def forward(self, features: Tensor) -> Tensor:
        """Rows (N, input_size) -> logits (N, num_labels)."""
        for block in self.blocks:
            features = block(features)
        logits: Tensor = self.head(features)
        return logits


def empty(config: Mapping[str, Any]) -> MergeflowMLP:
    """The model without its weights, on the meta device."""
    with torch.device("meta"):
        return MergeflowMLP(config).eval()

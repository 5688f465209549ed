"""Makes `regmean.safetensors`: what fusion-bench's RegMean gives for well-posed inputs, to hold ours against.

Run where `make.py` runs:

    python regmean.py

The package's own function computes every result, in float32 by its inverse; this script makes its inputs, which are stored with
the result. It takes sums of Grams and inverts them, ours corrects the mean: the same where all is well posed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from fusion_bench.method.regmean.regmean import merging_with_regmean_weights
from safetensors.torch import save_file

HERE = Path(__file__).parent


def main() -> None:
    """Three models, Linear and Conv1D, some alphas."""
    stored: dict[str, torch.Tensor] = {}
    for number, (alpha, out, d, transposed) in enumerate(
        [(1.0, 12, 20, False), (0.9, 20, 12, False), (0.9, 16, 16, True), (0.5, 12, 20, True), (0.0, 12, 20, False)]
    ):
        generator = torch.Generator().manual_seed(number)
        weights = [torch.randn((d, out) if transposed else (out, d), generator=generator) for _ in range(3)]
        mix = torch.eye(d) + 0.1 * torch.randn(d, d, generator=generator)
        xs = [torch.randn(40 * d, d, generator=generator) @ mix for _ in range(3)]
        grams = [x.T @ x / len(x) for x in xs]
        merged = merging_with_regmean_weights(
            {"layer.weight": weights}, [{"layer": gram} for gram in grams], alpha, weight_transpose=not transposed
        )["layer.weight"]
        case = f"case{number}"
        stored[f"{case}/alpha"], stored[f"{case}/transposed"] = torch.tensor(alpha), torch.tensor(transposed)
        stored[f"{case}/merged"] = merged.contiguous()
        for index in range(3):
            stored[f"{case}/weight.{index}"], stored[f"{case}/gram.{index}"] = weights[index], grams[index]
    save_file(stored, HERE / "regmean.safetensors", {"package": "fusion-bench 0.2.33", "torch": torch.__version__})


if __name__ == "__main__":
    main()

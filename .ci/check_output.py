"""Hold a merged folder against one of its models: the same tensor names and shapes, finite values, and a model card.

Usage: check_output.py MERGED MODEL
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


def main() -> None:
    """Compare the two folders of the command line; an AssertionError says what does not hold."""
    merged, model = Path(sys.argv[1]), Path(sys.argv[2])
    made, meant = load_file(merged / "model.safetensors"), load_file(model / "model.safetensors")
    assert made.keys() == meant.keys(), sorted(made.keys() ^ meant.keys())
    for name, tensor in made.items():
        assert tensor.shape == meant[name].shape, name
        assert np.isfinite(tensor).all(), name
    config = json.loads((merged / "config.json").read_text())
    assert config["architectures"] == ["mergeflow_mlp"], config
    assert (merged / "README.md").is_file(), "no model card"
    print(f"{merged}: {len(made)} tensors, the names and shapes of {model}, all finite")


if __name__ == "__main__":
    main()

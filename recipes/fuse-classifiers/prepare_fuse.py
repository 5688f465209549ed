"""Make the data and train the models of the fused classifiers, in plain torch.

Usage: prepare_fuse.py [FOLDER] [--seed N]    (default: work/ beside this file; about ten seconds)

The experts and their images are those of recipes/digits. Of the images that no model is trained on, 300 in all five domains are
what the experts teach on, without labels (`unlabelled`), and the rest are held out (`test-*`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
sys.path.insert(0, str(Path(__file__).parents[1] / "digits"))
import digits
import prepare as experts
from digits import DOMAINS, Images, in_domain, save

UNLABELLED = 300


def parts_of(seed: int) -> dict[str, Images]:
    """The images of one seed in disjoint parts."""
    parts = digits.splits(seed, validation=UNLABELLED)
    return {**parts, "unlabelled": parts["validation"]}


def prepare(folder: Path, seed: int) -> None:
    """Write models and data of one seed into `folder`."""
    for name, model in experts.train(seed).items():
        save(model, folder / "models" / name)
    parts = parts_of(seed)
    for domain in DOMAINS:
        for name, part in ((domain, domain), (f"test-{domain}", "test")):
            images, labels = parts[part]
            experts.write_rows(folder / "data" / f"{name}.jsonl", in_domain(images, domain), labels)
    everywhere = torch.cat([in_domain(parts["unlabelled"][0], domain) for domain in DOMAINS])
    experts.write_rows(folder / "data" / "unlabelled.jsonl", everywhere)


def main() -> None:
    """Read the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "work")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    prepare(options.folder, options.seed)


if __name__ == "__main__":
    main()

"""Make the data and train the models of the digits experiment, in plain torch.

Usage: prepare.py [FOLDER] [--seed N]    (default: work/ beside this file; about ten seconds)

The images, the domains and the classifier are the quickstart's. FOLDER/models gets a weak base, trained on small batches of 60
images in all five domains; five experts that go on from it, each with 228 images of its own in its one domain; and
`multitask`, which saw what all five experts saw, and as many steps as they took together. FOLDER/data gets JSON lines that
`mergeflow` reads: each expert's own images, the images that nobody trains on (`test-*`), and rows of noise. The seed decides
which images are whose, and how the models are trained.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
from digits import DOMAINS, EXPERT_IMAGES, MLP, SHAPE, Images, in_domain, save, splits
from train import STEPS, fit

BASE_BATCH = 16


def parts_of(seed: int) -> dict[str, Images]:
    """The images of one seed in disjoint parts; all that no model is trained on are for the test."""
    return splits(seed, validation=0)


def train(seed: int) -> dict[str, MLP]:
    """The base, an expert for each domain, and the multi-task model."""
    torch.manual_seed(seed)
    parts = parts_of(seed)
    images, labels = parts["base"]
    everywhere = torch.cat([in_domain(images, domain) for domain in DOMAINS])
    base = fit(MLP(**SHAPE), everywhere, labels.repeat(len(DOMAINS)), 100 * seed, batch=BASE_BATCH)
    models = {"base": base}
    for number, domain in enumerate(DOMAINS, start=1):
        images, labels = parts[domain]
        models[domain] = fit(copy.deepcopy(base), in_domain(images, domain), labels, 100 * seed + number)
    images = torch.cat([in_domain(parts[domain][0], domain) for domain in DOMAINS])
    labels = torch.cat([parts[domain][1] for domain in DOMAINS])
    models["multitask"] = fit(copy.deepcopy(base), images, labels, 100 * seed + 6, steps=STEPS * len(DOMAINS))
    return {name: model.eval() for name, model in models.items()}


def noise(seed: int) -> Tensor:
    """As many rows as an expert has images, of pixels that are equally likely to be anything from black to white."""
    return torch.rand(EXPERT_IMAGES, SHAPE["input_size"], generator=torch.Generator().manual_seed(seed))


def write_rows(path: Path, inputs: Tensor, labels: Tensor | None = None) -> None:
    """One JSON object a line: `features`, and `label` where there is one."""
    rows = [{"features": row} for row in inputs.tolist()]
    for row, label in zip(rows, [] if labels is None else labels.tolist(), strict=False):
        row["label"] = label
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(folder: Path, seed: int) -> None:
    """Write models and data of one seed into `folder`."""
    for name, model in train(seed).items():
        save(model, folder / "models" / name)
    parts = parts_of(seed)
    for domain in DOMAINS:
        for name, part in ((domain, domain), (f"test-{domain}", "test")):
            images, labels = parts[part]
            write_rows(folder / "data" / f"{name}.jsonl", in_domain(images, domain), labels)
    write_rows(folder / "data" / "noise.jsonl", noise(seed))


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

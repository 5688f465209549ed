"""Make the digits experiment for several seeds, through mergeflow's own commands, and print the table of accuracies.

Usage: table.py [FOLDER] [--seeds 0 1 2]    (default: work/ beside this file; about ten seconds a seed)

For each seed: `prepare.py` makes data and models, `mergeflow run merge.yaml` collects the statistics and merges, and `mergeflow
eval` measures each model on the images of all five domains that no model was trained on. "Each expert in its own domain" and "all
experts at once" (the mean of their probabilities) are five models and not one, and "multi-task" needs the data of all five.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
import commands
from commands import command
from digits import DOMAINS, in_domain, load
from prepare import parts_of, prepare

RECIPE = Path(__file__).parent / "merge.yaml"
MERGES = {
    "simple": "the mean of the five (`linear`)",
    "fisher_raw": "`fisher`, as the diagonals are",
    "fisher": "`fisher`, normalize model_l2",
    "regmean": "`regmean`, alpha 0.9",
    "regmean99": "`regmean`, alpha 0.99",
    "few": "`regmean`, alpha 0.9, ten images an expert",
    "noise": "`regmean`, alpha 0.9, noise in place of images",
}
ROWS = {
    "base": "base",
    "best": "best single expert",
    "own": "each expert in its own domain",
    "together": "all experts at once",
    "multitask": "multi-task",
    **MERGES,
}


def accuracies(model: Path, work: Path) -> dict[str, float]:
    """How much a model gets right in each domain."""
    files = [work / "data" / f"test-{domain}.jsonl" for domain in DOMAINS]
    return dict(zip(DOMAINS, commands.accuracies(model, files, "--batch-size", "256", "--threads", "1"), strict=True))


@torch.no_grad()
def together(work: Path, seed: int) -> float:
    """The accuracy of the mean of all experts' probabilities, over the domains."""
    experts = [load(work / "models" / domain) for domain in DOMAINS]
    images, labels = parts_of(seed)["test"]
    right = []
    for domain in DOMAINS:
        shown = in_domain(images, domain)
        found = sum(expert(shown).softmax(1) for expert in experts).argmax(1)
        right.append((found == labels).float().mean().item())
    return statistics.fmean(right)


def merge(work: Path, out: Path, *more: str) -> None:
    """`mergeflow run`: the statistics of all experts, and all merges."""
    command("run", str(RECIPE), "-o", str(out), "--set", f"work={work.resolve()}", "--threads", "1", "-q", *more)


def measured(work: Path, out: Path, seed: int) -> dict[str, float]:
    """The mean accuracy over the five domains of every row of the table."""
    mean = {name: statistics.fmean(accuracies(out / name, work).values()) for name in MERGES}
    singles = {name: accuracies(work / "models" / name, work) for name in ("base", "multitask", *DOMAINS)}
    found = {
        "base": statistics.fmean(singles["base"].values()),
        "best": max(statistics.fmean(singles[domain].values()) for domain in DOMAINS),
        "own": statistics.fmean(singles[domain][domain] for domain in DOMAINS),
        "together": together(work, seed),
        "multitask": statistics.fmean(singles["multitask"].values()),
        **mean,
    }
    return {name: found[name] for name in ROWS}


def main() -> None:
    """Read the command line, make what is not there, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "work")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for seed in options.seeds:
        work = options.folder / f"seed-{seed}"
        prepare(work, seed)
        merge(work, work / "merged", "--force")
        found.append(measured(work, work / "merged", seed))
    print("Accuracy on 597 held-out images in each of five domains:\n")
    print(f"| model |{''.join(f' seed {seed} |' for seed in options.seeds)} mean |")
    print(f"| --- |{' ---: |' * (len(options.seeds) + 1)}")
    for name, words in ROWS.items():
        values = [one[name] for one in found]
        cells = "".join(f" {value:.3f} |" for value in [*values, statistics.fmean(values)])
        print(f"| {words} |{cells}")


if __name__ == "__main__":
    main()

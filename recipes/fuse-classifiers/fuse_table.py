"""Make the fused classifiers for several seeds, through mergeflow's own commands, and print the table of accuracies.

Usage: fuse_table.py [FOLDER] [--seeds 0 1 2]    (default: work/ beside this file; about a quarter of a minute a seed)

For each seed: `prepare_fuse.py` makes data and models, `mergeflow run fuse.yaml` merges and fuses, and `mergeflow eval` measures
each model on the images of all five domains that neither an expert nor the fuse has seen.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
import commands
from digits import DOMAINS
from prepare_fuse import prepare

RECIPE = Path(__file__).parent / "fuse.yaml"
ROWS = {
    "mean": "the mean of the five (`linear`)",
    "mean_avg": "fused from it, `avg` (FedDF)",
    "mean_surest": "fused from it, `max_confidence` with `include_self`",
    "regmean": "`regmean`",
    "regmean_avg": "fused from it, `avg` (FedDF)",
    "regmean_surest": "fused from it, `max_confidence` with `include_self`",
}


def fuse(work: Path, out: Path, *more: str) -> None:
    """`mergeflow run`: all merges and all fuses."""
    commands.command(
        "run", str(RECIPE), "-o", str(out), "--set", f"work={work.resolve()}", "--threads", "1", "-q", *more
    )


def measured(work: Path, out: Path, names: Iterable[str] = ROWS) -> dict[str, float]:
    """The mean accuracy over the five domains of each model."""
    files = [work / "data" / f"test-{domain}.jsonl" for domain in DOMAINS]
    options = ("--batch-size", "256", "--threads", "1")
    return {name: statistics.fmean(commands.accuracies(out / name, files, *options)) for name in names}


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
        fuse(work, work / "fused", "--force")
        found.append(measured(work, work / "fused"))
    print("Accuracy on 297 held-out images in each of five domains:\n")
    print(f"| model |{''.join(f' seed {seed} |' for seed in options.seeds)} mean |")
    print(f"| --- |{' ---: |' * (len(options.seeds) + 1)}")
    for name, words in ROWS.items():
        values = [one[name] for one in found]
        cells = "".join(f" {value:.3f} |" for value in [*values, statistics.fmean(values)])
        print(f"| {words} |{cells}")


if __name__ == "__main__":
    main()

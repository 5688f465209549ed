"""Make the sentiment experiment for several seeds, through mergeflow's own commands, and print the table of accuracies.

Usage: table.py [FOLDER] [--seeds 0 1 2]    (default: work/ beside this file; minutes a seed, and 86 MB to fetch once)

`prepare.py` fetches and trains, `mergeflow run merge.yaml` collects the statistics and merges, `mergeflow eval` measures on
texts of the three domains, and of a fourth that no model was trained on. Models that are in FOLDER already are not trained again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
from commands import accuracies, command
from prepare import TRAINED, UNSEEN, prepare

RECIPE = Path(__file__).parent / "merge.yaml"
MERGES = {
    "simple": "the mean of the three (`linear`)",
    "fisher": "`fisher`, normalize model_l2",
    "regmean": "`regmean`, alpha 0.9",
    "regmean_pp": "`regmean_pp`, alpha 0.9",
}


def merge(work: Path, out: Path) -> None:
    """`mergeflow run`: the statistics of all fine-tunes, and all merges."""
    command("run", str(RECIPE), "-o", str(out), "--set", f"work={work.resolve()}", "-q", "--force")


def measured(work: Path, out: Path) -> dict[str, list[float]]:
    """For each row of the table the accuracy on the three domains and the unseen one."""
    files = [work / "data" / f"test-{domain}.jsonl" for domain in (*TRAINED, UNSEEN)]
    found = {f"fine-tuned on {name}": accuracies(work / "models" / name, files) for name in TRAINED}
    return found | {words: accuracies(out / name, files) for name, words in MERGES.items()}


def main() -> None:
    """Read the command line, make all, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "work")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    found = []
    for seed in options.seeds:
        work = options.folder / f"seed-{seed}"
        if not (work / "models").exists():
            prepare(work, options.folder / "packages", seed)
        merge(work, work / "merged")
        found.append(measured(work, work / "merged"))
        print(f"Accuracy on texts that no model was trained on; mean over {len(found)} seeds:\n")
        print(f"| model | {' | '.join(TRAINED)} | mean of the three | {UNSEEN} (unseen) |")
        print(f"| --- |{' ---: |' * (len(TRAINED) + 2)}")
        for row in found[0]:
            *trained, unseen = (fmean(column) for column in zip(*(one[row] for one in found), strict=True))
            cells = " | ".join(f"{value:.3f}" for value in [*trained, fmean(trained), unseen])
            print(f"| {row} | {cells} |")


if __name__ == "__main__":
    main()

"""Print how many of the held-out digits each model gets right, domain by domain, as a Markdown table.

Usage: evaluate.py [--split test|validation] MODEL...    (folders of models or of merges)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from digits import DOMAINS, accuracies, load, splits


def main() -> None:
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    options = parser.parse_args()
    torch.set_num_threads(1)
    part = splits()[options.split]
    print(f"Accuracy on {len(part[1])} held-out images ({options.split}) in each domain:\n")
    print(f"| model | {' | '.join(DOMAINS)} | mean |")
    print(f"| --- |{' ---: |' * (len(DOMAINS) + 1)}")
    for folder in options.models:
        found = list(accuracies(load(folder), part).values())
        cells = [f"{value:.3f}" for value in [*found, sum(found) / len(found)]]
        print(f"| {folder.name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

"""Make the fused language models for several seeds, through mergeflow's own commands, and print the table of bits per byte.

Usage: lm_table.py [FOLDER] [--seeds 0 1 2 3 4]    (default: work/ beside this file; about seven minutes a seed on two cores)

For each seed: `prepare_lm.py` makes data and models, `mergeflow run fuse.yaml` trains the base in each way on the same documents in
the same order, and `mergeflow eval` measures each model on files of both domains that no model has seen. A gain is of the mean of
both domains, against plain training of the same seed; t and p are of a paired, two-sided t-test over the seeds.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
import commands
from prepare_lm import DOMAINS, prepare
from scipy.stats import ttest_rel

RECIPE = Path(__file__).parent / "fuse.yaml"
MODELS = {"base": "the start", "code": "the teacher of code", "prose": "the teacher of prose"}
WAYS = {
    "plain": "plain training on the same documents",
    "soft_ce": "`fuse`, 64 likeliest tokens",
    "soft_ce_10": "`fuse`, 10 likeliest tokens",
    "alm": "`fuse`, `kind: alm`",
    "fusellm": "`fuse`, `preset: fusellm_v1`",
    "worse_teacher": "control: the worse teacher of each document",
    "shuffled_teacher": "control: teachers whose words are exchanged",
}


def fuse(recipe: Path, work: Path, out: Path, seed: int, *more: str) -> None:
    """`mergeflow run`: all that a recipe makes."""
    settings = ("--set", f"work={work.resolve()}", "--set", f"seed={seed}")
    commands.command("run", str(recipe), "-o", str(out), *settings, *more)


def measured(work: Path, out: Path, ways: Iterable[str] = WAYS) -> dict[str, list[float]]:
    """Bits per byte of each model in each domain."""
    files = [work / "data" / f"test-{domain}.jsonl" for domain in DOMAINS]
    folders = {**{name: work / "models" / name for name in MODELS}, **{name: out / name for name in ways}}
    return {name: commands.measures("bits_per_byte", folder, files) for name, folder in folders.items()}


def table(found: Sequence[Mapping[str, Sequence[float]]], ways: Mapping[str, str] = WAYS) -> Iterable[str]:
    """The table of the measurements of several seeds, line by line; the way `plain` is what others are held against."""
    plain = [statistics.fmean(one["plain"]) for one in found]
    yield "| model | code | prose | mean | against plain training | better on | t | p |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for name, words in {**MODELS, **ways}.items():
        domains = [statistics.fmean(one[name][at] for one in found) for at in range(len(DOMAINS))]
        means = [statistics.fmean(one[name]) for one in found]
        cells = "".join(f" {value:.4f} |" for value in [*domains, statistics.fmean(means)])
        if name in MODELS or name == "plain":
            yield f"| {words} |{cells} | | | |"
            continue
        gain = statistics.fmean(own / before - 1 for own, before in zip(means, plain, strict=True))
        better = sum(own < before for own, before in zip(means, plain, strict=True))
        t, p = ttest_rel(means, plain) if len(found) > 1 else (math.nan, math.nan)
        yield f"| {words} |{cells} {gain:+.2%} | {better} of {len(found)} | {t:.1f} | {p:.1g} |"


def main(description: str | None = __doc__, recipe: Path = RECIPE, ways: Mapping[str, str] = WAYS) -> None:
    """Read the command line, make what is not there, and print the table."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "work")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    options = parser.parse_args()
    found = []
    for seed in options.seeds:
        work = options.folder / f"seed-{seed}"
        if not (work / "models").exists():
            prepare(work, seed=seed)
        out = work / recipe.parent.name
        fuse(recipe, work, out, seed)
        found.append(measured(work, out, ways))
        print(
            f"Bits per byte of files that no model has seen, {len(found)} seeds:", "", *table(found, ways), "", sep="\n"
        )


if __name__ == "__main__":
    main()

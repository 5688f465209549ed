"""recipes/fuse-classifiers: merges that their experts teach are better than the merges, measured through the public commands."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def scripts() -> Iterator[ModuleType]:
    """The script that makes the table."""
    folders = [str(ROOT / "recipes" / name) for name in ("fuse-classifiers", "digits", "quickstart")]
    threads = torch.get_num_threads()
    sys.path[:0] = folders
    torch.set_num_threads(1)
    yield import_module("fuse_table")
    for folder in folders:
        sys.path.remove(folder)
    torch.set_num_threads(threads)


def measured(
    scripts: ModuleType, work: Path, seed: int, *more: str, names: Sequence[str] | None = None
) -> Mapping[str, float]:
    """The accuracies of one seed, all made anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGEFLOW_CACHE", str(work / "cache"))
        scripts.prepare(work, seed)
        scripts.fuse(work, work / "fused", *more)
    found: Mapping[str, float] = scripts.measured(work, work / "fused", names or scripts.ROWS)
    return found


def test_the_experts_teach_their_mean_in_few_epochs(scripts: ModuleType, tmp_path: Path) -> None:
    found = measured(scripts, tmp_path, 0, "--set", "epochs=5", names=("mean", "mean_avg", "mean_surest"))
    assert found["mean_surest"] > found["mean"] + 0.03
    assert found["mean_surest"] > found["mean_avg"]


@pytest.mark.slow
def test_the_surest_source_is_better_than_the_start_on_each_seed(scripts: ModuleType, tmp_path: Path) -> None:
    found = [measured(scripts, tmp_path / str(seed), seed) for seed in range(3)]
    gains = [one["mean_surest"] - one["mean"] for one in found]
    assert min(gains) > 0 and statistics.fmean(gains) >= 0.03, gains
    assert all(one["mean_surest"] > one["mean_avg"] for one in found)
    assert all(one["regmean_surest"] > one["regmean_avg"] for one in found)

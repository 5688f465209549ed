"""recipes/fuse-classifiers and fuse-lm: models that others teach are better than without, measured through the public commands."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import pytest
from toys import recipe_script


@pytest.fixture(scope="module")
def scripts() -> Iterator[ModuleType]:
    """The script that makes the table of the classifiers."""
    with recipe_script("fuse_table", "fuse-classifiers", "digits") as module:
        yield module


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


@pytest.mark.slow
def test_a_language_model_learns_from_two_teachers_and_not_from_wrong_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One seed of the table in recipes/fuse-lm, whose README has five."""
    monkeypatch.setenv("MERGEFLOW_CACHE", str(tmp_path / "cache"))
    with recipe_script("lm_table", "fuse-lm") as lm_table:
        lm_table.prepare(tmp_path, seed=0)
        lm_table.fuse(lm_table.RECIPE, tmp_path, tmp_path / "out", 0)
        domains = lm_table.measured(tmp_path, tmp_path / "out")
    for own, teacher in enumerate(("code", "prose")):
        assert domains[teacher][own] < domains["base"][own], "there is something to learn"
        assert domains[teacher][1 - own] > domains["base"][1 - own], "and a choice to make"
    bits = {name: statistics.fmean(found) for name, found in domains.items()}
    assert bits["soft_ce"] < 0.992 * bits["plain"]
    assert bits["alm"] < 0.995 * bits["plain"]
    assert max(bits["soft_ce_10"], bits["fusellm"]) < bits["plain"]
    assert bits["plain"] < bits["worse_teacher"] < bits["shuffled_teacher"], "the gain is of what the teachers say"

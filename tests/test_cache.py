"""The cache of artifacts: where it lies, what it lists, and what it deletes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from mergeflow import cache
from mergeflow.errors import MachineError
from mergeflow.writing.claim import Claim
from tests.toys import call

DAY = 86400.0


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGEFLOW_CACHE", str(tmp_path))
    return tmp_path


def artifact(key: str, size: int = 100, days: float = 0.0) -> Path:
    """A folder in the place of an artifact, last used so many days ago."""
    path = cache.artifact_path(key)
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"x" * size)
    os.utime(path, (time.time() - days * DAY,) * 2)
    return path


def test_the_cache_lies_where_the_environment_says(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.root() == root
    assert cache.artifact_path("k") == root / "artifacts" / "k"
    monkeypatch.setenv("MERGEFLOW_CACHE", "~/elsewhere")
    assert cache.root() == Path.home() / "elsewhere"
    monkeypatch.delenv("MERGEFLOW_CACHE")
    assert cache.root() == Path.home() / ".cache" / "mergeflow"


def test_without_a_home_the_environment_must_say_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MERGEFLOW_CACHE", raising=False)

    def nowhere() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(MachineError, match="Set MERGEFLOW_CACHE"):
        cache.root()


def test_a_key_says_all_that_went_in_whatever_its_order() -> None:
    assert cache.artifact_key({"a": 1, "b": [2, None]}) == cache.artifact_key({"b": [2, None], "a": 1})
    keys = {cache.artifact_key({"a": value}) for value in (1, "1", 1.5, None, [1], {"a": 1})}
    assert len(keys) == 6
    assert all(len(key) == cache.KEY and set(key) <= set("0123456789abcdef") for key in keys)
    with pytest.raises(ValueError):
        cache.artifact_key({"a": float("nan")})


def test_entries_are_the_finished_artifacts_the_one_used_last_first(root: Path) -> None:
    assert list(cache.entries()) == []
    artifact("old", 10, days=3)
    artifact("new", 20, days=1)
    (root / "artifacts" / ".half.staging").mkdir()
    (root / "artifacts" / "a file").write_text("")
    assert [(one.key, one.size) for one in cache.entries()] == [("new", 20), ("old", 10)]
    cache.mark_used(cache.artifact_path("old"))
    assert [one.key for one in cache.entries()] == ["old", "new"]
    cache.mark_used(cache.artifact_path("gone"))


def test_list_tells_keys_sizes_and_times(root: Path) -> None:
    empty = call("cache", "list")
    assert (empty.code, empty.out) == (0, f"0 artifacts, 0 B in {root}\n")
    path = artifact("one", 2000)
    told = json.loads(call("cache", "list", "--json").out)
    assert told == {
        "root": str(root),
        "artifacts": [{"key": "one", "path": str(path), "bytes": 2000, "used": path.stat().st_mtime}],
        "unfinished": [],
    }
    text = call("cache", "list").out
    assert "one" in text
    assert "1 artifact, 2.0 kB" in text


def test_clear_deletes_all_or_some_or_what_was_not_used_lately(root: Path) -> None:
    for index in range(4):
        artifact(f"k{index}", 100, days=index)
    (root / "work" / "k1").mkdir(parents=True)
    assert call("cache", "clear", "k1").out == "1 artifact and 1 unfinished deleted, 100 B\n"
    assert not (root / "work" / "k1").exists()
    assert {one.key for one in cache.entries()} == {"k0", "k2", "k3"}
    assert call("cache", "clear", "--older-than", "2.5").out == "1 artifact deleted, 100 B\n"
    assert {one.key for one in cache.entries()} == {"k0", "k2"}
    assert call("cache", "clear", "k0", "--older-than", "1").out == "0 artifacts deleted, 0 B\n"
    assert call("cache", "clear").out == "2 artifacts deleted, 200 B\n"
    assert list(cache.entries()) == []
    assert list((root / "artifacts").iterdir()) == []


def test_a_key_that_is_not_there_is_said(root: Path) -> None:
    artifact("k0")
    called = call("cache", "clear", "k9")
    assert called.code == 2
    assert "k9" in called.err
    assert [one.key for one in cache.entries()] == ["k0"]


def left(key: str, size: int = 50, days: float = 0.0) -> list[Path]:
    """What a killed stage leaves: its scratch folder, and the folder that was to become the artifact."""
    paths = [cache.work_path(key), cache.artifact_path(key).with_name(f".{key}.staging")]
    for path in paths:
        (path / "groups").mkdir(parents=True)
        (path / "groups" / "0.safetensors").write_bytes(b"x" * size)
        os.utime(path / "groups" / "0.safetensors", (time.time() - days * DAY,) * 2)
    return paths


def test_what_a_run_is_making_is_listed_as_such_and_left_alone(root: Path) -> None:
    work, staging = left("k")
    claim = Claim.take(work, cache.artifact_path("k"))
    try:
        assert "is being made" in call("cache", "list").out
        assert [one["running"] for one in json.loads(call("cache", "list", "--json").out)["unfinished"]] == [True]
        assert call("cache", "clear").out == "0 artifacts deleted, 0 B\n"
        assert call("cache", "clear", "k").out == "0 artifacts deleted, 0 B\n"
        assert work.exists()
        assert staging.exists()
    finally:
        claim.release()
    assert call("cache", "clear").out == "0 artifacts and 1 unfinished deleted, 100 B\n"
    assert not work.exists()
    assert not staging.exists()


def test_what_killed_stages_left_is_listed_and_cleared_by_key_and_age(root: Path) -> None:
    artifact("whole", 10)
    old, new = left("old", days=3), left("new")
    told = json.loads(call("cache", "list", "--json").out)
    assert [one["key"] for one in told["artifacts"]] == ["whole"]
    assert [(one["key"], one["bytes"], one["running"]) for one in told["unfinished"]] == [
        ("new", 100, False),
        ("old", 100, False),
    ]
    lines = call("cache", "list").out.splitlines()
    assert [line.endswith("  unfinished") for line in lines] == [False, True, True, False]
    assert lines[-1].startswith("1 artifact and 2 unfinished, 210 B")
    assert call("cache", "clear", "--older-than", "2").out == "0 artifacts and 1 unfinished deleted, 100 B\n"
    assert [path.exists() for path in (*old, *new)] == [False, False, True, True]
    assert call("cache", "clear", "new").out == "0 artifacts and 1 unfinished deleted, 100 B\n"
    assert [one.key for one in cache.entries()] == ["whole"]
    assert list(cache.unfinished()) == []


def test_links_in_the_cache_are_not_followed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "kept").write_text("x")
    (root / "artifacts").mkdir()
    (root / "artifacts" / "link").symlink_to(elsewhere)
    left("k")
    (cache.work_path("k") / "link").symlink_to(elsewhere)
    assert call("cache", "clear").out == "0 artifacts and 1 unfinished deleted, 100 B\n"
    assert (elsewhere / "kept").exists()

"""The data of recipes/sentiment: `pytest --real` fetches it once into `.material/`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.real

ROOT = Path(__file__).parent.parent
MATERIAL = ROOT / ".material"


@pytest.fixture(scope="module")
def prepare() -> Iterator[ModuleType]:
    """The script, under a name of its own: the digits have one of the same name."""
    spec = spec_from_file_location("sentiment_prepare", ROOT / "recipes" / "sentiment" / "prepare.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["sentiment_prepare"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["sentiment_prepare"]


@pytest.fixture(scope="module")
def ratings(prepare: ModuleType) -> dict[str, list[tuple[str, dict[str, str]]]]:
    MATERIAL.mkdir(exist_ok=True)
    (MATERIAL / ".gitignore").write_text("*\n")
    try:
        found: dict[str, list[tuple[str, dict[str, str]]]] = prepare.ratings(MATERIAL / "packages")
    except SystemExit as error:
        pytest.skip(f"REAL DATA IS NOT TESTED HERE: {error}")
    return found


def test_the_ratings_are_those_that_were_published(ratings: dict[str, list[tuple[str, dict[str, str]]]]) -> None:
    counts = {domain: Counter(row["label"] for _, row in rows) for domain, rows in ratings.items()}
    assert counts == {
        "tweets": {"good": 2300, "bad": 1062},
        "films": {"good": 4982, "bad": 5061},
        "products": {"good": 1725, "bad": 1218},
        "opinion": {"good": 1100, "bad": 1688},
    }


def test_no_review_or_article_is_on_both_sides(
    prepare: ModuleType, ratings: dict[str, list[tuple[str, dict[str, str]]]]
) -> None:
    for rows in ratings.values():
        training, test = prepare.split(rows, 0, 1000)
        assert len(training) == 1000 and len(test) == prepare.TEST_ROWS
        sources: dict[str, set[str]] = {}
        for source, row in rows:
            sources.setdefault(row["text"], set()).add(source)
        trained = {source for row in training for source in sources[row["text"]] if len(sources[row["text"]]) == 1}
        tested = {source for row in test for source in sources[row["text"]] if len(sources[row["text"]]) == 1}
        assert trained and tested and not trained & tested
        assert prepare.split(rows, 1, 1000)[1] != test


def test_a_package_that_is_not_what_was_published_is_refused(prepare: ModuleType, tmp_path: Path) -> None:
    requirement, sha256 = prepare.RATINGS
    (tmp_path / sha256).write_bytes(b"another file")
    with pytest.raises(SystemExit, match="is not what was published"):
        prepare.fetch(requirement, sha256, tmp_path)

"""The figures of the fault suite: a table at the end of the run, and the same as JSON where MERGEFLOW_FIGURES names a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trials import Trials

FIGURES = pytest.StashKey[list[dict[str, Any]]]()

Figure = Callable[..., None]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = []


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Figure:
    """`figure(row, count, outcome, **numbers)`: what was tried, how often, and what came of it."""

    def note(row: str, count: int, outcome: str, **numbers: float) -> None:
        request.config.stash[FIGURES].append({"row": row, "count": count, "outcome": outcome, **numbers})

    return note


@pytest.fixture(scope="session")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs in processes of their own, each a fork of one that has imported everything."""
    found = Trials(tmp_path_factory.mktemp("trials"))
    yield found
    found.close()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    figures = config.stash[FIGURES]
    skipped = [
        (report.nodeid.rpartition("::")[2], str(report.longrepr[2]).removeprefix("Skipped: "))
        for report in terminalreporter.stats.get("skipped", ())
        if "tests/faults/" in report.nodeid and "slow:" not in str(report.longrepr[2])
    ]
    if not figures and not skipped:
        return
    terminalreporter.section("faults: what was tried, how often, and what came of it")
    wide = max((len(one["row"]) for one in figures), default=0)
    for one in figures:
        terminalreporter.line(f"{one['row']:<{wide}}  {one['count']:>9,}  {one['outcome']}")
    for name, reason in skipped:
        terminalreporter.line(f"NOT TRIED HERE: {name}: {reason}", red=True)
    if path := os.environ.get("MERGEFLOW_FIGURES"):
        told = {"figures": figures, "not_tried": dict(skipped)}
        Path(path).write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")

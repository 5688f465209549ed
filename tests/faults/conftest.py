"""The table of the fault suite: what was asked, what was run and what came of it, at the end of the run.

The same is written as JSON where MERGEFLOW_FIGURES names a file. What this machine cannot do stands in the table too.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from trials import Trials

Record = Callable[[str, "int | str", "int | str", str], None]


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """`record(row, asked, run, outcome)`: a line of the table; how long it took is counted from the test's beginning."""
    began = time.monotonic()

    def note(row: str, asked: int | str, run: int | str, outcome: str) -> None:
        seconds = round(time.monotonic() - began, 1)
        line = {"row": row, "asked": asked, "run": run, "outcome": outcome, "seconds": seconds}
        request.node.user_properties.append(("figure", line))  # comes with the report from another process, too

    return note


@pytest.fixture(scope="session")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trials]:
    """Runs in processes of their own, each a fork of one that has imported everything."""
    found = Trials(tmp_path_factory.mktemp("trials"))
    yield found
    found.close()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    ended = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())]
    figures = [line for report in ended for name, line in report.user_properties if name == "figure"]
    ours = {
        kind: [report for report in terminalreporter.stats.get(kind, ()) if "tests/faults/" in report.nodeid]
        for kind in ("skipped", "failed", "error")
    }
    reasons = {
        report.nodeid.rpartition("::")[2]: str(report.longrepr[2]).removeprefix("Skipped: ")
        for report in ours["skipped"]
    }
    skipped = {name: reason for name, reason in reasons.items() if not reason.startswith("slow:")}
    failed = [report.nodeid.rpartition("::")[2] for report in (*ours["failed"], *ours["error"])]
    if not figures and not skipped and not failed:
        return
    terminalreporter.section("faults: what was asked, what was run, and what came of it")
    cells = [("what", "asked", "run", "seconds", "outcome")]
    for line in figures:
        counts = (f"{line[key]:,}" if isinstance(line[key], int) else line[key] for key in ("asked", "run"))
        cells.append((line["row"], *counts, f"{line['seconds']:.1f}", line["outcome"]))
    wide = [max(len(row[column]) for row in cells) for column in range(4)]
    for row in cells:
        left, *middle = (f"{text:>{w}}" if at else f"{text:<{w}}" for at, (text, w) in enumerate(zip(row, wide)))  # noqa: B905
        terminalreporter.line("  ".join((left, *middle, row[4])))
    for name, reason in skipped.items():
        terminalreporter.line(f"NOT TRIED HERE: {name}: {reason}", red=True)
    for name in failed:
        terminalreporter.line(f"FAILED: {name}", red=True)
    if path := os.environ.get("MERGEFLOW_FIGURES"):
        told = {"figures": figures, "not_tried": skipped, "failed": failed}
        Path(path).write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")

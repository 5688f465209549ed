"""The journal of a staging folder: which plan it is of, and which rows of it are durable.

The first line names the plan, each other one a row. A line carries a check of its own text: one that was torn by a crash or
changed since is not believed, and costs no more than its row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from mergeflow.errors import RecipeError

JOURNAL = "journal.jsonl"
FRESH_JOURNAL = f"{JOURNAL}.new"

_ENCODE = json.JSONEncoder(separators=(",", ":"), sort_keys=True).encode


@dataclass(frozen=True, slots=True)
class Finished:
    """A row that is done: its tensor digest (mergeflow.digests) and the digests of the inputs it was made from."""

    digest: str
    inputs: Mapping[str, str]


def journal_line(record: Mapping[str, Any]) -> bytes:
    """A line of the journal: the record, and a check of its own text, so that a changed line is not believed."""
    text = _ENCODE({**record, "check": ""})
    return text.replace('"check":""', f'"check":"{blake3(text.encode()).hexdigest(length=8)}"', 1).encode() + b"\n"


def journal_records(content: bytes) -> Iterator[dict[str, Any]]:
    """The records of those lines whose check is right, in order."""
    for line in content.split(b"\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and journal_line(record) == line + b"\n":
            yield record


def read_journal(path: Path, digest: str, parts: Mapping[str, str]) -> dict[int, Finished]:
    """The rows a run of this plan has journalled; RecipeError for another plan's journal, which says what changed."""
    try:
        records = list(journal_records(path.read_bytes()))
    except FileNotFoundError:
        return {}
    if not records or "parts" not in records[0]:
        return {}
    head, *lines = records
    changed = [part for part in parts if head["parts"].get(part) != parts[part]]
    if head["digest"] != digest or changed:
        raise RecipeError(
            f"an unfinished run of another plan is here: {' and '.join(changed) or 'plan'} changed since",
            where=str(path.parent),
            fix="Forget it with --fresh, or give another folder with -o.",
        )
    return {line["row"]: Finished(line["digest"], line["inputs"]) for line in lines if "row" in line}

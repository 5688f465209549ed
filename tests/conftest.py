"""Which tests run: `slow`, `real` and `gpu` ones are skipped, each with its reason in the summary, unless asked for.

`--slow`, `--real` and `--gpu` ask for them, and so does a `-m` expression that names the marker.
"""

from __future__ import annotations

import re

import pytest

REASONS = {
    "slow": "takes more than a few seconds",
    "real": "needs published models or data fetched beforehand",
    "gpu": "needs a CUDA device",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    for marker, reason in REASONS.items():
        parser.addoption(f"--{marker}", action="store_true", help=f"run the tests marked '{marker}': {reason}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    named = set(re.findall(r"\w+", config.getoption("-m") or ""))
    for marker, reason in REASONS.items():
        if config.getoption(f"--{marker}") or marker in named:
            continue
        skip = pytest.mark.skip(reason=f"{marker}: {reason}; run with --{marker}")
        for item in items:
            if marker in item.keywords:
                item.add_marker(skip)

"""Seconds that mean the same on a machine that is slow just now as on a quiet one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import yaml

_TEXT = "[" + "1," * 49_990 + "]"
_USUAL = 0.05
"""What a quiet machine takes for libyaml's events of `_TEXT`: work and small objects, as in what is timed."""


def seconds(call: Callable[[], object], enough: float = 0.0) -> float:
    """The processor's seconds that a call takes at best of five times, as they would be on a quiet machine.

    Each time is held against those of a fixed piece of work beside it, which is not ours. A call that was quick for `enough`
    seconds is not made again.
    """
    best = math.inf
    before: float | None = None
    for _ in range(5):
        took = _took(call)
        if took < enough:
            return took
        before = before or _took(_events)
        after = _took(_events)
        best = min(best, took / max(1.0, (before + after) / 2 / _USUAL))
        if best < enough:
            break
        before = after
    return best


def _took(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def _events() -> None:
    for _ in yaml.parse(_TEXT, Loader=yaml.CSafeLoader):
        pass

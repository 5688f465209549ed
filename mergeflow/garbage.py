"""Python's garbage collection, kept away from work that makes many objects which all live on."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """No look for cycles: there are none in a million new objects, and each round would take in all that is loaded again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()

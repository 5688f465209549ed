"""Every op of the list in the conformance suite, and what the suite itself is good for."""

from __future__ import annotations

from typing import Any

from mergeflow.ops import OPS, Op
from mergeflow.testing import OpConformance

DECLARED: dict[str, dict[str, Any]] = {
    "linear": {"averages": True},
    "slerp": {"averages": True},
    "ties": {"averages": True},
}
"""What the classes of ops do not say of themselves, by op (see `OpConformance`)."""


def suite_of(op: type[Op]) -> type[OpConformance]:
    """The suite of an op, as a test file of its own would write it."""
    return type(f"Test{op.__name__}", (OpConformance,), {"op": op, "__module__": __name__, **DECLARED.get(op.name, {})})


globals().update({suite.__name__: suite for suite in map(suite_of, OPS)})

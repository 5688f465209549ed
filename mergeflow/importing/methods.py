"""mergekit 0.1.5's merge methods, as a table: our op for each, and what its parameters are called here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

REQUIRED: Any = object()
"""The default of a parameter that mergekit asks for."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a mergekit method: our word for it, its kind, whose it is, and mergekit's default in our terms.

    `ours` is empty where the parameter changes no number. A `model`'s is looked for at each source, a `shared` one is not.
    """

    ours: str
    kind: Literal["number", "share", "flag", "opposite", "rescale", "count"]
    of: Literal["model", "shared"]
    default: Any = REQUIRED


@dataclass(frozen=True, slots=True)
class Method:
    """A mergekit method: our op, what it does with a base, how many inputs it takes (the base counted), its parameters.

    `base`: `needed`, `optional`, or `input` (an input like the others). With `ends` the base is the first input of our op.
    """

    op: str
    base: Literal["needed", "optional", "input"]
    parameters: Mapping[str, Parameter]
    fewest: int = 1
    most: int | None = None
    ends: bool = False
    draws: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """What our op is told so that it does as mergekit does."""


_WEIGHT = Parameter("weight", "number", "model")
_NO_EFFECT = Parameter("", "flag", "shared", False)


def _arithmetic(op: str, normalize: bool, rescale: bool, **own: Parameter) -> Method:
    """A method of the task arithmetic family."""
    sparse = op != "task_arithmetic"
    return Method(
        op,
        "needed",
        {
            "weight": _WEIGHT,
            "density": Parameter("density" if sparse else "", "share", "model", 1.0),
            **own,
            "normalize": Parameter("normalize", "flag", "shared", normalize),
            "rescale": Parameter("rescale" if sparse else "", "rescale", "shared", "l1" if rescale else "none"),
            "lambda": Parameter("scale", "number", "shared", 1.0),
            "int8_mask": _NO_EFFECT,
        },
        draws=op.startswith(("dare", "della")),
        fixed={"rank_axis": 1} if op.startswith("della") else {},
    )


_GAMMA = Parameter("gamma", "number", "model", 0.01)
_EPSILON = Parameter("epsilon", "number", "model", 0.15)
_CHANGED = Parameter("epsilon", "number", "shared", 1e-5)

METHODS: Mapping[str, Method] = {
    "linear": Method(
        "linear",
        "input",
        {
            "weight": Parameter("weight", "number", "model"),
            "normalize": Parameter("normalize", "flag", "shared", True),
        },
    ),
    "slerp": Method("slerp", "needed", {"t": Parameter("t", "number", "shared")}, 2, 2, ends=True),
    "nuslerp": Method(
        "nuslerp",
        "optional",
        {
            "weight": _WEIGHT,
            # mergekit calls the vectors along the last axis columns, and we call them rows.
            "nuslerp_row_wise": Parameter("row_wise", "opposite", "shared", True),
            "nuslerp_flatten": Parameter("flatten", "flag", "shared", True),
        },
        2,
        3,
    ),
    "multislerp": Method(
        "multislerp",
        "optional",
        {
            "weight": _WEIGHT,
            "normalize_weights": Parameter("normalize_weights", "flag", "shared", True),
            "eps": Parameter("eps", "number", "shared", 1e-8),
        },
    ),
    "karcher": Method(
        "karcher",
        "input",
        {
            "max_iter": Parameter("max_iter", "count", "shared", 10),
            "tol": Parameter("tol", "number", "shared", 1e-5),
        },
    ),
    "model_stock": Method(
        "model_stock", "needed", {"filter_wise": Parameter("filter_wise", "flag", "shared", False)}, 3
    ),
    "nearswap": Method("nearswap", "needed", {"t": Parameter("t", "number", "shared")}, 2, 2),
    "arcee_fusion": Method("arcee_fusion", "needed", {}, 2, 2),
    "sce": Method(
        "sce",
        "needed",
        {"select_topk": Parameter("select_topk", "share", "shared", 1.0), "int8_mask": _NO_EFFECT},
    ),
    "ram": Method("ram", "needed", {"epsilon": _CHANGED}),
    "ramplus_tl": Method(
        "ramplus",
        "needed",
        {
            "r": Parameter("r", "number", "shared", 0.1),
            "alpha": Parameter("alpha", "number", "shared", 0.2),
            "epsilon": _CHANGED,
        },
    ),
    "passthrough": Method("passthrough", "input", {"scale": Parameter("scale", "number", "model", 1.0)}, 1, 1),
    "task_arithmetic": _arithmetic("task_arithmetic", False, False),
    "ties": _arithmetic("ties", True, False),
    "dare_ties": _arithmetic("dare_ties", False, True),
    "dare_linear": _arithmetic("dare_linear", False, True),
    "breadcrumbs": _arithmetic("breadcrumbs", False, False, gamma=_GAMMA),
    "breadcrumbs_ties": _arithmetic("breadcrumbs_ties", False, False, gamma=_GAMMA),
    "della": _arithmetic("della", True, True, epsilon=_EPSILON),
    "della_linear": _arithmetic("della_linear", False, True, epsilon=_EPSILON),
}
"""Every method of mergekit 0.1.5."""

PARAMETERS = frozenset(name for method in METHODS.values() for name in method.parameters)

TRUTHS = {"flag": (False, True), "opposite": (True, False), "rescale": ("none", "l1")}
"""What false and true are in our terms."""

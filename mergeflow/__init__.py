"""mergeflow: declarative, lazy merging of model checkpoints.

    from mergeflow import load_recipe, plan, run, Recipe
    run(load_recipe("recipe.yaml"), "out")

    from mergeflow.ops import Ties
    Ties(density=0.2)(base, [a, b])

The names below are the public face; each is loaded when it is first used, so that importing mergeflow, and checking a
recipe, needs no torch. No module has the name of a public function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mergeflow.errors import (
        ClaimedError,
        InputError,
        Interrupted,
        MachineError,
        MergeflowError,
        NumericError,
        Problems,
        RecipeError,
    )
    from mergeflow.graph import Plan
    from mergeflow.pipeline import Result, plan, run
    from mergeflow.recipe import Recipe, load_recipe
    from mergeflow.verifying import verify

_HOMES = {
    "errors": (
        "ClaimedError",
        "InputError",
        "Interrupted",
        "MachineError",
        "MergeflowError",
        "NumericError",
        "Problems",
        "RecipeError",
    ),
    "graph": ("Plan",),
    "pipeline": ("Result", "plan", "run"),
    "recipe": ("Recipe", "load_recipe"),
    "verifying": ("verify",),
}

__all__ = [
    "ClaimedError",
    "InputError",
    "Interrupted",
    "MachineError",
    "MergeflowError",
    "NumericError",
    "Plan",
    "Problems",
    "Recipe",
    "RecipeError",
    "Result",
    "__version__",
    "load_recipe",
    "plan",
    "run",
    "verify",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"mergeflow.{home}"), name)
    raise AttributeError(f"module 'mergeflow' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__

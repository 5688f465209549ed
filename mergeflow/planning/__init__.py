"""A recipe and the headers of its models become a plan: the only place that knows both.

Each model (`models.py`) and each node (`nodes.py`) is a table from tensor names to expressions; a node's table asks the tables
below it, tensor by tensor, only for what an output asks of it, and keeps each expression that it made, so that what two rows
share is one object. Everything that headers can show is found here, before a weight is read, and reported together: problems
of one kind at one input are one line with a count, not a line for each tensor (`findings.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

from mergeflow.checkpoint import Checkpoint
from mergeflow.graph import Plan
from mergeflow.planning.expressions import applications, loads
from mergeflow.planning.models import EMBEDDINGS, HEADS, QUANTISED, SPACE_KEY
from mergeflow.planning.planner import NO_MODEL, Planner, default_like, keeps_quantisation, plan_digest, references
from mergeflow.recipe import Output, Recipe

__all__ = [
    "EMBEDDINGS",
    "HEADS",
    "NO_MODEL",
    "QUANTISED",
    "SPACE_KEY",
    "applications",
    "keeps_quantisation",
    "like_and_tokenizer",
    "loads",
    "make_plan",
    "needed_models",
    "plan_digest",
    "references",
]


def make_plan(recipe: Recipe, models: Mapping[str, Checkpoint]) -> Plan:
    """The plan of a recipe. `models` holds the opened checkpoint of each of `needed_models(recipe)`.

    Raises every problem that headers can show, together.
    """
    return Planner(recipe, models).plan()


def needed_models(recipe: Recipe) -> list[str]:
    """The models and artifacts that the outputs ask for, in the recipe's order: inputs of nodes, `like` and `tokenizer`."""
    outputs = recipe.outputs.values()
    wanted = references(recipe, [name for one in outputs for name in (one.node, one.like, one.tokenizer) if name])
    return [name for name in (*recipe.models, *recipe.artifacts) if name in wanted]


def like_and_tokenizer(recipe: Recipe, output: Output) -> tuple[str, str]:
    """The models whose config and whose tokenizer an output takes."""
    like = output.like or default_like(recipe, output.node)
    return like, output.tokenizer or like

"""The list of ops: the only place that names them all, and the only one that looks for ops of other packages.

A package outside adds its ops by entry points of the group `mergeflow.ops`, whose names are the words in recipes. They
are loaded only when a recipe uses a name that is not ours, or when all ops are listed, so that a recipe of our own ops
runs nobody else's code. Importing this module loads no torch.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from mergeflow.errors import RecipeError, did_you_mean
from mergeflow.ops.add import Add
from mergeflow.ops.base import LEAF, Block, DeltaOp, Op, Reduction, measure
from mergeflow.ops.breadcrumbs import Breadcrumbs, BreadcrumbsTies
from mergeflow.ops.cast import Cast
from mergeflow.ops.dare import DareLinear, DareTies
from mergeflow.ops.della import Della, DellaLinear
from mergeflow.ops.emr import Emr, EmrApply
from mergeflow.ops.evolve_cross import EvolveCross
from mergeflow.ops.linear import Linear
from mergeflow.ops.passthrough import Passthrough
from mergeflow.ops.scale import Scale
from mergeflow.ops.select import Select
from mergeflow.ops.slerp import Slerp
from mergeflow.ops.task_arithmetic import TaskArithmetic
from mergeflow.ops.task_vector import TaskVector
from mergeflow.ops.ties import Ties
from mergeflow.ops.unchanged import Unchanged

__all__ = [
    "LEAF",
    "OPS",
    "Add",
    "Block",
    "Breadcrumbs",
    "BreadcrumbsTies",
    "Cast",
    "DareLinear",
    "DareTies",
    "Della",
    "DellaLinear",
    "DeltaOp",
    "Emr",
    "EmrApply",
    "EvolveCross",
    "Linear",
    "Op",
    "Passthrough",
    "Reduction",
    "Scale",
    "Select",
    "Slerp",
    "TaskArithmetic",
    "TaskVector",
    "Ties",
    "Unchanged",
    "all_ops",
    "measure",
    "op_named",
]

OPS: tuple[type[Op], ...] = (
    Linear,
    Slerp,
    TaskArithmetic,
    Ties,
    DareLinear,
    DareTies,
    Breadcrumbs,
    BreadcrumbsTies,
    DellaLinear,
    Della,
    EvolveCross,
    Emr,
    EmrApply,
    TaskVector,
    Add,
    Scale,
    Cast,
    Passthrough,
    Select,
)
"""Our ops, in the order of the table."""

_OURS = {op.name: op for op in OPS}
_GROUP = "mergeflow.ops"


def op_named(name: str) -> type[Op]:
    """The class of the op with this name. Raises RecipeError with the nearest name where there is none."""
    if name in _OURS:
        return _OURS[name]
    outside = _outside()
    if name in outside:
        return _loaded(outside[name])
    raise RecipeError(f"unknown op '{name}'", fix=did_you_mean(name, [*_OURS, *outside]) or "See `mergeflow ops`.")


def all_ops() -> dict[str, type[Op]]:
    """Every op by its name: ours, then those of other packages. Raises RecipeError where one cannot be loaded."""
    return {**_OURS, **{name: _loaded(entry) for name, entry in sorted(_outside().items())}}


def _outside() -> dict[str, EntryPoint]:
    """The entry points of other packages; a name of ours stays ours."""
    return {entry.name: entry for entry in entry_points(group=_GROUP) if entry.name not in _OURS}


def _loaded(entry: EntryPoint) -> type[Op]:
    """The op class of an entry point."""
    package = entry.dist.name if entry.dist else entry.value
    try:
        found = entry.load()
    except (ImportError, AttributeError) as error:
        raise RecipeError(
            f"the op '{entry.name}' of the package {package} cannot be loaded: {error}", fix="Mend or uninstall it."
        ) from error
    if not (isinstance(found, type) and issubclass(found, Op) and found.name == entry.name):
        raise RecipeError(f"'{entry.value}' of the package {package} is not an op called '{entry.name}'")
    return found

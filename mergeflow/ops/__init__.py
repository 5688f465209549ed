"""The list of ops: the only place that names them all, and the only one that looks for ops of other packages.

A package outside adds its ops by entry points of the group `mergeflow.ops`, whose names are the words in recipes. They
are loaded only when a recipe uses a name that is not ours, or when all ops are listed, so that a recipe of our own ops
runs nobody else's code. Importing this module loads no torch.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from mergeflow.errors import RecipeError, did_you_mean
from mergeflow.ops.add import Add
from mergeflow.ops.aim import Aim
from mergeflow.ops.arcee_fusion import ArceeFusion
from mergeflow.ops.base import LEAF, Block, DeltaOp, Op, Reduction, measure
from mergeflow.ops.breadcrumbs import Breadcrumbs, BreadcrumbsTies
from mergeflow.ops.cart import Cart
from mergeflow.ops.cast import Cast
from mergeflow.ops.consensus import Consensus
from mergeflow.ops.dare import DareLinear, DareTies
from mergeflow.ops.della import Della, DellaLinear
from mergeflow.ops.emr import Emr, EmrApply
from mergeflow.ops.evolve_cross import EvolveCross
from mergeflow.ops.fisher import Fisher
from mergeflow.ops.fuse import Fuse
from mergeflow.ops.iso_c import IsoC
from mergeflow.ops.iso_cts import IsoCts
from mergeflow.ops.karcher import Karcher
from mergeflow.ops.knots import Knots
from mergeflow.ops.linear import Linear
from mergeflow.ops.lot import Lot
from mergeflow.ops.magmax import Magmax
from mergeflow.ops.model_stock import ModelStock
from mergeflow.ops.multislerp import MultiSlerp
from mergeflow.ops.nearswap import NearSwap
from mergeflow.ops.nuslerp import NuSlerp
from mergeflow.ops.passthrough import Passthrough
from mergeflow.ops.pcb import Pcb
from mergeflow.ops.ram import Ram, RamPlus
from mergeflow.ops.regmean import RegMean
from mergeflow.ops.regmean_pp import RegMeanPP
from mergeflow.ops.scale import Scale
from mergeflow.ops.sce import Sce
from mergeflow.ops.select import Select
from mergeflow.ops.slerp import Slerp
from mergeflow.ops.stack import Stack
from mergeflow.ops.star import Star
from mergeflow.ops.statistics import ActAbsmean, FisherDiag, Gram, GramDiag, InputMean, StageOp
from mergeflow.ops.task_arithmetic import TaskArithmetic
from mergeflow.ops.task_vector import TaskVector
from mergeflow.ops.ties import Ties
from mergeflow.ops.tsv import Tsv
from mergeflow.ops.unchanged import Unchanged
from mergeflow.ops.widen import Widen
from mergeflow.ops.wudi import Wudi

__all__ = [
    "LEAF",
    "OPS",
    "ActAbsmean",
    "Add",
    "Aim",
    "ArceeFusion",
    "Block",
    "Breadcrumbs",
    "BreadcrumbsTies",
    "Cart",
    "Cast",
    "Consensus",
    "DareLinear",
    "DareTies",
    "Della",
    "DellaLinear",
    "DeltaOp",
    "Emr",
    "EmrApply",
    "EvolveCross",
    "Fisher",
    "FisherDiag",
    "Fuse",
    "Gram",
    "GramDiag",
    "InputMean",
    "IsoC",
    "IsoCts",
    "Karcher",
    "Knots",
    "Linear",
    "Lot",
    "Magmax",
    "ModelStock",
    "MultiSlerp",
    "NearSwap",
    "NuSlerp",
    "Op",
    "Passthrough",
    "Pcb",
    "Ram",
    "RamPlus",
    "Reduction",
    "RegMean",
    "RegMeanPP",
    "Scale",
    "Sce",
    "Select",
    "Slerp",
    "Stack",
    "StageOp",
    "Star",
    "TaskArithmetic",
    "TaskVector",
    "Ties",
    "Tsv",
    "Unchanged",
    "Widen",
    "Wudi",
    "all_ops",
    "measure",
    "op_named",
]

OPS: tuple[type[Op], ...] = (
    Linear,
    Slerp,
    NuSlerp,
    MultiSlerp,
    Karcher,
    TaskArithmetic,
    Ties,
    Sce,
    Ram,
    RamPlus,
    ModelStock,
    NearSwap,
    ArceeFusion,
    DareLinear,
    DareTies,
    Breadcrumbs,
    BreadcrumbsTies,
    DellaLinear,
    Della,
    EvolveCross,
    Emr,
    EmrApply,
    Magmax,
    Consensus,
    Pcb,
    Widen,
    Tsv,
    IsoC,
    IsoCts,
    Knots,
    Star,
    Cart,
    Wudi,
    RegMean,
    RegMeanPP,
    Lot,
    Fisher,
    Aim,
    TaskVector,
    Add,
    Scale,
    Cast,
    Passthrough,
    Select,
    Stack,
    Gram,
    GramDiag,
    InputMean,
    ActAbsmean,
    FisherDiag,
    Fuse,
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

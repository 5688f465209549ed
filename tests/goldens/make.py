"""Makes the golden files: what other packages give for the models of `inputs.py`, to hold our ops against.

Run in an environment of its own, where mergeflow need not be:

    pip install torch==2.13.0
    pip install --no-deps mergekit==0.1.5 fusion-bench==0.2.33 sd-mecha==1.1.8 peft==0.21.2
    pip install -r requirements.txt
    python make.py [FILE ...]

Each package gets one safetensors file beside this script. Its tensors are called CASE/TENSOR; its metadata `cases` gives, as
JSON, for each case our op and parameters, the models, what was called there and with which parameters, and where the two
readings part. The packages' own code computes every number; this script only calls it, and adds a merged delta to the base
where the package stops at the delta.

One file more, `mergekit-yaml`, has what mergekit's command makes of the configurations in `../mergekit_configs` that draw
nothing, on four Llamas of `inputs.py`.

How parameters are aligned:

TIES. We keep k = max(1, floor(density n)) of a tensor's n entries. mergekit does the same; so does peft, but for
its floor at 0. fusion-bench keeps int(K d) + 1 of the model's d entries, so K = (k - 1/2) / d. sd-mecha keeps n + 1 -
max(1, int((1 - k') n)), so k' = (k - 3/2) / n. mergekit weighs before the vote and divides by the agreeing weights;
peft weighs after it, fusion-bench and sd-mecha not at all, and all three divide by the number of agreeing deltas: the same for
equal weights. mergekit, peft: a sum of 0 elects +; fusion-bench elects the sign of the model's majority, sd-mecha nothing.
No sum here is 0, and no two entries tie at a threshold.

nuslerp. `nuslerp_row_wise: true` is our `row_wise: false` and the other way round: their flag is named after columns.

Random ops. mergekit draws by torch.bernoulli(p) from one global stream. `drawn` cases hand it u < p instead, u being
the numbers of Philox4x32-10 under the case's keys, one for each input, as written here from the paper: the op is called with
the same keys. `replayed` cases let mergekit draw (tensors sorted by name, inputs in order, after torch.manual_seed), and store
the masks that came of it.

EMR. One scaler for each task, from the sums over tensors of the mean magnitudes: `rescale: per_tensor_mean`.

SVD ops. fusion-bench averages what is no matrix and scales that too, so only matrices are compared.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from inputs import SHAPES, digest, llama, models, write_llamas
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).parent
ALL = tuple(SHAPES)
MATRICES = tuple(name for name, shape in SHAPES.items() if len(shape) == 2)

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One merge: how we are called, and what a package gave."""

    name: str
    op: str
    parameters: Mapping[str, Any]
    there: str
    """The package's function and parameters."""
    merge: Callable[[Tensors, list[Tensors]], Tensors]
    """The merged tensors, of a base and the inputs."""
    kind: str = "dense"
    inputs: int = 2
    base: bool = True
    """Whether the base takes part as such; the op's first input is the base where it knows none."""
    dtype: str = "float32"
    scope: str = "tensor"
    """`tensor`: each tensor alone tells its result; `model`: the model as a whole does."""
    keys: tuple[int, ...] = ()
    """The keys of the draws, one for each input."""
    note: str = ""
    """Where this reading parts from ours, or is wrong."""

    def made(self, package: str) -> tuple[Tensors, dict[str, Any]]:
        """The tensors under their names in the file, and what the metadata says."""
        base, tunes = models(self.kind, self.inputs)
        dtype = getattr(torch, self.dtype)
        given = [{name: torch.from_numpy(one).to(dtype) for name, one in model.items()} for model in (base, *tunes)]
        merged = self.merge(given[0], given[1:])
        assert merged, self.name
        for name, tensor in merged.items():
            assert tensor.dtype == torch.uint8 or (tensor.dtype == dtype and torch.isfinite(tensor).all()), name
        about = {
            "op": self.op,
            "parameters": dict(self.parameters),
            "kind": self.kind,
            "inputs": self.inputs,
            "base": self.base,
            "dtype": self.dtype,
            "scope": self.scope,
            "keys": list(self.keys),
            "digest": digest(base, tunes),
            "package": package,
            "version": importlib.metadata.version(package),
            "there": self.there,
            "note": self.note,
        }
        return {f"{self.name}/{name}": tensor.detach().clone().contiguous() for name, tensor in merged.items()}, about


# mergekit


def mergekit_cases() -> list[Case]:
    """Its registered methods, by its own programming interface, which binds parameters as its command does."""
    from mergekit.merge_methods.api import merge_state_dicts
    from mergekit.merge_methods.registry import registered_methods

    def case(
        name: str,
        op: str,
        method: str,
        parameters: Mapping[str, Any],
        theirs: Mapping[str, Any] | None = None,
        *,
        without: Sequence[str] = (),
        **more: Any,
    ) -> Case:
        """`theirs` are mergekit's parameters where they are called otherwise; `without` are tensors that are left out."""
        called = dict(parameters if theirs is None else theirs)
        base_given = more.get("base", True)

        def merge(base: Tensors, inputs: list[Tensors]) -> Tensors:
            names = [name for name in ALL if name not in without]
            listed = [{name: model[name] for name in names} for model in ([base] if base_given else []) + inputs]
            with torch.inference_mode(), drawing(more.get("keys", ())):
                return merge_state_dicts(listed, method, parameters=called, base=0 if base_given else None)

        said = ", ".join(f"{key}={value!r}" for key, value in called.items())
        return Case(name, op, parameters, f"merge_method: {method}, {said}", merge, **more)

    two, three = [0.7, 0.4], [0.5, -0.2, 0.8]
    densities = [0.3, 0.6, 0.25]
    keys = (0x0123_4567_89AB_CDEF, 0xFEDC_BA98_7654_3210, 42)
    found = [
        case("linear", "linear", "linear", {"weight": three}, inputs=3, base=False),
        case("linear_sum", "linear", "linear", {"weight": two, "normalize": False}, base=False),
        case("slerp", "slerp", "slerp", {"t": 0.3}, inputs=1),
        case("slerp_beyond", "slerp", "slerp", {"t": 1.0}, inputs=1),
        case("passthrough", "passthrough", "passthrough", {"scale": 0.4}, {"scale": [0.4]}, inputs=1, base=False),
        case("task_arithmetic", "task_arithmetic", "task_arithmetic", {"weight": three}, inputs=3),
        case(
            "task_arithmetic_mean",
            "task_arithmetic",
            "task_arithmetic",
            {"weight": three, "normalize": True, "scale": 0.6},
            {"weight": three, "normalize": True, "lambda": 0.6},
            inputs=3,
        ),
        case("ties", "ties", "ties", {"weight": [0.5, 0.3, 0.8], "density": densities}, inputs=3),
        case("ties_sparse", "ties", "ties", {"weight": two, "density": 0.45}, kind="sparse"),
        case(
            "ties_negative",
            "ties",
            "ties",
            {"weight": three, "density": 0.5, "normalize": False, "scale": 0.7},
            {"weight": three, "density": 0.5, "normalize": False, "lambda": 0.7},
            inputs=3,
        ),
        case(
            "ties_rescaled",
            "ties",
            "ties",
            {"weight": two, "density": 0.4, "rescale": "l1"},
            {"weight": two, "density": 0.4, "rescale": True},
        ),
        case(
            "breadcrumbs",
            "breadcrumbs",
            "breadcrumbs",
            {"weight": three, "density": densities, "gamma": [0.1, 0.05, 0.2]},
            inputs=3,
        ),
        case("breadcrumbs_full", "breadcrumbs", "breadcrumbs", {"weight": two, "density": 0.95, "gamma": 0.1}),
        case(
            "breadcrumbs_rescaled",
            "breadcrumbs",
            "breadcrumbs",
            {"weight": two, "density": 0.5, "gamma": 0.03, "rescale": "l1", "normalize": True},
            {"weight": two, "density": 0.5, "gamma": 0.03, "rescale": True, "normalize": True},
        ),
        case(
            "breadcrumbs_ties",
            "breadcrumbs_ties",
            "breadcrumbs_ties",
            {"weight": [0.5, 0.3, 0.8], "density": densities, "gamma": 0.1},
            inputs=3,
        ),
        case("nuslerp_flat", "nuslerp", "nuslerp", {"weight": two}, base=False),
        case("nuslerp_flat_base", "nuslerp", "nuslerp", {"weight": two}),
        case("nuslerp_opposed", "nuslerp", "nuslerp", {"weight": [0.6, -0.6]}),
    ]
    swapped = "nuslerp_row_wise takes vectors along the first axis, and without it along the last, which are the rows of a matrix"
    for based in (False, True):
        for theirs_rows in (False, True):
            found.append(
                case(
                    f"nuslerp_{'columns' if theirs_rows else 'rows'}{'_base' if based else ''}",
                    "nuslerp",
                    "nuslerp",
                    {"weight": two, "flatten": False, "row_wise": not theirs_rows},
                    {"weight": two, "nuslerp_flatten": False, "nuslerp_row_wise": theirs_rows},
                    base=based,
                    without=("experts.weight",) if theirs_rows else (),
                    note=swapped
                    + ("; the last axis but one, ours, is the first of matrices only" if theirs_rows else ""),
                )
            )
    found += [
        case("multislerp", "multislerp", "multislerp", {"weight": [0.5, 0.3, 0.8]}, inputs=3, base=False),
        case("multislerp_base", "multislerp", "multislerp", {"weight": [0.5, 0.3, 0.8]}, inputs=3),
        case(
            "multislerp_as_given",
            "multislerp",
            "multislerp",
            {"weight": [0.5, 0.3, 0.8], "normalize_weights": False},
            inputs=3,
        ),
        case("karcher", "karcher", "karcher", {}, inputs=3, base=False),
        case("karcher_short", "karcher", "karcher", {"max_iter": 2, "tol": 1e-9}, inputs=4, base=False),
        case("model_stock", "model_stock", "model_stock", {}, inputs=3),
        case("model_stock_rows", "model_stock", "model_stock", {"filter_wise": True}, inputs=3),
        case("model_stock_pair", "model_stock", "model_stock", {}, kind="sparse"),
        case("nearswap", "nearswap", "nearswap", {"t": 0.0005}, kind="near", inputs=1),
        case("sce", "sce", "sce", {}, inputs=3),
        case("sce_selected", "sce", "sce", {"select_topk": 0.4}, inputs=3),
        case("sce_sparse", "sce", "sce", {"select_topk": 0.7}, kind="sparse", inputs=4),
        case("arcee_fusion", "arcee_fusion", "arcee_fusion", {}, inputs=1, dtype="float64"),
        case("ram", "ram", "ram", {}, kind="sparse", inputs=3),
        case("ram_epsilon", "ram", "ram", {"epsilon": 0.004}, kind="near", inputs=3),
        case("ramplus", "ramplus", "ramplus_tl", {}, kind="sparse", inputs=3),
        case(
            "ramplus_capped",
            "ramplus",
            "ramplus_tl",
            {"r": 0.5, "alpha": 2.0, "epsilon": 0.004},
            kind="near",
            inputs=4,
        ),
    ]
    ranked = "3-D tensors are left out: mergekit ranks within axis 1, we within the last"
    for op, parameters in {
        "dare_linear": {"weight": three, "density": densities},
        "dare_ties": {"weight": three, "density": densities},
        "della": {"weight": [0.5, 0.3, 0.8], "density": [0.3, 0.6, 0.5], "epsilon": [0.1, 0.2, 0.3]},
        "della_linear": {"weight": three, "density": [0.3, 0.6, 0.5], "epsilon": [0.1, 0.2, 0.3]},
    }.items():
        della = op.startswith("della")
        more: dict[str, Any] = {"inputs": 3, "keys": keys}
        if della:
            more |= {"without": ("experts.weight",), "note": ranked}
        found.append(case(f"{op}_drawn", op, op, parameters, **more))
        theirs = parameters | {"rescale": False, "normalize": not della, "lambda": 0.8}
        ours = parameters | {"rescale": "none", "normalize": not della, "scale": 0.8}
        found.append(case(f"{op}_drawn_plain", op, op, ours, theirs, **more))
        found.append(replayed(case(f"{op}_replayed", op, op, parameters, **(more | {"keys": ()}))))
    missing = {method.spec.name for method in registered_methods()} - {
        str(one.there.split(",")[0][14:]) for one in found
    }
    assert not missing, f"no golden of {missing}"
    return found


@contextlib.contextmanager
def drawing(keys: Sequence[int]) -> Iterator[None]:
    """torch.bernoulli(p) as u < p with u of `keys`, in turn; as it is, without keys."""
    if not keys:
        yield
        return
    turn = 0

    def drawn(p: Tensor) -> Tensor:
        nonlocal turn
        u = torch.tensor(philox(keys[turn % len(keys)], p.numel()), dtype=torch.float64).reshape(p.shape)
        turn += 1
        return (u < p.double()).to(p.dtype)

    with mock.patch.object(torch, "bernoulli", drawn):
        yield


def replayed(case: Case, seed: int = 7) -> Case:
    """The case with mergekit's own draws after torch.manual_seed, and their masks beside its result: mask.TENSOR, a row an input."""

    def merge(base: Tensors, inputs: list[Tensors]) -> Tensors:
        bernoulli = torch.bernoulli
        masks: list[Tensor] = []

        def noted(p: Tensor) -> Tensor:
            masks.append(bernoulli(p))
            return masks[-1]

        torch.manual_seed(seed)
        with mock.patch.object(torch, "bernoulli", noted):
            merged = case.merge(base, inputs)
        assert len(masks) == len(merged) * len(inputs) and list(merged) == sorted(merged)
        for place, name in enumerate(list(merged)):
            own = masks[place * len(inputs) : (place + 1) * len(inputs)]
            merged[f"mask.{name}"] = torch.stack([mask.reshape(base[name].shape) for mask in own]).to(torch.uint8)
        return merged

    return Case(
        **{
            **{name: getattr(case, name) for name in case.__dataclass_fields__},
            "merge": merge,
            "there": f"{case.there}, after torch.manual_seed({seed})",
        }
    )


def philox(key: int, size: int) -> list[float]:
    """The first numbers of Philox4x32-10 (Salmon et al. 2011), as multiples of 2^-24."""
    found: list[float] = []
    for counter in range(-(-size // 4)):
        c, k = [counter & 0xFFFF_FFFF, counter >> 32, 0, 0], [key & 0xFFFF_FFFF, key >> 32]
        for _ in range(10):
            left, right = c[0] * 0xD251_1F53, c[2] * 0xCD9E_8D57
            c = [right >> 32 ^ c[1] ^ k[0], right & 0xFFFF_FFFF, left >> 32 ^ c[3] ^ k[1], left & 0xFFFF_FFFF]
            k = [k[0] + 0x9E37_79B9 & 0xFFFF_FFFF, k[1] + 0xBB67_AE85 & 0xFFFF_FFFF]
        found += [(word >> 8) * 2.0**-24 for word in c]
    return found[:size]


# fusion-bench


def fusion_bench_cases() -> list[Case]:
    """The functions under its algorithms, on state dicts of deltas."""
    from fusion_bench.method.emr_merging.utils import emr_merge
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
    from fusion_bench.method.knots.knots_utils import subspace_alignment
    from fusion_bench.method.magmax.magmax import _magmax_select
    from fusion_bench.method.tall_mask.utils import generate_task_masks
    from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction
    from fusion_bench.method.ties_merging.ties_merging_utils import (
        state_dict_to_vector,
        ties_merging,
        vector_to_state_dict,
    )
    from fusion_bench.method.wudi.wudi import wudi_merging

    def matrices(act: Callable[[list[Tensors]], Tensors], scale: float = 1.0) -> Callable[..., Tensors]:
        """base + scale * act(deltas), on the matrices."""

        def merge(base: Tensors, inputs: list[Tensors]) -> Tensors:
            merged = act([{name: one[name] - base[name] for name in MATRICES} for one in inputs])
            return {name: base[name] + scale * merged[name].detach() for name in MATRICES}

        return merge

    def emr(base: Tensors, inputs: list[Tensors]) -> Tensors:
        unified, masks, scalers = emr_merge(deltas_of(base, inputs))
        return {
            f"{task}/{name}": base[name] + unified[name] * masks[name][task] * scalers[task]
            for task in range(len(inputs))
            for name in base
        }

    def ties(density: float, how: str, scale: float = 1.0) -> Callable[..., Tensors]:
        def merge(base: Tensors, inputs: list[Tensors]) -> Tensors:
            flat = torch.stack([state_dict_to_vector(delta) for delta in deltas_of(base, inputs)])
            size = flat.shape[1]
            kept = max(1, math.floor(density * size))
            merged = ties_merging(flat, reset_thresh=(kept - 0.5) / size, merge_func=how)
            return dict(vector_to_state_dict(state_dict_to_vector(base) + scale * merged, base))

        return merge

    def magmax(base: Tensors, inputs: list[Tensors]) -> Tensors:
        merged = _magmax_select(deltas_of(base, inputs))
        return {name: base[name] + 0.5 * merged[name] for name in base}

    def consensus(lam: float, least: int, scale: float) -> Callable[..., Tensors]:
        def merge(base: Tensors, inputs: list[Tensors]) -> Tensors:
            flat_base = state_dict_to_vector(base)
            flat = torch.stack([state_dict_to_vector(one) for one in inputs])
            masks = generate_task_masks(flat - flat_base, flat, flat_base, tall_mask_lambda=lam)
            merged = (flat - flat_base).sum(0) * (masks.sum(0) >= least)
            return dict(vector_to_state_dict(flat_base + scale * merged, base))

        return merge

    def knots(density: float) -> Callable[..., Tensors]:
        def act(deltas: list[Tensors]) -> Tensors:
            found = {}
            for name in MATRICES:
                u, s, rows = subspace_alignment([delta[name] for delta in deltas])
                flat = torch.stack([(s[:, None] * part).reshape(-1) for part in rows])
                kept = max(1, math.floor(density * flat.shape[1]))
                merged = ties_merging(flat, reset_thresh=(kept - 0.5) / flat.shape[1], merge_func="mean")
                found[name] = u @ merged.reshape(rows[0].shape)
            return found

        return matrices(act)

    return [
        Case(
            "emr",
            "emr",
            {},
            "emr_merging.utils.emr_merge, as EMRTaskModulator applies it",
            emr,
            inputs=3,
            scope="model",
        ),
        Case(
            "emr_sparse",
            "emr",
            {},
            "emr_merging.utils.emr_merge, as EMRTaskModulator applies it",
            emr,
            kind="sparse",
            inputs=4,
            scope="model",
            note="where all deltas are 0 it elects -, we +: the same result",
        ),
        Case(
            "iso_c",
            "iso_c",
            {"scale": 0.8},
            "iso_c, scaling_factor 0.8",
            matrices(lambda d: iso_c(d, "cpu"), 0.8),
            inputs=3,
        ),
        *(
            Case(
                f"iso_cts_{count}",
                "iso_cts",
                {"scale": 0.8, "common": share},
                f"iso_cts, common_space_fraction {share}, scaling_factor 0.8",
                matrices(lambda d, share=share: iso_cts(d, share, "cpu"), 0.8),
                inputs=count,
            )
            for count, share in ((2, 0.6), (3, 0.8))
        ),
        *(
            Case(
                f"tsv_{count}",
                "tsv",
                {"scale": 0.7},
                "TSVM_utils.compute_and_sum_svd_mem_reduction, alpha 0.7",
                matrices(lambda d: compute_and_sum_svd_mem_reduction(d, accelerator="cpu"), 0.7),
                inputs=count,
            )
            for count in (2, 3)
        ),
        *(
            Case(
                f"wudi_{steps}",
                "wudi",
                {"steps": steps},
                f"wudi_merging, iter_num {steps}",
                matrices(lambda d, steps=steps: wudi_merging(d, "cpu", steps)),
                inputs=3,
            )
            for steps in (10, 300)
        ),
        Case(
            "ties_model",
            "ties",
            {"scope": "model", "density": 0.2},
            "ties_merging, merge_func mean",
            ties(0.2, "mean"),
            inputs=3,
            scope="model",
        ),
        Case(
            "ties_model_sum",
            "ties",
            {"scope": "model", "density": 0.35, "normalize": False, "scale": 0.3},
            "ties_merging, merge_func sum, scaling_factor 0.3",
            ties(0.35, "sum", 0.3),
            inputs=3,
            scope="model",
        ),
        Case("magmax", "magmax", {"scale": 0.5}, "_magmax_select, scaling_factor 0.5", magmax, inputs=3),
        Case(
            "consensus",
            "consensus",
            {"lam": 0.4, "k": 2, "scale": 0.3},
            "tall_mask.utils.generate_task_masks, tall_mask_lambda 0.4, kept where 2 masks are 1, of the summed deltas times 0.3",
            consensus(0.4, 2, 0.3),
            inputs=3,
            note="its algorithm TallMaskTaskArithmeticAlgorithm hands deltas and weights together to another such function, "
            "which is not the paper's mask, so it is not used",
        ),
        Case(
            "consensus_three",
            "consensus",
            {"lam": 0.2, "k": 3},
            "tall_mask.utils.generate_task_masks, tall_mask_lambda 0.2, kept where 3 masks are 1, of the summed deltas",
            consensus(0.2, 3, 1.0),
            inputs=4,
        ),
        Case(
            "knots",
            "knots",
            {"density": 0.4},
            "knots_utils.subspace_alignment, then ties_merging of the parts of S V^T, merge_func mean",
            knots(0.4),
            inputs=3,
            note="it has the alignment alone; components under 1e-4 are left out, and none is here",
        ),
    ]


def deltas_of(base: Tensors, inputs: Sequence[Tensors]) -> list[Tensors]:
    """The inputs less the base."""
    return [{name: one[name] - base[name] for name in base} for one in inputs]


# sd-mecha and peft


def sd_mecha_cases() -> list[Case]:
    """Its merge methods, without the recipe around them."""
    from sd_mecha.extensions.builtin.merge_methods import linear, ties

    def ties_sum(density: float) -> Callable[..., Tensors]:
        def merge(base: Tensors, inputs: list[Tensors]) -> Tensors:
            found = {}
            for name, own in base.items():
                kept = max(1, math.floor(density * own.numel()))
                k = (kept - 1.5) / own.numel()
                merged = ties.ties_sum.__wrapped__(*(one[name] - own for one in inputs), k=k, vote_sgn=True)
                found[name] = own + merged
            return found

        return merge

    def model_stock(base: Tensors, inputs: list[Tensors]) -> Tensors:
        return {
            name: own + ties.model_stock.__wrapped__(*(one[name] - own for one in inputs)) for name, own in base.items()
        }

    def n_average(base: Tensors, inputs: list[Tensors]) -> Tensors:
        return {name: linear.n_average.__wrapped__(*inputs, key=name) for name in base}

    def weighted_sum(base: Tensors, inputs: list[Tensors]) -> Tensors:
        alpha = torch.tensor(0.3)
        return {name: linear.weighted_sum.__wrapped__(*inputs, alpha=alpha, key=name) for name in base}

    def add_difference(base: Tensors, inputs: list[Tensors]) -> Tensors:
        delta = {name: linear.subtract.__wrapped__(inputs[0][name], own) for name, own in base.items()}
        return {name: linear.add_difference.__wrapped__(base, delta, torch.tensor(0.7), key=name) for name in base}

    return [
        Case(
            "ties",
            "ties",
            {"density": 0.3},
            "ties_sum, k = (floor(0.3 n) - 3/2) / n, vote_sgn True",
            ties_sum(0.3),
            inputs=3,
            note="a NaN makes its entry 0 there; vote_sgn False votes by count, not True",
        ),
        Case(
            "ties_sparse",
            "ties",
            {"density": 0.4},
            "ties_sum, k = (floor(0.4 n) - 3/2) / n, vote_sgn True",
            ties_sum(0.4),
            kind="sparse",
            inputs=3,
        ),
        Case(
            "model_stock",
            "model_stock",
            {"filter_wise": True},
            "model_stock",
            model_stock,
            note="of three inputs and more it takes neighbouring pairs only, not all; ties_sum_extended turns apply_stock round",
        ),
        Case("n_average", "linear", {}, "n_average", n_average, inputs=4, base=False),
        Case("weighted_sum", "linear", {"weight": [0.7, 0.3]}, "weighted_sum, alpha 0.3", weighted_sum, base=False),
        Case(
            "add_difference",
            "task_arithmetic",
            {"weight": 0.7},
            "subtract, then add_difference, alpha 0.7",
            add_difference,
            inputs=1,
        ),
    ]


def peft_cases() -> list[Case]:
    """The functions of peft.utils.merge_utils, on deltas."""
    from peft.utils import merge_utils

    def alone(act: Callable[[list[Tensor], int], Tensor]) -> Callable[..., Tensors]:
        """base + act(deltas, n), tensor by tensor."""

        def merge(base: Tensors, inputs: list[Tensors]) -> Tensors:
            return {name: own + act([one[name] - own for one in inputs], own.numel()) for name, own in base.items()}

        return merge

    def density(share: float, size: int) -> float:
        """A density at which its floor gives ours, whatever the rounding."""
        return max(1, math.floor(share * size)) / size + 1e-9

    equal, weights = torch.tensor([0.7, 0.7, 0.7]), torch.tensor([0.5, -0.2, 0.8])
    return [
        Case(
            "task_arithmetic",
            "task_arithmetic",
            {"weight": [0.5, -0.2, 0.8]},
            "task_arithmetic, weights 0.5, -0.2, 0.8",
            alone(lambda deltas, _: merge_utils.task_arithmetic(deltas, weights)),
            inputs=3,
        ),
        *(
            Case(
                f"ties_{ours}",
                "ties",
                {"density": 0.3, "scale": 0.7, "vote": ours},
                f"ties, density floor(0.3 n) / n, weights 0.7 each, majority_sign_method {theirs}",
                alone(lambda deltas, n, theirs=theirs: merge_utils.ties(deltas, equal, density(0.3, n), theirs)),
                inputs=3,
                note="weights after the vote, and a mean over counts: equal weights are our scale",
            )
            for ours, theirs in (("mass", "total"), ("count", "frequency"))
        ),
        Case(
            "magnitude_prune",
            "ties",
            {"density": 0.3, "weight": 0.5, "normalize": False},
            "magnitude_prune of one delta, density floor(0.3 n) / n, weight 0.5",
            alone(lambda deltas, n: merge_utils.magnitude_prune(deltas, torch.tensor([0.5]), density(0.3, n))),
            inputs=1,
            note="TIES of one delta without its division: the vote of one always passes",
        ),
    ]


CASES: Mapping[str, Callable[[], list[Case]]] = {
    "mergekit": mergekit_cases,
    "fusion-bench": fusion_bench_cases,
    "sd-mecha": sd_mecha_cases,
    "peft": peft_cases,
}


# mergekit's command


CONFIGS = HERE.parent / "mergekit_configs"
RANDOM = ("dare", "della")
"""How the names of configurations begin whose numbers depend on draws."""
WIDE = ("model_stock", "nuslerp_rows")
"""Configurations of angles between vectors of two to four numbers, of which mergekit's float32 loses up to 2e-4: in float64."""


def mergekit_yaml(config: str, folder: Path, *options: str) -> Tensors:
    """What the command makes of a configuration in this folder."""
    (folder / "config.yml").write_text(config)
    command = Path(sys.executable).with_name("mergekit-yaml")
    words = [command, "config.yml", "out", "--no-copy-tokenizer", "--no-write-model-card", "--quiet", *options]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(words, cwd=folder, env=environment, check=True)
    merged: Tensors = {}
    for path in sorted((folder / "out").glob("*.safetensors")):
        merged |= load_file(path)
    shutil.rmtree(folder / "out")
    return dict(sorted(merged.items()))


def make_mergekit_yaml() -> None:
    """Writes what the command makes of each configuration, tensors sorted by name and joined into one: CONFIG.

    First it proves that the command draws as the `replayed` cases say.
    """
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        models_digest = write_llamas(folder)
        prove_order_of_draws(folder)
        tensors: Tensors = {}
        cases: dict[str, Any] = {}
        for path in sorted(CONFIGS.glob("*.yml")):
            config = path.read_text()
            if path.stem in WIDE:
                config = re.sub("^dtype: float32$", "dtype: float64", config, flags=re.MULTILINE)
            if path.stem.startswith(RANDOM) or "\n---\n" in config:
                continue
            merged = mergekit_yaml(config, folder)
            layers = len([name for name in merged if name.endswith("q_proj.weight")])
            assert {name: tuple(one.shape) for name, one in merged.items()} == llama(layers), path.stem
            tensors[path.stem] = torch.cat([one.reshape(-1) for one in merged.values()])
            cases[path.stem] = {
                "config": config,
                "layers": layers,
                "digest": models_digest,
                "package": "mergekit",
                "version": importlib.metadata.version("mergekit"),
            }
    written("mergekit-yaml", tensors, cases)


def prove_order_of_draws(folder: Path) -> None:
    """Raises AssertionError unless the command draws for tensors sorted by name, for each its inputs in order, from one stream."""
    from mergekit.merge_methods.api import merge_state_dicts

    config = """
merge_method: dare_linear
base_model: ./base
models: [{model: ./b, parameters: {weight: 0.5}}, {model: ./a, parameters: {weight: 0.8}}]
parameters: {density: 0.4}
"""
    by_command = mergekit_yaml(config, folder, "--random-seed", "11")
    stored = [load_file(folder / name / "model.safetensors") for name in ("base", "b", "a")]
    listed = [dict(sorted(one.items())) for one in stored]
    torch.manual_seed(11)
    by_hand = merge_state_dicts(listed, "dare_linear", parameters={"weight": [0.5, 0.8], "density": 0.4}, base=0)
    assert all(torch.equal(by_command[name], by_hand[name]) for name in by_hand)


def written(name: str, tensors: Tensors, cases: Mapping[str, Any]) -> None:
    """Writes a file. The metadata has one entry, since several are written in no fixed order."""
    path = HERE / f"{name}.safetensors"
    save_file(tensors, path, {"cases": json.dumps(cases)})
    print(f"{path.name}: {len(cases)} cases, {path.stat().st_size:,} bytes")


def main(files: Sequence[str]) -> None:
    """Writes these files, or all."""
    torch.set_num_threads(1)
    for package in files or (*CASES, "mergekit-yaml"):
        if package == "mergekit-yaml":
            make_mergekit_yaml()
            continue
        tensors: Tensors = {}
        cases: dict[str, Any] = {}
        for case in CASES[package]():
            assert case.name not in cases, case.name
            found, about = case.made(package)
            tensors |= found
            cases[case.name] = about
        written(package, tensors, cases)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Every op of the list in the conformance suite, and the suite on ops that each break one of its rules."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import files_of
from pages import write_examples
from toys import environment

import mergeflow.ops as ops
from mergeflow import load_recipe, run
from mergeflow.ops import (
    LEAF,
    OPS,
    Add,
    Block,
    DeltaOp,
    Linear,
    Op,
    Passthrough,
    Reduction,
    TaskArithmetic,
    Ties,
)
from mergeflow.ops.base import numbers, weighted_sum
from mergeflow.ops.draws import uniform
from mergeflow.ops.statistics import StageOp
from mergeflow.settings import Fraction, Number, PerInput, Setting, setting
from mergeflow.testing import Case, OpConformance, cases_of

DECLARED: dict[str, dict[str, Any]] = {
    "linear": {"averages": True},
    "slerp": {"averages": True},
    "nuslerp": {"averages": True, "commutes": True},
    "multislerp": {"averages": True},
    "karcher": {"averages": True},
    "ties": {"averages": True},
    "breadcrumbs": {"alone": False},  # drops the largest even at density 1
    "breadcrumbs_ties": {"alone": False},
    "della": {"averages": True},
    "sce": {"averages": True},
    "ram": {"averages": True},
    "ramplus": {"averages": True},
    "model_stock": {"averages": True},
    "nearswap": {"averages": True},
    "arcee_fusion": {"alone": False},
    "magmax": {"averages": True},
    "pcb": {"alone": False},
    "iso_c": {"alone": False},
    "iso_cts": {"alone": False},
    "knots": {"averages": True},
    "star": {"alone": False},
    "cart": {"averages": True},
    "evolve_cross": {"averages": True},
}
"""What the classes of ops do not say of themselves, by op (see `OpConformance`)."""


FURTHER: dict[str, tuple[Case, ...]] = {
    "linear": (Case(Linear(weight=[0.3, 0.5, 0.1]), 3),),
    "task_arithmetic": (
        Case(TaskArithmetic(weight=[0.3, -0.4]), 2, True),
        Case(TaskArithmetic(normalize=True), 3, True, averages=True),
    ),
    "ties": (
        Case(Ties(density=[0.01, 0.5, 1.0], weight=[0.3, -0.2, 0.4], rescale="l1", vote="count"), 3, True),
        Case(Ties(density=0.6, rescale="l2", rounding="ceil", normalize=False, scale=0.7), 1, True),
    ),
    "add": (Case(Add(weight=0.5), 2, True),),
    "passthrough": (Case(Passthrough(scale=0.3), 1),),
}
"""Cases beyond those that the suite reads off the classes."""


def suite_of(op: type[Op], **declared: Any) -> type[OpConformance]:
    """The suite of an op, as a test file of its own would write it."""
    return type(f"Test{op.__name__}", (OpConformance,), {"op": op, "__module__": __name__, **declared})


for _op in OPS:
    _cases = (
        (*cases_of(_op), *FURTHER.get(_op.name, ())) if _op.takes in ("model", "inputs") and not _op.input_keys else ()
    )
    _declared = {"cases": lambda self, cases=_cases: cases, **DECLARED.get(_op.name, {})}
    globals()[f"Test{_op.__name__}"] = suite_of(_op, **_declared)


def test_what_is_declared_is_declared_of_ops_that_there_are() -> None:
    assert DECLARED.keys() | FURTHER.keys() <= {op.name for op in OPS}


def test_every_op_gives_the_same_bytes_whatever_the_hash_seed(tmp_path: Path) -> None:
    """In processes whose sets stand in another order. Stages run below regmean and fisher, from a cache of each process."""
    ops_here = [op for op in OPS if not issubclass(op, StageOp)]
    write_examples(tmp_path, ops_here)
    code = (
        "import sys; from pathlib import Path; from mergeflow import load_recipe, run\n"
        "for path in sorted(Path('.').glob('*.yaml')): run(load_recipe(path), Path(sys.argv[1]) / path.stem, threads=1)\n"
    )
    made = []
    for seed in ("1", "2"):
        words = [sys.executable, "-c", code, f"out-{seed}"]
        env = environment(PYTHONHASHSEED=seed, MERGEFLOW_CACHE=str(tmp_path / f"cache-{seed}"))
        done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
        files = files_of(tmp_path / f"out-{seed}")
        made.append({name: data for name, data in files.items() if name.endswith(".safetensors")})
    assert {name.split("/")[0] for name in made[0]} == {op.name for op in ops_here}
    assert made[0] == made[1]


PLANNED = [op for op in OPS if op.takes not in ("model", "inputs") or op.input_keys]


@pytest.mark.parametrize("op", PLANNED, ids=lambda op: op.name)
def test_what_is_planned_in_place_of_an_op_gives_the_same_bytes_in_every_run(
    op: type[Op], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ops that compute nothing themselves, whose suite has no tensors to try."""
    monkeypatch.setenv("MERGEFLOW_CACHE", str(tmp_path / "cache"))
    write_examples(tmp_path, [op])
    made = []
    for threads, memory, reading in ((1, 2**30, "mmap"), (2, 2**26, "pread"), (2, 2**30, "mmap")):
        out = tmp_path / f"out{len(made)}"
        run(load_recipe(tmp_path / f"{op.name}.yaml"), out, threads=threads, memory=memory, reading=reading)  # type: ignore[arg-type]
        made.append({name: data for name, data in files_of(out).items() if name.endswith(".safetensors")})
    assert made[0] and made[0] == made[1] == made[2]


# The suite itself.


class Mean(Op):
    """The mean, as it should be."""

    name = "mean"
    formula = "sum_i w_i theta_i / K"
    may_base = True

    weight: PerInput[Number] = setting(1.0, "Share of this input.")

    def compute(self, inputs: Sequence[torch.Tensor], block: Block) -> torch.Tensor:
        weights = [weight / sum(numbers(self.weight)) for weight in numbers(self.weight)]
        return weighted_sum(inputs, weights)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops of this file are found as those of an installed package are."""
    made = [Mean, *FAULTS]
    points = [EntryPoint(op.name, f"{__name__}:{op.__name__}", "mergeflow.ops") for op in made]
    monkeypatch.setattr(ops, "entry_points", lambda group: points)


def broken(suite: type[OpConformance]) -> set[str]:
    """The properties that fail for some case, but for those that need a process or files."""
    found = set()
    for name, test in inspect.getmembers(suite, inspect.isfunction):
        if not name.startswith("test_") or "tmp_path" in inspect.signature(test).parameters:
            continue
        given = "case" in inspect.signature(test).parameters
        for case in [case for case in suite().cases() if test.chosen(suite, case)] if given else [None]:
            try:
                test(suite(), case) if given else test(suite())
            except (Exception, pytest.fail.Exception):
                found.add(name)
    return found


@pytest.mark.usefixtures("installed")
def test_a_sound_op_keeps_every_rule_and_each_of_its_cases_says_what_it_is() -> None:
    suite = suite_of(Mean, averages=True)
    assert broken(suite) == set()
    assert [str(case) for case in suite().cases()] == [
        "of 2",
        "of 2 and a base",
        "of 1",
        "of 1 and a base",
        "of 3",
        "of 3 and a base",
    ]


class Seeded(Mean):
    """Has a parameter with a word of the recipe."""

    name = "seeded"
    seed: Setting[Number] = setting(1.0, "Of the draws.")


class Undescribed(Mean):
    """No full stop at the end"""

    name = "undescribed"


class Halved(Mean):
    """Has a default that it does not take."""

    name = "halved"
    share: Setting[Fraction] = setting(0, "How much of it.")


class Writes(Mean):
    """Writes into its first input."""

    name = "writes"

    def compute(self, inputs: Sequence[torch.Tensor], block: Block) -> torch.Tensor:
        return super().compute([inputs[0].mul_(2), *inputs[1:]], block)


class Dice(Mean):
    """Draws from torch's own generator."""

    name = "dice"

    def compute(self, inputs: Sequence[torch.Tensor], block: Block) -> torch.Tensor:
        return super().compute(inputs, block) * torch.rand_like(inputs[0])


class Hides(Mean):
    """Makes numbers of what is none."""

    name = "hides"

    def compute(self, inputs: Sequence[torch.Tensor], block: Block) -> torch.Tensor:
        return super().compute(inputs, block).nan_to_num(0, 0, 0)


class Breaks(Mean):
    """Cannot stand a NaN."""

    name = "breaks"

    def compute(self, inputs: Sequence[torch.Tensor], block: Block) -> torch.Tensor:
        if any(one.isnan().any() for one in inputs):
            raise RuntimeError("not a number")
        return super().compute(inputs, block)


class ToNorm(Mean):
    """Divides by a norm that may be 0."""

    name = "to_norm"
    cut = "tensor"
    portable = False

    def compute(self, inputs: Sequence[torch.Tensor], block: Block) -> torch.Tensor:
        return super().compute(inputs, block) / inputs[0].norm()


class FirstTwice(Mean):
    """Counts its first input twice."""

    name = "first_twice"

    def compute(self, inputs: Sequence[torch.Tensor], block: Block) -> torch.Tensor:
        return super().compute([*inputs[:-1], inputs[-1] / 2], block)


class Reshapes(Mean):
    """Gives one dimension where there was none."""

    name = "reshapes"

    def compute(self, inputs: Sequence[torch.Tensor], block: Block) -> torch.Tensor:
        return super().compute(inputs, block)[:1] if inputs[0].numel() == 7 * 9 else super().compute(inputs, block)


class Near(DeltaOp):
    """Gives almost the base for deltas of zero."""

    name = "near"
    formula = "theta_0 + sum_i tau_i + 1e-9"

    def combine(self, deltas: Sequence[torch.Tensor], block: Block) -> torch.Tensor:
        return weighted_sum(deltas, [1.0] * len(deltas)) + 1e-9


class ByPlace(Mean):
    """Forgets where its block starts."""

    name = "by_place"

    def compute(self, inputs: Sequence[torch.Tensor], block: Block) -> torch.Tensor:
        return super().compute(inputs, block) * torch.arange(1, len(inputs[0]) + 1)


class _Sum(Reduction):
    """One sum in float32, in whatever order."""

    def block(self, inputs: Sequence[torch.Tensor], block: Block) -> torch.Tensor:
        return inputs[0].sum()

    def merge(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return sum(parts[1:], start=parts[0])

    def finish(self, total: torch.Tensor) -> float:
        return float(total)


class Sums(Mean):
    """Adds the sum of the first input."""

    name = "sums"

    def reduction(self, known: tuple[Any, ...]) -> Reduction | None:
        return None if known else _Sum()

    def compute(self, inputs: Sequence[torch.Tensor], block: Block) -> torch.Tensor:
        return super().compute(inputs, block) * (1 + block.measured[0])


class ByRow(Mean):
    """Needs the rows above without saying so."""

    name = "by_row"
    cut = "row"

    def compute(self, inputs: Sequence[torch.Tensor], block: Block) -> torch.Tensor:
        return super().compute([one.cumsum(0) for one in inputs], block)


class Draws(DeltaOp):
    """Keeps each entry by chance, whatever its place."""

    name = "draws_anywhere"
    formula = "theta_0 + sum_i m_i tau_i"
    draws = True
    density: Setting[Fraction] = setting(1.0, "Part to keep.")

    def combine(self, deltas: Sequence[torch.Tensor], block: Block) -> torch.Tensor:
        masks = [uniform(key, 0, delta) < self.density for key, delta in zip(block.keys, deltas, strict=True)]
        return weighted_sum([delta * mask for delta, mask in zip(deltas, masks, strict=True)], [1.0] * len(deltas))


class Constant(Draws):
    """Draws the same numbers whatever the seed."""

    name = "draws_constant"

    def combine(self, deltas: Sequence[torch.Tensor], block: Block) -> torch.Tensor:
        masks = [uniform(7, block.start, delta) < self.density for delta in deltas]
        return weighted_sum([delta * mask for delta, mask in zip(deltas, masks, strict=True)], [1.0] * len(deltas))


FAULTS: dict[type[Op], set[str]] = {
    Seeded: {"names_of_their_own"},
    Undescribed: {"is_described"},
    Halved: {"its_defaults"},
    Writes: {"written_to"},
    Dice: {"depends_on_nothing"},
    Hides: {"leaves_one"},
    Breaks: {"no_reason_to_break"},
    ToNorm: {"are_defined_and_finite"},
    FirstTwice: {"the_order"},
    Reshapes: {"are_defined_and_finite"},
    Near: {"zero_deltas"},
    ByPlace: {"cut_into_blocks"},
    Sums: {"cut_into_blocks", "measured_apart"},
    ByRow: {"rows_may_be"},
    Draws: {"cut_into_blocks"},
    Constant: {"depends_on_the_seed"},
}
"""Faulty ops, each with the properties that must fail, by a part of their names."""


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("op", FAULTS, ids=lambda op: op.name)
def test_a_fault_is_found_by_the_property_that_forbids_it(op: type[Op]) -> None:
    found = broken(suite_of(op, alone=False, examples=5))
    for words in FAULTS[op]:
        assert any(words in name for name in found), f"{words} is not among {found}"


def test_what_an_op_does_not_claim_is_not_tested() -> None:
    plain, declared = suite_of(Near, alone=False), suite_of(Mean, averages=True)
    for name in ("equal_inputs_give_that_input", "weight_one_on_one_input_and_none_on_the_others_gives_it"):
        assert getattr(plain, f"test_{name}") is None
        assert getattr(declared, f"test_{name}") is not None


def test_the_cases_of_an_op_reach_its_choices_and_the_inside_of_its_ranges() -> None:
    ties = {op.name: op for op in OPS}["ties"]
    told = [str(case) for case in cases_of(ties)]
    assert {"of 2 and a base", "of 1 and a base", "density=0.4 of 2 and a base"} <= set(told)
    assert "density=0.4 rescale=l2 of 2 and a base" in told and "density=0.4 normalize=False of 2 and a base" in told
    assert all(isinstance(case, Case) and case.based for case in cases_of(ties))
    assert suite_of(ties)()._large(cases_of(ties)[0])[0] > LEAF

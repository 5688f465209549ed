"""Ops on rows and whole tensors, tensors made on the way, rows of bits, measures over a model: the same bits however work is cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from checkpoints import files_of, save, weights_of
from test_executing import Kept, executed, models_of, noise, paths_of, plan_by_hand, values
from torch import Tensor

from mergeflow import Recipe, executing, plan, run
from mergeflow.checkpoint.sources import Read, Source
from mergeflow.dtypes import BY_NAME
from mergeflow.errors import MergeflowError
from mergeflow.graph import Apply, Expression, Load, Made, Measure, Row
from mergeflow.ops import LEAF, Block, Op, Reduction, Ties
from mergeflow.settings import Place

SHAPES = {
    "wide": (700, 301),
    "narrow": (90_001, 3),
    "long": (2, 150_000),
    "vector": (1000,),
    "cube": (5, 7, 1001),
    "one": (1,),
    "scalar": (),
    "empty": (0, 7),
    "hollow": (7, 0),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of some 3,000 elements, and segments that most rows do not end at."""
    monkeypatch.setattr(executing, "SEGMENT", 2 * LEAF)
    monkeypatch.setattr(executing, "PIECE", 2 * LEAF)
    monkeypatch.setattr(executing, "LARGEST_BLOCK", 3000)
    monkeypatch.setattr(executing._Cpu, "block", LEAF)
    monkeypatch.setattr(executing._Staged, "block", 2 * LEAF)


def rows_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1] if tensor.ndim else 1) if tensor.numel() else tensor.reshape(0, 1)


class RowMaximum(Op):
    """Subtracts from each row its maximum, and from everything the sum of all maxima."""

    name: ClassVar[str] = "row_maximum"
    formula: ClassVar[str] = "theta - max"
    cut: ClassVar[Any] = "row"

    def reduction(self, known: tuple[Any, ...]) -> Reduction | None:
        return None if known else _Maxima()

    def compute(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        (values,) = inputs
        assert values.ndim == 2 and (not values.numel() or values.shape[1] == (block.shape or (1,))[-1])
        if not values.numel():
            return values
        return values - values.amax(1, keepdim=True) - block.measured[0]


@dataclass(frozen=True)
class _Maxima(Reduction):
    cut: ClassVar[Any] = "row"

    def block(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        return inputs[0].double().amax(1).sum() if inputs[0].numel() else torch.zeros((), dtype=torch.float64)

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(parts)).sum()

    def finish(self, total: Tensor) -> float:
        return float(total)


class Reversed(Op):
    """A matrix upside down: needs it whole."""

    name: ClassVar[str] = "reversed"
    formula: ClassVar[str] = "flip"
    cut: ClassVar[Any] = "tensor"

    def compute(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        return inputs[0].flip(0) if inputs[0].ndim else inputs[0]


def centred(tensor: Tensor) -> Tensor:
    if not tensor.numel():
        return tensor
    rows = rows_of(tensor)
    return (rows - rows.amax(1, keepdim=True) - float(rows.double().amax(1).sum())).reshape(tensor.shape)


OPTIONS = [
    {"threads": 1},
    {"threads": 2},
    {"threads": 4, "memory": 2**30},
    {"device": "staged:cpu"},
    {"reading": "pread"},
]


@pytest.mark.usefixtures("small")
def test_rows_come_whole_and_the_cut_changes_no_bit(tmp_path: Path) -> None:
    tensors = models_of("a", SHAPES)["a"]
    save(tmp_path / "a", tensors)
    op = RowMaximum()

    def made(load: Load) -> Expression:
        return Apply(op, (load,), Measure(op, ((load,),)))

    planned = plan_by_hand(tmp_path / "a", lambda loads: {name: made(load) for name, load in loads.items()})
    sinks = [executed(planned, **options) for options in OPTIONS]
    for name, got in values(sinks[0], planned).items():
        assert torch.allclose(got, centred(tensors[name]), rtol=1e-5, atol=1e-3), name
    for sink in sinks[1:]:
        assert sink.rows == sinks[0].rows
        assert sink.done == sinks[0].done


@pytest.mark.usefixtures("small")
def test_rows_below_a_whole_tensor_are_cut_as_they_are_alone(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in models_of("a", SHAPES)["a"].items() if tensor.numel()}
    save(tmp_path / "a", tensors)
    op = RowMaximum()

    def made(load: Load) -> Expression:
        inner = Apply(op, (load,), Measure(op, ((load,),)))
        return Apply(Reversed(), (inner,))

    alone = plan_by_hand(
        tmp_path / "a", lambda loads: {n: Apply(op, (load,), Measure(op, ((load,),))) for n, load in loads.items()}
    )
    whole = plan_by_hand(tmp_path / "a", lambda loads: {name: made(load) for name, load in loads.items()})
    first, second = values(executed(alone), alone), values(executed(whole), whole)
    for name in tensors:
        assert torch.equal(first[name].flip(0) if tensors[name].ndim else first[name], second[name]), name


@pytest.mark.usefixtures("small")
def test_thresholds_over_what_is_made_by_rows_are_those_of_the_whole(tmp_path: Path) -> None:
    """Trim counts equals leaf by leaf, and rows of 301 end in the middle of leaves: magnitudes here tie in masses."""
    tensors = {
        f"{m}.{n}": (noise(i, *shape) * 2).round() / 2 for m in "ab" for i, (n, shape) in enumerate(SHAPES.items())
    }
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    save(tmp_path / "a", tensors)
    rows, trim = RowMaximum(), Ties(density=0.3).resolved(((1.0,), (0.3,), True, 1.0))
    names = [name for name in SHAPES if f"a.{name}" in tensors]

    def made(loads: Mapping[str, Load], name: str, *, by_rows: bool) -> Expression:
        inner: Expression = loads[f"b.{name}"]
        if by_rows:
            inner = Apply(rows, (inner,), Measure(rows, ((inner,),)))
        inputs = (loads[f"a.{name}"], inner)
        return Apply(trim, inputs, Measure(trim, (inputs,)))

    def planned(folder: Path, *, by_rows: bool) -> Any:
        return plan_by_hand(folder, lambda loads: {f"a.{n}": made(loads, n, by_rows=by_rows) for n in names})

    nested = planned(tmp_path / "a", by_rows=True)
    sinks = [executed(nested, **options) for options in OPTIONS]

    # The same with the rows' results in a file.
    def of_rows(load: Load) -> Expression:
        return Apply(rows, (load,), Measure(rows, ((load,),)))

    alone = plan_by_hand(tmp_path / "a", lambda loads: {f"b.{n}": of_rows(loads[f"b.{n}"]) for n in names})
    save(tmp_path / "flat", {**tensors, **values(executed(alone), alone)})
    flat = planned(tmp_path / "flat", by_rows=False)
    assert sinks[0].rows == executed(flat).rows
    assert all(sink.rows == sinks[0].rows and sink.done == sinks[0].done for sink in sinks)
    accounted = {key for _, inputs in sinks[0].done.values() for key in inputs}
    assert accounted == {f"a/{m}.{n}" for m in "ab" for n in names}


@dataclass(frozen=True)
class Ramp(Source):
    """Elements i * step + the first stored number."""

    step: float

    def make(self, read: Read, start: int, stop: int, shape: tuple[int, ...], compute: torch.dtype) -> Tensor:
        return torch.arange(start, stop).to(compute) * self.step + read(0, 0, 1).to(compute)


@dataclass(frozen=True)
class Outer(Source):
    """left x right, by whole rows."""

    cut: ClassVar[Any] = "row"

    def make(self, read: Read, start: int, stop: int, shape: tuple[int, ...], compute: torch.dtype) -> Tensor:
        assert start % shape[1] == 0 and stop % shape[1] == 0
        left = read(0, start // shape[1], stop // shape[1]).to(compute)
        return (left[:, None] * read(1, 0, shape[1]).to(compute)[None]).reshape(-1)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.usefixtures("small")
def test_a_tensor_that_no_file_holds_is_made_block_by_block(options: dict[str, Any], tmp_path: Path) -> None:
    tensors = {"w": noise(1, 500, 401), "left": noise(2, 500), "right": noise(3, 401)}
    save(tmp_path / "a", tensors)
    f32 = BY_NAME["float32"]

    def rows(loads: Mapping[str, Load]) -> Mapping[str, Expression]:
        ramp = Made(Ramp(0.5), (loads["left"],), f32, (500, 401))
        outer = Made(Outer(), (loads["left"], loads["right"]), f32, (500, 401))
        return {"w": Apply(_Sum3(), (loads["w"], ramp, outer))}

    planned = plan_by_hand(tmp_path / "a", rows)
    sink = executed(planned, **options)
    ramp = (torch.arange(500 * 401) * 0.5 + tensors["left"][0]).reshape(500, 401)
    right = tensors["w"] + ramp + tensors["left"][:, None] * tensors["right"][None]
    assert torch.equal(values(sink, planned)["w"], right)
    assert sink.done[0][1].keys() == {"a/w", "a/left", "a/right"}, "what was read is accounted for"
    copy = plan_by_hand(tmp_path / "a", lambda loads: dict(loads))
    digests = {key: digest for _, inputs in executed(copy).done.values() for key, digest in inputs.items()}
    assert sink.done[0][1] == digests


class _Sum3(Op):
    name: ClassVar[str] = "sum3"
    formula: ClassVar[str] = "a + b + c"

    def compute(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        return inputs[0] + inputs[1] + inputs[2]


class Projected(Op):
    """theta times a square matrix, which it reads by rows."""

    name: ClassVar[str] = "projected"
    formula: ClassVar[str] = "theta G"
    cut: ClassVar[Any] = "tensor"
    lazy: ClassVar[bool] = True

    def compute(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        raise AssertionError("it reads for itself")

    def compute_lazily(self, inputs: Sequence[Any], block: Block) -> Tensor:
        weight, gram = inputs
        assert weight.shape == block.shape and gram.shape == (weight.shape[1],) * 2
        rows, length = weight.shape
        cuts = [(start, min(start + 7, length)) for start in range(0, length, 7)]
        parts = [weight.rows(0, rows)[:, start:stop] @ gram.rows(start, stop) for start, stop in cuts]
        return torch.stack(parts).sum(0)

    def needed_bytes(self, shapes: Sequence[tuple[int, ...]]) -> int:
        return 4 * sum(rows * columns for rows, columns in shapes)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.usefixtures("small")
def test_an_op_that_reads_for_itself_takes_inputs_of_other_shapes(options: dict[str, Any], tmp_path: Path) -> None:
    tensors = {"w": noise(1, 50, 401), "v": noise(2, 50, 401), "gram": noise(3, 401, 401), "right": noise(4, 401)}
    save(tmp_path / "a", tensors)

    def rows(loads: Mapping[str, Load]) -> Mapping[str, Expression]:
        outer = Made(Outer(), (loads["right"], loads["right"]), BY_NAME["float32"], (401, 401))
        total = Apply(_Sum3(), (loads["w"], loads["w"], loads["v"]))
        return {"w": Apply(Projected(), (total, loads["gram"])), "v": Apply(Projected(), (loads["v"], outer))}

    planned = plan_by_hand(tmp_path / "a", rows)
    sink = executed(planned, **options)
    got = values(sink, planned)
    right = (tensors["w"] * 2 + tensors["v"]).double() @ tensors["gram"].double()
    assert torch.allclose(got["w"].double(), right, rtol=1e-4, atol=1e-3)
    outer = tensors["right"][:, None].double() * tensors["right"][None].double()
    assert torch.allclose(got["v"].double(), tensors["v"].double() @ outer, rtol=1e-4, atol=1e-3)
    accounted = {key for _, inputs in sink.done.values() for key in inputs}
    assert accounted == {"a/w", "a/v", "a/gram", "a/right"}
    copied = executed(plan_by_hand(tmp_path / "a", lambda loads: dict(loads)))
    digests = {key: digest for _, inputs in copied.done.values() for key, digest in inputs.items()}
    assert all(digests[key] == digest for _, inputs in sink.done.values() for key, digest in inputs.items())
    assert executing.peak_memory(planned, 2**30, 1) >= 4 * (50 * 401 + 401 * 401)


class Positive(Op):
    """Which elements are above 0."""

    name: ClassVar[str] = "positive"
    formula: ClassVar[str] = "theta > 0"

    def compute(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        return inputs[0] > 0


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, LEAF - 1, LEAF + 1, 40 * LEAF + 13])
@pytest.mark.usefixtures("small")
def test_a_row_of_bits_holds_eight_elements_a_byte(size: int, tmp_path: Path) -> None:
    tensor = noise(1, size)
    save(tmp_path / "a", {"w": tensor})
    planned = plan_by_hand(tmp_path / "a", {"w": lambda loads: Apply(Positive(), (loads["w"],))})
    row = planned.rows[0]
    kind = BY_NAME["uint8"]
    bits = Row("", "m", "w", row.expression, kind, (-(-size // 8),), 0, 0, row.compute, check_finite=False, bits=True)
    planned = type(planned)("hand", {}, planned.models, (bits,), (), ())
    sinks = [Kept(planned), Kept(planned)]
    for threads, sink in enumerate(sinks, 1):
        executing.execute(planned, paths_of(planned), sink, threads=threads)
    unpacked = np.unpackbits(np.frombuffer(sinks[0].rows[0], np.uint8), bitorder="little")[:size]
    assert np.array_equal(unpacked.astype(bool), (tensor > 0).numpy())
    assert sinks[0].rows == sinks[1].rows and sinks[0].done == sinks[1].done


# TIES over the model


MODEL = {"b.big": (3 * LEAF + 5,), "a.small": (40,), "c.matrix": (300, 401), "d.none": (0,), "e.scalar": ()}


def reference(models: Mapping[str, Mapping[str, Tensor]], density: float) -> dict[str, np.ndarray[Any, Any]]:
    """All deltas of a model as one vector in the order of the names, trimmed by a sort, then elected and averaged."""
    names = sorted(MODEL)
    parts = []
    for model in ("b", "c"):
        flat = np.concatenate([(models[model][n] - models["a"][n]).double().numpy().reshape(-1) for n in names])
        kept = np.argsort(-np.abs(flat), kind="stable")[: max(1, int(density * flat.size))]
        trimmed = np.zeros_like(flat)
        trimmed[kept] = flat[kept]
        parts.append(trimmed)
    sign = np.where(parts[0] + parts[1] >= 0, 1.0, -1.0)
    count = sum((part * sign > 0).astype(float) for part in parts)
    total = sum(np.where(part * sign > 0, part, 0.0) for part in parts)
    merged = np.where(count > 0, total / np.maximum(count, 1), 0.0)
    found, place = {}, 0
    for name in names:
        base = models["a"][name].double().numpy()
        found[name] = base + merged[place : place + base.size].reshape(base.shape)
        place += base.size
    return found


@pytest.mark.parametrize("density", [0.01, 0.3])
@pytest.mark.parametrize("coarse", [False, True], ids=["spread", "in masses"])
@pytest.mark.usefixtures("small")
def test_ties_over_the_model_is_what_one_sort_of_it_gives(density: float, coarse: bool, tmp_path: Path) -> None:
    models = models_of("abc", MODEL)
    if coarse:  # magnitudes tie in masses, across tensors too
        models = {m: {n: (t * 2).round() / 2 for n, t in tensors.items()} for m, tensors in models.items()}
    for name, tensors in models.items():
        save(tmp_path / name, tensors)
    node = {"op": "ties", "base": "a", "inputs": ["b", "c"], "density": density, "scope": "model"}
    recipe = Recipe(folder=tmp_path, models={n: f"./{n}" for n in models}, nodes={"m": node})
    run(recipe, tmp_path / "out", threads=1)
    got = weights_of(tmp_path / "out")
    for name, right in reference(models, density).items():
        assert np.abs(got[name].double().numpy() - right).max(initial=0) < 2e-6, name
    run(recipe, tmp_path / "again", threads=2, memory=2**26)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "out")


def test_ties_over_the_model_counts_tensors_that_nobody_asked_for(tmp_path: Path) -> None:
    for name, tensors in models_of("abc", MODEL).items():
        save(tmp_path / name, tensors)
    node = {"op": "ties", "base": "a", "inputs": ["b", "c"], "density": 0.3, "scope": "model"}
    chosen = {"op": "select", "rules": [{"match": "a.*", "model": "m"}, {"model": "a"}]}

    def made(**nodes: Any) -> Any:
        return Recipe(folder=tmp_path, models={n: f"./{n}" for n in "abc"}, nodes=nodes)

    whole, part = plan(made(m=node)), plan(made(m=node, s=chosen))
    assert part.bytes_in == whole.bytes_in, "the threshold depends on all tensors, and the plan says so"
    run(made(m=node), tmp_path / "whole")
    run(made(m=node, s=chosen), tmp_path / "part")
    assert torch.equal(weights_of(tmp_path / "whole")["a.small"], weights_of(tmp_path / "part")["a.small"])


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(MergeflowError) as caught:
        act()
    return str(caught.value)


def test_a_density_that_changes_over_a_measured_model_is_refused(tmp_path: Path) -> None:
    for name, tensors in models_of("abc", MODEL).items():
        save(tmp_path / name, tensors)
    density = [{"match": "a.*", "value": 0.5}, {"value": 0.3}]
    node = {"op": "ties", "base": "a", "inputs": ["b", "c"], "density": density, "scope": "model"}
    said = refusal(lambda: plan(Recipe(folder=tmp_path, models={n: f"./{n}" for n in "abc"}, nodes={"m": node})))
    assert said == (
        "recipe.nodes.m.density: `density` changes over the model, and `ties` measures the whole model here. "
        "Give it one value for each input."
    )


def test_an_input_left_out_of_a_measured_model_is_refused(tmp_path: Path) -> None:
    models = models_of("abc", MODEL)
    del models["c"]["b.big"]
    for name, tensors in models.items():
        save(tmp_path / name, tensors)
    node = {"op": "ties", "base": "a", "inputs": ["b", "c"], "density": 0.3, "scope": "model", "missing": "omit"}
    said = refusal(lambda: plan(Recipe(folder=tmp_path, models={n: f"./{n}" for n in "abc"}, nodes={"m": node})))
    assert "`ties` measures the whole model, and an input is left out at 'b.big'" in said


def test_inputs_that_are_left_out_in_turn_of_a_measured_model_are_refused_too(tmp_path: Path) -> None:
    """The count of inputs is the same at every tensor, and the inputs are not."""
    models = models_of("abc", {"x": (3, 4), "y": (5,)})
    for name, lacks in (("b", "x"), ("c", "y")):
        del models[name][lacks]
    for name, tensors in models.items():
        save(tmp_path / name, tensors)
    node = {"op": "ties", "base": "a", "inputs": ["b", "c"], "density": 0.3, "scope": "model", "missing": "omit"}
    said = refusal(lambda: plan(Recipe(folder=tmp_path, models={n: f"./{n}" for n in "abc"}, nodes={"m": node})))
    assert "`ties` measures the whole model, and an input is left out at 'x', 'y'" in said


def test_float64_beside_float32_in_a_measured_model_is_refused_where_entries_are_compared(tmp_path: Path) -> None:
    for name, tensors in models_of("abc", {"x": (30, 4), "y": (50,)}).items():
        save(tmp_path / name, {**tensors, "y": tensors["y"].double()})
    models = {n: f"./{n}" for n in "abc"}

    def made(**more: Any) -> Recipe:
        node = {"op": "ties", "base": "a", "inputs": ["b", "c"], "density": 0.3, "scope": "model", **more}
        return Recipe(folder=tmp_path, models=models, nodes={"m": node})

    said = refusal(lambda: plan(made()))
    assert "compares the entries of the whole model, and float64 stands beside narrower dtypes at 'y'" in said
    run(made(only="x", others={"model": "a"}), tmp_path / "out")
    assert weights_of(tmp_path / "out")["y"].dtype is torch.float64


def test_what_is_collected_block_by_block_lies_in_few_arrays() -> None:
    """Small arrays that stay, each between large blocks that go, kept 300 MiB from being used again."""
    op = Ties(density=0.3)
    resolved = op.resolved(op.values_at(Place(""), range(1)))
    tensors = [torch.zeros(40 * LEAF), noise(1, 40 * LEAF)]
    sample = resolved.reduction(())
    assert sample is not None
    known = (sample.finish(sample.merge([sample.block([one[:LEAF] for one in tensors], Block())])),)
    inside = resolved.reduction(known)
    assert inside is not None
    total: Any = None
    for start in range(0, 40 * LEAF, LEAF):
        part = inside.block([one[start : start + LEAF] for one in tensors], Block(start, known, (40 * LEAF,)))
        total = part if total is None else inside.merge([total, part])
    assert len(total.values[0]) <= 8
    assert len(total.by_leaf[0]) <= 8
    assert sum(map(len, total.by_leaf[0])) == 40
    (found,) = inside.finish(total)
    kept = int((tensors[1].abs() >= found.at()).sum())
    assert kept == int(0.3 * 40 * LEAF)

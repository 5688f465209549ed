"""Rows come out as plain torch and numpy say they should, and with the same bits however the work is cut."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy
import pytest
import torch
from checkpoints import digest_of, raw, same, save, save_sharded, weights_of
from torch import Tensor

from mergeflow import Recipe, executing, plan, run
from mergeflow.checkpoint import open_checkpoint
from mergeflow.dtypes import BY_NAME
from mergeflow.errors import InputError, Interrupted, MachineError, MergeflowError, NumericError, Problems, RecipeError
from mergeflow.executing import check_tied, execute
from mergeflow.graph import Apply, Expression, Load, Measure, Plan, Row
from mergeflow.hub import locate
from mergeflow.ops import LEAF, Block, Linear, Op, Reduction, Ties
from mergeflow.writing import Staging

F = torch.float32
SIZES = (1, 3, LEAF - 1, LEAF, LEAF + 1, 2 * LEAF + 77, 3 * LEAF)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)


class Kept:
    """A sink that keeps rows in memory, each handed out in pieces of odd length."""

    def __init__(self, made: Plan, piece: int = 5000) -> None:
        self.rows = [bytearray(row.nbytes) for row in made.rows]
        self.piece = piece
        self.done: dict[int, tuple[str, Mapping[str, str]]] = {}
        self.handed = [0] * len(made.rows)
        self.final = [0] * len(made.rows)
        self.lock = threading.Lock()

    def memory(self, row: int, start: int, stop: int) -> list[memoryview]:
        with self.lock:
            self.handed[row] += stop - start
        whole, step = memoryview(self.rows[row]), max(self.piece // 8 * 8, 8)
        return [whole[first : min(first + step, stop)] for first in range(start, stop, step)]

    def filled(self, row: int, start: int, stop: int) -> None:
        with self.lock:
            self.final[row] += stop - start

    def row_done(self, row: int, digest: str, inputs: Mapping[str, str]) -> None:
        with self.lock:
            assert row not in self.done
            assert self.final[row] == len(self.rows[row]), "all bytes are final before the row is done"
            self.done[row] = (digest, inputs)


def paths_of(made: Plan) -> dict[tuple[str, str], Path]:
    return {
        (name, file): model.folder.local([file])[file] for name, model in made.models.items() for file in model.files
    }


def executed(made: Plan, **options: Any) -> Kept:
    sink = Kept(made)
    execute(made, paths_of(made), sink, **{"threads": 2, "memory": 2**26, **options})
    return sink


def recipe_of(tmp_path: Path, models: Mapping[str, Any], nodes: Mapping[str, Any], **rest: Any) -> Recipe:
    """A recipe over models that are given as tensors."""
    entries: dict[str, Any] = {}
    for name, model in models.items():
        if isinstance(model, Mapping):
            save(tmp_path / name, model)
        entries[name] = f"./{name}"
    return Recipe(folder=tmp_path, models=entries, nodes=dict(nodes), **rest)


def merged(
    tmp_path: Path, models: Mapping[str, Any], nodes: Mapping[str, Any], out: str = "out", **rest: Any
) -> dict[str, Tensor]:
    options = {key: rest.pop(key) for key in ("threads", "memory", "reading", "device") if key in rest}
    run(recipe_of(tmp_path, models, nodes, **rest), tmp_path / out, **{"threads": 2, **options})
    return weights_of(tmp_path / out)


def noise(seed: int, *shape: int, dtype: torch.dtype = F) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype)


def models_of(
    names: str, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = F
) -> dict[str, dict[str, Tensor]]:
    return {
        name: {key: noise(100 * i + j, *shape, dtype=dtype) for j, (key, shape) in enumerate(shapes.items())}
        for i, name in enumerate(names)
    }


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts so small that a few hundred thousand elements cross segments and blocks, and batches of rows end soon."""
    monkeypatch.setattr(executing, "SEGMENT", 2 * LEAF)
    monkeypatch.setattr(executing, "PIECE", 2 * LEAF)
    monkeypatch.setattr(executing, "SMALL", 1000)
    monkeypatch.setattr(executing._Cpu, "block", LEAF)
    monkeypatch.setattr(executing._Staged, "block", 2 * LEAF)


# What ops give, written again in numpy's float64


def wide(tensor: Tensor) -> numpy.ndarray[Any, Any]:
    return tensor.double().numpy()


def delta(tensor: Tensor, base: Tensor) -> numpy.ndarray[Any, Any]:
    """Rounded to float32 as a run rounds it, unless one is float64: which entries are largest depends on it."""
    kind = torch.float64 if torch.float64 in (tensor.dtype, base.dtype) else torch.float32
    return (tensor.to(kind) - base.to(kind)).double().numpy()


def linear(tensors: Sequence[Tensor], weights: Sequence[float], normalize: bool = True) -> numpy.ndarray[Any, Any]:
    total = sum(w * wide(t) for w, t in zip(weights, tensors, strict=True))
    return total / sum(weights) if normalize else numpy.asarray(total)


def slerp(first: Tensor, second: Tensor, t: float) -> numpy.ndarray[Any, Any]:
    a, b = wide(first), wide(second)
    cosine = (a * b).sum() / ((numpy.sqrt((a * a).sum()) or 1) * (numpy.sqrt((b * b).sum()) or 1))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = numpy.arccos(cosine)
    return (numpy.sin((1 - t) * angle) * a + numpy.sin(t * angle) * b) / numpy.sin(angle)


def trim(values: numpy.ndarray[Any, Any], density: float) -> numpy.ndarray[Any, Any]:
    flat = values.reshape(-1)
    kept = numpy.zeros_like(flat)
    if flat.size:
        largest = numpy.argsort(-numpy.abs(flat), kind="stable")[: max(1, int(density * flat.size))]
        kept[largest] = flat[largest]
    return kept.reshape(values.shape)


def ties(base: Tensor, models: Sequence[Tensor], density: float, weights: Sequence[float]) -> numpy.ndarray[Any, Any]:
    parts = [w * trim(delta(m, base), density) for m, w in zip(models, weights, strict=True)]
    sign = numpy.where(sum(parts) >= 0, 1.0, -1.0)
    agree = [(p * sign > 0) for p in parts]
    divisor = sum(a * w for a, w in zip(agree, weights, strict=True))
    total = sum(numpy.where(a, p, 0.0) for a, p in zip(agree, parts, strict=True))
    return wide(base) + numpy.where(divisor > 0, total / numpy.where(divisor > 0, divisor, 1.0), 0.0)


ROUNDING = {
    torch.float64: 2**-46,
    torch.float32: 2**-20,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
    torch.float8_e4m3fn: 2**-3,
    torch.float8_e5m2: 2**-2,
}


def assert_close(got: Tensor, right: numpy.ndarray[Any, Any], what: str = "") -> None:
    assert tuple(got.shape) == right.shape, what
    near = ROUNDING[got.dtype]
    error = numpy.abs(wide(got) - right)
    assert (error <= near * (numpy.abs(right) + 1)).all(), f"{what}: off by {error.max()}"


SHAPES = {f"n{size}": (size,) for size in SIZES} | {
    "matrix": (301, 457),
    "scalar": (),
    "empty": (0, 7),
    "row": (1, 1, 5),
}
DELTA = {"op": "task_vector", "base": "a", "model": "b"}
NODES: dict[str, tuple[dict[str, Any], Callable[..., numpy.ndarray[Any, Any]]]] = {
    "linear": (
        {"op": "linear", "inputs": [{"model": "a", "weight": 0.3}, {"model": "b", "weight": 0.9}, "c"]},
        lambda a, b, c: linear([a, b, c], [0.3, 0.9, 1.0]),
    ),
    "linear, not normalized": (
        {"op": "linear", "inputs": ["a", "b"], "weight": 0.4, "normalize": False},
        lambda a, b, c: linear([a, b], [0.4, 0.4], False),
    ),
    "slerp": ({"op": "slerp", "inputs": ["a", "b"], "t": 0.3}, lambda a, b, c: slerp(a, b, 0.3)),
    "task_arithmetic": (
        {"op": "task_arithmetic", "base": "a", "inputs": [{"model": "b", "weight": 0.5}, "c"], "scale": 0.7},
        lambda a, b, c: wide(a) + 0.7 * (0.5 * (wide(b) - wide(a)) + wide(c) - wide(a)),
    ),
    "ties": (
        {"op": "ties", "base": "a", "inputs": [{"model": "b", "weight": 0.5}, "c"], "density": 0.3},
        lambda a, b, c: ties(a, [b, c], 0.3, [0.5, 1.0]),
    ),
    "task_vector": (DELTA, lambda a, b, c: wide(b) - wide(a)),
    "add": (
        {"op": "add", "base": "c", "inputs": [{"model": DELTA, "weight": 0.5}]},
        lambda a, b, c: wide(c) + 0.5 * (wide(b) - wide(a)),
    ),
    "scale": ({"op": "scale", "model": "a", "by": -1.5}, lambda a, b, c: -1.5 * wide(a)),
    "cast": ({"op": "cast", "model": "a", "to": "bfloat16"}, lambda a, b, c: wide(a.bfloat16())),
    "passthrough": ({"op": "passthrough", "model": "b"}, lambda a, b, c: wide(b)),
    "select": ({"op": "select", "rules": [{"match": "n*", "model": "c"}, {"model": "a"}]}, None),
}  # type: ignore[dict-item]


@pytest.mark.parametrize("op", NODES)
@pytest.mark.usefixtures("small")
def test_each_op_gives_through_files_what_numpy_gives(op: str, tmp_path: Path) -> None:
    node, right = NODES[op]
    models = models_of("abc", SHAPES)
    got = merged(tmp_path, models, {"m": node})
    assert got.keys() == SHAPES.keys()
    for name in SHAPES:
        a, b, c = (models[model][name] for model in "abc")
        if op == "select":
            assert raw(got[name]) == raw(c if name.startswith("n") else a)
        else:
            assert_close(got[name], right(a, b, c), name)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op", ["linear", "slerp", "ties", "task_arithmetic"])
@pytest.mark.usefixtures("small")
def test_every_float_dtype_is_computed_wide_and_rounded_once(op: str, dtype: torch.dtype, tmp_path: Path) -> None:
    node, right = NODES[op]
    models = models_of("abc", {"w": (2 * LEAF + 5,), "s": (), "e": (0,)}, dtype)
    got = merged(tmp_path, models, {"m": node})
    for name in models["a"]:
        assert got[name].dtype == dtype
        assert_close(got[name], right(*(models[model][name] for model in "abc")), name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_mixed_dtypes_are_written_as_the_first_has_them_or_as_the_output_says(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = {
        model: {"w": noise(i, 1000, dtype=kind)}
        for i, (model, kind) in enumerate(zip("abc", (dtype, torch.float16, F), strict=True))
    }
    node = {"op": "linear", "inputs": ["a", "b", "c"]}
    right = linear([tensors[model]["w"] for model in "abc"], [1, 1, 1])
    first = merged(tmp_path, tensors, {"m": node})["w"]
    assert first.dtype == dtype
    assert_close(first, right)
    chosen = merged(tmp_path, tensors, {"m": node}, "other", output={"dtype": "float64"})["w"]
    assert chosen.dtype == torch.float64
    assert numpy.abs(wide(chosen) - right).max() < (1e-15 if dtype == torch.float64 else 1e-6)


def test_a_float64_input_makes_the_whole_expression_float64(tmp_path: Path) -> None:
    tiny = 2.0**-40
    models = {"a": {"w": torch.ones(5)}, "b": {"w": torch.full((5,), 1 + tiny, dtype=torch.float64)}}
    got = merged(tmp_path, models, {"d": {"op": "task_vector", "base": "a", "model": "b"}}, output={"dtype": "float64"})
    assert got["w"].tolist() == [tiny] * 5


def test_a_cast_without_an_op_rounds_straight_from_what_is_stored(tmp_path: Path) -> None:
    # By way of float32 this value would be rounded twice, the second time up from a tie that the first one made.
    value = 1 + 2.0**-11 - 2.0**-40
    got = merged(
        tmp_path,
        {"a": {"w": torch.tensor([value], dtype=torch.float64)}},
        {},
        output={"node": "a", "dtype": "float16"},
    )
    assert got["w"].dtype == torch.float16
    assert got["w"].item() == numpy.float16(value)


@pytest.mark.parametrize("stored", FLOATS, ids=str)
def test_a_copy_is_rounded_to_every_dtype_as_torch_rounds_it(stored: torch.dtype, tmp_path: Path) -> None:
    models = {"a": {"w": noise(1, 70_003, dtype=stored), "s": noise(2, dtype=stored), "e": noise(3, 0, dtype=stored)}}
    for dtype in FLOATS:
        name = str(dtype).removeprefix("torch.")
        got = merged(tmp_path, models, {}, name, output={"node": "a", "dtype": name})
        assert same(got, {key: tensor.to(dtype) for key, tensor in models["a"].items()})


UNTOUCHED = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
)


@pytest.mark.parametrize("op", ["linear", "slerp", "ties", "task_arithmetic", "task_vector", "scale", "cast"])
def test_integer_and_boolean_tensors_that_agree_come_through_as_they_are(op: str, tmp_path: Path) -> None:
    whole = {str(dtype): torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype) for dtype in UNTOUCHED}
    models = {model: {**whole, "w": noise(i, 10)} for i, model in enumerate("abc")}
    got = merged(tmp_path, models, {"m": NODES[op][0]})
    for name, tensor in whole.items():
        right = torch.zeros(2, 3).to(tensor.dtype) if op == "task_vector" else tensor
        assert got[name].dtype == tensor.dtype
        assert raw(got[name]) == raw(right), name


@pytest.mark.parametrize("dtype", UNTOUCHED, ids=str)
def test_integer_and_boolean_tensors_that_differ_are_refused_and_named(dtype: torch.dtype, tmp_path: Path) -> None:
    models = {
        "a": {"w": noise(1, 10), "count": torch.tensor([0, 1, 1]).to(dtype)},
        "b": {"w": noise(2, 10), "count": torch.tensor([0, 1, 0]).to(dtype)},
    }
    node = {"op": "linear", "inputs": ["a", "b"]}
    with pytest.raises(RecipeError, match=r"m: count: .*the inputs differ here. Choose one by a `select` rule"):
        merged(tmp_path, models, {"m": node})
    assert not (tmp_path / "out").exists()
    chosen = {"op": "select", "rules": [{"match": "count", "model": "b"}, {"model": "m"}]}
    got = merged(tmp_path, models, {"m": {**node, "only": "w", "others": {"model": "a"}}, "s": chosen})
    assert got["count"].tolist() == models["b"]["count"].tolist()


@pytest.mark.usefixtures("small")
def test_nested_nodes_measure_each_on_what_is_below_it(tmp_path: Path) -> None:
    models = models_of("abc", {"w": (5 * LEAF + 3,), "s": (), "e": (0,), "tiny": (4,)})
    for tensors in models.values():
        tensors["count"] = torch.arange(3 * LEAF)
    inner = {"op": "ties", "base": "a", "inputs": ["b", "c"], "density": 0.2}
    middle = {"op": "slerp", "inputs": [inner, "c"], "t": 0.4}
    outer = {"op": "linear", "inputs": [{"model": middle, "weight": 3}, "a"]}
    got = merged(tmp_path, models, {"m": outer})
    assert torch.equal(got.pop("count"), torch.arange(3 * LEAF))
    for name in got:
        a, b, c = (models[model][name] for model in "abc")
        first = torch.from_numpy(numpy.asarray(ties(a, [b, c], 0.2, [1, 1])))
        second = torch.from_numpy(numpy.asarray(slerp(first, c, 0.4)))
        assert_close(got[name], linear([second, a], [3, 1]), name)


@pytest.mark.usefixtures("small")
def test_what_several_outputs_share_is_read_once_and_the_same_in_each(tmp_path: Path) -> None:
    models = models_of("ab", {"w": (3 * LEAF,), "v": (10,)})
    nodes = {
        "mean": {"op": "linear", "inputs": ["a", "b"]},
        "twice": {"op": "scale", "model": "mean", "by": 2},
        "arc": {"op": "slerp", "inputs": ["mean", "twice"], "t": 0.5},
    }
    recipe = recipe_of(
        tmp_path, models, nodes, outputs={k: {"node": k} for k in nodes} | {"plain": {"node": "a", "dtype": "float64"}}
    )
    run(recipe, tmp_path / "out", threads=2)
    for name in models["a"]:
        a, b = models["a"][name], models["b"][name]
        mean = linear([a, b], [1, 1])
        got = {key: weights_of(tmp_path / "out" / key)[name] for key in (*nodes, "plain")}
        assert_close(got["mean"], mean)
        assert_close(got["twice"], 2 * mean)
        assert_close(got["arc"], 1.5 * mean)
        assert torch.equal(got["plain"], a.double())


class Ordered(Kept):
    """A sink that notes in which order rows are begun."""

    def __init__(self, made: Plan) -> None:
        super().__init__(made)
        self.order: dict[int, None] = {}

    def memory(self, row: int, start: int, stop: int) -> list[memoryview]:
        self.order.setdefault(row)
        return super().memory(row, start, stop)


MIXED = {f"t{i}": noise(i, 2 * LEAF + i, dtype=(torch.bfloat16, F)[i % 2]) for i in range(12)}


@pytest.mark.usefixtures("small")
def test_rows_of_several_outputs_over_one_tensor_follow_each_other(tmp_path: Path) -> None:
    other = {name: tensor + 1 for name, tensor in MIXED.items()}
    nodes = {
        "mean": {"op": "linear", "inputs": ["a", "b"]},
        "late": {"op": "scale", "model": "b", "by": 3},
        "twice": {"op": "scale", "model": "a", "by": 2},
    }
    outputs = {key: {"node": key} for key in nodes}
    made = plan(recipe_of(tmp_path, {"a": MIXED, "b": other}, nodes, outputs=outputs))
    sink = Ordered(made)
    execute(made, paths_of(made), sink, threads=1)
    order = [(made.rows[index].output, made.rows[index].name) for index in sink.order]
    of_a, of_b = (made.models[name].tensors.values() for name in "ab")
    by_place = [[tensor.name for tensor in sorted(of, key=lambda one: one.begin)] for of in (of_a, of_b)]
    assert order == [
        *((output, name) for name in by_place[0] for output in ("mean", "twice")),
        *(("late", name) for name in by_place[1]),
    ]
    assert sink.rows == executed(made).rows


@pytest.mark.usefixtures("small")
def test_one_output_of_one_dtype_is_written_in_the_order_of_its_shards(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.w": noise(i, LEAF + i) for i in range(12)}
    (tmp_path / "a").mkdir()
    save_sharded(tmp_path / "a", tensors, 3)
    save(tmp_path / "b", tensors)
    made = plan(recipe_of(tmp_path, {"a": "a", "b": "b"}, {"m": {"op": "linear", "inputs": ["a", "b"]}}))
    sink = Ordered(made)
    execute(made, paths_of(made), sink, threads=1)
    places = [(made.rows[index].shard, made.rows[index].offset) for index in sink.order]
    assert len(made.shards) == 3 and places == sorted(places) and len(places) == 12


@pytest.mark.usefixtures("small")
def test_memory_of_the_writer_stays_bounded_for_outputs_whose_shards_have_another_order(tmp_path: Path) -> None:
    other = {name: tensor + 1 for name, tensor in MIXED.items()}
    nodes = {"mean": {"op": "linear", "inputs": ["a", "b"]}, "twice": {"op": "scale", "model": "a", "by": 2}}
    outputs = {key: {"node": key, "shard_size": "1GB"} for key in nodes}
    (tmp_path / "a").mkdir()
    save_sharded(tmp_path / "a", MIXED, 3)
    made = plan(recipe_of(tmp_path, {"a": "a", "b": other}, nodes, outputs=outputs))
    assert len(made.shards) == 2
    order: dict[int, None] = {}
    most = 0

    class Watched(Kept):
        def memory(self, row: int, start: int, stop: int) -> list[memoryview]:
            nonlocal most
            order.setdefault(row)
            pieces = staging.memory(row, start, stop)
            most = max(most, staging._made)
            return pieces

        def filled(self, row: int, start: int, stop: int) -> None:
            staging.filled(row, start, stop)

        def row_done(self, row: int, digest: str, inputs: Mapping[str, str]) -> None:
            staging.row_done(row, digest, inputs)

    size = 2**18
    with Staging.open(
        tmp_path / "out", digest="d", parts={}, shards=made.shards, rows=made.rows, pool_bytes=0, extent_bytes=size
    ) as staging:
        execute(made, paths_of(made), Watched(made), threads=2)
        staging.publish()
    assert sum(shard.size for shard in made.shards) > 30 * size and most <= 12
    offsets = [made.rows[index].offset for index in order if made.rows[index].output == "mean"]
    assert offsets != sorted(offsets), "holes were left, and filled later"
    right = executed(made).rows
    for index, row in enumerate(made.rows):
        shard = made.shards[row.shard]
        data = (tmp_path / "out" / shard.output / shard.file).read_bytes()
        assert data[row.offset : row.offset + row.nbytes] == right[index]


def test_sizes_around_the_real_cuts(tmp_path: Path) -> None:
    shapes = {
        f"{name}{shift:+}": (size + shift,)
        for name, size in (("block", executing.LARGEST_BLOCK), ("segment", executing.SEGMENT))
        for shift in (-1, 0, 1)
    }
    models = models_of("ab", shapes, torch.bfloat16)
    got = merged(tmp_path, models, {"m": {"op": "slerp", "inputs": ["a", "b"], "t": 0.25}})
    for name in shapes:
        assert_close(got[name], slerp(models["a"][name], models["b"][name], 0.25), name)


# The same bits, however the work is cut

EVERYTHING = {
    "m": {
        "op": "linear",
        "inputs": [
            {
                "op": "slerp",
                "inputs": [{"op": "ties", "base": "a", "inputs": ["b", "c"], "density": 0.3, "rescale": "l2"}, "b"],
                "t": 0.6,
            },
            {"op": "task_arithmetic", "base": "a", "inputs": ["b", {"op": "task_vector", "base": "c", "model": "b"}]},
            {"op": "cast", "model": "c", "to": "float16"},
        ],
    }
}
SPREAD = {"w": (7 * LEAF + 11,), "x": (999, 401), "s": (), "e": (0, 3), "y": (LEAF,)} | {
    f"t{i}": (i,) for i in range(40)
}


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe]:
    folder = tmp_path_factory.mktemp("spread")
    models = models_of("abc", SPREAD, torch.bfloat16)
    return folder, recipe_of(folder, models, EVERYTHING)


@pytest.fixture(scope="module")
def right(spread: tuple[Path, Recipe]) -> tuple[list[bytes], dict[int, Any]]:
    made = plan(spread[1])
    sink = executed(made, threads=1, memory=2**31)
    return [bytes(row) for row in sink.rows], sink.done


@pytest.mark.parametrize(
    "options",
    [
        {"threads": 1, "memory": 2**20},
        {"threads": 2, "memory": 2**31},
        {"threads": 4, "memory": 2**22},
        {"threads": 3, "reading": "pread"},
        {"threads": 2, "reading": "mmap", "drop_behind": True},
        {"threads": 2, "device": "staged:cpu"},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
@pytest.mark.parametrize("cuts", ["small cuts", "real cuts"])
def test_threads_memory_reading_device_and_cuts_change_no_bit(
    cuts: str,
    options: dict[str, Any],
    spread: tuple[Path, Recipe],
    right: tuple[list[bytes], dict[int, Any]],
    request: pytest.FixtureRequest,
) -> None:
    if cuts == "small cuts":
        request.getfixturevalue("small")
    sink = executed(plan(spread[1]), **options)
    assert [bytes(row) for row in sink.rows] == right[0]
    assert sink.done.keys() == right[1].keys()
    if cuts == "real cuts":  # the pieces of digests are real too
        assert sink.done == right[1]


@pytest.mark.parametrize("block", [LEAF, 2 * LEAF, 4 * LEAF, 16 * LEAF])
def test_the_length_of_blocks_changes_no_bit(
    block: int, spread: tuple[Path, Recipe], right: tuple[list[bytes], dict[int, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executing._Cpu, "block", block)
    assert [bytes(row) for row in executed(plan(spread[1])).rows] == right[0]


def test_digests_are_those_of_the_bytes_and_every_input_is_named_once(
    spread: tuple[Path, Recipe], right: tuple[list[bytes], dict[int, Any]]
) -> None:
    made = plan(spread[1])
    rows, done = right
    named: list[str] = []
    for index, row in enumerate(made.rows):
        tensor = torch.frombuffer(bytearray(rows[index]), dtype=torch.bfloat16) if rows[index] else torch.empty(0)
        assert done[index][0] == digest_of(tensor.to(torch.bfloat16).reshape(row.shape))
        named += done[index][1]
    assert sorted(named) == sorted(f"{model}/{name}" for model in "abc" for name in SPREAD)
    stored = {model: weights_of(spread[0] / model) for model in "abc"}
    for _, inputs in done.values():
        for key, digest in inputs.items():
            model, _, name = key.partition("/")
            assert digest == digest_of(stored[model][name])


def test_rows_finished_before_are_left_alone_and_the_others_have_the_same_bits(
    spread: tuple[Path, Recipe], right: tuple[list[bytes], dict[int, Any]]
) -> None:
    made = plan(spread[1])
    before = {index: None for index in range(0, len(made.rows), 2)}
    sink = Kept(made)
    report = execute(made, paths_of(made), sink, finished=before, threads=2)
    assert sink.done.keys() == set(range(1, len(made.rows), 2))
    assert all(not sink.handed[index] for index in before)
    assert all(bytes(sink.rows[index]) == right[0][index] for index in sink.done)
    assert report.bytes_out == sum(made.rows[index].nbytes for index in sink.done)


def test_one_file_and_shards_of_the_same_tensors_give_the_same_bits(
    spread: tuple[Path, Recipe], right: tuple[list[bytes], dict[int, Any]], tmp_path: Path
) -> None:
    whole = plan(spread[1])
    for i, model in enumerate("abc"):
        save_sharded(tmp_path / model, weights_of(spread[0] / model), 3 + i)
    made = plan(recipe_of(tmp_path, {"a": None, "b": None, "c": None}, EVERYTHING))
    sink = executed(made)
    by_name = {row.name: right[0][index] for index, row in enumerate(whole.rows)}
    assert {row.name: bytes(sink.rows[index]) for index, row in enumerate(made.rows)} == by_name


# Ops that only tests have: a tensor as a whole, a measure over several tensors


class Sorted(Op):
    """Sorts the rows of a matrix, which takes the whole tensor in its own shape."""

    name: ClassVar[str] = "sorted"
    formula: ClassVar[str] = "sort(theta)"
    cut: ClassVar[Any] = "tensor"

    def compute(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        assert block.start == 0
        return inputs[0].sort(dim=0).values if inputs[0].ndim else inputs[0]


class Centred(Op):
    """Subtracts the mean over all tensors that are measured."""

    name: ClassVar[str] = "centred"
    formula: ClassVar[str] = "theta - mean"

    def reduction(self, known: tuple[Any, ...]) -> Reduction | None:
        return [_Sum(), _Count(), None][len(known)]

    def compute(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        total, count = block.measured
        return inputs[0] - total / count


@dataclass(frozen=True)
class _Sum(Reduction):
    def block(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        return torch.stack([leaf.double().sum() for leaf in inputs[0].split(LEAF)])

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))

    def finish(self, total: Tensor) -> Any:
        return sum(total.tolist())


class _Count(_Sum):
    def block(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        return torch.tensor([inputs[0].numel()])

    def finish(self, total: Tensor) -> Any:
        return int(total.sum())


def plan_by_hand(
    folder: Path,
    expressions: Mapping[str, Callable[[Mapping[str, Load]], Expression]]
    | Callable[[Mapping[str, Load]], Mapping[str, Expression]],
) -> Plan:
    """A plan of one model `a`, whose rows are made by hand from the loads of its tensors."""
    model = open_checkpoint(locate(str(folder), relative_to=folder))
    loads = {name: Load("a", tensor) for name, tensor in model.tensors.items()}
    made = expressions(loads) if callable(expressions) else {k: make(loads) for k, make in expressions.items()}
    rows = [
        Row("", "m", name, expression, BY_NAME["float32"], loads[name].tensor.shape, 0, 0, BY_NAME["float32"])
        for name, expression in made.items()
    ]
    return Plan("hand", {}, {"a": model}, tuple(rows), (), ())


def values(sink: Kept, made: Plan) -> dict[str, Tensor]:
    return {
        row.name: torch.frombuffer(data, dtype=F).reshape(row.shape) if data else torch.empty(row.shape)
        for row, data in zip(made.rows, sink.rows, strict=True)
    }


@pytest.mark.parametrize("device", ["cpu", "staged:cpu"])
@pytest.mark.usefixtures("small")
def test_an_op_on_whole_tensors_gets_them_whole_and_in_shape(device: str, tmp_path: Path) -> None:
    tensors = {"big": noise(1, 1000, 300), "s": noise(2), "e": noise(3, 0, 4), "t": noise(4, 3, 2, 2)}
    save(tmp_path / "a", tensors)
    made = plan_by_hand(
        tmp_path / "a",
        lambda loads: {
            n: Apply(Linear(normalize=False, weight=2.0).resolved(((2.0,), False)), (Apply(Sorted(), (load,)),))
            for n, load in loads.items()
        },
    )
    got = values(executed(made, device=device), made)
    for name, tensor in tensors.items():
        assert torch.equal(got[name], 2 * (tensor.sort(dim=0).values if tensor.ndim else tensor)), name


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("device", ["cpu", "staged:cpu"])
@pytest.mark.usefixtures("small")
def test_a_measure_over_several_tensors_is_taken_once_for_all_rows(threads: int, device: str, tmp_path: Path) -> None:
    shapes = {"w": (5 * LEAF + 3,), "x": (300, 401), "s": (), "e": (0,), **{f"t{i}": (9,) for i in range(20)}}
    tensors = models_of("a", shapes)["a"]
    save(tmp_path / "a", tensors)
    op, calls = Centred(), []

    def rows(loads: Mapping[str, Load]) -> Mapping[str, Expression]:
        measure = Measure(op, tuple((load,) for load in loads.values()))
        return {name: Apply(op, (load,), measure) for name, load in loads.items()}

    made = plan_by_hand(tmp_path / "a", rows)
    mean = sum(wide(t).sum() for t in tensors.values()) / sum(t.numel() for t in tensors.values())
    sink = executed(made, threads=threads, device=device, progress=lambda i, o: calls.append((i, o)))
    got = values(sink, made)
    for name, tensor in tensors.items():
        assert_close(got[name], wide(tensor) - mean, name)
    size = sum(4 * t.numel() for t in tensors.values())
    assert sum(i for i, _ in calls) == 3 * size, "two rounds of the measure and the rows: each reads every byte once"
    assert sum(o for _, o in calls) == size


@pytest.mark.usefixtures("small")
def test_measures_over_several_tensors_stand_on_measures_below_them(tmp_path: Path) -> None:
    """The outer mean is over tensors each trimmed by its own threshold and centred by an inner mean of all."""
    tensors = models_of("a", {"w": (3 * LEAF + 3,), "x": (101, 50), "y": (77,)})["a"]
    zeros = {f"zero.{name}": torch.zeros_like(tensor) for name, tensor in tensors.items()}
    save(tmp_path / "a", {**tensors, **zeros})
    trimming = Ties(density=0.1).resolved(((1.0,), (0.1,), True, 1.0))
    inner, outer = Centred(), Centred()

    def rows(loads: Mapping[str, Load]) -> Mapping[str, Expression]:
        trimmed: dict[str, Expression] = {}
        for name in tensors:
            inputs = (loads[f"zero.{name}"], loads[name])
            trimmed[name] = Apply(trimming, inputs, Measure(trimming, (inputs,)))
        first = Measure(inner, tuple((one,) for one in trimmed.values()))
        centred = {name: Apply(inner, (one,), first) for name, one in trimmed.items()}
        # The first row's program does not hold all that the outer measure stands on.
        second = Measure(outer, tuple((one,) for one in [*list(centred.values())[1:], trimmed["w"]]))
        return {name: Apply(outer, (loads[name],), second) for name in tensors} | {
            f"zero.{name}": one for name, one in centred.items()
        }

    made = plan_by_hand(tmp_path / "a", rows)
    got = values(executed(made), made)
    cut = {name: trim(wide(tensor), 0.1) for name, tensor in tensors.items()}
    mean = sum(c.sum() for c in cut.values()) / sum(c.size for c in cut.values())
    level = {name: c - mean for name, c in cut.items()}
    measured = [*list(level.values())[1:], cut["w"]]
    top = sum(m.sum() for m in measured) / sum(m.size for m in measured)
    for name, tensor in tensors.items():
        assert_close(got[f"zero.{name}"], level[name], name)
        assert_close(got[name], wide(tensor) - top, name)


# Numbers that are none


def planted(dtype: torch.dtype = F, size: int = 3 * LEAF) -> dict[str, dict[str, Tensor]]:
    models = models_of("abc", {"w": (size,), "fine": (100,)}, dtype)
    models["b"]["w"][[7, LEAF + 5, size - 1]] = float("nan")
    models["b"]["w"][[9, 11]] = float("-inf")
    return models


@pytest.mark.parametrize("op", [op for op in NODES if op not in ("cast", "scale", "select", "passthrough")])
@pytest.mark.parametrize("dtype", [F, torch.float16], ids=str)
@pytest.mark.usefixtures("small")
def test_a_nan_or_inf_in_an_input_is_counted_and_its_tensor_named(op: str, dtype: torch.dtype, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, planted(dtype), {"m": NODES[op][0]})
    with pytest.raises(NumericError) as caught:
        run(recipe, tmp_path / "out", threads=2)
    assert str(caught.value) == (
        "m: w: 'w' of 'b' has 3 NaN and 2 Inf. Mend the checkpoint, or write `non_finite: keep` under `output:`."
    )
    assert caught.value.exit_code == 6
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "node",
    [
        {"op": "cast", "model": "b", "to": "float16"},
        {"op": "cast", "model": "b", "to": "float8_e4m3fn"},
        {"op": "scale", "model": "b", "by": 0.5},
        {"op": "scale", "model": "b", "by": 0.0},
        {"op": "passthrough", "model": "b"},
        {"op": "select", "rules": [{"model": "b"}]},
        {"op": "linear", "inputs": [{"model": "b", "weight": 0.0}, "a"]},
        {"op": "task_arithmetic", "base": "a", "inputs": ["c", {"model": "b", "weight": 0.0}]},
    ],
    ids=str,
)
def test_a_nan_is_found_also_where_it_is_only_copied_rounded_or_of_no_weight(node: Any, tmp_path: Path) -> None:
    with pytest.raises(NumericError, match="'w' of 'b' has 3 NaN and 2 Inf"):
        merged(tmp_path, planted(), {"m": node})


@pytest.mark.parametrize("where", ["base", "input"])
def test_a_nan_that_trim_and_vote_would_hide_is_found(where: str, tmp_path: Path) -> None:
    models = models_of("abc", {"w": (1000,)})
    target = models["a" if where == "base" else "b"]["w"]
    target[5] = float("nan")
    nodes = {"m": {"op": "ties", "base": "a", "inputs": ["b", {"model": "c", "weight": 0}], "density": 0.01}}
    with pytest.raises(NumericError, match=f"'w' of '{'a' if where == 'base' else 'b'}' has 1 NaN"):
        merged(tmp_path, models, nodes)


@pytest.mark.usefixtures("small")
def test_every_row_that_is_not_finite_is_reported_together(tmp_path: Path) -> None:
    models = models_of("ab", {f"t{i}": (LEAF * (i % 3) + 10,) for i in range(12)})
    for i in (1, 4, 7):
        models["a"][f"t{i}"][3] = float("nan")
        models["b"][f"t{i}"][:i] = float("inf")
    recipe = recipe_of(tmp_path, models, {"m": {"op": "linear", "inputs": ["a", "b"]}})
    with pytest.raises(Problems) as caught:
        run(recipe, tmp_path / "out", threads=2)
    assert caught.value.exit_code == 6
    assert sorted(str(error) for error in caught.value.errors) == [
        f"m: t{i}: 't{i}' of 'a' has 1 NaN; 't{i}' of 'b' has {i} Inf. "
        "Mend the checkpoint, or write `non_finite: keep` under `output:`."
        for i in (1, 4, 7)
    ]
    assert not (tmp_path / "out").exists()


def test_memory_of_rows_that_are_not_finite_is_given_back(tmp_path: Path) -> None:
    models = models_of("a", {f"t{i}": (100,) for i in range(30)})
    for tensor in models["a"].values():
        tensor[0] = float("nan")
    made = plan(recipe_of(tmp_path, models, {"m": {"op": "scale", "model": "a", "by": 2}}))
    sink = Kept(made)
    with pytest.raises(Problems):
        execute(made, paths_of(made), sink, threads=2)
    assert sink.final == sink.handed, "else a staging folder would hold a buffer for each of them"
    assert not sink.done


@pytest.mark.parametrize(
    ("dtype", "fits", "over"),
    [
        ("float16", [65504.0, -65504.0, 65519.0], [65520.0, -65520.0, 70000.0, 3e38]),
        ("bfloat16", [3.3895313892515355e38, 3.39e38], [3.4e38, -3.4028234663852886e38]),
        ("float8_e4m3fn", [448.0, -448.0, 440.0], [465.0, -500.0, 1e9]),
        ("float8_e5m2", [57344.0, -57344.0], [61441.0, -70000.0, 1e9]),
    ],
)
@pytest.mark.parametrize("way", ["output", "cast", "copy"])
def test_what_overflows_the_output_dtype_is_an_error_and_what_rounds_to_its_largest_is_not(
    dtype: str, fits: list[float], over: list[float], way: str, tmp_path: Path
) -> None:
    nodes: dict[str, Any] = {"m": {"op": "scale", "model": "a", "by": 1.0}}
    output: dict[str, Any] = {"dtype": dtype}
    if way == "cast":
        nodes, output = {"m": {"op": "cast", "model": "a", "to": dtype}}, {}
    elif way == "copy":
        nodes, output = {}, {"node": "a", "dtype": dtype}
    kind = getattr(torch, dtype)
    good = merged(tmp_path / "good", {"a": {"w": torch.tensor(fits)}}, nodes, output=output)["w"]
    assert good.dtype == kind
    assert good.float().isfinite().all()
    for number in over:
        folder = tmp_path / str(number)
        with pytest.raises(NumericError, match=rf"w: 1 value overflows {dtype} \(its largest is .*\)\. Write a wider"):
            merged(folder, {"a": {"w": torch.tensor([1.0, number])}}, nodes, output=output)
        assert not (folder / "out").exists()
        kept = merged(
            folder, {"a": {"w": torch.tensor([1.0, number])}}, nodes, "kept", output={**output, "non_finite": "keep"}
        )
        assert kept["w"].float()[0] == 1


def test_what_is_not_finite_can_be_kept(tmp_path: Path) -> None:
    models = planted()
    got = merged(tmp_path, models, {"m": {"op": "linear", "inputs": ["a", "b"]}}, output={"non_finite": "keep"})["w"]
    assert int(got.isnan().sum()) == 3
    assert int(got.isinf().sum()) == 2


def test_an_overflow_on_the_way_that_no_input_explains_is_an_overflow(tmp_path: Path) -> None:
    models = {"a": {"w": torch.full((10,), 3e38)}, "b": {"w": torch.full((10,), 3e38)}}
    with pytest.raises(NumericError, match="10 values overflow float32"):
        merged(tmp_path, models, {"m": {"op": "linear", "inputs": ["a", "b"], "normalize": False}})


# Files that are not as they should be


READING = pytest.mark.parametrize("reading", ["mmap", "pread"])


@READING
@pytest.mark.parametrize("shift", [0, 1, 2, 4, 7])
def test_tensors_that_lie_unaligned_in_their_file_are_read_right(reading: Any, shift: int, tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(5, dtype=torch.uint8),
        "w": noise(1, 70_001),
        "half": noise(2, 33, dtype=torch.float16),
        "odder": torch.ones(3, dtype=torch.bool),
        "wide": noise(3, 1001, dtype=torch.float64),
        "eight": noise(4, 7, dtype=torch.float8_e4m3fn),
        "long": torch.arange(9),
    }
    save(tmp_path / "a", tensors, shift=shift)
    save(tmp_path / "b", tensors, shift=7 - shift)
    got = merged(tmp_path, {"a": None, "b": None}, {"m": {"op": "linear", "inputs": ["a", "b"]}}, reading=reading)
    assert same(got, tensors), "the mean of two equal tensors is the tensor"


@READING
def test_shards_may_be_links_as_in_the_cache_of_a_hub(reading: Any, tmp_path: Path) -> None:
    tensors = models_of("a", {f"t{i}": (500, 30) for i in range(4)})["a"]
    cache = tmp_path / "models--org--a"
    save_sharded(cache / "blobs", tensors, 2)
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted((cache / "blobs").iterdir())):
        path.rename(path.with_name(str(number)))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    recipe = Recipe(models={"a": str(snapshot)}, nodes={"m": {"op": "scale", "model": "a", "by": 3}})
    got = weights_of(run(recipe, tmp_path / "out", reading=reading).path)
    assert same(got, {name: 3 * tensor for name, tensor in tensors.items()})


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace(path: Path) -> None:
    other = path.with_name("new")
    other.write_bytes(bytes(path.stat().st_size))
    os.replace(other, path)


def rewrite(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size - 2_000_000)
        file.write(b"\x7f" * 2_000_000)


def touch(path: Path) -> None:
    os.utime(path, ns=(0, 123_456_789))


@READING
@pytest.mark.parametrize("harm", [shorten, replace, rewrite, touch, os.unlink], ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("moment", ["first block", "measure"])
@pytest.mark.usefixtures("small")
def test_a_file_that_changes_while_it_is_read_is_an_error_that_names_it(
    moment: str, harm: Callable[[Path], None], reading: Any, tmp_path: Path
) -> None:
    models = models_of("ab", {f"t{i}": (3 * LEAF,) for i in range(8)})
    node = (
        {"op": "slerp", "inputs": ["a", "b"], "t": 0.5}
        if moment == "measure"
        else {"op": "linear", "inputs": ["a", "b"]}
    )
    recipe = recipe_of(tmp_path, models, {"m": node})
    victim = tmp_path / "b" / "model.safetensors"
    once = iter([True])

    def progress(what: str, done: int, total: int) -> None:
        if next(once, False):
            harm(victim)

    with pytest.raises(InputError) as caught:
        run(recipe, tmp_path / "out", reading=reading, threads=2, progress=progress)
    assert str(victim) in str(caught.value)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


@READING
@pytest.mark.parametrize("harm", [shorten, replace, rewrite], ids=lambda harm: harm.__name__)
def test_a_file_that_changes_after_it_was_planned_is_an_error_that_names_it(
    harm: Callable[[Path], None], reading: Any, tmp_path: Path
) -> None:
    models = models_of("ab", {"w": (600_000,)})
    recipe = recipe_of(tmp_path, models, {"m": {"op": "linear", "inputs": ["a", "b"]}})
    victim = tmp_path / "b" / "model.safetensors"
    with pytest.raises(InputError, match=r"model\.safetensors"):
        run(recipe, tmp_path / "out", reading=reading, threads=1, planned=lambda made: harm(victim))
    assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_opened_is_an_input_error(tmp_path: Path) -> None:
    models = models_of("a", {"w": (10,)})
    made = plan(recipe_of(tmp_path, models, {"m": {"op": "scale", "model": "a", "by": 2}}))
    paths = paths_of(made)
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: cannot open the file: No such file"):
        execute(made, paths, Kept(made))


@pytest.fixture
def few_files() -> Iterator[Callable[[int], None]]:
    """Let this process open only so many files more, until the test ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda more: resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + more, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def plan_of_many_shards(tmp_path: Path) -> Plan:
    (tmp_path / "a").mkdir()
    save_sharded(tmp_path / "a", {f"t{i}": noise(i, 10) for i in range(30)}, 30)
    return plan(recipe_of(tmp_path, {"a": "a"}, {"m": {"op": "scale", "model": "a", "by": 2}}))


def test_models_of_many_shards_open_as_many_files_as_the_machine_lets_them(
    tmp_path: Path, few_files: Callable[[int], None]
) -> None:
    made = plan_of_many_shards(tmp_path)
    few_files(20)
    assert len(executed(made).done) == 30


@READING
@pytest.mark.parametrize("more", [20, 21])
def test_too_many_open_files_are_an_error_of_the_machine_that_says_what_to_do(
    more: int, reading: Any, tmp_path: Path, few_files: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executing, "_allow_open_files", lambda: None)
    made = plan_of_many_shards(tmp_path)
    opened = len(os.listdir("/proc/self/fd"))
    few_files(more)
    with pytest.raises(MachineError, match=r"safetensors: cannot open the file: Too many open files\..*ulimit -n"):
        executed(made, reading=reading)
    assert len(os.listdir("/proc/self/fd")) == opened


@pytest.mark.parametrize("code", [errno.ENODEV, errno.ENOMEM])
def test_a_file_that_cannot_be_mapped_is_read_by_call(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan(recipe_of(tmp_path, models_of("abc", {"w": (LEAF + 1,)}), EVERYTHING))
    right = executed(made).rows

    def refused(*args: Any, **options: Any) -> Any:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(executing.mmap, "mmap", refused)
    assert executed(made, reading="mmap").rows == right


@READING
def test_a_file_that_became_empty_is_an_input_error_and_no_descriptor_stays_open(reading: Any, tmp_path: Path) -> None:
    made = plan(recipe_of(tmp_path, models_of("ab", {"w": (10,)}), {"m": {"op": "linear", "inputs": ["a", "b"]}}))
    os.truncate(tmp_path / "b" / "model.safetensors", 0)
    opened = len(os.listdir("/proc/self/fd"))
    with pytest.raises(InputError, match=r"b/model\.safetensors: the file (became empty|ends at byte)"):
        executed(made, reading=reading)
    assert len(os.listdir("/proc/self/fd")) == opened


def test_inputs_are_never_written_to_and_no_descriptor_stays_open(tmp_path: Path) -> None:
    models = models_of("abc", {"w": (LEAF + 1,)})
    recipe = recipe_of(tmp_path, models, EVERYTHING)
    made = plan(recipe)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    opened = len(os.listdir("/proc/self/fd"))
    for reading in ("mmap", "pread"):
        executed(made, reading=reading)
    assert len(os.listdir("/proc/self/fd")) == opened
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == before


@READING
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_tied_head_that_differs_in_one_element_is_refused(
    place: str, reading: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executing, "SEGMENT", 1000)
    embedding = noise(1, 64, 33)
    head = embedding.clone()
    tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": head, "x": noise(2, 3)}
    config = {"tie_word_embeddings": True, "vocab_size": 64}
    for model in "ab":
        save(tmp_path / model, tensors, config=config)
    nodes = {"m": {"op": "linear", "inputs": ["a", "b"]}}
    recipe = recipe_of(tmp_path, {"a": None, "b": None}, nodes)
    got = run(recipe, tmp_path / "equal", reading=reading)
    assert weights_of(got.path).keys() == {"model.embed_tokens.weight", "x"}
    head.view(-1)[0 if place == "first" else -1] += 1
    save(tmp_path / "b", tensors, config=config)
    with pytest.raises(RecipeError, match=r"the config of 'b' ties 'lm_head.weight'.*tied: untie"):
        run(recipe, tmp_path / "out", reading=reading)
    assert not (tmp_path / "out").exists()
    made = plan(recipe)
    with pytest.raises(RecipeError, match="stored values differ"):
        check_tied(made, paths_of(made), reading)


# Stopping


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.usefixtures("small")
def test_stop_ends_the_work_after_the_blocks_in_flight(threads: int, tmp_path: Path) -> None:
    models = models_of("ab", {f"t{i}": (4 * LEAF,) for i in range(10)})
    made = plan(recipe_of(tmp_path, models, {"m": {"op": "linear", "inputs": ["a", "b"]}}))
    stop, blocks = threading.Event(), []

    def progress(bytes_in: int, bytes_out: int) -> None:
        blocks.append(bytes_out)
        if len(blocks) == 5:
            stop.set()

    before = torch.get_num_threads()
    sink = Kept(made)
    with pytest.raises(Interrupted):
        execute(made, paths_of(made), sink, threads=threads, stop=stop, progress=progress)
    assert len(blocks) <= 5 + threads
    assert torch.get_num_threads() == before
    assert all(sink.final[row] == made.rows[row].nbytes for row in sink.done)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("method", ["memory", "filled", "row_done"])
def test_an_error_of_the_sink_ends_the_work_and_is_raised(method: str, threads: int, tmp_path: Path) -> None:
    models = models_of("a", {f"t{i}": (LEAF + 10,) for i in range(20)})
    made = plan(recipe_of(tmp_path, models, {"m": {"op": "scale", "model": "a", "by": 2}}))

    class Broken(Kept):
        pass

    def fail(self: Any, *given: Any) -> None:
        raise MergeflowError("broken on purpose")

    setattr(Broken, method, fail)
    with pytest.raises(MergeflowError, match="broken on purpose"):
        execute(made, paths_of(made), Broken(made), threads=threads)
    assert not [t for t in threading.enumerate() if t.name.startswith("mergeflow-")]

"""Fingerprints: the estimate is as good as is said, the bits depend on nothing but the tensor, and a sink passes all through."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeflow.fingerprints import BLOCK, BUCKETS, CHUNK, STANDARD_ERROR, Fingerprint, Sketch, drift
from mergeflow.ops.draws import words

TORCH = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "int64": torch.int64,
}


def fingerprint(values: torch.Tensor, name: str = "layer.weight", cuts: tuple[int, ...] = ()) -> Fingerprint:
    """Of a whole tensor; `cuts` are places where the memory it lies in is broken."""
    sketch = Sketch(name)
    for start in range(0, len(values), CHUNK):
        piece = values[start : start + CHUNK]
        places = [0, *sorted(c - start for c in cuts if start < c < start + len(piece)), len(piece)]
        sketch.add(start, [piece[a:b] for a, b in pairwise(places)])
    return sketch.finish()


def by_definition(values: torch.Tensor, name: str) -> np.ndarray:
    """The 32 sums, element by element in float64, as the module's docstring says them."""
    from blake3 import blake3

    digest = blake3(b"mergeflow fingerprint\n" + name.encode()).digest(16)
    sign_key, block_key = (int.from_bytes(digest[n : n + 8], "little") for n in (0, 8))
    rows, groups = BLOCK // BUCKETS, 1024
    group_of = np.empty(rows, np.int64)
    order = np.argsort(words(0, 0, rows // 4).reshape(-1), kind="stable")
    group_of[order] = np.arange(rows) // (rows // groups)
    drawn = words(1, 0, groups * BUCKETS // 4).reshape(groups, BUCKETS)
    x = values.to(torch.float64).numpy()
    sums = np.zeros(BUCKETS)
    for block in range(-(-len(x) // BLOCK)):
        moved = int(words(block_key, block // 4, block // 4 + 1).reshape(-1)[block % 4]) % groups
        e = np.arange(min(BLOCK, len(x) - block * BLOCK))
        row, lane = e // BUCKETS, e % BUCKETS
        place = np.empty(row[-1] + 1, np.int64)  # among the rows that are there
        place[order[order <= row[-1]]] = np.arange(row[-1] + 1)
        bits = words(sign_key, block * rows // 128, (block + 1) * rows // 128).reshape(-1)
        sign = 1.0 - 2.0 * (bits[place[row] // 32] >> (place[row] % 32).astype(np.uint32) & 1)
        mark = drawn[group_of[row] ^ moved, lane]
        sign *= 1.0 - 2.0 * (mark >> 31)
        np.add.at(sums, mark >> 8 & 31, sign * x[block * BLOCK + e])
    return sums


@pytest.mark.parametrize("dtype", sorted(TORCH))
@pytest.mark.parametrize("size", [1, 33, 4096, BLOCK, 5 * BLOCK + 777])
def test_the_sums_are_those_of_the_definition(dtype: str, size: int) -> None:
    values = (torch.randn(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64) * 100).to(
        TORCH[dtype]
    )
    found = fingerprint(values)
    scale = float(values.double().norm()) or 1.0
    np.testing.assert_allclose(found.sums, by_definition(values, "layer.weight"), rtol=0, atol=1e-6 * scale)
    assert found.norm == pytest.approx(float(values.double().norm()), rel=1e-4)


CHANGES = {
    "noise": lambda n, g: torch.randn(n, generator=g),
    "a constant": lambda n, g: torch.ones(n),
    "a column of 64": lambda n, g: torch.zeros(n).index_fill_(0, torch.arange(5, n, 64), 1.0),
    "rank one": lambda n, g: torch.outer(torch.randn(n // 128 + 1, generator=g), torch.randn(128, generator=g)).reshape(
        -1
    )[:n],
    "the same again and again": lambda n, g: torch.randn(4096, generator=g).repeat(n // 4096 + 1)[:n],
}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("size", [1e-7, 1e-2, 1.0])
def test_a_drift_is_estimated_to_an_eighth_of_itself(kind: str, size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    count, trials = 200_333, 48
    ratios = []
    for trial in range(trials):
        old = torch.randn(count, generator=generator, dtype=torch.float64)
        new = old + size * CHANGES[kind](count, generator).double()
        true = float((new - old).norm() / old.norm())
        ratios.append(drift(fingerprint(old, f"t{trial}"), fingerprint(new, f"t{trial}")) / true)
    # Five standard errors of a mean and of a spread of so many trials.
    assert abs(np.mean(ratios) - 1) < 5 * STANDARD_ERROR / math.sqrt(trials)
    assert np.std(ratios) < STANDARD_ERROR * (1 + 5 / math.sqrt(2 * trials))


def test_rounding_of_bfloat16_is_told_from_a_change() -> None:
    old = torch.randn(300_000, generator=torch.Generator().manual_seed(3))
    rounded = old * (1 + 1e-7 * torch.randn(len(old), generator=torch.Generator().manual_seed(4)))
    assert drift(fingerprint(old), fingerprint(rounded)) < 1e-6
    assert drift(fingerprint(old), fingerprint(old * 1.01)) == pytest.approx(0.01, rel=0.5)
    assert drift(fingerprint(old.bfloat16()), fingerprint(old.bfloat16())) == 0.0


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300_000), st.lists(st.integers(1, 300_000), max_size=6), st.sampled_from(sorted(TORCH)))
def test_where_memory_is_broken_changes_no_bit(size: int, cuts: list[int], dtype: str) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(TORCH[dtype])
    assert fingerprint(values, cuts=tuple(sorted(set(cuts)))) == fingerprint(values)


def test_the_order_of_chunks_and_how_many_come_at_once_change_no_bit() -> None:
    values = torch.randn(2 * CHUNK + 12_345, generator=torch.Generator().manual_seed(0)).bfloat16()
    backwards = Sketch("layer.weight")
    for start in reversed(range(0, len(values), CHUNK)):
        backwards.add(start, [values[start : start + CHUNK]])
    whole = Sketch("layer.weight")
    whole.add(0, [values])
    assert backwards.finish() == whole.finish() == fingerprint(values)


def test_text_brings_the_same_fingerprint_back_and_other_text_is_refused() -> None:
    found = fingerprint(torch.randn(1000))
    assert Fingerprint.of_text(found.norm, found.text()) == found and len(found.text()) == 344
    for bad in ("", "AAAA", found.text()[:-4], "!" * 344):
        with pytest.raises(ValueError):
            Fingerprint.of_text(1.0, bad)


def test_values_that_no_norm_can_hold_are_told() -> None:
    good = fingerprint(torch.ones(100))
    assert math.isnan(drift(good, fingerprint(torch.full((100,), math.nan))))
    assert math.isnan(drift(good, fingerprint(torch.full((100,), math.inf))))
    assert drift(fingerprint(torch.zeros(100)), good) == math.inf
    assert drift(fingerprint(torch.zeros(100)), fingerprint(torch.zeros(100))) == 0.0
    large = torch.full((100,), 3e38, dtype=torch.bfloat16)
    assert fingerprint(large).norm == pytest.approx(float(large[0]) * 10, rel=1e-4)


def test_a_tensor_without_elements_has_a_fingerprint() -> None:
    assert Sketch("empty").finish() == Fingerprint(0.0, (0.0,) * BUCKETS)

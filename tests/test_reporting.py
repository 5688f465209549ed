"""A plan as text, as JSON and as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergeflow import pipeline
from mergeflow.checkpoint import encode_header
from mergeflow.dtypes import BY_NAME
from mergeflow.recipe import Recipe
from mergeflow.reporting import mermaid, plan_data, plan_text, size_text

NODES: dict[str, Any] = {
    "d": {"op": "task_vector", "base": "base", "model": "a"},
    "m": {"op": "ties", "base": "base", "inputs": ["d", {"model": "b", "density": 0.3}], "density": 0.5},
    "s": {"op": "select", "rules": [{"match": ["x.*", 'odd"<&'], "model": "a"}, "m"]},
}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    header, _ = encode_header([("x.w", BY_NAME["float32"], (1000,)), ("y", BY_NAME["float32"], (500,))], {})
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        with (tmp_path / name / "model.safetensors").open("wb") as file:
            file.write(header)
            file.truncate(len(header) + 6000)
    models = {name: f"./{name}" for name in ("base", "a", "b")}
    return Recipe(name="soup", models=models, nodes=NODES, folder=tmp_path)


def data_of(recipe: Recipe) -> dict[str, Any]:
    return plan_data(pipeline.plan(recipe), device="cpu", threads=2, peak=10_000_000, free=7_000_000_000)


def test_the_data_says_what_headers_can_tell(recipe: Recipe) -> None:
    data = data_of(recipe)
    assert json.loads(json.dumps(data)) == data
    assert data["name"] == "soup"
    assert {name: model["bytes"] for name, model in data["models"].items()} == dict.fromkeys(("base", "a", "b"), 6000)
    assert [row["name"] for row in data["rows"]] == ["x.w", "y"]
    assert data["rows"][0] == {
        "output": "",
        "name": "x.w",
        "dtype": "float32",
        "shape": [1000],
        "file": "model.safetensors",
        "expression": "a:x.w",
    }
    assert data["rows"][1]["expression"] == "ties(base:y, task_vector(base:y, a:y), task_vector(base:y, b:y))"
    assert data["bytes_in"] == 4000 + 3 * 2000  # one tensor is copied, the other needs three
    assert data["bytes_read"] >= data["bytes_in"]
    assert data["bytes_out"] == sum(
        file.get("bytes", 0) for file in data["files"] if file["file"] == "model.safetensors"
    )
    assert {"README.md"} <= {file["file"] for file in data["files"]}
    assert (data["threads"], data["peak_memory"], data["bytes_free"]) == (2, 10_000_000, 7_000_000_000)
    assert data["stages"] == []
    assert len(data["digest"]) == 64


def test_the_text_says_it_to_a_person(recipe: Recipe) -> None:
    text = plan_text(data_of(recipe), Path("out"))
    assert text.splitlines()[0] == "soup  ->  out"
    for words in (
        "2 tensors in 1 file",
        "makes    2 tensors",
        "1  ties",
        "1  as it is",
        "7.0 GB free",
        "10.0 MB at most",
    ):
        assert words in text
    assert "\x1b" not in plan_text({**data_of(recipe), "notes": ["\x1b[2J"]}, Path("out"))


def test_the_picture_has_models_nodes_and_outputs(recipe: Recipe) -> None:
    lines = mermaid(recipe).splitlines()
    assert lines[0] == "graph LR"
    assert '  n0[("base<br/>./base")]' in lines
    assert '  n4["m<br/>ties<br/>density 0.5 · 0.3"]' in lines
    assert "  n3 --> n4" in lines
    assert "  n0 -. base .-> n4" in lines
    assert '  n1 -->|"x.*, odd&quot;&lt;&amp;"| n5' in lines
    assert '  n5 --> o0(["soup"])' in lines
    assert len(lines) == len(set(lines))


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_400, "99.4 kB"), (99_600, "100 kB"), (999_400, "999 kB"),
        (999_600, "1.0 MB"), (2_200_000_000, "2.2 GB"), (5e12, "5.0 TB"),
    ],
)  # fmt: skip
def test_sizes_have_a_unit_that_fits(count: float, text: str) -> None:
    assert size_text(count) == text

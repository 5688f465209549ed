"""An op of another package: written, installed, tested and used as its author would, through the real command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from toys import environment, write_toys

FILES = {
    "pyproject.toml": """\
[build-system]
requires = ["setuptools>=70.1"]
build-backend = "setuptools.build_meta"

[project]
name = "mergeflow-midpoint"
version = "1.2.3"
dependencies = ["mergeflow"]

[project.entry-points."mergeflow.ops"]
midpoint = "mergeflow_midpoint:Midpoint"

[tool.setuptools]
py-modules = ["mergeflow_midpoint"]
""",
    "mergeflow_midpoint.py": '''\
"""`midpoint`: halfway between the least and the greatest of some models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergeflow.ops import Block, Op
from mergeflow.settings import Setting, Unit, setting

if TYPE_CHECKING:
    from torch import Tensor


class Midpoint(Op):
    """Go from the least to the greatest of the inputs, element by element.

    (1 - t) min_i theta_i + t max_i theta_i, for inputs of one shape.
    """

    name = "midpoint"
    formula = "(1 - t) min_i theta_i + t max_i theta_i"
    paper = "arXiv:0000.00000"

    t: Setting[Unit] = setting(0.5, "How far to go.")

    def compute(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        """(1 - t) min_i theta_i + t max_i theta_i"""
        import torch

        stacked = torch.stack(list(inputs))
        return stacked.amin(0) * (1 - float(self.t)) + stacked.amax(0) * float(self.t)
''',
    "test_midpoint.py": """\
from mergeflow.testing import OpConformance

from mergeflow_midpoint import Midpoint


class TestMidpoint(OpConformance):
    op = Midpoint
    averages = True
""",
}
RECIPE = """\
recipe: 1
name: between
models: {a: ./a, b: ./b}
nodes:
  merged:
    op: midpoint
    inputs: [a, b]
    t: [{match: "*.mlp.*", value: {gradient: [0.0, 1.0]}}, {value: 0.5}]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package's sources, its installation in `installed`, two toy models and a recipe."""
    folder = tmp_path_factory.mktemp("outside")
    source = folder / "source"
    source.mkdir()
    for name, text in FILES.items():
        (source / name).write_text(text)
    pytest.importorskip("setuptools", minversion="70.1", reason="the build backend, which torch asks for too")
    words = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    words += ["--target", str(folder / "installed"), str(source)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    write_toys(folder)
    (folder / "between.yaml").write_text(RECIPE)
    return folder


def mergeflow(place: Path, *words: str, installed: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command line in a process that has the package beside mergeflow, or with None does not have it."""
    env = environment()
    if installed is not None:
        env["PYTHONPATH"] = os.pathsep.join([str(installed), env["PYTHONPATH"]])
    command = [sys.executable, "-m", "mergeflow", *words]
    return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_without_the_package_the_op_is_unknown(place: Path) -> None:
    done = mergeflow(place, "validate", "between.yaml")
    assert done.returncode == 2 and "unknown op 'midpoint'" in done.stderr


def test_an_installed_op_is_in_the_table_and_has_its_page_and_its_schema(place: Path) -> None:
    installed = place / "installed"
    table = mergeflow(place, "ops", installed=installed)
    assert table.returncode == 0, table.stderr
    assert "midpoint" in table.stdout and "Go from the least to the greatest of the inputs" in table.stdout
    row = next(
        line
        for line in mergeflow(place, "ops", "--markdown", installed=installed).stdout.splitlines()
        if "`midpoint`" in line
    )
    assert "`t=0.5`" in row and "https://arxiv.org/abs/0000.00000" in row
    page = mergeflow(place, "ops", "midpoint", installed=installed).stdout
    for words in ("(1 - t) min_i theta_i", "arXiv:0000.00000", "t  fraction in [0, 1]; default 0.5", "op: midpoint"):
        assert words in page
    schema = json.loads(mergeflow(place, "schema", installed=installed).stdout)
    node = schema["definitions"]["node.midpoint"]
    assert {"op", "inputs", "t"} <= node["properties"].keys()
    assert {"$ref": "#/definitions/node.midpoint"} in schema["definitions"]["node"]["oneOf"]


def test_a_recipe_with_an_installed_op_is_validated_planned_and_run(place: Path) -> None:
    import numpy as np
    from safetensors.numpy import load_file

    installed = place / "installed"
    assert mergeflow(place, "validate", "between.yaml", installed=installed).stdout == "between.yaml: good\n"
    wrong = place / "wrong.yaml"
    wrong.write_text(RECIPE.replace("value: 0.5}]", "value: 1.5}]"))
    done = mergeflow(place, "validate", "wrong.yaml", installed=installed)
    assert done.returncode == 2 and "less than or equal to 1" in done.stderr
    done = mergeflow(place, "run", "between.yaml", "-o", "out", "-q", installed=installed)
    assert done.returncode == 0, done.stderr
    a, b, made = (load_file(place / name / "model.safetensors") for name in ("a", "b", "out"))
    assert made.keys() == a.keys()
    for name, tensor in made.items():
        t = {"model.layers.0.mlp.weight": 0.0, "model.layers.1.mlp.weight": 1.0}.get(name, 0.5)
        want = np.minimum(a[name], b[name]) * (1 - t) + np.maximum(a[name], b[name]) * t
        np.testing.assert_allclose(tensor, want, rtol=1e-6, atol=1e-7)
    card = (place / "out" / "README.md").read_text()
    assert "midpoint" in card and "0000.00000" in card


def test_the_example_on_its_page_runs(place: Path) -> None:
    installed = place / "installed"
    page = mergeflow(place, "ops", "midpoint", installed=installed).stdout
    text = "".join(f"{line[2:]}\n" for line in page.partition("Example\n")[2].splitlines())
    (place / "example.yaml").write_text(text.replace("./first", "./a").replace("./second", "./b"))
    done = mergeflow(place, "run", "example.yaml", "-q", installed=installed)
    assert done.returncode == 0, done.stderr


def test_its_author_tests_it_with_the_conformance_suite(place: Path) -> None:
    env = environment()
    env["PYTHONPATH"] = os.pathsep.join([str(place / "installed"), env["PYTHONPATH"]])
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_midpoint.py"]
    done = subprocess.run(
        words, cwd=place / "source", env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 30
    broken = FILES["mergeflow_midpoint.py"].replace("stacked.amax(0) *", "stacked[0] *")
    elsewhere = place / "broken"
    shutil.copytree(place / "installed", elsewhere)
    (elsewhere / "mergeflow_midpoint.py").write_text(broken)
    (elsewhere / "test_midpoint.py").write_text(FILES["test_midpoint.py"])
    env["PYTHONPATH"] = os.pathsep.join([str(elsewhere), environment()["PYTHONPATH"]])
    words += ["-k", "order or dtype"]
    done = subprocess.run(words, cwd=elsewhere, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1 and "test_the_order_of_the_inputs_matters_to_rounding_only" in done.stdout

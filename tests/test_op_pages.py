"""What `mergeflow ops NAME` prints can be copied and run, for every op."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from checkpoints import weights_of
from pages import classifier, example_of, llama, write_models
from toys import call

from mergeflow.ops import OPS, Op
from mergeflow.ops.statistics import StatisticsOp


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_page_of_an_op_has_an_example_that_is_validated_and_runs(
    op: type[Op], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MERGEFLOW_CACHE", str(tmp_path / "cache"))
    page = call("ops", op.name)
    assert page.code == 0 and page.out.endswith("".join(f"  {line}\n" for line in example_of(op.name).splitlines()))
    (tmp_path / "example.yaml").write_text(example_of(op.name))
    assert call("validate", "example.yaml").out == "example.yaml: good\n"
    recipe = yaml.safe_load(example_of(op.name))
    write_models(tmp_path, recipe)
    done = call("run", "example.yaml", "-q")
    assert done.code == 0, done.err
    made = weights_of(tmp_path / recipe["name"])
    assert made.keys() and all(tensor.isfinite().all() for tensor in made.values() if tensor.is_floating_point())
    if issubclass(op, StatisticsOp):
        assert all(name.startswith("fisher." if op.kind == "fisher_diag" else f"{op.kind}.") for name in made)
        assert json.loads((tmp_path / recipe["name"] / "statistics.json").read_text())["kind"] == op.kind
    elif not op.has_parts and op.takes != "layers":
        like = classifier(0) if op.takes == "sources" else llama(0)
        assert {name: tensor.shape for name, tensor in made.items()} == {n: t.shape for n, t in like.items()}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_page_of_an_op_tells_formula_paper_inputs_and_every_parameter(op: type[Op]) -> None:
    page = call("ops", op.name).out
    assert f"formula  {op.formula}\n" in page and (op.paper is None or f"paper    {op.paper}\n" in page)
    assert re.search(r"^takes    \w+:", page, re.MULTILINE) and re.search(r"^gives    \w+ from", page, re.MULTILINE)
    for name, info in op.model_fields.items():
        assert re.search(rf"^  {name} .*(default|required)", page, re.MULTILINE), name
        assert info.description and info.description in page

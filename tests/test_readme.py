"""What the README says is what the program does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mergeflow.document import read_document
from mergeflow.ops import OPS
from mergeflow.schema import ops_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_first_block_is_two_commands() -> None:
    block = re.search(r"```bash\n(.*?)```", README, re.S)
    assert block is not None
    assert len(block[1].strip().splitlines()) == 2


def test_the_table_of_ops_is_fresh() -> None:
    found = re.search(r"<!-- ops: begin.*?-->\n(.*?)<!-- ops: end -->", README, re.S)
    assert found is not None
    assert found[1] == ops_table(OPS, markdown=True), "renew it with `mergeflow ops --markdown`"


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)```", README, re.S))
def test_its_recipe_is_a_recipe(text: str, tmp_path: Path) -> None:
    from mergeflow import load_recipe

    assert read_document(text, "README.md").data["recipe"] == 1
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.outputs[""].node == list(recipe.nodes)[-1], "the last node is what is written"

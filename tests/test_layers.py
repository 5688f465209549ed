"""The document of the architecture: imports go down, each module stands on its floor."""

from __future__ import annotations

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent / "mergeflow"

FLOORS: dict[int, str] = {
    10: "__main__",
    9: "cli testing",
    8: "locking verifying",
    7: "pipeline",
    6: "comparing inspecting schema reporting importing preparing evaluating fingerprints",
    5: "executing writing publishing stages",
    4: "planning restacking",
    3: "recipe graph layout manifest",
    2: "ops checkpoint document cache",
    1: "settings hub digests",
    0: "errors dtypes garbage",
}
FLOOR = {module: floor for floor, modules in FLOORS.items() for module in modules.split()}


def module_of(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: pathlib.Path) -> set[str]:
    """The rooms of mergeflow that a file imports, wherever in the file it does so."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mergeflow"):
            inner = (node.module or "").split(".")[1:]
            rooms |= {inner[0]} if inner else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            rooms |= {a.name.split(".")[1] for a in node.names if a.name.startswith("mergeflow.")}
    return rooms


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: pathlib.Path) -> None:
    here = module_of(path)
    if here == "__init__":
        return
    for room in imports(path) - {here}:
        if room == "__version__":
            continue
        assert FLOOR[room] < FLOOR[here], f"{path.name} (floor {FLOOR[here]}) imports {room} (floor {FLOOR[room]})"


def test_every_module_has_a_floor() -> None:
    assert {module_of(p) for p in ROOT.rglob("*.py")} - {"__init__"} <= set(FLOOR)


def test_only_the_hub_module_imports_huggingface_hub_and_only_executing_and_ops_compute() -> None:
    for path in ROOT.rglob("*.py"):
        if "huggingface_hub" in path.read_text() and "import huggingface_hub" in path.read_text():
            assert path.name == "hub.py"

"""The action, the hook and the example repository: their shell steps as written, in bash, as a runner would run them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from toys import environment

ROOT = Path(__file__).parent.parent
ACTION = ROOT / ".github/actions/mergeflow-check/action.yml"
HOOKS = ROOT / ".pre-commit-hooks.yaml"
EXAMPLE = ROOT / "recipes/ci-example"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The example with the models that it names, where it may be changed."""
    shutil.copytree(EXAMPLE, tmp_path / "ci-example")
    shutil.copytree(ROOT / "recipes/quickstart/models", tmp_path / "quickstart/models")
    return tmp_path / "ci-example"


@dataclass(frozen=True)
class Ran:
    """What the steps of an action left."""

    code: int
    log: str
    summary: str
    shown: str
    outputs: dict[str, str]


def run_action(repository: Path, **given: str) -> Ran:
    """Run the action's steps in order, each in bash as a runner does, with expressions put into their environment only."""
    action = yaml.safe_load(ACTION.read_text())
    folder = repository.parent / "runner"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    command = folder / "bin"
    command.mkdir()
    (command / "mergeflow").write_text(f'#!/bin/sh\nexec {sys.executable} -m mergeflow "$@"\n')
    (command / "mergeflow").chmod(0o755)
    inputs = {name: str(one.get("default", "")) for name, one in action["inputs"].items()} | {"install": ""} | given

    def valued(text: str) -> str:
        def value(found: re.Match[str]) -> str:
            name = found[1].strip()
            return str(folder) if name == "runner.temp" else inputs[name.removeprefix("inputs.")]

        return re.sub(r"\$\{\{(.*?)\}\}", value, text)

    inputs = {name: valued(text) for name, text in inputs.items()}
    files = {name: folder / name for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    for file in files.values():
        file.touch()
    log, code = "", 0
    for step in action["runs"]["steps"]:
        if step.get("if") == "inputs.install != ''" and not inputs["install"]:
            continue
        assert "${{" not in step["run"], "an expression in a script is an injection"
        variables = {name: valued(text) for name, text in step.get("env", {}).items()}
        path = f"{command}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            cwd=repository,
            env={**environment(**{n: str(f) for n, f in files.items()}), "PATH": path, **variables},
            capture_output=True,
            text=True,
        )
        log += done.stdout + done.stderr
        code = done.returncode
        if code:
            break
    outputs = dict(line.split("=", 1) for line in files["GITHUB_OUTPUT"].read_text().splitlines())
    summary = Path(outputs["summary"]).read_text() if "summary" in outputs else ""
    return Ran(code, log, summary, files["GITHUB_STEP_SUMMARY"].read_text(), outputs)


def test_the_example_is_as_it_was_locked(repository: Path) -> None:
    ran = run_action(repository, recipes="recipes/*.yaml")
    assert ran.code == 0, ran.log
    assert "### Plan of digits" in ran.summary and "all exactly as locked" in ran.summary
    assert "accuracy on held_out" in ran.summary and ran.shown == ran.summary
    assert sorted(os.listdir(repository / "recipes")) == ["digits.yaml", "digits.yaml.lock"]


def test_a_change_fails_the_action_and_the_summary_names_what_moved(repository: Path) -> None:
    recipe = repository / "recipes/digits.yaml"
    recipe.write_text(recipe.read_text().replace("weight: 0.5}", "weight: 0.6}"))
    ran = run_action(repository, recipes="recipes/digits.yaml")
    assert ran.code == 1, ran.log
    assert "the recipe is another one" in ran.summary and "| `head.weight` |" in ran.summary and ran.shown
    assert run_action(repository, recipes="recipes/digits.yaml", tolerance="0.9", options="--threads 1").code == 0


def test_a_recipe_that_is_wrong_stops_at_once_with_its_line(repository: Path) -> None:
    recipe = repository / "recipes/digits.yaml"
    recipe.write_text(recipe.read_text().replace("inputs:", "input:"))
    ran = run_action(repository, recipes="recipes/*.yaml")
    assert ran.code == 2 and "recipes/digits.yaml:20:" in ran.log and "Did you mean 'inputs'?" in ran.log


def test_globs_that_fit_nothing_and_recipes_without_a_lock_are_told(repository: Path) -> None:
    assert "no file fits" in run_action(repository, recipes="recipe/*.yaml").log
    (repository / "recipes/digits.yaml.lock").unlink()
    ran = run_action(repository, recipes="recipes/*.yaml")
    assert ran.code == 0 and "has no lock" in ran.summary


def test_words_of_a_stranger_are_never_a_part_of_a_script(repository: Path) -> None:
    ran = run_action(
        repository,
        recipes="recipes/digits.yaml $(touch${IFS}owned) `touch owned` ;touch owned",
        tolerance="$(touch owned)",
    )
    assert not (repository / "owned").exists() and ran.code != 0


def test_the_example_uses_the_action_with_inputs_that_it_has() -> None:
    workflow = yaml.safe_load((EXAMPLE / ".github/workflows/merge.yml").read_text())
    steps: list[dict[str, Any]] = workflow["jobs"]["check"]["steps"]
    [ours] = [step for step in steps if "mergeflow-check@" in step.get("uses", "")]
    action = yaml.safe_load(ACTION.read_text())
    assert set(ours["with"]) <= set(action["inputs"]) and "recipes" in ours["with"]
    assert "steps.merge.outputs.summary" in (EXAMPLE / ".github/workflows/merge.yml").read_text()
    assert "summary" in action["outputs"] and ours["id"] == "merge"


def test_the_hook_validates_the_files_that_it_names(repository: Path) -> None:
    [hook] = yaml.safe_load(HOOKS.read_text())
    [used] = yaml.safe_load((EXAMPLE / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert used["id"] == hook["id"]
    names = [str(file.relative_to(repository)) for file in repository.rglob("*.yaml")]
    chosen = [name for name in names if re.search(hook["files"], name)]
    assert chosen == ["recipes/digits.yaml"]
    words = hook["entry"].split()

    def hooked() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *words, *chosen], cwd=repository, env=environment(), capture_output=True, text=True
        )

    assert words[0] == "mergeflow" and hooked().returncode == 0
    (repository / chosen[0]).write_text("recipe: 1\nmodel: {}\n")
    assert hooked().returncode == 2

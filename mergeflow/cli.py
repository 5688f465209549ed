"""The command line: a command parses words, calls one function, and prints. Heavy imports happen inside a command.

Results go to stdout; progress, warnings and errors to stderr. An error is printed in its own words and ends with its own
exit code; what is none of ours is a bug: one line, and the trace in a file.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mergeflow import __version__
from mergeflow.errors import MergeflowError, Problems, RecipeError, printable

if TYPE_CHECKING:
    from mergeflow.recipe import Recipe

F = TypeVar("F", bound=Callable[..., Any])


def main() -> None:
    """Run the command line and leave with its exit code."""
    try:
        code = commands.main(standalone_mode=False)
        sys.stdout.flush()
    except MergeflowError as error:
        click.echo(printable(str(error)), err=True)
        if isinstance(error, Problems):
            click.echo(f"{len(error.errors)} problems", err=True)
        code = error.exit_code
    except click.exceptions.Exit as error:
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = 2
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped", err=True)
        code = 130
    except BrokenPipeError:
        # The reader of our output has gone; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except BaseException as error:  # whatever it is, a person gets one line and a file
        with tempfile.NamedTemporaryFile("w", prefix="mergeflow-", suffix=".log", delete=False) as file:
            file.write(f"mergeflow {__version__}\n{sys.argv!r}\n{traceback.format_exc()}")
        click.echo(f"a bug in mergeflow: {type(error).__name__}: {error}. The trace is in {file.name}", err=True)
        code = 70
    raise SystemExit(code)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="mergeflow")
def commands() -> None:
    """Merge model checkpoints by a recipe."""


def settings_option(function: F) -> F:
    """`--set name=value`, any number of times."""
    return click.option(
        "--set", "settings", multiple=True, metavar="NAME=VALUE", help="Give a variable of the recipe another value."
    )(function)


def recipe_of(path: str, settings: tuple[str, ...]) -> Recipe:
    """The recipe at a path, with the variables that were set."""
    from mergeflow.document import read_document
    from mergeflow.recipe import load_recipe

    values = {}
    for one in settings:
        name, equals, text = one.partition("=")
        if not equals:
            raise RecipeError(f"'{one}' has no value", where="--set", fix="Write --set name=value.")
        values[name] = read_document(text, f"--set {name}").data
        if isinstance(values[name], dict | list):
            raise RecipeError(
                f"'{text}' is no scalar", where=f"--set {name}", fix="Give one number, word or truth value."
            )
    return load_recipe(path, settings=values)


def memory_size(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """The bytes of `--memory`."""
    from mergeflow.recipe import parse_size

    if value is None:
        return None
    try:
        return parse_size(value)
    except RecipeError as error:
        raise error.placed("--memory") from None


memory_option = click.option(
    "--memory",
    callback=memory_size,
    metavar="SIZE",
    help="Memory to use, e.g. 2GiB; default: a quarter of the machine's.",
)
threads_option = click.option(
    "--threads", type=click.IntRange(1, 1024), help="Worker threads; default: one a processor."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
out_option = click.option(
    "-o", "--out", type=click.Path(), help="The folder to write; default: ./<name of the recipe>."
)
recipe_argument = click.argument("recipe", type=click.Path())


@commands.command()
@recipe_argument
@out_option
@settings_option
@click.option(
    "--device", default="cpu", show_default=True, metavar="cpu|cuda|cuda:N", help="Where blocks are computed."
)
@memory_option
@threads_option
@click.option(
    "--io",
    "reading",
    type=click.Choice(["auto", "mmap", "pread"]),
    default="auto",
    show_default=True,
    help="How inputs are read: mapped, or by call (safer where a disk may fail).",
)
@click.option("--force", is_flag=True, help="Replace a finished output of another plan.")
@click.option("--fresh", is_flag=True, help="Forget what a killed run left.")
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("-v", "--verbose", is_flag=True, help="Also say where the time went.")
def run(
    recipe: str,
    out: str | None,
    settings: tuple[str, ...],
    device: str,
    memory: int | None,
    threads: int | None,
    reading: Any,
    force: bool,
    fresh: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Merge: plan RECIPE, fill its tensors, write the output; goes on where a killed run stopped."""
    from mergeflow import pipeline
    from mergeflow.reporting import size_text

    check_device(device)
    started = time.perf_counter()
    checked = recipe_of(recipe, settings)
    shown = _Progress(quiet)
    try:
        result = pipeline.run(
            checked,
            out,
            device=device,
            threads=threads,
            memory=memory,
            reading=reading,
            force=force,
            fresh=fresh,
            progress=shown.update,
            planned=shown.planned,
        )
    finally:
        shown.close()
    for warning in result.warnings:
        click.echo(f"warning: {printable(warning)}", err=True)
    seconds = time.perf_counter() - started
    if as_json:
        data = {
            "path": str(result.path),
            "plan": result.digest,
            "made": result.made,
            "rows": result.rows,
            "resumed": result.resumed,
            "bytes_in": result.bytes_in,
            "bytes_out": result.bytes_out,
            "seconds": {**result.seconds, "total": seconds},
            "warnings": list(result.warnings),
        }
        click.echo(json.dumps(data, indent=1))
    elif not result.made:
        click.echo(f"{result.path}: already made")
    else:
        again = f", {result.resumed} of them made before" if result.resumed else ""
        click.echo(f"{result.path}: {result.rows} tensors{again}, {size_text(result.bytes_out)} in {seconds:.1f} s")
    if verbose:
        for name, spent in result.seconds.items():
            click.echo(f"  {name:<16} {spent:8.3f} s", err=True)


@commands.command()
@recipe_argument
@out_option
@settings_option
@memory_option
@threads_option
@json_option
@click.option("--graph", type=click.Choice(["mermaid"]), help="Print the recipe's graph instead, as a picture in text.")
def plan(
    recipe: str,
    out: str | None,
    settings: tuple[str, ...],
    memory: int | None,
    threads: int | None,
    as_json: bool,
    graph: str | None,
) -> None:
    """Say what a run would do, from headers alone: problems, tensors, bytes, memory, time."""
    checked = recipe_of(recipe, settings)
    from mergeflow import pipeline, reporting

    if graph:
        click.echo(reporting.mermaid(checked), nl=False)
        return
    target = Path(out or checked.name)
    made, budget, free = pipeline.foresee(checked, target, memory=memory, threads=threads)
    data = reporting.plan_data(made, threads=budget.threads, peak=budget.peak, free=free)
    click.echo(json.dumps(data, indent=1) if as_json else reporting.plan_text(data, target))


@commands.command()
@click.argument("recipes", nargs=-1, required=True, type=click.Path())
@settings_option
@json_option
def validate(recipes: tuple[str, ...], settings: tuple[str, ...], as_json: bool) -> None:
    """Check RECIPES alone: grammar, names, parameters; needs no model."""
    errors: list[MergeflowError] = []
    for recipe in recipes:
        try:
            recipe_of(recipe, settings)
        except Problems as several:
            errors += several.errors
        except MergeflowError as error:
            errors.append(error)
        else:
            if not as_json:
                click.echo(f"{recipe}: good")
    if as_json:
        problems = [{"where": e.where, "what": e.what, "fix": e.fix} for e in errors]
        click.echo(json.dumps({"recipes": list(recipes), "problems": problems}, indent=1))
        if errors:
            raise click.exceptions.Exit(Problems(errors).exit_code)
    elif errors:
        raise errors[0] if len(errors) == 1 else Problems(errors)


@commands.command()
@click.argument("model")
@click.option("--revision", help="A hub commit, tag or branch.")
@click.option("--subfolder", help="The folder in the repository that holds the model.")
@click.option("--file", help="The .safetensors file or index to read.")
@json_option
def inspect(model: str, revision: str | None, subfolder: str | None, file: str | None, as_json: bool) -> None:
    """Show what a checkpoint holds, from its headers: MODEL is a folder, a .safetensors file or a hub name."""
    from mergeflow.checkpoint import open_checkpoint
    from mergeflow.hub import locate
    from mergeflow.inspecting import inspect_model, inspect_text

    # On the command line a folder that is there is meant, whatever its name looks like.
    path = f"./{model}" if os.path.exists(model) and not model.startswith(("/", "./", "../", "~")) else model
    folder = locate(path, revision=revision, subfolder=subfolder, relative_to=Path())
    data = inspect_model(open_checkpoint(folder, file=file))
    click.echo(json.dumps(data, indent=1) if as_json else inspect_text(data))


@commands.command()
@click.argument("name", required=False)
@click.option("--markdown", is_flag=True, help="As a Markdown table, as the README has it.")
def ops(name: str | None, markdown: bool) -> None:
    """List the ops, or show one in full."""
    from mergeflow.schema import op_page, ops_table

    click.echo(op_page(name) if name else ops_table(markdown=markdown), nl=False)


@commands.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from mergeflow.schema import schema_text

    click.echo(schema_text(), nl=False)


def check_device(device: str) -> None:
    """Raise MergeflowError for a device that is not there, before anything is planned."""
    import re

    from mergeflow.errors import MachineError

    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise RecipeError(f"there is no device '{device}'", where="--device", fix="Write cpu, cuda or cuda:1.")
    if device != "cpu":
        import torch

        number = int(device.partition(":")[2] or 0)
        if number >= torch.cuda.device_count():
            raise MachineError(
                f"torch sees {torch.cuda.device_count()} CUDA devices here",
                where=f"--device {device}",
                fix="Use --device cpu.",
            )


class _Progress:
    """Progress on stderr: a bar on a terminal, a line now and then in a pipe."""

    LINE_SECONDS = 10.0

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.terminal = sys.stderr.isatty()
        self.what = ""
        self.bar: Any = None
        self.done = self.total = 0
        self.started = self.spoke = time.monotonic()

    def planned(self, plan: Any) -> None:
        """Say what is about to be done."""
        from mergeflow.reporting import size_text

        if not self.quiet:
            click.echo(f"{plan.name}: {len(plan.rows)} tensors, {size_text(plan.bytes_out)} to write", err=True)

    def update(self, what: str, done: int, total: int) -> None:
        """Called from any thread: a race costs a count on the screen and nothing else."""
        if self.quiet:
            return
        if what != self.what:
            self.close()
            self.what, self.done, self.total, self.started = what, 0, total, time.monotonic()
            if self.terminal:
                from tqdm import tqdm

                self.bar = tqdm(
                    total=total, desc=what, unit="B", unit_scale=True, leave=False, file=sys.stderr, mininterval=0.2
                )
        self.done += done
        if self.bar is not None:
            self.bar.update(done)
        elif not self.terminal and time.monotonic() - self.spoke > self.LINE_SECONDS:
            self.spoke = now = time.monotonic()
            speed = self.done / max(now - self.started, 1e-9)
            left = (self.total - self.done) / speed if speed else 0.0
            click.echo(
                f"{what}: {self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB, {speed / 1e9:.2f} GB/s, {left:.0f} s left",
                err=True,
            )

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

"""The command line: a command parses words, calls one function, and prints. Heavy imports happen inside a command.

Results go to stdout; progress, warnings and errors to stderr. An error is printed in its own words and ends with its own
exit code; what is none of ours is a bug: one line, and the trace in a file.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import click

from mergeflow import __version__
from mergeflow.errors import MachineError, MergeflowError, Problems, RecipeError, did_you_mean, printable, raise_all

if TYPE_CHECKING:
    from mergeflow.cache import Entry
    from mergeflow.recipe import Recipe
    from mergeflow.recipe.grammar import DataSource

F = TypeVar("F", bound=Callable[..., Any])


def main() -> None:
    """Run the command line and leave with its exit code."""
    with _interrupts() as interrupted:
        try:
            code = commands.main(prog_name="mergeflow", standalone_mode=False)
            sys.stdout.flush()
        except BaseException as error:
            code = _STOPPED if interrupted and not isinstance(error, MergeflowError) else _told(error)
            if code == _STOPPED and not isinstance(error, MergeflowError):
                click.echo("stopped", err=True)
    raise SystemExit(code)


_STOPPED = 130


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Notes each Ctrl-C: libraries that are interrupted while they load answer with errors of their own.

    Where Ctrl-C is ignored, as for a job in the background, it stays so.
    """
    seen: list[int] = []
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield seen
        return

    def handle(number: int, frame: object) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handle)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _told(error: BaseException) -> int:
    """Say on stderr what went wrong, in the error's own words; its exit code."""
    if isinstance(error, MergeflowError) and error.exit_code != 70:
        click.echo(str(error), err=True)
        if isinstance(error, Problems):
            click.echo(f"{len(error.errors)} problems", err=True)
        return error.exit_code
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, click.ClickException):
        error.show()
        return 2
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return _STOPPED
    if isinstance(error, BrokenPipeError | SystemExit) and _reader_is_gone():
        # There is nobody left to tell; what is still in our buffers goes nowhere. click makes an exit of the error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    if isinstance(error, MemoryError):
        click.echo("there is not enough memory. Give --memory less, or use fewer --threads.", err=True)
        return 5
    text = f"a bug in mergeflow: {type(error).__name__}: {error}".partition("\n")[0]
    trace = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="mergeflow-", suffix=".log", delete=False) as file:
            file.write(f"mergeflow {__version__}\n{sys.argv!r}\n{trace}")
    except OSError:
        click.echo(f"{printable(text)}. The trace, which no file could take:\n{trace}", err=True)
    else:
        click.echo(f"{printable(text)}. The trace is in {file.name}", err=True)
    return 70


def _reader_is_gone() -> bool:
    """Whether what stdout is piped into has ended: a socket's broken pipe is another thing."""
    poll = select.poll()
    poll.register(1, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


class _Commands(click.Group):
    """The group of commands; with `--json` the problems of a command are a JSON document too."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MergeflowError as error:
            if ctx.meta.get(_JSON):
                errors = error.errors if isinstance(error, Problems) else (error,)
                problems = [{"where": one.where, "what": one.what, "fix": one.fix} for one in errors]
                click.echo(json.dumps({"problems": problems, "exit_code": error.exit_code}, indent=1))
            raise


_JSON = "mergeflow.json"


def program() -> None:
    """`main` for a process of its own, left without taking the interpreter apart, which takes up to half a second with torch."""
    code = 70
    try:
        main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
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
    from mergeflow.recipe import load_recipe, read_settings

    return load_recipe(path, settings=read_settings(settings))


def read_words(words: tuple[str, ...]) -> dict[str, Any]:
    """What `key=value` words say, each value as YAML reads it."""
    from mergeflow.recipe import read_settings

    return {name: written.value for name, written in read_settings(words).items()}


def memory_size(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """The bytes of `--memory`."""
    if value is None:
        return None
    from mergeflow.recipe import parse_size

    try:
        return parse_size(value)
    except RecipeError:
        raise RecipeError(f"'{value}' is no size", where="--memory", fix="Write it as 2GB or 2GiB.") from None


def note_json(context: click.Context, parameter: click.Parameter, value: bool) -> bool:
    """Remember that the answer is JSON, for the problems that another option or the command has."""
    context.meta[_JSON] = value
    return value


memory_option = click.option(
    "--memory",
    callback=memory_size,
    metavar="SIZE",
    help="Memory to use, e.g. 2GiB, at least 64MiB; default: a quarter of the machine's.",
)
threads_option = click.option(
    "--threads", type=click.IntRange(1, 1024), help="Worker threads; default: one a processor."
)
json_option = click.option(
    "--json", "as_json", is_flag=True, callback=note_json, is_eager=True, help="Print one JSON document on stdout."
)
out_option = click.option(
    "-o", "--out", type=click.Path(), help="The folder to write; default: ./<name of the recipe>."
)
recipe_argument = click.argument("recipe", type=click.Path())


summary_option = click.option(
    "--summary", type=click.Path(), metavar="FILE", help="Append a summary in Markdown to FILE, for a CI's log."
)
scratch_option = click.option(
    "--scratch", type=click.Path(), metavar="FOLDER", help="Where the merge is made for the while; default: here."
)


def put(text: str, path: str | None, mode: str = "w") -> None:
    """Write a file that an option names, or with mode "a" add to it; nothing where it is not given. Raises MachineError."""
    if path is not None:
        try:
            with open(path, mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise MachineError(f"cannot be written: {error.strerror}", where=path) from None


pickle_option = click.option(
    "--allow-pickle",
    is_flag=True,
    help="Read pickled weights (.bin, .pt) where there are no safetensors: their tensors alone, no code is run.",
)


def how_options(function: F) -> F:
    """How a merge is run, which changes nothing of the result: `--device`, `--memory`, `--threads`, `--io`, `--allow-pickle`."""
    options = [
        click.option(
            "--device", default="cpu", show_default=True, metavar="cpu|cuda|cuda:N", help="Where blocks are computed."
        ),
        memory_option,
        threads_option,
        click.option(
            "--io",
            "reading",
            type=click.Choice(["auto", "mmap", "pread"]),
            default="auto",
            show_default=True,
            help="How inputs are read: mapped, or by call (safer where a disk may fail).",
        ),
        pickle_option,
    ]
    for option in reversed(options):
        function = option(function)
    return function


def data_options(function: F) -> F:
    """`--data`, any number of times, and how its rows are read; `data_sources` makes entries of them."""
    options = [
        click.option(
            "--data",
            "paths",
            multiple=True,
            required=True,
            metavar="FILE",
            help="Rows: .jsonl, .csv, .parquet, .txt, a folder of such files or of images, or a hub data set. May be repeated.",
        ),
        click.option("--text", metavar="FIELD", help="The field that holds the text; default: text."),
        click.option("--template", metavar="TEXT", help='The text made of several fields, e.g. "{question} {answer}".'),
        click.option("--messages", metavar="FIELD", help="The field that holds a chat, a list of {role, content}."),
        click.option(
            "--features", metavar="FIELD", help="The field that holds numbers, for mergeflow_mlp or as pixels."
        ),
        click.option("--label", metavar="FIELD", help="The field that holds the label."),
        click.option(
            "--kind",
            type=click.Choice(["jsonl", "csv", "parquet", "text", "images", "hub"]),
            help="How to read the data; default: by the ending of its name.",
        ),
        click.option("--split", help="The split of a hub data set, e.g. test."),
        click.option("--data-revision", "revision", help="A commit, tag or branch of a hub data set."),
        click.option(
            "--limit", type=click.IntRange(min=1), help="At most so many rows: the first, or drawn with --data-seed."
        ),
        click.option("--data-seed", "seed", type=click.IntRange(min=0), help="Draw the rows that --limit allows."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def data_sources(paths: tuple[str, ...], fields: dict[str, Any]) -> list[DataSource]:
    """The entries of data that `data_options` describe."""
    from mergeflow.recipe.grammar import DataSource

    given = {name: value for name, value in fields.items() if value is not None}
    return [DataSource.model_validate({"path": path, **given}) for path in paths]


def path_of(model: str) -> str:
    """A model as recipes write it: on the command line a folder that is there is meant, whatever its name looks like."""
    return f"./{model}" if os.path.exists(model) and not model.startswith(("/", "./", "../", "~")) else model


@commands.command()
@recipe_argument
@out_option
@settings_option
@how_options
@click.option("--force", is_flag=True, help="Replace a finished output of another plan.")
@click.option("--fresh", is_flag=True, help="Forget what a killed run left.")
@click.option("--locked", is_flag=True, help="Refuse inputs that are not those of the recipe's lock.")
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("-v", "--verbose", is_flag=True, help="Also say where the time went.")
def run(
    recipe: str,
    out: str | None,
    settings: tuple[str, ...],
    force: bool,
    fresh: bool,
    locked: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **how: Any,
) -> None:
    """Make the merge that RECIPE describes.

    It is planned from headers, filled tensor by tensor, and appears at OUT all at once when it is whole. A run that was
    stopped or killed goes on where it was when the same command is given again; one that is made already ends at once.
    """
    from mergeflow import pipeline
    from mergeflow.reporting import size_text

    check_device(how["device"])
    started = time.perf_counter()
    checked = recipe_of(recipe, settings)
    if locked:
        from mergeflow import locking

        how["accept"] = locking.guard(checked, locking.lock_path(recipe), how["device"], how["allow_pickle"])
    with _Progress(quiet) as shown:

        def planned(made: Any) -> None:
            shown.planned(made)
            warn(made.warnings)

        result = pipeline.run(checked, out, force=force, fresh=fresh, progress=shown.update, planned=planned, **how)
    if not result.made:
        warn(result.warnings)
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
            "stages": [{"node": node, "key": key, "in_cache": done} for node, key, done in result.stages],
            "seconds": {**result.seconds, "total": seconds},
            "warnings": list(result.warnings),
        }
        click.echo(json.dumps(data, indent=1))
        return
    for node, key, done in result.stages:
        click.echo(f"{node}: {'found in the cache' if done else 'made'} ({key[:12]})")
    if not result.made:
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
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda|cuda:N", help="Where it would run.")
@memory_option
@threads_option
@pickle_option
@json_option
@summary_option
@click.option("--graph", type=click.Choice(["mermaid"]), help="Print the recipe's graph instead, as a picture in text.")
def plan(
    recipe: str,
    out: str | None,
    settings: tuple[str, ...],
    device: str,
    memory: int | None,
    threads: int | None,
    allow_pickle: bool,
    as_json: bool,
    summary: str | None,
    graph: str | None,
) -> None:
    """Say what a run would do, from headers alone.

    Every problem that headers can show, or the tensors and files, bytes read and written, memory and time. Of a hub's models only
    configs, tokenizers, indexes and headers are fetched. No weights are read but, of models on this machine that are averaged, a
    sample of some KiB, to warn where they have no common origin.
    """
    check_device(device)
    checked = recipe_of(recipe, settings)
    from mergeflow import pipeline, reporting

    if graph:
        click.echo(reporting.mermaid(checked), nl=False)
        return
    target = Path(out or checked.name)
    made, budget, free = pipeline.foresee(
        checked, target, device=device, memory=memory, threads=threads, allow_pickle=allow_pickle
    )
    data = reporting.plan_data(made, device=device, threads=budget.threads, peak=budget.peak, free=free)
    put(reporting.plan_markdown(data), summary, "a")
    click.echo(json.dumps(data, indent=1) if as_json else reporting.plan_text(data, target))


@commands.command()
@recipe_argument
@settings_option
@how_options
@scratch_option
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def lock(
    recipe: str,
    settings: tuple[str, ...],
    scratch: str | None,
    as_json: bool,
    quiet: bool,
    **how: Any,
) -> None:
    """Write down what RECIPE makes, for `check` and `run --locked`.

    The merge is made once, in a folder that is deleted afterwards. RECIPE.lock then holds the revisions and digests of what went in,
    and of each tensor that came out its digest and a fingerprint of some 500 bytes, by which a later drift is measured.
    """
    from mergeflow import locking

    check_device(how["device"])
    checked = recipe_of(recipe, settings)
    with (
        _Progress(quiet) as shown,
        locking.making(checked, scratch=scratch, progress=shown.update, planned=warn_of, **how) as made,
    ):
        locking.write_lock(made.lock, path := locking.lock_path(recipe))
    data = {"path": str(path), "tensors": len(made.lock.tensors), "inputs": len(made.lock.inputs)}
    click.echo(json.dumps(data, indent=1) if as_json else f"{path}: {data['tensors']} tensors locked")


@commands.command()
@recipe_argument
@settings_option
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    metavar="DRIFT",
    help="The most that a tensor may drift, ||new - old|| / ||old||, e.g. 1e-6; default: what `expect:` says, else nothing.",
)
@how_options
@scratch_option
@summary_option
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def check(
    recipe: str,
    settings: tuple[str, ...],
    tolerance: float | None,
    scratch: str | None,
    summary: str | None,
    as_json: bool,
    quiet: bool,
    **how: Any,
) -> None:
    """Make the merge of RECIPE in a scratch folder and hold it against RECIPE.lock and the recipe's `expect:`.

    Exit 0 where every tensor is as it was locked, or has drifted no further than is allowed, and every expectation is met; exit 1
    otherwise, with a table of what moved, the furthest first.
    """
    from mergeflow import locking

    check_device(how["device"])
    checked = recipe_of(recipe, settings)
    lock = locking.read_lock(locking.lock_path(recipe))
    with _Progress(quiet) as shown:
        found = locking.check(
            checked, lock, tolerance=tolerance, scratch=scratch, progress=shown.update, planned=warn_of, **how
        )
    click.echo(json.dumps(locking.check_data(found), indent=1) if as_json else locking.check_text(found))
    put(locking.check_markdown(found), summary, "a")
    if not found.passed:
        raise click.exceptions.Exit(1)


@commands.command()
@click.argument("out", type=click.Path())
@click.option(
    "--replay",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Also make N tensors again from the recipe inside.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Which tensors --replay draws.")
@how_options
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def verify(out: str, replay: int, seed: int, as_json: bool, quiet: bool, **how: Any) -> None:
    """Hold the output folder OUT against its own manifest: every byte of every file.

    Exit 0 where all is as it was written; exit 1 with the file or tensor that was changed or is missing. --replay makes tensors again
    from the recipe inside the output and compares bits; inputs that are missing or have changed since are named, with exit 3.
    """
    from mergeflow import verifying

    check_device(how["device"])
    with _Progress(quiet) as shown:
        found = verifying.verify(out, replay=replay, seed=seed, progress=shown.update, **how)
    data = verifying.verification_data(found)
    click.echo(json.dumps(data, indent=1) if as_json else verifying.verification_text(found))
    if not found.passed:
        raise click.exceptions.Exit(1)


@commands.command()
@click.argument("recipes", nargs=-1, required=True, type=click.Path())
@settings_option
@json_option
def validate(recipes: tuple[str, ...], settings: tuple[str, ...], as_json: bool) -> None:
    """Check RECIPES alone, without their models.

    Grammar, names, parameters: in a fraction of a second, for editors, commit hooks and CI.
    """
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
    raise_all(errors)
    if as_json:
        click.echo(json.dumps({"recipes": list(recipes), "problems": []}, indent=1))


@commands.command()
@click.argument("model")
@click.option("--revision", help="A hub commit, tag or branch.")
@click.option("--subfolder", help="The folder in the repository that holds the model.")
@click.option("--file", help="The .safetensors file or index to read.")
@pickle_option
@json_option
def inspect(
    model: str, revision: str | None, subfolder: str | None, file: str | None, allow_pickle: bool, as_json: bool
) -> None:
    """Show what a checkpoint or a LoRA adapter holds, from its headers.

    MODEL is a folder, a .safetensors file, or the name of a hub repository.
    """
    from mergeflow.checkpoint import holds_adapter, open_checkpoint
    from mergeflow.checkpoint.adapter import open_adapter
    from mergeflow.checkpoint.statistics import STATISTICS, open_statistics
    from mergeflow.hub import locate
    from mergeflow.inspecting import inspect_model, inspect_text

    folder = locate(path_of(model), revision=revision, subfolder=subfolder, relative_to=Path())
    adapter = file is None and holds_adapter(folder)
    if folder.exists(STATISTICS) and file is None:
        data = inspect_model(open_statistics(folder))
    else:
        data = inspect_model(
            open_adapter(folder, allow_pickle=allow_pickle)
            if adapter
            else open_checkpoint(folder, file=file, allow_pickle=allow_pickle)
        )
    click.echo(json.dumps(data, indent=1) if as_json else inspect_text(data))


@commands.command()
@click.argument("first")
@click.argument("second")
@threads_option
@click.option("--svg", type=click.Path(), metavar="FILE", help="Also write a picture of the change of each layer.")
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def diff(first: str, second: str, threads: int | None, svg: str | None, as_json: bool, quiet: bool) -> None:
    """Say how far the model SECOND is from FIRST.

    Relative change, cosine and largest difference of each layer and tensor, what moved most first; tensors, shapes, dtypes,
    config and tokenizer that differ. Each is a folder, a .safetensors file or a hub name. The exit code is 0 whatever differs.
    """
    from mergeflow import comparing

    with _Progress(quiet) as shown:
        found = comparing.diff(
            first, second, threads=threads, progress=lambda done, total: shown.update("read", done, total)
        )
    if svg:
        put(comparing.diff_svg(found), svg)
    click.echo(json.dumps(comparing.diff_data(found), indent=1) if as_json else comparing.diff_text(found))


@commands.command()
@click.argument("models", nargs=-1, required=True)
@threads_option
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def lineage(models: tuple[str, ...], threads: int | None, as_json: bool, quiet: bool) -> None:
    """Say of MODELS, two or more, which have a common origin.

    Each two are the same, parent and child, fine-tunes of one parent (which is among the models, or not: siblings) or strangers, with the
    numbers that show it.
    """
    from mergeflow import comparing

    with _Progress(quiet) as shown:
        found = comparing.lineage(
            models, threads=threads, progress=lambda done, total: shown.update("read", done, total)
        )
    click.echo(json.dumps(comparing.lineage_data(found), indent=1) if as_json else comparing.lineage_text(found))


@commands.command("eval")
@click.argument("model")
@data_options
@click.option(
    "--batch-size", type=click.IntRange(1, 1 << 16), default=8, show_default=True, help="Rows that run together."
)
@click.option("--max-length", type=click.IntRange(min=1), help="Tokens read at once; default: the model's context.")
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda|cuda:N", help="Where the model runs.")
@threads_option
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def eval_(
    model: str,
    paths: tuple[str, ...],
    batch_size: int,
    max_length: int | None,
    device: str,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    **fields: Any,
) -> None:
    """Say how good MODEL is on data: a whole folder or hub repository, with config and tokenizer.

    Of a classifier accuracy and macro-F1, each the plain mean over the entries of --data; of a causal language model bits per
    byte of text and perplexity by token. Labels are read from the field `label` unless --label names another.
    """
    from mergeflow import evaluating

    check_device(device)
    sources = data_sources(paths, fields)
    with _Progress(quiet, unit="rows") as shown:
        found = evaluating.evaluate(
            evaluating.model_folder(path_of(model), Path()),
            sources,
            relative_to=Path(),
            label=model,
            batch_size=batch_size,
            max_length=max_length,
            device=device,
            threads=threads,
            progress=shown.update,
        )
    for warning in evaluating.warnings(found):
        click.echo(f"warning: {printable(warning)}", err=True)
    click.echo(
        json.dumps(evaluating.evaluation_data(found), indent=1)
        if as_json
        else printable(evaluating.evaluation_text(found))
    )


@commands.command()
@click.argument("name", required=False)
@click.option("--markdown", is_flag=True, help="As a Markdown table, as the README has it.")
def ops(name: str | None, markdown: bool) -> None:
    """List the ops, or show one in full."""
    from mergeflow.schema import op_page, ops_table

    click.echo(op_page(name) if name else ops_table(markdown=markdown), nl=False)


@commands.command()
@click.argument("model")
@click.option(
    "--data", "data", required=True, metavar="FILE", help="What the model is run on (.jsonl, .csv, .txt, ...)."
)
@click.option(
    "--kind", default="gram", show_default=True, metavar="OP", help="What is collected: gram, fisher_diag, ..."
)
@click.option("-o", "--out", required=True, type=click.Path(), help="The folder to write.")
@click.option(
    "--option", "options", multiple=True, metavar="KEY=VALUE", help="A parameter of the op, or a field of the data."
)
@click.option("--revision", help="A hub commit, tag or branch.")
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda|cuda:N", help="Where the model runs.")
@memory_option
@threads_option
@click.option("--force", is_flag=True, help="Replace a finished output of another plan.")
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def stats(
    model: str,
    data: str,
    kind: str,
    out: str,
    options: tuple[str, ...],
    revision: str | None,
    device: str,
    memory: int | None,
    threads: int | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Collect statistics of MODEL on data, for merges that never see the data.

    The short way to a recipe whose output is a stage: its artifact is written to OUT, to be published beside the model.
    """
    from mergeflow import pipeline
    from mergeflow.preparing import statistics_recipe
    from mergeflow.reporting import size_text

    check_device(device)
    recipe = statistics_recipe(model, data, kind, read_words(options), revision=revision)
    with _Progress(quiet) as shown:
        result = pipeline.run(
            recipe, out, device=device, memory=memory, threads=threads, force=force, progress=shown.update
        )
    if as_json:
        click.echo(json.dumps({"path": str(result.path), "made": result.made, "tensors": result.rows}, indent=1))
    elif not result.made:
        click.echo(f"{result.path}: already made")
    else:
        click.echo(f"{result.path}: {result.rows} tensors, {size_text(result.bytes_out)}")


@commands.group()
def cache() -> None:
    """List or clear the artifacts of stages."""


@cache.command("list")
@json_option
def cache_list(as_json: bool) -> None:
    """List the artifacts, the one used last first, and what unfinished stages keep to go on with."""
    from mergeflow import cache as store
    from mergeflow.reporting import size_text
    from mergeflow.writing import is_held

    found, begun = list(store.entries()), list(store.unfinished())
    if as_json:
        data = {
            "root": str(store.root()),
            "artifacts": [_entry_data(one) for one in found],
            "unfinished": [{**_entry_data(one), "running": any(map(is_held, one.paths))} for one in begun],
        }
        click.echo(json.dumps(data, indent=1))
        return
    for one in [*found, *begun]:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.used))
        state = "" if one in found else "  is being made" if any(map(is_held, one.paths)) else "  unfinished"
        click.echo(printable(f"{one.key}  {size_text(one.size):>9}  {used}{state}"))
    more = f" and {len(begun)} unfinished" if begun else ""
    click.echo(
        f"{_artifacts(len(found))}{more}, {size_text(sum(one.size for one in [*found, *begun]))} in {store.root()}"
    )


def _entry_data(entry: Entry) -> dict[str, Any]:
    return {"key": entry.key, "path": str(entry.paths[0]), "bytes": entry.size, "used": entry.used}


def _artifacts(count: int) -> str:
    return "1 artifact" if count == 1 else f"{count} artifacts"


@cache.command("clear")
@click.argument("keys", nargs=-1)
@click.option(
    "--older-than", type=click.FloatRange(min=0), metavar="DAYS", help="Only those not used for so many days."
)
def cache_clear(keys: tuple[str, ...], older_than: float | None) -> None:
    """Delete artifacts and what unfinished stages keep: all, those of KEYS, or those not used lately.

    What a live run is making is left alone. A merge that is made already is not made again for lack of its artifacts.
    """
    from mergeflow import cache as store
    from mergeflow.reporting import size_text
    from mergeflow.writing import is_held

    there = [one.key for one in (*store.entries(), *store.unfinished())]
    for key in keys:
        if key not in there:
            fix = did_you_mean(key, there) or "`mergeflow cache list` shows all keys."
            raise RecipeError(f"the cache has no artifact '{key}'", where="cache clear", fix=fix)
    chosen: dict[str, Any] = {
        "older_than": None if older_than is None else older_than * 86400,
        "keys": frozenset(keys) if keys else None,
    }
    gone, begun = store.clear(**chosen), store.clear_unfinished(is_held, **chosen)
    more = f" and {len(begun)} unfinished" if begun else ""
    click.echo(f"{_artifacts(len(gone))}{more} deleted, {size_text(sum(one.size for one in [*gone, *begun]))}")


@commands.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from mergeflow.schema import schema_text

    click.echo(schema_text(), nl=False)


@commands.command("import")
@click.argument("config", type=click.Path())
@click.option("-o", "--out", type=click.Path(), metavar="RECIPE", help="The recipe to write; default: stdout.")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def import_(config: str, out: str | None, force: bool) -> None:
    """Bring a mergekit configuration over: CONFIG becomes a recipe that gives the same numbers.

    What is left out or done another way is noted, on stderr and in the recipe; what cannot be brought over is named
    with its line, and then nothing is written.
    """
    from mergeflow.importing import import_config, write_recipe

    into = Path(out).parent if out else Path()
    found = import_config(config, into=into)
    if out:
        write_recipe(found, out, force=force)
    for note in found.notes:
        click.echo(f"note: {printable(note)}", err=True)
    click.echo(f"{out}: written" if out else found.text, nl=bool(out))


def warn_of(plan: Any) -> None:
    """Print the warnings of a plan on stderr."""
    warn(plan.warnings)


def warn(warnings: Iterable[str]) -> None:
    """Print warnings on stderr."""
    for warning in warnings:
        click.echo(f"warning: {printable(warning)}", err=True)


def check_device(device: str) -> None:
    """Raise MergeflowError for a device that is not there, before anything is planned."""
    import re

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


_BYTES = ("fetch", "read", "compute", "write")
"""Work that is counted in bytes; stages count batches, layers or examples."""


class _Progress:
    """Progress on stderr: a bar on a terminal, a line now and then in a pipe."""

    LINE_SECONDS = 10.0

    def __init__(self, quiet: bool, unit: str = "") -> None:
        self.quiet = quiet
        self.unit = unit
        self.terminal = sys.stderr.isatty()
        self.what = ""
        self.bar: Any = None
        self.done = self.total = 0
        self.started = self.spoke = self.seen = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def planned(self, plan: Any) -> None:
        """Say what is about to be done."""
        from mergeflow.reporting import size_text

        if not self.quiet:
            self.say(f"{plan.name}: {len(plan.rows)} tensors, {size_text(plan.bytes_out)} to write")

    def update(self, what: str, done: int, total: int) -> None:
        """Called from any thread: a race costs a count on the screen and nothing else.

        What stands behind a comma in `what` is a note on the same work.
        """
        if self.quiet:
            return
        if not done and not total:  # something to be told, and nothing to be counted
            self.close()
            self.say(printable(what))
            return
        name, _, note = what.partition(", ")
        now = time.monotonic()
        if (name, total) != (self.what, self.total):
            self.close()
            self.what, self.done, self.total, self.started = name, 0, total, self.seen  # what is told of now began then
            if self.terminal:
                from tqdm import tqdm

                self.bar = tqdm(
                    total=total,
                    desc=name,
                    unit=self._unit,
                    unit_scale=self._unit == "B",
                    leave=False,
                    file=sys.stderr,
                    mininterval=0.2,
                )
        self.done += done
        self.seen = now
        if self.bar is not None:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(done)
        elif not self.terminal and now - self.spoke > self.LINE_SECONDS:
            self.spoke = now
            speed = self.done / max(now - self.started, 1e-9)
            left = (self.total - self.done) / speed if speed else 0.0
            amounts = [self._amount(count) for count in (self.done, self.total, speed)]
            self.say(f"{what}: {amounts[0]} of {amounts[1]}, {amounts[2]}/s, {left:.0f} s left")

    def _amount(self, count: float) -> str:
        from mergeflow.reporting import size_text

        return size_text(count) if self._unit == "B" else f"{count:.0f} {self._unit}".rstrip()

    @property
    def _unit(self) -> str:
        """Bytes for what is fetched, read or written; stages count batches, layers or examples."""
        return "B" if self.what in _BYTES else self.unit

    def say(self, line: str) -> None:
        """A line on stderr; a run is not given up because nobody reads them any more."""
        try:
            click.echo(line, err=True)
        except OSError:
            self.quiet = True

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

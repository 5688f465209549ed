"""The command line as a person meets it: most of it in processes of its own."""

from __future__ import annotations

import json
import os
import pathlib
import pty
import re
import resource
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator

import click
import pytest
import yaml
from pages import every_op, write_models
from toys import SOURCE, call, environment, write_toys

from mergeflow import cli
from mergeflow.errors import InputError, MergeflowError, Problems
from mergeflow.ops import all_ops

RECIPE = """\
recipe: 1
name: merged
description: Two fine-tunes of one model.
vars: {part: 0.5}
models: {base: ./base, a: ./a, b: ./b}
nodes:
  merged: {op: ties, base: base, inputs: [a, b], density: "${part}"}
output: {like: base}
"""
HEAVY = ("torch", "torch._C", "huggingface_hub", "tqdm", "numpy", "transformers")
LIGHT = {
    "help": ["--help"],
    "help of run": ["run", "--help"],
    "validate": ["validate", "recipe.yaml"],
    "validate every op": ["validate", "every/every.yaml"],
    "ops": ["ops"],
    "one op": ["ops", "ties"],
    "schema": ["schema"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    made: pathlib.Path = tmp_path_factory.mktemp("cli")
    write_toys(made)
    (made / "recipe.yaml").write_text(RECIPE)
    every = every_op()
    (made / "every").mkdir()
    (made / "every" / "every.yaml").write_text(yaml.safe_dump(every, sort_keys=False))
    write_models(made / "every", every)
    return made


@pytest.fixture
def inside(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MERGEFLOW_CACHE", str(folder / "cache"))
    yield folder


def process(folder: pathlib.Path, *words: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-m", "mergeflow", *words],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


# The commands


def test_a_run_prints_its_result_on_stdout_and_progress_on_stderr_and_the_next_says_already_made(
    folder: pathlib.Path,
) -> None:
    first = process(folder, "run", "recipe.yaml", "-o", "out", "-v")
    assert first.returncode == 0, first.stderr
    assert re.fullmatch(r"out: 4 tensors, \d+ B in \d+\.\d s\n", first.stdout)
    assert "merged: 4 tensors" in first.stderr and re.search(r"plan +\d+\.\d+ s", first.stderr)
    again = process(folder, "run", "recipe.yaml", "-o", "out", "-q")
    assert (again.returncode, again.stdout, again.stderr) == (0, "out: already made\n", "")


def test_without_o_the_output_is_named_after_the_recipe(inside: pathlib.Path) -> None:
    done = call("run", "recipe.yaml", "-q")
    assert (done.code, done.err) == (0, "") and done.out.startswith("merged: 4 tensors")
    assert (inside / "merged" / "model.safetensors").is_file()


def test_quiet_says_nothing_but_the_result(inside: pathlib.Path) -> None:
    done = call("run", "recipe.yaml", "-o", "quiet", "-q")
    assert (done.code, done.err, done.out.count("\n")) == (0, "", 1)


def test_a_recipe_with_every_op_is_valid_and_runs_in_one_sweep(inside: pathlib.Path) -> None:
    every = every_op()
    assert {node["op"] for node in every["nodes"].values()} == set(all_ops())
    assert call("validate", "every/every.yaml", "recipe.yaml").out == "every/every.yaml: good\nrecipe.yaml: good\n"
    done = call("run", "every/every.yaml", "-q")
    assert done.code == 0, done.err
    assert {path.name for path in (inside / "every-op").iterdir()} == set(all_ops())


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (["run", "recipe.yaml", "-o", "json-out", "--json"], {"path", "plan", "made", "rows", "seconds", "warnings"}),
        (["plan", "recipe.yaml", "--json"], {"name", "digest", "rows", "bytes_in", "bytes_out", "peak_memory"}),
        (["validate", "recipe.yaml", "--json"], {"recipes", "problems"}),
        (["inspect", "base", "--json"], {"tensors"}),
    ],
)
def test_json_is_one_document_on_stdout(words: list[str], keys: set[str], inside: pathlib.Path) -> None:
    done = call(*words)
    data = json.loads(done.out)
    assert done.code == 0 and keys <= data.keys()


@pytest.mark.parametrize("command", ["run", "plan", "validate"])
def test_problems_are_one_json_document_too(command: str, inside: pathlib.Path) -> None:
    (inside / "bad.yaml").write_text(RECIPE.replace("op: ties", "op: teis") + "nme: x\n")
    done = call(command, "bad.yaml", "--json")
    data = json.loads(done.out)
    assert done.code == data["exit_code"] == 2
    assert data["problems"] == [
        {"where": "bad.yaml:9:1", "what": "unknown key 'nme'", "fix": "Did you mean 'name'?"},
        {"where": "bad.yaml:7:16", "what": "unknown op 'teis'", "fix": "Did you mean 'ties'?"},
    ]
    assert done.err.endswith("2 problems\n")


def test_validate_goes_through_all_recipes_and_counts_their_problems(inside: pathlib.Path) -> None:
    (inside / "one.yaml").write_text(RECIPE.replace("op: ties", "op: teis"))
    (inside / "two.yaml").write_text(RECIPE + "nme: x\noutptu: y\n")
    done = call("validate", "one.yaml", "recipe.yaml", "two.yaml")
    assert (done.code, done.out) == (2, "recipe.yaml: good\n")
    assert [line.split(":")[0] for line in done.err.splitlines()] == ["one.yaml", "two.yaml", "two.yaml", "3 problems"]


def test_a_plan_for_a_person_names_models_files_bytes_memory_and_digest(inside: pathlib.Path) -> None:
    done = call("plan", "recipe.yaml")
    data = json.loads(call("plan", "recipe.yaml", "--json").out)
    assert done.code == 0
    for word in ("./base", "./a", "./b", "4 tensors", "ties", "model.safetensors", "config.json", data["digest"]):
        assert word in done.out
    assert not (inside / ".merged.staging").exists()


def test_a_graph_is_mermaids(inside: pathlib.Path) -> None:
    done = call("plan", "every/every.yaml", "--graph", "mermaid")
    assert done.code == 0 and done.out.startswith("graph LR\n")
    every = every_op()
    assert done.out.count("[(") == len(every["models"]) and all(op in done.out for op in all_ops())


def test_inspect_takes_a_folder_a_file_and_what_looks_like_a_repository(inside: pathlib.Path) -> None:
    for path in ("base", "./base", "base/model.safetensors", str(inside / "base")):
        done = call("inspect", path)
        assert done.code == 0 and "model.embed_tokens.weight" in done.out, path


def test_ops_lists_all_shows_one_and_names_the_nearest(inside: pathlib.Path) -> None:
    listed = call("ops")
    assert listed.code == 0 and all(name in listed.out for name in all_ops())
    assert call("ops", "--markdown").out.startswith("|")
    for name in all_ops():
        assert name in call("ops", name).out
    done = call("ops", "tise")
    assert done.code == 2 and "Did you mean 'ties'?" in done.err


def test_the_schema_is_json(inside: pathlib.Path) -> None:
    assert json.loads(call("schema").out)["$schema"].startswith("http://json-schema.org/draft-07")


def test_set_changes_the_recipe_and_the_plan(inside: pathlib.Path) -> None:
    plain, other = (
        json.loads(call("plan", "recipe.yaml", "--json", *words).out) for words in ([], ["--set", "part=0.25"])
    )
    assert plain["recipe"]["nodes"]["merged"]["density"] == 0.5
    assert other["recipe"]["nodes"]["merged"]["density"] == 0.25
    assert plain["digest"] != other["digest"]


def test_every_command_has_help_and_every_option_says_what_it_is() -> None:
    for name, command in cli.commands.commands.items():
        done = call(name, "--help")
        assert done.code == 0 and done.out.startswith(f"Usage: mergeflow {name}")
        assert command.help and len(command.help) > 20, name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.name}"


def test_every_command_is_in_the_readme() -> None:
    readme = (SOURCE / "README.md").read_text()
    missing = [name for name in cli.commands.commands if not re.search(rf"mergeflow {name}\b", readme)]
    assert not missing, f"README.md says nothing of `mergeflow {missing[0]}`"


def test_the_version_is_told() -> None:
    from mergeflow import __version__

    assert call("--version").out == f"mergeflow, version {__version__}\n"


# Start-up


@pytest.mark.parametrize("words", LIGHT.values(), ids=LIGHT)
def test_light_commands_import_nothing_heavy(words: list[str], folder: pathlib.Path) -> None:
    done = process(folder, *words, options=("-X", "importtime"))
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "mergeflow.cli" in imported and not imported & {*HEAVY}


def test_the_library_checks_a_recipe_without_torch(folder: pathlib.Path) -> None:
    code = (
        "import sys, mergeflow, mergeflow.ops\n"
        "mergeflow.load_recipe('every/every.yaml')\n"
        "from mergeflow.schema import ops_table, schema_text\n"
        "ops_table(); schema_text()\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def children_seconds() -> float:
    """Processor time of the processes that have ended: what else runs on the machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("words", LIGHT.values(), ids=LIGHT)
def test_light_commands_answer_well_under_a_second(words: list[str], folder: pathlib.Path) -> None:
    # What looks at every parameter of every op may take a second. A machine that is slow for now is slow for what a command
    # is built on, too: four times the import of that is allowed there, which is under half a second on one that is not.
    best = bare = float("inf")
    share = 2 if words in (LIGHT["schema"], LIGHT["validate every op"]) else 1
    for _ in range(5):
        start = children_seconds()
        subprocess.run([sys.executable, "-c", "import click, yaml; from pydantic import BaseModel"], check=True)
        between = children_seconds()
        assert process(folder, *words).returncode == 0
        bare, best = min(bare, between - start), min(best, children_seconds() - between)
        if best < share * max(0.5, 4 * bare):
            return
    pytest.fail(f"{' '.join(words)} takes {best:.2f} s, and the libraries that it is built on {bare:.2f} s")


# Progress


def on_a_terminal(folder: pathlib.Path, *words: str) -> tuple[str, int]:
    """What a command shows on a terminal, and its exit code."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    with subprocess.Popen(
        [sys.executable, "-m", "mergeflow", *words],
        cwd=folder,
        env=environment(TERM="xterm", COLUMNS="100"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as running:
        os.close(theirs)
        shown = b""
        while select.select([ours], [], [], 60)[0]:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            shown += piece
        os.close(ours)
        code = running.wait(60)
    return shown.decode(), code


def test_a_terminal_gets_a_bar_that_is_taken_away(folder: pathlib.Path) -> None:
    shown, code = on_a_terminal(folder, "run", "recipe.yaml", "-o", "bar")
    assert code == 0, shown
    assert re.search(r"\rwrite: +\d+%\|", shown), repr(shown)
    last = shown.replace("\r\n", "\n").rstrip("\n").split("\n")[-1]
    assert last.split("\r")[-1].startswith("bar: 4 tensors"), repr(last)


@pytest.fixture
def progress_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., cli._Progress]:
    """Makes the progress of a pipe whose clock says these seconds, first when it is made."""

    def made(*times: float) -> cli._Progress:
        clock = iter(times)
        monkeypatch.setattr(cli.time, "monotonic", lambda: next(clock))
        return cli._Progress(quiet=False)

    return made


def test_a_pipe_gets_a_line_now_and_then(
    progress_at: Callable[..., cli._Progress], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = progress_at(0.0, 1.0, 11.0, 12.0, 25.0)
    for _ in range(4):
        shown.update("write", 500_000_000, 3_000_000_000)
    shown.close()
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [
        "write: 1.0 GB of 3.0 GB, 90.9 MB/s, 22 s left",
        "write: 2.0 GB of 3.0 GB, 80.0 MB/s, 12 s left",
    ]


def test_a_note_behind_a_comma_changes_and_the_count_goes_on(
    progress_at: Callable[..., cli._Progress], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = progress_at(0.0, 11.0, 22.0)
    for loss in ("2.50", "2.25"):
        shown.update(f"train, loss {loss}", 10, 40)
    assert [line.partition(" of ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "train, loss 2.50: 10",
        "train, loss 2.25: 20",
    ]


def test_the_speed_of_what_is_new_counts_the_time_until_it_is_first_told(
    progress_at: Callable[..., cli._Progress], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = progress_at(0.0, 5.0, 25.0)
    shown.update("batches", 1, 1)
    shown.update("capture tokens of source 1", 4000, 20_000)
    assert capsys.readouterr().err == "capture tokens of source 1: 4000 of 20000, 200/s, 80 s left\n"


def test_a_pipe_gets_no_escape_codes_and_no_bar(folder: pathlib.Path) -> None:
    done = process(folder, "run", "recipe.yaml", "-o", "piped")
    assert done.returncode == 0 and "\r" not in done.stderr and "\x1b" not in done.stderr + done.stdout


# Ends


@pytest.mark.parametrize("words", [["schema"], ["ops"], ["plan", "recipe.yaml", "--json"]], ids=" ".join)
def test_a_reader_that_goes_away_is_no_error(words: list[str], folder: pathlib.Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "mergeflow", *words],
            cwd=folder,
            env=environment(),
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_whose_progress_nobody_reads_goes_on(folder: pathlib.Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "mergeflow", "run", "recipe.yaml", "-o", "unread"]
    done = subprocess.run(words, cwd=folder, env=environment(), stdout=writing, stderr=writing, timeout=60)
    os.close(writing)
    assert done.returncode == 0 and (folder / "unread" / "model.safetensors").is_file()


def test_a_broken_pipe_of_something_else_is_a_bug(inside: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*words: object, **more: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("mergeflow.pipeline.run", broken)
    assert call("run", "recipe.yaml", "-o", "never").code == 70


def interrupted(folder: pathlib.Path, body: str, *words: str) -> tuple[int, str]:
    """The end of a command into which `body` is patched, and that gets a Ctrl-C when it prints `now`."""
    code = f"import sys, time\n{body}\nsys.argv = ['mergeflow', *{list(words)!r}]\nimport mergeflow.cli as cli\ncli.main()\n"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "now\n"
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
    return running.returncode, errors


WAIT = "def wait(*a, **k):\n    print('now', flush=True)\n    time.sleep(30)\n"


def test_ctrl_c_while_the_recipe_is_read_gives_130(folder: pathlib.Path) -> None:
    body = f"{WAIT}import mergeflow.recipe as recipe\nrecipe.load_recipe = wait"
    assert interrupted(folder, body, "validate", "recipe.yaml") == (130, "\nstopped\n")


def test_ctrl_c_that_a_library_turns_into_its_own_error_gives_130(folder: pathlib.Path) -> None:
    body = (
        f"{WAIT}def turned(*a, **k):\n    try:\n        wait()\n    except KeyboardInterrupt:\n"
        "        raise ImportError('numpy could not be loaded') from None\n"
        "import mergeflow.recipe as recipe\nrecipe.load_recipe = turned"
    )
    assert interrupted(folder, body, "plan", "recipe.yaml") == (130, "stopped\n")


def test_ctrl_c_while_rows_are_made_says_how_to_go_on_and_the_next_run_does(folder: pathlib.Path) -> None:
    body = (
        "import mergeflow.executing as executing\nreal = executing.execute\n"
        "def slow(*a, stop, **k):\n    print('now', flush=True)\n    stop.wait(30)\n    return real(*a, stop=stop, **k)\n"
        "executing.execute = slow"
    )
    code, errors = interrupted(folder, body, "run", "recipe.yaml", "-o", "resumed", "-q")
    assert (code, errors) == (130, "stopped. Run the same command again to go on from here.\n")
    assert not (folder / "resumed").exists() and (folder / ".resumed.staging").exists()
    done = process(folder, "run", "recipe.yaml", "-o", "resumed", "-q")
    assert done.returncode == 0 and (folder / "resumed" / "model.safetensors").exists()
    assert not (folder / ".resumed.staging").exists()


def test_a_bug_gives_70_one_line_and_a_file_with_the_trace(
    inside: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for bug in (ValueError("no such\nluck"), MergeflowError("bytes were filled twice", where="w")):

        def broken(*words: object, bug: Exception = bug, **more: object) -> None:
            raise bug

        monkeypatch.setattr("mergeflow.pipeline.run", broken)
        done = call("run", "recipe.yaml", "-o", "never")
        assert (done.code, done.out, done.err.count("\n")) == (70, "", 1)
        found = re.fullmatch(r"a bug in mergeflow: \w+: .+\. The trace is in (.+)\n", done.err)
        assert found, done.err
        trace = pathlib.Path(found[1]).read_text()
        assert "Traceback" in trace and "in broken" in trace and "'recipe.yaml'" in trace


def test_a_bug_where_no_file_can_be_written_shows_the_trace(
    inside: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*words: object, **more: object) -> None:
        raise ValueError("no such luck")

    def full(*words: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mergeflow.pipeline.run", broken)
    monkeypatch.setattr("tempfile.NamedTemporaryFile", full)
    done = call("run", "recipe.yaml", "-o", "never")
    assert done.code == 70 and "Traceback" in done.err


def test_too_little_memory_in_the_middle_is_no_bug(inside: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(*words: object, **more: object) -> None:
        raise MemoryError

    monkeypatch.setattr("mergeflow.pipeline.run", greedy)
    done = call("run", "recipe.yaml", "-o", "never")
    assert done.code == 5 and "--memory" in done.err


def test_usage_errors_give_2_and_name_the_help(inside: pathlib.Path) -> None:
    for words in (["run"], ["rnu", "x"], ["run", "recipe.yaml", "--nope"], ["run", "recipe.yaml", "--io", "fast"]):
        done = call(*words)
        assert (done.code, done.out) == (2, "") and "--help" in done.err and "Usage: mergeflow" in done.err


def test_several_problems_give_the_first_of_2_3_5_6(inside: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*words: object, **more: object) -> None:
        raise Problems([InputError("is gone", where="./a"), InputError("is gone", where="./b")])

    monkeypatch.setattr("mergeflow.pipeline.run", failing)
    done = call("run", "recipe.yaml", "-o", "never")
    assert (done.code, done.err) == (3, "./a: is gone\n./b: is gone\n2 problems\n")


def test_names_from_files_cannot_move_the_cursor(inside: pathlib.Path) -> None:
    (inside / "evil.yaml").write_text(RECIPE.replace("op: ties", 'op: "ti\\e[2Jes"'))
    done = call("validate", "evil.yaml")
    assert done.code == 2 and "\x1b" not in done.err and "\\x1b[2J" in done.err

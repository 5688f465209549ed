"""The whole way in order: a recipe is planned from headers, executed into a staging folder, and published by one rename.

The only module that joins planning, executing, writing and publishing, which do not know each other. Nothing is decided
here about numbers or bytes: a step is called, its result handed to the next.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from mergeflow.checkpoint import Checkpoint, open_checkpoint
from mergeflow.checkpoint.adapter import open_adapter
from mergeflow.checkpoint.statistics import STATISTICS, open_statistics
from mergeflow.comparing import sample
from mergeflow.document import dump_yaml
from mergeflow.errors import (
    InputError,
    Interrupted,
    MachineError,
    MergeflowError,
    NumericError,
    Problems,
    RecipeError,
    raise_all,
)
from mergeflow.garbage import no_collection
from mergeflow.graph import Plan, PlannedStage, SideFile
from mergeflow.hub import is_local, locate
from mergeflow.manifest import FORMAT, MANIFEST, check_folder, encode_manifest, file_facts, shard_facts, software
from mergeflow.ops.statistics import StageOp
from mergeflow.ops.unchanged import Unchanged
from mergeflow.planning import (
    NO_MODEL,
    applications,
    keeps_quantisation,
    like_and_tokenizer,
    loads,
    make_plan,
    needed_models,
    plan_digest,
)
from mergeflow.preparing import Runner, Stage, asked_digest, check_memory, prepare, stages_of
from mergeflow.publishing import CARD, RECIPE, side_files
from mergeflow.recipe import ArtifactSource, ModelSource, Recipe
from mergeflow.writing import Finished, Staging, finished_digest, free_bytes, refuse, repair

if TYPE_CHECKING:
    from mergeflow.executing import Reading, Report, Sink

LEAST_MEMORY = 64 * 2**20

Progress = Callable[[str, int, int], None]
"""Called with what is going on (`fetch`, `read`, `write`) and numbers of bytes: done since the last call, and in all."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a run did. `made` is false when the target was finished before; `seconds` are by part of the way."""

    path: Path
    digest: str
    made: bool
    rows: int = 0
    resumed: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    stages: tuple[tuple[str, str, bool], ...] = ()
    """Of each stage its node, the key of its artifact, and whether that was in the cache before."""


@no_collection()
def open_models(recipe: Recipe, allow_pickle: bool = False) -> dict[str, Checkpoint]:
    """The headers of every model the recipe's outputs ask for. Raises all that fail, together."""
    models: dict[str, Checkpoint] = {}
    errors: list[MergeflowError] = []
    for name in needed_models(recipe):
        section = "models" if name in recipe.models else "artifacts"
        source = recipe.models.get(name) or recipe.artifacts[name]
        try:
            folder = locate(
                source.location, revision=source.revision, subfolder=source.subfolder, relative_to=recipe.folder
            )
            if isinstance(source, ModelSource) and source.adapter is not None:
                models[name] = open_adapter(folder, allow_pickle=allow_pickle)
            elif isinstance(source, ArtifactSource) and folder.exists(STATISTICS):
                models[name] = open_statistics(folder)
            else:
                models[name] = open_checkpoint(folder, file=source.file, allow_pickle=allow_pickle)
        except MergeflowError as error:
            errors.append(error.placed(recipe.where((section, name))))
    raise_all(errors)
    return models


@no_collection()
def plan(recipe: Recipe, *, out: str | Path | None = None, device: str = "cpu", allow_pickle: bool = False) -> Plan:
    """Everything headers can tell about a run of the recipe; no weight is read.

    With `out` the written recipe's local paths are relative to it. `device` is where its stages run. Pickled weights are
    refused without `allow_pickle`, which no recipe can give. Raises every problem found, together.
    """
    opened = open_models(recipe, allow_pickle)
    prepared = prepare(recipe, opened, foresee=_foresee(device, allow_pickle), device=device)
    models = {**opened, **prepared.artifacts}
    recipe = prepared.recipe
    made = make_plan(recipe, {name: models[name] for name in needed_models(recipe)})
    files = list(made.side_files)
    warnings = list(made.warnings)
    idle = ", ".join(name for name in recipe.models if name not in models)
    notes = (*made.notes, f"no output needs {idle}, so nothing of it is read") if idle else made.notes
    for output in recipe.outputs.values():
        like, tokenizer = like_and_tokenizer(recipe, output)
        rows = [row for row in made.rows if row.output == output.key]
        dtypes: dict[str, int] = {}
        for row in rows:
            dtypes[row.dtype.name] = dtypes.get(row.dtype.name, 0) + row.nbytes
        used = {
            load.model for load in (made.loads if len(recipe.outputs) == 1 else loads(*(r.expression for r in rows)))
        }
        try:
            beside, lints = side_files(
                output=output.key,
                # An artifact is no model: nothing may take it for one.
                like=None if made.spaces[output.key] in NO_MODEL else made.models[like],
                like_name=like,
                tokenizer=None if made.spaces[output.key] in NO_MODEL else made.models[tokenizer],
                tokenizer_name=tokenizer,
                inputs={name: checkpoint for name, checkpoint in made.models.items() if name in used},
                dtypes=dtypes,
                config=output.config,
                card=output.card,
                recipe_name=recipe.name,
                description=recipe.description,
                resolved_recipe=_portable(recipe, Path(out or recipe.name), output.key),
                ops=sorted(
                    {
                        *_ops(rows),
                        *([("stack", None)] if made.stacks[output.key] else []),
                        *((one.op.name, one.op.paper) for one in prepared.stages if one.node.name in used),
                    },
                    key=lambda named: named[0],
                ),
                tied=False if output.tied == "untie" else None,
                space=made.spaces[output.key],
                quantised=keeps_quantisation(rows, like, made.models[like]),
                stacks=made.stacks[output.key],
                configs={name: checkpoint.config or {} for name, checkpoint in made.models.items()},
            )
        except MergeflowError as error:
            raise error.placed(recipe.where(output.path)) from None
        taken = {file.file for file in beside}
        files = [file for file in files if file.output != output.key or file.file not in taken]
        files += beside
        warnings += lints
    parts = {**made.parts, "the files beside the weights": _digest_beside(files, made.models)}
    return replace(
        made,
        side_files=tuple(files),
        warnings=tuple(dict.fromkeys(warnings)),
        notes=notes,
        parts=parts,
        stages=tuple(
            PlannedStage(
                one.node.name,
                one.op.name,
                ", ".join(one.models),
                ", ".join(given.data for given in one.node.inputs if given.data) or None,
                one.key,
                one.done,
                one.needs,
            )
            for one in prepared.stages
        ),
        digest=plan_digest(parts),
    )


def _foresee(device: str, allow_pickle: bool) -> Callable[[Recipe], Plan]:
    """The plan of a recipe, for what its stages run."""
    return lambda asked: plan(asked, device=device, allow_pickle=allow_pickle)


def _digest_beside(files: list[SideFile], models: Mapping[str, Checkpoint]) -> str:
    """A digest of what stands beside the weights, but for what only retells the recipe: what is copied, by its stamp."""
    hasher = blake3()
    for file in sorted(files, key=lambda file: (file.output, file.file)):
        if file.content is None:
            told = models[file.model].stamp(file.name).encode()
        else:
            told = b"" if file.file in (CARD, RECIPE) else file.content
        hasher.update(f"{file.output}\n{file.file}\n{len(told)}\n".encode())
        hasher.update(told)
    return hasher.hexdigest()


def _ops(rows: list[Any]) -> list[tuple[str, str | None]]:
    """The ops that rows use, with their papers, by name."""
    ops = (one.op for one in applications(row.expression for row in rows))
    return sorted({op.name: op.paper for op in ops if not isinstance(op, Unchanged)}.items())


def _portable(recipe: Recipe, out: Path, key: str) -> str:
    """The resolved recipe with local paths as they are seen from the output's folder, so that it runs from there."""
    here = os.path.abspath(out / key if key else out)

    def seen(path: str) -> str:
        if not is_local(path) or path.startswith(("/", "~")):
            return path
        relative = os.path.relpath(os.path.abspath(recipe.folder / path), here)
        return relative if relative.startswith("../") else f"./{relative}"

    sections: dict[str, dict[str, Any]] = {}
    locations = {
        "models": {name: source.location for name, source in recipe.models.items()},
        "artifacts": {name: source.location for name, source in recipe.artifacts.items()},
        "data": {name: source.path for name, source in recipe.data.items()},
    }
    for section, sources in locations.items():
        for name, given in recipe.resolved.get(section, {}).items():
            path, key = seen(sources[name]), "adapter" if isinstance(given, dict) and "adapter" in given else "path"
            sections.setdefault(section, {})[name] = {**given, key: path} if isinstance(given, dict) else path
    return dump_yaml({**recipe.resolved, **sections})


def run(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    device: str = "cpu",
    threads: int | None = None,
    memory: int | None = None,
    reading: Reading = "auto",
    force: bool = False,
    fresh: bool = False,
    allow_pickle: bool = False,
    progress: Progress = lambda what, done, total: None,
    planned: Callable[[Plan], None] = lambda plan: None,
    accept: Callable[[Mapping[str, Any]], None] = lambda inputs: None,
    watch: Callable[[Plan, Sink], Sink] = lambda plan, sink: sink,
) -> Result:
    """Make the recipe's output at `out` (default: `./<name>`), going on where a killed run of the same plan stopped.

    `memory` is what mergeflow may allocate, in bytes (default: a quarter of the machine's); `force` replaces a finished
    output of another plan, `fresh` forgets what a killed run left.
    `allow_pickle` reads pickled weights, of which only the tensors are. Nothing is left that looks finished unless it is.
    `accept` is shown what was read, as the manifest has it (`inputs`), before anything is published, and refuses by an InputError;
    `watch` may put something between the executor and the writer, which then sees every byte of every row.
    Raises any MergeflowError; on the first SIGINT or SIGTERM, Interrupted after the blocks in flight.
    """
    clock = _Clock()
    target = Path(out) if out is not None else Path(recipe.name)
    repair(target)
    stages, asked = _stages(recipe, device, allow_pickle)
    told = tuple((stage.node.name, stage.key, stage.done) for stage in stages)
    if not fresh and not all(stage.done for stage in stages) and (kept := _made_as_asked(target, recipe, asked)):
        accept(_recorded_inputs(target, next(iter(recipe.outputs))))
        found = tuple(one for one in told if one[2])
        return Result(target, kept[0], made=False, rows=kept[1], stages=found)
    _run_stages(recipe, device, threads, memory, allow_pickle, progress, stages)
    clock.lap("stages")
    made = plan(recipe, out=target, device=device, allow_pickle=allow_pickle)
    stamps = _stamps(made)
    clock.lap("plan")
    if not fresh and finished_digest(target) == made.digest:
        accept(_recorded_inputs(target, next(iter(recipe.outputs))))
        return Result(target, made.digest, made=False, rows=len(made.rows), warnings=made.warnings, stages=told)
    _check_target(made, target, force)
    made = _with_sample(made)
    planned(made)
    budget = Budget.of(made, memory, threads)
    clock.lap("budget")
    import torch  # noqa: F401  here, so that what it takes is not counted as work

    clock.lap("start_up")
    # Bits may differ between devices: a run goes on only from what the same kind of device made.
    parts = {**made.parts, "the device": device.partition(":")[0]}
    with _signals() as stop:
        staging = Staging.open(
            target,
            digest=made.digest,
            parts=parts,
            shards=made.shards,
            rows=made.rows,
            force=force,
            fresh=fresh,
            pool_bytes=budget.pool,
            stop=stop,
        )
        clock.lap("stage")
        with staging:
            try:
                paths = _fetch(made, stop, progress)
                clock.lap("fetch")
                report = _fill(made, paths, staging, watch, budget, device, reading, stop, progress)
                _check_stamps(stamps)
                clock.lap("rows")
            except (NumericError, RecipeError, InputError, Problems) as error:
                # The same plan would end here again, and another one cannot go on from what it left; what a disk could
                # not read this time it may read the next.
                if not isinstance(error, InputError) or _changed(stamps):
                    staging.discard()
                raise
            finished = staging.finish()
            inputs = _inputs(made, finished)
            try:
                accept(inputs)
            except InputError:
                staging.discard()
                raise
            for file in made.side_files:
                _write_side_file(staging, file, made.models)
            for key in recipe.outputs:
                beside = {
                    file.file: staging.path / _below(key, file.file) for file in made.side_files if file.output == key
                }
                staging.add(
                    _below(key, MANIFEST), _manifest(made, finished, inputs, beside, key, recipe.outputs, asked)
                )

            def verify(folder: Path) -> None:
                _check_written(folder, target, recipe.outputs, threads, progress)

            staging.publish(verify)
            clock.lap("publish")
    return Result(
        path=target,
        digest=made.digest,
        made=True,
        rows=len(made.rows),
        resumed=len(staging.finished),
        bytes_in=report.bytes_in,
        bytes_out=report.bytes_out,
        seconds={**clock.laps, **{f"threads.{key}": value for key, value in report.seconds.items()}},
        warnings=made.warnings,
        stages=told,
    )


def recompute(
    recipe: Recipe,
    wanted: Collection[tuple[str, str]],
    accept: Callable[[Mapping[str, Any]], None],
    *,
    device: str = "cpu",
    threads: int | None = None,
    memory: int | None = None,
    reading: Reading = "auto",
    allow_pickle: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> dict[tuple[str, str], str]:
    """Make some tensors of a recipe again and write none of them; the digest of each, by output and name.

    `wanted` are such pairs; those that the recipe does not make are left out. `accept` is shown what goes in, as a manifest has it
    (`inputs`): before a weight is read, and again with the digests of what was. Stages that the cache lacks are run. Raises what a run
    raises, and what `accept` does.
    """
    from mergeflow.executing import execute

    _run_stages(recipe, device, threads, memory, allow_pickle, progress, _stages(recipe, device, allow_pickle)[0])
    made = plan(recipe, device=device, allow_pickle=allow_pickle)
    rows = tuple(row for row in made.rows if (row.output, row.name) in wanted)
    made = replace(made, rows=rows, loads=tuple(loads(*(row.expression for row in rows))), equal=())
    stamps = _stamps(made)
    accept(_inputs(made, {}))
    budget = Budget.of(made, memory, threads)
    sink = _Digests()
    total = sum(row.nbytes for row in rows)
    with _signals() as stop:
        execute(
            made,
            _fetch(made, stop, progress),
            sink,
            device=device,
            threads=budget.threads,
            memory=budget.compute,
            reading=reading,
            stop=stop,
            progress=lambda bytes_in, bytes_out: progress("compute", bytes_out, total),
            drop_behind=budget.drop_behind,
        )
    _check_stamps(stamps)
    accept(_inputs(made, sink.done))
    return {(rows[index].output, rows[index].name): row.digest for index, row in sink.done.items()}


class _Digests:
    """A sink that keeps of each row its digests and nothing else."""

    def __init__(self) -> None:
        self.done: dict[int, Finished] = {}

    def memory(self, row: int, start: int, stop: int) -> list[memoryview]:
        return [memoryview(bytearray(stop - start))]

    def filled(self, row: int, start: int, stop: int) -> None:
        pass

    def row_done(self, row: int, digest: str, inputs: Mapping[str, str]) -> None:
        self.done[row] = Finished(digest, inputs)


def _stages(recipe: Recipe, device: str, allow_pickle: bool) -> tuple[tuple[Stage, ...], str]:
    """The stages that the outputs ask for, as the cache has them, and a digest of all that the run is given; none without stages."""
    if not any(isinstance(node.op, StageOp) for node in recipe.nodes.values()):
        return (), ""
    opened = open_models(recipe, allow_pickle)
    stages = stages_of(recipe, opened, device)
    return stages, asked_digest(recipe, opened, stages, device) if stages else ""


def _made_as_asked(target: Path, recipe: Recipe, asked: str) -> tuple[str, int] | None:
    """The plan digest and number of tensors of a finished output that a run given the same has made, all its files in place."""
    rows = 0
    for key in recipe.outputs:
        folder = target / key if key else target
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
            files = {**manifest["shards"], **manifest["files"]}
            whole = all((folder / name).stat().st_size == facts["size"] for name, facts in files.items())
            if not whole or manifest["asked"] != asked:
                return None
            rows += len(manifest["tensors"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
    digest = finished_digest(target)
    return None if digest is None else (digest, rows)


def _run_stages(
    recipe: Recipe,
    device: str,
    threads: int | None,
    memory: int | None,
    allow_pickle: bool,
    progress: Progress,
    stages: tuple[Stage, ...],
) -> None:
    """Make the artifacts that rows need and the cache lacks."""
    if all(stage.done for stage in stages):
        return
    from mergeflow.executing import threads_for

    foresee = _foresee(device, allow_pickle)
    opened = open_models(recipe, allow_pickle)
    # What headers can show is said before hours of collecting, not after.
    made = plan(recipe, device=device, allow_pickle=allow_pickle)
    memory = memory or max(total_memory() // 4, LEAST_MEMORY)
    if device == "cpu":
        check_memory(recipe, made.stages, memory)
    with _signals() as stop:

        def materialise(asked: Recipe, node: str, folder: Path) -> None:
            run(
                asked.giving(node),
                folder,
                device=device,
                threads=threads,
                memory=memory,
                allow_pickle=allow_pickle,
                progress=progress,
            )

        runner = Runner(device, threads_for(threads), memory, stop, progress, materialise)
        prepare(recipe, opened, foresee=foresee, device=device, make=runner.make)


def _with_sample(made: Plan) -> Plan:
    """The plan with a warning for models that it averages and that look like strangers, told from a few KiB of each."""
    found = sample(made)
    if not found.size:
        return made
    note = f"{-(-found.size // 1024)} KiB of weights were sampled, to tell whether the models that are averaged have a common origin"
    return replace(made, warnings=(*made.warnings, *found.warnings), notes=(*made.notes, note))


def _check_target(made: Plan, target: Path, force: bool) -> None:
    """Raise RecipeError for a target that must not be written: one that stands in the way, or holds an input."""
    for name, path in _local_weights(made):
        if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(target)):
            raise RecipeError(
                f"holds the model '{name}', which this run reads", where=str(target), fix="Give another folder with -o."
            )
    try:
        refuse(target, force)
    except RecipeError as error:
        changed = _what_changed(made, target)
        if changed:
            error.what += f", made by a plan that differs in {changed}"
        raise


def _what_changed(made: Plan, target: Path) -> str:
    """The parts in which a finished output's plan was another, as words; empty where that cannot be told."""
    try:
        before = json.loads((target / MANIFEST).read_bytes())["parts"]
        return ", ".join(part for part, digest in made.parts.items() if before.get(part) != digest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""


def _fill(
    made: Plan,
    paths: Mapping[tuple[str, str], Path],
    staging: Staging,
    watch: Callable[[Plan, Sink], Sink],
    budget: Budget,
    device: str,
    reading: Reading,
    stop: threading.Event,
    progress: Progress,
) -> Report:
    from mergeflow.executing import check_tied, execute

    check_tied(made, paths, reading)
    total = sum(row.nbytes for index, row in enumerate(made.rows) if index not in staging.finished)
    return execute(
        made,
        paths,
        watch(made, staging),
        finished=staging.finished,
        device=device,
        threads=budget.threads,
        memory=budget.compute,
        reading=reading,
        stop=stop,
        progress=lambda bytes_in, bytes_out: progress("write", bytes_out, total),
        drop_behind=budget.drop_behind,
    )


class _Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self.last
        self.last = now


@dataclass(frozen=True, slots=True)
class Budget:
    """How `--memory` is spent, in bytes: buffers of the writer, blocks of the threads; and how many threads fit.

    `peak` is what is expected to be in use at most; `drop_behind` whether the inputs are so large against the memory at
    hand that what was read is given back at once.
    """

    pool: int
    compute: int
    threads: int
    peak: int
    drop_behind: bool

    @classmethod
    def of(cls, made: Plan, memory: int | None = None, threads: int | None = None) -> Budget:
        """The budget of a plan. Raises MachineError where `memory` is too little for one thread."""
        from mergeflow.executing import peak_memory, threads_for

        available = available_memory()
        memory = memory or max(total_memory() // 4, LEAST_MEMORY)
        if memory < LEAST_MEMORY:
            raise RecipeError("mergeflow needs at least 64MiB", where="--memory", fix="Write `--memory 64MiB` or more.")
        pool = min(max(memory // 4, 2**25), 2**27)
        compute, workers = memory - pool, threads_for(threads)
        while (peak := peak_memory(made, compute, workers)) > compute:
            if workers == 1:
                needed = (peak + pool) // 2**20 + 1
                raise MachineError(
                    f"this plan needs {needed} MiB of memory", where="--memory", fix=f"Write `--memory {needed}MiB`."
                )
            workers -= 1
        return cls(pool, compute, workers, pool + peak, drop_behind=made.bytes_in > available // 2)


def total_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's limit."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(machine, _group_limit() or machine)


def available_memory() -> int:
    """Bytes of memory that could be had now without swapping."""
    free = total_memory()
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = min(free, int(line.split()[1]) * 1024)
    except OSError:
        pass
    return free


def _group_limit() -> int | None:
    """The memory limit of the control group this process is in (v2 or v1), if it has one."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        v1 = "memory" in controllers.split(",")
        if not v1 and controllers:
            continue
        root = Path("/sys/fs/cgroup/memory" if v1 else "/sys/fs/cgroup")
        folder = root / group.lstrip("/")
        for place in (folder, *folder.parents):
            try:
                text = (place / ("memory.limit_in_bytes" if v1 else "memory.max")).read_text().strip()
            except OSError:
                continue
            if text.isdigit():
                limits.append(int(text))
            if place == root:
                break
    return min(limits, default=None)


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """The first SIGINT or SIGTERM stops the work after the blocks in flight, the second leaves at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except Interrupted as error:
        if received:
            fix = error.fix or "Run the same command again to go on from here."
            raise Interrupted("stopped", signal_number=received[0], fix=fix) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fetch(made: Plan, stop: threading.Event, progress: Progress) -> dict[tuple[str, str], Path]:
    """The local files of everything that rows read, fetched where a hub has them."""
    wanted: dict[str, dict[str, None]] = {}
    for load in made.loads:
        wanted.setdefault(load.model, {})[load.tensor.file] = None
    for pair in made.equal:
        for tensor in (pair.kept, pair.dropped):
            wanted.setdefault(pair.model, {})[tensor.file] = None
    paths: dict[tuple[str, str], Path] = {}
    for model, files in wanted.items():
        checkpoint = made.models[model]
        total = sum(checkpoint.files[name].size for name in files)

        def fetched(done: int, total: int = total) -> None:
            progress("fetch", done, total)
            if stop.is_set():
                raise Interrupted("stopped")

        try:
            found = checkpoint.paths(files, fetched)
        except MergeflowError:
            if stop.is_set():  # whatever a download makes of being stopped
                raise Interrupted("stopped") from None
            raise
        paths.update({(model, name): path for name, path in found.items()})
    return paths


def _stamps(made: Plan) -> dict[Path, tuple[int, int]]:
    """Size and time of change of the weights on this machine as they were planned with; a hub's have a revision."""
    return {path: _stamp(path) for _, path in _local_weights(made)}


def _local_weights(made: Plan) -> Iterator[tuple[str, Path]]:
    """The files of weights that are this machine's own and not a hub's, each with its model's name."""
    for name, checkpoint in made.models.items():
        if checkpoint.folder.revision is None:
            for path in checkpoint.folder.local(list(checkpoint.files)).values():
                yield name, path


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _changed(stamps: Mapping[Path, tuple[int, int]]) -> Path | None:
    """The first file that is not what it was."""
    return next((path for path, stamp in stamps.items() if _stamp(path) != stamp), None)


def _check_stamps(stamps: Mapping[Path, tuple[int, int]]) -> None:
    """Raises InputError where a file changed since it was planned with: its rows may be of either."""
    path = _changed(stamps)
    if path is not None:
        raise InputError(
            "the file changed while it was read", where=str(path), fix="Run again when nothing writes to it."
        )


def _below(key: str, file: str) -> str:
    return f"{key}/{file}" if key else file


def _write_side_file(staging: Staging, file: SideFile, models: Mapping[str, Checkpoint]) -> None:
    target = _below(file.output, file.file)
    if file.content is not None:
        staging.add(target, file.content)
    else:
        staging.copy(target, models[file.model].folder.local([file.name])[file.name])


def _inputs(made: Plan, finished: Mapping[int, Finished]) -> dict[str, Any]:
    """What was read, by the recipe's names: files with their stamps, and the digest of each tensor."""
    inputs: dict[str, Any] = {}
    for name, checkpoint in made.models.items():
        inputs[name] = {
            "source": checkpoint.folder.label,
            "revision": checkpoint.folder.revision,
            "files": {
                file.name: {
                    "size": file.size,
                    "header": file.header_digest,
                    "sha256": checkpoint.folder.sha256(file.name),
                }
                for file in checkpoint.files.values()
            }
            | {
                file: {"digest": digest, "sha256": checkpoint.folder.sha256(file)}
                for file, digest in checkpoint.deciding.items()
            },
            "tensors": {},
        }
    for row in finished.values():
        for tensor, digest in row.inputs.items():
            model, _, stored = tensor.partition("/")
            inputs[model]["tensors"][stored] = digest
    return inputs


def _recorded_inputs(target: Path, key: str) -> dict[str, Any]:
    """What a finished output says it was made of."""
    try:
        found = json.loads((target / _below(key, MANIFEST)).read_bytes())["inputs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"its manifest cannot be read ({error})", where=str(target), fix="Make it again with --force."
        ) from None
    return dict(found)


def _manifest(
    made: Plan,
    finished: Mapping[int, Finished],
    inputs: Mapping[str, Any],
    beside: Mapping[str, Path],
    key: str,
    outputs: Iterable[str],
    asked: str,
) -> bytes:
    """What was made, from what, with digests; the same bytes for the same plan on the same software, seen from the same folder."""
    facts = {name: file_facts(path.read_bytes()) for name, path in beside.items()}
    tensors = {
        row.name: {
            "file": made.shards[row.shard].file,
            "dtype": row.dtype.name,
            "shape": list(row.shape),
            "digest": finished[index].digest,
        }
        for index, row in enumerate(made.rows)
        if row.output == key
    }
    layers = {
        stacked.blocks: [
            {"layers": to, "source": source, "source_layers": layers} for to, source, layers in stacked.runs()
        ]
        for stacked in made.stacks.get(key, ())
    }
    data = {
        "format": FORMAT,
        "name": made.name,
        "plan": made.digest,
        "parts": dict(made.parts),
        **({"asked": asked} if asked else {}),
        "recipe": made.recipe,
        "software": software(),
        "inputs": inputs,
        "tensors": tensors,
        **({"layers": layers} if layers else {}),
        "output": key,
        "outputs": sorted(outputs),
        "shards": {shard.file: shard_facts(shard.header, shard.size) for shard in made.shards if shard.output == key},
        "files": {name: one for name, one in facts.items() if name not in (CARD, RECIPE)},
        # What the manifest says too, with paths as they are seen from the folder: another folder has others.
        "retold": {name: one for name, one in facts.items() if name in (CARD, RECIPE)},
    }
    return encode_manifest(data)


def _check_written(folder: Path, target: Path, outputs: Iterable[str], threads: int | None, progress: Progress) -> None:
    """Read a staged output back and hold it against its manifests. Raises MachineError where the disk gives other bytes back."""
    for key in outputs:
        found = check_folder(
            folder / key, threads=threads, progress=lambda done, total: progress("read", done, total)
        ).problems
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise MachineError(
                f"what was written does not read back as it was made, so what stood there is kept: "
                f"{_below(key, found[0].file)} {found[0].tensor} {found[0].what}{more}",
                where=str(target),
                fix="Run the same command again, which makes anew what is damaged, or give a folder on another disk with -o.",
            )


def foresee(
    recipe: Recipe,
    out: Path,
    *,
    device: str = "cpu",
    memory: int | None = None,
    threads: int | None = None,
    allow_pickle: bool = False,
) -> tuple[Plan, Budget, int]:
    """The plan of a run into `out`, how it would spend memory, and the bytes free on that disk.

    It samples the models that are averaged (mergeflow.comparing.sample): beside headers the one thing that is read. Raises what a run
    would raise before it reads weights, a disk that is too small included.
    """
    made = plan(recipe, out=out, device=device, allow_pickle=allow_pickle)
    if device == "cpu":
        check_memory(recipe, made.stages, memory or max(total_memory() // 4, LEAST_MEMORY))
    made = _with_sample(made)
    budget = Budget.of(made, memory, threads)
    free = free_bytes(out)
    if free < made.bytes_out:
        raise MachineError(
            f"the output needs {made.bytes_out} bytes, and the disk has {free} free", where=str(out), fix="Make room."
        )
    if finished_digest(out) == made.digest:
        return replace(made, notes=(*made.notes, f"{out} is already made")), budget, free
    try:
        _check_target(made, out, force=False)
    except RecipeError as error:
        made = replace(made, warnings=(*made.warnings, str(error)))
    return made, budget, free

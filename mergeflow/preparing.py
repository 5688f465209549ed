"""Stages made before rows: each becomes an artifact in the cache, and the recipe goes on as if it had named that artifact.

A stage sees data or runs models, so planning cannot look into it. What planning needs of it is the folder that it makes: so a
recipe is prepared by putting an entry under `artifacts:` (or, for a stage that merges, under `models:`) in the place of each
stage node, in the order in which they need each other, and nothing after this module knows that there were stages. The key of
an artifact says all that went in (the op, the models' files, the data's bytes), so what is in the cache is found before anything
runs. For a plan, a stage that has not run yet gives the headers of what it would make.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from mergeflow import __version__, cache
from mergeflow.checkpoint import SINGLE, WRITE_FIRST, Checkpoint, StoredTensor, WeightFile, open_checkpoint
from mergeflow.checkpoint.adapter import Adapter
from mergeflow.checkpoint.sources import Zeros
from mergeflow.checkpoint.statistics import Facts, ModelNote, Statistics, marks, open_statistics, sampled
from mergeflow.checkpoint.statistics import StageOp as OpNote
from mergeflow.digests import PIECE, tensor_digest
from mergeflow.dtypes import BY_NAME
from mergeflow.errors import (
    ClaimedError,
    InputError,
    Interrupted,
    MachineError,
    MergeflowError,
    RecipeError,
    did_you_mean,
)
from mergeflow.graph import Made, Needs, Plan, PlannedStage, Row, Shard
from mergeflow.hub import SMALL_FILE, LocalFolder, is_local, locate
from mergeflow.layout import Tensor as PlacedTensor
from mergeflow.layout import lay_out
from mergeflow.manifest import FORMAT, MANIFEST, encode_manifest, file_facts, shard_facts, software
from mergeflow.ops import op_named
from mergeflow.ops.fuse import Fuse
from mergeflow.ops.statistics import StageOp, StatisticsOp
from mergeflow.planning import SPACE_KEY, references
from mergeflow.recipe import ArtifactSource, DataSource, ModelSource, Node, Recipe
from mergeflow.writing import Staging, finished_digest, free_bytes, repair
from mergeflow.writing.claim import Claim
from mergeflow.writing.disk import sync_path

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of a recipe: its node, the models it runs, each with its data, the key of its artifact, and whether that is in
    the cache."""

    node: Node
    op: StageOp
    models: tuple[str, ...]
    data: tuple[DataSource | None, ...]
    key: str
    done: bool
    identities: tuple[str, ...] = ()
    """A digest of all that decides each of the models."""
    needs: Needs | None = None
    """What making it takes, of what has not been made and can be told."""
    family: str = ""
    """A digest of all that goes into it but `only`; of stages that collect statistics."""

    @property
    def path(self) -> Path:
        """Where the artifact lies, or will."""
        return cache.artifact_path(self.key)

    @property
    def source(self) -> ArtifactSource | ModelSource:
        """What stands in the node's place."""
        path = str(self.path)
        return ArtifactSource(path=path) if isinstance(self.op, StatisticsOp) else ModelSource(path=path)


@dataclass(frozen=True, slots=True)
class CachedFolder(LocalFolder):
    """An artifact in the cache: its revision is its key, which says what went into it."""

    key: str = ""

    @property
    def revision(self) -> str:  # type: ignore[override]
        return self.key


@dataclass(frozen=True, slots=True)
class ForeseenFolder:
    """What a stage that has not run yet will make: it has a name and a key, and of its files those that are known by now.

    Of files of weights, `headers` and sizes are, and the rest is a hole.
    """

    label: str
    revision: str
    beside: Mapping[str, bytes] = field(default_factory=dict)
    headers: Mapping[str, tuple[bytes, int]] = field(default_factory=dict)

    def names(self) -> tuple[str, ...]:
        return tuple(sorted([*self.beside, *self.headers]))

    def exists(self, name: str) -> bool:
        return name in self.beside or name in self.headers

    def size(self, name: str) -> int:
        return self.headers[name][1] if name in self.headers else len(self._known(name))

    def read(self, name: str, limit: int = 0) -> bytes:
        return self._known(name)

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        if stop > self.size(name):
            raise InputError(f"ends before byte {stop:,}", where=self.label)
        return self._known(name)[start:stop].ljust(stop - start, b"\0")

    def _known(self, name: str) -> bytes:
        if name in self.headers:
            return self.headers[name][0]
        if name not in self.beside:
            raise InputError("is not made yet", where=self.label)
        return self.beside[name]

    def local(self, names: Any, progress: Any = None) -> dict[str, Path]:
        raise InputError("is not made yet", where=self.label)

    def sha256(self, name: str) -> str | None:
        return None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A recipe without stages, the opened artifacts by the names of their nodes, and the stages in their order."""

    recipe: Recipe
    artifacts: Mapping[str, Checkpoint] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()


Materialise = Callable[[Recipe, str, Path], None]
"""Writes the model that a node gives to a folder, as an output of its own."""


Foresee = Callable[[Recipe], Plan]
"""Plans a recipe from headers, its own stages foreseen where they have not run."""


def prepare(
    recipe: Recipe,
    opened: Mapping[str, Checkpoint],
    *,
    foresee: Foresee,
    device: str = "cpu",
    make: Callable[[Stage, Recipe], None] | None = None,
) -> Prepared:
    """A recipe with an artifact in the place of each stage that its outputs ask for.

    `opened` are the checkpoints of its models. With `make` each stage whose artifact is not in the cache is made by it; without,
    its headers are foreseen. Raises RecipeError for a stage of what is no whole model, InputError for data that cannot be read.
    """
    stages: list[Stage] = []
    artifacts: dict[str, Checkpoint] = {}
    known: dict[str, str] = {}
    for node in _in_order(recipe):
        stage = _stage(recipe, node, opened, known, device)
        known[node.name] = stage.key
        opened_one: Checkpoint | None = None
        if not stage.done:
            _refuse_pickles(recipe, stage, opened)
            models = _models_of(recipe, stage, opened, artifacts, foresee)
            if make is None:
                opened_one, needs = _foreseen(recipe, stage, models, device)
                stage = replace(stage, needs=needs)
            else:
                make(stage, recipe.with_made({one.node.name: one.source for one in stages}))
                _check_unchanged(recipe, stage, opened, known, device)
        stages.append(stage)
        artifacts[node.name] = opened_one or _opened(recipe, stage)
    if not stages:
        return Prepared(recipe)
    sources = {stage.node.name: stage.source for stage in stages}
    return Prepared(recipe.with_made(sources), artifacts, tuple(stages))


def stages_of(recipe: Recipe, opened: Mapping[str, Checkpoint], device: str = "cpu") -> tuple[Stage, ...]:
    """The stages that the outputs ask for, in their order, each with its key; no model is looked into."""
    stages: list[Stage] = []
    known: dict[str, str] = {}
    for node in _in_order(recipe):
        stages.append(_stage(recipe, node, opened, known, device))
        known[node.name] = stages[-1].key
    return tuple(stages)


def asked_digest(recipe: Recipe, opened: Mapping[str, Checkpoint], stages: Sequence[Stage], device: str) -> str:
    """A digest of all that a run is given: the recipe as it was resolved, its models' files, what goes into its stages.

    A plan's digest needs the artifacts of stages; by this one an output is known as made where they have been cleared since.
    """
    return cache.artifact_key(
        {
            "version": __version__,
            "recipe": recipe.resolved,
            "files": {name: _files_identity(checkpoint) for name, checkpoint in sorted(opened.items())},
            "stages": [stage.key for stage in stages],
            "device": device.partition(":")[0],
        }
    )


def _refuse_pickles(recipe: Recipe, stage: Stage, opened: Mapping[str, Checkpoint]) -> None:
    """Raise InputError for a stage that would run pickled weights: libraries would open these in their own way."""
    for name in stage.models:
        if name in opened and opened[name].pickled:
            raise InputError(
                f"runs '{name}', whose weights are pickles", where=recipe.where(stage.node.path), fix=WRITE_FIRST
            )


def _in_order(recipe: Recipe) -> Iterator[Node]:
    """The stage nodes that the outputs need, each after those that it needs itself."""
    outputs = recipe.outputs.values()
    wanted = references(recipe, [name for one in outputs for name in (one.node, one.like, one.tokenizer) if name])
    waiting = [recipe.nodes[name] for name in recipe.nodes if name in wanted]
    stages = {node.name for node in waiting if isinstance(node.op, StageOp)}
    done: set[str] = set()
    while stages - done:
        for name in sorted(stages - done):
            below = references(recipe, recipe.nodes[name].references) & stages
            if below <= done:
                done.add(name)
                yield recipe.nodes[name]
                break


def _stage(
    recipe: Recipe, node: Node, opened: Mapping[str, Checkpoint], known: Mapping[str, str], device: str
) -> Stage:
    """A stage with its key; `known` are the keys of the stages before it."""
    assert isinstance(node.op, StageOp)
    models = tuple(one.model for one in node.inputs)
    data = tuple(recipe.data.get(one.data) if one.data else None for one in node.inputs)
    seed = recipe.seed if node.seed is None else node.seed
    digests = dict(known)
    identities = tuple(_identity(recipe, model, opened, digests) for model in models)
    parts = {
        "op": node.op.name,
        "version": node.op.version,
        "parameters": node.op.deciding,
        "seed": seed if node.op.seeded else None,
        "models": identities,
        "data": [
            _data_identity(recipe, str(one.data), source) if source else None
            for one, source in zip(node.inputs, data, strict=True)
        ],
        "device": device.partition(":")[0],
    }
    key = cache.artifact_key({**parts, "only": node.only})
    family = cache.artifact_key(parts) if isinstance(node.op, StatisticsOp) else ""
    path = cache.artifact_path(key)
    repair(path)
    done = finished_digest(path) is not None
    return Stage(node, node.op, models, data, key, done=done, identities=identities, family=family)


def _check_unchanged(
    recipe: Recipe, stage: Stage, opened: Mapping[str, Checkpoint], known: Mapping[str, str], device: str
) -> None:
    """What was made must be what the key says: an artifact of a model or data that changed meanwhile is taken back."""
    before = {name: key for name, key in known.items() if name != stage.node.name}
    if _stage(recipe, stage.node, opened, before, device).key != stage.key:
        cache.clear(keys=frozenset({stage.key}))
        raise InputError(
            "its model or data changed while it ran", where=recipe.where(stage.node.path), fix="Run it again."
        )


def _identity(recipe: Recipe, name: str, opened: Mapping[str, Checkpoint], known: dict[str, str]) -> str:
    """A digest of all that decides the tensors of a model or node, and not of what a recipe calls it.

    `known` are digests by name, and grows. A node's draws depend on names (mergeflow.ops.draws), and so does its digest then.
    """
    found = known.get(name)
    if found is not None:
        return found
    if name in opened:
        source = recipe.models.get(name)
        told: Any = [
            _files_identity(opened[name]),
            source.model_dump(mode="json", include={"only", "rename", "space"}) if source else None,
        ]
    else:
        node = recipe.nodes[name]
        names = [one.model for one in node.inputs]
        parameters = node.op.model_dump(mode="json")
        seed = [recipe.seed, node.name] if node.seed is None else [node.seed]
        told = {
            "op": node.op.name,
            "parameters": parameters,
            "inputs": [
                [
                    _identity(recipe, one.model, opened, known),
                    _identity(recipe, one.base, opened, known) if one.base else None,
                    {key: _identity(recipe, other, opened, known) for key, other in sorted(one.keys.items())},
                ]
                for one in node.inputs
            ],
            "others": [
                _identity(recipe, one, opened, known) if one else None for one in (node.base, node.others, node.rest)
            ],
            "words": _plain([node.rules, node.takes, node.only, node.missing, node.mismatch, node.extra, node.vocab]),
            "averaged": node.only is not None and node.others is None,
            "draws": [seed, names] if node.op.draws else None,
            # A parameter may name an input.
            "names": names if any(value in names for value in parameters.values() if isinstance(value, str)) else None,
        }
    found = known[name] = cache.artifact_key({"of": told})
    return found


def _plain(value: Any) -> Any:
    """A node's words as plain data: settings by rules and gradients are models of pydantic."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


BESIDE = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Files beside the weights that may decide what a model is given to read: config, tokenizer, template, preprocessor."""


def _files_identity(checkpoint: Checkpoint) -> Any:
    """Weight files by header and stamp; what stands beside them by its bytes, or of a hub by its commit."""
    folder = checkpoint.folder
    weights = [
        [file.name, file.size, file.header_digest, checkpoint.stamp(file.name)] for file in checkpoint.files.values()
    ]
    return [weights, _beside_identity(checkpoint) if folder.revision is None else folder.revision]


def _beside_identity(checkpoint: Checkpoint) -> Any:
    """The side files that may decide what a model reads, with a digest of each."""
    folder = checkpoint.folder
    return [
        [name, blake3(folder.read(name)).hexdigest()]
        for name in sorted(folder.names())
        if "/" not in name and name.endswith(BESIDE) and name != MANIFEST
    ]


def _data_identity(recipe: Recipe, name: str, data: DataSource) -> Any:
    """How the data is read, and a digest of its bytes and names, and of images that rows name; of a hub's dataset its name and revision."""
    from mergeflow.stages.data import images_named, local_path

    said = data.model_dump(mode="json")
    path = local_path(data, recipe.folder)
    if path is None:
        return said
    del said["path"]
    where = recipe.where(("data", name))
    digest = blake3()
    try:
        mode = path.stat().st_mode  # says why, which the error of a map does not
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            raise InputError("is neither a file nor a folder", where=where, fix="Put its rows into a file.")
        files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
        for file in files:
            digest.update(os.fsencode(file.relative_to(path) if path.is_dir() else file.name) + b"\0")
            digest.update(blake3(max_threads=blake3.AUTO).update_mmap(file).digest())
        counted = set(files)
        for file in images_named(data, recipe.folder):
            if file.is_file() and file not in counted:  # the row of one that is not there is left out and counted
                digest.update(blake3().update_mmap(file).digest())
    except (OSError, ValueError) as error:  # a path with a NUL is none
        fix, why = "Paths of data are relative to the recipe.", getattr(error, "strerror", None) or error
        raise InputError(f"cannot read '{data.path}': {why}", where=where, fix=fix) from None
    return [said, digest.hexdigest()]


def _relatives(stage: Stage) -> tuple[Statistics, ...]:
    """What the cache holds of the same op on the same model and data for other tensors; one that is damaged does not count."""
    found = []
    for entry in cache.entries() if stage.family else ():
        (path,) = entry.paths
        with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError, MergeflowError):
            if json.loads((path / MANIFEST).read_bytes()).get("family") == stage.family:
                found.append(open_statistics(CachedFolder(f"artifact {entry.key}", path, key=entry.key)))
    return tuple(found)


def _opened(recipe: Recipe, stage: Stage) -> Checkpoint:
    cache.mark_used(stage.path)
    folder = CachedFolder(f"stage {stage.node.name}", stage.path, key=stage.key)
    try:
        return open_statistics(folder) if isinstance(stage.op, StatisticsOp) else open_checkpoint(folder)
    except MergeflowError as error:
        error.fix = f"It lies in the cache and is damaged: `mergeflow cache clear {stage.key}`."
        raise error.placed(recipe.where(stage.node.path)) from None


def _models_of(
    recipe: Recipe,
    stage: Stage,
    opened: Mapping[str, Checkpoint],
    artifacts: Mapping[str, Checkpoint],
    foresee: Foresee,
) -> tuple[Checkpoint | Plan, ...]:
    """The models that a stage runs: of a node its plan. Raises RecipeError where one is no whole model."""
    at: tuple[str | int, ...] = stage.node.path
    return tuple(
        _model_of(recipe, stage, name, opened, artifacts, foresee, (*at, *_steps(stage.op.takes, index)))
        for index, name in enumerate(stage.models)
    )


def _steps(takes: str, index: int) -> tuple[str | int, ...]:
    """Where a node names one of the models that its stage runs."""
    if takes == "sources":
        return ("sources", index - 1) if index else ("target",)
    return ("inputs", index) if takes == "inputs" else ("model",)


def _model_of(
    recipe: Recipe,
    stage: Stage,
    name: str,
    opened: Mapping[str, Checkpoint],
    artifacts: Mapping[str, Checkpoint],
    foresee: Foresee,
    at: tuple[str | int, ...],
) -> Checkpoint | Plan:
    found: Checkpoint | Plan
    if name in recipe.nodes and name not in artifacts:
        found = foresee(recipe.giving(name))
        space = found.spaces[""]
    else:
        found = opened[name] if name in opened else artifacts[name]
        source = recipe.models.get(name)
        space = found.metadata.get(SPACE_KEY) or (source.space if source else None) or "weight"
        if isinstance(found, Adapter):
            space = "delta"
        elif isinstance(found, Statistics):
            space = "statistics"
        for key in ("file", "only", "rename"):
            if getattr(source, key, None) is not None:
                raise RecipeError(
                    f"the stage '{stage.node.name}' runs a whole folder, and `{key}` makes '{name}' a part of one",
                    where=recipe.where(("models", name, key)),
                    fix=f"Name a folder that holds this model alone; an entry without `{key}` may stand beside this one.",
                )
    try:
        stage.op.space(None, (space,))  # type: ignore[arg-type]
    except RecipeError as error:
        raise error.placed(recipe.where(at)) from None
    return found


def _foreseen(
    recipe: Recipe, stage: Stage, models: Sequence[Checkpoint | Plan], device: str
) -> tuple[Checkpoint, Needs | None]:
    """The headers that a stage would make, from its models' configs and headers, and what making it takes.

    Raises MachineError where the disk cannot hold what it makes.
    """
    try:
        with contextlib.ExitStack() as stack:
            folders = [stack.enter_context(_skeleton(model)) for model in models]
            made: Checkpoint
            if isinstance(stage.op, StatisticsOp):
                made = _foreseen_statistics(stage, stage.op, folders[0], models[0])
            else:
                made = _foreseen_model(stage, folders, models[0])
            return made, _needs(recipe, stage, folders, made, device)
    except MergeflowError as error:
        raise error.placed(recipe.where(stage.node.path)) from None


def _foreseen_model(stage: Stage, folders: Sequence[Path], first: Checkpoint | Plan) -> Checkpoint:
    """The made model's headers, as they will be, and the first model's side files beside them."""
    from mergeflow.ops.regmean_pp import RegMeanPP
    from mergeflow.stages import models, regmean_pp
    from mergeflow.stages.fuse import running

    opened = [models.open_folder(folder) for folder in folders]
    if isinstance(stage.op, Fuse):
        running.check(stage.op, opened[0], opened[1:])
    else:
        assert isinstance(stage.op, RegMeanPP)
        regmean_pp.check(stage.op, opened)
    tensors = opened[0].checkpoint.tensors
    placed = [PlacedTensor(name, tensors[name].dtype, tensors[name].shape) for name in sorted(tensors)]
    found, index = lay_out(placed, like_files=[], shard_size=None, metadata=regmean_pp.METADATA)
    beside = _side_files(first, regmean_pp.is_side_file) | ({index[0]: index[1]} if index else {})
    label = f"stage {stage.node.name}, not run yet"
    return open_checkpoint(
        ForeseenFolder(label, stage.key, beside, {file.name: (file.header, file.size) for file in found})
    )


def _needs(recipe: Recipe, stage: Stage, folders: Sequence[Path], made: Checkpoint, device: str) -> Needs | None:
    """What a stage takes. What the cache holds may be part of it, so a disk is too small only where that would not do either."""
    from mergeflow.ops.regmean_pp import RegMeanPP
    from mergeflow.stages import foreseeing, models
    from mergeflow.stages.data import local_path
    from mergeflow.stages.fuse import estimating

    rows = []
    for data in stage.data[:1] if isinstance(stage.op, Fuse) else stage.data:
        if data is None or local_path(data, recipe.folder) is None:
            return None  # a plan fetches no data
        rows.append(estimating.sizes(data, recipe.folder))
    opened = [models.open_folder(folder) for folder in folders]
    if isinstance(stage.op, Fuse):
        found = estimating.needs(stage.op, opened[0], opened[1:], rows[0], device)
    elif isinstance(stage.op, StatisticsOp):
        assert isinstance(made, Statistics)
        found = foreseeing.needs(stage.op, opened[0], made, rows[0], device)
    else:
        assert isinstance(stage.op, RegMeanPP)
        found = foreseeing.needs_of_merge(stage.op, opened, rows, device)
    free = free_bytes(cache.root()) + sum(entry.size for entry in cache.entries())
    if found.disk > free:
        raise MachineError(
            f"takes about {found.disk:,} bytes in the cache, and its disk has {free:,} free",
            fix="Make room, or set MERGEFLOW_CACHE to a folder on another disk.",
        )
    return found


def check_memory(recipe: Recipe, stages: Sequence[PlannedStage], memory: int) -> None:
    """Raises MachineError for a stage that takes more memory than there may be."""
    for stage in stages:
        if not stage.done and stage.needs is not None and stage.needs.memory > memory:
            node = recipe.nodes[stage.node]
            smaller = ", or a smaller target" if isinstance(node.op, Fuse) else ""
            raise MachineError(
                f"takes {stage.needs.memory:,} bytes of memory beside activations, and may take {memory:,}",
                where=recipe.where(node.path),
                fix=f"Give it more --memory{smaller}.",
            )


def _side_files(model: Checkpoint | Plan, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The files beside a model's weights that are wanted, of a plan those that it would write."""
    if isinstance(model, Checkpoint):
        folder = model.folder
        names = [name for name in folder.names() if wanted(name)]
        return {name: folder.read(name) for name in names if folder.size(name) <= SMALL_FILE}
    return {
        one.file: model.models[one.model].folder.read(one.name) if one.content is None else one.content
        for one in model.side_files
        if wanted(one.file)
    }


def _foreseen_statistics(stage: Stage, op: StatisticsOp, folder: Path, model: Checkpoint | Plan) -> Statistics:
    from mergeflow.stages import predict

    found = predict(op, folder, stage.node.only)
    tensors = {}
    for name, (dtype, shape) in found.tensors.items():
        kind = BY_NAME[dtype]
        tensors[name] = StoredTensor(name, kind, shape, SINGLE, 0, prod(shape) * kind.size)
    facts = Facts(
        kind=op.kind,
        codec=getattr(op, "codec", "float32"),
        op=OpNote(name=op.name, version=op.version),
        model=ModelNote(digest="", source=f"node {stage.models[0]}")
        if isinstance(model, Plan)
        else ModelNote(digest="", source=model.folder.label, files=marks(model), sampled=sampled(model)),
        n_examples=0,
        n_tokens=2**62,
        groups=dict(found.groups),
        skipped=dict(found.skipped),
        transposed=found.transposed,
    )
    folder_of = ForeseenFolder(f"stage {stage.node.name}, not run yet", stage.key)
    return Statistics(folder_of, tensors, {SINGLE: WeightFile(SINGLE, 0, "")}, None, {}, facts, "")


@contextlib.contextmanager
def _skeleton(model: Checkpoint | Plan) -> Iterator[Path]:
    """A folder with a model's config and headers; its weights are holes in files, where they are not on this machine yet."""
    if isinstance(model, Checkpoint) and isinstance(model.folder, LocalFolder):
        yield model.folder.root
        return
    with tempfile.TemporaryDirectory(prefix="mergeflow-") as made:
        path = Path(made)
        if isinstance(model, Checkpoint):
            folder = model.folder
            for file in model.files.values():
                length = 8 + int.from_bytes(folder.read_range(file.name, 0, 8), "little")
                _hollow(path / file.name, folder.read_range(file.name, 0, length), file.size)
            for name in folder.names():
                if name == "config.json" or name.endswith(".index.json"):
                    (path / name).write_bytes(folder.read(name))
        else:
            for shard in model.shards:
                _hollow(path / shard.file, shard.header, shard.size)
            for beside in model.side_files:
                if beside.file == "config.json" or beside.file.endswith(".index.json"):
                    content = beside.content
                    if content is None:
                        content = model.models[beside.model].folder.read(beside.name)
                    (path / beside.file).write_bytes(content)
        yield path


def _hollow(path: Path, header: bytes, size: int) -> None:
    """A safetensors file of a header and a hole."""
    with path.open("wb") as file:
        file.write(header)
        file.truncate(size)


# Making


@dataclass(frozen=True, slots=True)
class Runner:
    """What it takes to run stages: how, and what the whole way lends them."""

    device: str
    threads: int
    memory: int
    stop: threading.Event
    progress: Progress
    materialise: Materialise

    def make(self, stage: Stage, recipe: Recipe) -> None:
        """Run a stage and put its artifact into the cache. Raises what the stage raises, and leaves nothing half-made.

        Where another live run makes the same artifact, this one waits for it.
        """
        work = cache.work_path(stage.key)
        try:
            work.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MachineError(f"cannot be made: {error.strerror}", where=str(work.parent)) from None
        try:
            with self._claimed(stage.path, work):
                if finished_digest(stage.path) is None:
                    self._make(stage, recipe, work)
        except MergeflowError as error:
            raise error.placed(recipe.where(stage.node.path)) from None

    @contextlib.contextmanager
    def _claimed(self, path: Path, work: Path) -> Iterator[None]:
        """Hold the right to make the artifact at `path`. In `work` stays what a later run can go on from, and nothing else."""
        claim = self._claim(path, work)
        lost: list[MergeflowError] = []

        def taken(error: MergeflowError) -> None:
            lost.append(error)
            self.stop.set()

        try:
            claim.beat(taken)
            yield
            shutil.rmtree(work, ignore_errors=True)
        except MergeflowError as error:
            if lost:
                raise lost[0] from None
            if not isinstance(error, Interrupted | MachineError):
                # The same inputs would end here again.
                shutil.rmtree(work, ignore_errors=True)
            raise
        finally:
            claim.release()

    def _claim(self, path: Path, work: Path) -> Claim:
        """The right to make the artifact at `path`, once no other run holds it."""
        while True:
            try:
                return Claim.take(work, path)
            except ClaimedError:
                self._wait()

    def _wait(self) -> None:
        """Wait for another run."""
        self.progress("wait", 0, 0)
        if self.stop.wait(WAIT_SECONDS):
            raise Interrupted("stopped") from None

    def _make(self, stage: Stage, recipe: Recipe, work: Path) -> None:
        if not isinstance(stage.op, StatisticsOp):
            self._merge(stage, recipe, work)
            return
        from mergeflow.stages import StageJob, run_stage

        (name,), (data,) = stage.models, stage.data
        folder, checkpoint = self._model(name, recipe, work / "model")
        # A merged model in the cache stands among the recipe's models too, in the place of its node.
        own = name in recipe.resolved.get("models", {})
        known = _relatives(stage)
        source = {
            "digest": known[0].facts.model.digest if known else _digest_of(checkpoint, self.stop, self.progress),
            "source": checkpoint.folder.label if own else f"node {name}",
            "revision": checkpoint.folder.revision if own else None,
            "files": marks(checkpoint),
            "sampled": sampled(checkpoint),
        }
        job = StageJob(
            op=stage.op,
            model=folder,
            source=source,
            data=data,
            folder=recipe.folder,
            work=work / "stage",
            write=self._write(stage),
            only=stage.node.only,
            device=self.device,
            memory=self.memory,
            threads=self.threads,
            seed=recipe.seed if stage.node.seed is None else stage.node.seed,
            progress=self.progress,
            stop=self.stop,
            known=known,
        )
        job.work.mkdir(exist_ok=True)
        run_stage(job)

    def _merge(self, stage: Stage, recipe: Recipe, work: Path) -> None:
        """Run a stage that merges several models, each on data of its own."""
        if isinstance(stage.op, Fuse):
            self._fuse(stage, stage.op, recipe, work)
            return
        from mergeflow.ops.regmean_pp import RegMeanPP
        from mergeflow.stages import regmean_pp

        assert isinstance(stage.op, RegMeanPP)
        candidates = []
        for index, (name, data) in enumerate(zip(stage.models, stage.data, strict=True)):
            assert data is not None
            candidates.append(
                regmean_pp.Candidate(self._model(name, recipe, work / "models" / str(index))[0].absolute(), data)
            )
        job = regmean_pp.MergeJob(
            op=stage.op,
            candidates=tuple(candidates),
            folder=recipe.folder,
            work=work / "stage",
            write=self._write(stage),
            only=stage.node.only,
            device=self.device,
            memory=self.memory,
            threads=self.threads,
            progress=self.progress,
            stop=self.stop,
        )
        job.work.mkdir(exist_ok=True)
        regmean_pp.run(job)

    def _fuse(self, stage: Stage, op: Fuse, recipe: Recipe, work: Path) -> None:
        """Run a stage that trains its first model on what the others give. What it keeps on the way is in the cache too."""
        from mergeflow.stages.fuse import job, running

        data = stage.data[0]
        assert data is not None
        found = [
            self._kept_model(name, told, recipe) for name, told in zip(stage.models, stage.identities, strict=True)
        ]
        made = job.FuseJob(
            op=op,
            target=found[0][0],
            sources=tuple(folder for folder, _ in found[1:]),
            digests=tuple(self._digest(checkpoint) for _, checkpoint in found),
            data=data,
            corpus=_data_identity(recipe, str(stage.node.inputs[0].data), data),
            folder=recipe.folder,
            work=work / "stage",
            write=self._write(stage),
            kept=self._kept,
            free=lambda: free_bytes(cache.root()),
            device=self.device,
            memory=self.memory,
            threads=self.threads,
            seed=recipe.seed if stage.node.seed is None else stage.node.seed,
            progress=self.progress,
            stop=self.stop,
        )
        made.work.mkdir(exist_ok=True)
        running.run(made)

    def _digest(self, checkpoint: Checkpoint) -> str:
        """A digest of a model by its tensors and side files, wherever it lies."""
        tensors = _digest_of(checkpoint, self.stop, self.progress)
        return cache.artifact_key({"tensors": tensors, "beside": _beside_identity(checkpoint)})

    def _kept_model(self, name: str, identity: str, recipe: Recipe) -> tuple[Path, Checkpoint]:
        """The local folder of a model, and its headers; of a node what lies in the cache, where it is written once."""
        path = cache.artifact_path(cache.artifact_key({"model": identity, "made by": [__version__, version("torch")]}))
        if name in recipe.models or finished_digest(path) is None:
            while True:
                try:
                    return self._model(name, recipe, path)
                except ClaimedError:
                    self._wait()
        cache.mark_used(path)
        return path, open_checkpoint(LocalFolder(str(path), path))

    def _kept(self, parts: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """What these parts decide: a folder in the cache, filled by `make` where it is not there. It is all or nothing."""
        key = cache.artifact_key(parts)
        path, work = cache.artifact_path(key), cache.work_path(key)
        if finished_digest(path) is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            work.parent.mkdir(parents=True, exist_ok=True)
            with self._claimed(path, work):
                if finished_digest(path) is None:
                    inside = work / "made"
                    inside.mkdir(exist_ok=True)
                    make(inside)
                    _publish(inside, path, key)
        cache.mark_used(path)
        return path

    def _write(self, stage: Stage) -> Callable[[Mapping[str, Tensor], Mapping[str, bytes], Mapping[str, str]], None]:
        means = {**software(), "device": self.device, "threads": str(self.threads)}
        return lambda tensors, files, metadata: write_artifact(
            stage.path, stage.key, tensors, files, metadata, self.stop, stage.family, means
        )

    def _model(self, name: str, recipe: Recipe, made: Path) -> tuple[Path, Checkpoint]:
        """The local folder of a model that a stage runs, a node's written out to `made` first, and its headers."""
        if name in recipe.models:
            source = recipe.models[name]
            folder = locate(
                source.location, revision=source.revision, subfolder=source.subfolder, relative_to=recipe.folder
            )
            found = open_checkpoint(folder, file=source.file)
            names = [one for one in folder.names() if "/" not in one and not one.endswith(SKIPPED)]
            paths = folder.local(
                list(dict.fromkeys([*found.files, *names])), lambda done: self.progress("fetch", done, 0)
            )
            return next(iter(paths.values())).parent, found
        made.parent.mkdir(exist_ok=True)
        self.materialise(recipe, name, made)
        return made, open_checkpoint(LocalFolder(str(made), made))


WAIT_SECONDS = 0.5
"""Between looks at whether another run has made an artifact."""

SKIPPED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".py")
"""Files of a repository that no stage reads."""


def _digest_of(checkpoint: Checkpoint, stop: threading.Event, progress: Progress) -> str:
    """The digest of a model over its tensors: every byte is read once."""
    from mergeflow.checkpoint.statistics import model_digest

    paths = checkpoint.paths()
    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    found = []
    for name, tensor in checkpoint.tensors.items():
        pieces = []
        with paths[tensor.file].open("rb") as file:
            file.seek(tensor.begin)
            left = tensor.nbytes
            while left:
                if stop.is_set():
                    raise Interrupted("stopped")
                piece = file.read(min(PIECE, left))
                if not piece:
                    raise InputError("the file became shorter while it was read", where=str(paths[tensor.file]))
                pieces.append(blake3(piece).digest())
                left -= len(piece)
                progress("read", len(piece), total)
        found.append((name, tensor.dtype.name, tensor.shape, tensor_digest(pieces, tensor.dtype.name, tensor.shape)))
    return model_digest(found)


def write_artifact(
    target: Path,
    key: str,
    tensors: Mapping[str, Tensor],
    files: Mapping[str, bytes],
    metadata: Mapping[str, str],
    stop: threading.Event | None = None,
    family: str = "",
    means: Mapping[str, str] | None = None,
) -> None:
    """Make the folder of an artifact, all or nothing: tensors in this order in one file, side files, and a manifest.

    `family` is what it shares with artifacts that were made of the same for other tensors, `means` what it was made with, on
    which its last bits may depend.

    Tensors are asked for one at a time, twice each: once for their shapes, once to be written.
    """
    import torch

    kinds = {name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in tensors.items()}
    placed = [PlacedTensor(name, BY_NAME[dtype], shape) for name, (dtype, shape) in kinds.items()]
    found, index = lay_out(placed, like_files=[], shard_size=None, metadata=dict(metadata))
    shards = [Shard("", file.name, file.header, file.size) for file in found]
    home = {name: (which, offset) for which, file in enumerate(found) for name, offset in file.offsets.items()}
    rows = [
        Row(
            "", key, one.name, Made(Zeros(), (), one.dtype, one.shape), one.dtype, one.shape, *home[one.name], one.dtype
        )
        for one in placed
    ]
    digests: dict[str, str] = {}
    with Staging.open(
        target, digest=key, parts={"stage": key}, shards=shards, rows=rows, fresh=True, stop=stop
    ) as staging:
        for which, row in enumerate(rows):
            stored: Any = tensors[row.name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            data = memoryview(stored)
            pieces = [blake3(data[start : start + PIECE]).digest() for start in range(0, len(data), PIECE)]
            start = 0
            for piece in staging.memory(which, 0, row.nbytes) if row.nbytes else ():
                piece[:] = data[start : start + len(piece)]
                start += len(piece)
            if row.nbytes:
                staging.filled(which, 0, row.nbytes)
            digests[row.name] = tensor_digest(pieces, row.dtype.name, row.shape)
            staging.row_done(which, digests[row.name], {})
        staging.finish()
        beside = {**files, **({index[0]: index[1]} if index else {})}
        for name, content in beside.items():
            staging.add(name, content)
        manifest = {
            "format": FORMAT,
            "plan": key,
            "stage": key,
            **({"family": family} if family else {}),
            **({"software": dict(means)} if means else {}),
            "tensors": {
                row.name: {
                    "file": shards[row.shard].file,
                    "dtype": row.dtype.name,
                    "shape": list(row.shape),
                    "digest": digests[row.name],
                }
                for row in rows
            },
            "shards": {shard.file: shard_facts(shard.header, shard.size) for shard in shards},
            "files": {name: file_facts(content) for name, content in beside.items()},
        }
        staging.add(MANIFEST, encode_manifest(manifest))
        staging.publish()


def _publish(made: Path, target: Path, key: str) -> None:
    """Put a folder of files into the cache: its bytes durable, a manifest in it, and one rename."""
    files = sorted(path for path in made.rglob("*") if path.is_file() and path.name != MANIFEST)
    try:
        told = {}
        for path in files:
            told[str(path.relative_to(made))] = {
                "size": path.stat().st_size,
                "digest": blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest(),
            }
            sync_path(path)
        manifest = {"format": FORMAT, "plan": key, "stage": key, "tensors": {}, "shards": {}, "files": told}
        (made / MANIFEST).write_bytes(encode_manifest(manifest))
        sync_path(made / MANIFEST)
        sync_path(made)
        made.rename(target)
        sync_path(target.parent)
    except OSError as error:
        raise MachineError(f"cannot be written: {error.strerror}", where=str(target)) from None


def statistics_recipe(
    model: str, data: str, kind: str, options: Mapping[str, Any], *, revision: str | None = None
) -> Recipe:
    """The recipe behind `mergeflow stats`: one stage, and its artifact as the output.

    `options` are the op's parameters and the data's fields, told apart by their names. Paths are those of the command line.
    """
    op = op_named(kind)
    if not issubclass(op, StatisticsOp):
        raise RecipeError(f"`{kind}` collects nothing", where="--kind", fix="Write gram, fisher_diag or another stage.")
    own = {*op.model_fields, "only", "seed"}
    strange = [key for key in options if key not in own and key not in DataSource.model_fields]
    if strange:
        fix = did_you_mean(strange[0], [*own, *DataSource.model_fields]) or f"There are {', '.join(sorted(own))}."
        raise RecipeError(f"`{kind}` has no `{strange[0]}`", where="--option", fix=fix)
    said = {key: value for key, value in options.items() if key in own}
    fields = {key: value for key, value in options.items() if key not in own}
    source = {"path": _as_written(model), **({"revision": revision} if revision else {})}
    return Recipe(
        name="statistics",
        models={"model": source},
        data={"data": {"path": _as_written(data), **fields}},
        nodes={kind: {"op": kind, "model": "model", "data": "data", **said}},
    )


def _as_written(path: str) -> str:
    """A path of the command line as recipes write it: what is there is meant, whatever its name looks like."""
    return f"./{path}" if Path(path).exists() and not is_local(path) else path

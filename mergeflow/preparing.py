"""Stages made before rows: each becomes an artifact in the cache, and the recipe goes on as if it had named that artifact.

A stage sees data or runs a model, so planning cannot look into it. What planning needs of it is the folder that it makes: so a
recipe is prepared by putting an entry under `artifacts:` in the place of each stage node, in the order in which they need each
other, and nothing after this module knows that there were stages. The key of an artifact says all that went in (the op, the
model's files, the data's bytes), so what is in the cache is found before anything runs. For a plan, a stage that has not run
yet gives the headers of what it would make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from mergeflow import cache
from mergeflow.checkpoint import Checkpoint, StoredTensor, WeightFile, open_checkpoint
from mergeflow.dtypes import BY_NAME
from mergeflow.errors import InputError, RecipeError
from mergeflow.hub import Folder, LocalFolder, is_local
from mergeflow.ops.statistics import StageOp
from mergeflow.planning import references
from mergeflow.recipe import ArtifactSource, DataSource, Node, Recipe
from mergeflow.writing import finished_digest

if TYPE_CHECKING:
    pass

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of a recipe: its node, the model it runs, the key of its artifact, and whether that is in the cache."""

    node: Node
    op: StageOp
    model: str
    data: DataSource | None
    key: str
    done: bool

    @property
    def path(self) -> Path:
        """Where the artifact lies, or will."""
        return cache.artifact_path(self.key)


@dataclass(frozen=True, slots=True)
class CachedFolder(LocalFolder):
    """An artifact in the cache: its revision is its key, which says what went into it."""

    key: str = ""

    @property
    def revision(self) -> str:  # type: ignore[override]
        return self.key


@dataclass(frozen=True, slots=True)
class ForeseenFolder:
    """What a stage that has not run yet will make: it has a name and a key, and no files."""

    label: str
    revision: str

    def names(self) -> tuple[str, ...]:
        return ()

    def exists(self, name: str) -> bool:
        return False

    def size(self, name: str) -> int:
        raise InputError("is not made yet", where=self.label)

    def read(self, name: str, limit: int = 0) -> bytes:
        raise InputError("is not made yet", where=self.label)

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        raise InputError("is not made yet", where=self.label)

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


def prepare(
    recipe: Recipe,
    opened: Mapping[str, Checkpoint],
    *,
    device: str = "cpu",
    make: Callable[[Stage, Recipe], None] | None = None,
) -> Prepared:
    """A recipe with an artifact in the place of each stage that its outputs ask for.

    `opened` are the checkpoints of its models. With `make` each stage whose artifact is not in the cache is made by it; without,
    its headers are foreseen.
    """
    stages: list[Stage] = []
    artifacts: dict[str, Checkpoint] = {}
    for node in _in_order(recipe):
        stage = _stage(recipe, node, opened, artifacts, device)
        if not stage.done and make is not None:
            make(
                stage,
                recipe.with_artifacts(
                    {name: ArtifactSource(path=str(one.folder.label)) for name, one in artifacts.items()}
                ),
            )
            stage = _stage(recipe, node, opened, artifacts, device)
        stages.append(stage)
        artifacts[node.name] = _opened(stage) if stage.done else _foreseen(stage, opened)
    if not stages:
        return Prepared(recipe)
    sources = {stage.node.name: ArtifactSource(path=str(stage.path)) for stage in stages}
    return Prepared(recipe.with_artifacts(sources), artifacts, tuple(stages))


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
    recipe: Recipe, node: Node, opened: Mapping[str, Checkpoint], artifacts: Mapping[str, Checkpoint], device: str
) -> Stage:
    assert isinstance(node.op, StageOp)
    model = node.inputs[0].model
    data = recipe.data.get(node.data) if node.data else None
    key = cache.artifact_key(
        {
            "op": node.op.name,
            "version": node.op.version,
            "parameters": node.op.model_dump(mode="json"),
            "only": node.only,
            "seed": recipe.seed if node.seed is None else node.seed,
            "model": _model_identity(recipe, model, opened, artifacts),
            "data": _data_identity(recipe, node, data) if data else None,
            "device": device.partition(":")[0],
        }
    )
    return Stage(node, node.op, model, data, key, done=finished_digest(cache.artifact_path(key)) is not None)


def _model_identity(
    recipe: Recipe, name: str, opened: Mapping[str, Checkpoint], artifacts: Mapping[str, Checkpoint]
) -> Any:
    """What a model or node is made of: of a checkpoint its files, of a node its part of the recipe and what is below."""
    if name in opened:
        checkpoint = opened[name]
        return [
            (file.name, file.size, file.header_digest, checkpoint.stamp(file.name))
            for file in checkpoint.files.values()
        ] + [checkpoint.config]
    if name in artifacts:
        return artifacts[name].folder.revision
    below = sorted(references(recipe, [name]))
    nodes = {one: recipe.resolved["nodes"].get(one.partition(".")[0]) for one in below if one in recipe.nodes}
    leaves = {one: _model_identity(recipe, one, opened, artifacts) for one in below if one not in recipe.nodes}
    return [nodes, leaves, recipe.seed]


def _data_identity(recipe: Recipe, node: Node, data: DataSource) -> Any:
    """The grammar of the data and a digest of its bytes; of a hub's dataset its name and revision."""
    said = data.model_dump(mode="json")
    if not is_local(data.path):
        return said
    path = recipe.folder / Path(data.path).expanduser()
    where = recipe.where(("data", str(node.data)))
    digest = blake3()
    try:
        files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
        for file in files:
            digest.update(str(file.relative_to(path) if path.is_dir() else file.name).encode() + b"\0")
            digest.update(blake3(max_threads=blake3.AUTO).update_mmap(file).digest())
    except OSError as error:
        fix = "Paths of data are relative to the recipe."
        raise InputError(f"cannot read '{data.path}': {error.strerror}", where=where, fix=fix) from None
    return [said, digest.hexdigest()]


def _opened(stage: Stage) -> Checkpoint:
    cache.mark_used(stage.path)
    return open_checkpoint(CachedFolder(f"stage {stage.node.name}", stage.path, key=stage.key))


def _foreseen(stage: Stage, opened: Mapping[str, Checkpoint]) -> Checkpoint:
    """The headers that a stage would make, from its model's config."""
    from mergeflow.stages import predict

    checkpoint = opened.get(stage.model)
    if checkpoint is None:
        raise RecipeError(
            f"the stage '{stage.node.name}' runs a node, whose statistics are known once it has run",
            fix="Run the recipe: a plan shows stages of models.",
        )
    paths = checkpoint.folder.local(["config.json"]) if checkpoint.folder.exists("config.json") else {}
    folder = next(iter(paths.values())).parent if paths else Path(checkpoint.folder.label)
    tensors, metadata = {}, {}
    for name, (dtype, shape) in predict(stage.op, folder).items():
        kind, count = BY_NAME[dtype], 1
        for length in shape:
            count *= length
        tensors[name] = StoredTensor(name, kind, shape, "model.safetensors", 0, count * kind.size)
    label: Folder = ForeseenFolder(f"stage {stage.node.name}, not run yet", stage.key)
    return Checkpoint(label, tensors, {"model.safetensors": WeightFile("model.safetensors", 0, "")}, None, metadata)

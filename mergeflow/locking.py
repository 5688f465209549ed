"""What a recipe made once, held against what it makes now: `lock` writes it down, `check` compares, `run --locked` refuses.

A lock is a text file beside the recipe, `<recipe file>.lock`: JSON with sorted keys and one line for each input, op, file and
tensor, so that a diff of two locks reads as what moved. It pins what went in (revision, sizes, digests of headers and of
all that was read), what computed it (versions of ops and software, instruction set) and what came out: of each tensor
its digest, which is exact, and its fingerprint (`mergeflow.fingerprints`), from which a drift is estimated without the old model.

A lock and a check each run the merge once, into a folder of their own that is deleted afterwards: nothing that lies about can be
taken for the result. The recipe's `expect:` changes nothing of what is made and so is in no digest.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergeflow import __version__, pipeline
from mergeflow.checkpoint.safetensors import DuplicateKey, unique
from mergeflow.errors import InputError, RecipeError, printable, raise_all
from mergeflow.fingerprints import STANDARD_ERROR, Fingerprint, Fingerprinting, drift
from mergeflow.graph import Plan
from mergeflow.manifest import MANIFEST
from mergeflow.pipeline import Progress
from mergeflow.planning import applications
from mergeflow.planning.findings import Findings
from mergeflow.recipe import ExpectSection, Recipe
from mergeflow.reporting import markdown_cell
from mergeflow.settings import places, value_at
from mergeflow.writing import disk

LARGEST_LOCK = 512 * 2**20
SHOWN = 20
"""Tensors that a table shows before it says how many more there are."""

Hex = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class LockedFile(_Part):
    """A file of weights that was read: bytes, and the digest of its header."""

    size: int
    header: Hex


class LockedInput(_Part):
    """A model or artifact that went in. `content` is a digest over every tensor of it that was read."""

    source: str
    revision: str | None
    files: dict[str, LockedFile]
    content: Hex


class LockedTensor(_Part):
    """A tensor that came out; `norm` is None where it is not finite, and `sums` then means nothing."""

    digest: Hex
    dtype: str
    shape: tuple[int, ...]
    norm: float | None
    sums: str

    @property
    def fingerprint(self) -> Fingerprint:
        """Its norm and sums. Raises ValueError for sums that are none."""
        return Fingerprint.of_text(math.nan if self.norm is None else self.norm, self.sums)


class Lock(_Part):
    """All that a lock file says."""

    lock: Literal[1] = 1
    recipe: Hex
    """Of the resolved recipe: another one is another merge."""
    software: dict[str, str]
    ops: dict[str, int]
    stages: dict[str, str]
    """The keys of the artifacts of its stages: digests of all that went into them."""
    inputs: dict[str, LockedInput]
    files: dict[str, Hex]
    """What stands beside the weights: config, tokenizer."""
    tensors: dict[str, LockedTensor]

    def text(self) -> str:
        """The file: one line for each entry of a section."""
        sections = []
        for key, value in sorted(self.model_dump(mode="json").items()):
            if isinstance(value, dict):
                lines = [f"  {_json(name)}: {_json(one)}" for name, one in sorted(value.items())]
                sections.append(f' "{key}": ' + ("{\n" + ",\n".join(lines) + "\n }" if lines else "{}"))
            else:
                sections.append(f' "{key}": {_json(value)}')
        return "{\n" + ",\n".join(sections) + "\n}\n"


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def lock_path(recipe: str | Path) -> Path:
    """Where the lock of a recipe file is: beside it, `merge.yaml.lock`."""
    return Path(f"{recipe}.lock")


def read_lock(path: Path) -> Lock:
    """The lock in a file. Raises RecipeError where there is none, InputError for a file that is not one."""
    fix = "Write it anew with `mergeflow lock`."
    try:
        if path.stat().st_size > LARGEST_LOCK:
            raise InputError("is too large for a lock", where=str(path), fix=fix)
        raw = path.read_bytes()
        json.loads(raw, object_pairs_hook=unique)
        found = Lock.model_validate_json(raw)
        for one in found.tensors.values():
            _ = one.fingerprint
        return found
    except FileNotFoundError:
        raise RecipeError(
            "the recipe has no lock", where=str(path), fix="Write one with `mergeflow lock RECIPE`."
        ) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        at = ".".join(map(str, first["loc"]))
        raise InputError(f"is no lock: {at}: {first['msg']}", where=str(path), fix=fix) from None
    except json.JSONDecodeError as error:
        raise InputError(f"is no lock: {error.msg}", where=f"{path}:{error.lineno}:{error.colno}", fix=fix) from None
    except DuplicateKey as error:
        raise InputError(f"is no lock: '{error}' stands there twice", where=str(path), fix=fix) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"is no lock: {error}", where=str(path), fix=fix) from None


def write_lock(made: Lock, path: Path) -> None:
    """Write a lock file at once: whatever happens there is the old one or the new one. Raises MachineError."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with disk.named(path, "cannot be written"):
        try:
            with disk.created(beside) as out:
                disk.write_all(out, made.text().encode())
                os.fsync(out)
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        disk.sync_path(path.parent)


@dataclass(frozen=True)
class Made:
    """A merge that was run to be looked at: its lock, and the folder it is in for as long as it is looked at."""

    lock: Lock
    folder: Path


@contextmanager
def making(recipe: Recipe, *, scratch: str | Path | None = None, **how: Any) -> Iterator[Made]:
    """Run the merge into a folder below `scratch` (default: here), and delete it in the end.

    `how` are options of `pipeline.run` (`device`, `threads`, `memory`, `reading`, `progress`, `planned`). Raises what a run raises.
    """
    where = Path(scratch or ".")
    with disk.named(where, "cannot be written"):
        folder = Path(tempfile.mkdtemp(prefix=f".{recipe.name}.check.", dir=where))
    try:
        watched: list[tuple[Plan, Fingerprinting]] = []

        def watch(plan: Plan, sink: Any) -> Any:
            watched.append((plan, Fingerprinting(plan.rows, sink)))
            return watched[-1][1]

        out = folder / recipe.name
        result = pipeline.run(recipe, out, watch=watch, **how)
        plan, fingerprints = watched[-1]
        stages = {node: key for node, key, _ in result.stages}
        yield Made(_lock(recipe, plan, out, fingerprints.finish(), stages), out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _lock(
    recipe: Recipe,
    plan: Plan,
    out: Path,
    fingerprints: Mapping[tuple[str, str], Fingerprint],
    stages: Mapping[str, str],
) -> Lock:
    tensors: dict[str, LockedTensor] = {}
    files: dict[str, str] = {}
    inputs: dict[str, LockedInput] = {}
    for key in recipe.outputs:
        manifest = json.loads((out / key / MANIFEST).read_bytes())
        inputs |= locked_inputs(recipe, manifest["inputs"])
        files |= {_named(key, name): file["digest"] for name, file in manifest["files"].items()}
        for name, told in manifest["tensors"].items():
            mark = fingerprints[key, name]
            tensors[_named(key, name)] = LockedTensor(
                digest=told["digest"],
                dtype=told["dtype"],
                shape=tuple(told["shape"]),
                norm=mark.norm if math.isfinite(mark.norm) else None,
                sums=mark.text(),
            )
    return Lock(
        recipe=recipe_digest(recipe),
        software=software(),
        ops=_versions(plan, recipe),
        stages=dict(stages),
        inputs=inputs,
        files=files,
        tensors=tensors,
    )


def _named(output: str, name: str) -> str:
    return f"{output}/{name}" if output else name


def recipe_digest(recipe: Recipe) -> str:
    """Hex BLAKE3 of the resolved recipe: of all in it that says what is made."""
    return blake3(_json(recipe.resolved).encode()).hexdigest()


def locked_inputs(recipe: Recipe, inputs: Mapping[str, Any]) -> dict[str, LockedInput]:
    """What a lock says of the inputs that a manifest has; what the recipe's own stages made is known by their keys."""
    sources = _sources(recipe)
    found = {}
    for name, told in inputs.items():
        if name in sources:
            read = "".join(f"{tensor} {digest}\n" for tensor, digest in sorted(told["tensors"].items()))
            beside = "".join(
                f"{file} {facts['digest']}\n" for file, facts in sorted(told["files"].items()) if "digest" in facts
            )
            found[name] = LockedInput(
                source=sources[name],
                revision=told["revision"],
                files={
                    file: LockedFile(size=facts["size"], header=facts["header"])
                    for file, facts in told["files"].items()
                    if "header" in facts
                },
                content=blake3(f"{read}\n{beside}".encode()).hexdigest(),
            )
    return found


def _sources(recipe: Recipe) -> dict[str, str]:
    """Where each model and artifact of a recipe is, as it says."""
    return {name: recipe.artifacts[name].location for name in recipe.artifacts} | {
        name: recipe.models[name].location for name in recipe.models
    }


def software() -> dict[str, str]:
    """What computes: versions, the machine's kind and the instructions that torch uses on it."""
    import torch

    return {
        "mergeflow": __version__,
        "torch": version("torch").partition("+")[0],
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def _versions(plan: Plan, recipe: Recipe) -> dict[str, int]:
    """The versions of all ops that make rows, and of those of the recipe's stages."""
    found = {stage.op: recipe.nodes[stage.node].op.version for stage in plan.stages if stage.node in recipe.nodes}
    return found | {one.op.name: one.op.version for one in applications(row.expression for row in plan.rows)}


# Run --locked


def guard(
    recipe: Recipe, path: Path, device: str = "cpu", allow_pickle: bool = False
) -> Callable[[Mapping[str, Any]], None]:
    """What `run --locked` holds a run against, before it reads a weight and again with all that was read.

    Raises RecipeError where there is no lock or the recipe is another one than was locked, InputError for inputs that have drifted: at
    once where headers, sizes or revisions show it, and from what is returned, which takes a manifest's inputs, where only the
    weights do.
    """
    lock = read_lock(path)
    if lock.recipe != recipe_digest(recipe):
        raise RecipeError(
            "the recipe is another one than was locked",
            where=str(path),
            fix="Look at what changed, then run `mergeflow lock` again.",
        )
    _refuse(
        path,
        [
            *_drifted(lock, recipe, allow_pickle),
            *_stage_changes(lock.stages, _stages(recipe, device, allow_pickle) if lock.stages else {}),
        ],
    )

    def accept(inputs: Mapping[str, Any]) -> None:
        found = locked_inputs(recipe, inputs)
        _refuse(path, [*_input_changes(lock.inputs, found)])

    return accept


def _drifted(lock: Lock, recipe: Recipe, allow_pickle: bool) -> list[str]:
    """In what the recipe's inputs are others than were locked, as far as headers show it.

    A model that only stages run is none of them: its weights are in the keys of their artifacts.
    """
    opened = pipeline.open_models(recipe, allow_pickle)
    found = {
        name: before.model_copy(
            update={
                "revision": opened[name].folder.revision,
                "files": {f.name: LockedFile(size=f.size, header=f.header_digest) for f in opened[name].files.values()},
            }
        )
        for name, before in lock.inputs.items()
        if name in opened
    }
    return [*_input_changes(lock.inputs, found)]


def _stages(recipe: Recipe, device: str, allow_pickle: bool) -> dict[str, str]:
    made = pipeline.plan(recipe, device=device, allow_pickle=allow_pickle)
    return {stage.node: stage.key for stage in made.stages}


def _stage_changes(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            yield f"the stage '{name}' ran on something else than before, or another way"


def _refuse(path: Path, changes: Sequence[str]) -> None:
    if changes:
        raise InputError(
            f"the inputs are not those that were locked: {'; '.join(changes)}",
            where=str(path),
            fix="Bring the locked ones back, or look at what changed and run `mergeflow lock` again.",
        )


def _input_changes(before: Mapping[str, LockedInput], now: Mapping[str, LockedInput]) -> Iterator[str]:
    """A sentence for each input that is another one."""
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if old is None or new is None:
            yield f"'{name}' is {'new' if old is None else 'gone'}"
        elif old.revision != new.revision:
            yield f"'{name}' is at revision {new.revision}, not {old.revision}"
        elif old.files.keys() != new.files.keys():
            files = ", ".join(sorted(old.files.keys() ^ new.files.keys()))
            yield f"'{name}' has other files ({files})"
        elif old.files != new.files:
            file = next(file for file in sorted(new.files) if new.files[file] != old.files[file])
            sizes = old.files[file].size, new.files[file].size
            what = f"{sizes[0]} bytes then, {sizes[1]} now" if sizes[0] != sizes[1] else "its header is another"
            yield f"{file} of '{name}' changed ({what})"
        elif old.content != new.content:
            yield f"the weights of '{name}' changed"


# Check


@dataclass(frozen=True, slots=True)
class Moved:
    """A tensor or file that is not as it was locked.

    `why` is new, gone, shape, dtype, file or drift; `drift` is the estimate of ||new - old|| / ||old|| where there is one, and
    `allowed` whether that is within what the check tolerates.
    """

    name: str
    why: str
    drift: float | None = None
    before: str = ""
    now: str = ""
    allowed: bool = False


@dataclass(frozen=True, slots=True)
class Expectation:
    """One thing that the recipe expects of the result, what was found, and whether that is good."""

    what: str
    found: str
    good: bool


@dataclass(frozen=True)
class Check:
    """What a check found: sentences on what went in or computed, what came out otherwise, and what was expected."""

    recipe: str
    tensors: int
    changes: tuple[str, ...]
    moved: tuple[Moved, ...]
    expected: tuple[Expectation, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing moved further than is allowed and every expectation is met."""
        return all(one.allowed for one in self.moved) and all(one.good for one in self.expected)


def check(
    recipe: Recipe,
    lock: Lock,
    *,
    tolerance: float | None = None,
    scratch: str | Path | None = None,
    progress: Progress = lambda what, done, total: None,
    planned: Callable[[Plan], None] = lambda plan: None,
    **how: Any,
) -> Check:
    """Make the merge and hold it against its lock and against what the recipe expects of it.

    A tensor is good when it has the locked digest, or its estimated drift is at most `tolerance`, else what `expect.drift` allows it,
    else nothing. Raises what a run raises, RecipeError for an `expect.drift` whose patterns fit no tensor, InputError for data that
    cannot be read.
    """
    limits: dict[str, float] = {}

    def limited(plan: Plan) -> None:
        planned(plan)
        limits.update(_limits(recipe, plan, tolerance))  # patterns that fit nothing are said before a weight is read

    with making(recipe, scratch=scratch, progress=progress, planned=limited, **how) as made:
        expected = [*_finite(recipe.expect, made.lock), *_measured(recipe, made.folder, progress, **how)]
        return Check(
            recipe.name,
            len(made.lock.tensors),
            tuple(_changes(lock, made.lock)),
            tuple(_moved(lock, made.lock, limits)),
            tuple(expected),
        )


def _limits(recipe: Recipe, plan: Plan, tolerance: float | None) -> dict[str, float]:
    """The drift that each tensor may have. Raises RecipeError for patterns of `expect.drift` that fit none."""
    names = {_named(row.output, row.name): row.name for row in plan.rows}
    setting = recipe.expect.drift
    if tolerance is not None:
        return dict.fromkeys(names, tolerance)
    if setting is None:
        return {}
    known, where, findings = places(names.values()), recipe.where(("expect", "drift")), Findings()
    findings.check_setting(setting, known, where)
    raise_all(findings.all())
    try:
        return {name: value_at(setting, known[short]) for name, short in names.items()}
    except RecipeError as error:
        raise error.placed(where) from None


def _changes(before: Lock, now: Lock) -> Iterator[str]:
    """What else is not as it was: none of it fails a check, all of it may explain one."""
    if before.recipe != now.recipe:
        yield "the recipe is another one than was locked"
    yield from _input_changes(before.inputs, now.inputs)
    yield from _stage_changes(before.stages, now.stages)
    for name in sorted({*before.ops, *now.ops}):
        if before.ops.get(name) != now.ops.get(name):
            yield f"op '{name}' was version {before.ops.get(name, 'none')}, is {now.ops.get(name, 'none')}"
    for name in sorted({*before.software, *now.software}):
        if before.software.get(name) != now.software.get(name):
            yield f"{name} was {before.software.get(name, 'unknown')}, is {now.software.get(name, 'unknown')}"


def _moved(before: Lock, now: Lock, limits: Mapping[str, float]) -> list[Moved]:
    """What came out otherwise, the furthest first."""
    found = []
    for name in sorted({*before.tensors, *now.tensors}):
        old, new = before.tensors.get(name), now.tensors.get(name)
        if old is None or new is None:
            found.append(Moved(name, "new" if old is None else "gone"))
        elif old.shape != new.shape:
            found.append(Moved(name, "shape", None, _shape(old.shape), _shape(new.shape)))
        elif old.digest != new.digest:
            far = drift(old.fingerprint, new.fingerprint)
            if old.dtype != new.dtype:
                found.append(Moved(name, "dtype", far, old.dtype, new.dtype))
            else:
                found.append(Moved(name, "drift", far, allowed=far <= limits.get(name, -1.0)))
    for name in sorted({*before.files, *now.files}):
        was, is_now = before.files.get(name), now.files.get(name)
        if was != is_now:
            found.append(Moved(name, "new" if was is None else "gone" if is_now is None else "file"))
    return sorted(found, key=lambda one: (one.allowed, -_rank(one), one.name))


def _rank(one: Moved) -> float:
    return math.inf if one.drift is None or math.isnan(one.drift) else one.drift


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _finite(expect: ExpectSection, made: Lock) -> Iterator[Expectation]:
    if expect.finite:
        bad = [name for name, one in made.tensors.items() if one.norm is None]
        shown = f"{bad[0]}{f' and {len(bad) - 1} more' if len(bad) > 1 else ''}: NaN or Inf" if bad else "all finite"
        yield Expectation("finite", shown, not bad)


def _measured(recipe: Recipe, folder: Path, progress: Progress, **how: Any) -> Iterator[Expectation]:
    """The measures that the recipe expects, with what came out; each output runs once on each of its data."""
    wanted: dict[tuple[str, str], list[Any]] = {}
    for one in recipe.expect.eval:
        wanted.setdefault((one.output or "", one.data), []).append(one)
    for (output, name), measures in wanted.items():
        from mergeflow import evaluating

        where = recipe.where(("expect", "eval"))
        found = evaluating.evaluate(
            folder / output,
            [recipe.data[name]],
            relative_to=recipe.folder,
            label=recipe.name,
            device=how.get("device", "cpu"),
            threads=how.get("threads"),
            progress=progress,
        ).results[0]
        for one in measures:
            if one.metric not in found.measures:
                raise RecipeError(
                    f"the output has no {one.metric}",
                    where=where,
                    fix=f"It is measured by {', '.join(found.measures)}.",
                )
            value = found.measures[one.metric]
            bounds = [
                f"{word} {bound:g}"
                for word, bound in (("at least", one.min), ("at most", one.max))
                if bound is not None
            ]
            good = (one.min is None or value >= one.min) and (one.max is None or value <= one.max)
            at = f"{output}/{name}" if output else name
            yield Expectation(f"{one.metric} on {at} {' and '.join(bounds)}", f"{value:.4f}", good)


# Words


def check_data(found: Check) -> dict[str, Any]:
    """JSON-ready; a drift that cannot be told is null."""
    return {
        "recipe": found.recipe,
        "passed": found.passed,
        "tensors": found.tensors,
        "changes": list(found.changes),
        "moved": [
            {
                "name": one.name,
                "why": one.why,
                "drift": one.drift if one.drift is not None and math.isfinite(one.drift) else None,
                "standard_error": STANDARD_ERROR * one.drift
                if one.drift is not None and math.isfinite(one.drift)
                else None,
                "before": one.before or None,
                "now": one.now or None,
                "allowed": one.allowed,
            }
            for one in found.moved
        ],
        "expected": [{"what": one.what, "found": one.found, "good": one.good} for one in found.expected],
    }


def _told(one: Moved) -> str:
    """How far something moved, in words."""
    if one.why in ("new", "gone"):
        return one.why
    if one.why == "file":
        return "other contents"
    changed = f"{one.before} -> {one.now}" if one.before or one.now else ""
    if one.drift is None:
        return changed
    if math.isnan(one.drift):
        far = "not finite"
    elif math.isinf(one.drift):
        far = "was zero"
    else:
        far = f"{one.drift:.1e} ± {STANDARD_ERROR * one.drift:.0e}"
    return f"{far}, {changed}" if changed else far


def _verdict(found: Check) -> str:
    far = [one for one in found.moved if not one.allowed]
    near = len(found.moved) - len(far)
    bad = sum(not one.good for one in found.expected)
    told = [f"{len(far)} moved"] * bool(far) + [f"{near} moved within what is allowed"] * bool(near)
    told += [f"{bad} expectations not met"] * bool(bad)
    if not told:
        told = ["all exactly as locked"]
    return f"{found.recipe}: {'good' if found.passed else 'FAILED'}, {found.tensors} tensors, {', '.join(told)}"


def check_text(found: Check, *, shown: int = SHOWN) -> str:
    """A table for a person: what moved, the furthest first, and what was expected."""
    lines = [_verdict(found)]
    lines += [f"  {change}" for change in found.changes]
    if found.moved:
        width = max(len(one.name) for one in found.moved[:shown])
        lines += ["", f"  {'tensor':<{width}}  drift: ||new - old|| / ||old||"]
        for one in found.moved[:shown]:
            lines.append(f"  {one.name:<{width}}  {_told(one)}{'  (allowed)' if one.allowed else ''}")
        if len(found.moved) > shown:
            lines.append(f"  and {len(found.moved) - shown} more")
    if found.expected:
        lines += ["", *(f"  {'met    ' if one.good else 'NOT MET'}  {one.what}: {one.found}" for one in found.expected)]
    return printable("\n".join(lines))


def check_markdown(found: Check, *, shown: int = SHOWN) -> str:
    """The same for a CI's summary or a comment on a pull request."""
    mark = "✅" if found.passed else "❌"
    lines = [f"### {mark} {markdown_cell(_verdict(found))}", ""]
    lines += [f"- {markdown_cell(change)}" for change in found.changes]
    if found.moved:
        lines += ["", "| tensor | drift | |", "| --- | ---: | --- |"]
        lines += [
            f"| `{markdown_cell(one.name)}` | {markdown_cell(_told(one))} | {'allowed' if one.allowed else ''} |"
            for one in found.moved[:shown]
        ]
        if len(found.moved) > shown:
            lines.append(f"| and {len(found.moved) - shown} more | | |")
    if found.expected:
        lines += ["", "| expected | found | |", "| --- | ---: | --- |"]
        lines += [
            f"| {markdown_cell(one.what)} | {markdown_cell(one.found)} | {'✅' if one.good else '❌'} |"
            for one in found.expected
        ]
    return "\n".join(lines).rstrip() + "\n"

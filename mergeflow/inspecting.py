"""What headers tell about a checkpoint, as data and as text, for `mergeflow inspect`.

No weight is read, and no torch is needed: an answer takes milliseconds, whatever the size of the model. Names, metadata
and config come from strangers, so the text escapes whatever a terminal would act on, and shortens what is long; the data
holds everything as it is. Tensors that differ in numbers alone are one line of text, in the braces that a recipe's patterns
use, so that a line can be copied into one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mergeflow.checkpoint import Checkpoint, StoredTensor
from mergeflow.checkpoint.adapter import Adapter
from mergeflow.checkpoint.statistics import Statistics
from mergeflow.errors import InputError, printable
from mergeflow.manifest import MANIFEST
from mergeflow.planning import EMBEDDINGS, HEADS, QUANTISED, SPACE_KEY
from mergeflow.settings import places, runs

LONGEST_WORD = 200
WIDEST_NAME = 72
ENOUGH = 4
"""Tokens for each dimension of a Gram, below which it says little about the directions that inputs hardly take."""
MOST_NUMBERS = 3
"""Numbers of a name that are folded, from the left: layer, expert and one more; a hostile name has hundreds."""


def inspect_model(checkpoint: Checkpoint) -> dict[str, Any]:
    """What headers and config say, JSON-ready; sizes in bytes, `tensors` in the order of files and offsets."""
    tensors = checkpoint.tensors
    config = checkpoint.config or {}
    by_dtype: dict[str, int] = {}
    for tensor in tensors.values():
        by_dtype[tensor.dtype.name] = by_dtype.get(tensor.dtype.name, 0) + tensor.elements
    architectures = config.get("architectures")
    model_type = config.get("model_type")
    return {
        "source": checkpoint.folder.label,
        "revision": checkpoint.folder.revision,
        "files": [{"name": file.name, "size": file.size} for file in checkpoint.files.values()],
        "size": sum(file.size for file in checkpoint.files.values()),
        "space": "delta" if isinstance(checkpoint, Adapter) else checkpoint.metadata.get(SPACE_KEY, "weight"),
        "adapter": checkpoint.facts if isinstance(checkpoint, Adapter) else None,
        "statistics": _statistics(checkpoint) if isinstance(checkpoint, Statistics) else None,
        "architectures": [str(name) for name in architectures] if isinstance(architectures, list) else [],
        "model_type": model_type if isinstance(model_type, str) else None,
        "count": len(tensors),
        "parameters": {"total": sum(by_dtype.values()), "by_dtype": by_dtype},
        "stacks": _stacks(tensors),
        "vocabulary": _vocabulary(tensors, config),
        "tied": _tied(tensors, config),
        "quantised": _quantised(tensors, config),
        "metadata": dict(checkpoint.metadata),
        "mergeflow": _made(checkpoint),
        "tensors": [
            {
                "name": tensor.name,
                "dtype": tensor.dtype.name,
                "shape": list(tensor.shape),
                "file": tensor.file,
                "size": tensor.nbytes,
            }
            for tensor in tensors.values()
        ],
    }


def inspect_text(data: Mapping[str, Any]) -> str:
    """The data of `inspect_model` for a terminal: facts, then a line for each kind of tensor."""
    facts = [(word, text) for word, text in _facts(data) if text]
    width = max(len(word) for word, _ in facts)
    return "\n".join([*(f"{word:<{width}}  {text}" for word, text in facts), "", *_table(data["tensors"])])


def _stacks(tensors: Mapping[str, StoredTensor]) -> list[dict[str, Any]]:
    """The numbered stacks: prefix, how many layers, and their numbers (as a recipe's pattern has them)."""
    found: dict[str, tuple[int, ...]] = {}
    for name, place in places(tensors).items():
        if place.layers is not None:
            components = name.split(".")
            first = next(i for i, component in enumerate(components) if component.isascii() and component.isdigit())
            found.setdefault(".".join(components[:first]), place.layers)
    return [
        {"prefix": prefix, "layers": len(numbers), "numbers": _ranges(numbers)} for prefix, numbers in found.items()
    ]


def _vocabulary(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of the embedding, and what the config calls the vocabulary's size; None for what is not known."""
    size = _from_config(config, "vocab_size")
    embedding = _first(tensors, EMBEDDINGS)
    return {
        "rows": tensors[embedding].shape[0] if embedding and tensors[embedding].shape else None,
        "embedding": embedding,
        "config": size if isinstance(size, int) and not isinstance(size, bool) else None,
    }


def _tied(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the config ties the head to the embedding (None: it does not say), and the head that is stored."""
    flag = _from_config(config, "tie_word_embeddings")
    return {"config": flag if isinstance(flag, bool) else None, "head": _first(tensors, HEADS)}


def _quantised(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> str | None:
    """How the checkpoint shows that its numbers mean nothing without their scales; None for a plain one."""
    if config.get("quantization_config"):
        return "config.json has a quantization_config"
    name = next((name for name in tensors if name.endswith(QUANTISED)), None)
    return None if name is None else f"it has the tensor {name}"


def _made(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What the manifest of a mergeflow output says of itself; None where there is none."""
    try:
        manifest = checkpoint.json(MANIFEST)
    except InputError as error:
        return {"problem": str(error)}
    if not isinstance(manifest, dict):
        return None
    inputs, software = manifest.get("inputs"), manifest.get("software")
    return {
        "recipe": manifest.get("name"),
        "plan": manifest.get("plan"),
        "version": software.get("mergeflow") if isinstance(software, dict) else None,
        "inputs": {
            name: {"source": one.get("source"), "revision": one.get("revision")}
            for name, one in (inputs.items() if isinstance(inputs, dict) else ())
            if isinstance(one, dict)
        },
    }


def _statistics(checkpoint: Statistics) -> dict[str, Any]:
    """What statistics.json says was collected: of each group the weights that read it, its dimension and its tokens."""
    facts = checkpoint.facts
    weights: dict[str, list[str]] = {}
    for weight, group in facts.groups.items():
        weights.setdefault(group, []).append(weight)
    return {
        "kind": facts.kind,
        "codec": facts.codec,
        "op": facts.op.model_dump(mode="json"),
        "model": facts.model.model_dump(mode="json"),
        "only": list(facts.only) if facts.only is not None else None,
        "n_examples": facts.n_examples,
        "n_tokens": facts.n_tokens,
        "groups": {
            group: {
                "weights": names,
                "dimension": checkpoint.dimension(names[0]),
                "n_tokens": checkpoint.n_tokens(names[0]),
            }
            for group, names in weights.items()
        },
        "skipped": dict(facts.skipped),
    }


def _from_config(config: Mapping[str, Any], key: str) -> Any:
    """A key of config.json, or of its text_config."""
    inner = config.get("text_config")
    return config.get(key, inner.get(key) if isinstance(inner, dict) else None)


def _first(tensors: Iterable[str], endings: Sequence[str]) -> str | None:
    """The first tensor that is called one of these, below whatever prefix."""
    return next((name for name in tensors if any(name == end or name.endswith(f".{end}") for end in endings)), None)


# Text


def _facts(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "source", _plain(data["source"])
    yield "revision", _plain(data["revision"] or "")
    files = data["files"]
    names = [f"{_plain(file['name'])} ({_size(file['size'])})" for file in files[:3]]
    more = f" and {len(files) - 3} more, {_size(data['size'])} in all" if len(files) > 3 else ""
    yield "files", f"{', '.join(names)}{more}"
    kind = f"model_type {_plain(data['model_type'])}" if data["model_type"] else ""
    yield "architecture", ", ".join(filter(None, [*map(_plain, data["architectures"]), kind]))
    parameters = data["parameters"]
    each = ", ".join(f"{name} {number:,}" for name, number in parameters["by_dtype"].items())
    yield "tensors", f"{data['count']:,}"
    yield "parameters", f"{parameters['total']:,} ({each})" if each else "0"
    stacks = [
        f"{_plain(stack['prefix'] or '(no prefix)')} {{{_plain(stack['numbers'])}}} x{stack['layers']}"
        for stack in data["stacks"]
    ]
    yield "layers", ", ".join(stacks[:8]) + (f" and {len(stacks) - 8} more stacks" if len(stacks) > 8 else "")
    if data["adapter"] is None and data["statistics"] is None:
        yield "vocabulary", _vocabulary_text(data["vocabulary"])
        yield "tied head", _tied_text(data["tied"], data["vocabulary"])
    yield "space", _plain(data["space"])
    yield from _adapter_facts(data["adapter"])
    yield from _statistics_facts(data["statistics"])
    yield "quantised", f"yes: {_plain(data['quantised'])}" if data["quantised"] else ""
    for key, value in data["metadata"].items():
        yield "metadata", f"{_plain(key)}: {_plain(value)}"
    made = data["mergeflow"]
    if made is not None:
        yield "made by", _made_text(made)


def _adapter_facts(adapter: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    """What an adapter says of itself."""
    if adapter is None:
        return
    scaling = ", ".join(f"{one:g}" for one in adapter["scaling"][:5]) + (", ..." if len(adapter["scaling"]) > 5 else "")
    yield "rank", ", ".join(map(str, adapter["rank"]))
    yield "scaling", f"{scaling} (alpha / {'sqrt(rank)' if adapter['rslora'] else 'rank'})" if scaling else ""
    yield "targets", _plain(", ".join(adapter["targets"]))
    saved = [_plain(name) for name in adapter["saved"]]
    more = f" and {len(saved) - 3} more" if len(saved) > 3 else ""
    yield "changes", f"{adapter['changes']:,} tensors of its base"
    yield "whole weights", f"{', '.join(saved[:3])}{more}"
    yield "made for", _plain(adapter["base"] or "")


def _statistics_facts(told: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    """What was collected, of which model, and how far it can be trusted."""
    if told is None:
        return
    model, groups, skipped = told["model"], told["groups"], told["skipped"]
    only = f", only {_plain(', '.join(told['only']))}" if told["only"] else ""
    yield "statistics", f"{told['kind']}, codec {told['codec']}{only}"
    revision = f"@{_plain(model['revision'])}" if model["revision"] else ""
    yield (
        "collected on",
        f"{_plain(model['source'])}{revision} ({_plain(model['digest'][:12])})" if model["source"] else "",
    )
    yield "tokens", f"{told['n_tokens']:,} of {told['n_examples']:,} examples"
    if groups:
        count = sum(len(one["weights"]) for one in groups.values())
        widest = max(one["dimension"] for one in groups.values())
        yield "groups", f"{len(groups):,} inputs of {count:,} weights, of up to {widest:,} dimensions"
    yield "skipped", f"{len(skipped):,} weights, e.g. {_plain(next(iter(skipped.items())))}" if skipped else ""
    if told["kind"] == "gram" and told["codec"] != "diagonal":
        yield "conditioning", _conditioning(groups)


def _conditioning(groups: Mapping[str, Mapping[str, Any]]) -> str:
    """How many tokens each dimension of a Gram has: with few, the directions that inputs hardly take are noise.

    n / (n + d) is the alpha that shrinks a second moment of n tokens in d dimensions as far as its own noise asks for.
    """
    if not groups:
        return ""
    scarce = {name: one for name, one in groups.items() if one["n_tokens"] < ENOUGH * one["dimension"]}
    if not scarce:
        least = min(one["n_tokens"] / max(one["dimension"], 1) for one in groups.values())
        return f"good: {least:,.3g} tokens or more for each dimension"
    name, worst = min(scarce.items(), key=lambda item: item[1]["n_tokens"] / item[1]["dimension"])
    n, d = worst["n_tokens"], worst["dimension"]
    return (
        f"poor in {len(scarce):,} of {len(groups):,} groups: {n:,} tokens for {d:,} dimensions in {_plain(name)}; "
        f"use alpha of {n / (n + d):.2f} or less, or collect on {ENOUGH * d:,} tokens"
    )


def _vocabulary_text(vocabulary: Mapping[str, Any]) -> str:
    rows, size = vocabulary["rows"], vocabulary["config"]
    if rows is None:
        return "" if size is None else f"{size:,} by config.json"
    differs = f", {size:,} by config.json" if size is not None and size != rows else ""
    return f"{rows:,} rows in {_plain(vocabulary['embedding'])}{differs}"


def _tied_text(tied: Mapping[str, Any], vocabulary: Mapping[str, Any]) -> str:
    head = tied["head"]
    if head is None and vocabulary["embedding"] is None:
        return ""
    flag = {True: "yes", False: "no", None: "config.json does not say"}[tied["config"]]
    return f"{flag}; {_plain(head)} is stored" if head is not None else f"{flag}; no head is stored"


def _made_text(made: Mapping[str, Any]) -> str:
    if "problem" in made:
        return f"mergeflow, but its manifest cannot be read: {_plain(made['problem'])}"
    version = f" {_plain(made['version'])}" if made["version"] else ""
    inputs = ", ".join(
        _plain(f"{one['source']}@{one['revision']}" if one["revision"] else one["source"])
        for one in made["inputs"].values()
    )
    facts = f"recipe {_plain(made['recipe'])}, plan {_plain(made['plan'])}"
    return f"mergeflow{version}: {facts}{f', from {inputs}' if inputs else ''}"


def _table(tensors: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each group of tensors: name, shape, dtype, and how many they are."""
    rows = []
    for name, group in folded(tensors):
        shape = f"[{', '.join(map(str, group[0]['shape']))}]"
        rows.append((_plain(name), shape, group[0]["dtype"], f"x{len(group)}" if len(group) > 1 else ""))
    if not rows:
        return ["no tensors"]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    widths[0] = min(widths[0], WIDEST_NAME)
    return [
        f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {dtype:<{widths[2]}}  {count}".rstrip()
        for name, shape, dtype, count in rows
    ]


def folded(tensors: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Tensors of one shape and dtype whose names differ in numbers alone, with a name for all: `layers.{0-21}.up.weight`.

    A name stands for exactly the tensors beside it: where the numbers do not make a full grid, fewer are put together.
    """
    groups: dict[Any, dict[tuple[int, ...], Mapping[str, Any]]] = {}
    for tensor in tensors:
        pieces: list[str | None] = tensor["name"].split(".")
        at = [i for i, piece in enumerate(pieces) if piece is not None and _is_number(piece)][:MOST_NUMBERS]
        numbers = tuple(int(pieces[i] or 0) for i in at)
        for i in at:
            pieces[i] = None
        groups.setdefault((tuple(pieces), tensor["dtype"], tuple(tensor["shape"])), {})[numbers] = tensor
    lines = []
    for (kept, _, _), members in groups.items():
        for grid in _grids(list(members)):
            axes = iter(grid)
            words = (_braced(next(axes)) if piece is None else piece for piece in kept)
            lines.append((".".join(words), [members[key] for key in itertools.product(*grid)]))
    return lines


def _grids(members: list[tuple[int, ...]]) -> Iterator[list[list[int]]]:
    """The members as full grids, each a sorted list of numbers for each position; along the first position at worst."""
    axes = [sorted(set(axis)) for axis in zip(*members, strict=True)]
    if math.prod(map(len, axes)) == len(members):
        yield axes
        return
    rests: dict[tuple[int, ...], list[int]] = {}
    for first, *rest in members:
        rests.setdefault(tuple(rest), []).append(first)
    alike: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for rest_of_name, firsts in rests.items():
        alike.setdefault(tuple(sorted(firsts)), []).append(rest_of_name)
    for firsts_sorted, rest_members in alike.items():
        for grid in _grids(rest_members):
            yield [list(firsts_sorted), *grid]


def _is_number(component: str) -> bool:
    """Whether a part of a name is a number as it is usually written, which braces can stand for."""
    return component.isascii() and component.isdigit() and len(component) < 10 and str(int(component)) == component


def _braced(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{{{_ranges(numbers)}}}"


def _ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers as a recipe's patterns have them: `0-3`, `0,4,8`, `0-3,7`."""
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs(numbers))


def _plain(value: Any) -> str:
    """A word from a file on one line of a terminal: escaped, and cut where it is long."""
    text = str(value)
    if len(text) > LONGEST_WORD:
        text = f"{text[:LONGEST_WORD]}... ({len(text):,} characters)"
    return printable(text).replace("\n", "\\n")


def _size(size: int) -> str:
    """Bytes as people read them."""
    number, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if number < 1000:
            break
        number, unit = number / 1000, larger
    return f"{size} B" if unit == "B" else f"{number:.3g} {unit}" if number < 999.5 else f"{number:.0f} {unit}"

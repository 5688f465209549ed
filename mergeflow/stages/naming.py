"""Which tensor of a checkpoint lies where in a model's parameters.

transformers renames, fuses and splits tensors while it loads them. Its own rules are asked where each tensor of the checkpoint
goes, and the answer is checked by value on sampled rows once weights are there. Three shapes of an answer are followed: a tensor
is a parameter; it is rows of one (q, k and v fused; an expert's matrix in one tensor of all experts); or parameters are rows of
it. What the rules do beyond that has no place here, and no statistics.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from mergeflow.checkpoint import Checkpoint
from mergeflow.dtypes import torch_dtype
from mergeflow.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

SAMPLED = 8
"""Rows that are compared of each tensor."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """`rows` rows of checkpoint tensor `tensor` from `start` on are rows of `parameter` from `at` on, in `expert` if it has many."""

    tensor: str
    parameter: str
    rows: int
    start: int = 0
    at: int = 0
    expert: int | None = None


@dataclass(frozen=True)
class Names:
    """Where a checkpoint's tensors lie: `pieces` by parameter; `lost` says why others are in none."""

    pieces: Mapping[str, tuple[Piece, ...]]
    lost: Mapping[str, str]


def names_of(model: nn.Module, stored: Mapping[str, Shape]) -> Names:
    """Where tensors of these names and shapes lie in a model's parameters, by its conversion rules; needs no weights."""
    parameters = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    whole: list[Piece] = []
    lost: dict[str, str] = {}
    fused: dict[tuple[str, int], tuple[Any, dict[str, list[str]]]] = {}
    for name in sorted(stored, key=_natural):
        renamed, pattern, converter = _renamed(model, name)
        if converter is not None:
            _, sources = fused.setdefault((renamed, id(converter)), (converter, {}))
            sources.setdefault(pattern, []).append(name)
        elif parameters.get(renamed) == stored[name]:
            whole.append(Piece(name, renamed, _rows(stored[name])))
        elif renamed in parameters:
            lost[name] = f"its shape {list(stored[name])} is not that of the parameter {renamed}"
        else:
            lost[name] = "the model's class has no such parameter"
    for (renamed, _), (converter, sources) in fused.items():
        pieces = _fused(renamed, converter, sources, stored, parameters)
        if pieces is None:
            kinds = " and ".join(type(operation).__name__ for operation in converter.operations)
            lost |= dict.fromkeys(
                (name for names in sources.values() for name in names),
                f"transformers changes it while loading ({kinds})",
            )
        else:
            whole += pieces
    found: dict[str, list[Piece]] = {}
    for piece in whole:
        found.setdefault(piece.parameter, []).append(piece)
    return Names({name: tuple(pieces) for name, pieces in found.items()}, lost)


def _renamed(model: nn.Module, name: str) -> tuple[str, str, Any]:
    """The parameter that a tensor goes to, and the pattern and converter that take it there, if it is changed on the way."""
    rules = _rules(model)
    if rules is None:
        return name, "", None
    rename, renamings, converters, prefix, parameters = rules
    renamed, pattern = rename(name, renamings, converters, prefix, parameters)
    if renamed not in parameters and name in parameters:
        renamed, pattern = rename(name, [], [], prefix, parameters)
    if pattern is None:
        return renamed, "", None
    return renamed, pattern, next(one for one in converters if pattern in one.source_patterns)


def _rules(model: nn.Module) -> Any:
    """transformers' rules for a model; None for a model of our own."""
    kept = model.__dict__.get("_mergeflow_rules")
    if kept is None and hasattr(model, "base_model_prefix"):
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
        except ImportError as error:
            raise InputError(f"this version of transformers does not tell how it renames tensors: {error}") from None
        rules = get_model_conversion_mapping(cast("Any", model)) or []
        kept = (
            rename_source_key,
            [rule for rule in rules if isinstance(rule, WeightRenaming)],
            [rule for rule in rules if isinstance(rule, WeightConverter)],
            model.base_model_prefix,
            model.state_dict(),
        )
        kept = (*kept[:4], dict.fromkeys(kept[4], True))
        model.__dict__["_mergeflow_rules"] = kept
    return kept


def _fused(
    renamed: str,
    converter: Any,
    sources: Mapping[str, list[str]],
    stored: Mapping[str, Shape],
    parameters: Mapping[str, Shape],
) -> list[Piece] | None:
    """The pieces that a converter makes; None where it does more than to put rows together or apart."""
    kinds = [type(operation).__name__ for operation in converter.operations]
    dims = [getattr(operation, "dim", 0) for operation in converter.operations]
    shape = parameters.get(renamed)
    ordered = [sources[pattern] for pattern in converter.source_patterns if pattern in sources]
    if shape is None or len(ordered) != len(converter.source_patterns):
        return None
    if kinds in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]) and dims in ([0], [0, 1]) and len(shape) == 3:
        return _experts(renamed, shape, ordered, stored)
    if kinds == ["Concatenate"] and dims == [0] and all(len(names) == 1 for names in ordered):
        return _together(renamed, shape, [names[0] for names in ordered], stored)
    if kinds == ["Chunk"] and dims == [0] and len(ordered) == 1 and len(ordered[0]) == 1:
        name = ordered[0][0]
        first = str(converter.target_patterns[0])
        targets = [renamed.replace(first, str(target)) for target in converter.target_patterns]
        return _apart(name, stored[name], targets, parameters)
    return None


def _experts(renamed: str, shape: Shape, ordered: list[list[str]], stored: Mapping[str, Shape]) -> list[Piece] | None:
    pieces, at = [], 0
    for names in ordered:
        rows = stored[names[0]][0] if stored[names[0]] else 0
        if len(names) != shape[0] or any(stored[name] != (rows, shape[2]) for name in names):
            return None
        pieces += [Piece(name, renamed, rows, at=at, expert=expert) for expert, name in enumerate(names)]
        at += rows
    return pieces if at == shape[1] else None


def _together(renamed: str, shape: Shape, names: list[str], stored: Mapping[str, Shape]) -> list[Piece] | None:
    pieces, at = [], 0
    for name in names:
        if stored[name][1:] != shape[1:]:
            return None
        pieces.append(Piece(name, renamed, stored[name][0], at=at))
        at += stored[name][0]
    return pieces if at == shape[0] else None


def _apart(name: str, shape: Shape, targets: list[str], parameters: Mapping[str, Shape]) -> list[Piece] | None:
    pieces, start = [], 0
    for target in targets:
        own = parameters.get(target)
        if own is None or own[1:] != shape[1:]:
            return None
        pieces.append(Piece(name, target, own[0], start=start))
        start += own[0]
    return pieces if start == shape[0] else None


def checked(names: Names, model: nn.Module, checkpoint: Checkpoint) -> Names:
    """The same, without what is not so by value on sampled rows."""
    parameters = model.state_dict()
    lost = dict(names.lost)
    for piece in (piece for pieces in names.pieces.values() for piece in pieces):
        if not _same(piece, parameters[piece.parameter], checkpoint):
            lost[piece.tensor] = f"its values are not those of the parameter {piece.parameter}"
    kept = {
        parameter: tuple(piece for piece in pieces if piece.tensor not in lost)
        for parameter, pieces in names.pieces.items()
    }
    return replace(names, pieces={parameter: pieces for parameter, pieces in kept.items() if pieces}, lost=lost)


def _same(piece: Piece, parameter: Tensor, checkpoint: Checkpoint) -> bool:
    import torch

    inside = parameter if piece.expert is None else parameter[piece.expert]
    if piece.rows == 0 or inside.ndim == 0:
        stored = read_tensor(checkpoint, piece.tensor)
        return torch.equal(stored.to(inside.dtype), inside.cpu())
    for step in range(min(SAMPLED, piece.rows)):
        row = step * (piece.rows - 1) // max(min(SAMPLED, piece.rows) - 1, 1)
        stored = read_rows(checkpoint, piece.tensor, piece.start + row, piece.start + row + 1)[0]
        if not torch.equal(stored.to(inside.dtype), inside[piece.at + row].cpu()):
            return bool(stored.isnan().any())
    return True


def _rows(shape: Shape) -> int:
    return shape[0] if shape else 0


def _natural(name: str) -> list[tuple[int, str]]:
    """Numbers in a name by their size: expert 10 comes after expert 2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def read_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor of a checkpoint, in its stored dtype: a new tensor, its bytes read once and not mapped."""
    tensor = checkpoint.tensors[name]
    return _read(checkpoint, name, 0, tensor.nbytes).reshape(tensor.shape)


def read_rows(checkpoint: Checkpoint, name: str, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of the first axis of a tensor."""
    tensor = checkpoint.tensors[name]
    size = tensor.nbytes // max(tensor.shape[0], 1)
    return _read(checkpoint, name, start * size, stop * size).reshape(stop - start, *tensor.shape[1:])


def _read(checkpoint: Checkpoint, name: str, start: int, stop: int) -> Tensor:
    import torch

    tensor = checkpoint.tensors[name]
    path = checkpoint.folder.local([tensor.file])[tensor.file]
    made = torch.empty(stop - start, dtype=torch.uint8)
    with path.open("rb", buffering=0) as file:
        file.seek(tensor.begin + start)
        view, done = memoryview(cast("Any", made.numpy())), 0
        while done < len(view):
            count = file.readinto(view[done : done + (1 << 28)])
            if not count:
                raise InputError(
                    f"ends before tensor '{name}' does", where=str(path), fix="Fetch or copy the file again."
                )
            done += count
    return made.view(torch_dtype(tensor.dtype))


def shapes(checkpoint: Checkpoint, names: Iterable[str] | None = None) -> dict[str, Shape]:
    """The shapes of a checkpoint's tensors."""
    return {name: checkpoint.tensors[name].shape for name in (checkpoint.tensors if names is None else names)}

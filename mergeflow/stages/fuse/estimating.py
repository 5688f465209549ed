"""What a `fuse` takes of disk, memory and time, from headers, configs and the size of the data: nothing is run, nothing tokenised.

Estimates are for a person who wonders whether to begin, and for refusing what cannot fit; what is known exactly later (the bytes
of a capture) is checked again then.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeflow.graph import Needs
from mergeflow.ops.fuse import Fuse
from mergeflow.stages import data, models
from mergeflow.stages.fuse import capturing

if TYPE_CHECKING:
    from mergeflow.recipe.grammar import DataSource

BYTES_A_PARAMETER = 16
"""A weight, its gradient, and AdamW's two means, in float32."""
BYTES_A_CHECKPOINT = 12
"""Of each parameter in a training's checkpoint: a weight and AdamW's two means."""
CHARACTERS_A_BIT = 0.25
"""Characters of text in a token, for each bit of its id: 4 of 65,536 ids."""
OPERATIONS = {"cpu": 2e10, "cuda": 5e13}
"""What a device is taken to do in a second."""


def sizes(source: DataSource, folder: Path) -> list[int]:
    """The characters of text in each row of the data, 0 where it has none. Raises InputError where it cannot be read."""
    return [_characters(row.fields, source) for row in data.read_rows(source, folder, data.Counts())]


def _characters(fields: Any, source: DataSource) -> int:
    if source.messages is not None:
        return len(json.dumps(fields.get(source.messages), ensure_ascii=False))
    if source.template is not None:
        return sum(len(value) for value in fields.values() if isinstance(value, str))
    value = fields.get(source.text or "text")
    return len(value) if isinstance(value, str) else 0


def training(target: models.Folder) -> int:
    """Bytes of memory that training takes beside activations."""
    return target.elements * BYTES_A_PARAMETER


def activations(folder: models.Folder, tokens: int) -> int:
    """About the bytes of what so many tokens leave behind in a transformer, for the way back; 0 where its config does not say."""
    width, layers = folder.number("hidden_size", "n_embd", "d_model"), folder.number("num_hidden_layers", "n_layer")
    inner = folder.number("intermediate_size", "n_inner", "ffn_dim") or 4 * width
    return tokens * layers * (12 * width + 3 * inner) * 4


def needs(op: Fuse, target: models.Folder, sources: Sequence[models.Folder], rows: Sequence[int], device: str) -> Needs:
    """What the fuse takes where nothing of it is in the cache."""
    op = op.settled
    teachers = [*sources, *([target] if op.self_too else [])] if op.teaches else []
    kept = sum(_kept(op, folder, target, rows) for folder in teachers)
    if op.task == "causal_lm":  # documents, and the target's tokens of them
        kept += sum(rows) + 8 * _tokens(op, target, rows)
    operations = sum(2 * folder.elements * _tokens(op, folder, rows) for folder in teachers)
    operations += 6 * target.elements * _tokens(op, target, rows) * op.train.epochs
    return Needs(
        disk=kept + BYTES_A_CHECKPOINT * target.elements + target.nbytes,
        memory=max([training(target) + _logits(op, target), *(4 * folder.elements for folder in teachers)]),
        seconds=round(operations / OPERATIONS["cpu" if device == "cpu" else "cuda"], 1),
    )


def _kept(op: Fuse, folder: models.Folder, target: models.Folder, rows: Sequence[int]) -> int:
    """About the bytes that the cache keeps of one source: what it says, and of a language model its tokens and how they are paired."""
    if op.task == "classification":
        return 4 * len(rows) * folder.n_labels
    tokens, stretches = _tokens(op, folder, rows), op.loss.kind == "alm"
    top_k = 0 if stretches else op.capture.top_k
    said = capturing.disk_bytes(tokens, top_k, folder.number("vocab_size"), op.capture.dtype)
    return said + (0 if stretches else 8 * _tokens(op, target, rows))


def _logits(op: Fuse, target: models.Folder) -> int:
    """Bytes of the logits of what runs together, of their logarithms and of what goes back, in float32."""
    tokens = op.train.micro_batch_tokens if op.task == "causal_lm" else 0
    return 3 * 4 * tokens * target.number("vocab_size")


def _tokens(op: Fuse, folder: models.Folder, rows: Sequence[int]) -> int:
    """About how many tokens a model reads of the data: of images patches, of numbers rows."""
    if folder.task == "images":
        size, patch = folder.image_size, folder.config.get("patch_size")
        each = (size // patch) ** 2 if isinstance(size, int) and isinstance(patch, int) and patch > 0 else 1
        return len(rows) * each
    if folder.task == "features":
        return len(rows)
    characters = max(1.0, CHARACTERS_A_BIT * math.log2(max(folder.number("vocab_size"), 2)))
    tokens = [int(size / characters) + 2 for size in rows]
    if op.task == "causal_lm":  # longer ones are cut in several
        return sum(tokens)
    longest = folder.longest(op.max_length, data.NO_CONTEXT)
    return sum(min(size, longest) for size in tokens)

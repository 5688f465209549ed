"""Documents of tokens -> rows that run together: several in one row, without attention from one to another, or one a row.

Rows are dealt once, from a seed, and stay the same over the epochs, so that a choice may be made for a whole row. In a packed row
positions start anew with each document, and a mask of four axes says who attends to whom; `check` runs two documents both ways
before a model is trained so, since not every class heeds the mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeflow.errors import RecipeError
from mergeflow.stages.fuse.training import order

if TYPE_CHECKING:
    from torch import Tensor, nn

IGNORED = -100
"""The label of a position that predicts nothing."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of documents, (rows, tokens), with the keyword arguments of the model.

    `labels` are the next tokens, -100 where a document ends or nothing stands. `places` says of each document in it where its first
    token lies in the flat rows.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    documents: tuple[int, ...]
    places: tuple[int, ...]

    @property
    def predicted(self) -> int:
        """How many next tokens it has."""
        return int((self.labels != IGNORED).sum())


def rows_of(lengths: Sequence[int], longest: int, seed: int, *, pack: bool) -> list[tuple[int, ...]]:
    """The documents of each row, in an order that the seed decides: as many as fit one after the other, or one."""
    rows: list[list[int]] = []
    filled = longest
    for document in order(len(lengths), seed, -2):
        if not pack or filled + lengths[document] > longest:
            rows.append([])
            filled = 0
        rows[-1].append(document)
        filled += lengths[document]
    return [tuple(row) for row in rows]


def grouped(rows: Sequence[tuple[int, ...]], lengths: Sequence[int], most: int) -> list[tuple[tuple[int, ...], ...]]:
    """Neighbouring rows that run together: at most `most` tokens when padded, but at least one row."""
    groups: list[list[tuple[int, ...]]] = []
    widest = 0
    for row in rows:
        length = sum(lengths[document] for document in row)
        if not groups or max(widest, length) * (len(groups[-1]) + 1) > most:
            groups.append([])
            widest = 0
        groups[-1].append(row)
        widest = max(widest, length)
    return [tuple(group) for group in groups]


def batch(
    documents: Sequence[Tensor], group: Sequence[Sequence[int]], model: nn.Module, *, pad: int, pack: bool, device: str
) -> Batch:
    """The tensors of some rows: of token ids (a tensor each document), `pad` where nothing stands."""
    import torch

    length = max(sum(len(documents[document]) for document in row) for row in group)
    ids = torch.full((len(group), length), pad, dtype=torch.long)
    labels = torch.full((len(group), length), IGNORED, dtype=torch.long)
    positions = torch.zeros((len(group), length), dtype=torch.long)
    owners = torch.full((len(group), length), -1, dtype=torch.long)
    places = []
    for at, row in enumerate(group):
        start = 0
        for number, document in enumerate(row):
            own = documents[document]
            stop = start + len(own)
            ids[at, start:stop] = own
            labels[at, start : stop - 1] = own[1:]
            positions[at, start:stop] = torch.arange(len(own))
            owners[at, start:stop] = number
            places.append(at * length + start)
            start = stop
    inputs: dict[str, Tensor] = {"input_ids": ids}
    if pack:
        inputs |= {"position_ids": positions, "attention_mask": _mask(owners, model)}
    elif len(group) > 1:
        inputs["attention_mask"] = (owners >= 0).long()
    on = {name: value.to(device) for name, value in inputs.items()}
    return Batch(on, labels.to(device), tuple(document for row in group for document in row), tuple(places))


def _mask(owners: Tensor, model: nn.Module) -> Tensor:
    """(rows, 1, tokens, tokens): a token sees itself and those before it in its document; what pads sees itself."""
    import torch

    same = owners[:, :, None] == owners[:, None, :]
    seen = (same & torch.ones_like(same[0]).tril())[:, None]
    if getattr(getattr(model, "config", None), "_attn_implementation", "") == "sdpa":
        return seen
    dtype = next(model.parameters()).dtype
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def check(model: nn.Module, documents: Sequence[Tensor], *, pad: int, device: str) -> None:
    """Raises RecipeError where a packed row gives a document other logits than it has alone."""
    import torch

    chosen = [document for document in documents if len(document) > 1][:2]
    if len(chosen) < 2:
        return
    fix = "Write `pack: false`."
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise RecipeError("the target's class takes no positions, so documents cannot be packed", fix=fix)
    chosen = [one[:64] for one in chosen]
    together = batch(chosen, [(0, 1)], model, pad=pad, pack=True, device=device)
    packed = logits(model, together)[0]
    alone = torch.cat(
        [logits(model, batch(chosen, [(n,)], model, pad=pad, pack=False, device=device))[0] for n in (0, 1)]
    )
    apart = float((packed - alone).abs().max() / alone.abs().max().clamp(min=1e-6))
    if not apart < 1e-3:
        raise RecipeError("the target's class attends from one packed document to another", fix=fix)


def logits(model: nn.Module, given: Batch) -> Tensor:
    """(rows, tokens, vocabulary)."""
    output: Any = model(**given.inputs, use_cache=False)
    found: Tensor = output.logits
    return found

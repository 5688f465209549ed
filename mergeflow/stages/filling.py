"""A model on the meta device whose parameters come and go: read from the checkpoint's files when they are needed, and dropped.

What runs models that are larger than memory stands on this. Weights are read by plain reads and not through a map, whose pages
could be dropped and read again.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mergeflow.errors import MachineError
from mergeflow.stages import models, naming

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_libc = ctypes.CDLL(None)


def give_back() -> None:
    """Give freed memory back to the system: malloc keeps it otherwise, and the next block's tensors may not fit its holes."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


@dataclass
class Filling:
    """A model on the meta device, what its checkpoint's tensors are in it, and where it runs."""

    model: nn.Module
    folder: models.Folder
    names: naming.Names
    device: str
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        self.dtype = models.compute_dtype(self.folder)

    def fill(self, names: Sequence[str]) -> None:
        """Read these parameters. Raises MachineError for one whose tensors are changed on the way."""
        from torch import nn

        for name in names:
            owner, _, last = name.rpartition(".")
            module = self.model.get_submodule(owner)
            before = module._parameters[last]
            assert before is not None
            made = self._read(before, self._pieces(name))
            self._put(before, nn.Parameter(made.to(self.device), requires_grad=False))

    def fill_buffers(self) -> None:
        """Read the buffers that the checkpoint has; the others are as they were made."""
        for name, buffer in self.model.named_buffers():
            pieces = self.names.pieces.get(name)
            if pieces:
                buffer.copy_(self._read(buffer, pieces))

    def _pieces(self, name: str) -> Sequence[naming.Piece]:
        pieces = self.names.pieces.get(name)
        if not pieces:
            raise MachineError(
                f"the model is larger than half the memory, and its parameter {name} cannot be read alone",
                where=str(self.folder.path),
                fix="Give it more --memory, so that all of the model is loaded.",
            )
        return pieces

    def _read(self, parameter: Tensor, pieces: Sequence[naming.Piece]) -> Tensor:
        """A parameter's values, each tensor in its place."""
        import torch

        checkpoint = self.folder.checkpoint
        (first, *others) = pieces
        if not others and first.expert is None and checkpoint.tensors[first.tensor].shape == parameter.shape:
            return naming.read_tensor(checkpoint, first.tensor).to(parameter.dtype)
        made = torch.empty(parameter.shape, dtype=parameter.dtype)
        for piece in pieces:
            inside = made if piece.expert is None else made[piece.expert]
            inside[piece.at : piece.at + piece.rows] = naming.read_rows(
                checkpoint, piece.tensor, piece.start, piece.start + piece.rows
            )
        return made

    def empty(self, names: Sequence[str]) -> None:
        """Drop these parameters again."""
        import torch
        from torch import nn

        for name in names:
            owner, _, last = name.rpartition(".")
            before = self.model.get_submodule(owner)._parameters[last]
            assert before is not None
            self._put(before, nn.Parameter(torch.empty_like(before, device="meta"), requires_grad=False))
        give_back()

    def _put(self, before: nn.Parameter, after: nn.Parameter) -> None:
        """One parameter in place of another, in every module that has it, so that tied ones stay tied."""
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is before:
                    module._parameters[name] = after

"""The shared parts of ops that decompose matrices: singular value decompositions, polar factors, and what all such ops guard against.

Everything is computed in float64. The orthogonal factor of a matrix is as uncertain as its rounding times its largest over
its smallest singular value, which for a square matrix grows with its size: in float32 nothing would be left of it at the
sizes of models, and float64 costs half as much again.

A direction whose singular value is no more than the rounding of what was decomposed is noise: its vectors are whatever the
solver came by. Published code keeps them, so that what it gives for deltas of low rank is a matter of the solver's
version; here they are left out (`Svd`), and a polar factor is the partial isometry, which is the one that depends on the
matrix alone. For matrices of full rank both are the same.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from mergeflow.ops.base import Block, Cut, DeltaOp

if TYPE_CHECKING:
    from torch import Tensor


class Svd(NamedTuple):
    """u diag(s) vh: (m, r), (r,) and (r, n) in float64, the largest first, without directions that are only rounding."""

    u: Tensor
    s: Tensor
    vh: Tensor

    def first(self, rank: int) -> Svd:
        """The `rank` largest directions: copies, which do not hold on to the others."""
        if rank >= len(self.s):
            return self
        return Svd(self.u[:, :rank].clone(), self.s[:rank].clone(), self.vh[:rank].clone())

    def matrix(self) -> Tensor:
        """The product."""
        return (self.u * self.s) @ self.vh


@dataclass(frozen=True, slots=True)
class Deltas:
    """w_i tau_i in float64, each made when it is asked for, so that one more matrix is held and not all of them."""

    tensors: Sequence[Tensor]
    weights: Sequence[float]

    def __len__(self) -> int:
        return len(self.tensors)

    def __iter__(self) -> Iterator[Tensor]:
        for tensor, weight in zip(self.tensors, self.weights, strict=True):
            wide = tensor.double()
            yield wide if weight == 1 else wide * weight

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.tensors[0].shape
        return rows, columns

    @property
    def rank(self) -> int:
        """The number of singular values: the shorter side."""
        return min(self.shape)

    @property
    def rounding(self) -> float:
        """The relative rounding of the deltas: that of the dtype in which they were subtracted."""
        import torch

        return torch.finfo(self.tensors[0].dtype).eps

    def total(self) -> Tensor:
        """sum_i w_i tau_i, in order, as a new tensor."""
        import torch

        total = torch.zeros_like(self.tensors[0], dtype=torch.float64)
        for delta in self:
            total.add_(delta)
        return total


class SpectralOp(DeltaOp):
    """An op on whole matrices of deltas, through `merged`, which sees only finite matrices that are not all zero."""

    cut: ClassVar[Cut] = "tensor"
    matrices_only: ClassVar[bool] = True
    portable: ClassVar[bool] = False

    @abstractmethod
    def merged(self, deltas: Sequence[Tensor]) -> Tensor:
        """The merged delta of these matrices, in float64, scaled."""

    def combine(self, deltas: Sequence[Tensor], block: Block) -> Tensor:
        """The merged delta; zero where all deltas are, and NaN where one holds a NaN or an Inf, which no solver takes."""
        import torch

        first = deltas[0]
        if not all(bool(delta.isfinite().all()) for delta in deltas):
            return torch.full_like(first, torch.nan)
        if not any(bool(delta.any()) for delta in deltas):
            return torch.full_like(first, -0.0)  # which leaves even a -0 of the base as it is
        return self.merged(deltas).to(first.dtype)


def thin_svd(matrix: Tensor, rounding: float, floor: float = 0.0) -> Svd:
    """The decomposition of a finite matrix, without singular values up to max(rounding s_1, floor).

    Raises torch.linalg.LinAlgError where no way of computing it converges.
    """
    import torch

    wide = matrix.double()
    try:
        u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # public, but not in torch's own list
        u, s, vh = preconditioned_svd(wide)
    if s.numel():
        least = max(rounding, torch.finfo(torch.float64).eps * max(wide.shape)) * float(s[0])
        kept = int((s > max(least, floor)).sum())
        u, s, vh = u[:, :kept], s[:kept], vh[:kept]
    return Svd(u, s, vh)


def preconditioned_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The decomposition for the rare matrix at which divide and conquer does not converge.

    The shorter side is turned by the eigenvectors of its Gram matrix, which another algorithm finds. What is left is
    orthogonal but for rounding, its triangular factor nearly diagonal, and of that the decomposition is easy. Turning changes
    no singular value, so nothing of the accuracy is lost.
    """
    import torch

    if matrix.shape[0] < matrix.shape[1]:
        u, s, vh = preconditioned_svd(matrix.mT)
        return vh.mT, s, u.mT
    turn = torch.linalg.eigh(matrix.mT @ matrix)[1].flip(1)
    q, r = torch.linalg.qr(matrix @ turn)
    u, s, vh = torch.linalg.svd(r, full_matrices=False)
    return q @ u, s, vh @ turn.mT


def polar(matrix: Tensor, rounding: float) -> Tensor:
    """The nearest matrix with orthonormal columns or rows, U V^T of its decomposition: a partial isometry of the same rank."""
    found = thin_svd(matrix, rounding)
    return found.u @ found.vh


def ranks_of(share: float, rank: int) -> int:
    """How many of `rank` directions a share is: rounded down, at least one, at most all."""
    return min(rank, max(1, int(share * rank)))

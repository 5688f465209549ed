"""`regmean`: the weights whose outputs are nearest to every model's own, on the inputs that model has seen.

The data is not needed: what a linear layer's outputs depend on is the Gram matrix of its inputs (mergeflow.checkpoint.statistics).
`RegMean` is what recipes say, `Solve` what planning puts in its place at one weight: it reads Grams by rows, once for each piece of
the outputs, and holds two square matrices however many models there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn

from pydantic import Field

from mergeflow.errors import NumericError
from mergeflow.ops.base import Block, ByRows, Op, number
from mergeflow.ops.deltas import refuse_zero_sum
from mergeflow.settings import NonNegative, Number, PerInput, Setting, Unit, setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Solver = Literal["cholesky", "cg", "lstsq"]

LARGEST_CONDITION = 1e12
"""A sum of Grams with a greater condition estimate is not solved: float64 would leave four digits at best."""
_ENTRIES = 1 << 20
"""Entries of a Gram that are read at once."""
_OUTPUTS = 1 << 20
"""Entries of a weight that are solved at once, at least."""
_STEPS = 5
"""Steps of the condition estimate, which mostly stands after two."""
_TOLERANCE = 1e-11
"""The residual of conjugate gradients, over that of no correction."""
ROUNDING = {"correlation16": 2.0**-11, "correlation8": 0.5 / 127}
"""How far off a stored correlation is at most; otherwise that of float32."""


class RegMean(Op):
    """Solve each linear weight so that its outputs are nearest to every model's own on that model's inputs (RegMean).

    W = W_ref + [(sum_i c_i G~_i)^-1 sum_i c_i G~_i (W_i - W_ref)^T]^T with G~ = alpha G + (1 - alpha) diag(G), where G_i is the
    Gram matrix (mean of x x^T over tokens) of the inputs that model i has at this weight: `gram:` of an input names a folder or
    node of such statistics. Weights (out, in) in any float dtype, stored (in, out) by Conv1D; Grams (in, in); solved in
    `solve_dtype`. With a base, W becomes W_base + s (W - W_base). Tensors for which some input has no Gram take `others`, by default
    the mean with the same weights.

    This is the published closed form wherever that is well posed; where the data says nothing, as for an input channel that is
    always 0, it keeps W_ref, where the published form deletes the weight or fails. The sum is scaled by the roots of its diagonal
    before it is factorised. Each weight is solved alone, also where several read one input: a factorisation is d^3/3 of the
    some 6 d^3 multiplications that a square weight of two models takes, and to keep it would cost a matrix for each input.

    Raises NumericError where the sum cannot be solved, or its condition is estimated at more than 1e12: with fewer tokens than
    dimensions that is so at alpha 1.
    """

    name = "regmean"
    formula = "theta_ref + [(sum_i c_i G~_i)^-1 sum_i c_i G~_i (theta_i - theta_ref)^T]^T"
    paper = "arXiv:2212.09849"
    may_base = True
    matrices_only = True
    portable = False
    input_keys: ClassVar[tuple[str, ...]] = ("gram",)

    weight: PerInput[NonNegative] = setting(1.0, "Share of this input.")
    alpha: Setting[Unit] = setting(0.9, "Multiplies what a Gram has off its diagonal; 0 is a mean by channels.")
    scale: Setting[Number] = setting(1.0, "Multiplies the step from the base, where there is one.")
    ridge: Setting[NonNegative] = setting(0.0, "Added to the sum's diagonal, in units of that diagonal's mean.")
    weigh_by: Literal["models", "tokens"] = Field(
        default="models", description="`tokens` multiplies each weight by how many tokens the Gram was collected over."
    )
    reference: str = Field(
        default="mean",
        min_length=1,
        description="What is corrected, and kept where the data says nothing: mean, base, or the model name of an input.",
    )
    solver: Solver = Field(
        default="cholesky",
        description="cholesky; cg, which never forms the sum; lstsq, the smallest correction where there are many.",
    )
    solve_dtype: Literal["float64", "float32"] = Field(default="float64", description="What is solved in.")

    def check(self) -> None:
        """Raises RecipeError where all weights are 0."""
        refuse_zero_sum(tuple(self.weight))  # type: ignore[arg-type]

    def only_input(self, count: int) -> int | None:
        """One input is what it is nearest to."""
        return 0 if count == 1 and self.reference == "mean" else None

    def compute(self, inputs: Sequence[Tensor], block: Block) -> NoReturn:
        """Never asked for: planning puts `Solve` in its place."""
        raise TypeError(f"{self.name} needs a Gram for each input: use it in a recipe")

    def solve(
        self,
        weights: Sequence[float],
        *,
        based: bool,
        reference: int | None,
        transposed: bool,
        module: str = "",
        n_tokens: Sequence[int] = (),
        codecs: Sequence[str] = (),
    ) -> Solve:
        """The op at one weight, of a resolved one. `reference` is an input's index, -1 the base, None the mean."""
        return Solve.model_construct(
            weights=tuple(weights),
            alpha=number(self.alpha),
            scale=number(self.scale),
            ridge=number(self.ridge),
            solver=self.solver,
            solve_dtype=self.solve_dtype,
            based=based,
            reference=reference,
            transposed=transposed,
            module=module,
            n_tokens=tuple(n_tokens),
            codecs=tuple(dict.fromkeys(codecs)),
        )


Delta = Callable[[int], "Tensor"]
"""W_i - W_ref by the input's index, in some outputs: (outputs, inputs)."""

Asked = tuple[Delta, int]
"""The deltas of some outputs, and how many these are."""


class Solve(Op):
    """What planning puts at one weight; no recipe can name it. Inputs are W_1 .. W_K, the base if `based`, and G_1 .. G_K."""

    name = "regmean"
    formula = RegMean.formula
    paper = RegMean.paper
    cut = "tensor"
    lazy = True
    portable = False

    weights: tuple[float, ...]
    alpha: float = 0.9
    scale: float = 1.0
    ridge: float = 0.0
    solver: Solver = "cholesky"
    solve_dtype: Literal["float64", "float32"] = "float64"
    based: bool = False
    reference: int | None = None
    """The index of an input, -1 for the base, None for the mean."""
    transposed: bool = False
    """Whether weights are stored (in, out)."""
    module: str = ""
    n_tokens: tuple[int, ...] = ()
    codecs: tuple[str, ...] = ()

    def compute(self, inputs: Sequence[Tensor], block: Block) -> NoReturn:
        """Never asked for: it reads for itself."""
        raise TypeError("regmean reads its inputs by rows")

    def compute_lazily(self, inputs: Sequence[ByRows], block: Block) -> Tensor:
        """W_ref + [(sum_i c_i G~_i)^-1 sum_i c_i G~_i (W_i - W_ref)^T]^T"""
        import torch

        count = len(self.weights)
        models, base, grams = inputs[:count], inputs[count] if self.based else None, inputs[count + self.based :]
        outputs, d = self._sides(models[0].shape)
        first = models[0].rows(0, min(1, models[0].shape[0]))
        result = torch.empty(models[0].shape, dtype=first.dtype, device=first.device)
        if not result.numel():
            return result
        sums = Sums(grams, self.weights, self.alpha, self.ridge, torch_type(self.solve_dtype), first.device)
        solve: Callable[[Tensor], Tensor] | None = None
        for start, stop in _pieces(outputs, _step(outputs, d)):
            own = (
                self._rows(base, start, stop, sums.dtype)
                if base is not None and (self.scale != 1 or self.reference == -1)
                else None
            )
            reference = self._reference(models, own, start, stop, sums.dtype)
            asked = self._deltas(models, reference, start, stop), len(reference)
            if solve is None:  # of the first outputs the products are taken while the Grams are read for their sum
                solve, right = getattr(self, f"_{self.solver}")(sums, d, asked)
            else:
                right = sums.products(*asked)
            del reference, asked
            merged = solve(right)
            del right
            reference = self._reference(models, own, start, stop, sums.dtype)
            merged += reference
            if own is not None and self.scale != 1:
                merged = merged.sub_(own).mul_(self.scale).add_(own)
            if self.transposed:
                result[:, start:stop] = merged.mT
            else:
                result[start:stop] = merged
        return result

    def needed_bytes(self, shapes: Sequence[tuple[int, ...]]) -> int:
        """Two square matrices and what is solved next, or one and all that solving takes; the result; what is read at once."""
        outputs, d = self._sides(shapes[0])
        size = 8 if self.solve_dtype == "float64" else 4
        piece = _step(outputs, d) * d * size
        square = {"cholesky": 2, "lstsq": 4, "cg": 0}[self.solver] * d * d * size
        held = max(square + 2 * piece, square // 2 + 6 * piece) if self.solver != "cg" else 8 * piece
        read = min(max(_ENTRIES, d), d * d) * (size + 8)
        return held + read + 8 * outputs * d

    def _sides(self, shape: Sequence[int]) -> tuple[int, int]:
        """How many outputs and inputs a weight has."""
        rows, columns = shape
        return (columns, rows) if self.transposed else (rows, columns)

    # Weights, as (outputs, inputs) whatever they are stored as

    def _rows(self, weight: ByRows, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Outputs [start, stop) of a weight: a new tensor."""
        import torch

        if not self.transposed:
            return weight.rows(start, stop).to(dtype, copy=True)
        d, outputs = weight.shape
        first = weight.rows(0, 1)
        found = torch.empty(stop - start, d, dtype=dtype, device=first.device)
        for top, bottom in _pieces(d, max(_ENTRIES // outputs, 1)):
            found[:, top:bottom] = weight.rows(top, bottom)[:, start:stop].mT
        return found

    def _reference(
        self, models: Sequence[ByRows], base: Tensor | None, start: int, stop: int, dtype: torch.dtype
    ) -> Tensor:
        """Outputs [start, stop) of W_ref: a new tensor."""
        if self.reference == -1:
            assert base is not None
            return base.clone()
        if self.reference is not None:
            return self._rows(models[self.reference], start, stop, dtype)
        sound = [(one, weight) for one, weight in zip(models, self.weights, strict=True) if weight]
        total = self._rows(sound[0][0], start, stop, dtype)
        if len(sound) == 1:
            return total
        total *= sound[0][1]
        for one, weight in sound[1:]:
            total += self._rows(one, start, stop, dtype).mul_(weight)
        total /= sum(weight for _, weight in sound)
        return total

    def _deltas(self, models: Sequence[ByRows], reference: Tensor, start: int, stop: int) -> Delta:
        """W_i - W_ref by the input's index, in outputs [start, stop)."""
        return lambda index: self._rows(models[index], start, stop, reference.dtype).sub_(reference)

    # Solvers: from the sums to a function that solves X (sum) = right, of (outputs, inputs), and the right sides that are asked for

    def _cholesky(self, sums: Sums, d: int, asked: Asked) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        import torch

        matrix, root, _, given = sums.equilibrated(*asked)
        norm = float(torch.linalg.vector_norm(matrix, 1, dim=1).max()) if d else 0.0
        matrix = matrix.mT
        place = (matrix, torch.empty((), dtype=torch.int32)) if matrix.is_cpu else None  # by columns, as LAPACK has it
        factor, info = torch.linalg.cholesky_ex(matrix, out=place)
        del matrix, place
        if int(info):
            raise self._failure(float("inf"), d)

        def inverse(right: Tensor) -> Tensor:
            half: Tensor = torch.linalg.solve_triangular(factor.mT, right, upper=True, left=False)
            half = torch.linalg.solve_triangular(factor, half, upper=False, left=False)
            return half

        condition = norm * _inverse_norm(inverse, root)
        if not condition <= LARGEST_CONDITION:
            raise self._failure(condition, d)
        return (lambda right: inverse(right.div_(root)).div_(root)), given

    def _lstsq(self, sums: Sums, d: int, asked: Asked) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """The smallest correction: of what solves the scaled equations, the part that has none of what the data does not see."""
        import torch

        matrix, root, alive, given = sums.equilibrated(*asked)
        try:
            values, vectors = torch.linalg.eigh(matrix)
        except RuntimeError:  # NaN, or numbers beyond all scales
            raise self._failure(float("inf"), d) from None
        del matrix
        rounding = max((ROUNDING.get(codec, 2.0**-24) for codec in self.codecs), default=2.0**-24)
        kept = values > 4 * rounding * d**0.5 * float(values[-1])
        unseen = vectors[:, ~kept] / root[:, None]
        unseen = torch.linalg.qr(unseen).Q if unseen.shape[1] else unseen
        vectors, values = vectors[:, kept], values[kept]

        def solved(right: Tensor) -> Tensor:
            found: Tensor = ((right.div_(root) @ vectors).div_(values) @ vectors.mT).div_(root)
            return found.sub_((found @ unseen) @ unseen.mT).mul_(alive)

        return solved, given

    def _cg(self, sums: Sums, d: int, asked: Asked) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """Conjugate gradients on the scaled equations, one for each output; Grams are read again at every step."""
        import torch

        root = sums.root()

        def solved(right: Tensor) -> Tensor:
            rest = right.div_(root)
            found = torch.zeros_like(rest)
            way = rest.clone()
            square = rest.square().sum(1, keepdim=True)
            enough = square * _TOLERANCE**2
            for _ in range(max(1000, 4 * d)):
                if bool((square <= enough).all()):
                    return found.div_(root)
                along = sums.times(way / root).div_(root)
                slope = (way * along).sum(1, keepdim=True)
                if not bool(torch.isfinite(slope).all()) or bool((slope < 0).any()):
                    break
                step = torch.where(slope > 0, square / slope, 0.0)
                found += way * step
                rest -= along.mul_(step)
                before, square = square, rest.square().sum(1, keepdim=True)
                way = way.mul_(torch.where(before > 0, square / before, 0.0)).add_(rest)
            raise self._failure(None, d)

        return solved, sums.products(*asked)

    def _failure(self, condition: float | None, d: int) -> NumericError:
        """Why a sum of Grams cannot be solved, and what to write."""
        tokens = ", ".join(map(str, self.n_tokens)) or "unknown"
        lossy = [codec for codec in self.codecs if codec in ROUNDING]
        if condition is None:
            how = "conjugate gradients do not come to an end"
        elif condition == float("inf"):
            how = "the sum of the Grams is not positive definite"
        else:
            how = f"the condition of the sum of the Grams is about {condition:.1e}"
        if condition == float("inf") and lossy:
            how += f" as `{', '.join(lossy)}` stores them"
        fix = "Write a smaller `alpha` (0.9), a `ridge` (1e-3), or `solver: lstsq` for the smallest correction."
        if lossy and self.alpha > 0.9:
            fix = f"Write `alpha: 0.9`, a `ridge` (1e-3), or collect the Grams with `codec: packed32` in place of {lossy[0]}."
        return NumericError(
            f"regmean cannot be solved: {how} (dimension {d}, n_tokens {tokens}, alpha {self.alpha:g})",
            where=self.module,
            fix=fix,
        )


@dataclass(frozen=True, slots=True)
class Sums:
    """sum_i c_i G~_i + ridge, read by rows of the Grams each time that it is wanted."""

    grams: Sequence[ByRows]
    weights: Sequence[float]
    alpha: float
    ridge: float
    dtype: torch.dtype
    device: torch.device

    @property
    def d(self) -> int:
        return self.grams[0].shape[0]

    def _read(self, index: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Rows [start, stop) of a Gram, a new tensor, and the diagonal's part of them."""
        import torch

        for start, stop in _pieces(self.d, max(_ENTRIES // self.d, 1)):
            rows = self.grams[index].rows(start, stop).to(self.dtype, copy=True)
            place = torch.arange(stop - start, device=rows.device)
            yield start, stop, rows, rows[place, place + start]

    def _root(self, diagonal: Tensor) -> tuple[Tensor, Tensor]:
        """The root of the sum's diagonal with its ridge, 1 where that is 0, and where it is not."""
        import torch

        diagonal = diagonal + self.ridge * diagonal.mean()
        alive = diagonal > 0
        return torch.where(alive, diagonal, 1.0).sqrt(), alive

    def root(self) -> Tensor:
        """The root of the sum's diagonal, 1 where that is 0."""
        import torch

        diagonal = torch.zeros(self.d, dtype=self.dtype, device=self.device)
        for index, weight in enumerate(self.weights):
            for start, stop, _, part in self._read(index) if weight else ():
                diagonal[start:stop] += part * weight
        return self._root(diagonal)[0]

    def equilibrated(self, delta: Delta, outputs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The sum, its rows and columns divided by the root of its diagonal; that root; which channels are not dead; and what
        `products` gives, of the same reading.

        The sum's diagonal is 1, that of dead channels too.
        """
        import torch

        total = torch.zeros(self.d, self.d, dtype=self.dtype, device=self.device)
        right = torch.zeros(outputs, self.d, dtype=self.dtype, device=self.device)
        for index, weight in enumerate(self.weights):
            if not weight:
                continue
            own = delta(index)
            for start, stop, rows, diagonal in self._read(index):
                self._add_product(right, own, weight, start, stop, rows, diagonal)
                total[start:stop] += rows if weight == 1 else rows.mul_(weight)
        root, alive = self._root(total.diagonal())
        for start, stop in _pieces(self.d, max(_ENTRIES // self.d, 1)):
            total[start:stop] *= self.alpha / root[start:stop, None]
            total[start:stop] /= root
        total.diagonal().fill_(1)
        return total, root, alive, right

    def products(self, delta: Delta, outputs: int) -> Tensor:
        """sum_i (W_i - W_ref) c_i G~_i, of (outputs, inputs)."""
        import torch

        right = torch.zeros(outputs, self.d, dtype=self.dtype, device=self.device)
        for index, weight in enumerate(self.weights):
            if not weight:
                continue
            own = delta(index)
            for start, stop, rows, diagonal in self._read(index):
                self._add_product(right, own, weight, start, stop, rows, diagonal)
        return right

    def _add_product(
        self, right: Tensor, own: Tensor, weight: float, start: int, stop: int, rows: Tensor, diagonal: Tensor
    ) -> None:
        """Add own c_i G~_i in the columns [start, stop), whose rows of the Gram are given."""
        part = (own @ rows.mT).mul_(self.alpha * weight)
        part += own[:, start:stop] * (diagonal * ((1 - self.alpha) * weight))
        right[:, start:stop] += part

    def times(self, values: Tensor) -> Tensor:
        """values (sum_i c_i G~_i + ridge): a new tensor."""
        right = self.products(lambda index: values, len(values))
        if self.ridge:
            mean = 0.0
            for index, weight in enumerate(self.weights):
                for _, _, _, part in self._read(index) if weight else ():
                    mean += float(part.sum()) * weight / self.d
            right += values * (self.ridge * mean)
        return right


def torch_type(name: str) -> Any:
    """torch's dtype of this name."""
    import torch

    return getattr(torch, name)


def _step(outputs: int, d: int) -> int:
    """How many outputs are solved at once: six such pieces take no more than a square matrix, if that is large."""
    pieces = -(-outputs // max(d // 6, _OUTPUTS // max(d, 1), 1)) or 1
    return -(-outputs // pieces)


def _pieces(length: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, step):
        yield start, min(start + step, length)


def _inverse_norm(inverse: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """An estimate from below, mostly sharp, of the 1-norm of a symmetric inverse (Hager 1984, Higham 1988)."""
    import torch

    d = len(like)
    point = torch.full((1, d), 1 / d, dtype=like.dtype, device=like.device)
    norm = 0.0
    for step in range(_STEPS):
        found = inverse(point)
        size = float(found.abs().sum())
        if step and size <= norm:
            break
        norm = size
        slope = inverse(torch.where(found >= 0, 1.0, -1.0).to(like.dtype))
        best = int(slope.abs().argmax())
        if step and float(slope.abs().max()) <= float((slope * point).sum()):
            break
        point = torch.zeros_like(point)
        point[0, best] = 1
    # Vectors that Hager's steps do not see: signs that alternate and grow.
    place = torch.arange(d, dtype=like.dtype, device=like.device)
    wave = (1 + place / max(d - 1, 1)) * (1 - 2 * (place % 2))
    return max(norm, 2 * float(inverse(wave[None]).abs().sum()) / (3 * d))

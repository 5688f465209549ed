"""`aim`: the step from a base, shortened where the base's own activations are large."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from mergeflow.ops.base import Block, Op, Reduction, Space, number
from mergeflow.settings import Setting, Unit, setting

if TYPE_CHECKING:
    from torch import Tensor


class Aim(Op):
    """Keep a merged model near its base at the input channels that the base uses most (AIM).

    theta_0 + (1 - (1 - omega) s) (theta - theta_0), where s of an input channel is the mean of its absolute activation in the base,
    divided by the greatest of that weight's channels: `act_absmean:` of the input names a folder or node of such statistics of the
    base. Weights (out, in) in any float dtype, stored (in, out) by Conv1D; computed in float32 (float64 if any input is). The input
    is any merged or fine-tuned model. Tensors without statistics take `others`, by default the input's own.
    """

    name = "aim"
    formula = "theta_0 + (1 - (1 - omega) s) (theta - theta_0)"
    paper = "arXiv:2502.02421"
    most = 1
    needs_base = True
    matrices_only = True
    input_keys: ClassVar[tuple[str, ...]] = ("act_absmean",)
    keys_of_base: ClassVar[bool] = True

    omega: Setting[Unit] = setting(0.4, "How much of the step is left at the most used channel.")

    def space(self, base: Space | None, inputs: Sequence[Space]) -> Space:
        """A model, or a delta that is put onto the base."""
        super().space(base, ["weight"])
        return "weight"

    def compute(self, inputs: Sequence[Tensor], block: Block) -> NoReturn:
        """Never asked for: planning puts `AimStep` in its place."""
        raise TypeError("aim needs activations: use it in a recipe")

    def step(self) -> AimStep:
        """The op at a weight, of a resolved one."""
        return AimStep(omega=number(self.omega))


class AimStep(Op):
    """What planning puts at one weight; no recipe can name it. Inputs are theta_0, theta and the activations, of one shape."""

    name = "aim"
    formula = Aim.formula
    paper = Aim.paper

    omega: float

    def reduction(self, known: tuple[Any, ...]) -> Reduction | None:
        """One round: the greatest activation."""
        return None if known else _Greatest()

    def compute(self, inputs: Sequence[Tensor], block: Block) -> Tensor:
        """theta_0 + (1 - (1 - omega) s) (theta - theta_0)"""
        base, theta, activations = inputs
        greatest = block.measured[0]
        kept = activations.mul((self.omega - 1) / greatest if greatest > 0 else 0.0).add_(1)
        return kept.mul_(theta - base).add_(base)


@dataclass(frozen=True, slots=True)
class _Greatest(Reduction):
    """The greatest activation."""

    def block(self, inputs: Sequence[Tensor], block: Block) -> float:
        return float(inputs[2].amax()) if inputs[2].numel() else 0.0

    def merge(self, parts: Sequence[float]) -> float:
        return max(parts)

    def finish(self, total: float) -> float:
        return total

"""`select`: each tensor from one node, by rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from mergeflow.ops.base import Block, Op

if TYPE_CHECKING:
    from torch import Tensor


class Select(Op):
    """Take each tensor from one model or node, chosen by rules over the tensors' names.

    The first rule whose `match` fits the name gives the model; the last has no `match`. Nothing is computed: the
    tensor is the chosen one's, bit for bit, whatever its dtype, so `select` is also how integer tensors that differ
    are settled.
    """

    name = "select"
    formula = "theta_r(name)"
    takes = "rules"

    def compute(self, inputs: Sequence[Tensor], block: Block) -> NoReturn:
        """Never asked for: planning puts the chosen tensor in the place of the op."""
        raise TypeError("select chooses a tensor when it is planned and computes nothing")

"""`dare_linear` and `dare_ties`: drop entries of each delta by chance, make up for it, merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mergeflow.ops.base import Block, numbers
from mergeflow.ops.draws import below
from mergeflow.ops.sparsified import Kept, Masking, Voting

if TYPE_CHECKING:
    from torch import Tensor


class DareLinear(Masking):
    """Drop entries of each delta by chance, make up for the loss, and add the weighted sum.

    theta_0 + s sum_i w_i f_i b_i tau_i with tau_i = theta_i - theta_0 and b_i = 1 where u < density, else 0, so that each
    entry is kept with probability `density`. u is drawn for each entry of each input by a counter-based generator
    (Philox4x32-10): no cut, thread or other tensor changes it, and two tensors of one shape have two masks. f_i makes up for
    what was dropped: by default it restores the l1 norm of tau_i over the whole tensor; `rescale: probability` is the
    paper's 1 / density. Norms under 1e-7 are left alone, and a density of 1 draws nothing. With `normalize` the sum is
    divided by sum_i w_i; weights that sum to 0 are then refused when planning.

    Models and deltas of one shape, in any float dtype; computed in float32 (float64 if any input is).
    """

    name = "dare_linear"
    formula = "theta_0 + s sum_i w_i f_i b_i tau_i"
    paper = "arXiv:2311.03099"
    kept_by = Kept

    def masks(self, deltas: Sequence[Tensor], block: Block) -> list[tuple[Tensor, Any] | None]:
        """u < density"""
        drawn = zip(deltas, numbers(self.density), block.keys, strict=True)
        return [
            None if density == 1 else (below(key, block.start, delta, density), density)
            for delta, density, key in drawn
        ]


class DareTies(DareLinear, Voting):
    """Drop entries of each delta by chance, make up for the loss, and merge what agrees in sign.

    theta_0 + s sum_i m_i w_i f_i b_i tau_i: `dare_linear` with the vote of `ties`. The elected sign of an entry is that of
    sum_i w_i f_i b_i tau_i, 0 counting as +; m_i is 1 where w_i f_i b_i tau_i has the elected sign, so a dropped entry
    never votes. With `normalize` each entry is divided by sum_i m_i w_i; where that is 0 the delta is 0.

    Models and deltas of one shape, in any float dtype; computed in float32 (float64 if any input is).
    """

    name = "dare_ties"
    formula = "theta_0 + s sum_i m_i w_i f_i b_i tau_i"

"""What a student says against what it is taught: the losses that training minimises, by position.

A student is asked for its log-probabilities of the taught ids alone, picked from its own; a dense teacher is never built.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 1e-6
"""Below this a probability counts as this much, so that its logarithm is finite."""


def fuse_loss(
    student: Tensor,
    taught: Mapping[str, Tensor],
    *,
    kind: Literal["soft_ce", "kl"] = "soft_ce",
    tail: Literal["bucket", "renormalise"] = "bucket",
    teacher_temperature: float = 1.0,
) -> Tensor:
    """(n,) losses, 0 where nothing is taught. `student` (n, K): its log-probabilities of `taught["ids"]`; `taught` as
    `Targets.tensors` gives it.

    soft_ce: -sum_i p_i log q_i; kl: the same less the teacher's own entropy. The tail is one class more, -t log(1 - sum_i q_i), or the
    kept probabilities are renormalised. A teacher's temperature T raises them, and the tail, to 1/T, and they are made to sum to 1.
    """
    import torch

    kept = taught["kept"]
    probs = torch.where(kept, taught["probs"], 0).to(student.dtype)
    rest = taught["tail"].to(student.dtype)
    if tail == "renormalise":
        rest = torch.zeros_like(rest)
    if teacher_temperature != 1:
        probs, rest = (torch.where(one > 0, one ** (1 / teacher_temperature), 0) for one in (probs, rest))
    if tail == "renormalise" or teacher_temperature != 1:
        total = (probs.sum(1) + rest).clamp_min(LEAST)
        probs, rest = probs / total[:, None], rest / total
    picked = torch.where(kept, student, 0)
    loss = -(probs * picked).sum(1)
    if tail == "bucket":
        outside = 1 - torch.where(kept, student.exp(), 0).sum(1)
        loss = loss - rest * outside.clamp_min(LEAST).log()
    if kind == "kl":
        loss = loss + torch.xlogy(probs, probs).sum(1) + torch.xlogy(rest, rest)
    return torch.where(taught["valid"], loss, 0)


def alm_loss(student: Tensor, index: Tensor, said: Tensor, tau: float = 100.0) -> Tensor:
    """(stretches,) losses between the probabilities of stretches of text (arXiv:2503.20083, binarised, f the tau-th root).

    `student` (n,): its log-probabilities of the tokens that follow; `index` (n,) and `said` (stretches,) as `Chunks` gives them.
    a = P_teacher^(1/tau), b = P_student^(1/tau); tau (-a log b - (1 - a) log(1 - b)).
    """
    import torch

    inside = index >= 0
    spelled = torch.zeros(len(said), dtype=student.dtype, device=student.device)
    spelled = spelled.index_add(0, index[inside], student[inside]) / tau
    wanted = said.to(student.dtype) / tau
    other = (-torch.expm1(spelled)).clamp_min(LEAST).log()
    return -tau * (wanted.exp() * spelled - torch.expm1(wanted) * other)

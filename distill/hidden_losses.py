"""Losses on hidden states, on mixer outputs, between layers, and on preferences.

Each is a sum over valid positions divided by the *global* number of valid tokens (preferences: of pairs), zero when
there is none, and has gradients of exactly zero at positions that are not valid. Arithmetic in float32 (float64 for
float64). `valid` (n) int64 are the places of the valid positions when all are laid flat: a mask would have the host
wait for the device to count them. The losses over the vocabulary are in `losses.py`.
Twin: tests/distill/test_hidden_losses.py.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F

Count = float | torch.Tensor


def _wide(x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The valid rows (n, D) in the computing dtype; the others get no gradient, whatever they hold."""
    return x.flatten(0, -2)[valid].to(torch.promote_types(x.dtype, torch.float32))


def _mean(values: torch.Tensor, count: Count) -> torch.Tensor:
    if isinstance(count, torch.Tensor):
        return values.sum() / count.to(values.device).clamp(min=1)
    return values.sum() / max(count, 1)


def mse(student: torch.Tensor, teacher: torch.Tensor, valid: torch.Tensor, num_valid: Count) -> torch.Tensor:
    """Mean over positions of the mean square over D. student, teacher (..., D), valid (n)."""
    return _mean((_wide(student, valid) - _wide(teacher.detach(), valid)).square().mean(-1), num_valid)


def l2(student: torch.Tensor, teacher: torch.Tensor, valid: torch.Tensor, num_valid: Count) -> torch.Tensor:
    """Mean over positions of |student - teacher| / sqrt(D): unlike mse, a few large tokens do not rule the sum.
    The gradient of a position without any error is zero."""
    difference = _wide(student, valid) - _wide(teacher.detach(), valid)
    return _mean(torch.linalg.vector_norm(difference, dim=-1), num_valid) / difference.shape[-1] ** 0.5


def cosine(student: torch.Tensor, teacher: torch.Tensor, valid: torch.Tensor, num_valid: Count) -> torch.Tensor:
    """Mean over positions of 1 - cos(student, teacher)."""
    if student.is_cuda and student.dtype != torch.float64:
        from .cosine_kernel import one_minus_cosine

        rows = one_minus_cosine(student.flatten(0, -2), teacher.flatten(0, -2), valid)
        return _mean(rows, num_valid)
    similarity = F.cosine_similarity(_wide(student, valid), _wide(teacher.detach(), valid), dim=-1)
    return _mean(1 - similarity, num_valid)


def layer_cosine(hidden_states: Sequence[torch.Tensor], valid: torch.Tensor, num_valid: Count) -> torch.Tensor:
    """Sum over layers l >= 1 of the mean over positions of 1 - cos(h_l, h_{l-1}), gradient through both.

    The regulariser of "Your Transformer is Secretly Linear" (arXiv 2405.12250): with a weight above zero it pulls the
    hidden states of consecutive layers together. hidden_states: (..., D) each, in the order of the layers.
    """
    wide = [_wide(hidden, valid) for hidden in hidden_states]
    layers = [_mean(1 - F.cosine_similarity(after, before, dim=-1), num_valid) for before, after in pairwise(wide)]
    return sum(layers, wide[0].new_zeros(()))


def dpo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float,
    num_pairs: Count,
) -> torch.Tensor:
    """Mean over pairs of -log sigmoid(beta ((chosen - rejected) - (reference_chosen - reference_rejected))).

    Each argument (pairs): the summed log-probability of a completion (arXiv 2305.18290, eq. 7).
    """
    margin = (chosen - rejected) - (reference_chosen - reference_rejected).detach()
    return _mean(-F.logsigmoid(beta * margin), num_pairs)

"""Losses over the vocabulary from hidden states and head weights, so that the logits of a batch never exist at once.

With p the teacher's and q the student's distribution at temperature T, per valid position (dz is by student logits):
  forward_kl  T^2 sum p (log p - log q)                 dz = T (q - p)
  reverse_kl  T^2 sum q (log q - log p)                 dz = T q (log q - log p - KL)
  jsd         T^2 (b KL(p|m) + (1-b) KL(q|m)), m = b p + (1-b) q
                                                        dz = T (1-b) q (log q - log m - KL(q|m))
  ce          -log q[target] at T = 1                   dz = q - onehot
All in log space in float32 (float64 for float64), divided by the *global* number of valid tokens, which the caller
passes. Losses of hidden states and of preferences are in `hidden_losses.py`. Twin: tests/distill/test_losses.py.
Legend: N positions, D width, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from .packing import IGNORED

VOCABULARY_LOSSES = ("forward_kl", "reverse_kl", "jsd", "ce")
CHUNK_BYTES = 256 * 2**20  # of one float32 tensor of logits; a chunk holds about four
WEIGHT_ROWS = 8192  # vocabulary rows of a weight gradient that are added at once where it is wider than the product


@dataclass(frozen=True)
class Term:
    """One loss of the sum. `temperature` is of the divergences, `beta` (the teacher's share) of `jsd`."""

    name: str
    weight: float = 1.0
    temperature: float = 1.0
    beta: float = 0.5


def divergence(
    term: Term, student: torch.Tensor, teacher: torch.Tensor | None, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The value (n) of a term per row and its gradient (n, V) by the student's logits, both unweighted.

    student, teacher (n, V) logits in float32 or float64; targets (n) token ids, read by `ce` only. A teacher's logit
    of -inf is a token it excludes: forward_kl and jsd drive the student's mass there to zero, reverse_kl, which would
    be infinite, compares on the teacher's tokens alone.
    """
    if term.name == "ce":
        log_q = student.log_softmax(-1)
        index = targets[:, None]
        value = -log_q.gather(-1, index)[:, 0]
        gradient = log_q.exp_()
        return value, gradient.scatter_add_(-1, index, -torch.ones_like(index, dtype=gradient.dtype))
    T = term.temperature
    if term.name == "reverse_kl":
        student = student.masked_fill(teacher == -math.inf, -math.inf)
    log_q, log_p = (student / T).log_softmax(-1), (teacher / T).log_softmax(-1)
    if term.name == "forward_kl":
        p = log_p.exp()
        value = _mean_of(p, log_p - log_q)
        return T * T * value, T * (log_q.exp_() - p)
    q = log_q.exp()
    if term.name == "reverse_kl":
        ratio = log_q - log_p
        value = _mean_of(q, ratio)
        return T * T * value, T * _centred(q, ratio, value)
    b, gap = term.beta, log_p - log_q
    # log(m/q) = log1p(b expm1(gap)) is exactly zero where p = q; for gap > 0 the same seen from p cannot overflow.
    bend = torch.where(gap > 0, torch.log1p((1 - b) * torch.expm1(-gap)), torch.log1p(b * torch.expm1(gap)))
    ratio_p, ratio_q = gap.clamp(max=0) - bend, -gap.clamp(min=0) - bend
    value_q = _mean_of(q, ratio_q)
    value = b * _mean_of(log_p.exp(), ratio_p) + (1 - b) * value_q
    return T * T * value, T * (1 - b) * _centred(q, ratio_q, value_q)


def _mean_of(weight: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    """Sum of weight * ratio over the vocabulary, with 0 * inf = 0."""
    return (weight * ratio).masked_fill_(weight == 0, 0).sum(-1)


def _centred(weight: torch.Tensor, ratio: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    return (weight * (ratio - mean[:, None])).masked_fill_(weight == 0, 0)


def vocabulary_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    terms: Sequence[Term],
    num_valid: int | torch.Tensor,
    *,
    teacher_hidden: torch.Tensor | None = None,
    teacher_weight: torch.Tensor | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum of the terms over the valid positions, divided by `num_valid`, and each term's own value.

    hidden (..., D) after the last norm; weight (V, D) of the head; targets (...) the next token or IGNORED, shaped like
    hidden without D; the teacher's likewise, of any width, without gradient. num_valid: valid positions of the whole
    step, over micro-batches and processes; zero gives zero. vocab_size: rows beyond it are padding of the vocabulary
    and take no part. chunk_tokens: positions whose logits exist at once (by default what CHUNK_BYTES holds).

    The number of chunks depends on the shapes alone. Gradients reach `hidden` and `weight` (each only if it needs
    one); those of positions that are not valid are exactly zero. Raises ValueError for shapes that do not fit.
    """
    vocab_size = vocab_size or weight.shape[0]
    needs_teacher = any(term.name != "ce" for term in terms)
    if needs_teacher and (teacher_hidden is None or teacher_weight is None):
        raise ValueError("a divergence needs teacher_hidden and teacher_weight")
    if not needs_teacher:
        teacher_hidden = teacher_weight = None
    if hidden.shape[:-1] != targets.shape or (needs_teacher and teacher_hidden.shape[:-1] != targets.shape):
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and targets {tuple(targets.shape)} must be of the same positions"
        )
    if vocab_size > min(weight.shape[0], teacher_weight.shape[0] if needs_teacher else vocab_size):
        raise ValueError(f"vocab_size {vocab_size} is more than the rows of a head")
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if needs_teacher:
        teacher_hidden = teacher_hidden.reshape(-1, teacher_hidden.shape[-1]).detach()
        teacher_weight = teacher_weight.detach()
    num_chunks = num_chunks_for(len(targets), vocab_size, chunk_tokens)
    scale = 1.0 / torch.as_tensor(num_valid, dtype=torch.float64, device=hidden.device).clamp(min=1)
    loss, parts = _Chunked.apply(
        hidden, weight, teacher_hidden, teacher_weight, targets, tuple(terms), scale, vocab_size, num_chunks
    )
    return loss, dict(zip((term.name for term in terms), parts.unbind()))


def num_chunks_for(num_positions: int, vocab_size: int, chunk_tokens: int | None = None) -> int:
    """How many pieces the positions are cut into: a function of shapes alone, the same on every process."""
    chunk = chunk_tokens or max(1, CHUNK_BYTES // (4 * vocab_size))
    return max(1, -(-num_positions // chunk))


class _Chunked(torch.autograd.Function):
    """Gradients are made chunk by chunk in the forward pass, since the logits are there; backward multiplies them."""

    @staticmethod
    def forward(ctx, hidden, weight, teacher_hidden, teacher_weight, targets, terms, scale, vocab_size, num_chunks):
        compute = torch.promote_types(hidden.dtype, torch.float32)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        head = weight[:vocab_size]
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=compute, device=weight.device) if needs_weight else None
        parts = torch.zeros(len(terms), dtype=torch.float64, device=hidden.device)
        # Work goes by valid positions; their share of each chunk varies, the number of chunks does not.
        valid = (targets != IGNORED).nonzero()[:, 0]
        for rows in valid.tensor_split(num_chunks):
            if not len(rows):
                continue
            h = hidden[rows]
            student = (h @ head.T).to(compute)
            teacher = None
            if teacher_hidden is not None:
                teacher = (teacher_hidden[rows] @ teacher_weight[:vocab_size].T).to(compute)
            total = None
            for index, term in enumerate(terms):
                value, gradient = divergence(term, student, teacher, targets[rows])
                parts[index] += value.sum(dtype=torch.float64)
                if needs_hidden or needs_weight:
                    gradient = gradient.mul_(term.weight)
                    total = gradient if total is None else total.add_(gradient)
                del gradient
            del student, teacher
            if total is None:
                continue
            total = total.mul_(scale.to(compute)).to(hidden.dtype)
            if needs_hidden:
                grad_hidden[rows] = total @ head
            if needs_weight:
                _add_product(grad_weight[:vocab_size], total, h)
        parts *= scale
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(parts)
        weights = torch.tensor([term.weight for term in terms], dtype=torch.float64, device=parts.device)
        return (parts * weights).sum().to(compute), parts

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight * grad_loss.to(grad_weight.dtype)
        return grad_hidden, grad_weight, *[None] * 7


def _add_product(total: torch.Tensor, gradient: torch.Tensor, hidden: torch.Tensor) -> None:
    """total (V, D) += gradient^T (V, n) @ hidden (n, D); in pieces where total is wider, to spare a second (V, D)."""
    if total.dtype == gradient.dtype:
        total.addmm_(gradient.T, hidden)
        return
    for start in range(0, len(total), WEIGHT_ROWS):
        part = slice(start, start + WEIGHT_ROWS)
        total[part] += gradient[:, part].T @ hidden


def token_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, chunk_tokens: int | None = None
) -> torch.Tensor:
    """log q[target] per position, float32, zero where the target is IGNORED; differentiable, logits recomputed.

    hidden (..., D), weight (V, D), targets (...). For losses that need log-probabilities of sequences (DPO).
    """
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    pieces = num_chunks_for(len(wanted), weight.shape[0], chunk_tokens)
    values = [
        torch.utils.checkpoint.checkpoint(_logprobs, h, weight, t, use_reentrant=False)
        for h, t in zip(flat.tensor_split(pieces), wanted.tensor_split(pieces))
    ]
    return torch.cat(values).reshape(targets.shape)


def _logprobs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    valid = targets != IGNORED
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    chosen = logits.gather(-1, targets.masked_fill(~valid, 0)[:, None])[:, 0]
    return torch.where(valid, chosen - logits.logsumexp(-1), 0.0)

"""Losses over the vocabulary from hidden states and head weights, so that the logits of a batch never exist at once.

With p the teacher's and q the student's distribution at temperature T, per valid position (dz is by student logits):
  forward_kl  T^2 sum p (log p - log q)                 dz = T (q - p)
  reverse_kl  T^2 sum q (log q - log p)                 dz = T q (log q - log p - KL)
  jsd         T^2 (b KL(p|m) + (1-b) KL(q|m)), m = b p + (1-b) q
                                                        dz = T (1-b) q (log q - log m - KL(q|m))
  ce          -log q[target] at T = 1                   dz = q - onehot
All in log space in float32 (float64 for float64), and divided by the *global* number of valid tokens, which the caller
passes. Where only the teacher's k likeliest tokens P are known (`TopK`), all others are one event r, "none of these":
  forward_kl  sum_P p (log p - log q) + p_r (log p_r - log q_r)    dz = q - p in P, q (1 - p_r / q_r) elsewhere
at T = 1 alone. Merging events loses what they tell apart, so this is never above the full KL (data-processing
inequality), and equals it where teacher and student agree on the ratios outside of P.
Losses of hidden states and of preferences are in `hidden_losses.py`. Twin: tests/distill/test_losses.py.
Legend: N positions, D width, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .packing import IGNORED

VOCABULARY_LOSSES = ("forward_kl", "reverse_kl", "jsd", "ce")
CHUNK_BYTES = 640 * 2**20  # of all that stands of a chunk's logits at once
FLOATS = 12  # bytes of a logit that PyTorch's forms take beside both models' own: three float32; the fused kernel none


@dataclass(frozen=True)
class Term:
    """One loss of the sum. `temperature` is of the divergences, `beta` (the teacher's share) of `jsd`."""

    name: str
    weight: float = 1.0
    temperature: float = 1.0
    beta: float = 0.5


@dataclass(frozen=True)
class TopK:
    """What a teacher says of n next tokens, as far as it was kept: ids (n, k) int64, all different in a row; log_p
    (n, k) their log-probabilities; log_rest (n) that of all other tokens together, -inf where there is no other."""

    ids: torch.Tensor
    log_p: torch.Tensor
    log_rest: torch.Tensor

    def split(self, count: int) -> list["TopK"]:
        """In `count` pieces, cut as `Tensor.tensor_split` does."""
        pieces = (tensor.tensor_split(count) for tensor in (self.ids, self.log_p, self.log_rest))
        return [TopK(*piece) for piece in zip(*pieces)]


def normalised(kept: TopK) -> TopK:
    """The same with probabilities that sum to 1, which rounding to float16 for the disk has moved a little."""
    total = torch.cat([kept.log_p, kept.log_rest[:, None]], -1).logsumexp(-1)
    return TopK(kept.ids, kept.log_p - total[:, None], kept.log_rest - total)


def top_k_divergence(student: torch.Tensor, teacher: TopK) -> tuple[torch.Tensor, torch.Tensor]:
    """The forward KL over the teacher's tokens and the rest (n), and its gradient (n, V) by the student's logits, at
    least float32. student (n, V) logits, left as they are."""
    log_q = _log_softmax(student, 1.0)
    log_p, log_rest = teacher.log_p.to(log_q.dtype), teacher.log_rest.to(log_q.dtype)
    value = _finite(log_p - log_q.gather(-1, teacher.ids), p := log_p.exp()).mul_(p).sum(-1)
    others = log_q.scatter(-1, teacher.ids, -math.inf)
    log_others, rest = others.logsumexp(-1), log_rest.exp()
    value += _finite(log_rest - log_others, rest).mul_(rest)
    # q (1 - p_r / q_r) as q - softmax(others) p_r: both stay finite where q_r is nearly nothing.
    within = _finite(others.sub_(log_others[:, None]).exp_(), rest[:, None]).mul_(rest[:, None])
    return value, log_q.exp_().sub_(within).scatter_add_(-1, teacher.ids, -p)


def divergence(
    term: Term, student: torch.Tensor, teacher: torch.Tensor | None, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The value (n) of a term per row and its gradient (n, V) by the student's logits, both unweighted and at least
    float32. student, teacher (n, V) logits of any float dtype, left as they are; targets (n) ids, read by `ce` only.

    A teacher's logit of -inf is a token it excludes: forward_kl and jsd drive the student's mass there to zero,
    reverse_kl, which would be infinite, compares on the teacher's tokens alone.
    """
    if term.name == "ce":
        log_q = _log_softmax(student, 1.0)
        index = targets[:, None]
        value = -log_q.gather(-1, index)[:, 0]
        return value, log_q.exp_().scatter_add_(-1, index, log_q.new_full(index.shape, -1.0))
    T = term.temperature
    if term.name == "reverse_kl":
        student = student.masked_fill(teacher == -math.inf, -math.inf)
    log_q, log_p = _log_softmax(student, T), _log_softmax(teacher, T)
    if term.name == "forward_kl":
        p = log_p.exp()
        value = _finite(log_p.sub_(log_q), p).mul_(p).sum(-1)
        return T * T * value, log_q.exp_().sub_(p).mul_(T)
    q = log_q.exp()
    if term.name == "reverse_kl":
        ratio = _finite(log_q.sub_(log_p), q)
        value = (ratio * q).sum(-1)
        return T * T * value, ratio.sub_(value[:, None]).mul_(q).mul_(T)
    b, gap = term.beta, log_p - log_q
    # log(m/q) = log1p(b expm1(gap)) is exactly zero where p = q; for gap > 0 the same seen from p cannot overflow.
    bend = torch.where(gap > 0, torch.log1p((1 - b) * torch.expm1(-gap)), torch.log1p(b * torch.expm1(gap)))
    p = log_p.exp_()
    value_p = _finite(gap.clamp(max=0).sub_(bend), p).mul_(p).sum(-1)
    ratio = _finite(gap.clamp_(min=0).add_(bend).neg_(), q)
    value_q = (ratio * q).sum(-1)
    value = b * value_p + (1 - b) * value_q
    return T * T * value, ratio.sub_(value_q[:, None]).mul_(q).mul_(T * (1 - b))


def _log_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    scaled = logits if temperature == 1 else logits.to(wide) / temperature
    return scaled.log_softmax(-1, dtype=wide)


def _finite(ratio: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The log ratio, zero in place where its weight is zero, since there 0 * inf is meant to be 0."""
    return ratio.masked_fill_(weight == 0, 0)


def vocabulary_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    terms: Sequence[Term],
    num_valid: float | torch.Tensor,
    *,
    valid: torch.Tensor | None = None,
    teacher_hidden: torch.Tensor | None = None,
    teacher_weight: torch.Tensor | None = None,
    top_k: TopK | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum of the terms over the valid positions, divided by `num_valid`, and each term's own value.

    hidden (..., D) after the last norm; weight (V, D) of the head; targets (...) the next token or IGNORED, shaped like
    hidden without D; the teacher's likewise, of any width, without gradient, or instead `top_k`, a row for each valid
    position in their order, which serves `forward_kl` at T = 1 alone. num_valid: valid positions of the whole step,
    over micro-batches and processes; zero gives zero. valid (n) int64: where this call's are in `targets` laid flat,
    for a caller who knows; else the device is asked, which waits for all it has to do. vocab_size: rows beyond it are
    padding of the vocabulary and take no part. chunk_tokens: positions whose logits exist at once (by default what
    CHUNK_BYTES holds).

    The number of chunks depends on the shapes alone. Gradients reach `hidden` and `weight` (each only if it needs
    one); those of positions that are not valid are exactly zero. Raises ValueError for shapes that do not fit.
    """
    vocab_size = vocab_size or weight.shape[0]
    if top_k is not None and any(term.name == "forward_kl" and term.temperature != 1 for term in terms):
        raise ValueError("top_k serves forward_kl at temperature 1")
    known = ("ce",) if top_k is None else ("ce", "forward_kl")
    needs_teacher = any(term.name not in known for term in terms)
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
    if torch.is_autocast_enabled(hidden.device.type):
        low = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(low), weight.to(low)
        if needs_teacher:
            teacher_hidden, teacher_weight = teacher_hidden.to(low), teacher_weight.to(low)
    fused = hidden.is_cuda and hidden.dtype != torch.float64 and [term.name for term in terms] == ["forward_kl"]
    fused = fused and top_k is None
    logit_bytes = 2 * hidden.element_size() + FLOATS * (not fused)
    num_chunks = num_chunks_for(len(targets), vocab_size, chunk_tokens, logit_bytes)
    if isinstance(num_valid, torch.Tensor):
        scale = 1.0 / num_valid.to(hidden.device, torch.float64).clamp(min=1)
    else:
        scale = torch.full((), 1.0 / max(num_valid, 1), dtype=torch.float64, device=hidden.device)
    if valid is None:
        valid = (targets != IGNORED).nonzero()[:, 0]
    loss, parts = _Chunked.apply(
        hidden,
        weight,
        teacher_hidden,
        teacher_weight,
        top_k,
        targets,
        valid,
        tuple(terms),
        scale,
        vocab_size,
        num_chunks,
        fused,
    )
    return loss, dict(zip((term.name for term in terms), parts.unbind()))


def num_chunks_for(
    num_positions: int, vocab_size: int, chunk_tokens: int | None = None, logit_bytes: int = 4 + FLOATS
) -> int:
    """How many pieces the positions are cut into: a function of shapes alone, the same on every process. logit_bytes:
    what stands at once for every pair of a position and a token; by default that of bfloat16 in PyTorch's forms."""
    chunk = chunk_tokens or max(1, CHUNK_BYTES // (logit_bytes * vocab_size))
    return max(1, -(-num_positions // chunk))


class _Chunked(torch.autograd.Function):
    """Gradients are made chunk by chunk in the forward pass, since the logits are there; backward multiplies them."""

    @staticmethod
    def forward(
        ctx, hidden, weight, teacher_hidden, teacher_weight, top_k, targets, valid, terms, scale, vocab_size,
        num_chunks, fused,
    ):  # fmt: skip
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        head = weight[:vocab_size]
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        parts = torch.zeros(len(terms), dtype=torch.float64, device=hidden.device)
        # Work goes by valid positions; their share of each chunk varies, the number of chunks does not.
        if fused:
            from .forward_kl_kernel import forward_kl_
        if top_k is not None and len(top_k.ids) != len(valid):
            raise ValueError(f"top_k has {len(top_k.ids)} rows for {len(valid)} valid positions")
        kept = [None] * num_chunks if top_k is None else top_k.split(num_chunks)
        for rows, likeliest in zip(valid.tensor_split(num_chunks), kept):
            if not len(rows):
                continue
            h = hidden[rows]
            student, teacher = h @ head.T, None
            if teacher_hidden is not None:
                teacher = teacher_hidden[rows] @ teacher_weight[:vocab_size].T
            if fused:
                value = forward_kl_(student, teacher, terms[0].temperature, scale * terms[0].weight)
                parts[0] += value.sum(dtype=torch.float64)
                total = student  # overwritten with their gradient
            else:
                total = None
                for index, term in enumerate(terms):
                    if likeliest is not None and term.name == "forward_kl":
                        value, gradient = top_k_divergence(student, likeliest)
                    else:
                        value, gradient = divergence(term, student, teacher, targets[rows])
                    parts[index] += value.sum(dtype=torch.float64)
                    if needs_hidden or needs_weight:
                        gradient = gradient.mul_(term.weight)
                        total = gradient if total is None else total.add_(gradient)
                    del gradient
                if total is not None:
                    total = total.mul_(scale).to(hidden.dtype)
            del student, teacher
            if total is None:
                continue
            if needs_hidden:
                grad_hidden[rows] = total @ head
            if needs_weight:
                # Summed in float32 within a chunk, rounded to the weight's dtype once a chunk: for bfloat16 a wider
                # sum would cost more memory than all else here.
                grad_weight[:vocab_size].addmm_(total.T, h)
        parts *= scale
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(parts)
        loss = sum(term.weight * part for term, part in zip(terms, parts))
        return loss.to(torch.promote_types(hidden.dtype, torch.float32)), parts

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight * grad_loss.to(grad_weight.dtype)
        return grad_hidden, grad_weight, *[None] * 10


def token_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, chunk_tokens: int | None = None
) -> torch.Tensor:
    """log q[target] per position, float32, zero where the target is IGNORED; differentiable, logits recomputed.

    hidden (..., D), weight (V, D), targets (...). For losses that need log-probabilities of sequences (DPO).
    """
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    pieces = num_chunks_for(len(wanted), weight.shape[0], chunk_tokens)
    values = [
        checkpoint(_logprobs, h, weight, t, use_reentrant=False)
        for h, t in zip(flat.tensor_split(pieces), wanted.tensor_split(pieces))
    ]
    return torch.cat(values).reshape(targets.shape)


def _logprobs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    valid = targets != IGNORED
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    chosen = logits.gather(-1, targets.masked_fill(~valid, 0)[:, None])[:, 0]
    return torch.where(valid, chosen - logits.logsumexp(-1), 0.0)

"""How strongly a state is written and how fast it forgets: half-life, write strength and their slopes, per state head.

A candidate is judged by how much of the teacher's attention context it explains, together with what is beside the
state and each with a free scale, in the metric of `statistics.py`. All heads try their candidates at once: first a
coarse grid of half-lives and strengths, then coordinate descent, which also moves the slopes along two directions of
the input that are read off the teacher's attention (`attention_targets`). Sums of squares on a few windows decide
everything.

Shapes: B windows, T tokens, HQ query heads, Hs state heads, d head size, D hidden size.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from deltanet.mixer import DeltaMixer

from .settings import Settings

HALF_LIFE, STRENGTH, STRENGTH_SLOPE, DECAY_SLOPE = range(4)
"""Columns of a candidate (Hs, 4): log2 of the half-life, logit of beta / beta_max, and the two slopes."""
LEAST_GAIN = 1e-5
DIRECTION_RIDGE = 0.1
CONSTANT_RIDGE = 0.01
NEAR, AHEAD = 4, 16
"""Attention to the NEAR last tokens, or to those of a local window, says nothing about memory; the decay's target looks
AHEAD tokens on."""


@dataclass
class Found:
    """What the search found for a layer, one entry per state head."""

    half_life: list[float]
    beta: list[float]
    strength_slope: list[float]
    decay_slope: list[float]
    explained: list[float]


@torch.no_grad()
def fit_strengths(
    mixer: DeltaMixer,
    x: torch.Tensor,
    rotation,
    context: torch.Tensor,
    metric: torch.Tensor,
    settings: Settings,
    attention_input: torch.Tensor | None = None,
    window: int | None = None,
    attention=None,
    attention_rotation=None,
) -> Found:
    """Sets b_proj and a_proj of `mixer` and says what it found.

    x (B, T, D) is the layer's input, context (B, T, HQ, d) what the teacher's attention made there, metric (HQ, d, d).
    attention_input (B, T, D) is the teacher's own input of the layer (x if None), window its sliding window.
    attention is the teacher's layer with its rotation; None: what the mixer projects is what it projected.
    """
    search = _Search(mixer, x, rotation, context, metric)
    directions = None
    if settings.importance or settings.decay_slope:
        teacher_x = x if attention_input is None else attention_input
        whose = (mixer, teacher_x, rotation) if attention is None else (attention, teacher_x, attention_rotation)
        targets = attention_targets(*whose, window, max(NEAR, mixer.config.local_window))
        directions = _directions(x, targets, search.num_states)
        search.along = [(x - directions.mean) @ weight.T for weight in directions.weights]
    gated = mixer.config.mixer == "gated_delta"
    for half_life in settings.half_lives if gated else (math.inf,):
        for beta in settings.betas:
            candidate = torch.zeros_like(search.best)
            candidate[:, HALF_LIFE] = math.log2(min(half_life, 1e9))
            candidate[:, STRENGTH] = math.log(beta / (1 - beta))
            search.attempt(candidate)
    moves = {STRENGTH: (-1.0, -0.5, 0.5, 1.0)}
    if gated:
        moves = {HALF_LIFE: (-1.0, -0.5, 0.5, 1.0)} | moves
    if gated and settings.decay_slope:
        moves = {DECAY_SLOPE: (0.25, 0.5, 1.0, -0.25, -0.5)} | moves
    if settings.importance:
        moves = {STRENGTH_SLOPE: (0.25, 0.5, 1.0, -0.25, -0.5)} | moves
    for sweep in range(settings.sweeps):
        for column, steps in moves.items():
            start = search.best.clone()
            for step in steps:
                candidate = start.clone()
                candidate[:, column] += step * 0.5 ** max(sweep - 1, 0)
                search.attempt(candidate)
    _set_parameters(mixer, search.best, directions, x)
    best = search.best.cpu()
    return Found(
        half_life=(2.0 ** best[:, HALF_LIFE]).tolist() if gated else [math.inf] * len(best),
        beta=(mixer.config.beta_max * torch.sigmoid(best[:, STRENGTH])).tolist(),
        strength_slope=best[:, STRENGTH_SLOPE].tolist(),
        decay_slope=best[:, DECAY_SLOPE].tolist(),
        explained=search.score.tolist(),
    )


class _Search:
    def __init__(self, mixer: DeltaMixer, x, rotation, context, metric):
        config = mixer.config
        self.mixer, self.x, self.rotation = mixer, x, rotation
        self.q, self.k, self.v, _ = mixer.project(x, rotation)
        self.num_states, self.group = config.num_state_heads, config.num_attention_heads // config.num_state_heads
        self.root = torch.linalg.cholesky(metric.double()).to(x.dtype)  # |e L|^2 = e^T M e
        self.context = self._measured(context)
        self.beside = [self._measured(source) for source in beside_state(mixer, self.q, self.k, self.v)]
        self.total = _dot(self.context, self.context)
        size = 1 + len(self.beside)
        self.gram = x.new_zeros(config.num_attention_heads, size, size, dtype=torch.float64)
        self.cross = self.gram.new_zeros(config.num_attention_heads, size)
        for i, a in enumerate(self.beside, 1):
            self.cross[:, i] = _dot(a, self.context)
            for j, b in enumerate(self.beside[:i], 1):
                self.gram[:, i, j] = self.gram[:, j, i] = _dot(a, b)
        self.best = x.new_zeros(self.num_states, 4)
        self.score = x.new_full((self.num_states,), -torch.inf)
        self.along = [x.new_zeros(1, 1, self.num_states)] * 2

    def _measured(self, y: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bthd,hde->bthe", y, self.root)

    def attempt(self, candidate: torch.Tensor) -> None:
        """Keeps the candidate for every state head whose score it raises."""
        score = self._explained(candidate)
        better = score > self.score + LEAST_GAIN
        self.best = torch.where(better[:, None], candidate, self.best)
        self.score = torch.where(better, score, self.score)

    def _explained(self, candidate: torch.Tensor) -> torch.Tensor:
        """(Hs,): the share of the context that the state and what is beside it explain, combined by least squares."""
        config = self.mixer.config
        beta = config.beta_max * torch.sigmoid(
            candidate[:, STRENGTH] + candidate[:, STRENGTH_SLOPE] * self.along[0]
        ).expand(*self.x.shape[:2], -1)
        g = None
        if config.mixer == "gated_delta":
            offset = inverse_softplus(math.log(2) * 2.0 ** -candidate[:, HALF_LIFE])
            g = -F.softplus(offset + candidate[:, DECAY_SLOPE] * self.along[1]).expand_as(beta)
        z = self.mixer.read_texts(self.q, self.k, self.v, beta, g, self.rotation)
        z = self._measured(z)
        gram, cross = self.gram.clone(), self.cross.clone()
        gram[:, 0, 0], cross[:, 0] = _dot(z, z), _dot(z, self.context)
        for i, source in enumerate(self.beside, 1):
            gram[:, 0, i] = gram[:, i, 0] = _dot(z, source)
        ridge = 1e-6 * gram.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=1e-30)[:, None, None]
        solved = torch.linalg.solve(
            gram + ridge * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device), cross
        )
        explained = (cross * solved).sum(-1).view(self.num_states, self.group).sum(1)
        return (explained / self.total.view(self.num_states, self.group).sum(1).clamp(min=1e-30)).to(self.x.dtype)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(HQ,) sums over everything but heads, in float64."""
    return (a * b).sum((1, 3)).double().sum(0)


def beside_state(mixer: DeltaMixer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """What a mixer adds to what it reads, (B, T, HQ, d) each: the values of its skip taps, then its local window's."""
    values = v.repeat_interleave(mixer.group, 2)
    taps = [shifted(values, j) for j in range(mixer.config.skip_taps)]
    return [*taps, mixer.attend(q, k, v)] if mixer.config.local_window else taps


def shifted(y: torch.Tensor, j: int) -> torch.Tensor:
    """y (B, T, ...) j tokens later, zero before the start."""
    return y if j == 0 else F.pad(y, (0, 0) * (y.ndim - 2) + (j, 0))[:, : y.shape[1]]


def inverse_softplus(y: torch.Tensor) -> torch.Tensor:
    return y.expm1().clamp(min=1e-13).log()


def attention_targets(
    attention, x: torch.Tensor, rotation, window: int | None = None, near: int = NEAR
) -> tuple[torch.Tensor, torch.Tensor, slice]:
    """Two logarithms per token and query head, (B, T', HQ), that are read off the attention over x, and which tokens.

    First how much attention a token's key draws from tokens at least `near` later; second how much of the attention of
    the next AHEAD tokens goes past it, further back (the first token, where attention parks, left out).
    """
    q, k = (y(x).unflatten(-1, (-1, attention.head_dim)) for y in (attention.q_proj, attention.k_proj))
    if attention.config.qk_norm == "head":
        q, k = attention.q_norm(q), attention.k_norm(k)
    if rotation is not None:
        q, k = apply_rotary_pos_emb(q, k, *rotation, unsqueeze_dim=2)
    _, T, HQ, d = q.shape
    group = HQ // k.shape[2]
    ones = torch.ones(T, T, dtype=torch.bool, device=x.device)
    seen = ones.tril() if window is None else ones.tril() & ones.triu(1 - window)
    ahead = (ones.tril() & ~ones.tril(-AHEAD)).to(x.dtype)
    far = ones.tril(-near).to(x.dtype)
    kept = slice(min(8, T // 8), max(T - min(max(128, 2 * near), T // 4), T // 8 + 2))
    drawn, past = [], []
    for head in range(HQ):
        logits = q[:, :, head] @ k[:, :, head // group].mT * d**-0.5
        weights = torch.softmax(logits.masked_fill(~seen, -torch.inf), -1)
        drawn.append((weights * far).sum(1)[:, kept].clamp(min=1e-5).log())
        before = weights.cumsum(-1) - weights - weights[:, :, :1]
        past.append(((before * ahead).sum(1) / ahead.sum(0))[:, kept].clamp(min=1e-4).log())
    return torch.stack(drawn, -1), torch.stack(past, -1), kept


@dataclass
class _Directions:
    mean: torch.Tensor
    weights: tuple[torch.Tensor, torch.Tensor]


def _directions(x: torch.Tensor, targets, num_states: int) -> _Directions:
    """Linear functions of x (Hs, D each) that predict the two targets, whose mean over windows at each position is
    taken off and whose spread is 1; the second with its sign turned, so that a positive slope forgets where attention
    does not look back. Query heads that share a state share the mean of theirs."""
    drawn, past, kept = targets
    inputs = x[:, kept].reshape(-1, x.shape[-1])
    inputs = inputs - inputs.mean(0)
    gram = inputs.T @ inputs
    gram = gram + DIRECTION_RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=x.dtype, device=x.device)
    factor = torch.linalg.cholesky(gram.double())
    weights = []
    for target, sign in ((drawn, 1.0), (past, -1.0)):
        flat = (target - target.mean(0, keepdim=True)).reshape(-1, target.shape[-1])
        if len(target) == 1:
            flat = (target - target.mean(1, keepdim=True)).reshape(-1, target.shape[-1])
        flat = flat / flat.std(0).clamp(min=1e-6)
        weight = torch.cholesky_solve((inputs.T @ flat).double(), factor).T.to(x.dtype) * sign
        weights.append(weight.view(num_states, -1, weight.shape[-1]).mean(1))
    return _Directions(x.reshape(-1, x.shape[-1]).mean(0), (weights[0], weights[1]))


def _set_parameters(mixer: DeltaMixer, best: torch.Tensor, directions: _Directions | None, x: torch.Tensor) -> None:
    """Writes the candidate into b_proj and a_proj; a slope along (x - mean) moves its mean into the bias."""
    rows = [(mixer.b_proj, best[:, STRENGTH], best[:, STRENGTH_SLOPE], 0)]
    if mixer.config.mixer == "gated_delta":
        offset = inverse_softplus(math.log(2) * 2.0 ** -best[:, HALF_LIFE])
        rows.append((mixer.a_proj, offset, best[:, DECAY_SLOPE], 1))
    for projection, offset, slope, which in rows:
        projection.weight.zero_()
        if directions is not None:
            projection.weight.copy_(slope[:, None] * directions.weights[which])
            offset = offset - projection.weight @ directions.mean
        if projection.bias is not None:
            projection.bias.copy_(offset)
        else:
            projection.weight.add_(offset[:, None] * constant_direction(x))


def constant_direction(x: torch.Tensor) -> torch.Tensor:
    """(D,), the linear function of x (..., D) that is nearest to one on every token: a bias for a projection that has
    none."""
    inputs = x.reshape(-1, x.shape[-1])
    gram = (inputs.T @ inputs).double()
    gram.diagonal().add_(CONSTANT_RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, inputs.sum(0).double()).to(x.dtype)

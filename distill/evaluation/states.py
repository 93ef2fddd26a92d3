"""What the states of a student hold, and how far back a model's context is of use to it.

Shapes: N windows, T tokens, HQ query heads, H state heads, hd head size.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from deltanet.mixer import DeltaMixer

from .branches import layers_of
from .subject import Subject

SHORTEST = 8
BATCH_TOKENS = 1024


@torch.no_grad()
def states(student: Subject, ids: torch.Tensor) -> dict[str, dict[str, float]]:
    """ids (N, T) -> per delta-rule layer, means over windows and heads unless said:

    state norm: Frobenius norm of the state after T tokens; growth: over its norm at the middle of what it has taken in
    (1 where that was nothing). half-life: tokens in which the mean decay over the text halves a memory, of the median
    head, shortest and longest; none without decay. write strength: mean beta. key cosine: mean cosine of two different
    keys; where it is near 1 every write erases the one before.
    """
    mixers = [layer.self_attn for layer in layers_of(student.model)]
    seen: dict[str, list[dict[str, torch.Tensor]]] = {}
    handles = []
    for index, mixer in enumerate(mixers):
        if isinstance(mixer, DeltaMixer):
            gather = partial(_gather, seen.setdefault(f"layer {index}", []))
            handles.append(mixer.register_forward_pre_hook(gather, with_kwargs=True))
    try:
        for window in ids.to(student.device):
            student.model(window[None], use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    rows: dict[str, dict[str, float]] = {}
    for name, found in seen.items():
        mean = {key: torch.stack([one[key] for one in found]).mean(0) for key in found[0]}
        half = mean["half_norm"]
        rows[name] = {
            "state norm": mean["norm"].mean().item(),
            "growth": torch.where(half > 0, mean["norm"] / half.clamp(min=1e-30), 1.0).mean().item(),
        }
        if "decay" in mean:
            half_lives = (math.log(2) / mean["decay"].clamp(min=1e-9)).sort().values
            rows[name] |= {
                "half-life": half_lives.median().item(),
                "shortest": half_lives[0].item(),
                "longest": half_lives[-1].item(),
            }
        rows[name] |= {"write strength": mean["beta"].mean().item(), "key cosine": mean["cosine"].mean().item()}
    return rows


def _gather(found: list, mixer: DeltaMixer, inputs: tuple, options: dict) -> None:
    found.append(_look(mixer, inputs[0], options["position_embeddings"]))


def _look(mixer: DeltaMixer, x: torch.Tensor, position_embeddings) -> dict[str, torch.Tensor]:
    """Figures of one window, one per head, from the mixer's input x (1, T, D)."""
    q, k, v, _ = mixer.project(x, position_embeddings)
    strength, decay = mixer.strengths(x)
    k, v, beta, g = mixer.written(k, v, strength, decay)
    q, k = mixer.features(q, k, position_embeddings)
    unseen = mixer.config.local_window  # tokens until the first is written
    half = (x.shape[1] + min(unseen, x.shape[1] - 2)) // 2
    parts = [slice(0, half), slice(half, None)]
    norms, state = [], None
    for part in parts:
        forgets = None if g is None else g[:, part]
        _, state = mixer.read(
            q[:, part], k[:, part], v[:, part], beta[:, part], forgets, None, state, return_state=True
        )
        norms.append(state[0].float().norm(dim=(1, 2)).cpu())
    unit = F.normalize(k[0, unseen:].float(), dim=-1)
    tokens = len(unit)
    cosine = (unit.sum(0).square().sum(-1) - tokens) / max(tokens * (tokens - 1), 1)
    found = {"half_norm": norms[0], "norm": norms[1], "beta": strength[0].mean(0).cpu(), "cosine": cosine.cpu()}
    return found if decay is None else found | {"decay": -decay[0].mean(0).cpu()}


@torch.no_grad()
def truncated_context(
    models: dict[str, Subject], ids: torch.Tensor, *, advance: Callable[[float], None] = lambda amount: None
) -> dict[str, dict[str, float]]:
    """ids (N, T), T at least 2 SHORTEST -> the loss of each model on the same tokens, in nats, when it sees only so
    many tokens before each. Where the figures stop falling, the model remembers no further.

    The scored tokens are the last 2^n of every window, the most that leave as many before them. A context of c to
    2 c - 1 tokens is a piece of 2 c whose second half is scored. `advance(tokens)` is called per piece.
    """
    scored = 2 ** int(math.log2(ids.shape[1] // 2))
    rows: dict[str, dict[str, float]] = {}
    context = min(SHORTEST, scored)
    while context <= scored:
        pieces = ids[:, -scored - context :].unfold(1, 2 * context, context).flatten(0, 1)
        rows[f"{context} to {2 * context - 1} tokens"] = {
            who: _second_half_loss(subject, pieces, context, advance) for who, subject in models.items()
        }
        context *= 2
    return rows


def _second_half_loss(subject: Subject, pieces: torch.Tensor, context: int, advance) -> float:
    total = 0.0
    for batch in pieces.split(max(BATCH_TOKENS // pieces.shape[1], 1)):
        batch = batch.to(subject.device)
        logits = subject.model(batch, use_cache=False, logits_to_keep=context + 1).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), batch[:, context:].flatten(), reduction="sum").item()
        advance(batch.numel())
    return total / (len(pieces) * context)

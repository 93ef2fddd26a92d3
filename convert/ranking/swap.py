"""What it costs to swap attention for a calibrated mixer, end to end: one layer at a time, or greedily.

All of them run a `Hybrid` over scored text that nothing was fitted on; no gradient step is taken. Scores are in nats
per token, larger where attention is harder to do without.

Shapes: N windows, T tokens, D hidden size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from deltanet import DeltaNetForCausalLM

from ..closeness import LOGIT_TOKENS, MARGIN
from .hybrid import Hybrid

LONGEST_PASSAGE = 256
"""A passage and its copy are read in one go by any teacher, and by a state that forgets over hundreds of tokens."""

Advance = Callable[[float], None]


@torch.no_grad()
def swap(teacher, twin, scored: torch.Tensor, advance: Advance = lambda amount: None) -> list[dict]:
    """`layer` and `score`, the divergence when that layer alone is swapped. scored (N, T) int64."""
    hybrid, found = Hybrid(teacher, twin, scored), []
    for layer in range(hybrid.num_layers):
        found.append({"layer": layer, "score": hybrid.divergence({layer})})
        advance(1)
    return found


@torch.no_grad()
def recall(teacher, twin, scored: torch.Tensor, advance: Advance = lambda amount: None) -> list[dict]:
    """`layer`, `language`, `recalled` and `score` = recalled - language, of every layer swapped alone.

    A passage of the scored text is followed by the same passage again. `language` is how much the loss rises on the
    first, `recalled` on the second from its ninth token on. As in HALO (arXiv 2601.22156), a layer that only recall
    needs comes first; theirs divides where this subtracts, since neither rise is far from 0.
    """
    passage = min(LONGEST_PASSAGE, scored.shape[1] // 2)
    rows = scored[:, : scored.shape[1] // passage * passage].reshape(-1, passage)
    ids = torch.cat([rows, rows], 1)[: max(scored.numel() // (2 * passage), 1)]
    parts = {"language": slice(1, passage), "recalled": slice(passage + min(MARGIN, passage // 2), 2 * passage)}
    hybrid, found = Hybrid(teacher, twin, ids), []
    before = losses(teacher, hybrid.states(set()), ids, parts)
    for layer in range(hybrid.num_layers):
        after = losses(teacher, hybrid.states({layer}), ids, parts)
        rise = {name: after[name] - before[name] for name in parts}
        found.append({"layer": layer, **rise, "score": rise["recalled"] - rise["language"]})
        advance(1)
    return found


@torch.no_grad()
def greedy(teacher, twin, scored: torch.Tensor, advance: Advance = lambda amount: None) -> list[dict]:
    """`layer`, `score` and `kl`, in the order in which layers get their attention back.

    All layers start swapped; in every round the layer whose attention lowers the divergence most gets it back (as in
    arXiv 2512.20569, but without training the candidates). `kl` is what is left after that, `score` what was there
    before: how bad things were when this layer was the best remedy. `advance(1)` is called per candidate.
    """
    hybrid = Hybrid(teacher, twin, scored)
    swapped, found = set(range(hybrid.num_layers)), []
    left = hybrid.divergence(swapped)
    while swapped:
        hybrid.rebase(swapped)
        candidates = {}
        for layer in sorted(swapped):
            candidates[layer] = hybrid.divergence(swapped - {layer})
            advance(1)
        best = min(candidates, key=candidates.get)
        found.append({"layer": best, "score": left, "kl": candidates[best]})
        left = candidates[best]
        swapped.remove(best)
    return found


def losses(
    teacher: DeltaNetForCausalLM, states: torch.Tensor, ids: torch.Tensor, parts: dict[str, slice]
) -> dict[str, float]:
    """Mean loss in nats of the tokens ids[:, part] (N, T), for every part, from final hidden states (N, T, D) and the
    teacher's head; a part starts after the first token."""
    found = {}
    for name, part in parts.items():
        inputs = states[:, part.start - 1 : part.stop - 1].flatten(0, 1)
        targets = ids[:, part].flatten()
        total = 0.0
        for start in range(0, len(targets), LOGIT_TOKENS):
            rows = slice(start, start + LOGIT_TOKENS)
            total += F.cross_entropy(teacher.lm_head(inputs[rows]).float(), targets[rows], reduction="sum").item()
        found[name] = total / len(targets)
    return found

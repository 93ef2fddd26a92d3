"""Greedy choice in which every candidate is distilled for some steps before it is judged (arXiv 2512.20569).

What a layout is worth after training is not what it is worth before: errors that a few steps mend do not count here.
Only mixers train, by forward KL to the teacher; the rest is the teacher's.
Twin: tests/convert/ranking/test_distilled.py.

Shapes: N windows, T tokens, D hidden size, V vocabulary.
"""

import copy
from collections.abc import Callable, Mapping
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from deltanet import DeltaNetForCausalLM

from ..calibration import Stream
from ..closeness import LOGIT_TOKENS, compare
from ..layouts import LINEAR

STEPS = 8
RATE = 5e-4
"""Half of what stages train mixers at: Adam's first steps are as long as its rate, however small the gradient."""
STEP_TOKENS = 1024

Mixers = Mapping[int, nn.Module]
Text = tuple[torch.Tensor, torch.Tensor]  # tokens (n, T) and the teacher's final states (n, T, D)


@torch.no_grad()
def distilled(
    teacher: DeltaNetForCausalLM,
    twin: DeltaNetForCausalLM,
    fit: torch.Tensor,
    scored: torch.Tensor,
    steps: int = STEPS,
    advance: Callable[[float], None] = lambda amount: None,
) -> list[dict]:
    """As `swap.greedy`, with `steps` steps on the text fit (N, T) int64 for every candidate, about STEP_TOKENS of it a
    step and the same for all; scored (M, T) int64 judges them. All are in float32 on one device.

    A candidate starts from the mixers of the one chosen before it, so what is chosen has been trained for longer and
    longer. Teacher and twin are left as they are.
    """
    read = [(tokens, _states(teacher, {}, tokens)) for tokens in fit.split(max(STEP_TOKENS // fit.shape[1], 1))]
    judged = (scored, torch.cat([_states(teacher, {}, row) for row in scored.split(1)]))
    mixers = {layer: block.self_attn for layer, block in enumerate(twin.model.layers)}
    mixers, left = _trained(teacher, mixers, read, judged, steps)
    found = []
    while mixers:
        candidates = {}
        for layer in sorted(mixers):
            others = {other: mixer for other, mixer in mixers.items() if other != layer}
            candidates[layer] = _trained(teacher, others, read, judged, steps)
            advance(1)
        best = min(candidates, key=lambda layer: candidates[layer][1])
        mixers, kl = candidates[best]
        found.append({"layer": best, "score": left, "kl": kl})
        left = kl
    return found


def _trained(teacher, mixers: Mixers, read: list[Text], judged: Text, steps: int) -> tuple[Mixers, float]:
    """Copies of the mixers, trained on `read`, and KL(teacher || with them) on `judged`, in nats a token."""
    mixers = copy.deepcopy(dict(mixers))
    parameters = [parameter.requires_grad_() for mixer in mixers.values() for parameter in mixer.parameters()]
    if parameters:
        optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
        for step in range(steps):
            tokens, goal = read[step % len(read)]
            with torch.enable_grad():
                loss = _kl(teacher, _states(teacher, mixers, tokens), goal) / tokens.numel()
            # Not backward(): the teacher's own parameters, which may require gradients, get none.
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True)):
                parameter.grad = gradient
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
    tokens, goal = judged
    with torch.no_grad():
        hidden = {"teacher": goal, "hybrid": torch.cat([_states(teacher, mixers, row) for row in tokens.split(1)])}
    return mixers, compare(teacher, teacher, hidden, tokens)["hybrid"]["kl"]


def _states(teacher, mixers: Mixers, tokens: torch.Tensor) -> torch.Tensor:
    """(N, T, D): the final hidden states of the teacher with these mixers in place of its attention."""
    stream = Stream(teacher, tokens, len(tokens))
    hidden = stream.hidden
    for layer, block in enumerate(teacher.model.layers):
        other = SimpleNamespace(self_attn=mixers[layer], layer_type=LINEAR) if layer in mixers else None
        hidden = hidden + stream.mix(layer, block.input_layernorm(hidden), other)[1]
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
    return teacher.model.norm(hidden)


def _kl(teacher, hidden: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """The sum over positions of KL(teacher || other) in nats, from final states; logits exist by LOGIT_TOKENS."""

    def part(mine: torch.Tensor, its: torch.Tensor) -> torch.Tensor:
        log_q, log_p = (teacher.lm_head(states).float().log_softmax(-1) for states in (mine, its))
        return F.kl_div(log_q, log_p, reduction="sum", log_target=True)

    pieces = zip(*(states.flatten(0, -2).split(LOGIT_TOKENS) for states in (hidden, goal)))
    return sum(checkpoint(part, *pair, use_reentrant=False) for pair in pieces)

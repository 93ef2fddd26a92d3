"""What each layer, and each branch of a delta-rule layer, contributes: the loss without it less the loss with it.

Retrofits are known to lean on the branch that was easiest to learn and to leave the other idle; a perplexity does not
show that. Here a state, the skip taps, or a whole mixer gives zeros, and all else stays as it is.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from deltanet.mixer import DeltaMixer

from .subject import Subject

STATE, TAPS, MIXER = "state off", "skip taps off", "mixer off"
LOGIT_ROWS = 256  # positions whose float32 logits exist at once


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of any causal model of transformers' that has `layers` with a `self_attn` in each; [] of others."""
    layers = list(getattr(model.get_decoder(), "layers", ()))
    return layers if all(isinstance(getattr(layer, "self_attn", None), nn.Module) for layer in layers) else []


@torch.no_grad()
def branches(
    subject: Subject, ids: torch.Tensor, *, advance: Callable[[float], None] = lambda amount: None
) -> dict[str, dict[str, float]]:
    """ids (N, T) -> per layer how much the loss rises, in nats a token, with its mixer off, and of a delta-rule layer
    with its state or its skip taps off; and the same with all states, or all taps, off at once.

    A negative figure is a layer that does harm on this text. `advance(1)` is called per layer.
    """
    ids = ids.to(subject.device)
    whole = mean_loss(subject, ids)
    mixers = [layer.self_attn for layer in layers_of(subject.model)]
    rows: dict[str, dict[str, float]] = {}
    for index, mixer in enumerate(mixers):
        rows[f"layer {index}, {kind(mixer)}"] = {
            switch: _rise(subject, ids, whole, [mixer], switch) for switch in _switches(mixer)
        }
        advance(1)
    linear = [mixer for mixer in mixers if isinstance(mixer, DeltaMixer)]
    if len(linear) > 1:
        every = {switch: _rise(subject, ids, whole, linear, switch) for switch in _switches(linear[0])}
        rows["all delta-rule layers"] = every
    return rows


def kind(mixer: nn.Module) -> str:
    return "delta rule" if isinstance(mixer, DeltaMixer) else "attention"


def mean_loss(subject: Subject, ids: torch.Tensor) -> float:
    """Mean loss of the next token in nats; ids (N, T) on the subject's device."""
    total = 0.0
    for window in ids:
        logits = subject.model(window[None], use_cache=False).logits[0, :-1]
        for start in range(0, len(logits), LOGIT_ROWS):
            rows = slice(start, start + LOGIT_ROWS)
            total += F.cross_entropy(logits[rows].float(), window[1:][rows], reduction="sum").item()
    return total / (len(ids) * (ids.shape[1] - 1))


def _switches(mixer: nn.Module) -> list[str]:
    if not isinstance(mixer, DeltaMixer):
        return [MIXER]
    return [STATE, *([TAPS] if mixer.config.skip_taps else []), MIXER]


def _rise(subject: Subject, ids: torch.Tensor, whole: float, mixers: list[nn.Module], switch: str) -> float:
    with contextlib.ExitStack() as off:
        for mixer in mixers:
            off.enter_context(switched_off(mixer, switch))
        return mean_loss(subject, ids) - whole


@contextlib.contextmanager
def switched_off(mixer: nn.Module, switch: str) -> Iterator[None]:
    """The mixer without its state, taps or output, for whole texts without a cache; put back afterwards."""
    if switch == STATE:
        mixer.read = lambda q, *others, **options: (torch.zeros_like(q), None)
        try:
            yield
        finally:
            del mixer.read
        return
    silenced = mixer.skip_proj if switch == TAPS else mixer
    handle = silenced.register_forward_hook(lambda module, inputs, output: _zero(output))
    try:
        yield
    finally:
        handle.remove()


def _zero(output):
    """Zeros in place of a tensor, or of the first of several."""
    return torch.zeros_like(output) if isinstance(output, torch.Tensor) else (torch.zeros_like(output[0]), *output[1:])

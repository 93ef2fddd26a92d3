"""What each layer, and each branch of a delta-rule layer, contributes: loss and recall without it.

Retrofits are known to lean on the branch that was easiest to learn and to leave the other idle; a perplexity does not
show that, and a loss hardly shows what carries recall, which few tokens of a text ask for. Here a state, the skip taps,
the local window or a whole mixer gives zeros, and all else stays as it is.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from deltanet.mixer import DeltaMixer

from .subject import Subject

STATE, TAPS, LOCAL, MIXER = "state", "skip taps", "local window", "mixer"
ALL = {STATE: "all states", TAPS: "all skip taps", LOCAL: "all local windows", MIXER: "all delta-rule mixers"}
LAYERS, KINDS, NONE = "layers", "kinds", "none"
PARTS = (LAYERS, KINDS, NONE)
"""Which parts are switched off: those of every layer too, those of all delta-rule layers at once alone, or none."""
RISE, RECALL, FIRST = "loss rise, nats", "recall {}", "first {}"
LOGIT_ROWS = 256  # positions whose float32 logits exist at once


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of any causal model of transformers' that has `layers` with a `self_attn` in each; [] of others."""
    layers = list(getattr(model.get_decoder(), "layers", ()))
    return layers if all(isinstance(getattr(layer, "self_attn", None), nn.Module) for layer in layers) else []


def parts_of(model: nn.Module, which: str = LAYERS) -> dict[str, tuple[list[nn.Module], str]]:
    """What can be switched off, by its name: the mixers, and which of STATE, TAPS, LOCAL and MIXER of each.

    First all delta-rule layers at once, where there are several, then layer by layer; of `which` see PARTS.
    """
    mixers = [layer.self_attn for layer in layers_of(model)]
    linear = [mixer for mixer in mixers if isinstance(mixer, DeltaMixer)]
    parts: dict[str, tuple[list[nn.Module], str]] = {}
    if len(linear) > (which == LAYERS) and which != NONE:
        for switch in _switches(linear[0]):
            parts[ALL[switch]] = linear, switch
    if which != LAYERS:
        return parts
    for index, mixer in enumerate(mixers):
        for switch in _switches(mixer):
            parts[f"layer {index}, {switch if isinstance(mixer, DeltaMixer) else 'attention'}"] = [mixer], switch
    return parts


@torch.no_grad()
def branches(
    student: Subject,
    teacher: Subject | None,
    ids: torch.Tensor,
    *,
    parts: str = LAYERS,
    recalled: Callable[[nn.Module], list[dict]] = lambda model: [],
    advance: Callable[[float], None] = lambda amount: None,
) -> dict[str, dict[str, float]]:
    """ids (N, T) -> per part that is off, and first with none off, the loss less that of the whole student, in nats a
    token, and at every distance the share of a passage that is expected where it comes again (RECALL) and where it
    stands there for the first time (FIRST); and the same of the teacher, whole.

    A negative rise is a part that does harm on this text. parts: one of PARTS. recalled: what `recall_by_distance`
    (convert.closeness) gives for one model, as its student; not asked of a delta-rule layer among others, whose one
    state or taps move it within the noise of so few passages (docs/evaluate.md). `advance(1)` is called per part.
    """
    ids = ids.to(student.device)
    whole = mean_loss(student, ids)
    rows: dict[str, dict[str, float]] = {}
    if teacher is not None:
        rise = mean_loss(teacher, ids.to(teacher.device)) - whole
        rows["none (teacher)"] = {RISE: rise} | _by_distance(recalled(teacher.model))
    rows["none (student)"] = {RISE: 0.0} | _by_distance(recalled(student.model))
    num_linear = sum(isinstance(layer.self_attn, DeltaMixer) for layer in layers_of(student.model))
    for name, (mixers, switch) in parts_of(student.model, parts).items():
        with contextlib.ExitStack() as off:
            for mixer in mixers:
                off.enter_context(switched_off(mixer, switch))
            rows[name] = {RISE: mean_loss(student, ids) - whole}
            if len(mixers) == num_linear or not isinstance(mixers[0], DeltaMixer):
                rows[name] |= _by_distance(recalled(student.model))
        advance(1)
    return rows


def _by_distance(rows: list[dict]) -> dict[str, float]:
    columns: dict[str, float] = {}
    for row in rows:
        columns[RECALL.format(row["distance"])] = row["student"]
        columns[FIRST.format(row["distance"])] = row["first"]["student"]
    return columns


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
    config = mixer.config
    return [STATE, *([TAPS] if config.skip_taps else []), *([LOCAL] if config.local_window else []), MIXER]


@contextlib.contextmanager
def switched_off(mixer: nn.Module, switch: str) -> Iterator[None]:
    """The mixer without one of its branches or its output, for whole texts without a cache; put back afterwards."""
    if switch == STATE:
        mixer.read = lambda q, *others, **options: (torch.zeros_like(q), None)
        try:
            yield
        finally:
            del mixer.read
        return
    silenced = {TAPS: "skip_proj", LOCAL: "local_proj"}.get(switch)
    silenced = mixer if silenced is None else getattr(mixer, silenced)
    handle = silenced.register_forward_hook(lambda module, inputs, output: _zero(output))
    try:
        yield
    finally:
        handle.remove()


def _zero(output):
    """Zeros in place of a tensor, or of the first of several."""
    return torch.zeros_like(output) if isinstance(output, torch.Tensor) else (torch.zeros_like(output[0]), *output[1:])

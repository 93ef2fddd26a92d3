"""How close a student is to its teacher before training: layer by layer, end to end, and in what it can recall.

Every number comes from held-out text. Layers are measured on the teacher's own hidden states, so each is judged by
itself; the end-to-end numbers stand next to what little would have been enough to reach: a random mixer, no mixer at
all, the plain copy, the state without the skip taps and the taps without the state. Perplexity hides lost memory, so
two probes ask for it directly. `as_markdown` makes the page, `files` what a student's folder gets.
"""

import contextlib
import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F

from deltanet import DeltaNetForCausalLM
from deltanet.mixer import DeltaMixer

from .calibration import Stream

LINEAR = "linear_attention"
LOGIT_TOKENS = 256
"""Logits exist for so many tokens at a time; a whole window of a large vocabulary would be most of the memory."""
MARGIN = 8
"""A repeated passage counts from its ninth token on: before that even a perfect memory cannot know it is one."""
DISTANCES = (64, 128, 256, 512, 1024)
VARIANTS = {
    "plain_copy": "plain copy",
    "state_alone": "state alone",
    "skip_alone": "skip taps alone",
    "local_alone": "local window alone",
    "no_mixer": "mixer removed",
    "random_mixer": "random mixer",
}
_ALONE = {"state_alone": "read_proj", "skip_alone": "skip_proj", "local_alone": "local_proj"}
"""Branches of a mixer, and the projection whose zeros switch each off."""


@torch.no_grad()
def closeness(
    teacher: DeltaNetForCausalLM,
    student: DeltaNetForCausalLM,
    held_out: torch.Tensor,
    *,
    tokens: int = 4096,
    recall_tokens: int = 2048,
    seed: int = 0,
    advance: Callable[[float], None] | None = None,
) -> dict:
    """The report, a dict for JSON. held_out (N, T) int64 are windows of text that nothing was fitted on.

    At most about `tokens` of them are used, and `recall_tokens` per probe. Keys: teacher_perplexity,
    student_perplexity, kl (mean nats per token), each of VARIANTS with perplexity and kl, layers (layer, cosine,
    relative_error, residual_error), ranking (linear layers, the one that most needs attention first), recall, tokens.
    `advance(1)` is called up to 4 + len(VARIANTS) times.
    """
    advance = advance or (lambda amount: None)
    length = held_out.shape[1]
    held_out = held_out[: max(tokens // length, 1)].to(teacher.device)
    layers = layer_errors(teacher, student, held_out)
    advance(1)
    hidden = {"teacher": final_states(teacher, held_out), "student": final_states(student, held_out)}
    advance(1)
    for name in _applicable(student):
        with varied(student, name, teacher, seed):
            hidden[name] = final_states(student, held_out)
        advance(1)
    scores = compare(teacher, student, hidden, held_out)
    advance(1)
    report = {
        "tokens": held_out.numel(),
        "teacher_perplexity": scores["teacher"]["perplexity"],
        "student_perplexity": scores["student"]["perplexity"],
        "kl": scores["student"]["kl"],
        **{name: scores[name] for name in VARIANTS if name in scores},
        "layers": layers,
        "ranking": [row["layer"] for row in sorted(layers, key=lambda row: -row["residual_error"])],
        "recall": recall(teacher, student, held_out, tokens=recall_tokens, seed=seed),
    }
    advance(1)
    return report


class OutputError:
    """How far a mixer's output is from the teacher's, given the same input, gathered batch by batch."""

    def __init__(self):
        self._sums, self._count = torch.zeros(4, dtype=torch.float64), 0

    def add(self, made: torch.Tensor, wanted: torch.Tensor, residual: torch.Tensor) -> None:
        """The student's output, the teacher's, and the residual stream before it is added, each (..., D)."""
        error = (made - wanted).double().square().sum(-1)
        size = wanted.double().square().sum(-1)
        after = (residual + wanted).double().square().sum(-1)
        cosine = F.cosine_similarity(made, wanted, dim=-1).double()
        self._sums += torch.stack([cosine.sum(), error.sum(), size.sum(), (error / after).sum()]).cpu()
        self._count += error.numel()

    def figures(self) -> dict[str, float]:
        """cosine: mean over tokens of the angle between the two; relative_error: norm of the difference over the norm
        of the teacher's; residual_error: over the norm of the residual stream it is added to, root mean square over
        tokens."""
        cosine, error, size, share = self._sums.tolist()
        return {
            "cosine": cosine / self._count,
            "relative_error": math.sqrt(error / max(size, 1e-30)),
            "residual_error": math.sqrt(share / self._count),
        }


def layer_errors(teacher, student, tokens: torch.Tensor) -> list[dict]:
    """`layer` and the figures of `OutputError` of every linear layer, on the teacher's own stream."""
    stream, found = Stream(teacher, tokens, 4), []
    for layer, kind in enumerate(student.config.layer_types):
        error = OutputError()
        for rows in stream.rows():
            x = stream.mixer_input(layer, rows)
            wanted = stream.mix(layer, x)[1]
            if kind == LINEAR:
                error.add(stream.mix(layer, x, student.model.layers[layer])[1], wanted, stream.hidden[rows])
            stream.advance(layer, rows, wanted)
        if kind == LINEAR:
            found.append({"layer": layer, **error.figures()})
    return found


def final_states(model, tokens: torch.Tensor) -> torch.Tensor:
    """(N, T, D): the final hidden states, one window at a time."""
    return torch.cat([model.model(window[None], use_cache=False).last_hidden_state for window in tokens])


def compare(teacher, student, hidden: dict[str, torch.Tensor], tokens: torch.Tensor) -> dict[str, dict]:
    """Perplexity of the next token and mean KL(teacher || model) in nats, for each of the hidden states."""
    loss, divergence = dict.fromkeys(hidden, 0.0), dict.fromkeys(hidden, 0.0)
    inputs, targets = {name: h[:, :-1].flatten(0, 1) for name, h in hidden.items()}, tokens[:, 1:].flatten()
    for start in range(0, len(targets), LOGIT_TOKENS):
        rows = slice(start, start + LOGIT_TOKENS)
        reference = None
        for name in hidden:  # the teacher comes first
            head = teacher.lm_head if name == "teacher" else student.lm_head
            logs = F.log_softmax(head(inputs[name][rows]).float(), -1)
            reference = logs if reference is None else reference
            loss[name] += F.nll_loss(logs, targets[rows], reduction="sum").item()
            divergence[name] += F.kl_div(logs, reference, log_target=True, reduction="sum").item()
    count = len(targets)
    return {
        name: {"perplexity": math.exp(min(loss[name] / count, 700)), "kl": divergence[name] / count} for name in hidden
    }


def _applicable(student) -> list[str]:
    """The variants that say something about this student."""
    config = student.config
    if LINEAR not in config.layer_types:
        return []
    there = {
        "state_alone": config.read_gate, "skip_alone": config.skip_taps > 0, "local_alone": config.local_window > 0
    }  # fmt: skip
    several = sum(there.values()) > 1 and config.read_gate
    return [name for name in VARIANTS if name not in there or (several and there[name])]


@contextlib.contextmanager
def varied(student, variant: str, teacher=None, seed: int = 0) -> Iterator[None]:
    """The student with every linear layer's mixer replaced by one of VARIANTS, put back afterwards."""
    kept = {}
    try:
        for layer, kind in enumerate(student.config.layer_types):
            if kind == LINEAR:
                block = student.model.layers[layer]
                kept[layer] = block.self_attn
                original = None if teacher is None else teacher.model.layers[layer].self_attn
                block.self_attn = _variant(kept[layer], variant, original, seed + layer)
        yield
    finally:
        for layer, mixer in kept.items():
            student.model.layers[layer].self_attn = mixer


@torch.no_grad()
def _variant(mixer: DeltaMixer, variant: str, original, seed: int) -> DeltaMixer:
    """A changed copy of the mixer; `original` is the teacher's attention in its place."""
    changed = copy.deepcopy(mixer)
    if variant == "plain_copy":
        changed.reset_to_plain_copy()
        changed.o_proj.load_state_dict(_output(original, changed))
    elif variant in _ALONE:
        for branch, name in _ALONE.items():
            if branch != variant and hasattr(changed, name):
                getattr(changed, name).weight.zero_()
                getattr(changed, name).bias.zero_()
    elif variant == "no_mixer":
        changed.o_proj.weight.zero_()
        if changed.o_proj.bias is not None:
            changed.o_proj.bias.zero_()
    else:
        generator = torch.Generator().manual_seed(seed)
        for parameter in changed.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * mixer.config.initializer_range
            parameter.copy_(noise)
    return changed


def _output(original, changed) -> dict[str, torch.Tensor]:
    """The teacher's output projection with the bias that the student's has, zero where the teacher has none."""
    state = {"weight": original.o_proj.weight}
    if changed.o_proj.bias is not None:
        bias = original.o_proj.bias
        state["bias"] = torch.zeros_like(changed.o_proj.bias) if bias is None else bias
    return state


@torch.no_grad()
def recall(teacher, student, held_out: torch.Tensor, *, tokens: int = 2048, seed: int = 0) -> dict:
    """Two probes of memory, each the share of tokens that the teacher and the student guess right (argmax).

    repeat: a passage of held-out text, then the same passage again; counted from its ninth token on.
    needle: a few random tokens early in a text, and at its end the first half of them; counted on the second half.
    Any causal models of transformers' will do; without a teacher the student stands alone.
    """
    models = {who: model for who, model in (("teacher", teacher), ("student", student)) if model is not None}
    length = held_out.shape[1]
    passage = max(min(128, length // 2 - MARGIN), MARGIN + 1)
    first = _passages(held_out, passage, tokens)
    generator = torch.Generator().manual_seed(seed)
    needle = torch.randint(student.config.vocab_size, (len(first), 8), generator=generator).to(held_out.device)
    hay = torch.cat([first[:, :MARGIN], needle, first[:, MARGIN:], needle], 1)
    asked = slice(hay.shape[1] - 4, hay.shape[1])
    return {
        "distance": passage,
        "repeat": {who: _repeated(model, first)[1] for who, model in models.items()},
        "needle": {who: _accuracies(model, hay, asked)[0] for who, model in models.items()},
    }


@torch.no_grad()
def recall_by_distance(
    teacher, student, held_out: torch.Tensor, *, most: int, tokens: int, distances: Sequence[int] = DISTANCES
) -> list[dict]:
    """The probe `repeat` of `recall` with passages of so many tokens as `distances` says, up to a window of held_out
    and to half of `most`, what the models can see; on about `tokens` tokens each. [] where none fits.

    `first` holds the share of the same tokens that each model guesses when the passage stands there for the first time:
    what it knows of language, so that only what is above it is memory.
    """
    models = {who: model for who, model in (("teacher", teacher), ("student", student)) if model is not None}
    longest = min(held_out.shape[1], most // 2)
    rows = []
    for distance in (passage for passage in distances if passage <= longest):
        first = _passages(held_out, distance, tokens)
        found = {who: _repeated(model, first) for who, model in models.items()}
        again, before = ({who: shares[time] for who, shares in found.items()} for time in (1, 0))
        rows.append({"distance": distance, **again, "first": before})
    return rows


def _passages(held_out: torch.Tensor, length: int, tokens: int) -> torch.Tensor:
    """(passages, length) of held_out, as many as come to `tokens` tokens when each stands there twice."""
    count = max(tokens // (2 * length), 1)
    places = range(0, held_out.shape[1] - length + 1, length)
    starts = [(row, at) for at in places for row in range(len(held_out))][:count]
    return torch.stack([held_out[row, at : at + length] for row, at in starts])


def _repeated(model, passages: torch.Tensor) -> list[float]:
    """The shares right of every passage and of its repetition, each from its ninth token on."""
    length = passages.shape[1]
    return _accuracies(
        model, torch.cat([passages, passages], 1), slice(MARGIN, length), slice(length + MARGIN, 2 * length)
    )


def _accuracies(model, ids: torch.Tensor, *counted: slice) -> list[float]:
    """Of each of `counted`, in order and none from 0 on, the share of the tokens ids[:, counted] that the model expects
    most."""
    start = counted[0].start
    right = [0] * len(counted)
    for row in ids:
        logits = model(row[None], use_cache=False, logits_to_keep=len(row) - start + 1).logits[0, :-1]
        is_right = logits.argmax(-1) == row[start:]
        for place, part in enumerate(counted):
            right[place] += is_right[part.start - start : part.stop - start].sum().item()
    return [count / (len(ids) * (part.stop - part.start)) for count, part in zip(right, counted)]


def as_markdown(report: dict) -> str:
    """The report as a page for people; it reads well in a terminal too."""
    teacher = report["teacher_perplexity"]
    lines = [
        "# How close the student starts",
        "",
        f"On {report['tokens']:,} held-out tokens, before any training.",
        "",
        "|                            | perplexity | x teacher | KL, nats/token |",
        "| -------------------------- | ---------: | --------: | -------------: |",
        _row("teacher", teacher, teacher, 0.0),
        _row("**student**", report["student_perplexity"], teacher, report["kl"]),
    ]
    lines += [
        _row(label, report[name]["perplexity"], teacher, report[name]["kl"])
        for name, label in VARIANTS.items()
        if name in report
    ]
    recalled = report["recall"]
    lines += [
        "",
        f"Recall over {recalled['distance']} tokens, share right: "
        + "; ".join(
            f"{name} teacher {recalled[name]['teacher']:.3f}, student {recalled[name]['student']:.3f}"
            for name in ("repeat", "needle")
        ),
    ]
    if report["layers"]:
        lines += [
            "",
            "Each linear layer on the teacher's own hidden states (error / residual stream ranks the layers):",
            "",
            "| layer | cosine | relative error | error / residual stream |",
            "| ----: | -----: | -------------: | ----------------------: |",
        ]
        lines += [
            f"| {row['layer']:>5} | {row['cosine']:>6.3f} | {row['relative_error']:>14.3f} "
            f"| {row['residual_error']:>23.4f} |"
            for row in report["layers"]
        ]
    return "\n".join(lines) + "\n"


def _row(label: str, perplexity: float, teacher: float, kl: float) -> str:
    return f"| {label:<26} | {perplexity:>10.4g} | {perplexity / teacher:>9.4g} | {kl:>14.4f} |"


def files(report: dict) -> dict[str, str]:
    """What a student's folder gets: closeness.json, closeness.md, and ranking.json for `--hybrid ranking.json:COUNT`.

    A layer that kept attention was not measured and is not in the ranking; rank a conversion with no attention.
    """
    return {
        "closeness.json": json.dumps(report, indent=2) + "\n",
        "closeness.md": as_markdown(report),
        "ranking.json": json.dumps({"ranking": report["ranking"]}) + "\n",
    }

"""How well a model knows language, and how far it is from its teacher, by position in the text and by what of the next
token stood before.

    perplexity = exp(mean of -log q(next token))        kl = mean of KL(teacher || student), nats a token
    top1_agreement = share of positions where both expect the same token most

Twin: tests/distill/evaluation/test_language.py.
"""

import itertools
import math
from collections.abc import Callable

import torch
from transformers import GenerationConfig

from ..losses import Term, divergence
from .subject import Subject

ROWS = 256  # positions whose float32 log-probabilities exist at once
FIRST_EDGE = 16
SEEN = ("new", "token", "pair")
"""What stood before of a next token: nothing, the token itself, or the token right behind the one that it follows now.
A pair is what a memory of what came after what can give, the associative recall hits of arXiv 2312.04927."""


@torch.no_grad()
def language(
    student: Subject,
    teacher: Subject | None,
    windows: torch.Tensor,
    *,
    advance: Callable[[float], None] = lambda amount: None,
) -> dict:
    """windows (N, T) int64 -> tokens, window, perplexity (`student`, and `teacher` if there is one), with a teacher kl
    and top1_agreement; by_position: the same figures of positions `first` to `last`, which have so many tokens before
    them; and by_seen: the same of the next tokens of each kind of SEEN, `tokens` of them. The whole vocabulary of the
    model counts, as in transformers' own loss.

    `advance(tokens)` is called after every window.
    """
    names = ["student"] if teacher is None else ["student", "teacher", "kl", "same"]
    sums = torch.zeros(len(names), windows.shape[1] - 1, dtype=torch.float64)
    by_seen, counts = torch.zeros(len(names), len(SEEN), dtype=torch.float64), torch.zeros(len(SEEN), dtype=torch.int64)
    for window in windows:
        kinds = seen(window)
        counts += torch.bincount(kinds, minlength=len(SEEN))
        logits = _logits(student, window)
        expected = None if teacher is None else _logits(teacher, window)
        width = logits.shape[-1] if expected is None else min(logits.shape[-1], expected.shape[-1])
        targets = window[1:].to(student.device)
        for start in range(0, len(targets), ROWS):
            rows = slice(start, start + ROWS)
            q = logits[rows, :width]
            parts = [divergence(Term("ce"), q, None, targets[rows])[0]]
            if expected is not None:
                p = expected[rows, :width].to(q.device)
                parts.append(divergence(Term("ce"), p, None, targets[rows])[0])
                parts.append(divergence(Term("forward_kl"), q, p, targets[rows])[0])
                parts.append(q.argmax(-1) == p.argmax(-1))
            found = torch.stack([part.double().cpu() for part in parts])
            sums[:, rows] += found
            by_seen.index_add_(1, kinds[rows], found)
        advance(len(window))
    edges = position_edges(windows.shape[1] - 1)
    return {
        "tokens": windows.numel(),
        "window": windows.shape[1],
        **_figures(names, sums.sum(1), sums.shape[1] * len(windows)),
        "by_position": [
            {"first": first + 1, "last": last, **_figures(names, part.sum(1), part.shape[1] * len(windows))}
            for first, last in edges
            for part in [sums[:, first:last]]
        ],
        "by_seen": [
            {"seen": kind, "tokens": count, **_figures(names, part, count)}
            for kind, count, part in zip(SEEN, counts.tolist(), by_seen.T)
            if count
        ],
    }


def seen(window: torch.Tensor) -> torch.Tensor:
    """window (T) int64 -> (T - 1) int64, for every token but the first its index in SEEN."""
    tokens, pairs, kinds = set(), set(), []
    for before, token in itertools.pairwise(window.tolist()):
        tokens.add(before)
        kinds.append(2 if (before, token) in pairs else int(token in tokens))
        pairs.add((before, token))
    return torch.tensor(kinds, dtype=torch.int64)


def position_edges(length: int) -> list[tuple[int, int]]:
    """Half-open ranges over `length` positions, each twice as long as the one before; a short rest joins the last."""
    edges, start, stop = [], 0, FIRST_EDGE
    while start < length:
        stop = length if length < stop * 1.5 else stop
        edges.append((start, stop))
        start, stop = stop, stop * 2
    return edges


def _logits(subject: Subject, window: torch.Tensor) -> torch.Tensor:
    return subject.model(window[None, :].to(subject.device), use_cache=False).logits[0, :-1]


def _figures(names: list[str], sums: torch.Tensor, count: int) -> dict:
    mean = {name: value / count for name, value in zip(names, sums.tolist())}
    figures: dict = {"perplexity": {who: math.exp(min(mean[who], 700.0)) for who in names[:2]}}
    if "kl" in mean:
        figures |= {"kl": mean["kl"], "top1_agreement": mean["same"]}
    return figures


@torch.no_grad()
def continuations(
    student: Subject,
    teacher: Subject | None,
    windows: torch.Tensor,
    *,
    count: int = 3,
    prompt_tokens: int = 32,
    new_tokens: int = 48,
) -> list[dict]:
    """How each model goes on, greedily, from the first words of `count` windows: prompt, text (what really follows),
    student, and with a teacher also teacher and same_tokens, how many tokens pass before the two differ."""
    prompt_tokens = min(prompt_tokens, windows.shape[1] // 2)
    new_tokens = min(new_tokens, windows.shape[1] - prompt_tokens)
    rows = sorted({int(row) for row in torch.linspace(0, len(windows) - 1, count)})
    samples = []
    for window in windows[rows]:
        prompt, rest = window[:prompt_tokens], window[prompt_tokens : prompt_tokens + new_tokens]
        mine = _go_on(student, prompt, new_tokens)
        decode = student.tokenizer.decode
        sample = {"prompt": decode(prompt), "text": decode(rest), "student": decode(mine)}
        if teacher is not None:
            other = _go_on(teacher, prompt, new_tokens)
            pairs = list(zip(mine.tolist(), other.tolist()))
            sample["teacher"] = decode(other)
            sample["same_tokens"] = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        samples.append(sample)
    return samples


def _go_on(subject: Subject, prompt: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """The ids that follow. A folder's own defaults of sampling or repetition take no part."""
    ids = prompt[None].to(subject.device)
    own = subject.model.generation_config
    pad = subject.tokenizer.pad_token_id
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens,
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=pad if pad is not None else subject.tokenizer.eos_token_id,
    )
    out = subject.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return out[0, len(prompt) :].cpu()

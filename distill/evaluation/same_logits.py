"""Whether a model says the same however a text is put to it: token by token with a cache, padded, or packed.

A fault here makes every figure that is measured with whole texts say little about what users get. Differences are of
float logits; in float32 they are rounding, in bfloat16 some hundredths of the largest logit.
"""

import inspect
from itertools import pairwise

import torch

from deltanet import DeltaNetConfig
from deltanet.modeling import CACHE

from .subject import Subject

SINGLE_STEPS = 16
SHORTEST = 8

Rows = dict[str, dict[str, float]]


@torch.no_grad()
def same_logits(subject: Subject, ids: torch.Tensor) -> Rows:
    """ids (T,), T at least SHORTEST -> per way the largest difference of any logit from those of the plain text.

    cached: half of the text at once, then a piece, then SINGLE_STEPS tokens one by one. padded: beside a text of half
    the length, which is padded on the left, then on the right; both texts count. packed (models of ours): the text cut
    into three documents in one row, against each alone.
    """
    ids = ids.to(subject.device)
    plain = _logits(subject, ids[None])[0]
    ways = {"cached": _cached(subject, ids) - plain, "padded": _padded(subject, ids, plain)}
    if isinstance(subject.model.config, DeltaNetConfig):
        ways["packed"] = _packed(subject, ids)
    largest = plain.abs().max().item()
    return {
        way: {"largest difference": difference.abs().max().item(), "largest logit": largest}
        for way, difference in ways.items()
    }


def _logits(subject: Subject, ids: torch.Tensor, **arguments) -> torch.Tensor:
    return subject.model(ids, use_cache=False, **arguments).logits.float()


def _cached(subject: Subject, ids: torch.Tensor) -> torch.Tensor:
    """(T, vocabulary)."""
    first = len(ids) // 2
    second = max(len(ids) - SINGLE_STEPS, first)
    pieces = [ids[:first], ids[first:second], *ids[second:].split(1)]
    cache, found = None, []
    for piece in pieces:
        if not len(piece):
            continue
        given = {} if cache is None else {CACHE: cache}
        output = subject.model(piece[None], use_cache=True, **given)
        cache = output[CACHE]
        found.append(output.logits[0].float())
    return torch.cat(found)


def _padded(subject: Subject, ids: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    """The differences of all real tokens, of both texts and both sides."""
    short = ids[: len(ids) // 2]
    alone = _logits(subject, short[None])[0]
    pad = subject.tokenizer.pad_token_id
    filler = ids.new_full((len(ids) - len(short),), 0 if pad is None else pad)
    found = []
    for parts in ((filler, short), (short, filler)):
        batch = torch.stack([ids, torch.cat(parts)])
        real = torch.cat([torch.zeros_like(part) if part is filler else torch.ones_like(part) for part in parts])
        mask = torch.stack([torch.ones_like(ids), real])
        given = {"attention_mask": mask}
        if "position_ids" in inspect.signature(subject.model.forward).parameters:
            given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        logits = _logits(subject, batch, **given)
        found += [logits[0] - plain, logits[1][real.bool()] - alone]
    return torch.cat(found)


def _packed(subject: Subject, ids: torch.Tensor) -> torch.Tensor:
    """The differences of all tokens of three documents, one of them a single token."""
    ends = [0, len(ids) // 3, len(ids) // 3 + 1, len(ids)]
    bounds = torch.tensor(ends, dtype=torch.int32, device=ids.device)
    together = _logits(subject, ids[None], cu_seqlens=bounds)[0]
    alone = [_logits(subject, ids[None, start:stop])[0] for start, stop in pairwise(ends)]
    return together - torch.cat(alone)

"""How likely a model finds a continuation of a context, for many pairs at once.

Texts become ids as evaluation harnesses do it: the whole is tokenised, and the continuation is what comes after the
context's own tokens; white space between the two belongs to the continuation. Rows are padded on the right, where a
causal model cannot see, so a batch gives what single rows give. Twin: tests/distill/evaluation/test_scoring.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from deltanet_errors import UserError

from .subject import Reader, Subject, check_ids
from .tasks.words import opening_ids

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
LOGIT_BYTES = 2**29  # of the float32 logits of a batch


@dataclass(frozen=True)
class Request:
    """ids of context and continuation; the continuation starts at `start` (at least 1). is_cut: its context lost
    tokens on the left, to fit the model's range."""

    ids: tuple[int, ...]
    start: int
    is_cut: bool = False


@dataclass(frozen=True)
class Score:
    """log_likelihood: natural log of the probability of the whole continuation; is_greedy: each of its tokens is the
    one the model expects most."""

    log_likelihood: float
    is_greedy: bool


def encode(reader: Reader | Subject, context: str, continuation: str) -> Request:
    """Raises UserError for an empty continuation, and for one that leaves no room for a token before it."""
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped
    tokenizer = reader.tokenizer
    opening = opening_ids(tokenizer)
    before = tokenizer(context, add_special_tokens=False, verbose=False)["input_ids"] if context else []
    whole = tokenizer(context + continuation, add_special_tokens=False, verbose=False)["input_ids"]
    if not opening and not before:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        opening = [] if start is None else [start]
    ids, start = opening + whole, len(opening) + len(before)
    if not 0 < start < len(ids):
        raise UserError(f"continuation {continuation!r}: nothing to score after the context {context[-40:]!r}")
    check_ids(reader, max(ids), f"continuation {continuation[:40]!r}")
    surplus = max(len(ids) - reader.max_context, 0)
    if surplus >= start:
        raise UserError(f"continuation {continuation[:40]!r}...: longer than the model's range, {reader.max_context}")
    return Request(tuple(ids[surplus:]), start - surplus, surplus > 0)


@torch.no_grad()
def score(
    subject: Subject,
    requests: Sequence[Request],
    *,
    batch_tokens: int | None = None,
    advance: Callable[[float], None] = lambda amount: None,
) -> list[Score]:
    """A score for each request, in their order. batch_tokens: of a padded batch, by default by device; it is smaller
    where the logits of its continuations would take more than LOGIT_BYTES.

    Requests that differ in their last token only share a row. `advance(n)` tells how many requests are done.
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        rows.setdefault(request.ids[:-1], []).append(index)

    def kept(batch: Sequence[tuple[int, ...]]) -> int:
        return len(batch[0]) + 1 - min(requests[index].start for ids in batch for index in rows[ids])

    scores: list[Score | None] = [None] * len(requests)
    order = sorted(rows, key=len, reverse=True)
    first = 0
    while first < len(order):
        batch = fitting(subject, order[first:], len(order[first]), kept, batch_tokens)
        first += len(batch)
        wanted = [(row, requests[index], index) for row, ids in enumerate(batch) for index in rows[ids]]
        for (_, _, index), found in zip(wanted, _score_batch(subject, batch, wanted)):
            scores[index] = found
        advance(len(wanted))
    return scores


def fitting(
    subject: Subject,
    rows: Sequence,
    longest: int,
    kept: Callable[[Sequence], int],
    batch_tokens: int | None = None,
) -> Sequence:
    """The first of `rows`, at least one: as many as make `batch_tokens` (by default by device) when padded to the
    `longest`, and whose logits take at most LOGIT_BYTES; `kept(rows)` says at how many positions each row has any."""
    batch_tokens = batch_tokens or BATCH_TOKENS.get(subject.device.type, 2048)
    batch = rows[: max(batch_tokens // longest, 1)]
    logits = LOGIT_BYTES // (4 * subject.model.config.get_text_config().vocab_size)
    return batch[: max(logits // kept(batch), 1)]


def _score_batch(subject: Subject, batch: list[tuple[int, ...]], wanted: list[tuple]) -> list[Score]:
    longest = len(batch[0])
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    for row, known in enumerate(batch):
        ids[row, : len(known)] = torch.tensor(known)
    # Position i says what comes at i + 1; only those that a continuation needs get logits.
    first = min(request.start for _, request, _ in wanted) - 1
    keep = torch.arange(first, longest, device=subject.device)
    logits = subject.model(ids.to(subject.device), use_cache=False, logits_to_keep=keep).logits
    found = []
    for row, request, _ in wanted:
        targets = torch.tensor(request.ids[request.start :], device=logits.device)
        begin = request.start - 1 - first
        logs = logits[row, begin : begin + len(targets)].float().log_softmax(-1)
        likelihood = logs.gather(-1, targets[:, None]).double().sum().item()
        found.append(Score(likelihood, bool((logs.argmax(-1) == targets).all())))
    return found

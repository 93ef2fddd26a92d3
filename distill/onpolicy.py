"""Text that the student writes during training, after prompts, for the teacher to score (arXiv 2306.13649).

A completion is a pure function of the student's weights, the seed and its position in the order of the prompts: token
t is where the cumulated distribution passes the t-th hashed number of that position. So a resumed run writes the same.
It ends with the first stop token, which is a target like any other, or without one at the limit; where it ends is
known by place, so a padding token that is also the stop token changes nothing. No gradient goes through the choice.
Twin: tests/distill/test_onpolicy.py.
"""

from collections.abc import Callable, Collection
from collections.abc import Sequence as Many
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
import torch

from convert.text import nucleus
from deltanet import DeltaNetForCausalLM
from deltanet.modeling import CACHE
from deltanet_errors import UserError

from .data import Corpus, Part
from .order import hashed
from .packing import Sequence, assemble
from .schema import Stage


def prompt_corpus(
    parts: Many[Part], stage: Stage, seq_len: int, *, key: Many[int], weights: Many[float] | None
) -> Corpus:
    """The prompts of these sources, one a sequence: of a chat what comes before its first target, of a text the first
    `prompt_tokens` (never its last token). Those that leave less than `completion_tokens` of seq_len are dropped and
    counted.

    Raises UserError for a source without a prompt that fits.
    """
    room = seq_len - stage.completion_tokens
    prompts, lost = [], []
    for part in parts:
        lengths = np.minimum(part.stop - part.start - 1, stage.prompt_tokens)
        if part.tokens.marks is not None:
            spans = zip(part.start.tolist(), part.stop.tolist())
            lengths = np.array([int(np.argmax(part.tokens.marks[a:b])) for a, b in spans], np.int64)
        fits = (lengths > 0) & (lengths <= room)
        if not fits.any():
            raise UserError(
                f"source {part.tokens.name}: none of its {len(lengths)} documents has a prompt of 1 to {room} tokens "
                f"(seq_len {seq_len} less completion_tokens {stage.completion_tokens})"
            )
        start, lengths, dropped = part.start[fits], lengths[fits], lengths[~fits]
        prompts.append(Part(replace(part.tokens, marks=None), start, start + lengths))
        lost.append((len(dropped), int(dropped.sum())))
    longest = max(int((part.stop - part.start).max()) for part in prompts)
    corpus = Corpus(prompts, seq_len=longest, key=key, weights=weights, packing="single")
    corpus.reports = [
        replace(
            report,
            documents=report.documents + documents,
            tokens=report.tokens + tokens,
            dropped=tokens,
            dropped_documents=documents,
            supervised=0,
        )
        for report, (documents, tokens) in zip(corpus.reports, lost)
    ]
    return corpus


class Completions:
    """`completions(position)` is that prompt with what the student now writes after it, only the latter as targets.

    The positions of a micro-batch are written together, so each is to be asked for once, in order, after a step.
    """

    def __init__(
        self,
        student: DeltaNetForCausalLM,
        prompts: Corpus,
        stage: Stage,
        *,
        key: Many[int],
        stop_ids: Collection[int],
        vocab_size: int,
        micro_batch_size: int,
        compute: Callable[[], AbstractContextManager],
    ):
        """`compute` gives the context a forward pass runs in."""
        self.student, self.prompts, self.length = student, prompts, stage.completion_tokens
        self.key, self.stop_ids, self.vocab_size = tuple(key), frozenset(stop_ids), vocab_size
        self.size, self.compute = micro_batch_size, compute
        self.made: dict[int, Sequence] = {}

    def __call__(self, position: int) -> Sequence:
        if position not in self.made:
            first = position // self.size * self.size
            positions = range(first, first + self.size)
            self.made = dict(zip(positions, self._write(positions)))
        return self.made.pop(position)

    def _write(self, positions: Many[int]) -> list[Sequence]:
        prompts = [self._prompt(position) for position in positions]
        draws = [hashed(*self.key, position, count=self.length) for position in positions]
        chances = np.stack(draws).astype(np.float64) / 2.0**64
        was_training = self.student.training
        self.student.eval()
        with torch.no_grad(), self.compute():
            written = write_after(self.student, prompts, torch.from_numpy(chances), self.stop_ids, self.vocab_size)
        self.student.train(was_training)
        sequences = []
        for prompt, completion in zip(prompts, written):
            ids = np.concatenate([prompt, completion])
            sequences.append(assemble([ids], len(ids), supervised=[np.arange(len(ids)) >= len(prompt)]))
        return sequences

    def _prompt(self, position: int) -> np.ndarray:
        sequence = self.prompts[position]
        return sequence.input_ids[: sequence.num_tokens]


@torch.compiler.set_stance("force_eager")  # a cache that grows would compile anew and anew
def write_after(
    model: DeltaNetForCausalLM,
    prompts: Many[np.ndarray],
    chances: torch.Tensor,
    stop_ids: Collection[int],
    vocab_size: int,
    top_p: float = 1.0,
) -> list[np.ndarray]:
    """What the model writes after each prompt: up to T tokens, ending with the first of stop_ids.

    prompts: ids, each of one token or more. chances (rows, T) float64 in [0, 1): token t of a row is the first id
    below vocab_size whose cumulated probability, in the `nucleus` of top_p, exceeds chances[row, t]. Rows that have
    ended are dropped from the batch once they are half of it, where the cache can.
    """
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padded on the left, which the mask tells: by place, not by id
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt)
        mask[row, longest - len(prompt) :] = 1
    ids, mask, chances = ids.to(model.device), mask.to(model.device), chances.to(model.device)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=model.device)
    written = torch.zeros(chances.shape, dtype=torch.int64, device=model.device)
    going = torch.arange(len(prompts), device=model.device)  # the rows that are still run
    ended, cache = torch.zeros_like(going, dtype=torch.bool), None
    for place, chance in enumerate(chances.T):
        output = model(ids, attention_mask=mask, use_cache=True, logits_to_keep=1, **{CACHE: cache})
        cache = output[CACHE]
        rising = nucleus(output.logits[:, -1, :vocab_size].double().softmax(-1), top_p).cumsum(-1)
        goal = chance[going, None] * rising[:, -1:]
        ids = torch.searchsorted(rising, goal, right=True).clamp(max=vocab_size - 1)
        written[going, place] = ids[:, 0]
        ended |= torch.isin(ids[:, 0], stops)
        num_ended = int(ended.sum())
        if num_ended == len(going):
            break
        mask = torch.cat([mask, mask.new_ones(len(going), 1)], 1)
        if 2 * num_ended >= len(going) and all(hasattr(layer, "batch_select_indices") for layer in cache.layers):
            left = (~ended).nonzero()[:, 0]
            cache.batch_select_indices(left)
            ids, mask, going, ended = ids[left], mask[left], going[left], ended[left]
    rows = written[:, : place + 1].cpu().numpy()
    ends = np.isin(rows, sorted(stop_ids))
    return [row[: int(end.argmax()) + 1] if end.any() else row for row, end in zip(rows, ends)]

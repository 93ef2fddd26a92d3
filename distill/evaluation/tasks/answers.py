"""What a model answers in examples of generated tasks, many at once.

Twin: tests/distill/evaluation/tasks/test_task.py.
"""

from collections.abc import Iterable

import torch

from ..scoring import fitting
from ..subject import Subject
from .example import Example


@torch.no_grad()
def answers(subject: Subject, examples: list[Example]) -> list[dict[int, int]]:
    """For each example the token that the model expects most at every position of an answer, the tokens before given.

    An answer of several tokens is right here exactly where greedy decoding gives it.
    """
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index].ids))
    said: list[dict[int, int]] = [{} for _ in examples]
    while order:
        longest = len(examples[order[0]].ids)
        batch = fitting(subject, order, longest, lambda rows: len(_positions(examples, rows)))
        order = order[len(batch) :]
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        for row, index in enumerate(batch):
            ids[row, : len(examples[index].ids)] = torch.tensor(examples[index].ids)
        wanted = sorted(_positions(examples, batch))
        keep = torch.tensor(wanted, device=subject.device) - 1  # position i says what comes at i + 1
        logits = subject.model(ids.to(subject.device), use_cache=False, logits_to_keep=keep).logits
        for row, index in enumerate(batch):
            choices = examples[index].choices
            seen = logits[row, :, list(choices)] if choices else logits[row]
            best = dict(zip(wanted, seen.argmax(-1).tolist()))
            for at in examples[index].positions:
                said[index][at] = choices[best[at]] if choices else best[at]
    return said


def _positions(examples: list[Example], rows: Iterable[int]) -> set[int]:
    return {at for row in rows for at in examples[row].positions}

"""Models whose score on any task is known: one that looks ahead, and one that always says the same."""

from types import SimpleNamespace

import torch
from rigged_model import Rigged

from distill.evaluation.subject import Subject
from distill.evaluation.tasks.words import word_tokenizer

SIZE = 256
TOKENIZER = word_tokenizer(SIZE)


class Oracle(torch.nn.Module):
    """Says at every position the very token that comes next in its input."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=vocab_size))

    def forward(self, ids, use_cache, logits_to_keep):
        following = ids[:, (logits_to_keep + 1).clamp(max=ids.shape[1] - 1)]
        return SimpleNamespace(logits=torch.nn.functional.one_hot(following, self.vocab_size).float())


def subject(model: torch.nn.Module, tokenizer=TOKENIZER) -> Subject:
    return Subject("made up", model, tokenizer, torch.device("cpu"), torch.float32, 4096)


def oracle(tokenizer=TOKENIZER) -> Subject:
    return subject(Oracle(len(tokenizer)), tokenizer)


def constant(token: int) -> Subject:
    return subject(Rigged(token, SIZE))

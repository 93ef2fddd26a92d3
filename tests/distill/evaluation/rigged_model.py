"""A subject whose model always expects the same token, whatever it reads."""

from types import SimpleNamespace

import torch

from distill.evaluation.subject import Subject


class Rigged(torch.nn.Module):
    def __init__(self, token: int, vocab_size: int):
        super().__init__()
        self.token, self.vocab_size = token, vocab_size
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=vocab_size))

    def forward(self, ids, use_cache, logits_to_keep):
        logits = torch.zeros(*ids.shape, self.vocab_size)
        logits[..., self.token] = 9.0
        return SimpleNamespace(logits=logits[:, logits_to_keep])


def always(token: str, like: Subject) -> Subject:
    """A subject with the tokenizer of `like` that always says `token`."""
    ids = like.tokenizer(token, add_special_tokens=False)["input_ids"]
    assert len(ids) == 1
    return Subject("rigged", Rigged(ids[0], 1024), like.tokenizer, like.device, like.dtype, 4096)

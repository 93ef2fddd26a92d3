"""The text a model is measured on, as windows of token ids. Twin: tests/distill/evaluation/test_windows.py."""

import torch

from convert.progress import progress
from convert.text import tokenise, write_text
from convert.text_files import read_documents
from deltanet_errors import UserError

from .subject import Subject

SELF, NONE = "self", "none"
WINDOW, TOKENS = 1024, 16384


def read_windows(
    text: str, writer: Subject, *, tokens: int = TOKENS, window: int | None = None, longest: int, seed: int = 0
) -> torch.Tensor:
    """(windows, length) int64: `tokens` tokens of the file `text`, or as many that `writer` writes (`self`).

    Documents are taken evenly over the file and joined, each after the token that opens one. length is `window`, by
    default WINDOW or `longest`, the models' range, if that is shorter. Raises UserError for a window beyond the range
    and for a file that cannot be read or holds less than one window.
    """
    length = min(WINDOW, longest) if window is None else window
    if not 2 <= length <= longest:
        raise UserError(f"--window {length}: allowed is 2 to {longest}, the range of the model")
    if tokens < length:
        raise UserError(f"--tokens {tokens}: allowed is one window ({length} tokens) or more")
    count = tokens // length
    if text != SELF:
        return tokenise(writer.tokenizer, read_documents(text), count, length, f"--text {text}, --window {length}")
    with progress(f"{writer.name} writes text", count * (length - 1), "tokens") as advance:
        return write_text(writer.model, writer.tokenizer, count, length, seed, advance)

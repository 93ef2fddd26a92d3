"""Which token ids a checkpoint folder names outside of its vocabulary: a model has no embedding for them.

Of a source this is a note, since many name a padding token that no text holds; in what we publish it is a fault.
Twin: tests/convert/test_tokens.py.
"""

import json
from pathlib import Path

from deltanet_errors import UserError

GENERATION = "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def generation_settings(folder: Path) -> dict:
    """generation_config.json of a checkpoint folder, empty where there is none. Raises UserError if unreadable."""
    path = folder / GENERATION
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: unreadable: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: unreadable: holds a {type(settings).__name__}, not an object")
    return settings


def num_ids(tokenizer) -> int:
    """One more than the highest id; more than there are tokens where ids between have none."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def strangers(tokenizer, config, generation: dict) -> list[str]:
    """A line for each id that is none of the vocabulary of `config`, and for a tokenizer (or None) with more tokens."""
    found = []
    if tokenizer is not None and num_ids(tokenizer) > config.vocab_size:
        found.append(f"tokenizer: {num_ids(tokenizer)} tokens, but config.json has room for {config.vocab_size}")
    for where, settings in (("config.json", vars(config)), (GENERATION, generation)):
        for key in IDS:
            value = settings.get(key)
            for token in value if isinstance(value, list) else [value]:
                if token is not None and (type(token) is not int or not -1 <= token < config.vocab_size):
                    found.append(f"{where}: {key} is {token!r}; the vocabulary has {config.vocab_size}")
    return found

"""What generated tasks are written with: whole words of a tokenizer, each a single token.

A vocabulary as small as a hundred words will do, so the tasks run on any model that has words at all, and a tokenizer
made of nothing but words (`word_tokenizer`) trains models from scratch.
Twin: tests/distill/evaluation/tasks/test_words.py.
"""

import functools
import itertools
import random
import re
from dataclasses import dataclass

from convert.tokens import num_ids
from deltanet_errors import UserError

END = "<end>"
DIGITS = tuple("0123456789")
OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
SYMBOLS = (*DIGITS, *OPERATORS, "]", "=")
LETTERS = ("bdfgklmnprstvz", "aeiou")
_WORD = re.compile("[^\\W\\d_]+")
_MARKERS = ("Ġ", "▁")  # how byte-level and sentencepiece vocabularies write the blank before a word


@dataclass(frozen=True)
class Vocabulary:
    """words: ids of whole words, in the tokenizer's order. opening: what the tokenizer puts before every text.
    symbols: text -> ids of the symbols of ListOps."""

    words: tuple[int, ...]
    opening: tuple[int, ...]
    symbols: dict[str, tuple[int, ...]]

    def draw(self, rng: random.Random, count: int, task: str) -> list[int]:
        """`count` different words. Raises UserError where there are not as many."""
        self.need(count, task)
        return rng.sample(self.words, count)

    def need(self, count: int, task: str) -> None:
        """Raises UserError for fewer than `count` words."""
        if len(self.words) < count:
            raise UserError(f"task {task}: needs {count} words of one token, the tokenizer has {len(self.words)}")


def opening_ids(tokenizer) -> list[int]:
    """What the tokenizer itself puts before a text; [] for many."""
    own, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    for first in range(len(own) - len(bare) + 1):
        if own[first : first + len(bare)] == bare:
            return own[:first]
    return []


def vocabulary(tokenizer, size: int | None = None) -> Vocabulary:
    """The words of a tokenizer among its first `size` ids (None: all)."""
    return _vocabulary(tokenizer, num_ids(tokenizer) if size is None else size)


@functools.lru_cache(maxsize=8)
def _vocabulary(tokenizer, size: int) -> Vocabulary:
    special = set(tokenizer.all_special_ids)
    tokens = {
        index: token
        for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        if index < size and index not in special
    }
    marked = {index: token[1:] for index, token in tokens.items() if token.startswith(_MARKERS)}
    words = tuple(index for index, token in (marked or tokens).items() if _WORD.fullmatch(token))
    blank = " " if marked else ""
    symbols = {}
    for symbol in SYMBOLS:
        ids = tokenizer(blank + symbol, add_special_tokens=False)["input_ids"]
        symbols[symbol] = tuple(ids)
    return Vocabulary(words, tuple(opening_ids(tokenizer)), symbols)


def word_tokenizer(size: int):
    """A tokenizer of `size` tokens for models that learn nothing but tasks: an end, the symbols of ListOps, and made-up
    words, split at blanks. Raises UserError for a size that leaves no words or has no spellings."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    syllables = ["".join(pair) for pair in itertools.product(*LETTERS)]
    spellings = itertools.chain.from_iterable(
        ("".join(parts) for parts in itertools.product(syllables, repeat=length)) for length in (1, 2, 3)
    )
    fixed = (END, *SYMBOLS)
    most = len(fixed) + sum(len(syllables) ** length for length in (1, 2, 3))
    if not len(fixed) < size <= most:
        raise UserError(f"a vocabulary of {size} words: allowed is {len(fixed) + 1} to {most:,}")
    names = [*fixed, *itertools.islice(spellings, size - len(fixed))]
    backend = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token=END))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END, unk_token=END)

"""Words out of tokenizers."""

import pytest
from transformers import AutoTokenizer

from deltanet_errors import UserError
from distill.evaluation.tasks.words import END, SYMBOLS, vocabulary, word_tokenizer
from recipes import __path__ as recipes


def test_a_tokenizer_of_words_reads_back_what_it_writes():
    tokenizer = word_tokenizer(100)
    assert len(tokenizer) == 100
    ids = list(range(1, 100))
    assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids
    assert tokenizer.eos_token == tokenizer.pad_token == END
    known = vocabulary(tokenizer)
    assert len(known.words) == 100 - 1 - len(SYMBOLS)
    assert known.opening == ()
    assert all(len(known.symbols[symbol]) == 1 for symbol in SYMBOLS)


def test_words_of_a_pretrained_tokenizer_are_whole_words_of_one_token():
    tokenizer = AutoTokenizer.from_pretrained(f"{next(iter(recipes))}/demo")
    words = vocabulary(tokenizer).words
    assert len(words) > 200
    for word in words[:: len(words) // 50]:
        text = tokenizer.decode([word])
        assert text.startswith(" ")
        assert text[1:].isalpha()
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == [word]


def test_only_ids_that_the_model_has_are_words():
    tokenizer = word_tokenizer(100)
    assert max(vocabulary(tokenizer, 60).words) == 59


@pytest.mark.parametrize("size", [0, 17, 10**9])
def test_a_vocabulary_without_words_or_spellings_is_refused(size):
    with pytest.raises(UserError, match=f"a vocabulary of {size} words: allowed is 18 to "):
        word_tokenizer(size)

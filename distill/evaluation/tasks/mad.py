"""Tasks like those of MAD (arXiv 2403.17844): recall and copying over very small vocabularies, many answers a row.

The mapping of keys to values is drawn anew for every row. Compression and memorization are left out: the first needs an
auto-encoder, the second asks for a fixed table that only training can give.
Twin: tests/distill/evaluation/tasks/test_mad.py.
"""

import random

from deltanet_errors import UserError

from .example import Example
from .task import Task
from .words import Vocabulary


def recall(
    rng: random.Random, vocabulary: Vocabulary, *, length: int = 128, symbols: int = 16, noise: float = 0.0
) -> Example:
    """Pairs of a key and its value, keys drawn again and again; every value whose key came before is an answer. Half of
    `symbols` are keys, half values. With `noise`, that share of the places holds one of as many other words. A row that
    comes to its end without an answer is made to ask for a key it has."""
    if length < 8 + len(vocabulary.opening) or symbols < 4 or not 0 <= noise < 1:
        raise UserError(f"task mad recall: length {length}, symbols {symbols}, noise {noise} make no row")
    vocabulary.need(2 * symbols if noise else symbols, "mad recall")
    keys, values = vocabulary.words[: symbols // 2], vocabulary.words[symbols // 2 : symbols]
    noises = vocabulary.words[symbols : 2 * symbols]
    table = {key: rng.choice(values) for key in keys}
    ids, seen, answers = list(vocabulary.opening), set(), []
    while len(ids) < length - 1:
        is_late = not answers and length - len(ids) < 6  # room for one more key and the question for it
        if not is_late and rng.random() < noise:
            ids.append(rng.choice(noises))
            continue
        key = rng.choice(sorted(seen) if is_late and seen else keys)
        ids += [key, table[key]]
        if key in seen:
            answers.append((len(ids) - 1, len(ids)))
        seen.add(key)
    return Example(tuple(ids), tuple(answers), guesses={"a value at random": 1 / len(values)})


def selective(
    rng: random.Random, vocabulary: Vocabulary, *, length: int = 256, items: int = 16, symbols: int = 14
) -> Example:
    """`items` words scattered among blanks, then a marker, and the words in their order."""
    room = length - len(vocabulary.opening) - items - 1
    if not 0 < items <= room or symbols < 2:
        raise UserError(f"task mad_copy: {items} words of {symbols} symbols do not fit into {length} tokens")
    vocabulary.need(symbols + 2, "mad_copy")
    blank, marker, *known = vocabulary.words[: symbols + 2]
    words = rng.choices(known, k=items)
    spread = [blank] * room
    for at, word in zip(sorted(rng.sample(range(room), items)), words):
        spread[at] = word
    start = len(vocabulary.opening) + room + 1
    ids = (*vocabulary.opening, *spread, marker, *words)
    return Example(ids, tuple((at, at + 1) for at in range(start, len(ids))), guesses={"a word at random": 1 / symbols})


MAD = (
    Task(
        "mad_recall",
        "in-context recall over 16 symbols and more",
        {
            f"{length} tokens, {symbols} symbols": {"length": length, "symbols": symbols, "noise": 0.0}
            for length, symbols in ((128, 16), (256, 16), (256, 32), (512, 64))
        },
        recall,
    ),
    Task(
        "mad_noisy",
        "in-context recall with words between that mean nothing",
        {f"noise {noise:.0%}": {"length": 128, "symbols": 16, "noise": noise} for noise in (0.2, 0.4, 0.6)},
        recall,
    ),
    Task(
        "mad_copy",
        "selective copying",
        {
            f"{length} tokens, {items} words": {"length": length, "items": items, "symbols": 14}
            for length, items in ((64, 8), (256, 16), (512, 32))
        },
        selective,
    ),
)

"""Recall and length: passages that come again, needles, lists, pairs of keys and values, MQAR.

All are written with whole words of the model's vocabulary, drawn at random, so nothing can be known beforehand.
Twin: tests/distill/evaluation/tasks/test_recall.py.
"""

import random

from deltanet_errors import UserError

from .example import Example
from .task import Task
from .words import Vocabulary

SPAN, CUE = 32, 8  # of repeat: tokens of the passage, and those of its copy that are given away
PASSWORD = 5
SENTENCE = 12  # words of the sentence that surrounds a passkey again and again
A_VALUE = "a value, whatever its key"


def repeat(rng: random.Random, vocabulary: Vocabulary, *, distance: int = 64) -> Example:
    """A passage of SPAN random words and its copy, which begins `distance` tokens after it; counted from the copy's
    ninth word on."""
    if distance < SPAN:
        raise UserError(f"task repeat: distance {distance}; allowed is {SPAN} or more")
    vocabulary.need(SPAN, "repeat")
    words = rng.choices(vocabulary.words, k=distance)
    ids = (*vocabulary.opening, *words, *words[:SPAN])
    start = len(vocabulary.opening) + distance + CUE
    return Example(ids, tuple((at, at + 1) for at in range(start, len(ids))))


def needle(rng: random.Random, vocabulary: Vocabulary, *, length: int = 128, keys: int = 4, values: int = 1) -> Example:
    """Needles `marker key value` anywhere among random words; at the end `marker key` asks for one key's values, in any
    order."""
    needles, tail = keys * values, 2 + values
    hay = length - 3 * needles - tail - len(vocabulary.opening)
    if min(keys, values) < 1 or hay < needles:
        raise UserError(f"task needle: {keys} keys of {values} values do not fit into {length} tokens")
    marker, *drawn = vocabulary.draw(rng, 1 + keys + needles + SENTENCE, "needle")
    asked, held = drawn[:keys], drawn[keys : keys + needles]
    others = drawn[keys + needles :]
    order = rng.sample(range(needles), needles)
    gaps = sorted(rng.choices(range(hay + 1), k=needles))
    words, at = [], 0
    for gap, index in zip(gaps, order):
        words += [*rng.choices(others, k=gap - at), marker, asked[index % keys], held[index]]
        at = gap
    words += [*rng.choices(others, k=hay - at), marker, asked[0]]
    wanted = [held[index] for index in order if index % keys == 0]
    start = len(vocabulary.opening) + len(words)
    legal = {start + i: frozenset(wanted[i:]) for i in range(values)}
    share = sum((values - i) / (needles - i) for i in range(values)) / values
    answers = tuple((start + i, start + i + 1) for i in range(values))
    return Example((*vocabulary.opening, *words, *wanted), answers, legal, guesses={A_VALUE: share})


def passkey(rng: random.Random, vocabulary: Vocabulary, *, length: int = 128) -> Example:
    """`marker` and PASSWORD words somewhere between copies of one sentence; at the end `marker` asks for all of them.
    With a single passkey, copying the only words that are no sentence is enough: it shows memory, not its address."""
    hay = length - 2 * (1 + PASSWORD) - len(vocabulary.opening)
    if hay < SENTENCE:
        raise UserError(f"task passkey: length {length} leaves no room for a sentence of {SENTENCE} words")
    marker, *drawn = vocabulary.draw(rng, 1 + PASSWORD + SENTENCE, "passkey")
    key, sentence = drawn[:PASSWORD], drawn[PASSWORD:]
    filler = [sentence[i % SENTENCE] for i in range(hay)]
    gap = rng.randrange(hay + 1)
    ids = (*vocabulary.opening, *filler[:gap], marker, *key, *filler[gap:], marker, *key)
    return Example(ids, ((len(ids) - PASSWORD, len(ids)),))


def copying(rng: random.Random, vocabulary: Vocabulary, *, items: int = 8) -> Example:
    """A list of random words, a marker, and the list again."""
    if items < 1:
        raise UserError(f"task copying: items {items}; allowed is 1 or more")
    vocabulary.need(3, "copying")
    marker = rng.choice(vocabulary.words)
    words = rng.choices([word for word in vocabulary.words if word != marker], k=items)
    start = len(vocabulary.opening) + items + 1
    ids = (*vocabulary.opening, *words, marker, *words)
    return Example(ids, tuple((at, at + 1) for at in range(start, len(ids))))


def induction(rng: random.Random, vocabulary: Vocabulary, *, length: int = 32) -> Example:
    """Random words, among them once a trigger; the trigger comes again at the end and asks what followed it."""
    room = length - len(vocabulary.opening) - 2
    if room < 3:
        raise UserError(f"task induction: length {length} is too short")
    vocabulary.need(3, "induction")
    trigger = rng.choice(vocabulary.words)
    words = rng.choices([word for word in vocabulary.words if word != trigger], k=room)
    at = rng.randrange(room - 1)
    words[at] = trigger
    ids = (*vocabulary.opening, *words, trigger, words[at + 1])
    return Example(ids, ((len(ids) - 1, len(ids)),))


def lookup(rng: random.Random, vocabulary: Vocabulary, *, pairs: int = 8) -> Example:
    """`key value` so many times, a marker, and one of the keys asks for its value."""
    if pairs < 1:
        raise UserError(f"task lookup: pairs {pairs}; allowed is 1 or more")
    marker, *drawn = vocabulary.draw(rng, 1 + 2 * pairs, "lookup")
    asked = rng.randrange(pairs)
    ids = (*vocabulary.opening, *drawn, marker, drawn[2 * asked], drawn[2 * asked + 1])
    return Example(ids, ((len(ids) - 1, len(ids)),), guesses={A_VALUE: 1 / pairs})


def mqar(
    rng: random.Random, vocabulary: Vocabulary, *, length: int = 64, pairs: int = 4, power: float = 0.01
) -> Example:
    """Multi-query associative recall (arXiv 2312.04927): `key value` so many times, then every key once more, each
    asking for its value, in slots of two tokens that are drawn with a probability proportional to slot^(power - 1); all
    else holds a blank word. Keys and values are different halves of the words, without repetition.

    As in the original the value does not follow the key that asks, so that no question is easier for the earlier ones:
    without the keys, no guess is right more often than once in `pairs`.
    """
    slots = (length - len(vocabulary.opening) - 2 * pairs) // 2
    if pairs < 1 or slots < pairs:
        raise UserError(f"task mqar: {pairs} pairs do not fit into {length} tokens; allowed is up to a quarter")
    if not 0 <= power <= 1:
        raise UserError(f"task mqar: power {power}; allowed is 0 to 1")
    vocabulary.need(2 * pairs + 1, "mqar")
    blank, half = vocabulary.words[0], (len(vocabulary.words) + 1) // 2
    keys = rng.sample(vocabulary.words[1:half], pairs)
    values = rng.sample(vocabulary.words[half:], pairs)
    # The largest u^(1/w) draw without replacement in proportion to w.
    drawn = sorted(range(slots), key=lambda slot: -(rng.random() ** ((slot + 1) ** (1 - power))))[:pairs]
    order = rng.sample(range(pairs), pairs)
    tail = [blank] * (2 * slots)
    for slot, index in zip(drawn, order):
        tail[2 * slot] = keys[index]
    known = [word for pair in zip(keys, values) for word in pair]
    start = len(vocabulary.opening) + 2 * pairs + 1
    answers = tuple((start + 2 * slot, start + 2 * slot + 1) for slot in sorted(drawn))
    legal = {start + 2 * slot: frozenset((values[index],)) for slot, index in zip(drawn, order)}
    return Example((*vocabulary.opening, *known, *tail), answers, legal, guesses={A_VALUE: 1 / pairs})


RECALL = (
    Task(
        "repeat",
        "a passage of words comes again after a distance",
        {f"{d} back": {"distance": d} for d in (64, 128, 256, 448, 960, 1984, 4032)},
        repeat,
    ),
    Task(
        "needle",
        "the value of a key, hidden among random words",
        {
            f"{length} tokens, {keys} keys, {values} values": {"length": length, "keys": keys, "values": values}
            for length, keys, values in (
                (64, 1, 1),
                (64, 4, 1),
                (128, 4, 1),
                (128, 2, 2),
                (256, 8, 1),
                (512, 4, 2),
                *((length, 4, 1) for length in (1024, 2048, 4096, 8192)),
            )
        },
        needle,
    ),
    Task(
        "passkey",
        f"{PASSWORD} words, hidden between copies of one sentence",
        {f"{length} tokens": {"length": length} for length in (64, 128, 256, 512, 1024, 2048, 4096, 8192)},
        passkey,
    ),
    Task(
        "copying",
        "a list of words, once more",
        {f"{items} words": {"items": items} for items in (8, 16, 32, 64, 128)},
        copying,
    ),
    Task(
        "induction",
        "what followed the trigger",
        {f"{length} tokens": {"length": length} for length in (16, 32, 64, 128, 256, 512)},
        induction,
    ),
    Task(
        "lookup",
        "the value of one key of a list",
        {f"{pairs} pairs": {"pairs": pairs} for pairs in (4, 8, 16, 32, 64)},
        lookup,
    ),
    Task(
        "mqar",
        "the values of all keys, each asked once",
        {
            f"{length} tokens, {pairs} pairs": {"length": length, "pairs": pairs}
            for length, pairs in ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64))
        },
        mqar,
    ),
)

"""State tracking (arXiv 2411.12537): parity, sums modulo a number, products of permutations, asked at the end only.

A linear state with eigenvalues in [0, 1] cannot hold these over length; with write strengths up to 2 it can hold
parity. Floors are one over the number of states. Twin: tests/distill/evaluation/tasks/test_states.py.
"""

import itertools
import random

from deltanet_errors import UserError

from .example import Example
from .task import Task
from .words import Vocabulary


def modular(rng: random.Random, vocabulary: Vocabulary, *, length: int = 16, modulus: int = 2) -> Example:
    """`length` numbers below `modulus`, each a word, a marker, and their sum modulo `modulus`. 2 is parity."""
    if length < 1 or modulus < 2:
        raise UserError(f"task modular: length {length}, modulus {modulus}; allowed is 1 and 2 or more")
    vocabulary.need(modulus + 1, "modular")
    marker, *words = vocabulary.words[: modulus + 1]
    numbers = rng.choices(range(modulus), k=length)
    return _asked(vocabulary, [words[n] for n in numbers], marker, words[sum(numbers) % modulus], words)


def permutations(rng: random.Random, vocabulary: Vocabulary, *, length: int = 8, elements: int = 3) -> Example:
    """`length` permutations of `elements` things, each a word, a marker, and what they do one after the other."""
    if length < 1 or not 2 <= elements <= 5:
        raise UserError(f"task permutations: length {length} of {elements} elements; allowed is 1 or more of 2 to 5")
    group = list(itertools.permutations(range(elements)))
    vocabulary.need(len(group) + 1, "permutations")
    marker, *words = vocabulary.words[: len(group) + 1]
    drawn = rng.choices(group, k=length)
    product = tuple(range(elements))
    for one in drawn:
        product = tuple(one[place] for place in product)
    return _asked(vocabulary, [words[group.index(one)] for one in drawn], marker, words[group.index(product)], words)


def _asked(vocabulary: Vocabulary, text: list[int], marker: int, answer: int, states: list[int]) -> Example:
    ids = (*vocabulary.opening, *text, marker, answer)
    answers = ((len(ids) - 1, len(ids)),)
    return Example(ids, answers, choices=tuple(states), guesses={"a state at random": 1 / len(states)})


LENGTHS = (8, 16, 40, 128, 256)
STATES = (
    Task(
        "parity",
        "whether the count of ones is odd",
        {f"{length} words": {"length": length, "modulus": 2} for length in LENGTHS},
        modular,
    ),
    Task(
        "modular",
        "a sum modulo 5",
        {f"{length} words": {"length": length, "modulus": 5} for length in LENGTHS},
        modular,
    ),
    Task(
        "permutations",
        "the product of permutations of 3 things",
        {f"{length} words": {"length": length, "elements": 3} for length in LENGTHS},
        permutations,
    ),
)

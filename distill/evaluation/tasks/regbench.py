"""In-context languages after RegBench (arXiv 2401.12973): strings of one random automaton, which the next symbol obeys.

    4 to 12 states, 4 to 18 symbols, 1 to 3 edges a state to different states, none to itself, all states accepting;
    a row is 10 to 19 strings of 1 to 49 symbols. Unlike there, automata are not minimised and rows may be capped.

A symbol is right where the automaton allows it in that state. Most of that is within reach of counting n-grams in the
row, so the guesses hold those. Twin: tests/distill/evaluation/tasks/test_regbench.py.
"""

import random
from collections import Counter, defaultdict

from deltanet_errors import UserError

from .example import Example
from .task import Task
from .words import Vocabulary

SYMBOLS = 18
STATES, ALPHABET, EDGES = (4, 12), (4, SYMBOLS), (1, 3)
ORDERS = (2, 3, 4)
Edges = list[dict[int, int]]


def draw_automaton(rng: random.Random) -> Edges:
    """Per state its edges, symbol -> next state; symbols from 0 to SYMBOLS - 1."""
    states = rng.randint(*STATES)
    alphabet = rng.sample(range(SYMBOLS), rng.randint(*ALPHABET))
    edges: Edges = []
    for state in range(states):
        targets = rng.sample([other for other in range(states) if other != state], rng.randint(*EDGES))
        edges.append(dict(zip(rng.sample(alphabet, len(targets)), targets)))
    return edges


def ngram_guesses(strings: list[list[int]], orders: tuple[int, ...] = ORDERS) -> dict[int, list[int | None]]:
    """For each order n what the last n - 1 symbols were most often followed by so far, or fewer where they are new; one
    guess a symbol, string after string, None where nothing was seen yet."""
    found: dict[int, list[int | None]] = {order: [] for order in orders}
    counts: defaultdict[tuple, Counter] = defaultdict(Counter)
    for string in strings:
        for at, symbol in enumerate(string):
            for order in orders:
                longest = min(order - 1, at)
                histories = (tuple(string[at - size : at]) for size in range(longest, -1, -1))
                known = next((counts[history] for history in histories if history in counts), None)
                found[order].append(known.most_common(1)[0][0] if known else None)
            for size in range(min(max(orders) - 1, at) + 1):
                counts[tuple(string[at - size : at])][symbol] += 1
    return found


def regular_language(
    rng: random.Random, vocabulary: Vocabulary, *, strings: int = 19, longest: int = 49, length: int = 1024
) -> Example:
    """10 to `strings` strings of 1 to `longest` symbols of one automaton, cut at `length` tokens; every symbol is an
    answer, separators are not."""
    if strings < 1 or longest < 1 or length < 4 + len(vocabulary.opening):
        raise UserError(f"task regbench: {strings} strings of up to {longest} symbols in {length} tokens make no row")
    vocabulary.need(SYMBOLS + 1, "regbench")
    separator, *words = vocabulary.words[: SYMBOLS + 1]
    edges = draw_automaton(rng)
    ids = list(vocabulary.opening) or [separator]
    answers, legal, kept, allowed = [], {}, [], []
    for _ in range(rng.randint(min(10, strings), strings)):
        state, string = 0, []
        for _ in range(rng.randint(1, longest)):
            if len(ids) >= length:
                break
            symbol = rng.choice(sorted(edges[state]))
            legal[len(ids)] = frozenset(words[other] for other in edges[state])
            answers.append((len(ids), len(ids) + 1))
            allowed.append(set(edges[state]))
            ids.append(words[symbol])
            string.append(symbol)
            state = edges[state][symbol]
        kept.append(string)
        if len(ids) >= length:
            break
        ids.append(separator)
    guesses = {"a symbol at random": sum(map(len, allowed)) / SYMBOLS / len(answers)}
    for order, guessed in ngram_guesses(kept).items():
        guesses[f"{order}-grams of the row"] = sum(g in right for g, right in zip(guessed, allowed)) / len(answers)
    return Example(tuple(ids[:length]), tuple(answers), legal, guesses=guesses)


REGBENCH = (
    Task(
        "regbench",
        "the next symbol of an automaton seen only in the row",
        {f"{length} tokens": {"strings": 19, "longest": 49, "length": length} for length in (128, 256, 512, 1024)},
        regular_language,
    ),
)

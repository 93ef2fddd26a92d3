"""ListOps as Long Range Arena has it (arXiv 1804.06028, 2011.04006): nested MIN, MAX, MED and SM over digits.

    [MAX 2 9 [MIN 4 7 ] 0 ] = 9        MED is the median rounded down, SM the sum modulo 10

A node above the deepest level is an operator with probability 0.25, else a digit; operators have 2 to 10 arguments.
Trees are drawn until one has the wanted length. Much of the score needs no nesting, so the guesses climb a ladder: the
root operator alone, with its own digits, and right down to some depth.
Twin: tests/distill/evaluation/tasks/test_listops.py.
"""

import random
from dataclasses import dataclass

from deltanet_errors import UserError

from .example import Example
from .task import Task
from .words import DIGITS, OPERATORS, SYMBOLS, Vocabulary

OPERATOR_SHARE = 0.25
FEWEST, MOST = 2, 10  # arguments
USUAL = {"[MIN": 0, "[MAX": 9, "[MED": 4, "[SM": 0}  # what an operator most often gives
LADDER = (0, 1, 2, 3)
TRIES = 20_000
DEEPEST = 100


@dataclass(frozen=True)
class Tree:
    """An operator over digits and trees."""

    operator: str
    arguments: tuple["int | Tree", ...]

    def symbols(self) -> list[str]:
        """The tree as it is written: operator, arguments, bracket."""
        inner = [[str(part)] if isinstance(part, int) else part.symbols() for part in self.arguments]
        return [self.operator, *(symbol for part in inner for symbol in part), "]"]

    def value(self, levels: int | None = None) -> int:
        """What it gives, 0 to 9. levels: how many levels of operators below this one are read; what lies deeper counts
        as the usual value of its operator, None reads everything."""
        numbers = [part if isinstance(part, int) else _below(part, levels) for part in self.arguments]
        return apply(self.operator, numbers)

    def from_own_digits(self) -> int:
        """A guess from the operator and its own digits, as if the trees below were not there."""
        digits = [part for part in self.arguments if isinstance(part, int)]
        return apply(self.operator, digits) if digits else USUAL[self.operator]


def _below(tree: Tree, levels: int | None) -> int:
    if levels == 0:
        return USUAL[tree.operator]
    return tree.value(None if levels is None else levels - 1)


def apply(operator: str, numbers: list[int]) -> int:
    """The value of an operator over digits."""
    if operator == "[MIN":
        return min(numbers)
    if operator == "[MAX":
        return max(numbers)
    if operator == "[SM":
        return sum(numbers) % 10
    middle, ranked = len(numbers) // 2, sorted(numbers)
    return ranked[middle] if len(numbers) % 2 else (ranked[middle - 1] + ranked[middle]) // 2


def draw_tree(rng: random.Random, depth: int, room: int) -> tuple[Tree, int] | None:
    """A random tree of at most `depth` levels and its number of symbols; None once it has more than `room`."""
    arguments: list[int | Tree] = []
    operator, used = rng.choice(OPERATORS), 2
    for _ in range(rng.randint(FEWEST, MOST)):
        if depth > 1 and rng.random() < OPERATOR_SHARE:
            found = draw_tree(rng, depth - 1, room - used)
            if found is None:
                return None
            arguments.append(found[0])
            used += found[1]
        else:
            arguments.append(rng.randrange(10))
            used += 1
        if used > room:
            return None
    return Tree(operator, tuple(arguments)), used


def listops(
    rng: random.Random, vocabulary: Vocabulary, *, shortest: int = 10, longest: int = 40, depth: int = 10
) -> Example:
    """One tree of `shortest` to `longest` symbols and at most `depth` levels of operators, `=`, and its value."""
    if not 1 <= depth <= DEEPEST or not 4 <= shortest <= longest:
        raise UserError(
            f"task listops: {shortest} to {longest} symbols in {depth} levels; allowed is 4 symbols or more, the "
            f"fewest first, in 1 to {DEEPEST} levels"
        )
    if len(set(vocabulary.symbols.values()) - {()}) < len(SYMBOLS):
        raise UserError("task listops: the tokenizer writes two of the symbols alike, or one not at all")
    for _ in range(TRIES):
        found = draw_tree(rng, depth, longest)
        if found is not None and found[1] >= shortest:
            return as_example(found[0], vocabulary)
    raise UserError(f"task listops: trees of {shortest} to {longest} symbols in {depth} levels are too rare")


def as_example(tree: Tree, vocabulary: Vocabulary) -> Example:
    """The tree as tokens, its value to be picked among the ten digits."""
    value = tree.value()
    text = [token for symbol in (*tree.symbols(), "=") for token in vocabulary.symbols[symbol]]
    answer = vocabulary.symbols[str(value)]
    start = len(vocabulary.opening) + len(text)
    digits = [vocabulary.symbols[digit] for digit in DIGITS]
    guesses = {
        "the root operator alone": float(USUAL[tree.operator] == value),
        "the root operator and its digits": float(tree.from_own_digits() == value),
    }
    partial = {f"reading {depth + 1} deep": float(tree.value(depth) == value) for depth in LADDER}
    return Example(
        (*vocabulary.opening, *text, *answer),
        ((start, start + len(answer)),),
        choices=tuple(ids[0] for ids in digits) if all(len(ids) == 1 for ids in digits) else (),
        guesses=guesses,
        partial=partial,
    )


LISTOPS = (
    Task(
        "listops",
        "nested MIN, MAX, MED and SM over digits",
        {
            f"{shortest} to {longest} symbols": {"shortest": shortest, "longest": longest, "depth": 10}
            for shortest, longest in ((4, 20), (20, 60), (60, 200), (200, 500), (500, 2000))
        },
        listops,
    ),
)

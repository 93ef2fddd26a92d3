"""One example of a generated task: tokens, which of them are answers, and what a guesser would get right.

Twin: tests/distill/evaluation/tasks/test_example.py.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

CONTEXT, COMMONEST = "a word of the text so far", "always the same word"


@dataclass(frozen=True)
class Example:
    """ids: the tokens that the model reads. answers: spans [start, stop) of positions, start at least 1; an answer is
    right where each of its tokens is. legal: position -> the tokens that are right there, among which ids[position]
    need not be, so that an answer may be asked for without standing in the text; elsewhere ids[position] alone is.
    choices: where given, the only tokens that an answer may be picked from.
    guesses: a strategy that needs no understanding -> the share of the answers it gets right, on average.
    partial: the same of strategies that understand a part: floors for whoever claims to understand more than that part,
    but not among those that a model must be above to have shown anything.
    """

    ids: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]
    legal: Mapping[int, frozenset[int]] = field(default_factory=dict)
    choices: tuple[int, ...] = ()
    guesses: Mapping[str, float] = field(default_factory=dict)
    partial: Mapping[str, float] = field(default_factory=dict)

    def right(self, position: int) -> frozenset[int]:
        """The tokens that are right at a position."""
        return self.legal.get(position) or frozenset((self.ids[position],))

    def target(self, position: int) -> int:
        """The token to learn at a position: the one that stands there, if it is right."""
        right = self.right(position)
        return self.ids[position] if self.ids[position] in right else min(right)

    def share_right(self, said: Mapping[int, int]) -> float:
        """The share of the answers that are right, where `said` holds a token for each of their positions."""
        good = sum(all(said[at] in self.right(at) for at in range(*span)) for span in self.answers)
        return good / len(self.answers)

    @property
    def positions(self) -> list[int]:
        """All positions of answers, rising."""
        return [at for span in self.answers for at in range(*span)]


def floors(examples: Sequence[Example]) -> dict[str, float]:
    """What each strategy reaches on these very examples: theirs, a token of the text so far taken at random, and the
    one token that, always said, is right most often."""
    found = means([example.guesses for example in examples])
    found[CONTEXT] = _mean([_from_context(example) for example in examples])
    found[COMMONEST] = commonest(examples)[1]
    return found


def means(shares: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every figure by name; where one is missing it counts as 0."""
    names = dict.fromkeys(name for share in shares for name in share)
    return {name: _mean([share.get(name, 0.0) for share in shares]) for name in names}


def commonest(examples: Sequence[Example]) -> tuple[int, float]:
    """The token that, always said, is right most often, and how often that is."""
    worth: Counter[int] = Counter()
    for example in examples:
        for span in example.answers:
            for token in frozenset.intersection(*(example.right(at) for at in range(*span))):
                worth[token] += 1 / len(example.answers)
    token, share = max(worth.items(), key=lambda item: (item[1], -item[0]), default=(0, 0.0))
    return token, share / len(examples)


def _from_context(example: Example) -> float:
    """What a token drawn from all before, anew for each, gets right on average."""
    seen: Counter[int] = Counter()
    chance, last = {}, 0
    for at in example.positions:
        seen.update(example.ids[last:at])
        last = at
        chance[at] = sum(seen[token] for token in example.right(at)) / at
    share = 0.0
    for span in example.answers:
        product = 1.0
        for at in range(*span):
            product *= chance[at]
        share += product
    return share / len(example.answers)


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values)

"""A generated task: levels of difficulty, examples from a seed, and a model's share of right answers beside the floors.

Example i of (task, split, seed, level) is a pure function of these five, so more examples are the same ones and some
more, and training and test never share a stream. Recipes are checked against the options here, so no torch is imported
before a model is asked (answers.py). Twin: tests/distill/evaluation/tasks/test_task.py.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from deltanet_errors import UserError, nearest

from ..result import TaskResult, mean
from .example import Example, floors, means
from .words import vocabulary

if TYPE_CHECKING:
    from ..subject import Subject

Options = Mapping[str, int | float | str]
NUM_SAMPLES = 3
TAIL = 60  # tokens of a sample's prompt that are shown


@dataclass(frozen=True)
class Task:
    """levels: label -> options of `make`, easiest first. make(rng, vocabulary, **options) -> Example, which raises
    UserError for options that cannot be; its keyword arguments with their defaults are the options there are."""

    name: str
    describe: str
    levels: Mapping[str, Options]
    make: Callable[..., Example]

    def examples(
        self,
        seed: int,
        n: int,
        level: str | Options,
        tokenizer,
        *,
        split: Literal["train", "test"] = "test",
        vocab_size: int | None = None,
    ) -> Iterator[Example]:
        """`n` examples of a level, given by its label or as options. vocab_size: how many ids the model knows.

        Raises UserError for an unknown level or option, and for a vocabulary that is too small.
        """
        options = self.options(level)
        words = vocabulary(tokenizer, vocab_size)
        shown = sorted(options.items())
        for index in range(n):
            yield self.make(random.Random(f"{self.make.__name__} {split} {seed} {shown} {index}"), words, **options)

    def options(self, level: str | Options) -> dict:
        """The options of a level, checked against those there are."""
        if isinstance(level, str):
            if level not in self.levels:
                raise UserError(f"task {self.name}: no level {level!r}; levels: {', '.join(self.levels)}")
            return dict(self.levels[level])
        allowed = self.make.__kwdefaults__ or {}
        for name, value in level.items():
            if name not in allowed:
                raise UserError(
                    f"task {self.name}: no option {name!r}{nearest(name, list(allowed))}; options: {', '.join(allowed)}"
                )
            wanted = (int, float) if isinstance(allowed[name], float) else type(allowed[name])
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise UserError(f"task {self.name}: {name} is {value!r}; such as {allowed[name]!r} is allowed")
        return allowed | {name: type(allowed[name])(value) for name, value in level.items()}

    def files(self, options: Options) -> list[Path]:
        """The files that its examples come from, if any."""
        return []

    def fitting(self, tokenizer, vocab_size: int, *, seed: int, max_context: int) -> list[str]:
        """The labels of the levels whose first example can be made and has at most `max_context` tokens.

        Raises UserError where there are none, saying why the easiest is not among them.
        """
        found, reasons = [], []
        for label in self.levels:
            try:
                (first,) = self.examples(seed, 1, label, tokenizer, vocab_size=vocab_size)
            except UserError as error:
                reasons.append(error)
                continue
            if len(first.ids) <= max_context:
                found.append(label)
            else:
                too_long = f"its level {label!r} takes {len(first.ids)} tokens; at most {max_context} are allowed"
                reasons.append(UserError(f"task {self.name}: {too_long}"))
        if not found:
            raise reasons[0]
        return found

    def run(self, subject: "Subject", *, seed: int, n: int, max_context: int) -> TaskResult:
        """The model's answers to `n` examples, spread evenly over the levels that fit into `max_context` tokens and the
        tokenizer's words (at least one of each). accuracy is the mean over examples of the share of right answers.

        Raises UserError where no level fits.
        """
        from .answers import answers

        found: dict[str, list[Example]] = {}
        fitting = self.fitting(subject.tokenizer, subject.vocab_size, seed=seed, max_context=max_context)
        for index, label in enumerate(fitting):
            count = max(n // len(fitting) + (index < n % len(fitting)), 1)
            made = self.examples(seed, count, label, subject.tokenizer, vocab_size=subject.vocab_size)
            found[label] = [example for example in made if len(example.ids) <= max_context]
        everything = [example for examples in found.values() for example in examples]
        said = answers(subject, everything)
        shares = [example.share_right(tokens) for example, tokens in zip(everything, said)]
        by_level, at = {}, 0
        for label, examples in found.items():
            by_level[label] = mean(shares[at : at + len(examples)]) | {"floors": floors(examples)}
            at += len(examples)
        samples = [_sample(subject.tokenizer, *pair) for pair in list(zip(everything, said))[:NUM_SAMPLES]]
        return TaskResult(
            self.name,
            **mean(shares),
            floors=floors(everything),
            by_level=by_level,
            samples=samples,
            partial_floors=means([example.partial for example in everything]),
        )


def _sample(tokenizer, example: Example, said: dict[int, int]) -> dict[str, str]:
    start, stop = example.answers[-1]
    return {
        "prompt": tokenizer.decode(example.ids[max(start - TAIL, 0) : start]),
        "answer": tokenizer.decode([example.target(at) for at in range(start, stop)]),
        "said": tokenizer.decode([said[at] for at in range(start, stop)]),
    }

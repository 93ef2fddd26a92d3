"""Standard sets out of jsonl files: the format is told by the keys of a row (docs/evaluate.md lists them).

A set gives one result or several, all from the same scores:
  NAME            cloze: the continuation is what the model says itself (greedily); choices: the likeliest option
  NAME_norm       choices: the likeliest option per character, so that short options have no advantage
  NAME_letters    choices as a question with lettered options, asked in every rotation: does it say what, or where?
Twin: tests/distill/evaluation/test_sets.py.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from convert.text_files import read_json_lines
from deltanet_errors import UserError

from .result import TaskResult, mean, share
from .scoring import Request, Score, encode, score
from .subject import Reader, Subject

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHOWN = 3
SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Cloze:
    """A text and the one continuation that is right."""

    context: str
    continuation: str

    @property
    def continuations(self) -> tuple[str, ...]:
        return (self.continuation,)


@dataclass(frozen=True)
class Choice:
    """A question and its options, each as it stands after the question; `gold` counts from 0."""

    context: str
    options: tuple[str, ...]
    gold: int
    question: str = ""

    @property
    def continuations(self) -> tuple[str, ...]:
        return self.options


Row = Cloze | Choice


@dataclass(frozen=True)
class StandardSet:
    """The rows of one file, all of one kind. It runs like a generated task, but `run` gives several results."""

    name: str
    rows: Sequence[Row] = field(repr=False)

    @property
    def results(self) -> tuple[str, ...]:
        """The names of what `run` gives."""
        endings = ("",) if isinstance(self.rows[0], Cloze) else ("", "_norm", "_letters")
        return tuple(self.name + ending for ending in endings)

    def run(
        self,
        subject: Subject,
        *,
        limit: int | None = None,
        advance: Callable[[float], None] = lambda amount: None,
    ) -> list[TaskResult]:
        """The results on the first `limit` rows. `advance(share)` tells how much of the work is done."""
        rows, plain = self.rows[:limit], self.requests(subject, limit)
        if isinstance(rows[0], Cloze):
            return [_cloze(self.name, rows, score(subject, plain, advance=lambda n: advance(n / len(plain))))]
        lettered = [request for row in rows for request in _lettered_requests(subject, row)]
        total = len(plain) + len(lettered)
        scores = score(subject, plain + lettered, advance=lambda n: advance(n / total))
        return [
            *_choices(self.name, rows, _grouped(scores, rows, lambda row: len(row.options))),
            _letters(self.name, rows, _grouped(scores[len(plain) :], rows, lambda row: len(row.options) ** 2)),
        ]

    def requests(self, reader: Reader | Subject, limit: int | None) -> list[Request]:
        """The continuations of the first `limit` rows. Raises UserError naming the row where one cannot be scored."""
        found = []
        for number, row in enumerate(self.rows[:limit], 1):
            try:
                found += [encode(reader, row.context, continuation) for continuation in row.continuations]
            except UserError as error:
                raise UserError(f"{self.name}, row {number}: {error}") from None
        return found


def read_set(path: str | Path) -> StandardSet:
    """The set in a jsonl file; its name is the file's. Raises UserError naming file and line for an unreadable file, a
    row of no known format, and a file without rows or with rows of two kinds."""
    path = Path(path)
    rows: list[Row] = []
    for place, row in read_json_lines(path):
        try:
            rows.append(_row(row))
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
        if type(rows[-1]) is not type(rows[0]):
            raise UserError(f"{place}: a row of another kind than the first; give each kind a file of its own")
    if not rows:
        raise UserError(f"{path}: no rows in it")
    return StandardSet(path.stem, rows)


def _row(row: object) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    for keys, read in FORMATS.items():
        if set(keys) <= row.keys():
            read_row = read(row)
            _check(read_row)
            return read_row
    known = "; ".join(", ".join(keys) for keys in FORMATS)
    raise ValueError(f"no known format has the keys {', '.join(row)}; known: {known}")


def _check(row: Row) -> None:
    if not all(text.strip() for text in (row.options if isinstance(row, Choice) else (row.continuation,))):
        raise ValueError("a continuation or an option is empty")
    if isinstance(row, Choice):
        if not 2 <= len(row.options) <= len(LETTERS):
            raise ValueError(f"{len(row.options)} options; allowed: 2 to {len(LETTERS)}")
        if not 0 <= row.gold < len(row.options):
            raise ValueError(f"the right option is number {row.gold} of {len(row.options)}, counted from 0")


def _text(row: dict, key: str) -> str:
    return _as_text(row[key], key)


def _as_text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {json.dumps(value)[:SHOWN_CHARACTERS]}; allowed is text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds half of a surrogate pair, which is no character") from None
    return value


def _texts(row: dict, key: str) -> list[str]:
    if not isinstance(row.get(key), list):
        raise ValueError(f"{key} is {json.dumps(row.get(key))[:SHOWN_CHARACTERS]}; allowed is a list of texts")
    return [_as_text(value, f"{key}[{index}]") for index, value in enumerate(row[key])]


def _number(row: dict, key: str) -> int:
    """A whole number, also as text."""
    value = row[key]
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not (is_whole or re.fullmatch(r"-?[0-9]{1,9}", str(value))):
        raise ValueError(f"{key} is {json.dumps(value)[:SHOWN_CHARACTERS]}; allowed is the number of the right option")
    return int(value)


def _joined(context: str, continuation: str) -> str:
    """The continuation with a space before it, unless one is there already or the context ends a line."""
    has_space = not context or context[-1].isspace() or continuation[:1].isspace()
    return continuation if has_space else " " + continuation


def _context_continuation(row: dict) -> Cloze:
    context = _text(row, "context")
    return Cloze(context, _joined(context, _text(row, "continuation")))


def _last_word(row: dict) -> Cloze:
    before, space, word = _text(row, "text").rstrip().rpartition(" ")
    if not space:
        raise ValueError("text has a single word, so nothing comes before the last one")
    return Cloze(before, " " + word)


def _options(question: str, options: Sequence[str], gold: int) -> Choice:
    """A question that says so is answered after `Answer:`, as the published prompts of PIQA and ARC have it."""
    context = question.rstrip()
    if context.startswith("Question:") and not context.endswith("Answer:"):
        context += "\nAnswer:"
    bare = question.strip().removeprefix("Question:").removesuffix("Answer:").strip()
    return Choice(context, tuple(_joined(context, option) for option in options), gold, bare)


def _question(row: dict) -> Choice:
    """ARC's rows (choices with text and label, answerKey) and MMLU's (choices, answer as number or letter)."""
    key = "answerKey" if "answerKey" in row else "answer"
    if isinstance(row["choices"], dict):
        options, labels = _texts(row["choices"], "text"), _texts(row["choices"], "label")
        if len(options) != len(labels):
            raise ValueError(f"choices has {len(options)} texts and {len(labels)} labels")
    else:
        options = _texts(row, "choices")
        labels = list(LETTERS[: len(options)])
    if isinstance(row[key], str) and row[key] not in labels:
        raise ValueError(f"{key} is {row[key]!r}; allowed: {', '.join(labels)}")
    gold = labels.index(row[key]) if isinstance(row[key], str) else _number(row, key)
    return _options(f"Question: {_text(row, 'question')}", options, gold)


FORMATS: dict[tuple[str, ...], Callable[[dict], Row]] = {
    ("context", "continuation"): _context_continuation,
    ("query", "choices", "gold"): lambda row: _options(
        _text(row, "query"), _texts(row, "choices"), _number(row, "gold")
    ),
    ("goal", "sol1", "sol2", "label"): lambda row: _options(
        f"Question: {_text(row, 'goal')}", (_text(row, "sol1"), _text(row, "sol2")), _number(row, "label")
    ),
    ("ctx", "endings", "label"): lambda row: _options(_text(row, "ctx"), _texts(row, "endings"), _number(row, "label")),
    ("question", "choices", "answerKey"): _question,
    ("question", "choices", "answer"): _question,
    ("text",): _last_word,
}


def _grouped(scores: Sequence[Score], rows: Sequence[Choice], size: Callable[[Choice], int]) -> list[list[float]]:
    """The log-likelihoods of each row, from the front of `scores`."""
    values, groups = iter(scores), []
    for row in rows:
        groups.append([next(values).log_likelihood for _ in range(size(row))])
    return groups


def _cloze(name: str, rows: Sequence[Cloze], scores: Sequence[Score]) -> TaskResult:
    right = sum(found.is_greedy for found in scores)
    counts = Counter(row.continuation.strip() for row in rows)
    guessed = 0.0
    for row in rows:
        words = {word.strip(".,;:!?\"'") for word in row.context.split()}
        guessed += (row.continuation.strip() in words) / max(len(words), 1)
    nats = -sum(found.log_likelihood for found in scores) / len(rows)
    return TaskResult(
        name,
        **share(right, len(rows)),
        floors={
            "the commonest answer": counts.most_common(1)[0][1] / len(rows),
            "a random word of the context": guessed / len(rows),
        },
        figures={"perplexity": math.exp(min(nats, 700.0))},
        samples=[
            {"context": row.context[-160:], "answer": row.continuation.strip(), "correct": found.is_greedy}
            for row, found in zip(rows[:SHOWN], scores)
        ],
    )


def _choices(name: str, rows: Sequence[Choice], likelihoods: list[list[float]]) -> list[TaskResult]:
    lengths = [[len(option.strip()) for option in row.options] for row in rows]
    golds = [row.gold for row in rows]
    floors = {
        "chance": sum(1 / len(row.options) for row in rows) / len(rows),
        "always the first": golds.count(0) / len(rows),
        "always the last": sum(row.gold == len(row.options) - 1 for row in rows) / len(rows),
        "the shortest": _right([[-n for n in row] for row in lengths], golds),
        "the longest": _right(lengths, golds),
    }
    per_character = [[value / n for value, n in zip(*pair)] for pair in zip(likelihoods, lengths)]
    results = []
    for suffix, values in (("", likelihoods), ("_norm", per_character)):
        chosen = [_largest(row) for row in values]
        samples = [
            {"question": row.question, "answer": row.options[row.gold].strip(), "chosen": row.options[pick].strip()}
            for row, pick in zip(rows[:SHOWN], chosen)
        ]
        right = sum(pick == gold for pick, gold in zip(chosen, golds))
        results.append(TaskResult(name + suffix, **share(right, len(rows)), floors=floors, samples=samples))
    return results


def _largest(values: Sequence[float]) -> int:
    """The index of the largest value; of equals the first."""
    return max(range(len(values)), key=values.__getitem__)


def _right(values: Sequence[Sequence[float]], golds: Sequence[int]) -> float:
    return sum(_largest(row) == gold for row, gold in zip(values, golds)) / len(golds)


def _lettered_requests(subject: Subject, row: Choice) -> list[Request]:
    """Every letter after the question, for every rotation of the options; rotation r puts option i at (i + r) mod k."""
    size, requests = len(row.options), []
    for rotation in range(size):
        shown = [row.options[(place - rotation) % size].strip() for place in range(size)]
        lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, shown)]
        context = "\n".join([f"Question: {row.question}", *lines, "Answer:"])
        requests += [encode(subject, context, f" {letter}") for letter in LETTERS[:size]]
    return requests


def _letters(name: str, rows: Sequence[Choice], likelihoods: list[list[float]]) -> TaskResult:
    """Accuracy over rows and rotations, with the standard error over rows, since rotations of a row are kin."""
    said, asked, right_at = Counter(), Counter(), Counter()
    accuracies, steady = [], 0
    for row, values in zip(rows, likelihoods):
        size = len(row.options)
        picks = [_largest(values[turn * size : (turn + 1) * size]) for turn in range(size)]
        golds = [(row.gold + turn) % size for turn in range(size)]
        said.update(picks)
        asked.update(golds)
        right_at.update(gold for pick, gold in zip(picks, golds) if pick == gold)
        accuracies.append(sum(pick == gold for pick, gold in zip(picks, golds)) / size)
        steady += len({(pick - turn) % size for turn, pick in enumerate(picks)}) == 1
    total = sum(said.values())
    commonest, times = max(sorted(said.items()), key=lambda item: item[1])
    return TaskResult(
        f"{name}_letters",
        **mean(accuracies),
        floors={"always the same letter": sum(1 / len(row.options) for row in rows) / len(rows)},
        by_level={
            f"right answer at {LETTERS[place]}": share(right_at[place], count) | {"said": said[place] / total}
            for place, count in sorted(asked.items())
        },
        figures={
            f"says {LETTERS[commonest]}": times / total,
            "same answer in every order": steady / len(rows),
        },
    )

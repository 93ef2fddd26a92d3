"""The tasks of the Long Range Arena (arXiv 2011.04006) whose data are not generated: rows of a local file, one token a
byte or a pixel, then a marker and the class.

    lra_text       file: jsonl of {"text": string, "label": number}                   bytes, cut at `length`
    lra_retrieval  file: jsonl of {"text1": string, "text2": string, "label": number} both cut at half of `length`
    lra_image      file: npz of images (N, H, W) uint8 and labels (N,)                pixels, line by line

Labels are whole numbers from 0. `test` names a second file of the same kind to measure on; without it the last tenth of
`file` is kept for that. Differs from the original: a class is one more token instead of a pooled head.
Twin: tests/distill/evaluation/tasks/test_classification.py.
"""

import functools
import random
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from convert.text_files import encodable, read_json_lines
from deltanet_errors import UserError

from .example import Example
from .task import Options, Task
from .words import Vocabulary, vocabulary

A_CLASS = "a class at random"
HELD_OUT = 10  # one row in so many is for testing where no second file is given
BYTES = 256


@dataclass(frozen=True)
class Row:
    """parts: the bytes or pixels, 0 to 255, of each part. label: its class."""

    parts: tuple[bytes, ...]
    label: int


@dataclass(frozen=True)
class FileTask(Task):
    """A task of rows in a file. read(path) -> rows; layout: what the file holds, for people; make(rows, classes,
    vocabulary, **options) -> Example of one row."""

    read: Callable[[Path], list[Row]] = list
    layout: str = ""

    def files(self, options: Options) -> list[Path]:
        """The files that the options name. Raises UserError where there is none."""
        named = [Path(options[name]).expanduser() for name in ("file", "test") if options.get(name)]
        if not options.get("file"):
            raise UserError(f"task {self.name}: say its `file`, {self.layout}")
        for path in named:
            if not path.is_file():
                raise UserError(f"task {self.name}: {path}: no such file; it takes {self.layout}")
        return named

    def of(self, path: str) -> "FileTask":
        """The task on the rows of one file, at the other options' defaults. Raises UserError where there is none."""
        options = self.options({"file": path})
        self.files(options)
        return FileTask(f"{self.name}:{path}", self.describe, {"its rows": options}, self.make, self.read, self.layout)

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
        """At most `n` rows of the split, drawn without replacement in an order that follows from the seed. Raises
        UserError for a file that cannot be read as it should."""
        options = self.options(level)
        files, words = self.files(options), vocabulary(tokenizer, vocab_size)
        tables = [_rows(self.read, path, path.stat().st_mtime_ns) for path in files]
        for path, rows in zip(files, tables):
            if not rows:
                raise UserError(f"task {self.name}: {path}: no rows in it; it takes {self.layout}")
        classes = 1 + max(row.label for rows in tables for row in rows)
        first = tables[0]
        border = len(first) if len(tables) > 1 else len(first) - max(len(first) // HELD_OUT, 1)
        chosen = first[:border] if split == "train" else tables[1] if len(tables) > 1 else first[border:]
        if classes < 2 or not chosen:
            raise UserError(
                f"task {self.name}: {files[0]}: {len(first)} rows of {classes} classes; allowed is 2 or more"
            )
        shape = {name: value for name, value in options.items() if name not in ("file", "test")}
        order = random.Random(f"{self.make.__name__} {split} {seed}").sample(range(len(chosen)), len(chosen))
        for index in order[:n]:
            yield self.make(chosen[index], classes, words, **shape)


@functools.lru_cache(maxsize=4)
def _rows(read: Callable[[Path], list[Row]], path: Path, changed: int) -> list[Row]:
    return read(path)


def read_jsonl(path: Path, keys: Sequence[str]) -> list[Row]:
    """The rows of a jsonl file whose texts are under `keys`, in UTF-8. Raises UserError naming file and line."""
    rows = []
    for place, row in read_json_lines(path):
        texts = [row.get(key) if isinstance(row, dict) else None for key in keys]
        if not all(isinstance(text, str) for text in texts) or not is_label(row.get("label")):
            wanted = ", ".join(f"`{key}` (string)" for key in keys)
            raise UserError(f"{place}: expected are {wanted} and `label` (whole number from 0)")
        rows.append(Row(tuple(encodable(text, place).encode() for text in texts), row["label"]))
    return rows


def is_label(value: object) -> bool:
    """Whether it is a whole number from 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_images(path: Path) -> list[Row]:
    """The rows of an npz file. Raises UserError for arrays that are missing, of another shape or of another kind."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            images, labels = stored["images"], stored["labels"]
    except (KeyError, ValueError, OSError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: no npz file of `images` and `labels` ({error})") from None
    good = images.ndim == 3 and images.dtype == np.uint8 and labels.shape == images.shape[:1]
    if not good or labels.dtype.kind not in "iu" or (labels < 0).any():
        raise UserError(
            f"{path}: images {images.shape} {images.dtype}, labels {labels.shape} {labels.dtype}; expected are "
            "(N, H, W) uint8 and (N,) whole numbers from 0"
        )
    return [Row((image.tobytes(),), int(label)) for image, label in zip(images, labels)]


def classified(
    task: str, parts: Sequence[Sequence[int]], label: int, classes: int, symbols: int, words: Vocabulary
) -> Example:
    """The parts (numbers below `symbols`), a separator between two, a marker, and the class, to be picked among all."""
    words.need(2 + classes + symbols, task)
    marker, separator = words.words[:2]
    names, known = words.words[2 : 2 + classes], words.words[2 + classes :]
    ids = list(words.opening)
    for part in parts:
        ids += [*(known[value] for value in part), separator]
    ids[-1:] = [marker, names[label]]
    answers = ((len(ids) - 1, len(ids)),)
    return Example(tuple(ids), answers, choices=names, guesses={A_CLASS: 1 / classes})


def texts(row: Row, classes: int, words: Vocabulary, *, file: str = "", test: str = "", length: int = 1024) -> Example:
    """A row's texts by bytes, which share `length`."""
    share, task = length // len(row.parts), "lra_text" if len(row.parts) == 1 else "lra_retrieval"
    if share < 1:
        raise UserError(f"task {task}: length {length}; allowed is {len(row.parts)} or more")
    return classified(task, [part[:share] for part in row.parts], row.label, classes, BYTES, words)


def image(row: Row, classes: int, words: Vocabulary, *, file: str = "", test: str = "", greys: int = 256) -> Example:
    """A row's pixels in so many greys."""
    if not 2 <= greys <= BYTES:
        raise UserError(f"task lra_image: greys {greys}; allowed is 2 to {BYTES}")
    pixels = [value * greys // BYTES for value in row.parts[0]]
    return classified("lra_image", [pixels], row.label, classes, greys, words)


CLASSIFICATION = (
    FileTask(
        "lra_text",
        "the class of a text, by bytes",
        {},
        texts,
        functools.partial(read_jsonl, keys=("text",)),
        'a jsonl file of {"text": string, "label": number}',
    ),
    FileTask(
        "lra_retrieval",
        "whether two texts belong together, by bytes",
        {},
        texts,
        functools.partial(read_jsonl, keys=("text1", "text2")),
        'a jsonl file of {"text1": string, "text2": string, "label": number}',
    ),
    FileTask(
        "lra_image",
        "the class of a picture, by pixels",
        {},
        image,
        read_images,
        "an npz file of images (N, H, W) uint8 and labels (N,)",
    ),
)

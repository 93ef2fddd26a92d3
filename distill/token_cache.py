"""A source tokenised once: memory-mapped ids on disk, under a name that is the digest of everything that made them.

The folder NAME holds ids.bin (uint16 or uint32), bounds.bin (int64: where documents begin, and the end), unless
they are texts marks.bin (uint8: 1 where a token is supervised), of tasks targets.bin (as ids: what is to be said in
each place), and facts.json with the counts and the sha256 of the files. It appears by one rename when complete; one
process at a time makes it. Twin: tests/distill/test_data.py.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from convert.text_files import suffix_of
from deltanet_errors import DeltanetError, UserError

from .chat import encode_chat
from .documents import find_files, pin_revision, read_records, read_source
from .preferences import read_pair
from .schema import Source

FORMAT = 2  # to be raised when the same files give other tokens than before
CHAT_FORMAT = 2  # to be raised when the same chats or preferences give other tokens than before
TASK_FORMAT = 2  # to be raised when a task makes other examples than before
BATCH = 256  # documents given to the tokenizer at once; it spreads them over the cores


@dataclass(frozen=True)
class Facts:
    """Of one source: `supervised` counts tokens that may be targets, `stopped` documents whose last such is a stop."""

    documents: int
    tokens: int
    supervised: int
    stopped: int


@dataclass(frozen=True)
class Tokens:
    """The documents of a source: document i is ids[bounds[i] : bounds[i + 1]]; marks is None where all supervise,
    targets where what is to be said is what stands there.
    Of preferences documents 2 i and 2 i + 1 are the chosen and the rejected conversation."""

    name: str
    kind: str
    digest: str
    ids: np.ndarray
    bounds: np.ndarray
    marks: np.ndarray | None
    facts: Facts
    targets: np.ndarray | None = None


@dataclass(frozen=True)
class Document:
    """One document as it is stored: ids int64, marks bool, targets int64; what None says is in `Tokens`."""

    ids: np.ndarray
    marks: np.ndarray | None = None
    targets: np.ndarray | None = None


def tokenizer_digest(tokenizer) -> str:
    """sha256 of what decides the ids: the vocabulary and its rules, the special tokens, the chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    return _digest([rules, special, tokenizer.chat_template])


def check_same_tokenizer(teacher, student) -> None:
    """Raises UserError naming the first difference, since a distillation compares the two models token by token."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    differing = {token for token, _ in ours.items() ^ theirs.items()}
    for token in sorted(differing, key=lambda token: (theirs.get(token, ours.get(token)), token)):
        if ours.get(token) != theirs.get(token):
            raise UserError(
                f"the student's tokenizer is not its teacher's: {token!r} is {ours.get(token, 'absent')} in the "
                f"student and {theirs.get(token, 'absent')} in the teacher"
            )
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(student, name) != getattr(teacher, name):
            raise UserError(
                f"the student's tokenizer is not its teacher's: {name} is {getattr(student, name)} in the student "
                f"and {getattr(teacher, name)} in the teacher"
            )


def tokenise(
    source: Source,
    tokenizer,
    cache: Path,
    *,
    vocab_size: int,
    train_on: str = "assistant",
    stop_ids: Collection[int] = (),
    advance: Callable[[int], None] = lambda tokens: None,
) -> Tokens:
    """The tokens of a source, from the cache folder or made now.

    A text is what the tokenizer makes of it with its special tokens, ended by eos; a chat as in `chat.py`. stop_ids
    are ids that end a turn besides the tokenizer's eos. `advance` is told the tokens so far after every document, and
    what it raises leaves no cache. Raises UserError for unreadable or empty sources, refused
    chats, and ids of vocab_size or more; DeltanetError where the cache cannot be written.
    """
    stop_ids = {*stop_ids, *({tokenizer.eos_token_id} - {None})}
    files, source = find_files(source), pin_revision(source)
    made_by = source.model_dump(mode="json", exclude={"name", "weight", "path"})
    contents = [_content(file, source) for file in (*files, *_task_files(source))]
    rule = {"text": None, "task": TASK_FORMAT}.get(source.kind, [CHAT_FORMAT, train_on, sorted(stop_ids)])
    digest = _digest([FORMAT, made_by, contents, tokenizer_digest(tokenizer), rule])
    folder = cache / digest[:32]
    if not folder.is_dir():
        try:
            with alone_in(cache):
                if not folder.is_dir():  # another process may have made it meanwhile
                    documents = _encode(source, files, tokenizer, stop_ids, train_on)
                    _write(folder, documents, vocab_size, source, stop_ids, advance)
        except OSError as error:
            raise DeltanetError(f"{cache}: cannot write the tokens of {source.name}: {error.strerror}") from None
    return _open(folder, source, digest, vocab_size)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Waits until no other process is in here with the same folder, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _content(file: Path, source: Source) -> tuple[str | None, str]:
    """What decides the documents of a file: how it is read, and its bytes."""
    try:
        return suffix_of(file), file_digest(file)
    except OSError as error:
        raise UserError(f"source {source.name}: {file}: cannot be read: {error.strerror}") from None


def file_digest(file: Path) -> str:
    """sha256 of a file's bytes."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _encode(source: Source, files, tokenizer, stop_ids, train_on) -> Iterator[Document]:
    if source.task is not None:
        yield from _examples(source, tokenizer)
        return
    if source.kind == "preference":
        for place, record in itertools.islice(read_records(source, files), source.max_documents):
            for messages in read_pair(record, source, place):
                yield Document(*encode_chat(messages, tokenizer, stop_ids, "last", place))
        return
    documents = read_source(source, files)
    if source.kind == "chat":
        for place, messages in documents:
            yield Document(*encode_chat(messages, tokenizer, stop_ids, train_on, place))
        return
    end = tokenizer.eos_token_id
    batch: list[str] = []

    def flush():
        for ids in tokenizer(batch, return_attention_mask=False, verbose=False)["input_ids"]:
            yield Document(np.array(ids if end is None or ids[-1:] == [end] else [*ids, end], np.int64))
        batch.clear()

    for _, text in documents:
        batch.append(text)
        if len(batch) == BATCH:
            yield from flush()
    if batch:
        yield from flush()


def _task_files(source: Source) -> list[Path]:
    if source.task is None:
        return []
    from .evaluation.tasks import TASKS

    return TASKS[source.task].files(source.options)


def _examples(source: Source, tokenizer) -> Iterator[Document]:
    """The examples of a generated task; only its answers are supervised."""
    from .evaluation.tasks import TASKS

    for example in TASKS[source.task].examples(source.seed, source.documents, source.options, tokenizer, split="train"):
        ids, marks = np.array(example.ids, np.int64), np.zeros(len(example.ids), bool)
        marks[example.positions] = True
        targets = ids.copy()
        targets[example.positions] = [example.target(at) for at in example.positions]
        yield Document(ids, marks, targets)


def _write(
    folder: Path, documents: Iterator[Document], vocab_size: int, source: Source, stop_ids: set[int], advance
) -> None:
    staging = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)  # what a killed process left
    staging.mkdir(parents=True)
    try:
        dtype = _id_dtype(vocab_size)
        bounds, supervised, stopped = [0], 0, 0
        with contextlib.ExitStack() as stack:
            ids_file = stack.enter_context(open(staging / "ids.bin", "wb"))
            marks_file = stack.enter_context(open(staging / "marks.bin", "wb")) if source.kind != "text" else None
            targets_file = stack.enter_context(open(staging / "targets.bin", "wb")) if source.kind == "task" else None
            for document in documents:
                ids, marks = document.ids, document.marks
                if len(ids) and int(ids.max()) >= vocab_size:
                    raise UserError(
                        f"source {source.name}: the tokenizer makes the id {ids.max()}, but the model has {vocab_size} "
                        "tokens: this is not the model's tokenizer"
                    )
                ids_file.write(ids.astype(dtype).tobytes())
                bounds.append(bounds[-1] + len(ids))
                advance(bounds[-1])
                if marks_file is not None:
                    marks_file.write(marks.astype(np.uint8).tobytes())
                if targets_file is not None:
                    targets_file.write(document.targets.astype(dtype).tobytes())
                last = np.flatnonzero(marks)[-1:] if marks is not None else np.arange(len(ids))[-1:]
                supervised += int(marks.sum()) if marks is not None else len(ids)
                stopped += bool(len(last)) and int(ids[last[0]]) in stop_ids
        if bounds[-1] == 0:
            where = ", ".join(source.path) if source.path else source.dataset or source.task
            raise UserError(f"source {source.name}: {where}: no text in it")
        (staging / "bounds.bin").write_bytes(np.array(bounds, np.int64).tobytes())
        digests = {file.name: file_digest(file) for file in sorted(staging.iterdir())}
        facts = Facts(len(bounds) - 1, bounds[-1], supervised, stopped)
        (staging / "facts.json").write_text(json.dumps({"facts": asdict(facts), "sha256": digests}))
        for file in staging.iterdir():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
        os.rename(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _id_dtype(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _open(folder: Path, source: Source, digest: str, vocab_size: int) -> Tokens:
    try:
        stored = json.loads((folder / "facts.json").read_text())
        for name, written in stored.get("sha256", {}).items():
            if file_digest(folder / name) != written:
                raise ValueError(f"the sha256 of {name} is not the one it was written with")
        facts = Facts(**stored["facts"])
        ids = np.memmap(folder / "ids.bin", _id_dtype(vocab_size), "r")
        bounds = np.fromfile(folder / "bounds.bin", np.int64)
        if len(ids) != facts.tokens or len(bounds) != facts.documents + 1:
            raise ValueError("the counts do not agree")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: damaged tokens of source {source.name} ({error}); delete the folder") from None
    marks = np.memmap(folder / "marks.bin", np.uint8, "r") if source.kind != "text" else None
    targets = np.memmap(folder / "targets.bin", ids.dtype, "r") if source.kind == "task" else None
    return Tokens(source.name or "", source.kind, digest, ids, bounds, marks, facts, targets)

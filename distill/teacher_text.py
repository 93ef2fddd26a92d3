"""Training text that the teacher writes itself, for a model that has to be converted without any data.

Rows are sampled at temperature 1 (what the teacher's own distribution asks for) or from its likeliest tokens (`top_p`,
without which a small teacher loses the thread: docs/results/students-states-alone.md), cut into documents where the
teacher begins another, and kept unless they repeat themselves or one kept before; chats are in teacher_chats.py. They
stand in JSON lines, one portion a file, so that people can read them and a killed run goes on with the next portion.
Twin: tests/distill/test_teacher_text.py.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from convert.text import document_start, render_chat, write_text
from deltanet.config import max_context
from deltanet_errors import DeltanetError, UserError, one_line

from .order import hashed
from .schema import USUAL_NAME, Source
from .teacher_chats import SHORTEST as SHORTEST_CHAT
from .teacher_chats import write_chats
from .token_cache import Facts, Tokens

SHORT, LONG = 256, 1024
"""Tokens of a row: as many as a sequence of the run, within these bounds. A student of short texts does not learn how
its teacher uses a long one (docs/results/students-states-alone.md)."""
PORTION = 32768  # tokens that a CPU writes before it stores them
ROWS, SHARE = 2048, 0.4
"""On a GPU, which takes nearly as long for few rows as for many: rows at most, and what their cache may take of the
memory that the teacher leaves of the whole card, so that the same kind of card writes the same rows."""
SHORTEST = 32  # tokens of a document that is kept
LEAST_NEW = 0.2  # compressed over plain bytes; stories and prose are at 0.4 to 0.6, a loop is below 0.1
SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
MOST_EMPTY = 5  # portions in a row that gave nothing


def written_source(
    source: Source,
    teacher,
    tokenizer,
    folder: Path,
    seed: int,
    seq_len: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Source:
    """The source with `path` naming the files the teacher has written: at least `from_teacher` tokens in all.

    The same seed, name, top_p, openings, seq_len, teacher and kind of device write the same text, other names other
    text.
    `advance` is told the tokens so far after every portion. Raises DeltanetError where the teacher only repeats itself
    (a `top_p` near 0 has it write the same again and again), and UserError where the folder holds text of that name by
    another seed, length, openings or shape of teacher, or damaged text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: list[str] = []
    seen: set[bytes] = set()
    tokens, empty = 0, 0
    stem = source.written_as
    _check_openings(source, tokenizer, _shape(teacher, source, seq_len)[1])
    _check_made_of(folder, stem, _made_of(source, teacher, seed, seq_len))
    own = () if source.name == USUAL_NAME else (zlib.crc32(source.name.encode()),)
    while tokens < source.from_teacher:
        file = folder / f"{stem}-{len(files):04}.jsonl"
        if not file.is_file():
            key = int(hashed(seed, *own, len(files))[0]) >> 1
            _store(file, _portion(source, teacher, tokenizer, key, seq_len, len(files)), seen)
        files.append(str(file))
        found = _read(file, seen)
        tokens, empty = tokens + found, 0 if found else empty + 1
        if empty == MOST_EMPTY:
            what = "repeats itself in {} rows" if source.kind == "text" else "ends none of {} chats or repeats them"
            raise DeltanetError(
                f"source {source.name}: the teacher {what.format(_shape(teacher, source, seq_len)[0] * empty)}; give a "
                f"{source.kind} instead"
            )
        advance(tokens)
    return source.model_copy(update={"path": tuple(files), "from_teacher": None})


def planned(source: Source, seq_len: int) -> Tokens:
    """A stand-in of the size the source will have, for a plan without writing; of a chat all tokens are targets."""
    count = source.from_teacher
    bounds = np.append(np.arange(0, count, _length(source, seq_len)), count)
    facts = Facts(len(bounds) - 1, count, count, 0)
    marks = None if source.kind == "text" else np.ones(count, np.uint8)
    return Tokens(source.name, source.kind, "not written yet", np.zeros(count, np.uint16), bounds, marks, facts)


def _made_of(source: Source, teacher, seed: int, seq_len: int) -> dict:
    """What decides a source's text besides its name. Of the teacher its shape alone: its weights may be in parts."""
    shape = {name: getattr(teacher.config, name) for name in SHAPE}
    making = {"kind": source.kind, "seed": seed, "length": _length(source, seq_len), "teacher": shape}
    return making | ({"openings": list(source.openings)} if source.openings else {})


def _check_made_of(folder: Path, stem: str, making: dict) -> None:
    """Notes what the portions are made of. Raises UserError where those there are noted to be made otherwise."""
    note = folder / f"{stem}.json"
    try:
        before = dict(json.loads(note.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # of before there were notes, or none yet
        _write_whole(note, json.dumps(making, indent=2) + "\n")
        return
    if before != making:
        changed = "; ".join(
            f"{key} {before.get(key)} -> {making.get(key)}"
            for key in {**before, **making}
            if making.get(key) != before.get(key)
        )
        raise UserError(
            f"{folder}: what the teacher wrote there as {stem} was made otherwise ({changed}); delete {stem}* there, "
            "or give the run another --output"
        )


def _length(source: Source, seq_len: int) -> int:
    return min(max(seq_len, SHORTEST_CHAT if source.kind == "chat" else SHORT), LONG)


def _shape(teacher, source: Source, seq_len: int) -> tuple[int, int]:
    """(rows, tokens of each) of a portion."""
    length = min(_length(source, seq_len), max_context(teacher.config))
    if teacher.device.type != "cuda":
        return max(PORTION // length, 1), length
    config = teacher.config
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * length * teacher.dtype.itemsize
    memory = torch.cuda.get_device_properties(teacher.device).total_memory
    room = SHARE * (memory - sum(parameter.nbytes for parameter in teacher.parameters()))
    return max(min(ROWS, int(room // row)), 1), length


def _check_openings(source: Source, tokenizer, length: int) -> None:
    """Raises UserError for an opening that leaves little of a row of `length` tokens, or has the template's marks."""
    for text in source.openings:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        said, most = f"source {source.name}: openings: {text[:40]!r}", length // 4
        if not text.strip() or not set(ids).isdisjoint(tokenizer.all_special_ids):
            raise UserError(f"{said}: allowed are plain words, without special tokens")
        if len(ids) > most:
            raise UserError(f"{said}: {len(ids)} tokens; allowed are {most}, a quarter of what is written at once")


def _portion(source: Source, teacher, tokenizer, key: int, seq_len: int, index: int) -> list[dict]:
    count, length = _shape(teacher, source, seq_len)
    turn = index * count % max(len(source.openings), 1)  # the openings take turns over all portions
    how = {"top_p": source.top_p, "openings": source.openings[turn:] + source.openings[:turn]}
    if source.kind == "chat":
        ends = teacher.config.eos_token_id
        stop_ids = {*([ends] if isinstance(ends, int) else ends or []), tokenizer.eos_token_id} - {None}
        return write_chats(teacher, tokenizer, count, length, key, stop_ids=stop_ids, is_dull=repeats, **how)
    rows = write_text(teacher, tokenizer, count, length, key, batch=count, **how).numpy()
    marks = _document_marks(tokenizer)
    most = 1 if source.openings else None  # what follows the first document of a row begins as it likes
    return [document for row in rows for document in _documents(row, tokenizer, marks, most)]


def _document_marks(tokenizer) -> list[int]:
    """The tokens that part documents: the one they begin with, and the end-of-text token, unless that ends the turns
    of a chat, whose next turn belongs to the same text."""
    marks = {document_start(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
        inside = tokenizer(render_chat(tokenizer, turns), add_special_tokens=False)["input_ids"][1:]
        marks -= set(inside)
    return sorted(marks)


def _documents(row: np.ndarray, tokenizer, marks: list[int], most: int | None = None) -> list[dict]:
    """The documents of a row that are worth keeping, of the first `most`, without the marks between them."""
    kept = []
    parts = [ids for ids in np.split(row, np.flatnonzero(np.isin(row, marks))) if len(ids)]
    for ids in parts[:most]:
        ids = ids[1:] if ids[0] in marks else ids
        text = tokenizer.decode(ids.tolist())
        if len(ids) >= SHORTEST and not repeats(text):
            kept.append({"text": text, "tokens": len(ids)})
    return kept


def repeats(text: str) -> bool:
    """Whether a text says little more than once what it says."""
    plain = text.encode()
    return len(zlib.compress(plain)) < LEAST_NEW * len(plain)


def _read(file: Path, seen: set[bytes]) -> int:
    """The tokens of a portion, whose documents have been `seen` from now on. Raises UserError where it is damaged."""
    tokens = 0
    try:
        with file.open(encoding="utf-8", newline="\n") as lines:  # str.splitlines would also cut at U+2028 and the like
            for line in lines:
                seen.add(_digest(line))
                tokens += int(json.loads(line)["tokens"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged ({one_line(error)}); delete it, and the teacher writes it again") from None
    return tokens


def _store(file: Path, documents: list[dict], seen: set[bytes]) -> None:
    """Writes a portion, of each document one and none that was seen."""
    lines = dict.fromkeys(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    _write_whole(file, "".join(line for line in lines if _digest(line) not in seen))


def _digest(line: str) -> bytes:
    return hashlib.sha256(line.encode()).digest()


def _write_whole(file: Path, text: str) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)

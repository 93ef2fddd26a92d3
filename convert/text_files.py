"""Documents out of files, as every command understands them: txt, text, md, json, jsonl and parquet, each also .gz.

A document is a text or a chat (a list of {role, content}); with it comes its place, `file:line` or `file[row]`, which
heads every complaint about it. Nothing here tokenises. Twin: tests/convert/test_text_files.py.
"""

import gzip
import json
import os
import stat
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from deltanet_errors import UserError, one_line

SUFFIXES = (".txt", ".text", ".md", ".jsonl", ".json", ".parquet")
Keys = tuple[str, ...]
TEXTS: tuple[Keys, ...] = (("text",), ("content",), ("document",))
"""By which keys a record holds a text: the first of these that it has all of. Of chats: `CHATS`."""
MESSAGES = (("messages",), ("conversations",), ("conversation",))
COMPLETION, INSTRUCTION, PAIR = ("prompt", "completion"), ("instruction", "output"), ("chosen", "rejected")
CHATS: tuple[Keys, ...] = (*MESSAGES, COMPLETION, INSTRUCTION, PAIR)
UNREAD = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""What a turn may say besides its content."""
TOOLS = ("tools", "functions")
"""Where a row lists the tools that its chat may call."""
CALLS = ("function_call", "observation")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}

FILE, FOLDER = "a file", "a folder"
KINDS = {stat.S_IFREG: FILE, stat.S_IFDIR: FOLDER, stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}

WORDS = ("self", "none")
"""What may stand for a file after --calibrate."""

Messages = list[dict[str, str]]
Document = str | Messages


def check_file(file: str | Path, named: str, words: Sequence[str] = ()) -> None:
    """Raises UserError headed by `named` for what is no file, or none of a kind that is read, nor one of `words`."""
    if file in words:
        return
    kind = kind_of(file)
    if kind == FOLDER:
        raise UserError(f"{named} is a folder; name the files in it")
    if kind not in (None, FILE):
        raise UserError(f"{named} is {kind}; texts are read more than once, so write them to a file first")
    if suffix_of(file) is None:
        allowed = ", ".join((*SUFFIXES, "each also .gz", *words))
        raise UserError(f"{named}: not a text this can read; allowed: {allowed}")
    if kind is None and os.path.islink(file):
        raise UserError(f"{named} is a link to a file that is not there")
    if kind is None:
        is_pattern = any(mark in str(file) for mark in "*?[")
        raise UserError(f"{named}: no such file" + "; no patterns here, name the files" * is_pattern)


def kind_of(path: str | Path) -> str | None:
    """What stands at the path, or where a link there leads: one of KINDS, None where nothing does."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return None
    return KINDS.get(stat.S_IFMT(mode), "a device")


def read_documents(file: str | Path) -> list[Document]:
    """The documents of a file, without blank texts. Raises UserError with the place of what is none."""
    check_file(file, str(file))
    documents = [read_document(record, place) for place, record in read_file(file)]
    return [document for document in documents if not is_blank(document)]


def is_blank(document: Document) -> bool:
    """Whether it is a text without a word, which nobody reads."""
    return isinstance(document, str) and not document.strip()


def read_file(file: str | Path, separator: str | None = None) -> Iterator[tuple[str, object]]:
    """(place, record) of every record as it stands in the file: text, or what JSON or parquet holds.

    A text file is one record, or with `separator` the parts between; CRLF in it is a newline. A JSON file is a list of
    records, or one. Raises UserError with the place for what cannot be read, is not UTF-8 or not JSON.
    """
    suffix = suffix_of(file)
    if suffix == ".parquet":
        yield from _parquet_records(file)
    elif suffix == ".jsonl":
        yield from read_json_lines(file)
    elif suffix == ".json":
        value = _json(_text(file), file, 1)
        for index, record in enumerate(value if isinstance(value, list) else [value]):
            yield f"{file}[{index}]", record
    elif separator is None:
        yield f"{file}:1", _text(file)
    else:
        line, separator = 1, separator.replace("\r\n", "\n")
        for part in _text(file).split(separator):
            blank = len(part) - len(part.lstrip("\n"))
            yield f"{file}:{line + blank}", part.strip("\n")
            line += (part + separator).count("\n")


def read_json_lines(file: str | Path) -> Iterator[tuple[str, object]]:
    """(place, record) of every line of JSON, whatever the file is called; blank ones are skipped. Raises as
    `read_file`."""
    for line, text in _lines(file):
        if text.strip():
            yield f"{file}:{line}", _json(text, file, line)


def suffix_of(file: str | Path) -> str | None:
    """Which of SUFFIXES says how the file is read; None for a kind that is not."""
    name = str(file).lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def _open(file: str | Path) -> BinaryIO:
    return gzip.open(file) if str(file).lower().endswith(".gz") else open(file, "rb")


def _text(file: str | Path) -> str:
    return "".join(line for _, line in _lines(file))


def _lines(file: str | Path) -> Iterator[tuple[int, str]]:
    """(number, line) of every line, which ends in a newline and nothing else; a byte-order mark is dropped."""
    number = 0
    try:
        with _open(file) as stream:
            for number, data in enumerate(stream, 1):
                yield number, data.decode("utf-8-sig" if number == 1 else "utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}:{number}: not UTF-8 (byte {error.object[error.start]:#04x})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}:{number + 1}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _json(text: str, file: str | Path, line: int) -> object:
    try:
        return json.loads(text.rstrip())
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{line + error.lineno - 1}: not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise UserError(f"{file}:{line}: not JSON: nested too deep") from None
    except ValueError:  # what else Python refuses
        most = sys.get_int_max_str_digits()
        raise UserError(f"{file}:{line}: a number of more than {most:,} digits, which is too long to be read") from None


def _parquet_records(file: str | Path) -> Iterator[tuple[str, object]]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with _open(file) as stream, pyarrow.parquet.ParquetFile(stream) as table:
            # Dates are never text, and some that a file may hold are none in Python.
            columns = [field.name for field in table.schema_arrow if not pyarrow.types.is_temporal(field.type)]
            for batch in table.iter_batches(columns=columns):
                for record in batch.to_pylist():
                    yield f"{file}[{row}]", record
                    row += 1
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: damaged, or text that is not UTF-8, at row {row} or after: {one_line(error)}"
        ) from None
    except OverflowError as error:
        raise UserError(f"{file}: a date beyond Python's at row {row} or after: {one_line(error)}") from None
    except (pyarrow.ArrowException, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: not a parquet file: {one_line(error)}") from None


def pick(record: dict, shapes: Sequence[Keys]) -> Keys | None:
    """The first of the shapes whose keys all have a value in the record."""
    return next((keys for keys in shapes if all(record.get(key) is not None for key in keys)), None)


def missing(record: dict, place: str, shapes: Sequence[Keys], hint: str = "") -> UserError:
    """What to raise for a record that has none of the shapes."""
    wanted = " or ".join(" and ".join(keys) for keys in shapes)
    found = ", ".join(f"{key} (null)" if value is None else str(key) for key, value in record.items())
    return UserError(f"{place}: no {wanted} among the keys {found}{hint}")


def read_document(record: object, place: str) -> Document:
    """The text of a record that has one, else its chat. Raises UserError headed by `place` as `read_text` does."""
    if not isinstance(record, dict) or pick(record, TEXTS):
        return read_text(record, place)
    if not pick(record, CHATS):
        raise missing(record, place, TEXTS + CHATS)
    return read_chat(record, place)


def read_text(record: object, place: str, field: str | None = None) -> str:
    """The text that a record is or has, under `field` if that is given. Raises UserError headed by `place`."""
    if isinstance(record, dict):
        shapes = TEXTS if field is None else ((field,),)
        keys = pick(record, shapes)
        if keys is None:
            raise missing(record, place, shapes, "; `kind: chat` reads conversations" if pick(record, CHATS) else "")
        record, place = record[keys[0]], f"{place} {keys[0]}"
    if not isinstance(record, str):
        raise UserError(f"{place}: expected text, got {type(record).__name__}")
    return encodable(record, place)


def read_chat(record: object, place: str, field: str | None = None) -> Messages:
    """The conversation that a record has, under `field` if that is given: messages, ShareGPT's (from, value), a prompt
    and its completion, instruction / input / output, or of a pair of answers the chosen one; before it what the record
    says of `system` and `history`.

    Raises UserError headed by `place`.
    """
    if not isinstance(record, dict):
        raise UserError(f"{place}: expected an object with messages, got {type(record).__name__}")
    if field is None and pick(record, (PAIR,)):
        return read_answer(record, place, PAIR[0])
    shapes = CHATS if field is None else ((field,),)
    keys = pick(record, shapes)
    if keys is None:
        raise missing(record, place, shapes)
    if keys == COMPLETION:
        return read_answer(record, place, keys[1])
    turns = record[keys[0]]
    if keys == INSTRUCTION:
        asked = [part for part in (turns, record.get("input")) if part]
        question = "\n".join(asked) if all(isinstance(part, str) for part in asked) else None
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": record[keys[1]]}]
    return _opened(_turns(turns, f"{place} {keys[0]}"), record, place, keys)


def read_answer(record: dict, place: str, key: str, field: str | None = None) -> Messages:
    """The conversation that ends with the assistant's answer under `key`: a text, a turn, or a list of turns.

    Its prompt is there if the list does not begin with an answer; else it is `messages` or the like, or `prompt`;
    `field` names another. Raises UserError headed by `place`, also for a prompt that ends with the assistant: some
    (TRL) take that for the beginning of the answer, and a chat template for a turn before it.
    """
    shapes = (*MESSAGES, COMPLETION[:1]) if field is None else ((field,),)
    asked = pick(record, shapes)
    if asked is None and field is not None:
        raise missing(record, place, shapes)
    turns = _turns(record[key], f"{place} {key}", "assistant")
    if asked is not None and turns[0]["role"] == "assistant":
        turns = _turns(record[asked[0]], f"{place} {asked[0]}", "user") + turns
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise UserError(f"{place} {key}: expected a prompt and then the assistant's answer")
    if turns[-2]["role"] == "assistant":
        raise UserError(f"{place} {key}: the prompt ends with the assistant; it must end with what is answered")
    return _opened(turns, record, place, asked or ())


def _opened(turns: Messages, record: dict, place: str, read: Sequence[str]) -> Messages:
    """The turns after what their record says beside them: its `system` in front, then its `history`, a list of
    [question, answer]; keys that the turns were `read` from are not beside them. Raises UserError where they cannot
    stand there, and where it lists tools."""
    beside = {key: value for key, value in record.items() if key not in read and not _is_empty(value)}
    _refuse_weight(record, place)
    for key in TOOLS:
        if key in beside:
            raise UserError(f"{place} {key}: not read; write the tools into a system turn, as the chat template would")
    opening = turns[:1] if turns[0]["role"] == "system" else []
    turns, system, history = turns[len(opening) :], beside.get("system"), beside.get("history", [])
    if system is not None:
        if not isinstance(system, str):
            raise UserError(f"{place} system: expected text, got {type(system).__name__}")
        own = [{"role": "system", "content": encodable(system, f"{place} system")}]
        if opening not in ([], own):
            raise UserError(f"{place} system: the chat begins with another system turn; leave one of them out")
        opening = own
    pairs = history if isinstance(history, list) else [history]
    if not all(isinstance(pair, list) and [type(text) for text in pair] == [str, str] for pair in pairs):
        raise UserError(f"{place} history: expected a list of [question, answer], both text")
    said = [turn for pair in pairs for turn in zip(("user", "assistant"), pair)]
    earlier = [{"role": role, "content": encodable(text, f"{place} history")} for role, text in said]
    return opening + earlier + turns


def _is_empty(value: object) -> bool:
    """Whether nothing is said: also by a text of spaces, or by one that is an empty list or object in JSON."""
    return not value or (isinstance(value, str) and value.strip() in ("", "[]", "[ ]", "{}", "null"))


def _turns(turns: object, where: str, said_by: str | None = None) -> Messages:
    """Messages from a list of turns, each with role and content, or from and value; where it is known who said it,
    also from a single turn or a text. Raises UserError where a turn says more than that, or is not to be learnt."""
    if said_by is not None and isinstance(turns, str):
        turns = {"role": said_by, "content": turns}
    if said_by is not None and isinstance(turns, dict):
        turns = [turns]
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: expected a list of messages")
    messages = []
    for number, turn in enumerate(turns):
        given = turn if isinstance(turn, dict) else {}
        role = given.get("role") or given.get("from")
        content = given.get("value") if given.get("content") is None else given["content"]
        for key in UNREAD:
            if given.get(key):
                raise UserError(f"{where}[{number}] {key}: not read; write it into the content, as text")
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(f"{where}[{number}]: expected an object with role and content, both text")
        role = ROLES.get(role, role)
        if role in CALLS:
            raise UserError(f"{where}[{number}]: turns of {role!r} are not read; write it into the content, as text")
        if role == "assistant":
            _refuse_weight(given, f"{where}[{number}]")
        messages.append({"role": role, "content": encodable(content, f"{where}[{number}]")})
    return messages


def _refuse_weight(given: dict, place: str) -> None:
    """Raises UserError where a turn or a row says that its answers are not to be learnt, or not like others."""
    for key in ("weight", "train"):
        if given.get(key) not in (None, 1):
            raise UserError(
                f"{place}: {key} {given[key]!r} is not read, so this answer would be a target like any other"
            )


def encodable(text: str, place: str) -> str:
    """The text. Raises UserError for half of a character, which JSON can write and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{place}: holds half of a surrogate pair, which is no character") from None
    return text

"""Documents out of files: txt, json, jsonl and parquet, each also .gz, and data sets of the Hub.

A document is a text or a conversation (a list of {role, content}); with it comes its place, `file:line`, which heads
every complaint about it. Files are read in the order of the recipe, globs sorted. Nothing here tokenises.
Twin: tests/distill/test_documents.py.
"""

import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from deltanet_errors import UserError, nearest, one_line

from .schema import Source

SUFFIXES = (".txt", ".text", ".md", ".jsonl", ".json", ".parquet")
TEXT_FIELDS = ("text", "content", "document")
CHAT_FIELDS = ("messages", "conversations", "conversation")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
Messages = list[dict[str, str]]


def find_files(source: Source) -> list[Path]:
    """The local files of a source. Raises UserError for a path or glob without one, and for a kind of file unknown."""
    files: list[Path] = []
    for pattern in source.path or ():
        path = Path(pattern).expanduser()
        found = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
        if not found:
            siblings = [item.name for item in path.parent.glob("*")] if path.parent.is_dir() else []
            raise UserError(f"source {source.name}: {pattern}: no such file{nearest(path.name, siblings)}")
        for file in found:
            if not file.exists():
                raise UserError(f"source {source.name}: {file} is a link to a file that is not there")
            if file.is_dir():
                raise UserError(f"source {source.name}: {file} is a folder; say {file}/*.jsonl or the like")
            if _suffix(file) not in SUFFIXES:
                raise UserError(f"source {source.name}: {file}: the suffix is none of {', '.join(SUFFIXES)} (or .gz)")
        files += found
    return files


def pin_revision(source: Source) -> Source:
    """A Hub source with its revision as a commit, so that the same recipe means the same text; others as they are.

    Raises UserError where the data set cannot be reached and `revision` is no commit already.
    """
    if source.dataset is None or re.fullmatch("[0-9a-f]{40}", source.revision or ""):
        return source
    if Path(source.dataset).is_dir():
        raise UserError(f"source {source.name}: {source.dataset} is a folder; local files go under `path:`")
    import huggingface_hub

    try:
        commit = huggingface_hub.HfApi().dataset_info(source.dataset, revision=source.revision).sha
    except Exception as error:  # of the Hub, of either generation of its HTTP library, or of the network
        raise UserError(
            f"source {source.name}: data set {source.dataset}: {str(error).splitlines()[0]} (a `revision:` that is a "
            "commit needs no look-up)"
        ) from None
    return source.model_copy(update={"revision": commit})


def read_source(source: Source, files: list[Path]) -> Iterator[tuple[str, str | Messages]]:
    """(place, document) of every document that is not blank, up to `max_documents`; not for preferences.

    Raises UserError with the place for what is not UTF-8, not JSON, or has no text or messages where they should be.
    """
    count = 0
    for place, record in read_records(source, files):
        if source.max_documents is not None and count >= source.max_documents:
            return
        document = _conversation(record, source, place) if source.kind == "chat" else _text(record, source, place)
        if isinstance(document, str) and not document.strip():
            continue
        count += 1
        yield place, document


def read_records(source: Source, files: list[Path]) -> Iterator[tuple[str, object]]:
    """(place, record) of every record of a source as it stands there: text, or what JSON or parquet holds."""
    return (found for file in files for found in _records(file, source)) if files else _hub_records(source)


def _suffix(file: Path) -> str:
    name = file.name.removesuffix(".gz")
    return Path(name).suffix.lower()


def _records(file: Path, source: Source) -> Iterator[tuple[str, object]]:
    suffix = _suffix(file)
    if suffix == ".parquet":
        yield from _parquet_records(file)
        return
    line = 0
    try:
        opener = gzip.open if file.name.endswith(".gz") else open
        with opener(file, "rb") as stream:
            if suffix == ".jsonl":
                for line, data in enumerate(stream, 1):
                    text = _decode(data, file, line)
                    if text.strip():
                        yield f"{file}:{line}", _json(text, file, line)
                return
            text = _decode(stream.read(), file, 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}:{line + 1}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if suffix == ".json":
        value = _json(text, file, 1)
        for index, record in enumerate(value if isinstance(value, list) else [value]):
            yield f"{file}[{index}]", record
    elif source.separator is None:
        yield f"{file}:1", text
    else:
        line = 1
        for part in text.split(source.separator):
            blank = len(part) - len(part.lstrip("\r\n"))
            yield f"{file}:{line + part[:blank].count(chr(10))}", part.strip("\r\n")
            line += part.count("\n") + source.separator.count("\n")


def _parquet_records(file: Path) -> Iterator[tuple[str, object]]:
    import pyarrow
    import pyarrow.parquet

    try:
        row = 0
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches():
                for record in batch.to_pylist():
                    yield f"{file}[{row}]", record
                    row += 1
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: damaged, or text that is not UTF-8, at row {row} or after: {one_line(error)}"
        ) from None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a parquet file: {one_line(error)}") from None


def _hub_records(source: Source) -> Iterator[tuple[str, object]]:
    import datasets

    where = f"source {source.name}: data set {source.dataset}"
    try:
        rows = datasets.load_dataset(
            source.dataset, source.config, split=source.split, revision=source.revision, streaming=True
        )
        for index, record in enumerate(rows):
            yield f"{source.dataset}[{index}]", record
    except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{where}: cannot be read: {str(error).splitlines()[0]}") from None


def _decode(data: bytes, file: Path, line: int) -> str:
    """The text of these bytes, which begin at `line` of the file; a byte-order mark at its head is dropped."""
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise UserError(f"{file}:{line}: not UTF-8 (byte {data[error.start]:#04x})") from None


def _json(text: str, file: Path, line: int) -> object:
    try:
        return json.loads(text.rstrip())
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{line + error.lineno - 1}: not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise UserError(f"{file}:{line}: not JSON: nested too deep") from None


def _encodable(text: str, place: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{place}: holds half of a surrogate pair, which is no character") from None
    return text


def pick(record: dict, field: str | None, candidates: tuple[str, ...]) -> str | None:
    """The key `field` where the record has it; without a wish the first of the candidates it has; else None."""
    if field is not None:
        return field if field in record else None
    return next((name for name in candidates if name in record), None)


def _text(record: object, source: Source, place: str) -> str:
    if isinstance(record, dict):
        field = pick(record, source.field, TEXT_FIELDS)
        if field is None:
            wanted = source.field or " or ".join(TEXT_FIELDS)
            hint = "; `kind: chat` reads conversations" if pick(record, None, CHAT_FIELDS) else ""
            raise UserError(f"{place}: no {wanted} among the keys {', '.join(map(str, record))}{hint}")
        record = record[field]
        place = f"{place} {field}"
    if not isinstance(record, str):
        raise UserError(f"{place}: expected text, got {type(record).__name__}")
    return _encodable(record, place)


def _conversation(record: object, source: Source, place: str) -> Messages:
    """Messages from `messages`, ShareGPT's `conversations` (from, value), or instruction / input / output."""
    if not isinstance(record, dict):
        raise UserError(f"{place}: expected an object with messages, got {type(record).__name__}")
    field = pick(record, source.field, CHAT_FIELDS)
    if field is None and source.field is None and {"instruction", "output"} <= record.keys():
        asked = [part for part in (record["instruction"], record.get("input")) if part]
        question = "\n\n".join(asked) if all(isinstance(part, str) for part in asked) else None
        turns: object = [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]
        field = "instruction"
    elif field is None:
        wanted = source.field or " or ".join(CHAT_FIELDS)
        raise UserError(f"{place}: no {wanted} among the keys {', '.join(map(str, record))}")
    else:
        turns = record[field]
    return read_turns(turns, f"{place} {field}")


def read_turns(turns: object, where: str) -> Messages:
    """Messages from a list of turns, each with role and content, or from and value. Raises UserError with `where`."""
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: expected a list of messages")
    messages = []
    for number, turn in enumerate(turns):
        role = (turn.get("role") or turn.get("from")) if isinstance(turn, dict) else None
        content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(f"{where}[{number}]: expected an object with role and content, both text")
        messages.append({"role": ROLES.get(role, role), "content": _encodable(content, f"{where}[{number}]")})
    return messages

"""Documents of a recipe's sources: out of files (convert/text_files.py) or data sets of the Hub.

Files are read in the order of the recipe, globs sorted. Twin: tests/distill/test_documents.py.
"""

import glob
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from convert.text_files import Document, check_file, is_blank, read_chat, read_file, read_text
from deltanet_errors import UserError, nearest

from .schema import Source


def find_files(source: Source) -> list[Path]:
    """The local files of a source. Raises UserError for a path or glob without one, for a kind of file unknown, and
    for a file named twice, of which what is held out would be trained on all the same."""
    files: list[Path] = []
    named: dict[Path, str] = {}
    for pattern in source.path or ():
        path = Path(os.path.expanduser(pattern))
        found = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
        if not found:
            siblings = [item.name for item in path.parent.glob("*")] if path.parent.is_dir() else []
            raise UserError(f"source {source.name}: {pattern}: no such file{nearest(path.name, siblings)}")
        for file in found:
            check_file(file, f"source {source.name}: {file}")
            first = named.get(file.resolve())
            if first is not None:
                raise UserError(f"source {source.name}: {file} is named twice, by {first} and {pattern}")
            named[file.resolve()] = pattern
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


def read_source(source: Source, files: list[Path]) -> Iterator[tuple[str, Document]]:
    """(place, document) of every document that is not blank, up to `max_documents`; not for preferences.

    Raises UserError with the place for what is not UTF-8, not JSON, or has no text or messages where they should be.
    """
    read = read_chat if source.kind == "chat" else read_text
    found = ((place, read(record, place, source.field)) for place, record in read_records(source, files))
    return itertools.islice((pair for pair in found if not is_blank(pair[1])), source.max_documents)


def read_records(source: Source, files: list[Path]) -> Iterator[tuple[str, object]]:
    """(place, record) of every record of a source as it stands there: text, or what JSON or parquet holds."""
    if not files:
        return _hub_records(source)
    return (found for file in files for found in read_file(file, source.separator))


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

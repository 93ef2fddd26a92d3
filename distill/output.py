"""The folder that a command writes to, refused before the work where nothing could be written.

Twin: tests/distill/test_output.py.
"""

import os
from pathlib import Path

from deltanet_errors import UserError


def output_folder(text: str | Path, option: str = "-o") -> Path:
    """The folder called `text`. Raises UserError, headed by `option`, for an empty name and as `check_folder`."""
    if not str(text):
        raise UserError(f"{option} '': the name of the folder is empty")
    check_folder(Path(text), option)
    return Path(text)


def check_folder(folder: Path, option: str) -> None:
    """Raises UserError where `folder`, or what is there of the path to it, is no folder or cannot be written."""
    try:
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    except OSError as error:
        raise UserError(f"{option} {folder}: {error.strerror}") from None
    if not existing.is_dir():
        raise UserError(f"{option} {folder}: {existing} is a file, not a folder")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{option} {folder}: {existing} is not writable")

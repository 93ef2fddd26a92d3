"""What a run says where its disk takes no more. Twin: tests/fault/test_whole_runs.py."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from deltanet_errors import DeltanetError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
NOTHING_LOST = "its commits are untouched, and the same command goes on once there is room"


@contextlib.contextmanager
def telling_of_no_room(folder: Path) -> Iterator[None]:
    """Turns the error of a disk that takes no more into one that says what is left to do."""
    try:
        yield
    except OSError as error:
        where = str(error.filename or "")
        if error.errno not in NO_ROOM or (where and not where.startswith(str(folder))):
            raise
        why = f"{where}: {error.strerror}" if where else error.strerror
        raise DeltanetError(f"{folder}: cannot be written: {why}; {NOTHING_LOST}") from error
    except SafetensorError as error:
        if not str(error).startswith("Error while serializing"):
            raise
        raise DeltanetError(f"{folder}: cannot be written: {error}; {NOTHING_LOST}") from error

"""What a run says is for people, and they may stop listening: `| tee log` dies of the same Ctrl-C that asks the run to
commit and end, `| head` has seen enough, a terminal is closed. None of that ends a run before its commit.

Twin: tests/distill/test_broken_pipe.py.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO


class _Lasting:
    """A stream that takes what is written to it also when nobody reads it any more."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with self._unheard():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._unheard():
            self._stream.flush()

    @contextlib.contextmanager
    def _unheard(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            # What the stream still holds, and what libraries write past it, goes nowhere from now on.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


@contextlib.contextmanager
def outliving_readers() -> Iterator[None]:
    """Within it standard output and error are `_Lasting`."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (None if stream is None else _Lasting(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before

"""SIGTERM, Ctrl-C and a terminal that closes (SIGHUP): the first asks the run to end (exit code 75), the second ends
the process at once, but for SIGHUP, which shell and kernel may both send. What nohup has it ignore stays ignored.

Everything a run keeps appears by a rename, so the first signal may cut almost any work: it raises where the work is
(`at_once`). Only training is not cut (`noted`): there the handler sets a flag, at which the loop looks after every
step, on all ranks together, and commits. Twins: tests/distill/test_interrupts.py, tests/fault/test_whole_runs.py.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

from deltanet_errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class _Cut(BaseException):
    """Raised by a signal in the middle of something; no `except Exception` on its way may take it for its own."""


class Interrupts:
    """Within the `with` block, `requested` is the name of the first signal that came, or None."""

    requested: str | None = None
    _cuts = False

    def __enter__(self) -> "Interrupts":
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            ours = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._note) for number in ours}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it the first signal ends the work wherever it is; Interrupted leaves the block."""
        try:
            self._cuts = True
            self._look()
            yield
            self._cuts = False
            self._look()
        except _Cut:
            raise Interrupted(
                f"stopped by {self.requested}; what is finished is kept, and the same command goes on from there"
            ) from None
        finally:
            self._cuts = False

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Within it, in a block `at_once`, a signal cuts nothing; one that nobody looked at ends the work after it."""
        self._look()
        self._cuts = False
        try:
            yield
        finally:
            self._cuts = True
        self._look()

    def _look(self) -> None:
        if self.requested is not None:
            raise _Cut

    def _note(self, number: int, _frame) -> None:
        if self.requested is not None and number == signal.SIGHUP:
            return
        if self.requested is not None:
            os._exit(128 + number)
        self.requested = signal.Signals(number).name
        if self._cuts:
            raise _Cut
        print(f"{self.requested}: stopping after a commit; once more stops at once", file=sys.stderr, flush=True)

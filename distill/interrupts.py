"""SIGTERM and Ctrl-C: the first asks the run to commit and stop (exit code 75), the second stops it at once.

A handler only sets a flag, so nothing is cut in the middle; the loop looks at it after every step, on all ranks
together, and whoever works long in between calls `check`. Twin: tests/distill/test_interrupts.py.
"""

import os
import signal
import sys
import threading

from deltanet.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupts:
    """Within the `with` block, `requested` is the name of the first signal that came, or None."""

    requested: str | None = None

    def __enter__(self) -> "Interrupts":
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        if self.requested is not None:
            os._exit(128 + number)
        self.requested = signal.Signals(number).name
        print(f"{self.requested}: stopping after a commit; once more stops at once", file=sys.stderr, flush=True)

    def check(self, what: str) -> None:
        """Raises Interrupted if a signal has come; `what` says what is on disk."""
        if self.requested is not None:
            raise Interrupted(f"stopped by {self.requested}; {what}")

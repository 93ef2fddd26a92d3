"""A progress line on stderr: a bar where a person watches, otherwise a plain line now and then."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

SILENCE = 10.0


@contextlib.contextmanager
def progress(label: str, total: float, unit: str = "") -> Iterator[Callable[[float], None]]:
    """Yields `advance(amount)`. Without a terminal it prints at most one line in SILENCE seconds."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"))
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda amount: bar.advance(task, amount)
        return
    done, last = 0.0, time.monotonic()

    def advance(amount: float) -> None:
        nonlocal done, last
        done += amount
        if time.monotonic() - last >= SILENCE:
            last = time.monotonic()
            counted = f" ({done:.4g} of {total:.4g} {unit})" if unit else ""
            print(f"{label}: {done / total:.0%}{counted}", file=sys.stderr, flush=True)

    yield advance

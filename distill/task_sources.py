"""Generated tasks in a run: what it measures at its end because it trained on it, and whether it can.

Twin: tests/distill/test_task_sources.py.
"""

from collections.abc import Sequence
from dataclasses import replace

from .evaluation.selection import Chosen
from .evaluation.subject import Reader
from .evaluation.tasks import TASKS
from .schema import Source


def trained_tasks(sources: Sequence[Source]) -> list[Chosen]:
    """The tasks of these sources, each at the very options it is trained on, under the name `trained on NAME`. Their
    examples are of the test split, which no training sees."""
    chosen = []
    for source in sources:
        if source.task is not None:
            name = f"trained on {source.name}"
            task = replace(
                TASKS[source.task], name=name, levels={"as trained": TASKS[source.task].options(source.options)}
            )
            chosen.append(Chosen(name, task, True))
    return chosen


def check_tasks(
    chosen: Sequence[Chosen], tokenizer, vocab_size: int, max_context: int, limit: int | None = None
) -> None:
    """Raises UserError for a generated task that was asked for and has no level that the model could be given, and for
    a row of a standard set (of its first `limit`) that is too long, so that a run does not find out at its end."""
    for one in chosen:
        if one.is_generated and one.is_named:
            one.task.fitting(tokenizer, vocab_size, seed=0, max_context=max_context)
        one.check(Reader(tokenizer, max_context, vocab_size), limit)

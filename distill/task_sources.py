"""Sources that are generated tasks: what a run that trains on them measures at its end.

Twin: tests/distill/test_task_sources.py.
"""

from collections.abc import Sequence
from dataclasses import replace

from .evaluation.selection import Chosen
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

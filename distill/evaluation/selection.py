"""Which tasks `--tasks` means: generated ones by name, `all` of them, `none`, NAME:FILE, and standard sets as files.

Twin: tests/distill/evaluation/test_selection.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from convert.text_files import kind_of
from deltanet_errors import UserError, nearest

from .result import TaskResult
from .sets import StandardSet, read_set
from .subject import Reader, Subject
from .tasks import TASKS
from .tasks.classification import FileTask

ALL, NONE = "all", "none"
GENERATED_EXAMPLES = {"cpu": 50, "cuda": 200}


@dataclass(frozen=True)
class Chosen:
    """A task that is to be run. is_generated: its examples are made from the seed, else they are those of a file.
    is_named: the user asked for it, so that it is an error where it cannot be run; `all` asks for those that can."""

    name: str
    task: object
    is_generated: bool
    is_named: bool = True

    @property
    def results(self) -> tuple[str, ...]:
        """The names of what it gives."""
        return (self.name,) if self.is_generated else self.task.results

    def run(
        self,
        subject: Subject,
        *,
        seed: int,
        limit: int | None,
        max_context: int,
        advance: Callable[[float], None] = lambda amount: None,
    ) -> list[TaskResult]:
        """The results on at most `limit` examples: by default GENERATED_EXAMPLES of a generated task, all of a file.
        `advance(share)` adds up to 1."""
        if self.is_generated:
            n = limit or GENERATED_EXAMPLES.get(subject.device.type, 50)
            result = self.task.run(subject, seed=seed, n=n, max_context=max_context)
            advance(1)
            return [result]
        return self.task.run(subject, limit=limit, advance=advance)

    def check(self, reader: Reader | Subject, limit: int | None) -> None:
        """Raises UserError where a row of a standard set is too long for the model, before hours go into others."""
        if not self.is_generated:
            self.task.requests(reader, limit)


def select(names: Sequence[str], option: str = "--tasks") -> list[Chosen]:
    """The tasks named, each once, in the order given. Raises UserError, headed by `option`, for a name that is neither
    a task nor a file, and one that names the line for a file that cannot be read."""
    if NONE in names:
        if len(names) > 1:
            raise UserError(f"{option} {' '.join(names)}: none stands alone")
        return []
    chosen: dict[str, Chosen] = {}
    for name in names:
        base, _, file = name.partition(":")
        if name == ALL:
            named = [task for task, one in chosen.items() if one.is_generated]
            generated = [task for task in TASKS if TASKS[task].levels and task not in named]
            found = [Chosen(task, TASKS[task], True, is_named=False) for task in generated]
        elif isinstance(TASKS.get(base), FileTask):
            found = [Chosen(name, TASKS[base].of(file), True)]
        elif name in TASKS:
            found = [Chosen(name, TASKS[name], True)]
        elif file and base in TASKS:
            takers = ", ".join(task for task in TASKS if isinstance(TASKS[task], FileTask))
            raise UserError(f"{option} {name}: {base} makes its examples and takes no file; those that do: {takers}")
        elif Path(name).is_file():
            found = [_standard(name)]
        elif name.endswith((".jsonl", ".json")) or "/" in name:
            kind = kind_of(name)
            raise UserError(f"{option} {name}: {'no such file' if kind is None else f'is {kind}, not a file'}")
        else:
            known = [*TASKS, ALL, NONE]
            raise UserError(
                f"{option} {name}: no such task{nearest(name, known)}; tasks: {', '.join(known)}, or a .jsonl file"
            )
        for one in found:
            for two in chosen.values():
                is_again = one.is_generated and two.is_generated and one.name == two.name
                for result in () if is_again else one.results:
                    if result in two.results:
                        raise UserError(f"{option} {name}: two results called {result}; give the file another name")
            chosen[one.name] = one
    return list(chosen.values())


def _standard(path: str) -> Chosen:
    found: StandardSet = read_set(path)
    return Chosen(found.name, found, False)

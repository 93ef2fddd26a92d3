"""What `deltanet-eval` does: measures, then prints the report, and with -o writes it in three forms.

Twin: tests/distill/evaluation/test_eval_command.py.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from convert.publish.manifest import MANIFEST
from deltanet_errors import UserError

from ..output import output_folder
from .evaluate import evaluate
from .markdown import markdown, short
from .page import page

NAME = "evaluation"
UNFINISHED = f"{NAME}.unfinished.json"


def run(arguments) -> None:
    """The command line: the report on standard output, as Markdown, what matters most once more at its end, or with
    --json as one object."""
    out = None if arguments.output is None else output_folder(arguments.output)
    if out is not None and (out / MANIFEST).is_file():
        raise UserError(f"-o {out}: a checkpoint whose {MANIFEST} would no longer fit; name a folder beside it")
    with _kept(out) as keep:
        report = evaluate(
            arguments.student,
            against=arguments.against,
            text=arguments.text,
            tasks=arguments.tasks,
            contexts=parse_contexts(arguments.contexts),
            tokens=arguments.tokens,
            window=arguments.window,
            limit=arguments.limit,
            task_context=arguments.task_context,
            parts=arguments.parts,
            seed=arguments.seed,
            device=arguments.device,
            dtype=arguments.dtype,
            keep=keep,
        )
        try:
            if out is not None:
                write_reports(out, report)
        finally:  # what took hours is told even where it cannot be written
            print(json.dumps(report, indent=2) if arguments.json else f"{markdown(report)}\n{short(report)}")
    if out is not None and not arguments.json:
        print(f"\npage: {out / NAME}.html")


@contextmanager
def _kept(folder: Path | None) -> Iterator[Callable[[dict], None]]:
    """Gives what keeps a report that is not finished, as UNFINISHED in `folder`; it stays there, and is told, where the
    block does not come to its end."""
    if folder is None:
        yield lambda report: None
        return
    file, is_kept = folder / UNFINISHED, False

    def keep(report: dict) -> None:
        nonlocal is_kept
        try:
            _write(folder, {UNFINISHED: json.dumps(report, indent=2) + "\n"})
            is_kept = True
        except UserError as error:  # no reason to end what may yet be printed
            print(error, file=sys.stderr)

    try:
        yield keep
    except BaseException:
        if is_kept:
            print(f"measured so far: {file}", file=sys.stderr)
        raise
    file.unlink(missing_ok=True)


def parse_contexts(words: list[str] | None) -> list[int] | None:
    """Numbers of tokens; () for `none`. Raises UserError for anything else."""
    if words is None or words == ["none"]:
        return words and []
    for word in words:
        if not re.fullmatch(r"\d{1,18}", word):
            raise UserError(f"--contexts {word}: allowed are numbers of tokens, or none alone")
    return [int(word) for word in words]


def write_reports(folder: Path, report: dict) -> None:
    """evaluation.json, .md and .html in `folder`, each whole or not at all. Raises UserError for a full disk."""
    forms = {"json": json.dumps(report, indent=2) + "\n", "md": markdown(report), "html": page(report)}
    _write(folder, {f"{NAME}.{suffix}": text for suffix, text in forms.items()})


def _write(folder: Path, files: dict[str, str]) -> None:
    """Writes all aside before the first takes its place; under the same names each time, so that what a killed process
    left there goes with the next report."""
    aside = {name: folder / f".{name}.tmp" for name in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            aside[name].write_text(text, encoding="utf-8")
        for name in files:
            os.replace(aside[name], folder / name)
    except OSError as error:
        raise UserError(f"{folder}: the report cannot be written: {error.strerror or error}") from error
    finally:
        for path in aside.values():
            with suppress(OSError):
                path.unlink()
